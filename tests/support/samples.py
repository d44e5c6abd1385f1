"""Sample generators that the tests share, and the float64 oracle that decides who is right.

The oracle is numpy and loops over chunks as arXiv 1708.00631 writes them; it shares with ``reference.py`` only
the random division, which test_division.py checks by itself.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from consistency_ops import reference

EPS32 = torch.finfo(torch.float32).eps
SECTOR_BYTES = 32

# Random cases of the functional op


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of ``precondition``; ``build`` makes its tensors."""

    index: int
    outputs: int
    units: int  # units of one convolution group, without the bias
    rows: int  # rows of a linear layer or a (rows, in) convolution; else N and the spatial sizes decide
    chunk: int
    damping: float
    scaling: str
    bias: bool
    group: int | None
    max_rows: int
    given_permutation: bool
    conv_groups: int
    kernel: tuple[int, ...]
    images: tuple[int, ...]  # (N, *spatial); empty: the input is (rows, in)
    grad_dtype: torch.dtype
    input_dtype: torch.dtype
    input_layout: str
    grad_layout: str
    seed: int
    step: int


UNITS = (1, 2, 3, 5, 7, 8, 13, 16, 31, 32, 33, 40, 63, 64, 65, 100, 127, 128, 129, 130, 200, 255, 256, 257, 300, 385)
CHUNKS = (1, 2, 5, 16, 31, 32, 33, 64, 96, 100, 127, 128, 128, 128, 200, 255, 256)
ROWS = (1, 2, 3, 5, 10, 33, 64, 100, 127, 128, 129, 300, 513, 1025)
OUTPUTS = (1, 2, 3, 7, 8, 10, 17, 33, 64, 100, 129)
DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
LAYOUTS = ("contiguous", "transposed", "every-other", "offset", "flipped", "expanded", "3-D")
CONV_LAYOUTS = ("contiguous", "channels-last", "every-other", "flipped", "expanded")
DTYPE_PAIRS = (  # (gradient, input)
    (torch.float32, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
)


def case(index: int) -> Case:
    """The ``index``-th case; the same on every machine."""
    rng = random.Random(index)
    linear = rng.random() < 0.6
    kernel, images, conv_groups = (), (), 1
    units, outputs = rng.choice(UNITS), rng.choice(OUTPUTS)
    if not linear:
        units, conv_groups = min(units, 130), rng.choice((1, 1, 2, 3))
        outputs = conv_groups * min(outputs, 17)
        kernel = rng.choice(((1,), (3,), (1, 1), (3, 3), (2, 3), (5, 5), (3, 1, 2)))
        images = (rng.choice((1, 2, 5)), *(rng.choice((1, 2, 4, 7)) for _ in kernel))
        if rng.random() < 0.25:
            images = ()
    chunk = rng.choice(CHUNKS)
    group = rng.choice((None, 1, 8))
    rows = rng.choice(ROWS)
    grad_dtype, input_dtype = rng.choice(DTYPE_PAIRS)
    channels_vectors = not linear and not images
    return Case(
        index=index,
        outputs=outputs,
        units=units,
        rows=rows,
        chunk=chunk,
        damping=rng.choice(DAMPINGS),
        scaling=rng.choice(("absolute", "trace")),
        bias=rng.random() < 0.5,
        group=None if group is None else min(group, chunk),
        max_rows=rng.choice((10_000, 10_000, 50, 7)),
        given_permutation=rng.random() < 0.25,
        conv_groups=conv_groups,
        kernel=kernel,
        images=images,
        grad_dtype=grad_dtype,
        input_dtype=input_dtype,
        input_layout=rng.choice(LAYOUTS[:-1] if channels_vectors else LAYOUTS if linear else CONV_LAYOUTS),
        grad_layout=rng.choice(
            ("contiguous", "transposed", "every-other") if linear else ("contiguous", "channels-last")
        ),
        seed=rng.choice((0, 1, 2**63 + 11)),
        step=rng.choice((0, 1, 2**40 + 3)),
    )


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` (its first rows repeated where the layout is "expanded") in another memory layout."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every-other":
        wide = torch.full([2 * size for size in tensor.shape], math.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "offset":
        wide = torch.full([size + 3 for size in tensor.shape], math.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(1, size + 1) for size in tensor.shape)]
        return view.copy_(tensor)
    if layout == "flipped":
        return tensor.flip(0)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "channels-last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if tensor.dim() in formats:
            return tensor.contiguous(memory_format=formats[tensor.dim()])
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "3-D":
        rows, units = tensor.shape
        first = next(f for f in (4, 3, 2, 1) if rows % f == 0)
        return tensor.reshape(rows // first, first, units).transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


def rows_like(rows: int, units: int, generator: torch.Generator) -> Tensor:
    """Rows of an activation, float64: correlated units, a mean, scales over a decade."""
    scale = torch.logspace(0, -1, units, dtype=torch.float64)
    mixing = torch.randn(units, min(units, 8), generator=generator, dtype=torch.float64) / 8
    noise = torch.randn(rows, units, generator=generator, dtype=torch.float64) * scale
    return noise + torch.randn(rows, mixing.shape[1], generator=generator, dtype=torch.float64) @ mixing.T + 0.2


def build(case: Case) -> tuple[Tensor, Tensor, dict]:
    """(grad, inputs, keyword arguments) of ``precondition`` for a case."""
    generator = torch.Generator().manual_seed(case.index)
    channels = case.units * case.conv_groups
    if case.images:
        count = math.prod(case.images)
        inputs = rows_like(count, channels, generator).reshape(*case.images, channels).movedim(-1, 1)
        inputs = lay_out(inputs.contiguous().to(case.input_dtype), case.input_layout)
    else:
        inputs = lay_out(rows_like(case.rows, channels, generator).to(case.input_dtype), case.input_layout)
    grad = torch.randn(case.outputs, case.units, *case.kernel, generator=generator, dtype=torch.float64)
    keywords = {
        "damping": case.damping,
        "scaling": case.scaling,
        "chunk": case.chunk,
        "group": case.group,
        "max_rows": case.max_rows,
        "seed": case.seed,
        "step": case.step,
    }
    if case.bias:
        bias_grad = torch.randn(2 * case.outputs, generator=generator, dtype=torch.float64).to(case.grad_dtype)
        keywords["bias_grad"] = bias_grad[::2]
    if case.given_permutation:
        keywords["permutation"] = torch.randperm(case.units + case.bias, generator=generator)
    return lay_out(grad.to(case.grad_dtype), case.grad_layout), inputs, keywords


def default_group(dtype: torch.dtype, chunk: int) -> int:
    """One 32-byte sector of the gradient's dtype, at most a chunk."""
    return min(SECTOR_BYTES // dtype.itemsize, chunk)


# The oracle


@dataclasses.dataclass
class Chunk:
    """One chunk of one convolution group, in float64: the problem ``corrected @ covariance = gradient``."""

    outputs: slice
    units: np.ndarray  # indices of the layer's units; the bias is the last
    rows: np.ndarray  # (n, B)
    gradient: np.ndarray  # (outputs, taps, B)
    tau: float
    damping: float

    def damped(self) -> np.ndarray:
        second_moment = self.rows.T @ self.rows / len(self.rows)
        return second_moment / self.tau + self.damping * np.eye(len(self.units))


def row_matrix(grad: Tensor, inputs: Tensor) -> np.ndarray:
    values = inputs.detach().to(torch.float64).numpy()
    if grad.dim() > 2 and inputs.dim() == grad.dim():
        values = np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


def chunks(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: str = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    layer: int = 0,
    bias_grad: Tensor | None = None,
) -> Iterator[Chunk]:
    """The chunks of a call in the order of ``info``."""
    rows = row_matrix(grad, inputs)
    rows = rows[reference.sample_rows(len(rows), max_rows, seed, step, layer).numpy()]
    matrix = grad.detach().to(torch.float64).numpy()
    matrix = matrix.reshape(*matrix.shape[:2], -1).swapaxes(1, 2)  # (outputs, taps, units)
    if bias_grad is not None:
        copies = bias_grad.detach().to(torch.float64).numpy()[:, None, None]
        matrix = np.concatenate([matrix, np.broadcast_to(copies, (*matrix.shape[:2], 1))], axis=2)
    units = matrix.shape[2]
    weight_units = grad.shape[1]
    conv_groups = rows.shape[1] // weight_units
    outputs = len(grad) // conv_groups
    if permutation is None:
        group = default_group(grad.dtype, chunk) if group is None else group
        order = reference.division(units, chunk, group, seed, step, layer).numpy()
    else:
        order = permutation.numpy()
    count = -(-units // chunk)
    for g in range(conv_groups):
        x = rows[:, g * weight_units : (g + 1) * weight_units]
        if bias_grad is not None:
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        tau = float(np.mean(x**2, axis=0).mean()) if scaling == "trace" else 1.0
        of_group = slice(g * outputs, (g + 1) * outputs)
        for index in np.array_split(order, count):
            yield Chunk(of_group, index, x[:, index], matrix[of_group][:, :, index], tau or 1.0, damping)


def solve_float64(chunk: Chunk) -> np.ndarray:
    flat = chunk.gradient.reshape(-1, len(chunk.units))
    return np.linalg.solve(chunk.damped(), flat.T).T.reshape(chunk.gradient.shape)


def solve_torch(chunk: Chunk, reverse: bool = False) -> np.ndarray:
    """torch's own float32 composition: mm, cholesky, cholesky_solve; the units in their order or reversed."""
    order = np.arange(len(chunk.units))[:: -1 if reverse else 1]
    rows = torch.from_numpy(np.ascontiguousarray(chunk.rows[:, order])).float()
    covariance = rows.T @ rows / len(rows) / chunk.tau + chunk.damping * torch.eye(rows.shape[1])
    flat = torch.from_numpy(chunk.gradient.reshape(-1, len(order))[:, order]).float()
    solution = torch.cholesky_solve(flat.T, torch.linalg.cholesky(covariance)).T
    return solution[:, order.copy()].reshape(chunk.gradient.shape).double().numpy()


def gather(chunk: Chunk, grad: Tensor, bias_grad: Tensor | None) -> np.ndarray:
    """The columns of a (corrected) gradient that belong to a chunk, (outputs, taps, B); bias copies are the average."""
    values = grad.detach().to(torch.float64).numpy()
    values = values.reshape(*values.shape[:2], -1).swapaxes(1, 2)[chunk.outputs]
    if bias_grad is not None:
        copies = bias_grad.detach().to(torch.float64).numpy()[chunk.outputs, None, None]
        values = np.concatenate([values, np.broadcast_to(copies, (*values.shape[:2], 1))], axis=2)
    return values[:, :, chunk.units]


def average_bias(chunk: Chunk, solution: np.ndarray, has_bias: bool, weight_units: int) -> np.ndarray:
    """Replace the copies of the bias entry, one per kernel tap, by their average."""
    solution = solution.copy()
    if has_bias:
        at = chunk.units == weight_units
        solution[:, :, at] = solution[:, :, at].mean(axis=1, keepdims=True)
    return solution


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Frobenius norm of the difference over that of ``want``; 0 / 0 is 0, NaN is infinite."""
    difference, size = np.linalg.norm(got - want), np.linalg.norm(want)
    if difference == 0.0:
        return 0.0
    return float(difference / size) if np.isfinite(difference) and size > 0 else math.inf


# One layer, and whether two tensors are the same to the last bit, NaN included


def layer(outputs=6, units=40, rows=50, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = rows_like(rows, units, generator).to(dtype)
    return torch.randn(outputs, units, generator=generator).to(dtype), inputs


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(bits(a), bits(b))
