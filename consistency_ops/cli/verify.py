"""``python -m consistency_ops verify``: does every operator compute on this device what it should?"""

from __future__ import annotations

import argparse
import sys

from ..ops import set_backend, verify


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m consistency_ops verify",
        description="Run every operator on a device and compare what it computes with float64 on the CPU: some "
        "seconds. The exit status is 1 if one differs.",
    )
    parser.add_argument("--device", help="such as cpu, cuda:0 or mps; default: the accelerator, or else the CPU")
    parser.add_argument(
        "--backend",
        choices=("auto", "native", "torch"),
        help="what is verified: native: the library's kernels; torch: torch's own operations; auto: what a training "
        "would use",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command: 0 if nothing differs, 1 if something does, 2 after a sentence on standard error."""
    args = _parser().parse_args(argv)
    try:
        if args.backend:
            set_backend(args.backend)
        verification = verify(args.device)
    except RuntimeError as error:  # there is no such device
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(verification)
    return 0 if verification.ok else 1
