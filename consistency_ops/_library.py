"""Loads the compiled library, which registers `torch.ops.consistency_ops`, or says in one sentence what is missing.

`library` is the same file through ctypes: the functions of `consistency_ops/c_api.h`.  `autograd` is the optional
extension with nodes of autograd in C++ (`csrc/autograd`), or None.
"""

import ctypes
import importlib
import re
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


def _load_autograd() -> ModuleType | None:
    """None unless it was built for exactly this torch (its name says which) and this Python (its suffix does)."""
    import torch

    try:  # setup.py makes the same name
        return importlib.import_module("consistency_ops._autograd_torch_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


library = _load()
autograd = _load_autograd()
