"""Glorot and Bengio (2010) at their size: Shapeset-3x2, made while training, five hidden layers of 1000 units.

Softmax, negative log-likelihood, SGD without momentum in mini-batches of 10, no picture twice.  The rate is the best of
three on a validation set, each tried for a twentieth of the examples from the same start; the paper tries
more of them, for 5 million steps each.  At every point 300 fixed test pictures go through the network, and what the
paper's figures show of each layer is kept: mean, standard deviation and 98th percentile of the activations; and the
deviation of the back-propagated gradients.  Runs go on from the last point.

The step is written out instead of left to autograd: the weights are updated by the product that is their gradient,
which is therefore never stored; a test compares the two.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.training import runner, shapes

TITLE = "Shapeset-3x2 of Glorot and Bengio, online, five layers of 1000 units: errors and saturation"
DATA = None
SETTINGS = {
    f"{activation}, {init}": {"activation": activation, "init": init}
    for activation in ("sigmoid", "tanh", "softsign")
    for init in ("standard", "glorot")
    if (activation, init) != ("sigmoid", "glorot")
}
SIZE = {"points": 25, "examples": 100_000, "test": 10_000, "validation": 2_000, "batch": 10, "width": 1_000}
RATES = (0.1, 0.03, 0.01)
EXAMPLES = 300  # fixed test pictures for the monitors, as in the paper
# Test error, per cent: table 1 of the paper; the sigmoid's is from memory, the others were read there.
PAPER = {
    "sigmoid, standard": 82.61,
    "tanh, standard": 27.15,
    "tanh, glorot": 15.60,
    "softsign, standard": 16.27,
    "softsign, glorot": 16.06,
}
FIGSIZE = (13, 6)

APPLY = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "softsign": functional.softsign}
SLOPE = {  # by the value of the activation
    "sigmoid": lambda z: z * (1 - z),
    "tanh": lambda z: 1 - z * z,
    "softsign": lambda z: (1 - z.abs()).square(),
}


class Network:
    """A multilayer perceptron with its gradient descent step written out."""

    def __init__(self, widths: list[int], activation: str, init: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.apply, self.slope = APPLY[activation], SLOPE[activation]
        self.weights, self.biases = [], []
        for fan_in, fan_out in pairwise(widths):
            bound = math.sqrt(6 / (fan_in + fan_out)) if init == "glorot" else 1 / math.sqrt(fan_in)
            self.weights.append(bound * (2 * torch.rand(fan_out, fan_in, generator=generator) - 1))
            self.biases.append(torch.zeros(fan_out))

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def load(self, tensors: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors(), tensors, strict=True):
            tensor.copy_(value)

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the input, the activations of all hidden layers and the logits."""
        z = [x]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            s = torch.addmm(bias, z[-1], weight.T)
            z.append(s if i == len(self.weights) - 1 else self.apply(s))
        return z

    def error(self, x: Tensor, y: Tensor) -> float:
        wrong = [self.values(a)[-1].argmax(1) != b for a, b in zip(x.split(500), y.split(500), strict=True)]
        return float(torch.cat(wrong).double().mean())

    def gradients(self, z: list[Tensor], y: Tensor, rate: float = 0.0) -> tuple[float, list[Tensor]]:
        """Return the mean loss and its gradients at the layers' linear outputs; update the weights at ``rate`` > 0."""
        logits = z[-1]
        gradient = logits.softmax(1)
        gradient[torch.arange(len(y)), y] -= 1
        gradient /= len(y)
        found = [gradient]
        for i in range(len(self.weights) - 1, -1, -1):
            below = (gradient @ self.weights[i]) * self.slope(z[i]) if i else gradient
            if rate:
                self.weights[i].addmm_(gradient.T, z[i], alpha=-rate)
                self.biases[i].sub_(gradient.sum(0), alpha=rate)
            gradient = below
            if i:
                found.insert(0, gradient)
        return float(functional.cross_entropy(logits, y)), found

    def train(self, examples: int, batch: int, rate: float, generator: torch.Generator) -> float:
        """Train on new pictures and return the mean loss."""
        total, steps = 0.0, 0
        for first in range(0, examples, 1000):
            x, y = shapes.draw(min(1000, examples - first), generator)
            for rows in torch.arange(len(y)).split(batch):
                total += self.gradients(self.values(x[rows]), y[rows], rate)[0]
                steps += 1
        return total / steps


