"""What a model computes, as a graph of operations without side effects, or the reason why that cannot be told.

``torch.fx`` follows values, not memory, and sees neither hooks nor what a forward pass leaves behind. Here writes are
followed too: after ``h.mul_(10)`` every later use of ``h`` is the result of that operation. What cannot be followed is
refused.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..nn.plain_layers import objection
from ..ops.modulus import modulus
from .recorder import unrecorded

# Where the standard library is: its functions may ask for types.
_STANDARD = (os.path.dirname(os.__file__), "<frozen")


class Refused(NotImplementedError):
    """A reason why there is no certificate, as a sentence."""


def _refuse(what: str, reason: str) -> Refused:
    return Refused(f"lipschitz_bound: {what}: {reason}")


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_size(node: fx.Node) -> bool:
    """Whether the value is a shape, a type or a device, and not a signal."""
    if name_of(node) == "getattr":
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def signals(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on an input, other than through its shape."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (not is_size(node) and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def is_known(node: fx.Node) -> bool:
    """Whether a called function is the one of this name of Python, torch or this package."""
    if node.op != "call_function":
        return True
    name, homes = name_of(node), (operator, builtins, torch, functional, torch.special, torch._C._nn)
    return node.target is modulus or any(getattr(home, name, None) is node.target for home in homes)


# ---- values that stand for tensors

_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
)  # fmt: skip
# Of two operands, one of which may be a number.
BINARY = frozenset({
    "add", "sub", "rsub", "iadd", "isub", "add_", "sub_", "mul", "imul", "mul_", "div", "truediv", "itruediv", "div_",
})  # fmt: skip


class _Writes:
    """Python's ``+=`` and its kin write into a tensor; ``fx.Proxy`` would take them for ``h = h + x``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _refuse("setitem", "an assignment to a part of a tensor cannot be followed")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise _refuse(f"{name} = ...", "an attribute of a tensor is assigned, which cannot be followed")
        object.__setattr__(self, name, value)

    def __getattr__(self: Any, name: str) -> _Attribute:
        if not hasattr(Tensor, name):  # hasattr() in the model's code is answered as for a tensor
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return _Attribute(self, name)


def _writing(name: str) -> Callable[..., Any]:
    function = getattr(operator, f"i{name}")

    def write(self: Any, other: Any) -> fx.Proxy:
        made: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return made

    return write


for _each in _OPERATORS:
    setattr(_Writes, f"__i{_each}__", _writing(_each))


class _Value(_Writes, fx.Proxy):
    pass


class _Attribute(_Writes, fx.proxy.Attribute):
    pass


class _Tracer(fx.Tracer):
    """Every module of ``leaves`` is one operation; all others are looked into."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: set[nn.Module], example: tuple[Any, ...]) -> None:
        super().__init__(autowrap_functions=(modulus,))
        self.leaves, self.example = leaves, example
        self.before = {module: _attributes(module) for module in leaves}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise _refuse("torch.autocast", "it rounds to a coarser type, which is no continuous map")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(self, function: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        """Tensors become placeholders. Other inputs, and those left to their defaults, are what a call would have."""
        inputs = [
            self.create_proxy("placeholder", name, (), {}) if symbolic else value
            for name, value, symbolic in _inputs(function, self.example)
        ]
        return lambda: function(self.root, *inputs), []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return module in self.leaves

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(module)
        check_called(module, name, module in self.leaves)
        if module in self.leaves and _attributes(module) != self.before[module]:
            raise _refuse(f"{name} ({type(module).__name__})", "forward changes it before it is called")
        return super().call_module(module, forward, args, kwargs)


def check_called(module: nn.Module, name: str, leaf: bool) -> None:
    """Refuses a module whose call may not be what its class says, or that stays in training mode."""
    what = f"{name or 'the model'} ({type(module).__name__})"
    if objection(module):
        raise _refuse(what, objection(module))
    if leaf and module.training:
        raise _refuse(what, "it stays in training mode after eval()")


# ---- inputs, and questions for their type


def _inputs(function: Callable[..., Any], example: tuple[Any, ...]) -> list[tuple[str, Any, bool]]:
    """(name, value, whether it is a signal) of what ``forward`` is called with."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in positional]
    if example:
        names += [f"input_{i}" for i in range(len(names), len(example))]
        signals = [any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)) for value in example]
        return list(zip(names, example, signals, strict=False))
    required = [p.name for p in positional if p.default is p.empty]
    return [(name, None, True) for name in required or names[:1] or ["input_0"]]


