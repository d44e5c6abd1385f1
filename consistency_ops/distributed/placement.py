"""Who holds what of every layer, and over which ranks its covariance is pooled.

Right multiplication is row-local: a rank that holds some output rows of a gradient needs the covariance of the layer's
inputs and nothing else. So the ranks that see different data pool their covariances, and then every rank corrects what
it has:

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

What cannot be supported keeps its gradient, and ``summary()`` says why.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..engine.discovery import FLATTENED
from ..engine.dtensors import (
    Group,
    Shards,
    is_dtensor,
    is_fully_sharded,
    mesh_groups,
    row_placements,
    sharded_units,
    shards_rows,
)
from ..engine.layer import Layer
from ..engine.notices import Notices, log, some
from ..engine.state import StateStore

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Placement as MeshPlacement

    from ..engine.capture import Capture


@dataclass(frozen=True)
class Placement:
    """What one rank holds of a layer, and what the ranks exchange to correct it. ``repr`` is one readable line."""

    name: str
    groups: tuple[Group, ...] = ()  # ranks that pool their covariances, in the order of the all-reduces
    holds: str = "the whole gradient"
    joins_bias: bool = False
    exchanges_units: bool = False  # the gradient's units are dealt to ranks, and are exchanged for whole rows
    reason: str | None = None  # why the layer is left alone
    dealt: tuple[int, int] = 1, 1  # ranks with other rows of the gradient; those that compute no others (shares.py)

    def __repr__(self) -> str:
        if self.reason is not None:
            return f"Placement({self.name!r}: left alone, {self.reason})"
        pooled = ", then over ".join(f"ranks {_ranges(group)}" for group in self.groups)
        parts = [f"holds {self.holds}", f"pools the covariance over {pooled}" if pooled else "pools nothing"]
        if self.exchanges_units:
            parts.append("exchanges units for rows and back")
        parts.append("bias joined" if self.joins_bias else "bias not joined")
        return f"Placement({self.name!r}: {', '.join(parts)})"


class Placements:
    """The placements of all layers, made anew in every step, because parameters may be moved, frozen or sharded.

    A placement that differs from that of the last step is logged at debug level.

    Args:
        layers: those of the preconditioner.
        model: weak reference to the model, to find out whether ``fully_shard`` was applied.
        owns: whether the optimizer updates a parameter.
        group: the ranks that average the gradients of plain parameters; ``None``: those of the
            ``DistributedDataParallel`` around the model, if there is one.
        unpooled_optimizer: name of an optimizer whose correction ranks cannot pool; ``None``: they can.
        store: told which layers have other chunks on every rank.
        notices: where warnings go.
    """

    def __init__(
        self,
        layers: list[Layer],
        model: weakref.ref[nn.Module],
        owns: Callable[[Tensor], bool],
        group: ProcessGroup | None,
        unpooled_optimizer: str | None,
        store: StateStore,
        notices: Notices,
    ) -> None:
        self.layers: list[Layer] = layers
        self._model, self._owns = model, owns
        self._group, self._unpooled_optimizer = group, unpooled_optimizer
        self._store, self._notices = store, notices
        self._searched = self._fully_sharded = self._seen_left = False
        self.wrappers: list[weakref.ref[nn.parallel.DistributedDataParallel]] = []
        self._wrapper_ranks: dict[int, Group] = {}  # by id of the parameter
        self._process_groups: dict[Group, ProcessGroup] = {}
        self._current: dict[int, Placement] = {}  # by index of the layer

    def update(self) -> dict[int, Placement]:
        """Placements of this step by layer index. A layer that is this rank's own affair has none."""
        self._search_wrappers()
        before, self._current = self._current, {}
        for layer in self.layers:
            if layer.capture is not None and (placement := self._place(layer)) is not None:
                self._current[layer.index] = placement
                if placement != before.get(layer.index):
                    log.debug("Preconditioner: rank %d: %r", dist.get_rank(), placement)
        return self._current

    def of(self, layer: Layer) -> Placement:
        return self._current[layer.index]

    def reason(self, layer: Layer) -> str | None:
        """Why a layer is left alone, for reports."""
        placement = self._current.get(layer.index)
        return None if placement is None else placement.reason

    def left_alone(self) -> set[int]:
        """The layers of this step that ranks share and that are left alone. Says so, from the second step on.

        In the first it may not be known yet what the inputs are.
        """
        left = {index: placement for index, placement in self._current.items() if placement.reason is not None}
        reasons = {placement.reason: placement.name for placement in left.values()}
        if left and self._seen_left and self._unpooled_optimizer is None:
            self._notices.once(
                "left on ranks",
                f"{len(left)} layers are left alone on these ranks, so their gradients are as they are: "
                + some(f"{name} ({reason})" for reason, name in reasons.items()),
            )
        self._seen_left = bool(left)
        return set(left)

    def process_group(self, ranks: Group) -> ProcessGroup:
        return self._process_groups[ranks]

    def bias_of(self, layer: Layer) -> Tensor | None:
        """The bias that is corrected with the layer's weight, if there is one."""
        module = layer.module()
        if module is None or layer.kind.bias is None or not layer.joins_bias:
            return None
        bias = module._parameters.get(layer.kind.bias)
        return bias if bias is not None and bias.requires_grad and self._owns(bias) else None

    def _search_wrappers(self) -> None:
        """Find the wrappers, in the first step: a trainer may have put them there after the preconditioner was made."""
        if self._searched:
            return
        self._searched = True
        self._fully_sharded = is_fully_sharded(self._model())
        layers = [layer for layer in self.layers if layer.capture is not None]
        ours = {id(layer.weight) for layer in layers}
        for wrapper in gc.get_objects():
            if issubclass(type(wrapper), nn.parallel.DistributedDataParallel):
                ignored = wrapper.parameters_to_ignore
                held = {id(p) for name, p in wrapper.module.named_parameters() if name not in ignored}
                if held & ours:
                    self.wrappers.append(weakref.ref(wrapper))
                    self._wrapper_ranks.update(dict.fromkeys(held, self._ranks_of(wrapper.process_group)))
        layers = [layer for layer in layers if self._concerns(layer)]  # another optimizer may have the rest
        alone = [layer.name for layer in layers if self._place(layer) is None]
        if alone and dist.get_world_size() > 1:
            self._notices.once(
                "alone",
                f"there are {dist.get_world_size()} ranks, but some layers are neither in a DistributedDataParallel "
                f"nor sharded, so each rank corrects them with its own inputs: {some(alone)}. If ranks average "
                "gradients in another way, pass their process_group.",
            )
        if len(alone) < len(layers) and self._unpooled_optimizer is not None:
            self._notices.once(
                "not pooled",
                f"{self._unpooled_optimizer} does not pool covariances over ranks, so gradients that ranks share are "
                "left as they are. On several ranks use Preconditioner with an optimizer of torch.optim.",
            )

    def _ranks_of(self, group: ProcessGroup) -> Group:
        ranks = tuple(dist.get_process_group_ranks(group))
        self._process_groups.setdefault(ranks, group)
        return ranks

    def _concerns(self, layer: Layer) -> bool:
        """Whether this optimizer updates the weight of the layer."""
        weight = layer.weight
        return not (
            weight is None or is_lazy(weight) or not self._owns(weight) or not weight.requires_grad or layer.tied
        )

    def _place(self, layer: Layer) -> Placement | None:
        """None: the layer is this rank's own affair."""
        weight = layer.weight
        if weight is None or not self._concerns(layer):
            return None
        if weight.dim() < 2:
            return Placement(layer.name, reason=FLATTENED)
        outer = self._wrapper_ranks.get(id(weight))
        if outer is None and self._group is not None:
            outer = self._ranks_of(self._group)
        if is_dtensor(weight):
            placement = self._place_sharded(layer, weight, () if outer is None else (outer,))
        elif outer is None:
            return None
        else:
            placement = Placement(layer.name, (outer,), joins_bias=self.bias_of(layer) is not None)
        if placement.reason is None and self._unpooled_optimizer is not None:
            return Placement(layer.name, reason=f"{self._unpooled_optimizer} does not pool over ranks")
        return placement

    def _place_sharded(self, layer: Layer, weight: DTensor, outer: tuple[Group, ...]) -> Placement:
        kind, module, capture = layer.kind, layer.module(), layer.capture
        assert module is not None and capture is not None
        if kind.packed and not shards_rows(weight):
            return _left(layer, "query, key and value share one weight that is not sharded over whole rows")
        if kind.copies(module):
            return _left(layer, "groups of a convolution are sharded")
        view = weight if kind.packed else cast("DTensor", kind.view(module, weight))
        unseen = self._fully_sharded and capture.same_rows is None and weight.grad is not None
        if unseen and sharded_units(view) is not None:
            capture.expect_all_units()
        mesh = weight.device_mesh
        exchanges = kind.num_groups(module) == 1 and self._exchanges_units(capture, view)
        placements = row_placements(view) if exchanges else list(view.placements)
        roles: list[str] = []
        for dim, placement in enumerate(placements):
            role = "copy" if mesh.size(dim) == 1 else _role(placement)
            if role == "other":
                return _left(layer, f"weight is placed as {placement}")
            if role != "copy" and kind.num_groups(module) > 1:
                return _left(layer, "groups of a convolution are sharded")
            roles.append(role)
        groups, same_rows = mesh_groups(weight), capture.same_rows
        pooled: dict[str, list[Group]] = {"rows": [], "copy": []}
        for dim, (group, role) in enumerate(zip(groups, roles, strict=True)):
            same = same_rows is not None and group in same_rows
            if role == "units":
                if same_rows is not None and not same:
                    return _left(layer, "weight is sharded over its units, the input is not")
            elif mesh.size(dim) > 1 and not same:
                self._ranks_of(mesh.get_group(dim))
                pooled[role].append(group)
        columns = tuple(role == "units" for role in roles)
        if any(columns):
            shards = Shards(mesh, columns)
            if view.shape[1] % shards.count:
                return _left(layer, f"{view.shape[1]} units are sharded unevenly over {shards.count} ranks")
            self._store.shards[layer.index] = shards
        bias = self.bias_of(layer)
        whole = kind.packed or not kind.part
        fits = whole and not any(columns) and is_dtensor(bias) and list(bias.placements) == placements
        if bias is not None and not fits:
            layer.joins_bias, bias = False, None
        rows = [dim for dim, role in enumerate(roles) if role == "rows"]
        computed = [dim for dim in rows if same_rows is not None and groups[dim] in same_rows]
        dealt = tuple(math.prod(mesh.size(dim) for dim in dims) for dims in (rows, computed))
        holds = "its units of the gradient" if any(columns) else "its rows of the gradient"
        return Placement(
            layer.name,
            # Replicas must end with the same bits, so their dimensions are reduced last.
            (*pooled["rows"], *pooled["copy"], *outer),
            holds if any(role != "copy" for role in roles) else "the whole gradient",
            bias is not None,
            exchanges,
            dealt=(dealt[0], dealt[1]),
        )

    @staticmethod
    def _exchanges_units(capture: Capture, view: DTensor) -> bool:
        """Whether the weight is sharded over its units, and every rank has seen inputs of its own with all of them."""
        dim = sharded_units(view)
        if dim is None or capture.state is None or capture.same_rows is None:
            return False
        return mesh_groups(view)[dim] not in capture.same_rows and capture.width == view.shape[1]


def _left(layer: Layer, reason: str) -> Placement:
    return Placement(layer.name, reason=reason)


def _role(placement: MeshPlacement) -> str:
    """What a mesh dimension does with the gradient matrix: each rank has a "copy", its own "rows", or its "units"."""
    shard = getattr(placement, "dim", None)
    if placement.is_partial():
        return "other"
    return "copy" if shard is None else "units" if shard == 1 else "rows"  # experts or kernel taps are rows, too


def _ranges(ranks: Group) -> str:
    """Ranks in short: 0-3, 8, 10-11."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
