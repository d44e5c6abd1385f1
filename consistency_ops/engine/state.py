"""Where the preconditioner keeps its tensors: in ``optimizer.state[weight]``, which every way of saving keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .dtensors import local

if TYPE_CHECKING:
    from .dtensors import Shards
    from .layer import Layer

PREFIX = "consistency_"
_STEP = PREFIX + "step"


class StateStore:
    """Keeps the tensors of each layer that outlive a step, and the step counter.

    A layer has such tensors only with ``decay > 0`` or ``every > 1``. Their keys:

    * ``inverse``, ``info``: of the last refresh, one entry per chunk.
    * ``covariance``: the running sum of covariances.
    * ``weight``: the sum of the weights in that running sum, for the bias correction; float, (1,).
    * ``division``: int64, (2,): a digest of everything that fixes the random division, and the number of units.

    With an optimizer the tensors are in ``optimizer.state[weight]``; without one they are kept here, by layer name.

    A layer whose chunks differ from rank to rank (row-parallel) keeps them as DTensors, because checkpoints take a
    plain tensor to be the same on all ranks. Its keys name the number of ranks, because another number of ranks has
    other chunks.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self.shards: dict[int, Shards] = {}  # by index of the layer, where chunks differ from rank to rank
        self._optimizer = optimizer
        self._own: dict[str, dict[str, Tensor]] = {}
        # A tensor: a compiled optimizer would guard on a number.
        self._step = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._loading: Mapping[str, Any] = {}

    def get(self, layer: Layer) -> dict[str, Tensor]:
        if self._optimizer is None:
            return self._own.get(layer.name, {})
        return {_name(layer, key): local(value) for key, value in self._entries(layer).items()}

    def put(self, layer: Layer, key: str, value: Tensor) -> None:
        if self._optimizer is None:
            self._own.setdefault(layer.name, {})[key] = value
            return
        shards = self.shards.get(layer.index)
        if shards is not None and not on_host(key):
            key, value = f"{key}_of_{shards.count}", shards.assemble(value)
        weight = layer.weight
        assert weight is not None
        self._optimizer.state[weight][_prefix(layer) + key] = value

    def drop(self, layer: Layer, *names: str) -> None:
        """Forget these entries of a layer, or all of them."""
        weight = layer.weight
        if self._optimizer is None:
            entries, ours = self._own.get(layer.name, {}), {key: key for key in self._own.get(layer.name, {})}
        else:
            entries = {} if weight is None else self._optimizer.state.get(weight, {})
            ours = {key: _name(layer, key) for key in self._entries(layer)}
        for key, name in ours.items():
            if not names or name in names:
                del entries[key]

    def _entries(self, layer: Layer) -> dict[str, Tensor]:
        """By their keys in the optimizer's state."""
        weight, prefix = layer.weight, _prefix(layer)
        optimizer = self._optimizer
        entries = {} if weight is None or optimizer is None else optimizer.state.get(weight, {})
        return {k: v for k, v in entries.items() if _is_ours(k) and k.startswith(prefix) and k != _STEP}

    def count_step(self, step: int) -> None:
        """Write the step beside the state of every parameter that has been updated.

        Of all, not of the covered ones: ``torch.distributed.checkpoint`` wants state for all parameters or for none.
        Only where there is a gradient: optimizers take any entry for a sign that they have initialised theirs.
        """
        self._step.fill_(step)
        if self._optimizer is None:
            return
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None or parameter in state:
                    state[parameter][_STEP] = self._step

    def counted_steps(self) -> int:
        if self._optimizer is None:
            return int(self._step)
        return max((int(entries[_STEP]) for entries in self._optimizer.state.values() if _STEP in entries), default=0)

    def clear(self, others: Set[Tensor]) -> None:
        """Forget everything but the entries of these weights, which are another preconditioner's."""
        self._own.clear()
        if self._optimizer is not None:
            for parameter, entries in list(self._optimizer.state.items()):
                if parameter in others:
                    continue
                for key in [key for key in entries if _is_ours(key)]:
                    del entries[key]
                if not entries:
                    del self._optimizer.state[parameter]

    def before_load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loading = state_dict

    def after_load(self, optimizer: Optimizer) -> None:
        """Take our tensors as they were saved: ``load_state_dict`` has cast them to the dtype of the weight."""
        saved, self._loading = self._loading, {}
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=False):
            for name, value in saved["state"].get(key, {}).items():
                if _is_ours(name):
                    device = "cpu" if on_host(name) else parameter.device
                    optimizer.state[parameter][name] = value.detach().to(device, copy=True)


def on_host(key: str) -> bool:
    """Whether an entry is read on the host, and lives there."""
    return key == _STEP or key.endswith("division")


def _prefix(layer: Layer) -> str:
    """Of the keys of a layer; several layers may have parts of one weight."""
    return f"{PREFIX}{layer.kind.part}." if layer.kind.part else PREFIX


def _name(layer: Layer, key: str) -> str:
    return re.sub(r"_of_\d+$", "", key.removeprefix(_prefix(layer)))


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)
