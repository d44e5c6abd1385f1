"""``Preconditioner.summary()``: a table of all layers, and what becomes of each gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parameter import is_lazy

from ..engine.layer import captured_rows, was_corrected

if TYPE_CHECKING:
    from ..engine.layer import Layer
    from ..preconditioner import Preconditioner

_LEFT = "; gradient left as it is"


def summary(pre: Preconditioner) -> str:
    return "\n".join([repr(pre), *_table([_row(pre, layer) for layer in pre.layers])])


def _row(pre: Preconditioner, layer: Layer) -> tuple[str, str, str, str, str]:
    module = layer.module()
    weight = layer.weight
    division = "-"
    left = layer.reason or layer.tied or pre._ranks.reason(layer)
    if not left and weight is not None and not is_lazy(weight):
        groups, units = layer.kind.groups(module), layer.units
        chunks = -(-units // pre.chunk_of(units))
        division = f"{f'{groups} x ' if groups > 1 else ''}{units} -> {chunks} of {-(-units // chunks)}"
    rows = "-" if layer.capture is None else str(captured_rows(layer))
    kind = "-" if module is None else type(module).__name__
    return layer.name or "(model)", kind, division, rows, _status(pre, layer)


def _status(pre: Preconditioner, layer: Layer) -> str:
    if layer.reason is not None:
        return layer.reason + _LEFT
    if layer.tied:
        return f"tied with {layer.tied}" + _LEFT
    weight = layer.weight
    if weight is None:
        return "gone" if layer.module() is None else f"{layer.kind.weight} is no parameter any more" + _LEFT
    if not pre.owns(weight):
        return "not in the optimizer" + _LEFT
    if not weight.requires_grad:
        return "frozen"
    if (reason := pre._ranks.reason(layer)) is not None:
        return reason + _LEFT
    if was_corrected(pre, layer):
        bad = int((layer.info != 0).sum())
        return "ok" if bad == 0 else f"{bad} of {len(layer.info)} chunks failed" + _LEFT
    if pre.steps == 0:
        return "waiting for the first step"
    if layer.unfit_gradient:
        return "gradient is sparse, expanded or a tensor subclass" + _LEFT
    if layer.lost_rows:
        return "called less often than the layer whose input it shared" + _LEFT
    if not layer.module().training:
        return "in evaluation mode" + _LEFT
    if pre.every > 1 and captured_rows(layer) > 0:
        return "waiting for the next refresh" + _LEFT
    return "no input seen yet" + _LEFT if captured_rows(layer) == 0 else "no gradient in the last step"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
