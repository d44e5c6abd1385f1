"""Runs a training, and keeps every finished run as a JSON line."""

from __future__ import annotations

import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import consistency_ops as co
from benchmarks.peers.optimizers import DAMPINGS, PEERS
from benchmarks.peers.tasks import TASKS, VARIANTS, Split, Task

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers"
BEHIND = 1.5  # a trial stops if its metric is this many times that of the best earlier trial at the same step
TRIAL_POINTS = 4  # points on a trial's curve: few, as an evaluation of a convnet costs 10 to 20 steps
LOST = 20.0  # a run ends when its loss is this many times the first one


def measure(task: Task, model: nn.Module, part: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the task's metric, averaged over ``part``."""
    model.eval()
    with torch.no_grad():
        batches = zip(*(t.split(500) for t in part), strict=True)
        total = sum(float(task.measure(model(x), y).sum()) for x, y in batches)
    model.train()
    return total / len(part[0])


def batches(task: Task, split: Split, seed: int) -> Iterator[tuple]:
    """Training batches without end; examples that do not fill a last batch of an epoch are left out."""
    shuffle = torch.Generator().manual_seed(1000 + seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < task.batch:
            order = torch.randperm(len(split.train[0]), generator=shuffle)
        batch, order = order[: task.batch], order[task.batch :]
        yield split.train[0][batch], split.train[1][batch]


def train(
    task: Task, peer: str, setting: dict, split: Split, seed: int, steps: int, judge: str, rival: list | None = None
) -> dict:
    """Train once and return the record of the run. The curve shows the metric on ``judge``, "test" or "held_out".

    A run stops after half of its steps if its metric is ``BEHIND`` times that of the curve ``rival`` at the same step.
    A point of the curve is (step, CPU seconds so far, mean training loss since the last point, metric).
    """
    torch.manual_seed(seed)
    model = task.model(seed)
    step = PEERS[peer].build(model, task.loss_type, **setting)
    part = getattr(split, judge)
    points = task.points if judge == "test" else TRIAL_POINTS
    curve, times, losses = [[0, 0.0, None, _finite(measure(task, model, part))]], [], []
    first, failure = None, None
    for i, (x, y) in zip(range(1, steps + 1), batches(task, split, seed), strict=False):
        start = time.process_time()
        try:
            loss = step(x, y, task.loss)
        except (RuntimeError, ValueError) as error:  # a peer's own failure, such as a singular factor
            failure = f"step {i}: {type(error).__name__}: {str(error)[:120]}"
            break
        times.append(time.process_time() - start)
        first = loss if first is None else first
        losses.append(loss)
        if not (math.isfinite(loss) and loss < LOST * first):
            failure = f"step {i}: loss {loss:.3g}"
            break
        if i % max(1, steps // points) == 0 or i == steps:
            mean = sum(losses) / len(losses)
            curve.append([i, round(sum(times), 4), _finite(mean), _finite(measure(task, model, part))])
            losses = []
            if rival and 2 * i >= steps and _behind(curve[-1], rival):
                failure = f"step {i}: stopped, {BEHIND} times worse than a trial before it"
                break
    return {
        "curve": curve,
        "ms_per_step": round(1e3 * statistics.median(times), 3) if times else None,
        "failure": failure,
    }


def _behind(point: list, rival: list) -> bool:
    best = next((metric for step, _, _, metric in rival if step == point[0]), None)
    return best is not None and (point[3] is None or point[3] > BEHIND * best)


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def last(run: dict) -> float:
    """Return the metric at the end; infinite for a run that failed."""
    value = run["curve"][-1][3]
    return math.inf if run["failure"] or value is None else value


class Store:
    """The finished runs in one file, a JSON line each, which are found by their settings."""

    KEY = ("task", "optimizer", "phase", "setting", "seed", "steps")

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [json.loads(line) for line in lines if line.strip()]

    def find(self, **key: object) -> dict | None:
        return next((run for run in self.runs if all(run[name] == key[name] for name in self.KEY)), None)

    def add(self, run: dict) -> None:
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")


@functools.cache
def versions() -> dict:
    info = co.build_info()
    return {key: info[key] for key in info if key != "library"} | {"threads": torch.get_num_threads()}


def run_once(
    store: Store,
    task: str,
    peer: str,
    phase: str,
    setting: dict,
    split: Split,
    seed: int,
    steps: int,
    rival: list | None = None,
) -> dict:
    """Return the stored run, or make and store a new one."""
    key = dict(task=task, optimizer=peer, phase=phase, setting=setting, seed=seed, steps=steps)
    if found := store.find(**key):
        return found
    judge = "test" if phase == "final" else "held_out"
    run = key | train((TASKS | VARIANTS)[task], peer, setting, split, seed, steps, judge, rival)
    run["package"] = f"{PEERS[peer].package} {PEERS[peer].version}"
    run["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run["machine"] = versions()
    store.add(run)
    print(f"{task} {peer} {phase} {setting} seed {seed}: {run['curve'][-1]} {run['failure'] or ''}", flush=True)
    return run


def compete(store: Store, task: str, peers: list[str], split: Split, seeds: int, steps: int | None = None) -> None:
    """Run trials of half the steps with seed 0, then the best setting with the seeds 1, 2, ...

    ``steps`` replaces the task's own number.
    """
    steps = steps or TASKS[task].steps
    for peer in peers:
        trials: list[dict] = []
        settings = list(PEERS[peer].trials)
        for setting in settings:
            trials.append(run_once(store, task, peer, "trial", setting, split, 0, steps // 2, best_curve(trials)))
            if PEERS[peer].damped and len(trials) == len(PEERS[peer].trials):
                rate = min(trials, key=last)["setting"]["lr"]
                settings += [{"lr": rate, "damping": damping} for damping in DAMPINGS]
        best = min(trials, key=last)
        if math.isinf(last(best)):
            print(f"{task} {peer}: every trial failed", flush=True)
            continue
        for seed in range(1, seeds + 1):
            run_once(store, task, peer, "final", best["setting"], split, seed, steps)


def best_curve(runs: list[dict]) -> list | None:
    """Return the curve of the best run; None if there is no run or all of them failed."""
    best = min(runs, key=last, default=None)
    return None if best is None or best["failure"] else best["curve"]
