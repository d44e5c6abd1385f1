"""``python -m consistency_ops analyse`` writes one HTML page that says what is wrong in a network, layer by layer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

from ..analysis.html_page import page_of_failure
from ..analysis.recorder import first_line
from . import data, models, options
from .errors import UserError
from .files import write_whole

DESCRIPTION = """\
Examine one network on one batch and write one self-contained HTML page: what is wrong, layer by layer, and
what would help. Nothing is trained; one forward and backward pass and some Jacobians are measured.
"""
EXAMPLES = r"""examples:
  python -m consistency_ops analyse
      the deep MLP of the paper on scikit-learn's handwritten digits
  python -m consistency_ops analyse --model deep-mlp --normalization none --init 0.01
      the same without its normalisations: watch the gradient vanish
  python -m consistency_ops analyse --import mypackage.models:resnet18 --input-shape 3,32,32 --checkpoint last.pt
  python -m consistency_ops analyse --import mypackage.gpt:small --tokens 50257,128 --samples 8
  python -m consistency_ops analyse --import mypackage:t5 --input input_ids=tokens:32128,64 \
      --input labels=tokens:32128,16
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 0 success, 2 a mistake of the user, 130 interrupted."""
    try:
        args = _parser().parse_args(argv)
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("analyse needs matplotlib; install it with: pip install matplotlib")
        return _analyse(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory; choose fewer --samples, or --device cpu.", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2


def _analyse(args: argparse.Namespace) -> int:
    from ..analysis import analyse
    from .inputs import affordable
    from .subject import load

    _check_writable(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    begin = time.monotonic()

    def progress(sentence: str) -> None:
        print(f"{time.monotonic() - begin:5.1f} s  {sentence}", file=sys.stderr, flush=True)

    progress("loading the network")
    subject = load(args)
    title = args.import_ or args.model
    samples = subject.samples
    fit = affordable(subject.model, subject.inputs, subject.keywords, samples, args.seconds)
    if fit < samples:
        subject.keep(fit)
        limit = f"{fit} of {samples}, as many as fit into {args.seconds:g} s (--seconds)"
        subject.about["samples"] = limit
    try:
        result = analyse(
            subject.model,
            *subject.inputs,
            loss=subject.loss,
            layers=args.layers,
            damping=args.damping,
            chunk=args.chunk,
            keywords=subject.keywords,
            synthetic=subject.random,
            seconds=args.seconds,
            progress=progress,
        )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the network raises
        if not subject.of_user:
            raise UserError(f"the network cannot be examined on these inputs ({first_line(error)}).") from error
        progress("the network does not run")
        _write(args.out, page_of_failure(subject.model, title, subject.about, error))
        print(f"{title}: the network does not run on these inputs: {first_line(error)}\n{args.out}")
        return 0
    progress("the page")
    page = result.to_html(title, subject.about)
    _write(args.out, page)
    print(f"{title}: {result.parameters:,} parameters, {len(result.energy.layers)} layers with weights, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    for finding in result.findings:
        print(f"\n{finding.title} (severity {finding.severity} of 3)\n  {finding.measured}\n  {finding.advice}")
    if not result.findings:
        print("\nNo threshold was crossed.")
    for part, reason in result.failed.items():
        print(f"\nNot measured, {part}: {reason}.")
    if args.json is not None:
        _write(args.json, json.dumps(result.to_dict(), allow_nan=False) + "\n")
        print(f"\n{args.json}", end="")
    print(f"\n{args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m consistency_ops analyse",
        usage="python -m consistency_ops analyse [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=104),
        allow_abbrev=False,
    )
    _add_network(p.add_argument_group("network"))
    _add_inputs(p.add_argument_group("inputs"))
    _add_output(p.add_argument_group("examination and output"))
    return p


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", choices=models.MODELS, default="deep-mlp", help="a network of the train command (default: deep-mlp)")
    add(
        "--activation",
        choices=models.ACTIVATIONS,
        default="relu",
        help="activation function of --model (default: relu)",
    )
    add("--normalization", choices=models.NORMALIZATIONS, default="rms", help="normalisation of --model (default: rms)")
    add(
        "--init",
        type=options.init_scale,
        default=0.01,
        metavar="STD|he",
        help="initial weights of --model (default: 0.01)",
    )
    add(
        "--import",
        dest="import_",
        metavar="MODULE:NAME",
        help="your own network instead: a callable without arguments that returns the module, or (module, inputs), or "
        "(module, inputs, targets), with a tensor, a tuple of arguments or a dictionary of arguments as inputs; looked "
        "for in the current folder, too",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="state_dict to load; only tensors are read from the file")
    add("--mode", choices=("train", "eval"), default="train", help="mode of the network (default: train)")


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--samples", type=options.whole_number(2), default=256, metavar="N", help="size of the batch (default: 256)")
    add(
        "--data", choices=data.NAMES, default="digits", help="data set for --model (default: digits, from scikit-learn)"
    )
    add("--data-dir", type=Path, metavar="DIR", help="folder with the published files (default: data/NAME)")
    add("--input-shape", type=_sizes, metavar="C,H,W", help="for --import: standard normal inputs of this shape")
    add("--tokens", type=_pair, metavar="V,T", help="for --import: T random tokens of a vocabulary of V")
    add(
        "--input",
        type=_named,
        action="append",
        metavar="NAME=SIZES",
        help="for --import, once for every argument by name: NAME=3,32,32 for standard normal numbers, "
        "NAME=tokens:V,T for T random tokens of a vocabulary of V",
    )
    add(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="for --import: a tensor, a tuple or a dictionary of arguments, or (inputs, targets), from torch.save",
    )
    add(
        "--loss",
        choices=("cross-entropy", "mse"),
        help="for --import (default: the network's own loss if it returns one, else cross-entropy over the last "
        "dimension, or dimension 1 of images); without targets they are random",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--layers", type=lambda text: text.split(","), metavar="LIST", help="name patterns (default: all weight layers)"
    )
    add(
        "--damping",
        type=options.positive_number,
        default=0.1,
        metavar="X",
        help="damping of the preconditioner that is tried (default: 0.1)",
    )
    add(
        "--chunk",
        type=options.whole_number(1),
        default=128,
        metavar="N",
        help="chunk of the preconditioner that is tried (default: 128)",
    )
    add(
        "--seed",
        type=options.seed_number,
        default=0,
        metavar="N",
        help="seed of weights, random inputs and the choice of images (default: 0)",
    )
    add(
        "--device",
        type=options.device_name,
        default=torch.device("cpu"),
        metavar="DEV",
        help="cpu or cuda[:N] (default: cpu)",
    )
    add(
        "--seconds",
        type=options.positive_number,
        default=15.0,
        metavar="S",
        help="about how long to measure: so many samples are taken as fit, and what is left out is named (default: 15)",
    )
    add("--threads", type=options.thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--out",
        type=Path,
        default=Path("runs/analyse.html"),
        metavar="FILE",
        help="the page (default: runs/analyse.html)",
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers to this file, too")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be sizes like 3,32,32, got {text!r}")
    return sizes


def _named(text: str) -> tuple[str, str, list[int]]:
    name, equals, sizes = text.partition("=")
    tokens = sizes.startswith("tokens:")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=SIZES or NAME=tokens:VOCABULARY,LENGTH, got {text!r}")
    return (name, "tokens", _pair(sizes.removeprefix("tokens:"))) if tokens else (name, "normal", _sizes(sizes))


def _pair(text: str) -> list[int]:
    sizes = _sizes(text)
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"must be VOCABULARY,LENGTH, got {text!r}")
    return sizes


def _check_writable(path: Path) -> None:
    """Make the folder of ``path``, and refuse a path that cannot be written before any work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror or error}); choose another --out.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written to; choose another --out.")


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), cure="; choose another file")
