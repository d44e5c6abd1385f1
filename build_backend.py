"""setuptools' PEP 517 backend, with torch as a build requirement only where none is installed.

pip and uv build in an empty environment.  The library uses torch's stable ABI, so the torch it is built with need not
be the torch it runs with, and any torch >= 2.10 of the environment that is being installed into will do: its headers
are used (setup.py, `torch_cpp_extension`) and nothing is downloaded.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    sys.exit("consistency_ops: Windows is not supported: install it in WSL 2 (the Windows Subsystem for Linux).")

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def search_path(python: str) -> list[str]:
    """What an interpreter has on sys.path when a user starts it: .pth files, the system below a virtual environment
    and `pip --user` count, the variables that pip sets for the build do not (-E).  Empty for another Python version,
    whose torch this one could not import, and for what is no interpreter.
    """
    ask = "import sys; print(sys.version_info[:2], *sys.path[1:], sep='\\n')"
    try:
        told = subprocess.run([python, "-E", "-c", ask], cwd="/", capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    version, *paths = told.stdout.splitlines()
    return paths if version == str(sys.version_info[:2]) else []


def environment_python(folder: Path) -> str:
    return str(folder / "bin" / "python")


def pythons_of_uv() -> Iterator[str]:
    """Interpreters of the environment that uv installs into.

    uv builds in an environment of its own and does not say for which other one.  Its arguments and variables do, where
    the system shows them (Linux).  A wrong guess costs nothing: another torch has the same stable headers.
    """
    process = Path(f"/proc/{os.getppid()}")
    try:
        arguments = (process / "cmdline").read_text().split("\0")
        variables = dict(line.split("=", 1) for line in (process / "environ").read_text().split("\0") if "=" in line)
        folder = (process / "cwd").resolve()
    except (OSError, ValueError):  # not Linux, or not ours to read
        return
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, mark, same = option.partition("=")
        if name in ("--python", "-p"):
            named = folder / (same if mark else value)
            yield environment_python(named) if named.is_dir() else str(named)
    project = "pip" not in arguments  # `uv sync`, `uv run` and `uv add` do not look at VIRTUAL_ENV
    active = [variables.get("UV_PROJECT_ENVIRONMENT") if project else variables.get("VIRTUAL_ENV")]
    yield from (environment_python(folder / place) for place in active if place)
    yield from (environment_python(parent / ".venv") for parent in (folder, *folder.parents))
    if not project:
        if "CONDA_PREFIX" in variables:
            yield environment_python(Path(variables["CONDA_PREFIX"]))
        yield environment_python(Path(sys.base_prefix))


def has_torch(paths: list[str]) -> bool:
    found = importlib.metadata.distributions(name="torch", path=paths)
    return any(tuple(map(int, d.version.split(".")[:2])) >= (2, 10) for d in found)


def torch_paths() -> list[str] | None:
    """What to append to sys.path so that torch >= 2.10 can be imported; None if there is none."""
    if named := os.getenv("CONSISTENCY_OPS_TORCH"):
        paths = search_path(named)
        if not has_torch(paths):
            sys.exit(
                f"consistency_ops: CONSISTENCY_OPS_TORCH must be a Python {sys.version_info[0]}.{sys.version_info[1]} "
                f"interpreter that imports torch >= 2.10, got {named!r}."
            )
        return paths
    if has_torch(sys.path):
        return []
    for python in (sys.executable, *(pythons_of_uv() if "UV" in os.environ else ())):
        if has_torch(paths := search_path(python)):
            return paths
    return None


def get_requires_for_build_wheel(config_settings=None):
    if not any(map(importlib.util.find_spec, ("wheel", "setuptools.command.bdist_wheel"))):
        sys.exit("consistency_ops: building needs wheel: run `pip install setuptools wheel ninja`, then install again.")
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    if torch_paths() is not None:
        return requires
    print(
        "consistency_ops: no torch >= 2.10 was found beside it, so one is downloaded to build with: "
        "CONSISTENCY_OPS_TORCH=/path/to/python names an interpreter that has one.",
        file=sys.stderr,
    )
    return [*requires, "torch>=2.10"]


get_requires_for_build_editable = get_requires_for_build_wheel
