"""What is known of shapes without an example input: ranks, and whether two signals must have one shape.

Inputs are batches: their first dimension counts samples. A shape is written down as the events that made it from that
of an input; two signals with the same events have the same shape, whatever the input.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import fx, nn
from torch.nn.modules import conv

from ..nn import Modulus, OrthogonalFilter
from ..nn.plain_layers import table_type
from .lipschitz_rules import ELEMENTWISE, ELEMENTWISE_NAMES, MODULES, scaling
from .lipschitz_trace import BINARY, argument, is_size, name_of

Events = tuple[Hashable, ...]
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.Softmax, nn.Softmin)
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def _first(node: fx.Node) -> fx.Node | None:
    """The signal that an operation starts from."""
    return node.all_input_nodes[0] if node.all_input_nodes else None


def keeps_shape(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the result has the shape of the one signal that goes in."""
    if module is None:
        name = name_of(node)
        return name in ELEMENTWISE_NAMES or (name in BINARY and len(node.all_input_nodes) == 1)
    return isinstance(module, (*ELEMENTWISE, *_NORMS, Modulus, OrthogonalFilter)) or scaling(module) is not None


class Shapes:
    """Of a graph's signals; ``shape`` gives those that an example told, ``module`` the module that a node calls."""

    def __init__(self, shape: Callable[[Any], tuple[int, ...] | None], module: Callable[[fx.Node], nn.Module | None]):
        self.shape: Callable[[Any], tuple[int, ...] | None] = shape
        self.module: Callable[[fx.Node], nn.Module | None] = module
        self.found: dict[fx.Node, Events] = {}

    def rank(self, node: fx.Node | None) -> int | None:
        """Number of dimensions, the batch included; None where it is not known."""
        while node is not None:
            shape = self.shape(node)
            if shape is not None:
                return len(shape)
            module, name = self.module(node), name_of(node)
            if module is not None:
                kind = table_type(module, MODULES)
                if kind in _RANKS:
                    return _RANKS[kind]
                if isinstance(module, conv._ConvNd):
                    return module.weight.dim()
                if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                    return 2
                if not keeps_shape(node, module) and not isinstance(module, (nn.Linear, *_POOLS)):
                    return None
            elif node.op == "call_function" and name == "flatten" and _flattens_all(node):
                return 2
            elif name in ("view", "reshape") and len(node.args) > 1 and all(self._is_one(a) for a in node.args[1:]):
                return len(node.args) - 1
            elif name in ("cat", "concat") and node.args and isinstance(node.args[0], list | tuple):
                node = next((part for part in node.args[0] if isinstance(part, fx.Node)), None)
                continue
            elif (
                name == "getitem"
                and isinstance(node.args[1], tuple)
                and all(isinstance(i, slice) for i in node.args[1])
            ):
                pass
            elif not keeps_shape(node, None) and name not in BINARY:
                return None
            node = _first(node)
        return None

    @staticmethod
    def _is_one(value: Any) -> bool:
        return isinstance(value, int) or (isinstance(value, fx.Node) and is_size(value))

    def equal(self, a: Any, b: Any) -> bool:
        """Whether two signals have one shape, for certain."""
        shapes = self.shape(a), self.shape(b)
        return shapes[0] == shapes[1] if None not in shapes else self.events(a) == self.events(b)

    def events(self, node: fx.Node) -> Events:
        if node not in self.found:
            self.found[node] = self._events(node)
        return self.found[node]

    def _events(self, node: fx.Node) -> Events:
        module, source = self.module(node), _first(node)
        if source is None:
            return (node.name,)
        name = name_of(node)
        if keeps_shape(node, module) or (name in BINARY and self._operands_agree(node)):
            return self.events(source)
        if isinstance(module, nn.Linear):
            if self.rank(source) == 2 and self._samples(source) is not None:  # (N, out): nothing else matters
                return (("batch of", self._samples(source)), ("linear", None, module.out_features))
            return _then(self.events(source), "linear", module.in_features, module.out_features)
        if isinstance(module, conv._ConvNd):
            return _then(self.events(source), "conv", module.in_channels, module.out_channels, *_geometry(module))
        single = [n for n in node.all_input_nodes if not is_size(n)] == [source]
        if single and module is not None:
            return (*self.events(source), ("module", node.target))
        fixed = all(not isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values()))
        if single and fixed and node.args and node.args[0] is source:
            return (*self.events(source), (name, repr(node.args[1:]), repr(sorted(node.kwargs.items()))))
        return (node.name,)

    def _operands_agree(self, node: fx.Node) -> bool:
        nodes = node.all_input_nodes
        return len(nodes) == 2 and self.events(nodes[0]) == self.events(nodes[1])

    def _samples(self, node: fx.Node | None) -> Hashable:
        """What tells the number of samples: the input whose first dimension it is; None where it is not known."""
        while node is not None:
            if node.op == "placeholder":
                return node.name
            module, name = self.module(node), name_of(node)
            if module is not None:
                known = table_type(module, MODULES) is not None and not isinstance(module, nn.Unflatten)
                if not known or (isinstance(module, nn.Flatten) and module.start_dim != 1):
                    return None
            elif name in ("view", "reshape"):
                size = node.args[1] if len(node.args) > 1 else None
                own = isinstance(size, fx.Node) and name_of(size) == "size" and size.args == (node.args[0], 0)
                if not own:
                    return None
            elif name in ("cat", "concat"):
                if argument(node, 1, "dim", 0) != 1:
                    return None
            elif name == "getitem":
                if not isinstance(node.args[1], tuple) or node.args[1][0] != slice(None, None, None):
                    return None
            elif not keeps_shape(node, None) and not (name == "flatten" and argument(node, 1, "start_dim", 0) == 1):
                return None
            node = _first(node)
        return None


def _flattens_all(node: fx.Node) -> bool:
    return bool(argument(node, 1, "start_dim", 0) == 1 and argument(node, 2, "end_dim", -1) == -1)


def _geometry(module: Any) -> list[Hashable]:
    """What a convolution does to the size of an image, by (padding less reach, stride); nothing if it keeps it."""
    if isinstance(module, conv._ConvTransposeNd):
        return [
            ("transposed", module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
        ]
    flat = module._reversed_padding_repeated_twice
    added = [a + b for a, b in zip(flat[::2], flat[1::2], strict=True)][::-1]
    lines = zip(added, module.dilation, module.kernel_size, module.stride, strict=True)
    changes = tuple((p - d * (k - 1), s) for p, d, k, s in lines)
    return [] if set(changes) == {(0, 1)} else [changes]


def _then(events: Events, kind: str, inside: int, outside: int, *changes: Hashable) -> Events:
    """One more layer; layers of one kind in a row count as one, and one that changes nothing does not count."""
    last = events[-1]
    if isinstance(last, tuple) and last[0] == kind:
        inside, changes, events = last[1], (*last[3:], *changes), events[:-1]
    return events if inside == outside and not changes else (*events, (kind, inside, outside, *changes))
