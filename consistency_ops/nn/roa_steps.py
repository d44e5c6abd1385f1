"""All steps of an additive network in one call of the operator ``roa_scan``, where nothing can tell the difference.

Whatever looks into the modules of a network, or replaces them, gets them called one by one: hooks, parametrisations,
adapters in the place of a layer, transforms of ``torch.func``, tensors that are not simply tensors.  Hooks that say
``takes_joined_calls`` get the inputs of all steps at once instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..ops.roa_scan import roa_scan
from .activations import ACTIVATIONS
from .orthogonal import OrthogonalFilter

_WIDEST = 1024  # units; beyond, torch's products serve more threads than there are rows
_NARROW, _MANY_ROWS = 128, 16  # a matrix that serves one step is first copied: worth it if small, or for many rows
_KINDS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")

_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch._C._is_tracing
_any_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook


def _calls_are_plain() -> bool:
    if torch.compiler.is_exporting() or _transforming():
        return False
    if torch.compiler.is_compiling():  # which cannot ask the others, and sees every module by itself
        return True
    return not (forward_ad._current_level >= 0 or _is_tracing() or _any_global_hook())


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return (
        type(module) is kind
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and all(getattr(hook, "takes_joined_calls", False) for hook in module._forward_pre_hooks.values())
    )


def _fits(like: Tensor, *tensors: Tensor | None) -> bool:
    """Plain tensors of one dtype on one CPU."""
    return all(
        t is None
        or (type(t) in (Tensor, nn.Parameter) and t.dtype == like.dtype and t.device == like.device and not t.is_nested)
        for t in (like, *tensors)
    )


def _filter_of(filters: Sequence[OrthogonalFilter], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The permutations, or else the matrices, of filters of one kind; both None for the identity."""
    kind = filters[0].kind
    if kind == "identity":
        return None, None
    if kind in ("permutation", "shift"):
        parts = [filter.index for filter in filters]
    elif kind == "dense":
        parts = [filter.weight for filter in filters]
    else:
        parts = [filter.matrix().to(dtype) for filter in filters]
    maps = parts[0] if len(parts) == 1 else torch.stack(parts)
    return (maps, None) if kind in ("permutation", "shift") else (None, maps)


def steps_at_once(
    drive: Tensor, initial: Tensor, layer: nn.Module, filter: nn.Module, phi: nn.Module, **options: Any
) -> tuple[Tensor, Tensor] | None:
    """The states (T, N, units) of a recurrent network and the last one; None: call its modules one by one.

    ``layer`` is without a bias; ``drive`` (T, N, units) has it. Who wants the inputs of ``layer`` has to be told:
    :func:`tell`.
    """
    if (
        drive.device.type != "cpu"
        or drive.dtype not in _KINDS
        or not _calls_are_plain()
        or not _are_plain([layer], [filter], phi, options["activation"])
        or drive.shape[-1] > _WIDEST
    ):
        return None
    weight = getattr(layer, "weight", None)  # a copy of nn.DataParallel has none that is a parameter
    if isinstance(weight, Tensor) and torch.is_autocast_enabled("cpu"):
        weight = weight.to(drive.dtype)  # as in a product whose other factor is like this
    if not isinstance(weight, Tensor) or not isinstance(filter, OrthogonalFilter) or not _fits(drive, initial, weight):
        return None
    index, matrix = _filter_of([filter], drive.dtype)
    if not _fits(drive, matrix):
        return None
    return roa_scan(drive, initial, weight, index=index, filter=matrix, **options)


def layers_at_once(
    x: Tensor, layers: Sequence[nn.Module], filters: Sequence[nn.Module], phi: nn.Module, **options: Any
) -> Tensor | None:
    """What ``layers``, which have biases, make of x (..., units); None: call the modules one by one."""
    if (
        not isinstance(x, Tensor)
        or x.device.type != "cpu"
        or x.dtype not in _KINDS
        or not x.dim()
        or not _calls_are_plain()
        or not _are_plain(layers, filters, phi, options["activation"])
    ):
        return None
    units = x.shape[-1]
    rows = x.reshape(-1, units)
    if not (units <= _NARROW or (units <= _WIDEST and len(rows) >= _MANY_ROWS)):
        return None
    weights, biases = _parameters(layers, units)
    if len(weights) != len(layers) or not _fits(x, *weights, *biases) or torch.is_autocast_enabled("cpu"):
        return None
    index, matrix = _filter_of([f for f in filters if isinstance(f, OrthogonalFilter)], x.dtype)
    if not _fits(x, matrix):
        return None
    drive = torch.stack(biases).unsqueeze(1).expand(-1, len(rows), -1)
    states, last = roa_scan(drive, rows, torch.stack(weights), index=index, filter=matrix, **options)
    if any(layer._forward_pre_hooks for layer in layers):
        for layer, before in zip(layers, (rows, *states[:-1].unbind()), strict=True):
            tell(layer, before.view(x.shape))
    return last.view(x.shape)


def _parameters(layers: Sequence[nn.Module], units: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the layers that have both and keep the number of units."""
    weights, biases = [], []
    for layer in layers:
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.shape == (units, units):
            weights.append(weight)
            biases.append(bias)
    return weights, biases


def _are_plain(layers: Sequence[nn.Module], filters: Sequence[nn.Module], phi: nn.Module, activation: str) -> bool:
    return (
        _is_plain(phi, ACTIVATIONS[activation])
        and all(_is_plain(layer, nn.Linear) for layer in layers)
        and all(_is_plain(filter, OrthogonalFilter) for filter in filters)
    )


def tell(layer: nn.Module, inputs: Tensor) -> None:
    """Call the hooks that look at the inputs of a layer, which is itself not called."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, (inputs,), {})  # as registered with_kwargs
