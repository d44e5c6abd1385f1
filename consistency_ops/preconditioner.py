"""The drop-in preconditioner: corrects the gradients of a model in front of any optimizer (arXiv 1708.00631)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from .distributed.placement import Placements
from .distributed.pooling import Pooling
from .engine.capture import Capture, CaptureStates
from .engine.correction import Correction, CorrectionOptions, check, is_int
from .engine.discovery import find_layers, find_ties
from .engine.layer import Layer
from .engine.layer_step import LayerStep, by_precision, layer_step, notice_unseen
from .engine.notices import Notices, some
from .engine.ownership import Ownership
from .engine.state import StateStore, on_host
from .engine.whitening import WhiteningCorrection
from .ops.arguments import Scaling
from .ops.checks import check_module, check_names
from .reporting.stats import Stats, notice_failures, stats, write_scalars
from .reporting.summary import summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERSIONS = 1, 2  # of state_dict: 2 has the entry `division`


class Preconditioner:
    """Multiplies every layer's gradient by the inverse damped second moment of the layer's inputs, before each step.

    For a layer with input rows ``X`` (n, d) and weight gradient ``G`` (out, d) the optimizer receives ``G A_c^-1`` with
    ``A_c = X_c^T X_c / n + damping`` in every chunk ``c`` of at most ``chunk`` randomly chosen units (arXiv
    1708.00631). One line in a training script; nothing else changes::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        co.Preconditioner(model, optimizer)

    Construct it before the first call of a compiled model and before checkpoints are loaded. Covered are ``nn.Linear``,
    convolutions (transposed ones too), the input projections of ``nn.MultiheadAttention``, ``Conv1D`` of transformers,
    and what :func:`consistency_ops.layers.register` adds; all other layers, and those without statistics (never run,
    tied, frozen, in evaluation mode), keep their gradient; :meth:`summary` lists them. Gradients are corrected in
    place, after unscaling and clipping; all micro-batches of a step count. Steps that a ``GradScaler`` skips leave
    nothing behind (with ``zero_grad(set_to_none=False)`` their rows count in the next step). A closure is supported if
    the optimizer calls it once a step. Its state is in ``optimizer.state_dict()``.

    Args:
        model: the module whose layers are corrected. Only weak references to it are kept.
        optimizer: any ``torch.optim.Optimizer`` over its parameters; it keeps the preconditioner alive. ``None``: call
            :meth:`step` before the optimizer's.
        mode: ``"correct"`` multiplies the gradients, as in the paper. ``"whiten"`` lets the optimizer work in whitened
            coordinates of each layer's inputs: it is given ``G L^-T`` with ``L L^T = A_c + damping``, and what it adds
            to the weight is multiplied by ``L^-1`` after its step, and scaled to the norm that it had. (With
            ``torch.optim.SGD`` it is not scaled: this is the paper's method with a running average.) It needs an
            optimizer, and a copy of the covered weights during a step. ``None``: ``"correct"``.
        damping: number >= 0, or a function of the step (0, 1, ...) that returns one.
        scaling: ``"trace"`` divides ``A`` by its mean diagonal entry first, so that the gradient keeps its scale;
            ``"absolute"`` is the paper's rule.
        chunk: largest number of units inverted together, 1 to 256.
        group: consecutive units that stay together in the random division; ``None``: as many as fill 32 bytes.
        max_rows: input rows of a layer that are used in a step, a uniform sample where there are more. A layer's
            buffer takes ``max_rows`` x units x 4 bytes (8 in float64).
        decay: weight of the old value in a running average of the covariances, in [0, 1). ``None``: 0 in mode
            ``"correct"``, 0.95 in mode ``"whiten"``. With 0 only the current step's inputs count, and every refresh
            draws a new random division in mode ``"correct"``. Above 0 the division is fixed, the average is
            bias-corrected, and a step with Inf or NaN in a layer's inputs or gradient does not enter it.
        every: capture and invert in every ``every``-th step; the steps between reuse inverse and division. Above 1 use
            ``decay=0.5`` or more, too: the inverse of one batch multiplies what only other batches have by
            ``1 / damping``, and training may diverge. With ``decay > 0`` all of the first 20 steps capture and invert,
            because an average has to be gathered before it is reused.
        bias: join the bias to the units of its layer; ``False`` leaves bias gradients as they are.
        skip: layers to leave alone: module names, ``fnmatch`` patterns of names, or module types.
        seed: of the random division and the row sample.
        process_group: the ranks that average the gradients, and pool their covariances (the same model, options and
            number of steps on all). Needed only where gradients are averaged by hand: ``DistributedDataParallel``,
            ``fully_shard`` and ``DTensor`` parameters are recognised.

    Raises:
        ValueError: an argument out of range, or no layer to correct.
        TypeError: ``model`` or ``optimizer`` has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        mode: Literal["correct", "whiten"] | None = None,
        damping: float | Callable[[int], float] = 0.1,
        scaling: Scaling = "trace",
        chunk: int = 128,
        group: int | None = None,
        max_rows: int = 4096,
        decay: float | None = None,
        every: int = 1,
        bias: bool = True,
        skip: str | type[Any] | Iterable[str | type[Any]] = (),
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_module("Preconditioner", model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Preconditioner: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        optimizer = _unwrap(optimizer)
        check(not isinstance(optimizer, LBFGS), "optimizer", "one that evaluates the gradient once a step", optimizer)
        check(mode in (None, "correct", "whiten"), "mode", "None, 'correct' or 'whiten'", mode)
        check(mode != "whiten" or optimizer is not None, "optimizer", "given with mode='whiten'", optimizer)
        self.mode: Literal["correct", "whiten"] = mode or "correct"
        if decay is None:
            decay = 0.95 if self.mode == "whiten" else 0.0
        options = CorrectionOptions(damping, scaling, chunk, group, max_rows, decay, every, bias, seed)
        self.skip: tuple[str | type[Any], ...] = check_names("Preconditioner", "skip", skip)
        self._optimizer = optimizer
        self._model = weakref.ref(model)
        self._store = StateStore(optimizer)
        self._notices = Notices()
        self._ownership = Ownership(optimizer)
        self._correction = self._make_correction(options)
        self._hooks_fire: bool | None = None  # None: no step has had a gradient yet, so nobody can tell
        self._layers = find_layers(model, self.skip, bias)
        for layer in self._layers:
            if layer.reason is None:
                layer.reason = self._correction.declines(layer)
        self._states = CaptureStates(len(self._layers))
        self._placements = Placements(
            self._layers,
            self._model,
            self._ownership.owns,
            process_group,
            None if self._correction.pools else type(optimizer).__name__,
            self._correction.exchanges_units,
            self._store,
            self._notices,
        )
        self._pooling = Pooling(self._correction, self._placements)
        handles: list[RemovableHandle] = []
        self._handles = handles
        try:
            self._attach()
            self._refuse_a_second_one()
            if not any(layer.capture for layer in self._layers):
                raise ValueError(f"Preconditioner: model must have a layer to correct, got none\n{self.summary()}")
        except BaseException:
            _detach(self._layers, handles)
            raise
        if optimizer is not None:
            handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_pre_hook(self._store.before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        self._detach = weakref.finalize(self, _detach, self._layers, handles)
        self._detach.atexit = False

    def _make_correction(self, options: CorrectionOptions) -> Correction:
        """The arithmetic; a subclass may divide or solve in another way."""
        if self.mode == "whiten" and self._optimizer is not None:
            return WhiteningCorrection(options, self._store, self._optimizer)
        return Correction(options, self._store)

    # The options, and how far it is

    @property
    def damping(self) -> float | Callable[[int], float]:
        """Damping, or the function of the step that returns it. It may be set between two steps."""
        return self._correction.options.damping

    @damping.setter
    def damping(self, value: float | Callable[[int], float]) -> None:
        self._correction.options = replace(self._correction.options, damping=value)

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return self._correction.step

    # What is covered

    def _attach(self) -> None:
        """Hook the layers whose weight the optimizer holds; again when it holds others."""
        self._ownership.refresh()
        find_ties(self._layers)
        tied = [layer.name for layer in self._layers if layer.tied and layer.capture is not None]
        if tied:
            self._notices.once(
                "tied",
                f"weights were tied after the Preconditioner was constructed, their gradients are left as they are: "
                f"{some(tied)}. Tie weights first to keep this quiet.",
            )
        options = self._correction.options
        for layer in self._layers:
            module, weight = layer.module(), layer.weight
            if layer.capture is not None or module is None or weight is None or layer.reason is not None or layer.tied:
                continue
            if self._ownership.owns(weight):
                layer.capture = Capture(module, layer.kind, self._states, layer.index, options.max_rows, options.seed)
                self._handles += self._correction.attach(layer)
        self._states.new_weights = False

    def _refuse_a_second_one(self) -> None:
        """A gradient must not be corrected twice; two preconditioners may share an optimizer but no layer."""
        taken = {id(layer.module()) for layer in self._layers_of_others()}
        for layer in self._layers:
            if layer.capture is not None and id(layer.module()) in taken:
                raise ValueError(
                    "Preconditioner: optimizer must not have another Preconditioner for the same layer (call its "
                    f"remove() first), got one for {layer.name!r}"
                )

    def _layers_of_others(self) -> list[Layer]:
        """The layers that other preconditioners of the same optimizer correct."""
        if self._optimizer is None:
            return []
        owners = [getattr(hook, "__self__", None) for hook in self._optimizer._optimizer_step_pre_hooks.values()]
        others = [owner for owner in owners if isinstance(owner, Preconditioner) and owner is not self]
        return [layer for other in others for layer in other._layers if layer.capture is not None]

    # The step

    def step(self) -> None:
        """Correct the gradients; call it after ``backward`` and before the optimizer's step. Without an optimizer only.

        Raises:
            RuntimeError: an optimizer was given; its own step does this.
        """
        if self._optimizer is not None:
            raise RuntimeError("Preconditioner.step: must be called only when no optimizer was given, got one")
        self._correct()
        self._correction.finish_step(self._layers)

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._correct()
            return None
        calls = 0

        def corrected_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    "Preconditioner: optimizer must call its closure once a step, got a second call by "
                    f"{type(optimizer).__name__}"
                )
            loss = closure()
            self._correct()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": corrected_closure}
        return (args[0], corrected_closure, *args[2:]), kwargs

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._correction.finish_step(self._layers)

    @torch.no_grad()
    def _correct(self) -> None:
        correction, states = self._correction, self._states
        # The optimizer has broken off the last step after its correction.
        correction.step = max(correction.step, states.step)
        if self._ownership.refresh() or correction.step == 0:
            self._attach()
        correction.begin_step()
        for layer in self._layers:
            layer.info_slice = None
        pooled = self._pooling.correct()
        steps = self._layer_steps(pooled)
        if states.new_weights:  # seen while the steps were made
            self._attach()
            steps = self._layer_steps(pooled)
        first = False
        if not (self._hooks_fire or states.paused):
            self._hooks_fire = first = notice_unseen(steps, self._notices)
        for batch in by_precision(steps):
            correction.run(batch)
            for step in batch:
                step.write_back()
        finished = not states.paused
        for layer in self._layers:
            if layer.capture is not None:
                layer.capture.begin_step(finished)
        states.reset(correction.step + 1, paused=not correction.refreshes(correction.step + 1), finished=finished)
        if first:
            notice_failures(correction, self._layers, self._notices)

    def _layer_steps(self, pooled: set[int]) -> list[LayerStep]:
        """What this step has of the layers that no other rank shares."""
        layers = (layer for layer in self._layers if layer.index not in pooled and layer.capture is not None)
        steps = (layer_step(layer, self._ownership.owns, self._notices) for layer in layers)
        return [step for step in steps if step is not None]

    # State

    def _after_load(self, optimizer: Optimizer) -> None:
        self._store.after_load(optimizer)
        self._resume()

    def _resume(self) -> None:
        """Continue from what the store holds."""
        dropped = self._correction.resume(self._layers)
        if dropped:
            self._notices.once(
                "dropped",
                "the loaded state was saved with another seed, chunk, group or every, or with other layers before "
                f"these, so it was dropped and their statistics start anew: {some(dropped)}. Construct the "
                "Preconditioner as it was then.",
            )
        step = self._correction.step
        self._states.reset(step, paused=not self._correction.refreshes(step), finished=False)

    def state_dict(self) -> dict[str, Any]:
        """Step counter, running covariances and inverses, by layer name.

        With an optimizer, ``optimizer.state_dict()`` holds all of it already.
        """
        layers = {layer.name: dict(self._store.get(layer)) for layer in self._layers if layer.capture}
        return {
            "version": _VERSIONS[-1],
            "step": self.steps,
            "layers": {k: state for k, state in layers.items() if state},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Rows captured so far are dropped.

        Not needed with an optimizer, whose own ``load_state_dict`` does it. What was saved with another ``seed``,
        ``chunk``, ``group`` or ``every``, or at another place among the layers, cannot be used: the log says so, and
        the averages start anew.

        Raises:
            ValueError: a version from the future, no step, or a layer that is not covered here.
            RuntimeError: an optimizer was given that has no state yet, and would take ours for its own.
        """
        if self._optimizer is not None and not self._optimizer.state:
            raise RuntimeError(
                "Preconditioner.load_state_dict: the optimizer must have its state first, got none; "
                "optimizer.load_state_dict restores the preconditioner, too"
            )
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Preconditioner: state_dict must be a dict, got {type(state_dict).__name__}")
        version: Any = state_dict.get("version")
        step: Any = state_dict.get("step")
        saved: Any = state_dict.get("layers")
        check(version in _VERSIONS, "state_dict version", " or ".join(map(str, _VERSIONS)), version)
        check(is_int(step, 0), "state_dict step", "an integer >= 0", step)
        check(isinstance(saved, Mapping), "state_dict layers", "a dict by layer name", saved)
        covered = {layer.name: layer for layer in self._layers if layer.capture is not None}
        unknown = sorted(set(saved) - set(covered))
        check(not unknown, "state_dict layers", "those that are covered here", unknown)
        for name, entries in saved.items():
            if (weight := covered[name].weight) is not None:
                for key, value in entries.items():
                    device = "cpu" if on_host(key) else weight.device
                    self._store.put(covered[name], key, value.to(device, copy=True))
        self._store.count_step(step)
        self._resume()

    def remove(self) -> None:
        """Take out all hooks and all state; the optimizer then steps as if there had been no preconditioner."""
        self._detach()
        self._store.clear({layer.weight for layer in self._layers_of_others() if layer.weight is not None})
        self._layers.clear()

    # Reports

    def stats(self, *, condition: bool = True) -> Stats:
        """What the last step did; reads from the device, so it waits for it. Call it between steps.

        Keys: ``steps`` done; ``layers`` corrected and ``uncorrected`` in number; ``coverage``, the share of the
        trainable numbers that were corrected; ``chunks`` in all; ``failed_chunks``, whose gradient was left as it is;
        ``max_damping`` and ``max_condition`` of the last inversion (NaN: none yet). By layer: ``rows`` captured, of
        ``rows_seen``; ``failed`` chunks, where there are any; ``damping`` used, retries included; ``condition``, the
        largest 1-norm condition number of its damped chunks.

        Args:
            condition: whether to compute the condition numbers, which takes about as long as the correction of a step.
        """
        return stats(self._correction, self._layers, self._parameters(), self._notices, condition)

    def _parameters(self) -> Iterable[Tensor]:
        """The parameters of the optimizer; without one, those of the model."""
        if self._optimizer is not None:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        model = self._model()
        return [] if model is None else model.parameters()

    def log_to(self, writer: Any, step: int | None = None, prefix: str = "preconditioner") -> None:
        """Write every number of :meth:`stats` as a scalar, in the manner of TensorBoard.

        Args:
            writer: has ``add_scalar(tag, value, step)``, as ``torch.utils.tensorboard.SummaryWriter``.
            step: on the horizontal axis; ``None``: the steps that this preconditioner has done.
            prefix: of the tags, such as ``preconditioner/failed_chunks`` and ``preconditioner/condition/0``.
        """
        write_scalars(self.stats(), writer, self.steps if step is None else step, prefix)

    def summary(self) -> str:
        """A table of all layers: type, units and chunks, rows of the last capture, and what becomes of the gradient."""
        title, owns = repr(self), self._ownership.owns
        return summary(title, self._correction, self._layers, owns, self._placements.reason)

    def __repr__(self) -> str:
        covered = sum(layer.capture is not None for layer in self._layers)
        o = self._correction.options
        damping = "schedule" if callable(o.damping) else f"{o.damping:g}"
        options = f"damping={damping}, scaling={o.scaling!r}, chunk={o.chunk}, max_rows={o.max_rows}"
        options += f", decay={o.decay:g}" * (o.decay > 0) + f", every={o.every}" * (o.every > 1)
        return f"Preconditioner({covered} of {len(self._layers)} layers, {options})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("Preconditioner: must be constructed anew for a copied model, got a copy; use state_dict()")


def _detach(layers: list[Layer], handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    for layer in layers:
        if layer.capture is not None:
            layer.capture.remove()


def _unwrap(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside the wrapper of a training framework (Accelerate, Lightning): the one whose hooks fire."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
