"""The operators of row capture, and what torch must know of them to trace and to differentiate around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import ops
from ..ops.registration import NAMESPACE, register_fake

capture_rows: Any = ops.capture_rows_.default
capture_mark: Any = ops.capture_mark_.default

# A compiled graph cannot tell while it is traced whether it will run in a backward pass: this one asks when it runs.
_library: Any = torch.library.Library(  # type: ignore[no-untyped-call]  # torch does not annotate it
    NAMESPACE, "FRAGMENT"
)
_library.define(
    "capture_traced_rows_(Tensor(a!) rows, Tensor(b!) state, Tensor x, SymInt index, SymInt unit_dim, SymInt seed) "
    "-> ()"
)


def _capture_traced(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int) -> None:
    capture_rows(rows, state, x, index, unit_dim, seed, torch._C._current_graph_task_id() != -1)


_library.impl("capture_traced_rows_", _capture_traced, "CompositeExplicitAutograd")
capture_traced_rows: Any = ops.capture_traced_rows_.default


def _without_result(*_: object) -> None:
    """What the operators give to who traces them: they write their buffers."""


# They return nothing, so there is nothing to differentiate: autograd is skipped.
for _name in ("capture_rows_", "capture_mark_", "capture_traced_rows_"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    register_fake(_name)(_without_result)
