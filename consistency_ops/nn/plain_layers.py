"""Whether a module computes what its type says: no hooks, no forward of its own, a weight that is not recomputed.

Certificates and projections read ``module.weight`` and trust the type. What can make either false is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._hooks import nothing

_PACKAGE = __name__.partition(".")[0]
# Hooks of this package that read and never write: rows of the preconditioner and of SGD2, and the monitors.
_READERS = tuple(f"{_PACKAGE}.{part}" for part in ("engine.", "analysis.", "optim.sgd2"))
# Old-style hooks of torch that recompute a weight before every forward pass; in evaluation mode, from parameters alone.
_RECOMPUTE = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
# What a subclass may define without changing what forward computes.
_HARMLESS = frozenset({
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__dict__", "__weakref__",
    "__getstate__", "__setstate__", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__repr__",
    "__slots__", "__constants__", "__parameters__", "__orig_bases__", "__classcell__", "__firstlineno__",
    "__static_attributes__", "__annotate__", "__annotations_cache__", "__init_subclass__",
    "__abstractmethods__", "_abc_impl", "_version", "extra_repr", "reset_parameters", "_get_name", "train",
    "eval",
})  # fmt: skip


def table_type(module: nn.Module, table: Mapping[type, Any]) -> type | None:
    """The type in ``table`` whose forward pass ``module`` has: its own, or a base of which nothing is overridden."""
    passed: list[type] = []
    for kind in type(module).__mro__:
        if kind in table:
            known = (_PACKAGE + ".", "torch.nn.modules.")
            own = getattr(getattr(kind, "forward", None), "__module__", "").startswith(
                known
            )  # not replaced on the class itself
            overridden = any(hasattr(kind, name) and name not in _HARMLESS for c in passed for name in vars(c))
            return kind if own and not overridden else None
        passed.append(kind)
    return None


def _reads_only(hook: Callable[..., Any]) -> bool:
    return hook is nothing or str(getattr(hook, "__module__", "")).startswith(_READERS)


def recomputing_hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The old-style weight_norm, spectral_norm and pruning hooks of a module."""
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _RECOMPUTE))


def refresh_weights(module: nn.Module) -> None:
    """Recompute what old-style weight_norm, spectral_norm and pruning recompute before the next forward pass."""
    with torch.no_grad():
        for hook in list(recomputing_hooks(module)):
            hook(module, ())


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def objection(module: nn.Module) -> str:
    """Why calling the module may compute something else than the forward pass of its class; empty if nothing does."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            return f"its {name} has no shape yet; call the model once"
    everywhere = nn.modules.module
    for hook in (*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()):
        if not _reads_only(hook):
            return f"a forward hook of all modules ({_name(hook)}) may change what it computes"
    for what, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            recomputes = what == "forward pre-hook" and isinstance(hook, _RECOMPUTE)
            if not _reads_only(hook) and not recomputes:
                return f"its {what} ({_name(hook)}) may change what it computes"
    for name, value in vars(module).items():
        compiled = getattr(value, "_torchdynamo_orig_callable", None) == module._call_impl  # by module.compile()
        if callable(value) and hasattr(type(module), name) and not compiled:
            return f"its {name} was replaced on this object"
    calls = (type(module).__call__, type(module)._call_impl)
    if calls != (nn.Module.__call__, nn.Module._call_impl) and not isinstance(module, torch.fx.GraphModule):
        return "its class has a __call__ of its own"
    return ""


def derived_weight(module: Any, name: str = "weight") -> str:
    """What recomputes ``module.<name>``, so that a value written to it is lost; empty for a plain parameter."""
    for hook in recomputing_hooks(module):
        return f"{type(hook).__name__} recomputes its {name} before every forward pass"
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in module.parametrizations[name])
        return f"its {name} is computed by a parametrization ({kinds})"
    if not isinstance(module._parameters.get(name), Tensor):
        return f"its {name} is no parameter of its own"
    return ""


def unreadable_weight(module: Any) -> str:
    """Why the module's tensors do not say what it computes with; empty if they do, after :func:`refresh_weights`."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        precise = tensor.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
        if (tensor.is_floating_point() or tensor.is_complex()) and not precise:
            return f"its {name} is {tensor.dtype}, whose rounding is no continuous map; measure a float32 copy"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}, which may compute otherwise than a plain tensor"
    if parametrize.is_parametrized(module) and parametrize._cache_enabled:
        return "its weight may be a cached one; leave torch.nn.utils.parametrize.cached() first"
    with torch.no_grad():
        derived = "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor)
        if derived and not torch.allclose(module.weight, module.weight, rtol=0, atol=0, equal_nan=True):
            return "it has another weight at every access"
    return ""
