"""``max_share``: layers whose correction costs more than a share of their own forward and backward pass.

The count of ``layer_cost.py`` decides, once a layer: in the first step that has rows and a gradient of it. On ranks
that pool a layer the mean of their rows is counted, which all of them know alike. The decision is kept beside the
layer's state, and a training that is resumed does not make it again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .capture_states import SEEN
from .correction import Correction
from .dtensors import is_dtensor
from .layer import Layer
from .layer_cost import LayerSize, Method, share
from .layer_step import LayerStep
from .notices import Notices, log, some
from .state import StateStore

_KEY = "share"
_UNDECIDED, _TAKEN, _LEFT = -1, 0, 1


class Shares:
    """The decisions about the layers of one optimizer.

    Args:
        correction: its options are counted, and its number of steps says when to look at a device.
        store: where decisions are kept.
        notices: told of the layers that are left alone.
    """

    def __init__(self, correction: Correction, store: StateStore, notices: Notices) -> None:
        options = correction.options
        self.limit: float | None = options.max_share
        self._correction, self._store, self._notices = correction, store, notices
        self._method = Method(
            options.chunk,
            options.max_rows,
            options.every,
            options.decay > 0,
            correction.whitens,
            options.outputs and correction.whitens,
            options.dct and correction.whitens,
        )
        self._entries: dict[int, Tensor] = {}  # by layer index, what is to be stored after the optimizer's step

    def open(self, own: list[Layer]) -> bool:
        """Whether a decision about one of these layers is due."""
        return self.limit is not None and any(layer.share is None and self._looks(layer) for layer in own)

    def _looks(self, layer: Layer) -> bool:
        weight, capture = layer.weight, layer.capture
        if weight is None or weight.grad is None or capture is None or capture.state is None or capture.idle:
            return False
        return not (capture.source or capture).fixed or self._may_wait(capture.state)

    def _may_wait(self, on_device: Tensor) -> bool:
        """Compiled models count rows on the device only, and a layer may never have any: ever fewer looks at it."""
        step, every = self._correction.step, self._correction.options.every
        turn = step if step < every else step // every
        rare = turn & (turn + 1) == 0  # 0, 1, 3, 7, ...
        return rare and not (on_device.is_cuda and torch.cuda.is_current_stream_capturing())

    def decide(self, steps: list[LayerStep]) -> list[LayerStep]:
        """Decide about the layers that one process holds alone; returns the steps of those that are corrected."""
        if self.limit is None or all(step.layer.share is not None for step in steps):
            return steps
        users: dict[int, int] = {}
        for step in steps:
            users[id(step.rows)] = users.get(id(step.rows), 0) + 1
        for step in steps:
            if step.layer.share is None and self._looks(step.layer):
                self._decide(step, _rows_seen(step.layer), users[id(step.rows)])
        return [step for step in steps if not step.layer.dear]

    def decide_pooled(self, steps: list[LayerStep], rows: Tensor, ranks: int, parts: list[tuple[int, int]]) -> None:
        """Decide about layers that ranks share, on all of them alike.

        Args:
            rows: of all ranks, one number a layer.
            ranks: how many these are.
            parts: for every layer, among how many ranks its gradient is dealt, and among how many of these what it
                computes is, too.
        """
        if self.limit is None or all(step.layer.share is not None for step in steps) or not self._may_wait(rows):
            return
        for step, total, dealt in zip(steps, rows.tolist(), parts, strict=True):
            if step.layer.share is None and total > 0:
                self._decide(step, max(round(total / ranks), 1), 1, *dealt)

    def _decide(self, step: LayerStep, rows: int, sharers: int, held_by: int = 1, computed_by: int = 1) -> None:
        layer = step.layer
        if rows == 0:
            return
        assert self.limit is not None
        layer.share = share(_size(step, rows, held_by, computed_by), self._method, sharers)
        layer.dear = layer.share > self.limit
        self._keep(layer)
        if layer.dear:
            self._say(layer)

    def _say(self, layer: Layer) -> None:
        log.info(
            "Preconditioner: %s: correcting it counts %.2f of its forward and backward pass", layer.name, layer.share
        )

    def say_left(self, layers: list[Layer]) -> None:
        """Tell which layers are left alone from now on."""
        if layers:
            names = [f"{layer.name} ({layer.share:.2f})" for layer in layers]
            self._notices.once(
                f"share {names}",
                f"left alone, because correcting them costs more than max_share="
                f"{self.limit:g} of their forward and backward pass: {some(names)}. summary() lists all layers.",
            )

    # What is kept

    def _keep(self, layer: Layer) -> None:
        flag = _UNDECIDED if layer.share is None else _LEFT if layer.dear else _TAKEN
        numbers = [flag, layer.share or 0.0, self.limit]
        self._entries[layer.index] = torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def finish_step(self, layers: list[Layer]) -> None:
        """Store the decisions; after the optimizer's step, which may not find our state before.

        Checkpoints are read into what is there, so what is undecided has an entry, too.
        """
        if self.limit is None:
            return
        for layer in layers:
            weight = layer.weight
            if layer.share is None and weight is not None and weight.grad is not None and not layer.has_share_entry:
                self._keep(layer)
            if layer.index in self._entries and weight is not None:
                self._store.put(layer, _KEY, self._entries.pop(layer.index))
                layer.has_share_entry = True

    def resume(self, layers: list[Layer]) -> None:
        """Take the decisions that the store holds; those that were made with another limit are made of their share."""
        self._entries.clear()
        for layer in layers:
            layer.share, layer.dear, layer.has_share_entry = None, False, False
            entry = None if self.limit is None or layer.weight is None else self._store.one(layer, _KEY)
            if entry is None or entry.numel() != 3:
                continue
            flag, known, limit = entry.tolist()
            layer.has_share_entry = True
            if flag != _UNDECIDED:
                # A load before the preconditioner was constructed has cast it to the dtype of the weight.
                same = torch.tensor(self.limit, dtype=torch.float64).to(entry.dtype).item() == limit
                layer.share, layer.dear = known, flag == _LEFT if same else known > (self.limit or math.inf)


def _rows_seen(layer: Layer) -> int:
    """Rows of this step, on the host where eager mode has counted them."""
    assert layer.capture is not None
    source = layer.capture.source or layer.capture
    if not source.fixed:
        return source.offered
    assert source.state is not None
    return int(source.state[source.index, SEEN])


def _size(step: LayerStep, rows: int, held_by: int, computed_by: int) -> LayerSize:
    layer, module, weight = step.layer, step.layer.module(), step.weight
    assert module is not None
    width = step.grad.shape[1]
    outputs_and_taps = step.grad.numel() // max(width, 1)
    if is_dtensor(weight) and held_by > 1:  # as of the rank that has most
        matrices = weight.numel() // (3 if layer.kind.packed else 1)
        outputs_and_taps = matrices * layer.kind.num_groups(module) // max(layer.kind.all_units(module), 1)
    is_convolution = layer.kind.groups is not None or hasattr(module, "stride")
    return LayerSize(
        rows=rows,
        output_rows=_output_rows(module, layer, rows),
        width=width,
        units=step.units,
        groups=step.convolution_groups,
        taps=max(math.prod(step.grad.shape[2:]), 1),
        held=-(-outputs_and_taps // held_by),
        computed=-(-outputs_and_taps // computed_by),
        every_tap=is_convolution,
        itemsize=weight.element_size(),
    )


def _output_rows(module: nn.Module, layer: Layer, rows: int) -> int:
    """Of a convolution with a stride; padding does not enter."""
    stride = getattr(module, "stride", 1)
    if layer.kind.transposes or not isinstance(stride, int | tuple):
        return rows
    dims = -layer.kind.unit_dim - 1
    steps = stride**dims if isinstance(stride, int) else math.prod(stride)
    return max(rows // max(steps, 1), 1)
