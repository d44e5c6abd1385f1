"""How a layer type maps to input rows and a gradient matrix; a registry for users' own layer types.

The correction needs two things of a layer: the rows of its input, one vector of units a row, and its weight gradient
with those units in dimension 1.  A linear layer has (..., in) and (out, in). For a convolution, transposed or not, the
units are the input channels and every pixel of every image is a row; padding, stride and dilation do not enter (arXiv
1708.00631, convolutions; only the correlation between feature maps is used).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..ops.checks import check_integers, shown
from .dtensors import is_dtensor, local, local_rows, shards_rows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class LayerType:
    """One weight of a module type, the input that it multiplies, and how both are laid out."""

    unit_dim: int
    weight: str
    bias: str | None
    matrix: Callable[[Tensor], Tensor] | None = None
    position: int = 0  # of the input among the arguments of forward
    keyword: str | None = None  # its name, if that is not the first keyword argument
    part: str = ""  # which weight it is, where a module has several
    groups: str | None = None  # the module's attribute that counts the groups of a convolution; None: there are none
    packed: bool = False  # whether the parameter holds the matrices of several layers, one after the other
    uncalled: tuple[str, ...] = ()  # children whose weight the module takes without calling them
    inside: bool = False  # whether it multiplies something that forward makes, and not its input

    @property
    def transposes(self) -> bool:
        """Whether it is a transposed convolution, whose every input passes all taps."""
        return False

    def view(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as (out, in) or (out, in / groups, *kernel)."""
        return weight if self.matrix is None else self.matrix(weight)

    def bias_view(self, bias: Tensor) -> Tensor:
        """The bias, or its gradient, as (out,)."""
        return bias

    def local_view(self, module: nn.Module, weight: Tensor) -> Tensor:
        """What this rank holds of :meth:`view`."""
        return local(self.view(module, weight))

    def local_bias_view(self, bias: Tensor) -> Tensor:
        """What this rank holds of :meth:`bias_view`."""
        return local(self.bias_view(bias))

    def copies(self, module: nn.Module) -> bool:
        """Whether :meth:`view` is a copy, which :meth:`write_back` must return to its place."""
        return False

    def write_back(self, module: nn.Module, matrix: Tensor, grad: Tensor) -> None:
        """Copy a corrected ``matrix`` of :meth:`view` to ``grad``; nothing to do where it is a view."""

    def num_groups(self, module: nn.Module) -> int:
        """Groups of a convolution; 1 for every other layer."""
        if self.groups is None:
            return 1
        groups: int = getattr(module, self.groups)
        return groups

    def num_taps(self, module: nn.Module) -> int:
        """Taps of a convolution's kernel; 1 for every other layer."""
        if self.unit_dim == -1:
            return 1
        size = getattr(module, "kernel_size", None)  # lazy layers know it before their weight
        if size is not None:
            return math.prod(size) if isinstance(size, tuple) else int(size)
        return self.view(module, self.parameter(module).detach()).shape[2:].numel()

    def parameter(self, module: nn.Module) -> Parameter:
        """The weight itself, which the module must have."""
        weight = module._parameters[self.weight]
        assert weight is not None
        return weight

    def units(self, module: nn.Module) -> int:
        """Length of an input row of this rank, without the bias."""
        return self.local_view(module, self.parameter(module)).shape[1] * self.num_groups(module)

    def all_units(self, module: nn.Module) -> int:
        """Also those that other ranks hold."""
        return self.view(module, self.parameter(module)).shape[1] * self.num_groups(module)


class TransposedConvolution(LayerType):
    """The weight is (in, out / groups, *kernel): a group's outputs lie inside its inputs."""

    @property
    def transposes(self) -> bool:
        return True

    def view(self, module: Any, weight: Tensor) -> Tensor:
        if module.groups == 1:
            return weight.transpose(0, 1)
        return torch.unflatten(weight, 0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)

    def copies(self, module: Any) -> bool:
        return bool(1 < module.groups < module.in_channels)

    def write_back(self, module: Any, matrix: Tensor, grad: Tensor) -> None:
        groups = (module.groups, -1)
        torch.unflatten(grad, 0, groups).transpose(1, 2).copy_(torch.unflatten(matrix, 0, groups))

    def units(self, module: nn.Module) -> int:
        return local(self.parameter(module)).shape[0]

    def all_units(self, module: nn.Module) -> int:
        return self.parameter(module).shape[0]


