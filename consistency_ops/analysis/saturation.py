"""Finds the values at which an activation is saturated: its slope is below 5 % of its largest slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Modulus

SLOPE = 0.05  # of the largest slope


def _never(module: nn.Module, z: Tensor) -> Tensor:
    return torch.zeros_like(z, dtype=torch.bool)


# Rules by the output z, which is there after an in-place activation, too.
_BY_OUTPUT: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Tanh: lambda m, z: 1 - z * z < SLOPE,
    nn.Sigmoid: lambda m, z: 4 * z * (1 - z) < SLOPE,
    nn.Softsign: lambda m, z: (1 - z.abs()).square() < SLOPE,
    nn.ReLU: lambda m, z: z <= 0,
    nn.ReLU6: lambda m, z: (z <= 0) | (z >= 6),
    nn.Hardtanh: lambda m, z: (z <= m.min_val) | (z >= m.max_val),
    nn.Hardsigmoid: lambda m, z: (z <= 0) | (z >= 1),
    nn.Softplus: lambda m, z: -torch.expm1(-m.beta * z) < SLOPE,
    nn.ELU: lambda m, z: (z < 0) & (z + m.alpha < SLOPE * max(1.0, m.alpha)),
    nn.LeakyReLU: lambda m, z: (z < 0) & (abs(m.negative_slope) < SLOPE),
    Modulus: _never,
}


def _gelu_slope(x: Tensor) -> Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


# Rules by the input x, for activations that are not monotone. Their largest slope is the Lipschitz constant.
_BY_INPUT = {nn.GELU: (_gelu_slope, 1.1290), nn.SiLU: (_silu_slope, 1.0999)}


def saturated(module: nn.Module, x: Tensor | None, output: Tensor) -> Tensor | None:
    """Return a boolean tensor of the shape of ``output``; None if the module is no activation known here."""
    for kind, rule in _BY_OUTPUT.items():
        if type(module) is kind:
            return rule(module, output)
    for kind, (slope, largest) in _BY_INPUT.items():
        if type(module) is kind and x is not None and not getattr(module, "inplace", False):
            return slope(x).abs() < SLOPE * largest
    return None


def is_activation(module: nn.Module) -> bool:
    return type(module) in _BY_OUTPUT or type(module) in _BY_INPUT
