"""Optimizers and rules of arXiv 1708.00631: SGD2 and the selection of learning rates."""

from .learning_rate import select_learning_rate
from .sgd2 import SGD2

__all__ = ["SGD2", "select_learning_rate"]
