"""Whole trainings: every optimizer with warm-up and decay, at the best of five rates, three seeds.

    python -m benchmarks.peers full [TASK ...] [--optimizers NAME ...] [--resume] [--minutes M]
    python -m benchmarks.peers full --status

Every run is a JSON line in ``benchmarks/results/peers/full``, so the phase may be stopped at any time; ``--resume``
goes on with what is missing. The rate rises over the first twentieth of the steps, then falls to 0 in a line.

A method with our line also has a trial at the rate that its optimizer alone chose. ``--horizons 0.5
0.75`` adds runs of half and three quarters of the steps, each with its own decay: for the steps to Muon's final loss.

Trials take a third of the steps, with the same schedule on these, seed 0, and are judged by the loss on held-out
training examples. The five rates are found by one rule for all (:func:`next_rate`): half decades around a start until
the best has a worse neighbour on either side, then quarter decades. The best runs with the seeds 1, 2 and 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import DATA
from benchmarks.micro.timing import command
from benchmarks.peers import optimizers as known
from benchmarks.peers.optimizers import PEERS, Peer, corrected, whitened
from benchmarks.peers.runs import LOST, RESULTS, Store, batches, measure, versions
from benchmarks.peers.tasks import (
    BYTES_CONTEXT,
    TASKS,
    Gpt,
    Split,
    Task,
    nats,
    seeded,
    source_bytes,
)

FOLDER = RESULTS / "full"
WARM_UP = 0.05  # share of the steps
TRIALS, TRIAL_SHARE = 5, 3  # rates; a trial has the steps over this
POINTS, TRIAL_POINTS = 20, 4  # points on a curve
BEHIND = 2.0  # a trial that has this many times the held-out loss of the best one at half of its steps stops
SEEDS = 3

# A task of the first phase, its batch and the steps of a whole training, and the training examples for its loss.
FULL: dict[str, Task] = {
    name: dataclasses.replace(TASKS[name], batch=batch, steps=steps, points=POINTS)
    for name, batch, steps in (
        ("autoencoder", 250, 500),
        ("deep-mlp", 500, 400),
        ("fashion-mlp", 250, 600),
        ("fashion-convnet", 128, 600),
        ("cifar-convnet", 64, 500),
        ("cifar-resnet", 64, 500),
        ("char-gpt", 32, 480),
        ("narrow-mlp", 250, 600),
    )
}
for name in ("cifar-convnet", "cifar-resnet"):  # a look at their test images costs as much as many steps
    FULL[name] = dataclasses.replace(FULL[name], points=POINTS // 2)
FULL["char-gpt-large"] = dataclasses.replace(
    FULL["char-gpt"],
    text="characters of Python's manual pages, transformer 3 x 96, 4 heads, context 64",
    model=seeded(lambda: Gpt(width=96, blocks=3)),
    batch=16,
    steps=400,
)
FULL["byte-gpt"] = Task(
    "bytes of the sources of Python's standard library, transformer 2 x 96, 4 heads, context 128",
    "test loss (nats)",
    source_bytes,
    seeded(lambda: Gpt(width=96, blocks=2, context=BYTES_CONTEXT, symbols=256)),
    lambda output, y: nn.functional.cross_entropy(output.flatten(0, -2), y.flatten()),
    nats,
    *(8, 440, (), POINTS),
)
KERNELS = ("fashion-convnet", "cifar-convnet", "cifar-resnet")  # tasks with kernels of several taps
FITTED = {"char-gpt": 500, "char-gpt-large": 500, "byte-gpt": 200}  # training examples for the loss at the end
FITTED_IMAGES = 2500


def method(peer: str, start: float, text: str | None = None, build: Callable | None = None, **fixed: object) -> Method:
    spec = PEERS[peer]
    return Method(spec.text if text is None else text, start, spec.build if build is None else build, fixed, spec)


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with the rate at which its trials start, and the settings that are the same in all of them."""

    text: str
    start: float
    build: Callable[..., known.Step]
    fixed: dict
    peer: Peer

    @property
    def order(self) -> int:
        return self.peer.order


