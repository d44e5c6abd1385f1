"""The options of the correction, checked once, and how a wrong one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops.arguments import Scaling
from ..ops.checks import MAX_WIDTH, shown


@dataclass(frozen=True)
class CorrectionOptions:
    """The options of :class:`consistency_ops.Preconditioner` that decide the arithmetic; checked when made.

    Raises:
        ValueError: an option is out of range or has the wrong type.
    """

    damping: float | Callable[[int], float]
    scaling: Scaling
    chunk: int | None
    group: int | None
    max_rows: int
    decay: float
    every: int
    bias: bool
    seed: int
    keep_norm: bool = True
    rows_dtype: torch.dtype | None = None
    outputs: bool = False
    dct: bool = False
    max_share: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.damping):
            check_damping(self.damping)
        check(isinstance(self.keep_norm, bool), "keep_norm", "True or False", self.keep_norm)
        check(isinstance(self.outputs, bool), "outputs", "True or False", self.outputs)
        check(isinstance(self.dct, bool), "dct", "True or False", self.dct)
        check(self.scaling in ("trace", "absolute"), "scaling", "'trace' or 'absolute'", self.scaling)
        allowed = self.chunk is None or is_int(self.chunk, 1, MAX_WIDTH)
        check(allowed, "chunk", f"None or in [1, {MAX_WIDTH}]", self.chunk)
        largest_group = self.chunk or MAX_WIDTH
        allowed = self.group is None or is_int(self.group, 1, largest_group)
        check(allowed, "group", f"None or in [1, {largest_group}]", self.group)
        check(is_int(self.max_rows, 1), "max_rows", "an integer >= 1", self.max_rows)
        check(
            self.rows_dtype is None or self.rows_dtype is torch.bfloat16,
            "rows_dtype",
            "None or torch.bfloat16",
            self.rows_dtype,
        )
        check(isinstance(self.decay, int | float) and 0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)
        check(is_int(self.every, 1), "every", "an integer >= 1", self.every)
        check(isinstance(self.bias, bool), "bias", "True or False", self.bias)
        check(is_int(self.seed, 0, 2**63 - 1), "seed", "an integer in [0, 2^63)", self.seed)
        share = self.max_share
        allowed = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < math.inf
        check(share is None or allowed, "max_share", "None or a finite number > 0", share)


def check(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"Preconditioner: {name} must be {requirement}, got {shown(value)}")


def check_damping(value: float, where: str = "") -> float:
    check(isinstance(value, int | float) and 0 <= value < math.inf, "damping" + where, "a finite number >= 0", value)
    return float(value)


def is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
