"""The scenarios of tests/test_distributed.py, which ranks.py runs on four gloo ranks."""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from consistency_ops import Preconditioner, layers
from consistency_ops.ops import backend as _backend

from .ranks import same_bits

STEPS = 4
SHARES = (16, 4, 12, 8)  # rows of each rank, of a batch of 40
STORED = {"decay": 0.5, "every": 2}
OPTIONS = {"default": {}, "decay": {"decay": 0.5}, "every": {"every": 2}, "absolute": {"scaling": "absolute"}}


def mlp(dtype=torch.float64, widths=(12, 20, 16, 5), seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(step: int, dtype=torch.float64, units=12, classes=5):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(sum(SHARES), units, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (sum(SHARES),), generator=generator)


def share(step: int, rank: int, dtype=torch.float64):
    x, y = batch(step, dtype)
    begin = sum(SHARES[:rank])
    return x[begin : begin + SHARES[rank]], y[begin : begin + SHARES[rank]]


def sgd(model, name="sgd"):
    parameters = list(model.parameters())
    return torch.optim.AdamW(parameters, 0.01) if name == "adamw" else torch.optim.SGD(parameters, 0.2, momentum=0.9)


def train(model, optimizer, shares, first=0, steps=STEPS, dtype=torch.float64) -> None:
    """``shares``: ranks whose data this process takes; the loss is the mean of their means, as in data parallelism."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.cat([share(step, r, dtype)[0] for r in shares])
        losses = F.cross_entropy(model(x), torch.cat([share(step, r)[1] for r in shares]), reduction="none")
        torch.stack([part.mean() for part in losses.split([SHARES[r] for r in shares])]).mean().backward()
        optimizer.step()


def single(options: dict, dtype=torch.float64, steps=STEPS, name="sgd") -> list[torch.Tensor]:
    """One process with the data of all ranks."""
    model = mlp(dtype)
    optimizer = sgd(model, name)
    Preconditioner(model, optimizer, **{"chunk": 8, **options})
    train(model, optimizer, range(len(SHARES)), steps=steps, dtype=dtype)
    return [p.detach() for p in model.parameters()]


def result(model, **more) -> dict:
    parameters = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return {"parameters": parameters, "same": same_bits(parameters), **more}


def _ddp(options: dict, dtype=torch.float64, name="sgd", wrap_late=False, **ddp) -> dict:
    model = mlp(dtype)
    wrapped = None if wrap_late else DDP(model, **ddp)
    optimizer = sgd(model, name)
    pre = Preconditioner(model if wrap_late else wrapped, optimizer, chunk=8, **options)
    wrapped = wrapped or DDP(model, **ddp)
    train(wrapped, optimizer, [dist.get_rank()], dtype=dtype)
    return result(model, rows=pre.stats()["rows"], summary=pre.summary())


def backend():
    """What computes on this rank."""
    return {"computes": "torch" if "CPU" in _backend._before else "kernels"}


def ddp_default():
    return _ddp({})


def ddp_decay():
    return _ddp(OPTIONS["decay"])


def ddp_every():
    return _ddp(OPTIONS["every"])


WHITEN = {"mode": "whiten", "every": 2}


def ddp_wide():
    """Whole layers: matrices of three sizes, each with an all-reduce of its own."""
    return averaged_by_hand(chunk=None)


def ddp_whiten():
    return _ddp(WHITEN, name="adamw")


BOTH_SIDES = {"mode": "whiten", "every": 2, "outputs": True}
BOTH_SIDES_AND_COSINES = BOTH_SIDES | {"dct": True}


def ddp_whiten_outputs():
    return _ddp(BOTH_SIDES, name="adamw")


GATHERED = {"decay": 0.5, "every": 3}


def ddp_gathered():
    """An average that is gathered in 20 steps and then reused: number of all-reduces in each of 24."""
    model = mlp()
    wrapped, optimizer = DDP(model), sgd(model)
    Preconditioner(wrapped, optimizer, chunk=8, **GATHERED)
    sent = []
    for step in range(24):
        with Traffic() as traffic:
            train(wrapped, optimizer, [dist.get_rank()], first=step, steps=1)
        sent.append(sum("allreduce" in call for call in traffic.calls))
    return result(model, sent=sent)


def ddp_absolute():
    return _ddp(OPTIONS["absolute"])


def ddp_static_graph():
    return _ddp({}, static_graph=True)


def ddp_wrapped_late():
    return _ddp({}, wrap_late=True, gradient_as_bucket_view=True)


def ddp_float32():
    return _ddp({}, torch.float32, "adamw")


def ddp_accumulation():
    """Two micro-batches, the first under no_sync."""
    model = mlp()
    wrapped, optimizer = DDP(model), sgd(model)
    Preconditioner(wrapped, optimizer, chunk=8)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = share(step, dist.get_rank())
        half = len(x) // 2
        with wrapped.no_sync():
            (F.cross_entropy(wrapped(x[:half]), y[:half]) / 2).backward()
        (F.cross_entropy(wrapped(x[half:]), y[half:]) / 2).backward()
        optimizer.step()
    return result(model)


class Branches(nn.Module):
    """``side`` runs where it is wanted."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.never = nn.Linear(3, 3)

    def forward(self, x, side):
        h = F.relu(self.body(x))
        return self.head(h + self.side(h) if side else h)


def branches() -> Branches:
    torch.manual_seed(0)
    return Branches().double()


def ddp_missing_layer():
    """A layer that runs on rank 1 only, and one that never runs."""
    model = branches()
    wrapped, optimizer = DDP(model, find_unused_parameters=True), sgd(model)
    pre = Preconditioner(wrapped, optimizer, chunk=8)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = share(step, dist.get_rank())
        F.cross_entropy(wrapped(x, dist.get_rank() == 1), y).backward()
        optimizer.step()
    return result(model, summary=pre.summary())


def single_missing_layer() -> list[torch.Tensor]:
    model = branches()
    optimizer = sgd(model)
    Preconditioner(model, optimizer, chunk=8)
    for step in range(STEPS):
        optimizer.zero_grad()
        shares = [share(step, rank) for rank in range(4)]
        others = [0, 2, 3]
        x = torch.cat([shares[r][0] for r in others])
        h = F.relu(model.body(torch.cat([x, shares[1][0]])))
        with_side = h[len(x) :]
        logits = model.head(torch.cat([h[: len(x)], with_side + model.side(with_side)]))
        parts = logits.split([SHARES[r] for r in (*others, 1)])
        targets = [shares[r][1] for r in (*others, 1)]
        torch.stack([F.cross_entropy(p, t) for p, t in zip(parts, targets, strict=True)]).mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def averaged_by_hand(group=..., chunk=8):
    """No wrapper: gradients are averaged in the script, and the group is given."""
    model = mlp()
    optimizer = sgd(model)
    Preconditioner(model, optimizer, chunk=chunk, process_group=dist.group.WORLD if group is ... else group)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = share(step, dist.get_rank())
        F.cross_entropy(model(x), y).backward()
        _average(model)
        optimizer.step()
    return result(model)


def broken_gradient():
    """Decay: Inf in the inputs of one rank, in one step, keeps that step out of the average on all."""
    model = mlp()
    wrapped, optimizer = DDP(model), torch.optim.SGD(model.parameters(), 0.2)
    pre = Preconditioner(wrapped, optimizer, chunk=8, decay=0.5)
    weights = []
    for step in range(3):
        optimizer.zero_grad()
        x, y = share(step, dist.get_rank())
        if step == 1 and dist.get_rank() == 2:
            x = x.clone()
            x[0, 3] = float("inf")
        F.cross_entropy(wrapped(x), y).backward()
        for p in model.parameters():
            p.grad.nan_to_num_(0, 0, 0)
        optimizer.step()
        weights.append(float(optimizer.state[model[0].weight]["consistency_weight"]))
    return result(model, weights=weights, failed=pre.stats()["failed_chunks"])


def _error(call) -> str:
    try:
        call()
    except (Exception, checkpoint.CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _step(seed=0, widths=(12, 20, 16, 5), steps=0, **options) -> str:
    model = mlp(widths=widths)
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, process_group=dist.group.WORLD, seed=seed, **options)
    pre._correction.step = steps
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    return _error(optimizer.step)


def disagreements():
    rank = dist.get_rank()
    return {
        "seed": _step(seed=7 * (rank == 2)),
        "model": _step(widths=(12, 21 if rank == 3 else 20, 5)),
        "options": _step(decay=0.5 * (rank == 1)),
        "outputs": _step(mode="whiten", outputs=rank == 2),
        "dct": _step(mode="whiten", dct=rank == 1),
        "step": _step(steps=5 * (rank == 0)),
    }


def _average(model) -> None:
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def _go_alone(who, options, change=None, sharing=None) -> str:
    """Three steps; then the ranks of ``who`` go back to the first one, or do what ``change`` says."""
    model = mlp()
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8, process_group=dist.group.WORLD, **options)
    pre._attachments[0].pooling.shares_factorisation = sharing

    def step(i):
        optimizer.zero_grad()
        x, y = share(i, dist.get_rank())
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        _average(model)
        optimizer.step()

    step(0)
    saved = copy.deepcopy(optimizer.state_dict())
    step(1)
    step(2)
    if dist.get_rank() in who:
        optimizer.load_state_dict(saved) if change is None else change(model)
    before = [p.detach().clone() for p in model.parameters()]
    error = _error(lambda: step(3))
    assert all(map(torch.equal, before, model.parameters()))
    return error


