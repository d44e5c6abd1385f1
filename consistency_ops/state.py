"""Where the preconditioner keeps its tensors: in ``optimizer.state[weight]``, so that every way of saving keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

PREFIX = "consistency_"


class StateStore:
    """Entries of a layer: ``step``, and with ``decay`` or ``every`` also ``covariance``, ``weight``, ``inverse``, ``info``.

    Without an optimizer they are kept here, by the layer's name.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._own: dict[str, dict[str, Any]] = {}
        self._loading: Mapping[str, Any] = {}

    def get(self, name: str, weight: Tensor | None) -> dict[str, Any]:
        if self._optimizer is None:
            return self._own.get(name, {})
        entries = self._optimizer.state.get(weight, {}) if weight is not None else {}
        return {key[len(PREFIX) :]: value for key, value in entries.items() if _is_ours(key)}

    def put(self, name: str, weight: Tensor, key: str, value: Any) -> None:
        if self._optimizer is None:
            self._own.setdefault(name, {})[key] = value
        else:
            self._optimizer.state[weight][PREFIX + key] = value

    def clear(self) -> None:
        self._own.clear()
        if self._optimizer is not None:
            for entries in self._optimizer.state.values():
                for key in [key for key in entries if _is_ours(key)]:
                    del entries[key]

    def before_load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loading = state_dict

    def after_load(self, optimizer: Optimizer) -> None:
        """Take our tensors as they were saved: ``load_state_dict`` has cast them to the dtype of the weight."""
        saved, self._loading = self._loading, {}
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if _is_ours(name) and isinstance(value, Tensor):
                    optimizer.state[parameter][name] = value.detach().to(parameter.device, copy=True)


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)
