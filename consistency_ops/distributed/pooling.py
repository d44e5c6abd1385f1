"""Several ranks that train one model: their covariances are pooled, their gradients corrected where they lie.

Right multiplication is row-local: a rank that holds some output rows of a gradient needs the covariance of the layer's
inputs and nothing else. So the ranks that see different data pool their covariances, weighted by row counts, in one
all-reduce of one flat buffer, and then every rank corrects what it has:

* ``DistributedDataParallel``: every rank has the whole gradient, averaged already; pooled over the wrapper's group.
* ``fully_shard`` (FSDP2, also hybrid): every rank has some output rows; pooled over the mesh of the parameter. Of a
  weight that query, key and value share, a rank corrects the rows that it has of each.
* a layer under ``fully_shard`` whose weight is stored as (in, out): every rank has some units of all output rows. The
  gradient is exchanged for whole rows, corrected, and returned: two all-to-alls of the shards. (A compiled model finds
  out in its first step, in which these layers keep their gradient.)
* column-parallel (``ColwiseParallel``): some output rows, and all ranks see the same input. Nothing is sent.
* row-parallel (``RowwiseParallel``): some input columns, which are divided into chunks of their own, with their own
  mean diagonal (``scaling="trace"``). Nothing is sent. The bias is replicated and keeps its gradient.
* meshes of several dimensions: each dimension as above.

Which mesh dimensions share their rows is read from the input that a layer sees: a ``DTensor`` that is replicated, or
sharded over its units, needs no pooling over that dimension; every other dimension of the parameter's mesh is pooled.
Pooling over ranks that saw the same rows is harmless, so an input that nobody could look at (compiled models) costs
time and not correctness.

All ranks draw the same division from (seed, step, layer), and every rank of a group factors the same bits, so
parameters stay bitwise equal on ranks of one kind of processor. What cannot be supported keeps its gradient, and
``summary()`` says why.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import ops
from ..engine.discovery import FLATTENED
from ..engine.dtensors import (
    Group,
    Shards,
    is_dtensor,
    is_fully_sharded,
    local,
    mesh_groups,
    row_placements,
    sharded_units,
    shards_rows,
)
from . import cost_model
from .rank_check import Agreement, digest
from .triangles import Packing, SharedPacking

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..engine.layer import Layer
    from ..engine.layer_step import Item
    from ..preconditioner import Preconditioner

_STRIDE = 2  # column of CaptureState in csrc/include/consistency_ops/capture.h


@dataclass(frozen=True)
class Plan:
    """What becomes of one layer."""

    groups: tuple[Group, ...] = ()  # over which covariances are pooled, in this order
    joins_bias: bool = False
    moves: bool = False  # whether the gradient's units are dealt to ranks, and are exchanged for whole rows
    reason: str | None = None  # why the layer is left alone


class Ranks:
    """The layers of a :class:`~consistency_ops.Preconditioner` that several ranks hold, or hold shards of.

    Args:
        pre: whose layers they are.
        group: the ranks that average the gradients of plain parameters; ``None``: those of the
            ``DistributedDataParallel`` around the model, if there is one.
    """

    def __init__(self, pre: Preconditioner, group: ProcessGroup | None) -> None:
        self._pre: Preconditioner = weakref.proxy(pre)
        self._group = group
        self._searched = self._fully_sharded = False
        self._wrappers: list[weakref.ref[nn.Module]] = []  # DistributedDataParallel
        self._outer: dict[int, Group] = {}  # their ranks, by id of the parameter
        self._groups: dict[Group, ProcessGroup] = {}
        self._plans: dict[int, Plan] = {}  # of this step, by index of the layer
        self._packings: dict[tuple, Packing] = {}
        self._agreements: dict[tuple, Agreement] = {}  # by bucket
        self._moved: list[tuple[Tensor, Tensor]] = []  # gradients of this bucket, where they belong and with whole rows
        self.sharing: bool | None = None  # whether ranks share the factorisations; None: where the cost model says so

    def reason(self, layer: Layer) -> str | None:
        """Why a layer is left alone, for reports."""
        plan = self._plans.get(layer.index)
        return None if plan is None else plan.reason

    @torch.no_grad()
    def correct(self) -> set[int]:
        """Correct the layers that ranks share; returns their indices. The same on all ranks, in the same order."""
        if not (dist.is_available() and dist.is_initialized()):
            return set()
        self._search()
        self._plans = {}
        buckets: dict[tuple, list[Layer]] = {}
        for layer in self._pre.layers:
            if layer.capture is not None and (plan := self._plan(layer)) is not None:
                self._plans[layer.index] = plan
                if plan.reason is None:
                    weight = layer.weight
                    key = plan.groups, weight.device, weight.dtype == torch.float64
                    buckets.setdefault(key, []).append(layer)
        for key, layers in buckets.items():
            self._correct_bucket(key, layers)
        return set(self._plans)

    # Who shares what

    def _search(self) -> None:
        """Find the wrappers, in the first step: a trainer may have put them there after the preconditioner was made."""
        from ..reporting import stats

        if self._searched:
            return
        self._searched = True
        self._fully_sharded = is_fully_sharded(self._pre._model())
        layers = [layer for layer in self._pre.layers if layer.capture is not None]
        ours = {id(layer.weight) for layer in layers}
        for wrapper in gc.get_objects():
            if issubclass(type(wrapper), nn.parallel.DistributedDataParallel):
                ignored = wrapper.parameters_to_ignore
                held = {id(p) for name, p in wrapper.module.named_parameters() if name not in ignored}
                if held & ours:
                    self._wrappers.append(weakref.ref(wrapper))
                    self._outer.update(dict.fromkeys(held, self._ranks_of(wrapper.process_group)))
        alone = [layer.name for layer in layers if self._plan(layer) is None]
        if alone and dist.get_world_size() > 1:
            stats.notice_alone(self._pre, alone, dist.get_world_size())
        if len(alone) < len(layers) and not self._pre.pools:
            stats.notice_not_pooled(self._pre, type(self._pre._optimizer).__name__)

    def _ranks_of(self, group: ProcessGroup) -> Group:
        ranks = tuple(dist.get_process_group_ranks(group))
        self._groups.setdefault(ranks, group)
        return ranks

    def _plan(self, layer: Layer) -> Plan | None:
        """None: the layer is this rank's own affair."""
        weight = layer.weight
        if weight is None or is_lazy(weight) or not self._pre.owns(weight) or not weight.requires_grad or layer.tied:
            return None
        if weight.dim() < 2:
            return Plan(reason=FLATTENED)
        outer = self._outer.get(id(weight))
        if outer is None and self._group is not None:
            outer = self._ranks_of(self._group)
        if not is_dtensor(weight):
            if outer is None:
                return None
            plan = Plan((outer,), self._bias_of(layer) is not None)
        else:
            plan = self._plan_sharded(layer, weight, () if outer is None else (outer,))
        if plan.reason is None and not self._pre.pools:
            return replace(plan, reason=f"{type(self._pre._optimizer).__name__} does not pool over ranks")
        return plan

    def _plan_sharded(self, layer: Layer, weight: Tensor, outer: tuple[Group, ...]) -> Plan:
        packed = getattr(layer.kind, "packed", False)
        if packed and not shards_rows(weight):
            return Plan(reason="query, key and value share one weight that is not sharded over whole rows")
        if layer.kind.copies(layer.module()):
            return Plan(reason="groups of a convolution are sharded")
        view = weight if packed else layer.kind.view(layer.module(), weight)
        unseen = self._fully_sharded and layer.capture.same_rows is None and weight.grad is not None
        if unseen and sharded_units(view) is not None:
            layer.capture.expect_all_units()
        mesh, same_rows = weight.device_mesh, layer.capture.same_rows
        moves = self._moves(layer, view)
        placements = row_placements(view) if moves else list(view.placements)
        sharded, replicated, columns = [], [], [False] * mesh.ndim
        for dim, (group, placement) in enumerate(zip(mesh_groups(weight), placements, strict=True)):
            if mesh.size(dim) == 1:
                continue
            shard = getattr(placement, "dim", None)
            if placement.is_partial() or (shard is not None and shard > 1):
                return Plan(reason=f"weight is placed as {placement}")
            if shard is not None and layer.kind.groups(layer.module()) > 1:
                return Plan(reason="groups of a convolution are sharded")
            if shard == 1:
                if same_rows is not None and group not in same_rows:
                    return Plan(reason="weight is sharded over its units, the input is not")
                columns[dim] = True
            elif same_rows is None or group not in same_rows:
                self._ranks_of(mesh.get_group(dim))
                (replicated if shard is None else sharded).append(group)
        if any(columns):
            shards = Shards(mesh, tuple(columns))
            if view.shape[1] % shards.count:
                return Plan(reason=f"{view.shape[1]} units are sharded unevenly over {shards.count} ranks")
            self._pre._store.shards[layer.index] = shards
        bias = self._bias_of(layer)
        whole = packed or not layer.kind.part
        fits = whole and not any(columns) and is_dtensor(bias) and list(bias.placements) == placements
        if bias is not None and not fits:
            layer.joins_bias, bias = False, None
        # Replicas must end with the same bits, so their dimensions are reduced last.
        return Plan((*sharded, *replicated, *outer), bias is not None, moves)

    def _moves(self, layer: Layer, view: Tensor) -> bool:
        """Whether the weight is sharded over its units, and every rank has seen inputs of its own with all of them."""
        dim, capture = sharded_units(view), layer.capture
        if dim is None or capture.rows is None or capture.same_rows is None or layer.kind.groups(layer.module()) > 1:
            return False
        return mesh_groups(view)[dim] not in capture.same_rows and capture.rows.shape[1] == view.shape[1]

    def _bias_of(self, layer: Layer) -> Tensor | None:
        bias = layer.module()._parameters.get(layer.kind.bias) if layer.joins_bias else None
        return bias if bias is not None and bias.requires_grad and self._pre.owns(bias) else None

    # One all-reduce, and the correction

    def _correct_bucket(self, key: tuple, layers: list[Layer]) -> None:
        """The layers of one device that are pooled over the same groups: ``key[0]``."""
        pre, groups = self._pre, key[0]
        for wrapper in self._wrappers:
            if wrapper() is not None and wrapper()._join_config.enable:
                raise RuntimeError(
                    "Preconditioner: all ranks must make the same number of steps, got "
                    "DistributedDataParallel.join(); a rank that has finished cannot pool its inputs"
                )
        self._moved.clear()
        items = [self._item(layer) for layer in layers]
        if key not in self._agreements:
            self._agreements[key] = Agreement([self._groups[ranks] for ranks in groups])
        agreement, due = self._agreements[key], pre.refreshes(pre.steps)
        if due or agreement.expects(pre.refreshes):
            agreement.reach(self._fields(items), pre.refreshes, items[0].grad.device)
        # A layer without a gradient takes part all the same: all ranks must send the same buffer.
        covariances = self._refresh(agreement, groups, items) if due else None
        agreement.count_step()
        here = [i for i, item in enumerate(items) if item.layer.weight.grad is not None]
        corrected = [items[i] for i in here]
        if covariances is None:
            pre._apply(corrected)
        elif corrected:  # in one launch: nobody needs the inverses
            pre._correct_with(corrected, [covariances[i] for i in here])
        for item in corrected:
            item.write_back()
        for view, moved in self._moved:
            local(view).copy_(local(moved.redistribute(placements=view.placements)))
        if pre.every == 1 and pre.decay == 0:
            for item in items:
                item.layer.pending.clear()

    def _item(self, layer: Layer) -> Item:
        """What this rank has of a layer; where there is no gradient, its place is taken by weight and zeros."""
        from ..engine.layer_step import Item

        weight, kind = layer.weight, layer.kind
        layer.capture.follow(layer.module(), weight)
        bias = self._bias_of(layer) if self._plans[layer.index].joins_bias else None
        self._settle(weight)
        grad = weight.detach() if weight.grad is None else weight.grad
        if self._plans[layer.index].moves:
            view = kind.view(layer.module(), grad)
            moved = view.redistribute(placements=row_placements(view))
            if weight.grad is not None:
                self._moved.append((view, moved))
            grad = local(moved)
        else:
            grad = kind.local_view(layer.module(), grad)
        bias_grad = None
        if bias is not None:
            self._settle(bias)
            bias_grad = kind.local_bias_view(torch.zeros_like(bias) if bias.grad is None else bias.grad)
        capture = layer.capture
        layer.lost_rows = capture.lost
        source = capture.source or capture
        count = torch.zeros_like(source.count) if layer.lost_rows else source.count
        return Item(layer, weight, grad, bias_grad, source.rows, count)

    @staticmethod
    def _settle(parameter: Tensor) -> None:
        """Place the gradient as the parameter: a sum that is still to be taken is taken, as the optimizer would."""
        grad = parameter.grad
        if is_dtensor(grad) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)

    def _refresh(self, agreement: Agreement, groups: tuple[Group, ...], items: list[Item]) -> list[Tensor] | None:
        """Pooled covariances; None: they are inverted already, because all layers' inverses are needed."""
        pre = self._pre
        captures = [item.layer.capture.source or item.layer.capture for item in items]
        covariances = pre._covariances(items)
        # A row stands for as many as were passed over when the buffer was full.
        states = torch.stack([capture.state[capture.index] for capture in captures])
        rows = (torch.cat([item.count for item in items]) * states[:, _STRIDE]).to(covariances[0].dtype)
        broken = rows.new_zeros(len(items))
        if pre.decay > 0:  # a gradient of Inf or NaN on any rank keeps the step out of the average on all
            broken = torch.stack([_is_broken(item) for item in items]).to(rows.dtype)
        if self._shares(groups, items, covariances):
            pre._keep(items, *self._inverses_of_shares(agreement, groups, items, covariances, rows))
            return None
        covariances, rows, broken = self._pool(agreement, groups, items, covariances, rows, broken)
        if pre.decay > 0:
            counts = torch.where(broken > 0, 0, rows)
            pairs = zip(items, counts.split(1), covariances, strict=True)
            covariances = [pre._average(item, count, covariance) for item, count, covariance in pairs]
        if pre.every == 1:
            return covariances
        pre._keep(items, *pre._invert(items, covariances))
        return None

    def _shares(self, groups: tuple[Group, ...], items: list[Item], covariances: list[Tensor]) -> bool:
        """Whether each rank of the first group factors a share of the chunks."""
        if not groups or self._pre.decay > 0:
            return False
        if self.sharing is not None:
            return self.sharing
        units = max(-(-item.units // -(-item.units // self._pre.chunk)) for item in items)
        chunks, first = sum(map(len, covariances)), covariances[0]
        return cost_model.is_cheaper(first.device.type, len(groups[0]), chunks, units, first.dtype.itemsize)

    def _inverses_of_shares(
        self,
        agreement: Agreement,
        groups: tuple[Group, ...],
        items: list[Item],
        covariances: list[Tensor],
        rows: Tensor,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As ``foreach_inverse`` of the pooled covariances; each rank of the first group makes a share of it."""
        pre, first = self._pre, self._groups[groups[0]]
        key = tuple(item.units for item in items), tuple(map(len, covariances)), rows.device, groups[0]
        if key not in self._packings:
            self._packings[key] = SharedPacking(key[0], key[1], pre.chunk, first.size(), first.rank(), rows.device)
        packing = self._packings[key]
        sums = torch.cat(covariances) * rows[packing.owner, None, None]
        small = agreement.pool(sums.diagonal(dim1=1, dim2=2).sum(1), rows)
        tau = packing.mean_diagonal(*small.split([len(sums), len(rows)])) if pre.scaling == "trace" else None
        whole = packing.pack(sums)
        mine = whole.new_empty(len(whole) // first.size(), whole.shape[1])
        dist.reduce_scatter_tensor(mine, whole, group=first)
        for ranks in groups[1:]:
            dist.all_reduce(mine, group=self._groups[ranks])
        means = packing.unpack_mine(mine, small[len(sums) :], tau)
        inverses, info, used = ops.foreach_inverse(
            list(means.split(1)), units=packing.my_units, damping=pre._damping(), scaling="absolute", chunk=pre.chunk
        )
        triangles = packing.triangles(torch.cat(inverses))
        mine = torch.cat([triangles, info[:, None].to(triangles.dtype), used[:, None].to(triangles.dtype)], 1)
        whole = mine.new_empty(len(whole), mine.shape[1])
        dist.all_gather_into_tensor(whole, mine, group=first)
        whole = whole[: len(sums)]
        inverses = packing.full(whole[:, :-2]).split(list(map(len, covariances)))
        return list(inverses), whole[:, -2].to(torch.int32).contiguous(), whole[:, -1].float().contiguous()

    def _pool(
        self,
        agreement: Agreement,
        groups: tuple[Group, ...],
        items: list[Item],
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
        packing = self._packing(items, [len(covariance) for covariance in covariances], rows.device)
        packed = packing.pack([covariance * n for covariance, n in zip(covariances, rows, strict=True)])
        flat = agreement.pool(*packed, rows, broken)
        *packed, rows, broken = flat.split([*map(len, packed), len(items), len(items)])
        sums = packing.unpack(packed, covariances[0])
        return [total / n for total, n in zip(sums, rows, strict=True)], rows, broken

    def _packing(self, items: list[Item], lengths: list[int], device: torch.device) -> Packing:
        units = tuple(item.units for item in items)
        key = units, tuple(lengths), device
        if key not in self._packings:
            self._packings[key] = Packing(units, lengths, self._pre.chunk, device)
        return self._packings[key]

    def _fields(self, items: list[Item]) -> dict[str, int]:
        """What all ranks must agree on."""
        pre = self._pre
        options = (pre.scaling, pre.chunk, pre.group, pre.decay, pre.every, pre.bias)
        layers = [(i.layer.name, i.layer.index, i.units, str(i.grad.dtype), pre._num_chunks(i)) for i in items]
        return {"seed": pre.seed, "step": pre.steps, "options": digest(options), "layers": digest(layers)}


def _is_broken(item: Item) -> Tensor:
    gradients = [grad for grad in (item.grad, item.bias_grad) if grad is not None]
    return ~torch.stack([grad.isfinite().all() for grad in gradients]).all()
