"""Row capture: the hooks that put the input rows of a layer into a buffer, ready for the optimizer's step.

Everything that changes from step to step is in tensors, so a compiled model sees constant Python state and is compiled
once. The columns of the state tensor are the fields of ``CaptureState`` in ``csrc/include/consistency_ops/capture.h``.
"""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from .._ops import ops
from ..ops.registration import NAMESPACE, register_fake
from .capture_states import MARK, NEW, STRIDE, USED, CaptureStates, empty
from .dtensors import Group, as_plain, is_dtensor, local_input
from .layer_types import LayerType
from .pickles import nothing, reduce_to_nothing

_CHECKPOINT = torch.utils.checkpoint.__file__
_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_VAIN = 3  # gradients made anew within a step, all for nothing, before their rows are kept no longer

_capture_rows: Any = ops.capture_rows_.default
_capture_mark = ops.capture_mark_.default

# A compiled graph cannot tell while it is traced whether it will run in a backward pass: this one asks when it runs.
_library: Any = torch.library.Library(  # type: ignore[no-untyped-call]  # torch does not annotate it
    NAMESPACE, "FRAGMENT"
)
_library.define(
    "capture_traced_rows_(Tensor(a!) rows, Tensor(b!) state, Tensor x, SymInt index, SymInt unit_dim, SymInt seed) "
    "-> ()"
)


def _capture_traced(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int) -> None:
    _capture_rows(rows, state, x, index, unit_dim, seed, torch._C._current_graph_task_id() != -1)


