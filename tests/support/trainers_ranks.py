"""The scenarios of tests/test_trainers.py on two ranks: other people's trainers, launched for data parallelism."""

import contextlib
import copy
import logging
import os
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import consistency_ops as co

from . import frameworks, trainers
from .ranks import same_bits

STEPS = 6
accelerate, lightning, _ = frameworks.require("accelerate", "lightning", "transformers")  # once, before the fork


@contextlib.contextmanager
def launched():
    """The environment that a launcher sets, and what our log says meanwhile."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")  # the process group is there already
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("consistency_ops").addHandler(handler)
    with tempfile.TemporaryDirectory() as folder:
        yield folder, messages
    logging.getLogger("consistency_ops").removeHandler(handler)


def report(model, pre, messages):
    return {
        "same": same_bits(list(model.parameters())),
        "steps": pre.steps,
        "rows": pre.stats(condition=False)["rows"],
        "layers": pre.stats(condition=False)["layers"],
        "messages": messages,
    }


def transformed():
    with launched() as (folder, messages):
        trainer = trainers.gpt2_trainer(folder, 0, steps=STEPS)
        pre = co.Preconditioner(trainer.model, trainer.create_optimizer())
        trainer.train()
        return report(trainer.model, pre, messages)


def accelerated():
    """A plain loop; every rank takes its part of a batch."""
    with launched() as (_, messages):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        accelerator = accelerate.Accelerator(cpu=True)
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(
            torch.randn(96, 8, generator=generator), torch.randint(4, (96,), generator=generator)
        )
        pre = co.Preconditioner(model, optimizer)
        wrapped, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(data, batch_size=8)
        )
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(torch.nn.functional.cross_entropy(wrapped(x), y))
            optimizer.step()
        return report(model, pre, messages)


def lightened():
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.model(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            self.pre = co.Preconditioner(self, optimizer)
            return optimizer

    with launched() as (folder, messages):
        torch.manual_seed(0)
        model = Classifier()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*trainers.digits()), batch_size=32)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=2, strategy="ddp", default_root_dir=folder, **quiet
        )
        trainer.fit(model, loader)
        return report(model, model.pre, messages)


def _steps(model, wrapped):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = co.Preconditioner(wrapped, optimizer)
    torch.manual_seed(dist.get_rank())  # the same dropout in both runs
    for part in trainers.sentences(count=8 * STEPS).chunk(STEPS):
        optimizer.zero_grad()
        ids = part.chunk(dist.get_world_size())[dist.get_rank()]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in parameters], pre


def sharded():
    """GPT-2, whose weights are stored as (in, out), under fully_shard and under DistributedDataParallel."""
    with launched() as (folder, messages):
        model = trainers.gpt2_trainer(folder, 0).model
        other = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        got, pre = _steps(model, fully_shard(model, mesh=mesh))
        want, _ = _steps(other, DistributedDataParallel(other))
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
        found = report(other, pre, messages)
        return {**found, "same": same_bits(got), "layers": pre.stats()["layers"], "difference": difference}
