"""The operators of ``mode="whiten"`` against torch, the reference and each other."""

import itertools

import pytest
import torch
from torch import nn

from consistency_ops import ops, reference
from consistency_ops.ops.whitening import Layers, foreach_multiply_
from consistency_ops.preconditioner import Preconditioner
from support.whitening import adamw, optimizer_of, same, with_kernels_and_with_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 31, 64, 100, 128, 200, 256])
def test_the_triangular_factor_is_that_of_torch(chunk, dtype):
    torch.manual_seed(0)
    units = [chunk, 2 * chunk + 1]
    covariances = [ops.foreach_covariance([torch.randn(3 * u, u, dtype=dtype)], chunk=chunk)[0] for u in units]
    factors, info, used = ops.foreach_inverse(covariances, units=units, damping=0.1, chunk=chunk, triangular=True)
    assert not info.any() and torch.equal(used, torch.full_like(used, 0.1))
    for u, covariance, factor in zip(units, covariances, factors, strict=True):
        bounds = reference.chunk_bounds(u, chunk)
        for c, size in enumerate(b - a for a, b in itertools.pairwise(bounds)):
            damped = covariance[c, :size, :size].double() + 0.1 * torch.eye(size, dtype=torch.float64)
            want = torch.linalg.inv(torch.linalg.cholesky(damped))
            eps = torch.finfo(dtype).eps * float(torch.linalg.cond(damped))
            assert (factor[c, :size, :size] - want).abs().max() <= 50 * eps * want.abs().max()
            assert torch.equal(factor[c], factor[c].tril()) and not factor[c, size:].any()


