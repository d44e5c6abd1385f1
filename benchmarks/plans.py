"""What the launchers of the correction decide on the host, CPU and CUDA: for tests and for `benchmarks.model`.

``plans.cpp`` is compiled at the first use, into ``build/plans``, with the pybind11 that torch brings; no GPU and no
CUDA are needed.  Nothing of it is part of the package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "plans"
SOURCES = [
    Path(__file__).with_suffix(".cpp"),
    ROOT / "csrc" / "cpu" / "plan.cpp",
    ROOT / "csrc" / "cuda" / "precondition" / "plan.cpp",
]


def digest(*folders: str, more: bytes = b"") -> str:
    """Of all files in these folders of csrc: the name of what was compiled from them."""
    files = [path for name in folders for path in sorted((ROOT / "csrc" / name).rglob("*")) if path.is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + more).hexdigest()[:16]


@functools.cache
def module() -> ModuleType:
    """The compiled module: Shape, WhiteningPlan, cpu_plan, cuda_plan and cta; see the end of plans.cpp."""
    name = digest("include", "cpu", "cuda", more=SOURCES[0].read_bytes())
    target = BUILD / f"plans-{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", ROOT / "csrc" / "include", Path(torch.__file__).parent / "include"]
        command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
        command += [f"-I{folder}" for folder in (*includes, sysconfig.get_paths()["include"])]
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", partial, *SOURCES], check=True)
        os.replace(partial, target)
    spec = importlib.util.spec_from_file_location("plans", target)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
