"""Every rule of the Lipschitz bound, in networks of one operation where it is nearly reached, and traps."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import consistency_ops as co

from .lipschitz_networks import Function, modulus_of, norm_with_statistics

FEATURES, LINE, IMAGE, VOLUME = (24,), (4, 9), (4, 5, 6), (4, 2, 3, 2)
SPATIAL = {1: LINE, 2: IMAGE, 3: VOLUME}


def statistics(norm):
    """Running statistics and weights as after some training."""
    nn.init.uniform_(norm.running_var, 0.1, 4)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, -2, 2)
    return norm


def scaled(norm):
    nn.init.uniform_(norm.weight, -2, 2)
    return norm


def of(prefix, d):
    return getattr(nn, f"{prefix}{d}d")


def _elementwise():
    plain = (
        nn.ReLU, nn.ReLU6, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.Tanhshrink, nn.LogSigmoid, nn.Softshrink, nn.Sigmoid,
        nn.GELU, nn.Hardsigmoid, nn.SiLU, nn.SELU, nn.Mish, nn.Hardswish, co.nn.Modulus,
    )  # fmt: skip
    cases = {kind: [(kind, FEATURES)] for kind in plain}
    for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.SELU, nn.Mish, nn.Hardswish):
        cases[kind].append((lambda kind=kind: kind(inplace=True), FEATURES))
    cases[nn.GELU].append((lambda: nn.GELU("tanh"), FEATURES))
    numbers = {
        nn.ELU: [(0.5,), (3.0,), (-2.0,), (2.0, True)],
        nn.CELU: [(0.5,), (2.0, True)],
        nn.LeakyReLU: [(0.2,), (3.0,), (-4.0,), (5.0, True)],
        nn.Softplus: [(1.0,), (3.0, 30.0)],
        nn.Threshold: [(0.5, 0.5), (-1.0, -1.0, True)],
        nn.Hardshrink: [(0.0,)],
        nn.PReLU: [(1, 1.5), (24, 0.2)],
        nn.RReLU: [(1.0, 3.0), (0.1, 0.3, True)],
    }
    for kind, several in numbers.items():
        cases[kind] = [(lambda kind=kind, values=values: kind(*values), FEATURES) for values in several]
    return cases


def _filter(kind):
    return lambda: co.nn.OrthogonalFilter(6, kind)


def module_cases():
    """By type: (maker, shape of a sample), so that the constant is reached by half at least."""
    cases = _elementwise()
    softmaxes = {nn.Softmax: (2,), nn.Softmin: (2,), nn.LogSoftmax: (4,)}
    cases.update({kind: [(lambda kind=kind: kind(1), shape)] for kind, shape in softmaxes.items()})
    cases[nn.Softmax2d] = [(nn.Softmax2d, (2, 3, 3))]
    for kind in (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout):
        cases[kind] = [(kind, IMAGE)]
    cases[nn.Flatten] = [(nn.Flatten, IMAGE), (lambda: nn.Flatten(1, 2), IMAGE)]
    cases[nn.Unflatten] = [(lambda: nn.Unflatten(1, (4, 6)), FEATURES)]
    cases[nn.PixelShuffle] = [(lambda: nn.PixelShuffle(2), (4, 2, 3))]
    cases[nn.PixelUnshuffle] = [(lambda: nn.PixelUnshuffle(2), (1, 4, 4))]
    cases[nn.ChannelShuffle] = [(lambda: nn.ChannelShuffle(2), IMAGE)]
    cases[co.nn.OrthogonalFilter] = [(_filter(k), (6,)) for k in ("permutation", "householder", "hadamard", "dense")]
    cases[nn.Linear] = [(lambda: nn.Linear(24, 5), FEATURES), (lambda: nn.Linear(9, 3, bias=False), LINE)]
    cases[co.nn.BatchRMSNorm] = [(lambda: norm_with_statistics(4), LINE), (lambda: norm_with_statistics(24), FEATURES)]
    cases[nn.SyncBatchNorm] = [(lambda: statistics(nn.SyncBatchNorm(4)), IMAGE)]
    cases[nn.LayerNorm] = [(lambda: scaled(nn.LayerNorm(24)), FEATURES), (lambda: nn.LayerNorm(9, eps=1e-3), LINE)]
    cases[nn.RMSNorm] = [(lambda: scaled(nn.RMSNorm(24, eps=1e-5)), FEATURES), (lambda: nn.RMSNorm(24), FEATURES)]
    cases[nn.GroupNorm] = [(lambda: scaled(nn.GroupNorm(2, 4)), LINE)]
    for d in (1, 2, 3):
        shape = SPATIAL[d]
        cases[of("Dropout", d)] = [(of("Dropout", d), shape)]
        cases[of("ZeroPad", d)] = [(lambda d=d: of("ZeroPad", d)(1), shape), (lambda d=d: of("ZeroPad", d)(0), shape)]
        cases[of("ConstantPad", d)] = [(lambda d=d: of("ConstantPad", d)(1, 2.0), shape)]
        cases[of("ReflectionPad", d)] = [(lambda d=d: of("ReflectionPad", d)(1), (2, *[3] * d))]
        replicated = [(2, *[1] * d), shape]
        cases[of("ReplicationPad", d)] = [(lambda d=d: of("ReplicationPad", d)(1), size) for size in replicated]
        cases[of("CircularPad", d)] = [(lambda d=d: of("CircularPad", d)(2), (2, *[2] * d))]
        cases[of("Conv", d)] = [
            (lambda d=d: of("Conv", d)(4, 3, 3, padding=1), shape),
            (lambda d=d: of("Conv", d)(4, 6, 2, 2, 1, groups=2), shape),
            (lambda d=d: of("Conv", d)(4, 2, 2, padding=1, dilation=2), shape),
            (lambda d=d: of("Conv", d)(4, 4, 3, padding=1, padding_mode="circular"), shape),
            (lambda d=d: of("Conv", d)(4, 4, 1, padding=1, padding_mode="replicate"), (4, *[1] * d)),
            (lambda d=d: of("Conv", d)(4, 4, 1, padding=1, padding_mode="reflect"), (4, *[3] * d)),
        ]
        cases[of("ConvTranspose", d)] = [
            (lambda d=d: of("ConvTranspose", d)(4, 3, 3, padding=1), shape),
            (lambda d=d: of("ConvTranspose", d)(4, 6, 3, 2, 1, 1, groups=2), shape),
        ]
        cases[of("BatchNorm", d)] = [(lambda d=d: statistics(of("BatchNorm", d)(4)), shape)]
        tracked = dict(affine=True, track_running_stats=True)
        cases[of("InstanceNorm", d)] = [
            (lambda d=d: scaled(of("InstanceNorm", d)(4, affine=True)), shape),
            (lambda d=d, tracked=tracked: statistics(of("InstanceNorm", d)(4, **tracked)), shape),
        ]
        sizes = [(3, 1, 1), (2,)]
        cases[of("MaxPool", d)] = [(lambda d=d, size=size: of("MaxPool", d)(*size), shape) for size in sizes]
        cases[of("AvgPool", d)] = [
            (lambda d=d: of("AvgPool", d)(2, 1), shape),
            (lambda d=d: of("AvgPool", d)(2, 2, ceil_mode=True), (1, *[3] * d)),
            (lambda d=d: of("AvgPool", d)(2, 2, 1, count_include_pad=False), (1, *[2] * d)),
        ]
        cases[of("AdaptiveAvgPool", d)] = [
            (lambda d=d: of("AdaptiveAvgPool", d)(2), shape), (lambda d=d: of("AdaptiveAvgPool", d)(1), shape),
        ]  # fmt: skip
        cases[of("AdaptiveMaxPool", d)] = [(lambda d=d: of("AdaptiveMaxPool", d)(1), shape)]
    return cases


def function_cases():
    """By name: functions of the signal, and the shape of a sample."""
    at = {
        "softsign": F.softsign, "tanhshrink": F.tanhshrink, "log_sigmoid": F.logsigmoid, "softshrink": F.softshrink,
        "gelu": F.gelu, "hardsigmoid": F.hardsigmoid, "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish,
        "hardtanh": F.hardtanh, "hardtanh_": F.hardtanh_, "relu6": F.relu6, "modulus": modulus_of,
        "elu": lambda x: F.elu(x, 3.0), "elu_": lambda x: F.elu_(x, -2.0), "celu": lambda x: F.celu(x, 0.5),
        "celu_": lambda x: F.celu_(x, 2.0), "leaky_relu": lambda x: F.leaky_relu(x, negative_slope=-3.0),
        "leaky_relu_": lambda x: F.leaky_relu_(x, 4.0), "softplus": lambda x: F.softplus(x, 2.0),
        "_threshold": lambda x: F.threshold(x, 0.5, 0.5),
        "threshold": lambda x: torch.threshold(x, 0.5, 0.5), "threshold_": lambda x: F.threshold_(x, -1.0, -1.0),
        "hardshrink": lambda x: F.hardshrink(x, 0.0), "rrelu": lambda x: F.rrelu(x, 2.0, 3.0),
        "selu": F.selu, "pos": lambda x: +x, "neg": lambda x: -x,
    }  # fmt: skip
    methods = (
        "relu relu_ tanh tanh_ sigmoid sigmoid_ abs abs_ sin sin_ cos cos_ neg_ negative contiguous clone detach float "
        "double positive"
    )
    names = {name: (lambda x, name=name: getattr(x, name)()) for name in methods.split()}
    cases = {name: [(f, FEATURES)] for name, f in {**at, **names}.items()}
    cases["selu_"] = [(torch.selu_, FEATURES)]
    cases["relu"].append((lambda x: F.relu(x, inplace=True), FEATURES))
    same = {
        "flatten": lambda x: torch.flatten(x, 1), "reshape": lambda x: x.reshape(x.shape[0], -1),
        "data": lambda x: x.data,
        "permute": lambda x: x.permute(0, 2, 1, 3), "transpose": lambda x: x.transpose(1, 2), "mT": lambda x: x.mT,
        "squeeze": lambda x: x.squeeze(-1), "unsqueeze": lambda x: x.unsqueeze(1), "movedim": lambda x: x.movedim(1, 2),
        "swapaxes": lambda x: x.swapaxes(1, 2), "to": lambda x: x.to(torch.float64), "mH": lambda x: x.mH,
        "view": lambda x: x.view(x.size(0), -1), "getitem": lambda x: x[:, 1:, None], "real": lambda x: x.real,
        "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2), "dropout": lambda x: F.dropout(x, 0.5, False),
        "dropout2d": lambda x: F.dropout2d(x, 0.5, False),
    }  # fmt: skip
    cases.update({name: [(f, IMAGE)] for name, f in same.items()})
    cases["pixel_unshuffle"] = [(lambda x: F.pixel_unshuffle(x, 2), (1, 4, 4))]
    cases["dropout1d"] = [(lambda x: F.dropout1d(x, 0.5, False), LINE)]
    cases["dropout3d"] = [(lambda x: F.dropout3d(x, 0.5, False), VOLUME)]
    cases["T"] = [(lambda x: x.T.T, FEATURES)]
    cases["t"] = [(lambda x: x.t().t(), FEATURES)]
    cases["H"] = [(lambda x: x.H.H, FEATURES)]
    cases["softmax"] = [(lambda x: F.softmax(x, 1), (2,)), (lambda x: x.softmax(-1), (2,))]
    cases["softmin"] = [(lambda x: F.softmin(x, 1), (2,))]
    cases["log_softmax"] = [(lambda x: F.log_softmax(x, 1), (4,))]
    cases["mean"] = [(lambda x: x.mean((2, 3)), IMAGE), (lambda x: torch.mean(x, -1, keepdim=True), LINE)]
    for d, shape in SPATIAL.items():
        pools = {
            name: getattr(F, f"{name}{d}d")
            for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        }
        cases[f"max_pool{d}d"] = [(lambda x, f=pools["max_pool"]: f(x, 3, stride=1, padding=1), shape)]
        cases[f"avg_pool{d}d"] = [(lambda x, f=pools["avg_pool"]: f(x, 2, 1), (1, *[4] * d))]
        cases[f"adaptive_avg_pool{d}d"] = [(lambda x, f=pools["adaptive_avg_pool"]: f(x, 2), shape)]
        cases[f"adaptive_max_pool{d}d"] = [(lambda x, f=pools["adaptive_max_pool"]: f(x, 1), shape)]
    return cases


# ---- traps: what a bound that believes its graph, or the type of a module, gets wrong


class Program(nn.Module):
    """Layers, and a function of (self, x)."""

    def __init__(self, run, *layers):
        super().__init__()
        self.layers, self.run = nn.ModuleList(layers), run

    def forward(self, x):
        return self.run(self, x)


def lin(inside=6, outside=6):
    return nn.Linear(inside, outside, bias=False)


def around(write):
    """A Linear layer, statements that write into its result, a Linear layer."""

    def run(self, x):
        h = self.layers[0](x)
        h = write(self, h, x)
        return self.layers[1](h)

    return Program(run, lin(), lin(), nn.LeakyReLU(6.0, inplace=True))


def _stale(wrap, key):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = wrap(lin())
    layer(torch.randn(2, 6))
    with torch.no_grad():
        tensor = getattr(layer, key)
        tensor.copy_(10 * torch.randn_like(tensor))
    return layer


def _prune(layer):
    return prune.l1_unstructured(layer, "weight", 0.3)


def _hooked(method, hook):
    layer = lin()
    getattr(layer, method)(hook)
    return nn.Sequential(layer)


def _patched():
    layer = lin()
    layer.forward = lambda x: 10 * F.linear(x, layer.weight)
    return nn.Sequential(layer)


def _writes(*calls):
    def write(self, h, x):
        for call in calls:
            call(self, h, x)
        return h

    return around(write)


def _alias_add(self, h, x):
    k = h
    k += x
    k *= 3


def _view_then_write(self, h, x):
    v = h.view(-1, 6)
    h.mul_(10)
    return v


def _second_feature(pool, norm, behind):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([50.0, 0.1, 0.1, 0.1]))
        behind.weight.zero_()
        behind.weight[:, 1] = 1.0
    return nn.Sequential(norm, pool, behind)


class _ConvTwice(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 10 * weight, bias)


class _Counting(nn.Module):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return x * 2**self.calls


class _Gate(nn.Module):
    def forward(self, x, gate=None):
        return x if gate is not None else 10 * x


class _Scaled(nn.Module):
    def forward(self, weight):
        return 10 * weight


def _steeper(self, x):
    self.layers[0].negative_slope = 9.0
    y = self.layers[0](x)
    self.layers[0].negative_slope = 0.1
    return y


def _functional(self, x):
    weight = 10 * torch.eye(6, dtype=torch.float64)
    return torch.func.functional_call(self.layers[0], {"weight": weight}, (x,))


def _parametrized():
    layer = lin()
    nn.utils.parametrize.register_parametrization(layer, "weight", _Scaled())
    return nn.Sequential(layer)


def _imaginary():
    layer = nn.Linear(6, 6, bias=False, dtype=torch.complex128)
    with torch.no_grad():
        layer.weight.copy_(1j * torch.randn(6, 6, dtype=torch.float64))
    return nn.Sequential(Function(lambda x: x.to(torch.complex128)), layer, co.nn.Modulus())


def traps():
    """By name: (maker of a network, shape of a sample). Each is refused, or its bound holds."""
    return {
        "mul_": (lambda: _writes(lambda s, h, x: h.mul_(10)), (6,)),
        "add_ alpha": (lambda: _writes(lambda s, h, x: h.add_(x, alpha=20)), (6,)),
        "alias": (lambda: _writes(_alias_add, _alias_add), (6,)),
        "out": (lambda: _writes(lambda s, h, x: torch.mul(h, 10.0, out=h)), (6,)),
        "in-place module": (lambda: _writes(lambda s, h, x: s.layers[2](h)), (6,)),
        "in-place function": (lambda: _writes(lambda s, h, x: F.leaky_relu(h, 8.0, inplace=True)), (6,)),
        "slice": (lambda: _writes(lambda s, h, x: h[:, :6].mul_(10)), (6,)),
        "view": (lambda: _writes(lambda s, h, x: h.view(-1).mul_(10)), (6,)),
        "transposed": (lambda: _writes(lambda s, h, x: h.T.mul_(10)), (6,)),
        "old view": (lambda: around(_view_then_write), (6,)),
        "dropout": (lambda: _writes(lambda s, h, x: F.dropout(h, 0.5, False).mul_(10)), (6,)),
        "result and target": (lambda: around(lambda s, h, x: h + h.mul_(5)), (6,)),
        "x + x": (lambda: around(lambda s, h, x: (h + h) * 0.5 + 4 * (h + h)), (6,)),
        "alpha": (lambda: around(lambda s, h, x: torch.add(x, h, alpha=9)), (6,)),
        "cat": (lambda: Program(lambda s, x: torch.cat([x, x, x, 2 * x], 1)), (6,)),
        "two outputs": (lambda: Program(lambda s, x: torch.stack([x, x, x], 1)), (6,)),
        "broadcast": (lambda: Program(lambda s, x: 0.1 * x + x[:, :1]), (6,)),
        "broadcast layer": (lambda: Program(lambda s, x: s.layers[0](x) + x, lin(6, 1)), (6,)),
        "hook": (lambda: _hooked("register_forward_hook", lambda m, a, o: 10 * o), (6,)),
        "pre-hook": (lambda: _hooked("register_forward_pre_hook", lambda m, a: (10 * a[0],)), (6,)),
        "forward": (_patched, (6,)),
        "conv forward": (lambda: nn.Sequential(_ConvTwice(4, 4, 1)), LINE),
        "weight_norm": (lambda: nn.Sequential(_stale(weight_norm, "weight_g")), (6,)),
        "spectral_norm": (lambda: nn.Sequential(_stale(spectral_norm, "weight_orig")), (6,)),
        "pruned": (lambda: nn.Sequential(_stale(_prune, "weight_orig")), (6,)),
        "parametrization": (_parametrized, (6,)),
        "parametrized weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(lin())), (6,)),
        "complex": (_imaginary, (6,)),
        "complex tanh": (lambda: Function(lambda x: torch.tanh(3.1 * x * 1j).abs()), (2,)),
        "max pool over features": (
            lambda: _second_feature(nn.MaxPool1d(3, 1, 1), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False)), (4,),
        ),
        "avg pool over features": (
            lambda: _second_feature(nn.AvgPool1d(3, 1, 1), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False)), (4,),
        ),
        "max pool over channels": (
            lambda: _second_feature(nn.MaxPool2d(3, 1, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 1, 1, bias=False)), (4, 6),
        ),
        "flatten": (
            lambda: _second_feature(nn.Flatten(1, 2), nn.BatchNorm2d(4), nn.Linear(4, 1, bias=False)), (4, 2, 4),
        ),
        "tokens": (
            lambda: _second_feature(nn.Identity(), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False)), (4, 4),
        ),
        "replaced slope": (lambda: Program(_steeper, nn.LeakyReLU(0.1)), (24,)),
        "replaced weight": (lambda: Program(_functional, lin()), (6,)),
        "counter": (lambda: nn.Sequential(_Counting()), (3,)),
        "gate": (_Gate, (3,)),
        "type": (lambda: Program(lambda s, x: 10 * x if isinstance(x, torch.Tensor) else x), (3,)),
        "exact type": (lambda: Program(lambda s, x: 10 * x if type(x) is torch.Tensor else x), (3,)),
        "class": (lambda: Program(lambda s, x: 10 * x if x.__class__ is torch.Tensor else x), (3,)),
        "attribute": (lambda: Program(lambda s, x: x if hasattr(x, "sample") else 10 * x), (3,)),
        "jump": (lambda: nn.Sequential(nn.Threshold(0.0, -50.0)), (24,)),
        "celu": (lambda: nn.Sequential(nn.CELU(-1.0)), (24,)),
        "indices": (
            lambda: Program(lambda s, x: s.layers[0](x)[1] * 1.0, nn.MaxPool1d(3, 1, return_indices=True)), LINE,
        ),
    }  # fmt: skip
