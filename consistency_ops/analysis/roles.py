"""Layers that do the same in different blocks of a network, so that like is compared with like.

The gradient at a head of 10 classes and that at a 7x7 convolution of an image differ by orders of magnitude in any
network; the gradients at the query projections of the first and the last block should not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


Layer = TypeVar("Layer", bound=Named)


def role(name: str) -> str:
    """The name without its numbers: ``blocks.3.attn.qkv`` and ``blocks.11.attn.qkv`` do the same."""
    return re.sub(r"\d+", "#", name)


def by_role(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers in groups of one role that has several members, in their order."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(role(layer.name), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def comparable(layers: list[Layer]) -> list[list[Layer]]:
    """Groups of layers that may be compared: those of one role; all of them where every layer has a role of its own."""
    groups = by_role(layers)
    return groups or ([layers] if len(layers) > 1 else [])
