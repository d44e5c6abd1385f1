"""The energy of the residual at every layer, epoch by epoch, for ReLU, the modulus, and 20 instead of 11 layers.

Network C of arXiv 1708.00631 on MNIST, SGD2 with its rate selected; E_l = mean over samples and units of
(dz / dy_l)^2 with z the loss of one sample, averaged over an epoch (consistency_ops.analysis.gradient_energy).
If E_l falls from input to output, the depth reduces the error; if it falls from output to input, information is lost.
"""

import math

import consistency_ops as co
from benchmarks.training import fit, runner
from consistency_ops.nn import deep_mlp
from consistency_ops.optim.learning_rate import CANDIDATES

TITLE = "gradient energy by layer, ReLU against modulus"
DATA = "mnist"
SETTINGS = {
    f"{activation}, {depth} layers": {"activation": activation, "depth": depth}
    for depth in (11, 20)
    for activation in ("relu", "modulus")
}
SIZE = {"epochs": 6, "train": 6_000, "test": 2_000, "batch": 200}
FIGSIZE = (10, 7)


def run(settings, size, seed, data, tick):
    model = deep_mlp(784, 10, seed=seed, **settings)
    optimizer = fit.optimizer_of("sgd2", model, seed=seed)
    batches = len(data.train_y) // size["batch"]
    rate = fit.select(model, optimizer, data, size["batch"], CANDIDATES, seed)
    monitor = co.analysis.gradient_energy(model, average=batches)
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick)
    outcome = fit.train(model, optimizer, data, **common)
    found = monitor.result()
    # A mean over the batch divides every sample's residual by the batch size.
    square = size["batch"] ** 2
    energy = [[fit.finite(layer.energy[i] * square) for layer in found.layers] for i in range(len(found.steps))]
    return {"rate": rate, "energy": energy, **outcome}


def plot(figure, results):
    axes = figure.subplots(2, 2, sharey="row").flatten()
    for axis, (name, records) in zip(axes, results.items(), strict=False):
        energy = records[0]["energy"]
        for i, values in enumerate(energy):
            shade = 0.85 * (1 - (i + 1) / len(energy))
            layers = range(1, len(values) + 1)
            axis.plot(layers, values, color=(shade, shade, 1), marker=".", label=f"epoch {i + 1}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(yscale="log", xlabel="layer, from input to output", ylabel="mean squared residual", title=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    figure.suptitle("Energy of the residual by layer, networks of 128 units on MNIST, SGD2; seed 0")


def lines(results):
    """Compare hidden layers only: the first output has the scale of raw pixels, the last has no norm after it."""
    text = []
    for name, records in results.items():
        decades = [[math.log10(e[1] / e[-2]) if e[1] and e[-2] else math.inf for e in r["energy"]] for r in records]
        first, last = (runner.spread((d[i] for d in decades), "{:+.2f}") for i in (0, -1))
        error = runner.spread(r["test_error"][-1] for r in records)
        text.append(f"{name}: layer 2 over last hidden layer, log10: {first} at first, {last} at last; error {error}")
    return text
