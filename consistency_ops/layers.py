"""How a layer type maps to input rows and a gradient matrix; a registry for users' own layer types.

The correction needs two things of a layer: the rows of its input, one vector of units a row, and its weight gradient
with those units in dimension 1.  A linear layer has (..., in) and (out, in). For a convolution the units are the input
channels and every pixel of every image is a row; padding, stride and dilation do not enter (arXiv 1708.00631,
convolutions; only the correlation between feature maps is used).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .distributed import local


@dataclass(frozen=True)
class LayerType:
    """What :func:`register` stores for a module type."""

    unit_dim: int
    weight: str
    bias: str | None
    matrix: Callable[[Tensor], Tensor] | None

    def view(self, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as (out, in) or (out, in / groups, *kernel)."""
        return weight if self.matrix is None else self.matrix(weight)

    def groups(self, module: nn.Module) -> int:
        return getattr(module, "groups", 1)

    def units(self, module: nn.Module) -> int:
        """Length of an input row, without the bias."""
        return local(self.view(module._parameters[self.weight])).shape[1] * self.groups(module)


_TYPES: dict[type[nn.Module], LayerType] = {}


def register(
    module_type: type[nn.Module],
    *,
    unit_dim: int = -1,
    weight: str = "weight",
    bias: str | None = "bias",
    matrix: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Make every later :class:`~consistency_ops.Preconditioner` cover ``module_type`` and its subclasses.

    Args:
        module_type: the layer's class. Its forward takes the input as first argument, and its output is linear in it.
        unit_dim: negative dimension of the input that counts the units: -1 for (..., in), -3 for (N, in, H, W).
        weight, bias: names of the parameters; ``bias=None`` if the layer adds none (or it must not be joined).
        matrix: returns a view of the weight, and of its gradient, as (out, in) or (out, in / groups, \\*kernel).
            ``None``: they already have that shape. It must be a view: the gradient is corrected through it, in place.

    Raises:
        TypeError: ``module_type`` is not a subclass of ``torch.nn.Module``.
        ValueError: ``unit_dim`` is not negative.

    Example:
        A layer that stores its weight as (in, out), as the ``Conv1D`` of Hugging Face's GPT-2 does::

            co.layers.register(Conv1D, matrix=lambda weight: weight.T)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register: module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if unit_dim >= 0:
        raise ValueError(f"register: unit_dim must be negative (it counts from the last dimension), got {unit_dim}")
    _TYPES[module_type] = LayerType(unit_dim, weight, bias, matrix)


def layer_type(module: nn.Module) -> LayerType | None:
    """The registered type of a module, of the nearest base class if several are; None if there is none."""
    return next((_TYPES[base] for base in type(module).__mro__ if base in _TYPES), None)


register(nn.Linear)
register(nn.Conv1d, unit_dim=-2)
register(nn.Conv2d, unit_dim=-3)
register(nn.Conv3d, unit_dim=-4)
