"""The functional API: every operator as a Python function, its argument checks, and the compiled library behind it."""

from . import library  # first: it registers the operators

# isort: split
from .backend import set_backend  # the second: what computes behind them

# isort: split
from .arguments import default_group
from .batch_rms_norm import batch_rms_norm
from .checks import MAX_CHUNK
from .correction import PreconditionResult, foreach_precondition_, precondition, precondition_ex
from .modulus import modulus
from .stages import chunked_covariance, foreach_apply_, foreach_correct_, foreach_covariance, foreach_inverse
from .verification import Verification, verify

__all__ = [
    "MAX_CHUNK",
    "PreconditionResult",
    "Verification",
    "batch_rms_norm",
    "chunked_covariance",
    "default_group",
    "foreach_apply_",
    "foreach_correct_",
    "foreach_covariance",
    "foreach_inverse",
    "foreach_precondition_",
    "modulus",
    "precondition",
    "precondition_ex",
    "set_backend",
    "verify",
]
