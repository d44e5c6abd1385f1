"""Contractive networks: what keeps the norm bound of arXiv 1708.00631 small, and what makes it tight.

For f = A_L N_L phi ... phi A_1 with 1-Lipschitz phi (modulus, ReLU) and RMS norms of denominators D, Lip(f) is at most
the product of the spectral norms of A over the product of the smallest D.  The recipe: modulus, RMS norms, and a
moderate weight decay (SGD2: about ten times its default), which shrinks every linear map while the norms bring the
signal back to its range; nothing is added to the loss.  Then :func:`fold_rms_norm`, which multiplies every 1 / D into
the weights that follow: the same function, with a far smaller bound.  :func:`clip_spectral_norms_` is the hard
constraint.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import conv
from torch.nn.parameter import UninitializedParameter

from ..ops.checks import check_module, check_numbers, type_name
from .batch_rms_norm import BatchRMSNorm
from .modulus import Modulus
from .originals import replaced
from .plain_layers import derived_weight, objection, recomputing_hooks, table_type

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLING = tuple(
    getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)
)
# f(d x) = d f(x) for every channel and d > 0: these let the factors of a norm through.
_HOMOGENEOUS = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    Modulus,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
_KNOWN = dict.fromkeys((BatchRMSNorm, nn.Linear, *_CONVOLUTIONS, *_POOLING, *_HOMOGENEOUS, nn.Flatten, nn.Sequential))
# Where activations, norms and the like are defined: the number of dimensions stays.
_SAME_SHAPE = tuple(
    f"torch.nn.modules.{part}"
    for part in ("activation", "batchnorm", "instancenorm", "normalization", "padding", "upsampling")
)
_AFTER = "fold_rms_norm: a BatchRMSNorm must be followed by a Linear or convolution layer, got"


@torch.no_grad()
def fold_rms_norm(model: nn.Sequential) -> nn.Sequential:
    """A copy of ``model`` for evaluation without its RMS norms: each 1 / D is multiplied into the weights that follow.

    ``model`` is an ``nn.Sequential`` (nested ones too) that has been trained; its norms are frozen at their running
    statistics. The copy computes the same outputs up to rounding, in fewer passes, and the product of the spectral
    norms of its weights, the "folded" bound, is smaller than that of ``model``, where the smallest D of each norm
    counts for all channels. The copy is in evaluation mode; a layer that stands at two places becomes two layers.

    Inputs are batches: Linear layers see ``(N, C)``, convolutions ``(N, C, *spatial)``. Between a norm and its weights
    may stand modulus, ReLU, LeakyReLU, PReLU, dropout, pooling over the pixels, and Flatten of 1x1 images.

    Raises:
        TypeError: ``model`` is not an ``nn.Sequential``, or has a forward of its own.
        ValueError: a norm is not followed by a Linear or convolution layer of its channels, or what stands between
            does not let a factor a channel through.
        NotImplementedError: a layer that does not compute what its type says (hooks, a replaced forward), or whose
            weight is recomputed (weight_norm, spectral_norm, parametrizations, pruning).
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"fold_rms_norm: model must be an nn.Sequential, got {type_name(model)}")
    if table_type(model, _KNOWN) is not nn.Sequential:
        raise TypeError(f"fold_rms_norm: model must be a plain nn.Sequential, got {type_name(model)} with a forward")
    if what := replaced():
        raise NotImplementedError(f"fold_rms_norm: {what}")
    folded: list[nn.Module] = []
    gain = None  # 1 / D of the last norm, until a layer with weights takes it
    spatial = None  # spatial dimensions of the signal; None where no layer has told
    for name, module in _flat(model):
        kind = table_type(module, _KNOWN)
        if kind is BatchRMSNorm or gain is not None:
            _refuse_if("fold_rms_norm", name, module, objection(module))
        weighted = kind in (nn.Linear, *_CONVOLUTIONS)
        if (gain is not None and weighted) or any(recomputing_hooks(module)):
            _refuse_if("fold_rms_norm", name, module, derived_weight(module))
        module = copy.deepcopy(module)
        if kind is BatchRMSNorm:
            ones = torch.ones(1, module.num_features, device=module.running_ms.device, dtype=module.running_ms.dtype)
            here = module.eval().forward(ones)[0]
            gain = here if gain is None else gain * here
            continue
        if gain is not None and not weighted and not _lets_pass(kind, module, spatial):
            raise ValueError(f"{_AFTER} {type(module).__name__} ({name})")
        if gain is not None and weighted:
            expected = 0 if kind is nn.Linear else module.weight.dim() - 2
            if spatial not in (None, expected):
                where = "a signal without pixels" if spatial == 0 else f"{spatial} dimensions of pixels"
                raise ValueError(f"{_AFTER} {type(module).__name__} ({name}) behind {where}")
            _scale_inputs(name, module, gain)
            gain = None
        spatial = _spatial(kind, module, spatial)
        folded.append(module)
    if gain is not None:
        raise ValueError(f"{_AFTER} the end")
    return nn.Sequential(*folded).eval()


