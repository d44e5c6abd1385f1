"""The arithmetic of the preconditioner: covariance, average, factor, apply, for the layers of one step.

:class:`Correction` is the interface of the engine. It is given options once and :class:`LayerStep` lists in every
step, and knows neither the optimizer's hooks nor other ranks. ``Preconditioner`` uses it for the layers that one
process holds alone, ``distributed.pooling`` for those that ranks share, ``optim.SGD2`` with another choice of chunks,
and the reports read from it what the last step did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..ops.correction import launch_correction
from ..ops.library import torch_abi
from .digests import digest
from .dtensors import is_dtensor
from .layer import Layer
from .layer_step import LayerStep, in_order_of_input
from .options import CorrectionOptions, check_damping
from .state import StateStore

GATHERING_STEPS = 20  # first steps, in which a running average is too young to be reused


class Correction:
    """Corrects gradients by the inverse damped second moment of the inputs, as the options say.

    Args:
        options: how.
        store: where covariances and inverses are kept from step to step.
    """

    pools = True  # whether ranks can pool the covariances
    whitens = False  # whether displacements are mapped back
    shares_factorisation = True  # whether ranks can deal the chunks among them

    def __init__(self, options: CorrectionOptions, store: StateStore) -> None:
        self.options = options
        self.step: int = 0  # number of finished steps
        self.last_damping: float = math.nan  # of the last inversion, before retries
        self.last_division_step: int = 0  # the step whose division the last inversion had
        self._store = store
        self._divisions: dict[tuple[int, int], Tensor] = {}  # what the store keeps of a division and its units

    # Which layers, which steps

    @property
    def stores_matrices(self) -> bool:
        """Whether a layer's covariance or inverse outlives the step."""
        return self.options.every > 1 or self.options.decay > 0

    @property
    def reuses_batches(self) -> bool:
        """Whether the inverse of one batch serves several steps; a layer without rows in the first of them waits."""
        return self.options.every > 1 and self.options.decay == 0

    def begin_step(self) -> None:
        """Forget what an abandoned step has left; called before the gradients of a step are looked at."""

    def declines(self, layer: Layer) -> str | None:
        """Why a layer of a known type is left alone, or None."""
        return None

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        """Hooks of its own that the correction needs on a layer."""
        return []

    def chunk_of(self, units: int, groups: int = 1) -> int:
        """Largest chunk for a layer of so many units, the bias included. Layers of one launch must have the same.

        The kernels have one size of chunk for all layers, and stored matrices are padded to it. Wider matrices are as
        large as the layer, and so are those of convolution ``groups`` that are kept: there are hundreds of them in a
        depthwise layer, with a unit or two each. The division of the units is the same.
        """
        chunk = self.options.chunk
        padded = chunk is not None and chunk <= ops.MAX_CHUNK and not (groups > 1 and self.stores_matrices)
        return chunk if chunk is not None and padded else min(chunk or units, units)

    def _launch(self, steps: list[LayerStep]) -> tuple[int, int | None]:
        """Chunk and group of a launch for these layers."""
        chunk, group = self.chunk_of(steps[0].units, steps[0].convolution_groups), self.options.group
        return chunk, None if group is None else min(group, chunk)

    def refreshes(self, step: int) -> bool:
        """Whether a step captures and inverts. Its number alone decides: ranks, resumed and compiled models agree."""
        options = self.options
        return step % options.every == 0 or (options.decay > 0 and step < GATHERING_STEPS)

    @property
    def division_step(self) -> int:
        """The second argument of the random division: the division changes with every refresh, or never (``decay``)."""
        return 0 if self.options.decay > 0 else self.step - self.step % self.options.every

    def num_chunks(self, step: LayerStep) -> int:
        units, groups = step.units, step.convolution_groups
        return groups * -(-units // self.chunk_of(units, groups))

    def division_digest(self, layer: Layer) -> int:
        """Everything that decides which units stand where in the stored matrices of a layer, but their number."""
        options, weight = self.options, layer.weight
        assert weight is not None
        group = ops.default_group(weight.dtype, options.chunk or 0) if options.group is None else options.group
        return digest((options.seed, options.chunk, group, layer.index, 0 if options.decay > 0 else options.every))

    def was_corrected(self, layer: Layer) -> bool:
        """Whether the last step corrected this layer. A stored inverse needs no rows. Waits for the device."""
        return layer.info is not None and (self.stores_matrices or layer.captured_rows() > 0)

    # The whole correction

    def run(self, steps: list[LayerStep]) -> None:
        """Correct the gradients of layers that are on one device, in one precision, with one :meth:`chunk_of`."""
        if not self.stores_matrices:
            self.fused(steps, *self._launch(steps))
            return
        if not self.refreshes(self.step):
            late = [step for step in steps if _has_waited(step)]
            if late:
                self._from_rows(late)
                steps = [step for step in steps if step not in late]
            self.apply_stored(steps)
            return
        self._from_rows(steps)

    def _from_rows(self, steps: list[LayerStep]) -> None:
        """Correct by the rows of this step, and by the average if there is one."""
        covariances = self.covariances(steps)
        # A covariance of NaN fails to factor, and a chunk that fails keeps its gradient: no rows, no correction.
        if self.options.decay > 0:
            covariances = self._averages(steps, covariances)
        else:
            for i, step in enumerate(steps):
                covariances[i] = torch.where(step.count.view(1, 1, 1) > 0, covariances[i], math.nan)
        self.from_covariances(steps, covariances)

    def fused(self, steps: list[LayerStep], chunk: int, group: int | None) -> None:
        """Covariance, factor and correction of this step's rows in one launch; nothing is kept."""
        captures = (step.layer.capture for step in steps)
        if any(capture is not None and capture.source is not None for capture in captures):
            steps = in_order_of_input(steps)
        options = self.options
        joined = [(i, step.bias_grad) for i, step in enumerate(steps) if step.bias_grad is not None]
        info, used = launch_correction(
            [step.grad for step in steps],
            [step.rows for step in steps],
            bias_grads=[bias_grad for _, bias_grad in joined],
            bias_layers=[i for i, _ in joined],
            permutations=[],
            permutation_layers=[],
            row_counts=[step.count for step in steps],
            row_count_layers=list(range(len(steps))),
            layers=[step.division_id for step in steps],
            damping=self.damping(),
            scaling=options.scaling,
            chunk=chunk,
            group=group,
            max_rows=options.max_rows,
            seed=options.seed,
            step=self.step,
        )
        self.record_outcome(steps, info, used)

    def from_covariances(self, steps: list[LayerStep], covariances: list[Tensor]) -> None:
        """Correct by these covariances. Only the steps that follow, if any reuse them, need the inverses."""
        if self.options.every > 1:
            self.remember_inverses(steps, *self.invert(steps, covariances))
            self.apply_stored(steps)
            return
        chunk, group = self._launch(steps)
        info, used = ops.foreach_correct_(
            [step.grad for step in steps],
            covariances,
            bias_grads=[step.bias_grad for step in steps],
            damping=self.damping(),
            scaling=self.options.scaling,
            chunk=chunk,
            group=group,
            seed=self.options.seed,
            step=self.division_step,
            layers=[step.layer.index for step in steps],
        )
        self.record_outcome(steps, info, used)

    # Its stages

    def covariances(self, steps: list[LayerStep]) -> list[Tensor]:
        """The second moments of the rows captured here, (chunks, chunk, chunk) per layer."""
        return self.covariances_of(
            rows=[step.rows for step in steps],
            row_counts=[step.count for step in steps],
            matrices=[step.grad for step in steps],
            biases=[step.bias_grad is not None for step in steps],
            division_step=self.division_step,
            division_ids=[step.layer.index for step in steps],
            chunk=self._launch(steps)[0],
        )

    def covariances_of(
        self,
        rows: list[Tensor],
        row_counts: list[Tensor],
        matrices: list[Tensor],
        biases: list[bool],
        division_step: int,
        division_ids: list[int],
        chunk: int,
    ) -> list[Tensor]:
        """The second moments of any rows, in any division: those of a step that is over, for reports."""
        group = self.options.group
        return ops.foreach_covariance(
            rows,
            grads=matrices,
            bias=biases,
            chunk=chunk,
            group=None if group is None else min(group, chunk),
            max_rows=self.options.max_rows,
            seed=self.options.seed,
            step=division_step,
            layers=division_ids,
            row_counts=row_counts,
        )

    def average(self, step: LayerStep, count: Tensor, covariance: Tensor) -> Tensor:
        """The bias-corrected running covariance after this step; NaN before anything has entered it.

        Args:
            step: the layer. Inf or NaN in its gradient keeps the covariance out of the average.
            count: rows behind ``covariance``; 0 keeps it out, too.
            covariance: of this step.
        """
        decay = self.options.decay
        old, weight = self._stored_sum(step, covariance)
        if old is None or weight is None:
            old, weight = torch.zeros_like(covariance), covariance.new_zeros(1)
        old, weight = old.to(covariance), weight.to(covariance)  # the layer may have had another dtype
        enters = are_finite([covariance, *step.gradients]) & (count > 0)
        weight = torch.where(enters, decay * weight + (1 - decay), weight)
        total = torch.where(enters, decay * old + (1 - decay) * covariance, old)
        step.layer.pending.update(covariance=total, weight=weight)
        step.layer.inverse_units = step.units
        return total / weight

    def _stored_sum(self, step: LayerStep, covariance: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The running sum of covariances and that of its weights; None where there is none that fits."""
        old, weight = (self._store.one(step.layer, key) for key in ("covariance", "weight"))
        if old is None or weight is None or old.shape != covariance.shape or not step.units_unchanged:
            return None, None
        return old, weight

    def _averages(self, steps: list[LayerStep], covariances: list[Tensor]) -> list[Tensor]:
        """:meth:`average` of all layers, in one call where that can be (``csrc/torch_abi/average.cpp``)."""
        found, update = None, getattr(torch_abi, "update_averages", None)
        if update is not None:
            olds, weights = zip(*map(self._stored_sum, steps, covariances), strict=True)
            counts, gradients = [step.count for step in steps], [step.gradients for step in steps]
            decay = float(self.options.decay)
            found = update(decay, covariances, list(olds), list(weights), counts, gradients)
        if found is None:
            return [self.average(s, s.count, covariance) for s, covariance in zip(steps, covariances, strict=True)]
        for step, (total, weight, _) in zip(steps, found, strict=True):
            step.layer.pending.update(covariance=total, weight=weight)
            step.layer.inverse_units = step.units
        return [average for _, _, average in found]

    def stored_average(self, layer: Layer) -> Tensor:
        """The bias-corrected running covariance as it is stored; ``decay > 0`` only."""
        state = self._store.get(layer)
        return state["covariance"] / state["weight"]

    def invert(self, steps: list[LayerStep], covariances: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Inverses, info and the damping used, as :func:`consistency_ops.ops.foreach_inverse`."""
        return ops.foreach_inverse(
            covariances,
            units=[step.units for step in steps],
            damping=self.damping(),
            scaling=self.options.scaling,
            chunk=self._launch(steps)[0],
        )

    def remember_inverses(self, steps: list[LayerStep], inverses: Sequence[Tensor], info: Tensor, used: Tensor) -> None:
        """Keep the inverses for the steps up to the next refresh."""
        self.record_outcome(steps, info, used)
        for step, inverse in zip(steps, inverses, strict=True):
            assert step.layer.info is not None
            step.layer.pending.update(inverse=inverse, info=step.layer.info)

    def apply_stored(self, steps: list[LayerStep]) -> None:
        """Multiply by the stored inverses. A layer that has none waits for the next refresh."""
        ready: list[tuple[LayerStep, Tensor, Tensor]] = []
        for step in steps:
            if (stored := self.stored_inverse(step)) is not None:
                inverse, info = stored
                step.layer.info_slice = info, 0, len(info)
                ready.append((step, inverse, info))
        if ready:
            chunk, group = self._launch(steps)
            ops.foreach_apply_(
                [step.grad for step, _, _ in ready],
                [inverse for _, inverse, _ in ready],
                torch.cat([info for _, _, info in ready]),
                bias_grads=[step.bias_grad for step, _, _ in ready],
                chunk=chunk,
                group=group,
                seed=self.options.seed,
                step=self.division_step,
                layers=[step.layer.index for step, _, _ in ready],
            )

    def stored_inverse(self, step: LayerStep) -> tuple[Tensor, Tensor] | None:
        """Inverse and info of the last refresh, or None if there is none that fits the layer as it is now."""
        inverse, info = (self._store.newest(step.layer, key) for key in ("inverse", "info"))
        if inverse is None or info is None or not step.units_unchanged:
            return None
        if len(inverse) != self.num_chunks(step):
            return None
        return inverse.to(step.compute_dtype), info.to(torch.int32)  # where a load has cast them, or the model changed

    def state_between_refreshes(self) -> dict[Tensor, dict[str, Any]] | None:
        """The optimizer's state, if this step only applies the inverses there, and nothing else is to be looked up."""
        return None if self.refreshes(self.step) else self._store.plain_state()

    def has_inverse(self, layer: Layer) -> bool:
        """Whether a chunk of the stored inverse can be used. Waits for the device."""
        info = self._store.get(layer).get("info")
        return info is not None and not bool(info.all())

    def retire_inverse(self, layer: Layer) -> None:
        """Let the stored inverse count as failed. It keeps its place: a checkpoint is read into what is there."""
        info = self._store.get(layer).get("info")
        if info is not None:
            self._store.put(layer, "info", torch.ones_like(info))

    def damping(self) -> float:
        """The damping of this step; call it once for every inversion, because reports show the last one.

        Raises:
            ValueError: the user's function of the step returned something else than a finite number >= 0.
        """
        value = self.options.damping
        if callable(value):
            value = check_damping(value(self.step), f" at step {self.step}")
        self.last_damping, self.last_division_step = value, self.division_step
        return value

    # What is kept

    def record_outcome(self, steps: list[LayerStep], info: Tensor, used: Tensor) -> None:
        """Note for every layer which entries of ``info`` and of the damping used are its own."""
        begin = chunks = 0
        sizes = -1, -1  # of the layer before, which often are those of the next
        for step in steps:
            if (step.units, step.convolution_groups) != sizes:
                sizes, chunks = (step.units, step.convolution_groups), self.num_chunks(step)
            end, layer = begin + chunks, step.layer
            layer.info_slice, layer.damping_slice = (info, begin, end), (used, begin, end)
            layer.inverse_units, layer.division_id = step.units, step.division_id
            begin = end

    def finish_step(self, layers: list[Layer]) -> None:
        """Count the step and store what it left; after the optimizer's step, which may not find our state before."""
        self.step += 1
        self._store.count_step(self.step)
        if not self.stores_matrices:
            return
        for layer in layers:
            if layer.pending and layer.weight is not None:
                key = self.division_digest(layer), layer.inverse_units or 0
                if (division := self._divisions.get(key)) is None:
                    division = self._divisions[key] = torch.tensor(key, device="cpu")
                for name, value in {**layer.pending, "division": division}.items():
                    self._store.put(layer, name, value)
                layer.pending.clear()

    def resume(self, layers: list[Layer]) -> list[str]:
        """Continue from what the store holds.

        Returns:
            Names of the layers whose stored matrices were dropped, because they were divided otherwise, or are those
            of another network.
        """
        self.step = self._store.counted_steps()
        dropped = []
        for layer in layers:
            layer.pending.clear()
            if layer.capture is None or layer.weight is None or is_lazy(layer.weight):
                continue
            layer.inverse_units = None
            state = self._store.get(layer)
            if (division := state.get("division")) is not None:
                layer.inverse_units = self._stored_units(layer, division)
                matrices = [state[key] for key in ("covariance", "inverse") if key in state]
                if layer.inverse_units is None or not self._fits(layer, layer.inverse_units, matrices):
                    layer.inverse_units = None
                    self._store.drop(layer)
                    dropped.append(layer.name)
                else:
                    self._trim(layer, layer.inverse_units, state)
            if self.options.every == 1:  # saved with a larger one
                self._store.drop(layer, "inverse", "info", "output_inverse", "output_info")
        return dropped

    def _stored_units(self, layer: Layer, division: Tensor) -> int | None:
        """Units of the stored matrices; None if they were divided otherwise."""
        here = [self.division_digest(layer), layer.units]
        # A load before the preconditioner was constructed has cast it to the dtype of the weight.
        cast = torch.tensor(here, device="cpu").to(division.dtype).tolist()
        key, units = division.tolist()
        if key != cast[0]:
            return None
        return here[1] if units == cast[1] else int(units)

    def _fits(self, layer: Layer, units: int, matrices: list[Tensor]) -> bool:
        """Whether stored matrices can be those of this layer, with its bias or without."""
        if not is_dtensor(layer.weight) and abs(units - layer.units) > 1:
            return False
        chunk = self.chunk_of(units, layer.num_groups)
        chunks = layer.num_groups * -(-units // chunk)
        return all(
            matrix.dim() == 3 and len(matrix) == chunks and matrix.shape[1] == matrix.shape[2] >= chunk
            for matrix in matrices
        )

    def _trim(self, layer: Layer, units: int, state: dict[str, Tensor]) -> None:
        """Of matrices that were saved with more padding (convolution groups, by an earlier version) keep the rest."""
        chunk = self.chunk_of(units, layer.num_groups)
        for key in ("covariance", "inverse"):
            if key in state and state[key].shape[1] > chunk:
                self._store.put(layer, key, state[key][:, :chunk, :chunk].clone())


def _has_waited(step: LayerStep) -> bool:
    """Whether these are the first rows since the layer had none in a step that inverts."""
    capture = step.layer.capture
    return capture is not None and capture.waits and not capture.idle


def are_finite(tensors: list[Tensor]) -> Tensor:
    """Whether there is neither Inf nor NaN in any of several tensors, in one pass."""
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    ends = [end.to(dtype) for t in tensors if t.numel() for end in torch.aminmax(t)]  # a rank may hold no rows of one
    if not ends:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    return torch.stack(ends).isfinite().all()