def going_alone():
    """One, two or three of the four ranks do what all must do."""
    return {
        "one": _go_alone((2,), {}),
        "three": _go_alone((0, 1, 3), {"decay": 0.5}),
        "shared": _go_alone((0,), {}, sharing=True),
        "every": _go_alone((3,), {"every": 3}),
        "frozen": _go_alone((1,), {}, lambda model: model[2].requires_grad_(False)),
    }


def going_back():
    """All ranks load the state of an earlier step, and repeat its steps: the same bits."""
    found = []
    # The first refresh after it: was expected by the old count, was not, comes after one that was.
    for options, start in (({}, 2), ({"every": 3}, 2), ({"every": 4, "decay": 0.5}, 22)):
        model = _sharded(mlp())
        optimizer = sgd(model)
        Preconditioner(model, optimizer, chunk=8, **options)
        train(model, optimizer, [dist.get_rank()], steps=start)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, [dist.get_rank()], first=start, steps=5)
        first = result(model)["parameters"]
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, [dist.get_rank()], first=start, steps=5)
        found.append(all(map(torch.equal, first, result(model)["parameters"])))
    return found


def unwrapped():
    """Without wrapper and group: it is said once, and each rank corrects with its own inputs, which differ."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("consistency_ops").addHandler(handler)
    found = averaged_by_hand(None)
    logging.getLogger("consistency_ops").removeHandler(handler)
    return {**found, "messages": messages}


def join():
    model = mlp()
    wrapped, optimizer = DDP(model), sgd(model)
    Preconditioner(wrapped, optimizer, chunk=8)
    x, y = share(0, dist.get_rank())
    with wrapped.join():
        F.cross_entropy(wrapped(x), y).backward()
        return _error(optimizer.step)


# FSDP2: the last layer has 5 outputs, so the ranks hold 2, 2, 1 and 0 of its rows


def _sharded(model, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (4,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _fsdp(options: dict, mesh=None, name="sgd") -> dict:
    model = _sharded(mlp(), mesh)
    optimizer = sgd(model, name)
    pre = Preconditioner(model, optimizer, chunk=8, **options)
    train(model, optimizer, [dist.get_rank()])
    return result(model, rows=pre.stats()["rows"], summary=pre.summary(), local=len(model[4].weight.to_local()))


def fsdp_whiten():
    return _fsdp(WHITEN, name="adamw")


def fsdp_whiten_outputs():
    return _fsdp(BOTH_SIDES, name="adamw")


def fsdp_default():
    return _fsdp({})


def fsdp_decay():
    return _fsdp(OPTIONS["decay"])


def fsdp_every():
    return _fsdp(OPTIONS["every"])


def fsdp_hybrid():
    return _fsdp({}, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def fsdp_accumulation():
    """Two micro-batches; the first is not reduced, or reduced and added."""
    found = {}
    for sync in (False, True):
        model = _sharded(mlp())
        optimizer = sgd(model)
        Preconditioner(model, optimizer, chunk=8)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = share(step, dist.get_rank())
            half = len(x) // 2
            model.set_requires_gradient_sync(sync)
            (F.cross_entropy(model(x[:half]), y[:half]) / 2).backward()
            model.set_requires_gradient_sync(True)
            (F.cross_entropy(model(x[half:]), y[half:]) / 2).backward()
            optimizer.step()
        found[sync] = result(model)
    return found


def _conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 6, 2, groups=2), nn.Flatten(), nn.Linear(54, 5)
    ).double()


def _conv_step(model, optimizer, steps=2, ranks=(0, 1, 2, 3)):
    for step in range(steps):
        optimizer.zero_grad()
        parts = [share(step, rank) for rank in ranks]
        images = [x.repeat(1, 9)[:, :108].view(-1, 3, 6, 6) for x, _ in parts]
        losses = F.cross_entropy(model(torch.cat(images)), torch.cat([y for _, y in parts]), reduction="none")
        torch.stack([part.mean() for part in losses.split([len(y) for _, y in parts])]).mean().backward()
        optimizer.step()


def fsdp_convolutions():
    """The grouped convolution is left alone: rows of several groups lie on one rank."""
    model = fully_shard(_conv_net(), mesh=init_device_mesh("cpu", (4,)))
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8)
    _conv_step(model, optimizer, ranks=(dist.get_rank(),))
    return result(model, summary=pre.summary())


def single_convolutions(skip=("2",)) -> list[torch.Tensor]:
    model = _conv_net()
    optimizer = sgd(model)
    Preconditioner(model, optimizer, chunk=8, skip=skip)
    _conv_step(model, optimizer)
    return [p.detach() for p in model.parameters()]


def _adam(model, options: dict, skip=(), decay=0.3):
    """Its weight decay is part of the gradient."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=decay)
    return optimizer, Preconditioner(model, optimizer, chunk=4, skip=skip, **options)


