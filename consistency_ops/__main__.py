"""The command line: ``python -m consistency_ops [command]``; without a command, the report that a bug report needs."""

from __future__ import annotations

import importlib
import os
import sys

# command: (module with main(argv) -> exit status, one line for the help); imported only when asked for
COMMANDS = {
    "analyse": (".cli.analyse", "say what is wrong in a network, layer by layer, as a web page"),
    "train": (".cli.train", "train one network with several optimizers side by side on real data"),
    "verify": (
        ".cli.verify",
        "run every operator on a device and compare what it computes with float64",
    ),
}
ALIASES = {"analyze": "analyse"}


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: python -m consistency_ops [--version | command [options]]\n\n"
        "Without a command: print versions, build and devices, as a bug report needs them.\n\n"
        f"commands:\n{commands}\n\n"
        "python -m consistency_ops COMMAND --help tells more."
    )


def main(argv: list[str]) -> int:
    if not argv:
        from .environment import format_report

        print(format_report())
        return 0
    command, *rest = argv
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command == "--version":
        from .environment import __version__

        print(f"consistency_ops {__version__}")
        return 0
    command = ALIASES.get(command, command)
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(COMMANDS[command][0], __package__).main(rest)
    return status


if __name__ == "__main__":
    try:
        _status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _status = 1
    sys.exit(_status)
