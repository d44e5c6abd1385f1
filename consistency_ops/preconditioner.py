"""The drop-in preconditioner: corrects the gradients of a model's layers in front of any optimizer (arXiv 1708.00631)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.optim import LBFGS, Optimizer

from . import ops
from .capture import LAST, Capture, States
from .layers import LayerType, layer_type

_STATE = "consistency_"  # prefix of our entries in optimizer.state[weight]
_VERSION = 1


@dataclass(eq=False)
class _Layer:
    """A layer with a weight of two or more dimensions, covered or not."""

    name: str
    module: weakref.ref[nn.Module]
    kind: LayerType | None
    index: int
    reason: str | None  # why it can never be corrected, or None
    capture: Capture | None = None
    joins_bias: bool = False
    info: Tensor | None = None  # of the last step
    damping: Tensor | None = None
    pending: dict[str, Any] = field(default_factory=dict)  # state to write after the optimizer's step

    @property
    def weight(self) -> Parameter | None:
        module = self.module()
        return None if module is None else module._parameters.get(self.kind.weight)


@dataclass(frozen=True)
class _Item:
    """A layer that is corrected in this step. ``grad`` has units in dimension 1; ``bias_grad`` is (out,) or None."""

    layer: _Layer
    weight: Parameter
    grad: Tensor
    bias_grad: Tensor | None

    @property
    def units(self) -> int:
        return self.grad.shape[1] + (self.bias_grad is not None)


class Preconditioner:
    """Multiplies every layer's gradient by the inverse damped second moment of the layer's inputs, before each step.

    For a layer with input rows ``X`` (n, d) and weight gradient ``G`` (out, d) the optimizer receives ``G A_c^-1`` with
    ``A_c = X_c^T X_c / n + damping`` in every chunk ``c`` of at most ``chunk`` randomly chosen units (arXiv 1708.00631).
    One line in a training script; nothing else changes::

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        co.Preconditioner(model, optimizer)

    Construct it before the first call of a compiled model, and before checkpoints are loaded. Covered are
    ``nn.Linear`` and ``nn.Conv1d/2d/3d`` and what :func:`consistency_ops.layers.register` adds; all other layers, and those
    without statistics (never run, tied, frozen, in evaluation mode), keep their gradient; :meth:`summary` lists them.
    Gradients are corrected in place, after unscaling and clipping; all micro-batches of a step count. Steps that a
    ``GradScaler`` skips leave nothing behind. A closure is supported if the optimizer calls it once a step.

    Args:
        model: the module whose layers are corrected. Only weak references to it are kept.
        optimizer: any ``torch.optim.Optimizer`` over its parameters. ``None``: call :meth:`step` before the optimizer's.
        damping: number >= 0, or a function of the step (0, 1, ...) that returns one.
        scaling: ``"trace"`` divides ``A`` by its mean diagonal entry first, so that a tuned learning rate stays valid;
            ``"absolute"`` is the paper's rule.
        chunk: largest number of units inverted together, 1 to 256.
        group: consecutive units that stay together in the random division; ``None``: as many as fill 32 bytes.
        max_rows: input rows of a layer that are used in a step; a uniform sample of them where there are more.
        decay: weight of the old value in a running average of the covariances, in [0, 1). 0: the current step's inputs
            only, and a new random division every time. Above 0 the division is fixed, the average bias-corrected, and
            a step with Inf or NaN in a layer's inputs or gradient does not enter it.
        every: capture and invert on every ``every``-th step; the steps between reuse inverse and division.
        bias: join the bias to the units of its layer; ``False`` leaves bias gradients as they are.
        skip: layers to leave alone: module names, ``fnmatch`` patterns of names, or module types.
        seed: of the random division and the row sample.

    Raises:
        ValueError: an argument out of range, or no layer to correct.
        TypeError: ``model`` or ``optimizer`` has the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        damping: float | Callable[[int], float] = 0.1,
        scaling: str = "trace",
        chunk: int = 128,
        group: int | None = None,
        max_rows: int = 4096,
        decay: float = 0.0,
        every: int = 1,
        bias: bool = True,
        skip: str | type | Iterable[str | type] = (),
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Preconditioner: model must be a torch.nn.Module, got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"Preconditioner: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, LBFGS):
            raise ValueError("Preconditioner: optimizer must evaluate the gradient once a step, got LBFGS")
        if not callable(damping):
            _check_damping(damping)
        _check(scaling in ("trace", "absolute"), "scaling", "'trace' or 'absolute'", scaling)
        _check(_is_int(chunk) and 1 <= chunk <= 256, "chunk", "in [1, 256]", chunk)
        _check(group is None or (_is_int(group) and 1 <= group <= chunk), "group", f"None or in [1, {chunk}]", group)
        _check(_is_int(max_rows) and max_rows >= 1, "max_rows", "an integer >= 1", max_rows)
        _check(0 <= decay < 1, "decay", "in [0, 1)", decay)
        _check(_is_int(every) and every >= 1, "every", "an integer >= 1", every)
        _check(_is_int(seed) and 0 <= seed < 2**63, "seed", "an integer in [0, 2^63)", seed)

        self.damping, self.scaling, self.chunk, self.group, self.max_rows = damping, scaling, chunk, group, max_rows
        self.decay, self.every, self.bias, self.seed = decay, every, bias, seed
        self.skip = (skip,) if isinstance(skip, str | type) else tuple(skip)
        self._optimizer = optimizer
        self._step = 0
        self._own_state: dict[str, dict[str, Any]] = {}  # by layer, where there is no optimizer
        self._parameters: set[int] = set()  # ids of the optimizer's parameters
        self._parameter_count = 0
        self._loading: Mapping[str, Any] | None = None
        self._warned = False

        self._layers = self._find_layers(model)
        self._states = States(len(self._layers))
        self._attach()
        if not any(layer.capture for layer in self._layers):
            raise ValueError(f"Preconditioner: model must have a layer to correct, got none\n{self.summary()}")
        handles = []
        if optimizer is not None:
            handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_pre_hook(self._before_load),
                optimizer.register_load_state_dict_post_hook(self._after_load),
            ]
        self._detach = weakref.finalize(self, _detach, self._layers, handles)
        self._detach.atexit = False

    # What is covered

    def _find_layers(self, model: nn.Module) -> list[_Layer]:
        modules = [(name.replace("_orig_mod.", ""), module) for name, module in model.named_modules()]
        owners: dict[int, list[str]] = {}
        for name, module in modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
        for pattern in self.skip:
            if isinstance(pattern, str) and not any(fnmatchcase(name, pattern) for name, _ in modules):
                warnings.warn(f"Preconditioner: skip pattern {pattern!r} matches no module", stacklevel=4)
        layers = []
        for name, module in modules:
            kind = layer_type(module)
            own = [p for p in module._parameters.values() if p is not None]
            if kind is None and not any(is_lazy(p) or p.dim() > 1 for p in own):
                continue
            layer = _Layer(name, weakref.ref(module), kind, len(layers), self._reason(name, module, kind, owners))
            if layer.reason is None and kind.bias is not None:
                bias = module._parameters.get(kind.bias)
                layer.joins_bias = self.bias and bias is not None and len(owners[id(bias)]) == 1
            layers.append(layer)
        return layers

    def _reason(
        self, name: str, module: nn.Module, kind: LayerType | None, owners: dict[int, list[str]]
    ) -> str | None:
        """Why this layer is never corrected, or None."""
        if any(isinstance(module, s) if isinstance(s, type) else fnmatchcase(name, s) for s in self.skip):
            return "skipped"
        if kind is None:
            return "unsupported type"
        weight = module._parameters.get(kind.weight)
        if weight is None:
            return f"{kind.weight} is not a parameter of the module"
        if len(owners[id(weight)]) > 1:
            return "tied with " + ", ".join(o for o in owners[id(weight)] if o != name)
        if not weight.is_floating_point():
            return f"unsupported dtype {weight.dtype}"
        return None

    def _attach(self) -> None:
        """Hook the layers whose weight the optimizer holds; again when its parameter groups have grown."""
        if self._optimizer is not None:
            self._parameter_count = _count_parameters(self._optimizer)
            self._parameters = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for layer in self._layers:
            if layer.reason is None and layer.capture is None and (module := layer.module()) is not None:
                if self._owns(layer.weight):
                    capture = Capture(module, layer.kind, self._states, layer.index, self.max_rows, self.seed)
                    layer.capture = capture

    def _owns(self, parameter: Tensor | None) -> bool:
        return parameter is not None and (self._optimizer is None or id(parameter) in self._parameters)

    # The step

    def step(self) -> None:
        """Correct the gradients; call it after ``backward`` and before the optimizer's step. Without an optimizer only.

        Raises:
            RuntimeError: an optimizer was given; its own step does this.
        """
        if self._optimizer is not None:
            raise RuntimeError("Preconditioner.step: must be called only when no optimizer was given, got one")
        self._correct()
        self._write_state()

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._correct()
            return None
        calls = 0

        def corrected_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    f"Preconditioner: optimizer must call its closure once a step, got a second call by "
                    f"{type(optimizer).__name__}"
                )
            loss = closure()
            self._correct()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": corrected_closure}
        return (args[0], corrected_closure, *args[2:]), kwargs

    @torch.compiler.disable
    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._write_state()

    @torch.no_grad()
    def _correct(self) -> None:
        if self._optimizer is not None and _count_parameters(self._optimizer) != self._parameter_count:
            self._attach()
        items: dict[torch.device, list[_Item]] = {}
        for layer in self._layers:
            layer.info = None
            if layer.capture is not None and (item := self._item(layer)) is not None:
                items.setdefault(item.grad.device, []).append(item)
        if not self._warned:
            self._warn_if_nothing_was_captured([item for batch in items.values() for item in batch])
        for batch in items.values():
            self._correct_batch(batch)
        for layer in self._layers:
            if layer.capture is not None:
                layer.capture.begin_step()
        self._states.reset(self._step + 1, paused=(self._step + 1) % self.every != 0, finished=not self._states.paused)

    def _item(self, layer: _Layer) -> _Item | None:
        module = layer.module()
        weight = layer.weight
        if weight is None or is_lazy(weight) or not self._owns(weight):
            return None
        layer.capture.follow(module, weight)
        if not weight.requires_grad or not _is_plain(weight.grad):
            return None
        bias_grad = None
        if layer.joins_bias:
            bias = module._parameters.get(layer.kind.bias)
            if bias is not None and self._owns(bias) and _is_plain(bias.grad):
                bias_grad = bias.grad
        return _Item(layer, weight, layer.kind.view(weight.grad), bias_grad)

    def _correct_batch(self, batch: list[_Item]) -> None:
        """Correct the gradients of layers that are on one device."""
        damping = self._damping_now()
        if self.every == 1 and self.decay == 0:
            info, used = ops.foreach_precondition_(
                [item.grad for item in batch],
                [item.layer.capture.rows for item in batch],
                bias_grads=[item.bias_grad for item in batch],
                damping=damping,
                scaling=self.scaling,
                chunk=self.chunk,
                group=self.group,
                max_rows=self.max_rows,
                seed=self.seed,
                step=self._step,
                layers=[item.layer.index for item in batch],
                row_counts=[item.layer.capture.count for item in batch],
                return_damping=True,
            )
            self._note_results(batch, info, used)
            return
        if self._step % self.every == 0:
            self._refresh(batch, damping)
        self._apply([item for item in batch if "inverse" in self._state_of(item)])

    def _refresh(self, batch: list[_Item], damping: float) -> None:
        """New covariances and inverses."""
        counts = [item.layer.capture.count for item in batch]
        covariances = ops.foreach_covariance(
            [item.layer.capture.rows for item in batch],
            grads=[item.grad for item in batch],
            bias=[item.bias_grad is not None for item in batch],
            chunk=self.chunk,
            group=self.group,
            max_rows=self.max_rows,
            permutations=None,
            seed=self.seed,
            step=self._division_step(),
            layers=[item.layer.index for item in batch],
            row_counts=counts,
        )
        # A covariance of NaN fails to factor, and a chunk that fails keeps its gradient: no rows, no correction.
        for i, (item, count) in enumerate(zip(batch, counts, strict=True)):
            if self.decay == 0:
                covariances[i] = torch.where(count.view(1, 1, 1) > 0, covariances[i], math.nan)
            else:
                covariances[i] = self._average(item, count, covariances[i])
        inverses, info, used = ops.foreach_inverse(
            covariances,
            units=[item.units for item in batch],
            damping=damping,
            scaling=self.scaling,
            chunk=self.chunk,
        )
        for item, inverse in zip(batch, inverses, strict=True):
            item.layer.pending["inverse"] = inverse
        self._note_results(batch, info, used)
        for item in batch:
            item.layer.pending["info"] = item.layer.info

    def _average(self, item: _Item, count: Tensor, covariance: Tensor) -> Tensor:
        """The bias-corrected running covariance, NaN before anything entered it."""
        state = self._state_of(item)
        old, weight = state.get("covariance"), state.get("weight")
        if old is None or old.shape != covariance.shape:
            old, weight = torch.zeros_like(covariance), covariance.new_zeros(1)
        gradients = [g for g in (item.grad, item.bias_grad) if g is not None]
        finite = torch.stack([t.isfinite().all() for t in (covariance, *gradients)]).all()
        enters = finite & (count > 0)
        weight = torch.where(enters, self.decay * weight + (1 - self.decay), weight)
        total = torch.where(enters, self.decay * old + (1 - self.decay) * covariance, old)
        item.layer.pending.update(covariance=total, weight=weight)
        return total / weight

    def _apply(self, batch: list[_Item]) -> None:
        """Multiply by the stored inverses."""
        states = [self._state_of(item) for item in batch]
        fits = [len(s["info"]) == len(s["inverse"]) == self._num_chunks(i) for i, s in zip(batch, states, strict=True)]
        states = [s for s, fit in zip(states, fits, strict=True) if fit]
        batch = [item for item, fit in zip(batch, fits, strict=True) if fit]
        if not batch:
            return
        for item, state in zip(batch, states, strict=True):
            item.layer.info = state["info"]
        ops.foreach_apply_(
            [item.grad for item in batch],
            [state["inverse"] for state in states],
            torch.cat([state["info"] for state in states]),
            bias_grads=[item.bias_grad for item in batch],
            chunk=self.chunk,
            group=self.group,
            permutations=None,
            seed=self.seed,
            step=self._division_step(),
            layers=[item.layer.index for item in batch],
        )

    def _division_step(self) -> int:
        return 0 if self.decay > 0 else self._step - self._step % self.every

    def _damping_now(self) -> float:
        if not callable(self.damping):
            return self.damping
        return _check_damping(self.damping(self._step), f" at step {self._step}")

    def _num_chunks(self, item: _Item) -> int:
        return item.layer.kind.groups(item.layer.module()) * -(-item.units // self.chunk)

    def _note_results(self, batch: list[_Item], info: Tensor, used: Tensor) -> None:
        sizes = [self._num_chunks(item) for item in batch]
        for item, i, u in zip(batch, info.split(sizes), used.split(sizes), strict=True):
            item.layer.info, item.layer.damping = i, u

    def _warn_if_nothing_was_captured(self, batch: list[_Item]) -> None:
        """Once: hooks that were installed after the first call of a compiled model never fire."""
        if not batch:
            return
        self._warned = True
        if all(int(item.layer.capture.count) == 0 and item.layer.module().training for item in batch):
            if any(bool(item.grad.count_nonzero()) for item in batch):
                warnings.warn(
                    "Preconditioner: no layer has seen any input, so all gradients were left as they are. If the model "
                    "is compiled, construct the Preconditioner before its first call, or call torch.compiler.reset().",
                    stacklevel=2,
                )

    # State

    def _state_of(self, item: _Item) -> dict[str, Any]:
        """State of a layer without the prefix; what is pending goes first."""
        return {**self._stored(item.layer, item.weight), **item.layer.pending}

    def _stored(self, layer: _Layer, weight: Tensor | None) -> dict[str, Any]:
        if self._optimizer is None:
            return self._own_state.get(layer.name, {})
        entries = self._optimizer.state.get(weight, {}) if weight is not None else {}
        return {key[len(_STATE) :]: entries[key] for key in entries if isinstance(key, str) and key.startswith(_STATE)}

    def _store(self, layer: _Layer, weight: Tensor, state: dict[str, Any]) -> None:
        if self._optimizer is None:
            self._own_state.setdefault(layer.name, {}).update(state)
        else:
            self._optimizer.state[weight].update({_STATE + key: value for key, value in state.items()})

    def _write_state(self) -> None:
        self._step += 1
        for layer in self._layers:
            weight = layer.weight if layer.capture is not None else None
            # Optimizers take a non-empty state for one that they initialised: write only beside theirs.
            if weight is not None and weight.grad is not None and self._owns(weight):
                self._store(layer, weight, {**layer.pending, "step": self._step})
            layer.pending.clear()

    def _before_load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        self._loading = state_dict

    def _after_load(self, optimizer: Optimizer) -> None:
        """Take our tensors as they were saved: ``load_state_dict`` has cast them to the dtype of the weight."""
        saved, self._loading = self._loading, None
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                if isinstance(name, str) and name.startswith(_STATE) and isinstance(value, Tensor):
                    optimizer.state[parameter][name] = value.detach().to(parameter.device, copy=True)
        self._resume()

    def _resume(self) -> None:
        steps = [self._stored(layer, layer.weight).get("step", 0) for layer in self._layers if layer.capture is not None]
        self._step = max(steps, default=0)
        for layer in self._layers:
            layer.pending.clear()
            if layer.capture is not None:
                layer.capture.begin_step()
        self._states.reset(self._step, paused=self._step % self.every != 0, finished=False)

    def state_dict(self) -> dict[str, Any]:
        """Step counter, running covariances and inverses, by layer name.

        With an optimizer it is a copy of what ``optimizer.state_dict()`` holds anyway.
        """
        layers = {layer.name: dict(self._stored(layer, layer.weight)) for layer in self._layers if layer.capture}
        return {"version": _VERSION, "layers": {name: state for name, state in layers.items() if state}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Rows captured so far are dropped.

        Raises:
            ValueError: another version, or a layer that this model does not have.
        """
        _check(state_dict.get("version") == _VERSION, "state_dict version", str(_VERSION), state_dict.get("version"))
        layers = {layer.name: layer for layer in self._layers if layer.capture is not None}
        unknown = sorted(set(state_dict["layers"]) - set(layers))
        _check(not unknown, "state_dict layers", "layers that this preconditioner covers", unknown)
        for name, layer in layers.items():
            if (weight := layer.weight) is not None and (state := state_dict["layers"].get(name)):
                moved = {k: v.to(weight.device, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}
                self._store(layer, weight, moved)
        self._resume()

    def remove(self) -> None:
        """Take out all hooks and all state; the optimizer then steps as if there had been no preconditioner."""
        self._detach()
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                for key in [k for k in state if isinstance(k, str) and k.startswith(_STATE)]:
                    del state[key]
        self._layers, self._own_state, self._optimizer = [], {}, None

    # Reports

    def stats(self) -> dict[str, Any]:
        """What the last step did; reads from the device, so it waits for it.

        Keys: ``steps`` done; ``layers`` corrected and ``uncorrected`` in number; ``chunks`` in all; ``failed_chunks``, whose
        gradient was left as it is; ``max_damping`` used, NaN if no inverse was made; ``rows`` captured, by layer.
        """
        rows, chunks, failed, damping, corrected = {}, 0, 0, [], 0
        for layer in self._layers:
            if layer.capture is None or layer.capture.state is None:
                continue
            rows[layer.name] = int(layer.capture.state[layer.index, LAST])
            if layer.info is not None and (rows[layer.name] > 0 or self.every > 1 or self.decay > 0):
                bad = int((layer.info != 0).sum())
                corrected += bad < len(layer.info)
                chunks += len(layer.info)
                failed += bad
                if layer.damping is not None:
                    damping.append(float(layer.damping.max()))
        return {
            "steps": self._step,
            "layers": corrected,
            "uncorrected": len(self._layers) - corrected,
            "chunks": chunks,
            "failed_chunks": failed,
            "max_damping": max(damping, default=math.nan),
            "rows": rows,
        }

    def summary(self) -> str:
        """A table of all layers: type, units and chunks, rows of the last step, and what happens to the gradient."""
        return "\n".join([repr(self), *_table([self._summary_row(layer) for layer in self._layers])])

    def _summary_row(self, layer: _Layer) -> tuple[str, str, str, str, str]:
        module = layer.module()
        kind = "-" if module is None else type(module).__name__
        weight = layer.weight if layer.kind is not None else None
        rows = "-"
        if layer.capture is not None and layer.capture.state is not None:
            rows = str(int(layer.capture.state[layer.index, LAST]))
        division = "-"
        if layer.reason is None and weight is not None and not is_lazy(weight):
            units = layer.kind.view(weight).shape[1] + layer.joins_bias
            chunks = -(-units // self.chunk)
            groups = layer.kind.groups(module)
            division = f"{f'{groups} x ' if groups > 1 else ''}{units} -> {chunks} of {-(-units // chunks)}"
        return layer.name or "(model)", kind, division, rows, self._status(layer, weight, rows)

    def _status(self, layer: _Layer, weight: Tensor | None, rows: str) -> str:
        left = "; gradient left as it is"
        if layer.reason is not None:
            return layer.reason + left
        if weight is None:
            return "gone"
        if not self._owns(weight):
            return "not in the optimizer" + left
        if not weight.requires_grad:
            return "frozen"
        if layer.info is not None and (rows != "0" or self.every > 1 or self.decay > 0):
            bad = int((layer.info != 0).sum())
            return "ok" if bad == 0 else f"{bad} of {len(layer.info)} chunks failed{left}"
        if self._step == 0:
            return "waiting for the first step"
        if weight.grad is not None and not _is_plain(weight.grad):
            return "gradient is sparse or a tensor subclass" + left
        if not layer.module().training:
            return "in evaluation mode" + left
        return "no input seen in the last step" + left

    def __repr__(self) -> str:
        covered = sum(layer.capture is not None for layer in self._layers)
        damping = "schedule" if callable(self.damping) else f"{self.damping:g}"
        options = f"damping={damping}, scaling={self.scaling!r}, chunk={self.chunk}, max_rows={self.max_rows}"
        options += f", decay={self.decay:g}" * (self.decay > 0) + f", every={self.every}" * (self.every > 1)
        return f"Preconditioner({covered} of {len(self._layers)} layers, {options})"

    def __reduce__(self) -> tuple:
        raise TypeError("Preconditioner: must be constructed anew for a copied model, got a copy; use state_dict()")


def _detach(layers: list[_Layer], handles: list) -> None:
    for handle in handles:
        handle.remove()
    for layer in layers:
        if layer.capture is not None:
            layer.capture.remove()


def _check(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"Preconditioner: {name} must be {requirement}, got {value!r}")


def _check_damping(value: float, where: str = "") -> float:
    _check(isinstance(value, int | float) and 0 <= value < math.inf, "damping" + where, "a finite number >= 0", value)
    return float(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(grad: Tensor | None) -> bool:
    return grad is not None and type(grad) is Tensor and grad.layout is torch.strided


def _count_parameters(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
