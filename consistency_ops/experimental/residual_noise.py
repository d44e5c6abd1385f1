"""Residual noise: a residual that is perturbed cannot stay in the kernel of the adjoint.

Section "noise injection" of arXiv 1708.00631, which gives no formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from ..ops.checks import check_module, check_names, check_numbers, shown, type_name


class ResidualNoise:
    """Adds noise to the residuals, the gradients at the outputs of layers: R <- R + scale rms(R) N(0, 1).

    The noise is added in backward, before the residual reaches the layer's weights and the layers below; forward passes
    and evaluation are unchanged.  rms is over the whole tensor, so that a residual of zeros stays zero.  The random
    numbers are torch's own, like those of dropout. ::

        noise = ResidualNoise(model, scale=1e-2, layers=["3", nn.Conv2d])

    Args:
        model: the network; forward hooks are put on the layers.
        scale: size of the noise relative to the residual, >= 0; about 1e-2.
        layers: module names, ``fnmatch`` patterns of names, or module types, whose output is one tensor.

    Raises:
        ValueError: ``scale`` out of range, or no layer that is meant.
        TypeError: an argument of the wrong type; from forward, when a layer's output is not a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 1e-2,
        layers: str | type[Any] | Iterable[str | type[Any]] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    ) -> None:
        check_module("ResidualNoise", model)
        check_numbers("ResidualNoise", scale=scale)
        if not 0 <= scale < math.inf:
            raise ValueError(f"ResidualNoise: scale must be at least 0 and finite, got {scale}")
        self.scale = scale
        wanted = check_names("ResidualNoise", "layers", layers)
        meant = [module for name, module in model.named_modules() if _is_meant(name, module, wanted)]
        if not meant:
            raise ValueError(f"ResidualNoise: layers must name modules of the model, got {shown(wanted)}")
        self._handles = [module.register_forward_hook(self._after_forward) for module in meant]

    def remove(self) -> None:
        """Add no more noise."""
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"ResidualNoise: outputs must be a Tensor, got {type_name(output)}")
        if not (module.training and output.requires_grad and torch.is_grad_enabled()):
            return output
        return _noisy_backward(output, self.scale)


def _is_meant(name: str, module: nn.Module, wanted: tuple[str | type[Any], ...]) -> bool:
    return any(isinstance(module, w) if isinstance(w, type) else fnmatchcase(name, w) for w in wanted)


class _NoisyBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()  # a view must not be overwritten in place, as nn.ReLU(inplace=True) does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rms = grad.float().square().mean().sqrt().to(grad.dtype)
        return grad + ctx.scale * rms * torch.randn_like(grad), None


_noisy_backward: Callable[[Tensor, float], Tensor] = _NoisyBackward.apply
