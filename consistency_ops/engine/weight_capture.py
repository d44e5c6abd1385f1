"""Rows for a weight that is used without calling its module: the caller hands them over with the weight."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from .capture import Capture


class Covering(Protocol):
    """What may cover a weight: a preconditioner."""

    def captures_of(self, weight: Tensor) -> list[Capture]:
        """The captures of a weight; empty if it is not corrected."""


_covering: list[weakref.ref[Covering]] = []  # all that are alive, in the order in which they were made
_found: dict[int, list[weakref.ref[Capture]]] = {}  # by id of the weight; checked before use


def announce(covering: Covering) -> None:
    """Let :func:`capture` find what this one covers, as long as it is alive."""
    _covering.append(weakref.ref(covering, _forget))


def withdraw(covering: Covering) -> None:
    """It is removed."""
    for reference in [reference for reference in _covering if reference() is covering]:
        _forget(reference)


def _forget(gone: weakref.ref[Covering]) -> None:
    if gone in _covering:
        _covering.remove(gone)
    if not _covering:
        _found.clear()


def capture(x: Tensor, weight: Tensor) -> None:
    """Tell the :class:`Preconditioner` of ``weight`` that its product with ``x`` is about to be taken.

    Layers tell it themselves when they are called. This is for a weight that is used in another way: in a fused loss,
    by ``torch.nn.functional``, in an attention of one's own. Call it in the forward pass, beside the product::

        co.capture(hidden, self.head.weight)
        loss = fused_linear_cross_entropy(hidden, self.head.weight, target)

    The bias of the weight's module is taken to be used in the same product. Without a preconditioner for ``weight`` the
    call does nothing, so that the same model trains without one. It may be compiled; as for layers, construct the
    preconditioner before the first call of a compiled model.

    Args:
        x: the input as the module would be given it: (..., in) for a linear layer, (N, in, H, W) for ``nn.Conv2d``.
            Rows of the same step pool. For a parameter of a module whose type is not known: (..., in), and the weight
            is (out, in).
        weight: the ``nn.Parameter`` itself, not a view or a copy of it. It may belong to a layer that the
            preconditioner would leave alone because its module has a forward of its own, an unsupported type, or is
            never called.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a preconditioner covers ``weight``, and ``x`` does not have its units; or ``weight`` is a view of a
            parameter that one covers.
    """
    if not _covering:
        return
    if torch.compiler.is_compiling():
        _search_while_tracing(weight)
        for reference in _found.get(id(weight), ()):
            taking = reference()
            if taking is not None:
                taking.take(x)
        return
    for taking in _captures_of(x, weight):
        taking.take(x)


def _captures_of(x: object, weight: object) -> list[Capture]:
    """Checked: what the call is for."""
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"capture: {name} must be a tensor, got {type(value).__name__}")
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    found = [taking for reference in _found.get(id(weight), ()) if (taking := reference()) is not None]
    if not found or any(taking.weight is not weight for taking in found):
        found = _search(weight)
    base = weight._base
    if not found and not isinstance(weight, Parameter) and isinstance(base, Parameter) and _search(base):
        raise ValueError(
            f"capture: weight must be the parameter itself, got a view of shape {tuple(weight.shape)} of one of shape "
            f"{tuple(base.shape)}"
        )
    for taking in found:
        dim, units = taking.unit_dim, taking.widths
        if units and (x.dim() < -dim or x.shape[dim] not in units):
            raise ValueError(
                f"capture: x must have {units[-1]} units in dimension {dim}, as the weight of shape "
                f"{tuple(weight.shape)} has, got shape {tuple(x.shape)}"
            )
    return found


def _search(weight: Tensor) -> list[Capture]:
    """Ask all preconditioners. The first that covers the weight has it: a gradient is corrected once."""
    _found.pop(id(weight), None)
    for reference in _covering:
        covering = reference()
        captures = [] if covering is None else covering.captures_of(weight)
        if captures:
            _found[id(weight)] = [weakref.ref(taking) for taking in captures]
            return captures
    return []


def _search_while_tracing(weight: Tensor) -> None:
    """Called by the compiler with the real weight, before the compiled code looks into ``_found`` under its guards."""
    _search(weight)


# What torch.compiler.assume_constant_result sets; it would import the whole compiler.
_search_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
