"""Makes the tables of the search, and of the norms, from the JSON lines."""

from __future__ import annotations

import math
import statistics

from benchmarks import markdown
from benchmarks.peers.full import FULL, last
from benchmarks.peers.full_tables import spread, values
from benchmarks.peers.norms import RATES as RATES_ALONE
from benchmarks.peers.norms import SETTINGS, SMALL
from benchmarks.peers.search import AROUND, AROUND_RATES, CHANGES, RATES, REFERENCES, STEPS
from benchmarks.peers.tables import number


def search(runs: list[dict]) -> str:
    """Return a table of the search, seed 0, one rate: train loss after a tenth and at the end, and the metric."""
    runs = [run for run in runs if run["phase"] not in AROUND]
    columns = [column for column in columns_of(runs) if column[0] != OF_KERNELS]
    heads = [
        f"{task}, {base}, {STEPS[task]} steps at {RATES[task, base]:g}: {FULL[task].metric}" for task, base in columns
    ]
    rows = []
    for change in [*REFERENCES, *CHANGES]:
        cells = []
        for task, base in columns:
            found = at_rate(runs, task, base, change, RATES[task, base])
            cells.append(_searched(found[0]) if found else "")
        if any(cells):
            rows.append([change, *cells])
    return markdown.table(["change", *heads], rows)


def outputs(runs: list[dict]) -> str:
    """Return a table of the ways to whiten the outputs' side, in front of AdamW on the character GPT, at two rates."""
    base = RATES["char-gpt", "adamw"]
    shares = (1.0, 3.0)
    rows = []
    names = ("base", "damping 0.3", *(name for name in REFERENCES if "outputs" in name))
    for change in (*names, *(name for name in CHANGES if "output" in name or "both sides" in name)):
        found = [at_rate(runs, "char-gpt", "adamw", change, float(f"{base * share:.2g}")) for share in shares]
        if any(found):
            rows.append([change, *(number(values(some[:1], "train_loss")[0]) if some else "" for some in found)])
    return markdown.table(["change", *(f"rate {base * share:g}" for share in shares)], rows)


OF_KERNELS = "cifar-convnet"  # has a table of its own


def kernels(runs: list[dict]) -> str:
    """Return a table of what is done to the kernels of the CIFAR-10 convnet, at one rate: mean and half range of the
    seeds."""
    rows = []
    for base in ("adamw", "muon"):
        lr = RATES[OF_KERNELS, base]
        for change in [*REFERENCES, *CHANGES]:
            found = at_rate(runs, OF_KERNELS, base, change, lr)
            if found:
                cells = [spread(values(found, key)) for key in ("train_loss", "metric")]
                mean = statistics.mean(run["seconds"] for run in found)
                rows.append([base, change, f"{lr:g}", *cells, f"{mean:.1f}"])
    return markdown.table(["optimizer", "change", "rate", "train loss", "test error", "CPU seconds"], rows)


def around(runs: list[dict]) -> str:
    """Return a table of changes of AdamW on both sides, at the rate of its whole trainings: train loss at the end and
    metric; of those with several seeds mean and half range, of the others the one seed."""
    heads = [f"{task}, {STEPS[task]} steps at {lr:g}: {FULL[task].metric}" for task, lr in AROUND_RATES.items()]
    rows = []
    for change in AROUND:
        cells = []
        for task, lr in AROUND_RATES.items():
            found = at_rate(runs, task, "adamw", change, lr)
            write = spread if len(found) > 1 else lambda some: number(some[0]) if math.isfinite(some[0]) else "failed"
            cells.append(" / ".join(write(values(found, key)) for key in ("train_loss", "metric")) if found else "")
        if any(cells):
            rows.append([change.removeprefix("both sides, "), *cells])
    return markdown.table(["change", *heads], rows)


def columns_of(runs: list[dict]) -> list[tuple[str, str]]:
    pairs = {(run["task"], run["optimizer"]) for run in runs}
    return [(task, base) for task in STEPS for base in ("muon", "adamw") if (task, base) in pairs]


