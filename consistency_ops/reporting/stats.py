"""What :class:`consistency_ops.Preconditioner` says about itself: ``summary()``, ``stats()`` and its log."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from ..engine.capture import SEEN, USED
from ..engine.layer import last_state, was_corrected
from .condition_numbers import conditions

if TYPE_CHECKING:
    from ..engine.layer import Layer
    from ..engine.layer_step import Item
    from ..preconditioner import Preconditioner

_log = logging.getLogger("consistency_ops")


def stats(pre: Preconditioner, condition: bool = True) -> dict[str, Any]:
    rows, seen, chunks, failed, damping, corrected = {}, {}, 0, {}, {}, []
    for layer in pre.layers:
        if layer.capture is None or layer.weight is None:
            continue
        state = last_state(layer)
        rows[layer.name], seen[layer.name] = (0, 0) if state is None else (state[USED], state[SEEN])
        if was_corrected(pre, layer):
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
        if layer.capture is not None and was_corrected(pre, layer) and (bad := int(layer.info.count_nonzero()))
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