def _is_number(node: fx.Node) -> bool:
    """Whether a value is made of sizes alone."""
    return is_size(node) or (bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes)))


@functools.cache
def _asks_for_type(code: CodeType) -> bool:
    """Whether a function calls ``type()`` or reads ``__class__``, which say that a traced value is no tensor."""
    asked = [i.argval for i in dis.get_instructions(code) if i.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME"))]
    return "type" in asked or "__class__" in code.co_names


@contextmanager
def _no_type_asked() -> Iterator[None]:
    """Refuses a model whose own code asks for exact types; only a call with real tensors shows what it does then."""
    asking: list[CodeType] = []
    before, package = sys.getprofile(), __name__.partition(".")[0]

    def seen(frame: FrameType, event: str, value: Any) -> None:
        home = frame.f_globals.get("__name__", "").partition(".")[0]
        if event == "call" and home not in ("torch", package) and _asks_for_type(frame.f_code):
            asking.append(frame.f_code)

    sys.setprofile(seen)
    try:
        yield
    finally:
        sys.setprofile(before)
    outside = [code for code in asking if not code.co_filename.startswith(_STANDARD)]
    if outside:
        raise _refuse(outside[0].co_name, "it asks for the type of a value; pass an example input")


@contextmanager
def _typed() -> Iterator[None]:
    """``isinstance(x, Tensor)`` in the model's own code is answered as for a tensor, not for what stands for it."""
    plain, tensor, package = builtins.isinstance, torch.empty(0), __name__.partition(".")[0]

    def typed(value: Any, kinds: Any) -> bool:
        if type(value) in (_Value, _Attribute):
            frame = sys._getframe(1)
            home = frame.f_globals.get("__name__", "").partition(".")[0]
            if home not in ("torch", package) or frame.f_code.co_name == "is_tensor":
                if _is_number(value.node):
                    raise _refuse("isinstance", "the type of a size is asked for, which cannot be followed")
                value = tensor
        return plain(value, kinds)

    builtins.isinstance = typed
    try:
        yield
    finally:
        builtins.isinstance = plain


# ---- what a forward pass leaves behind


def _content(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | set) else None


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module computes with, by identity."""
    return {name: (id(value), *map(id, _content(value) or [])) for name, value in vars(module).items()}


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written to; through ``data`` without a trace in its version."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer) or tensor.is_meta or not tensor.numel():
        return ()
    with torch.no_grad():
        wide = tensor.detach().reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64)
        weights = torch.linspace(1, 2, len(wide), dtype=torch.float64, device=wide.device).to(wide.dtype)
        return (None if tensor.is_inference() else tensor._version, repr(torch.dot(wide, weights).item()))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes of the modules are afterwards what they were before; a tensor that was written to is refused."""
    memory = [(m, {name: (value, _content(value)) for name, value in vars(m).items()}) for m in model.modules()]
    tensors = [
        (type(module).__name__, name, value, _mark(value))
        for module in model.modules()
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items())
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for module, before in memory:
            now = vars(module)
            for name in now.keys() - before.keys():
                del now[name]
            for name, (value, content) in before.items():
                now[name] = value
                if content is not None and [*map(id, _content(value) or [])] != [*map(id, content)]:
                    half = len(content) // 2
                    value.clear()
                    if isinstance(value, dict):
                        value.update(zip(content[:half], content[half:], strict=True))
                    else:
                        value.extend(content) if isinstance(value, list) else value.update(content)
    for kind, name, tensor, mark in tensors:
        if _mark(tensor) != mark:
            raise _refuse(
                kind, f"forward writes to its attribute {name}, so that the next call may give another result"
            )


def _is_same(first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two traces are one: operations, numbers and constant tensors."""
    a, b = list(first.graph.nodes), list(second.graph.nodes)
    if [node.format_node() for node in a] != [node.format_node() for node in b]:
        return False
    if any(used.graph is not second.graph for node in b for used in node.all_input_nodes):
        return False
    made = [node.target for node in b if node.op == "get_attr" and node.target.startswith("_tensor_constant")]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in made)


def trace(model: nn.Module, example: tuple[Any, ...], leaves: set[nn.Module]) -> fx.GraphModule:
    """The graph of ``model`` in evaluation mode.

    Two traces, with gradients and without, must agree: nothing is random or remembered, or asks for their mode.
    """
    check_called(model, "", False)
    found = []
    with _unchanged(model), _typed(), nullcontext() if example else _no_type_asked():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                traced = _Tracer(leaves, example).trace(model)
            found.append(fx.GraphModule(model, traced))
            for name in [name for name in vars(model) if name.startswith("_tensor_constant")]:
                delattr(model, name)
    if not _is_same(*found):
        raise _refuse(
            "the model",
            "two calls in a row compute different functions: it is random, or it remembers something, or it asks "
            "whether gradients are enabled",
        )
    return found[0]


# ---- writes


_IN_PLACE = frozenset(f"i{name}" for name in _OPERATORS)
# Functions whose result never shares memory with an argument; of all others it is taken to.
_NEW = frozenset({
    "add", "sub", "rsub", "mul", "div", "truediv", "neg", "negative", "abs", "relu", "relu6", "tanh", "sigmoid",
    "softsign", "hardtanh", "hardsigmoid", "softplus", "gelu", "silu", "modulus", "sin", "cos", "logsigmoid",
    "softmax", "softmin", "log_softmax", "selu", "elu", "celu", "leaky_relu", "rrelu", "threshold",
    "hardshrink", "softshrink", "tanhshrink", "mish", "hardswish", "cat", "concat", "stack", "mean", "clone",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d",
})  # fmt: skip


def written(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    """What an operation writes into, or None."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_module":
        return node.all_input_nodes[0] if getattr(modules[str(node.target)], "inplace", False) else None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    name = name_of(node)
    writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("inplace")
    return first if writes else None


def follow_writes(graph: fx.Graph, modules: Mapping[str, nn.Module], makes_new: Callable[[nn.Module], bool]) -> None:
    """Makes every use of a tensor after it was written to a use of the operation that wrote.

    Refused: writes to parameters, buffers and constants, and writes through one of several views of a memory of which
    another is used later.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    shares: dict[fx.Node, list[fx.Node]] = {}
    inside = signals(graph)
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        target = written(node, modules)
        new = (
            makes_new(modules[str(node.target)])
            if node.op == "call_module"
            else name_of(node) in _NEW and is_known(node)
        )
        joined = [node]
        if target is None:
            sharing = [] if new or is_size(node) else inputs
        else:
            sharing = [target] if isinstance(target, fx.Node) else []
        for other in sharing:
            if shares[other] is not joined:
                joined += shares[other]
                for member in joined:
                    shares[member] = joined
        shares[node] = joined
        if target is None or (isinstance(target, fx.Node) and _is_number(target)):
            continue
        if not isinstance(target, fx.Node) or target not in inside:
            raise _refuse(f"{name_of(node)} (at {node.name})", "it writes to a parameter, a buffer or a constant")
        for other in shares[target]:
            used = any(order[user] > order[node] for user in other.users) or other in inputs
            if other is not target and other is not node and used:
                raise _refuse(
                    f"{name_of(node)} (at {node.name})",
                    f"it writes into memory that {other.name}, which is used later, may share",
                )
        node.meta["writes"] = True
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)


# ---- the example


def _agree(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    size = float(b.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6 * size, equal_nan=True)


def run_example(traced: fx.GraphModule, model: nn.Module, example: tuple[Any, ...]) -> None:
    """Shapes and types of all values, from a call of both; refused where they differ or write what nobody sees."""

    class Run(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            args = self.fetch_args_kwargs_from_env(node)
            read = [t for t in tree_leaves(args) if isinstance(t, Tensor) and not t.is_inference()]
            before = [tensor._version for tensor in read]
            result = super().run_node(node)
            if isinstance(result, Tensor):
                node.meta["signal"] = (tuple(result.shape), result.dtype)
            if not node.meta.get("writes") and before != [tensor._version for tensor in read]:
                raise _refuse(f"{node.target if node.op == 'call_module' else node.name}", "it writes into its input")
            return result

    def copied() -> list[Any]:
        return [tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value) for value in example]

    with torch.no_grad(), unrecorded(), _unchanged(model):
        symbolic = [value for value in copied() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))]
        found, expected = Run(traced).run(*symbolic), model(*copied())
    a, b = (tree_flatten(value)[0] for value in (found, expected))
    if len(a) != len(b) or not all(map(_agree, a, b)):
        raise _refuse("the model", "the traced graph gives another result than the model for the example input")
