"""The functional API: every operator as a Python function, its argument checks, and the compiled library behind it."""

from . import library
from .arguments import default_group
from .batch_rms_norm import batch_rms_norm
from .checks import MAX_CHUNK
from .correction import PreconditionResult, foreach_precondition_, precondition, precondition_ex
from .modulus import modulus
from .stages import chunked_covariance, foreach_apply_, foreach_correct_, foreach_covariance, foreach_inverse

__all__ = [
    "MAX_CHUNK",
    "PreconditionResult",
    "batch_rms_norm",
    "chunked_covariance",
    "foreach_apply_",
    "foreach_correct_",
    "foreach_covariance",
    "foreach_inverse",
    "foreach_precondition_",
    "modulus",
    "precondition",
    "precondition_ex",
]
