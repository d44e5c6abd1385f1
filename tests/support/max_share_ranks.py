"""``max_share`` on ranks whose batches differ; run by :mod:`support.ranks`."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from consistency_ops import Preconditioner

from .ranks import same_bits

ROWS = 2, 600
CASES = {
    "correct": {},
    "every": {"every": 2},
    "decay": {"decay": 0.5},
    "whiten": {"mode": "whiten", "every": 2},
}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 600))


def _steps(model, optimizer, count: int) -> None:
    for i in range(count):
        generator = torch.Generator().manual_seed(10 * i + dist.get_rank())
        optimizer.zero_grad()
        model(torch.randn(ROWS[dist.get_rank()], 64, generator=generator)).square().mean().backward()
        optimizer.step()


def _shares(pre: Preconditioner) -> list[float]:
    return [entries["share"][1].item() for entries in pre.state_dict()["layers"].values()]


def _run(wrap, options: dict, limit: float, steps: int, state=None):
    model = wrap(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pre = Preconditioner(model, optimizer, max_share=limit, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    _steps(model, optimizer, steps)
    return model, optimizer, pre


def _cases(wrap) -> dict:
    found = {}
    for name, options in CASES.items():
        first = _run(wrap, options, 1e9, 1)  # holds the model, too
        limit = sum(_shares(first[2])) / 2
        model, optimizer, pre = _run(wrap, options, limit, 5)
        left = [layer.capture is None for layer in pre._layers]
        saved = copy.deepcopy(optimizer.state_dict())
        again = _run(wrap, options, limit, 2, saved)
        parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        found[name] = {
            "left": left,
            "shares": _shares(pre),
            "same": same_bits(parameters),
            "resumed": [layer.capture is None for layer in again[2]._layers],
        }
    return found


def ddp_max_share() -> dict:
    return _cases(DistributedDataParallel)


def fully_shard_max_share() -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(model: nn.Sequential) -> nn.Sequential:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return _cases(wrap)
