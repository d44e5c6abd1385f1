"""A weight that may be corrected, and what is known of it from step to step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .capture import USED, Capture
from .layer_types import LayerType

if TYPE_CHECKING:
    from ..preconditioner import Preconditioner


@dataclass(eq=False)
class Layer:
    """A module with a weight of two or more dimensions, covered or not."""

    name: str
    module: weakref.ref[nn.Module]
    kind: LayerType | None
    index: int  # among all layers; third argument of the random division
    reason: str | None  # why it is never corrected, or None
    joins_bias: bool = False
    tied: str = ""  # modules that own the same weight
    capture: Capture | None = None
    info_at: tuple[Tensor, int, int] | None = None  # of the last step, and the entries that are this layer's
    damping_at: tuple[Tensor, int, int] | None = None  # of the last inversion
    unfit_gradient: bool = False
    lost_rows: bool = False  # in the last step: see Capture.lost
    inverted_units: int | None = None  # of the stored matrices, or at the last inversion; the bias included
    divided_as: int = field(init=False)  # layer number of the division of the last inversion
    pending: dict[str, Any] = field(default_factory=dict)  # entries to store after the optimizer's step

    def __post_init__(self) -> None:
        self.divided_as = self.index

    @property
    def module_name(self) -> str:
        part = "" if self.kind is None else self.kind.part
        return self.name.removesuffix(part).removesuffix(".") if part else self.name

    @property
    def info(self) -> Tensor | None:
        """Of the last step, one entry a chunk; None: nothing was launched."""
        return _entries(self.info_at)

    @property
    def damping(self) -> Tensor | None:
        """Used by the last inversion, one entry a chunk."""
        return _entries(self.damping_at)

    @property
    def units(self) -> int:
        """Of one convolution group, the bias included; the weight must be initialised."""
        module, rows = self.module(), None if self.capture is None else self.capture.rows
        units = self.kind.units(module) if rows is None else rows.shape[1]
        return units // self.kind.groups(module) + self.joins_bias

    @property
    def weight(self) -> Parameter | None:
        module = self.module()
        return None if module is None or self.kind is None else module._parameters.get(self.kind.weight)


def _entries(at: tuple[Tensor, int, int] | None) -> Tensor | None:
    return None if at is None else at[0][at[1] : at[2]]


def last_state(layer: Layer) -> list[int] | None:
    """Of the last step that captured; waits for the device."""
    capture = layer.capture
    return None if capture.rows is None else capture.states.last_step(capture.rows.device, capture.last_source)


def captured_rows(layer: Layer) -> int:
    state = last_state(layer)
    return 0 if state is None else state[USED]


def was_corrected(pre: Preconditioner, layer: Layer) -> bool:
    """In the last step. With a stored inverse no rows are needed."""
    return layer.info is not None and (pre.every > 1 or pre.decay > 0 or captured_rows(layer) > 0)
