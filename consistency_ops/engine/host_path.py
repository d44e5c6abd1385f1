"""The fast ways of row capture and of a step in C++ (``csrc/torch_abi``), where it was built for the torch that runs.

They do the plain case on the CPU: parameters, dense tensors, one launch for all layers, matrices that are kept from
step to step only where they are applied, and nobody who watches the operators (modes, transforms, the profiler). They
read and write the attributes of :class:`Capture` and :class:`Layer` where they lie and leave everything else to the
Python code, which is the definition and computes the same bits. The forward hook needs nothing here: a call of a
:class:`Capture` goes to C++ first, except when Dynamo traces it.
"""

from __future__ import annotations

import ctypes

from ..ops import MAX_CHUNK
from ..ops.library import library, torch_abi
from .capture import Capture
from .capture_states import CaptureStates
from .correction import Correction
from .layer import Layer
from .layer_types import InProjection, LayerType, TransposedConvolution
from .ownership import Ownership


def _bind() -> bool:
    """Whether there is such code, and of the sources that the library was built from."""
    if torch_abi is None or not hasattr(library, "co_host_calls"):
        return False
    library.co_host_calls.restype = ctypes.c_void_p
    classes = Capture, CaptureStates, Layer, LayerType, TransposedConvolution, InProjection
    return bool(torch_abi.bind_host_path(library.co_host_calls(), *classes))


is_bound: bool = _bind()


def correct(correction: Correction, layers: list[Layer], ownership: Ownership) -> bool:
    """Correct the gradients of these layers.

    Returns:
        False if that is left to :meth:`Correction.run`, with nothing changed.
    """
    options = correction.options
    chunk = options.chunk
    if not is_bound or type(correction) is not Correction or torch_abi is None:
        return False
    if chunk is None or chunk > MAX_CHUNK:
        return False
    state = None
    if correction.stores_matrices:
        state = correction.state_between_refreshes()
        if state is None:
            return False
    plan = torch_abi.plan_step(layers, ownership.ids, chunk, options.group or 0, state)
    if plan is None:
        return False
    if state is not None:
        return bool(torch_abi.run_stored(plan, chunk, options.seed, correction.division_step))
    damping = correction.damping()
    trace, seed = options.scaling == "trace", options.seed
    return bool(torch_abi.run_step(plan, damping, trace, chunk, options.max_rows, seed, correction.step))


def begin_step(layers: list[Layer], finished: bool) -> None:
    """:meth:`Capture.begin_step` of all of them."""
    if is_bound and torch_abi is not None and torch_abi.begin_step(layers, finished):
        return
    for layer in layers:
        if layer.capture is not None:
            layer.capture.begin_step(finished)