@dataclass(frozen=True)
class InProjection(LayerType):
    """Query, key or value weight of ``nn.MultiheadAttention``: a third of one matrix, or a matrix of its own."""

    def view(self, module: nn.Module, weight: Tensor) -> Tensor:
        return torch.unflatten(weight, 0, (3, -1))[self.position] if self.packed else weight

    def bias_view(self, bias: Tensor) -> Tensor:
        return torch.unflatten(bias, 0, (3, -1))[self.position]

    def local_view(self, module: nn.Module, weight: Tensor) -> Tensor:
        return self._local_part(weight) if self.packed and is_dtensor(weight) else super().local_view(module, weight)

    def local_bias_view(self, bias: Tensor) -> Tensor:
        return self._local_part(bias) if is_dtensor(bias) else self.bias_view(bias)

    def all_units(self, module: nn.Module) -> int:
        return self.parameter(module).shape[1]

    def _local_part(self, tensor: DTensor) -> Tensor:
        """A part may begin and end inside of a shard, so it is no DTensor of its own."""
        if not shards_rows(tensor):
            return local(tensor)  # such a layer is left alone
        size = len(tensor) // 3
        return local_rows(tensor, self.position * size, (self.position + 1) * size)


# What a module of no known type is taken for; it is never corrected.
UNSUPPORTED = LayerType(-1, "weight", None)

_TYPES: dict[type[nn.Module], LayerType] = {}


def register(
    module_type: type[nn.Module],
    *,
    unit_dim: int = -1,
    weight: str = "weight",
    bias: str | None = "bias",
    matrix: Callable[[Tensor], Tensor] | None = None,
    groups: str | None = None,
) -> None:
    """Make every later :class:`~consistency_ops.Preconditioner` cover ``module_type`` and its subclasses.

    Args:
        module_type: the layer's class. Its forward takes the input as first argument, and its output is linear in it.
        unit_dim: negative dimension of the input that counts the units: -1 for (..., in), -3 for (N, in, H, W).
        weight, bias: names of the parameters; ``bias=None`` if the layer adds none (or it must not be joined).
        matrix: returns a view of the weight, and of its gradient, as ``(out, in)`` or ``(out, in / groups, *kernel)``.
            ``None``: they already have that shape. It must be a view: the gradient is corrected through it, in place,
            and :class:`~consistency_ops.Preconditioner` refuses a copy.
        groups: name of the attribute that counts the groups of a convolution, ``"groups"`` for ``nn.Conv2d``. With
            ``None`` the layer has no groups, whatever attributes it has.

    Raises:
        TypeError: ``module_type`` is not a subclass of ``torch.nn.Module``, or another argument has the wrong type.
        ValueError: ``unit_dim`` is not negative.

    Example:
        A layer that stores its weight as (in, out), as the ``Conv1D`` of Hugging Face's GPT-2 does::

            co.layers.register(Conv1D, matrix=lambda weight: weight.T)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register: module_type must be a subclass of torch.nn.Module, got {shown(module_type)}")
    check_integers("register", unit_dim=unit_dim)
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, str) and not (name == "bias" and value is None):
            raise TypeError(f"register: {name} must be the name of a parameter, got {shown(value)}")
    if not (groups is None or isinstance(groups, str)):
        raise TypeError(f"register: groups must be the name of an attribute, got {shown(groups)}")
    if not (matrix is None or callable(matrix)):
        raise TypeError(f"register: matrix must be a function of the weight, got {shown(matrix)}")
    if unit_dim >= 0:
        raise ValueError(f"register: unit_dim must be negative (it counts from the last dimension), got {unit_dim}")
    _TYPES[module_type] = LayerType(unit_dim, weight, bias, matrix, groups=groups)


# Types of packages that need not be installed, by module and name.
_BY_NAME = {
    f"{module}.Conv1D": LayerType(-1, "weight", "bias", lambda weight: weight.T)  # a linear layer: (in, out)
    for module in ("transformers.pytorch_utils", "transformers.modeling_utils")
}
_BY_NAME["torch_geometric.nn.dense.linear.Linear"] = LayerType(-1, "weight", "bias")
# timm's casts its weight under TorchScript, and pads its input: neither changes the units.
_BY_NAME["timm.layers.linear.Linear"] = LayerType(-1, "weight", "bias")
_BY_NAME["timm.layers.conv2d_same.Conv2dSame"] = LayerType(-3, "weight", "bias", groups="groups")


# Experts in one parameter of three dimensions. All of them have one second moment, that of their pooled input rows:
# they are further outputs, as the taps of a convolution are. The first product of a module multiplies the input of its
# forward; the second one what the module has made of it.


def _experts_first(weight: Tensor) -> Tensor:
    return weight.permute(1, 2, 0)  # (experts, out, in)


def _experts_first_transposed(weight: Tensor) -> Tensor:
    return weight.permute(2, 1, 0)  # (experts, in, out)


def _of_a_package(module: nn.Module, base: type) -> tuple[LayerType, ...]:
    """What a class of transformers, torchtitan or loralib is, by the names of the class and of its parameters."""
    package, name = base.__module__.split(".")[0], base.__qualname__
    if package == "transformers" and name.endswith("Experts"):
        return _experts_of_transformers(module)
    if package == "transformers" and name.endswith(("TopKRouter", "TopkRouter")) and _has_plain_weight(module):
        return (LayerType(-1, "weight", "bias"),)  # a linear layer, whatever it makes of its output
    if package == "loralib" and name == "Linear":
        return tuple(
            LayerType(-1, key, None, part=key, inside=True)
            for key in ("lora_A", "lora_B")
            if module._parameters.get(key) is not None
        )
    if package == "torchtitan" and name == "GroupedExperts":
        return _expert_kinds(module, ("w1", "w3", "w2"), "w2", _experts_first)
    return ()


def _has_plain_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None and not isinstance(module, nn.Linear)


def _experts_of_transformers(module: nn.Module) -> tuple[LayerType, ...]:
    own = {key: p for key, p in module._parameters.items() if p is not None and p.dim() == 3}
    down, up = own.get("down_proj"), own.get("gate_up_proj", own.get("up_proj"))
    if up is None or down is None:
        return ()
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool):  # a class that does not say: the sizes tell, as gate and up are in one matrix
        transposed = up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
    matrix = _experts_first_transposed if transposed else _experts_first
    return _expert_kinds(module, ("gate_up_proj", "gate_proj", "up_proj", "down_proj"), "down_proj", matrix)


def _expert_kinds(
    module: nn.Module, keys: tuple[str, ...], inside: str, matrix: Callable[[Tensor], Tensor]
) -> tuple[LayerType, ...]:
    present = [key for key in keys if module._parameters.get(key) is not None]
    return tuple(LayerType(-1, key, None, matrix, part=key, inside=key == inside) for key in present)


def layer_types(module: nn.Module) -> tuple[LayerType, ...]:
    """What is registered for a module, or for its nearest base class; empty if nothing is."""
    base = _known_base(module)
    if base is None:
        return ()
    if base in _TYPES:
        return (_TYPES[base],)
    if isinstance(module, nn.MultiheadAttention) and base is nn.MultiheadAttention:
        return _in_projections(module)
    return (_BY_NAME[_full_name(base)],) if _full_name(base) in _BY_NAME else _of_a_package(module, base)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's class computes in another way than the class that is registered.

    Its weight may then multiply something else than the input: the normalised input, a quantised one.
    """
    base = _known_base(module)
    return base is not None and type(module).forward is not base.forward


