"""Problems for whiten_cuda and unwhiten_cuda, and the float64 answer to each; numpy only, as precondition_cases.py.

A case is three launches: covariance, average, factor and G L^-T; the same G by the factors that the first one has kept;
and back, with a weight that has moved.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import precondition_cases as cases
import simt_library as simt

FACTOR, APPLY, ALL = 2, 4, 7


@dataclasses.dataclass
class WhiteningCase:
    """One call each way.

    ``weight``: that of the average before, of other rows; 0: there is none yet.  ``spoil_average``: (layer, unit,
    value) of its diagonal.  ``still``: layers whose gradient is zero; ``bias_only``: but for that of the bias.
    ``parts``: CTAs that share a chunk.
    """

    layers: list[cases.LayerCase]
    decay: float = 0.9
    weight: float = 0.4
    keep_norm: bool = True
    finish: bool = True
    chunk: int = 32
    damping: float = 0.5
    trace: bool = True
    max_rows: int = 10_000
    device: str = "sm_90"
    parts: int = 0
    packing: int = 0
    spoil_average: tuple[int, int, float] | None = None
    still: tuple[int, ...] = ()
    bias_only: tuple[int, ...] = ()
    stages_apart: bool = False

    def plain(self) -> cases.Case:
        names = ("layers", "chunk", "damping", "trace", "max_rows", "device", "packing")
        return cases.Case(**{name: getattr(self, name) for name in names}, ctas=self.parts)


class Whitening:
    """What a layer has beside its cases.Problem."""

    def __init__(self, case: WhiteningCase, number: int, problem: cases.Problem, rng: np.random.Generator):
        layer, self.problem = problem.case, problem
        if number in (*case.still, *case.bias_only):
            problem.g[:] = 0
        if number in case.still and problem.bias is not None:
            problem.bias[:] = 0
        self.g, self.bias = problem.g.copy(), None if problem.bias is None else problem.bias.copy()
        chunks, edges = (
            cases.num_chunks(problem.all_units, case.chunk),
            cases.bounds(problem.all_units, case.chunk),
        )
        self.average = self.average_weight = None
        if case.decay > 0:
            average = np.zeros((chunks, case.chunk, case.chunk))
            for c, (begin, end) in enumerate(itertools.pairwise(edges)):
                rows = rng.standard_normal((30, end - begin)) + 0.5
                average[c, : end - begin, : end - begin] = case.weight * rows.T @ rows / 30
            if case.spoil_average is not None and case.spoil_average[0] == number:
                unit = case.spoil_average[1]
                average[0, unit, unit] = case.spoil_average[2]
            self.average = cases.on_256_bytes(average.astype(np.float32))
            self.average_weight = cases.on_256_bytes(np.array([case.weight], np.float32))
        self.average_before = None if self.average is None else self.average.astype(np.float64)
        self.factors = cases.on_256_bytes(np.full((chunks, case.chunk, case.chunk), np.nan, np.float32))
        shape = problem.g.shape
        before, moved = rng.standard_normal(shape), rng.standard_normal(shape)
        self.before = cases.on_256_bytes(simt.encode(before, layer.g_dtype))
        now = simt.decode(self.before, layer.g_dtype) + moved.astype(np.float32) / 4
        self.weight = cases.on_256_bytes(simt.encode(now, layer.g_dtype))
        self.bias_before = self.bias_weight = None
        if problem.bias is not None:
            self.bias_before = simt.encode(rng.standard_normal(layer.outputs), layer.g_dtype)
            now = simt.decode(self.bias_before, layer.g_dtype) + np.float32(0.3)
            self.bias_weight = simt.encode(now, layer.g_dtype)

    def describe(self, flag: np.ndarray) -> simt.Whitened:
        def address(array: np.ndarray | None) -> int | None:
            return None if array is None else array.ctypes.data

        arrays = self.average, self.average_weight, flag, self.before, self.bias_before
        return simt.Whitened(*map(address, arrays), True, True)


def joined(weight: np.ndarray, bias: np.ndarray | None, dtype: int) -> np.ndarray:
    """(outputs, taps, units with the bias) in float64."""
    wide = simt.decode(weight, dtype).astype(np.float64).transpose(0, 2, 1)
    if bias is None:
        return wide
    column = simt.decode(bias, dtype).astype(np.float64)
    return np.concatenate([wide, np.broadcast_to(column[:, None, None], (*wide.shape[:2], 1))], axis=2)


def run(library: simt.Library, case: WhiteningCase) -> list[Whitening]:
    rng = np.random.default_rng(17)
    plain = case.plain()
    problems = cases.problems_of(plain)
    state = [Whitening(case, i, problem, rng) for i, problem in enumerate(problems)]
    flags = cases.on_256_bytes(np.zeros(len(state), np.int32))
    layers = [p.describe(cases.num_chunks(p.all_units, case.chunk)) for p in problems]
    whitened = [one.describe(flags[i:]) for i, one in enumerate(state)]
    options, whitening = cases.options_of(plain), simt.WhiteningOptions(case.decay, case.keep_norm, case.finish)
    options.triangular = True
    tuning = simt.Tuning(simt.AUTOMATIC, case.parts, False, case.packing)
    for layer, one in zip(layers, state, strict=True):
        layer.inverse = one.factors.ctypes.data

    def launch(stages: int, squares: np.ndarray | None = None) -> None:
        options.stages = stages
        size = library.whitening_workspace_bytes(layers, options, whitening, squares is not None, tuning)
        workspace = cases.on_256_bytes(np.full(size, 0xFF, np.uint8))
        workspace[: cases.COUNTER_BYTES] = 0
        library.whiten(layers, whitened, options, whitening, squares, case.device, workspace, tuning)
        assert not workspace[: cases.COUNTER_BYTES].any(), "a launch leaves the counters zero"

    launch(ALL)
    for i, one in enumerate(state):
        one.has_gradient = int(flags[i])
        one.by_g = cases.on_256_bytes(one.g)
        one.by_bias = None if one.bias is None else one.bias.copy()
        layers[i].g, layers[i].x, layers[i].covariance = one.by_g.ctypes.data, None, None
        if one.bias is not None:
            layers[i].bias_grad = one.by_bias.ctypes.data
    flags[:] = 0
    launch(APPLY)
    for i, one in enumerate(state):
        assert int(flags[i]) == one.has_gradient
        layers[i].g = one.weight.ctypes.data
        if one.bias is not None:
            layers[i].bias_grad = one.bias_weight.ctypes.data
        one.moved_from = joined(one.weight, one.bias_weight, one.problem.case.g_dtype)
        one.before_wide = joined(one.before, one.bias_before, one.problem.case.g_dtype)
    squares = cases.on_256_bytes(np.zeros((len(state), 2), np.float32))
    launch(APPLY, squares)
    if case.stages_apart:
        _stages_apart(library, case, state, layers, options, tuning)
    for i, one in enumerate(state):
        one.squares = squares[i]
    return state


def _stages_apart(library, case, state, layers, options, tuning) -> None:
    """L^-1 of the average, and G L^-1, by precondition_cuda."""
    for one, layer in zip(state, layers, strict=True):
        one.covariance = cases.on_256_bytes(one.average / one.average_weight)
        one.apart, one.product = cases.on_256_bytes(np.full_like(one.factors, np.nan)), one.g.copy()
        layer.covariance, layer.inverse, layer.g = (a.ctypes.data for a in (one.covariance, one.apart, one.product))
        if one.bias is not None:
            one.bias_product = one.bias.copy()
            layer.bias_grad = one.bias_product.ctypes.data
    for stages in (FACTOR, APPLY):
        options.stages = stages
        workspace = np.zeros(library.workspace_bytes(layers, options, tuning), np.uint8)
        library.precondition(layers, options, case.device, workspace, tuning)
    for one in state:
        layer = one.problem.case
        assert cases.relative_error(one.apart, one.factors) <= 200 * cases.EPS[simt.FLOAT32]
        order = library.division(one.problem.all_units, case.chunk, layer.group, 3, 0, layer.layer)
        want = joined(one.g, one.bias, layer.g_dtype)
        for c, (begin, end) in enumerate(itertools.pairwise(cases.bounds(len(order), case.chunk))):
            index, factor = order[begin:end], one.apart[c, : end - begin, : end - begin].astype(np.float64)
            want[:, :, index] = want[:, :, index] @ factor
        got = simt.decode(one.product, layer.g_dtype).transpose(0, 2, 1)
        assert cases.relative_error(got, want[..., : layer.units]) <= 200 * cases.EPS[simt.FLOAT32]


def check(library: simt.Library, case: WhiteningCase) -> list[Whitening]:
    """The launches against float64.  Returns what they wrote."""
    state = run(library, case)
    for one in state:
        _check_layer(library, case, one)
    return state


def _check_layer(library: simt.Library, case: WhiteningCase, one: Whitening) -> None:
    problem, layer = one.problem, one.problem.case
    dtype, units = layer.g_dtype, problem.all_units
    tolerance = 200 * cases.EPS[simt.FLOAT32] + (cases.EPS[dtype] if dtype != simt.FLOAT32 else 0)
    values = problem.values()
    count = len(values) if problem.row_count is None else min(len(values), layer.row_count)
    values = values[library.sample_rows(count, case.max_rows, 3, 0, layer.layer)] if count else values[:0]
    if layer.bias:
        values = np.concatenate([values, np.ones((len(values), 1))], axis=1)
    order = library.division(units, case.chunk, layer.group, 3, 0, layer.layer)
    edges = cases.bounds(units, case.chunk)
    grads = joined(one.g, one.bias, dtype)
    if grads.size == 0:  # nothing happens
        assert not problem.info.any() and one.has_gradient == 0
        return
    with np.errstate(invalid="ignore"):
        covariance = values.T @ values / max(1, len(values))
    blocks = [covariance[np.ix_(order[b:e], order[b:e])] for b, e in itertools.pairwise(edges)]
    sizes = [len(block) for block in blocks]
    seen = len(values) > 0
    if case.decay > 0:
        enters = seen and np.isfinite(np.diagonal(covariance)).all() and np.isfinite(grads).all()
        kept, new, weight = (case.decay, 1 - case.decay, case.decay * case.weight + 1 - case.decay)
        if not enters:
            kept, new, weight = 1.0, 0.0, case.weight
        stored = np.zeros_like(one.average_before)
        for c, size in enumerate(sizes):
            stored[c, :size, :size] = kept * one.average_before[c, :size, :size]
            if enters:
                stored[c, :size, :size] += new * blocks[c]
        assert cases.relative_error(one.average, stored) <= tolerance, (layer, "average")
        np.testing.assert_allclose(one.average_weight, [weight], rtol=1e-6)
        seen = weight > 0
        blocks = [
            stored[c, :size, :size] / weight if seen else block
            for c, (size, block) in enumerate(zip(sizes, blocks, strict=True))
        ]
    moments = np.concatenate([np.diagonal(block) for block in blocks])
    tau = moments[np.isfinite(moments)].mean() if case.trace and np.isfinite(moments).any() else 1.0
    tau = tau if tau > 0 else 1.0
    whitened = grads.copy()
    for c, (begin, end) in enumerate(itertools.pairwise(edges)):
        index, minor, tries = order[begin:end], 1, cases.MAX_TRIES - 1
        for tries in range(cases.MAX_TRIES) if seen else ():
            damped = blocks[c] / tau + case.damping * 10.0**tries * np.eye(end - begin)
            minor = cases.is_positive_definite(damped)
            if minor == 0:
                break
        assert problem.info[c] == minor, (layer, problem.info, minor)
        np.testing.assert_allclose(problem.damping_used[c], case.damping * 10.0**tries, rtol=1e-6)
        factor = one.factors[c].astype(np.float64)
        if minor != 0:
            assert not factor.any(), "the factor of a chunk that was given up"
            continue
        want = np.zeros_like(factor)
        want[: end - begin, : end - begin] = np.linalg.inv(np.linalg.cholesky(damped))
        assert cases.relative_error(factor, want) <= 200 * cases.EPS[simt.FLOAT32], (layer, "factor")
        assert not np.triu(factor, 1).any()
        with np.errstate(invalid="ignore", over="ignore"):
            product = grads[:, :, index] @ want[: end - begin, : end - begin].T
        fits = np.isfinite(simt.decode(simt.encode(product, dtype), dtype)).all(axis=2, keepdims=True)
        whitened[:, :, index] = np.where(fits, product, grads[:, :, index])

    def same(weight: np.ndarray, bias: np.ndarray | None, want: np.ndarray, what: str, bound: float) -> None:
        got = simt.decode(weight, dtype).astype(np.float64).transpose(0, 2, 1)
        assert cases.relative_error(got, want[..., : layer.units]) <= bound, (layer, what)
        if bias is not None:
            error = cases.relative_error(simt.decode(bias, dtype), want[..., -1].mean(axis=1))
            assert error <= bound, (layer, what, "bias", error)

    same(problem.g, problem.bias, whitened, "whitened", tolerance)
    same(one.by_g, one.by_bias, whitened, "whitened by the stored factors", tolerance)
    with np.errstate(invalid="ignore"):
        assert one.has_gradient == int((grads != 0).any())

    displacement = one.moved_from - one.before_wide
    mapped = displacement.copy()
    for c, (begin, end) in enumerate(itertools.pairwise(edges)):
        if problem.info[c] == 0:
            index = order[begin:end]
            mapped[:, :, index] = displacement[:, :, index] @ one.factors[c, : end - begin, : end - begin]
    if layer.bias:  # one bias, whose copies are averaged
        mapped[..., -1] = mapped[..., -1].mean(axis=1, keepdims=True)

    def square(move: np.ndarray) -> float:
        return (move[..., : layer.units] ** 2).sum() + ((move[:, 0, -1] ** 2).sum() if layer.bias else 0.0)

    if not one.has_gradient:
        same(one.weight, one.bias_weight, one.moved_from, "a weight that stays", 0.0)
        assert not one.squares.any()
        return
    squares = square(displacement), square(mapped)
    rounding = 4 * cases.EPS[dtype] if dtype != simt.FLOAT32 else 1e-5
    np.testing.assert_allclose(one.squares, squares, rtol=rounding)
    scale = np.sqrt(squares[0] / squares[1]) if case.keep_norm else 1.0
    want = one.before_wide + scale * mapped if case.finish else mapped
    same(one.weight, one.bias_weight, want, "mapped back", tolerance)


def written(state: list[Whitening]) -> list[bytes]:
    """Return every byte that the launches wrote."""
    names = ("average", "average_weight", "factors", "by_g", "by_bias", "weight", "bias_weight", "squares")
    arrays = [getattr(one, name) for one in state for name in names]
    found = [array.tobytes() for array in arrays if array is not None]
    return [*found, *cases.written([one.problem for one in state]), bytes(one.has_gradient for one in state)]


W, L = WhiteningCase, cases.LayerCase
F, B, H = simt.FLOAT32, simt.BFLOAT16, simt.FLOAT16
_TWO = [L(70, 5, layer=0), L(33, 40, rows=70, layer=1)]

# Small enough for every schedule and every sanitizer.
SMALL = {
    "one chunk": W([L(20, 9)], weight=0.0),
    "several layers": W([*_TWO, L(10, 3, layer=2)], parts=3),
    "no average": W(_TWO, decay=0.0, parts=2),
    "no average, no trace": W([L(70, 6, row_count=20), L(8, 2, row_count=0, layer=1)], decay=0.0, trace=False),
    "no trace": W(_TWO, trace=False),
    "bias": W([L(40, 7, bias=True), L(8, 300, bias=True, layer=1)], parts=2),
    "taps": W([L(36, 15, rows=50, layout="nchw", taps=(3, 3), bias=True)]),
    "bfloat16": W([L(40, 9, x_dtype=B, g_dtype=B, bias=True)]),
    "float16": W([L(40, 9, x_dtype=H, g_dtype=H, layout="columns", bias=True)]),
    "rows": W([L(40, 6, rows=75, row_count=31), L(8, 2, row_count=0, layer=1)], max_rows=20),
    "no rows yet": W([L(40, 6, row_count=0, bias=True)], weight=0.0),
    "NaN in X": W([L(70, 4, spoil=("x", 33, np.nan)), L(40, 4, layer=1)]),
    "NaN in X, no average": W([L(70, 4, spoil=("x", 33, np.nan))], decay=0.0),
    "NaN in G": W([L(70, 4, spoil=("g", 2, np.nan)), L(40, 4, layer=1)], parts=2),
    "overflow": W([L(24, 4, g_dtype=H, spoil=("g", 1, 60000.0))], damping=1e-3),
    "damping raised": W([L(70, 6, bias=True), L(20, 5, layer=1)], spoil_average=(0, 3, -4.0), trace=False),
    "damping raised, one chunk": W([L(20, 6)], spoil_average=(0, 3, -2.0)),
    "a chunk given up": W([L(70, 6, bias=True)], spoil_average=(0, 3, -900.0), trace=False),
    "a chunk given up, norm free": W([L(70, 6)], spoil_average=(0, 3, -900.0), trace=False, keep_norm=False),
    "no gradient": W([L(40, 6, bias=True), L(33, 5, layer=1)], still=(0,)),
    "norm free": W([L(40, 6, bias=True), L(36, 6, x_dtype=B, g_dtype=B, layer=1)], keep_norm=False),
    "norm free, taps": W([L(20, 6, taps=(3,), bias=True)], keep_norm=False),
    "not finished": W([L(70, 40, bias=True)], finish=False, parts=2),
    "not finished, norm free": W([L(20, 6)], finish=False, keep_norm=False),
    "a gradient of the bias alone": W([L(70, 6, bias=True)], bias_only=(0,), parts=2),
    "stages apart": W([L(70, 40, bias=True), L(33, 5, layer=1)], stages_apart=True),
    "no outputs": W([L(40, 0), L(20, 3, layer=1)]),
    "groups": W([L(72, 6, group=8), L(72, 6, group=8, x_dtype=B, g_dtype=B, layer=1)]),
    "permuted": W([L(72, 20, bias=True), L(64, 33, x_dtype=B, g_dtype=H, layer=1)], parts=3, packing=simt.ALWAYS),
    "damping zero": W([L(20, 3, scale=0.0)], damping=0.0, decay=0.0),
}
LARGE = {
    "64": W([L(64, 70, rows=530), L(50, 3, layer=1)], chunk=64),
    "128": W([L(128, 66, rows=520), L(100, 140, layer=1)], chunk=128),
    "128 bfloat16": W([L(256, 66, rows=600, x_dtype=B, g_dtype=B, group=16)], chunk=128),
    "160": W([L(160, 34, rows=40, bias=True)], chunk=160),
    "160 of 16 bits": W([L(150, 20, rows=40, x_dtype=H, g_dtype=H, bias=True)], chunk=160, keep_norm=False),
    "160, a chunk given up": W([L(160, 20, rows=40)], chunk=160, spoil_average=(0, 3, -900.0), trace=False),
    "256": W([L(255, 34, rows=40, bias=True)], chunk=256),
    "not aligned": W([L(63, 9, rows=140), L(63, 9, rows=140, x_dtype=B, g_dtype=B, layer=1)], chunk=64),
}
PREFIX = "whitened, "


def named(name: str) -> WhiteningCase:
    """A case by its name without PREFIX; "128@sm_80" is one on a device without products of four warps."""
    case, _, device = name.partition("@")
    return dataclasses.replace({**SMALL, **LARGE}[case], **({"device": device} if device else {}))
