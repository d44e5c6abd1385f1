"""Modules: the modulus, batch RMS normalisation, networks of arXiv 1708.00631, random orthogonal additive networks."""

from .batch_rms_norm import BatchRMSNorm
from .builders import deep_convnet, deep_mlp
from .contractive import clip_spectral_norms_, fold_rms_norm
from .modulus import Modulus
from .orthogonal import OrthogonalFilter
from .roa import JacobianBounds, ROAFeedForward, roa_jacobian_bounds
from .roa_rnn import ROARNN

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
