"""What every experiment shares: its name, the store of finished runs, and the figure.

An experiment is a module of this folder with

- ``TITLE``: one line; ``DATA``: the data set it reads, or None;
- ``SETTINGS``: run name -> keyword arguments, all JSON; ``DEFAULT``: names of those that run unless others are named,
  by default all; ``SIZE``: the sizes it runs at by default (``epochs``, ...); ``COMPARED``, where there is one: names
  of sizes that a figure compares, so that runs which differ in them are kept beside each other;
- ``run(settings, size, seed, data, tick) -> dict``: one run; ``tick(text)`` moves the progress bar by one epoch;
- ``plot(figure, results)``: draws into an empty matplotlib figure, ours beside what was published;
- ``lines(results)``: what came out, in sentences, for the console.

``results`` maps the run's name to its finished records, one a seed.  Every finished run is kept at once in
benchmarks/results/training/NAME.json with its settings, sizes, seed, command, processor, versions and date, and not
repeated unless its settings or sizes have changed; so an interrupted experiment goes on where it stopped.  Runs that
take long keep a :class:`Progress` after every epoch beside it, in the folder ``runs``, and go on from there.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

import consistency_ops as co
from benchmarks.micro.timing import command

RESULTS = Path(__file__).resolve().parents[1] / "results" / "training"

# Name on the command line: module.
EXPERIMENTS = {
    "small-mlp": "small_mlp",
    "convnet": "convnet",
    "deep-mlp": "deep_mlp",
    "init-tolerance": "init_tolerance",
    "deep-narrow": "deep_narrow",
    "narrow-search": "narrow_search",
    "contractive": "contractive",
    "gradient-energy": "gradient_energy",
    "glorot": "glorot",
    "shapeset": "shapeset",
    "modern": "modern",
    "conditioning": "conditioning",
    "roa-depth": "roa_depth",
    "roa-memory": "roa_memory",
    "roa-pixels": "roa_pixels",
    "pixelwise": "pixelwise",
    "noise": "noise",
}

Results = dict[str, list[dict[str, Any]]]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.training.{EXPERIMENTS[name]}")


class Store:
    """The finished runs of one experiment, in one JSON file that is never half written."""

    def __init__(self, path: Path, compared: Iterable[str] = ()) -> None:
        self.path, self.compared = path, tuple(compared)
        self.records: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def find(self, name: str, settings: dict, size: dict, seed: int) -> dict | None:
        wanted = json.loads(json.dumps({"run": name, "settings": settings, "size": size, "seed": seed}))
        return next((r for r in self.records if all(r[key] == wanted[key] for key in wanted)), None)

    def put(self, record: dict[str, Any]) -> None:
        """Add a record in the place of an older one of the same run and seed, and of the same ``compared`` sizes."""

        def key(r: dict[str, Any]) -> tuple:
            return r["run"], r["seed"], *(r["size"][name] for name in self.compared)

        self.records = [r for r in self.records if key(r) != key(record)] + [json.loads(json.dumps(record))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(r) for r in self.records)
        temporary.write_text(f'{{"runs": [\n{lines}\n]}}\n')
        os.replace(temporary, self.path)

    def results(self, order: Iterable[str]) -> Results:
        """Return the records by run, in the order of the experiment's settings, with ascending seeds."""
        found = {name: sorted((r for r in self.records if r["run"] == name), key=lambda r: r["seed"]) for name in order}
        return {name: records for name, records in found.items() if records}


class Progress:
    """One run that is not finished: what it needs to go on, in one file, with the time that it has taken so far."""

    def __init__(self, path: Path, **key: Any) -> None:
        self.path, self.key = path, json.loads(json.dumps(key))
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._seconds = self._cpu_seconds = 0.0

    def load(self) -> dict[str, Any] | None:
        """Return what was saved by a run of the same settings, sizes and seed, and restore torch's random numbers."""
        if not self.path.exists():
            return None
        saved = torch.load(self.path, weights_only=False)  # our own file
        if saved["key"] != self.key:
            return None
        self._seconds, self._cpu_seconds = saved["seconds"], saved["cpu_seconds"]
        torch.set_rng_state(saved["random"])
        state: dict[str, Any] = saved["state"]
        return state

    def save(self, **state: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({"key": self.key, "random": torch.get_rng_state(), "state": state, **self.times()}, temporary)
        os.replace(temporary, self.path)

    def times(self) -> dict[str, float]:
        """Return seconds, and seconds of processor time, of all parts of the run."""
        return {
            "seconds": round(self._seconds + time.perf_counter() - self._start, 2),
            "cpu_seconds": round(self._cpu_seconds + time.process_time() - self._cpu, 2),
        }

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def processor() -> str:
    """Return the name of the CPU, as far as the system tells it, and its number of cores."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def circumstances() -> dict[str, Any]:
    """Return what a figure depends on: command, processor, versions, date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {key: value for key, value in co.build_info().items() if key != "library"},
    }


def run(
    experiment: ModuleType, store: Store, names: list[str], seeds: list[int], size: dict, data, again: bool
) -> None:
    """Run what is missing; ``data`` is a function that loads it, called once and only where it is needed."""
    todo = [
        (name, seed)
        for seed in seeds
        for name in names
        if again or store.find(name, experiment.SETTINGS[name], size, seed) is None
    ]
    loaded = data() if todo else None
    for i, (name, seed) in enumerate(todo, 1):
        with tqdm(desc=f"[{i}/{len(todo)}] {name}, seed {seed}", total=size.get("epochs"), unit="epoch") as bar:
            key = {"run": name, "settings": experiment.SETTINGS[name], "size": size, "seed": seed}
            file = re.sub(r"[^a-z0-9.]+", "-", f"{store.path.stem} {name} {seed}".lower()) + ".pt"
            progress = Progress(store.path.parent / "runs" / file, **key)
            torch.manual_seed(seed)
            outcome = experiment.run(experiment.SETTINGS[name], size, seed, loaded, Ticker(bar, progress))
            store.put({**key, **outcome, **progress.times(), **circumstances()})
            progress.forget()


class Ticker:
    """Called with a text after every epoch; ``progress`` is for runs that can be interrupted between two of them."""

    def __init__(self, bar: tqdm, progress: Progress) -> None:
        self._bar, self.progress = bar, progress

    def __call__(self, text: str) -> None:
        self._bar.update()
        self._bar.set_postfix_str(text)


def draw(experiment: ModuleType, results: Results, path: Path) -> None:
    """Draw the figure of the finished runs as a PNG of 256 colours, which is smaller than 150 KB."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=getattr(experiment, "FIGSIZE", (9, 4)), layout="constrained")
    experiment.plot(figure, results)
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def mean(records: list[dict], key: str) -> list[float]:
    """Return a curve averaged over the seeds, as long as the shortest."""
    return [sum(values) / len(values) for values in zip(*(r[key] for r in records), strict=False)]


def spread(values: Iterable[float | None], form: str = "{:.2%}") -> str:
    """Format mean, least and largest of a figure over the seeds; None, which stands for Inf and NaN, is infinite."""
    values = [math.inf if value is None else value for value in values]
    text = form.format(sum(values) / len(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} to {form.format(max(values))})"
