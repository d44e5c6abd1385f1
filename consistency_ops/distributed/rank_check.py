"""Ranks that pool covariances must agree on seed, step, options and layers.

Ranks that differ are told so by an error, and none may wait for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RankCheck:
    """Detects ranks whose seed, step, options or layers differ, among the ranks that pool one flat buffer.

    A rank that has loaded a state or changed its layers (a *changed rank*) must not start a collective that the others
    do not expect: it would be paired with their next one, and hang. It therefore takes part in the all-reduce that they
    expect, with zeros, and sets two extra numbers at the end of the buffer: after the sum these are the number of
    changed ranks and the sum of their ranks.

    * 0 changed ranks: nothing to do.
    * All ranks changed: all compare what they have, with one all-gather.
    * Some ranks changed: every rank that reads the numbers raises an error. Changed ranks always read them; the others
      only on the CPU, because on other devices they would have to wait for the device.

    With ``every > 1`` nothing is sent between refreshes. A state that is loaded in between, at a step that refreshes,
    is compared at once: if only some ranks have loaded it, they wait until the backend's timeout.

    Args:
        groups: process groups over which the buffer is added up, one after the other.
    """

    def __init__(self, groups: Sequence[ProcessGroup]) -> None:
        self._groups = groups
        self._known: dict[str, int] = {"step": 0}  # what was compared, and the step that has been reached since
        self._buffer: tuple[int, torch.dtype] | None = None  # of the last refresh

    def expects(self, refreshes: Callable[[int], bool]) -> bool:
        """Whether unchanged ranks refresh now. ``refreshes`` says whether a step does."""
        return refreshes(self._known["step"])

    def reach(self, now: dict[str, int], refreshes: Callable[[int], bool], device: torch.device) -> None:
        """Compare what must be the same on all ranks, if it differs from what was compared last.

        Args:
            now: the step, and digests of everything else.
            refreshes: whether a step refreshes.
            device: where the collectives' tensors are made.

        Raises:
            RuntimeError: two ranks differ, or only some of the ranks have changed.
        """
        if now == self._known or not self._groups:
            return
        if self._buffer is not None and self.expects(refreshes):
            length, dtype = self._buffer
            buffer = torch.zeros(length, dtype=dtype, device=device)
            buffer[-2], buffer[-1] = 1, dist.get_rank()
            self.all_reduce(buffer)
            self._refuse_some_changed(buffer)
        mine = torch.tensor(list(now.values()), dtype=torch.int64, device=device)
        for group in self._groups:
            gathered = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(gathered, mine, group=group)
            for rank, theirs in enumerate(torch.stack(gathered).tolist()):
                for (field, value), other in zip(now.items(), theirs, strict=True):
                    if value != other:
                        raise RuntimeError(_disagreement(field, dist.get_global_rank(group, rank), value, other))
        self._known = dict(now)

    def count_step(self) -> None:
        self._known["step"] += 1

    def pool(self, *parts: Tensor) -> Tensor:
        """The sum over all ranks of ``parts``, joined to one flat buffer. Must be the first collective of a refresh."""
        buffer = torch.cat([*parts, parts[0].new_zeros(2)])
        self._buffer = len(buffer), buffer.dtype
        self.all_reduce(buffer)
        if not buffer.is_cuda:
            self._refuse_some_changed(buffer)
        return buffer[:-2]

    def all_reduce(self, buffer: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(buffer, group=group)

    def _refuse_some_changed(self, buffer: Tensor) -> None:
        count, rank = map(int, buffer[-2:].tolist())
        ranks = math.prod(group.size() for group in self._groups)
        if 0 < count < ranks:
            who = f"rank {rank} alone" if count == 1 else f"{count} of {ranks} ranks"
            raise RuntimeError(
                "Preconditioner: states must be loaded, and layers changed, on all ranks between the same two steps, "
                f"but {who} did so"
            )


def _disagreement(field: str, rank: int, mine: int, theirs: int) -> str:
    what = f"rank {dist.get_rank()} has {mine}, rank {rank} has {theirs}"
    if field in ("options", "layers"):
        what = f"those of rank {dist.get_rank()} and rank {rank} differ"
    return f"Preconditioner: {field} must be the same on all ranks, but {what}"
