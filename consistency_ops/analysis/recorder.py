"""The recorder that all monitors share: hooks on the chosen layers of any model, attached by one line.

A recorded forward pass, and the backward pass that belongs to it, make a *point*. Between recorded passes a hook is one
Python call. Gradients are taken by hooks on the outputs, not by full backward hooks: those refuse in-place activations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._hooks import Unpickled, hide
from ..layers import layer_type
from ..ops.checks import check_module, shown

Layers = Sequence[str | type[nn.Module]] | None
Self = TypeVar("Self", bound="Recorder")  # typing's own from Python 3.11 on

# Modules that only pass on, reshape, select or compare the outputs of others.
_QUIET = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.loss._Loss,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def weighted(module: nn.Module) -> bool:
    """Whether the module is linear in its input: Linear, Conv and what ``consistency_ops.layers`` registered."""
    return layer_type(module) is not None


def signalling(module: nn.Module) -> bool:
    """Whether the module has no children and is not one of _QUIET."""
    return not any(True for _ in module.children()) and not isinstance(module, _QUIET)


def choose(what: str, model: nn.Module, layers: Layers, default: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Return the layers that match a name pattern or type in ``layers``, or that the default rule chooses."""
    check_module(what, model)
    named = {name or "model": module for name, module in model.named_modules()}
    if layers is None:
        found = {name: module for name, module in named.items() if default(module)}
        if not found:
            raise ValueError(f"{what}: the model has no layer to measure by default; name some with layers=")
        return found
    if isinstance(layers, str | type):
        layers = (layers,)
    found = {}
    for rule in layers if isinstance(layers, Iterable) else (layers,):
        if not isinstance(rule, str | type):
            raise TypeError(f"{what}: layers must be names, patterns or types, got {shown(rule)}")
        fits = {
            n: m for n, m in named.items() if (isinstance(m, rule) if isinstance(rule, type) else fnmatchcase(n, rule))
        }
        if not fits:
            raise ValueError(f"{what}: layers: {shown(rule)} matches no module of the model")
        found |= fits
    return {name: module for name, module in named.items() if name in found}


def first_tensor(value: Any) -> Tensor | None:
    """Return ``value``, or the first floating-point tensor in a tuple, list or dict; None if there is none."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((t for v in value if (t := first_tensor(v)) is not None), None)


def first_line(error: BaseException) -> str:
    """What an exception says, as one line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


_measuring: list[None] = []  # not empty while a measurement runs the model; recorders ignore its passes


@contextmanager
def unrecorded() -> Iterator[None]:
    """Hide the passes of models in this context from all recorders."""
    _measuring.append(None)
    try:
        yield
    finally:
        _measuring.pop()


class Point:
    """Records of one point: sums by layer and name, which stay on their device, and the number of summands."""

    def __init__(self, step: int, layers: int) -> None:
        self.step: int = step
        self.forwards: int = 0
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        self.counts: list[dict[str, int]] = [{} for _ in range(layers)]

    def add(self, layer: int, name: str, value: Tensor, count: int = 1) -> None:
        sums, counts = self.sums[layer], self.counts[layer]
        sums[name] = sums[name] + value if name in sums else value
        counts[name] = counts.get(name, 0) + count


class _Hook(Unpickled):
    """A hook that is not copied with the model and does not keep the recorder alive."""

    def __init__(self, method: Callable[..., None], *args: Any) -> None:
        self.method, self.args = weakref.WeakMethod(method), args

    def __call__(self, *args: Any) -> None:
        method = self.method()
        if method is not None:
            method(*self.args, *args)


