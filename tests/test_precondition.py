"""The correction against float64, on random cases of every shape, layout, dtype, damping and division."""

import itertools
import math

import numpy as np
import pytest
import torch

import consistency_ops as co
from consistency_ops import reference
from support.samples import (
    EPS32,
    average_bias,
    build,
    case,
    chunks,
    gather,
    lay_out,
    relative_error,
    rows_like,
    solve_float64,
    solve_torch,
)

CASES, BATCH = 352, 16


def compute_dtype(grad, inputs):
    return torch.float64 if torch.float64 in (grad.dtype, inputs.dtype) else torch.float32


def output_rounding(want, dtype):
    """Largest relative error, in the Frobenius norm, that rounding a result near ``want`` to ``dtype`` can make."""
    if dtype.itemsize > 2:
        return 0.0
    information = torch.finfo(dtype)
    subnormal = information.smallest_normal * information.eps / 2
    return information.eps / 2 + subnormal * np.sqrt(want.size) / np.linalg.norm(want)


def rounded(values, dtype):
    return torch.from_numpy(values).to(dtype).double().numpy() if dtype.itemsize == 2 else values


def work(sample):
    """Return the number of elements of a case's inputs and gradient."""
    rows = math.prod(sample.images) or sample.rows
    return (min(rows, sample.max_rows) + sample.outputs * math.prod(sample.kernel)) * sample.units


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_random_cases_against_float64(first, kernels):
    """Per chunk: error <= 50 eps cond + rounding of a 16-bit result, eps of the compute type.

    Per case computed in float32: the worst chunk is not worse than twice the worst chunk of torch's own float32
    composition, plus 2 eps for the result's own rounding.  The order of the units in a chunk is arbitrary, and torch
    can be exact by luck in one order of two units, so its error is the larger of two orders."""
    samples = map(case, range(first, first + BATCH))
    for sample in kernels.choose(samples, lambda s: (s.grad_dtype, s.input_dtype), work):
        grad, inputs, keywords = build(sample)
        before = grad.clone(), inputs.clone()
        corrected, info, used = co.precondition_ex(grad, inputs, **keywords)
        assert torch.equal(grad, before[0]) and torch.equal(inputs, before[1]), sample
        weight, bias = corrected if sample.bias else (corrected, None)
        assert weight.shape == grad.shape and weight.dtype == grad.dtype, sample
        dtype = compute_dtype(grad, inputs)
        eps = torch.finfo(dtype).eps
        worst, worst_torch, worst_rounding, count = 0.0, 0.0, 0.0, 0
        for chunk in chunks(grad, inputs, **keywords):
            want = average_bias(chunk, solve_float64(chunk), sample.bias, sample.units)
            got = gather(chunk, weight, bias)
            error, condition = relative_error(got, want), np.linalg.cond(chunk.damped())
            rounding = output_rounding(want, grad.dtype)
            assert error <= 50 * eps * condition + rounding, (sample, count, error, condition)
            worst = max(worst, error)
            for reverse in (False, True) if dtype == torch.float32 else ():
                plain = average_bias(chunk, solve_torch(chunk, reverse), sample.bias, sample.units)
                worst_torch = max(worst_torch, relative_error(rounded(plain, grad.dtype), want))
            worst_rounding = max(worst_rounding, rounding)
            count += 1
        if dtype == torch.float32:
            assert worst <= 2 * worst_torch + 2 * eps + worst_rounding, (sample, worst, worst_torch)
        assert info.shape == used.shape == (count,) and info.dtype == torch.int32, sample
        assert not info.any() and torch.equal(used, torch.full((count,), sample.damping)), sample