WHITEN = 0.3  # the damping that the search found
BETAS_95 = [0.9, 0.95]

# The starts are what the first hundred steps found in the middle of their tasks; one with our line starts where its
# base does. K-FAC, FOOF and ISAAC have our default damping, 0.1.
METHODS: dict[str, Method] = {
    "sgd": method("sgd", 0.03),
    "adamw": method("adamw", 0.003),
    "muon": method("muon", 0.01),
    "adamw+white": method("adamw+pre", 0.003, f"AdamW, whitened, damping {WHITEN}", whitened("adamw"), damping=WHITEN),
    "muon+white": method("muon+pre", 0.01, f"Muon, whitened, damping {WHITEN}", whitened("muon"), damping=WHITEN),
    "adamw+white 0.1": method("adamw+pre", 0.003, "AdamW, whitened, damping 0.1", whitened("adamw"), damping=0.1),
    "muon+white 0.1": method("muon+pre", 0.01, "Muon, whitened, damping 0.1", whitened("muon"), damping=0.1),
    **{
        f"{base}+free": method(
            f"{base}+pre",
            start,
            f"{text}, whitened, norm free, damping {WHITEN}, every 10",
            whitened(base),
            damping=WHITEN,
            every=10,
            keep_norm=False,
        )
        for base, start, text in (("adamw", 0.003, "AdamW"), ("muon", 0.01, "Muon"))
    },
    # With the package's defaults for all else.
    **{
        f"{base}+both": method(f"{base}+pre", start, f"{text}, whitened, outputs too", whitened(base), outputs=True)
        for base, start, text in (("adamw", 0.003, "AdamW"), ("muon", 0.01, "Muon"))
    },
    # Cosine coefficients of kernels. On a task that is not of `KERNELS` these are the methods without.
    "adamw+white+dct": method(
        "adamw+pre", 0.003, f"AdamW, whitened, damping {WHITEN}, dct", whitened("adamw"), damping=WHITEN, dct=True
    ),
    "adamw+both+dct": method(
        "adamw+pre", 0.003, "AdamW, whitened, outputs too, dct", whitened("adamw"), outputs=True, dct=True
    ),
    # SOAP and KL-Shampoo have these betas by their packages' defaults.
    "adamw95": method("adamw", 0.003, "torch AdamW, betas 0.9, 0.95", betas=BETAS_95),
    **{
        f"adamw95+both{dct}": method(
            "adamw+pre",
            0.003,
            f"AdamW, betas 0.9, 0.95, whitened, outputs too{text}",
            whitened("adamw"),
            betas=BETAS_95,
            outputs=True,
            **options,
        )
        for dct, text, options in (("", "", {}), ("+dct", ", dct", {"dct": True}))
    },
    "adamw+pre": method("adamw+pre", 0.003, "AdamW, corrected"),
    "muon+pre": method("muon+pre", 0.01, "Muon, corrected"),
    "sgd+white": method("sgd+pre", 0.03, f"SGD, whitened, damping {WHITEN}", whitened("sgd"), damping=WHITEN),
    "sgd+pre": method("sgd+pre", 0.03, "SGD, corrected"),
    "newton-muon": method(
        "muon+pre",
        0.01,
        "Newton-Muon: Muon, corrected, whole layers, average 0.95, every 32",
        corrected("muon"),
        damping=0.2,
        decay=0.95,
        every=32,
        chunk=None,
    ),
    "soap": method("soap", 0.003),
    "kl-shampoo": method("kl-shampoo", 0.003),
    "shampoo": method("shampoo", 0.03),
    "psgd": method("psgd", 0.003),
    "kfac": method("kfac", 0.03, damping=0.1),
    "foof": method("foof", 0.03, damping=0.1),
    "isaac": method("isaac", 0.03, damping=0.1),
}
FIRST_ORDER = ("sgd", "adamw", "adamw95", "muon")
# The optimizer in which each of ours is switched on.
BASE = {name: name.split("+")[0] for name in METHODS if "+" in name}
OURS = tuple(BASE)


