"""Fixed random orthogonal maps, most of them cheaper than a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..ops.checks import check_sizes, shown, type_name

FILTERS = ("permutation", "shift", "householder", "hadamard", "dense", "identity")
_FACTOR = 64  # largest Hadamard matrix that is multiplied as a matrix


class OrthogonalFilter(nn.Module):
    """Multiplies the last dimension by a fixed random orthogonal matrix O: (..., features) to the same shape.

    Args:
        features: size of the last dimension.
        kind: how O is made, and its cost per row of d = ``features`` elements:

            - "permutation": a random permutation; d elements moved, no arithmetic;
            - "shift": a rotation by one place, the cyclic permutation of the ResESN code; the same;
            - "householder": ``reflections`` random reflections I - 2 v v^T; 4 d multiplications each;
            - "hadamard": random signs, Hadamard matrices, a random permutation; about 2 d sqrt(d) multiplications, as
              few small matrix products, and a handful of passes over the row.  Sizes that are no power of two are
              cut into powers of two (100 = 64 + 32 + 4), so that O mixes within these blocks;
            - "dense": the Q factor of a matrix with uniform entries in [-1, 1]; d^2 multiplications;
            - "identity": no filter (a leaky residual connection).
        reflections: number of reflections of "householder", at least 1.
        generator: source of the random numbers; default: torch's own.

    O is kept in buffers, not parameters, and goes with ``state_dict``.  Permutations and signs are orthogonal in every
    dtype; the others up to rounding, which in bfloat16 is about 1 %.

    Source: Ceni 2022, arXiv 2210.01245 (random orthogonal, dense), and the released code of ResESN (shift, identity).
    """

    index: Tensor
    inverse: Tensor
    signs: Tensor
    sylvester: Tensor
    vectors: Tensor
    weight: Tensor

    def __init__(
        self,
        features: int,
        kind: str = "permutation",
        *,
        reflections: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("OrthogonalFilter", features=features, reflections=reflections)
        if kind not in FILTERS:
            raise ValueError(f"OrthogonalFilter: kind must be one of {', '.join(FILTERS)}, got {shown(kind)}")
        self.features: int = features
        self.kind: str = kind
        dtype = dtype or torch.get_default_dtype()
        if kind in ("permutation", "hadamard"):
            self._keep("index", torch.randperm(features, generator=generator), device)
        elif kind == "shift":
            self._keep("index", torch.arange(features).roll(1), device)
        if kind in ("permutation", "hadamard", "shift"):
            self._keep("inverse", self.index.cpu().argsort(), device)
        if kind == "hadamard":
            signs = torch.randint(2, (features,), generator=generator) * 2 - 1
            self._keep("signs", signs.to(dtype), device)
            size = min(_FACTOR, 1 << (features.bit_length() - 1))
            self.register_buffer("sylvester", _sylvester(size).to(device, dtype), persistent=False)
        elif kind == "householder":
            vectors = torch.randn(reflections, features, generator=generator, dtype=torch.float64)
            self._keep("vectors", (vectors / vectors.norm(dim=1, keepdim=True)).to(dtype), device)
        elif kind == "dense":
            entries = torch.rand(features, features, generator=generator, dtype=torch.float64) * 2 - 1
            self._keep("weight", torch.linalg.qr(entries).Q.to(dtype).contiguous(), device)

    def _keep(self, name: str, tensor: Tensor, device: torch.device | str | None) -> None:
        self.register_buffer(name, tensor.to(device))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"OrthogonalFilter: x must be a Tensor, got {type_name(x)}")
        if not x.dim() or x.shape[-1] != self.features:
            raise ValueError(f"OrthogonalFilter: x must be (..., {self.features}), got {tuple(x.shape)}")
        if self.kind in ("permutation", "shift"):
            return _gather(x, self.index, self.inverse)
        if self.kind == "householder":
            for v in self.vectors:
                x = x - (x @ v).unsqueeze(-1) * (2 * v)
            return x
        if self.kind == "hadamard":
            return _gather(_hadamard(x * self.signs, self.sylvester), self.index, self.inverse)
        return x @ self.weight.T if self.kind == "dense" else x

    def matrix(self) -> Tensor:
        """Return O, (features, features), in float64, from the buffers."""
        buffers = {k: v.double() if v.is_floating_point() else v for k, v in self.named_buffers()}
        device = next(iter(buffers.values())).device if buffers else None
        eye = torch.eye(self.features, dtype=torch.float64, device=device)
        columns: Tensor = torch.func.functional_call(self, buffers, (eye,))
        return columns.T

    def extra_repr(self) -> str:
        return f"{self.features}, {self.kind!r}"


class _Gather(Function):
    """x[..., index] for a permutation. Its derivative gathers with the inverse; autograd's own would scatter-add."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(-1, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
        _, ctx.index, ctx.inverse = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.inverse, ctx.index), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _gather(tangent, ctx.index, ctx.inverse)


_gather: Callable[[Tensor, Tensor, Tensor], Tensor] = _Gather.apply


def _hadamard(x: Tensor, sylvester: Tensor) -> Tensor:
    """Multiply blocks of powers of two, the largest first, by their orthonormal Hadamard matrices.

    The matrix of size f is the upper left corner of ``sylvester``, that of size a b a Kronecker product of two.
    """
    total, parts = x.shape[-1], []
    for block in torch.split(x, [1 << k for k in reversed(range(total.bit_length())) if total >> k & 1], -1):
        size, done = block.shape[-1], 1
        while done < size:
            factor = min(len(sylvester), size // done)
            rows = block.reshape(*x.shape[:-1], -1, factor) @ sylvester[:factor, :factor]
            block, done = rows.transpose(-1, -2).reshape(*x.shape[:-1], size), done * factor
        parts.append(block / math.sqrt(size))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _sylvester(size: int) -> Tensor:
    """Return the Hadamard matrix of Sylvester's construction, with entries +-1; ``size`` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
