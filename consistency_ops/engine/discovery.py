"""Which layers of a model are corrected, and why the others are not."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .capture import Capture
from .dtensors import is_dtensor
from .layer import Layer
from .layer_types import UNSUPPORTED, LayerType, has_own_forward, layer_types

OWN_FORWARD = "forward of its own"
UNKNOWN = "unsupported type"
UNCALLED = "takes its weight and never calls it"
FLATTENED = "weight is flattened (FullyShardedDataParallel and DeepSpeed ZeRO 3 do that; fully_shard is supported)"


def find_layers(
    model: nn.Module, skip: tuple[str | type, ...], *, bias: bool, bias_of_kernels: bool = True
) -> list[Layer]:
    """All modules of ``model`` that own a parameter of two or more dimensions, in the order of ``named_modules``.

    A module with several weights is several layers.

    Args:
        model: is searched.
        skip: names, patterns and types of the modules that are left alone.
        bias: whether biases are joined to the units of their layers.
        bias_of_kernels: whether those of convolutions with several taps are, too.
    """
    modules = [(name.replace("_orig_mod.", ""), module) for name, module in model.named_modules()]
    owners = _owners(modules)
    for pattern in skip:
        if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name, _ in modules):
            warnings.warn(f"Preconditioner: skip pattern {pattern!r} matches no module", stacklevel=3)
    types = {id(module): layer_types(module) for _, module in modules}
    uncalled = {
        id(getattr(m, child, None)): type(m).__name__
        for _, m in modules
        for kind in types[id(m)]
        for child in kind.uncalled
    }
    layers: list[Layer] = []
    for name, module in modules:
        kinds = types[id(module)]
        if not kinds and not _matrices(module):
            continue
        for kind in kinds or (_unknown_kind(module),):
            reason = _reason(name, module, kind, skip)
            if reason is None and id(module) in uncalled:
                reason = f"{uncalled[id(module)]} {UNCALLED}"
            layer = Layer(".".join(filter(None, (name, kind.part))), weakref.ref(module), kind, len(layers), reason)
            layer.only_taken = kind.inside
            if kind.bias is not None and (
                reason is None or reason.startswith(OWN_FORWARD) or reason.endswith(UNCALLED)
            ):
                own_bias = module._parameters.get(kind.bias)
                fits = own_bias is not None and (is_lazy(own_bias) or own_bias.dim() == 1)
                wanted = bias and (bias_of_kernels or kind.num_taps(module) == 1)
                layer.joins_bias = wanted and fits and len(owners[id(own_bias)]) == 1
            layers.append(layer)
    return layers + _other_matrices(modules, types, len(layers))


def _matrices(module: nn.Module) -> list[str]:
    """Names of a module's parameters of two or more dimensions."""
    own = module._parameters.items()
    return [key for key, p in own if p is not None and (is_lazy(p) or p.dim() > 1)]


def _unknown_kind(module: nn.Module) -> LayerType:
    """What stands for a module of no known type: its weight, or the first of its matrices."""
    keys = _matrices(module)
    return UNSUPPORTED if "weight" in keys else LayerType(-1, keys[0], None, part=keys[0])


def _other_matrices(
    modules: list[tuple[str, nn.Module]], types: dict[int, tuple[LayerType, ...]], first: int
) -> list[Layer]:
    """Matrices beside the weight of a module, as loralib has them: listed, and corrected only if they are captured."""
    found: list[Layer] = []
    for name, module in modules:
        keys = _matrices(module)
        known = {kind.weight for kind in types[id(module)] or ((_unknown_kind(module),) if keys else ())}
        for key in keys:
            if key in known:
                continue
            kind, full = LayerType(-1, key, None, part=key), ".".join(filter(None, (name, key)))
            found.append(Layer(full, weakref.ref(module), kind, first + len(found), UNKNOWN))
    return found


def adopt_layer(layers: list[Layer], weight: Tensor) -> Layer | None:
    """Cover a weight that its user captures himself, though its module is of no known type, or is never called.

    Returns:
        Its layer, if it is a newly covered one.
    """
    layer = next((layer for layer in layers if layer.weight is weight), None)
    if layer is None or layer.reason is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if not layer.reason.startswith((UNKNOWN, OWN_FORWARD)) and not layer.reason.endswith(UNCALLED):
        return None
    layer.reason, layer.only_taken = None, True
    return layer


