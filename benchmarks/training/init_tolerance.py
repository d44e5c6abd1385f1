"""D: tolerance to the scale of the initial weights, the one figure of arXiv 1708.00631's code that can be read.

    python -m benchmarks.training init-tolerance [--data-dir DIR] [--runs NAME ...] [--epochs 20] [--seed 0]

Network C, the deep MLP of the training command (784-128, ten times 128-128, 128-10, ReLU, an RMS norm before every
weight layer but the first), on MNIST: raw pixels less their mean over the training images, batch 500, weights normal
with the given standard deviation, biases zero.  SGD2 at damping 1; the first layer (785 units with the bias, more than
500) takes plain SGD steps.  The rate is selected at epochs 1 and 11, later ones not above the first.  Weight decay 1e-3
for a deviation of 100 and more, 5e-4 for 10 and 1, 1e-4 below.

Every finished run is kept in benchmarks/results/init_tolerance.json and not repeated; --again repeats it.  The plot has
the recorded values beside ours: digitised from the published figure, and measured once in numpy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import consistency_ops as co
from benchmarks.micro.timing import machine
from consistency_ops.train import data, models

TITLE = "D: tolerance to the scale of the initial weights, beside the published curves"
RESULTS = Path(__file__).resolve().parents[1] / "results"
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
BATCH = 500
SEARCH_EVERY = 10
TRANSITION, END = 0.05, 0.006  # bands around the recorded test errors, before and at the last epoch

# Test error at epochs, by standard deviation: digitised from the figure, and measured in numpy.
FIGURE = {
    1e2: {1: 0.892, 2: 0.828, 3: 0.72, 4: 0.33, 5: 0.072, 6: 0.040, 7: 0.035, 8: 0.033, 10: 0.033, 20: 0.02},
    1.0: {1: 0.277, 2: 0.105, 3: 0.057, 4: 0.038, 6: 0.032, 20: 0.02},
    1e-2: {1: 0.043, 3: 0.025, 20: 0.018},
}
MEASURED = {
    1e2: {1: 0.879, 2: 0.819, 3: 0.642, 4: 0.346, 5: 0.074, 6: 0.047, 7: 0.036, 8: 0.032, 10: 0.030, 20: 0.0238},
    1.0: {1: 0.319, 2: 0.108, 3: 0.061, 4: 0.041, 5: 0.036, 6: 0.035, 7: 0.029, 8: 0.025, 10: 0.026, 20: 0.0192},
    1e-2: {1: 0.043, 2: 0.033, 3: 0.030, 4: 0.024, 5: 0.025, 6: 0.022, 7: 0.024, 8: 0.025, 10: 0.022, 20: 0.0181},
}
RUNS = {  # name: (standard deviation, optimizer, RMS norm)
    "sgd2-std-1e-2": (1e-2, "sgd2", True),
    "sgd2-std-1": (1.0, "sgd2", True),
    "sgd2-std-1e2": (1e2, "sgd2", True),
    "sgd2-no-norm": (1e-2, "sgd2", False),
    "sgd-std-1e-2": (1e-2, "sgd", True),
}


def optimizer_of(name: str, model: nn.Module, std: float, seed: int) -> torch.optim.Optimizer:
    decay = 1e-3 if std >= 100 else 5e-4 if std >= 1 else 1e-4
    optimizer = co.optim.SGD2(model, lr=1.0, weight_decay=decay, seed=seed)
    if name == "sgd":
        optimizer.preconditioner.remove()  # the same momentum and decay, no correction
    return optimizer


def test_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True))
    model.train()
    return wrong / len(y)


def train(name: str, images: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, seed: int) -> dict:
    std, method, norm = RUNS[name]
    train_x, train_y, test_x, test_y = images
    model = models.build("deep-mlp", (1, 28, 28), 10, normalization="rms" if norm else "none", init=std, seed=seed)
    optimizer = optimizer_of(method, model, std, seed)
    errors, losses, rates = [], [], {}
    start = time.perf_counter()
    shuffle = torch.Generator().manual_seed(seed)
    bar = tqdm(total=epochs * (len(train_y) // BATCH), desc=name, unit="step")

    def loss_of(batch: Tensor) -> Tensor:
        return functional.cross_entropy(model(train_x[batch]), train_y[batch])

    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train_y), generator=shuffle)
        batches = order[: len(order) // BATCH * BATCH].split(BATCH)
        if (epoch - 1) % SEARCH_EVERY == 0:
            rates[epoch] = co.optim.select_learning_rate(model, optimizer, loss_of, batches, largest=rates.get(1))
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
            bar.update()
        losses.append(total / len(batches))
        errors.append(test_error(model, test_x, test_y))
        bar.set_postfix_str(f"test error {errors[-1]:.4f}, rate {optimizer.param_groups[0]['lr']:g}")
    bar.close()
    return {
        "std": std,
        "optimizer": method,
        "norm": norm,
        "seed": seed,
        "epochs": epochs,
        "rates": rates,
        "train_loss": losses,
        "test_error": errors,
        "seconds": time.perf_counter() - start,
        "machine": machine(),
    }


def recorded_range(std: float, epoch: int) -> tuple[float, float] | None:
    values = [table[std][epoch] for table in (FIGURE, MEASURED) if epoch in table.get(std, {})]
    return (min(values), max(values)) if values else None


def check(runs: dict[str, dict]) -> list[str]:
    """What does not hold; nothing where all bands do.  Between the two recorded values counts as inside."""
    failures = []
    for name, run in runs.items():
        errors, std = run["test_error"], run["std"]
        if run["optimizer"] == "sgd2" and run["norm"]:
            for epoch in sorted({*FIGURE[std], *MEASURED[std]}):
                if epoch > len(errors):
                    continue
                low, high = recorded_range(std, epoch)
                band = END if epoch == 20 else TRANSITION
                if not low - band <= errors[epoch - 1] <= high + band:
                    failures.append(
                        f"{name}, epoch {epoch}: {errors[epoch - 1]:.4f}, recorded {low} to {high} +- {band}"
                    )
        elif not run["norm"] and min(errors) < 0.88:
            failures.append(f"{name}: {min(errors):.4f}, must stay at chance")
        elif run["optimizer"] == "sgd" and errors[0] <= 0.25:
            failures.append(f"{name}: {errors[0]:.4f} after one epoch, must be above .25")
    first = runs.get("sgd2-std-1e-2")
    if first and first["test_error"][0] >= 0.06:
        failures.append(f"sgd2-std-1e-2: {first['test_error'][0]:.4f} after one epoch, must be below .06")
    return failures


def plot(runs: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for i, (name, run) in enumerate(runs.items()):
        colour = f"C{i}"
        epochs = range(1, len(run["test_error"]) + 1)
        axis.plot(epochs, run["test_error"], color=colour, label=name)
        if run["optimizer"] == "sgd2" and run["norm"]:
            for table, marker, label in ((FIGURE, "o", "published figure"), (MEASURED, "x", "numpy")):
                points = table[run["std"]]
                legend = label if name == "sgd2-std-1" else None
                axis.plot(list(points), list(points.values()), marker, color=colour, fillstyle="none", label=legend)
    axis.set(
        yscale="log", xlabel="epoch", ylabel="MNIST test error", title="Network C, by standard deviation of the weights"
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA, help="folder of the four MNIST files")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="repeat runs that are stored")
    parser.add_argument("--out", type=Path, default=RESULTS / "init_tolerance.json")
    arguments = parser.parse_args(argv)

    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else {}
    missing = [name for name in arguments.runs if arguments.again or name not in runs]
    if missing:
        images = data.load("mnist", arguments.data_dir)
        raw = data.scaling(images.train_x, "raw")
        tensors = (raw(images.train_x), images.train_y, raw(images.test_x), images.test_y)
    for name in missing:
        runs[name] = train(name, tensors, arguments.epochs, arguments.seed)
        ordered = {key: runs[key] for key in RUNS if key in runs}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"runs": ordered}, indent=1) + "\n")
        plot(ordered, arguments.out.with_suffix(".png"))
    for name, run in runs.items():
        errors = run["test_error"]
        shown = ", ".join(
            f"{epoch}: {errors[epoch - 1]:.4f}" for epoch in (1, 2, 3, 4, 5, 10, 20) if epoch <= len(errors)
        )
        print(f"{name:<14} rates {run['rates']}  test error at epoch {shown}; best {min(errors):.4f}")
    failures = check(runs)
    if failures:
        sys.exit("\n".join(failures))
    assert all(math.isfinite(error) for run in runs.values() for error in run["test_error"])
    print("all within the bands")


if __name__ == "__main__":
    main()
