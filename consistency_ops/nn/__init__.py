"""Modules around the functional API, and the networks of the method and its neighbours."""

from consistency_ops.nn.batch_rms_norm import BatchRMSNorm
from consistency_ops.nn.builders import deep_convnet, deep_mlp
from consistency_ops.nn.contractive import clip_spectral_norms_, fold_rms_norm
from consistency_ops.nn.modulus import Modulus
from consistency_ops.nn.orthogonal import OrthogonalFilter
from consistency_ops.nn.roa import ROARNN, JacobianBounds, ROAFeedForward, roa_jacobian_bounds

__all__ = [
    "ROARNN",
    "BatchRMSNorm",
    "JacobianBounds",
    "Modulus",
    "OrthogonalFilter",
    "ROAFeedForward",
    "clip_spectral_norms_",
    "deep_convnet",
    "deep_mlp",
    "fold_rms_norm",
    "roa_jacobian_bounds",
]
