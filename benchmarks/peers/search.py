"""The search for the best member of the family of whitened coordinates, one change at a time.

    python -m benchmarks.peers.search [TASK ...] [--bases NAME ...] [--changes NAME ...] [--rates F ...] [--seeds N]

Every run has the schedule of the whole trainings on fewer steps (``STEPS``) and the rate at which the product's own
default does best there (``RATES``), times each of ``--rates``. It is judged at the end and after the first tenth.
Every run is a JSON line in ``benchmarks/results/peers/full/search.jsonl``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import DATA
from benchmarks.micro.timing import command
from benchmarks.peers.family import build_family
from benchmarks.peers.full import FOLDER, FULL, train
from benchmarks.peers.optimizers import Step, corrected, plain, whitened
from benchmarks.peers.runs import Store, versions

STEPS = {"deep-mlp": 200, "autoencoder": 300, "char-gpt": 240, "fashion-convnet": 240, "cifar-convnet": 500}
RATES = {  # the middle of the rates at which base and whitened base do best
    ("deep-mlp", "adamw"): 0.017,
    ("deep-mlp", "muon"): 0.018,
    ("autoencoder", "adamw"): 0.01,
    ("autoencoder", "muon"): 0.017,
    ("char-gpt", "adamw"): 0.01,
    ("char-gpt", "muon"): 0.03,
    ("fashion-convnet", "adamw"): 0.01,
    ("fashion-convnet", "muon"): 0.01,
    ("cifar-convnet", "adamw"): 0.03,
    ("cifar-convnet", "muon"): 0.018,
}
OUTER: dict[str, object] = {"inner": 0.0, "root": "symmetric"}
BOTH: dict[str, object] = {"output": 0.5, "root": "symmetric"}
CHOLESKY_ON_BOTH: dict[str, object] = {
    "root": "cholesky",
    "output": 0.5,
    "output_root": "cholesky",
    "output_of": "gradients",
    "every": 10,
}
CHANGES: dict[str, dict[str, object]] = {
    "whitened": {},
    "outer half alone": OUTER,
    "outer half alone, damping 0.3": OUTER | {"damping": 0.3},
    "outer half alone, damping 1": OUTER | {"damping": 1.0},
    "outer half alone, every 10": OUTER | {"every": 10},
    "inner half alone": {"outer": 0.0, "root": "symmetric"},
    "symmetric root": {"root": "symmetric"},
    **{f"damping {value:g}": {"damping": value} for value in (0.003, 0.01, 0.03, 0.3, 1.0)},
    **{f"damping {value:g} of the largest": {"damping": value, "relative": "largest"} for value in (0.001, 0.01)},
    **{f"decay {value:g}": {"decay": value} for value in (0.0, 0.9, 0.98, 0.99)},
    "every 10": {"every": 10},
    "every 32": {"every": 32},
    "norm clipped": {"norm": "clip"},
    "norm free": {"norm": "free"},
    "norm free, damping 0.3": {"norm": "free", "damping": 0.3},
    "norm clipped, damping 0.3": {"norm": "clip", "damping": 0.3},
    "norm of white noise, damping 0.3": {"norm": "white", "damping": 0.3},
    "outputs of white noise, damping 0.3": {"norm": "outputs", "damping": 0.3},
    "norm free, damping 1": {"norm": "free", "damping": 1.0},
    "norm free, damping 0.3, every 10": {"norm": "free", "damping": 0.3, "every": 10},
    "norm free, damping 0.3, outer half alone": OUTER | {"norm": "free", "damping": 0.3},
    "norm free, damping 0.3, both outer halves": OUTER
    | {"norm": "free", "damping": 0.3, "output": 0.5, "output_inner": False},
    "chunk 64": {"chunk": 64},
    "whole layers": {"chunk": None},
    "bias left alone": {"bias": False},
    "powers 1/4": {"inner": 0.25, "outer": 0.25, "root": "symmetric"},
    "outer power 3/4, inner 1/4": {"inner": 0.25, "outer": 0.75, "root": "symmetric"},
    "outer power 1/4 alone": {"inner": 0.0, "outer": 0.25, "root": "symmetric"},
    "first layer left out": {"skip": ("1", "blocks.0.qkv")},
    "head left out": {"skip": ("head",)},
    "down projections left out": {"skip": ("*.down",)},
    "output side too": BOTH,
    "output side too, power 1/4": {"output": 0.25, "root": "symmetric"},
    **{
        f"output side too, damping {value:g}, every 10": BOTH | {"damping": value, "every": 10}
        for value in (0.1, 0.3, 1.0)
    },
    **{
        f"{text}, every 10": {"root": root, "output": 0.5, "output_root": left, "output_of": "gradients", "every": 10}
        for text, root, left in (
            ("output side of the gradients", "symmetric", "symmetric"),
            ("output side of the gradients, Cholesky inside", "cholesky", "symmetric"),
            ("output side of the gradients, Cholesky on both", "cholesky", "cholesky"),
        )
    },
    **{
        f"output side of the gradients, Cholesky on both, every 10, {text}": CHOLESKY_ON_BOTH | {"kernels": kernels}
        for text, kernels in (("dct", "dct"), ("eigenvectors of the taps", "eigen"), ("taps whitened", "cholesky"))
    },
    "damping 0.3, every 10": {"damping": 0.3, "every": 10},
    "damping 0.3, every 10, dct": {"damping": 0.3, "every": 10, "kernels": "dct"},
    "damping 0.3, every 10, taps whitened": {"damping": 0.3, "every": 10, "kernels": "cholesky"},
    "dct alone": {"inner": 0.0, "outer": 0.0, "root": "symmetric", "kernels": "dct"},
    "outer halves of both sides, every 10": OUTER | {"output": 0.5, "output_inner": False, "every": 10},
    "outer halves of both sides": OUTER | {"output": 0.5, "output_inner": False},
    "outer halves of both sides, output 1/4": OUTER | {"output": 0.25, "output_inner": False},
    "eigenbasis": {"root": "eigen"},
    "eigenbasis, damping 0.3": {"root": "eigen", "damping": 0.3},
    "eigenbasis, damping 1": {"root": "eigen", "damping": 1.0},
    "eigenbasis alone, no powers": {"root": "eigen", "inner": 0.0, "outer": 0.0},
    "eigenbasis, output side too": {"root": "eigen", "output": 0.5},
    "eigenbasis, output side too, damping 1": {"root": "eigen", "output": 0.5, "damping": 1.0},
    "betas 0.9, 0.99, alone": {"betas": (0.9, 0.99), "alone": True},
    "betas 0.9, 0.95, alone": {"betas": (0.9, 0.95), "alone": True},
    "betas 0.95, 0.99, alone": {"betas": (0.95, 0.99), "alone": True},
    "betas 0.9, 0.99, damping 0.3": {"betas": (0.9, 0.99), "damping": 0.3},
    "betas 0.9, 0.95, damping 0.3": {"betas": (0.9, 0.95), "damping": 0.3},
    "betas 0.95, 0.99, damping 0.3": {"betas": (0.95, 0.99), "damping": 0.3},
}


def of_the_package(**options: object) -> Callable[[str], Callable[..., Step]]:
    return lambda base: lambda model, loss_type, lr: whitened(base)(model, loss_type, lr, **options)


REFERENCES: dict[str, Callable[[str], Callable[..., Step]]] = {
    "base": plain,
    "corrected": corrected,
    "the package, outputs=True": of_the_package(outputs=True),
    "the package, outputs=True, every=10": of_the_package(outputs=True, every=10),
    "the package, outputs=True, dct=True, every=10": of_the_package(outputs=True, dct=True, every=10),
    "the package, outputs=True, every=10, decay=0.7": of_the_package(outputs=True, every=10, decay=0.7),
}
ON_BOTH_SIDES = {"outputs": True, "dct": True}  # with new factors in every step, as whole trainings have it
AROUND_PACKAGE: dict[str, dict[str, object]] = {  # what the package can: one argument changed
    "both sides": {},
    **{f"both sides, damping={value:g}": {"damping": value} for value in (0.003, 0.01, 0.03, 0.3, 1.0)},
    **{f"both sides, decay={value:g}": {"decay": value} for value in (0.8, 0.9, 0.98, 0.99)},
    **{f"both sides, every={value}": {"every": value} for value in (4, 10)},
    **{f"both sides, chunk={value}": {"chunk": value} for value in (32, 64, None)},
    "both sides, keep_norm=False": {"keep_norm": False},
    "both sides, bias=False": {"bias": False},
    "both sides, first layer skipped": {"skip": ["0", "1", "blocks.0.qkv"]},
    "both sides, head skipped": {"skip": ["head", "11", "15", "34"]},
    "both sides, contractions skipped": {"skip": ["*.down"]},
}
CHOLESKY_DCT = CHOLESKY_ON_BOTH | {"every": 1, "kernels": "dct"}  # the same in plain torch
AROUND_FAMILY: dict[str, dict[str, object]] = {
    "both sides, norm clipped": {"norm": "clip"},
    "both sides, mean apart": {"mean_apart": True},
    "both sides, momentum before": {"momentum": 0.9, "betas": (0.0, 0.999)},
    "both sides, momentum before, betas 0, 0.99": {"momentum": 0.9, "betas": (0.0, 0.99)},
    **{f"both sides, betas 0.9, {value:g}": {"betas": (0.9, value)} for value in (0.99, 0.95)},
    "both sides, betas 0.95, 0.99": {"betas": (0.95, 0.99)},
    "both sides, damping 1 to 0.01 from the first layer to the last": {"damping": 1.0, "last_damping": 0.01},
    "both sides, damping 0.01 to 1 from the first layer to the last": {"damping": 0.01, "last_damping": 1.0},
    "both sides, damping 0.003 of the largest": {"damping": 0.003, "relative": "largest"},
    "both sides, outer halves alone": OUTER | {"output_root": "symmetric", "output_inner": False},
    "both sides, symmetric roots": {"root": "symmetric", "output_root": "symmetric"},
    "both sides, powers 1/4": {
        "root": "symmetric",
        "inner": 0.25,
        "outer": 0.25,
        "output_root": "symmetric",
        "output": 0.25,
    },
    "both sides, powers 1/4 in front, 1/2 behind": {"root": "symmetric", "inner": 0.25, "output_root": "symmetric"},
    "both sides, eigenvectors": {"root": "eigen"},
    "both sides, eigenvectors, powers 1/4": {"root": "eigen", "inner": 0.25, "outer": 0.25, "output": 0.25},
}
AROUND = [*AROUND_PACKAGE, *AROUND_FAMILY]
AROUND_RATES = {"char-gpt": 0.03, "autoencoder": 0.03, "cifar-convnet": 0.03, "deep-mlp": 0.0095}  # of whole trainings


def builder(name: str, base: str) -> tuple[Callable[..., Step], dict[str, object]]:
    """Return what builds the steps of a change, and the settings that it has beside the rate."""
    if name in AROUND_PACKAGE:
        return whitened(base), ON_BOTH_SIDES | AROUND_PACKAGE[name]
    if name in REFERENCES:
        return REFERENCES[name](base), {}
    if name in AROUND_FAMILY:
        return build_family(base), CHOLESKY_DCT | AROUND_FAMILY[name]
    return build_family(base), CHANGES[name]


def main() -> None:
    names = [*REFERENCES, *CHANGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(STEPS), metavar="TASK", help=", ".join(STEPS))
    parser.add_argument("--bases", nargs="+", choices=("adamw", "muon"), default=["muon", "adamw"])
    parser.add_argument("--changes", nargs="+", choices=[*names, *AROUND], default=names, metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="factors of the rate")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this time")
    parser.add_argument("--data-dir", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=FOLDER / "search.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(options.out)
    deadline = time.time() + 60 * options.minutes
    for task in options.tasks:
        split = FULL[task].load(options.data_dir)
        for base in options.bases:
            for name in options.changes:
                for share in options.rates:
                    for seed in range(options.first_seed, options.first_seed + options.seeds):
                        if time.time() > deadline:
                            return
                        run(store, task, base, name, float(f"{RATES[task, base] * share:.2g}"), seed, split)


def run(store: Store, task: str, base: str, name: str, lr: float, seed: int, split) -> dict:
    """Return the stored run, or make and store a new one."""
    build, change = builder(name, base)
    setting = {"lr": lr, **change}
    steps = STEPS[task]
    key = dict(task=task, optimizer=base, phase=name, setting=setting, seed=seed, steps=steps)
    if found := store.find(**(key | {"setting": _plain(setting)})):
        return found
    record = train(task, FULL[task], build, setting, split, seed, steps, trial=False)
    made = (key | {"setting": _plain(setting)}) | record | {"batch": FULL[task].batch}
    made["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    made["machine"], made["command"] = versions(), command()
    store.add(made)
    print(
        f"{time.strftime('%H:%M:%S')} {task} {base} {name} {lr:g} seed {seed}: tenth {record['curve'][2:3]}, "
        f"end {record['curve'][-1]}, train {record.get('train_loss')} {record['failure'] or ''}",
        flush=True,
    )
    return made


def _plain(setting: dict) -> dict:
    """``setting`` as JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in setting.items()}


if __name__ == "__main__":
    main()
