"""The graph of a network as the Lipschitz bound walks it: its operations, their factors, and what is folded where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .lipschitz_rules import (
    SLOPES,
    Factor,
    Rule,
    Unbounded,
    adaptive_avg_pool,
    avg_pool,
    has_rule,
    max_pool,
    module_factor,
    no_constant,
    scaling,
)
from .recorder import unrecorded

_TRANSPARENT = (  # commute with a positive factor per channel
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.modules.dropout._DropoutNd, nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Tracer(fx.Tracer):
    """Every module of ``leaves`` is one operation; all others are looked into."""

    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves


def _leaves(model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> set[nn.Module]:
    """Modules with a rule, and those of torch.nn that could have one; found before weights turn into proxies."""
    torch_own = {m for m in model.modules() if type(m).__module__.startswith("torch.nn") and not any(m.children())}
    return torch_own | {m for m in model.modules() if isinstance(m, tuple(rules)) or has_rule(m)}


class Network:
    """The traced graph, and what is folded where."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...], rules: Mapping[type[nn.Module], Rule]) -> None:
        self.rules = dict(rules)
        self.notes: list[str] = []
        leaves = _leaves(model, self.rules)
        try:
            graph = _Tracer(leaves).trace(model)
            self.module = fx.GraphModule(model, graph)
        except Exception as error:
            reason = (
                f"the model cannot be traced by torch.fx ({_first_line(error)}); give the module at fault a constant "
            )
            for name, module in model.named_modules():
                if no_constant(module) and not isinstance(module, tuple(self.rules)):
                    reason = f"{name} ({type(module).__name__}): {no_constant(module)}; give it a constant "
                    break
            raise NotImplementedError(f"lipschitz_bound: {reason}with rules={{Type: function}}") from error
        if example:
            from torch.fx.passes.shape_prop import ShapeProp  # slow to import

            with torch.no_grad(), unrecorded():
                try:
                    ShapeProp(self.module).propagate(*example)
                except RuntimeError as error:
                    shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in example)
                    reason = _first_line(error.__cause__ or error)
                    raise ValueError(f"lipschitz_bound: example must fit the model, got {shapes} ({reason})") from error
        self.modules = dict(model.named_modules())
        self.nodes = list(graph.nodes)
        self.before: dict[fx.Node, Tensor] = {}
        self.after: dict[fx.Node, Tensor] = {}
        self.absorbed: set[fx.Node] = set()
        for node in self.nodes:
            factors = self._scaling(node)
            if factors is not None:
                self._fold(node, factors)

    def target(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def shape(self, node: Any) -> tuple[int, ...] | None:
        meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
        return tuple(meta.shape) if hasattr(meta, "shape") else None

    def _scaling(self, node: fx.Node) -> Tensor | None:
        module = self.target(node)
        return None if module is None or isinstance(module, tuple(self.rules)) else scaling(module)

    def _fold(self, node: fx.Node, factors: Tensor) -> None:
        """Into the weights just before, which is exact, or into the next ones behind operations that let it pass."""
        source, flat = node.args[0] if node.args else None, self._is_flat(node)
        if self._foldable(source, flat) and len(source.users) == 1:
            module = self.target(source)
            if module.weight.shape[0] == len(factors):
                self.after[source] = self.after.get(source, 1) * factors
                self.absorbed.add(node)
                return
        here = node
        while len(here.users) == 1:
            (here,) = here.users
            flat = flat or isinstance(self.target(here), nn.Flatten)
            if self._foldable(here, flat):
                module = self.target(here)
                channels = module.weight.shape[1] * getattr(module, "groups", 1)
                if channels == len(factors) or (isinstance(module, nn.Linear) and channels % len(factors) == 0):
                    self.before[here] = self.before.get(here, 1) * factors
                    self.absorbed.add(node)
                return
            if not self._lets_pass(here):
                return

    def _is_flat(self, node: fx.Node) -> bool:
        """Whether the signal is (N, C): only then do a normalisation's channels and a Linear's units agree."""
        shape = self.shape(node)
        if shape is not None:
            return len(shape) == 2
        while node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            module = self.target(node)
            if isinstance(module, nn.Flatten):
                return True
            if isinstance(module, nn.Linear):
                note = "Linear layers beside normalisations are taken to see (N, C); an example input checks this"
                self.notes += [note] * (note not in self.notes)
                return True
            if isinstance(module, nn.modules.conv._ConvNd):
                return False
        return False

    def _foldable(self, node: Any, flat: bool) -> bool:
        module = self.target(node) if isinstance(node, fx.Node) else None
        if isinstance(module, nn.Linear) and not flat:
            return False
        return isinstance(module, _WEIGHTED) and not isinstance(module, tuple(self.rules))

    def _lets_pass(self, node: fx.Node) -> bool:
        module = self.target(node)
        if module is not None:
            if isinstance(module, tuple(self.rules)):
                return False
            flat = isinstance(module, nn.Flatten) and module.start_dim == 1
            return flat or isinstance(module, _TRANSPARENT) or type(module).__name__ == "Modulus"
        return node.op == "call_function" and node_name(node) in ("relu", "abs", "modulus", "dropout", "max_pool2d")

    def factor(self, node: fx.Node, folded: bool) -> Factor:
        """Of an operation with one signal."""
        shape = self.shape(node.args[0]) if node.args else None
        module = self.target(node)
        if module is not None:
            for kind, rule in self.rules.items():
                if isinstance(module, kind):
                    return Factor(_checked(node, rule(module)), False, "by rules=")
            if not folded:
                found = module_factor(module, None, None, shape)
            elif node in self.absorbed:
                return Factor(1.0, True, "folded into its neighbour")
            elif isinstance(self.before.get(node), Tensor) or isinstance(self.after.get(node), Tensor):
                found = module_factor(module, self.before.get(node), self.after.get(node), shape)
            else:
                found = module_factor(module, None, None, shape)
            if found is None:
                raise Unbounded("there is no rule for this module; give one with rules={Type: function}")
            return found
        return self._function(node, shape)

    def _function(self, node: fx.Node, shape: tuple[int, ...] | None) -> Factor:
        name, args = node_name(node), node.args
        if name.startswith("dropout") and _argument(node, 2, "training", _argument(node, 2, "train", True)):
            raise Unbounded("it is random in evaluation mode, too; pass training=self.training")
        if name == "to" and any(_is_whole(value) for value in (*args[1:], *node.kwargs.values())):
            raise Unbounded("rounding is not continuous")
        if name in SLOPES:
            return Factor(float(SLOPES[name]))
        if name == "leaky_relu":
            return Factor(max(1.0, abs(_argument(node, 1, "negative_slope", 0.01))))
        if name == "getitem" and _plain_index(args[1]):
            return Factor(1.0, False, "a part of the signal")
        if name.startswith("max_pool") and name[-2:-1] in "123":
            dilation = _argument(node, 4, "dilation", 1)
            kernel, stride = _argument(node, 1, "kernel_size", 1), _argument(node, 2, "stride", None)
            return max_pool(kernel, stride, dilation, int(name[-2]))
        if name.startswith("avg_pool") and name[-2:-1] in "123":
            names = (("kernel_size", 1), ("stride", None), ("padding", 0), ("ceil_mode", False))
            options = [_argument(node, i, key, default) for i, (key, default) in enumerate(names, 1)]
            count = _argument(node, 5, "count_include_pad", True)
            return avg_pool(*options, count, _argument(node, 6, "divisor_override", None), int(name[-2]))
        if name.startswith("adaptive_avg_pool") and name[-2:-1] in "123":
            return adaptive_avg_pool(_argument(node, 1, "output_size", 1), int(name[-2]), shape)
        if name == "mean":
            if shape is None:
                return Factor(1.0, False, "less for larger signals; pass an example input")
            dims = _argument(node, 1, "dim", None)
            dims = range(1, len(shape)) if dims is None else ((dims,) if isinstance(dims, int) else dims)
            return Factor(1 / math.sqrt(math.prod(shape[d] for d in dims)))
        raise Unbounded(f"there is no rule for {name}; wrap it in a module and give one with rules={{Type: function}}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, torch.dtype) and not (value.is_floating_point or value.is_complex)


def _checked(node: fx.Node, value: Any) -> float:
    if not isinstance(value, float | int) or not value >= 0:
        raise ValueError(f"lipschitz_bound: rules: the constant of {node.target} must be at least 0, got {value!r}")
    return float(value)


def node_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _plain_index(index: Any) -> bool:
    index = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index)


def is_size(node: fx.Node) -> bool:
    """Whether the value is a shape, and not a signal."""
    if node_name(node) == "getattr":
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].rstrip(".")
