"""Lipschitz constants in l2 of single operations, in evaluation mode; every number is the constant or an upper bound.

Two tables: ``MODULES`` by type, ``FUNCTIONS`` by the name that functions and methods of torch share. What is in neither
has no rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, dropout, instancenorm

from ..nn import BatchRMSNorm, Modulus, OrthogonalFilter
from ..nn.plain_layers import refresh_weights, table_type, unreadable_weight
from .lipschitz_factor import Factor, Shape, Site, Unbounded
from .operator_norm import convolution_norm, matrix_norm, wide

# ---- per-channel scalings: vectors that can be folded into neighbouring weights


def scaling(module: Any) -> Tensor | None:
    """|factor| of every channel of a normalisation that is frozen in evaluation mode; None for other modules."""
    kind = table_type(module, MODULES)
    if kind is BatchRMSNorm:
        ones = torch.ones(1, module.num_features, device=module.running_ms.device, dtype=module.running_ms.dtype)
        with torch.no_grad():
            scale: Tensor = module.forward(ones)[0].double()
        return scale
    if kind is not None and issubclass(kind, batchnorm._NormBase) and module.running_var is not None:
        if issubclass(kind, instancenorm._InstanceNorm) and not module.track_running_stats:
            return None  # its statistics are not used
        factors: Tensor = (module.running_var.double() + module.eps).rsqrt()
        return factors if module.weight is None else factors * module.weight.detach().double().abs()
    return None


def _frozen(module: Any, site: Site) -> Factor:
    factors = scaling(module)
    if factors is None:
        raise Unbounded("it has no running statistics, so that samples influence each other in evaluation, too")
    return Factor(float(factors.max()) if len(factors) else 0.0)


# ---- layers with weights


def _weight(module: Any) -> Tensor:
    """The weight that the next forward pass computes with, in double precision."""
    weight = module.weight.detach()
    if weight.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise Unbounded(f"its weight is {weight.dtype}, whose rounding is no continuous map; measure a float32 copy")
    return wide(weight)


def _linear(module: nn.Linear, site: Site) -> Factor:
    weight = _weight(module)
    if site.before is not None:
        weight = weight * site.before.repeat_interleave(weight.shape[1] // len(site.before))
    if site.after is not None:
        weight = weight * site.after[:, None]
    return Factor(*matrix_norm(weight))


def _convolution(module: Any, site: Site) -> Factor:
    weight, dims, groups = _weight(module), module.weight.dim() - 2, module.groups
    before, after = site.before, site.after
    if isinstance(module, conv._ConvTransposeNd):  # the adjoint of a convolution with the same kernel: the same norm
        before, after = after, before
    if before is not None:
        scale = before.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])
        weight = weight * scale.reshape(*weight.shape[:2], *[1] * dims)
    if after is not None:
        weight = weight * after.reshape(-1, *[1] * (dims + 1))
    options = {"stride": module.stride, "dilation": module.dilation, "groups": groups}
    if module.padding_mode == "circular" and site.shape is not None and _whole(module, site.shape):
        return Factor(*convolution_norm(weight, **options, circular=site.shape[-dims:]))
    value, exact = convolution_norm(weight, **options)
    note = "" if exact else "largest over all frequencies, for images of any size"
    if module.padding_mode != "zeros":
        repeats = _repeats(module.padding_mode, module._reversed_padding_repeated_twice)
        value, exact = value * math.sqrt(repeats), exact and repeats == 1
        note = f"times sqrt({repeats}) for {module.padding_mode} padding"
    return Factor(value, exact, note)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    """Pixels added before and after, by dimension; torch lists the last dimension first."""
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


def _repeats(mode: str, flat: Sequence[int]) -> int:
    """How often one pixel can appear after padding."""
    count = 1
    for before, after in _pairs(flat):
        before, after = max(before, 0), max(after, 0)
        # Reflected and circular pixels come once more on each side; the edge comes as often as it is replicated.
        count *= 1 + before + after if mode == "replicate" else 1 + (before > 0) + (after > 0)
    return count


def _whole(module: Any, shape: tuple[int, ...]) -> bool:
    """Whether every output of a circular convolution appears exactly once."""
    dims = module.weight.dim() - 2
    padding = _pairs(module._reversed_padding_repeated_twice)
    sizes = zip(shape[-dims:], padding, module.kernel_size, module.stride, module.dilation, strict=True)
    return all(n % s == 0 and (n + sum(p) - d * (k - 1) - 1) // s + 1 == n // s for n, p, k, s, d in sizes)


def _orthogonal(module: OrthogonalFilter, site: Site) -> Factor:
    """1 for the buffers that it was made with; they may have been loaded or changed since."""
    value = 1.0
    if "index" in module._buffers:
        value *= math.sqrt(float(torch.bincount(module.index, minlength=1).max())) if len(module.index) else 0.0
    if module.kind == "hadamard":
        made = OrthogonalFilter(module.features, "hadamard").sylvester
        if not torch.equal(module.sylvester.to(made), made):
            raise Unbounded("its Hadamard matrix was changed")
        value *= float(module.signs.detach().double().abs().max())
    if module.kind == "householder":
        lengths = module.vectors.detach().double().square().sum(1)
        value *= float(torch.clamp((1 - 2 * lengths).abs(), min=1).prod())
    return Factor(matrix_norm(module.weight)[0] if module.kind == "dense" else value)


# ---- pooling


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _overlap(kernel: int, stride: int, dilation: int = 1) -> int:
    """Largest number of windows along a line that contain one pixel."""
    return max(sum((x - j * dilation) % stride == 0 for j in range(kernel)) for x in range(stride))


def max_pool(kernel: Any, stride: Any, dilation: Any, indices: bool, dims: int) -> Factor:
    if indices:
        raise Unbounded("it returns indices, which jump")
    lines = zip(_each(kernel, dims), _each(stride or kernel, dims), _each(dilation, dims), strict=True)
    count = math.prod(_overlap(*line) for line in lines)
    return Factor(math.sqrt(count), True, f"a pixel is in up to {count} windows" if count > 1 else "")


def avg_pool(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_pad: bool, divisor: int | None, dims: int
) -> Factor:
    kernel, stride = _each(kernel, dims), _each(stride or kernel, dims)
    padded = any(_each(padding, dims))
    if (ceil_mode or (padded and not count_pad)) and divisor is None:
        # Windows at the border average fewer pixels. sqrt(largest row sum * largest column sum), Schur's bound.
        return Factor(math.sqrt(math.prod(map(_overlap, kernel, stride))), False, "windows of the border")
    weight = torch.full((1, 1, *kernel), 1 / (divisor or math.prod(kernel)), dtype=torch.float64)
    return Factor(*convolution_norm(weight, stride=stride))


def adaptive_avg_pool(output: Any, dims: int, shape: Shape) -> Factor:
    sizes = _each(output, dims)
    if shape is None:
        if any(size != 1 for size in sizes):
            raise Unbounded("its windows depend on the size of the image; pass an example input")
        return Factor(1.0, False, "less for larger images; pass an example input")
    value = 1.0
    for n, size in zip(shape[-dims:], sizes, strict=True):
        size = n if size is None else size
        line = nn.functional.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64), size)
        value *= matrix_norm(line)[0]
    return Factor(value)


def adaptive_max_pool(output: Any, indices: bool, dims: int) -> Factor:
    if indices:
        raise Unbounded("it returns indices, which jump")
    if set(_each(output, dims)) != {1}:
        raise Unbounded("its windows overlap by an amount that depends on the size of the image")
    return Factor(1.0)


def _dims(module: Any, kind: type[Any] | None = None) -> int:
    name = (kind or table_type(module, MODULES) or type(module)).__name__
    return int(name[-2])


def _avg_pooling(m: Any, site: Site) -> Factor:
    divisor = getattr(m, "divisor_override", None)
    return avg_pool(m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor, _dims(m))


# ---- normalisations by the sample itself


def _instance_scale(module: Any, site: Site) -> Factor:
    """Their slope is largest where the sample is constant."""
    weight, eps = getattr(module, "weight", None), module.eps
    if eps is None:  # RMSNorm: that of the signal's precision
        dtypes = [site.dtype or torch.float64] if weight is None else [weight.dtype, site.dtype or weight.dtype]
        eps = min(torch.finfo(dtype).eps for dtype in dtypes)
    gain = 1.0 if weight is None else float(weight.detach().double().abs().max())
    return Factor(
        gain / math.sqrt(eps) if eps > 0 else math.inf, False, "max |weight| / sqrt(eps): normalises by the sample"
    )


def _instance_norm(module: Any, site: Site) -> Factor:
    return _frozen(module, site) if scaling(module) is not None else _instance_scale(module, site)


# ---- elementwise functions by the largest slope; a and b are their numbers


def _at_least_one(slope: float) -> Factor:
    return Factor(max(1.0, abs(slope))) if not math.isnan(slope) else Factor(math.nan)


def _celu(alpha: float) -> Factor:
    if not alpha > 0:
        raise Unbounded(f"its slope has no bound for alpha = {alpha}")
    return Factor(1.0)


def _softplus(beta: float, threshold: float) -> Factor:
    if not (beta > 0 and threshold >= 20):
        raise Unbounded(f"it jumps where it turns into x, for beta = {beta} and threshold = {threshold}")
    return Factor(1.0)


def _threshold(at: float, value: float) -> Factor:
    if at != value:
        raise Unbounded(f"it jumps from {value} to {at}")
    return Factor(1.0)


def _hardshrink(limit: float) -> Factor:
    if limit > 0:
        raise Unbounded(f"it jumps from 0 to {limit}")
    return Factor(1.0)


def _log_softmax(dim: int | None, shape: Shape) -> Factor:
    """The rows of I - 1 p^T for probabilities p; the norm, convex in p, is largest where p is a unit vector."""
    if shape is None:
        raise Unbounded("its constant is the square root of the number of classes; pass an example input")
    if dim is None:
        dim = 0 if len(shape) in (0, 1, 3) else 1
    if dim % len(shape) == 0:
        raise Unbounded("it runs over the samples, of which there may be any number")
    return Factor(math.sqrt(shape[dim]))


def _glu(*_: Any) -> Factor:
    raise Unbounded("a product of two halves of the signal has no global Lipschitz constant")


def _constant(value: float) -> Callable[..., Factor]:
    return lambda *_: Factor(value)


def _prelu(module: nn.PReLU, site: Site) -> Factor:
    return _at_least_one(float(module.weight.detach().double().abs().max()))


# Maxima of the derivatives, rounded up; softmax: 2 p (1 - p), by Gershgorin's circles.
_GELU, _SILU, _MISH, _SELU = 1.12905, 1.09984, 1.08870, 1.0507009873554805 * 1.6732632423543772
_HARDSIGMOID, _HARDSWISH, _SOFTMAX = 0.16666668, 1.5, 0.5

# By type, function names, slope.
_ELEMENTWISE: list[tuple[type | None, str, float]] = [
    (nn.ReLU, "relu relu_", 1), (nn.ReLU6, "relu6", 1), (nn.Tanh, "tanh tanh_", 1), (nn.Softsign, "softsign", 1),
    (nn.Hardtanh, "hardtanh hardtanh_", 1), (nn.Tanhshrink, "tanhshrink", 1), (nn.LogSigmoid, "log_sigmoid", 1),
    (nn.Softshrink, "softshrink", 1), (nn.Sigmoid, "sigmoid sigmoid_", 0.25), (nn.GELU, "gelu", _GELU),
    (nn.Hardsigmoid, "hardsigmoid", _HARDSIGMOID), (nn.SiLU, "silu", _SILU), (nn.SELU, "selu selu_", _SELU),
    (nn.Mish, "mish", _MISH), (nn.Hardswish, "hardswish", _HARDSWISH), (Modulus, "modulus abs abs_", 1),
    (None, "sin sin_ cos cos_ neg neg_ negative pos", 1),
]  # fmt: skip
Numbers = list[tuple[str, int, float]]  # attribute, position in a call and default
# Activations whose slope depends on their numbers: names, numbers, constant.
_TURNED: dict[type[nn.Module], tuple[str, Numbers, Callable[..., Factor]]] = {
    nn.ELU: ("elu elu_", [("alpha", 1, 1.0)], _at_least_one),
    nn.CELU: ("celu celu_", [("alpha", 1, 1.0)], _celu),
    nn.LeakyReLU: ("leaky_relu leaky_relu_", [("negative_slope", 1, 0.01)], _at_least_one),
    nn.Softplus: ("softplus", [("beta", 1, 1.0), ("threshold", 2, 20.0)], _softplus),
    nn.Threshold: ("threshold threshold_ _threshold", [("threshold", 1, 0.0), ("value", 2, 0.0)], _threshold),
    nn.Hardshrink: ("hardshrink", [("lambd", 1, 0.5)], _hardshrink),
}

Get = Callable[[int, str, Any], Any]  # an argument of a call by position, name and default


def _module_slope(numbers: Numbers, constant: Callable[..., Factor]) -> Callable[[nn.Module, Site], Factor]:
    return lambda module, site: constant(*(getattr(module, name) for name, _, _ in numbers))


def _function_slope(numbers: Numbers, constant: Callable[..., Factor]) -> Callable[[Get, Site], Factor]:
    return lambda get, site: constant(*(get(position, name, default) for name, position, default in numbers))


def _random(get: Get, site: Site, position: int, value: float = 1.0) -> Factor:
    if get(position, "training", get(position, "train", True)):
        raise Unbounded("it is random in evaluation mode, too; pass training=self.training")
    return Factor(value)


def _rrelu(get: Get, site: Site) -> Factor:
    return _random(get, site, 3, _at_least_one((get(1, "lower", 1 / 8) + get(2, "upper", 1 / 3)) / 2).value)


def _mean(get: Get, site: Site) -> Factor:
    """Of the first dimension, the batch, the mean counts as 1: there may be a single sample."""
    if site.shape is None:
        return Factor(1.0, False, "less for larger signals; pass an example input")
    dims, rank = get(1, "dim", None), len(site.shape)
    dims = range(rank) if dims is None or dims == () else ((dims,) if isinstance(dims, int) else dims)
    return Factor(1 / math.sqrt(math.prod(site.shape[d] for d in dims if d % rank != 0)))


def _view(get: Get, site: Site) -> Factor:
    if isinstance(get(1, "dtype", None), torch.dtype):
        raise Unbounded("it reads the bits of numbers as other numbers")
    return Factor(1.0)


def _index(get: Get, site: Site) -> Factor:
    index = get(1, "index", None)
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index):
        raise Unbounded("it is indexed with more than numbers and slices, so that parts may repeat")
    if site.shape is not None and not (index[0] is None or index[0] is Ellipsis or index[0] == slice(None)):
        raise Unbounded("it picks samples of the batch, which others may then depend on")
    return Factor(1.0, False, "a part of the signal")


# ---- the tables


_REARRANGED = (
    "flatten reshape permute transpose squeeze unsqueeze contiguous clone detach pixel_shuffle pixel_unshuffle float "
    "double movedim swapaxes to positive t T mT H mH data real"
)


def _function_tables() -> dict[str, Callable[[Get, Site], Factor]]:
    table: dict[str, Callable[[Get, Site], Factor]] = {}
    for _, names, slope in _ELEMENTWISE:
        table.update(dict.fromkeys(names.split(), _constant(float(slope))))
    for names, numbers, constant in _TURNED.values():
        table.update(dict.fromkeys(names.split(), _function_slope(numbers, constant)))
    table.update(dict.fromkeys(_REARRANGED.split(), _constant(1.0)))
    table.update(dict.fromkeys(("softmax", "softmin"), _constant(_SOFTMAX)))
    table.update(dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), lambda g, s: _random(g, s, 2)))
    table["rrelu"] = lambda g, s: _random(
        g, s, 3, _at_least_one((g(1, "lower", 1 / 8) + g(2, "upper", 1 / 3)) / 2).value
    )
    table["log_softmax"] = lambda g, s: _log_softmax(g(1, "dim", None), s.shape)
    table.update(glu=_glu, mean=_mean, view=_view, getitem=_index)
    for d in (1, 2, 3):
        table.update(_pooling_functions(d))
    return table


def _pooling_functions(d: int) -> dict[str, Callable[[Get, Site], Factor]]:
    return {
        f"max_pool{d}d": lambda g, s: max_pool(
            g(1, "kernel_size", 1), g(2, "stride", None), g(4, "dilation", 1), g(6, "return_indices", False), d
        ),
        f"avg_pool{d}d": lambda g, s: avg_pool(
            g(1, "kernel_size", 1), g(2, "stride", None), g(3, "padding", 0), g(4, "ceil_mode", False),
            g(5, "count_include_pad", True), g(6, "divisor_override", None), d,
        ),
        f"adaptive_avg_pool{d}d": lambda g, s: adaptive_avg_pool(g(1, "output_size", 1), d, s.shape),
        f"adaptive_max_pool{d}d": lambda g, s: adaptive_max_pool(
            g(1, "output_size", 1), g(2, "return_indices", False), d
        ),
    }  # fmt: skip


def _of(prefix: str, home: Any = nn) -> list[type]:
    return [getattr(home, f"{prefix}{d}d") for d in (1, 2, 3)]


def _module_table() -> dict[type, Callable[[Any, Site], Factor]]:
    table: dict[type, Callable[[Any, Site], Factor]] = {}
    for kind, _, slope in _ELEMENTWISE:
        if kind is not None:
            table[kind] = _constant(float(slope))
    for kind, (_, numbers, constant) in _TURNED.items():
        table[kind] = _module_slope(numbers, constant)
    table[nn.PReLU] = _prelu
    table[nn.RReLU] = lambda m, s: _at_least_one((m.lower + m.upper) / 2)
    table[nn.GLU] = _glu
    table.update(dict.fromkeys((nn.Softmax, nn.Softmin, nn.Softmax2d), _constant(_SOFTMAX)))
    table[nn.LogSoftmax] = lambda m, s: _log_softmax(m.dim, s.shape)
    table.update(dict.fromkeys(SHARES_MEMORY, _constant(1.0)))
    for mode, word in (("Reflection", "reflect"), ("Replication", "replicate"), ("Circular", "circular")):
        table.update(dict.fromkeys(_of(f"{mode}Pad"), _padding(word)))
    table[OrthogonalFilter] = _orthogonal
    table[nn.Linear] = _linear
    table.update(dict.fromkeys([*_of("Conv"), *_of("ConvTranspose")], _convolution))
    table.update(dict.fromkeys([*_of("BatchNorm"), nn.SyncBatchNorm, BatchRMSNorm], _frozen))
    table.update(dict.fromkeys((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), _instance_scale))
    table.update(dict.fromkeys(_of("InstanceNorm"), _instance_norm))
    table.update(dict.fromkeys(_of("AvgPool"), _avg_pooling))
    for d in (1, 2, 3):
        table.update(_pooling_modules(d))
    return table


def _padding(word: str) -> Callable[[Any, Site], Factor]:
    return lambda m, s: Factor(math.sqrt(_repeats(word, m.padding)))


def _pooling_modules(d: int) -> dict[type, Callable[[Any, Site], Factor]]:
    return {
        getattr(nn, f"MaxPool{d}d"): lambda m, s: max_pool(m.kernel_size, m.stride, m.dilation, m.return_indices, d),
        getattr(nn, f"AdaptiveAvgPool{d}d"): lambda m, s: adaptive_avg_pool(m.output_size, d, s.shape),
        getattr(nn, f"AdaptiveMaxPool{d}d"): lambda m, s: adaptive_max_pool(m.output_size, m.return_indices, d),
    }


# Rearrangements, whose result may be their input.
SHARES_MEMORY = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, *_of("ZeroPad"), *_of("ConstantPad"),
)  # fmt: skip
MODULES = _module_table()
FUNCTIONS = _function_tables()
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(kind for kind, _, _ in _ELEMENTWISE if kind),
    *_TURNED,
    nn.PReLU,
    nn.RReLU,
    dropout._DropoutNd,
    nn.Identity,
)
ELEMENTWISE_NAMES: frozenset[str] = frozenset(
    name for names in (*(n for _, n, _ in _ELEMENTWISE), *(n for n, _, _ in _TURNED.values())) for name in names.split()
) | {"dropout", "rrelu", "clone", "contiguous", "detach", "float", "double", "to", "positive"}
# Linear over the complex numbers, or the modulus: the constants of the others are those of real signals.
_COMPLEX = (*SHARES_MEMORY, *_of("Conv"), *_of("ConvTranspose"), nn.Linear, Modulus)
_COMPLEX_NAMES = frozenset({
    "modulus", "abs", "neg", "neg_", "negative", "pos", "mean", "view", "getitem", "flatten", "reshape",
    "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "movedim", "swapaxes",
    "positive", "t", "T", "mT", "H", "mH", "data", "real", "dropout",
})  # fmt: skip

_NO_CONSTANT = {
    nn.Embedding: "a table of numbers is no continuous map; measure from its output on",
    nn.MultiheadAttention: "dot-product attention has no global Lipschitz constant",
    nn.Bilinear: "a product of two signals has no global Lipschitz constant",
    nn.modules.rnn.RNNBase: "recurrent modules have no rule here",
}


def no_constant(module: nn.Module) -> str:
    """Why this type of module has no constant; empty if it may have one."""
    return next((reason for kind, reason in _NO_CONSTANT.items() if isinstance(module, kind)), "")


def has_rule(module: nn.Module) -> bool:
    return table_type(module, MODULES) is not None


def _check_real(site: Site, known: bool) -> None:
    complex_signal = site.may_be_complex if site.dtype is None else site.dtype.is_complex
    if complex_signal and not known:
        raise Unbounded("its constant is known for real signals only, and this one may be complex")


def module_factor(module: nn.Module, site: Site) -> Factor:
    """The factor of a module at a place of the network."""
    if no_constant(module):
        raise Unbounded(no_constant(module))
    kind = table_type(module, MODULES)
    if kind is None:
        raise Unbounded("there is no rule for this module; give one with rules={Type: function}")
    refresh_weights(module)
    if unreadable_weight(module):
        raise Unbounded(unreadable_weight(module))
    _check_real(site, kind in _COMPLEX)
    return MODULES[kind](module, site)


def function_factor(name: str, get: Get, site: Site) -> Factor:
    """The factor of a function or method of torch."""
    if name not in FUNCTIONS:
        raise Unbounded(f"there is no rule for {name}; wrap it in a module and give one with rules={{Type: function}}")
    _check_real(site, name in _COMPLEX_NAMES)
    return FUNCTIONS[name](get, site)