def factor(i: int, steps: int) -> float:
    """Return the factor of the rate in step ``i`` of ``steps``, counted from 1."""
    warm = max(1, round(WARM_UP * steps))
    return i / warm if i <= warm else (steps - i + 1) / (steps - warm)


def optimizers_in(kept: object) -> list[torch.optim.Optimizer]:
    """Return the optimizers in what a step keeps: one of torch's, a FlatMuon, or a list of those."""
    if isinstance(kept, list | tuple):
        return [one for item in kept for one in optimizers_in(item)]
    if isinstance(kept, known.FlatMuon):
        return list(kept.parts)
    return [kept] if isinstance(kept, torch.optim.Optimizer) else []


class Schedule:
    """Sets the rates of every param group to a factor times what they are now."""

    def __init__(self, step: known.Step) -> None:
        groups = [group for one in optimizers_in(step.keep) for group in one.param_groups]
        assert groups, "a step that keeps no optimizer has no rate to set"
        self.groups = [(group, float(group["lr"])) for group in groups]

    def set(self, value: float) -> None:
        for group, rate in self.groups:
            group["lr"] = rate * value


def mean_loss(task: Task, model: nn.Module, part: tuple[Tensor, Tensor]) -> float | None:
    """Return the loss over ``part`` in eval mode."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in zip(*(t.split(250) for t in part), strict=True):
            total += float(task.loss(model(x), y)) * len(x)
    model.train()
    return _finite(total / len(part[0]))


def train(
    name: str,
    task: Task,
    build: Callable[..., known.Step],
    setting: dict,
    split: Split,
    seed: int,
    steps: int,
    trial: bool,
    rival: float | None = None,
) -> dict:
    """Train once with the schedule on ``steps`` and return the record of the run.

    A point of the curve is (step, CPU seconds so far, mean training loss since the last point, value). The value is the
    loss on held-out examples in a trial, else the task's metric on test examples. A trial ends after half of its steps
    if its loss there is ``BEHIND`` times ``rival``.
    """
    torch.manual_seed(seed)
    model = task.model(seed)
    model.train()
    step = build(model, task.loss_type, **setting)
    schedule = Schedule(step)
    judge = (lambda: mean_loss(task, model, split.held_out)) if trial else (lambda: _measured(task, model, split))
    points = TRIAL_POINTS if trial else task.points
    marks = {round(steps * k / points) for k in range(1, points + 1)}
    curve, times, losses = [[0, 0.0, None, judge()]], [], []
    first, failure = None, None
    for i, (x, y) in zip(range(1, steps + 1), batches(task, split, seed), strict=False):
        schedule.set(factor(i, steps))
        start = time.process_time()
        try:
            loss = step(x, y, task.loss)
        except (RuntimeError, ValueError, ArithmeticError) as error:  # a peer's own failure, as a singular factor
            failure = f"step {i}: {type(error).__name__}: {str(error)[:120]}"
            break
        times.append(time.process_time() - start)
        first = loss if first is None else first
        losses.append(loss)
        if not (math.isfinite(loss) and loss < LOST * first):
            failure = f"step {i}: loss {loss:.3g}"
            break
        if i in marks:
            curve.append([i, round(sum(times), 4), _finite(sum(losses) / len(losses)), judge()])
            losses = []
            if rival is not None and i == round(steps / 2) and not (curve[-1][3] or math.inf) < BEHIND * rival:
                failure = f"step {i}: stopped, {BEHIND:g} times worse than a trial before it"
                break
    record = {
        "curve": curve,
        "ms_per_step": round(1e3 * statistics.median(times), 3) if times else None,
        "seconds": round(sum(times), 3),
        "failure": failure,
    }
    if failure is None and not trial:
        fitted = tuple(t[: FITTED.get(name, FITTED_IMAGES)] for t in split.train)
        record["train_loss"] = mean_loss(task, model, fitted)
        record["test_loss"] = mean_loss(task, model, split.test)
    return record


def _measured(task: Task, model: nn.Module, split: Split) -> float | None:
    return _finite(measure(task, model, split.test))


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


# Rates


def rate(start: float, quarters: int) -> float:
    """Return ``start`` moved by so many quarter decades, with two digits."""
    return float(f"{start * 10 ** (quarters / 4):.2g}")


def next_rate(values: dict[int, float]) -> int:
    """Return the quarter decade, counted from the start, to try after those in ``values`` (place: loss, smaller is
    better; infinite for a failure).

    Half decades first: the start, the one above, the one below, then on beyond the end while an end is the best. When
    the best has been tried on both sides, quarter decades beside it, first on the side of its better neighbour.
    """
    for place in (0, 2, -2):
        if place not in values:
            return place
    coarse = [place for place in values if place % 2 == 0]
    if all(math.isinf(values[place]) for place in coarse):
        return min(coarse) - 2
    best = min(coarse, key=lambda place: (values[place], place))
    if best == max(coarse):
        return best + 2
    if best == min(coarse):
        return best - 2
    sides = sorted((1, -1), key=lambda side: values[best + 2 * side])
    return next((best + side for side in sides if best + side not in values), min(coarse) - 2)


def last(run: dict) -> float:
    """Return the value at the end; infinite for a run that failed."""
    value = run["curve"][-1][3]
    return math.inf if run["failure"] or value is None else value


class Phase:
    """What is run on one task: trials, finals and horizons, each only once."""

    def __init__(self, task: str, folder: Path, directory: Path, methods: dict[str, Method], steps: int | None) -> None:
        self.name, self.task, self.methods = task, FULL[task], methods
        self.steps = steps or self.task.steps
        self.store = Store(folder / f"{task}.jsonl")
        self._directory, self._split = directory, None
        self.deadline = math.inf

    @property
    def split(self) -> Split:
        if self._split is None:
            self._split = self.task.load(self._directory)
        return self._split

    def run(self, name: str, phase: str, setting: dict, seed: int, steps: int, rival: float | None = None) -> dict:
        """Return the stored run, or make and store a new one."""
        key = dict(task=self.name, optimizer=name, phase=phase, setting=setting, seed=seed, steps=steps)
        method = self.methods[name]
        same = (run for run in self.store.runs if run["fixed"] == method.fixed)
        if found := next((run for run in same if all(run[k] == value for k, value in key.items())), None):
            return found
        if time.time() > self.deadline:
            raise TimeoutError
        trial = phase in ("trial", "borrowed")
        record = train(
            self.name, self.task, method.build, {**method.fixed, **setting}, self.split, seed, steps, trial, rival
        )
        run = key | record | {"batch": self.task.batch, "fixed": method.fixed}
        run["package"] = f"{method.peer.package} {method.peer.version}"
        run["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        run["machine"], run["command"] = versions(), command()
        self.store.add(run)
        print(
            f"{time.strftime('%H:%M:%S')} {self.name} {name} {phase} {setting} seed {seed}, {steps} steps: "
            f"{run['curve'][-1]} {run.get('train_loss', '')} {run['failure'] or ''}",
            flush=True,
        )
        return run

    def trials(self, name: str) -> list[dict]:
        """Make the five trials."""
        values: dict[int, float] = {}
        found: list[dict] = []
        start = self.methods[name].start
        steps = self.steps // TRIAL_SHARE
        while len(found) < TRIALS:
            place = next_rate(values)
            setting = {"lr": rate(start, place)}
            best = min((run for run in found if not run["failure"]), key=last, default=None)
            half = next((v for step, _, _, v in best["curve"] if step == round(steps / 2)), None) if best else None
            found.append(self.run(name, "trial", setting, 0, steps, half))
            values[place] = last(found[-1])
        return found

    def chosen(self, name: str) -> dict | None:
        """Return the setting of the best trial, None if all failed."""
        best = min(self.trials(name), key=last)
        return None if math.isinf(last(best)) else best["setting"]

    def finals(self, name: str, seeds: int) -> list[dict]:
        setting = self.chosen(name)
        if setting is None:
            print(f"{self.name} {name}: every trial failed", flush=True)
            return []
        return [self.run(name, "final", setting, seed, self.steps) for seed in range(1, seeds + 1)]

    def borrowed(self, name: str) -> dict | None:
        """Return the trial at the rate that the optimizer alone chose; it is made if it is not among the five."""
        setting = self.chosen(BASE[name])
        steps = self.steps // TRIAL_SHARE
        if setting is None:
            return None
        found = next((run for run in self.trials(name) if run["setting"] == setting), None)
        return found or self.run(name, "borrowed", setting, 0, steps)

    def horizons(self, name: str, seeds: int, shares: list[float]) -> None:
        """Make runs of fewer steps, each with its own decay, for the steps to Muon's final loss."""
        setting = self.chosen(name)
        for share in shares if setting else ():
            for seed in range(1, seeds + 1):
                self.run(name, "horizon", setting, seed, round(share * self.steps))