def _known_base(module: nn.Module) -> type[nn.Module] | None:
    for base in type(module).__mro__:
        if base in _TYPES or base is nn.MultiheadAttention or _full_name(base) in _BY_NAME:
            return base
        if base.__module__.startswith(("transformers.", "torchtitan.", "loralib.")) and _of_a_package(module, base):
            return base
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def layer_type(module: nn.Module) -> LayerType | None:
    """What is registered for a module with one weight; None if nothing is."""
    kinds = layer_types(module)
    return kinds[0] if len(kinds) == 1 else None


def _in_projections(module: nn.MultiheadAttention) -> tuple[LayerType, ...]:
    packed = module._parameters.get("in_proj_weight") is not None
    return tuple(
        InProjection(
            unit_dim=-1,
            weight="in_proj_weight" if packed else f"{name[0]}_proj_weight",
            bias="in_proj_bias",
            position=i,
            keyword=name,
            part=f"in_proj.{name}",
            packed=packed,
            uncalled=("out_proj",),
        )
        for i, name in enumerate(("query", "key", "value"))
    )


register(nn.Linear)
register(nn.Conv1d, unit_dim=-2, groups="groups")
register(nn.Conv2d, unit_dim=-3, groups="groups")
register(nn.Conv3d, unit_dim=-4, groups="groups")
for _dims, _type in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 2):
    _TYPES[_type] = TransposedConvolution(-_dims, "weight", "bias", keyword="input", groups="groups")
