"""Warnings of the preconditioner in the log ``consistency_ops``, each written once."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

log: logging.Logger = logging.getLogger("consistency_ops")
PATIENCE = 10  # gradients without a correction, before that is said
_SHOWN = 5  # names that one message lists


class Notices:
    """Remembers what it has said: a training of a million steps says everything once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, key: str, text: str) -> None:
        """Log ``text`` as a warning, unless something was logged under ``key`` before.

        The text says what happened and what to do about it.
        """
        if key not in self._said:
            self._said.add(key)
            log.warning("Preconditioner: %s", text)


class Watched(Protocol):
    """What a :class:`Vigil` needs of the captures: counters that they keep, and the switch that stops them."""

    stopped: bool
    taken: int
    waiting: int
    alarm: Callable[[], None]


class Vigil:
    """Notices that gradients come and are never corrected, says why, and stops the capture until one is.

    Args:
        notices: where it says so.
        captures: told to stop.
        has_optimizer: whether the steps are those of an optimizer, or the user's calls.
    """

    def __init__(self, notices: Notices, captures: Watched, has_optimizer: bool) -> None:
        self._notices, self._captures, self._has_optimizer = notices, captures, has_optimizer
        self._silent = False
        self.may_end = False  # it belongs to an optimizer that is thrown away as a whole
        self._idle_steps = 0  # steps in a row that found no gradient although there were some in the backward pass
        captures.alarm = self.no_step

    def step(self, held: bool, corrected: bool, left: bool) -> None:
        """A step is done.

        Args:
            held: whether the optimizer holds the weight of any layer.
            corrected: whether any layer had a gradient.
            left: whether layers that ranks share are left alone, which was said before.
        """
        if corrected:
            self._silent = True
            self._idle_steps, self._captures.stopped = 0, False
        elif not held:
            self._stop(
                "the optimizer holds none of the covered weights any more, so no gradient is corrected and no input is "
                "captured from now on. DeepSpeed ZeRO and FullyShardedDataParallel (FSDP1) put flat copies in their "
                "place: use DistributedDataParallel, fully_shard, ZeroRedundancyOptimizer or ZeRO stage 0. If "
                "parameters were replaced, construct the Preconditioner after that."
            )
        elif left:
            self._idle_steps += 1
            if self._idle_steps >= PATIENCE:
                self._captures.stopped = self._silent = True
        elif self._captures.taken or self._captures.waiting:
            self._idle_steps += 1
            if self._idle_steps >= PATIENCE:
                self._stop(_GONE)
        self._captures.taken = 0

    def no_step(self) -> None:
        """Gradients were made again and again without a step."""
        if self._captures.taken:
            self._stop(_GONE)
        elif self._has_optimizer:
            self._stop(
                f"{PATIENCE} gradients came and no step() of the optimizer that was given followed, so nothing is "
                "corrected; inputs are captured again after its next step. If the training steps another optimizer (a "
                "wrapper such as SAM, one that a trainer made anew), construct the Preconditioner with that one."
            )
        else:
            self._stop(
                f"{PATIENCE} gradients came and no step() of the Preconditioner followed, so nothing is corrected; "
                "inputs are captured again after the next. Call it before the optimizer's step, or pass the optimizer."
            )

    def _stop(self, text: str) -> None:
        self._captures.stopped = self._silent = True
        self._notices.once("off", text)

    def silence(self) -> None:
        """The user removes the preconditioner."""
        self._silent = True

    @property
    def ended_in_vain(self) -> bool:
        """Whether nothing was corrected, and nothing was said of it."""
        return not (self._silent or self.may_end)


def end(vigils: list[Vigil], clean_up: Callable[..., None], *args: object) -> None:
    """A preconditioner is gone: clean up, and say so if it has done nothing."""
    clean_up(*args)
    if all(vigil.ended_in_vain for vigil in vigils):
        log.warning(
            "Preconditioner: it ended before it corrected a gradient, with the optimizer that it was given, or because "
            f"nothing referred to it. {_MADE_ANEW}"
        )


def outlive(vigils: list[weakref.ref[Vigil]]) -> None:
    """The model is gone, and its preconditioner is not: say so if it has done nothing."""
    left = [vigil for found in vigils if (vigil := found()) is not None]
    if left and all(vigil.ended_in_vain for vigil in left):
        for vigil in left:
            vigil.silence()
        log.warning("Preconditioner: its model ended before it corrected a gradient. %s", _MADE_ANEW)


_MADE_ANEW = (
    "Construct it after the model and the optimizer that the training really steps: a trainer may make its own."
)
_GONE = (
    "gradients came in the backward passes, and at the optimizer's step there were none, so nothing is corrected and "
    "no input is captured from now on. Optimizers that update the weights in the backward pass (LOMO, layer-wise "
    "GaLore, post-accumulate hooks) leave none: pass the list of those that do update the weights, if there are any."
)


def some(names: Iterable[str]) -> str:
    """The first names of a list, and the number of those that are left out."""
    names = [name or "(model)" for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
