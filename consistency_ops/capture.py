"""Row capture: the hooks that put the input rows of a layer into a buffer, ready for the optimizer's step.

Everything that changes from step to step is in tensors, so a compiled model sees constant Python state and is compiled
once. The columns of the state tensor are the fields of ``CaptureState`` in ``csrc/include/consistency_ops/capture.h``.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from . import ops  # noqa: F401  (loading registers the operators)
from .distributed import is_dtensor, local_input
from .layers import LayerType

_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
USED, LAST, STEP, PAUSED, STATE_SIZE = 0, 6, 7, 8, 9

_capture_rows = torch.ops.consistency_ops.capture_rows_.default
_capture_mark = torch.ops.consistency_ops.capture_mark_.default

# The two operators write their buffers and return nothing, so there is nothing to differentiate: autograd is skipped.
_autograd = torch.library.Library("consistency_ops", "IMPL")
for _name in ("capture_rows_", "capture_mark_"):
    _autograd.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("consistency_ops::capture_rows_")
def _(rows: Tensor, state: Tensor, x: Tensor, index: int, unit_dim: int, seed: int) -> None:
    return None


@torch.library.register_fake("consistency_ops::capture_mark_")
def _(rows: Tensor, state: Tensor, index: int, restart: bool) -> None:
    return None


def _no_capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """What a copied or unpickled model carries in place of a capture hook."""


def _unpickle() -> object:
    return _no_capture


class States:
    """The bookkeeping of all layers: one int64 tensor (layers, STATE_SIZE) a device."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.step = 0
        self.paused = False
        self._tensors: dict[torch.device, tuple[Tensor, ...]] = {}  # with the views that reset needs

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            state = torch.zeros(self.layers, STATE_SIZE, dtype=torch.int64, device=device)
            views = state[:, :LAST], state[:, USED], state[:, LAST], state[:, STEP], state[:, PAUSED]
            self._tensors[device] = state, *views
            self.reset(self.step, self.paused, finished=False)
        return self._tensors[device][0]

    def reset(self, step: int, paused: bool, finished: bool) -> None:
        """Forget all rows and begin ``step``; ``finished``: the rows forgotten are those of a finished step."""
        pauses = paused != self.paused
        self.step, self.paused = step, paused
        for _, pattern, used, last, steps, pausing in self._tensors.values():
            if finished:
                last.copy_(used)
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
    """

    def __init__(
        self, module: nn.Module, kind: LayerType, states: States, index: int, max_rows: int, seed: int
    ) -> None:
        self.weight_name = kind.weight
        self.unit_dim = kind.unit_dim
        self.kind = kind
        self.states = states
        self.index = index
        self.max_rows = max_rows
        self.seed = seed
        self.rows: Tensor | None = None
        self.state: Tensor | None = None
        self.count: Tensor | None = None  # rows in the buffer: int64, shape (1,), on the device
        self.same_rows: frozenset[str] | None = None  # eager only: see distributed.local_input; None: no call yet
        self.in_forward = False  # eager only: a call outside of any backward pass was captured in this step
        self._weight: weakref.ref[Tensor] | None = None  # whose place and dtype the buffer has
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._grad: weakref.ref[Tensor] | None = None  # of the weight, at the last backward pass of this step
        self._mark_handle: RemovableHandle | None = None
        self._handle = module.register_forward_pre_hook(self, with_kwargs=True)
        weight = module._parameters[kind.weight]
        if not torch.nn.parameter.is_lazy(weight):
            self.follow(module, weight)

    def follow(self, module: nn.Module, weight: Tensor) -> None:
        """Fit buffer and mark hook to this weight, which may have been moved, cast, replaced or unfrozen."""
        place = weight.device, weight.dtype
        if self._weight is None or self._weight() is not weight or self._place != place:
            self._fit(module, weight)
            self._weight, self._place = weakref.ref(weight), place
        if self._mark_handle is None and weight.requires_grad:
            self._mark_handle = weight.register_post_accumulate_grad_hook(self._mark)

    def _fit(self, module: nn.Module, weight: Tensor) -> None:
        key = torch._C._dispatch_key_for_device(weight.device.type)
        if not weight.is_meta and not torch._C._dispatch_has_kernel_for_dispatch_key(_capture_rows.name(), key):
            raise NotImplementedError(f"Preconditioner: this build has no kernels for {weight.device.type}")
        if self._mark_handle is not None:
            self._mark_handle.remove()
            self._mark_handle = None
        # Half precision is widened while it is copied, so that one dtype is read whatever autocast made of the input.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        units, rows = self.kind.units(module), self.rows
        if rows is None or rows.device != weight.device or rows.dtype != dtype or rows.shape[1] != units:
            self.rows = torch.empty(self.max_rows, units, dtype=dtype, device=weight.device)
            self.state = self.states.on(weight.device)
            self.count = self.state[self.index, USED : USED + 1]
            self.count.zero_()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        weight = module._parameters.get(self.weight_name)
        if not (module.training and torch.is_grad_enabled() and isinstance(weight, Parameter) and weight.requires_grad):
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if is_dtensor(x):
            x, self.same_rows = local_input(x, self.unit_dim)
        elif self.same_rows is None and not torch.compiler.is_compiling():
            self.same_rows = frozenset()
        if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided:
            return
        if not torch.compiler.is_compiling():
            if torch._C._functorch.peek_interpreter_stack() is not None:
                return
            if torch._C._current_graph_task_id() == -1:
                self.in_forward = True
            elif self.in_forward:
                return  # a checkpointed block is being recomputed
            if self.rows is None or self.rows.device != x.device or self.rows.dtype is not x.dtype is torch.float64:
                self.follow(module, weight)
        if self._takes(x):
            _capture_rows(self.rows, self.state, x, self.index, self.unit_dim, self.seed)

    def _takes(self, x: Tensor) -> bool:
        """Where this is false, the layer itself will say what is wrong with its input."""
        rows = self.rows
        if rows is None or rows.device != x.device or x.dim() < -self.unit_dim or x.dtype not in _FLOATS:
            return False
        return x.shape[self.unit_dim] == rows.shape[1] and (x.dtype is not torch.float64 or rows.dtype is x.dtype)

    def _mark(self, weight: Tensor) -> None:
        if (grad := weight.grad) is None:
            return  # another hook has taken it
        restart = self._grad is not None and self._grad() is not grad
        self._grad = weakref.ref(grad)
        _capture_mark(self.rows, self.state, self.index, restart)

    def begin_step(self) -> None:
        self.in_forward = False
        self._grad = None

    def remove(self) -> None:
        self._handle.remove()
        if self._mark_handle is not None:
            self._mark_handle.remove()

    # A copy of the model must not write into the original's buffers, nor carry a copy of them.
    def __deepcopy__(self, memo: dict) -> object:
        return _no_capture

    def __reduce__(self) -> tuple:
        return _unpickle, ()
