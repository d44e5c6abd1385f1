"""The drop-in preconditioner: corrects the gradients of a model in front of any optimizer (arXiv 1708.00631)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from . import ops
from .distributed.pooling import Ranks
from .distributed.rank_check import digest
from .engine.capture import Capture, States
from .engine.discovery import find_layers, find_ties
from .engine.layer import Layer
from .engine.layer_step import Item, is_plain, side_by_side
from .engine.state import StateStore, on_host
from .ops.checks import check_module, check_names
from .reporting import stats, summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERSIONS = 1, 2  # of state_dict: 2 has the entry `division`
_GATHERING = 20  # first steps, in which a running average is too young to be reused

_foreach_precondition_ = torch.ops.consistency_ops.foreach_precondition_.default


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
        damping: number >= 0, or a function of the step (0, 1, ...) that returns one.
        scaling: ``"trace"`` divides ``A`` by its mean diagonal entry first, so that the gradient keeps its scale;
            ``"absolute"`` is the paper's rule.
        chunk: largest number of units inverted together, 1 to 256.
        group: consecutive units that stay together in the random division; ``None``: as many as fill 32 bytes.
        max_rows: input rows of a layer that are used in a step, a uniform sample where there are more. A layer's
            buffer takes ``max_rows`` x units x 4 bytes (8 in float64).
        decay: weight of the old value in a running average of the covariances, in [0, 1). 0: the current step's inputs
            only, and a new random division every time. Above 0 the division is fixed, the average bias-corrected, and
            a step with Inf or NaN in a layer's inputs or gradient does not enter it.
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

    pools = True  # whether ranks can pool the covariances

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        damping: float | Callable[[int], float] = 0.1,
        scaling: str = "trace",
        chunk: int = 128,
        group: int | None = None,
        max_rows: int = 4096,
        decay: float = 0.0,
        every: int = 1,
        bias: bool = True,
        skip: str | type | Iterable[str | type] = (),
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_module("Preconditioner", model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Preconditioner: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        optimizer = _unwrap(optimizer)
        _check(not isinstance(optimizer, LBFGS), "optimizer", "one that evaluates the gradient once a step", optimizer)
        if not callable(damping):
            _check_damping(damping)
        _check(scaling in ("trace", "absolute"), "scaling", "'trace' or 'absolute'", scaling)
        _check(_is_int(chunk, 1, ops.MAX_CHUNK), "chunk", f"in [1, {ops.MAX_CHUNK}]", chunk)
        _check(group is None or _is_int(group, 1, chunk), "group", f"None or in [1, {chunk}]", group)
        _check(_is_int(max_rows, 1), "max_rows", "an integer >= 1", max_rows)
        _check(isinstance(decay, int | float) and 0 <= decay < 1, "decay", "in [0, 1)", decay)
        _check(_is_int(every, 1), "every", "an integer >= 1", every)
        _check(isinstance(bias, bool), "bias", "True or False", bias)
        _check(_is_int(seed, 0, 2**63 - 1), "seed", "an integer in [0, 2^63)", seed)

        self.damping, self.scaling, self.chunk, self.group, self.max_rows = damping, scaling, chunk, group, max_rows
        self.decay, self.every, self.bias, self.seed = decay, every, bias, seed
        self.skip = check_names("Preconditioner", "skip", skip)
        self.steps = 0  # finished
        self._optimizer = optimizer
        self._store = StateStore(optimizer)
        self._held: list[int] = []  # ids of the optimizer's parameters, in its order
        self._parameters: frozenset[int] = frozenset()  # the same
        self._checked = False  # whether hooks fire
        self.said: set[str] = set()  # what has been logged
        self.last_damping = math.nan  # before retries
        self.last_division = 0  # the step whose division the last inversion had
        self._model = weakref.ref(model)

        self.layers = self._find_layers(model)
        self._states = States(len(self.layers))
        self._ranks = Ranks(self, process_group)
        try:
            self._attach()
            self._refuse_a_second_one()
            if not any(layer.capture for layer in self.layers):
                raise ValueError(f"Preconditioner: model must have a layer to correct, got none\n{self.summary()}")
        except BaseException:
            _detach(self.layers, [])
            raise
        handles = []
        if optimizer is not None:
            handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_pre_hook(self._store.before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        self._detach = weakref.finalize(self, _detach, self.layers, handles)
        self._detach.atexit = False

    # What is covered

    def _find_layers(self, model: nn.Module) -> list[Layer]:
        return find_layers(model, self.skip, self.bias)

    def _attach(self) -> None:
        """Hook the layers whose weight the optimizer holds; again when it holds others."""
        if self._optimizer is not None:
            self._held = _ids_of_parameters(self._optimizer)
            self._parameters = frozenset(self._held)
        find_ties(self.layers)
        stats.notice_tied(self)
        for layer in self.layers:
            module, weight = layer.module(), layer.weight
            if layer.capture is None and weight is not None and self._may_correct(layer) and self.owns(weight):
                layer.capture = Capture(module, layer.kind, self._states, layer.index, self.max_rows, self.seed)
        self._states.new_weights = False

    def _refuse_a_second_one(self) -> None:
        """A gradient must not be corrected twice; two preconditioners may share an optimizer but no layer."""
        taken = {id(layer.module()) for layer in self._layers_of_others()}
        for layer in self.layers:
            if layer.capture is not None and id(layer.module()) in taken:
                raise ValueError(
                    "Preconditioner: optimizer must not have another Preconditioner for the same layer (call its "
                    f"remove() first), got one for {layer.name!r}"
                )

    def _layers_of_others(self) -> list[Layer]:
        """Those that other preconditioners of the same optimizer correct."""
        if self._optimizer is None:
            return []
        owners = [getattr(hook, "__self__", None) for hook in self._optimizer._optimizer_step_pre_hooks.values()]
        others = [owner for owner in owners if isinstance(owner, Preconditioner) and owner is not self]
        return [layer for other in others for layer in other.layers if layer.capture is not None]

    def _may_correct(self, layer: Layer) -> bool:
        return layer.reason is None and not layer.tied

    def owns(self, parameter: Tensor) -> bool:
        """Whether the optimizer updates this parameter."""
        return self._optimizer is None or id(parameter) in self._parameters

    def chunk_of(self, units: int) -> int:
        """Largest chunk for a layer of so many units, the bias included."""
        return self.chunk

    # The step

    def step(self) -> None:
        """Correct the gradients; call it after ``backward`` and before the optimizer's step. Without an optimizer only.

        Raises:
            RuntimeError: an optimizer was given; its own step does this.
        """
        if self._optimizer is not None:
            raise RuntimeError("Preconditioner.step: must be called only when no optimizer was given, got one")
        self._correct()
        self._finish_step()

    @torch._disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
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

    @torch._disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._finish_step()

    @torch.no_grad()
    def _correct(self) -> None:
        if self._states.step > self.steps:  # the optimizer has broken off the last step, after its correction
            self.steps = self._states.step
        holds_others = self._optimizer is not None and _ids_of_parameters(self._optimizer) != self._held
        if holds_others or self.steps == 0:
            self._attach()
        for layer in self.layers:
            layer.info_at = None
        pooled = self._ranks.correct()
        batches = self._batches(pooled)
        if self._states.new_weights:  # seen while the batches were made
            self._attach()
            batches = self._batches(pooled)
        first = False
        if not (self._checked or self._states.paused):
            self._checked = first = stats.notice_unseen(self, [item for batch in batches.values() for item in batch])
        for batch in batches.values():
            self._correct_batch(batch)
            for item in batch:
                item.write_back()
        finished = not self._states.paused
        for layer in self.layers:
            if layer.capture is not None:
                layer.capture.begin_step(finished)
        self._states.reset(self.steps + 1, paused=not self.refreshes(self.steps + 1), finished=finished)
        if first:
            stats.notice_failures(self)

    def _batches(self, pooled: set[int]) -> dict[tuple[torch.device, torch.dtype], list[Item]]:
        """By device and precision: one call computes in one."""
        batches: dict[tuple[torch.device, torch.dtype], list[Item]] = {}
        for layer in self.layers:
            if layer.index not in pooled and layer.capture is not None and (item := self._item(layer)) is not None:
                batches.setdefault((item.rows.device, item.rows.dtype), []).append(item)
        return batches

    def _item(self, layer: Layer) -> Item | None:
        if (module := layer.module()) is None:
            return None
        parameters, kind = module._parameters, layer.kind
        weight = parameters.get(kind.weight)
        if weight is None or layer.tied or not self.owns(weight) or is_lazy(weight):
            return None
        capture = layer.capture
        capture.follow(module, weight)
        grad = weight.grad
        layer.unfit_gradient = grad is not None and not is_plain(grad)
        if capture.lost != layer.lost_rows:
            layer.lost_rows = capture.lost
            if layer.lost_rows:
                stats.notice_lost(self, layer)
        if grad is None or layer.unfit_gradient or layer.lost_rows or not weight.requires_grad:
            return None
        source = capture.source or capture
        bias_grad = None
        if layer.joins_bias and (bias := parameters.get(kind.bias)) is not None and self.owns(bias):
            bias_grad = bias.grad
            if bias_grad is not None and not is_plain(bias_grad):
                bias_grad = None
            if bias_grad is not None:
                bias_grad = kind.bias_view(bias_grad)
        return Item(layer, weight, kind.view(module, grad), bias_grad, source.rows, source.count)

    def _correct_batch(self, batch: list[Item]) -> None:
        """Correct the gradients of layers that are on one device, in one precision."""
        if self.every == 1 and self.decay == 0:
            self._correct_at_once(batch, self.chunk)
            return
        if not self.refreshes(self.steps):
            self._apply(batch)
            return
        covariances = self._covariances(batch)
        # A covariance of NaN fails to factor, and a chunk that fails keeps its gradient: no rows, no correction.
        for i, item in enumerate(batch):
            if self.decay > 0:
                covariances[i] = self._average(item, item.count, covariances[i])
            else:
                covariances[i] = torch.where(item.count.view(1, 1, 1) > 0, covariances[i], math.nan)
        self._correct_with(batch, covariances)

    def _correct_with(self, items: list[Item], covariances: list[Tensor]) -> None:
        """Correct by these covariances; only the steps that follow, if any reuse them, need the inverses."""
        if self.every > 1:
            self._keep(items, *self._invert(items, covariances))
            self._apply(items)
            return
        info, used = ops.foreach_correct_(
            [item.grad for item in items],
            covariances,
            bias_grads=[item.bias_grad for item in items],
            damping=self._damping(),
            scaling=self.scaling,
            chunk=self.chunk,
            group=self.group,
            seed=self.seed,
            step=self._division_step(),
            layers=[item.layer.index for item in items],
        )
        self._note(items, info, used)

    def _correct_at_once(self, batch: list[Item], chunk: int) -> None:
        if any(item.layer.capture.source is not None for item in batch):
            batch = side_by_side(batch)
        # Straight to the operator: what ops.foreach_precondition_ would check holds for captured layers, or is checked
        # by the operator, and this runs in every step.
        joined = [(i, item.bias_grad) for i, item in enumerate(batch) if item.bias_grad is not None]
        info, used = _foreach_precondition_(
            [item.grad for item in batch],
            [bias_grad for _, bias_grad in joined],
            [item.rows for item in batch],
            [],
            [item.count for item in batch],
            [i for i, _ in joined],
            [],
            list(range(len(batch))),
            [item.division for item in batch],
            [ops.default_group(item.grad.dtype, chunk) if self.group is None else self.group for item in batch],
            self._damping(),
            self.scaling == "trace",
            chunk,
            self.max_rows,
            self.seed,
            self.steps,
            batch[0].grad.is_cuda and torch.get_float32_matmul_precision() != "highest",
        )
        self._note(batch, info, used)

    def _covariances(self, items: list[Item]) -> list[Tensor]:
        """Of the rows captured here, one (chunks, chunk, chunk) a layer."""
        return ops.foreach_covariance(
            [item.rows for item in items],
            grads=[item.grad for item in items],
            bias=[item.bias_grad is not None for item in items],
            chunk=self.chunk,
            group=self.group,
            max_rows=self.max_rows,
            seed=self.seed,
            step=self._division_step(),
            layers=[item.layer.index for item in items],
            row_counts=[item.count for item in items],
        )

    def _invert(self, items: list[Item], covariances: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Inverses, info and the damping used."""
        return ops.foreach_inverse(
            covariances,
            units=[item.units for item in items],
            damping=self._damping(),
            scaling=self.scaling,
            chunk=self.chunk,
        )

    def _keep(self, items: list[Item], inverses: list[Tensor], info: Tensor, used: Tensor) -> None:
        self._note(items, info, used)
        for item, inverse in zip(items, inverses, strict=True):
            item.layer.pending.update(inverse=inverse, info=item.layer.info)

    def _average(self, item: Item, count: Tensor, covariance: Tensor) -> Tensor:
        """The bias-corrected running covariance, NaN before anything entered it."""
        state = self._store.get(item.layer)
        old, weight = state.get("covariance"), state.get("weight")
        if old is None or old.shape != covariance.shape or not item.divided_as_before:
            old, weight = torch.zeros_like(covariance), covariance.new_zeros(1)
        gradients = [grad for grad in (item.grad, item.bias_grad) if grad is not None]
        finite = torch.stack([t.isfinite().all() for t in (covariance, *gradients)]).all()
        enters = finite & (count > 0)
        weight = torch.where(enters, self.decay * weight + (1 - self.decay), weight)
        total = torch.where(enters, self.decay * old + (1 - self.decay) * covariance, old)
        item.layer.pending.update(covariance=total, weight=weight)
        item.layer.inverted_units = item.units
        return total / weight

    def _apply(self, batch: list[Item]) -> None:
        """Multiply by the stored inverses; a layer without one waits for the next refresh."""
        ready: list[tuple[Item, Tensor, Tensor]] = []
        for item in batch:
            state = {**self._store.get(item.layer), **item.layer.pending}
            inverse, info = state.get("inverse"), state.get("info")
            if inverse is not None and len(inverse) == self._num_chunks(item) and item.divided_as_before:
                item.layer.info_at = info, 0, len(info)
                ready.append((item, inverse, info))
        if ready:
            ops.foreach_apply_(
                [item.grad for item, _, _ in ready],
                [inverse for _, inverse, _ in ready],
                torch.cat([info for _, _, info in ready]),
                bias_grads=[item.bias_grad for item, _, _ in ready],
                chunk=self.chunk,
                group=self.group,
                seed=self.seed,
                step=self._division_step(),
                layers=[item.layer.index for item, _, _ in ready],
            )

    def refreshes(self, step: int) -> bool:
        """Whether a step captures and inverts. By its number alone: ranks, resumed and compiled models agree."""
        return step % self.every == 0 or (self.decay > 0 and step < _GATHERING)

    def _division_step(self) -> int:
        return 0 if self.decay > 0 else self.steps - self.steps % self.every

    def _damping(self) -> float:
        """Called once for every inversion."""
        value = self.damping
        if callable(value):
            value = _check_damping(value(self.steps), f" at step {self.steps}")
        self.last_damping, self.last_division = value, self._division_step()
        return value

    def _num_chunks(self, item: Item) -> int:
        units = item.units
        return item.rows.shape[1] // item.grad.shape[1] * -(-units // self.chunk_of(units))

    def _note(self, batch: list[Item], info: Tensor, used: Tensor) -> None:
        begin = 0
        for item in batch:
            end = begin + self._num_chunks(item)
            layer = item.layer
            layer.info_at, layer.damping_at = (info, begin, end), (used, begin, end)
            layer.inverted_units, layer.divided_as = item.units, item.division
            begin = end

    def _finish_step(self) -> None:
        self.steps += 1
        self._store.count_step(self.steps)
        for layer in self.layers:
            if layer.pending and layer.weight is not None:
                layer.pending["division"] = torch.tensor([self._division(layer), layer.inverted_units], device="cpu")
                for key, value in layer.pending.items():
                    self._store.put(layer, key, value)
                layer.pending.clear()

    def _division(self, layer: Layer) -> int:
        """A digest of what decides which units stand where in the stored matrices of a layer, but for their number."""
        group = ops.default_group(layer.weight.dtype, self.chunk) if self.group is None else self.group
        return digest((self.seed, self.chunk, group, layer.index, 0 if self.decay > 0 else self.every))

    def parameters(self) -> Iterable[Tensor]:
        """Those of the optimizer; without one, those of the model."""
        if self._optimizer is not None:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        model = self._model()
        return [] if model is None else model.parameters()

    def stored(self, layer: Layer) -> dict[str, Tensor]:
        """What is kept of a layer from step to step."""
        return self._store.get(layer)

    # State

    def _after_load(self, optimizer: Optimizer) -> None:
        self._store.after_load(optimizer)
        self._resume()

    def _resume(self) -> None:
        """Continue from what the store holds."""
        self.steps = self._store.counted_steps()
        divided_otherwise = []
        for layer in self.layers:
            layer.pending.clear()
            if layer.capture is None:
                continue
            layer.capture.begin_step()
            layer.inverted_units = None
            if (division := self._store.get(layer).get("division")) is not None:
                key, layer.inverted_units = division.tolist()
                if key != self._division(layer):
                    self._store.drop(layer)
                    divided_otherwise.append(layer.name)
            if self.every == 1:  # saved with a larger one
                self._store.drop(layer, "inverse", "info")
        if divided_otherwise:
            stats.notice_dropped(self, divided_otherwise)
        self._states.reset(self.steps, paused=not self.refreshes(self.steps), finished=False)

    def state_dict(self) -> dict[str, Any]:
        """Step counter, running covariances and inverses, by layer name.

        With an optimizer, ``optimizer.state_dict()`` holds all of it already.
        """
        layers = {layer.name: dict(self._store.get(layer)) for layer in self.layers if layer.capture}
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
        version, step, saved = (state_dict.get(key) for key in ("version", "step", "layers"))
        _check(version in _VERSIONS, "state_dict version", " or ".join(map(str, _VERSIONS)), version)
        _check(_is_int(step, 0), "state_dict step", "an integer >= 0", step)
        _check(isinstance(saved, Mapping), "state_dict layers", "a dict by layer name", saved)
        covered = {layer.name: layer for layer in self.layers if layer.capture is not None}
        unknown = sorted(set(saved) - set(covered))
        _check(not unknown, "state_dict layers", "those that are covered here", unknown)
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
        self.layers = []

    # Reports

    def stats(self, *, condition: bool = True) -> dict[str, Any]:
        """What the last step did; reads from the device, so it waits for it. Call it between steps.

        Keys: ``steps`` done; ``layers`` corrected and ``uncorrected`` in number; ``coverage``, the share of the
        trainable numbers that were corrected; ``chunks`` in all; ``failed_chunks``, whose gradient was left as it is;
        ``max_damping`` and ``max_condition`` of the last inversion (NaN: none yet). By layer: ``rows`` captured, of
        ``rows_seen``; ``failed`` chunks, where there are any; ``damping`` used, retries included; ``condition``, the
        largest 1-norm condition number of its damped chunks.

        Args:
            condition: whether to compute the condition numbers, which takes about as long as the correction of a step.
        """
        return stats.stats(self, condition)

    def log_to(self, writer: Any, step: int | None = None, prefix: str = "preconditioner") -> None:
        """Write every number of :meth:`stats` as a scalar, in the manner of TensorBoard.

        Args:
            writer: has ``add_scalar(tag, value, step)``, as ``torch.utils.tensorboard.SummaryWriter``.
            step: on the horizontal axis; ``None``: the steps that this preconditioner has done.
            prefix: of the tags, such as ``preconditioner/failed_chunks`` and ``preconditioner/condition/0``.
        """
        stats.log_to(self, writer, step, prefix)

    def summary(self) -> str:
        """A table of all layers: type, units and chunks, rows of the last capture, and what becomes of the gradient."""
        return summary.summary(self)

    def __repr__(self) -> str:
        covered = sum(layer.capture is not None for layer in self.layers)
        damping = "schedule" if callable(self.damping) else f"{self.damping:g}"
        options = f"damping={damping}, scaling={self.scaling!r}, chunk={self.chunk}, max_rows={self.max_rows}"
        options += f", decay={self.decay:g}" * (self.decay > 0) + f", every={self.every}" * (self.every > 1)
        return f"Preconditioner({covered} of {len(self.layers)} layers, {options})"

    def __reduce__(self) -> tuple:
        raise TypeError("Preconditioner: must be constructed anew for a copied model, got a copy; use state_dict()")


def _detach(layers: list[Layer], handles: list) -> None:
    for handle in handles:
        handle.remove()
    for layer in layers:
        if layer.capture is not None:
            layer.capture.remove()


def _check(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"Preconditioner: {name} must be {requirement}, got {value!r}")


def _check_damping(value: float, where: str = "") -> float:
    _check(isinstance(value, int | float) and 0 <= value < math.inf, "damping" + where, "a finite number >= 0", value)
    return float(value)


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _unwrap(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside the wrapper of a training framework (Accelerate, Lightning): the one whose hooks fire."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _ids_of_parameters(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]
