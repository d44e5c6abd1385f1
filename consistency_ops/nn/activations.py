"""The activations that the network builders know by name, with their slopes and gains."""

from __future__ import annotations

import math

from torch import nn

from ..ops.checks import shown
from .modulus import Modulus

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "modulus": Modulus,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softsign": nn.Softsign,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}

# Largest absolute derivative: the Lipschitz constant.
SLOPES = {"modulus": 1.0, "relu": 1.0, "tanh": 1.0, "softsign": 1.0, "sigmoid": 0.25, "identity": 1.0}

# The gain of the weights that keeps the mean square of a signal; ReLU halves the mean square.
GAINS = {name: math.sqrt(2.0) if name == "relu" else 1.0 for name in ACTIVATIONS}


def make_activation(owner: str, name: str) -> nn.Module:
    """Return a new activation module; ``owner`` is named in the error."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{owner}: activation must be one of {', '.join(ACTIVATIONS)}, got {shown(name)}")
    return ACTIVATIONS[name]()
