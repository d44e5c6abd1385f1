"""Loads the compiled library, which registers `torch.ops.consistency_ops`, or says in one sentence what is missing.

`library` is the same file through ctypes: the functions of `consistency_ops/c_api.h`.
"""

import ctypes
import importlib
from pathlib import Path

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
        module = importlib.import_module("consistency_ops._C")
    except ModuleNotFoundError:
        raise ImportError(
            f"consistency_ops is not built in {Path(__file__).parent}: run `make build` in its checkout, or "
            "`pip install .` there and start Python in another folder."
        ) from None
    except ImportError as error:
        raise ImportError(
            f"the compiled library of consistency_ops does not load with torch {torch.__version__} ({error}): build it "
            "again with `pip install --force-reinstall --no-deps .` in its checkout."
        ) from error
    return ctypes.CDLL(module.__file__)


library = _load()
