"""The graph of a network as the Lipschitz bound walks it: its operations, their factors, and what is folded where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..nn.plain_layers import table_type
from ..ops.checks import shown
from .lipschitz_factor import Factor, Rule, Site, Unbounded
from .lipschitz_rules import (
    ELEMENTWISE,
    ELEMENTWISE_NAMES,
    FUNCTIONS,
    MODULES,
    SHARES_MEMORY,
    function_factor,
    has_rule,
    module_factor,
    no_constant,
    scaling,
)
from .lipschitz_shapes import Shapes
from .lipschitz_trace import Refused, argument, follow_writes, is_known, name_of, run_example, signals, trace

_POOLING = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_REARRANGEMENTS = ("to", "view", "reshape", "flatten", "permute", "transpose", "movedim", "swapaxes")
_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def _leaves(model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> set[nn.Module]:
    """Modules with a rule, and those of torch.nn that could have one."""
    torch_own = {m for m in model.modules() if type(m).__module__.startswith("torch.nn") and not any(m.children())}
    return torch_own | {m for m in model.modules() if isinstance(m, tuple(rules)) or has_rule(m)}


class Network:
    """The traced graph, and what is folded where."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...], rules: Mapping[type[nn.Module], Rule]) -> None:
        self.rules: dict[type[nn.Module], Rule] = dict(rules)
        self.notes: list[str] = []
        try:
            self.traced: fx.GraphModule = trace(model, example, _leaves(model, self.rules))
        except Refused:
            raise
        except Exception as error:
            raise NotImplementedError(f"lipschitz_bound: {self._untraced(model, error)}") from error
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        graph = self.traced.graph
        follow_writes(graph, self.modules, self._makes_new)
        if example:
            try:
                run_example(self.traced, model, example)
            except NotImplementedError:
                raise
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else shown(x) for x in example)
                reason = _first_line(error.__cause__ or error)
                raise ValueError(f"lipschitz_bound: example must fit the model, got {shapes} ({reason})") from error
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.may_be_complex: bool = self._may_be_complex(model, example)
        self.signals: set[fx.Node] = signals(graph)
        self.shapes: Shapes = Shapes(self.shape, self.target)
        self.before: dict[fx.Node, Tensor] = {}
        self.after: dict[fx.Node, Tensor] = {}
        self.absorbed: set[fx.Node] = set()
        for node in self.nodes:
            factors = self._scaling(node)
            if factors is not None:
                self._fold(node, factors)

    def _untraced(self, model: nn.Module, error: Exception) -> str:
        reason = f"the model cannot be traced by torch.fx ({_first_line(error)}); give the module at fault a constant "
        for name, module in model.named_modules():
            if no_constant(module) and not self._is_ruled(module):
                reason = f"{name} ({type(module).__name__}): {no_constant(module)}; give it a constant "
                break
        return f"{reason}with rules={{Type: function}}"

    def _may_be_complex(self, model: nn.Module, example: tuple[Any, ...]) -> bool:
        """Whether any tensor, number or type of the network is complex."""
        found: list[Any] = [*model.parameters(), *model.buffers(), *example]
        for node in self.nodes:
            found += [self._attribute(node)] if node.op == "get_attr" else [*node.args, *node.kwargs.values()]
        dtypes = [x.dtype if isinstance(x, Tensor) else x for x in found]
        return any(isinstance(x, complex) or (isinstance(x, torch.dtype) and x.is_complex) for x in dtypes)

    def _attribute(self, node: fx.Node) -> Any:
        owner, _, name = str(node.target).rpartition(".")
        return getattr(self.traced.get_submodule(owner), name)

    def _is_ruled(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(self.rules))

    def _makes_new(self, module: nn.Module) -> bool:
        """Whether a module's result shares no memory with its input."""
        kind = table_type(module, MODULES)
        new = kind is not None and kind not in SHARES_MEMORY and type(module).__name__ != "OrthogonalFilter"
        return new and not self._is_ruled(module)

    def target(self, node: fx.Node) -> Any:
        """The module that a node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def shape(self, node: Any) -> tuple[int, ...] | None:
        return node.meta["signal"][0] if isinstance(node, fx.Node) and "signal" in node.meta else None

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        return node.meta["signal"][1] if "signal" in node.meta else None

    # ---- folding

    def _scaling(self, node: fx.Node) -> Tensor | None:
        module = self.target(node)
        return None if module is None or self._is_ruled(module) or not node.args else scaling(module)

    def _fold(self, node: fx.Node, factors: Tensor) -> None:
        """Into the weights just before, which is exact, or into the next ones behind operations that let it pass."""
        source: Any = node.args[0]
        rank = self.shapes.rank(node)
        if rank is None:  # which dimension the channels are is not known
            return
        if self._takes(source, rank) and len(source.users) == 1:
            module = self.target(source)
            if module.weight.shape[0] == len(factors):
                self.after[source] = self.after.get(source, 1) * factors
                self.absorbed.add(node)
                return
        here, flattened = node, False
        while len(here.users) == 1:
            (here,) = here.users
            if self._takes(here, rank):
                module = self.target(here)
                channels = module.weight.shape[1] * getattr(module, "groups", 1)
                if channels == len(factors) or (flattened and channels % len(factors) == 0):
                    self.before[here] = self.before.get(here, 1) * factors
                    self.absorbed.add(node)
                return
            if isinstance(self.target(here), nn.Flatten) and (
                self.target(here).start_dim,
                self.target(here).end_dim,
            ) == (1, -1):
                rank, flattened = 2, True
            elif not self._lets_pass(here, rank):
                return

    def _takes(self, node: Any, rank: int) -> bool:
        """Whether a node is a layer whose input channels are dimension 1 of a signal of this rank."""
        module = self.target(node) if isinstance(node, fx.Node) else None
        if module is None or self._is_ruled(module) or len(node.all_input_nodes) != 1:
            return False
        kind = table_type(module, MODULES)
        return (kind is nn.Linear and rank == 2) or (
            kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and rank == module.weight.dim()
        )

    def _lets_pass(self, node: fx.Node, rank: int) -> bool:
        """Whether a factor a channel can be moved behind: elementwise functions, and pooling within the channels."""
        if len(node.all_input_nodes) != 1:
            return False
        module = self.target(node)
        if module is None:
            name = name_of(node)
            pools = name.startswith(("max_pool", "avg_pool")) and rank == int(name[-2]) + 2
            return is_known(node) and (name in ELEMENTWISE_NAMES or pools)
        kind = table_type(module, MODULES)
        if kind is None or self._is_ruled(module):
            return False
        return issubclass(kind, ELEMENTWISE) or (issubclass(kind, _POOLING) and rank == int(kind.__name__[-2]) + 2)

    # ---- factors

    def factor(self, node: fx.Node, signal: fx.Node, folded: bool) -> Factor:
        """Of an operation with one signal."""
        found = self._factor(node, signal, folded)
        for dtype in (self.dtype(signal), self.dtype(node)):
            if dtype is not None and dtype not in _PRECISE:
                raise Unbounded(f"a signal is {dtype}, whose rounding is no continuous map")
        return found

    def _factor(self, node: fx.Node, signal: fx.Node, folded: bool) -> Factor:
        site = Site(self.shape(signal), self.dtype(signal), self.may_be_complex)
        module = self.target(node)
        if module is None:
            return self._function(node, site)
        for kind, rule in self.rules.items():
            if isinstance(module, kind):
                return Factor(_checked(node, rule(module)), False, "by rules=")
        if folded and node in self.absorbed:
            return Factor(1.0, True, "folded into its neighbour")
        if folded:
            site = replace(site, before=self.before.get(node), after=self.after.get(node))
        return module_factor(module, site)

    def _function(self, node: fx.Node, site: Site) -> Factor:
        if not is_known(node):
            raise Unbounded("it is no function of torch; wrap it in a module and give one with rules={Type: function}")
        for value in (*node.args[1:], *node.kwargs.values()):
            if isinstance(value, torch.dtype) and value not in _PRECISE:
                raise Unbounded("rounding is not continuous")
            if name_of(node) == "to" and isinstance(value, fx.Node) and not self._is_precise(value):
                raise Unbounded("it may round to the type of another tensor")
        name = node.args[1] if name_of(node) == "getattr" else name_of(node)
        if name in FUNCTIONS and name not in _REARRANGEMENTS and len(node.all_input_nodes) > 1:
            raise Unbounded("an argument beside the signal is computed in forward")
        return function_factor(str(name), lambda i, key, default: argument(node, i, key, default), site)

    def _is_precise(self, node: Any) -> bool:
        """Whether a tensor, or the type of one, rounds to nothing coarser than float32."""
        if name_of(node) == "getattr":
            if node.args[1] == "device":
                return True
            node = node.args[0]
        if node.op == "get_attr":
            return self._attribute(node).dtype in _PRECISE
        dtype = self.dtype(node)
        if dtype is not None:
            return dtype in _PRECISE
        # Without an example: inputs are real or complex numbers, and what would make less of them is refused.
        return node.op == "placeholder" or any(map(self._is_precise, node.all_input_nodes))


def _checked(node: fx.Node, value: Any) -> float:
    if not isinstance(value, float | int) or not value >= 0:
        raise ValueError(
            f"lipschitz_bound: rules: the constant of {node.target} must be at least 0, got {shown(value)}"
        )
    return float(value)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].rstrip(".")
