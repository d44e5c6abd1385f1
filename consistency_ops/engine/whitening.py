"""``mode="whiten"``: the optimizer works in whitened coordinates of every layer's inputs.

With the damped running second moment ``A = L L^T`` of a layer's inputs, by chunks, the optimizer is given ``G L^-T``
in place of the gradient ``G``, and its displacement ``D`` of the weight is mapped back to ``D L^-1``. For plain SGD
this is the correction ``G A^-1`` itself. An optimizer that normalises its step (Adam, Muon) would largely normalise a
corrected gradient away, and the noise of a gradient is white only in these coordinates. For such an optimizer the
mapped displacement keeps the norm that the optimizer gave it, so that the learning rate keeps its meaning.

Weight decay acts on the weight as it does without the preconditioner. Decoupled decay is left out of ``D``. Coupled
decay is a part of the gradient: ``decay (W L - W)`` is added to ``G L^-T``, so that with the optimizer's own
``decay W`` it becomes ``decay W L``, which maps back to ``decay W``. A layer whose gradient is zero takes the
optimizer's step as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from .. import ops
from .correction import Correction, CorrectionOptions, largest
from .digests import digest
from .dtensors import sum_over_shards
from .layer import Layer
from .layer_step import LayerStep
from .state import StateStore

# Optimizers of torch whose weight decay multiplies the weight, by 1 - lr * weight_decay. Of all others in torch.optim a
# param group says so (`decoupled_weight_decay`), or the decay is added to the gradient.
_DECOUPLED: tuple[type[Optimizer], ...] = (AdamW, Adafactor, *filter(None, [getattr(torch.optim, "Muon", None)]))


@dataclass(eq=False)
class _Whitened:
    """A layer whose gradient was whitened, until the optimizer has made its step."""

    step: LayerStep
    parameters: list[Tensor]  # this rank's part of the weight as a matrix, and of the bias
    before: list[Tensor]  # their values before the step, after decoupled weight decay
    factor: Tensor  # L^-1, (chunks, chunk, chunk)
    info: Tensor
    no_gradient: Tensor  # whether the gradient was zero; one element


class WhiteningCorrection(Correction):
    """Whitens gradients before the optimizer's step, and maps its displacements back after it.

    Args:
        options, store: as for :class:`Correction`; ``decay`` is that of the running average, the division is fixed.
        optimizer: makes the step in between.
    """

    shares_factorisation = False
    exchanges_units = False

    def __init__(self, options: CorrectionOptions, store: StateStore, optimizer: Optimizer) -> None:
        super().__init__(options, store)
        self._optimizer = optimizer
        self._keeps_norm = options.keep_norm and not isinstance(optimizer, SGD)
        self._whitened: list[_Whitened] = []
        self._groups: dict[int, dict[str, Any]] = {}  # param group by id of the parameter
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}  # factor and info of this step by layer index, if not stored

    @property
    def stores_matrices(self) -> bool:
        return True

    @property
    def division_step(self) -> int:
        return 0

    def division_digest(self, layer: Layer) -> int:
        return digest((super().division_digest(layer), "whiten"))

    # Before the optimizer's step

    def begin_step(self) -> None:
        self._whitened.clear()
        self._fresh.clear()
        self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}

    def from_covariances(self, steps: list[LayerStep], covariances: list[Tensor]) -> None:
        self.remember_inverses(steps, *self.invert(steps, covariances))
        self.apply_stored(steps)

    def invert(self, steps: list[LayerStep], covariances: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """``L^-1`` of every chunk, info and the damping used."""
        return ops.foreach_inverse(
            covariances,
            units=[step.units for step in steps],
            damping=self.damping(),
            scaling=self.options.scaling,
            chunk=self._launch(steps)[0],
            triangular=True,
        )

    def remember_inverses(self, steps: list[LayerStep], inverses: Sequence[Tensor], info: Tensor, used: Tensor) -> None:
        if self.options.every > 1:
            super().remember_inverses(steps, inverses, info, used)
            return
        self.record_outcome(steps, info, used)
        for step, inverse in zip(steps, inverses, strict=True):
            assert step.layer.info is not None
            self._fresh[step.layer.index] = inverse, step.layer.info

    def stored_inverse(self, step: LayerStep) -> tuple[Tensor, Tensor] | None:
        return self._fresh.get(step.layer.index) or super().stored_inverse(step)

    def apply_stored(self, steps: list[LayerStep]) -> None:
        """Whiten the gradients by the stored factors. A layer that has none waits for the next refresh."""
        ready = []
        for step in steps:
            if (stored := self.stored_inverse(step)) is not None:
                factor, info = stored
                step.layer.info_slice = info, 0, len(info)
                ready.append(self._before(step, factor, info))
        if not ready:
            return
        self._multiply(ready, [w.step.gradients for w in ready], [w.factor.mT.contiguous() for w in ready])
        self._add_coupled_decay([w for w in ready if self._coupled_decay(w.step)])
        self._whitened += ready

    def _before(self, step: LayerStep, factor: Tensor, info: Tensor) -> _Whitened:
        module = step.layer.module()
        assert module is not None
        parameters = [step.layer.kind.local_view(module, step.weight.detach())]
        if step.bias_grad is not None:
            parameters.append(step.layer.kind.local_bias_view(_bias(step, module).detach()))
        before = [self._decayed(parameter, step) for parameter in parameters]
        return _Whitened(step, parameters, before, factor, info, largest(step.gradients) == 0)

    def _group(self, step: LayerStep) -> dict[str, Any]:
        return self._groups.get(id(step.weight), {})

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        ours = type(self._optimizer).__module__.startswith("torch.optim")
        return bool(group.get("decoupled_weight_decay", isinstance(self._optimizer, _DECOUPLED) or not ours))

    def _coupled_decay(self, step: LayerStep) -> float:
        group = self._group(step)
        return 0.0 if self._is_decoupled(group) else group.get("weight_decay", 0.0)

    def _decayed(self, parameter: Tensor, step: LayerStep) -> Tensor:
        """A copy of the parameter in the compute type, as decoupled weight decay will leave it."""
        group = self._group(step)
        copy = parameter.to(step.rows.dtype, copy=True)
        decay = group.get("weight_decay", 0.0) if self._is_decoupled(group) else 0.0
        return copy.mul_(1 - group["lr"] * decay) if decay else copy

    def _add_coupled_decay(self, whitened: list[_Whitened]) -> None:
        """Replace the ``decay W`` that the optimizer will add to the gradient by ``decay W L``."""
        if not whitened:
            return
        mapped = [[before.clone() for before in w.before] for w in whitened]
        self._multiply(whitened, mapped, [_unwhitening(w.factor) for w in whitened])
        for w, weights in zip(whitened, mapped, strict=True):
            decay = self._coupled_decay(w.step)
            decay = -decay if self._group(w.step).get("maximize", False) else decay
            for grad, weight, before in zip(w.step.gradients, weights, w.before, strict=True):
                grad.add_(torch.where(w.no_gradient, 0, weight - before).to(grad.dtype), alpha=decay)

    # After the optimizer's step

    @torch.no_grad()
    def finish_step(self, layers: list[Layer]) -> None:
        if self._whitened:
            self._map_back(self._whitened)
            self._whitened.clear()
            self._fresh.clear()
        super().finish_step(layers)

    def _map_back(self, whitened: list[_Whitened]) -> None:
        """Replace every displacement ``D`` by ``D L^-1``, with the norm of ``D`` where the optimizer normalises."""
        moves = [[p - before for p, before in zip(w.parameters, w.before, strict=True)] for w in whitened]
        old = [_sum_of_squares(move) for move in moves]
        self._multiply(whitened, moves, [w.factor for w in whitened])
        sums = [
            torch.stack([squares, _sum_of_squares(move), ~w.no_gradient])
            for w, squares, move in zip(whitened, old, moves, strict=True)
        ]
        sums = sum_over_shards([w.step.weight for w in whitened], sums)
        for w, move, (before_squares, squares, gradients) in zip(whitened, moves, sums, strict=True):
            if self._keeps_norm:
                ratio = (before_squares / squares).sqrt()
                torch._foreach_mul_(move, torch.where((squares > 0) & ratio.isfinite(), ratio, 1))
            torch._foreach_add_(move, w.before)
            for parameter, moved in zip(w.parameters, move, strict=True):
                # A layer without a gradient keeps the optimizer's step, weight decay included, bit for bit.
                parameter.copy_(torch.where(gradients > 0, moved.to(parameter.dtype), parameter))
            module = w.step.layer.module()
            if module is not None and w.step.layer.kind.copies(module):
                w.step.layer.kind.write_back(module, w.parameters[0], w.step.weight.detach())

    def _multiply(self, whitened: list[_Whitened], tensors: list[list[Tensor]], matrices: list[Tensor]) -> None:
        """Multiply weight-shaped (and bias-shaped) ``tensors`` of every layer by ``matrices``, chunk by chunk."""
        batches: dict[tuple[torch.device, torch.dtype, torch.dtype, int], list[int]] = {}
        for i, (w, matrix) in enumerate(zip(whitened, matrices, strict=True)):
            chunk = self.chunk_of(w.step.units)
            batches.setdefault((matrix.device, matrix.dtype, w.step.grad.dtype, chunk), []).append(i)
        for (_, _, dtype, chunk), some in batches.items():
            # The division depends on the dtype of the gradient, whatever the dtype of the tensors here.
            group = ops.default_group(dtype, chunk) if self.options.group is None else min(self.options.group, chunk)
            ops.foreach_apply_(
                [tensors[i][0] for i in some],
                [matrices[i] for i in some],
                torch.cat([whitened[i].info for i in some]),
                bias_grads=[tensors[i][1] if len(tensors[i]) > 1 else None for i in some],
                chunk=chunk,
                group=group,
                seed=self.options.seed,
                step=self.division_step,
                layers=[whitened[i].step.layer.index for i in some],
                triangular=True,
            )


def _bias(step: LayerStep, module: nn.Module) -> Tensor:
    assert step.layer.kind.bias is not None
    bias = module._parameters[step.layer.kind.bias]
    assert bias is not None
    return bias


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _unwhitening(factor: Tensor) -> Tensor:
    """``L`` from ``L^-1``; the identity where padding and chunks that were given up have zeros."""
    eye = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    diagonal = (factor.diagonal(dim1=1, dim2=2) == 0).to(factor.dtype)
    factor = factor + torch.diag_embed(diagonal)
    result: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return result.contiguous()
