"""Which tensors of a recorded autograd graph depend on which, and by which ways: skip connections."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Node = Any  # torch.autograd.graph.Node, and what C++ makes


def node_of(tensor: Tensor) -> Node:
    """The node that made a tensor that requires gradients; of a leaf, that which gathers its gradient."""
    return get_gradient_edge(tensor).node


def _is_leaf(node: Node) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def ancestors(node: Node, without: Node | None = None) -> set[Node]:
    """All nodes that ``node`` depends on, itself included, by ways that do not lead through ``without``."""
    found: set[Node] = {node}
    stack = [node]
    while stack:
        for before, _ in stack.pop().next_functions:
            if before is not None and before is not without and before not in found:
                found.add(before)
                stack.append(before)
    return found


def goes_around(start: Node, end: Node, output: Node) -> bool:
    """Whether a residual reaches the layers before ``start`` by a way that does not lead from ``end`` to ``start``.

    Either the output depends on them by a way around ``end``, as inside a residual branch; or ``end`` does by a way
    around ``start``, as behind the sum of branch and skip connection. Parameters do not count: one that is used twice,
    such as the table of tokens at both ends of a language model, is no way for a signal.
    """
    before = {node for node in ancestors(start) if node is start or not _is_leaf(node)}
    around_end = ancestors(output, without=end) if output is not end else set()
    around_start = ancestors(end, without=start) if end is not start else set()
    return not before.isdisjoint(around_end) or not before.isdisjoint(around_start)
