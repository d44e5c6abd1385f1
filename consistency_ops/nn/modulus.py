"""The modulus activation as a module."""

from torch import Tensor, nn

from ..ops.modulus import modulus


class Modulus(nn.Module):
    """``|x|`` of every element, real or complex; see :func:`consistency_ops.modulus`.  Shapes: any, unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return modulus(x)
