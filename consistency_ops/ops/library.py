"""Loads the compiled library, which registers `torch.ops.consistency_ops`, or says in one sentence what is missing.

`library` is the same file through ctypes: the functions of `consistency_ops/c_api.h`. `torch_abi` is the optional
accelerator against torch's unstable C++ interface (`csrc/torch_abi`), or None: then Python code does its work.
"""

import ctypes
import importlib
import re
from pathlib import Path
from types import ModuleType

TORCH_MIN = (2, 10)  # the stable ABI that the library targets; setup.py compiles for the same
# The operators of csrc/bindings/ops.cpp that the Python files call, and how many arguments each has.
OPERATORS = {
    "batch_rms_norm_denominator": 5,
    "batch_rms_norm_denominator_": 5,
    "batch_rms_norm_divide": 2,
    "capture_mark_": 4,
    "capture_rows_": 7,
    "foreach_apply_": 13,
    "foreach_correct_": 13,
    "foreach_covariance": 14,
    "foreach_inverse": 6,
    "foreach_precondition_": 19,
    "modulus": 1,
    "modulus_backward": 3,
    "modulus_complex_backward": 2,
    "modulus_forward": 2,
}


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
            f"consistency_ops is not built in {Path(__file__).parents[1]}: run `make build` in its checkout, or "
            "`pip install .` there and start Python in another folder."
        ) from None
    except ImportError as error:
        raise ImportError(
            f"the compiled library of consistency_ops does not load with torch {torch.__version__} ({error}): build it "
            "again with `pip install --force-reinstall --no-deps .` in its checkout."
        ) from error
    if other := next((name for name, arguments in OPERATORS.items() if _arguments(name) != arguments), None):
        raise ImportError(
            f"the compiled library {module.__file__} was built from other sources than the Python files beside it "
            f"(its operator {other} is missing or another one): run `make build` in its checkout, or "
            "`pip install --force-reinstall --no-deps .` there."
        )
    return ctypes.CDLL(module.__file__)


def _arguments(name: str) -> int | None:
    """How many arguments the library's operator of this name has; None: there is no such operator."""
    import torch

    operator = getattr(torch.ops.consistency_ops, name, None)
    return None if operator is None else len(operator.default._schema.arguments)


def _load_torch_abi() -> ModuleType | None:
    """None unless it was built for exactly this torch (its name says which) and this Python (its suffix does)."""
    import torch

    try:  # setup.py makes the same name
        return importlib.import_module("consistency_ops._torch_abi_" + re.sub(r"\W", "_", torch.__version__))
    except ImportError:
        return None


library: ctypes.CDLL = _load()
torch_abi: ModuleType | None = _load_torch_abi()


def build_config() -> dict[str, str]:
    """What the library was built with: ``torch``, ``compiler``, and with CUDA kernels ``cuda`` and ``cuda_archs``."""
    library.co_build_config.restype = ctypes.c_char_p
    lines: list[str] = library.co_build_config().decode().splitlines()
    return dict(line.split("=", 1) for line in lines)