def fsdp_both_sides():
    """Convolutions and their cosines, the grouped one left alone; a step without gradients, and a plain optimizer's."""
    mesh = init_device_mesh("cpu", (4,))
    model = fully_shard(_conv_net(), mesh=mesh)
    optimizer, pre = _adam(model, BOTH_SIDES_AND_COSINES)
    _conv_step(model, optimizer, ranks=(dist.get_rank(),))
    idle = []
    for options in (BOTH_SIDES_AND_COSINES, None):
        still = fully_shard(_conv_net(), mesh=mesh)
        adam, _ = (
            (torch.optim.Adam(still.parameters(), 0.01), None) if options is None else _adam(still, options, (), 0)
        )
        for p in still.parameters():
            adam.state[p] = {"step": torch.tensor(9.0), "exp_avg": p.detach() / 3, "exp_avg_sq": torch.ones_like(p)}
        x, y = share(0, dist.get_rank())
        (0.0 * F.cross_entropy(still(x.repeat(1, 9)[:, :108].view(-1, 3, 6, 6)), y)).backward()
        adam.step()
        idle.append([p.detach().to_local().clone() for p in still.parameters()])
    return result(model, summary=pre.summary(), idle=idle, start=[p.detach() for p in _conv_net().parameters()])


def single_both_sides(options: dict) -> list[torch.Tensor]:
    model = _conv_net()
    _conv_step(model, _adam(model, options, skip=("2",))[0])
    return [p.detach() for p in model.parameters()]


