"""A weight that may be corrected, and what is known of it from step to step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .capture import Capture
from .capture_states import USED
from .layer_types import LayerType

Slice = tuple[Tensor, int, int]  # a tensor that one launch wrote for all layers; first and last entry of this layer


@dataclass(eq=False, slots=True)
class Layer:
    """One weight of a module, with two or more dimensions, corrected or not."""

    name: str
    module: weakref.ref[nn.Module]
    kind: LayerType
    index: int  # position among all layers; third argument of the random division
    reason: str | None  # why it is never corrected, or None
    joins_bias: bool = False
    only_taken: bool = False  # its rows are handed over by `consistency_ops.capture`; the module's inputs are others
    tied: str = ""  # names of the other modules that own the same weight
    capture: Capture | None = None  # None: its gradient is left as it is
    info_slice: Slice | None = None  # info of the last step's launch
    damping_slice: Slice | None = None  # damping that the last inversion used
    unfit_gradient: bool = False  # the last gradient could not be corrected in place
    lost_rows: bool = False  # in the last step; see Capture.lost
    inverse_units: int | None = None  # units of the stored covariance and inverse, bias included
    division_id: int = field(init=False)  # layer id whose division the last inverse was made with
    pending: dict[str, Tensor] = field(default_factory=dict)  # what to store after the optimizer's step
    share: float | None = None  # correction over forward and backward pass, by count; None: undecided (shares.py)
    dear: bool = False  # that is more than max_share: it is left alone
    has_share_entry: bool = False  # the store has one

    def __post_init__(self) -> None:
        self.division_id = self.index

    @property
    def module_name(self) -> str:
        part = self.kind.part
        return self.name.removesuffix(part).removesuffix(".") if part else self.name

    @property
    def weight(self) -> Parameter | None:
        """The parameter, or None if the module or the parameter is gone."""
        module = self.module()
        return None if module is None else module._parameters.get(self.kind.weight)

    @property
    def units(self) -> int:
        """Units of one convolution group, the bias included. The weight must be initialised."""
        module = self.module()
        assert module is not None
        capture = self.capture
        units = self.kind.units(module) if capture is None or capture.state is None else capture.width
        return units // self.kind.num_groups(module) + self.joins_bias

    @property
    def num_groups(self) -> int:
        """Groups of a convolution; 1 for every other layer, and for one that is gone."""
        module = self.module()
        return 1 if module is None else self.kind.num_groups(module)

    @property
    def info(self) -> Tensor | None:
        """``info`` of the last step, one entry per chunk; None if nothing was launched for this layer."""
        return _entries(self.info_slice)

    @property
    def damping(self) -> Tensor | None:
        """Damping that the last inversion used, one entry per chunk."""
        return _entries(self.damping_slice)

    def last_state(self) -> list[int] | None:
        """The capture state at the end of the last step that captured. Waits for the device."""
        capture = self.capture
        if capture is None or capture.state is None:
            return None
        return capture.states.last_step(capture.state.device, capture.last_source)

    def captured_rows(self) -> int:
        """Rows that the last step captured. Waits for the device."""
        state = self.last_state()
        return 0 if state is None else state[USED]


def _entries(at: Slice | None) -> Tensor | None:
    return None if at is None else at[0][at[1] : at[2]]
