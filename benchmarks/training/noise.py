"""Noise injection (arXiv 1708.00631): does it free a deep narrow ReLU network whose residuals die?

The networks are those of deep_narrow.py in which ReLU stays at chance: ten units per layer, orthogonal weights, SGD2 at
one rate.  Noise is added to the parameter gradients (before the correction) or to the residuals.  The modulus beside it
needs none.
"""

from benchmarks.training import fit, runner
from consistency_ops.experimental import ResidualNoise
from consistency_ops.nn import deep_mlp
from consistency_ops.optim import GradientNoise

TITLE = "noise in gradients or residuals of a deep narrow network"
DATA = "mnist"
NOISES = {
    "no noise": {},
    "gradient 1": {"eta": 1.0},
    "gradient 0.3": {"eta": 0.3},
    "gradient 0.01": {"eta": 0.01},
    "gradient 1e-4": {"eta": 1e-4},
    "residual 0.01": {"scale": 0.01},
    "residual 0.1": {"scale": 0.1},
}
SETTINGS = {
    f"{activation}, depth {depth}, {name}": {"activation": activation, "depth": depth, **noise}
    for activation, depth in (("relu", 100), ("relu", 50), ("modulus", 100))
    for name, noise in NOISES.items()
}
SIZE = {"epochs": 6, "train": 4_000, "test": 2_000, "batch": 100, "width": 10}
RATE = 0.1


def run(settings, size, seed, data, tick):
    options = dict(activation=settings["activation"], depth=settings["depth"], width=size["width"], seed=seed)
    model = deep_mlp(784, 10, normalization="none", init="orthogonal", **options)
    optimizer = fit.optimizer_of("sgd2", model, lr=RATE, seed=seed)
    if "eta" in settings:
        GradientNoise(optimizer, eta=settings["eta"], seed=seed)
    if "scale" in settings:
        ResidualNoise(model, scale=settings["scale"])
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick)
    return fit.train(model, optimizer, data.standard(), **common)


def plot(figure, results):
    networks = sorted({name.rsplit(", ", 1)[0] for name in results}, reverse=True)
    axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for axis, network in zip(axes, networks, strict=True):
        for i, noise in enumerate(NOISES):
            records = results.get(f"{network}, {noise}", [])
            for record in records:
                losses = [float("nan") if x is None else x for x in record["train_loss"]]
                label = noise if record is records[0] else None
                axis.plot(range(1, len(losses) + 1), losses, color=f"C{i}", label=label)
        axis.set(xlabel="epoch", title=network)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean training loss")
    axes[0].legend(fontsize="small")
    figure.suptitle("Noise injection, ten units per layer, SGD2")


def lines(results):
    text = []
    for name, records in results.items():
        losses = [r["train_loss"][-1] for r in records]
        shown = ", ".join("not finite" if x is None else f"{x:.3f}" for x in losses)
        error = runner.spread(min(r["test_error"]) for r in records)
        text.append(f"{name}: training loss {shown}; best test error {error}")
    return text
