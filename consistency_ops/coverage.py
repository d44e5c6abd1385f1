"""Which layers of a model are corrected, and why the others are not."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

from .capture import Capture
from .distributed import FLATTENED
from .layers import LayerType, layer_type


@dataclass(eq=False)
class Layer:
    """A module with a weight of two or more dimensions, covered or not."""

    name: str
    module: weakref.ref[nn.Module]
    kind: LayerType | None
    index: int  # among all layers; third argument of the random division
    reason: str | None  # why it is never corrected, or None
    joins_bias: bool = False
    capture: Capture | None = None
    info: Tensor | None = None  # of the last step, one entry a chunk; None: nothing was launched
    damping: Tensor | None = None  # used by the last inversion
    unfit_gradient: bool = False
    pending: dict[str, Any] = field(default_factory=dict)  # entries to store after the optimizer's step

    @property
    def units(self) -> int:
        """Of one convolution group, the bias included; the weight must be initialised."""
        module = self.module()
        return self.kind.units(module) // self.kind.groups(module) + self.joins_bias

    @property
    def weight(self) -> Parameter | None:
        module = self.module()
        return None if module is None or self.kind is None else module._parameters.get(self.kind.weight)


def find_layers(model: nn.Module, skip: tuple[str | type, ...], bias: bool) -> list[Layer]:
    """All modules of ``model`` that own a parameter of two or more dimensions, in the order of ``named_modules``."""
    modules = [(name.replace("_orig_mod.", ""), module) for name, module in model.named_modules()]
    owners: dict[int, list[str]] = {}
    for name, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for pattern in skip:
        if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name, _ in modules):
            warnings.warn(f"Preconditioner: skip pattern {pattern!r} matches no module", stacklevel=4)
    layers: list[Layer] = []
    for name, module in modules:
        kind = layer_type(module)
        own = [p for p in module._parameters.values() if p is not None]
        if kind is None and not any(is_lazy(p) or p.dim() > 1 for p in own):
            continue
        layer = Layer(name, weakref.ref(module), kind, len(layers), _reason(name, module, kind, skip, owners))
        if layer.reason is None and kind.bias is not None:
            own_bias = module._parameters.get(kind.bias)
            layer.joins_bias = bias and own_bias is not None and len(owners[id(own_bias)]) == 1
        layers.append(layer)
    return layers


def _reason(
    name: str,
    module: nn.Module,
    kind: LayerType | None,
    skip: tuple[str | type, ...],
    owners: Mapping[int, list[str]],
) -> str | None:
    """Why this layer is never corrected, or None."""
    if any(isinstance(module, s) if isinstance(s, type) else fnmatchcase(name, s) for s in skip):
        return "skipped"
    if kind is None:
        return "unsupported type"
    weight = module._parameters.get(kind.weight)
    if weight is None:
        return f"{kind.weight} is not a parameter of the module"
    if len(owners[id(weight)]) > 1:
        return "tied with " + ", ".join(owner for owner in owners[id(weight)] if owner != name)
    if not is_lazy(weight) and weight.dim() < 2:
        return FLATTENED
    if not weight.is_floating_point():
        return f"unsupported dtype {weight.dtype}"
    return None
