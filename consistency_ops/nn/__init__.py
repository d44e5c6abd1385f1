"""Modules around the functional API."""

from consistency_ops.nn.batch_rms_norm import BatchRMSNorm
from consistency_ops.nn.modulus import Modulus

__all__ = ["BatchRMSNorm", "Modulus"]