def at_rate(runs: list[dict], task: str, base: str, change: str, lr: float) -> list[dict]:
    """Return the runs of a change at one rate, seed 0 first."""
    key = (task, base, change, STEPS[task], lr)
    names = "task", "optimizer", "phase", "steps"
    found = [run for run in runs if (*(run[name] for name in names), run["setting"]["lr"]) == key]
    return sorted(found, key=lambda run: run["seed"])


def _searched(run: dict) -> str:
    if run["failure"]:
        return "diverges"
    return f"{number(tenth_of(run))} / {number(run['train_loss'])} / {number(last(run))}"


NORMS = {"base": "alone", "damping 0.3": "whitened, norm kept", "norm free, damping 0.3": "whitened, norm free"}


def norms(runs: list[dict]) -> str:
    """Return a table of the train loss at the end at several rates: alone, whitened with the norm kept and free."""
    rows = []
    for task, base in columns_of(runs):
        lrs = {run["setting"]["lr"] for run in runs if (run["task"], run["optimizer"]) == (task, base)}
        for lr in sorted(lrs):
            found = {change: at_rate(runs, task, base, change, lr) for change in NORMS}
            seeds = min(len(some) for some in (found["damping 0.3"], found["norm free, damping 0.3"]))
            if not seeds:
                continue
            cells = [spread(values(some, "train_loss")) if len(some) == seeds else "" for some in found.values()]
            if seeds == 1:
                cells = [cell.split(" ±")[0] for cell in cells]
            rows.append([f"{task}, {base}", f"{lr:g}", str(seeds), *cells])
    return markdown.table(["task, optimizer", "rate", "seeds", *NORMS.values()], rows)


def small_norms(runs: list[dict]) -> str:
    """Return a table of the four small tasks: train loss at the rate of the optimizer alone, three seeds; and at the
    best of three rates, seed 0."""
    compared = ("alone", "norm kept", "norm free")
    heads = [*compared, *(f"{name}, best of three rates" for name in compared)]
    rows = []
    for task in SMALL:
        for base in ("muon", "adamw"):
            some = [run for run in runs if (run["task"], run["optimizer"]) == (task, base)]
            lr = RATES_ALONE[base, task]
            cells = []
            for name in compared:
                found = [run for run in some if (run["phase"], run["setting"]["lr"]) == (name, lr)]
                cells.append(spread(values(found, "train_loss")) if len(found) > 1 else "")
            for name in compared:
                found = [run for run in some if (run["phase"], run["seed"]) == (name, 0)]
                tried = {float(f"{lr * share:.2g}") for share in (0.32, 1.0, 3.2)}
                found = [run for run in found if run["setting"]["lr"] in tried]
                best = min(found, key=lambda run: values([run], "train_loss"), default=None)
                complete = best is not None and len(found) == len(tried)
                cells.append(f"{number(best['train_loss'])} at {best['setting']['lr']:g}" if complete else "")
            rows.append([f"{task}, {base}", f"{lr:g}", *cells])
    return markdown.table(["task, optimizer", "rate", *heads], rows)


MEMBERS = ("alone", "norm kept", *list(SETTINGS)[5:])


def members(runs: list[dict]) -> str:
    """Return a table of other members of the family in front of AdamW: train loss at one rate, three seeds."""
    tasks = [task for task in SMALL if any(run["phase"] == MEMBERS[2] and run["task"] == task for run in runs)]
    heads = [f"{task}, adamw at {RATES_ALONE['adamw', task]:g}" for task in tasks]
    rows = []
    for name in MEMBERS:
        cells = []
        for task in tasks:
            key = ("adamw", task, name, RATES_ALONE["adamw", task])
            names = ("optimizer", "task", "phase")
            found = [run for run in runs if (*(run[n] for n in names), run["setting"]["lr"]) == key]
            cells.append(spread(values(found, "train_loss")) if found else "")
        rows.append([name, *cells])
    return markdown.table(["", *heads], rows)


def tenth_of(run: dict) -> float:
    """Return the mean training loss of the second twentieth of the steps."""
    tenth = round(run["steps"] / 10)
    return next(loss for step, _, loss, _ in run["curve"] if step == tenth)
