"""The additive recurrence, all steps in one operator: what ``nn.ROARNN`` and ``nn.ROAFeedForward`` compute.

The derivative is one more operator and the products for the weights. A derivative of the derivative goes step by step
through torch's own operations (``portable_scan.roa_scan_backward``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from . import portable_scan
from .registration import register_autograd, register_fake

NUMBERS = {name: number for number, name in enumerate(portable_scan.ACTIVATIONS)}

_scan: Callable[..., tuple[Tensor, Tensor, Tensor]] = ops.roa_scan.default
_scan_backward: Callable[..., tuple[Tensor, Tensor]] = ops.roa_scan_backward.default


def roa_scan(
    drive: Tensor,
    initial: Tensor,
    weight: Tensor,
    *,
    index: Tensor | None = None,
    filter: Tensor | None = None,
    alpha: float,
    beta: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """All states of ``h <- alpha O h + beta phi(x_t + W h)`` and the last one, from ``initial``.

    Args:
        drive: x, (steps, rows, units).
        initial: (rows, units).
        weight: W, (units, units), or (steps, units, units): one a step.
        index: O as a permutation, ``(O h)_j = h[index_j]``, (units) or (steps, units).
        filter: O as a matrix, (units, units) or (steps, units, units); with neither, O is the identity.
        activation: a name of ``portable_scan.ACTIVATIONS``.

    All tensors have one dtype. float64 is computed in float64, everything else in float32, and between the steps too:
    states are rounded where they are returned. Backward keeps two tensors of the size of ``drive``: the states, and
    the activations.
    """
    tensors = (drive, initial, weight)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    states, last, _ = _scan(drive, initial, weight, index, filter, alpha, beta, NUMBERS[activation], keep)
    return states, last


@register_fake("roa_scan")
def _(
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
    shape = drive.shape
    return drive.new_empty(shape), drive.new_empty(shape[1:]), drive.new_empty(shape if keep else (0, *shape[1:]))


@register_fake("roa_scan_backward")
def _(
    grad_states: Tensor | None,
    grad_last: Tensor | None,
    kept: Tensor,
    weight: Tensor,
    index: Tensor | None,
    filter: Tensor | None,
    alpha: float,
    beta: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    return kept.new_empty(kept.shape), kept.new_empty(kept.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, initial, weight, index, filter, ctx.alpha, ctx.beta, ctx.activation, *_ = inputs
    states, _, kept = output
    ctx.save_for_backward(initial, weight, index, filter, states, kept)
    ctx.set_materialize_grads(False)


def _inverse(index: Tensor | None) -> Tensor | None:
    if index is None:
        return None
    places = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    return torch.empty_like(index).scatter_(-1, index, places)


def _formula(
    ctx: Any, grad_states: Tensor | None, grad_last: Tensor | None, grad_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    initial, weight, index, filter, states, kept = ctx.saved_tensors
    if kept.shape != states.shape:
        raise RuntimeError("roa_scan: there is no derivative of a call with keep=False")
    rest = kept, weight, _inverse(index), filter, ctx.alpha, ctx.beta, ctx.activation
    if grad_kept is not None or torch.is_grad_enabled():
        delta, grad_initial = portable_scan.roa_scan_backward(grad_states, grad_last, *rest, grad_kept)
    else:
        delta, grad_initial = _scan_backward(grad_states, grad_last, *rest)
    grad_weight = _weight_gradient(delta, initial, states, weight) if ctx.needs_input_grad[2] else None
    return delta, grad_initial, grad_weight, *(None,) * 6


def _weight_gradient(delta: Tensor, initial: Tensor, states: Tensor, weight: Tensor) -> Tensor:
    """delta_t^T h_{t-1}, of every step or summed over them; without a copy of the states that begins with h_0."""
    if weight.dim() == 3:
        before = torch.cat([initial.unsqueeze(0), states[:-1]])
        return delta.transpose(1, 2) @ before
    if not len(states):
        return torch.zeros_like(weight)
    later = delta[1:].flatten(0, 1).T @ states[:-1].flatten(0, 1)
    return later + delta[0].T @ initial


register_autograd("roa_scan", _formula, setup_context=_setup)
