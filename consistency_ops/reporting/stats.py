"""``Preconditioner.stats()``: what the last step did, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..engine.capture_states import SEEN, USED
from ..engine.correction import Correction
from ..engine.layer import Layer
from ..engine.notices import Notices, some
from .condition_numbers import condition_numbers


class Stats(TypedDict):
    """What :meth:`consistency_ops.Preconditioner.stats` returns; its docstring explains the keys."""

    steps: int
    layers: int
    uncorrected: int
    coverage: float
    chunks: int
    failed_chunks: int
    max_damping: float
    max_condition: float
    rows: dict[str, int]
    rows_seen: dict[str, int]
    failed: dict[str, int]
    damping: dict[str, float]
    condition: dict[str, float]


def stats(
    parts: list[tuple[Correction, list[Layer]]],
    layers: list[Layer],
    parameters: Iterable[Tensor],
    notices: Notices,
    condition: bool,
) -> Stats:
    """Read what the last step did from the device.

    Args:
        parts: for each optimizer the correction that made the step, and the layers that it captures.
        layers: all layers, corrected or not.
        parameters: those whose numbers count for the coverage.
        notices: told of chunks that could not be inverted.
        condition: whether to compute condition numbers.
    """
    rows, seen, damping = {}, {}, {}
    failed, numbers = {}, {}
    chunks, corrected = 0, []
    for correction, own in parts:
        here = []
        for layer in own:
            if layer.weight is None:
                continue
            state = layer.last_state()
            rows[layer.name], seen[layer.name] = (0, 0) if state is None else (state[USED], state[SEEN])
            info = layer.info
            if info is not None and correction.was_corrected(layer):
                if bool((info == 0).any()):
                    here.append(layer)
                chunks += len(info)
                if layer.damping is not None:
                    damping[layer.name] = float(layer.damping.max())
        failed.update(notice_failures(correction, own, notices))
        if condition and not math.isnan(correction.last_damping):  # else all inverses were loaded
            numbers.update(condition_numbers(correction, layers, here))
        corrected += here
    return {
        "steps": max(correction.step for correction, _ in parts),
        "layers": len(corrected),
        "uncorrected": len(layers) - len(corrected),
        "coverage": _coverage(list(parameters), corrected),
        "chunks": chunks,
        "failed_chunks": sum(failed.values()),
        "max_damping": max(damping.values(), default=math.nan),
        "max_condition": max(numbers.values(), default=math.nan),
        "rows": rows,
        "rows_seen": seen,
        "failed": failed,
        "damping": damping,
        "condition": numbers,
    }


def write_scalars(values: Stats, writer: Any, step: int, prefix: str) -> None:
    """Write every number of ``values`` with ``writer.add_scalar(tag, number, step)``."""
    fields: dict[str, Any] = {**values}
    for key, value in fields.items():
        named = (
            {f"{key}/{name or 'model'}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        )
        for tag, number in named.items():
            if key != "steps" and not math.isnan(number):
                writer.add_scalar(f"{prefix}/{tag}", number, step)


def notice_failures(correction: Correction, layers: list[Layer], notices: Notices) -> dict[str, int]:
    """Chunks of the last step that could not be inverted, by layer; said once in the log. Waits for the device."""
    failed: dict[str, int] = {}
    for layer in layers:
        info = layer.info
        if layer.capture is not None and layer.weight is not None and info is not None:
            # Without rows there was nothing to invert: an expert without tokens is no alarm.
            bad = int(info.count_nonzero()) if correction.was_corrected(layer) else 0
            if bad and layer.captured_rows():
                failed[layer.name] = bad
    if failed:
        notices.once(
            "failed",
            f"{sum(failed.values())} chunks could not be inverted, so their gradients were left as they are: "
            f"{some(failed)}. Look for Inf or NaN in the inputs of these layers, or raise damping. stats() counts "
            "them.",
        )
    return failed


def _coverage(parameters: list[Tensor], corrected: list[Layer]) -> float:
    """The share of the trainable numbers that were corrected."""
    sizes = {id(p): p.numel() for p in parameters if p.requires_grad and not is_lazy(p)}
    seen: dict[int, int] = {}
    for layer in corrected:
        module = layer.module()
        if module is None:
            continue
        for name in (layer.kind.weight, layer.kind.bias if layer.joins_bias else None):
            parameter = None if name is None else module._parameters.get(name)
            if parameter is not None and id(parameter) in sizes:  # the bias may be another optimizer's
                seen[id(parameter)] = parameter.numel()
    return sum(seen.values()) / sum(sizes.values()) if sizes else 0.0