def run(settings, size, seed, data, tick):
    del data
    with torch.no_grad():
        return _run(settings, size, seed, tick)


def _run(settings, size, seed, tick):
    network = Network([shapes.SIDE**2, *[size["width"]] * 5, len(shapes.CLASSES)], **settings, seed=seed)
    held_out = torch.Generator().manual_seed(10**6 + seed)  # the same pictures for every run of a seed
    valid_x, valid_y = shapes.draw(size["validation"], held_out)
    test_x, test_y = shapes.draw(size["test"], held_out)
    generator = torch.Generator().manual_seed(seed)
    state = tick.progress.load() or {"trials": {}, "losses": [], "errors": [], "layers": []}
    start = [tensor.clone() for tensor in network.tensors()]
    for rate in RATES:
        if rate not in state["trials"]:
            network.load(start)
            network.train(size["examples"] // 20, size["batch"], rate, torch.Generator().manual_seed(10**7 + seed))
            state["trials"][rate] = network.error(valid_x, valid_y)
            tick.progress.save(**state)
    rate = min(state["trials"], key=state["trials"].__getitem__)
    network.load(state.get("network", start))
    if "generator" in state:
        generator.set_state(state["generator"])
    if not state["layers"]:
        state["layers"].append(_monitor(network, test_x[:EXAMPLES], test_y[:EXAMPLES]))
    while len(state["losses"]) < size["points"]:
        state["losses"].append(network.train(size["examples"] // size["points"], size["batch"], rate, generator))
        state["errors"].append(network.error(test_x, test_y))
        state["layers"].append(_monitor(network, test_x[:EXAMPLES], test_y[:EXAMPLES]))
        state |= {"network": network.tensors(), "generator": generator.get_state()}
        tick.progress.save(**state)
        tick(f"loss {state['losses'][-1]:.3f}, test error {state['errors'][-1]:.2%}")
    return {
        "rate": rate,
        "trials": state["trials"],
        "train_loss": state["losses"],
        "test_error": state["errors"],
        "layers": state["layers"],
    }


def _monitor(network: Network, x: Tensor, y: Tensor) -> list[dict[str, float]]:
    z = network.values(x)
    gradients = network.gradients(z, y)[1]
    return [
        {
            "mean": float(a.mean()),
            "std": float(a.std()),
            "percentile": float(torch.quantile(a.abs().flatten()[:: max(1, a.numel() // 10**6)], 0.98)),
            "gradient_std": float(g.std()),
        }
        for a, g in zip(z[1:-1], gradients[:-1], strict=True)
    ]


def plot(figure, results):
    axes = figure.subplots(2, len(results), sharey="row", squeeze=False)
    for column, name in enumerate(results):
        record = results[name][0]
        unit = record["size"]["examples"] / (len(record["layers"]) - 1) / 1000
        key = "mean" if name.startswith("sigmoid") else "percentile"
        for i in range(5):
            points = [unit * k for k in range(len(record["layers"]))]
            values, spreads = ([layers[i][k] for layers in record["layers"]] for k in (key, "std"))
            axes[0, column].plot(points, values, color=f"C{i}", marker=".", label=f"layer {i + 1}")
            axes[0, column].plot(points, spreads, color=f"C{i}", linestyle=":")
        axes[0, column].set(title=name, ylim=(0, 1.05))
        for r in results[name]:
            axes[1, column].plot(points[1:], [100 * e for e in r["test_error"]], color="C0")
        axes[1, column].axhline(PAPER[name], color="black", linewidth=0.8, linestyle="--", label="paper, at the end")
        axes[1, column].set(xlabel="thousand examples", ylim=(0, 100))
        axes[1, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("98th percentile (sigmoid: mean), dotted:\nstandard deviation of activations")
    axes[1, 0].set_ylabel("test error, %")
    named = [*axes[0, 0].get_lines()[::2], axes[1, 0].get_lines()[-1]]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize="small")
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(f"Shapeset-3x2, five hidden layers of {size['width']} units; 300 fixed pictures at every point")


def lines(results):
    return [
        f"{name}: test error {runner.spread(r['test_error'][-1] for r in records)} after "
        f"{records[0]['size']['examples']} examples (paper {PAPER[name]} %), rates {[r['rate'] for r in records]}"
        for name, records in results.items()
    ]
