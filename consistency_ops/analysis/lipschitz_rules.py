"""Lipschitz constants in l2 of single modules, in evaluation mode; every number is the constant or an upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import BatchRMSNorm, Modulus, OrthogonalFilter
from .operator_norm import convolution_norm, matrix_norm


@dataclass(frozen=True)
class Factor:
    """What one operation multiplies the bound by."""

    value: float
    exact: bool = True  # the operation's own constant, and not only an upper bound of it
    note: str = ""


Shape = tuple[int, ...] | None


class Unbounded(Exception):
    """An operation without a Lipschitz constant that is known here; the message says which and why."""


# Per-channel scalings: vectors that can be folded into neighbouring weights.


def scaling(module: nn.Module) -> Tensor | None:
    """|factor| of every channel of a normalisation that is frozen in evaluation mode; None for other modules."""
    if isinstance(module, BatchRMSNorm):
        was = module.training
        ones = torch.ones(1, module.num_features, device=module.running_ms.device, dtype=module.running_ms.dtype)
        with torch.no_grad():
            factors = module.eval()(ones)[0]
        module.train(was)
        return factors.double()
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
        factors = (module.running_var.double() + module.eps).rsqrt()
        return factors if module.weight is None else factors * module.weight.detach().double().abs()
    return None


# Layers with weights.


def linear(module: nn.Linear, before: Tensor | None, after: Tensor | None) -> Factor:
    weight = module.weight.detach().double()
    if before is not None:
        weight = weight * before.repeat_interleave(weight.shape[1] // len(before))
    if after is not None:
        weight = weight * after[:, None]
    return Factor(*matrix_norm(weight))


def convolution(module: nn.Module, before: Tensor | None, after: Tensor | None, shape: Shape) -> Factor:
    weight, dims, groups = module.weight.detach().double(), module.weight.dim() - 2, module.groups
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if transposed:  # the adjoint of a convolution with the same kernel; its norm is the same
        before, after = after, before
    if before is not None:
        scale = before.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
        weight = weight * scale.reshape(*weight.shape[:2], *[1] * dims)
    if after is not None:
        weight = weight * after.reshape(-1, *[1] * (dims + 1))
    options = {"stride": module.stride, "dilation": module.dilation, "groups": groups}
    if module.padding_mode == "circular" and shape is not None and _whole(module, shape):
        return Factor(*convolution_norm(weight, **options, circular=shape[-dims:]))
    value, exact = convolution_norm(weight, **options)
    note = "" if exact else "largest over all frequencies, for images of any size"
    if module.padding_mode != "zeros":
        repeats = math.prod(_copies(module.padding_mode, *pair) for pair in _padding(module))
        value, exact = value * math.sqrt(repeats), exact and repeats == 1
        note = f"times sqrt({repeats}) for {module.padding_mode} padding"
    return Factor(value, exact, note)


def _padding(module: nn.Module) -> list[tuple[int, int]]:
    """Pixels added before and after, by dimension; _reversed_padding_repeated_twice lists them last dimension first."""
    flat = module._reversed_padding_repeated_twice
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


def _copies(mode: str, before: int, after: int) -> int:
    """How often one pixel can appear along a line after padding."""
    if mode == "replicate":
        return 1 + before + after
    return 1 + (before > 0) + (after > 0)  # reflect and circular: once more on each side


def _whole(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether every output of a circular convolution appears exactly once."""
    dims = module.weight.dim() - 2
    sizes = zip(shape[-dims:], _padding(module), module.kernel_size, module.stride, module.dilation, strict=True)
    return all(n % s == 0 and (n + sum(p) - d * (k - 1) - 1) // s + 1 == n // s for n, p, k, s, d in sizes)


# Pooling.


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _overlap(kernel: int, stride: int, dilation: int = 1) -> int:
    """Largest number of windows along a line that contain one pixel."""
    return max(sum((x - j * dilation) % stride == 0 for j in range(kernel)) for x in range(stride))


def max_pool(kernel, stride, dilation, dims: int) -> Factor:
    lines = zip(_each(kernel, dims), _each(stride or kernel, dims), _each(dilation, dims), strict=True)
    count = math.prod(_overlap(*line) for line in lines)
    return Factor(math.sqrt(count), True, f"a pixel is in up to {count} windows" if count > 1 else "")


def avg_pool(kernel, stride, padding, ceil_mode: bool, count_pad: bool, divisor: int | None, dims: int) -> Factor:
    kernel, stride = _each(kernel, dims), _each(stride or kernel, dims)
    padded = any(_each(padding, dims))
    if (ceil_mode or (padded and not count_pad)) and divisor is None:
        # Windows at the border average fewer pixels. sqrt(largest row sum * largest column sum), Schur's bound.
        return Factor(math.sqrt(math.prod(map(_overlap, kernel, stride))), False, "windows of the border")
    weight = torch.full((1, 1, *kernel), 1 / (divisor or math.prod(kernel)), dtype=torch.float64)
    return Factor(*convolution_norm(weight, stride=stride))


def adaptive_avg_pool(output: int | tuple[int | None, ...], dims: int, shape: Shape) -> Factor:
    sizes = _each(output, dims)
    if shape is None:
        if any(size != 1 for size in sizes):
            raise Unbounded("its windows depend on the size of the image; pass an example input")
        return Factor(1.0, False, "less for larger images; pass an example input")
    value = 1.0
    for n, size in zip(shape[-dims:], sizes, strict=True):
        size = n if size is None else size
        line = torch.nn.functional.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64), size)
        value *= matrix_norm(line)[0]
    return Factor(value)


