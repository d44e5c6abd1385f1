"""Second-order training at first-order cost: the system of arXiv 1708.00631 as fused kernels for PyTorch."""

import sys as _sys

try:
    from .ops import library as _library  # first: it says in one sentence what is missing
except ImportError as _error:
    # `python -m consistency_ops` imports the package before __main__, and would show a traceback around the sentence.
    if _sys.argv[:1] == ["-m"] and _sys.orig_argv[-len(_sys.argv)].endswith("consistency_ops"):
        _sys.exit(f"error: {_error}")
    raise

# isort: split
from . import analysis, layers, linalg, nn, optim
from .engine.weight_capture import capture
from .environment import BuildInfo, __version__, build_info, cmake_prefix_path, include_dir
from .ops import (
    PreconditionResult,
    Verification,
    batch_rms_norm,
    chunked_covariance,
    foreach_precondition_,
    modulus,
    precondition,
    precondition_ex,
    set_backend,
    verify,
)
from .preconditioner import Preconditioner

__all__ = [
    "BuildInfo",
    "PreconditionResult",
    "Preconditioner",
    "Verification",
    "__version__",
    "analysis",
    "batch_rms_norm",
    "build_info",
    "capture",
    "chunked_covariance",
    "cmake_prefix_path",
    "foreach_precondition_",
    "include_dir",
    "layers",
    "linalg",
    "modulus",
    "nn",
    "optim",
    "precondition",
    "precondition_ex",
    "set_backend",
    "verify",
]
