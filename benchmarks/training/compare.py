"""The run, the curves and the sentences of experiments that compare optimizers on one network."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.training import fit, runner
from consistency_ops.optim.learning_rate import CANDIDATES


def run(model: nn.Module, settings: dict, size: dict, seed: int, data: fit.Split, tick) -> dict[str, Any]:
    """Train with the optimizer of ``settings``, at its "rate" or one of eight selected as in the paper."""
    method = settings["optimizer"]
    adaptive = method == "muon" or method in fit.ADAM
    options = {} if adaptive else {"weight_decay": settings.get("weight_decay", 1e-4)}
    optimizer = fit.optimizer_of(method, model, lr=settings.get("rate", 1.0), seed=seed, **options)
    search = None if "rate" in settings else fit.ADAPTIVE if adaptive else CANDIDATES
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, search=search)
    return fit.train(model, optimizer, data, progress=getattr(tick, "progress", None), **common)


MANY = 5  # curves whose names would cover some of them


def curves(
    figure, results: runner.Results, published: dict[str, dict[int, float]] | None = None, source: str = ""
) -> None:
    """Training loss and test error against epochs; ``published`` test errors by run and epoch as crosses."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    left, right = figure.subplots(1, 2)
    for i, (name, records) in enumerate(results.items()):
        for axis, key in ((left, "train_loss"), (right, "test_error")):
            for record in records:
                values = record[key]
                axis.plot(range(1, len(values) + 1), values, color=f"C{i}", alpha=0.3, linewidth=0.8)
            values = runner.mean(records, key)
            label = name.replace("sgd2", "SGD2").replace("sgd", "SGD").replace("adam", "Adam").replace("muon", "Muon")
            axis.plot(range(1, len(values) + 1), values, color=f"C{i}", label=label)
        if published and name in published:
            points = published[name]
            right.plot(list(points), list(points.values()), "x", color=f"C{i}")
    left.set(yscale="log", xlabel="epoch", ylabel="mean training loss")
    right.set(yscale="log", xlabel="epoch", ylabel="test error")
    left.plot([], [], "kx", label=source) if published else None
    if len(results) > MANY:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    else:
        left.legend(fontsize="small")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    for axis in (left, right):
        axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)


def lines(results: runner.Results) -> list[str]:
    text = []
    for name, records in results.items():
        first, last, best = (
            runner.spread(choose(r["test_error"]) for r in records) for choose in (lambda e: e[0], lambda e: e[-1], min)
        )
        rates = [r["rates"] or r["settings"]["rate"] for r in records]
        text.append(f"{name}: test error {first} after one epoch, {last} at the end, best {best}; rates {rates}")
    return text
