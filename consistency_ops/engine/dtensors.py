"""Tensors that are no plain ones: what a rank holds of a ``DTensor``, and subclasses that carry something along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs

# Global ranks.  Not a process group: equal meshes may have others, and DTensor takes equal meshes for one.
Group = tuple[int, ...]


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Without an import: ``torch.distributed.tensor`` takes two seconds, and who has a DTensor has imported it."""
    kind = type(tensor)
    return kind is not Tensor and kind is not Parameter and hasattr(tensor, "placements")


def as_plain(x: object) -> Tensor | None:
    """A subclass of Tensor that only carries something along as a plain tensor; None for what is more, or no tensor."""
    if type(x) is Tensor or type(x) is Parameter:
        return x
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or is_dtensor(x):
        return None
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without autograd."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def is_fully_sharded(model: nn.Module | None) -> bool:
    """Whether ``fully_shard`` has been applied to a part of it: inputs are then plain, and have all units."""
    if model is None or not any(map(is_dtensor, model.parameters())):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def shards_rows(tensor: DTensor) -> bool:
    """Whether one mesh dimension has runs of rows and all others have copies, as ``fully_shard`` makes them."""
    return deals_rows(tensor.placements)


def deals_rows(placements: Sequence[Placement]) -> bool:
    sharded = [p for p in placements if not p.is_replicate()]
    return len(sharded) == 1 and sharded[0].is_shard(0) and not hasattr(sharded[0], "split_factor")


def sharded_units(matrix: DTensor) -> int | None:
    """The mesh dimension over which columns, the units, are dealt to ranks, if all others have copies."""
    sharded = [(dim, p) for dim, p in enumerate(matrix.placements) if not p.is_replicate()]
    if len(sharded) != 1 or not sharded[0][1].is_shard(1) or hasattr(sharded[0][1], "split_factor"):
        return None
    return sharded[0][0] if matrix.device_mesh.size(sharded[0][0]) > 1 else None


def row_placements(matrix: DTensor) -> list[Placement]:
    """Rows dealt to ranks instead of the units: the ranks then hold whole rows, as they need to."""
    from torch.distributed.tensor import Shard

    return [Shard(0) if p.is_shard(1) else p for p in matrix.placements]


def replicated(tensor: DTensor) -> list[Placement]:
    """The whole tensor on every rank."""
    from torch.distributed.tensor import Replicate

    return [Replicate()] * tensor.device_mesh.ndim


def redistributed(part: Tensor, like: DTensor, before: Sequence[Placement], after: Sequence[Placement]) -> Tensor:
    """This rank's part of a matrix of the shape of ``like``, when it is placed otherwise."""
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    whole = DTensor.from_local(part, mesh, before, run_check=False, shape=like.shape, stride=like.stride())
    return local(whole.redistribute(placements=after))


def local_rows(tensor: DTensor, begin: int, end: int) -> Tensor:
    """Those of the rows from ``begin`` to ``end`` that this rank holds of a tensor that :func:`shards_rows`."""
    shard, mesh = local(tensor), tensor.device_mesh
    (dim,) = (i for i, p in enumerate(tensor.placements) if not p.is_replicate())
    first = mesh.get_local_rank(dim) * -(-len(tensor) // mesh.size(dim))
    begin, end = (min(max(row - first, 0), len(shard)) for row in (begin, end))
    return shard[begin:end]


def local_input(x: DTensor, unit_dim: int) -> tuple[Tensor | None, frozenset[Group] | None]:
    """Rows that this rank has of a DTensor, and the dimensions of its mesh in which no other rank has others.

    There every rank has the same rows, or its own units of them. None instead of rows: a sum that is still to be taken,
    whose parts are no rows; instead of dimensions: nothing is known.
    """
    if any(p.is_partial() for p in x.placements):
        return None, None
    if torch.compiler.is_compiling():
        return local(x), None
    unit_dim %= x.dim()
    pairs = zip(mesh_groups(x), x.placements, strict=True)
    return local(x), frozenset(g for g, p in pairs if p.is_replicate() or getattr(p, "dim", None) == unit_dim)


def mesh_groups(tensor: DTensor) -> list[Group]:
    """This rank's group in every mesh dimension."""
    mesh = tensor.device_mesh
    return [tuple(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]


def sum_over_shards(weights: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
    """Sums over all elements of each weight, from the sums over what each rank holds of it.

    Args:
        weights: plain tensors, whose sums are whole already, or DTensors.
        sums: one tensor per weight, all of one shape.
    """
    batches: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_dtensor(weight) and (dims := tuple(d for d, p in enumerate(weight.placements) if p.is_shard())):
            batches.setdefault((weight.device_mesh, dims), []).append(i)
    sums = list(sums)
    for (mesh, dims), some in batches.items():
        flat = torch.stack([sums[i] for i in some])
        for dim in dims:
            dist.all_reduce(flat, group=mesh.get_group(dim))
        for i, total in zip(some, flat, strict=True):
            sums[i] = total
    return sums


@dataclass(frozen=True)
class Shards:
    """Where the chunks of a row-parallel layer are: the same number on every rank of some mesh dimensions."""

    mesh: DeviceMesh
    columns: tuple[bool, ...]  # whether the weight is sharded over its units, a mesh dimension each

    @property
    def count(self) -> int:
        return math.prod(self.mesh.size(dim) for dim, sharded in enumerate(self.columns) if sharded)

    def assemble(self, entry: Tensor) -> Tensor:
        """This rank's chunks as its part of a DTensor, (chunks of all ranks, ...)."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Shard(0) if sharded else Replicate() for sharded in self.columns]
        return DTensor.from_local(entry, self.mesh, placements, run_check=False)
