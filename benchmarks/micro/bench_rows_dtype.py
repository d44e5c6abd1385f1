"""What rows that are rounded to bfloat16 (``rows_dtype``) do to the correction and to training.

    python -m benchmarks.micro.bench_rows_dtype [--json FILE] [--epochs 3]

The network 784-256-256-10 with ReLU on MNIST or Fashion-MNIST (CONSISTENCY_OPS_DATA), batch 500, SGD with momentum.
From one start, with rows in float32 and in bfloat16: how far the corrected gradients of one batch are apart (of all
layers, Frobenius norm) at several dampings, before training and after it; and the loss over the training images and the
error on the test images at the end, over three seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks import DATA
from benchmarks.micro.timing import save
from benchmarks.training import fit

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
DAMPINGS = (1.0, 0.1, 0.01, 0.001)
BATCH = 500


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def corrected(model: nn.Module, split: fit.Split, damping: float, dtype: torch.dtype | None) -> torch.Tensor:
    pre = co.Preconditioner(model, damping=damping, rows_dtype=dtype)
    model.zero_grad()
    functional.cross_entropy(model(split.train_x[:BATCH]), split.train_y[:BATCH]).backward()
    pre.step()
    pre.remove()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distances(model: nn.Module, split: fit.Split) -> dict[str, float]:
    found = {}
    for damping in DAMPINGS:
        exact, rounded = (corrected(model, split, damping, dtype) for dtype in DTYPES.values())
        found[str(damping)] = float((rounded - exact).norm() / exact.norm())
    return found


def train(split: fit.Split, dtype: torch.dtype | None, seed: int, epochs: int) -> tuple[nn.Module, dict[str, float]]:
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pre = co.Preconditioner(model, optimizer, rows_dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(split.train_y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(split.train_x[rows]), split.train_y[rows]).backward()
            optimizer.step()
    kept = sum(layer.capture.rows.nbytes for layer in pre._layers if layer.capture.rows is not None)
    pre.remove()
    with torch.no_grad():
        loss = float(functional.cross_entropy(model(split.train_x), split.train_y))
    return model, {"train_loss": loss, "test_error": fit.error_of(model, split), "rows_bytes": kept}


def measure(name: str, folder: Path, epochs: int) -> dict:
    split = fit.load(name, {"train": 20_000, "test": 10_000}, folder).standard()
    found = {"before": distances(network(0), split)}
    for kind, dtype in DTYPES.items():
        runs = [train(split, dtype, seed, epochs) for seed in range(3)]
        found[kind] = [numbers for _, numbers in runs]
        if kind == "float32":
            found["after"] = distances(runs[0][0], split)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the numbers here (default: benchmarks/results)")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, DATA / name, options.epochs) for name in ("mnist", "fashion-mnist")}
    for name, found in results.items():
        for when in ("before", "after"):
            apart = ", ".join(f"{damping}: {value:.1e}" for damping, value in found[when].items())
            print(f"{name:14} gradients apart {when:6} training at damping {apart}")
        for kind in DTYPES:
            for run in found[kind]:
                print(f"{name:14} {kind:9} train loss {run['train_loss']:.4f}, test error {run['test_error']:.4f}")
    print(save("rows_dtype", {"epochs": options.epochs, **results}, options.json))


if __name__ == "__main__":
    main()
