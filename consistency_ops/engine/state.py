"""Where the preconditioner keeps its tensors: in ``optimizer.state[weight]``, which every way of saving keeps."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .dtensors import local

if TYPE_CHECKING:
    from .dtensors import Shards
    from .layer import Layer
    from .optimizers import AttachedOptimizer

PREFIX = "consistency_"
_STEP = PREFIX + "step"
_SIDE = "inverse", "info", "covariance", "weight"
_KEYS = *_SIDE, *(f"output_{key}" for key in _SIDE), "division", "share"
_STEPS: set[int] = set()  # ids of the step tensors that the stores of this process write


class StateStore:
    """Keeps the tensors of each layer that outlive a step, and the step counter.

    A layer has such tensors only with ``decay > 0``, ``every > 1`` or ``max_share``. Their keys:

    * ``inverse``, ``info``: of the last refresh, one entry per chunk.
    * ``covariance``: the running sum of covariances.
    * ``weight``: the sum of the weights in that running sum, for the bias correction; float, (1,).
    * the same with ``output_`` in front: of the output side of ``mode="whiten"``.
    * ``division``: int64, (2,): a digest of everything that fixes the random division, and the number of units.
    * ``share``: float64, (3,): whether the layer is left alone (1; -1: undecided), its share, and ``max_share``.

    With an optimizer the tensors are in ``optimizer.state[weight]``; without one they are kept here, by layer name.

    A layer whose chunks differ from rank to rank (row-parallel) keeps them as DTensors, because checkpoints take a
    plain tensor to be the same on all ranks. Its keys name the number of ranks, because another number of ranks has
    other chunks.
    """

    def __init__(self, optimizer: AttachedOptimizer | None) -> None:
        self.shards: dict[int, Shards] = {}  # by index of the layer, where chunks differ from rank to rank
        self._optimizer = optimizer
        self._own: dict[str, dict[str, Tensor]] = {}
        # A tensor: a compiled optimizer would guard on a number.
        self._step = torch.zeros(1, dtype=torch.int64, device="cpu")
        _STEPS.add(id(self._step))
        weakref.finalize(self, _STEPS.discard, id(self._step)).atexit = False
        self._loading: Mapping[str, Any] = {}
        # What the last look at every parameter found: the state and its length, those with our step and those without.
        self._looked: tuple[Any, int, list[Tensor], list[Tensor]] | None = None

    def get(self, layer: Layer) -> dict[str, Tensor]:
        if self._optimizer is None:
            return self._own.get(layer.name, {})
        return {_name(layer, key): local(value) for key, value in self._entries(layer).items()}

    def one(self, layer: Layer, key: str) -> Tensor | None:
        """One entry of :meth:`get`, without a look at the others."""
        if self._optimizer is None:
            return self._own.get(layer.name, {}).get(key)
        if layer.index in self.shards:
            return self.get(layer).get(key)
        value: Tensor | None = self._optimizer.known_state_of(layer.weight).get(_prefix(layer) + key)
        return None if value is None else local(value)

    def plain_state(self) -> dict[Tensor, dict[str, Any]] | None:
        """The optimizer's own dictionary, if every layer's entries are there, as plain tensors."""
        if self._optimizer is None or self._optimizer.parts or self.shards:
            return None
        return self._optimizer.saving.state

    def newest(self, layer: Layer, key: str) -> Tensor | None:
        """What this step has left of it, else :meth:`one`."""
        return layer.pending.get(key, self.one(layer, key))

    def running_sum(
        self,
        layer: Layer,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        prefix: str = "",
        fits: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Copies of a running sum of covariances and of its weight; zeros where none of that shape is kept, or it does
        not fit.

        The call that adds to them does it in place, and what is stored stays until the step is over: if the optimizer
        breaks it off, its rows have not counted.
        """
        total, weight = (self.one(layer, prefix + key) for key in ("covariance", "weight"))
        if not fits or total is None or weight is None or total.shape != shape:
            return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(1, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=total.device).copy_(total), weight.to(dtype, copy=True)

    def holds(self, layer: Layer, key: str, value: Tensor) -> bool:
        """Whether ``value`` itself is kept there, and in no DTensor: quicker than :meth:`get`."""
        if self._optimizer is None:
            return self._own.get(layer.name, {}).get(key) is value
        return self._optimizer.known_state_of(layer.weight).get(_prefix(layer) + key) is value

    def put(self, layer: Layer, key: str, value: Tensor) -> None:
        if self._optimizer is None:
            self._own.setdefault(layer.name, {})[key] = value
            return
        shards = self.shards.get(layer.index)
        if shards is not None and not on_host(key):
            key, value = f"{key}_of_{shards.count}", shards.assemble(value)
        weight = layer.weight
        assert weight is not None
        self._optimizer.state_of(weight)[_prefix(layer) + key] = value

    def drop(self, layer: Layer, *names: str) -> None:
        """Forget these entries of a layer, or all of them."""
        if self._optimizer is None:
            own = self._own.get(layer.name, {})
            for key in list(own):
                if not names or key in names:
                    del own[key]
            return
        entries = self._optimizer.known_state_of(layer.weight)
        for key in list(self._entries(layer)):
            if not names or _name(layer, key) in names:
                del entries[key]

    def _entries(self, layer: Layer) -> dict[str, Tensor]:
        """By their keys in the optimizer's state."""
        prefix = _prefix(layer)
        assert self._optimizer is not None
        entries = self._optimizer.known_state_of(layer.weight)
        return {k: v for k, v in entries.items() if isinstance(k, str) and k.startswith(prefix) and k != _STEP}

    def count_step(self, step: int) -> None:
        """Write the step beside the state of every parameter that has been updated.

        Of all, not of the covered ones: ``torch.distributed.checkpoint`` wants state for all parameters or for none.
        Only where there is a gradient: optimizers take any entry for a sign that they have initialised theirs.
        """
        self._step.fill_(step)
        if self._optimizer is None:
            return
        if not self._optimizer.parts:
            state = self._optimizer.saving.state
            if not self._is_marked(state, step):
                self._mark(state, self._optimizer.parameters)
            return
        for parameter in self._optimizer.parameters:
            if parameter.grad is not None or self._optimizer.has_state(parameter):
                self._optimizer.state_of(parameter)[_STEP] = self._step

    def _mark(self, state: dict[Tensor, dict[str, Any]], parameters: list[Tensor]) -> None:
        marked: list[Tensor] = []
        unmarked: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is not None or parameter in state:
                state[parameter][_STEP] = self._step
                marked.append(parameter)
            else:
                unmarked.append(parameter)
        self._looked = state, len(state), marked, unmarked

    def _is_marked(self, state: dict[Tensor, dict[str, Any]], step: int) -> bool:
        """Whether all parameters still have our step, which is one tensor, so that nothing is to be written.

        Looks at the first parameter and at another one in every step, because a look at all takes a tenth of a step of
        small layers; entries that a user takes away without a change of the length come back with their turn.
        """
        if self._looked is None:
            return False
        looked, length, marked, unmarked = self._looked
        if state is not looked or len(state) != length or not marked:
            return False
        if any(state.get(p, {}).get(_STEP) is not self._step for p in (marked[0], marked[step % len(marked)])):
            return False
        return all(p.grad is None and p not in state for p in unmarked)

    def counted_steps(self) -> int:
        if self._optimizer is None:
            return int(self._step)
        return max((int(entries[_STEP]) for entries in self._counted()), default=0)

    def adopt(self) -> None:
        """Go on counting from a step that was loaded."""
        self._step.fill_(self.counted_steps())
        for entries in self._counted():
            entries[_STEP] = self._step

    def _counted(self) -> list[dict[str, Any]]:
        """The entries of all parameters that have a step of ours."""
        states = [] if self._optimizer is None else self._optimizer.states()
        found = [entries for state in states for entries in state.values()]
        return [entries for entries in found if isinstance(entries, dict) and _STEP in entries]

    def keep_types(self, layers: list[Layer]) -> None:
        """Ask an optimizer that casts what it loads, in a way of its own, to leave our entries (bitsandbytes does)."""
        uncast = None if self._optimizer is None else getattr(self._optimizer.saving, "non_castable_tensor_keys", None)
        if isinstance(uncast, set):
            uncast.add(_STEP)
            uncast.update(_prefix(layer) + key for layer in layers for key in _KEYS)

    def clear(self, others: Set[Tensor]) -> None:
        """Forget everything but the entries of these weights, which are another preconditioner's."""
        self._own.clear()
        self._looked = None
        if self._optimizer is not None:
            for state in self._optimizer.states():
                for parameter in [p for p in state if not any(p is other for other in others)]:
                    _clear(state, parameter)

    def forget_strangers(self) -> None:
        """Take our entries from parameters that the optimizer holds no longer: its ``state_dict`` cannot name them."""
        self._looked = None
        if self._optimizer is None:
            return
        held = {id(parameter) for parameter in self._optimizer.parameters}
        for state in self._optimizer.states():
            for parameter in [p for p in state if id(p) not in held]:
                _clear(state, parameter)

    def is_foreign(self, layer: Layer) -> bool:
        """Whether the step beside a layer's weight was written by no store of this process: it was loaded."""
        step = None if self._optimizer is None else self._optimizer.known_state_of(layer.weight).get(_STEP)
        return step is not None and id(step) not in _STEPS

    def before_load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loading = state_dict

    def after_load(self, optimizer: Optimizer) -> None:
        """Take our tensors as they were saved: ``load_state_dict`` has cast them to the dtype of the weight."""
        saved, self._loading = self._loading, {}
        if self._optimizer is None or "param_groups" not in saved or "state" not in saved:
            return  # an optimizer with a format of its own
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=False):
            for name, value in (saved["state"].get(key) or {}).items():
                if _is_ours(name):
                    device = "cpu" if on_host(name) else parameter.device
                    self._optimizer.state_of(parameter)[name] = value.detach().to(device, copy=True)


def _clear(state: dict[Tensor, dict[str, Any]], parameter: Tensor) -> None:
    """Take our entries of a parameter out of an optimizer's state."""
    entries = state[parameter]
    if not (isinstance(entries, dict) and any(map(_is_ours, entries))):
        return
    for key in [key for key in entries if _is_ours(key)]:
        del entries[key]
    if not entries:
        del state[parameter]


def on_host(key: str) -> bool:
    """Whether an entry is read on the host, and lives there."""
    return key == _STEP or key.endswith(("division", "share"))


def _prefix(layer: Layer) -> str:
    """Of the keys of a layer; several layers may have parts of one weight."""
    return f"{PREFIX}{layer.kind.part}." if layer.kind.part else PREFIX


def _name(layer: Layer, key: str) -> str:
    name = key.removeprefix(_prefix(layer))
    return re.sub(r"_of_\d+$", "", name) if "_of_" in name else name


def _is_ours(key: object) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)
