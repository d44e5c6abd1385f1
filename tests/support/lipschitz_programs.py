"""Random networks: layers, functions, statements that write, sums, concatenations, hooks, derived weights."""

import random
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import consistency_ops as co

from .lipschitz_cases import of, scaled, statistics
from .lipschitz_networks import norm_with_statistics

ACTIVATIONS = [
    nn.ReLU,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Hardswish,
    nn.SELU,
    co.nn.Modulus,
    lambda: nn.LeakyReLU(2.5),
    lambda: nn.LeakyReLU(-1.5),
    lambda: nn.ELU(2.0),
    lambda: nn.CELU(0.7),
    lambda: nn.PReLU(init=1.3),
    lambda: nn.LeakyReLU(3.0, inplace=True),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ELU(1.5, inplace=True),
    nn.Dropout,
    nn.Identity,
    nn.Softshrink,
    nn.Tanhshrink,
]
FUNCTIONS = [
    torch.tanh,
    F.gelu,
    F.silu,
    torch.abs,
    torch.sin,
    F.softsign,
    lambda h: h * 1.7,
    lambda h: h / 0.6,
    lambda h: 1 - h,
    lambda h: F.leaky_relu(h, 2.0),
    lambda h: F.elu(h, alpha=1.8),
    lambda h: -h,
    lambda h: h.mul(1.4),
    lambda h: F.dropout(h, 0.5, False),
    lambda h: torch.sub(h, 3, alpha=2),
    lambda h: h.clone(),
    lambda h: F.softplus(h, 2.0),
]


def _slices(h):
    h[:, : h.shape[1]].mul_(1.5)


def _views(h):
    h.view(h.size(0), -1).mul_(1.5)


def _renamed(h):
    k = h
    k *= 1.4


STATEMENTS = [
    lambda h, kept: h.mul_(1.6),
    lambda h, kept: h.add_(kept, alpha=1.5),
    lambda h, kept: torch.add(h, kept, out=h),
    lambda h, kept: torch.mul(h, 1.5, out=h),
    lambda h, kept: F.leaky_relu(h, 1.7, inplace=True),
    lambda h, kept: h.neg_(),
    lambda h, kept: h.tanh_().mul_(2),
    lambda h, kept: h.div_(0.7),
    lambda h, kept: _renamed(h),
    lambda h, kept: _views(h),
    lambda h, kept: _slices(h),
    lambda h, kept: h.add_(h),
    lambda h, kept: torch.relu_(h),
    lambda h, kept: F.elu_(h, 2.2),
]


def _added(h, kept):
    h += kept
    return h


def _subtracted(h, kept):
    h -= kept
    return h


JOINS = [
    lambda h, kept: h + kept,
    lambda h, kept: torch.add(h, kept, alpha=1.5),
    lambda h, kept: kept - 2 * h,
    _added,
    _subtracted,
    lambda h, kept: torch.cat([h, kept], 1),
    lambda h, kept: torch.cat((kept, h, h), dim=1),
    lambda h, kept: h + 0.5 * h,
]


def layer(rng, shape):
    """A layer for samples of this shape, features (F,), a line (C, L) or an image (C, H, W)."""
    d, channels = len(shape) - 1, shape[0]
    any_rank = [
        lambda: nn.Linear(shape[-1], rng.randint(2, 7)),
        lambda: nn.Linear(shape[-1], shape[-1], bias=False),
        lambda: scaled(nn.LayerNorm(shape[-1], eps=rng.choice([1e-5, 0.1]))),
        lambda: scaled(nn.RMSNorm(shape[-1], eps=0.1)),
        lambda: nn.Softmax(1),
        lambda: norm_with_statistics(channels, rng.randint(0, 99)),
        lambda: statistics(nn.BatchNorm1d(channels) if d < 2 else nn.BatchNorm2d(channels)),
    ]
    features = [lambda: nn.MaxPool1d(3, 1, 1), lambda: nn.AvgPool1d(2, 1), lambda: nn.Linear(channels, 8)]
    if not d:
        return rng.choice(any_rank + features + any_rank[:2])()
    groups = rng.choice([g for g in (1, 2, 4) if channels % g == 0])
    mode = rng.choice(["zeros", "zeros", "reflect", "circular", "replicate"])
    pixels = [
        lambda: of("Conv", d)(
            channels, groups * rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 2), 1, 1, groups, True, mode
        ),
        lambda: of("Conv", d)(channels, channels, 3, padding=1),
        lambda: of("ConvTranspose", d)(channels, rng.randint(1, 3), 3, rng.randint(1, 2), 1),
        lambda: of("MaxPool", d)(rng.randint(2, 3), rng.randint(1, 2), 1),
        lambda: of("AvgPool", d)(2, rng.randint(1, 2), 1, rng.random() < 0.5, rng.random() < 0.5),
        lambda: of("AdaptiveAvgPool", d)(rng.randint(1, 3)),
        lambda: of("AdaptiveMaxPool", d)(1),
        lambda: of("ReflectionPad", d)(1),
        lambda: of("CircularPad", d)(1),
        lambda: of("ReplicationPad", d)(1),
        lambda: scaled(nn.GroupNorm(groups, channels, eps=0.05)),
        lambda: of("InstanceNorm", d)(channels, eps=0.05),
        nn.Flatten,
        lambda: nn.Flatten(1, 2),
    ]
    return rng.choice(any_rank + pixels + pixels[:2])()


