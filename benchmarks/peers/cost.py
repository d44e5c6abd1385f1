"""The cost of a step with each optimizer: CPU time over that of SGD in one interleaved run, and kept memory.

    python -m benchmarks.peers.cost [--models NAME ...] [--optimizers NAME ...] [--memory] [--json FILE]

A step is zero_grad, forward, backward and update on random data.  A time is the mean of ten steps, one of which renews
what is renewed every ten.  Memory is the bytes of all tensors that are alive after three steps and are neither
parameters, gradients nor data, over the bytes of the parameters; work space inside a call is not seen.  `--memory`
measures it alone and writes it into the rows that are stored.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.micro.timing import command, interleaved, save
from benchmarks.peers.optimizers import PEERS
from benchmarks.peers.runs import RESULTS
from benchmarks.peers.tasks import Block, named, resnet

STEP_RATE = 1e-4  # small, so that nothing diverges


class Sequence(nn.Module):
    """Transformer blocks on random token vectors; the classes come from the mean token."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.block, self.head = Block(width, heads, causal), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


# name: (model, shape of a batch); "large": batches that people use
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "deep MLP, batch 500": (lambda: named("deep-mlp", (1, 28, 28))(0), (500, 1, 28, 28)),
    "ResNet-8, batch 32": (resnet, (32, 3, 32, 32)),
    "half-width ViT-B block, 394 tokens": (lambda: Sequence(384, 6, False), (2, 197, 384)),
    "half-width GPT-2 block, 256 tokens": (lambda: Sequence(384, 6, True), (1, 256, 384)),
    "large: convnet B, batch 128": (lambda: named("convnet", (3, 32, 32))(0), (128, 3, 32, 32)),
    "large: GPT-2 small block, 2048 tokens": (lambda: Sequence(768, 12, True), (2, 1024, 768)),
}
ONLY = {"large: GPT-2 small block, 2048 tokens": ("sgd", "adamw", "sgd+pre", "adamw+pre")}  # a step takes seconds
ROUNDS, LARGE_ROUNDS = 10, 3  # one step in ten renews the inverses of K-FAC, FOOF, SOAP, Shampoo and SINGD


def setting(peer: str) -> dict[str, float]:
    """Return the setting of ``peer``, with ``warm_up=0`` for a step of the long run."""
    more = {"warm_up": 0} if peer in ("kfac", "foof") else {}
    return {**PEERS[peer].trials[0], "lr": STEP_RATE, **more}


def step_of(model: nn.Module, peer: str, x: Tensor, y: Tensor) -> Callable[[], float]:
    step = PEERS[peer].build(model, "cross_entropy", **setting(peer))
    run = lambda: step(x, y, functional.cross_entropy)  # noqa: E731
    return run


def live_bytes() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's deprecated classes answer isinstance with a warning
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def kept(build: Callable[[], nn.Module], peer: str, x: Tensor, y: Tensor) -> float:
    """Return the bytes that the optimizer keeps between steps over the bytes of the parameters."""
    before = live_bytes()
    model = build()
    parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
    buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
    run = step_of(model, peer, x, y)
    for _ in range(3):
        run()
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    return (live_bytes() - before - parameters - buffers - gradients) / parameters


def kept_rows(path: str | None, models: list[str]) -> tuple[list[dict], dict[str, str]]:
    """Return the figures of an earlier run on other models."""
    file = Path(path) if path else RESULTS / "cost.json"
    old = json.loads(file.read_text()) if file.exists() else {"rows": [], "failures": {}}
    failures = {name: text for name, text in old["failures"].items() if not name.startswith(tuple(models))}
    return [row for row in old["rows"] if row["model"] not in models], failures


def measure_memory(path: str | None, models: list[str], peers: list[str]) -> None:
    """Measure what the optimizers keep, and write it into the rows of an earlier run."""
    file = Path(path) if path else RESULTS / "cost.json"
    results = json.loads(file.read_text())
    how = {"command": command(), "date": datetime.date.today().isoformat()}
    for row in results["rows"]:
        if row["model"] not in models or row["optimizer"] not in peers:
            continue
        build, shape = MODELS[row["model"]]
        torch.manual_seed(0)
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        before, row["memory"] = row["memory"], kept(build, row["optimizer"], x, y)
        row["memory_measured"] = how
        print(f"{row['model']:<40} {row['optimizer']:<12} +{before:.2f} -> +{row['memory']:.2f}", flush=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--memory", action="store_true", help="measure what is kept, not the times")
    parser.add_argument("--json", help="write here instead of benchmarks/results/peers/cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers = [name for name in dict.fromkeys(["sgd", *arguments.optimizers]) if PEERS[name].version]
    if arguments.memory:
        measure_memory(arguments.json, arguments.models, peers)
        return
    rows, failures = kept_rows(arguments.json, arguments.models)
    how = {"command": command(), "date": datetime.date.today().isoformat()}  # models are measured on different days
    for name in arguments.models:
        build, shape = MODELS[name]
        torch.manual_seed(0)
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        steps, memory = {}, {}
        for peer in peers:
            if peer not in ONLY.get(name, peers):
                continue
            try:
                memory[peer] = kept(build, peer, x, y)
                steps[peer] = step_of(build(), peer, x, y)
            except Exception as error:  # a peer's own failure; the others go on
                failures[f"{name}, {peer}"] = f"{type(error).__name__}: {str(error)[:120]}"
                print(f"{name}, {peer}: {failures[f'{name}, {peer}']}", flush=True)
        rounds = LARGE_ROUNDS if name in ONLY else ROUNDS
        times = interleaved(steps, rounds=(rounds, rounds), clock=time.process_time)
        mean = {peer: statistics.mean(values) for peer, values in times.items()}
        for peer, seconds in mean.items():
            row = {"model": name, "optimizer": peer, "ms": 1e3 * seconds, "ratio": seconds / mean["sgd"]}
            rows.append(row | {"memory": memory[peer], "rounds": len(times[peer]), **how})
            print(
                f"{name:<40} {peer:<12} {1e3 * seconds:9.1f} ms  x{row['ratio']:.2f}  +{memory[peer]:.1f}", flush=True
            )
        save("peers/cost", {"rows": rows, "failures": failures}, arguments.json)


if __name__ == "__main__":
    main()
