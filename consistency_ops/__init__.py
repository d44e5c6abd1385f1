"""Second-order training at first-order cost: the system of arXiv 1708.00631 as fused kernels for PyTorch."""

from .ops import library as _library  # first: it says in one sentence what is missing

# isort: split
from . import analysis, layers, nn, optim
from .environment import build_info, cmake_prefix_path, include_dir
from .ops import (
    batch_rms_norm,
    chunked_covariance,
    foreach_precondition_,
    modulus,
    precondition,
    precondition_ex,
)
from .preconditioner import Preconditioner

__version__ = "0.1.0"

__all__ = [
    "Preconditioner",
    "analysis",
    "batch_rms_norm",
    "build_info",
    "chunked_covariance",
    "cmake_prefix_path",
    "foreach_precondition_",
    "include_dir",
    "layers",
    "modulus",
    "nn",
    "optim",
    "precondition",
    "precondition_ex",
]
