"""Ranks that pool covariances must agree on seed, step, options and layers, or be told so; none may wait for ever."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Agreement:
    """Of the ranks that pool one flat buffer.

    Whether something is new (a state was loaded, a layer frozen) each rank knows of itself only. A rank with news must
    not ask the others by a collective that they do not expect: it would be paired with their next one, and hang. So it
    takes part in the pooling that they expect, with zeros, and raises its hand in the last two numbers of the buffer:
    1, and its rank. If all hands are up, all compare; if some are, that is an error on every rank that looks. Ranks
    with news do; the others only on the CPU, because on other devices they would have to wait.

    With ``every > 1`` nothing is sent between refreshes. State that is loaded then, at a step that refreshes, is
    compared at once: if only some ranks have loaded it, they wait until the backend's timeout.
    """

    def __init__(self, groups: Sequence[ProcessGroup]) -> None:
        self._groups = groups
        self._known: dict[str, int] = {"step": 0}  # what was compared, and the step that has been reached since
        self._buffer: tuple[int, torch.dtype] | None = None  # of the last refresh

    def expects(self, refreshes: Callable[[int], bool]) -> bool:
        """Whether ranks without news refresh now. ``refreshes``: whether a step does."""
        return refreshes(self._known["step"])

    def reach(self, now: dict[str, int], refreshes: Callable[[int], bool], device: torch.device) -> None:
        """``now``: step, and digests of what else must be the same. Where something is new, all ranks compare it."""
        if now == self._known or not self._groups:
            return
        if self._buffer is not None and self.expects(refreshes):
            length, dtype = self._buffer
            buffer = torch.zeros(length, dtype=dtype, device=device)
            buffer[-2], buffer[-1] = 1, dist.get_rank()
            self.all_reduce(buffer)
            self._refuse_news_of_some(buffer)
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
        """Sum over ranks of flat buffers, one after the other: the first collective of a refresh."""
        buffer = torch.cat([*parts, parts[0].new_zeros(2)])
        self._buffer = len(buffer), buffer.dtype
        self.all_reduce(buffer)
        if not buffer.is_cuda:
            self._refuse_news_of_some(buffer)
        return buffer[:-2]

    def all_reduce(self, buffer: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(buffer, group=group)

    def _refuse_news_of_some(self, buffer: Tensor) -> None:
        count, rank = map(int, buffer[-2:].tolist())
        ranks = math.prod(group.size() for group in self._groups)
        if 0 < count < ranks:
            who = f"rank {rank} alone" if count == 1 else f"{count} of {ranks} ranks"
            raise RuntimeError(
                "Preconditioner: states must be loaded, and layers changed, on all ranks between the same two steps, "
                f"but {who} did so"
            )


def digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _disagreement(field: str, rank: int, mine: int, theirs: int) -> str:
    what = f"rank {dist.get_rank()} has {mine}, rank {rank} has {theirs}"
    if field in ("options", "layers"):
        what = f"those of rank {dist.get_rank()} and rank {rank} differ"
    return f"Preconditioner: {field} must be the same on all ranks, but {what}"
