"""One optimizer with the layers whose weights it holds: the hooks on both, and what happens in one step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .distributed.placement import Placements
from .distributed.pooling import Pooling
from .engine import host_path
from .engine.capture import Capture
from .engine.capture_states import LIMIT, CaptureStates
from .engine.correction import Correction
from .engine.discovery import find_ties, find_twins
from .engine.layer import Layer
from .engine.layer_step import LayerStep, by_launch, layer_step, notice_unseen
from .engine.notices import Notices, Vigil, some
from .engine.optimizers import PRIVATE, AttachedOptimizer, is_private, refuse_private
from .engine.ownership import Ownership
from .engine.products import watch_products
from .engine.shares import Shares
from .engine.state import StateStore
from .ops.backend import is_out_of_memory, settle
from .ops.checks import type_name
from .reporting.stats import notice_failures

_STEP_FILE = sys.modules[Optimizer.__module__].__file__  # whose `wrapper` calls the hooks of a step


class Attachment:
    """Captures the inputs of the layers that an optimizer updates, and corrects their gradients before its step.

    Args:
        layers: all layers of the model; several attachments share them, and each takes those that its optimizer holds.
        model: weak reference to the model.
        optimizer: the one that is attached to; ``None``: every layer counts as held, and the user calls the step.
        make_correction: the arithmetic, given the store that it keeps its tensors in, and the optimizer.
        process_group: see :class:`consistency_ops.Preconditioner`.
        notices: where warnings go.
        find_new_layers: called when the optimizer holds other parameters than before.
    """

    def __init__(
        self,
        layers: list[Layer],
        model: weakref.ref[nn.Module],
        optimizer: AttachedOptimizer | None,
        make_correction: Callable[[StateStore, Optimizer | None], Correction],
        process_group: Any,
        notices: Notices,
        find_new_layers: Callable[[], None] | None,
    ) -> None:
        self.optimizer = optimizer
        self.layers = layers
        self.ownership: Ownership = Ownership(optimizer)
        self.store: StateStore = StateStore(optimizer)
        self.correction: Correction = make_correction(self.store, None if optimizer is None else optimizer.stepping)
        self.states: CaptureStates = CaptureStates(
            len(layers), None if optimizer is None else weakref.ref(self.ownership)
        )
        self.vigil: Vigil = Vigil(notices, self.states, optimizer is not None)
        alarm = weakref.WeakMethod(self._alarm)  # no circle: an optimizer that is thrown away frees all this at once
        self.states.alarm = lambda: None if (method := alarm()) is None else method()
        self.placements: Placements = Placements(
            layers,
            model,
            self.ownership.owns,
            process_group,
            None if self.correction.pools or optimizer is None else type(optimizer.stepping).__name__,
            self.store,
            notices,
        )
        self._shares: Shares = Shares(self.correction, self.store, notices)
        self.pooling: Pooling = Pooling(self.correction, self.placements, self._shares)
        self._notices = notices
        self._find_new_layers = find_new_layers
        self._own: list[Layer] = []
        self._left: list[Layer] = []
        self._running = 0  # calls of the optimizer's step that have begun and not ended: a subclass calls its base's
        self._hooks_fire: bool | None = None  # None: no step has had a gradient yet, so nobody can tell
        self.handles: list[RemovableHandle] = []
        self.owner: object = None  # the preconditioner, which lives as long as the optimizer

    # What is covered

    def own_layers(self) -> list[Layer]:
        """The layers that are captured for this optimizer, in the order of the model."""
        return self._own

    def stored_layers(self) -> list[Layer]:
        """The layers of this optimizer that have a state: the captured ones, and what ``max_share`` left alone."""
        return [*self._own, *self._left]

    def attach(self) -> None:
        """Hook the layers whose weight the optimizer holds; again when it holds others."""
        self.ownership.refresh()
        if self.states.grow(len(self.layers)):
            for capture in _captures(self.own_layers()):
                capture.take_state()
        find_ties(self.layers)
        tied = [layer.name for layer in self.layers if layer.tied and layer.capture is not None]
        if tied:
            self._notices.once(
                "tied",
                f"weights were tied after the Preconditioner was constructed, their gradients are left as they are: "
                f"{some(tied)}. Tie weights first to keep this quiet.",
            )
        options = self.correction.options
        new: list[Layer] = []
        for layer in self.layers:
            module, weight = layer.module(), layer.weight
            known = layer.capture is not None or layer.dear or layer.reason is not None or layer.tied
            if known or module is None or weight is None:
                continue
            if self.ownership.owns(weight):
                if self.optimizer is not None:
                    _refuse_a_second_one(module, layer, weight)
                refuse_private(weight, layer.name)
                settle(weight.device)
                layer.capture = Capture(
                    module,
                    layer.kind,
                    self.states,
                    layer.index,
                    options.max_rows,
                    options.seed,
                    options.rows_dtype,
                )
                if layer.only_taken:
                    layer.capture.unhook()
                if layer.kind.inside:
                    layer.capture.watch(watch_products(module, layer.capture))
                self.handles += self.correction.attach(layer)
                new.append(layer)
        self._own = [layer for layer in self.layers if layer.capture and layer.capture.states is self.states]
        self._find_left()
        self.store.keep_types(new)
        self.states.new_weights = False
        if new and self.correction.step > 0:  # they may have had a state that was loaded before they came
            step = self.correction.step
            self._drop_misfits(new)
            self.correction.step = step
            self._shares.resume(new)
            self._leave_dear()

    def hook_optimizer(self) -> None:
        """Follow the optimizer's steps and loads."""
        if self.optimizer is None:
            return
        stepping, saving = self.optimizer.stepping, self.optimizer.saving
        self.handles += [
            stepping.register_step_pre_hook(self._before_step),
            stepping.register_step_post_hook(self._after_step),
            saving.register_load_state_dict_pre_hook(self.store.before_load),
            saving.register_load_state_dict_post_hook(self._after_load),
        ]

    # The step

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running and _is_nested(optimizer):
            self._running += 1
            return None
        self._running = 1  # whatever an exception in the last step has left
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.correct()
            return None
        calls = 0

        def corrected_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    "Preconditioner: optimizer must call its closure once a step, got a second call by "
                    f"{type_name(optimizer)}"
                )
            loss = closure()
            self.correct()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": corrected_closure}
        return (args[0], corrected_closure, *args[2:]), kwargs

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running -= 1
        if self._running <= 0:  # not the end of a super().step() within a step
            self.finish_step()

    def finish_step(self) -> None:
        """Count the step and store what it left."""
        self.correction.finish_step(self.own_layers())
        self._shares.finish_step(self.stored_layers())

    @torch.no_grad()
    def correct(self) -> None:
        """Correct the gradients of this step."""
        correction, states = self.correction, self.states
        # The optimizer has broken off the last step after its correction.
        correction.step = max(correction.step, states.step)
        if self.ownership.refresh() or correction.step == 0:
            self.store.forget_strangers()
            if self._find_new_layers is not None:
                self._find_new_layers()
            self.attach()
            self._take_what_was_loaded()
        correction.begin_step()
        own = self._leave_if_private(self.own_layers())
        if own and (self.optimizer is not None) and self._was_loaded(own):
            self._take_what_was_loaded()
        steps: list[LayerStep] = []
        pooled: set[int] = set()
        first = False
        quick = bool(self._hooks_fire) and not (states.new_weights or self.pooling.has_ranks)
        quick = quick and not self._shares.open(own)
        quick = quick and host_path.correct(correction, own, self.ownership)
        corrected = quick
        if not quick:
            for layer in own:
                layer.info_slice = None
            pooled = self.pooling.correct()
            steps = self._layer_steps(own, pooled)
            if states.new_weights:  # seen while the steps were made
                self.attach()
                own = self.own_layers()
                steps = self._layer_steps(own, pooled)
            if not (self._hooks_fire or states.paused):
                self._hooks_fire = first = notice_unseen(steps, self._notices)
            taken = self._shares.decide(steps)
            self._run(taken)
        left = self.placements.left_alone() if pooled else set()
        corrected = corrected or bool(steps or pooled - left)
        held = corrected or not own  # all else takes a while
        held = held or any(layer.weight is not None and self.ownership.owns(layer.weight) for layer in own)
        self.vigil.step(held, corrected, bool(left))
        finished = not states.paused
        # Of the quick ones none waits.
        waits = self._waiting(own, steps, pooled) if correction.reuses_batches and not quick else []
        host_path.begin_step(own, finished)
        states.reset(correction.step + 1, paused=not correction.refreshes(correction.step + 1), finished=finished)
        for capture, still in waits:
            capture.wait(still)
        self._leave_dear()
        if first:
            notice_failures(correction, self.own_layers(), self._notices)

    def _run(self, steps: list[LayerStep]) -> None:
        """Correct the gradients of these layers, one launch for all that fit together."""
        correction = self.correction
        for batch in by_launch(steps, correction.chunk_of):
            try:
                correction.run(batch)
            except RuntimeError as error:
                raise _with_a_cure(error) from None
            for step in batch:
                if step.layer.kind.groups is not None:  # no other has a copy that must be written back
                    step.write_back()

    def _waiting(self, own: list[Layer], steps: list[LayerStep], pooled: set[int]) -> list[tuple[Capture, bool]]:
        """Layers that wait for rows, or have done so until now, and whether they wait on.

        An expert without tokens in a step that inverts has nothing to invert, and its inverse of the steps before has
        another division: it captures until it has rows, and is corrected by these.
        """
        inverts = not self.states.paused
        with_rows = {s.layer.index for s in steps if s.layer.capture is not None and not s.layer.capture.idle}
        found = []
        for layer in own:
            capture = layer.capture
            if capture is None or layer.index in pooled:
                continue
            waits = layer.index not in with_rows and (inverts or capture.waits)
            if waits and inverts and not layer.pending:
                self.correction.retire_inverse(layer)
            if capture.waits and not (waits or inverts) and capture.state is not None:
                source = capture.source or capture
                self.states.keep_last(capture.state.device, source.index)
                capture.last_source = source.index
            if waits or capture.waits:
                found.append((capture, waits))
        return found

    def _leave_if_private(self, own: list[Layer]) -> list[Layer]:
        """Leave a model alone that turns out to be trained with differential privacy; all parameters have the mark."""
        if not own or not is_private(own[0].weight):
            return own
        self._notices.once(
            "private", PRIVATE.format("model", "parameters with per-sample gradients") + "; it is left alone"
        )
        self.vigil.silence()
        for capture in _captures(own):
            capture.remove()
        for layer in own:
            layer.capture, layer.reason = None, "trained with differential privacy"
        self._own = []
        return self._own

    def _layer_steps(self, own: list[Layer], pooled: set[int]) -> list[LayerStep]:
        """What this step has of the layers that no other rank shares."""
        layers = [layer for layer in own if layer.index not in pooled] if pooled else own
        owned, notices = self.ownership.owned, self._notices
        return [step for layer in layers if (step := layer_step(layer, owned, notices)) is not None]

    def _alarm(self) -> None:
        """Many gradients came without a step: as many as ten new ones for each layer that has some?"""
        states = self.states
        trained = sum(layer.weight is not None and layer.weight.requires_grad for layer in self.own_layers())
        limit = LIMIT * max(trained, 1)
        if states.waiting > limit:
            self.vigil.no_step()
        else:
            states.limit = limit

    # Layers that cost too much

    def _find_left(self) -> None:
        self._left = [
            layer
            for layer in self.layers
            if layer.dear and layer.weight is not None and self.ownership.owns(layer.weight)
        ]

    def _leave_dear(self) -> None:
        """Take the hooks from layers that were found to cost more than ``max_share``: they cost nothing then."""
        found = [layer for layer in self._own if layer.dear]
        if not found:
            return
        for layer in found:
            if layer.capture is not None:
                layer.capture.drop()
            layer.capture = layer.info_slice = layer.damping_slice = None
            layer.pending.clear()
        self._own = [layer for layer in self._own if not layer.dear]
        self._find_left()
        self._shares.say_left(found)
        if not self._own:
            self.vigil.silence()

    def _take_decisions(self) -> None:
        """Those of a state that was loaded: some layers may have to be captured that were not, and the reverse."""
        if self._shares.limit is None:
            return
        before = set(self._left)
        self._shares.resume(self.stored_layers())
        self._leave_dear()
        if any(not layer.dear for layer in before):
            self.attach()

    # Rows

    def drop_rows(self) -> None:
        """Forget all rows of this step."""
        for capture in _captures(self.own_layers()):
            capture.begin_step()
        self.states.reset(self.states.step, paused=self.states.paused, finished=False)

    # State

    def _was_loaded(self, own: list[Layer]) -> bool:
        """Whether the optimizer has another state than this attachment wrote, and no hook told of it."""
        assert self.optimizer is not None
        return self.optimizer.state_was_replaced() or self.store.is_foreign(own[0])

    def _take_what_was_loaded(self) -> None:
        """Continue from a state that was loaded unseen; the rows of this step stay."""
        if self.optimizer is None or self.store.counted_steps() in (0, self.correction.step):
            return
        self.store.adopt()
        self._drop_misfits(self.own_layers())
        self.states.move_to(self.correction.step)
        self._take_decisions()
        self._wait_for_what_is_missing()

    def _after_load(self, optimizer: Optimizer) -> None:
        self.store.after_load(optimizer)
        self.resume()

    def resume(self) -> None:
        """Continue from what the store holds. Rows captured so far are dropped."""
        if self.optimizer is not None:
            self.optimizer.state_was_replaced()
        self.store.adopt()
        self._drop_misfits(self.own_layers())
        for capture in _captures(self.own_layers()):
            capture.begin_step()
        step = self.correction.step
        self.states.reset(step, paused=not self.correction.refreshes(step), finished=False)
        self._take_decisions()
        self._wait_for_what_is_missing()

    def _wait_for_what_is_missing(self) -> None:
        """After a load: a layer without an inverse, where others have one, was waiting for rows; see _waiting."""
        paused = self.states.paused and self.correction.reuses_batches
        for layer in self.own_layers():
            if layer.capture is not None:
                waits = paused and not self.correction.has_inverse(layer)
                if waits or layer.capture.waits:
                    layer.capture.wait(waits)

    def _drop_misfits(self, layers: list[Layer]) -> None:
        dropped = self.correction.resume(layers)
        if dropped:
            self._notices.once(
                "dropped",
                "the loaded state was saved with another seed, chunk, group or every, with other layers before these, "
                f"or by another network, so it was dropped and their statistics start anew: {some(dropped)}. Construct "
                "the Preconditioner as it was then.",
            )


