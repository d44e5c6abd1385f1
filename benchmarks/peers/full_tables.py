"""Makes the tables of the whole trainings from the JSON lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from benchmarks import markdown
from benchmarks.peers.full import BASE, FIRST_ORDER, FULL, KERNELS, METHODS, OURS, last
from benchmarks.peers.tables import number

Runs = dict[str, list[dict]]  # by task

DCT = "+dct"  # the methods of this ending have ``dct=True``


def of_phase(runs: list[dict], name: str, phase: str) -> list[dict]:
    """Return the runs of an optimizer; of final runs those with the task's own number of steps."""
    found = [run for run in own(runs, name) if run["phase"] == phase]
    return [run for run in found if phase != "final" or run["steps"] == FULL[run["task"]].steps]


def own(runs: list[dict], name: str) -> list[dict]:
    """Return the runs of an optimizer with the settings that it has now; earlier ones stay in the files.

    On a task without kernels ``dct=True`` changes nothing, bit for bit, and the runs are those of the method without.
    """
    if runs and runs[0]["task"] not in KERNELS:
        name = name.removesuffix(DCT)
    return [run for run in runs if run["optimizer"] == name and run["fixed"] == METHODS[name].fixed]


def values(found: list[dict], key: str) -> list[float]:
    """Return train or test loss at the end, or the last value of the curve ("metric"); infinite where a run failed."""
    if key == "metric":
        return [last(run) for run in found]
    return [math.inf if run["failure"] or run[key] is None else run[key] for run in found]


def spread(found: list[float]) -> str:
    """Return mean and half range."""
    fine = [value for value in found if math.isfinite(value)]
    if not fine:
        return "failed"
    text = f"{number(statistics.mean(fine))} ± {number((max(fine) - min(fine)) / 2)}"
    return text if len(fine) == len(found) else f"{text}, {len(found) - len(fine)} of {len(found)} failed"


def mean_end(runs: list[dict], name: str, key: str = "train_loss") -> float | None:
    """Return the mean over the final runs; None if there are none, infinite if one failed."""
    found = values(of_phase(runs, name, "final"), key)
    return statistics.mean(found) if found else None


def tasks_of(runs: Runs) -> list[str]:
    return [task for task in FULL if any(run["phase"] == "final" for run in runs.get(task, []))]


def _name(name: str) -> str:
    return f"**{METHODS[name].text}**" if name in BASE else METHODS[name].text


def ends(runs: Runs, key: str) -> str:
    """Return a table of the ends of the trainings: ``key`` of every optimizer on every task; the best is in italics."""
    tasks = tasks_of(runs)
    heads = [f"{task}{'' if key == 'train_loss' else ', ' + FULL[task].metric}" for task in tasks]
    rows = []
    best = {
        task: min((end, name) for name in METHODS if (end := mean_end(runs[task], name, key)) is not None)[1]
        for task in tasks
    }
    for name in METHODS:
        cells = []
        for task in tasks:
            found = of_phase(runs[task], name, "final")
            cell = spread(values(found, key)) if found else "not run"
            cells.append(f"*{cell}*" if name == best[task] else cell)
        if set(cells) != {"not run"}:
            rows.append([_name(name), *cells])
    return markdown.table(["optimizer", *heads], rows)


LATE = 0.9  # share of the steps


def converged(runs: Runs) -> str:
    """Return a table of the optimizers alone: the metric on test examples after 90 % of the steps over that at the
    end, the mean of the seeds; above 1 it still fell."""
    tasks = tasks_of(runs)
    rows = [[_name(name), *(_late(of_phase(runs[task], name, "final")) for task in tasks)] for name in FIRST_ORDER]
    return markdown.table(["optimizer", *tasks], rows)


def longer(runs: Runs) -> str:
    """Return a table of trainings that are longer than the tasks say: train loss and metric at the end, of each
    optimizer, and what AdamW alone still gained in the last tenth."""
    finals = {task: [run for run in runs[task] if run["phase"] == "final"] for task in FULL if runs.get(task)}
    names = [name for name in METHODS if any(own(found, name) for found in finals.values())]
    shown = [name for name in names if name + DCT not in names]
    rows = []
    for task, found in finals.items():
        best = min(statistics.mean(values(some, "train_loss")) for name in names if (some := own(found, name)))
        cells = []
        for name in shown:
            some = own(found, name)
            ends_ = [spread(values(some, key)) for key in ("train_loss", "metric")] if some else ["not run"]
            if some and statistics.mean(values(some, "train_loss")) == best:
                ends_[0] = f"*{ends_[0]}*"
            cells.append(" / ".join(ends_))
        steps = found[0]["steps"]
        rows.append([f"{task}, {steps} steps: train loss / {FULL[task].metric}", *cells, _late(own(found, "adamw"))])
    return markdown.table(["task", *map(_name, shown), f"{METHODS['adamw'].text}, 90 % over the end"], rows)