def column_parallel_both_sides():
    """All ranks see the same rows, and have some of the outputs."""
    model = mlp()
    split = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (4,)), {"0": split, "2": split})
    optimizer = sgd(model, "adamw")
    pre = Preconditioner(model, optimizer, chunk=8, **BOTH_SIDES)
    train(model, optimizer, range(4))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("consistency_ops").addHandler(handler)
    rows_and_units = parallelize_module(block(), init_device_mesh("cpu", (4,)), PARALLEL)
    Preconditioner(rows_and_units, sgd(rows_and_units, "adamw"), chunk=8, **BOTH_SIDES)
    logging.getLogger("consistency_ops").removeHandler(handler)
    return result(model, summary=pre.summary(), messages=messages)


def fsdp_mixed_precision():
    """bfloat16 compute, float32 parameters: the same as DDP under autocast would be hard to say, so only sane."""
    model = mlp(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _sharded(model, mp_policy=policy)
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8)
    train(model, optimizer, [dist.get_rank()], dtype=torch.float32)
    return result(model, rows=pre.stats()["rows"], failed=pre.stats()["failed_chunks"])


class Transposed(nn.Module):
    """Weight (in, out), as Conv1D of Hugging Face: the shards of FSDP2 are units."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight + self.bias


layers.register(Transposed, matrix=lambda weight: weight.T)


def _transposed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Transposed(), nn.Linear(5, 5).double())


def single_transposed(options: dict, steps=STEPS, left=0) -> list[torch.Tensor]:
    """``left`` is the number of first steps that leave the transposed weight and its bias alone."""
    model = _transposed()
    optimizer = sgd(model)
    pre = Preconditioner(model, chunk=8, **options)

    def correct(*_):
        kept = [p.grad.clone() for p in model[0].parameters()]
        leave = pre.steps < left
        pre.step()
        if leave:
            for p, grad in zip(model[0].parameters(), kept, strict=True):
                p.grad.copy_(grad)

    optimizer.register_step_pre_hook(correct)
    train(model, optimizer, range(4), steps=steps)
    return [p.detach() for p in model.parameters()]


def fsdp_transposed():
    """The preconditioner is constructed after sharding, or before."""
    found = {}
    for name, options, early in (("late", {}, False), ("early", {}, True), ("stored", STORED, False)):
        model = _transposed()
        if early:
            pre = Preconditioner(model, chunk=8, **options)
            hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = fully_shard(model, mesh=hybrid if early else init_device_mesh("cpu", (4,)))
        optimizer = sgd(model)
        if early:
            optimizer.register_step_pre_hook(lambda *_, pre=pre: pre.step())
        else:
            pre = Preconditioner(model, optimizer, chunk=8, **options)
        train(model, optimizer, [dist.get_rank()])
        found[name] = result(model, summary=pre.summary(), failed=pre.stats()["failed_chunks"])
    return found


TRANSPOSED_WHITEN = dict(mode="whiten", every=2)


def single_transposed_whiten(**options) -> list[torch.Tensor]:
    model = _transposed()
    optimizer = sgd(model, "adamw")
    Preconditioner(model, optimizer, chunk=8, **TRANSPOSED_WHITEN, **options)
    train(model, optimizer, range(4))
    return [p.detach() for p in model.parameters()]


def fsdp_transposed_whiten(**options):
    """The displacement's units are exchanged for whole rows, too, and back."""
    model = fully_shard(_transposed(), mesh=init_device_mesh("cpu", (4,)))
    optimizer = sgd(model, "adamw")
    pre = Preconditioner(model, optimizer, chunk=8, **TRANSPOSED_WHITEN, **options)
    train(model, optimizer, [dist.get_rank()])
    return result(model, summary=pre.summary(), failed=pre.stats()["failed_chunks"])


