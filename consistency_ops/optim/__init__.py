"""Optimizers and rules of arXiv 1708.00631: SGD2, the selection of learning rates, noise, decorrelation of pixels."""

from .decorrelation import decorrelate_fft, decorrelate_im2col
from .learning_rate import select_learning_rate
from .noise import GradientNoise, ResidualNoise
from .sgd2 import SGD2

__all__ = ["SGD2", "GradientNoise", "ResidualNoise", "decorrelate_fft", "decorrelate_im2col", "select_learning_rate"]