def _late(finals: list[dict]) -> str:
    found = [run for run in finals if not run["failure"]]
    late = [_metric_at(run, round(LATE * run["steps"])) for run in found]
    return f"{statistics.mean(late) / statistics.mean(map(last, found)):.3f}" if found else "not run"


def _metric_at(run: dict, step: int) -> float:
    return next(value for at, _, _, value in run["curve"] if at == step)


def seconds(runs: Runs) -> str:
    """Return a table of the CPU seconds of a whole training, the mean of the seeds."""
    tasks = tasks_of(runs)
    rows = []
    for name in METHODS:
        found = [
            [run["seconds"] for run in of_phase(runs[task], name, "final") if not run["failure"]] for task in tasks
        ]
        if any(found):
            cells = [f"{statistics.mean(some):.1f}" if some else "" for some in found]
            rows.append([_name(name), *cells])
    return markdown.table(["optimizer", *(f"{task}, {FULL[task].steps} steps" for task in tasks)], rows)


def steps_to(runs: list[dict], name: str, target: float) -> tuple[float, float] | None:
    """Return (steps, CPU seconds) of a training that ends at ``target`` train loss; None if the whole one ends above.

    The whole training and shorter ones, each with its own decay, are joined by straight lines of the loss over the
    logarithm of the steps. A target that the shortest one meets gives its steps, a bound from above.
    """
    ends_: list[tuple[float, float, float]] = []
    found = [run for run in own(runs, name) if run["phase"] in ("final", "horizon")]
    for steps in sorted({run["steps"] for run in found if run["steps"] <= FULL[run["task"]].steps}):
        some = [run for run in found if run["steps"] == steps]
        loss = statistics.mean(values(some, "train_loss"))
        ends_.append((steps, loss, statistics.mean(run["seconds"] for run in some)))
    if not ends_ or ends_[-1][1] > target:
        return None
    k = next(k for k, (_, loss, _) in enumerate(ends_) if loss <= target)
    if k == 0:
        return ends_[0][0], ends_[0][2]
    (n0, l0, s0), (n1, l1, s1) = ends_[k - 1], ends_[k]
    if not math.isfinite(l0):
        return n1, s1
    share = (l0 - target) / (l0 - l1)
    return n0 * (n1 / n0) ** share, s0 + (s1 - s0) * share


def muon_steps(runs: Runs) -> str:
    """Return a table of steps and CPU seconds to Muon's final train loss, as shares of Muon's own."""
    tasks = [task for task in tasks_of(runs) if mean_end(runs[task], "muon") is not None]
    heads = [f"{task}, {number(mean_end(runs[task], 'muon'))}" for task in tasks]

    def cell(task: str, name: str) -> str:
        if name == "muon":
            return "1"
        found = steps_to(runs[task], name, mean_end(runs[task], "muon"))
        whole = FULL[task].steps, _seconds(runs[task], "muon")
        shares = None if found is None else f"{found[0] / whole[0]:.2f} ({found[1] / whole[1]:.2f})"
        return _reached(runs[task], name, found, shares)

    return _steps_table(runs, tasks, heads, cell)


def first_order_steps(runs: Runs) -> str:
    """Return a table of steps and CPU seconds to the best final train loss of SGD, AdamW and Muon alone."""
    tasks = [task for task in tasks_of(runs) if best_first_order(runs[task]) is not None]
    heads = []
    for task in tasks:
        name, end = best_first_order(runs[task])
        heads.append(f"{task}, {number(end)}, {name}")

    def cell(task: str, name: str) -> str:
        found = steps_to_first_order(runs[task], name)
        text = None if found is None else f"{found[0]:.0f} ({found[1]:.1f} s)"
        return text if text and name == best_first_order(runs[task])[0] else _reached(runs[task], name, found, text)

    return _steps_table(runs, tasks, heads, cell)


def best_first_order(runs: list[dict]) -> tuple[str, float] | None:
    """Return the first-order optimizer that ends at the lowest train loss, and that loss."""
    ends_ = {name: end for name in FIRST_ORDER if (end := mean_end(runs, name)) is not None}
    name = min(ends_, key=lambda name: ends_[name], default=None)
    return None if name is None else (name, ends_[name])


def behind_first_order(runs: Runs, name: str) -> dict[str, float]:
    """Return by task the train loss at the end over that of the best first-order optimizer."""
    found = {}
    for task in tasks_of(runs):
        end, best = mean_end(runs[task], name), best_first_order(runs[task])
        if end is not None and best is not None:
            found[task] = end / best[1]
    return found


def steps_to_first_order(runs: list[dict], name: str) -> tuple[float, float] | None:
    """Return (steps, CPU seconds) of a training that ends where the best of the first-order optimizers does."""
    best = best_first_order(runs)
    return None if best is None else steps_to(runs, name, best[1])


