"""``mode="whiten"``: the optimizer works in whitened coordinates of every layer's inputs.

With the damped running second moment ``A = L L^T`` of a layer's inputs, by chunks, the optimizer is given ``G L^-T``
in place of the gradient ``G``, and its displacement ``D`` of the weight is mapped back to ``D L^-1``. For plain SGD
this is the correction ``G A^-1`` itself. An optimizer that normalises its step (Adam, Muon) would largely normalise a
corrected gradient away, and the noise of a gradient is white only in these coordinates. For such an optimizer the
mapped displacement keeps the norm that the optimizer gave it; with ``keep_norm=False`` it is up to ``damping ** -0.5``
times as long.

Weight decay acts on the weight as it does without the preconditioner. Decoupled decay is left out of ``D``. Coupled
decay is a part of the gradient: ``decay (W L - W)`` is added to ``G L^-T``, so that with the optimizer's own
``decay W`` it becomes ``decay W L``, which maps back to ``decay W``. A layer whose gradient is zero takes the
optimizer's step as it is. With ``outputs=True`` the same is done from the left (``output_side.py``); with ``dct=True``
the optimizer has the cosine coefficients of kernels (``kernel_cosines.py``). The three maps act on different dimensions
of a weight, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from .. import ops
from ..ops.whitening import Layers, foreach_multiply_, foreach_unwhiten_, foreach_whiten_, foreach_whiten_by_
from ..reference import norm_scales
from .correction import Correction
from .digests import digest
from .dtensors import is_dtensor, redistributed, row_placements, sum_over_shards
from .kernel_cosines import Bases, KernelCosines, to_cosines
from .layer import Layer
from .layer_step import LayerStep
from .options import CorrectionOptions
from .output_side import Matrix, OutputSide, inverse_of_lower, whiten_outputs
from .state import StateStore

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Optimizers of torch whose weight decay multiplies the weight, by 1 - lr * weight_decay. Of all others in torch.optim a
# param group says so (`decoupled_weight_decay`), or the decay is added to the gradient.
_DECOUPLED: tuple[type[Optimizer], ...] = (AdamW, Adafactor, *filter(None, [getattr(torch.optim, "Muon", None)]))


@dataclass(eq=False)
class _Whitened:
    """The layers of one launch whose gradients were whitened, until the optimizer has made its step."""

    steps: list[LayerStep]
    launch: Layers
    factors: list[Tensor]  # L^-1 of every layer, (chunks, chunk, chunk)
    info: Tensor
    has_gradient: Tensor  # int32, one entry a layer
    # Before the step, after decoupled weight decay, in the order of `steps`; of a DTensor what this rank holds.
    weights: list[Tensor]
    biases: list[Tensor]
    sides: list[OutputSide | KernelCosines]
    sharded: bool  # whether a weight is a DTensor
    # Weights and biases where they lie, and the parameters that they are of with their addresses; empty if some are
    # copies.  An optimizer that writes in place leaves all that as it is.
    views: tuple[list[Tensor], list[Tensor]]
    owners: list[Tensor]
    places: list[int]

    def matrices(self, weights: list[Tensor], biases: list[Tensor]) -> list[Matrix]:
        """Every layer's weight with its joined bias."""
        of_layer = dict(zip(self.launch.biases, biases, strict=True))
        return [(weight, of_layer.get(i)) for i, weight in enumerate(weights)]

    def as_they_are_now(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and joined biases after the optimizer's step."""
        if self.places and [owner.data_ptr() for owner in self.owners] == self.places:
            return self.views
        return [_weight_of(step) for step in self.steps], [_bias_of(self.steps[i]) for i in self.launch.biases]

    def unwhiten_(
        self, now: list[Tensor], before: list[Tensor], biases: list[Tensor], *, keep_norm: bool, finish: bool = True
    ) -> Tensor:
        """Map the displacements ``now - before`` of the weights, and those of the biases, in place."""
        return foreach_unwhiten_(
            now,
            biases,
            before,
            self.biases,
            self.factors,
            self.info,
            self.has_gradient,
            self.launch,
            keep_norm=keep_norm,
            finish=finish,
        )

    def write_back(self, weights: list[Tensor]) -> None:
        """Give their weights to the layers whose type made copies of them."""
        for step, weight in zip(self.steps, weights, strict=True):
            if _is_copied(step):
                step.layer.kind.write_back(_module(step), weight, step.weight.detach())


class WhiteningCorrection(Correction):
    """Whitens gradients before the optimizer's step, and maps its displacements back after it.

    Args:
        options, store: as for :class:`Correction`; ``decay`` is that of the running average, the division is fixed.
        optimizer: makes the step in between.
    """

    shares_factorisation = False
    whitens = True

    def __init__(self, options: CorrectionOptions, store: StateStore, optimizer: Optimizer) -> None:
        super().__init__(options, store)
        self._optimizer = optimizer
        self._keeps_norm = options.keep_norm and not isinstance(optimizer, SGD)
        self._whitened: list[_Whitened] = []
        self._groups: dict[int, dict[str, Any]] = {}  # param group by id of the parameter
        self._is_coupled = False  # whether the optimizer adds weight decay to a gradient
        # By layer index, factor and info: of this step, if they are not stored; and of the last refresh, if they are.
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._lower: dict[int, tuple[Tensor, Tensor]] = {}  # by layer index, a factor L^-1 and its L
        self._cosines: Bases = {}

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
        groups = self._optimizer.param_groups
        self._groups = {id(p): group for group in groups for p in group["params"]}
        self._is_coupled = any(map(self._coupled_decay, groups))

    def run(self, steps: list[LayerStep]) -> None:
        if not self.refreshes(self.step):
            super().run(steps)
            return
        # Groups of a convolution have one average in several matrices, which goes by stages.
        alone = [step for step in steps if step.convolution_groups == 1 or self.options.decay == 0]
        if alone:
            self._refresh(alone)
        if len(alone) < len(steps):
            super().run([step for step in steps if step.convolution_groups > 1])

    def _refresh(self, steps: list[LayerStep]) -> None:
        """New factors from this step's rows, and whitened gradients, in one call."""
        launch, grads, bias_grads = self._launch_of(steps)
        averages = [self._running_average(step) for step in steps] if self.options.decay > 0 else []
        chunk = launch.chunk
        factors = [step.rows.new_zeros(self.num_chunks(step), chunk, chunk, dtype=step.compute_dtype) for step in steps]
        info, used, has_gradient = foreach_whiten_(
            grads,
            bias_grads,
            [step.rows for step in steps],
            [step.count for step in steps],
            [total for total, _ in averages],
            [weight for _, weight in averages],
            factors,
            launch,
            damping=self.damping(),
            scaling=self.options.scaling,
            decay=float(self.options.decay),
            max_rows=self.options.max_rows,
        )
        self.remember_inverses(steps, factors, info, used)
        self._hold(steps, launch, factors, info, has_gradient)

    def _running_average(self, step: LayerStep) -> tuple[Tensor, Tensor]:
        """Running sum of covariances and its weight, which the call changes in place."""
        layer, chunk = step.layer, self.chunk_of(step.units, step.convolution_groups)
        shape = self.num_chunks(step), chunk, chunk
        layer.inverse_units, fits = step.units, step.units_unchanged
        total, weight = self._store.running_sum(layer, shape, step.compute_dtype, step.rows.device, fits=fits)
        layer.pending.update(covariance=total, weight=weight)
        return total, weight

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
        self.record_outcome(steps, info, used)
        stored = self.options.every > 1
        for step, inverse in zip(steps, inverses, strict=True):
            layer = step.layer
            assert layer.info is not None
            pair = inverse, layer.info
            if stored:
                layer.pending.update(inverse=inverse, info=pair[1])
                self._kept[layer.index] = pair
            else:
                self._fresh[layer.index] = pair

    def retire_inverse(self, layer: Layer) -> None:
        """The division is fixed, so the factor of earlier rows still fits."""

    def stored_inverse(self, step: LayerStep) -> tuple[Tensor, Tensor] | None:
        layer = step.layer
        if (fresh := self._fresh.get(layer.index)) is not None:
            return fresh
        if (kept := self._kept.get(layer.index)) is not None:
            current = layer.pending.get("inverse") is kept[0] or self._store.holds(layer, "inverse", kept[0])
            fits = kept[0].dtype == step.compute_dtype and kept[0].shape[0] == self.num_chunks(step)
            if current and fits and step.units_unchanged:
                return kept
        return super().stored_inverse(step)

    def apply_stored(self, steps: list[LayerStep]) -> None:
        """Whiten the gradients by the stored factors. A layer that has none waits for the next refresh."""
        ready, factors, infos = [], [], []
        for step in steps:
            if (stored := self.stored_inverse(step)) is not None:
                factor, info = stored
                step.layer.info_slice = info, 0, info.shape[0]
                ready.append(step)
                factors.append(factor)
                infos.append(info)
        if ready:
            launch, grads, bias_grads = self._launch_of(ready)
            info = torch.cat(infos)
            self._hold(ready, launch, factors, info, foreach_whiten_by_(grads, bias_grads, factors, info, launch))

    def _launch_of(self, steps: list[LayerStep]) -> tuple[Layers, list[Tensor], list[Tensor]]:
        """What the calls for these layers have in common, and their gradients."""
        options, chunk = self.options, self.chunk_of(steps[0].units, steps[0].convolution_groups)
        if options.group is None:
            of_type = {dtype: ops.default_group(dtype, chunk) for dtype in {step.grad.dtype for step in steps}}
            groups = [of_type[step.grad.dtype] for step in steps]
        else:
            groups = [min(options.group, chunk)] * len(steps)
        joined = [(i, step.bias_grad) for i, step in enumerate(steps) if step.bias_grad is not None]
        indices = [step.layer.index for step in steps]
        launch = Layers([i for i, _ in joined], indices, groups, chunk, options.seed, self.division_step)
        return launch, [step.grad for step in steps], [bias_grad for _, bias_grad in joined]

    def _hold(
        self, steps: list[LayerStep], launch: Layers, factors: list[Tensor], info: Tensor, has_gradient: Tensor
    ) -> None:
        """Keep what is needed after the optimizer's step, and give the optimizer the coupled decay that it must see."""
        sharded = any(is_dtensor(step.weight) for step in steps)
        if sharded:
            flags = sum_over_shards([step.weight for step in steps], list(has_gradient.unbind()))
            has_gradient = torch.stack(flags)
        sides: list[OutputSide | KernelCosines] = []
        if self.options.outputs:
            damping = self.last_damping if self.refreshes(self.step) else None
            sides += whiten_outputs(steps, has_gradient, self._store, self.options, self.chunk_of, damping)
        if self.options.dct:
            sides += to_cosines(steps, has_gradient, self._cosines)
        biased = [steps[i] for i in launch.biases]
        weights, biases = [_weight_of(step) for step in steps], [_bias_of(step) for step in biased]
        owners = [*(step.weight for step in steps), *(_bias_parameter(step) for step in biased)]
        before = self._decayed([*weights, *biases], owners)
        count = len(steps)
        moves = sharded or any(map(_is_copied, steps))
        whitened = _Whitened(
            steps,
            launch,
            factors,
            info,
            has_gradient,
            before[:count],
            before[count:],
            sides,
            sharded,
            (weights, biases),
            owners,
            [] if moves else [owner.data_ptr() for owner in owners],
        )
        self._whitened.append(whitened)
        if self._is_coupled:
            coupled = [self._coupled_decay(self._groups.get(id(owner), {})) for owner in owners]
            if any(coupled):
                self._add_coupled_decay(whitened, coupled)

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        ours = type(self._optimizer).__module__.startswith("torch.optim")
        return bool(group.get("decoupled_weight_decay", isinstance(self._optimizer, _DECOUPLED) or not ours))

    def _coupled_decay(self, group: dict[str, Any]) -> float:
        decay: float = group.get("weight_decay", 0.0)
        if not decay or self._is_decoupled(group):
            return 0.0
        return -decay if group.get("maximize", False) else decay

    def _decayed(self, tensors: list[Tensor], owners: list[Tensor]) -> list[Tensor]:
        """Copies of the tensors, parts of the parameters ``owners``, as decoupled weight decay will leave them."""
        copies: list[Tensor] = [tensors[0]] * len(tensors)
        of_group: dict[int, list[int]] = {}
        for i, owner in enumerate(owners):
            of_group.setdefault(id(self._groups.get(id(owner))), []).append(i)
        for some in of_group.values():
            group = self._groups.get(id(owners[some[0]]), {})
            decay = group.get("weight_decay", 0.0) if self._is_decoupled(group) else 0.0
            # Rounded as the optimizers of torch round it.
            scaled = torch._foreach_mul([tensors[i] for i in some], 1 - group.get("lr", 0.0) * decay if decay else 1.0)
            for i, copy in zip(some, scaled, strict=True):
                copies[i] = copy if copy.stride() == tensors[i].stride() else _with_strides_of(tensors[i], copy)
        return copies

    def _add_coupled_decay(self, whitened: _Whitened, decays: list[float]) -> None:
        """Replace the ``decay W`` that the optimizer will add to the gradient by ``decay W L``."""
        steps, launch, count = whitened.steps, whitened.launch, len(whitened.steps)
        tensors = [*map(_rows_of, steps, whitened.weights), *whitened.biases]
        dtype = whitened.factors[0].dtype
        added = [tensor.to(dtype) * decay for tensor, decay in zip(tensors, decays, strict=True)]
        mapped = [tensor.clone() for tensor in added]
        lower = [self._lower_factor(s.layer.index, f) for s, f in zip(steps, whitened.factors, strict=True)]
        foreach_multiply_(mapped[:count], mapped[count:], lower, whitened.info, launch)
        matrices = whitened.matrices(mapped[:count], mapped[count:])
        for side in whitened.sides:
            side.multiply_(matrices)
        grads = [*(step.grad for step in steps), *(steps[i].bias_grad for i in launch.biases)]
        flags = (whitened.has_gradient > 0).unbind()
        flags = (*flags, *(flags[i] for i in launch.biases))
        for grad, flag, there, here in zip(grads, flags, mapped, added, strict=True):
            assert grad is not None
            grad.add_(torch.where(flag, there - here, 0).to(grad.dtype))

    def _lower_factor(self, index: int, factor: Tensor) -> Tensor:
        """``L`` from ``L^-1``, made once a refresh; of chunks that were given up anything."""
        known = self._lower.get(index)
        if known is None or known[0] is not factor:
            known = self._lower[index] = factor, inverse_of_lower(factor)
        return known[1]

    def _map_sides_back(
        self, whitened: _Whitened, weights: list[Tensor], before: list[Tensor], biases: list[Tensor]
    ) -> None:
        if not whitened.sides:
            return
        now, old = whitened.matrices(weights, biases), whitened.matrices(before, whitened.biases)
        for side in whitened.sides:
            side.map_back_(now, old, keep_norm=self._keeps_norm)

    # After the optimizer's step

    @torch.no_grad()
    def finish_step(self, layers: list[Layer]) -> None:
        for whitened in self._whitened:
            if whitened.sharded:
                self._map_back_over_ranks(whitened)
            else:
                self._map_back(whitened)
        self._whitened.clear()
        self._fresh.clear()
        super().finish_step(layers)

    def _map_back(self, whitened: _Whitened) -> None:
        """Replace every displacement ``D`` by ``D L^-1``, with the norm of ``D`` where it is kept."""
        weights, biases = whitened.as_they_are_now()
        self._map_sides_back(whitened, weights, whitened.weights, biases)
        whitened.unwhiten_(weights, whitened.weights, biases, keep_norm=self._keeps_norm)
        whitened.write_back(weights)

    def _map_back_over_ranks(self, whitened: _Whitened) -> None:
        """The same where ranks hold parts of the weights: the norms are those of all parts."""
        steps = whitened.steps
        weights, biases = whitened.as_they_are_now()
        # Of a layer whose units are dealt to ranks the rows of the displacement are gathered, and dealt again.
        exchanged = {i for i, step in enumerate(steps) if weights[i].shape != step.grad.shape}
        rows, rows_before = list(weights), list(whitened.weights)
        for i in exchanged:
            rows[i] = _rows_of(steps[i], weights[i] - whitened.weights[i])
            rows_before[i] = torch.zeros_like(rows[i])
        self._map_sides_back(whitened, rows, rows_before, biases)
        squares = whitened.unwhiten_(rows, rows_before, biases, keep_norm=self._keeps_norm, finish=False)
        if self._keeps_norm:
            scales = norm_scales(torch.stack(sum_over_shards([s.weight for s in steps], list(squares.unbind()))))
        else:
            scales = torch.ones_like(squares[:, 0])
        moved = whitened.has_gradient > 0

        def finish(i: int, now: Tensor, move: Tensor, before: Tensor) -> None:
            new = before + (move * scales[i].to(move.dtype)).to(before.dtype)
            now.copy_(torch.where(moved[i], new, now))

        for i, (step, weight, before) in enumerate(zip(steps, weights, whitened.weights, strict=True)):
            finish(i, weight, _units_of(step, rows[i]) if i in exchanged else weight, before)
        for i, bias, before in zip(whitened.launch.biases, biases, whitened.biases, strict=True):
            finish(i, bias, bias, before)
        whitened.write_back(weights)


def _module(step: LayerStep) -> nn.Module:
    module = step.layer.module()
    assert module is not None
    return module


def _is_copied(step: LayerStep) -> bool:
    """Whether :func:`_weight_of` is a copy, which must be written back."""
    kind = step.layer.kind
    return kind.groups is not None and kind.copies(_module(step))  # no other has one


def _weight_of(step: LayerStep) -> Tensor:
    """What this rank holds of the weight, in the shape of its gradient; a copy where the layer's type says so."""
    return step.layer.kind.local_view(_module(step), step.weight.detach())


def _bias_parameter(step: LayerStep) -> Tensor:
    assert step.layer.kind.bias is not None
    bias = _module(step)._parameters[step.layer.kind.bias]
    assert bias is not None
    return bias


def _bias_of(step: LayerStep) -> Tensor:
    return step.layer.kind.local_bias_view(_bias_parameter(step).detach())


def _with_strides_of(like: Tensor, values: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(values)


def _rows_of(step: LayerStep, part: Tensor) -> Tensor:
    """A part of the weight as the whole rows that the gradient of this rank has."""
    if part.shape == step.grad.shape:
        return part
    view = cast("DTensor", step.layer.kind.view(_module(step), step.weight.detach()))
    return redistributed(part, view, view.placements, row_placements(view))


def _units_of(step: LayerStep, rows: Tensor) -> Tensor:
    """The opposite of :func:`_rows_of`."""
    view = cast("DTensor", step.layer.kind.view(_module(step), step.weight.detach()))
    return redistributed(rows, view, row_placements(view), view.placements)
