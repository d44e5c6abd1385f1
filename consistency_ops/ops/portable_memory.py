"""How much memory the portable operators take beside their arguments: for the message when there is none.

Part of ``portable.py``, which says what holds for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .portable_matrices import blocks_of


def workspace_bytes(name: str, args: Sequence[Any]) -> int | None:
    """Bytes of the largest things that a correction keeps beside its arguments: matrices, factors, dealt rows."""
    if name == "foreach_inverse":
        return 3 * sum(int(m.numel() * m.element_size()) for m in args[0])
    if name not in ("foreach_precondition_", "foreach_covariance", "foreach_apply_", "foreach_correct_"):
        return None
    chunk = args[{"foreach_precondition_": 12, "foreach_apply_": 9}.get(name, 10)]
    given = args[0] if name == "foreach_covariance" else args[2]
    element = 8 if any(t.dtype == torch.float64 for t in (*args[0], *given)) else 4
    matrices, largest = 0, 0
    for i, of_layer in enumerate(args[0]):
        if name == "foreach_covariance":
            total, rows = of_layer.shape[args[7][i]], math.prod(of_layer.shape) // max(1, of_layer.shape[args[7][i]])
        elif name == "foreach_precondition_":
            x = given[i]
            total = x.shape[1 if of_layer.dim() > 2 and x.dim() == of_layer.dim() else -1]
            rows = x.numel() // max(1, total)
        else:
            total, rows = of_layer.shape[1], 0
        units = max(1, args[8][i] if name == "foreach_covariance" else of_layer.shape[1])
        of_part = sum(count * size * size for _, count, size in blocks_of(units, chunk))
        matrices += of_part * max(1, total // units) * element
        if name != "foreach_covariance":
            largest = max(largest, 3 * of_layer.numel() * element)
        largest = max(largest, min(rows, args[-3] if name != "foreach_precondition_" else args[13]) * total * element)
    return int((1 if name == "foreach_covariance" else 3) * matrices + largest)
