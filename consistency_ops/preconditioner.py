"""The drop-in preconditioner: corrects the gradients of a model in front of any optimizer (arXiv 1708.00631)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ._hooks import hide
from .attachment import Attachment, held_weights, remove_hooks
from .engine.capture import Capture
from .engine.capture_states import RowMask
from .engine.correction import Correction
from .engine.discovery import OWN_FORWARD, UNKNOWN, adopt_layer, find_layers, find_new_layers
from .engine.dtensors import is_dtensor, is_fully_sharded
from .engine.failed_forward import FailedForward
from .engine.notices import Notices, end, outlive, some
from .engine.optimizers import find_optimizers, refuse_private_model
from .engine.options import CorrectionOptions, check, is_int
from .engine.output_side import dealt_rows
from .engine.state import StateStore, on_host
from .engine.weight_capture import announce, withdraw
from .engine.whitening import WhiteningCorrection
from .ops.arguments import Scaling
from .ops.checks import check_module, check_names, type_name
from .reporting.stats import Stats, stats, write_scalars
from .reporting.summary import LayerFacts, summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERSIONS = 1, 2  # of state_dict: 2 has the entry `division`
# The last line of the summary in mode "whiten".
_RATE_NOTE = (
    "In whitened coordinates the best learning rate was {} that of the optimizer alone: try some "
    "(optim.select_learning_rate with decay=True)."
)
_BETAS_NOTE = " With outputs=True AdamW did better with betas=(0.9, 0.95)."


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
        optimizer: any ``torch.optim.Optimizer`` over its parameters, an object that wraps or contains such, or a list
            of them: every layer belongs to the one that holds its weight. It keeps the preconditioner alive. ``None``:
            call :meth:`step` before the optimizer's.
        mode: ``"correct"`` multiplies the gradients, as in the paper. ``"whiten"`` lets the optimizer work in whitened
            coordinates of each layer's inputs: it is given ``G L^-T`` with ``L L^T = A_c + damping``, and what it adds
            to the weight is multiplied by ``L^-1`` after its step, and scaled to the norm that it had. (With
            ``torch.optim.SGD`` it is not scaled: this is the paper's method with a running average.) It needs an
            optimizer, and a copy of the covered weights during a step. ``None``: ``"correct"``.
        damping: number >= 0, or a function of the step (0, 1, ...) that returns one.
        scaling: ``"trace"`` divides ``A`` by its mean diagonal entry first, so that the gradient keeps its scale;
            ``"absolute"`` is the paper's rule.
        chunk: largest number of units inverted together, 1 to 16 384, or ``None`` for whole layers. The kernels invert
            up to 256; larger chunks are inverted by ``torch.linalg``, which is dear, so use ``every`` and ``decay``
            with them.
        group: consecutive units that stay together in the random division; ``None``: as many as fill 32 bytes.
        max_rows: input rows of a layer that are used in a step. Where there are more, each block of them gives one,
            drawn at random. A layer's buffer takes as many rows as it sees, at most ``max_rows``, x units x 4 bytes (2
            for inputs of 16 bits, 8 in float64).
        rows_dtype: ``torch.bfloat16`` rounds rows in float32 to it, which halves their buffers; inputs of other types
            are kept as they are. ``None``: all are.
        decay: weight of the old value in a running average of the covariances, in [0, 1). ``None``: 0 in mode
            ``"correct"``, 0.95 in mode ``"whiten"``. With 0 only the current step's inputs count, and every refresh
            draws a new random division in mode ``"correct"``. Above 0 the division is fixed, the average is
            bias-corrected, and a step with Inf or NaN in a layer's inputs or gradient does not enter it.
        every: capture and invert in every ``every``-th step; the steps between reuse inverse and division. ``None``: 10
            in mode ``"whiten"`` with an average and without ``outputs``, else 1. Above 1 use ``decay=0.5`` or more,
            too: the inverse of one batch multiplies what only other batches have by ``1 / damping``, and training may
            diverge. With ``decay > 0`` all of the first 20 steps capture and invert, because an average has to be
            gathered before it is reused.
        bias: join the bias to the units of its layer; ``False`` leaves bias gradients as they are. In mode ``"whiten"``
            those of convolutions with several taps are left in any case: one step of such a bias would be mapped to
            every tap, beside the kernel's own.
        skip: layers to leave alone: module names, ``fnmatch`` patterns of names, or module types.
        seed: of the random division and the row sample.
        keep_norm: in mode ``"whiten"``, whether a layer's mapped step is scaled to the norm that the optimizer gave it
            (never with ``torch.optim.SGD``). ``False``: it is up to ``damping ** -0.5`` times as long, which is nearly
            the same as a higher rate (see the page on choosing).
        outputs: in mode ``"whiten"``, whether the optimizer works in whitened coordinates of each layer's outputs, too:
            it is given ``K^-1 G L^-T``, and its step is mapped back by ``K^-T`` and ``L^-1``, with ``K K^T`` the damped
            running second moment of the columns of ``G L^-T``, by chunks of outputs. Ranks to which ``fully_shard`` has
            dealt its rows gather them, one layer at a time; row-parallel weights have the inputs' side only.
        dct: in mode ``"whiten"``, whether the optimizer is given the kernels of convolutions as coefficients of the
            discrete cosine transform over their taps, and its step is transformed back. Adam and its kind, which scale
            single numbers, then scale spatial frequencies; SGD and Muon make the same step as without. No state.
        max_share: leave a layer alone where correcting it costs more than this share of its own forward and backward
            pass. A count of operations and bytes decides in the layer's first step, with its rows of that step, and no
            clock: on all ranks, and after a resume, alike. Such a layer has no hooks from then on; the log and
            :meth:`summary` name it. ``None``: all are corrected.
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
        optimizer: Optimizer | Sequence[Optimizer] | Any | None = None,
        *,
        mode: Literal["correct", "whiten"] | None = None,
        damping: float | Callable[[int], float] = 0.1,
        scaling: Scaling = "trace",
        chunk: int | None = 128,
        group: int | None = None,
        max_rows: int = 4096,
        rows_dtype: torch.dtype | None = None,
        decay: float | None = None,
        every: int | None = None,
        bias: bool = True,
        skip: str | type[Any] | Iterable[str | type[Any]] = (),
        seed: int = 0,
        keep_norm: bool = True,
        outputs: bool = False,
        dct: bool = False,
        max_share: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_module("Preconditioner", model)
        refuse_private_model(model)
        attached = [None] if optimizer is None else find_optimizers(optimizer)
        check(mode in (None, "correct", "whiten"), "mode", "None, 'correct' or 'whiten'", mode)
        check(mode != "whiten" or optimizer is not None, "optimizer", "given with mode='whiten'", optimizer)
        for name, value in (("outputs", outputs), ("dct", dct)):
            check(mode == "whiten" or not value, name, "False without mode='whiten'", value)
        self.mode: Literal["correct", "whiten"] = mode or "correct"
        if decay is None:
            decay = 0.95 if self.mode == "whiten" else 0.0
        if every is None:
            every = 10 if self.mode == "whiten" and decay > 0 and not outputs else 1
        options = CorrectionOptions(
            damping,
            scaling,
            chunk,
            group,
            max_rows,
            decay,
            every,
            bias,
            seed,
            keep_norm,
            rows_dtype,
            outputs,
            dct,
            max_share,
        )
        self.skip: tuple[str | type[Any], ...] = check_names("Preconditioner", "skip", skip)
        self._model = weakref.ref(model)
        self._notices = Notices()
        self._joins = {"bias": bias, "bias_of_kernels": self.mode != "whiten"}
        self._layers = find_layers(model, self.skip, **self._joins)
        self._attachments: list[Attachment] = []
        handles: list[RemovableHandle] = []
        try:
            for one in attached:
                attachment = Attachment(
                    self._layers,
                    self._model,
                    one,
                    lambda store, stepping: self._make_correction(options, store, stepping),
                    process_group,
                    self._notices,
                    None if one is None else self._find_new_layers,
                )
                attachment.handles, attachment.owner = handles, None if one is None else self
                self._attachments.append(attachment)
            for layer in self._layers:
                if layer.reason is None:
                    layer.reason = self._correction.declines(layer)
            for attachment in self._attachments:
                attachment.attach()
            own = any((layer.reason or "").startswith(OWN_FORWARD) for layer in self._layers)
            if not own and not any(layer.capture for layer in self._layers):
                table = self.summary() + self._unknown_types()
                raise ValueError(f"Preconditioner: model must have a layer to correct, got none\n{table}")
            watch = FailedForward([part.states for part in self._attachments], self._layers)
            handles.append(model.register_forward_hook(watch, always_call=True))
            hide(model)
            for attachment in self._attachments:
                attachment.hook_optimizer()
                attachment.resume()
        except BaseException:
            remove_hooks(self._layers, handles)
            raise
        self._notice_what_is_left()
        announce(self)
        vigils = [attachment.vigil for attachment in self._attachments]
        weakref.finalize(model, outlive, [weakref.ref(vigil) for vigil in vigils]).atexit = False
        self._detach = weakref.finalize(self, end, vigils, remove_hooks, self._layers, handles)
        self._detach.atexit = False

    def _make_correction(
        self, options: CorrectionOptions, store: StateStore, optimizer: Optimizer | None
    ) -> Correction:
        """The arithmetic; a subclass may divide or solve in another way."""
        if self.mode == "whiten" and optimizer is not None:
            return WhiteningCorrection(options, store, optimizer)
        return Correction(options, store)

    # The options, and how far it is

    @property
    def damping(self) -> float | Callable[[int], float]:
        """Damping, or the function of the step that returns it. It may be set between two steps."""
        return self._correction.options.damping

    @damping.setter
    def damping(self, value: float | Callable[[int], float]) -> None:
        for attachment in self._attachments:
            attachment.correction.options = replace(attachment.correction.options, damping=value)

    @property
    def steps(self) -> int:
        """Number of finished steps; of the optimizer that has made most, where there are several."""
        return max(attachment.correction.step for attachment in self._attachments)

    @property
    def _correction(self) -> Correction:
        return self._attachments[0].correction

    @staticmethod
    def of(optimizer: Any) -> list[Preconditioner]:
        """The preconditioners that are attached to an optimizer, or to those inside of it.

        For instance to :meth:`remove` one that was made in an earlier cell of a notebook.

        Raises:
            TypeError: ``optimizer`` is no optimizer, and has none in it.
        """
        found: list[Preconditioner] = []
        for attached in find_optimizers(optimizer):
            for hook in attached.stepping._optimizer_step_pre_hooks.values():
                owner = getattr(getattr(hook, "__self__", None), "owner", None)
                if isinstance(owner, Preconditioner) and owner not in found:
                    found.append(owner)
        return found

    # What is covered

    def _find_new_layers(self) -> None:
        """Cover modules that came after the constructor: a new head, a second adapter."""
        model = self._model()
        if model is None:
            return
        for layer in find_new_layers(model, self._layers, self.skip, **self._joins):
            if layer.reason is None:
                layer.reason = self._correction.declines(layer)

    def captures_of(self, weight: Tensor) -> list[Capture]:
        """Who takes rows that :func:`consistency_ops.capture` is given for a weight; not for users."""
        held = any(part.ownership.owns(weight) for part in self._attachments)
        if held and adopt_layer(self._layers, weight) is not None:
            for part in self._attachments:
                part.attach()
        layers = [layer for layer in self._layers if layer.weight is weight]
        return [layer.capture for layer in layers if layer.capture is not None]

    def _unknown_types(self) -> str:
        """How to cover what is not known."""
        left = [layer for layer in self._layers if (layer.reason or "").startswith((UNKNOWN, OWN_FORWARD))]
        kinds = sorted({type_name(module) for layer in left if (module := layer.module()) is not None})
        if not kinds:
            return ""
        return (
            f"\nLinear layers of other types are covered by consistency_ops.layers.register, single weights by "
            f"consistency_ops.capture; here: {', '.join(kinds)}"
        )

    def _notice_what_is_left(self) -> None:
        """Say which layers a reader of the model would expect to be corrected, and why they are not."""
        own = [layer for layer in self._layers if layer.reason is not None and layer.reason.startswith(OWN_FORWARD)]
        if own:
            if not any(layer.capture for layer in self._layers):
                self._attachments[0].vigil.silence()
            kinds = sorted({type_name(module) for layer in own if (module := layer.module()) is not None})
            self._notices.once(
                "own forward",
                f"{', '.join(kinds)} have a forward of their own, so nobody knows what their weight multiplies; their "
                f"gradients are left as they are: {some(layer.name for layer in own)}. If the weight multiplies the "
                "first argument of forward, call consistency_ops.layers.register(the class) first; if it multiplies "
                "something else, call consistency_ops.capture(that, weight) in the forward.",
            )
        covered = [layer for layer in self._layers if layer.capture is not None and is_dtensor(layer.weight)]
        exchanged = is_fully_sharded(self._model())
        apart = [layer.name for layer in covered if dealt_rows(layer, exchanged=exchanged) is None]
        if self._correction.options.outputs and apart:
            self._notices.once(
                "outputs",
                "the ranks cannot gather the outputs of these weights, so only their inputs are whitened: "
                f"{some(apart)}.",
            )
        weights = held_weights(self._layers)
        if weights and not any(weight.requires_grad for weight in weights):
            self._notices.once(
                "frozen",
                "all weights that could be corrected are frozen, so nothing is corrected until one of them is not; "
                "summary() lists all layers.",
            )

    # The step

    def step(self) -> None:
        """Correct the gradients; call it after ``backward`` and before the optimizer's step. Without an optimizer only.

        Raises:
            RuntimeError: an optimizer was given; its own step does this.
        """
        if self._attachments[0].optimizer is not None:
            raise RuntimeError("Preconditioner.step: must be called only when no optimizer was given, got one")
        self._attachments[0].correct()
        self._attachments[0].finish_step()

    @torch.no_grad()
    def mask_rows(self, mask: Tensor | None) -> None:
        """Choose which input rows count from the next forward pass on, until the next call: not those of padding.

        Args:
            mask: True where a row counts. Inputs whose leading dimensions have its shape, (batch, tokens) for instance,
                are masked; inputs of other shapes count as they are. ``None``: all rows count. A mask on the CPU costs
                no wait for the device.

        Raises:
            TypeError: ``mask`` is not a tensor of bool.
        """
        if mask is not None and not (isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.dim() > 0):
            got = f"dtype {mask.dtype}, {mask.dim()} dimensions" if isinstance(mask, Tensor) else type_name(mask)
            raise TypeError(f"Preconditioner.mask_rows: mask must be a bool tensor or None, got {got}")
        rows = None if mask is None else RowMask(mask)
        for attachment in self._attachments:
            attachment.states.mask = rows

    def drop_rows(self) -> None:
        """Forget the input rows that were captured since the last step.

        Call it when a forward pass is thrown away without a backward pass: one that is tried again with a smaller
        batch, a metric that is computed in training mode, ``generator(noise).detach()``. A forward pass of the model
        that raises is noticed without it.
        """
        for attachment in self._attachments:
            attachment.drop_rows()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Step counter, running covariances and inverses, by layer name.

        With an optimizer, ``optimizer.state_dict()`` holds all of it already.
        """
        layers = {
            layer.name: dict(part.store.get(layer)) for part in self._attachments for layer in part.stored_layers()
        }
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
        attached = [part.optimizer for part in self._attachments if part.optimizer is not None]
        if attached and not any(optimizer.saving.state or optimizer.parts for optimizer in attached):
            raise RuntimeError(
                "Preconditioner.load_state_dict: the optimizer must have its state first, got none; "
                "optimizer.load_state_dict restores the preconditioner, too"
            )
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Preconditioner: state_dict must be a dict, got {type_name(state_dict)}")
        version: Any = state_dict.get("version")
        step: Any = state_dict.get("step")
        saved: Any = state_dict.get("layers")
        check(version in _VERSIONS, "state_dict version", " or ".join(map(str, _VERSIONS)), version)
        check(is_int(step, 0), "state_dict step", "an integer >= 0", step)
        check(isinstance(saved, Mapping), "state_dict layers", "a dict by layer name", saved)
        covered = {layer.name: (layer, part) for part in self._attachments for layer in part.stored_layers()}
        unknown = sorted(set(saved) - set(covered))
        check(not unknown, "state_dict layers", "those that are covered here", unknown)
        for name, entries in saved.items():
            layer, part = covered[name]
            if (weight := layer.weight) is not None:
                for key, value in entries.items():
                    part.store.put(layer, key, value.to("cpu" if on_host(key) else weight.device, copy=True))
        for part in self._attachments:
            part.store.count_step(step)
            part.resume()

    def remove(self) -> None:
        """Take out all hooks and all state; the optimizers then step as if there had been no preconditioner."""
        withdraw(self)
        for part in self._attachments:
            part.vigil.silence()
        self._detach()
        for part in self._attachments:
            others = self.of(part.optimizer.stepping) if part.optimizer is not None else []
            part.store.clear(set().union(*(held_weights(other._layers) for other in others)))
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
        parts = [(part.correction, part.own_layers()) for part in self._attachments]
        return stats(parts, self._layers, self._parameters(), self._notices, condition)

    def _parameters(self) -> Iterable[Tensor]:
        """The parameters of the optimizers; without one, those of the model."""
        attached = [part.optimizer for part in self._attachments if part.optimizer is not None]
        if attached:
            return [p for optimizer in attached for p in optimizer.parameters]
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
        parts = self._attachments
        facts = [LayerFacts(part.correction, part.ownership.owns, part.placements.reason) for part in parts]
        part_of = {layer.index: i for i, part in enumerate(parts) for layer in part.stored_layers()}
        table = summary(repr(self), self._layers, lambda layer: facts[part_of.get(layer.index, 0)])
        if self.mode != "whiten":
            return table
        options = self._correction.options
        found = "a third to six times" if options.keep_norm else "a half to twice"
        found = "a sixth to eighteen times" if options.outputs else found
        groups = [group for part in parts if part.optimizer for group in part.optimizer.stepping.param_groups]
        is_long = any(len(betas) > 1 and betas[1] > 0.95 for group in groups if (betas := group.get("betas")))
        return f"{table}\n{_RATE_NOTE.format(found)}" + _BETAS_NOTE * (options.outputs and is_long)

    def __repr__(self) -> str:
        covered = sum(layer.capture is not None for layer in self._layers)
        o = self._correction.options
        damping = "schedule" if callable(o.damping) else f"{o.damping:g}"
        options = "mode='whiten', " * (self.mode == "whiten") + f"damping={damping}, scaling={o.scaling!r}, "
        options += f"chunk={o.chunk}, max_rows={o.max_rows}" + f", rows_dtype={o.rows_dtype}" * (
            o.rows_dtype is not None
        )
        options += ", keep_norm=False" * (not o.keep_norm) + ", outputs=True" * o.outputs + ", dct=True" * o.dct
        options += "" if o.max_share is None else f", max_share={o.max_share:g}"
        options += f", decay={o.decay:g}" * (o.decay > 0) + f", every={o.every}" * (o.every > 1)
        return f"Preconditioner({covered} of {len(self._layers)} layers, {options})"

    # A copy of a module that holds its preconditioner, for an average of the weights or for another machine, has none.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