def fsdp_transposed_whiten_outputs():
    return fsdp_transposed_whiten(outputs=True)


def units_in_two_dimensions():
    """Rows of the input over both dimensions of a mesh, and units of the weight."""
    mesh = init_device_mesh("cpu", (2, 2))
    model = nn.Linear(12, 5, bias=False).double()
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(1), Shard(1)]))
    pre = Preconditioner(model)
    model(distribute_tensor(batch(0)[0], mesh, [Shard(0), Shard(0)])).square().sum().backward()
    before = model.weight.grad.full_tensor()
    pre.step()
    return pre.summary(), torch.equal(before, model.weight.grad.full_tensor())


def flattened():
    """Weights as FullyShardedDataParallel leaves them (it needs an accelerator), before and after its constructor."""
    found = []
    for early in (True, False):
        model = mlp()
        flat = nn.Parameter(model[0].weight.detach().flatten()[:60])
        if early:
            model[0].weight = flat
        pre = Preconditioner(model, process_group=dist.group.WORLD)
        model[0].weight = flat
        flat.grad = torch.ones_like(flat)
        pre.step()
        found.append((pre.summary(), bool((flat.grad == 1).all())))
    return found


# Work sharing: each rank factors some of the chunks


def shared(name="default"):
    """Forced sharing, as so small a model is cheaper alone: eight chunks on four ranks, and on two of a hybrid mesh."""
    found = []
    for mesh in (None, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))):
        model = DDP(mlp()) if mesh is None else _sharded(mlp(), mesh)
        optimizer = sgd(model)
        pre = Preconditioner(model, optimizer, chunk=8, **OPTIONS[name])
        pre._attachments[0].pooling.shares_factorisation = True
        with Traffic() as traffic:
            train(model, optimizer, [dist.get_rank()])
        stats = pre.stats()
        calls = [call for call in traffic.calls if "reduce_scatter" in call or "allgather" in call]
        found.append(result(model, calls=calls, damping=stats["max_damping"], failed=stats["failed_chunks"]))
    return found


