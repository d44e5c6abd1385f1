"""The additive recurrence of ``roa_scan`` out of torch's own operations; half precision is computed in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# By the numbers of csrc/include/consistency_ops/roa_scan.h.
ACTIVATIONS = ("identity", "tanh", "sigmoid", "relu", "softsign", "modulus")
_MODULUS = ACTIVATIONS.index("modulus")
_PHI: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda s: s,
    torch.tanh,
    torch.sigmoid,
    torch.relu,
    functional.softsign,
    torch.abs,
)
# The derivative from what is kept: phi(s), and s of the modulus.
_SLOPE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.ones_like,
    lambda y: 1 - y * y,
    lambda y: y * (1 - y),
    lambda y: (y > 0).to(y.dtype),
    lambda y: (1 - y.abs()).square(),
    lambda s: 1 - 2 * (s < 0).to(s.dtype),
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the recurrence is computed in, from step to step."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _at(maps: Tensor | None, dims: int, step: int) -> Tensor | None:
    """The map of one step."""
    return maps if maps is None or maps.dim() == dims else maps[step]


def _filtered(h: Tensor, index: Tensor | None, filter: Tensor | None) -> Tensor:
    if index is not None:
        return h.index_select(1, index)
    return h if filter is None else h @ filter.T


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def roa_scan(
    drive: Tensor,
    initial: Tensor,
    weight: Tensor,
    index: Tensor | None,
    filter: Tensor | None,
    alpha: float,
    beta: float,
    activation: int,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = compute_dtype(drive.dtype), drive.shape
    states = drive.new_empty(shape)
    kept = drive.new_empty(shape if keep else (0, *shape[1:]))
    h, weight, filter = initial.to(dtype), weight.to(dtype), _wide(filter, dtype)
    for t in range(shape[0]):
        w = weight if weight.dim() == 2 else weight[t]
        s = drive[t].to(dtype) + h @ w.T
        y = _PHI[activation](s)
        h = torch.add(alpha * _filtered(h, _at(index, 1, t), _at(filter, 2, t)), y, alpha=beta)
        states[t] = h
        if keep:
            kept[t] = s if activation == _MODULUS else y
    return states, h.to(drive.dtype, copy=True, memory_format=torch.contiguous_format), kept


def roa_scan_backward(
    grad_states: Tensor | None,
    grad_last: Tensor | None,
    kept: Tensor,
    weight: Tensor,
    index: Tensor | None,
    filter: Tensor | None,
    alpha: float,
    beta: float,
    activation: int,
    grad_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """With autograd on, it can be differentiated itself: ``grad_kept`` is then what comes back for ``kept``."""
    dtype = compute_dtype(kept.dtype)
    deltas: list[Tensor] = []
    g = kept.new_zeros(kept.shape[1:], dtype=dtype) if grad_last is None else grad_last.to(dtype)
    weight, filter = weight.to(dtype), _wide(filter, dtype)
    back = None if filter is None else filter.mT
    for t in range(kept.shape[0] - 1, -1, -1):
        w = weight if weight.dim() == 2 else weight[t]
        if grad_states is not None:
            g = g + grad_states[t].to(dtype)
        to_phi = beta * g
        slope = _SLOPE[activation](kept[t].to(dtype))
        delta = to_phi * slope
        if grad_kept is not None:
            arrived = grad_kept[t].to(dtype)
            delta = delta + (arrived if activation == _MODULUS else arrived * slope)
        deltas.append(delta.to(kept.dtype))
        g = alpha * _filtered(g, _at(index, 1, t), _at(back, 2, t)) + delta @ w
    delta = torch.stack(deltas[::-1]) if deltas else kept.new_empty(kept.shape)
    return delta, g.to(kept.dtype, copy=True, memory_format=torch.contiguous_format)
