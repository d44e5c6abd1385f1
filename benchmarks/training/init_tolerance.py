"""Tolerance to the scale of the initial weights, the one figure of arXiv 1708.00631's code that can be read.

Network C (784-128, ten times 128-128, 128-10, ReLU, an RMS norm before every weight layer but the first) on all of
MNIST: raw pixels less their mean, batch 500, weights normal with the deviation of the run's name, biases 0.  SGD2 at
damping 1; the first layer (785 units with the bias, more than 500) takes plain SGD steps.  The rate is selected at
epochs 1 and 11, later ones not above the first.  Weight decay 1e-3 for a deviation of 100 and more, 5e-4 for 10 and 1,
1e-4 below.  Beside it SGD, and the network without norms, which the paper says do not train.

Circles are read off the published figure (to 0.002; in the bundle at the end only roughly), crosses are an independent
implementation in numpy.  Where both exist, anything between them counts as agreement.
"""

from __future__ import annotations

from benchmarks.training import fit, runner
from consistency_ops.nn import deep_mlp
from consistency_ops.optim.learning_rate import CANDIDATES

TITLE = "tolerance to the scale of the initial weights, beside the published curves"
DATA = "mnist"
DEVIATIONS = (1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
SETTINGS = {f"sgd2, {std:g}": {"std": std, "optimizer": "sgd2", "normalization": "rms"} for std in DEVIATIONS} | {
    "sgd, 0.01": {"std": 1e-2, "optimizer": "sgd", "normalization": "rms"},
    "sgd2, 0.01, no norm": {"std": 1e-2, "optimizer": "sgd2", "normalization": "none"},
}
SIZE = {"epochs": 20, "train": 60_000, "test": 10_000, "batch": 500}
FIGSIZE = (11, 5)
TRANSITION, END = 0.05, 0.006  # largest differences from the recorded test errors, before and at epoch 20

# Test error at epochs, by deviation: digitised from the figure, and measured in numpy.
FIGURE = {
    1e4: {1: 0.916, 2: 0.916, 3: 0.915, 4: 0.896, 5: 0.849, 6: 0.761, 7: 0.543, 8: 0.163, 10: 0.052, 20: 0.033},
    1e3: {1: 0.912, 2: 0.906, 3: 0.877, 4: 0.797, 5: 0.635, 6: 0.234, 7: 0.066, 8: 0.04, 20: 0.02},
    1e2: {1: 0.892, 2: 0.828, 3: 0.72, 4: 0.33, 5: 0.072, 6: 0.040, 7: 0.035, 8: 0.033, 10: 0.033, 20: 0.02},
    1e1: {1: 0.806, 2: 0.686, 3: 0.547, 4: 0.347, 5: 0.160, 6: 0.082, 7: 0.050, 8: 0.039, 10: 0.029, 20: 0.02},
    1.0: {1: 0.277, 2: 0.105, 3: 0.057, 4: 0.038, 6: 0.032, 20: 0.02},
    1e-1: {1: 0.050, 2: 0.037, 3: 0.033, 4: 0.029, 5: 0.027, 7: 0.025, 8: 0.025, 20: 0.02},
    1e-2: {1: 0.043, 3: 0.025, 20: 0.018},
    1e-4: {1: 0.043, 2: 0.033, 3: 0.027, 4: 0.023, 5: 0.023, 6: 0.023, 7: 0.021, 8: 0.019, 10: 0.019, 20: 0.018},
}
MEASURED = {
    1e4: {1: 0.899, 2: 0.898, 3: 0.898, 4: 0.878, 5: 0.838, 6: 0.733, 7: 0.497, 8: 0.163, 10: 0.046, 20: 0.0324},
    1e2: {1: 0.879, 2: 0.819, 3: 0.642, 4: 0.346, 5: 0.074, 6: 0.047, 7: 0.036, 8: 0.032, 10: 0.030, 20: 0.0238},
    1.0: {1: 0.319, 2: 0.108, 3: 0.061, 4: 0.041, 5: 0.036, 6: 0.035, 7: 0.029, 8: 0.025, 10: 0.026, 20: 0.0192},
    1e-2: {1: 0.043, 2: 0.033, 3: 0.030, 4: 0.024, 5: 0.025, 6: 0.022, 7: 0.024, 8: 0.025, 10: 0.022, 20: 0.0181},
    1e-4: {1: 0.046, 2: 0.036, 3: 0.030, 4: 0.028, 5: 0.024, 6: 0.025, 7: 0.024, 8: 0.024, 10: 0.020, 20: 0.0194},
}


def run(settings, size, seed, data, tick):
    std = settings["std"]
    decay = 1e-3 if std >= 100 else 5e-4 if std >= 1 else 1e-4
    model = deep_mlp(784, 10, normalization=settings["normalization"], init=std, seed=seed)
    optimizer = fit.optimizer_of(settings["optimizer"], model, seed=seed, weight_decay=decay)
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, progress=tick.progress)
    return fit.train(model, optimizer, data, search=CANDIDATES, **common)


def outside(record: dict) -> list[str]:
    """Return the epochs at which a run is outside the bands around the recorded errors."""
    std, errors = record["settings"]["std"], record["test_error"]
    found = []
    for epoch in sorted({*FIGURE.get(std, {}), *MEASURED.get(std, {})}):
        recorded = [table[std][epoch] for table in (FIGURE, MEASURED) if epoch in table.get(std, {})]
        band = END if epoch == 20 else TRANSITION
        if epoch <= len(errors) and not min(recorded) - band <= errors[epoch - 1] <= max(recorded) + band:
            found.append(f"epoch {epoch}: {errors[epoch - 1]:.4f}, recorded {min(recorded):g} to {max(recorded):g}")
    return found


def plot(figure, results):
    axis = figure.subplots()
    for i, (name, records) in enumerate(results.items()):
        settings = records[0]["settings"]
        style = dict(color=f"C{i % 10}", linestyle="-" if settings in _reference() else "--")
        for record in records:
            errors = record["test_error"]
            label = name if record is records[0] else None
            axis.plot(range(1, len(errors) + 1), errors, **style, linewidth=1, label=label)
        if settings in _reference():
            for table, marker in ((FIGURE, "o"), (MEASURED, "x")):
                points = table.get(settings["std"], {})
                axis.plot(
                    list(points), list(points.values()), marker, color=f"C{i % 10}", fillstyle="none", markersize=5
                )
    axis.plot([], [], "ko", fillstyle="none", label="published figure")
    axis.plot([], [], "kx", label="independent numpy")
    axis.set(yscale="log", xlabel="epoch", ylabel="MNIST test error", xlim=(0.5, 20.5))
    axis.set_xticks(range(1, 21))
    ticks = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
    axis.set_yticks(ticks, [f"{100 * t:g} %" for t in ticks])
    axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), title="deviation of the weights")
    figure.suptitle("Network C of twelve weight matrices, by standard deviation of the initial weights")


def _reference() -> list[dict]:
    """Return the settings that the published figure shows."""
    return [s for s in SETTINGS.values() if s["optimizer"] == "sgd2" and s["normalization"] == "rms"]


def lines(results):
    text = []
    for name, records in results.items():
        first, last = (runner.spread(r["test_error"][i] for r in records) for i in (0, -1))
        line = f"{name}: test error {first} after one epoch, {last} at the end; rates {[r['rates'] for r in records]}"
        if records[0]["settings"] in _reference():
            wrong = [f"seed {r['seed']}, {x}" for r in records for x in outside(r)]
            line += "; outside the bands: " + "; ".join(wrong) if wrong else "; within the bands"
        text.append(line)
    return text
