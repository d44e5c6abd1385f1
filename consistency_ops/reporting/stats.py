"""``Preconditioner.stats()``: what the last step did, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..engine.capture import SEEN, USED
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
    correction: Correction, layers: list[Layer], parameters: Iterable[Tensor], notices: Notices, condition: bool
) -> Stats:
    """Read what the last step did from the device.

    Args:
        correction: the one that made the step.
        layers: all layers, corrected or not.
        parameters: those whose numbers count for the coverage.
        notices: told of chunks that could not be inverted.
        condition: whether to compute condition numbers.
    """
    rows, seen, damping = {}, {}, {}
    chunks, corrected = 0, []
    for layer in layers:
        if layer.capture is None or layer.weight is None:
            continue
        state = layer.last_state()
        rows[layer.name], seen[layer.name] = (0, 0) if state is None else (state[USED], state[SEEN])
        info = layer.info
        if info is not None and correction.was_corrected(layer):
            if bool((info == 0).any()):
                corrected.append(layer)
            chunks += len(info)
            if layer.damping is not None:
                damping[layer.name] = float(layer.damping.max())
    failed = notice_failures(correction, layers, notices)
    numbers = condition_numbers(correction, layers, corrected) if condition else {}
    return {
        "steps": correction.step,
        "layers": len(corrected),
        "uncorrected": len(layers) - len(corrected),
        "coverage": _coverage(parameters, corrected),
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
            bad = int(info.count_nonzero()) if correction.was_corrected(layer) else 0
            if bad:
                failed[layer.name] = bad
    if failed:
        notices.once(
            "failed",
            f"{sum(failed.values())} chunks could not be inverted, so their gradients were left as they are: "
            f"{some(failed)}. Look for Inf or NaN in the inputs of these layers, or raise damping. stats() counts "
            "them.",
        )
    return failed


def _coverage(parameters: Iterable[Tensor], corrected: list[Layer]) -> float:
    """The share of the trainable numbers that were corrected."""
    total = sum(p.numel() for p in parameters if p.requires_grad and not is_lazy(p))
    seen: dict[int, int] = {}
    for layer in corrected:
        module = layer.module()
        if module is None:
            continue
        for name in (layer.kind.weight, layer.kind.bias if layer.joins_bias else None):
            parameter = None if name is None else module._parameters.get(name)
            if parameter is not None:
                seen[id(parameter)] = parameter.numel()
    return sum(seen.values()) / total if total else 0.0
