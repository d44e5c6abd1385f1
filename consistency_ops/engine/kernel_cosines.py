"""``mode="whiten", dct=True``: the optimizer works on the cosine coefficients of convolution kernels.

Neighbouring pixels are correlated, and the second moment of the input channels (``whitening.py``) does not see it: all
taps of a kernel have the same. The moment of the taps is nearly that of a stationary signal, whose eigenvectors the
basis vectors of the discrete cosine transform approach (Ahmed, Natarajan and Rao, "Discrete cosine transform", 1974).
So each kernel of a gradient ``G`` is given to the optimizer as its coefficients ``G C^T``, with ``C`` orthogonal, and
its displacement ``D`` is mapped back to ``D C``. An optimizer that scales single numbers, as Adam does, then scales
spatial frequencies. One that does not depend on the basis, as SGD or Muon on flattened kernels, makes the same step as
without. There is no state, and ranks that hold different rows or units need nothing of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer_step import LayerStep
from .output_side import Matrix


@dataclass(eq=False)
class KernelCosines:
    """The convolutions of one launch whose kernels the optimizer sees as coefficients, until it has made its step."""

    places: list[int]  # of its layers among those of the launch
    bases: list[Tensor]  # C of every layer, (taps, taps)
    moved: list[Tensor]  # of every layer, whether it has a gradient; without one its step stays as it is

    def map_back_(self, now: list[Matrix], before: list[Matrix], *, keep_norm: bool) -> None:
        """Replace every displacement ``D`` of a weight, ``now - before``, by ``D C``; its norm stays in any case."""
        for place, basis, moved in zip(self.places, self.bases, self.moved, strict=True):
            weight, old = now[place][0], before[place][0]
            values = weight.to(basis.dtype)
            weight.copy_(torch.where(moved, old + _of_taps(values - old, basis), values))

    def multiply_(self, matrices: list[Matrix]) -> None:
        """Replace every weight ``W`` by its coefficients ``W C^T``."""
        for place, basis in zip(self.places, self.bases, strict=True):
            weight = matrices[place][0]
            weight.copy_(_of_taps(weight.to(basis.dtype), basis.T))


Bases = dict[tuple[torch.Size, torch.dtype, torch.device], Tensor]


def to_cosines(steps: list[LayerStep], has_gradient: Tensor, known: Bases) -> list[KernelCosines]:
    """Replace the gradients of convolutions of more than one tap by coefficients, in place.

    Args:
        has_gradient: int32, one entry a layer.
        known: bases of earlier steps; new ones are added.
    """
    places = [i for i, step in enumerate(steps) if step.grad.numel() and _has_taps(step)]
    if not places:
        return []
    flags = (has_gradient > 0).unbind()
    bases = []
    for step in (steps[i] for i in places):
        key = step.grad.shape[2:], step.compute_dtype, step.grad.device
        if key not in known:
            known[key] = cosines(*key)
        bases.append(known[key])
    side = KernelCosines(places, bases, [flags[i] for i in places])
    side.multiply_([(step.grad, None) for step in steps])
    return [side]


def cosines(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II of a kernel of this shape: rows are basis vectors, over the flattened kernel."""
    basis = torch.ones(1, 1, dtype=torch.float64, device=device)
    for size in shape:
        count = torch.arange(size, dtype=torch.float64, device=device)
        one = torch.cos(math.pi / size * (count + 0.5) * count.view(-1, 1)) * math.sqrt(2 / size)
        one[0] = math.sqrt(1 / size)
        basis = torch.kron(basis, one)
    return basis.to(dtype)


def _has_taps(step: LayerStep) -> bool:
    module = step.layer.module()
    return module is not None and step.layer.kind.num_taps(module) > 1


def _of_taps(kernels: Tensor, basis: Tensor) -> Tensor:
    """``kernels``, (outputs, units, *kernel), times ``basis`` from the right, over the flattened kernel."""
    return (kernels.flatten(2) @ basis).view_as(kernels)
