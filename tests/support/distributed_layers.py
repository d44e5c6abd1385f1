"""The scenarios of tests/test_distributed_layers.py: kinds of layer, precision, checkpointing on several ranks."""

from __future__ import annotations

import copy
import logging
import math

import torch
import torch.distributed as dist
from test_experts import Network, ToyExperts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from consistency_ops import Preconditioner
from consistency_ops.optim import SGD2

from .distributed_scenarios import STEPS, STORED, _sharded, mlp, result, sgd, share, train


class Mixed(nn.Module):
    """Transposed convolutions and attention: packed, and with inputs of three widths. One chunk each but the head."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 3, padding=1, groups=2)
        self.same = nn.ConvTranspose1d(6, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True, bias=False)
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        x = x.unflatten(1, (4, 3))
        h = self.same(F.relu(self.up(x))).transpose(1, 2)
        h = h + self.attention(h, h, h)[0]
        x = x.transpose(1, 2)
        return self.head((h + self.cross(h, x, x)[0]).flatten(1))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


LAYERS = {"default": {}, "stored": STORED}


def single_mixed(options: dict, skip=()) -> list[torch.Tensor]:
    model = mixed()
    optimizer = sgd(model)
    Preconditioner(model, optimizer, chunk=8, skip=skip, **options)
    train(model, optimizer, range(4))
    return [p.detach() for p in model.parameters()]


def ddp_layers():
    found = {}
    for name, options in LAYERS.items():
        model = mixed()
        wrapped, optimizer = DDP(model), sgd(model)
        pre = Preconditioner(wrapped, optimizer, chunk=8, **options)
        train(wrapped, optimizer, [dist.get_rank()])
        found[name] = result(model, summary=pre.summary())
    return found


def fully_shard_layers():
    """The packed weight has 18 rows: 5, 5, 5 and 3 on four ranks, 9 and 9 on two, so its parts straddle shards."""
    found = {}
    for name, options in {**LAYERS, "hybrid": {}}.items():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if name == "hybrid" else None
        model = fully_shard(mixed(), mesh=mesh or init_device_mesh("cpu", (4,)))
        optimizer = sgd(model)
        pre = Preconditioner(model, optimizer, chunk=8, **options)
        train(model, optimizer, [dist.get_rank()])
        found[name] = result(model, summary=pre.summary(), failed=pre.stats()["failed_chunks"])
    return found


def packed_columns():
    """A packed weight that is sharded over its units is left alone."""
    model, mesh = mixed().attention, init_device_mesh("cpu", (4,))
    weight = distribute_tensor(model.in_proj_weight.detach(), mesh, [Shard(1)])
    model.in_proj_weight = nn.Parameter(weight)
    pre = Preconditioner(model)
    model.in_proj_weight.grad = distribute_tensor(torch.ones(18, 6, dtype=torch.float64), mesh, [Shard(1)])
    pre.step()
    same = model.in_proj_weight.grad.redistribute(placements=[Replicate()]).to_local()
    return {"summary": pre.summary(), "unchanged": bool((same == 1).all())}


class Uneven(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 5))


def uneven_shards():
    """18 units on four ranks are 5, 5, 5 and 3: the row-parallel layer is left alone, the column-parallel one not."""
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    model = parallelize_module(Uneven().double(), init_device_mesh("cpu", (4,)), plan)
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8)
    train(model, optimizer, range(4))
    return result(model, summary=pre.summary())


def single_uneven() -> list[torch.Tensor]:
    model = Uneven().double()
    optimizer = sgd(model)
    Preconditioner(model, optimizer, chunk=8, skip="2")
    train(model, optimizer, range(4))
    return [p.detach() for p in model.parameters()]


def sgd2():
    """SGD2 does not pool: it is plain momentum, the same on all ranks, and says so."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("consistency_ops").addHandler(handler)
    model = mlp()
    wrapped, optimizer = DDP(model), SGD2(model, 0.1)
    train(wrapped, optimizer, [dist.get_rank()])
    logging.getLogger("consistency_ops").removeHandler(handler)
    return result(model, summary=optimizer.preconditioner.summary(), messages=messages)


def single_sgd2() -> list[torch.Tensor]:
    """SGD2's update of gradients that are not corrected."""
    model = mlp()
    optimizer = SGD2(model, 0.1)
    optimizer.preconditioner.remove()
    train(model, optimizer, range(4))
    return [p.detach() for p in model.parameters()]


# Precision


