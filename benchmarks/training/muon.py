"""Muon for networks with convolutions, as one optimizer, so that trials of rates can put all of its state back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.peers.optimizers import MatrixMuon


class Muon(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` on every weight, Adam at the same rate on the rest; no decay."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        parameters = list(model.parameters())
        self._parts: list[torch.optim.Optimizer] = [MatrixMuon([p for p in parameters if p.dim() > 1], lr)]
        if rest := [p for p in parameters if p.dim() < 2]:
            self._parts.append(torch.optim.Adam(rest, lr=lr))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self._parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parts = state_dict["parts"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "parts"})
        for part, state in zip(self._parts, parts, strict=True):
            part.load_state_dict(state)