_library.impl("capture_traced_rows_", _capture_traced, "CompositeExplicitAutograd")
_capture_traced_rows = ops.capture_traced_rows_.default

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
        self._module = weakref.ref(module)
        self._plain = False  # called outside of a backward pass, in this step
        self._marked_calls = 0  # `calls` at the last backward pass of this step
        self._restarted = 0  # `calls` when a backward pass began a new gradient
        self._before_handle: RemovableHandle | None = None
        self._adds = False  # the running backward pass adds to the gradient that the last one made
        self._kept: list[tuple[Tensor, Tensor]] = []  # rows of gradients that were taken away in this step
        self._vain = 0  # steps in a row in which such rows were not needed
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
            self.rows = empty(self.max_rows, width, dtype, weight.device)
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
        if self._before_handle is not None:
            self._before_handle.remove()
            self._before_handle = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight = module._parameters.get(self.weight_name)
        if not (module.training and torch.is_grad_enabled() and isinstance(weight, Parameter) and weight.requires_grad):
            if weight is None and module.training and module.__dict__.get("_is_replica"):
                self._capture_replica(self._input(args, kwargs))
            return
        x = self._input(args, kwargs)
        if is_dtensor(x):
            x, same_rows = local_input(x, self.unit_dim)
            if same_rows is not None:
                self.same_rows = same_rows
        elif self.same_rows is None and not torch.compiler.is_compiling():
            self.same_rows = frozenset()
        if type(x) not in (Tensor, Parameter):
            x = as_plain(x)
        if x is None or x.layout is not torch.strided:
            return
        if torch.compiler.is_compiling():
            if self._takes(x) and not torch.compiler.is_exporting():
                mask = self.states.mask
                x = x if mask is None else mask.select(x, self.unit_dim)
                _capture_traced_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed)
            return
        if self.states.stopped or torch._C._functorch.peek_interpreter_stack() is not None or torch._C._is_tracing():
            return
        if self.rows is None or self.rows.device != x.device or self.rows.dtype is not x.dtype is torch.float64:
            self.follow(module, weight)
        self._make_room(module, weight, x)
        if self._takes(x) and not self._shares(x):
            in_backward = torch._C._current_graph_task_id() != -1
            if not in_backward:
                self._plain = True
            elif self._plain and not _is_recomputed():
                in_backward = False  # a part under reentrant checkpointing, whose first pass nobody saw
            mask = self.states.mask
            x = x if mask is None else mask.select(x, self.unit_dim)
            _capture_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed, in_backward)

    def take(self, x: Tensor) -> None:
        """Capture an input that the module itself is not given, just before its weight is used."""
        module, rows = self._module(), self.rows
        if module is not None:
            if x.dtype is torch.float64 and rows is not None and rows.dtype is not x.dtype:
                x = x.to(rows.dtype)  # the weight was cast, too
            self(module, (None,) * self.kind.position + (x,), {})

    @property
    def weight(self) -> Tensor | None:
        """The parameter that its module has now."""
        module = self._module()
        return None if module is None else module._parameters.get(self.weight_name)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units that an input may have: of this rank, and of all; empty while there is no buffer."""
        return () if self.rows is None else (self._units, self._all_units)

    def unhook(self) -> None:
        """The inputs of the module are not those of the weight: only :meth:`take` captures."""
        self._handle.remove()

    def _capture_replica(self, x: Any) -> None:
        """An input of a copy that ``nn.DataParallel`` made for one pass; its weight is no parameter."""
        x, rows = as_plain(x), self.rows
        if x is None or rows is None or not torch.is_grad_enabled() or self.states.stopped:
            return
        mask = self.states.mask
        x = x.detach().to(rows.device) if mask is None else mask.select(x.detach(), self.unit_dim).to(rows.device)
        if self._takes(x):
            _capture_rows(rows, self.state, x, self.index, self.unit_dim, self.seed, False)

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
                self.rows = empty(self.max_rows, self._width, rows.dtype, rows.device)
            elif self._follows(weight):  # fully_shard puts another one in its place during the forward pass
                self.follow(module, weight)

    def expect_all_units(self) -> None:
        """As :meth:`_make_room` for a compiled model, which cannot: if no call of the first step fitted. Waits once."""
        if self._width is None and self.rows is not None:
            self._width = self.rows.shape[1]
            if self.count is not None and int(self.count) == 0:
                self._width, self.same_rows = self._all_units, frozenset()
                self.rows = empty(self.max_rows, self._width, self.rows.dtype, self.rows.device)

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
        states, grad = self.states, weight.grad
        if states.stopped:
            return
        if grad is None:  # another hook has taken it
            states.taken += 1
            states.wait(NEW)
            return
        last = self._grad
        restart = last is not None and last() is not grad
        if torch.is_grad_enabled():  # create_graph=True: a sum is a new tensor
            restart = not self._is_sum(weight, grad) and restart
        states.wait(NEW if restart or last is None else 1)
        self._grad = weakref.ref(grad)
        source = self.source or self
        self._marked_calls, source._marked_calls = self.calls, source.calls
        if restart and source.calls and source._restarted == source.calls:
            restart = False  # another layer that shares these rows was first
        if restart:
            source._restarted = source.calls
            source._keep_rows()
        _capture_mark(source.rows, source.state, source.index, restart)

    def _is_sum(self, weight: Tensor, grad: Tensor) -> bool:
        """Whether a backward pass with ``create_graph=True`` has added to the gradient that the last one made."""
        if self._before_handle is not None:
            return self._adds
        register: Any = weight.register_hook
        self._before_handle = register(self._before_grad)  # from the next pass on it is known
        function = grad.grad_fn
        return function is not None and bool(function.next_functions) and function.next_functions[0][0] is None

    def _before_grad(self, grad: Tensor) -> None:
        module = self._module()
        weight = None if module is None else module._parameters.get(self.weight_name)
        old = None if weight is None else weight.grad
        self._adds = old is not None and self._grad is not None and self._grad() is old

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

    def settle(self, grad: Tensor | None, maker: Capture) -> None:
        """Decide about the rows of gradients that were taken away within this step, before it uses the rows.

        Args:
            grad: of the weight of ``maker``, as the step finds it. If no backward pass made it, then it was added up by
                hand from those that were taken away, and their rows count.
            maker: the capture of that weight, which has the same rows.
        """
        if not (self._kept or self._restarted):
            return
        made = grad is None or maker._grad is None or maker._grad() is grad
        if not made and self._restarted:
            self._vain = 0
        if not self._kept:
            return
        kept, self._kept = self._kept, []
        if made:
            self._vain += 1
            return
        assert self.state is not None and self.rows is not None
        state, buffer = self.state[self.index], self.rows
        rows = torch.cat([*(part[: int(count)] for part, count in kept), buffer[: int(state[USED])]])
        if len(rows) > len(buffer):
            thinned = -(-len(rows) // len(buffer))
            rows = rows[torch.arange(len(buffer), device=rows.device) * len(rows) // len(buffer)]
            state[STRIDE] *= thinned
        buffer[: len(rows)] = rows
        state[USED] = state[MARK] = len(rows)

    def drop_unmarked(self) -> None:
        """A forward pass has failed: forget its calls. The rows are in :meth:`CaptureStates.drop_unmarked`."""
        self.calls = self._marked_calls
        if self.calls == 0:
            self.source, self._lost, self._plain = None, False, False

    def begin_step(self, finished: bool = False) -> None:
        if finished:
            self.last_source = self.index if self.source is None else self.source.index
        self.calls, self.source, self._lost = 0, None, False
        self._grad = None
        self._plain, self._marked_calls, self._restarted = False, 0, 0
        if self._kept:
            self._kept = []

    def take_state(self) -> None:
        """After the states have grown."""
        if self.state is not None:
            self.state = self.states.on(self.state.device)
            self.count = self.state[self.index, USED : USED + 1]

    def remove(self) -> None:
        self._handle.remove()
        self._mark_nothing()

    # A copy of the model must not write into the original's buffers, nor carry a copy of them.
    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_to_nothing()


def _is_recomputed() -> bool:
    """Whether non-reentrant checkpointing runs this call again in a backward pass: it was captured already.

    Under reentrant checkpointing the first pass has no gradients, and this call is the only one that is seen.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _CHECKPOINT:
            if code.co_name == "unpack_hook":
                return True
            if code.co_name == "backward":
                return False
        frame = frame.f_back
    return False
