"""Row capture: the hooks that put the input rows of a layer into a buffer, ready for the optimizer's step.

Everything that changes from step to step is in tensors, so a compiled model sees constant Python state and is compiled
once. The columns of the state tensor are the fields of ``CaptureState`` in ``csrc/include/consistency_ops/capture.h``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ..ops.registration import register_fake
from .dtensors import Group, is_dtensor, local_input
from .layer_types import LayerType

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
USED, SEEN, FORWARD, STEP, PAUSED, STATE_SIZE = 0, 1, 6, 7, 8, 10

_capture_rows: Any = torch.ops.consistency_ops.capture_rows_.default
_capture_mark = torch.ops.consistency_ops.capture_mark_.default

# A compiled graph cannot tell while it is traced whether it will run in a backward pass: this one asks when it runs.
_library: Any = torch.library.Library(  # type: ignore[no-untyped-call]  # torch does not annotate it
    "consistency_ops", "FRAGMENT"
)
_library.define(
    "capture_traced_rows_(Tensor(a!) rows, Tensor(b!) state, Tensor x, SymInt index, SymInt unit_dim, SymInt seed) "
    "-> ()"
)


def _capture_traced(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int) -> None:
    _capture_rows(rows, state, x, index, unit_dim, seed, torch._C._current_graph_task_id() != -1)


_library.impl("capture_traced_rows_", _capture_traced, "CompositeExplicitAutograd")
_capture_traced_rows = torch.ops.consistency_ops.capture_traced_rows_.default

# The operators write their buffers and return nothing, so there is nothing to differentiate: autograd is skipped.
for _name in ("capture_rows_", "capture_mark_", "capture_traced_rows_"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@register_fake("capture_rows_")
def _(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int, in_backward: bool = False) -> None:
    return None


@register_fake("capture_traced_rows_")
def _(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int) -> None:
    return None


@register_fake("capture_mark_")
def _(rows: Tensor, state: Tensor, index: int, restart: bool) -> None:
    return None


def _no_capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a copied or unpickled model carries in place of a capture hook."""


def _unpickle() -> Callable[..., None]:
    return _no_capture


