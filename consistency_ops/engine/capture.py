"""Row capture: the hooks that put the input rows of a layer into a buffer, ready for the optimizer's step.

Everything that changes from step to step is in tensors, so a compiled model sees constant Python state and is compiled
once. The columns of the state tensor are the fields of ``CaptureState`` in ``csrc/include/consistency_ops/capture.h``.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from .._hooks import Unpickled, hide
from ..reference import sample_rows
from .capture_operators import capture_mark, capture_rows, capture_traced_rows
from .capture_states import MARK, NEW, PAUSED, STRIDE, USED, CaptureStates
from .dtensors import Group, as_plain, is_dtensor, local_input
from .layer_types import LayerType
from .recomputation import is_recomputed
from .row_buffer import ROOMY, RowBuffer

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_no_interpreter: Any = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func transforms
_is_tracing: Any = torch._C._is_tracing
_graph_task: Any = torch._C._current_graph_task_id  # -1 outside of backward passes
_turn = threading.Lock()  # of the replicas of nn.DataParallel

_by_key: weakref.WeakValueDictionary[int, Capture] = weakref.WeakValueDictionary()
_keys = itertools.count()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not annotate it
def _fix_buffer(key: int, dtype: torch.dtype) -> bool:
    """Called while a model is traced, and not by the compiled model: what is traced reads the buffer afterwards."""
    _by_key[key].fix(dtype)
    return True


class Capture(RowBuffer, Unpickled):
    """The rows of one layer: a forward pre-hook, and a hook on the weight that notices abandoned gradients.

    A module that is called several times in a step, or in several micro-batches, pools its rows. With activation
    checkpointing each call counts once: the pass without gradients (reentrant) is passed over, and so is a
    recomputation in the backward pass of what was already captured (non-reentrant). Nothing is captured in evaluation
    mode, without gradients, for a frozen weight, under ``torch.func`` transforms, or from sparse inputs and tensor
    subclasses.

    Layers that are called one after the other with one tensor (query, key and value projections) share its rows: the
    first captures them, and ``source`` of the others is the first. In eager mode only.
    """

    # fmt: off
    __slots__ = (
        "_adds", "_all_units", "_alone", "_before_handle", "_grad", "_handle", "_key", "_lost",
        "_mark_handle", "_marked_calls", "_module", "_place", "_plain", "_position", "_removed", "_restarted",
        "_units", "_watches", "_weight", "_width", "calls", "kind", "last_source", "same_rows", "source", "unit_dim",
        "waits", "weight_name",
    )
    # fmt: on

    width: int
    offered: int
    fixed: bool
    takes_joined_calls = True  # nn/roa_steps.py may give it the inputs of many calls at once

    def __init__(
        self,
        module: nn.Module,
        kind: LayerType,
        states: CaptureStates,
        index: int,
        max_rows: int,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(states, index, max_rows, seed, dtype)
        self.weight_name: str = kind.weight
        self.unit_dim: int = kind.unit_dim
        self.kind: LayerType = kind
        self.waits: bool = False  # captures although others pause: there were no rows when they did
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
        self._removed = False
        self._watches: list[RemovableHandle] = []  # more hooks, which end with it
        self._plain = False  # called outside of a backward pass, in this step
        self._marked_calls = 0  # `calls` at the last backward pass of this step
        self._restarted = 0  # `calls` when a backward pass began a new gradient
        self._before_handle: RemovableHandle | None = None
        self._adds = False  # the running backward pass adds to the gradient that the last one made
        self._key = next(_keys)
        _by_key[self._key] = self
        self._position = kind.position
        weight = kind.parameter(module)
        if not torch.nn.parameter.is_lazy(weight):
            self.follow(module, weight)
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)
        hide(module)  # a copy of the model must not write into the original's buffers, nor carry a copy of them

    def follow(self, module: nn.Module, weight: Tensor) -> None:
        """Fit buffer and mark hook to this weight, which may have been moved, cast, reshaped, replaced or unfrozen."""
        place, handle = (weight.device, weight.dtype, weight.shape), self._mark_handle
        if self._weight != id(weight) or not (
            handle is None or handle.id in (weight._post_accumulate_grad_hooks or ())
        ):
            self.states.new_weights = True
            self._fit(module, weight)
        elif self._place != place or (self.state is None and weight.requires_grad):
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
            self.state = self.count = None
            self._release()
            return
        device, double = weight.device, weight.dtype == torch.float64
        self._units, self._all_units = self.kind.units(module), self.kind.all_units(module)
        width = self._width if self._width in (self._units, self._all_units) else self._units
        if (self.state is None, self._device, self._double, self.width) != (False, device, double, width):
            self._release()
            self._device, self._double, self.width = device, double, width
            self.state = self.states.on(device)
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

    @property
    def idle(self) -> bool:
        """Whether it is known, without a look at the device, that this step has no rows."""
        source = self.source or self
        return not self.fixed and not source.fixed and source.offered == 0

    # The hooks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        weight = module._parameters.get(self.weight_name)
        if not (
            module.training
            and torch.is_grad_enabled()
            and (type(weight) is Parameter or isinstance(weight, Parameter))
            and weight.requires_grad
        ):
            if weight is None and module.training and module.__dict__.get("_is_replica"):
                self._capture_replica(self._input(args, kwargs))
            return
        x = args[self._position] if len(args) > self._position else self._input(args, kwargs)
        if type(x) is not Tensor:
            x = self._plain_input(x)
            if x is None:
                return
        elif self.same_rows is None and not torch.compiler.is_compiling():
            self.same_rows = frozenset()
        if x.layout is not torch.strided:
            return
        if torch.compiler.is_compiling():
            self._trace(x)
            return
        states, dim, dtype = self.states, self.unit_dim, x.dtype
        if states.stopped or (states.paused and not self.waits) or _no_interpreter() is not None or _is_tracing():
            return
        if self.state is None or self._device != x.device or (dtype is torch.float64 and not self._double):
            self.follow(module, weight)
        if x.dim() < -dim:
            return
        width = x.size(dim)
        if not width == self.width == self._width:
            self._make_room(module, weight, width)
        if (dtype is self._taken or self._takes(x)) and width == self.width and not self._shares(x):
            in_backward = _graph_task() != -1
            if not in_backward:
                self._plain = True
            elif self._plain:
                if is_recomputed():
                    return
                in_backward = False  # a part under reentrant checkpointing, whose first pass nobody saw
            if states.mask is not None:
                x = states.mask.select(x, dim)
            self._put(x, in_backward)

    def _put(self, x: Tensor, in_backward: bool) -> None:
        """Capture rows of the inputs of a call, which are as wide as the buffer and where it is."""
        count = x.numel() // (self.width or 1)
        if count == 0:
            return
        marks = self._mark_due
        if marks:
            self._mark_due, self._marked_offered = False, self.offered
        self.offered += count
        if self.offered > self._room or x.dtype is not self._taken:
            self._grow(self.offered, x.dtype)
        if x.is_cuda and not self.fixed and torch.cuda.is_current_stream_capturing():
            self.fixed, self._room = True, ROOMY
        capture_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed, in_backward, marks)

    def _trace(self, x: Tensor) -> None:
        if torch.compiler.is_exporting() or not self._takes(x):
            return
        mask = self.states.mask
        x = x if mask is None else mask.select(x, self.unit_dim)
        _fix_buffer(self._key, x.dtype)
        capture_traced_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed)

    def take(self, x: Tensor) -> None:
        """Capture an input that the module itself is not given, just before its weight is used."""
        module = self._module()
        if module is not None and not self._removed:
            if x.dtype is torch.float64 and self.state is not None and not self._double:
                x = x.to(torch.float32)  # the weight was cast, too
            self(module, (None,) * self.kind.position + (x,), {})

    @property
    def weight(self) -> Tensor | None:
        """The parameter that its module has now."""
        module = self._module()
        return None if module is None else module._parameters.get(self.weight_name)

    @property
    def widths(self) -> tuple[int, ...]:
        """Units that an input may have: of this rank, and of all; empty while it is frozen."""
        return () if self.state is None else (self._units, self._all_units)

    def unhook(self) -> None:
        """The inputs of the module are not those of the weight: only :meth:`take` captures."""
        self._handle.remove()

    def _capture_replica(self, x: Any) -> None:
        """An input of a copy that ``nn.DataParallel`` made for one pass; its weight is no parameter."""
        x, device = as_plain(x), self._device
        if x is None or self.state is None or not torch.is_grad_enabled() or self.states.stopped:
            return
        mask = self.states.mask
        x = x.detach().to(device) if mask is None else mask.select(x.detach(), self.unit_dim).to(device)
        if self._takes(x):
            with _turn:
                self._put(x, False)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self.kind
        if len(args) > kind.position:
            return args[kind.position]
        return next(iter(kwargs.values()), None) if kind.keyword is None else kwargs.get(kind.keyword)

    def _plain_input(self, x: Any) -> Tensor | None:
        """What a tensor that is not simply one has of rows."""
        if is_dtensor(x):
            x, same_rows = local_input(x, self.unit_dim)
            if same_rows is not None:
                self.same_rows = same_rows
        elif self.same_rows is None and not torch.compiler.is_compiling():
            self.same_rows = frozenset()
        return as_plain(x)

    def _make_room(self, module: nn.Module, weight: Tensor, width: int) -> None:
        """For all units, where it turns out that they are sharded in the weight and not in the input."""
        if self.same_rows and width != self._units:
            return
        self._width = width
        if self.state is not None and width != self.width:
            if width in (self._units, self._all_units):
                self._release()
                self.width = width
            elif self._follows(weight):  # fully_shard puts another one in its place during the forward pass
                self.follow(module, weight)

    def expect_all_units(self) -> None:
        """As :meth:`_make_room` for a compiled model, which cannot: if no call of the first step fitted. Waits once."""
        if self._width is None and self.state is not None:
            self._width = self.width
            if self.count is not None and int(self.count) == 0:
                self._width, self.same_rows = self._all_units, frozenset()
                self._release()
                self.width = self._all_units

    def _takes(self, x: Tensor) -> bool:
        """Where this is false, the layer itself will say what is wrong with its input."""
        if self.state is None or self._device != x.device or x.dim() < -self.unit_dim or x.dtype not in _FLOATS:
            return False
        return x.shape[self.unit_dim] == self.width and (self._double or x.dtype is not torch.float64)

    def _shares(self, x: Tensor) -> bool:
        """Whether another layer has captured this tensor, and nothing in this step that this layer did not see."""
        self.calls += 1
        inputs = self.states.inputs
        version = 0 if x.is_inference() else x._version
        seen = inputs.get(id(x))
        if seen is not None and seen[0]() is x and seen[1] == version and not self._alone:
            source, call = seen[2:]
            fits = source.unit_dim == self.unit_dim and source._double == self._double and source is not self
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
            assert self.state is not None and source.state is not None
            self.offered, self._marked_offered = source.offered, source._marked_offered
            self._mark_due = source._mark_due
            if source.rows is not None:
                self._grow(len(source.rows), source.rows.dtype)
                assert self.rows is not None
                self.rows[: len(source.rows)].copy_(source.rows)
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
        states.waiting += NEW if restart or last is None else 1
        if states.waiting > states.limit:
            states.alarm()
        self._grad = weakref.ref(grad)
        source = self.source or self
        self._marked_calls = self.calls
        source._marked_calls = source.calls
        if restart and source.calls and source._restarted == source.calls:
            restart = False  # another layer that shares these rows was first
        if not restart and not source.fixed:
            source._mark_due = True  # the next call writes it down with its rows, which are not of this pass
            return
        source._restart(restart)

    def _restart(self, restart: bool) -> None:
        """A backward pass has begun a new gradient (``restart``), or a graph is to note each."""
        if self._mark_due:
            self._mark_now()
        marked, self._marked_offered = self._marked_offered, self.offered
        if restart:
            self._restarted = self.calls
            self._keep_rows()
            if marked < self.offered:
                self.offered -= marked
                self._marked_offered = self.offered
        if self.rows is not None:
            capture_mark(self.rows, self.state, self.index, restart)

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
        if made or self.state is None or self.rows is None:
            self._vain += 1
            return
        state = self.state[self.index]
        rows = torch.cat([*(part[: int(count)] for part, count in kept), self.rows[: int(state[USED])]])
        self._grow(len(rows), rows.dtype)
        self.offered, self._mark_due, buffer = len(rows), False, self.buffer
        if len(rows) > len(buffer):
            state[STRIDE] *= -(-len(rows) // len(buffer))
            key = self.seed % 2**64, self.states.step, self.index
            rows = rows[sample_rows(len(rows), len(buffer), *key, rows.device)]
        buffer[: len(rows)] = rows
        state[USED] = state[MARK] = len(rows)

    def wait(self, waits: bool) -> None:
        """Capture although others pause, or pause like them; after the states have begun a step."""
        self.waits = waits
        if self.state is not None:
            self.state[self.index, PAUSED].fill_(int(self.states.paused and not waits))

    def note_mark(self) -> None:
        """Let the state know the last backward pass."""
        if self._mark_due:
            self._mark_now()

    def drop_unmarked(self) -> None:
        """A forward pass has failed: forget its calls. The rows are in :meth:`CaptureStates.drop_unmarked`."""
        self.calls, self.offered = self._marked_calls, self._marked_offered
        if self.calls == 0:
            self.source, self._lost, self._plain = None, False, False

    def begin_step(self, finished: bool = False) -> None:
        if finished:
            self.last_source = self.index if self.source is None else self.source.index
            if self._grown:
                self._trim()
        self.offered = self._marked_offered = 0
        self._mark_due = False
        self.calls, self.source, self._lost = 0, None, False
        self._grad = None
        self._plain, self._marked_calls, self._restarted = False, 0, 0
        if self._kept:
            self._kept = []

    def watch(self, handles: list[RemovableHandle]) -> None:
        """Remove these hooks with its own."""
        self._watches += handles

    def remove(self) -> None:
        self._removed = True
        self._handle.remove()
        for handle in self._watches:
            handle.remove()
        self._mark_nothing()

    def drop(self) -> None:
        """Remove it, with its buffer: a compiled model that reads them is compiled anew, as for a frozen weight."""
        self.remove()
        self.state = self.count = None
        self._release()
