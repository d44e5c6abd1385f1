"""What :class:`consistency_ops.Preconditioner` says about itself: ``summary()`` and ``stats()``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from .capture import USED

if TYPE_CHECKING:
    from .coverage import Layer
    from .preconditioner import Preconditioner

_LEFT = "; gradient left as it is"


def stats(pre: Preconditioner) -> dict[str, Any]:
    rows, chunks, failed, damping, corrected = {}, 0, 0, [], 0
    for layer in pre.layers:
        if layer.capture is None:
            continue
        rows[layer.name] = _rows(layer)
        if _was_corrected(pre, layer):
            bad = int((layer.info != 0).sum())
            corrected += bad < len(layer.info)
            chunks += len(layer.info)
            failed += bad
            if layer.damping is not None:
                damping.append(float(layer.damping.max()))
    return {
        "steps": pre.steps,
        "layers": corrected,
        "uncorrected": len(pre.layers) - corrected,
        "chunks": chunks,
        "failed_chunks": failed,
        "max_damping": max(damping, default=math.nan),
        "rows": rows,
    }


def summary(pre: Preconditioner) -> str:
    return "\n".join([repr(pre), *_table([_row(pre, layer) for layer in pre.layers])])


def _rows(layer: Layer) -> int:
    """Captured in the last step that captured; waits for the device."""
    capture = layer.capture
    return 0 if capture.rows is None else capture.states.last_step(capture.rows.device, capture.last_source)[USED]


def _was_corrected(pre: Preconditioner, layer: Layer) -> bool:
    """In the last step. With a stored inverse no rows are needed."""
    return layer.info is not None and (pre.every > 1 or pre.decay > 0 or _rows(layer) > 0)


def _row(pre: Preconditioner, layer: Layer) -> tuple[str, str, str, str, str]:
    module = layer.module()
    weight = layer.weight
    division = "-"
    left = layer.reason or layer.tied or pre._ranks.reason(layer)
    if not left and weight is not None and not is_lazy(weight):
        groups, units = layer.kind.groups(module), layer.units
        chunks = -(-units // pre.chunk_of(units))
        division = f"{f'{groups} x ' if groups > 1 else ''}{units} -> {chunks} of {-(-units // chunks)}"
    rows = "-" if layer.capture is None else str(_rows(layer))
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
    if _was_corrected(pre, layer):
        bad = int((layer.info != 0).sum())
        return "ok" if bad == 0 else f"{bad} of {len(layer.info)} chunks failed" + _LEFT
    if pre.steps == 0:
        return "waiting for the first step"
    if layer.unfit_gradient:
        return "gradient is sparse or a tensor subclass" + _LEFT
    if layer.lost_rows:
        return "called less often than the layer whose input it shared" + _LEFT
    if not layer.module().training:
        return "in evaluation mode" + _LEFT
    if pre.every > 1 and _rows(layer) > 0:
        return "waiting for the next refresh" + _LEFT
    return "no input seen yet" + _LEFT if _rows(layer) == 0 else "no gradient in the last step"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
