"""What the correction of a layer costs, beside the layer's own forward and backward pass: a count, and no clock.

Unit: one operation (half a multiply-add) of a layer's own matrix products. Own passes of n rows, d units, m outputs and
their taps take ``6 n d m`` of these, and move inputs, outputs, weight and their gradients. The correction of units in
chunks of c takes::

    capture          two passes over the rows that are kept, a third when they are read
    covariance       n d c                 the lower triangle
    factor, inverse  d c^2                 c^3 a chunk
    product          2 m d c               with taps as outputs; two passes over G

Rows that are at most a quarter of a chunk need r^2 d, r^3 a chunk and 4 m d r in place of the last three, with r rows
in whole panels of 16 (``csrc/cpu/few_rows.h``). Groups of a convolution whose matrices outlive the step are problems
of their own, and read lines of their own in a row of inputs. Constants turn bytes, slow operations and calls into
operations. They were fitted to 38 layers (``benchmarks/micro/bench_layer_cost.py``, one thread of an AMD EPYC with
AVX-512, where an operation is 6.2 ps); on other processors and on GPUs nothing was fitted, and they serve there because
every machine must decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..ops import MAX_CHUNK

OWN_BYTE = 12.0  # a byte of inputs, outputs or weights that a pass of the layer reads or writes
OWN_CALL = 5.8e6  # forward and backward of the smallest layer, on the host
NARROW_OPERATION = 25.0  # of a convolution whose groups have fewer than 16 units: no matrix product
_NARROW = 16
PRODUCT = 0.27  # an operation of our products
COVARIANCE = 0.26
FACTOR = 0.96
ROW_BYTE = 12.0  # a byte of input rows that is moved
GRADIENT_BYTE = 19.0  # the same of gradients and weights, whose units are gathered
CALL = 1.25e6  # what a corrected layer takes on the host: 7.5 us (bench_host)
STORED_CALL = 3e6  # the same where matrices outlive the step: 18 to 21 us
GROUP_CALL = 2.6e5  # a group of a convolution where matrices outlive the step: 1.6 us in a refresh, and in every step
_LINE = 64  # bytes that a row takes where a group's units do not lie beside those of the others
WHITENED_PASSES = 5.0  # passes over a weight whose displacement is mapped back: its copy, the mapping, the norms
_COSINE_PASSES = 5.0  # the same of gradients and weights whose kernels become coefficients and come back
_PANEL = 16


@dataclass(frozen=True)
class LayerSize:
    """The numbers that a count needs; of a layer on several ranks, those of one rank."""

    rows: int  # input rows in a step, those of all calls and micro-batches
    output_rows: int  # rows of outputs: fewer where a convolution has a stride
    width: int  # units of one group of a convolution
    units: int  # the same, the bias included
    groups: int
    taps: int  # of a kernel; experts in one weight, of which a row passes one
    held: int  # rows of the gradient matrix, taps times outputs of all groups, that are corrected here
    computed: int  # the same, as the layer computes with them
    every_tap: bool = True  # whether a row is multiplied by all taps
    itemsize: int = 4  # bytes of a number


@dataclass(frozen=True)
class Method:
    """The options that decide the arithmetic."""

    chunk: int | None
    max_rows: int
    every: int = 1
    averages: bool = False
    whitens: bool = False
    outputs: bool = False
    dct: bool = False


def own_cost(size: LayerSize) -> float:
    """Operations of forward and backward pass."""
    rows_of_weight = size.computed if size.every_tap else size.computed / size.taps
    operations = 6.0 * size.output_rows * size.width * rows_of_weight
    if size.groups > 1 and size.width < _NARROW:
        operations *= NARROW_OPERATION
    inputs, outputs = size.rows * size.width * size.groups, size.output_rows * size.computed / size.taps
    numbers = 3.0 * (inputs + outputs + size.width * size.computed)
    return operations + OWN_BYTE * size.itemsize * numbers + OWN_CALL


def correction_cost(size: LayerSize, method: Method, sharers: int = 1) -> float:
    """Operations of capture and correction in a step; of refreshes, which come every ``every``-th step, that part.

    Args:
        sharers: layers with the same input rows, which are captured and factored once.
    """
    chunks, chunk = _chunks(size.units, method.chunk)
    used = math.ceil(size.rows / math.ceil(size.rows / method.max_rows)) if size.rows else 0
    padded = math.ceil(used / _PANEL) * _PANEL
    moved = ROW_BYTE * size.itemsize * 3.0 * used * size.width * size.groups
    fused = not (method.whitens or method.averages) and method.every == 1
    if fused and size.taps in (1, 9) and 4 * padded <= chunk:
        refresh = moved + size.groups * (COVARIANCE * size.units * padded**2 + FACTOR * chunks * padded**3)
        return refresh / sharers + _product(size, 2.0 * padded) + CALL
    factor = size.groups * (COVARIANCE * used * size.units * chunk + FACTOR * chunks * chunk**3)
    matrices = size.groups * chunks * _kept(size, method) ** 2 * size.itemsize * ROW_BYTE
    refresh = moved + factor + (3.0 * matrices if method.averages else 0.0)
    each = _product(size, chunk) + (matrices if method.every > 1 else 0.0) + (CALL if fused else STORED_CALL)
    if size.groups > 1 and not fused:
        refresh += size.groups * (GROUP_CALL + ROW_BYTE * _LINE * used)
        each += size.groups * GROUP_CALL
    if method.whitens:  # each of the two products is with a triangle
        each += size.held * size.units * size.itemsize * GRADIENT_BYTE * WHITENED_PASSES
    if method.outputs:
        more, more_each = _output_side(size, method)
        refresh, each = refresh + more, each + more_each
    if method.dct and size.every_tap and size.taps > 1:
        numbers = float(size.held * size.units)
        each += PRODUCT * 4.0 * numbers * size.taps + GRADIENT_BYTE * size.itemsize * _COSINE_PASSES * numbers
    return refresh / sharers / method.every + each


def share(size: LayerSize, method: Method, sharers: int = 1) -> float:
    """Correction over forward and backward pass."""
    return correction_cost(size, method, sharers) / own_cost(size)


def _product(size: LayerSize, chunk: float) -> float:
    """G times the inverses: read, multiplied, written."""
    numbers = float(size.held * size.units)
    return PRODUCT * 2.0 * numbers * chunk + 2.0 * GRADIENT_BYTE * size.itemsize * numbers


def _output_side(size: LayerSize, method: Method) -> tuple[float, float]:
    """Of a refresh and of each step: the same with columns of the gradient as rows; both are copied."""
    outputs = max(size.held // size.taps, 1)
    columns = size.units * size.taps
    chunks, chunk = _chunks(outputs, method.chunk)
    factor = COVARIANCE * columns * outputs * chunk + FACTOR * chunks * chunk**3
    each = PRODUCT * 2.0 * columns * outputs * chunk + GRADIENT_BYTE * size.itemsize * 8.0 * columns * outputs
    return factor + 3.0 * chunks * chunk**2 * size.itemsize * ROW_BYTE, each


def _kept(size: LayerSize, method: Method) -> int:
    """Rows of a matrix that outlives the step: padded to the chunk of all layers of a launch, if kernels make it.

    Those of convolution groups are not padded (``Correction.chunk_of``).
    """
    chunk = method.chunk or size.units
    return chunk if chunk <= MAX_CHUNK and size.groups == 1 else min(chunk, size.units)


def _chunks(units: int, chunk: int | None) -> tuple[int, float]:
    """Number and mean size."""
    count = math.ceil(units / min(chunk or units, units))
    return count, units / count
