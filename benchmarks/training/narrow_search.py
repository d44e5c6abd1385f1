"""Deep and narrow networks, searched: how often does the modulus train where ReLU does not?

Multilayer perceptrons on standardised MNIST, by depth (hidden layers), width, optimizer, initial weights, decay, noise
on the gradients and normalisation.  Every cell trains the same five seeds (initial weights and order of the batches) at
every rate of the optimizer; a network has trained when its mean training loss of the last epoch is finite and below 2
(chance: ln 10 = 2.303).  A seed counts as trained at one rate, the cell's best, so that neither activation is given a
second draw; shares come with 95 % intervals of Wilson.

The networks of a cell are trained side by side in batched products, because one layer of ten units is all overhead:
their arithmetic is that of :class:`torch.optim.Adam` and of :class:`consistency_ops.optim.SGD2` (damping 1, the first
layer of 785 units uncorrected), which a test compares.  "rms": every hidden layer's output is divided by the root mean
square of its units in the batch, floored as in :class:`consistency_ops.nn.BatchRMSNorm`, which passes no gradient.

The default runs are 32 cells of 20 networks.  The whole search, 180 cells:
    python -m benchmarks.training narrow-search --runs all
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from consistency_ops.nn import deep_mlp

TITLE = "deep and narrow MLPs: success rates of the modulus and ReLU over depth, width, rate, start, decay, noise"
DATA = "mnist"
DEPTHS, WIDTHS = (20, 50, 100), (10, 16, 32)
ACTIVATIONS = ("modulus", "relu")
RATES = {"adam": (0.01, 0.003, 0.001, 0.0003), "sgd2": (1.0, 0.3, 0.1, 0.03)}
BASE = {"init": "orthogonal", "decay": 0.0, "noise": 0.0, "norm": "none"}
CHANGES = {"gaussian": {"init": "he"}, "decay": {"decay": 1e-3}, "noise": {"noise": 0.01}, "rms": {"norm": "rms"}}


def _settings() -> dict[str, dict]:
    found = {}
    for change, changed in ({"": {}} | CHANGES).items():
        for optimizer in RATES:
            for depth in DEPTHS:
                for width in WIDTHS:
                    for activation in ACTIVATIONS:
                        name = f"{activation}, {optimizer}, depth {depth}, width {width}" + (change and f", {change}")
                        options = dict(activation=activation, optimizer=optimizer, depth=depth, width=width)
                        found[name] = {**options, **BASE, **changed}
    return found


SETTINGS = _settings()
# The base settings at the least width, every change of them at the middle depth, and the largest width.
DEFAULT = (
    [n for n in SETTINGS if n.endswith("width 10")]
    + [n for n in SETTINGS if any(n.endswith(f", sgd2, depth 50, width 10, {change}") for change in CHANGES)]
    + [n for n in SETTINGS if n.endswith("width 32")]
)
SIZE = {"epochs": 5, "train": 4_000, "test": 2_000, "batch": 100, "networks": 5}
TRAINED = 2.0
FIGSIZE = (12, 7)


class Networks:
    """Networks of one shape, side by side: weights (networks, out, in + 1), the last column the bias."""

    def __init__(self, settings: dict, seeds: range) -> None:
        options = {key: settings[key] for key in ("width", "depth", "activation", "init")}
        models = [deep_mlp(784, 10, normalization="none", seed=seed, **options) for seed in seeds]
        layers = [[m for m in model if isinstance(m, torch.nn.Linear)] for model in models]
        rates = RATES[settings["optimizer"]]
        self.rates = torch.tensor(rates).repeat(len(seeds)).view(-1, 1, 1)  # the seeds' networks one after the other
        self.weights = [
            torch.stack([torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in column])
            .repeat_interleave(len(rates), 0)
            .requires_grad_()
            for column in zip(*layers, strict=True)
        ]
        self.activation = torch.abs if settings["activation"] == "modulus" else torch.relu
        self.rms = settings["norm"] == "rms"
        self.inputs: list[Tensor] = []
        self.moments = [[torch.zeros_like(w) for w in self.weights] for _ in range(2)]
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Map (networks, batch, 784) to logits, and keep the layers' inputs."""
        self.inputs = []
        for i, weight in enumerate(self.weights):
            if i:
                x = self.activation(x)
                if self.rms:
                    square = x.detach().square().mean(1, keepdim=True) + 1e-6
                    x = x / (square + 1e-2 * square.amax(2, keepdim=True)).sqrt()
            self.inputs.append(x.detach())
            x = torch.baddbmm(weight[:, None, :, -1], x, weight[..., :-1].mT)
        return x

    @torch.no_grad()
    def step(self, gradients: list[Tensor], settings: dict, generator: torch.Generator) -> None:
        self.steps += 1
        for i, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            if settings["noise"]:  # the same for all networks; eta / (1 + t)^0.55 is its variance
                deviation = math.sqrt(settings["noise"] / self.steps**0.55)
                gradient = gradient + deviation * torch.randn(gradient.shape[1:], generator=generator)
            if settings["optimizer"] == "sgd2" and gradient.shape[2] <= 500:
                gradient = corrected(gradient, self.inputs[i])
            decayed = weight.clone()
            decayed[..., -1] = 0  # biases do not decay
            if settings["optimizer"] == "adam":
                gradient = gradient + settings["decay"] * decayed
                first = self.moments[0][i].lerp_(gradient, 0.1)
                second = self.moments[1][i].lerp_(gradient.square(), 0.001)
                size = (second / (1 - 0.999**self.steps)).sqrt_() + 1e-8
                weight -= self.rates * (first / (1 - 0.9**self.steps)) / size
            else:
                momentum = self.moments[0][i].mul_(0.9).add_(gradient, alpha=-0.1).sub_(settings["decay"] * decayed)
                weight += self.rates * momentum / (1 - 0.9**self.steps)


