"""The optimizer SGD2, the selection of learning rates and the gradient noise of arXiv 1708.00631."""

from .learning_rate import select_learning_rate
from .noise import GradientNoise
from .sgd2 import SGD2

__all__ = ["SGD2", "GradientNoise", "select_learning_rate"]