@pytest.mark.parametrize("first", range(0, CASES, 4 * BATCH))
def test_reference_agrees_with_the_oracle(first):
    """``reference.precondition`` in float64 is the definition: within 50 eps64 cond of an independent float64 solve."""
    for index in range(first, first + 4 * BATCH):
        sample = case(index)
        grad, inputs, keywords = build(sample)
        doubles = {k: v.double() if k == "bias_grad" else v for k, v in keywords.items()}
        doubles["group"] = doubles["group"] or min(32 // grad.itemsize, sample.chunk)
        weight, bias, _, _ = reference.precondition(grad.double(), inputs.double(), **doubles)
        for chunk in chunks(grad, inputs, **keywords):
            want = average_bias(chunk, solve_float64(chunk), sample.bias, sample.units)
            bound = 50 * torch.finfo(torch.float64).eps * np.linalg.cond(chunk.damped())
            assert relative_error(gather(chunk, weight, bias), want) <= bound, sample


def test_the_cases_cover_what_they_promise():
    samples = [case(index) for index in range(CASES)]
    assert len(set(samples)) >= 300
    for attribute, values in {
        "grad_dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "damping": (1e-3, 10.0),
        "units": (1, 2, 129, 385),
        "rows": (1, 1025),
        "conv_groups": (1, 2, 3),
        "input_layout": ("channels-last", "every-other", "flipped", "expanded", "3-D", "transposed", "offset"),
        "group": (None, 1, 8),
    }.items():
        for value in values:
            assert sum(getattr(sample, attribute) == value for sample in samples) >= 3, (attribute, value)
    assert sum(sample.rows < sample.units for sample in samples) >= 50
    assert sum(sample.units % sample.chunk > 0 and sample.units > sample.chunk for sample in samples) >= 50


def test_input_dtype_mix_equals_the_wider_input():
    """A bf16 or fp16 input beside a float32 gradient gives what its exact float32 copy gives."""
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(7)
        inputs = rows_like(200, 96, generator).to(dtype)
        grad = torch.randn(33, 96, generator=generator)
        narrow = co.precondition(grad, inputs, damping=0.1, chunk=64)
        wide = co.precondition(grad, inputs.float(), damping=0.1, chunk=64)
        rows = inputs.double()
        condition = float(torch.linalg.cond(rows.T @ rows / 200 + 0.1 * torch.eye(96, dtype=torch.float64)))
        assert relative_error(narrow.double().numpy(), wide.double().numpy()) <= 50 * EPS32 * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_channels_last_equals_contiguous(dtype):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(4, 24, 9, 7, generator=generator).to(dtype)
    grad = torch.randn(18, 24, 3, 3, generator=generator).to(dtype)
    want = co.precondition(grad, inputs, damping=0.1, chunk=16, max_rows=60)
    for layout in ("channels-last", "every-other", "transposed"):
        got = co.precondition(grad, lay_out(inputs, layout), damping=0.1, chunk=16, max_rows=60)
        tolerance = 200 * torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype).eps
        tolerance += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        assert relative_error(got.double().numpy(), want.double().numpy()) <= tolerance, layout
        got = co.precondition(lay_out(grad, layout), inputs, damping=0.1, chunk=16, max_rows=60)
        assert relative_error(got.double().numpy(), want.double().numpy()) <= tolerance, layout


def test_one_by_one_convolution_equals_linear():
    """A 1x1 convolution on 1x1 maps is the fully connected layer."""
    generator = torch.Generator().manual_seed(5)
    inputs, grad = torch.randn(50, 40, generator=generator), torch.randn(12, 40, generator=generator)
    bias = torch.randn(12, generator=generator)
    linear = co.precondition(grad, inputs, damping=0.1, chunk=16, bias_grad=bias)
    conv = co.precondition(grad[:, :, None, None], inputs[:, :, None, None], damping=0.1, chunk=16, bias_grad=bias)
    assert torch.equal(linear[0], conv[0][:, :, 0, 0]) and torch.equal(linear[1], conv[1])


def test_chunked_covariance_against_float64():
    for index in range(40):
        generator = torch.Generator().manual_seed(index)
        rows, units, chunk = ((1, 5, 64), (300, 33, 32), (17, 129, 128), (1025, 200, 256), (64, 256, 256))[index % 5]
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[index % 4]
        inputs = lay_out(
            rows_like(rows, units, generator).to(dtype), ("contiguous", "transposed", "every-other")[index % 3]
        )
        keywords = {
            "chunk": chunk,
            "group": (1, 8)[index % 2] if chunk >= 8 else 1,
            "max_rows": (10_000, 50)[index // 20],
        }
        got = co.chunked_covariance(inputs, seed=index, **keywords)
        want = reference.chunked_covariance(inputs.double(), seed=index, **keywords)
        assert got.shape == want.shape == (-(-units // chunk), chunk, chunk)
        assert got.dtype in (torch.float32, dtype)
        # For a sum of n products, |error| <= n eps sum |x_i x_j| <= n eps of the largest diagonal entry, and 1 / n.
        eps = torch.finfo(got.dtype).eps
        bound = eps * (rows**0.5 + 10) * want.diagonal(dim1=1, dim2=2).amax()
        assert (got.double() - want).abs().max() <= bound, (index, dtype)
        assert torch.equal(got, got.mT), "the covariance must be exactly symmetric"
        used = reference.chunk_bounds(units, chunk)
        for c, (begin, end) in enumerate(itertools.pairwise(used)):
            assert not got[c, end - begin :].any() and not got[c, :, end - begin :].any()


def test_float64_end_to_end():
    """float64 stays float64: an error a thousandth of float32's rounding, on an ill-conditioned chunk."""
    generator = torch.Generator().manual_seed(11)
    inputs = rows_like(500, 128, generator)
    grad = torch.randn(20, 128, generator=generator, dtype=torch.float64)
    got = co.precondition(grad, inputs, damping=1e-4)
    covariance = inputs.T @ inputs / 500 + 1e-4 * torch.eye(128, dtype=torch.float64)
    want = torch.linalg.solve(covariance, grad.T).T
    bound = 50 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(covariance))
    assert bound < 1e-3 * EPS32
    assert relative_error(got.numpy(), want.numpy()) <= bound