def _flattens(module: Any) -> bool:
    return bool((module.start_dim, module.end_dim) == (1, -1))


def _lets_pass(kind: type[Any] | None, module: nn.Module, spatial: int | None) -> bool:
    """Whether a factor for every channel may be moved behind a module: pooling must not run over the channels."""
    if kind is not None and kind in _POOLING:
        return spatial == int(kind.__name__[-2])
    return kind in _HOMOGENEOUS or (kind is nn.Flatten and _flattens(module))


def _spatial(kind: type[Any] | None, module: Any, before: int | None) -> int | None:
    """Spatial dimensions of a module's output."""
    if kind in _CONVOLUTIONS or isinstance(module, conv._ConvTransposeNd):
        dims: int = module.weight.dim()
        return dims - 2
    if kind is nn.Flatten:
        return 0 if _flattens(module) else None
    same = kind is not None or type(module).__module__ in _SAME_SHAPE
    return before if same else None


def _refuse_if(op: str, name: str, module: nn.Module, reason: str) -> None:
    if reason:
        raise NotImplementedError(f"{op}: {name} ({type(module).__name__}): {reason}")


def _scale_inputs(name: str, module: Any, gain: Tensor) -> None:
    weight, groups = module.weight, getattr(module, "groups", 1)
    if len(gain) != weight.shape[1] * groups:
        raise ValueError(
            f"fold_rms_norm: a BatchRMSNorm must have the channels of the layer after it ({name}), got {len(gain)} and "
            f"{weight.shape[1] * groups}"
        )
    per_output = gain.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    weight.mul_(per_output.to(weight).view(*weight.shape[:2], *[1] * (weight.dim() - 2)))


def _flat(model: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """The modules in the order of their calls; one that is called twice comes twice."""
    _refuse_if("fold_rms_norm", prefix.rstrip(".") or "model", model, objection(model))
    modules: list[tuple[str, Any]] = []
    children: dict[str, Any] = model._modules
    for name, module in children.items():
        nested = table_type(module, _KNOWN) is nn.Sequential
        modules += _flat(module, f"{prefix}{name}.") if nested else [(prefix + name, module)]
    return modules


@torch.no_grad()
def clip_spectral_norms_(model: nn.Module, limit: float = 1.0) -> float:
    """Project the weights of all Linear layers of ``model`` onto the matrices of spectral norm at most ``limit``.

    In place. Singular values above ``limit`` become ``limit``: the nearest such matrix, real or complex. Call it every
    few steps of training; a decomposition of each weight is made, in double precision, and rounded to the type of the
    weight. Returns the largest spectral norm met. Convolutions are left.

    Raises:
        ValueError: ``limit`` is not positive and finite, or a weight is not finite.
        TypeError: ``model`` is not a module.
        NotImplementedError: a Linear layer whose weight is recomputed (weight_norm, spectral_norm, parametrizations,
            pruning), has no shape yet, or whose forward was replaced: nothing has been changed then.
    """
    check_module("clip_spectral_norms_", model)
    check_numbers("clip_spectral_norms_", limit=limit)
    if not 0 < limit < math.inf:
        raise ValueError(f"clip_spectral_norms_: limit must be positive and finite, got {limit}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in layers:
        replaced = "its forward was replaced on this object" if "forward" in vars(module) else ""
        lazy = isinstance(module._parameters.get("weight"), UninitializedParameter)
        shapeless = "its weight has no shape yet; call the model once" if lazy else ""
        _refuse_if("clip_spectral_norms_", name, module, replaced or shapeless or derived_weight(module))
        if not module.weight.isfinite().all():
            raise ValueError(f"clip_spectral_norms_: weights must be finite, got NaN or Inf in {name}.weight")
    largest = 0.0
    for _, module in layers:
        if module.weight.numel():
            wide = torch.complex128 if module.weight.is_complex() else torch.float64
            u, sigma, v = torch.linalg.svd(module.weight.to(wide), full_matrices=False)
            largest = max(largest, float(sigma[0]))
            if sigma[0] > limit:
                module.weight.copy_((u * sigma.clamp_max(limit)) @ v)
    return largest