def instance_scale(module: nn.Module) -> Factor:
    """Normalisations by the statistics of the sample itself: their slope is largest where the sample is constant."""
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    weight = getattr(module, "weight", None)
    gain = 1.0 if weight is None else float(weight.detach().double().abs().max())
    return Factor(gain / math.sqrt(eps), False, "max |weight| / sqrt(eps): normalises by the sample itself")


# Elementwise functions by the largest slope, for modules, functions and methods alike.

_GELU, _SILU, _SIXTH = 1.12905, 1.09984, 0.16666668  # maxima of the derivatives, rounded up
SLOPES: dict[str, float] = {
    "relu": 1, "relu_": 1, "relu6": 1, "tanh": 1, "sigmoid": 0.25, "softsign": 1, "hardtanh": 1, "hardsigmoid": _SIXTH,
    "softplus": 1, "gelu": _GELU, "silu": _SILU, "abs": 1, "modulus": 1, "sin": 1, "cos": 1, "neg": 1, "logsigmoid": 1,
    "softmax": 1, "selu": 1.0507009873554805 * 1.6732632423543772, "mish": 1.08850, "hardswish": 1.5,
    # Rearrangements.
    "flatten": 1, "view": 1, "reshape": 1, "permute": 1, "transpose": 1, "squeeze": 1, "unsqueeze": 1, "contiguous": 1,
    "clone": 1, "dropout": 1, "dropout1d": 1, "dropout2d": 1, "dropout3d": 1, "detach": 1, "pixel_shuffle": 1,
    "float": 1, "movedim": 1, "swapaxes": 1, "identity": 1, "to": 1, "positive": 1, "t": 1,
}  # fmt: skip

_SAME = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign,
    nn.Hardtanh, nn.Softplus, Modulus, nn.Softmax, nn.PixelShuffle, nn.PixelUnshuffle, OrthogonalFilter, nn.Tanhshrink,
    nn.LogSigmoid, nn.Softshrink, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d,
)  # fmt: skip


def _softsigned(module: nn.Module) -> Factor | None:
    """Activations whose slope depends on an argument."""
    if isinstance(module, nn.LeakyReLU):
        return Factor(max(1.0, abs(module.negative_slope)))
    if isinstance(module, nn.PReLU):
        return Factor(max(1.0, float(module.weight.detach().abs().max())))
    if isinstance(module, nn.ELU):
        return Factor(max(1.0, module.alpha))
    return None


def _pooling(module: nn.Module, shape: Shape) -> Factor | None:
    dims = next((int(d) for d in "123" if type(module).__name__.endswith(f"{d}d")), 1)
    if isinstance(module, nn.modules.pooling._MaxPoolNd):
        return max_pool(module.kernel_size, module.stride, module.dilation, dims)
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        divisor = getattr(module, "divisor_override", None)
        options = module.padding, module.ceil_mode, module.count_include_pad, divisor
        return avg_pool(module.kernel_size, module.stride, *options, dims)
    if isinstance(module, nn.modules.pooling._AdaptiveAvgPoolNd):
        return adaptive_avg_pool(module.output_size, dims, shape)
    if isinstance(module, nn.modules.pooling._AdaptiveMaxPoolNd) and set(_each(module.output_size, dims)) == {1}:
        return Factor(1.0)
    return None


_NO_CONSTANT = {
    nn.Embedding: "a table of numbers is no continuous map; measure from its output on",
    nn.MultiheadAttention: "dot-product attention has no global Lipschitz constant",
    nn.Bilinear: "a product of two signals has no global Lipschitz constant",
    nn.modules.rnn.RNNBase: "recurrent modules have no rule here",
}


def no_constant(module: nn.Module) -> str:
    """Why this type of module has no constant; empty if it may have one."""
    return next((reason for kind, reason in _NO_CONSTANT.items() if isinstance(module, kind)), "")


def is_own(module: nn.Module) -> bool:
    """Whether the module computes what its type of torch.nn, or of this package, does: no forward of the user's."""
    kind = next(c for c in type(module).__mro__ if c.__module__.startswith(("torch.", "consistency_ops.")))
    return type(module).forward is kind.forward


def has_rule(module: nn.Module) -> bool:
    if not is_own(module):
        return False
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return True
    try:
        return module_factor(module, None, None, None) is not None
    except Unbounded:
        return True


def module_factor(module: nn.Module, before: Tensor | None, after: Tensor | None, shape: Shape) -> Factor | None:
    """The factor of a module whose input is scaled by ``before`` and whose output by ``after``; None: no rule."""
    if isinstance(module, nn.Linear):
        return linear(module, before, after)
    if isinstance(module, nn.modules.conv._ConvNd):
        return convolution(module, before, after, shape)
    factors = scaling(module)
    if factors is not None:
        return Factor(float(factors.max()) if len(factors) else 0.0)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise Unbounded("it has no running statistics, so that samples influence each other in evaluation, too")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        return instance_scale(module)
    if no_constant(module):
        raise Unbounded(no_constant(module))
    if isinstance(module, _SAME):
        return Factor(1.0)
    if isinstance(module, nn.Sigmoid | nn.Hardsigmoid | nn.GELU | nn.SiLU | nn.SELU | nn.Mish | nn.Hardswish):
        return Factor(SLOPES[type(module).__name__.lower()])
    return _softsigned(module) or _pooling(module, shape)


Rule = Callable[[nn.Module], float]
