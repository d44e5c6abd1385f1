"""Chunks with fewer rows than units: the CPU solves by a matrix of the size of the rows (csrc/cpu/few_rows.h)."""

import math

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops, reference

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensors(rows, units, outputs=24, dtype=torch.float32, grad_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, units, generator=generator) + 0.2
    grad, bias = torch.randn(outputs, units, generator=generator), torch.randn(outputs, generator=generator)
    return grad.to(grad_dtype), x.to(dtype), bias.to(grad_dtype)


def expected(grad, x, bias=None, **options):
    options = {"group": ops.default_group(grad.dtype, options.get("chunk", 128)), **options}
    return reference.precondition(
        grad.double(), x.double(), bias_grad=None if bias is None else bias.double(), **options
    )


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("units", [64, 65, 128, 300, 577])
@pytest.mark.parametrize("rows", [1, 2, 8, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_same_correction(rows, units, with_bias):
    grad, x, bias = tensors(rows, units)
    options = {"damping": 0.1, "scaling": "trace", "seed": 3}
    result = co.precondition_ex(grad, x, bias_grad=bias if with_bias else None, **options)
    want, want_bias, want_info, want_used = expected(grad, x, bias if with_bias else None, **options)
    corrected, corrected_bias = result.corrected if with_bias else (result.corrected, None)
    assert torch.equal(result.info, want_info)
    torch.testing.assert_close(result.damping_used.double(), want_used.double())
    # 8 eps cond, the condition of the damped covariance being at most 1 + units / damping.
    bound = 8 * torch.finfo(torch.float32).eps * (1 + units / 0.1)
    assert error(corrected, want) < min(bound, 1e-4)
    if with_bias:
        assert error(corrected_bias, want_bias) < min(bound, 1e-4)


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("units", [129, 256])
def test_every_dtype(units, dtype, grad_dtype):
    grad, x, bias = tensors(5, units, dtype=dtype, grad_dtype=grad_dtype)
    target, target_bias = grad.clone(), bias.clone()
    co.foreach_precondition_([target], [x], bias_grads=[target_bias], damping=0.1, scaling="trace")
    want, want_bias, _, _ = expected(grad, x, bias, damping=0.1, scaling="trace")
    bound = 1e-5 + torch.finfo(grad_dtype).eps
    assert error(target, want) < bound and error(target_bias, want_bias) < bound


def test_layers_that_share_an_input():
    grad, x, _ = tensors(7, 200)
    other = torch.randn(50, 200)
    grads = [grad.clone(), other.clone()]
    co.foreach_precondition_(grads, [x, x], layers=[0, 0], damping=0.1)
    assert torch.equal(grads[0], co.precondition(grad, x, damping=0.1))
    assert torch.equal(grads[1], co.precondition(other, x, damping=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_all_threads(dtype):
    grads, inputs = zip(
        *[tensors(16, units, 300, dtype=dtype, seed=units)[:2] for units in (129, 300, 400)], strict=True
    )
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([grad.clone() for grad in grads])
        co.foreach_precondition_(results[-1], list(inputs), damping=0.1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_chunk_with_bad_inputs_keeps_its_gradient(bad):
    grad, x, _ = tensors(4, 256)
    x[2, 100] = bad
    options = {"damping": 0.1, "scaling": "trace", "group": 1}
    result = co.precondition_ex(grad, x, **options)
    want, _, info, used = expected(grad, x, **options)
    assert torch.equal(result.info, info) and info.count_nonzero() == 1
    torch.testing.assert_close(result.damping_used.double(), used.double())
    kept = (want == grad.double()).all(dim=0)
    assert int(kept.sum()) == 128 and torch.equal(result.corrected[:, kept], grad[:, kept])
    assert error(result.corrected[:, ~kept], want[:, ~kept]) < 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-7, 1e-3, 10.0])
def test_every_damping(damping):
    """Without damping the covariance of few rows is singular; nearly without, it goes the way of many rows."""
    grad, x, _ = tensors(6, 128)
    result = co.precondition_ex(grad, x, damping=damping, scaling="trace")
    assert result.corrected.isfinite().all()
    if damping == 0:
        failed = result.info != 0
        assert not failed.all() or torch.equal(result.corrected, grad)
        return
    want = expected(grad, x, damping=float(result.damping_used[0]), scaling="trace")[0]
    assert error(result.corrected, want) < 8 * torch.finfo(torch.float32).eps * (1 + 128 / damping)


def test_a_result_that_overflows_stays_as_it_was():
    grad, x, _ = tensors(3, 128, grad_dtype=torch.float16)
    grad[4] = 60000.0
    result = co.precondition(grad, x, damping=1e-2, scaling="trace")
    assert torch.equal(result[4], grad[4]) and not torch.equal(result[3], grad[3])


def test_zero_inputs_divide_by_the_damping():
    grad, _, _ = tensors(3, 128)
    torch.testing.assert_close(co.precondition(grad, torch.zeros(3, 128), damping=0.5), 2 * grad)


def test_stages_agree_with_the_fused_call():
    grad, x, _ = tensors(9, 256)
    fused = co.precondition(grad, x, damping=0.1, scaling="trace")
    covariances = ops.foreach_covariance([x], grads=[grad], chunk=128)
    staged = grad.clone()
    ops.foreach_correct_([staged], covariances, damping=0.1, scaling="trace", chunk=128)
    assert error(staged, fused.double()) < 1e-5


@pytest.mark.parametrize("units", [64, 128, 250])
@pytest.mark.parametrize("rows", [3, 16, 17, 32])
def test_taps_of_a_convolution(rows, units):
    """3 x 3 taps that lie side by side are moved as they lie; with another layout, or a bias, they are not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, units, 1, rows, generator=generator) + 0.2
    grad, bias = torch.randn(7, units, 3, 3, generator=generator), torch.randn(7, generator=generator)
    options = {"damping": 0.1, "scaling": "trace", "seed": 3}
    want, _, info, _ = expected(grad, x, **options)
    bound = min(8 * torch.finfo(torch.float32).eps * (1 + units / 0.1), 1e-4)
    assert info.count_nonzero() == 0
    assert error(co.precondition(grad, x, **options), want) < bound
    other = grad.to(memory_format=torch.channels_last)
    assert error(co.precondition(other, x, **options), want) < bound
    with_bias, got_bias = co.precondition(grad, x, bias_grad=bias, **options)
    want, want_bias, _, _ = expected(grad, x, bias, **options)
    assert error(with_bias, want) < bound and error(got_bias, want_bias) < bound


@pytest.mark.parametrize("shape", [(9, 128), (9, 128, 3, 3)])
def test_only_the_row_that_overflows_stays(shape):
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape, generator=generator)
    x = torch.randn(8, 128, *[1] * (len(shape) - 2), generator=generator)
    row = (4, slice(None), *[1] * (len(shape) - 2))
    grad[row] *= 1e37
    options = {"damping": 1e-3, "scaling": "trace"}
    result, want = co.precondition(grad, x, **options), expected(grad, x, **options)[0]
    assert torch.equal(result[row], grad[row]) and want[row].abs().max() > torch.finfo(torch.float32).max
    others = torch.ones(shape, dtype=torch.bool)
    others[row] = False
    assert error(result[others], want[others]) < 1e-3