def _captures(layers: list[Layer]) -> list[Capture]:
    return [layer.capture for layer in layers if layer.capture is not None]


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the ``step`` whose hook runs was called by another ``step`` of the same optimizer, that of a subclass."""
    steps, found = 0, cast("FrameType | None", sys._getframe(1))
    while found is not None:
        if found.f_code.co_name == "wrapper" and found.f_code.co_filename == _STEP_FILE:
            args: tuple[object, ...] = found.f_locals.get("args", ())
            steps += args[:1] == (optimizer,)
        found = found.f_back
    return steps > 1


def _refuse_a_second_one(module: nn.Module, layer: Layer, weight: Tensor) -> None:
    """A gradient must not be corrected twice, whatever the number of preconditioners and optimizers."""
    if find_twins(module, layer.kind, weight):
        raise ValueError(
            "Preconditioner: optimizer must not have another Preconditioner for the same layer (call its "
            f"remove() first), got one for {layer.name!r}"
        )


def remove_hooks(layers: list[Layer], handles: list[RemovableHandle]) -> None:
    """Take out everything that was hooked."""
    for handle in handles:
        handle.remove()
    for layer in layers:
        if layer.capture is not None:
            layer.capture.remove()


def _with_a_cure(error: RuntimeError) -> RuntimeError:
    """The error of an allocator as the type that searches for a batch size know, on the CPU too; others as they are."""
    if not is_out_of_memory(error):
        return error
    return torch.OutOfMemoryError(
        "Preconditioner: out of memory in the correction of a step: a smaller chunk, fewer max_rows, decay=0, every=1, "
        f"or skip= for the widest layers need less ({str(error).splitlines()[0]})"
    )


def held_weights(layers: list[Layer]) -> set[Tensor]:
    """The weights of the layers that are captured, or would be if they cost less."""
    held = (layer for layer in layers if layer.capture is not None or layer.dear)
    return {layer.weight for layer in held if layer.weight is not None}
