"""``python -m consistency_ops train`` compares optimizers on one network and writes report.json and report.png."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..preconditioner import Preconditioner
from . import data, download, models, options, results
from .errors import UserError
from .optimizers import Method, choose_methods
from .training_loop import Contestant, Task

if TYPE_CHECKING:
    from .console import Console

_NEEDED = ("tqdm", "matplotlib")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 0 success, 2 a mistake of the user, 130 interrupted."""
    try:
        args = options.parse(argv)
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"train needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}")
        return _train(args, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory; choose a smaller --batch-size or --limit, or --device cpu.", file=sys.stderr)
    except KeyboardInterrupt:  # before there is anything to report
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    from .comparison import Comparison, Settings
    from .console import Console

    console = Console()
    correction = {k: v for k in ("damping", "chunk", "every") if (v := getattr(args, k)) is not None}
    methods = choose_methods(args.optimizer, correction)
    if args.threads:
        torch.set_num_threads(args.threads)
    _check_device(args.device)
    _make_folder(args.out)
    if args.download:
        download.download(args.data, args.data_dir, console.line)
    images = data.load(args.data, args.data_dir, limit=args.limit)
    if args.batch_size > len(images.train_x):
        raise UserError(
            f"--batch-size: must be at most {len(images.train_x)}, the training images, got {args.batch_size}."
        )
    scaling = data.scaling(images.train_x, args.inputs)

    def initial(seed: int) -> nn.Module:
        return models.build(
            args.model,
            images.shape,
            images.classes,
            activation=args.activation,
            normalization=args.normalization,
            init=args.init,
            seed=seed,
        ).to(args.device)

    network = initial(args.seeds[0])
    report = results.begin(options.config(args), argv, torch.get_num_threads(), args.device)
    report["data"] = {**images.describe(), "inputs": scaling.text}
    report["model"] = {"parameters": models.parameter_count(network), "layers": str(network).splitlines()}
    report["methods"] = {method.name: _describe(method, network) for method in methods}
    for line in results.heading(report):
        console.line(line)
    path = args.out / "report.json"
    settings = Settings(methods, args.seeds, args.epochs, args.trial_epochs, args.rates)
    task = Task.on(args.device, images, scaling, args.batch_size)
    comparison = Comparison(settings, task, initial, report, console, lambda: results.write(report, path))
    try:
        comparison.run()
        report["status"] = "finished"
    except KeyboardInterrupt:
        report["status"] = "interrupted"
        console.line("\ninterrupted; the report holds what was done")
    return _finish(report, path, console)


def _finish(report: dict[str, Any], path: Path, console: Console) -> int:
    from . import plot

    summary = report["summary"] = results.summarise(report)
    summary["verdict"] = results.verdict(report)
    results.write(report, path)
    if summary["methods"]:
        for line in [*results.table(summary), "", *summary["verdict"], ""]:
            console.line(line)
        plot.draw(report, path.with_suffix(".png"))
        console.line(str(path.with_suffix(".png")))
    console.line(str(path))
    return 0 if report["status"] == "finished" else 130


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror or error}); choose another --out.") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: cannot be written to; choose another --out.")


def _check_device(device: torch.device) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"--device: {device} cannot be used here ({first}); choose --device cpu.") from None


def _describe(method: Method, network: nn.Module) -> str:
    """Build the optimizer once for the report, so that a wrong option is told before an hour of training."""
    try:
        built = Contestant.start(method, method.rates[0], network)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{method.name}: {error}") from None
    if not isinstance(built.keep, Preconditioner):
        return method.text
    text = f"{method.text}: {built.keep!r}"
    built.keep.remove()  # it ends without having corrected anything, which would be a warning
    return text
