"""The comparison: the same rate search for every method, then all methods side by side, epoch by epoch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .console import Console
from .optimizers import Method
from .training_loop import Contestant, Task

Report = dict[str, Any]

_SAVE_EVERY = 2.0  # seconds; writing a report of many epochs takes longer than an epoch of the digits


@dataclass(frozen=True)
class Settings:
    """What to compare. ``rates`` has the learning rates that the user fixed, by method; the others are searched."""

    methods: list[Method]
    seeds: list[int]
    epochs: int
    trial_epochs: int
    rates: dict[str, float]


class Comparison:
    """Runs the methods of :class:`Settings`.

    ``report`` is the content of report.json and is filled as the runs go on. ``save`` writes it, at most every two
    seconds, so that a crash loses little.
    """

    def __init__(
        self,
        settings: Settings,
        task: Task,
        initial: Callable[[int], nn.Module],
        report: Report,
        console: Console,
        save: Callable[[], None],
    ) -> None:
        self.settings: Settings = settings
        self.task: Task = task
        self.initial: Callable[[int], nn.Module] = initial
        self.report: Report = report
        self.console: Console = console
        self._write, self._written = save, -math.inf
        report["rate_search"] = {
            "epochs": settings.trial_epochs,
            "seed": settings.seeds[0],
            "trials": {},
            "chosen": dict(settings.rates),
        }
        report["runs"] = []

    def run(self) -> None:
        try:
            self._search()
            for seed in self.settings.seeds:
                self._compare(seed)
        finally:
            self.console.close()

    def _save(self) -> None:
        if time.monotonic() - self._written > _SAVE_EVERY:
            self._write()
            self._written = time.monotonic()

    # ---- learning rates

    def _search(self) -> None:
        """Try all rates of every method whose rate is not fixed, and choose that with the lowest held-out error."""
        searched = [method for method in self.settings.methods if method.name not in self.settings.rates]
        if not searched:
            return
        search = self.report["rate_search"]
        seed, epochs = search["seed"], self.settings.trial_epochs
        task = self.task.trial()
        self.console.line(
            f"Rate search: {len(searched[0].rates)} trials of {_count(epochs, 'epoch')} for each method, seed {seed}, "
            f"judged by {len(task.judge_x):,} training images that are held out; the test set plays no part."
        )
        self.console.start(sum(len(method.rates) for method in searched) * epochs * task.steps)
        initial, done = self.initial(seed), 0
        for method in searched:
            trials = search["trials"][method.name] = []
            for lr in method.rates:
                self.console.where(f"{method.name}, rate {lr:g}")
                contestant = Contestant.start(method, lr, initial)
                while len(contestant.epochs) < epochs and contestant.status == "running":
                    contestant.run_epoch(task, seed, self.console.tick)
                if contestant.status == "running":
                    contestant.status = "finished"
                trials.append(contestant.record())
                done += epochs * task.steps
                self.console.reach(done)
            best = min(trials, key=_score)
            search["chosen"][method.name] = best["lr"]
            self._save()
            self.console.line(f"  {method.name:9s} rate {best['lr']:<7g} {_trial_text(trials, best)}")
        self.console.line()

    # ---- the comparison

    def _compare(self, seed: int) -> None:
        """Train every method from the same weights on the same batches.

        The methods take turns, an epoch each. If the machine slows down for a while, it slows all of them, so that
        their seconds stay comparable.
        """
        settings, steps = self.settings, self.task.steps
        initial = self.initial(seed)
        rates = self.report["rate_search"]["chosen"]
        contestants = [Contestant.start(method, rates[method.name], initial) for method in settings.methods]
        records = {}
        for contestant in contestants:
            records[contestant.method.name] = {"seed": seed, **contestant.record()}
            self.report["runs"].append(records[contestant.method.name])
        self.console.start(len(contestants) * settings.epochs * steps)
        done = 0
        for epoch in range(1, settings.epochs + 1):
            for contestant in contestants:
                name = contestant.method.name
                if contestant.status != "diverged":
                    self.console.where(f"seed {seed}, epoch {epoch}/{settings.epochs}, {name}")
                    result = contestant.run_epoch(self.task, seed, self.console.tick)
                    if epoch == settings.epochs and contestant.status == "running":
                        contestant.status = "finished"
                    records[name].update(contestant.record())
                    self.console.line(
                        f"seed {seed}  epoch {epoch:3d}/{settings.epochs}  {name:9s}  {_epoch_text(contestant, result)}"
                    )
                    self._save()
                done += steps
                self.console.reach(done)
        self.console.line()


def _score(trial: dict[str, Any]) -> tuple[float, float]:
    """Return the mean (error, loss) over the last quarter of a trial's epochs; infinite if it diverged."""
    if trial["status"] == "diverged":
        return math.inf, math.inf
    last = trial["epochs"][-max(1, len(trial["epochs"]) // 4) :]
    return statistics.fmean(e["validation_error"] for e in last), statistics.fmean(e["validation_loss"] for e in last)


def _trial_text(trials: list[dict[str, Any]], best: dict[str, Any]) -> str:
    errors = [_score(trial)[0] for trial in trials]
    tried = "  ".join(
        f"{trial['lr']:g}: {'diverged' if math.isinf(error) else format(100 * error, '.1f')}"
        for trial, error in zip(trials, errors, strict=True)
    )
    if math.isinf(_score(best)[0]):
        return f"({tried}; every trial diverged)"
    return f"(held-out error in % by rate: {tried})"


def _epoch_text(contestant: Contestant, result: dict[str, Any]) -> str:
    if contestant.status == "diverged":
        return f"diverged: the loss is not finite any more (rate {contestant.lr:g}); this method stops here"
    return (
        f"loss {result['train_loss']:8.4g}  test error {100 * result['test_error']:6.2f} %  {result['seconds']:7.2f} s"
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
