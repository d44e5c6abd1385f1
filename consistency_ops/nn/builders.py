"""Deep and narrow networks of equal layers for the experiments of arXiv 1708.00631."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ..ops.checks import check_integers, check_numbers, check_sizes, shown
from .activations import GAINS, make_activation
from .batch_rms_norm import BatchRMSNorm

NORMALIZATIONS = ("rms", "batch", "none")
Model = TypeVar("Model", bound=nn.Module)
INITS = ("he", "glorot", "standard", "orthogonal")


def deep_mlp(
    inputs: int,
    classes: int,
    *,
    width: int = 128,
    depth: int = 11,
    activation: str = "relu",
    normalization: str = "rms",
    init: float | str = 0.01,
    seed: int = 0,
) -> nn.Sequential:
    """Build ``depth`` hidden layers of ``width`` units: (N, ...) of ``inputs`` elements to logits (N, classes).

    Flatten, Linear, activation, then ``depth - 1`` times (normalization, Linear, activation), normalization, Linear:
    ``depth + 1`` weight matrices.  With the defaults it is network C of the paper's code ("10-layer-deep").

    ``activation``: modulus, relu, tanh, softsign, sigmoid or identity.  ``normalization``: "rms"
    (:class:`BatchRMSNorm`), "batch" (``nn.BatchNorm``) or "none"; before every weight layer but the first.

    ``init``: the standard deviation of all weights (the paper: 0.01), or

    - "he": normal, variance g^2 / fan-in, with g^2 = 2 for ReLU and 1 for the others, which keeps the mean square;
    - "glorot": uniform, variance 2 / (fan-in + fan-out) (Glorot and Bengio 2010, eq. 16);
    - "standard": uniform in +-1 / sqrt(fan-in) (there, eq. 1);
    - "orthogonal": a random orthogonal matrix times g, in a convolution at the central tap only.  With the modulus
      every hidden layer is then an isometry: neither signals nor gradients change their length.

    Biases are 0.  The same ``seed`` gives the same weights.

    Raises:
        ValueError: an unknown name or a size below 1.
    """
    check_sizes("deep_mlp", inputs=inputs, classes=classes, width=width, depth=depth)
    act, norm = _pieces("deep_mlp", activation, normalization, nn.BatchNorm1d)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), act()]
    for _ in range(depth - 1):
        layers += [*norm(width), nn.Linear(width, width), act()]
    layers += [*norm(width), nn.Linear(width, classes)]
    return initialise(nn.Sequential(*layers), init, GAINS[activation], seed)


def deep_convnet(
    channels: int,
    classes: int,
    *,
    width: int = 16,
    depth: int = 12,
    pools: int = 2,
    activation: str = "relu",
    normalization: str = "rms",
    init: float | str = "orthogonal",
    seed: int = 0,
) -> nn.Sequential:
    """Build ``depth`` 3x3 convolutions of ``width`` channels: images (N, channels, H, W) to logits (N, classes).

    2x2 max pooling after ``pools`` of the convolutions, evenly spread, global average pooling at the end, and a Linear
    layer.  The other arguments are those of :func:`deep_mlp`.

    Raises:
        ValueError: an unknown name, a size below 1, or as many pools as convolutions.
    """
    check_sizes("deep_convnet", channels=channels, classes=classes, width=width, depth=depth)
    check_integers("deep_convnet", pools=pools)
    if not 0 <= pools < depth:
        raise ValueError(f"deep_convnet: pools must be in [0, depth = {depth}), got {pools}")
    act, norm = _pieces("deep_convnet", activation, normalization, nn.BatchNorm2d)
    pooled = {depth * (i + 1) // (pools + 1) - 1 for i in range(pools)}
    layers: list[nn.Module] = []
    for i in range(depth):
        before = norm(width) if i else []
        layers += [*before, nn.Conv2d(width if i else channels, width, 3, padding=1), act()]
        layers += [nn.MaxPool2d(2)] * (i in pooled)
    layers += [*norm(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return initialise(nn.Sequential(*layers), init, GAINS[activation], seed)


@torch.no_grad()
def initialise(model: Model, init: float | str, gain: float = 1.0, seed: int = 0) -> Model:
    """Fill the weights of all Linear and convolution layers as :func:`deep_mlp` says, biases with 0; returns ``model``.

    ``gain`` multiplies "he" and "orthogonal".
    """
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(
                f"initialise: init must be a standard deviation or one of {', '.join(INITS)}, got {shown(init)}"
            )
    else:
        check_numbers("initialise", init=init)
        if not 0 < init < math.inf:
            raise ValueError(f"initialise: init must be positive and finite, got {init}")
    check_integers("initialise", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        weight = layer.weight
        taps = weight[0, 0].numel()
        fan_in, fan_out = weight.shape[1] * taps, weight.shape[0] * taps
        if init == "orthogonal":
            _orthogonal(weight, gain, generator)
        elif init in ("glorot", "standard"):
            bound = math.sqrt(6 / (fan_in + fan_out)) if init == "glorot" else 1 / math.sqrt(fan_in)
            weight.uniform_(-bound, bound, generator=generator)
        else:
            std = gain / math.sqrt(fan_in) if isinstance(init, str) else init
            weight.normal_(0.0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return model


def _orthogonal(weight: torch.Tensor, gain: float, generator: torch.Generator) -> None:
    matrix = torch.empty(weight.shape[:2])
    nn.init.orthogonal_(matrix, gain, generator=generator)
    centre: tuple[int | slice, ...] = (slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))
    weight.zero_()
    weight[centre] = matrix.to(weight)


def _pieces(
    owner: str, name: str, normalization: str, batch_norm: Callable[[int], nn.Module]
) -> tuple[Callable[[], nn.Module], Callable[[int], list[nn.Module]]]:
    """What makes an activation, and what makes the normalisation of so many units, or nothing."""
    make_activation(owner, name)  # raises where there is none of this name
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{owner}: normalization must be one of {', '.join(NORMALIZATIONS)}, got {shown(normalization)}"
        )
    norms: dict[str, Callable[[int], nn.Module] | None] = {"rms": BatchRMSNorm, "batch": batch_norm, "none": None}
    norm = norms[normalization]
    return (lambda: make_activation(owner, name)), (lambda units: [] if norm is None else [norm(units)])
