"""Global Lipschitz bounds and certified radii (arXiv 1708.00631, contractive networks)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..nn.originals import replaced
from ..ops.checks import check_module, shown, type_name
from .lipschitz_factor import Factor, Rule, Unbounded
from .lipschitz_graph import Network
from .lipschitz_rules import has_rule
from .lipschitz_trace import BINARY, is_known, name_of
from .recorder import unrecorded
from .results import COLOURS, Result, figure, over_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LipschitzFactor(Result):
    """One operation: natural logarithms of its factor, alone and with normalisations folded into the weights."""

    name: str
    kind: str
    log_factor: float
    log_folded: float
    exact: bool  #: the operation's own constant; else an upper bound of it
    note: str


@dataclass(frozen=True)
class LipschitzBound(Result):
    """``|f(x) - f(x')| <= bound |x - x'|`` in l2 for all x, x', in evaluation mode. Logarithms are natural.

    ``log_bound``: the product of all factors (with sums where branches meet). ``log_folded``: the same after every
    frozen normalisation is multiplied into a weight next to it; never larger.
    """

    log_bound: float
    log_folded: float
    factors: list[LipschitzFactor]
    notes: list[str]

    @property
    def bound(self) -> float:
        """May overflow to inf; the logarithm does not."""
        return _exp(self.log_bound)

    @property
    def folded(self) -> float:
        return _exp(self.log_folded)

    @property
    def contractive(self) -> bool:
        """Whether the folded bound is below 1."""
        return self.log_folded < 0

    def plot(self) -> Figure:
        """log10 of the factors, one bar an operation with a factor other than 1."""
        made, (axis,) = figure(1, width=6.5)
        shown = [f for f in self.factors if f.log_factor or f.log_folded]
        for shift, colour, key in ((-0.2, COLOURS[0], "log_factor"), (0.2, COLOURS[1], "log_folded")):
            heights = [getattr(f, key) / math.log(10) for f in shown]
            label = {"log_factor": "alone", "log_folded": "folded"}[key]
            axis.bar([i + shift for i in range(len(shown))], heights, 0.4, color=colour, label=label)
        over_layers(axis, [f.name for f in shown])
        axis.set_ylabel("log10 of the factor")
        total = f"bound 1e{self.log_bound / math.log(10):.2f}, folded 1e{self.log_folded / math.log(10):.2f}"
        axis.set_title(total, fontsize=10)
        axis.legend(fontsize=8, frameon=False)
        return made


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _log(value: float) -> float:
    """What is not a number bounds nothing: it counts as infinite."""
    if math.isnan(value):
        return math.inf
    return math.log(value) if value > 0 else -math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module in its own mode afterwards.

    Through ``train()``, because some modules do work there (LoRA layers merge their weights in evaluation).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


def _log_sum(values: list[float], power: float = 1.0) -> float:
    """log of the l1 (power 1) or l2 (power 2) norm of exp(values)."""
    top = max(values, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(sum(math.exp(power * (v - top)) for v in values)) / power


def lipschitz_bound(
    model: nn.Module, *example: Any, rules: Mapping[type[nn.Module], Rule] | None = None
) -> LipschitzBound:
    """An upper bound of the Lipschitz constant of ``model`` in l2, as a function of all its inputs, in evaluation mode.

    Factors are multiplied along the graph that ``torch.fx`` traces, and added where branches are summed (residual
    connections). Linear: the largest singular value. Convolutions of any stride, padding, dilation and groups, also
    transposed: through the Fourier transform of the kernel, exact for circular padding with a known image size, else
    for images of any size and at most some per cent too large (2 % for 64 channels and 3x3 kernels, 40 % for 512).
    BatchNorm and BatchRMSNorm: frozen at their running statistics. LayerNorm and its kin: their worst case, which is
    large. The folded bound multiplies frozen normalisations into weights. Writes into tensors (``h += x``,
    ``h.mul_(2)``, ``out=``, in-place activations) count wherever the tensor is used afterwards.

    Inputs are batches: their first dimension counts samples. Signals are real unless a parameter, a number or the
    example is complex. The bound is that of exact arithmetic: rounding to float32 and finer is not counted, and coarser
    types are refused.

    Args:
        model: the module; its mode does not matter.
        example: optional example inputs. They tell shapes and types (for means, adaptive pooling, circular padding,
            broadcasting, folding), and the trace is compared with a call of the model. Arguments that are left out have
            their defaults.
        rules: ``{Type: function}``: function(module) gives the constant of modules of this type, which must not write
            into their input; they come first.

    Raises:
        NotImplementedError: what the bound cannot vouch for, by its name and with the reason: an operation without a
            known constant, a module with hooks or a replaced forward, a write that cannot be followed, a function
            that differs from call to call, a model that cannot be traced.
        TypeError, ValueError: ``model`` is not a module; ``rules`` or ``example`` do not fit.

    Example::

        bound = co.analysis.lipschitz_bound(model)
        print(bound.log_bound, bound.log_folded, bound.contractive)
    """
    check_module("lipschitz_bound", model)
    if what := replaced():
        raise NotImplementedError(f"lipschitz_bound: {what}")
    given = rules.items() if isinstance(rules, Mapping) else [(rules, None)] * (rules is not None)
    if not all(isinstance(kind, type) and callable(rule) for kind, rule in given):
        raise TypeError(f"lipschitz_bound: rules must be {{Type: function}}, got {shown(rules)}")
    if type(model).__name__ == "OptimizedModule":  # what torch.compile returns: the same function
        model = model.get_submodule("_orig_mod")
    ruled = has_rule(model) or isinstance(model, tuple(rules or ()))
    if ruled and not isinstance(model, nn.Sequential):
        mode = model.training
        model = nn.Sequential(model)  # torch.fx looks into the module it is given
        model.training = mode
    factors: list[LipschitzFactor] = []
    plain: dict[fx.Node, float] = {}
    folded: dict[fx.Node, float] = {}
    with evaluating(model):
        network = Network(model, example, rules or {})
        for node in network.nodes:
            _visit(network, node, plain, folded, factors)
    end = network.nodes[-1]
    return LipschitzBound(plain[end], min(plain[end], folded[end]), factors, network.notes)


def _visit(
    network: Network,
    node: fx.Node,
    plain: dict[fx.Node, float],
    folded: dict[fx.Node, float],
    factors: list[LipschitzFactor],
) -> None:
    signals = [n for n in node.all_input_nodes if n in network.signals]
    if node.op == "placeholder":
        plain[node] = folded[node] = 0.0
    elif node not in network.signals:  # constants
        plain[node] = folded[node] = -math.inf
    elif node.op == "output":
        parts: list[fx.Node] = []  # a signal that is returned twice counts twice
        fx.map_arg(node.args, parts.append)
        for logs in (plain, folded):
            logs[node] = _log_sum([logs[n] for n in parts if n in signals], 2)
    elif not is_known(node):
        raise _sentence(
            network, node, "it is no function of torch; wrap it in a module and give one with rules={Type: function}"
        )
    elif len(signals) == 1 and node.op != "call_module" and name_of(node) in BINARY and not _twice(node, signals[0]):
        value = _with_constant(network, node, signals[0])
        for logs in (plain, folded):
            logs[node] = logs[signals[0]] + _log(value)
        if value != 1:
            factors.append(LipschitzFactor(node.name, name_of(node), _log(value), _log(value), True, ""))
    elif name_of(node) in _JOINS and node.op != "call_module":
        _join(network, node, signals, plain, folded, factors)
    elif len(signals) == 1 and not _twice(node, signals[0]):
        factor, tight = _factors(network, node, signals[0])
        plain[node] = plain[signals[0]] + _log(factor.value)
        folded[node] = folded[signals[0]] + _log(tight.value)
        name = str(node.target) if node.op == "call_module" else node.name
        kind = type(network.target(node)).__name__ if node.op == "call_module" else name_of(node)
        note = "; ".join(dict.fromkeys(n for n in (factor.note, tight.note) if n))
        factors.append(LipschitzFactor(name, kind, _log(factor.value), _log(tight.value), factor.exact, note))
    else:
        raise _sentence(
            network, node, "it combines several signals in a way that has no global Lipschitz constant here"
        )


def _factors(network: Network, node: fx.Node, signal: fx.Node) -> tuple[Factor, Factor]:
    try:
        factor = network.factor(node, signal, folded=False)
        touched = node in network.absorbed or node in network.before or node in network.after
        return factor, network.factor(node, signal, folded=True) if touched else factor
    except Unbounded as reason:
        raise _sentence(network, node, str(reason)) from None


def _sentence(network: Network, node: fx.Node, reason: str) -> NotImplementedError:
    module = network.target(node)
    what = f"{node.target} ({type(module).__name__})" if module is not None else f"{name_of(node)} (at {node.name})"
    return NotImplementedError(f"lipschitz_bound: {what}: {reason}")


_JOINS = frozenset({
    "add", "sub", "rsub", "iadd", "isub", "add_", "sub_", "cat", "concat", "stack",
})  # fmt: skip


def _operands(node: fx.Node) -> list[Any]:
    """Of an operation of two, also where they are given by name."""
    return [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)][:2]


def _twice(node: fx.Node, signal: fx.Node) -> bool:
    """Whether both operands are the signal, as in x + x."""
    return sum(operand is signal for operand in _operands(node)) > 1


def _with_constant(network: Network, node: fx.Node, signal: fx.Node) -> float:
    """signal (+, -, *, /) a number; parameters and buffers only where they are added to a signal of their shape."""
    name = name_of(node)
    operands = _operands(node)
    other: Any = next((operand for operand in operands if operand is not signal), None)
    if isinstance(other, fx.Node):
        fits = network.shape(signal) is not None and network.shape(signal) == network.shape(node)
        if "mul" in name or "div" in name or not fits:
            hint = "" if network.shape(signal) is not None else "; pass an example input"
            raise _sentence(network, node, f"a tensor is combined with the signal and may be broadcast{hint}")
        return _alpha(node, signal)
    if "mul" in name:
        return float(abs(other))
    if "div" in name:
        if operands[0] is not signal:
            raise _sentence(network, node, "division by a signal has no global Lipschitz constant")
        if node.kwargs.get("rounding_mode"):
            raise _sentence(network, node, "rounding is not continuous")
        return 1 / abs(other) if other else math.inf
    return _alpha(node, signal)


def _alpha(node: fx.Node, signal: Any, position: int | None = None) -> float:
    """|alpha|: torch.add(a, b, alpha=...) scales its second argument, torch.rsub its first."""
    operands = _operands(node)
    position = (1 if operands[1] is signal else 0) if position is None else position
    scaled = 0 if name_of(node) == "rsub" else 1
    alpha: Any = node.kwargs.get("alpha", 1)
    return float(abs(alpha)) if position == scaled else 1.0


def _join(
    network: Network,
    node: fx.Node,
    signals: list[fx.Node],
    plain: dict[fx.Node, float],
    folded: dict[fx.Node, float],
    factors: list[LipschitzFactor],
) -> None:
    """Sums add the constants of their terms (twice if a term comes twice), concatenations their squares."""
    if name_of(node) in ("cat", "concat", "stack"):
        parts = node.args[0] if node.args else node.kwargs["tensors"]
        if not isinstance(parts, list | tuple):
            raise _sentence(network, node, "how many signals it joins cannot be told")
        terms, power = [(n, 0.0) for n in parts if n in signals], 2.0
    else:
        operands = _operands(node)
        shapes = [network.shape(n) for n in operands]
        if not network.shapes.equal(*operands):
            known = f"signals of shapes {shapes[0]} and {shapes[1]} are broadcast"
            unknown = "its terms may have different shapes, and be broadcast; pass an example input"
            raise _sentence(network, node, unknown if None in shapes else known)
        note = "the terms of sums are taken to have equal shapes; an example input checks this"
        if None in shapes and note not in network.notes:
            network.notes.append(note)
        pairs = [(n, _log(_alpha(node, n, i))) for i, n in enumerate(operands)]
        terms, power = [(n, a) for n, a in pairs if n in signals], 1.0
    for logs in (plain, folded):
        logs[node] = _log_sum([logs[n] + a for n, a in terms], power)
    grown = [logs[node] - max(logs[n] for n, _ in terms) for logs in (plain, folded)]
    note = "its branches' constants are added" if power == 1 else "its parts' squares are added"
    factors.append(LipschitzFactor(node.name, name_of(node), grown[0], grown[1], False, note))


def certified_radius(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    bound: LipschitzBound | float | None = None,
) -> Tensor:
    """For every sample, an l2 distance within which no input is classified otherwise: margin / (sqrt(2) bound).

    The margin is the logit of the class less the largest other one; two logits together change by at most sqrt(2) bound
    times the distance. The class is the predicted one, or that of ``targets``; then the radius of
    misclassified samples is 0.

    Args:
        model: (N, ...) to logits (N, C), C >= 2; called in evaluation mode and left in its own.
        inputs, targets: samples and, optionally, their classes, int64 (N,).
        bound: what :func:`lipschitz_bound` returned (its folded bound is used) or a number; None: computed here.

    Returns:
        float64 (N,), in the units of ``inputs``; 0 for samples whose logits are not all finite.

    Raises:
        TypeError, ValueError: types, shapes, classes out of range, or a bound that is not positive.
        NotImplementedError: as :func:`lipschitz_bound`.
    """
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) and not (name == "targets" and value is None):
            raise TypeError(f"certified_radius: {name} must be a Tensor, got {type_name(value)}")
    bound = lipschitz_bound(model, inputs[:1]) if bound is None else bound
    if not isinstance(bound, LipschitzBound | int | float):
        raise TypeError(f"certified_radius: bound must be a LipschitzBound or a number, got {type_name(bound)}")
    if not isinstance(bound, LipschitzBound) and not bound > 0:
        raise ValueError(f"certified_radius: bound must be positive, got {bound}")
    log_bound = bound.log_folded if isinstance(bound, LipschitzBound) else math.log(bound)
    with evaluating(model), torch.no_grad(), unrecorded():
        logits = model(inputs)
    if logits.is_complex():
        raise TypeError(f"certified_radius: the model must return real logits, got {logits.dtype}")
    logits = logits.double()
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"certified_radius: the model must return logits (N, C) with C >= 2, got shape {tuple(logits.shape)}"
        )
    if targets is None:
        targets = logits.argmax(1)
    elif targets.shape != logits.shape[:1]:
        raise ValueError(f"certified_radius: targets must be ({len(logits)},), got shape {tuple(targets.shape)}")
    elif targets.dtype != torch.int64:
        raise TypeError(f"certified_radius: targets must be int64, got {targets.dtype}")
    elif len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(
            f"certified_radius: targets must be classes in [0, {logits.shape[1]}), got {int(targets.min())} to "
            f"{int(targets.max())}"
        )
    own = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -math.inf).amax(1)
    margin = torch.where(logits.isfinite().all(1), own - others, 0).clamp(min=0)
    radius = (margin.log() - log_bound - 0.5 * math.log(2)).exp()
    return radius.nan_to_num(nan=0.0, posinf=math.inf)  # NaN: no margin, and a bound of 0