class CaptureStates:
    """The bookkeeping of all layers: one int64 tensor (layers, STATE_SIZE) a device, and what the last step left."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.step: int = 0
        self.paused: bool = False
        self.new_weights: bool = False  # a layer has another weight than before: it may be tied
        # Inputs of this step by id: who captured it in which of its calls, and the version it had.
        self.inputs: dict[int, tuple[weakref.ref[Tensor], int, Capture, int]] = {}
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}  # with the views that reset needs

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            state = torch.zeros(self.layers, STATE_SIZE, dtype=torch.int64, device=device)
            views = state[:, : FORWARD + 1], state[:, STEP], state[:, PAUSED]
            state[:, STEP], state[:, PAUSED] = self.step, int(self.paused)
            self._tensors[device] = state, torch.zeros_like(state), *views
        return self._tensors[device][0]

    def last_count(self, device: torch.device, index: int) -> Tensor:
        """Rows in the buffer of a layer: of this step, or if there are none yet, of the last one that captured."""
        state, last = self._tensors[device][:2]
        count = state[index, USED : USED + 1]
        return torch.where(count > 0, count, last[index, USED : USED + 1])

    def last_step(self, device: torch.device, index: int) -> list[int]:
        """The state of a layer at the end of the last step that captured; waits for the device."""
        return self._tensors[device][1][index].tolist()

    def reset(self, step: int, paused: bool, finished: bool) -> None:
        """Forget all rows and begin ``step``; ``finished``: the rows forgotten are those of a finished step."""
        pauses = paused != self.paused
        self.step, self.paused = step, paused
        self.inputs.clear()
        for state, last, pattern, steps, pausing in self._tensors.values():
            if finished:
                last.copy_(state)
            pattern.zero_()
            steps.fill_(step)
            if pauses or not finished:
                pausing.fill_(int(paused))


class Capture:
    """The rows of one layer: a forward pre-hook, and a hook on the weight that notices abandoned gradients.

    A module that is called several times in a step, or in several micro-batches, pools its rows. With activation
    checkpointing each call counts once: the pass without gradients (reentrant) is passed over, and so is a
    recomputation in the backward pass of what was already captured (non-reentrant). Nothing is captured in evaluation
    mode, without gradients, for a frozen weight, under ``torch.func`` transforms, or from sparse inputs and tensor
    subclasses.

    Layers that are called one after the other with one tensor (query, key and value projections) share its rows: the
    first captures them, and ``source`` of the others is the first. In eager mode only.
    """

    def __init__(
        self, module: nn.Module, kind: LayerType, states: CaptureStates, index: int, max_rows: int, seed: int
    ) -> None:
        self.weight_name: str = kind.weight
        self.unit_dim: int = kind.unit_dim
        self.kind = kind
        self.states = states
        self.index = index
        self.max_rows = max_rows
        self.seed = seed
        self.rows: Tensor | None = None
        self.state: Tensor | None = None
        self.count: Tensor | None = None  # rows in the buffer: int64, shape (1,), on the device
        self.same_rows: frozenset[Group] | None = None  # eager only: see dtensors.local_input; None: no call yet
        self._units = self._all_units = 0  # of this rank and of all, where the weight is sharded over them
        self._width: int | None = None  # of the inputs, eager
        self.calls: int = 0  # eager, in this step
        self.source: Capture | None = None  # whose rows are those of this layer, too
        self.last_source: int = index  # index of the layer that captured the rows of the last finished step
        self._alone = False  # shared rows once, and then saw other inputs than the layer that captured them
        self._lost = False  # rows of this step are missing for that reason
        self._weight: int | None = None  # id of the weight that is followed; weak references forbid to swap tensors
        self._place: tuple[torch.device, torch.dtype, torch.Size] | None = None  # of that weight, as the buffer fits it
        self._grad: weakref.ref[Tensor] | None = None  # of the weight, at the last backward pass of this step
        self._mark_handle: RemovableHandle | None = None
        weight = kind.parameter(module)
        if not torch.nn.parameter.is_lazy(weight):
            self.follow(module, weight)
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def follow(self, module: nn.Module, weight: Tensor) -> None:
        """Fit buffer and mark hook to this weight, which may have been moved, cast, reshaped, replaced or unfrozen."""
        place = weight.device, weight.dtype, weight.shape
        if not self._follows(weight):
            self.states.new_weights = True
            self._fit(module, weight)
        elif self._place != place or (self.rows is None and weight.requires_grad):
            self._fit(module, weight)
        else:
            return
        self._weight, self._place = id(weight), place

    def _follows(self, weight: Tensor) -> bool:
        """Another weight may have the id of one that is gone, but not its hook."""
        if self._weight != id(weight):
            return False
        handle = self._mark_handle
        return handle is None or handle.id in (weight._post_accumulate_grad_hooks or ())

    def _fit(self, module: nn.Module, weight: Tensor) -> None:
        if not weight.requires_grad:  # a frozen layer needs no buffer
            self._mark_nothing()
            self.rows = self.state = self.count = None
            return
        # Half precision is widened while it is copied, so that one dtype is read whatever autocast made of the input.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._units, self._all_units, rows = self.kind.units(module), self.kind.all_units(module), self.rows
        width = self._width if self._width in (self._units, self._all_units) else self._units
        if rows is None or rows.device != weight.device or rows.dtype != dtype or rows.shape[1] != width:
            self.rows = torch.empty(self.max_rows, width, dtype=dtype, device=weight.device)
            self.state = self.states.on(weight.device)
            self.count = self.state[self.index, USED : USED + 1]
            self.count.zero_()
        self._mark_nothing()
        self._mark_handle = weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # torch's gap
            self._mark
        )
        # Assigned anew, because a weight that was swapped for another tensor has left its hooks with the old one.
        weight._post_accumulate_grad_hooks = weight._post_accumulate_grad_hooks

    def _mark_nothing(self) -> None:
        if self._mark_handle is not None:
            self._mark_handle.remove()
            self._mark_handle = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight = module._parameters.get(self.weight_name)
        if not (module.training and torch.is_grad_enabled() and isinstance(weight, Parameter) and weight.requires_grad):
            return
        x = self._input(args, kwargs)
        if is_dtensor(x):
            x, same_rows = local_input(x, self.unit_dim)
            if same_rows is not None:
                self.same_rows = same_rows
        elif self.same_rows is None and not torch.compiler.is_compiling():
            self.same_rows = frozenset()
        if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided:
            return
        if torch.compiler.is_compiling():
            if self._takes(x):
                _capture_traced_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed)
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if self.rows is None or self.rows.device != x.device or self.rows.dtype is not x.dtype is torch.float64:
            self.follow(module, weight)
        self._make_room(module, weight, x)
        if self._takes(x) and not self._shares(x):
            in_backward = torch._C._current_graph_task_id() != -1
            _capture_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed, in_backward)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self.kind
        if len(args) > kind.position:
            return args[kind.position]
        return next(iter(kwargs.values()), None) if kind.keyword is None else kwargs.get(kind.keyword)

    def _make_room(self, module: nn.Module, weight: Tensor, x: Tensor) -> None:
        """For all units, where it turns out that they are sharded in the weight and not in the input."""
        dim, rows = self.unit_dim, self.rows
        if x.dim() < -dim or (self.same_rows and x.shape[dim] != self._units):
            return
        self._width = x.shape[dim]
        if rows is not None and self._width != rows.shape[1]:
            if self._width in (self._units, self._all_units):
                self.rows = rows.new_empty(self.max_rows, self._width)
            elif self._follows(weight):  # fully_shard puts another one in its place during the forward pass
                self.follow(module, weight)

    def expect_all_units(self) -> None:
        """As :meth:`_make_room` for a compiled model, which cannot: if no call of the first step fitted. Waits once."""
        if self._width is None and self.rows is not None:
            self._width = self.rows.shape[1]
            if self.count is not None and int(self.count) == 0:
                self._width, self.same_rows = self._all_units, frozenset()
                self.rows = self.rows.new_empty(self.max_rows, self._width)

    def _takes(self, x: Tensor) -> bool:
        """Where this is false, the layer itself will say what is wrong with its input."""
        rows = self.rows
        if rows is None or rows.device != x.device or x.dim() < -self.unit_dim or x.dtype not in _FLOATS:
            return False
        return x.shape[self.unit_dim] == rows.shape[1] and (x.dtype is not torch.float64 or rows.dtype is x.dtype)

    def _shares(self, x: Tensor) -> bool:
        """Whether another layer has captured this tensor, and nothing in this step that this layer did not see."""
        self.calls += 1
        inputs = self.states.inputs
        version = 0 if x.is_inference() else x._version
        seen = inputs.get(id(x))
        if seen is not None and seen[0]() is x and seen[1] == version and not self._alone:
            source, call = seen[2:]
            assert source.rows is not None and self.rows is not None
            fits = source.unit_dim == self.unit_dim and source.rows.dtype == self.rows.dtype and source is not self
            if fits and source.calls == call == self.calls and (call == 1 or self.source is source):
                self.source = source
                return True
        if self.source is not None:
            self._part(self.source)
        if len(inputs) > 2 * self.states.layers:  # many calls in one step: most of their tensors are gone
            inputs.clear()
        inputs[id(x)] = weakref.ref(x), version, self, self.calls
        return False

    def _part(self, source: Capture) -> None:
        """Go on with a copy of the rows that were shared so far; none if the source has since captured others."""
        self._alone, self.source = True, None
        if source.calls == self.calls - 1:
            assert self.rows is not None and self.state is not None
            assert source.rows is not None and source.state is not None
            self.rows.copy_(source.rows)
            self.state[self.index].copy_(source.state[source.index])
        else:
            self._lost = True

    @property
    def lost(self) -> bool:
        """Whether rows of this step are not at hand, because another layer went on capturing after this one shared."""
        if self.source is not None and self.source.calls != self.calls:
            self._alone = self._lost = True
        return self._lost

    def _mark(self, weight: Tensor) -> None:
        if (grad := weight.grad) is None:
            return  # another hook has taken it
        restart = self._grad is not None and self._grad() is not grad
        self._grad = weakref.ref(grad)
        _capture_mark(self.rows, self.state, self.index, restart)

    def begin_step(self, finished: bool = False) -> None:
        if finished:
            self.last_source = self.index if self.source is None else self.source.index
        self.calls, self.source, self._lost = 0, None, False
        self._grad = None

    def remove(self) -> None:
        self._handle.remove()
        self._mark_nothing()

    # A copy of the model must not write into the original's buffers, nor carry a copy of them.
    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _no_capture

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, ()