class Recorder:
    """Base of the monitors. A subclass says what to keep of a layer's input and output, and of its output gradient.

    Recorded are forward passes of ``model`` with gradients enabled, so a validation pass under ``torch.no_grad()`` does
    not count, and neither do layers inside a reentrant activation checkpoint, nor the passes of
    :func:`~consistency_ops.analysis.propagation`. A layer that is called several times in a pass pools its calls. Keep
    the recorder: when it is collected, or ``detach()`` is called, or its ``with`` block ends, the model is as before;
    the results stay.

    Args:
        model: any module; call it as a whole, uncompiled.
        layers: name patterns (``"blocks.*.mlp"``) or module types; None: the monitor's default.
        every: number of forward passes from one that is recorded to the next.
        average: number of recorded passes that make one point (for a mean over an epoch: its number of batches).
    """

    what = "recorder"

    def __init__(
        self, model: nn.Module, layers: Layers, every: int, average: int, default: Callable[[nn.Module], bool]
    ) -> None:
        for name, value in (("every", every), ("average", average)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.what}: {name} must be a whole number, at least 1, got {shown(value)}")
        chosen = choose(self.what, model, layers, default)
        self.names: list[str] = list(chosen)
        self.kinds: list[str] = [type(module).__name__ for module in chosen.values()]
        self.every: int = every
        self.average: int = average
        self.forwards: int = 0
        self.points: list[Point] = []
        self.tolerant: bool = False  #: a layer that cannot be measured is left out, and named in ``failures``
        self.failures: dict[str, str] = {}
        self._order: dict[int, None] = {}  # layers in the order of their first call
        self._recording = False
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(_Hook(self._begin), prepend=True)]
        for index, module in enumerate(chosen.values()):
            self._handles.append(module.register_forward_hook(_Hook(self._see, index), with_kwargs=True))
        self._handles.append(model.register_forward_hook(_Hook(self._end), always_call=True))
        for module in (model, *chosen.values()):
            hide(module)

    def detach(self) -> None:
        """Remove every hook; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._recording = False

    def clear(self) -> None:
        """Forget all points."""
        self.points.clear()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.detach()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "detached"
        return f"{type(self).__name__}({len(self.names)} layers, {len(self.points)} points, {state})"

    def _begin(self, *_: Any) -> None:
        if _measuring or not torch.is_grad_enabled():
            return
        self._recording = self.forwards % self.every == 0
        self.forwards += 1
        if self._recording:
            if not self.points or self.points[-1].forwards == self.average:
                self.points.append(Point(self.forwards - 1, len(self.names)))
            self.points[-1].forwards += 1

    def _end(self, *_: Any) -> None:
        self._recording = False

    def _see(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Activation checkpointing computes layers again in backward, after the pass has ended; that does not count.
        tensor = first_tensor(output)
        if not self._recording or tensor is None or not torch.is_grad_enabled():
            return
        self._order[index] = None
        point = self.points[-1]
        with torch.no_grad(), self._kept_going(index):
            self._forward(point, index, module, first_tensor((args, kwargs)), tensor.detach())
        if tensor.requires_grad:
            tensor.register_hook(  # type: ignore[no-untyped-call]  # torch does not annotate it
                lambda gradient: self._take(point, index, gradient)
            )

    def _take(self, point: Point, index: int, gradient: Tensor) -> None:
        with torch.no_grad(), self._kept_going(index):
            self._backward(point, index, gradient.detach())

    @contextmanager
    def _kept_going(self, index: int) -> Iterator[None]:
        """What goes wrong in a hook ends the training pass, unless the recorder is tolerant."""
        try:
            yield
        except Exception as error:
            if not self.tolerant:
                raise
            self.failures.setdefault(self.names[index], first_line(error))

    def _forward(self, point: Point, index: int, module: nn.Module, x: Tensor | None, output: Tensor) -> None:
        raise NotImplementedError

    def _backward(self, point: Point, index: int, gradient: Tensor) -> None:
        raise NotImplementedError

    def _seen(self) -> list[int]:
        """Return the layers that were called, in the order of their first call."""
        if not self._order:
            raise RuntimeError(
                f"{self.what}: nothing was recorded; run the model, with gradients enabled, while the recorder is "
                "attached"
            )
        return list(self._order)

    def _series(self, layer: int, name: str) -> list[tuple[Tensor, int] | None]:
        """Return (sum, count) at every point, None where nothing was recorded. Waits for the device."""
        return [
            (p.sums[layer][name].cpu(), p.counts[layer][name]) if name in p.sums[layer] else None for p in self.points
        ]