def _scaled(model, optimizer, shares, poisoned=False, autocast=False, dtype=torch.float64) -> None:
    """``poisoned``: the third step is first tried with Inf in the inputs of rank 1, and skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step in range(STEPS):
        for poison in (True, False) if poisoned and step == 2 else (False,):
            optimizer.zero_grad()
            parts = [share(step, rank, dtype) for rank in shares]
            x = torch.cat([x for x, _ in parts])
            if poison and dist.get_rank() == 1:
                x[0, 0] = math.inf
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = F.cross_entropy(model(x), torch.cat([y for _, y in parts]), reduction="none")
            loss = torch.stack([part.mean() for part in losses.split([len(y) for _, y in parts])]).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def scaler():
    """A step that all ranks skip because one of them saw Inf."""
    found = {}
    for name in ("ddp", "fully_shard"):
        model = mlp()
        wrapped = DDP(model) if name == "ddp" else _sharded(model)
        optimizer = sgd(model)
        pre = Preconditioner(wrapped, optimizer, chunk=8, decay=0.5)
        _scaled(wrapped, optimizer, [dist.get_rank()], poisoned=True)
        found[name] = result(model, steps=pre.steps, failed=pre.stats()["failed_chunks"])
    return found


def _autocast(model, wrapped, shares):
    optimizer = sgd(model)
    pre = Preconditioner(wrapped, optimizer, chunk=8)
    _scaled(wrapped, optimizer, shares, autocast=True, dtype=torch.float32)
    return pre


def autocast():
    model = mlp(torch.float32)
    pre = _autocast(model, DDP(model), [dist.get_rank()])
    return result(model, rows=str(pre._layers[1].capture.rows.dtype))


def single_autocast() -> list[torch.Tensor]:
    model = mlp(torch.float32)
    _autocast(model, model, range(4))
    return [p.detach() for p in model.parameters()]


def _bfloat16(model, wrapped, shares):
    optimizer = sgd(model)
    pre = Preconditioner(wrapped, optimizer, chunk=8, decay=0.5)
    train(wrapped, optimizer, shares, dtype=torch.bfloat16)
    return pre.state_dict()["layers"]["0" if wrapped is model else "module.0"]


def bfloat16():
    """Parameters, gradients and their all-reduce in bfloat16; statistics and theirs in float32."""
    model = mlp(torch.bfloat16)
    state = _bfloat16(model, DDP(model), [dist.get_rank()])
    return result(model, dtypes={key: str(value.dtype) for key, value in state.items() if value.is_floating_point()})


def single_bfloat16() -> list[torch.Tensor]:
    model = mlp(torch.bfloat16)
    _bfloat16(model, model, range(4))
    return [p.detach() for p in model.parameters()]


# Checkpointing and compiled optimizers


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.body, self.reentrant = mlp(), reentrant

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


def checkpointed():
    found = []
    for reentrant in (True, False):
        model = Checkpointed(reentrant)
        wrapped, optimizer = DDP(model), sgd(model)
        pre = Preconditioner(wrapped, optimizer, chunk=8)
        train(wrapped, optimizer, [dist.get_rank()])
        found.append(result(model, rows=pre.stats()["rows"]))
    return found


def resumed_layers():
    """DDP, attention and all: the state of every part is found again."""
    model = mixed()
    wrapped, optimizer = DDP(model), sgd(model)
    Preconditioner(wrapped, optimizer, chunk=8, **STORED)
    train(wrapped, optimizer, [dist.get_rank()], steps=3)
    saved = copy.deepcopy((wrapped.state_dict(), optimizer.state_dict()))
    train(wrapped, optimizer, [dist.get_rank()], first=3, steps=3)
    other = mixed()
    again, optimizer = DDP(other), sgd(other)
    Preconditioner(again, optimizer, chunk=8, **STORED)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(again, optimizer, [dist.get_rank()], first=3, steps=3)
    return result(other, uninterrupted=result(model)["parameters"])


# Experts, and weights that are flattened

EXPERT_OPTIONS = {"default": {}, "stored": STORED, "whiten": {"mode": "whiten", "every": 2}}


def train_experts(model, options, shares, wrap=lambda model: model):
    """Three steps with the data of some of four ranks; the gradient is the mean over all of them."""
    model = wrap(model)
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=4, **options)
    for step in range(3):
        optimizer.zero_grad()
        for part in shares:
            x = torch.randn(24, 6, generator=torch.Generator().manual_seed(10 * step + part)).double()
            (model(x).square().mean() / len(shares)).backward()
        optimizer.step()
    return pre


def fully_shard_experts():
    """Shards of whole experts: one each on four ranks, two each on two."""
    found = {}
    for name, options in {**EXPERT_OPTIONS, "hybrid": {}}.items():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if name == "hybrid" else None
        mesh = mesh or init_device_mesh("cpu", (4,))
        model = Network(ToyExperts).double()

        def wrap(model, mesh=mesh):
            fully_shard(model.experts, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        pre = train_experts(model, options, [dist.get_rank()], wrap)
        found[name] = result(model, summary=pre.summary(), failed=pre.stats()["failed_chunks"])
    return found


def flat_parameters():
    """FullyShardedDataParallel around a model that has a preconditioner already, and what the log says of it."""
    found = {}
    for keeps_names in (True, False):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, messages=messages: messages.append(record.getMessage())
        logging.getLogger("consistency_ops").addHandler(handler)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = Preconditioner(model, optimizer)
        wrapped = FullyShardedDataParallel(model, use_orig_params=keeps_names, device_id=torch.device("cpu"))
        for _ in range(12):
            optimizer.zero_grad()
            wrapped(share(0, dist.get_rank())[0]).square().sum().backward()
            optimizer.step()
        try:
            Preconditioner(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
            refusal = ""
        except ValueError as error:
            refusal = str(error)
        logging.getLogger("consistency_ops").removeHandler(handler)
        stopped = all(part.states.stopped for part in pre._attachments)
        found[keeps_names] = {"log": messages, "stopped": stopped, "refusal": refusal, "summary": pre.summary()}
    return found
