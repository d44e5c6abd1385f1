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

import torch
from torch import nn

from ..ops.checks import check_module, check_numbers
from .batch_rms_norm import BatchRMSNorm

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Between a norm and its weights these let a factor per channel through.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.ReLU, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)


@torch.no_grad()
def fold_rms_norm(model: nn.Sequential) -> nn.Sequential:
    """A copy of ``model`` for evaluation without its RMS norms: each 1 / D is multiplied into the weights that follow.

    ``model`` is an ``nn.Sequential`` (nested ones too) that has been trained; its norms are frozen at their running
    statistics.  The copy computes the same outputs up to rounding, in fewer passes, and the product of the spectral
    norms of its weights, the "folded" bound, is smaller than that of ``model``, where the smallest D of each norm
    counts for all channels.  The copy is in evaluation mode.

    Raises:
        TypeError: ``model`` is not an ``nn.Sequential``.
        ValueError: a norm is not followed by a Linear or convolution layer; ReLU, pooling, dropout and Flatten of 1x1
            images may stand between.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"fold_rms_norm: model must be an nn.Sequential, got {type(model).__name__}")
    folded: list[nn.Module] = []
    gain = None  # 1 / D of the last norm, until a layer with weights takes it
    for name, module in _flat(model):
        module = copy.deepcopy(module)
        if isinstance(module, BatchRMSNorm):
            ones = torch.ones(1, module.num_features, device=module.running_ms.device, dtype=module.running_ms.dtype)
            here = module.eval()(ones)[0]
            gain = here if gain is None else gain * here
            continue
        if gain is not None and isinstance(module, _WEIGHTED):
            _scale_inputs(name, module, gain)
            gain = None
        elif gain is not None and not isinstance(module, (*_TRANSPARENT, nn.Flatten)):
            raise ValueError(
                "fold_rms_norm: a BatchRMSNorm must be followed by a Linear or convolution layer, got "
                f"{type(module).__name__} ({name})"
            )
        folded.append(module)
    if gain is not None:
        raise ValueError("fold_rms_norm: a BatchRMSNorm must be followed by a Linear or convolution layer, got the end")
    return nn.Sequential(*folded).eval()


def _scale_inputs(name: str, module: nn.Module, gain: torch.Tensor) -> None:
    weight, groups = module.weight, getattr(module, "groups", 1)
    if len(gain) != weight.shape[1] * groups:
        raise ValueError(
            f"fold_rms_norm: a BatchRMSNorm must have the channels of the layer after it ({name}), got {len(gain)} and "
            f"{weight.shape[1] * groups}"
        )
    per_output = gain.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
    weight.mul_(per_output.to(weight).view(*weight.shape[:2], *[1] * (weight.dim() - 2)))


def _flat(model: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    modules = []
    for name, module in model.named_children():
        nested = isinstance(module, nn.Sequential)
        modules += _flat(module, f"{prefix}{name}.") if nested else [(prefix + name, module)]
    return modules


@torch.no_grad()
def clip_spectral_norms_(model: nn.Module, limit: float = 1.0) -> float:
    """Project the weights of all Linear layers of ``model`` onto the matrices of spectral norm at most ``limit``.

    In place.  Singular values above ``limit`` become ``limit``: the nearest such matrix.  Call it every few steps of
    training; a decomposition of each weight is made, in float64.  Returns the largest spectral norm met.  Convolutions
    are left.

    Raises:
        ValueError: ``limit`` is not positive and finite. TypeError: ``model`` is not a module.
    """
    check_module("clip_spectral_norms_", model)
    check_numbers("clip_spectral_norms_", limit=limit)
    if not 0 < limit < math.inf:
        raise ValueError(f"clip_spectral_norms_: limit must be positive and finite, got {limit}")
    largest = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.numel():
            u, sigma, v = torch.linalg.svd(module.weight.double(), full_matrices=False)
            largest = max(largest, float(sigma[0]))
            if sigma[0] > limit:
                module.weight.copy_((u * sigma.clamp_max(limit)) @ v)
    return largest