def installed(names: list[str]) -> list[str]:
    missing = [name for name in names if METHODS[name].peer.version is None]
    for name in missing:
        print(f"{name}: skipped, {METHODS[name].peer.package} is not installed (requirements-peers.txt)")
    return [name for name in names if name not in missing]


def status(folder: Path, tasks: list[str], names: list[str], seeds: int) -> str:
    """Return what has been run: trials and finals of every method and task."""
    lines = []
    for task in tasks:
        runs = Store(folder / f"{task}.jsonl").runs
        cells = []
        for name in names:
            own = [run for run in runs if run["optimizer"] == name and run["fixed"] == METHODS[name].fixed]
            trials, finals = (sum(run["phase"] == phase for run in own) for phase in ("trial", "final"))
            cells.append(f"{name} {trials}/{TRIALS}+{finals}/{seeds}")
        lines.append(f"{task}: " + ", ".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(FULL)}; default: all")
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the final runs")
    parser.add_argument("--steps", type=int, help="of a final run, instead of the task's own number")
    parser.add_argument(
        "--horizons", nargs="+", type=float, default=[], metavar="SHARE", help="also runs of these shares of the steps"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the runs that are there")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--status", action="store_true", help="only say what has been run (trials + finals)")
    parser.add_argument("--data-dir", type=Path, default=DATA, help=f"default: {DATA}; CONSISTENCY_OPS_DATA sets it")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON lines")
    options = parser.parse_args(arguments)
    if unknown := [task for task in options.tasks if task not in FULL]:
        parser.error(f"TASK must be of {', '.join(FULL)}, got {unknown[0]}")
    tasks = options.tasks or list(FULL)
    if options.status:
        print(status(options.out, tasks, options.optimizers, options.seeds))
        return
    if not options.resume and (old := [task for task in tasks if (options.out / f"{task}.jsonl").exists()]):
        parser.error(f"{options.out} has runs of {', '.join(old)}: --resume goes on with them, --out DIR starts anew")
    warnings.filterwarnings("ignore", message=".*non-full backward hook.*")  # asdfghjkl's
    torch.set_num_threads(1)  # CPU seconds of one thread can be compared on a busy machine
    names = installed(options.optimizers)
    deadline = time.time() + 60 * options.minutes
    try:
        for task in tasks:
            phase = Phase(task, options.out, options.data_dir, METHODS, options.steps)
            phase.deadline = deadline
            for name in names:
                phase.finals(name, options.seeds)
                if BASE.get(name) in names:
                    phase.borrowed(name)
                phase.horizons(name, options.seeds, options.horizons)
    except TimeoutError:
        print(f"{options.minutes:g} minutes are over; --resume goes on", flush=True)


if __name__ == "__main__":
    main()