def find_new_layers(
    model: nn.Module, layers: list[Layer], skip: tuple[str | type, ...], **options: bool
) -> list[Layer]:
    """Add to ``layers`` what :func:`find_layers` finds and they have not; one that has the name of an old one takes its
    place. ``options`` are those of :func:`find_layers`.

    Returns:
        The new layers.
    """
    known = {(id(module), layer.kind.weight, layer.kind.part) for layer in layers if (module := layer.module())}
    places = {layer.name: layer.index for layer in layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of skip patterns: said before
        found = find_layers(model, skip, **options)
    new = []
    for layer in found:
        if (id(layer.module()), layer.kind.weight, layer.kind.part) in known:
            continue
        layer.index = layer.division_id = places.get(layer.name, len(layers))
        if layer.index == len(layers):
            layers.append(layer)
        else:
            old, layers[layer.index] = layers[layer.index], layer
            if old.capture is not None:
                old.capture.remove()
        new.append(layer)
    return new


def find_twins(module: nn.Module, kind: LayerType, weight: Tensor) -> bool:
    """Whether the same weight of a module is captured for the steps of an optimizer that is still there."""

    def captured() -> bool:
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Capture)]
        hooks = [hook for hook in hooks if hook.kind.weight == kind.weight and hook.kind.part == kind.part]
        owners = [hook.states.ownership() for hook in hooks if hook.states.ownership is not None]
        return any(owner is not None and owner.holds(weight) for owner in owners)

    if captured():
        gc.collect()  # one of an optimizer that was thrown away
    return captured()


def find_ties(layers: list[Layer]) -> None:
    """Note which weights belong to several modules."""
    modules = {id(module): (layer.module_name, module) for layer in layers if (module := layer.module()) is not None}
    owners = _owners(modules.values())
    for layer in layers:
        if layer.reason is None and (weight := layer.weight) is not None:
            names = owners[id(weight)]
            layer.tied = ", ".join(name for name in names if name != layer.module_name) if len(names) > 1 else ""


def _owners(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """Names of the modules that own a parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _reason(name: str, module: nn.Module, kind: LayerType, skip: tuple[str | type, ...]) -> str | None:
    """Why this layer is never corrected, or None."""
    if any(isinstance(module, s) if isinstance(s, type) else fnmatchcase(name, s) for s in skip):
        return "skipped"
    if not layer_types(module):
        return UNKNOWN
    if has_own_forward(module):
        return f"{OWN_FORWARD}, not registered"
    weight = module._parameters.get(kind.weight)
    if weight is None:
        return f"{kind.weight} {_computed_by(module, kind.weight)}"
    if not is_lazy(weight) and weight.dim() < 2:
        return FLATTENED
    if not is_lazy(weight) and not weight.numel():
        return "no units or no outputs"
    if not weight.is_floating_point():
        return f"unsupported dtype {weight.dtype}"
    if kind.matrix is not None and not is_lazy(weight) and not is_dtensor(weight):
        _check_matrix(name, module, kind, kind.matrix(weight.detach()), weight)
    return None


def _computed_by(module: nn.Module, key: str) -> str:
    """Why a weight is no parameter. The gradient of a computed one is gone at the step: there is nothing to correct."""
    parametrizations = getattr(module, "parametrizations", None)
    if parametrizations is not None and key in parametrizations:
        return f"is computed by {', '.join(type(part).__name__ for part in parametrizations[key])}"
    if f"{key}_g" in module._parameters:
        return "is computed by weight_norm"
    if f"{key}_orig" in module._parameters:
        return "is computed by a hook (spectral_norm, pruning)"
    if isinstance(getattr(module, key, None), Tensor):
        return "is not a parameter (FullyShardedDataParallel takes them, unless use_orig_params=True; use fully_shard)"
    return "is not a parameter of the module"


def _check_matrix(name: str, module: nn.Module, kind: LayerType, matrix: object, weight: Tensor) -> None:
    """A copy would be corrected, and the gradient itself left as it is, without a word."""
    view = isinstance(matrix, Tensor) and matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata
    if not isinstance(matrix, Tensor) or not view or matrix.dim() < 2:
        got = f"a {'view' if view else 'copy'} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else matrix
        raise ValueError(
            f"Preconditioner: matrix= of the registered {type(module).__name__} must return a view of the weight as "
            f"(out, in) or (out, in / groups, *kernel), got {got} for layer {name!r}"
        )
    bias = None if kind.bias is None else module._parameters.get(kind.bias)
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise ValueError(
            f"Preconditioner: matrix= of the registered {type(module).__name__} must have an output for each entry of "
            f"its bias, got {tuple(matrix.shape)} and {tuple(bias.shape)} for layer {name!r}"
        )
