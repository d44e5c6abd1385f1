"""The optimizers that can be compared, by the name ``--optimizer`` takes.

``sgd``, ``adam`` and ``adamw`` are torch's own; a name that ends in ``+pre`` is the same optimizer, built by the same
call, with :class:`consistency_ops.Preconditioner` attached; ``sgd2`` is the method of arXiv 1708.00631 as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..optim import SGD2
from ..preconditioner import Preconditioner
from .errors import UserError

MOMENTUM = 0.9
# Steps of half a decade. Adaptive methods move every weight by about the rate, so their grid is one step lower.
# The grids have the same length: no method gets more trials than another.
GRADIENT_RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ADAPTIVE_RATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)

_SUFFIX = "+pre"
_TORCH: dict[str, tuple[Callable[..., Optimizer], tuple[float, ...], str]] = {
    "sgd": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=MOMENTUM), GRADIENT_RATES, f"SGD, momentum {MOMENTUM}"),
    "adam": (lambda p, lr: torch.optim.Adam(p, lr=lr), ADAPTIVE_RATES, "Adam"),
    "adamw": (lambda p, lr: torch.optim.AdamW(p, lr=lr), ADAPTIVE_RATES, "AdamW, weight decay 0.01"),
}
NAMES = (*_TORCH, *(name + _SUFFIX for name in _TORCH), "sgd2")
DEFAULT = ("sgd", "adam", "sgd+pre", "adam+pre")


@dataclass(frozen=True)
class Method:
    """An optimizer to compare. ``build(model, lr)`` returns an object that must be kept alive, and the optimizer."""

    name: str
    text: str
    rates: tuple[float, ...]
    preconditioned: bool
    build: Callable[[nn.Module, float], tuple[object, Optimizer]] = field(repr=False)


def choose_methods(names: list[str], options: dict[str, Any] | None = None) -> list[Method]:
    """Return the methods of these names in order; every ``Preconditioner`` gets ``options``."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise UserError(
            f"--optimizer: must be a comma list of {', '.join(NAMES)}; got {unknown[0] if unknown else 'none'!r}."
        )
    if len(set(names)) < len(names):
        raise UserError(f"--optimizer: each method once, got {', '.join(names)}.")
    return [_method(name, dict(options or {})) for name in names]


def _method(name: str, options: dict[str, Any]) -> Method:
    if name == "sgd2":
        return Method(name, "SGD2 as published", GRADIENT_RATES, True, _build_sgd2)
    base, suffix, _ = name.partition(_SUFFIX)
    make, rates, text = _TORCH[base]

    def build(model: nn.Module, lr: float) -> tuple[object, Optimizer]:
        optimizer = make(model.parameters(), lr)
        return (Preconditioner(model, optimizer, **options) if suffix else None), optimizer

    return Method(name, f"{text}, preconditioned" if suffix else text, rates, bool(suffix), build)


def _build_sgd2(model: nn.Module, lr: float) -> tuple[object, Optimizer]:
    return None, SGD2(model, lr=lr)
