"""Muon for networks with convolutions, as one optimizer, so that trials of rates can put all of its state back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon, and of its authors


class Muon(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` on every weight, convolutions flattened to matrices; Adam at the same rate on the rest.

    With momentum 0.95 of Nesterov, five iterations, and torch's rule ``match_rms_adamw``; no decay.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if p.dim() > 1:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                    update = orthogonal(p.grad.lerp(buffer, 0.95).flatten(1))
                    size = 0.2 * math.sqrt(max(update.shape))
                    p.sub_(update.view_as(p), alpha=group["lr"] * size)
                else:
                    state["step"] = state.get("step", 0) + 1
                    first = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    second = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 0.001)
                    scale = (second / (1 - 0.999 ** state["step"])).sqrt_().add_(1e-8)
                    p.sub_(first / scale, alpha=group["lr"] / (1 - 0.9 ** state["step"]))


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values close to 1, by five Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
