"""Which parameters an optimizer updates."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from .optimizers import AttachedOptimizer


class Ownership:
    """Tells whether a parameter belongs to the optimizer. Without an optimizer every parameter counts as owned."""

    def __init__(self, optimizer: AttachedOptimizer | None) -> None:
        self._optimizer = optimizer
        self._in_order: list[int] = []  # ids of the optimizer's parameters
        self.owned: Container[int] = _Everything() if optimizer is None else frozenset()  # ids of the parameters

    def refresh(self) -> bool:
        """Look at the optimizer's parameters again; returns whether others have come or gone."""
        if self._optimizer is None:
            return False
        now = [identity for group in self._optimizer.stepping.param_groups for identity in map(id, group["params"])]
        if now == self._in_order:
            return False
        self._in_order, self.owned = now, frozenset(now)
        return True

    @property
    def ids(self) -> frozenset[int] | None:
        """Of the parameters; None: all are owned."""
        return self.owned if isinstance(self.owned, frozenset) else None

    def owns(self, parameter: Tensor) -> bool:
        return id(parameter) in self.owned

    def holds(self, parameter: Tensor) -> bool:
        """As :meth:`owns`, for an optimizer that may have been given others since the last look."""
        return self._optimizer is None or any(p is parameter for p in self._optimizer.parameters)


class _Everything:
    """Contains all ids."""

    def __contains__(self, item: object) -> bool:
        return True
