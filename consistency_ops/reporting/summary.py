"""``Preconditioner.summary()``: a table of all layers, and what becomes of each gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..engine.correction import Correction
from ..engine.layer import Layer

_LEFT = "; gradient left as it is"


@dataclass(frozen=True)
class LayerFacts:
    """What the rows of one optimizer's layers are made from."""

    correction: Correction  # the one that made the last step
    owns: Callable[[Tensor], bool]  # whether the optimizer updates a parameter
    placement_reason: Callable[[Layer], str | None]  # why ranks leave a layer alone, or None


def summary(title: str, layers: list[Layer], facts_of: Callable[[Layer], LayerFacts]) -> str:
    """The table.

    Args:
        title: its first line.
        layers: one row each.
        facts_of: what is known of a layer.
    """
    rows = []
    for layer in layers:
        facts = facts_of(layer)
        rows.append(_row(facts.correction, layer, facts.owns, facts.placement_reason(layer)))
    return "\n".join([title, *_table(rows)])


def _row(
    correction: Correction, layer: Layer, owns: Callable[[Tensor], bool], placement_reason: str | None
) -> tuple[str, ...]:
    module, weight = layer.module(), layer.weight
    division = "-"
    left = layer.reason or layer.tied or placement_reason
    if not left and module is not None and weight is not None and not is_lazy(weight):
        groups, units = layer.kind.num_groups(module), layer.units
        chunks = -(-units // correction.chunk_of(units))
        division = f"{f'{groups} x ' if groups > 1 else ''}{units} -> {chunks} of {-(-units // chunks)}"
    rows = "-" if layer.capture is None else str(layer.captured_rows())
    kind = "-" if module is None else type(module).__name__
    return layer.name or "(model)", kind, division, rows, _status(correction, layer, owns, placement_reason)


def _status(correction: Correction, layer: Layer, owns: Callable[[Tensor], bool], placement_reason: str | None) -> str:
    if layer.reason is not None:
        return layer.reason + _LEFT
    if layer.tied:
        return f"tied with {layer.tied}" + _LEFT
    module, weight = layer.module(), layer.weight
    if module is None or weight is None:
        return "gone" if module is None else f"{layer.kind.weight} is no parameter any more" + _LEFT
    if not owns(weight):
        return "not in the optimizer" + _LEFT
    if not weight.requires_grad:
        return "frozen"
    if placement_reason is not None:
        return placement_reason + _LEFT
    if layer.dear:
        limit = correction.options.max_share
        return f"correction costs {layer.share:.2f} of its passes, max_share={limit:g}" + _LEFT
    info = layer.info
    if info is not None and correction.was_corrected(layer):
        bad = int(info.count_nonzero())
        return "ok" if bad == 0 else f"{bad} of {len(info)} chunks failed" + _LEFT
    if correction.step == 0:
        return "waiting for the first step"
    if layer.unfit_gradient:
        return "gradient is sparse, expanded or a tensor subclass" + _LEFT
    if layer.lost_rows:
        return "called less often than the layer whose input it shared" + _LEFT
    if not module.training:
        return "in evaluation mode" + _LEFT
    rows = layer.captured_rows()
    if correction.options.every > 1 and rows > 0:
        return "waiting for the next refresh" + _LEFT
    return "no input seen yet" + _LEFT if rows == 0 else "no gradient in the last step"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
