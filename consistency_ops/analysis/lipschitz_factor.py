"""What a rule of the Lipschitz bound is asked and answers: the site of an operation, and its factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = tuple[int, ...] | None
Rule = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Factor:
    """What one operation multiplies the bound by."""

    value: float
    exact: bool = True  # the operation's own constant, and not only an upper bound of it
    note: str = ""


@dataclass(frozen=True)
class Site:
    """Where an operation stands: what is known of its input, and the scalings that are folded into its weights."""

    shape: Shape = None
    dtype: torch.dtype | None = None
    may_be_complex: bool = False
    before: Tensor | None = None  # a factor for every input channel
    after: Tensor | None = None  # a factor for every output channel


class Unbounded(Exception):
    """An operation without a Lipschitz constant that is known here; the message says which and why."""