def _steps_table(runs: Runs, tasks: list[str], heads: list[str], cell: Callable[[str, str], str]) -> str:
    rows = []
    for name in METHODS:
        cells = [cell(task, name) if of_phase(runs[task], name, "final") else "" for task in tasks]
        if any(cells):
            rows.append([_name(name), *cells])
    return markdown.table(["optimizer", *heads], rows)


def _reached(runs: list[dict], name: str, found: tuple[float, float] | None, text: str | None) -> str:
    """Return ``text`` with "≤" where already the shortest training that was run meets the target."""
    if found is None:
        return "not reached"
    return f"{'≤ ' if _is_bound(runs, name, found) else ''}{text}"


def _is_bound(runs: list[dict], name: str, found: tuple[float, float]) -> bool:
    shorter = [run["steps"] for run in own(runs, name) if run["phase"] == "horizon"]
    whole = [run["steps"] for run in of_phase(runs, name, "final")]
    return found[0] == min(shorter + whole)


def borrowed(runs: list[dict], name: str) -> tuple[float, float, float] | None:
    """Return (the base's chosen rate, the best of this one's trials, loss at the former over that at the latter)."""
    trials, base = of_phase(runs, name, "trial"), of_phase(runs, BASE[name], "trial")
    if not trials or not base:
        return None
    lr = min(base, key=last)["setting"]["lr"]
    best = min(trials, key=last)
    at = [run for run in [*trials, *of_phase(runs, name, "borrowed")] if run["setting"]["lr"] == lr]
    return (lr, best["setting"]["lr"], last(at[0]) / last(best)) if at else None


def rates(runs: Runs) -> str:
    """Return a table of chosen rates, and the loss at the base's rate over that at the own one."""
    tasks = tasks_of(runs)
    rows = []
    for name in METHODS:
        cells = []
        for task in tasks:
            trials = of_phase(runs[task], name, "trial")
            if not trials:
                cells.append("")
            elif name not in BASE:
                cells.append(f"{min(trials, key=last)['setting']['lr']:g}")
            else:
                found = borrowed(runs[task], name)
                cell = f"{min(trials, key=last)['setting']['lr']:g}"
                if found is not None:
                    more = "stopped" if math.isinf(found[2]) else f"{found[2]:.2f}"
                    cell += f" (at {found[0]:g}: {more})"
                cells.append(cell)
        if any(cells):
            rows.append([_name(name), *cells])
    return markdown.table(["optimizer", *tasks], rows)


SHOWN = ("adamw", "adamw+white", "muon", "muon+white")
COLUMNS = ("adamw", "adamw+white", "adamw95+both+dct", "muon", "muon+white")


def summary(runs: Runs, key: str = "metric") -> str:
    """Return a table with a task in a row: the optimizers of ``COLUMNS``, and the best of the others' that were run."""
    rows = []
    for task in tasks_of(runs):
        found = {name: of_phase(runs[task], name, "final") for name in METHODS}
        ends_ = {name: statistics.mean(values(some, key)) for name, some in found.items() if some}
        first = min((name for name in ends_ if name in COLUMNS or name not in OURS), key=lambda name: ends_[name])
        cells = [spread(values(found[name], key)) if found[name] else "not run" for name in COLUMNS]
        others = {name: end for name, end in ends_.items() if name not in COLUMNS and name not in OURS}
        best = min(others, key=lambda name: others[name], default=None)
        cells.append("" if best is None else f"{spread(values(found[best], key))}, {METHODS[best].text.split(',')[0]}")
        marked = [f"*{c}*" if n == first else c for n, c in zip((*COLUMNS, best), cells, strict=True)]
        rows.append([f"{task}, {FULL[task].metric}", *marked])
    return markdown.table(["task", *map(_name, COLUMNS), "best of the others"], rows)


AIMED = ("adamw+white", "adamw+both+dct", "adamw95+both+dct", "muon+white", "muon+both")
TRANSFORMERS = ("char-gpt", "char-gpt-large", "byte-gpt")


