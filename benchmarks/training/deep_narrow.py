"""Deep and narrow networks on MNIST: does the modulus train where ReLU does not?

Ten units per layer, 20 to 200 hidden layers, no normalisation, orthogonal weights (times sqrt 2 for ReLU), standardised
pixels.  Every rate of the optimizer is tried from the same start, and the one with the least final training loss
counts; both activations get the same trials.  The settings of arXiv 1708.00631 for this experiment are lost; "as
released" is its network C made narrow and deep (RMS norms, small weights, raw pixels), found not to train before.
"""

from benchmarks.training import fit, runner
from consistency_ops.nn import deep_mlp

TITLE = "deep and narrow MLPs on MNIST, modulus against ReLU"
DATA = "mnist"
DEPTHS = (20, 50, 100, 200)
RATES = {"adam": (0.003, 0.001), "sgd2": (0.3, 0.1)}
SETTINGS = {
    f"{activation}, {optimizer}, depth {depth}": {
        "activation": activation,
        "optimizer": optimizer,
        "depth": depth,
        "normalization": "none",
        "init": "orthogonal",
    }
    for optimizer in RATES
    for depth in DEPTHS
    for activation in ("modulus", "relu")
} | {
    f"{activation}, as released, depth 50": {
        "activation": activation,
        "optimizer": "sgd2",
        "depth": 50,
        "normalization": "rms",
        "init": 0.01,
    }
    for activation in ("modulus", "relu")
}
SIZE = {"epochs": 8, "train": 5_000, "test": 2_000, "batch": 100, "width": 10}
FIGSIZE = (11, 4.8)


def run(settings, size, seed, data, tick):
    released = settings["normalization"] == "rms"
    data = data if released else data.standard()
    trials = {}
    for rate in RATES[settings["optimizer"]]:
        model = deep_mlp(
            784,
            10,
            width=size["width"],
            depth=settings["depth"],
            activation=settings["activation"],
            normalization=settings["normalization"],
            init=settings["init"],
            seed=seed,
        )
        optimizer = fit.optimizer_of(settings["optimizer"], model, lr=rate, seed=seed)
        common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed)
        trials[rate] = fit.train(model, optimizer, data, tick=lambda text: None, **common)
    for _ in range(size["epochs"]):
        tick("")
    ends = {rate: trial["train_loss"][-1] for rate, trial in trials.items()}
    best = min((rate for rate in ends if ends[rate] is not None), key=ends.__getitem__)
    return {"rate": best, "final_losses": ends, **trials[best]}


def plot(figure, results):
    axes = figure.subplots(1, 3)
    for axis, optimizer in zip(axes, ("adam", "sgd2"), strict=False):
        for activation, line in (("modulus", "-"), ("relu", "--")):
            for i, depth in enumerate(DEPTHS):
                records = results.get(f"{activation}, {optimizer}, depth {depth}")
                if records:
                    losses = runner.mean(records, "train_loss")
                    label = f"{activation}, depth {depth}"
                    axis.plot(range(1, len(losses) + 1), losses, line, color=f"C{i}", label=label)
        axis.set(
            xlabel="epoch",
            ylabel="mean training loss",
            title={"adam": "Adam", "sgd2": "SGD2"}[optimizer],
            ylim=(0, 2.5),
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    for optimizer, marker in (("adam", "o"), ("sgd2", "s")):
        for activation, colour in (("modulus", "C0"), ("relu", "C3")):
            pairs = [(d, results.get(f"{activation}, {optimizer}, depth {d}")) for d in DEPTHS]
            points = [(d, sum(min(r["test_error"]) for r in rs) / len(rs)) for d, rs in pairs if rs]
            if points:
                axes[2].plot(*zip(*points, strict=True), "-", color=colour, linewidth=0.8)
                single = [(d, min(r["test_error"])) for d, rs in pairs for r in rs or []]
                style = dict(color=colour, alpha=0.6, label=f"{activation}, {optimizer}")
                axes[2].plot(*zip(*single, strict=True), marker, **style)
    axes[2].axhline(0.9, color="grey", linewidth=0.8, label="chance")
    axes[2].set(
        xlabel="hidden layers",
        ylabel="best test error",
        xscale="log",
        ylim=(0, 1),
        title="by depth, every seed, lines: means",
    )
    axes[2].grid(alpha=0.3)
    axes[2].set_xticks(DEPTHS, DEPTHS)
    axes[2].set_xticks([], minor=True)
    axes[2].legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(f"{size['width']} units per layer, {size['train']} MNIST images, no normalisation")


def lines(results):
    return [
        f"{name}: loss {runner.spread((r['train_loss'][-1] for r in records), '{:.3f}')}, best test error "
        f"{runner.spread(min(r['test_error']) for r in records)}, rate {[r['rate'] for r in records]}"
        for name, records in results.items()
    ]
