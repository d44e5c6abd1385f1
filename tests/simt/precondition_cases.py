"""Problems for precondition_cuda in every layout, type and stage, and the float64 answer to each.

numpy only.  Every array has exactly the bytes that the kernel may touch, so that AddressSanitizer sees one more, and
begins on 256 bytes, as torch's arrays on a GPU do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import weakref

import numpy as np
import simt_library as simt

MAX_TRIES = 3
COUNTER_BYTES = 2048
EPS = {simt.FLOAT32: 2.0**-23, simt.BFLOAT16: 2.0**-7, simt.FLOAT16: 2.0**-10}


_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


def on_256_bytes(array: np.ndarray) -> np.ndarray:
    """Return a copy in memory of its own, which begins on 256 bytes and has no byte more than the array."""
    if array.nbytes == 0:
        return array.copy()
    address = ctypes.c_void_p()
    if _libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(256), ctypes.c_size_t(array.nbytes)) != 0:
        raise MemoryError
    memory = (ctypes.c_char * array.nbytes).from_address(address.value)
    weakref.finalize(memory, _libc.free, address.value)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@dataclasses.dataclass
class LayerCase:
    """One layer.  ``taps`` is the kernel of a convolution; ``layout`` is rows (n, units), columns (units, n), nchw or
    nhwc, the last two for images of 5 x 5."""

    units: int
    outputs: int
    rows: int = 40
    taps: tuple[int, ...] = ()
    layout: str = "rows"
    x_dtype: int = simt.FLOAT32
    g_dtype: int = simt.FLOAT32
    bias: bool = False
    group: int = 1
    permuted: bool = False
    row_count: int | None = None
    spoil: tuple[str, int, float] | None = None  # ("x", unit, value) or ("g", output, value)
    spoiled_unit: int = 0  # of G
    scale: float = 1.0
    layer: int = 0
    same_input: bool = False  # the rows and the division are those of the layer before

    def also(self, outputs: int, **change) -> LayerCase:
        """A layer with the same input."""
        return dataclasses.replace(self, outputs=outputs, same_input=True, **change)


@dataclasses.dataclass
class Case:
    """One call."""

    layers: list[LayerCase]
    chunk: int = 32
    damping: float = 0.5
    trace: bool = False
    max_rows: int = 10_000
    seed: int = 3
    step: int = 0
    device: str = "sm_90"
    stages: tuple[int, ...] = (7,)  # the launches; with more than one the matrices between them are kept
    rung: int = simt.AUTOMATIC
    ctas: int = 0
    tf32: bool = False
    packing: int = 0
    counters: int = -1
    roundings: int = 200  # of float32: the error that is allowed


class Problem:
    """The arrays of one layer."""

    def __init__(self, case: LayerCase, rng: np.random.Generator, before: Problem | None):
        self.case = case
        # Correlated units with a mean, as activations have, so that the condition is in the hundreds.
        values = rng.standard_normal((case.rows, case.units)) + 0.5 * rng.standard_normal((case.rows, 1)) + 0.3
        values *= case.scale
        grads = rng.standard_normal((case.outputs, math.prod(case.taps), case.units))
        bias = rng.standard_normal(case.outputs)
        if case.spoil is not None:
            what, index, value = case.spoil
            if what == "x":
                values[case.rows // 2, index] = value
            else:
                grads[index, 0, case.spoiled_unit] = value
        self.x_shape = {"rows": (case.rows, case.units), "columns": (case.units, case.rows)}.get(case.layout)
        stored = simt.encode(values, case.x_dtype)
        if case.layout == "columns":
            stored = stored.T
        elif case.layout == "nchw":
            stored = stored.reshape(-1, 25, case.units).transpose(0, 2, 1)
        self.x = on_256_bytes(stored)
        # (outputs, units, taps) as a convolution's weight lies in memory; with one tap that is (outputs, units)
        self.g = on_256_bytes(simt.encode(grads, case.g_dtype).transpose(0, 2, 1))
        self.bias = simt.encode(bias, case.g_dtype) if case.bias else None
        self.all_units = case.units + case.bias
        self.permutation = rng.permutation(self.all_units) if case.permuted else None
        self.row_count = None if case.row_count is None else np.array([case.row_count], np.int64)
        if case.same_input:
            self.x, self.permutation, self.row_count = before.x, before.permutation, before.row_count

    def values(self) -> np.ndarray:
        """Return X as (rows, units) in float64."""
        x = simt.decode(self.x, self.case.x_dtype).astype(np.float64)
        if self.case.layout == "columns":
            return x.T
        return x.transpose(0, 2, 1).reshape(-1, self.case.units) if self.case.layout == "nchw" else x

    def grads(self) -> np.ndarray:
        """Return G as (outputs, taps, all units) in float64."""
        g = simt.decode(self.g, self.case.g_dtype).astype(np.float64).transpose(0, 2, 1)
        if self.bias is None:
            return g
        bias = simt.decode(self.bias, self.case.g_dtype).astype(np.float64)
        return np.concatenate([g, np.broadcast_to(bias[:, None, None], (*g.shape[:2], 1))], axis=2)

    def describe(self, chunks: int) -> simt.Layer:
        """The struct; keeps the arrays it points to alive as attributes."""
        case = self.case
        taps = (1,) * (3 - len(case.taps)) + case.taps
        strides, at = [], 1
        for size in reversed(taps):
            strides.insert(0, at)
            at *= size
        layer = simt.Layer()
        layer.x = self.x.ctypes.data
        sizes, row_strides, unit_stride = {
            "rows": ((1, 1, 1, case.rows), (0, 0, 0, case.units), 1),
            "columns": ((1, 1, 1, case.rows), (0, 0, 0, 1), case.rows),
            "nchw": ((1, 1, case.rows // 25, 25), (0, 0, 25 * case.units, 1), 25),
            "nhwc": ((1, case.rows // 25, 5, 5), (0, 25 * case.units, 5 * case.units, case.units), 1),
        }[case.layout]
        layer.x_row_size = sizes
        layer.x_row_stride = row_strides
        layer.x_unit_stride = unit_stride
        layer.units = case.units
        layer.g = self.g.ctypes.data
        layer.outputs = case.outputs
        layer.g_output_stride = case.units * at
        layer.g_unit_stride = at
        layer.g_tap_size = taps
        layer.g_tap_stride = tuple(strides)
        layer.x_dtype, layer.g_dtype, layer.bias_dtype = case.x_dtype, case.g_dtype, case.g_dtype
        if self.bias is not None:
            layer.has_bias = True
            layer.bias_grad = self.bias.ctypes.data
            layer.bias_stride = 1
        if self.permutation is not None:
            layer.permutation = self.permutation.ctypes.data
        if self.row_count is not None:
            layer.row_count = self.row_count.ctypes.data
        layer.layer = case.layer
        layer.group = case.group
        if case.same_input:  # what must not be looked at would be noticed
            layer.same_input = True
            layer.x = layer.permutation = layer.row_count = None
            layer.x_row_size, layer.x_row_stride, layer.x_unit_stride = (0,) * 4, (1 << 40,) * 4, 1 << 40
            layer.x_dtype, layer.layer, layer.group = 1, 99, 0
        self.info = np.full(chunks, -9, np.int32)
        self.damping_used = np.full(chunks, np.nan, np.float32)
        layer.info = self.info.ctypes.data
        layer.damping_used = self.damping_used.ctypes.data
        return layer

    def keep_matrices(self, layer: simt.Layer, chunk: int) -> None:
        shape = (len(self.info), chunk, chunk)
        self.covariance, self.inverse = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        layer.covariance, layer.inverse = self.covariance.ctypes.data, self.inverse.ctypes.data


def num_chunks(units: int, chunk: int) -> int:
    return -(-units // chunk)


def bounds(units: int, chunk: int) -> list[int]:
    chunks = num_chunks(units, chunk)
    return [c * (units // chunks) + min(c, units % chunks) for c in range(chunks)] + [units]


def options_of(case: Case) -> simt.Options:
    return simt.Options(
        damping=case.damping,
        trace_scaling=case.trace,
        chunk=case.chunk,
        max_rows=case.max_rows,
        seed=case.seed,
        step=case.step,
    )


def problems_of(case: Case) -> list[Problem]:
    rng = np.random.default_rng(11)
    problems: list[Problem] = []
    for layer in case.layers:
        problems.append(Problem(layer, rng, problems[-1] if problems else None))
    return problems


def run(library: simt.Library, case: Case, workspace: np.ndarray | None = None) -> list[Problem]:
    """Corrects fresh copies of the case's arrays in one launch."""
    problems = problems_of(case)
    options = options_of(case)
    tuning = simt.Tuning(case.rung, case.ctas, case.tf32, case.packing, counters=case.counters)
    layers = [p.describe(num_chunks(p.all_units, case.chunk)) for p in problems]
    if len(case.stages) > 1:
        for problem, layer in zip(problems, layers, strict=True):
            problem.keep_matrices(layer, case.chunk)
    for stages in case.stages:
        options.stages = stages
        if workspace is None:
            workspace = on_256_bytes(np.full(library.workspace_bytes(layers, options, tuning), 0xFF, np.uint8))
            if case.counters < 0:
                workspace[:COUNTER_BYTES] = 0
        library.precondition(layers, options, case.device, workspace, tuning)
        left = 0 if case.counters < 0 else 0xFF
        assert (workspace[:COUNTER_BYTES] == left).all(), (
            "a launch leaves the counters zero, and alone if they are not its"
        )
    return problems


