"""Ideas of arXiv 1708.00631 that did not earn their place in the experiments; they may go without notice.

Pixel-wise decorrelation of convolution gradients pays only for few channels with im2col, and never with the Fourier
transform. Residual noise changed no result. The benchmarks ``pixelwise`` and ``noise`` have the figures.
"""

from .decorrelation import decorrelate_fft, decorrelate_im2col
from .residual_noise import ResidualNoise

__all__ = ["ResidualNoise", "decorrelate_fft", "decorrelate_im2col"]
