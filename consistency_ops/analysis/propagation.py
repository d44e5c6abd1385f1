"""Residual propagation: singular values of block Jacobians, and the share of the residual that passes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ..nn import BatchRMSNorm
from ..ops.checks import check_integers, check_numbers, shown, type_name
from .graph_paths import ancestors, goes_around, node_of
from .jacobian import Block
from .recorder import Layers, choose, first_tensor, unrecorded, weighted
from .results import COLOURS, Result, figure, log_scale, over_layers, series
from .time_limit import is_limited, out_of_time, seconds_left, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BlockPropagation(Result):
    """Figures of J = d (output of ``end``) / d (output of ``start``): means over the samples; NaN if not computed.

    With ``method`` "exact" they come from the whole J. With "lanczos" ``sigma_max`` converges from below; mean, rank
    and image fraction are estimates by Gauss quadrature of the spectral measure, with a coarser ``tau``. With
    "gradient", where J is large and an operation in it has no second derivative, there is the gain alone.
    """

    start: str
    end: str
    inputs: int  #: units of one sample at ``start``
    outputs: int  #: units of one sample at ``end``
    method: str
    tau: float  #: singular values up to tau sigma_max count as 0
    sigma_max: float
    sigma_min: float  #: the smallest of the min(inputs, outputs) singular values
    mean_singular_value: float
    rank: float  #: number of singular values above tau sigma_max
    nullity: float  #: outputs - rank: dimension of the kernel of the adjoint
    #: ``|U U^T r|^2 / |r|^2``: U has the left singular vectors that ``rank`` counts, r is the residual at ``end``
    image_fraction: float
    decay: float  #: ``|J^T r| / (sigma_max |r|)``
    gain: float  #: ``|J^T r| / |r|``
    singular_values: list[list[float]]  #: of every sample, largest first; [] where J was not computed whole
    bypassed: bool = False  #: the output depends on what comes before ``end`` by another way, too: a skip connection


@dataclass(frozen=True)
class Propagation(Result):
    """Blocks from input to output."""

    blocks: list[BlockPropagation]
    samples: int
    residual: str  #: "loss" or "random"
    left_out: list[str] = field(default_factory=list)  #: blocks that could not be measured, and why

    def plot(self) -> Figure:
        """Plot largest and mean singular value, image fraction and decay of every block."""
        inside = any(not math.isnan(b.image_fraction) for b in self.blocks)
        made, axes = figure(2 if inside else 1, width=5.6)
        names = [block.start for block in self.blocks]
        for colour, key in zip(COLOURS, ("sigma_max", "mean_singular_value", "gain"), strict=False):
            if all(math.isnan(getattr(b, key)) for b in self.blocks):
                continue
            label = {"gain": "|JᵀR| / |R|"}.get(key, key.replace("_", " "))
            series(axes[0], names, [getattr(b, key) for b in self.blocks], colour, label)
        log_scale(axes[0])
        for colour, key in zip(COLOURS[3:], ("image_fraction", "decay") if inside else (), strict=False):
            label = key.replace("_", " ")
            series(axes[1], names, [getattr(b, key) for b in self.blocks], colour, label)
        axes[-1].set_ylim(*((-0.03, 1.03) if inside else axes[-1].get_ylim()))
        titles = "Jacobian of the block that starts at", "residual that comes through"
        for axis, title in zip(axes, titles, strict=False):
            over_layers(axis, names)
            axis.set_title(title, fontsize=10)
            axis.legend(fontsize=8, frameon=False)
        return made


@contextmanager
def frozen(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Put the model in evaluation mode; if it was training, batch norms keep the statistics of ``run()``'s batch.

    Modes and buffers are as before afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    norms = [
        (module, "decay", module.decay) if isinstance(module, BatchRMSNorm) else (module, "momentum", module.momentum)
        for module in model.modules()
        if module.training and (isinstance(module, BatchRMSNorm) or getattr(module, "track_running_stats", False))
    ]
    model.eval()
    try:
        if norms:
            for module, option, _ in norms:  # only the batch that comes counts
                setattr(module, option, 0.0 if option == "decay" else 1.0)
                module.train()
            with torch.no_grad():
                run()
            for module, _, _ in norms:
                module.eval()
        yield
    finally:
        for module, option, value in norms:
            setattr(module, option, value)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class _Tape:
    """One forward pass with its graph: inputs and outputs of the chosen layers in the order of their calls."""

    def __init__(
        self, model: nn.Module, chosen: dict[str, nn.Module], inputs: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> None:
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        inputs, keywords = tree_map(_started, (inputs, dict(keywords)))
        first = first_tensor((inputs, keywords))
        if first is not None:
            self._keep("input", first)
        calls: dict[str, int] = {}

        def see(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                tensor = first_tensor(output)
                if tensor is None:
                    return None
                if not tensor.requires_grad and tensor is output:
                    output = tensor = _leaf(tensor)  # behind frozen parameters and token numbers the graph starts here
                calls[name] = calls.get(name, 0) + 1
                self._keep(name if calls[name] == 1 else f"{name} (call {calls[name]})", tensor)
                # A copy goes on: an activation in place would change what is kept.
                return tensor.clone() if tensor is output else None

            return hook

        handles = [module.register_forward_hook(see(name)) for name, module in chosen.items()]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
                output = model(*inputs, **keywords)
        finally:
            for handle in handles:
                handle.remove()
        self.output = output
        end = first_tensor(output)
        if end is None:
            raise TypeError(f"propagation: the model must return a floating-point tensor, got {type_name(output)}")
        self.end = end

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.names.append(name)
        self.tensors.append(tensor)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _started(x: Any) -> Any:
    return _leaf(x) if isinstance(x, Tensor) and x.is_floating_point() else x


def _first(x: Any, count: int, batch: int) -> Any:
    return x[:count] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x


def _pairs(tape: _Tape, to: str) -> list[tuple[int, str, Tensor]]:
    """Return (index of the start, name and tensor of the end); the end is the first later layer that depends on it."""
    ends = [*zip(tape.names, tape.tensors, strict=True), ("output", tape.end)]
    before = [ancestors(node_of(end)) if end.requires_grad else set() for _, end in ends]
    pairs = []
    for i, start in enumerate(tape.tensors):
        if start.requires_grad:
            later = range(i + 1, len(ends)) if to == "next" else [len(ends) - 1]
            found = next((k for k in later if node_of(start) in before[k]), None)
            if found is not None:
                pairs.append((i, *ends[found]))
    return pairs


def batch_of(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """The number of samples: the first dimension of the first tensor that has dimensions."""
    return next((len(x) for x in tree_leaves((inputs, dict(keywords))) if isinstance(x, Tensor) and x.dim()), 1)


def propagation(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    layers: Layers = None,
    to: str = "next",
    samples: int = 8,
    tau: float = 1e-3,
    exact: int = 512,
    steps: int = 24,
    seed: int = 0,
    keywords: Mapping[str, Any] | None = None,
) -> Propagation:
    """Measure how residuals travel back through ``model`` at ``inputs`` (arXiv 1708.00631, the operator view of
    vanishing gradients).

    For J = d y_end / d y_start of one sample: its singular values; the share of the residual r = d loss / d y_end that
    lies in the image of J (only that share is passed on to shallower layers); and ``|J^T r| / (|J| |r|)``. A model in
    training mode is measured with dropout off and with its batch normalisations frozen at the statistics of
    ``inputs``; one in evaluation mode as it is. The model is left as it was.

    Args:
        model, inputs: called as ``model(*inputs)``; dimension 0 of tensors is the batch, and samples must not
            influence each other.
        loss: maps the model's output, for all of ``inputs``, to the scalar whose gradient is the residual; None: a
            standard normal residual.
        layers: name patterns or types; None: all layers with weights. The input is a start, too.
        to: ``"next"``: to the next of these layers (in the order of the calls) that depends on the start, or to the
            output; ``"output"``: always to the model's output.
        samples: number of samples to measure; the first ones are taken.
        tau: singular values up to ``tau`` times the largest count as 0 (in Lanczos blocks at least 4 / ``steps``).
        exact: J is computed whole if its smaller dimension is at most this (that many backward passes); else Lanczos.
        steps: number of Lanczos steps on J J^T; each costs two backward passes.
        seed: seed of the random vectors.
        keywords: inputs by name; then the call is ``model(*inputs, **keywords)``.

    Raises:
        TypeError, ValueError: arguments; an output without the batch in dimension 0.
    """
    chosen = choose("propagation", model, layers, weighted)
    if to not in ("next", "output"):
        raise ValueError(f"propagation: to must be 'next' or 'output', got {shown(to)}")
    given = {} if keywords is None else dict(keywords)
    if not inputs and not given:
        raise TypeError("propagation: inputs are missing; call propagation(model, x, ...)")
    check_integers("propagation", samples=samples, exact=exact, steps=steps, seed=seed)
    check_numbers("propagation", tau=tau)
    if samples < 1 or steps < 1 or exact < 0 or not 0 < tau < 1:
        raise ValueError(
            f"propagation: samples and steps must be at least 1, exact at least 0 and tau in (0, 1), got "
            f"{samples}, {steps}, {exact}, {tau}"
        )
    batch = batch_of(inputs, given)
    if not batch:
        raise ValueError("propagation: inputs must have at least one sample, got none")
    count = min(samples, batch)
    few = tree_map(lambda x: _first(x, count, batch), (inputs, given))
    blocks: dict[int, BlockPropagation] = {}
    left_out = []
    with unrecorded(), torch.enable_grad(), frozen(model, lambda: model(*inputs, **given)):
        residuals = None if loss is None else _residuals(_Tape(model, chosen, inputs, given), loss, count)
        tape = _Tape(model, chosen, *few)
        residual_noise, probe_noise = (torch.Generator().manual_seed(seed + k) for k in (0, 1))
        pairs = _pairs(tape, to)
        order = spread(len(pairs)) if is_limited() else list(range(len(pairs)))
        for done, k in enumerate(order):
            i, name, end = pairs[k]
            start = tape.tensors[i]
            if out_of_time():
                left_out.append(f"{tape.names[i]} to {name}: no time was left")
                continue
            bad = next((t for t in (start, end) if t.dim() < 1 or len(t) != count), None)
            if bad is not None:
                role = tape.names[i] if bad is start else name
                problem = f"dimension 0 must be the batch of {count}, but {role} has shape {tuple(bad.shape)}"
                if not is_limited():
                    raise ValueError(f"propagation: {problem}")
                left_out.append(f"{tape.names[i]} to {name}: {problem}")
                continue
            residual = torch.randn(end.shape, generator=residual_noise) if residuals is None else residuals[name]
            block = Block(start, end, residual, tau, probe_noise)
            values = block.measure(exact, steps, seconds_left() / (len(order) - done))
            around = tape.end.requires_grad and goes_around(node_of(start), node_of(end), node_of(tape.end))
            blocks[k] = BlockPropagation(
                tape.names[i], name, start[0].numel(), end[0].numel(), **values, bypassed=around
            )
    return Propagation([blocks[k] for k in sorted(blocks)], count, "random" if loss is None else "loss", left_out)


def _residuals(tape: _Tape, loss: Callable[[Any], Tensor], count: int) -> dict[str, Tensor]:
    value = loss(tape.output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError("propagation: loss must return a tensor with one element")
    if not value.requires_grad:
        raise ValueError("propagation: loss must depend on the model's output, got a constant")
    names, tensors = [*tape.names, "output"], [*tape.tensors, tape.end]
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    return {
        name: torch.zeros_like(t[:count]) if g is None else g[:count]
        for name, t, g in zip(names, tensors, gradients, strict=True)
    }