def is_positive_definite(matrix: np.ndarray) -> int:
    """Return 0, or the order of the first leading minor that is not positive definite."""
    for order in range(1, len(matrix) + 1):
        leading = matrix[:order, :order]
        if not np.isfinite(leading).all() or np.linalg.eigvalsh(leading)[0] <= 0:
            return order
    return 0


def solve(library: simt.Library, case: Case) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]]:
    """Per layer in float64: corrected (outputs, taps, units), bias, info, damping used."""
    return [_solve_layer(library, case, p) for p in problems_of(case)]


def _solve_layer(library, case, problem):
    layer = problem.case
    values, grads = problem.values(), problem.grads()
    rows = len(values) if problem.row_count is None else min(len(values), layer.row_count)
    values = values[library.sample_rows(rows, case.max_rows, case.seed, case.step, layer.layer)] if rows else values[:0]
    chunks = num_chunks(problem.all_units, case.chunk)
    if len(values) == 0:
        bias = grads[:, 0, -1] if layer.bias else None
        return grads[..., : layer.units], bias, np.zeros(chunks), np.full(chunks, case.damping)
    if layer.bias:
        values = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    order = problem.permutation
    if order is None:
        order = library.division(problem.all_units, case.chunk, layer.group, case.seed, case.step, layer.layer)
    with np.errstate(invalid="ignore", over="ignore"):
        covariance = values.T @ values / len(values)
    moments = np.diagonal(covariance)
    tau = moments[np.isfinite(moments)].mean() if case.trace and np.isfinite(moments).any() else 0.0
    if tau > 0:
        covariance = covariance / tau
    result, info, used = grads.copy(), [], []
    edges = bounds(problem.all_units, case.chunk)
    for begin, end in itertools.pairwise(edges):
        index = order[begin:end]
        block = covariance[np.ix_(index, index)]
        for tries in range(MAX_TRIES):
            damped = block + case.damping * 10.0**tries * np.eye(end - begin)
            minor = (
                0 if np.isfinite(damped).all() and np.linalg.eigvalsh(damped)[0] > 0 else is_positive_definite(damped)
            )
            if minor == 0:
                with np.errstate(invalid="ignore", over="ignore"):
                    corrected = grads[:, :, index] @ np.linalg.inv(damped)
                stored = simt.decode(simt.encode(corrected, layer.g_dtype), layer.g_dtype)
                keep = np.isfinite(stored).all(axis=2, keepdims=True)
                result[:, :, index] = np.where(keep, corrected, grads[:, :, index])
                break
        info.append(minor)
        used.append(case.damping * 10.0**tries)
    bias = result[:, :, -1].mean(axis=1) if layer.bias else None
    return result[..., : layer.units], bias, np.array(info), np.array(used)


