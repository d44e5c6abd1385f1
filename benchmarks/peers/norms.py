"""Whether the mapped step of whitened coordinates keeps its norm: four small tasks, at the rate of the optimizer alone.

    python -m benchmarks.peers.norms [TASK ...] [--bases adamw muon] [--settings NAME ...] [--rates F ...] [--seeds N]

Every run has the warm-up and decay of the whole trainings on 160 to 240 steps, and takes one or two CPU seconds.
``RATES`` are those at which the optimizer alone does well; ``--rates`` are factors of them. Every run is a JSON line in
``benchmarks/results/peers/full/norms.jsonl``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import consistency_ops as co
from benchmarks import DATA
from benchmarks.micro.timing import command
from benchmarks.peers.family import Family
from benchmarks.peers.full import FOLDER, factor
from benchmarks.peers.optimizers import BASES
from benchmarks.peers.runs import Store, versions
from benchmarks.peers.tasks import TASKS, Gpt, Split, mlp, seeded, small_convnet

EXAMPLES = 1000  # training and test examples for the loss at the end


def normalised_mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise([784, *[64] * 6]):
        layers += [nn.Linear(inputs, outputs), nn.RMSNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


# Name: the task of which it has data and loss, the model, its description, batch and steps.
SMALL: dict[str, tuple[str, Callable[[int], nn.Module], str, int, int]] = {
    "autoencoder": ("autoencoder", mlp([784, 64, 16, 64, 784], nn.Tanh, 1.0), "784-64-16-64-784", 100, 200),
    "deep-mlp": ("deep-mlp", normalised_mlp, "6 x 64, RMS norm", 200, 160),
    "convnet": ("fashion-convnet", seeded(small_convnet), "3 convolutions", 64, 200),
    "gpt": ("char-gpt", seeded(lambda: Gpt(width=32)), "2 x 32", 8, 240),
}
RATES = {("adamw", task): 0.01 for task in SMALL} | {
    ("muon", "autoencoder"): 0.01,
    ("muon", "deep-mlp"): 0.018,
    ("muon", "convnet"): 0.01,
    ("muon", "gpt"): 0.018,
}
SETTINGS: dict[str, dict | None] = {
    "alone": None,
    "norm kept": {"damping": 0.3, "keep_norm": True},
    "norm free": {"damping": 0.3, "keep_norm": False},
    "norm free, damping 0.1": {"damping": 0.1, "keep_norm": False},
    "norm free, damping 1": {"damping": 1.0, "keep_norm": False},
    # Other members of the family, one change of "norm kept" each.
    **{
        name: {"damping": 0.3, **change}
        for name, change in (
            ("every=1", {"every": 1}),
            ("every=32", {"every": 32}),
            ("chunk=32", {"chunk": 32}),
            ("chunk=64", {"chunk": 64}),
            ("chunk=None", {"chunk": None}),
            ("bias=False", {"bias": False}),
            ("without the last layer", {"skip": ["head", "7"]}),
            ("outputs=True", {"outputs": True}),
            ("outputs=True, keep_norm=False", {"outputs": True, "keep_norm": False}),
            # Never longer; in plain torch, because the product has no such way.
            ("norm clipped", {"norm": "clip", "every": 10}),
        )
    },
}


def train(task: str, base: str, setting: str, lr: float, seed: int, split: Split) -> dict:
    name, build, _, batch, steps = SMALL[task]
    loss_of = TASKS[name].loss
    model = build(seed)
    torch.manual_seed(seed)
    optimizer = BASES[base](model, lr)
    parts = getattr(optimizer, "parts", [optimizer])
    options = SETTINGS[setting]
    pre = family = None
    if options is not None and "norm" in options:
        family = Family(model, parts, **options)
    elif options is not None:
        pre = co.Preconditioner(model, parts, mode="whiten", **options)
    groups = [group for part in parts for group in part.param_groups]
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = split.train
    start = time.process_time()
    for i in range(1, steps + 1):
        for group in groups:
            group["lr"] = lr * factor(i, steps)
        rows = torch.randint(len(x), (batch,), generator=generator)
        model.zero_grad(set_to_none=False)
        loss = loss_of(model(x[rows]), y[rows])
        loss.backward()
        if not math.isfinite(loss.item()):
            return {"train_loss": None, "test_loss": None, "failure": f"step {i}: loss {loss.item():.3g}"}
        for part in parts if family is None else [family]:
            part.step()
    seconds = time.process_time() - start
    del pre
    model.eval()
    with torch.no_grad():
        ends = [float(loss_of(model(x[:EXAMPLES]), y[:EXAMPLES])) for x, y in (split.train, split.test)]
    return {"train_loss": ends[0], "test_loss": ends[1], "failure": None, "seconds": round(seconds, 3)}


def run(store: Store, task: str, base: str, setting: str, lr: float, seed: int, data: Path, splits: dict) -> dict:
    """Return the stored run, or make and store a new one."""
    key = dict(task=task, optimizer=base, phase=setting, setting={"lr": lr}, seed=seed, steps=SMALL[task][4])
    if found := store.find(**key):
        return found
    if task not in splits:
        splits[task] = TASKS[SMALL[task][0]].load(data)
    made = key | train(task, base, setting, lr, seed, splits[task])
    made["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    made["machine"], made["command"] = versions(), command()
    store.add(made)
    print(f"{task} {base} {setting} {lr:g} seed {seed}: {made['train_loss']} {made['failure'] or ''}", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(SMALL), metavar="TASK", help=", ".join(SMALL))
    parser.add_argument("--bases", nargs="+", choices=("adamw", "muon"), default=["muon", "adamw"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS)[:3], metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="factors of the rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=FOLDER / "norms.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store, splits = Store(options.out), {}
    for task, base, setting in itertools.product(options.tasks, options.bases, options.settings):
        for share, seed in itertools.product(options.rates, range(options.seeds)):
            lr = float(f"{RATES[base, task] * share:.2g}")
            run(store, task, base, setting, lr, seed, options.data_dir, splits)


if __name__ == "__main__":
    main()
