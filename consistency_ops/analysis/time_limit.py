"""How long the parts of an examination may take, and in which order they spend their time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimit:
    """Seconds from now on. Work asks :meth:`over` between its items, and leaves out what is left."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.end: float = time.monotonic() + seconds

    def over(self) -> bool:
        return time.monotonic() > self.end

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


_NONE = TimeLimit()
_running: list[TimeLimit] = [_NONE]


@contextmanager
def limited(limit: TimeLimit) -> Iterator[None]:
    """What is measured inside, and asks :func:`out_of_time`, ends with ``limit``."""
    _running.append(limit)
    try:
        yield
    finally:
        _running.pop()


def is_limited() -> bool:
    return _running[-1] is not _NONE


def seconds_left() -> float:
    return _running[-1].left()


def out_of_time() -> bool:
    return _running[-1].over()


def spread(count: int) -> list[int]:
    """The numbers below ``count``, the first, the last and the middle one first: any beginning covers them evenly."""
    order: dict[int, None] = {}
    pieces = 1
    while len(order) < count:
        order.update(dict.fromkeys(round(i * (count - 1) / pieces) for i in range(pieces + 1)))
        pieces *= 2
    return list(order)
