"""The six workloads of the correction: the layers of a network, their gradients and their sampled inputs."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The shape of a weight, ``outputs`` x ``units`` x ``kernel``; ``kernel`` is empty for a linear layer."""

    outputs: int
    units: int
    kernel: tuple[int, ...] = ()

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.units, *self.kernel)

    @property
    def rows(self) -> int:
        """Number of rows of the gradient matrix: outputs times kernel taps."""
        return self.outputs * math.prod(self.kernel)


def _resnet50() -> list[LayerShape]:
    layers, channels = [LayerShape(64, 3, (7, 7))], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [LayerShape(width, channels, (1, 1)), LayerShape(width, width, (3, 3))]
            layers += [LayerShape(4 * width, width, (1, 1))]
            if block == 0:
                layers += [LayerShape(4 * width, channels, (1, 1))]
            channels = 4 * width
    return layers


_VIT_BLOCK = [LayerShape(2304, 768), LayerShape(768, 768), LayerShape(3072, 768), LayerShape(768, 3072)]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The layers of a network, and the dtypes of their inputs and gradients in training."""

    layers: list[LayerShape]
    inputs: torch.dtype = torch.float32
    grads: torch.dtype = torch.float32

    @property
    def group(self) -> int:
        """Number of units in 32 bytes of gradient, the default of the operator."""
        return 32 // self.grads.itemsize

    def tensors(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return random gradients and inputs (rows, units); equal shapes do not share memory."""
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(layer.weight, generator=generator).to(self.grads) for layer in self.layers]
        return grads, [torch.randn(rows, layer.units, generator=generator).to(self.inputs) for layer in self.layers]


# The Vision Transformer is 3 of its 12 blocks: all are alike, and 12 would only make the run four times as long.
WORKLOADS: dict[str, Workload] = {
    "mlp": Workload([LayerShape(100, 784), LayerShape(100, 100), LayerShape(100, 100), LayerShape(10, 100)]),
    "wide-mlp": Workload([LayerShape(512, 512)] * 3),
    "resnet50": Workload(_resnet50(), inputs=torch.bfloat16),
    "resnet50-fp32": Workload(_resnet50()),
    "vit-b16": Workload(_VIT_BLOCK * 3, inputs=torch.bfloat16),
    "linear-4096": Workload([LayerShape(4096, 4096)], inputs=torch.bfloat16, grads=torch.bfloat16),
    "linear-4096-fp32": Workload([LayerShape(4096, 4096)]),
    "llama-block": Workload(
        [LayerShape(4096, 4096)] * 4 + [LayerShape(11008, 4096)] * 2 + [LayerShape(4096, 11008)],
        inputs=torch.bfloat16,
        grads=torch.bfloat16,
    ),
}
LARGE = ("resnet50", "resnet50-fp32", "vit-b16", "linear-4096", "linear-4096-fp32", "llama-block")


def useful_flops(layers: list[LayerShape], rows: int, chunk: int) -> int:
    """Return n B (B + 1) + B^3 + 2 o B^2 per chunk: a triangle of the covariance, factor and inverse, the product."""
    total = 0
    for layer in layers:
        count = -(-layer.units // chunk)
        for c in range(count):
            size = layer.units // count + (c < layer.units % count)
            total += rows * size * (size + 1) + size**3 + 2 * layer.rows * size**2
    return total