def shared_absolute():
    return shared("absolute")


def shared_every():
    return shared("every")


def shared_convolutions():
    """A grouped convolution has a mean diagonal for each group."""
    model = DDP(_conv_net())
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8)
    pre._attachments[0].pooling.shares_factorisation = True
    _conv_step(model, optimizer, ranks=(dist.get_rank(),))
    return result(model)


def one_unit_not_finite():
    """One unit of rank 0 is NaN, of all ranks 1e200: by scaling, what one process and ranks make of the gradient."""
    found = {}
    for scaling in ("trace", "absolute"):
        for value, broken in ((float("nan"), {0}), (1e200, {0, 1, 2, 3})):
            inputs = [10 * torch.randn(30, 64, dtype=torch.float64) for _ in range(dist.get_world_size())]
            for rank in broken:
                inputs[rank][3, 5] = value
            grad = torch.randn(8, 64, dtype=torch.float64)

            def corrected(xs, sharing=None, scaling=scaling, grad=grad):
                layer = nn.Linear(64, 8, bias=False).double()
                group = None if sharing is None else dist.group.WORLD
                pre = Preconditioner(layer, chunk=16, group=1, scaling=scaling, process_group=group)
                pre._attachments[0].pooling.shares_factorisation = sharing
                for x in xs:
                    layer(x)
                layer.weight.grad = grad.clone()
                pre.step()
                return layer.weight.grad

            mine = [inputs[dist.get_rank()]]
            found[scaling, value] = grad, corrected(inputs), corrected(mine, False), corrected(mine, True)
    return found


def placements():
    """Return the debug log of who holds what under DDP and fully_shard."""
    log, found = logging.getLogger("consistency_ops"), {}
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        for name in ("ddp", "fully_shard"):
            model = DDP(mlp()) if name == "ddp" else _sharded(mlp())
            optimizer = sgd(model)
            Preconditioner(model, optimizer, chunk=8)
            found[name] = []
            for _ in range(3):
                messages: list[str] = []
                train(model, optimizer, [dist.get_rank()], steps=1)
                found[name].append([text for text in messages if "Placement(" in text])
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return found


# Checkpoints


def _save(model, optimizer, folder) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def _load(model, optimizer, folder, group=None, partial=False) -> None:
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=partial)
    checkpoint.load(saved, checkpoint_id=folder, process_group=group, planner=planner)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def _shared_folder() -> str:
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def _checkpoint(options: dict, start) -> dict:
    """Saved on four ranks after three steps; resumed on four, and on two; both go on for three steps."""
    folder = _shared_folder()
    four = init_device_mesh("cpu", (4,))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))["shard"]  # two jobs of two ranks

    def job(mesh, seed):
        model = start(mesh, seed)
        optimizer = sgd(model, "adamw")
        Preconditioner(model, optimizer, chunk=8, **options)
        each = 4 // mesh.size()
        return model, optimizer, range(each * mesh.get_local_rank(), each * (mesh.get_local_rank() + 1))

    model, optimizer, shares = job(four, 0)
    train(model, optimizer, shares, steps=3)
    _save(model, optimizer, folder)
    train(model, optimizer, shares, first=3, steps=3)
    found = {"uninterrupted": result(model)}
    for name, mesh in (("four", four), ("two", two)):
        resumed, optimizer, shares = job(mesh, 9)
        _load(resumed, optimizer, folder, mesh.get_group())
        train(resumed, optimizer, shares, first=3, steps=3)
        found[name] = result(resumed)
    return found


def checkpoint_fully_shard():
    def start(mesh, seed):
        return _sharded(mlp(seed=seed), mesh)

    return [_checkpoint(options, start) for options in ({"decay": 0.5}, {"every": 2}, BOTH_SIDES)]


def checkpoint_ddp():
    def start(mesh, seed):
        return DDP(mlp(seed=seed), process_group=mesh.get_group())

    return [_checkpoint({"decay": 0.5}, start), _checkpoint({"every": 2}, start)]


