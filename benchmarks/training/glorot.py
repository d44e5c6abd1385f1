"""The monitors of Glorot and Bengio (AISTATS 2010): sigmoid, tanh and softsign, standard and normalized weights.

Five hidden layers (theirs had 1000 units), softmax, negative log-likelihood, SGD without momentum, mini-batches of 10,
standardised MNIST.  After every epoch 300 fixed test images go through network and loss, and
consistency_ops.analysis.activation_statistics keeps what the paper plots: mean, standard deviation and 98th percentile
of the activations, deviations of the back-propagated gradients, mean singular values of the layers' Jacobians.
"""

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.training import fit, runner
from consistency_ops.nn import deep_mlp

TITLE = "monitors of Glorot and Bengio, by activation and initial weights"
DATA = "mnist"
SETTINGS = {
    f"{activation}, {init}": {"activation": activation, "init": init}
    for activation in ("sigmoid", "tanh", "softsign")
    for init in ("standard", "glorot")
    if (activation, init) != ("sigmoid", "glorot")
}
SIZE = {"epochs": 6, "train": 3_000, "test": 2_000, "batch": 10, "width": 200, "rate_percent": 5}
EXAMPLES = 300
FIGSIZE = (13, 6)
# Test error on MNIST, per cent: table 1 of the paper (1000 units, 50 000 images); in brackets there: from memory here.
PAPER = {"softsign, standard": 1.64, "softsign, glorot": 1.72, "tanh, standard": 1.76}


def run(settings, size, seed, data, tick):
    data = data.standard()
    model = deep_mlp(784, 10, width=size["width"], depth=5, normalization="none", seed=seed, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=size["rate_percent"] / 100)
    types = tuple({type(m) for m in model} & {nn.Tanh, nn.Softsign, nn.Sigmoid})
    x, y = data.test_x[:EXAMPLES], data.test_y[:EXAMPLES]
    jacobian, points = [], []

    def probe(epoch: int = 0) -> None:
        with co.analysis.activation_statistics(model, layers=types) as monitor:
            functional.cross_entropy(model(x), y).backward()
        model.zero_grad()
        points.append(monitor.result().layers)
        jacobian.append(mean_singular_values(model, types, x[:20]))

    probe()
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, after_epoch=probe)
    outcome = fit.train(model, optimizer, data, **common)
    keys = ("mean", "std", "percentile", "gradient_std")
    layers = [
        {key: [fit.finite(getattr(p, key)[0]) for p in column] for key in keys} for column in zip(*points, strict=True)
    ]
    return {"layers": layers, "jacobian": jacobian, **outcome}


def mean_singular_values(model: nn.Sequential, types: tuple[type, ...], x: torch.Tensor) -> list[float]:
    """Return the mean singular values of dz_{i+1} / dz_i = diag(f'(s)) W between hidden layers (equation 17)."""
    values, z, linear = [], x, None
    for module in model:
        if isinstance(module, types) and linear.in_features == linear.out_features:
            s = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(module(s).sum(), s)
            values.append(float(torch.linalg.svdvals(slope.unsqueeze(-1) * linear.weight.detach()).mean()))
        linear = module if isinstance(module, nn.Linear) else linear
        with torch.no_grad():
            z = module(z)
    return values


def plot(figure, results):
    axes = figure.subplots(2, len(SETTINGS), sharey="row")
    for column, name in enumerate(SETTINGS):
        if name not in results:
            continue
        record = results[name][0]
        for i, layer in enumerate(record["layers"]):
            epochs = range(len(layer["std"]))
            key = "mean" if name.startswith("sigmoid") else "percentile"
            axes[0, column].plot(epochs, layer[key], color=f"C{i}", marker=".", label=f"layer {i + 1}")
            axes[0, column].plot(epochs, layer["std"], color=f"C{i}", linestyle=":")
            axes[1, column].plot(epochs, layer["gradient_std"], color=f"C{i}", marker=".")
        axes[0, column].set(title=name, ylim=(0, 1.05))
        axes[1, column].set(yscale="log", xlabel="epoch")
        axes[1, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("98th percentile (sigmoid: mean), dots:\nstandard deviation of activations")
    axes[1, 0].set_ylabel("standard deviation of the\nback-propagated gradients")
    axes[0, 0].legend(fontsize="x-small")
    figure.suptitle("Five hidden layers on MNIST, 300 fixed test images after every epoch; seed 0")


def lines(results):
    text = []
    for name, records in results.items():
        error = runner.spread(min(r["test_error"]) for r in records)
        first = [sum(r["jacobian"][0]) / len(r["jacobian"][0]) for r in records]
        shrink = [r["layers"][0]["gradient_std"][0] / r["layers"][-1]["gradient_std"][0] for r in records]
        paper = f" (paper {PAPER[name]} %)" if name in PAPER else ""
        text.append(
            f"{name}: best test error {error}{paper}; before training: mean singular value "
            f"{runner.spread(first, '{:.3f}')}, gradient of layer 1 over layer 5 {runner.spread(shrink, '{:.3f}')}"
        )
    return text
