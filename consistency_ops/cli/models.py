"""The three networks of the training command (arXiv 1708.00631 and its released code), for any image size."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..nn import BatchRMSNorm, Modulus, deep_mlp
from ..nn.activations import GAINS
from ..nn.builders import initialise

MODELS = ("mlp", "deep-mlp", "convnet")
ACTIVATIONS = ("relu", "modulus")
NORMALIZATIONS = ("rms", "none")

WIDTH = 128
DEEP_BLOCKS = 10


def build(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    activation: str = "relu",
    normalization: str = "rms",
    init: float | str = 0.01,
    seed: int = 0,
) -> nn.Sequential:
    """Build the network ``name``: images ``(N, *shape)`` to logits ``(N, classes)``.

    - ``mlp``: inputs-128-128-classes.
    - ``deep-mlp``: inputs-128, then ten times 128-128, then 128-classes: twelve weight matrices.
    - ``convnet``: three times 5x5 convolution (32, 32, 64 channels), activation and 3x3 max pooling of stride 2; a
      convolution over what is left of the image to 64 channels; 1x1 to the classes.

    ``normalization="rms"`` puts a batch RMS normalisation before every weight layer but the first. ``init`` is the
    standard deviation of all weights (the paper: 0.01), or ``"he"``: sqrt(2 / fan-in) for ReLU, sqrt(1 / fan-in) for
    the modulus, which keeps the mean square of its input. Biases start at 0. The same ``seed`` gives the same weights.
    """
    if name != "convnet":
        depth = 2 if name == "mlp" else 1 + DEEP_BLOCKS
        return deep_mlp(
            math.prod(shape),
            classes,
            width=WIDTH,
            depth=depth,
            activation=activation,
            normalization=normalization,
            init=init,
            seed=seed,
        )
    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "modulus": Modulus}

    def norm(channels: int) -> list[nn.Module]:
        return [BatchRMSNorm(channels)] if normalization == "rms" else []

    return initialise(
        nn.Sequential(*_convnet(shape, classes, activations[activation], norm)), init, GAINS[activation], seed
    )


def _convnet(
    shape: tuple[int, int, int],
    classes: int,
    act: Callable[[], nn.Module],
    norm: Callable[[int], list[nn.Module]],
) -> list[nn.Module]:
    channels, height, width = shape
    layers: list[nn.Module] = []
    for out in (32, 32, 64):
        layers += [
            *(norm(channels) if layers else []),
            nn.Conv2d(channels, out, 5, padding=2),
            act(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        ]
        channels, height, width = out, (height - 1) // 2 + 1, (width - 1) // 2 + 1
    layers += [*norm(channels), nn.Conv2d(channels, 64, (height, width)), act()]
    layers += [*norm(64), nn.Conv2d(64, classes, 1), nn.Flatten()]
    return layers


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
