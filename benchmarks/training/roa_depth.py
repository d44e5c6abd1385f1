"""Feed-forward networks of 10 to 50 000 layers on the digits: random orthogonal additive layers against a plain MLP.

Both are tanh networks of equal width with the same number of weights, trained by Adam at the best of two rates (least
final training loss; 5000 layers and more: one rate).  "gradient" is the norm of the loss's gradient at the first
hidden state over that at the last one, before training; the bounds are those of the additive network, from its weights.

50 000 layers: the additive network alone, which keeps one state in 250 for backward (``checkpoint``) and computes the
others again, Adam's fused form, and after every epoch the gradient's ratio and the bounds anew (``gradients``,
``all_bounds``), beside the loss of every step and the largest memory of the process in MB (``memory``).  "mnist": the
first so many images of MNIST instead of the digits, an epoch; a long training is resumable after each of these.
"""

import math
import resource

import torch
from torch import nn
from torch.nn import functional

from benchmarks import DATA as FOLDER
from benchmarks.training import fit, runner
from consistency_ops.nn import ROAFeedForward

TITLE = "roaFNN of up to 50 000 layers against a plain MLP, digits"
DATA = "digits"
DEPTHS = (10, 50, 500, 5000, 50_000)
DEEP = 5000  # layers; more take the way of the deepest
DEEPEST = {"kind": "roa", "depth": 50_000, "checkpoint": 250}
RATES = (0.003, 0.001)
SETTINGS = {
    f"{kind}, depth {depth}": {"kind": kind, "depth": depth} for depth in DEPTHS[:-1] for kind in ("roa", "mlp")
} | {"roa, depth 50000": DEEPEST}
MNIST = {f"roa, depth 50000, mnist {n}": {**DEEPEST, "data": "mnist", "train": n, "test": 1000} for n in (1400, 10_000)}
DEFAULT = list(SETTINGS)
SETTINGS |= MNIST
SIZE = {"epochs": 5, "batch": 50, "width": 32}
FIGSIZE = (13, 4)


class Plain(ROAFeedForward):
    """The same layers without filter and without the added past: x <- phi(W x + b)."""

    def hidden(self, x):
        for layer in self.layers:
            x = self.phi(layer(x))
        return x


def network(settings: dict, size: dict, seed: int, inputs: int = 64) -> ROAFeedForward:
    torch.manual_seed(seed)
    kind = ROAFeedForward if settings["kind"] == "roa" else Plain
    options = {"checkpoint": settings["checkpoint"]} if "checkpoint" in settings else {}
    model = kind(inputs, size["width"], 10, settings["depth"], **options)
    if kind is Plain:  # Glorot's weights are the best known for tanh
        for layer in model.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def gradient(model: ROAFeedForward, data: fit.Split) -> float:
    first = model.encoder(data.train_x[:100].flatten(1))
    last = model.hidden(first)
    loss = functional.cross_entropy(model.decoder(last), data.train_y[:100])
    at_first, at_last = torch.autograd.grad(loss, (first, last))
    return float(at_first.norm() / at_last.norm())


def run(settings, size, seed, data, tick):
    if "data" in settings:
        data = fit.load(settings["data"], settings, FOLDER / settings["data"])
    data, depth = data.standard(), settings["depth"]
    data = fit.Split(data.train_x.flatten(1), data.train_y, data.test_x.flatten(1), data.test_y, 1.0)
    inputs = data.train_x.shape[1]
    model = network(settings, size, seed, inputs)
    outcome = {"gradient": gradient(model, data)}
    if settings["kind"] == "roa":
        outcome["bounds"] = [fit.finite(x) for x in model.jacobian_bounds()]
    if depth > DEEP:
        return {"rate": RATES[1], **outcome, **_deepest(model, data, size, seed, tick)}
    trials = {}
    for rate in RATES if depth < 5000 else RATES[1:2]:
        model = network(settings, size, seed, inputs)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=lambda text: None)
        if depth >= 5000:
            common["tick"] = tick
        trials[rate] = fit.train(model, optimizer, data, **common)
    ends = {rate: trial["train_loss"][-1] for rate, trial in trials.items()}
    best = min(ends, key=lambda rate: math.inf if ends[rate] is None else ends[rate])
    return {"rate": best, **outcome, **trials[best]}


def _deepest(model: ROAFeedForward, data: fit.Split, size: dict, seed: int, tick) -> dict:
    """Train, and note what the depth does to the gradient on the way; an interrupted run goes on."""
    notes = {"step_loss": [], "gradients": [], "all_bounds": [], "memory": []}

    def loss_of(model, x, y):
        loss = functional.cross_entropy(model(x), y)
        notes["step_loss"].append(round(float(loss.detach()), 4))
        return loss

    def after_epoch(epoch):
        notes["gradients"].append(gradient(model, data))
        notes["all_bounds"].append([fit.finite(x) for x in model.jacobian_bounds()])
        notes["memory"].append(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[1], fused=True)
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, progress=tick.progress, notes=notes)
    return {**fit.train(model, optimizer, data, **common, loss_of=loss_of, after_epoch=after_epoch), **notes}


def plot(figure, results):
    left, right, curves = figure.subplots(1, 3)
    floor = 1e-45  # smallest float32, where a gradient that is exactly 0 is drawn
    lines_drawn = {
        ("roaFNN", "C0"): {d: f"roa, depth {d}" for d in DEPTHS},
        ("tanh MLP, Glorot's weights", "C3"): {d: f"mlp, depth {d}" for d in DEPTHS},
        ("roaFNN, MNIST", "C2"): {DEEPEST["depth"]: next((name for name in MNIST if name in results), "")},
    }
    for (label, colour), names in lines_drawn.items():
        pairs = [(d, results[name]) for d, name in names.items() if name in results]
        if not pairs:
            continue
        depths = [d for d, _ in pairs]
        gradients = [max(floor, sum(r["gradient"] for r in rs) / len(rs)) for _, rs in pairs]
        left.plot(depths, gradients, "o-", color=colour, label=label)
        if label == "roaFNN":
            low, high = ([math.exp(r[0]["bounds"][i]) for _, r in pairs] for i in (0, 1))
            left.fill_between(depths, low, high, color=colour, alpha=0.2, label="certified bounds")
        errors = [sum(min(r["test_error"]) for r in rs) / len(rs) for _, rs in pairs]
        right.plot(depths, errors, "o-", color=colour, label=label)
    left.set(xscale="log", yscale="log", xlabel="layers", ylabel="gradient at the first over the last state")
    right.set(xscale="log", xlabel="layers", ylabel="best test error", ylim=(0, 1))
    for records in results.values():
        if "step_loss" in records[0]:
            data = records[0]["settings"].get("data", "digits")
            curves.plot(records[0]["step_loss"], ".-", label=f"{records[0]['settings']['depth']} layers, {data}")
    curves.set(xlabel="step", ylabel="loss of the batch")
    for axis in (left, right, curves):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize="small")
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(
        f"Networks of {size['width']} units on the digits, {size['epochs']} epochs (1 epoch for 5000 layers and more)"
    )
    left.set_title("before training (0 is drawn at 1e-45)", fontsize=10)
    right.set_title("after training", fontsize=10)


def lines(results):
    return [
        f"{name}: gradient ratio {runner.spread((r['gradient'] for r in records), '{:.3g}')}, best test error "
        f"{runner.spread(min(r['test_error']) for r in records)}, {records[0]['cpu_seconds']:.0f} s"
        for name, records in results.items()
    ]