def checkpoint_tensor_parallel():
    """Row-parallel chunks of four ranks are not those of two."""

    def start(mesh, seed):
        return parallelize_module(block(seed), mesh, PARALLEL)

    folder, found = _shared_folder(), []
    four = init_device_mesh("cpu", (4,))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "tp"))["tp"]
    for seed, mesh in enumerate((four, four, two)):
        model = start(mesh, seed)
        optimizer = sgd(model, "adamw")
        pre = Preconditioner(model, optimizer, chunk=8, decay=0.5)
        error = ""
        if seed == 0:
            train(model, optimizer, range(4), steps=3)
            _save(model, optimizer, folder)
        else:
            load = partial(_load, model, optimizer, folder, mesh.get_group())
            error = _error(load)
            if error:
                load(partial=True)
        train(model, optimizer, range(4), first=3, steps=2)
        state = {name: entries["covariance"] for name, entries in pre.state_dict()["layers"].items()}
        weight = float(optimizer.state[model.down.weight][f"consistency_weight_of_{mesh.size()}"].to_local())
        found.append(result(model, state=state, error=error, weight=weight))
    return found


# Tensor parallel: 12 -> 16 column-parallel, 16 -> 5 row-parallel


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Split(nn.Module):
    """The same function, with the second layer as one layer for each shard of its units and a bias of its own."""

    def __init__(self, block: Block, parts: int):
        super().__init__()
        self.up = block.up
        self.parts = nn.ModuleList(nn.Linear(16 // parts, 5, bias=False).double() for _ in range(parts))
        for part, weight in zip(self.parts, block.down.weight.detach().chunk(parts, 1), strict=True):
            part.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(block.down.bias.detach().clone())

    def forward(self, x):
        h = F.relu(self.up(x)).chunk(len(self.parts), 1)
        return sum(part(piece) for part, piece in zip(self.parts, h, strict=True)) + self.bias


def block(seed=0) -> Block:
    torch.manual_seed(seed)
    return Block().double()


def single_split(parts: int, options: dict, steps=STEPS, name="sgd") -> dict[str, torch.Tensor]:
    model = Split(block(), parts)
    optimizer = sgd(model, name)
    Preconditioner(model, optimizer, chunk=8, **options)
    train(model, optimizer, range(4), steps=steps)
    found = {name: p.detach() for name, p in model.up.named_parameters(prefix="up")}
    found["down.weight"] = torch.cat([part.weight.detach() for part in model.parts], 1)
    return {**found, "down.bias": model.bias.detach()}


PARALLEL = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def ddp_launches():
    """Operators of ours and collectives in every step of the optimizer, by options."""
    calls = {}
    for name, options in OPTIONS.items():
        model = mlp()
        wrapped, optimizer = DDP(model), sgd(model)
        Preconditioner(wrapped, optimizer, chunk=8, **options)
        for step in range(3):
            optimizer.zero_grad()
            x, y = share(step, dist.get_rank())
            F.cross_entropy(wrapped(x), y).backward()
            with Traffic("consistency_ops") as traffic:
                optimizer.step()
            calls.setdefault(name, []).append(traffic.calls)
    return calls


class Traffic(TorchDispatchMode):
    """Notes the collectives, and the operators of other ``namespaces``, of the optimizer's step."""

    def __init__(self, *namespaces):
        super().__init__()
        self.namespaces = "c10d", "_c10d_functional", *namespaces
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in self.namespaces:
            self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


def _parallel_block(mesh, shard=None):
    model = parallelize_module(block(), mesh["tp"], PARALLEL)
    if shard is not None:
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=shard)
        fully_shard(model, mesh=shard)
    return model


def _tensor_parallel(options: dict, mesh, ranks, shard=None, name="sgd") -> dict:
    model = _parallel_block(mesh, shard)
    optimizer = sgd(model, name)
    pre = Preconditioner(model, optimizer, chunk=8, **options)
    train(model, optimizer, ranks, steps=STEPS - 1)
    x = torch.cat([share(STEPS - 1, rank)[0] for rank in ranks])
    y = torch.cat([share(STEPS - 1, rank)[1] for rank in ranks])
    optimizer.zero_grad()
    losses = F.cross_entropy(model(x), y, reduction="none")
    torch.stack([part.mean() for part in losses.split([SHARES[r] for r in ranks])]).mean().backward()
    with Traffic() as traffic:
        optimizer.step()
    named = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return {"named": named, "same": same_bits(list(named.values())), "summary": pre.summary(), "calls": traffic.calls}


def tensor_parallel():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    return {name: _tensor_parallel(options, mesh, range(4)) for name, options in OPTIONS.items()}


def tensor_parallel_and_fully_shard():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first = 2 * mesh.get_local_rank("dp")
    return {
        name: _tensor_parallel(options, mesh, (first, first + 1), shard=mesh["dp"]) for name, options in OPTIONS.items()
    }


TENSOR_PARALLEL_WHITEN = {
    "sgd": {"mode": "whiten", "every": 2},
    # A norm that is kept is that of the whole row-parallel layer, which `Split` has in parts.
    "adamw": {"mode": "whiten", "every": 2, "keep_norm": False},
}


def tensor_parallel_whiten():
    """Displacements of column- and row-parallel weights, without and with fully_shard; and a first step's norms."""
    alone = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first = 2 * both.get_local_rank("dp")
    found = {}
    for name, options in TENSOR_PARALLEL_WHITEN.items():
        found[name, 4] = _tensor_parallel(options, alone, range(4), name=name)
        found[name, 2] = _tensor_parallel(options, both, (first, first + 1), shard=both["dp"], name=name)
    for keep_norm in (True, False):
        model = _parallel_block(alone)
        before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
        Preconditioner(model, optimizer, mode="whiten", chunk=8, keep_norm=keep_norm)
        train(model, optimizer, range(4), steps=1)
        found["moves", keep_norm] = {n: p.detach().full_tensor() - before[n] for n, p in model.named_parameters()}
    return found


def tensor_parallel_and_group():
    """Gradients of tensor-parallel weights averaged by hand over the other dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(block(), mesh["tp"], PARALLEL)
    optimizer, first, group = sgd(model), 2 * mesh.get_local_rank("dp"), mesh.get_group("dp")
    Preconditioner(model, optimizer, chunk=8, process_group=group)

    def average(*_):
        for p in model.parameters():
            dist.all_reduce(p.grad.to_local(), group=group)
            p.grad.to_local().div_(2)

    optimizer.register_step_pre_hook(average)
    optimizer._optimizer_step_pre_hooks.move_to_end(next(iter(optimizer._optimizer_step_pre_hooks)))
    train(model, optimizer, (first, first + 1))
    named = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return {"named": named, "same": same_bits(list(named.values()))}


def _square_step(model, optimizer, x) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(x(step)) ** 2).sum().backward()
        optimizer.step()


def dtensor_inputs():
    """Weights replicated, input rows sharded: gradients are sums that are still to be taken."""
    mesh = init_device_mesh("cpu", (4,))
    model = distribute_module(block(), mesh)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pre = Preconditioner(model, optimizer, chunk=8)
    rank = dist.get_rank()
    _square_step(
        model, optimizer, lambda step: DTensor.from_local(batch(step)[0][10 * rank : 10 * rank + 10], mesh, [Shard(0)])
    )
    return result(model, rows=pre.stats()["rows"])


def single_squares() -> list[torch.Tensor]:
    model = block()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    Preconditioner(model, optimizer, chunk=8)
    _square_step(model, optimizer, lambda step: batch(step)[0])
    return [p.detach() for p in model.parameters()]


# Compiled models; aot_eager has the graphs of inductor and needs no compiler


def _compiled(model, shares) -> dict:
    optimizer = sgd(model)
    pre = Preconditioner(model, optimizer, chunk=8)
    train(torch.compile(model, backend="aot_eager"), optimizer, shares, steps=3)
    named = {n: p.detach().full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {"named": named, "parameters": list(named.values()), "summary": pre.summary()}


def compiled():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    mine = [dist.get_rank()]
    return {
        "ddp": _compiled(DDP(mlp()), mine),
        "fully_shard": _compiled(_sharded(mlp()), mine),
        "tensor_parallel": _compiled(parallelize_module(block(), mesh, PARALLEL), range(4)),
        "transposed": _compiled(fully_shard(_transposed(), mesh=mesh), mine),
    }