def derived(rng, module):
    """The layer with a weight that is computed from others, which have changed since."""
    wraps = [
        (weight_norm, "weight_g"), (spectral_norm, "weight_orig"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.3), "weight_orig"), (parametrizations.weight_norm, ""),
    ]  # fmt: skip
    wrap, key = rng.choice(wraps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = wrap(module)
    if key:
        with torch.no_grad():
            getattr(module, key).mul_(3)
    return module


class Network(nn.Module):
    """Steps (kind, what): each turns (h, kept) into the next."""

    def __init__(self):
        super().__init__()
        self.layers, self.steps = nn.ModuleList(), []

    def forward(self, x):
        h = kept = x
        for kind, what in self.steps:
            if kind == "layer":
                h = self.layers[what](h)
            elif kind == "call":
                self.layers[what](h)
            elif kind == "function":
                h = what(h)
            elif kind == "statement":
                what(h, kept)
            elif kind == "join":
                h = what(h, kept)
            else:
                kept = h if kind == "keep" else h.clone()
        return h


def run(network, x):
    """The outputs, one for each sample, whatever the number of samples.

    A layer that is used again on features alone may take the samples for its channels, and stop with another number.
    """
    with torch.no_grad():
        result, single = network(x.clone()), network(x[:1].clone())
    if result.dim() < 2 or (len(result), len(single)) != (len(x), 1) or result.shape[1:] != single.shape[1:]:
        raise ValueError("samples are no samples any more")
    if not torch.allclose(result[:1], single, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError("samples influence each other")
    return result


def random_network(rng: random.Random):
    """(network, shape of a sample), in evaluation mode or not, of 1 to 8 steps that fit."""
    shape = rng.choice([(6,), (4, 5), (2, 3, 4)])
    network = Network()
    wanted = rng.randint(1, 8)
    x = torch.randn(3, *shape)
    h = network.eval()(x)
    for _ in range(60):
        if len(network.steps) >= wanted:
            break
        kind = rng.choices(
            ["layer", "activation", "function", "statement", "join", "keep", "copy", "again", "call"],
            [5, 3, 2, 2, 2, 1, 1, 0.7, 0.5],
        )[0]
        made, before = len(network.layers), list(network.steps)
        try:
            if kind in ("layer", "activation", "call"):
                module = layer(rng, tuple(h.shape[1:])) if kind == "layer" else rng.choice(ACTIVATIONS)()
                if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and rng.random() < 0.1:
                    module = derived(rng, module)
                network.layers.append(module)
                network.steps.append(("call" if kind == "call" else "layer", made))
            elif kind == "again":
                network.steps.append(("layer", rng.randrange(made)))
            elif kind in ("keep", "copy"):
                network.steps.append((kind, None))
            else:
                pool = {"function": FUNCTIONS, "statement": STATEMENTS, "join": JOINS}[kind]
                network.steps.append((kind, rng.choice(pool)))
            result = run(network.eval(), x)
            if result.numel() > 600 or not 2 <= result.dim() <= 4 or not result.isfinite().all():
                raise ValueError("not of interest")
            h = result
        except (RuntimeError, ValueError, AssertionError, IndexError):
            network.steps = before
            del network.layers[made:]
    if network.layers and rng.random() < 0.04:
        rng.choice(list(network.layers)).register_forward_hook(lambda module, args, output: output * 3)
    return network.train(rng.random() < 0.5), shape