def goals(runs: Runs) -> str:
    """Return a table of what was aimed at for nine tasks, and what was reached on those that were run."""
    tasks = [task for task in tasks_of(runs) if _complete(runs[task], *SHOWN)]
    gpts = [task for task in tasks if task in TRANSFORMERS]
    with_soap = [task for task in tasks if _complete(runs[task], "soap")]

    def ratio(task: str, name: str, other: str) -> float:
        return mean_end(runs[task], name) / mean_end(runs[task], other)

    def at_most(limit: float, found: dict[str, float]) -> dict[str, tuple[float, bool]]:
        return {task: (value, value <= limit) for task, value in found.items()}

    def below_1(found: dict[str, float]) -> dict[str, tuple[float, bool]]:
        return {task: (value, value < 1) for task, value in found.items()}

    rows = []
    for name in AIMED:
        found = {
            task: behind_first_order({task: runs[task]}, name)[task] for task in tasks if _complete(runs[task], name)
        }
        if found:
            text = f"{METHODS[name].text}: train loss over that of the best of SGD, AdamW and Muon"
            rows.append((text, "below 1 on 7", below_1(found)))
    for name in AIMED:
        base = BASE[name]
        found = {
            task: (ratio(task, name, base), _within(runs[task], name, base))
            for task in tasks
            if _complete(runs[task], name)
        }
        if found:
            text = f"{METHODS[name].text}: train loss over that of {METHODS[base].text}"
            rows.append((text, "never above by more than the seeds' spread", found))
    for name in AIMED:
        found = {task: at[2] for task in tasks if (at := borrowed(runs[task], name)) is not None}
        if found:
            text = f"{METHODS[name].text}: loss of a trial at the rate of {BASE[name]} alone over that of its own best"
            rows.append((text, "at most 1.1 on 7", at_most(1.1, found)))
    for name in AIMED[:3]:
        found = {task: ratio(task, name, "muon") for task in gpts if _complete(runs[task], name)}
        if found:
            text = f"{METHODS[name].text}: train loss over that of Muon alone, transformers"
            rows.append((text, "at most 1", at_most(1, found)))
    for name in AIMED[1:]:
        found = {}
        for task in (task for task in gpts if _complete(runs[task], name)):
            at_loss = steps_to(runs[task], name, mean_end(runs[task], "muon"))
            found[task] = math.inf if at_loss is None else at_loss[0] / FULL[task].steps
        if found:
            text = f"{METHODS[name].text}: share of Muon's steps to Muon's final train loss, transformers"
            rows.append((text, "at most 0.75", at_most(0.75, found)))
    for name in AIMED[1:]:
        both = [task for task in with_soap if _complete(runs[task], name)]
        found = {task: _seconds(runs[task], name) / _seconds(runs[task], "soap") for task in both}
        if found or name == "muon+white":
            text = f"{METHODS[name].text}: CPU seconds over those of SOAP, as many steps"
            rows.append((text, "below 1 on all", below_1(found)))
            found = {task: ratio(task, name, "soap") for task in both}
            text = f"{METHODS[name].text}: train loss over that of SOAP"
            rows.append((text, "below 1 on 5", below_1(found)))
            if name == "muon+both":  # has no shorter trainings
                continue
            for i, (what, wanted) in enumerate((("steps", "below 1 on 5"), ("CPU seconds", "below 1 on all"))):
                text = f"{METHODS[name].text}: {what} to the best final train loss of first order, over SOAP's"
                rows.append((text, wanted, {task: _over_soap(runs[task], name, i) for task in both}))
    heads = ["aim, of nine tasks", "wanted", "reached", "on which; missed in bold"]
    return markdown.table(heads, [_goal(*row) for row in rows])


def _goal(text: str, wanted: str, found: dict[str, tuple[float | str, bool]]) -> list[str]:
    cells = []
    for task, (value, good) in found.items():
        if isinstance(value, float):
            value = f"{value:.2f}" if math.isfinite(value) else "not reached"
        cell = f"{task} {value}"
        cells.append(cell if good else f"**{cell}**")
    return [text, wanted, f"{sum(good for _, good in found.values())} of {len(found)} run", ", ".join(cells)]


def _over_soap(runs: list[dict], name: str, i: int) -> tuple[float | str, bool]:
    """Return steps (``i`` 0) or CPU seconds (1) to the best loss of first order over SOAP's; whether that is below 1.

    Where the shortest training of SOAP is below that loss, the quotient is a bound from below and decides nothing.
    """
    ours, theirs = (steps_to_first_order(runs, one) for one in (name, "soap"))
    if ours is None:
        return math.inf, False
    if theirs is None:
        return "SOAP does not get there", True
    value = ours[i] / theirs[i]
    return (f"≥ {value:.2f}", False) if _is_bound(runs, "soap", theirs) else (value, value < 1)


def _complete(runs: list[dict], *names: str) -> bool:
    return all(of_phase(runs, name, "final") for name in names)


def _seconds(runs: list[dict], name: str) -> float:
    return statistics.mean(run["seconds"] for run in of_phase(runs, name, "final"))


def _within(runs: list[dict], name: str, base: str) -> bool:
    """Whether the mean of ``name`` is above that of ``base`` by no more than the half ranges of both together."""
    ours, theirs = (values(of_phase(runs, one, "final"), "train_loss") for one in (name, base))
    wide = (max(ours) - min(ours) + max(theirs) - min(theirs)) / 2
    return statistics.mean(ours) - statistics.mean(theirs) <= wide
