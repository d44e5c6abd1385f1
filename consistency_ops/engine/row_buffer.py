"""The buffer of a layer's rows: how large it is, of which type, and which of its rows have been differentiated."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .capture_operators import capture_mark
from .capture_states import MARK, USED, CaptureStates, empty

ROOMY = sys.maxsize  # room of a buffer that is as large as it may become
_HALVES = frozenset({torch.bfloat16, torch.float16})
_VAIN = 3  # gradients made anew within a step, all for nothing, before their rows are kept no longer


class RowBuffer:
    """Rows of one layer, and their bookkeeping in ``states``.

    It is as large as the rows of the largest step so far, at most ``max_rows``; a layer that shares the rows of another
    has none. A graph, compiled or recorded, holds the address: its buffer is made for ``max_rows`` at once and stays.
    Rows of 16 bits are kept as they are, until others come. ``dtype``: bfloat16 to round rows of 32 bits to it.
    """

    # Slots, not a dictionary: csrc/torch_abi reads and writes them where they lie (host_path.py).
    # fmt: off
    __slots__ = (
        "__weakref__", "_device", "_double", "_grown", "_kept", "_mark_due", "_marked_offered", "_room",
        "_taken", "_vain", "count", "dtype", "fixed", "index", "max_rows", "offered", "rows", "seed", "state",
        "states", "width",
    )
    # fmt: on

    def __init__(
        self, states: CaptureStates, index: int, max_rows: int, seed: int, dtype: torch.dtype | None = None
    ) -> None:
        self.states: CaptureStates = states
        self.index: int = index  # of the layer
        self.max_rows: int = max_rows
        self.seed: int = seed
        self.dtype: torch.dtype | None = dtype
        self.rows: Tensor | None = None  # None until the first are captured
        self.width: int = 0  # units of a row
        self.state: Tensor | None = None  # None: the weight is frozen
        self.count: Tensor | None = None  # rows in the buffer: int64, shape (1,), on the device
        self.offered: int = 0  # eager: rows of this step; the buffer holds no more
        self.fixed: bool = False  # a graph holds the buffer
        self._device: torch.device | None = None
        self._double = False  # rows are float64
        self._room = -1  # rows that the buffer has room for; -1: there is none
        self._taken: torch.dtype | None = None  # a type of inputs that the buffer can take
        self._grown = False  # it may be larger than it needs to be
        self._marked_offered = 0  # `offered` at the last backward pass of this step
        self._mark_due = False  # that pass is not yet in the state
        self._kept: list[tuple[Tensor, Tensor]] = []  # rows of gradients that were taken away in this step
        self._vain = 0  # steps in a row in which such rows were not needed

    def _release(self) -> None:
        self.rows, self._room, self._taken, self._grown = None, -1, None, False
        self.offered = self._marked_offered = 0
        self._mark_due = False

    def _hold(self, rows: int, dtype: torch.dtype) -> None:
        """Have a buffer for so many rows, and for inputs of this type; what is in it stays."""
        old, wide = self.rows, torch.float64 if self._double else torch.float32
        if dtype is torch.float32 and self.dtype is not None:
            dtype = self.dtype
        if self._double or dtype not in _HALVES or (old is not None and old.dtype is not dtype):
            dtype = wide
        if old is not None:
            rows = max(rows, len(old))
        if old is None or len(old) < rows or old.dtype is not dtype:
            assert self._device is not None
            self.rows = new = empty(rows, self.width, dtype, self._device)
            if old is not None:
                new[: len(old)].copy_(old)
        self._room = ROOMY if self.fixed or rows == self.max_rows else rows

    def _grow(self, needed: int, dtype: torch.dtype) -> None:
        """As :meth:`_hold`. The buffer at least doubles, so that many calls copy it a few times only."""
        old, rows = self.rows, min(needed, self.max_rows)
        if self.fixed:
            rows = self.max_rows if old is None else len(old)
        elif old is not None and rows > len(old):
            rows, self._grown = min(max(rows, 2 * len(old)), self.max_rows), True
        self._hold(rows, dtype)
        self._taken = dtype

    def _trim(self) -> None:
        """After the first step of its size the buffer is as large as the rows of that step."""
        self._grown, rows = False, self.rows
        if rows is not None and not self.fixed and 0 < self.offered < len(rows):
            self.rows, self._room = rows[: self.offered].clone(), self.offered

    def fix(self, dtype: torch.dtype) -> None:
        """Have the largest buffer for inputs of this type, where it will stay: a graph takes its address."""
        rows = len(self.rows) if self.fixed and self.rows is not None else self.max_rows
        self.fixed = True
        self._hold(rows, dtype)

    @property
    def buffer(self) -> Tensor:
        """The rows, of which the first ``count`` hold data; no row at all if none has been captured."""
        if self.rows is not None:
            return self.rows
        return torch.empty(0, self.width, dtype=torch.float64 if self._double else torch.float32, device=self._device)

    def _mark_now(self) -> None:
        """Write down the backward pass that all rows have been through."""
        self._mark_due, self._marked_offered = False, self.offered
        if self.rows is not None:
            capture_mark(self.rows, self.state, self.index, False)

    def _keep_rows(self) -> None:
        """Keep the rows of a gradient that was taken away: of a skipped step, or to be added up by hand."""
        rows, state = self.rows, self.state
        if (
            self._vain >= _VAIN
            or rows is None
            or state is None
            or (rows.is_cuda and torch.cuda.is_current_stream_capturing())
        ):
            return
        mark, used = state[self.index, MARK], state[self.index, USED]
        count = torch.where(mark < used, mark, 0)  # without new rows the same forward pass is differentiated again
        size = len(rows) if rows.is_cuda else int(count)
        if size:
            self._kept.append((rows[:size].clone(), count))

    def take_state(self) -> None:
        """After the states have grown."""
        if self.state is not None:
            self.state = self.states.on(self.state.device)
            self.count = self.state[self.index, USED : USED + 1]
