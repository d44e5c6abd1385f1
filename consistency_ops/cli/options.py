"""The options of ``python -m consistency_ops train`` and their defaults."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from . import data, models
from . import optimizers as methods
from .errors import UserError

DESCRIPTION = """\
Train one network with several optimizers side by side, from the same weights and on the same batches,
and report who won: report.json and report.png in --out. Learning rates are searched with the same
number of trials for every method.
"""
EXAMPLES = """\
examples:
  python -m consistency_ops train
      the deep MLP on scikit-learn's real handwritten digits; no network needed, a minute or two
  python -m consistency_ops train --data mnist --data-dir DIR --epochs 10
  python -m consistency_ops train --data fashion-mnist --download --model mlp --seeds 1..3
  python -m consistency_ops train --data cifar10 --data-dir DIR --model convnet --limit 10000 --epochs 5
  python -m consistency_ops train --optimizer sgd,sgd+pre,sgd2 --lr sgd=0.1,sgd+pre=0.1

Ctrl-C stops the run and still writes the report of what was done.
"""
DIGITS_BATCH, BATCH = 100, 500
MOST_SEEDS, SEED_END, MOST_THREADS = 1000, 2**32, 1024


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and complete the options; a mistake ends the program with status 2 and one sentence."""
    args = _parser().parse_args(argv)
    args.rates = _rates_by_name(args.lr, args.optimizer)
    args.batch_size = args.batch_size or (DIGITS_BATCH if args.data == "digits" else BATCH)
    args.trial_epochs = args.trial_epochs or max(1, args.epochs // 2)
    # Two threads make the millisecond steps of the digits slower, not faster, and far slower on a busy machine.
    args.threads = args.threads or (1 if args.data == "digits" else None)
    args.data_dir = args.data_dir or Path("data", args.data)
    return args


def config(args: argparse.Namespace) -> dict[str, object]:
    """Return the options as report.json keeps them, without those that this data set does not use."""
    plain: dict[str, object] = {
        k: v if isinstance(v, int | float | str | list | dict | None) else str(v) for k, v in vars(args).items()
    }
    del plain["lr"]  # "rates" has them by method
    if args.data == "digits":
        del plain["data_dir"]
    return plain


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=104)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m consistency_ops train",
        usage="python -m consistency_ops train [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    _add_data(p.add_argument_group("data"))
    _add_network(p.add_argument_group("network"))
    _add_training(p.add_argument_group("training"))
    _add_correction(p.add_argument_group("preconditioner (defaults: those of consistency_ops.Preconditioner)"))
    _add_machine(p.add_argument_group("machine and output"))
    return p


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", choices=data.NAMES, default="digits", help="data set (default: digits, from scikit-learn)")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the published files (default: data/NAME)")
    add("--download", action="store_true", help="fetch missing files into --data-dir and check their md5 sums")
    add("--limit", type=whole_number(1), metavar="N", help="use at most N training and N test images")
    add(
        "--inputs",
        choices=("standard", "raw"),
        default="standard",
        help="pixels minus their mean; standard also divides by one standard deviation, raw, as in the paper, "
        "does not (default: standard)",
    )


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", choices=models.MODELS, default="deep-mlp", help="3, 12 or 5 weight layers (default: deep-mlp)")
    add("--activation", choices=models.ACTIVATIONS, default="relu", help="activation function (default: relu)")
    add(
        "--normalization",
        choices=models.NORMALIZATIONS,
        default="rms",
        help="batch RMS normalisation before every weight layer but the first, or none (default: rms)",
    )
    add(
        "--init",
        type=init_scale,
        default=0.01,
        metavar="STD|he",
        help="standard deviation of the initial weights, or he: by fan-in, which helps plain optimizers most "
        "(default: 0.01, as in the paper)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--optimizer",
        type=_names,
        default=list(methods.DEFAULT),
        metavar="LIST",
        help=f"comma list of {', '.join(methods.NAMES)}; +pre is the same optimizer with the preconditioner attached "
        f"(default: {','.join(methods.DEFAULT)})",
    )
    add(
        "--lr",
        type=_rates,
        default={},
        metavar="RATE",
        help="learning rate without a search: one for all, or name=rate,name=rate; methods not named are searched",
    )
    add("--epochs", type=whole_number(1), default=20, metavar="N", help="number of epochs (default: 20)")
    add(
        "--trial-epochs",
        type=whole_number(1),
        metavar="N",
        help="length of a trial of the rate search (default: half of --epochs)",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        metavar="N",
        help=f"batch size (default: {DIGITS_BATCH} for digits, else {BATCH})",
    )
    add(
        "--seeds",
        type=_seeds,
        default=[1, 2, 3],
        metavar="LIST",
        help="1,2,5 or 1..5: initial weights and batch order of each repetition (default: 1..3)",
    )


def _add_correction(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--damping", type=positive_number, metavar="X", help="damping, relative to the mean square of a layer's inputs")
    add("--chunk", type=whole_number(1), metavar="N", help="largest number of units decorrelated together")
    add("--every", type=whole_number(1), metavar="N", help="reuse the inverse for N steps")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", type=device_name, default=torch.device("cpu"), metavar="DEV", help="cpu or cuda[:N] (default: cpu)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: 1 for digits, else torch's choice)")
    add(
        "--out", type=Path, default=Path("runs/train"), metavar="DIR", help="folder of the report (default: runs/train)"
    )


def _rates_by_name(rates: dict[str | None, float], names: list[str]) -> dict[str, float]:
    if None in rates:
        return dict.fromkeys(names, rates[None])
    by_name = {name: rate for name, rate in rates.items() if name is not None}
    for name in by_name:
        if name not in names:
            raise UserError(f"--lr: {name} is not among the methods of --optimizer ({', '.join(names)}).")
    return by_name


# ---- argument types; argparse turns their ArgumentTypeError into a sentence and exit status 2


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text!r}")
        return value

    return parse


def thread_count(text: str) -> int:
    value = whole_number(1)(text)
    if value > MOST_THREADS:  # torch would try to start them all
        raise argparse.ArgumentTypeError(f"must be at most {MOST_THREADS}, got {text!r}")
    return value


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def init_scale(text: str) -> float | str:
    return text if text == "he" else positive_number(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> dict[str | None, float]:
    """Parse one rate to ``{None: rate}``, and ``name=rate`` pairs to ``{name: rate}``."""
    if "=" not in text:
        return {None: positive_number(text)}
    rates: dict[str | None, float] = {}
    for pair in text.split(","):
        name, _, rate = pair.partition("=")
        rates[name.strip()] = positive_number(rate)
    return rates


def _seeds(text: str) -> list[int]:
    try:
        first, dots, last = text.partition("..")
        seeds = range(int(first), int(last) + 1) if dots else [int(seed) for seed in text.split(",")]
        seeds = list(seeds[: MOST_SEEDS + 1])
    except ValueError:
        seeds = []
    if not 0 < len(set(seeds)) == len(seeds) <= MOST_SEEDS or not 0 <= min(seeds) <= max(seeds) < SEED_END:
        raise argparse.ArgumentTypeError(
            f"must be different whole numbers, as 1,2,5 or 1..5, at most {MOST_SEEDS} and below 2^32, got {text!r}"
        )
    return seeds


def seed_number(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < SEED_END:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2^32), got {text!r}")
    return value


def device_name(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda[:N], got {text!r}")
    return device
