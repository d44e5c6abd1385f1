"""Bad and extreme values never raise: they set `info`, and the gradient of that chunk stays as it was.

Whatever happens, no NaN appears where the gradient had none, and no other chunk or layer changes.
"""

import itertools
import math

import pytest
import torch

import consistency_ops as co
from consistency_ops import reference
from support.samples import layer, relative_error, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def no_new_nan(after, before):
    return not (after.isnan() & ~before.isnan()).any()


def poisoned(inputs, row, unit, value):
    inputs = inputs.clone()
    inputs[row, unit] = value
    return inputs


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_or_inf_in_one_unit_spares_the_other_chunks(dtype, value, scaling):
    grad, inputs = layer(units=100, dtype=dtype)
    unit, keywords = 37, {"chunk": 32, "group": 4, "damping": 0.1, "scaling": scaling, "seed": 3}
    corrected, info, used = co.precondition_ex(grad, poisoned(inputs, 11, unit, value), **keywords)
    order, bounds = reference.division(100, 32, 4, seed=3), reference.chunk_bounds(100, 32)
    hit = next(c for c in range(4) if unit in order[bounds[c] : bounds[c + 1]].tolist())
    spoilt = order[bounds[hit] : bounds[hit + 1]]
    assert same_bits(corrected[:, spoilt], grad[:, spoilt])
    assert info[hit] > 0 and [bool(i) for i in info].count(True) == 1
    assert used[hit] == pytest.approx(10.0)
    want, _, want_info, _ = reference.precondition(
        grad.double(), poisoned(inputs, 11, unit, value).double(), **keywords
    )
    assert torch.equal(info > 0, want_info > 0)
    others = torch.ones(100, dtype=torch.bool)
    others[spoilt] = False
    tolerance = 1e-4 if dtype.itemsize == 4 else 1e-10 if dtype.itemsize == 8 else 2 * torch.finfo(dtype).eps
    assert relative_error(corrected[:, others].double().numpy(), want[:, others].numpy()) < tolerance
    assert corrected.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_row_leaves_the_layer_as_it_is(dtype):
    grad, inputs = layer(dtype=dtype)
    inputs[7] = math.nan
    bias = torch.randn(6).to(dtype)
    (corrected, corrected_bias), info, _ = co.precondition_ex(grad, inputs, chunk=16, bias_grad=bias)
    assert same_bits(corrected, grad)
    assert same_bits(corrected_bias, bias)
    assert (info > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "chunk", "group"),
    [((6, 100), 32, 4), ((11, 96), 32, 8), ((11, 96), 48, 8), ((11, 128), 64, 8), ((5, 96, 3, 3), 32, 8)],
    ids=str,
)
def test_nan_or_inf_in_the_gradient_passes_through(shape, chunk, group, dtype, value):
    """GradScaler must see it: the (row, chunk) block that holds it stays, bit for bit; the others are corrected."""
    units, kernel = shape[1], shape[2:]
    grad, inputs = torch.randn(shape).to(dtype), torch.randn(40, units).to(dtype)
    keywords = {"chunk": chunk, "group": group, "damping": 0.1, "seed": 5}
    clean = co.precondition(grad, inputs, **keywords)
    bad = grad.clone()
    tap = (1,) * len(kernel)
    bad[(2, 61, *tap)] = value
    corrected, info, _ = co.precondition_ex(bad, inputs, **keywords)
    order, bounds = reference.division(units, chunk, group, seed=5), reference.chunk_bounds(units, chunk)
    block = next(order[a:b] for a, b in itertools.pairwise(bounds) if 61 in order[a:b].tolist())
    assert not info.any()
    expected = clean.clone()
    expected[(2, block, *tap)] = bad[(2, block, *tap)]
    assert same_bits(corrected, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_or_inf_in_a_bias_gradient(value):
    """With several kernel taps the copies of the bias are averaged; an infinite bias must not become NaN on the way."""
    for shape, maps in (((4, 10), (30, 10)), ((4, 10, 3, 3), (2, 10, 5, 5))):
        grad, inputs, bias = torch.randn(shape), torch.randn(maps), torch.randn(4)
        bias[1] = value
        weight, corrected_bias = co.precondition(grad, inputs, bias_grad=bias, damping=0.1, chunk=4)
        assert no_new_nan(weight, grad)
        assert no_new_nan(corrected_bias, bias)
        assert same_bits(corrected_bias[1], bias[1])
        clean = co.precondition(grad, inputs, bias_grad=bias.nan_to_num(0, 0, 0), damping=0.1, chunk=4)
        keep = [0, 2, 3]
        assert same_bits(corrected_bias[keep], clean[1][keep])
        assert same_bits(weight[keep], clean[0][keep])


@pytest.mark.parametrize("poison", ["nan row", "inf", "huge", "singular", "nan gradient"])
def test_a_bad_layer_leaves_the_others_alone(poison):
    damping = 0.0 if poison == "singular" else 0.1
    layers = [layer(9, 70, 400, seed=s) for s in range(5)]
    grads, inputs = [g for g, _ in layers], [x for _, x in layers]
    clean = [g.clone() for g in grads]
    co.foreach_precondition_(clean, inputs, damping=damping, chunk=32)
    middle = {
        "nan row": poisoned(inputs[2], 3, slice(None), math.nan),
        "inf": poisoned(inputs[2], 3, 5, math.inf),
        "huge": inputs[2] * 1e30,
        "singular": torch.ones_like(inputs[2]),
        "nan gradient": inputs[2],
    }[poison]
    if poison == "nan gradient":
        grads[2][4, :] = math.nan
    before = grads[2].clone()
    info = co.foreach_precondition_(grads, [*inputs[:2], middle, *inputs[3:]], damping=damping, chunk=32)
    for i in (0, 1, 3, 4):
        assert same_bits(grads[i], clean[i]), i
    assert no_new_nan(grads[2], before)
    chunks = 3
    assert not info[: 2 * chunks].any()
    assert not info[3 * chunks :].any()
    if poison in ("nan row", "huge", "singular"):
        assert (info[2 * chunks : 3 * chunks] > 0).all()
        assert same_bits(grads[2], before)


def test_scales():
    """1e20 overflows the float32 second moment and leaves the gradient; 1e-25 underflows to zero."""
    grad, inputs = layer()
    for scaling in ("absolute", "trace"):
        corrected, info, _ = co.precondition_ex(grad, inputs * 1e20, scaling=scaling, chunk=16)
        assert same_bits(corrected, grad) or corrected.isfinite().all()
        assert no_new_nan(corrected, grad)
        if scaling == "absolute":
            assert (info > 0).all()
            assert same_bits(corrected, grad)
        corrected, info, _ = co.precondition_ex(grad, inputs * 1e-25, scaling=scaling, damping=0.5, chunk=16)
        assert not info.any()
        assert torch.allclose(corrected, grad / 0.5, rtol=1e-6) or (scaling == "trace" and corrected.isfinite().all())
    double = co.precondition(grad.double(), inputs.double() * 1e20, damping=1e38, chunk=16)
    want, *_ = reference.precondition(grad.double(), inputs.double() * 1e20, damping=1e38, chunk=16, group=4)
    assert relative_error(double.numpy(), want.numpy()) < 1e-9


@pytest.mark.parametrize("exponent", [-50, -20, 20, 50])
def test_trace_scaling_does_not_depend_on_the_scale_of_the_inputs(exponent):
    """Powers of two are exact, and the moments (2^-100 .. 2^100) are in float32's range, so the bits are the same."""
    grad, inputs = layer(units=100, rows=300)
    want = co.precondition(grad, inputs, scaling="trace", damping=0.1, chunk=32)
    got = co.precondition(grad, inputs * 2.0**exponent, scaling="trace", damping=0.1, chunk=32)
    assert relative_error(got.double().numpy(), want.double().numpy()) < 1e-5


def test_large_moments_whose_sum_overflows():
    """Moments near 1e38 are finite, their trace is not in float32: the result is right or the gradient is unchanged."""
    grad, inputs = layer(units=100, rows=4)
    inputs = inputs.sign() * 1.5e19
    corrected, info, _ = co.precondition_ex(grad, inputs, scaling="trace", damping=0.1, chunk=32, group=1)
    want, _, _, _ = reference.precondition(grad.double(), inputs.double(), scaling="trace", damping=0.1, chunk=32)
    order, bounds = reference.division(100, 32, 1), reference.chunk_bounds(100, 32)
    for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
        index = order[begin:end]
        if info[c]:
            assert same_bits(corrected[:, index], grad[:, index])
        else:
            assert relative_error(corrected[:, index].double().numpy(), want[:, index].numpy()) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_chunks_without_damping(dtype):
    """Zeros fail at pivot 1, equal units at pivot 2, exactly; the gradient stays, after three tries."""
    grad, _ = layer(dtype=dtype)
    for inputs, pivot in ((torch.zeros(50, 40), 1), (torch.ones(64, 40), 2)):
        corrected, info, used = co.precondition_ex(grad, inputs.to(dtype), damping=0.0, chunk=20)
        assert info.tolist() == [pivot, pivot]
        assert used.tolist() == [0.0, 0.0]
        assert same_bits(corrected, grad)
    if dtype.itemsize >= 4:  # rank 5 of 40: rounding decides whether a factor exists, but never lets a NaN out
        corrected, info, _ = co.precondition_ex(grad, layer(rows=5, dtype=dtype)[1], damping=0.0)
        assert no_new_nan(corrected, grad)
        assert info[0] == 0 or same_bits(corrected, grad)


def test_damping_is_raised_tenfold_at_most_twice():
    """Ones times 4096 have moments of 2^24, where float32 cannot see a damping below one."""
    grad, _ = layer(units=8)
    inputs = torch.full((64, 8), 4096.0)
    corrected, info, used = co.precondition_ex(grad, inputs, damping=0.05)
    assert info.tolist() == [0]
    assert used.tolist() == [5.0]
    want = torch.linalg.solve(inputs.double().T @ inputs.double() / 64 + 5 * torch.eye(8).double(), grad.double().T).T
    assert (
        relative_error(corrected.double().numpy(), want.numpy()) < 0.5
    )  # cond 1e7: the digits are gone, the scale is not
    corrected, info, used = co.precondition_ex(grad, inputs, damping=0.001)
    assert info.tolist() == [2]
    assert used.tolist() == [pytest.approx(0.1)]
    assert same_bits(corrected, grad)


def test_a_result_that_overflows_its_dtype_is_not_written():
    for dtype, large in ((torch.float16, 3e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)):
        grad = torch.full((4, 24), large).to(dtype)
        grad[1] = 1.0
        inputs = torch.full((10, 24), 1e-3).to(dtype)
        corrected = co.precondition(grad, inputs, damping=0.01, chunk=8)
        assert corrected.isfinite().all(), dtype
        assert same_bits(corrected[0], grad[0]), dtype
        assert not same_bits(corrected[1], grad[1]), dtype


@pytest.mark.parametrize("shape", [(0, 40), (6, 0), (0, 0)])
def test_empty_gradients(shape):
    grad, inputs = torch.ones(shape), torch.ones(50, shape[1])
    corrected, info, used = co.precondition_ex(grad, inputs, chunk=16)
    chunks = math.ceil(shape[1] / 16)
    assert corrected.shape == shape
    assert info.shape == used.shape == (chunks,)
    assert not info.any()
    bias = torch.ones(shape[0])
    (corrected, bias), info, _ = co.precondition_ex(grad, inputs, chunk=16, bias_grad=bias)
    assert corrected.shape == shape and bias.shape == (shape[0],)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_no_rows_leave_the_gradient(damping):
    shapes = (((6, 40), (0, 40)), ((6, 4, 3, 3), (0, 4, 5, 5)), ((6, 4, 3), (2, 4, 0)), ((6, 40), (3, 0, 40)))
    for grad, inputs in ((torch.randn(grad), torch.ones(inputs)) for grad, inputs in shapes):
        bias = torch.randn(6)
        (corrected, corrected_bias), info, used = co.precondition_ex(grad, inputs, damping=damping, bias_grad=bias)
        assert same_bits(corrected, grad)
        assert same_bits(corrected_bias, bias)
        assert not info.any()
        assert torch.equal(used, torch.full_like(used, damping))
    layers = [layer(seed=1), (torch.randn(6, 40), torch.ones(0, 40)), layer(seed=2)]
    grads = [g.clone() for g, _ in layers]
    co.foreach_precondition_(grads, [x for _, x in layers])
    assert same_bits(grads[1], layers[1][0])
    for position in (0, 2):
        alone = [layers[position][0].clone()]
        co.foreach_precondition_(alone, [layers[position][1]], layers=[position])
        assert same_bits(grads[position], alone[0])


def test_row_counts_out_of_range_read_no_garbage():
    grad, inputs = layer()
    want = co.precondition(grad, inputs)
    for count, expected in ((50, want), (51, want), (2**62, want), (0, grad), (-3, grad)):
        grads = [grad.clone()]
        co.foreach_precondition_(grads, [inputs], row_counts=[torch.tensor([count])])
        assert same_bits(grads[0], expected), count
    for bad in (torch.tensor([1.0]), torch.tensor([1, 2]), 7):
        with pytest.raises((TypeError, ValueError)):
            co.foreach_precondition_([grad.clone()], [inputs], row_counts=[bad])


def test_max_rows_larger_than_the_rows():
    grad, inputs = layer(rows=3)
    for max_rows in (4, 2**31, 2**40, 2**63 - 1):
        assert same_bits(co.precondition(grad, inputs, max_rows=max_rows), co.precondition(grad, inputs, max_rows=3))
    assert co.precondition(grad, inputs, max_rows=1).isfinite().all()


def test_chunk_larger_than_the_layer_is_one_chunk():
    grad, inputs = layer(units=5)
    want = torch.linalg.solve(inputs.double().T @ inputs.double() / 50 + torch.eye(5).double(), grad.double().T).T
    for chunk in (5, 6, 256):
        corrected, info, _ = co.precondition_ex(grad, inputs, chunk=chunk)
        assert info.shape == (1,)
        assert relative_error(corrected.double().numpy(), want.numpy()) < 1e-5
