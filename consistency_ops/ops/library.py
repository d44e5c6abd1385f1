"""Loads the compiled library, which registers the operators (`_ops.py`), or says in one sentence what is missing.

`library` is the same file through ctypes: the functions of `consistency_ops/c_api.h`. `torch_abi` is the optional
accelerator against torch's unstable C++ interface (`csrc/torch_abi`), or None: then Python code does its work.
"""

import ctypes
import hashlib
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

TORCH_MIN = (2, 10)  # the stable ABI that the library targets; setup.py compiles for the same


def _load() -> ctypes.CDLL:
    upgrade = "run `pip install --upgrade 'torch>=2.10'`"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"consistency_ops needs torch >= 2.10, and torch is not installed: {upgrade}.") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MIN:
        raise ImportError(f"consistency_ops needs torch >= 2.10, and this is torch {torch.__version__}: {upgrade}.")
    try:
        path = _path(importlib.import_module("..._ops", __name__))
    except ModuleNotFoundError:
        raise ImportError(
            f"consistency_ops is not built in {Path(__file__).parents[1]}: run `make build` in its checkout, or "
            "`pip install .` there and start Python in another folder."
        ) from None
    except ImportError as error:
        raise ImportError(
            f"the compiled library of consistency_ops does not load with torch {torch.__version__} ({error}): build it "
            "again with `pip install --force-reinstall --no-deps .` in its checkout."
        ) from error
    library = ctypes.CDLL(path)
    if not _is_of(library):
        raise ImportError(
            f"the compiled library {path} was built from other sources than the files beside it (the list "
            "of its operators is another one): run `make build` in its checkout, or "
            "`pip install --force-reinstall --no-deps .` there."
        )
    return library


def _path(_ops: ModuleType) -> str:
    """The file that `_ops` has loaded: `_C`, or the library that has the name of its namespace."""
    root = __name__.rpartition(".ops.")[0]
    named = (f"{root}._C", f"{root}.{_ops.add_op_namespace_prefix('').removesuffix('::')}")
    return next(str(sys.modules[name].__file__) for name in named if name in sys.modules)


def _is_of(library: ctypes.CDLL) -> bool:
    """Whether the library was compiled with the list of operators that lies in csrc, which this package calls."""
    found = _sources("bindings/schemas.inc")
    if not found:  # somebody ships the package without its sources: there is nothing to compare with
        return True
    try:
        library.co_schemas.restype = ctypes.c_char_p
        compiled: bytes = library.co_schemas()
    except AttributeError:  # older than this check
        return False
    return compiled == found[0].read_bytes().strip().removeprefix(b'R"(').removesuffix(b')"')


def _sources(*patterns: str) -> list[Path]:
    """The files of csrc, in the package where it is installed and beside it in a checkout, sorted by pattern."""
    package = Path(__file__).resolve().parents[1]
    for csrc in (package / "csrc", package.parent / "csrc"):
        if found := [file for pattern in patterns for file in sorted(csrc.glob(pattern))]:
            return found
    return []


def is_torch_abi_off() -> bool:
    return os.environ.get("CONSISTENCY_OPS_TORCH_ABI") == "0"


def _load_torch_abi() -> ModuleType | None:
    """None unless it was built for exactly this torch (its name says which) and this Python (its suffix does).

    ``CONSISTENCY_OPS_TORCH_ABI=0`` leaves it out here, too, and not only when the library is built.
    """
    import torch

    if is_torch_abi_off():
        return None
    try:  # setup.py makes the same name
        module = importlib.import_module("..._torch_abi_" + re.sub(r"\W", "_", torch.__version__), __name__)
    except ImportError:
        return None
    return module if _has_digest(module) else None


def _has_digest(module: ModuleType) -> bool:
    """Whether an accelerator was compiled from the files of csrc/torch_abi, as setup.py sums them up.

    One of an earlier commit, which may lie there after `git pull` without `make build`, may have other functions.
    """
    files = _sources("torch_abi/*.cpp", "torch_abi/*.h")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return not files or getattr(module, "digest", None) == digest


library: ctypes.CDLL = _load()
torch_abi: ModuleType | None = _load_torch_abi()


def _after_fork() -> None:
    """In a forked child: without the threads that its parent used, torch's operations, ours among them, would hang."""
    import torch

    if library.co_torch_lost_its_threads():
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def build_config() -> dict[str, str]:
    """What the library was built with: ``torch``, ``compiler``, and with CUDA kernels ``cuda`` and ``cuda_archs``."""
    library.co_build_config.restype = ctypes.c_char_p
    lines: list[str] = library.co_build_config().decode().splitlines()
    return dict(line.split("=", 1) for line in lines)
