"""What :class:`consistency_ops.Preconditioner` says about itself: ``summary()``, ``stats()`` and its log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from .capture import SEEN, USED
from .conditions import conditions

if TYPE_CHECKING:
    from .coverage import Layer
    from .item import Item
    from .preconditioner import Preconditioner

_LEFT = "; gradient left as it is"
_log = logging.getLogger("consistency_ops")


def stats(pre: Preconditioner, condition: bool = True) -> dict[str, Any]:
    rows, seen, chunks, failed, damping, corrected = {}, {}, 0, {}, {}, []
    for layer in pre.layers:
        if layer.capture is None or layer.weight is None:
            continue
        state = _last_state(layer)
        rows[layer.name], seen[layer.name] = (0, 0) if state is None else (state[USED], state[SEEN])
        if _was_corrected(pre, layer):
            bad = int(layer.info.count_nonzero())
            if bad < len(layer.info):
                corrected.append(layer)
            chunks += len(layer.info)
            if bad > 0:
                failed[layer.name] = bad
            if layer.damping is not None:
                damping[layer.name] = float(layer.damping.max())
    if failed:
        _notice_failures(pre, failed)
    numbers = conditions(pre, corrected) if condition else {}
    return {
        "steps": pre.steps,
        "layers": len(corrected),
        "uncorrected": len(pre.layers) - len(corrected),
        "coverage": _coverage(pre, corrected),
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


def log_to(pre: Preconditioner, writer: Any, step: int | None, prefix: str) -> None:
    values = stats(pre)
    step = pre.steps if step is None else step
    for key, value in values.items():
        named = (
            {f"{key}/{name or 'model'}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        )
        for tag, number in named.items():
            if key != "steps" and not math.isnan(number):
                writer.add_scalar(f"{prefix}/{tag}", number, step)


def _coverage(pre: Preconditioner, corrected: list[Layer]) -> float:
    """Share of the trainable numbers of the model that were corrected."""
    total, done = 0, 0
    seen: set[int] = set()
    for parameter in pre.parameters():
        if parameter.requires_grad and not is_lazy(parameter):
            total += parameter.numel()
    for layer in corrected:
        parameters = layer.module()._parameters
        for name in (layer.kind.weight, layer.kind.bias if layer.joins_bias else None):
            parameter = None if name is None else parameters.get(name)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                done += parameter.numel()
    return done / total if total else 0.0


# Each is said once, in the log "consistency_ops", with what to do about it


def _notice(pre: Preconditioner, key: str, message: str) -> None:
    if key not in pre.said:
        pre.said.add(key)
        _log.warning("Preconditioner: %s", message)


def notice_unseen(pre: Preconditioner, batch: list[Item]) -> bool:
    """Layers with a gradient whose hook never fired; False: too early to tell."""
    if not any(not item.grad.is_meta and bool(item.grad.count_nonzero()) for item in batch):
        return False
    unseen = [item.layer.name for item in batch if item.layer.module().training and int(item.count) == 0]
    if unseen:
        _notice(
            pre,
            "unseen",
            f"{len(unseen)} of {len(batch)} layers with a gradient have seen no input, so it was left as it is: "
            f"{_some(unseen)}. If the model is compiled, construct the Preconditioner before its first call, or call "
            "torch.compiler.reset(). A weight that is used without calling its module is not covered.",
        )
    return True


def notice_failures(pre: Preconditioner) -> None:
    failed = {
        layer.name: bad
        for layer in pre.layers
        if layer.capture is not None and _was_corrected(pre, layer) and (bad := int(layer.info.count_nonzero()))
    }
    if failed:
        _notice_failures(pre, failed)


def _notice_failures(pre: Preconditioner, failed: dict[str, int]) -> None:
    _notice(
        pre,
        "failed",
        f"{sum(failed.values())} chunks could not be inverted, so their gradients were left as they are: "
        f"{_some(failed)}. Look for Inf or NaN in the inputs of these layers, or raise damping. stats() counts them.",
    )


def notice_tied(pre: Preconditioner) -> None:
    tied = [layer.name for layer in pre.layers if layer.tied and layer.capture is not None]
    if tied:
        _notice(
            pre,
            "tied",
            f"weights were tied after the Preconditioner was constructed, their gradients are left as they are: "
            f"{_some(tied)}. Tie weights first to keep this quiet.",
        )


def notice_dropped(pre: Preconditioner, names: list[str]) -> None:
    _notice(
        pre,
        "dropped",
        "the loaded state was saved with another seed, chunk, group or every, or with other layers before these, so it "
        f"was dropped and their statistics start anew: {_some(names)}. Construct the Preconditioner as it was then.",
    )


def notice_alone(pre: Preconditioner, names: list[str], ranks: int) -> None:
    _notice(
        pre,
        "alone",
        f"there are {ranks} ranks, but some layers are neither in a DistributedDataParallel nor sharded, so each rank "
        f"corrects them with its own inputs: {_some(names)}. If ranks average gradients in another way, pass their "
        "process_group.",
    )


def notice_not_pooled(pre: Preconditioner, optimizer: str) -> None:
    _notice(
        pre,
        "not pooled",
        f"{optimizer} does not pool covariances over ranks, so gradients that ranks share are left as they are. On "
        "several ranks use Preconditioner with an optimizer of torch.optim.",
    )


def notice_lost(pre: Preconditioner, layer: Layer) -> None:
    _notice(
        pre,
        f"lost {layer.name}",
        f"layer {layer.name!r} was called less often than the layer whose input it shared, so its gradient was left "
        "as it is in this step. From now on it captures rows of its own; nothing needs to be done.",
    )


def _some(names: Iterable[str]) -> str:
    names = [name or "(model)" for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def summary(pre: Preconditioner) -> str:
    return "\n".join([repr(pre), *_table([_row(pre, layer) for layer in pre.layers])])


def _last_state(layer: Layer) -> list[int] | None:
    """Of the last step that captured; waits for the device."""
    capture = layer.capture
    return None if capture.rows is None else capture.states.last_step(capture.rows.device, capture.last_source)


def _rows(layer: Layer) -> int:
    state = _last_state(layer)
    return 0 if state is None else state[USED]


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
        return "gradient is sparse, expanded or a tensor subclass" + _LEFT
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
