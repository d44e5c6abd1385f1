"""One step of the layers that several ranks hold: covariances are pooled, gradients corrected where they lie.

Per step and bucket: one launch makes the covariances, one all-reduce of one flat buffer adds them up, weighted by row
counts, and a second launch factors and applies. A third launch only where inverses are kept (``every > 1``) or where
the ranks share the factorisation (``cost_model.py`` decides).

All ranks draw the same division from (seed, step, layer), and every rank of a group factors the same bits, so
parameters stay bitwise equal on ranks of one kind of processor. Who holds what of a layer is in ``placement.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..engine.correction import Correction
from ..engine.digests import digest
from ..engine.dtensors import Group, is_dtensor, local, row_placements
from ..engine.layer import Layer
from ..engine.layer_step import LayerStep
from ..engine.notices import log
from ..engine.shares import Shares
from . import cost_model
from .placement import Placements
from .rank_check import RankCheck
from .triangles import DealtTriangles, Triangles

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_STRIDE = 2  # column of CaptureState in csrc/include/consistency_ops/capture.h
# Groups to pool over, device, whether it is float64, and the largest chunk.
Bucket = tuple[tuple[Group, ...], torch.device, bool, int]


class Pooling:
    """Corrects the layers that ranks share, in every step.

    Args:
        correction: makes covariances and inverses, and applies them.
        placements: says which layers ranks share, and how.
        shares: decides which of them are left alone, because they cost too much.
    """

    def __init__(self, correction: Correction, placements: Placements, shares: Shares | None = None) -> None:
        self._correction, self._placements, self._shares_of_layers = correction, placements, shares
        self._triangles: dict[tuple[Any, ...], Triangles] = {}
        self._dealt_triangles: dict[tuple[Any, ...], DealtTriangles] = {}
        self._checks: dict[Bucket, RankCheck] = {}
        self._exchanged: list[tuple[DTensor, DTensor]] = []  # gradients of this bucket: as placed, and with whole rows
        self._shared_before: dict[tuple[Group, ...], bool] = {}
        # Whether ranks share the factorisations; None: where the cost model says so.
        self.shares_factorisation: bool | None = None

    @property
    def has_ranks(self) -> bool:
        """Whether there are processes that could share layers."""
        return dist.is_available() and dist.is_initialized()

    @torch.no_grad()
    def correct(self) -> set[int]:
        """Correct the layers that ranks share; the same on all ranks, in the same order.

        Returns:
            The indices of these layers, those that are left alone included.
        """
        if not self.has_ranks:
            return set()
        placements = self._placements.update()
        buckets: dict[Bucket, list[Layer]] = {}
        for index, placement in placements.items():
            if placement.reason is None:
                layer = self._placements.layers[index]
                weight = layer.weight
                assert weight is not None
                # Placement decides whether the bias is a unit; the layer itself may still count it.
                units = layer.units - layer.joins_bias + placement.joins_bias
                chunk = self._correction.chunk_of(units, layer.num_groups)
                key = placement.groups, weight.device, weight.dtype == torch.float64, chunk
                buckets.setdefault(key, []).append(layer)
        for key, layers in buckets.items():
            self._correct_bucket(key, layers)
        return set(placements)

    def _correct_bucket(self, key: Bucket, layers: list[Layer]) -> None:
        """Correct layers of one device that are pooled over the same groups."""
        correction, groups = self._correction, key[0]
        for wrapper in self._placements.wrappers:
            if (model := wrapper()) is not None and model._join_config.enable:
                raise RuntimeError(
                    "Preconditioner: all ranks must make the same number of steps, got "
                    "DistributedDataParallel.join(); a rank that has finished cannot pool its inputs"
                )
        self._exchanged.clear()
        steps = [self._layer_step(layer) for layer in layers]
        if key not in self._checks:
            self._checks[key] = RankCheck([self._placements.process_group(ranks) for ranks in groups])
        check, due = self._checks[key], correction.refreshes(correction.step)
        if due or check.expects(correction.refreshes):
            check.reach(self._compared(steps), correction.refreshes, steps[0].grad.device)
        # A layer without a gradient takes part all the same: all ranks must send the same buffer.
        covariances = self._refresh(check, groups, steps) if due else None
        check.count_step()
        here = [i for i, step in enumerate(steps) if step.weight.grad is not None and not step.layer.dear]
        corrected = [steps[i] for i in here]
        if covariances is None:
            if corrected:
                correction.apply_stored(corrected)
        elif corrected:  # in one launch: nobody needs the inverses
            correction.from_covariances(corrected, [covariances[i] for i in here])
        for step in corrected:
            step.write_back()
        for placed, whole_rows in self._exchanged:
            local(placed).copy_(local(whole_rows.redistribute(placements=placed.placements)))
        if not correction.stores_matrices:
            for step in steps:
                step.layer.pending.clear()

    def _layer_step(self, layer: Layer) -> LayerStep:
        """What this rank has of a layer. Where there is no gradient, the weight and zeros take its place."""
        weight, kind, module, capture = layer.weight, layer.kind, layer.module(), layer.capture
        placement = self._placements.of(layer)
        assert weight is not None and module is not None and capture is not None
        capture.follow(module, weight)
        _place_as_parameter(weight)
        grad = weight.detach() if weight.grad is None else weight.grad
        if placement.exchanges_units:
            placed = cast("DTensor", kind.view(module, grad))
            whole_rows = placed.redistribute(placements=row_placements(placed))
            if weight.grad is not None:
                self._exchanged.append((placed, whole_rows))
            grad = local(whole_rows)
        else:
            grad = kind.local_view(module, grad)
        bias = self._placements.bias_of(layer) if placement.joins_bias else None
        bias_grad = None
        if bias is not None:
            _place_as_parameter(bias)
            bias_grad = kind.local_bias_view(torch.zeros_like(bias) if bias.grad is None else bias.grad)
        layer.lost_rows = capture.lost
        source = capture.source or capture
        source.settle(weight.grad, capture)
        assert source.count is not None
        count = torch.zeros_like(source.count) if layer.lost_rows else source.count
        return LayerStep(layer, weight, grad, bias_grad, source.buffer, count)

    def _refresh(self, check: RankCheck, groups: tuple[Group, ...], steps: list[LayerStep]) -> list[Tensor] | None:
        """Pooled covariances, or None if they are inverted already, because all layers' inverses are needed."""
        correction = self._correction
        covariances = correction.covariances(steps)
        # A row stands for as many as were passed over when the buffer was full.
        states = torch.stack([_capture_state(step) for step in steps])
        rows = (torch.cat([step.count for step in steps]) * states[:, _STRIDE]).to(covariances[0].dtype)
        broken = rows.new_zeros(len(steps))
        if correction.options.decay > 0:  # a gradient of Inf or NaN on any rank keeps the step out of all averages
            broken = torch.stack([_is_broken(step) for step in steps]).to(rows.dtype)
        if self._shares(groups, steps, covariances):
            inverses = self._inverses_by_shares(check, groups, steps, covariances, rows)
            correction.remember_inverses(steps, *inverses)
            return None
        covariances, rows, broken = self._pool(check, groups, steps, covariances, rows, broken)
        self._decide(groups, steps, rows)
        taken = [i for i, step in enumerate(steps) if not step.layer.dear]
        if correction.options.decay > 0:
            counts = torch.split(torch.where(broken > 0, 0, rows), 1)
            for i in taken:
                covariances[i] = correction.average(steps[i], counts[i], covariances[i])
        if correction.options.every == 1:
            return covariances
        if taken:
            inverted = [steps[i] for i in taken]
            correction.remember_inverses(inverted, *correction.invert(inverted, [covariances[i] for i in taken]))
        return None

    def _decide(self, groups: tuple[Group, ...], steps: list[LayerStep], rows: Tensor) -> None:
        """Which layers cost too much, by the rows of all ranks."""
        if self._shares_of_layers is not None:
            dealt = [self._placements.of(step.layer).dealt for step in steps]
            self._shares_of_layers.decide_pooled(steps, rows, math.prod(map(len, groups)), dealt)

    def _shares(self, groups: tuple[Group, ...], steps: list[LayerStep], covariances: list[Tensor]) -> bool:
        """Whether each rank of the first group factors a share of the chunks."""
        if not groups or self._correction.options.decay > 0 or not self._correction.shares_factorisation:
            return False
        shares = self.shares_factorisation
        if shares is None:
            chunk = self._correction.chunk_of(steps[0].units, steps[0].convolution_groups)
            units = max(-(-step.units // -(-step.units // chunk)) for step in steps)
            chunks, first = sum(map(len, covariances)), covariances[0]
            shares = cost_model.is_cheaper(first.device.type, len(groups[0]), chunks, units, first.dtype.itemsize)
        if self._shared_before.get(groups) is not shares:
            self._shared_before[groups] = shares
            how = "each rank factors a share of the chunks" if shares else "every rank factors all chunks"
            log.debug("Preconditioner: rank %d: %d layers over %s: %s", dist.get_rank(), len(steps), groups, how)
        return shares

    def _inverses_by_shares(
        self,
        check: RankCheck,
        groups: tuple[Group, ...],
        steps: list[LayerStep],
        covariances: list[Tensor],
        rows: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As ``foreach_inverse`` of the pooled covariances; each rank of the first group makes a share of it."""
        options, first = self._correction.options, self._placements.process_group(groups[0])
        lengths, chunk = [len(covariance) for covariance in covariances], covariances[0].shape[1]
        key = tuple(step.units for step in steps), tuple(lengths), rows.device, groups[0]
        if key not in self._dealt_triangles:
            self._dealt_triangles[key] = DealtTriangles(key[0], key[1], chunk, first.size(), first.rank(), rows.device)
        dealt = self._dealt_triangles[key]
        sums = torch.cat(covariances) * rows[dealt.layer_of_chunk, None, None]
        # Whole diagonals, not their sums: an entry that is not finite on one rank must not count on any.
        pooled = check.pool(dealt.diagonals(sums), rows)
        diagonals, rows = torch.split(pooled, [dealt.diagonal_length, len(rows)])
        self._decide(groups, steps, rows)
        tau = dealt.trace_scale(diagonals, rows) if options.scaling == "trace" else None
        whole = dealt.deal(sums)
        mine = whole.new_empty(len(whole) // first.size(), whole.shape[1])
        dist.reduce_scatter_tensor(mine, whole, group=first)
        for ranks in groups[1:]:
            dist.all_reduce(mine, group=self._placements.process_group(ranks))
        inverses, info, used = ops.foreach_inverse(
            torch.split(dealt.my_means(mine, rows, tau), 1),
            units=dealt.my_units,
            damping=self._correction.damping(),
            scaling="absolute",
            chunk=chunk,
        )
        triangles = dealt.triangles(torch.cat(inverses))
        mine = torch.cat([triangles, info[:, None].to(triangles.dtype), used[:, None].to(triangles.dtype)], 1)
        whole = mine.new_empty(len(whole), mine.shape[1])
        dist.all_gather_into_tensor(whole, mine, group=first)
        whole = whole[: len(sums)]
        full = list(torch.split(dealt.full(whole[:, :-2]), lengths))
        return full, whole[:, -2].to(torch.int32).contiguous(), whole[:, -1].float().contiguous()

    def _pool(
        self,
        check: RankCheck,
        groups: tuple[Group, ...],
        steps: list[LayerStep],
        covariances: list[Tensor],
        rows: Tensor,
        broken: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Averages over all ranks of the groups, weighted by rows; NaN where no rank has any.

        One flat buffer: the lower triangles of all chunks times the rows behind them, the rows, the broken gradients.
        """
        if not groups:
            pairs = zip(covariances, rows, strict=True)
            return [torch.where(n > 0, covariance, math.nan) for covariance, n in pairs], rows, broken
        key = tuple(step.units for step in steps), tuple(map(len, covariances)), rows.device
        if key not in self._triangles:
            chunk = covariances[0].shape[1]
            self._triangles[key] = Triangles(key[0], list(key[1]), chunk, rows.device)
        triangles = self._triangles[key]
        flat = triangles.flatten([covariance * n for covariance, n in zip(covariances, rows, strict=True)])
        pooled = check.pool(*flat, rows, broken)
        *flat, rows, broken = torch.split(pooled, [*map(len, flat), len(steps), len(steps)])
        sums = triangles.unflatten(flat, covariances[0])
        return [total / n for total, n in zip(sums, rows, strict=True)], rows, broken

    def _compared(self, steps: list[LayerStep]) -> dict[str, int]:
        """What all ranks must agree on."""
        o = self._correction.options
        arithmetic = o.scaling, o.chunk, o.group, o.decay, o.every, o.bias, o.keep_norm, o.outputs, o.dct
        options = (*arithmetic, o.max_share)
        layers = [
            (s.layer.name, s.layer.index, s.units, str(s.grad.dtype), self._correction.num_chunks(s)) for s in steps
        ]
        return {"seed": o.seed, "step": self._correction.step, "options": digest(options), "layers": digest(layers)}


def _place_as_parameter(parameter: Tensor) -> None:
    """Place the gradient as the parameter. A partial sum is added up over the ranks, as the optimizer would do it."""
    grad = parameter.grad
    if is_dtensor(grad) and is_dtensor(parameter) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)


def _capture_state(step: LayerStep) -> Tensor:
    """The capture state of the layer whose rows this one uses."""
    capture = step.layer.capture
    assert capture is not None
    source = capture.source or capture
    assert source.state is not None
    return source.state[source.index]


def _is_broken(step: LayerStep) -> Tensor:
    return ~torch.stack([grad.isfinite().all() for grad in step.gradients]).all()
