"""The bookkeeping of row capture: how many rows each layer has, which rows count, and what stops the capture.

The columns of the state tensor are the fields of ``CaptureState`` in ``csrc/include/consistency_ops/capture.h``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.deterministic
from torch import Tensor

from ..ops.backend import is_out_of_memory
from ..ops.library import torch_abi

if TYPE_CHECKING:
    from .ownership import Ownership

USED, SEEN, STRIDE, NEXT, MARK, FORWARD, STEP, PAUSED, STATE_SIZE = 0, 1, 2, 3, 4, 6, 7, 8, 11
NEW, LIMIT = 100, 1000  # weight of a new gradient (one that is added to: 1), and of ten new ones: too many for a layer


def empty(rows: int, units: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is written before it is read: deterministic mode need not fill it, and it stays untouched."""
    mode: Any = torch.utils.deterministic
    fills, mode.fill_uninitialized_memory = mode.fill_uninitialized_memory, False
    try:
        return torch.empty(rows, units, dtype=dtype, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = rows * units * dtype.itemsize / 2**20
        raise torch.OutOfMemoryError(
            f"Preconditioner: out of memory for the input rows of a layer, {size:.0f} MiB for {rows} rows of {units} "
            f"units: a smaller max_rows needs less ({str(error).splitlines()[0]})"
        ) from None
    finally:
        mode.fill_uninitialized_memory = fills


class CaptureStates:
    """The bookkeeping of all layers: one int64 tensor (layers, STATE_SIZE) a device, and what the last step left."""

    # Slots, as those of RowBuffer.
    # fmt: off
    __slots__ = (
        "_tensors", "alarm", "inputs", "layers", "limit", "mask", "new_weights", "ownership", "paused",
        "step", "stopped", "taken", "waiting",
    )
    # fmt: on

    def __init__(self, layers: int, ownership: weakref.ref[Ownership] | None = None) -> None:
        self.layers: int = layers
        self.limit: int = LIMIT  # of `waiting`; raised by the alarm, which knows the layers that have gradients
        self.ownership: weakref.ref[Ownership] | None = (
            ownership  # of the optimizer whose steps they are; None: they are the user's calls
        )
        self.step: int = 0
        self.paused: bool = False
        self.new_weights: bool = False  # a layer has another weight than before: it may be tied
        self.stopped: bool = False  # nothing is captured, because nothing is corrected; eager mode
        self.taken: int = 0  # gradients of this step that other hooks had taken when they were to be marked
        self.waiting: int = 0  # gradients since the last correction, weighted
        self.alarm: Callable[[], None] = lambda: None  # called when too many are waiting
        self.mask: RowMask | None = None  # rows that count
        # Inputs of this step by id: who captured it in which of its calls, and the version it had.
        self.inputs: dict[int, tuple[weakref.ref[Tensor], int, Any, int]] = {}
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}  # with the views that reset needs

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            state = torch.zeros(self.layers, STATE_SIZE, dtype=torch.int64, device=device)
            views = state[:, : FORWARD + 1], state[:, STEP], state[:, PAUSED]
            state[:, STEP], state[:, PAUSED] = self.step, int(self.paused)
            self._tensors[device] = state, torch.zeros_like(state), *views
        return self._tensors[device][0]

    def grow(self, layers: int) -> bool:
        """Make room for more layers; returns whether the captures have to take their state from new tensors."""
        if layers <= self.layers:
            return False
        self.layers, before = layers, self._tensors
        self._tensors = {}
        for device, (state, last, *_) in before.items():
            self.on(device)[: len(state)] = state
            self._tensors[device][1][: len(last)] = last
        return True

    def move_to(self, step: int) -> None:
        """Be at another step, with the rows that were captured."""
        self.step = step
        for tensors in self._tensors.values():
            tensors[3].fill_(step)

    def drop_unmarked(self) -> None:
        """Forget the rows that were in no backward pass."""
        self.inputs.clear()
        for state, *_ in self._tensors.values():
            dropped = (state[:, USED] - state[:, MARK]) * state[:, STRIDE]
            state[:, SEEN] -= dropped
            state[:, NEXT] -= dropped
            state[:, USED] = state[:, MARK]
            state[:, : FORWARD + 1] *= state[:, MARK : MARK + 1] > 0

    def wait(self, weight: int) -> None:
        """A gradient came that has not been corrected yet."""
        self.waiting += weight
        if self.waiting > self.limit:
            self.alarm()

    def last_count(self, device: torch.device, index: int) -> Tensor:
        """Rows in the buffer of a layer: of this step, or if there are none yet, of the last one that captured."""
        state, last = self._tensors[device][:2]
        count = state[index, USED : USED + 1]
        return torch.where(count > 0, count, last[index, USED : USED + 1])

    def last_step(self, device: torch.device, index: int) -> list[int]:
        """The state of a layer at the end of the last step that captured; waits for the device."""
        return self._tensors[device][1][index].tolist()

    def keep_last(self, device: torch.device, index: int) -> None:
        """Let the last finished step of one layer be this one."""
        state, last = self._tensors[device][:2]
        last[index].copy_(state[index])

    def reset(self, step: int, paused: bool, finished: bool) -> None:
        """Forget all rows and begin ``step``; ``finished``: the rows forgotten are those of a finished step."""
        pauses = paused != self.paused
        self.waiting = 0
        self.step, self.paused = step, paused
        self.inputs.clear()
        all_paused = paused if pauses or not finished else None
        for state, last, pattern, steps, pausing in self._tensors.values():
            if torch_abi is not None and torch_abi.reset_states(state, last, step, all_paused, finished):
                continue
            if finished:
                last.copy_(state)
            pattern.zero_()
            steps.fill_(step)
            if all_paused is not None:
                pausing.fill_(int(all_paused))


class RowMask:
    """Which rows of the inputs count, by the leading dimensions of the inputs."""

    def __init__(self, mask: Tensor) -> None:
        self.shape: torch.Size = mask.shape
        self._rows = mask.flatten().nonzero().flatten()  # once a batch, where the mask is

    def select(self, x: Tensor, unit_dim: int) -> Tensor:
        """The rows of ``x`` that count: all, unless its leading dimensions are those of the mask."""
        dims = len(self.shape)
        if x.dim() + unit_dim < dims or x.shape[:dims] != self.shape:
            return x
        if self._rows.device != x.device:
            self._rows = self._rows.to(x.device)
        return x.detach().flatten(0, dims - 1).index_select(0, self._rows)