def corrected(gradient: Tensor, inputs: Tensor, damping: float = 1.0) -> Tensor:
    """G (X^T X / n + damping I)^-1 of every network, its bias joined; where that is not finite: zeros."""
    joined = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
    moment = joined.mT @ joined / joined.shape[1]
    moment.diagonal(dim1=1, dim2=2).add_(damping)
    lost = ~moment.isfinite().all((1, 2)) | ~gradient.isfinite().all((1, 2))
    moment[lost] = torch.eye(moment.shape[1])
    gradient = torch.where(lost[:, None, None], 0.0, gradient)
    return torch.cholesky_solve(gradient.mT, torch.linalg.cholesky_ex(moment)[0]).mT


def run(settings, size, seed, data, tick):
    data = data.standard()
    x, y = data.train_x.flatten(1), data.train_y
    seeds = range(seed * size["networks"], (seed + 1) * size["networks"])
    networks = Networks(settings, seeds)
    rates = RATES[settings["optimizer"]]
    noise = torch.Generator().manual_seed(seed)
    orders = [torch.Generator().manual_seed(s) for s in seeds]
    losses = []
    for _ in range(size["epochs"]):
        rows = torch.stack([torch.randperm(len(y), generator=g) for g in orders]).repeat_interleave(len(rates), 0)
        total = torch.zeros(len(rows))
        batches = rows[:, : len(y) // size["batch"] * size["batch"]].split(size["batch"], 1)
        for some in batches:
            logits = networks(x[some])
            loss = functional.cross_entropy(logits.mT, y[some], reduction="none").mean(1)
            networks.step(list(torch.autograd.grad(loss.sum(), networks.weights)), settings, noise)
            total += loss.detach()
        losses.append(total / len(batches))
        tick(f"losses {float(losses[-1].nan_to_num(9).min()):.3g} to {float(losses[-1].nan_to_num(9).max()):.3g}")
    with torch.no_grad():
        guesses = networks(data.test_x.flatten(1).expand(len(networks.rates), -1, -1)).argmax(2)
    errors = (guesses != data.test_y).double().mean(1).view(-1, len(rates))
    table = losses[-1].view(-1, len(rates))
    return {
        "rates": rates,
        "final_losses": [[value if math.isfinite(value) else None for value in row] for row in table.tolist()],
        "test_errors": errors.tolist(),
    }


def trained(records: list[dict]) -> tuple[int, int, float]:
    """Return how many of the cell's seeds have trained at its best rate, of how many, and that rate."""
    rates = records[0]["rates"]
    rows = [row for r in records for row in r["final_losses"]]
    counts = [sum(row[k] is not None and row[k] < TRAINED for row in rows) for k in range(len(rates))]
    best = max(range(len(rates)), key=lambda k: (counts[k], -sum(row[k] or 9.0 for row in rows)))
    return counts[best], len(rows), rates[best]


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of Wilson for a share, 95 % by default."""
    share, n = successes / trials, trials
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _error(records: list[dict]) -> float:
    """Mean test error of the cell's seeds at its best rate."""
    k = records[0]["rates"].index(trained(records)[2])
    errors = [row[k] for r in records for row in r["test_errors"]]
    return sum(errors) / len(errors)


def plot(figure, results):
    axes = figure.subplots(2, 3)
    widths = sorted({records[0]["settings"]["width"] for records in results.values()})
    for row, optimizer in zip(axes, RATES, strict=True):
        for axis, depth in zip(row, DEPTHS, strict=True):
            for k, activation in enumerate(ACTIVATIONS):
                for j, change in enumerate(["", *CHANGES]):
                    for i, width in enumerate(widths):
                        name = f"{activation}, {optimizer}, depth {depth}, width {width}" + (change and f", {change}")
                        if name not in results:
                            continue
                        count, total, _ = trained(results[name])
                        low, high = wilson(count, total)
                        at = i + 0.12 * j + 0.05 * k - 0.25
                        label = f"{activation}{', ' + change if change else ''}"
                        style = dict(color=f"C{3 * k}", marker="osD^v"[j], markersize=5, capsize=2, linestyle="")
                        span = [[count / total - low], [high - count / total]]
                        axis.errorbar(at, count / total, yerr=span, **style, linewidth=0.8, label=label)
            axis.set(xticks=range(len(widths)), xlim=(-0.5, len(widths) - 0.5), ylim=(-0.05, 1.05))
            axis.set_xticklabels([f"{w} units" for w in widths])
            axis.set_title(f"{optimizer}, {depth} hidden layers", fontsize="medium")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("share of seeds that train,\n95 % interval")
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize="small")
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(f"{size['train']} MNIST images, {size['epochs']} epochs; trained: training loss below {TRAINED:g}")


def lines(results):
    text = []
    for name, records in results.items():
        count, total, rate = trained(records)
        low, high = wilson(count, total)
        text.append(
            f"{name}: {count} of {total} train ({low:.0%} to {high:.0%}) at rate {rate:g}, mean test error there "
            f"{_error(records):.1%}"
        )
    for activation in ACTIVATIONS:
        cells = [trained(records) for name, records in results.items() if name.startswith(activation)]
        count, total = sum(c for c, _, _ in cells), sum(n for _, n, _ in cells)
        if total:
            low, high = wilson(count, total)
            text.append(f"{activation}, all {len(cells)} cells: {count} of {total} ({low:.0%} to {high:.0%})")
    return text