def check(library: simt.Library, case: Case) -> list[Problem]:
    """One launch against float64.  Returns what it wrote."""
    problems = run(library, case)
    for problem, (want, want_bias, info, used) in zip(problems, solve(library, case), strict=True):
        g = problem.grads()[..., : problem.case.units]
        assert np.array_equal(problem.info, info), (problem.case, problem.info, info)
        np.testing.assert_allclose(problem.damping_used, used, rtol=1e-6)
        tolerance = 2.0**-9 if case.tf32 else case.roundings * EPS[simt.FLOAT32]
        if problem.case.g_dtype != simt.FLOAT32:
            tolerance += EPS[problem.case.g_dtype]
        assert relative_error(g, want) <= tolerance, (problem.case, relative_error(g, want))
        if want_bias is not None:
            got = simt.decode(problem.bias, problem.case.g_dtype)
            assert relative_error(got, want_bias) <= tolerance, (problem.case, relative_error(got, want_bias))
    return problems


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the relative error in the Frobenius norm over finite elements; infinite if the others differ."""
    same = np.isfinite(want)
    if not np.array_equal(same, np.isfinite(got)):
        return math.inf
    norm = np.linalg.norm(want[same])
    return float(np.linalg.norm(got[same] - want[same]) / norm) if norm > 0 else float(np.abs(got[same]).max(initial=0))


def written(problems: list[Problem]) -> list[bytes]:
    """Return every byte that the launches wrote."""
    names = ("g", "bias", "info", "damping_used", "covariance", "inverse")
    arrays = [getattr(problem, name, None) for problem in problems for name in names]
    return [array.tobytes() for array in arrays if array is not None]


L = LayerCase
F, B, H = simt.FLOAT32, simt.BFLOAT16, simt.FLOAT16

# Small enough for every schedule and every sanitizer.
SMALL = {
    "one chunk": Case([L(20, 9)]),
    "one unit": Case([L(1, 3)], chunk=1),
    "several layers": Case([L(70, 5, layer=0), L(10, 3, layer=1), L(33, 40, rows=70, layer=2)]),
    "bias": Case([L(40, 7, bias=True)]),
    "bias alone in its chunk": Case([L(1, 5, bias=True)], chunk=1),
    "groups": Case([L(70, 6, group=8)]),
    "permutation": Case([L(50, 6, bias=True, permuted=True)]),
    "row sample": Case([L(40, 6, rows=75)], max_rows=20),
    "row count": Case([L(40, 6, rows=75, row_count=31), L(8, 2, row_count=0, layer=1)]),
    "columns": Case([L(40, 6, layout="columns", rows=37)]),
    "nchw": Case([L(36, 5, rows=50, layout="nchw", taps=(3, 3), bias=True)]),
    "nhwc": Case([L(36, 5, rows=50, layout="nhwc", taps=(2, 2), x_dtype=B, g_dtype=B)]),
    "whole stages of taps": Case([L(36, 15, taps=(3, 3), bias=True)]),
    "bfloat16": Case([L(40, 9, x_dtype=B, g_dtype=B, bias=True)]),
    "float16": Case([L(40, 9, x_dtype=H, g_dtype=H, layout="columns")]),
    "mixed types": Case([L(40, 9, x_dtype=B), L(40, 9, x_dtype=F, g_dtype=H, layer=1)]),
    "trace": Case([L(70, 6, bias=True), L(20, 5, layer=1), L(40, 5, layer=2)], trace=True),
    "trace of zeros": Case([L(40, 4, scale=0.0)], trace=True),
    "three launches": Case([L(70, 6, bias=True, group=4), L(20, 5, layer=1)], stages=(1, 2, 4)),
    "two launches, trace": Case([L(70, 6), L(40, 4, spoil=("x", 3, math.nan), layer=1)], trace=True, stages=(3, 4)),
    "three launches, trace of one chunk": Case([L(30, 4)], trace=True, stages=(1, 2, 4)),
    "three launches, trace": Case([L(70, 6)], trace=True, stages=(1, 2, 4)),
    "one pass of TF32": Case([L(40, 6), L(36, 6, x_dtype=B, g_dtype=B, layer=1)], tf32=True),
    "inverse apart": Case([L(40, 6, bias=True)], stages=(3, 4)),
    "covariance apart": Case([L(40, 6, g_dtype=B)], stages=(1, 6)),
    "no outputs": Case([L(40, 0)]),
    "same input": Case([L(70, 9), L(70, 9).also(40), L(70, 9).also(5, taps=(3,)), L(33, 7, rows=60, layer=1)]),
    "same input, bias, trace": Case(
        [
            L(8, 3),
            (q := L(50, 6, bias=True, permuted=True, layer=2)),
            q.also(0),
            q.also(35, g_dtype=B),
            L(40, 4, layer=1),
        ],
        trace=True,
    ),
    "same input, no outputs of the first": Case([L(40, 0, row_count=30), L(40, 0, row_count=30).also(7)]),
    "same input, nothing to correct": Case([L(40, 0), L(40, 0).also(0)]),
    "same input, covariance apart": Case([(q := L(70, 6, bias=True)), q.also(9, taps=(2,))], stages=(1, 6)),
    "same input, inverse apart": Case([L(40, 6, g_dtype=B), L(40, 6, g_dtype=B).also(5)], stages=(3, 4)),
    "same input, NaN": Case([(q := L(70, 9, spoil=("x", 33, math.nan))), q.also(8, spoil=None)]),
    "NaN in X": Case([L(40, 4, spoil=("x", 33, math.nan))]),
    "infinity in X, trace": Case([L(40, 4, spoil=("x", 3, math.inf)), L(40, 3, layer=1)], trace=True),
    "NaN in G": Case([L(40, 4, spoil=("g", 2, math.nan))]),
    "NaN in G, bias": Case([L(20, 4, bias=True, taps=(3,), spoil=("g", 2, math.nan))]),
    # read for a position that has no unit, it would spoil the next row
    "NaN at the end of a row of G": Case([L(31, 4, spoil=("g", 1, math.nan), spoiled_unit=29)]),
    # G by a matrix near the identity, so that nothing but the product's own rounding is left
    "well conditioned": Case([L(40, 9)], damping=300.0, roundings=4),
    "overflow of float16": Case([L(24, 4, g_dtype=H, spoil=("g", 1, 60000.0))], damping=1e-3),
    # by a matrix near 2: in one unit alone, of those that one lane holds
    "overflow of one unit": Case(
        [L(24, 4, g_dtype=H, scale=0.03, spoil=("g", 1, 60000.0), spoiled_unit=6)], damping=0.5
    ),
}

# The tile counts, stages and partial sums of larger chunks, and of the devices with less shared memory.
LARGE = {
    "64": Case([L(64, 70, rows=530), L(50, 3, layer=1)], chunk=64),
    "96": Case([L(96, 20, rows=45)], chunk=96),
    # 150 rows of G: the first 128 end within the three taps of an output
    "bias of taps": Case([L(20, 50, taps=(3,), bias=True)]),
    "95": Case([L(95, 3, rows=45)], chunk=96),  # single units, whose stage of 32 rows is full
    "128": Case([L(128, 66, rows=520), L(31, 2, layer=1)], chunk=128),
    "128 bfloat16": Case([L(256, 66, rows=600, x_dtype=B, g_dtype=B, group=16)], chunk=128, trace=True),
    "128, X of 16 bits": Case([L(128, 9, rows=530, x_dtype=B), L(99, 9, x_dtype=H, layer=1)], chunk=128),
    "160": Case([L(160, 34, rows=40)], chunk=160),
    "160 of 16 bits": Case([L(150, 20, rows=40, x_dtype=H, g_dtype=H, bias=True)], chunk=160),
    "160, one pass of TF32": Case([L(160, 20, rows=40)], chunk=160, tf32=True),
    "160, overflow of float16": Case([L(150, 20, g_dtype=H, spoil=("g", 1, 60000.0))], chunk=160, damping=1e-3),
    # rows that begin on no multiple of four units
    "not aligned": Case([L(31, 5, rows=150), L(63, 5, rows=140, x_dtype=B, g_dtype=B, layer=1)], chunk=64),
    "256": Case([L(255, 34, rows=40, bias=True)], chunk=256),
    "256 on sm_80": Case([L(256, 17, rows=40)], chunk=256, device="sm_80"),
    "192 on sm_86": Case([L(192, 17, rows=40, taps=(3,))], chunk=192, device="sm_86"),
}

RUNGS = {  # of the ladder, with several CTAs a chunk although the cases are small
    "one_cta": dict(rung=simt.ONE_CTA),
    "cluster": dict(rung=simt.CLUSTER, ctas=4),
    "queue": dict(rung=simt.TASK_QUEUE, ctas=3),
    "packed": dict(rung=simt.TASK_QUEUE, ctas=3, packing=simt.ALWAYS),
}


# Permuted rows (permute.cuh): rows on 16 bytes and not, blocks of rows that fill the shared memory, matrices that can
# only be gathered beside others, and more layers than there are places for packed rows.
PERMUTED = {
    "aligned": Case([L(64, 40, rows=70), L(96, 33, x_dtype=B, g_dtype=H, layer=1)]),
    "aligned, bias": Case([L(64, 9, bias=True), L(72, 9, x_dtype=H, g_dtype=B, bias=True, layer=1)], trace=True),
    "not aligned": Case([L(67, 9, x_dtype=B, g_dtype=B, bias=True), L(66, 9, layer=1)]),
    "blocks": Case([L(644, 60, rows=60)], chunk=64),
    "X alone": Case([L(48, 5, layout="nhwc", taps=(3, 3), rows=50), L(40, 9, taps=(2,), layer=1)]),
    "G alone": Case([L(48, 5, rows=50, layout="nchw"), L(40, 9, layout="columns", rows=37, layer=1)]),
    "four layers": Case([L(40 + 8 * i, 12, rows=50, layer=i) for i in range(4)], trace=True),
    "given": Case([L(68, 7, bias=True, permuted=True), L(64, 7, permuted=True, group=8, layer=1)]),
    "row count": Case([L(40, 6, rows=75, row_count=31), L(40, 5, row_count=0, layer=1)], max_rows=20),
    "failed chunk": Case([L(72, 6, bias=True, spoil=("x", 33, math.nan)), L(64, 5, spoil=("g", 1, math.nan), layer=1)]),
    "launches": Case([L(72, 6, bias=True), L(64, 5, x_dtype=B, g_dtype=B, layer=1)], stages=(1, 2, 4)),
    "inverse apart": Case([L(72, 6, bias=True)], stages=(3, 4), trace=True),
    "same input": Case([(q := L(72, 20, bias=True)), q.also(33), q.also(7), L(64, 5, layer=1)]),
    "same input, another dtype": Case([(q := L(64, 20)), q.also(9, g_dtype=B)]),
    "16 chunks": Case([L(512, 24, rows=24)]),
    "16 chunks of bfloat16": Case([L(512, 24, rows=24, x_dtype=B, g_dtype=B)]),
}
PERMUTED = {f"permuted, {name}": case for name, case in PERMUTED.items()}


def named(name: str) -> Case:
    """A case of SMALL or LARGE; "trace@queue" is one on a rung, "trace" leaves the choice to the launcher.

    "96@sm_80" is a case on a device without clusters and without products of four warps."""
    case, _, how = name.partition("@")
    change = {"device": how} if how in simt.SHARED_BYTES else RUNGS.get(how, {})
    return dataclasses.replace({**SMALL, **LARGE, **PERMUTED}[case], **change)
