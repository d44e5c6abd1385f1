"""Permuted sequential MNIST with a roaRNN: all 784 pixels, one a step; what brings the error down, and how far.

    h_t = alpha O h_{t-1} + beta tanh(W_h h_{t-1} + W_x u_t + b),   logits = W_o (read h_784) + b_o

Every run is named by what it changes of BASE, in which alpha and beta are those of the author's reservoirs (ResESN,
0.998 and 0.05; the settings of arXiv 2210.01245 are lost).  "alpha", "beta"; "input": factor of the initial input
weights; "read": factor of the states at the read-out; "rate": of Adam, constant, or with "fall" falling linearly to 0,
after it has risen from 0 over the first "warm" of all steps; "correct" and "whiten": the two modes of
:class:`consistency_ops.Preconditioner` before Adam, "outputs" its argument of this name; "decay": AdamW's, of the
weights without the biases; "dropout": share of the last states that the read-out does not see while training; "norm":
the read-out sees the last states normalised over the batch (``nn.BatchNorm1d`` without weights).  The
paper says more than 94 % right after one epoch and more than 98 % after ten, on all 60 000 images.

The defaults are the search, on pieces of the data.  The paper's size, resumable after every epoch:
    python -m benchmarks.training roa-pixels --runs RUN --train 60000 --test 10000 --epochs 10
        --out benchmarks/results/training/full
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.training import runner, tasks
from benchmarks.training.roa_memory import image_error, keep, restore, state_norm
from consistency_ops.nn import ROARNN

TITLE = "permuted sequential MNIST, 784 steps: a search for roaRNN's settings, and the paper's size"
DATA = "mnist"
BASE = {"alpha": 0.998, "beta": 0.05, "input": 1.0, "read": 1.0, "rate": 3e-3, "mode": "none", "fall": False}
FAST = {"mode": "whiten", "rate": 1e-2, "beta": 0.01, "read": 5.0}
BEST = {**FAST, "input": 3.0, "alpha": 1.0, "fall": True}
TEN = {**BEST, "outputs": True, "rate": 2e-2, "warm": 0.02}
CHANGES: dict[str, dict] = {
    "base": {},
    "first try": {"alpha": 1 - 2 / 784, "beta": 2 / 784, "read": 10.0, "mode": "correct"},
    "beta 0.01": {"beta": 0.01, "read": 5.0},
    "beta 0.1": {"beta": 0.1},
    "correct": {"mode": "correct"},
    "whiten": {"mode": "whiten"},
    "rate 0.001": {"rate": 1e-3},
    "alpha 1": {"alpha": 1.0},
    "alpha 0.99": {"alpha": 0.99},
    "input 0.25": {"input": 0.25},
    "whiten, rate 0.01": {"mode": "whiten", "rate": 1e-2},
    "whiten, beta 0.01": {"mode": "whiten", "beta": 0.01, "read": 5.0},
    "whiten, rate 0.01, beta 0.01": FAST,
    "whiten, first alpha and beta": {"mode": "whiten", "alpha": 1 - 2 / 784, "beta": 2 / 784, "read": 10.0},
    "whiten, beta 0.1": {"mode": "whiten", "beta": 0.1},
    "whiten, alpha 1": {"mode": "whiten", "alpha": 1.0},
    "whiten, input 2": {"mode": "whiten", "input": 2.0},
    "whiten, alpha 1, input 2, beta 0.1": {"mode": "whiten", "input": 2.0, "alpha": 1.0, "beta": 0.1},
    "whiten, rate 0.01, beta 0.03": {"mode": "whiten", "rate": 1e-2, "beta": 0.03, "read": 2.0},
    "whiten, rate 0.01, beta 0.01, fall": {**FAST, "fall": True},
    "whiten, rate 0.01, beta 0.01, input 3, fall": {**FAST, "input": 3.0, "fall": True},
    "whiten, rate 0.01, beta 0.01, input 3, alpha 1, fall": BEST,
    "both sides, rate 0.003": {**BEST, "outputs": True, "rate": 3e-3},
    "both sides, rate 0.01": {**BEST, "outputs": True},
    "both sides, rate 0.03": {**BEST, "outputs": True, "rate": 3e-2},
    "both sides, ten epochs": TEN,
    **{f"both sides, decay {decay:g}": {**TEN, "decay": decay} for decay in (0.01, 0.03, 0.1)},
    **{f"both sides, dropout {share:g}": {**TEN, "dropout": share} for share in (0.2, 0.5)},
    "batch norm": {**TEN, "norm": True, "read": 1.0},
    "batch norm, beta 0.03": {**TEN, "norm": True, "read": 1.0, "beta": 0.03},
    "first try, rate 0.01": {"alpha": 1 - 2 / 784, "beta": 2 / 784, "read": 10.0, "mode": "correct", "rate": 1e-2},
}
SETTINGS = {name: {**BASE, **changes} for name, changes in CHANGES.items()}
SIZE = {"epochs": 1, "train": 10_000, "test": 5_000, "batch": 50, "hidden": 128}
COMPARED = ("hidden",)
PAPER = {1: 0.06, 10: 0.02}  # test errors said to be undercut, by epoch
FIGSIZE = (9, 4.5)


class Network(nn.Module):
    def __init__(self, settings: dict, hidden: int) -> None:
        super().__init__()
        self.recurrent = ROARNN(1, hidden, alpha=settings["alpha"], beta=settings["beta"])
        self.read = nn.Linear(hidden, 10)
        self.scale = settings["read"]
        self.norm = state_norm(hidden) if settings.get("norm") else nn.Identity()
        self.dropout = nn.Dropout(settings.get("dropout", 0.0))
        with torch.no_grad():
            self.recurrent.input.weight.mul_(settings["input"])

    def forward(self, u):
        return self.read(self.dropout(self.scale * self.norm(self.recurrent(u)[1])))


def run(settings, size, seed, data, tick):
    data = data.standard()
    train, test = (tasks.permuted_pixels(x) for x in (data.train_x, data.test_x))
    model = Network(settings, size["hidden"])
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": settings.get("decay", 0.0)}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings["rate"])
    if settings["mode"] != "none":
        co.Preconditioner(model, optimizer, mode=settings["mode"], outputs=settings.get("outputs", False))
    warm = settings.get("warm", 0.0)
    shuffle, errors, losses = torch.Generator().manual_seed(seed), [], []
    restore(tick.progress.load(), model, optimizer, shuffle, losses, errors)
    while len(errors) < size["epochs"]:
        batches = torch.randperm(len(data.train_y), generator=shuffle).split(size["batch"])
        total = 0.0
        for i, rows in enumerate(batches):
            if settings["fall"]:
                done = (len(errors) + i / len(batches)) / size["epochs"]
                for group in optimizer.param_groups:
                    group["lr"] = settings["rate"] * (1 - done) * min(1.0, done / warm if warm else 1.0)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(train[:, rows]), data.train_y[rows])
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(batches))
        errors.append(image_error(model, test, data.test_y))
        keep(tick.progress, model, optimizer, shuffle, losses, errors)
        tick(f"loss {losses[-1]:.3f}, test error {errors[-1]:.2%}")
    return {"loss": losses, "test_error": errors}


def by_width(results):
    """Return the records by run; where their networks differ in width, by run and width."""
    widths = {record["size"]["hidden"] for records in results.values() for record in records}
    if len(widths) == 1:
        return results
    return {
        f"{name}, {width} units": found
        for name, records in results.items()
        for width in sorted(widths)
        if (found := [record for record in records if record["size"]["hidden"] == width])
    }


def plot(figure, results):
    axis = figure.subplots()
    results = by_width(results)
    names = sorted(results, key=lambda name: results[name][0]["test_error"][-1])
    longest = max(len(results[name][0]["test_error"]) for name in names)
    if longest == 1:  # the search: one error a run
        errors = [[r["test_error"][-1] for r in results[name]] for name in names]
        axis.barh(names, [sum(e) / len(e) for e in errors], color="C0", alpha=0.6)
        for i, values in enumerate(errors):
            axis.plot(values, [i] * len(values), "k.", markersize=4)
        axis.invert_yaxis()
        axis.set(xlabel="test error after one epoch", xlim=(0, None))
    else:
        for i, name in enumerate(names):
            for record in results[name]:
                errors = record["test_error"]
                axis.plot(range(1, len(errors) + 1), errors, color=f"C{i % 10}", marker=".", label=name)
        axis.plot(list(PAPER), list(PAPER.values()), "kv", label="paper: less than")
        axis.set(xlabel="epoch", ylabel="test error", yscale="log")
        axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    size = results[names[0]][0]["size"]
    units = "" if "units" in names[0] else f", {size['hidden']} units"
    figure.suptitle(f"psMNIST, 784 steps, {size['train']} images{units}, batches of {size['batch']}")


def lines(results):
    return [
        f"{name}: test error {runner.spread(r['test_error'][0] for r in records)} after one epoch, "
        f"{runner.spread(r['test_error'][-1] for r in records)} at the end ({len(records[0]['test_error'])} epochs)"
        for name, records in by_width(results).items()
    ]