@pytest.mark.parametrize("shape", [(7, 40), (33, 200), (10, 24, 3, 3), (50, 300), (5, 129), (16, 257)], ids=str)
@pytest.mark.parametrize("chunk", [8, 64, 100, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_any_matrix_multiplies_from_the_right(shape, chunk, bias, strided):
    torch.manual_seed(0)
    grad = torch.randn(shape, dtype=torch.float64)
    grad = grad.mT.contiguous().mT if strided else grad
    column = torch.randn(shape[0], dtype=torch.float64) if bias else None
    units = shape[1] + bias
    bounds, order = reference.chunk_bounds(units, chunk), reference.division(units, chunk, 1)
    matrices = torch.zeros(len(bounds) - 1, chunk, chunk, dtype=torch.float64)
    whole = torch.zeros(units, units, dtype=torch.float64)
    for c, matrix in enumerate(matrices):
        index = order[bounds[c] : bounds[c + 1]]
        matrix[: len(index), : len(index)] = torch.randn(len(index), len(index))
        whole[index[:, None], index] = matrix[: len(index), : len(index)]
    taps = grad.flatten(2).transpose(1, 2) if grad.dim() > 2 else grad[:, None]
    if bias:
        taps = torch.cat([taps, column[:, None, None].expand(-1, taps.shape[1], 1)], 2)
    want = taps @ whole
    info = torch.zeros(len(matrices), dtype=torch.int32)
    ops.foreach_apply_([grad], [matrices], info, bias_grads=[column], chunk=chunk, group=1, triangular=True)
    got = grad.flatten(2).transpose(1, 2) if grad.dim() > 2 else grad[:, None]
    torch.testing.assert_close(got, want[..., : shape[1]], rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(column, want[..., -1].mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 40), (10, 24, 3, 3), (9, 130)], ids=str)
def test_a_lower_triangular_matrix_multiplies_from_the_right(shape, dtype):
    """What all devices have kernels for: L^-1 from a covariance, and a product with it or with L."""
    torch.manual_seed(0)
    wide, chunk, units = torch.float64 if dtype == torch.float64 else torch.float32, 64, shape[1] + 1
    bounds, order = reference.chunk_bounds(units, chunk), reference.division(units, chunk, 8)
    covariances = ops.foreach_covariance([torch.randn(300, shape[1], dtype=wide)], chunk=chunk, bias=[True], group=8)
    (factor,), info, _ = ops.foreach_inverse(covariances, units=[units], damping=0.1, chunk=chunk, triangular=True)
    assert not info.any() and not factor.triu(1).any()
    whole = torch.zeros(units, units, dtype=torch.float64)
    for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
        damped = covariances[0][c, : end - begin, : end - begin].double()
        damped.diagonal().add_(0.1)
        want = torch.linalg.inv(torch.linalg.cholesky(damped))
        error = (factor[c, : end - begin, : end - begin] - want).abs().max() / want.abs().max()
        assert error <= (1e-12 if dtype == torch.float64 else 1e-5)
        whole[order[begin:end][:, None], order[begin:end]] = factor[c, : end - begin, : end - begin].double()
    grad, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    rows = grad.double().flatten(2).transpose(1, 2) if grad.dim() > 2 else grad.double()[:, None]
    want = torch.cat([rows, bias.double()[:, None, None].expand(-1, rows.shape[1], 1)], 2) @ whole
    layers = Layers([0], [0], [8], chunk, 0, 0)
    foreach_multiply_([grad], [bias], [factor], info, layers)
    got = grad.double().flatten(2).transpose(1, 2) if grad.dim() > 2 else grad.double()[:, None]
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    assert (got - want[..., :-1]).abs().max() <= bound * want.abs().max()
    assert (bias.double() - want[..., -1].mean(1)).abs().max() <= bound * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 40, 128])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_native_operators_compute_what_torchs_operations_compute(dtype, chunk, decay):
    """Linear and convolution, with and without a bias, a transposed weight, and a layer without rows."""
    torch.manual_seed(0)
    shapes, biased = [(7, 40), (10, 24, 3, 3), (33, 200), (5, 9)], [0, 1]
    grads = [torch.randn(s) for s in shapes]
    grads[2] = grads[2].T.contiguous().T
    units = [s[1] + (i in biased) for i, s in enumerate(shapes)]
    inputs = [torch.randn(50, s[1]) for s in shapes]
    counts = [torch.tensor([n]) for n in (50, 30, 50, 0)]
    averages = [torch.zeros(-(-u // chunk), chunk, chunk) for u in units] if decay else []
    weights = [torch.zeros(1) for _ in averages]
    rest = biased, [3, 1, 2, 0], [min(8, chunk)] * 4, 0.1, True, decay, chunk, 4096, 5, 0

    def cast(tensors, kind):
        return [torch.empty_strided(t.shape, t.stride(), dtype=kind).copy_(t) for t in tensors]

    def run(space, kind, wide):
        g, b = cast(grads, kind), cast([grad.flatten(1)[:, 0] * 3 for grad in grads[:2]], kind)
        a, w = cast(averages, wide), cast(weights, wide)
        factors = [torch.zeros(-(-u // chunk), chunk, chunk, dtype=wide) for u in units]
        info, _, flags = space.foreach_whiten_(g, b, cast(inputs, kind), counts, a, w, factors, *rest)
        before = cast([torch.randn(s, generator=torch.Generator().manual_seed(9)) for s in shapes], kind)
        before[2] = cast([before[2].T.contiguous().T], kind)[0]
        after = [x + y for x, y in zip(before, g, strict=True)]
        biases = [torch.zeros_like(x) for x in b]
        moved = [x + y for x, y in zip(biases, b, strict=True)]
        place = rest[:3]
        space.foreach_unwhiten_(after, moved, before, biases, factors, info, flags, *place, True, True, chunk, 5, 0)
        return [*g, *b, *a, *w, *after, *moved], info, flags

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got, info, flags = run(torch.ops.consistency_ops, dtype, wide)
    want, info_too, flags_too = run(torch.ops.consistency_ops_torch, dtype, wide)
    assert torch.equal(info, info_too) and torch.equal(flags, flags_too)
    assert info[-1] and not info[0]  # no rows: given up
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y.double()).abs().max() <= bound * max(1.0, float(y.double().abs().max()))


@pytest.mark.parametrize("shape", [(7, 40), (10, 24, 3, 3), (33, 200)], ids=str)
@pytest.mark.parametrize("chunk", [16, 40, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_the_operators_are_those_of_the_reference(shape, chunk, bias, keep_norm):
    torch.manual_seed(0)
    units = shape[1] + bias
    covariance = torch.randn(units, 2 * units, dtype=torch.float64)
    covariance = covariance @ covariance.T / units
    bounds, options = reference.chunk_bounds(units, chunk), dict(chunk=chunk, group=4, seed=3, layer=2)
    order, stored = reference.division(units, chunk, 4, 3, 0, 2), torch.zeros(len(bounds) - 1, chunk, chunk).double()
    for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
        index = order[begin:end]
        stored[c, : end - begin, : end - begin] = covariance[index][:, index]
    want = reference.whitening_factors(covariance, **options)
    (factors,), info, _ = ops.foreach_inverse(
        [stored], units=[units], damping=0.1, scaling="trace", chunk=chunk, triangular=True
    )
    for c, factor in enumerate(want):
        torch.testing.assert_close(factors[c, : len(factor), : len(factor)], factor, rtol=1e-9, atol=1e-11)

    grad, step = torch.randn(2, *shape, dtype=torch.float64)
    column, step_of_bias = torch.randn(2, shape[0], dtype=torch.float64) if bias else (None, None)
    whitened = reference.multiply_by_chunks(grad, column, [factor.T for factor in want], **options)
    native, place = torch.ops.consistency_ops, ([0] if bias else [], [2], [4])
    got, got_bias = grad.clone(), [] if column is None else [column.clone()]
    assert native.foreach_whiten_by_([got], got_bias, [factors], info, *place, chunk, 3, 0).tolist() == [1]
    torch.testing.assert_close(got, whitened[0], rtol=1e-9, atol=1e-11)

    before, after = grad, grad + step
    biases = (None, None) if column is None else (column + step_of_bias, column)
    moved = reference.unwhiten(after, before, *biases, want, keep_norm=keep_norm, **options)
    now, now_bias = after.clone(), [] if column is None else [biases[0].clone()]
    flags, old_bias = torch.ones(1, dtype=torch.int32), [] if column is None else [column]
    native.foreach_unwhiten_(
        [now], now_bias, [before], old_bias, [factors], info, flags, *place, keep_norm, True, chunk, 3, 0
    )
    torch.testing.assert_close(now, moved[0], rtol=1e-9, atol=1e-11)
    if bias:
        torch.testing.assert_close(got_bias[0], whitened[1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(now_bias[0], moved[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_torchs_own_operations_whiten_the_same(name):
    models = with_kernels_and_with_torch(lambda model: optimizer_of(name, model.parameters(), weight_decay=0.1), 3)
    same(*models, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_the_same_whatever_the_number_of_threads(threads):
    def go(count):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 30))
        optimizer = adamw(model)
        Preconditioner(model, optimizer, mode="whiten", every=2)
        x = torch.randn(64, 300)
        gradients = [torch.randn_like(p) for p in model.parameters()]
        torch.set_num_threads(count)
        for _ in range(3):
            model(x)
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return model

    same(go(threads), go(1))
