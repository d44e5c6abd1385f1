"""Second-order training at first-order cost: the system of arXiv 1708.00631 as fused kernels for PyTorch."""

from consistency_ops import _library  # first: it says in one sentence what is missing
from consistency_ops._build import build_info, cmake_prefix_path, include_dir
from consistency_ops.ops import (
    chunked_covariance,
    foreach_precondition_,
    precondition,
    precondition_ex,
)

__version__ = "0.1.0"
