"""co.linalg against torch.linalg in float64: values, shapes, derivatives, transforms, bad input."""

import ctypes
import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import consistency_ops as co
from consistency_ops import linalg
from consistency_ops.ops.library import library

DTYPES = (torch.float32, torch.float64)
SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 128, 129, 200, 255, 256)


# torch's own batched inv and solve, which these tests compare with, fail now and then on two threads of MKL.
pytestmark = pytest.mark.usefixtures("one_thread")


def spd(*shape, dtype=torch.float64, condition=100.0, seed=0):
    """Random matrices of a given condition number, largest eigenvalue 1."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[-1]
    q = torch.linalg.qr(torch.randn(*shape, n, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


def lower(a):
    """With NaN above the diagonal, which nobody may read."""
    return torch.where(torch.ones_like(a).tril().bool(), a, torch.nan)


def residual_ratio(a, x, b):
    """LAPACK's ratio of a solve: |B - A X| / (|A| |X| eps)."""
    eps = torch.finfo(x.dtype).eps
    a, x, b = a.double(), x.double(), b.double()
    norm = lambda m: m.abs().sum(-2).amax(-1)  # noqa: E731
    return float((norm(b - a @ x) / (norm(a) * norm(x) * eps)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 33])
def test_small_batches(n, dtype):
    """Also on every other kind of kernels: see AGAIN of support/kernels.py."""
    a, b = spd(3, n, dtype=dtype), torch.randn(3, n, 5, dtype=dtype)
    inverse, info = linalg.spd_inverse_ex(lower(a))
    exact = torch.linalg.inv(a.double())
    eps = torch.finfo(dtype).eps
    assert (inverse - exact).abs().max() <= 100 * n * eps * exact.abs().max()
    assert torch.equal(inverse, inverse.mT) and inverse.is_contiguous()
    assert info.dtype == torch.int32 and info.tolist() == [0, 0, 0]
    x, info = linalg.spd_solve_ex(lower(a), b)
    assert residual_ratio(a, x, b) <= 3 and info.tolist() == [0, 0, 0] and x.is_contiguous()
    several = torch.randn(3, n, 67, dtype=dtype)  # several blocks of right-hand sides, the last not full
    x = linalg.spd_solve(a, several)
    assert residual_ratio(a, x, several) <= 3
    assert torch.equal(linalg.spd_solve(a, several[..., 40:67])[..., :5], x[..., 40:45]), "columns do not meet"


@pytest.mark.parametrize("n", [40, 70])
def test_bad_matrices_leave_the_others_alone(n):
    good = spd(6, n, dtype=torch.float32)
    bad = good.clone()
    bad[1, 3, 3] = -1.0
    bad[2, n - 1, n - 1] = torch.nan
    bad[3, 20, 4] = torch.nan
    bad[4] = 0
    bad[5, n - 1, n - 1] = torch.inf
    b = torch.randn(6, n, 3)
    inverse, info = linalg.spd_inverse_ex(lower(bad))
    x, of_solve = linalg.spd_solve_ex(lower(bad), b)
    assert torch.equal(info, of_solve)
    assert info[0] == 0 and info[1] == 4 and info[2] == n and 4 < info[3] <= 21 and info[4] == 1 and info[5] == n
    assert inverse[1:].isnan().all() and x[1:].isnan().all()
    assert torch.equal(inverse[:1], linalg.spd_inverse(good[:1])) and torch.equal(
        x[:1], linalg.spd_solve(good[:1], b[:1])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_all_sizes(n, dtype):
    for condition, batch in ((10.0, (4,)), (1e6 if dtype == torch.float64 else 1e3, ())):
        a = spd(*batch, n, dtype=dtype, condition=condition)
        eps = torch.finfo(dtype).eps
        exact = torch.linalg.inv(a.double())
        inverse = linalg.spd_inverse(a)
        assert torch.linalg.matrix_norm(inverse.double() - exact).max() <= (
            50 * eps * condition * torch.linalg.matrix_norm(exact).max()
        )
        for k in (1, 16, 37):
            b = torch.randn(*batch, n, k, dtype=dtype)
            assert residual_ratio(a, linalg.spd_solve(a, b), b) <= 3


@pytest.mark.parametrize("n", [257, 300])
def test_larger_matrices_go_through_torch(n):
    a, b = spd(2, n), torch.randn(2, n, 3, dtype=torch.float64)
    assert torch.allclose(linalg.spd_inverse(lower(a)), torch.linalg.inv(a), rtol=1e-9)
    assert residual_ratio(a, linalg.spd_solve(lower(a), b), b) <= 3
    a[1, 5, 5] = -1
    inverse, info = linalg.spd_inverse_ex(a)
    assert info.tolist() == [0, 6] and inverse[1].isnan().all() and not inverse[0].isnan().any()


SHAPES = [  # of A, of B, left
    ((5, 5), (5,), True),
    ((5, 5), (5, 3), True),
    ((5, 5), (2, 5), False),
    ((2, 5, 5), (2, 5), True),
    ((2, 5, 5), (5,), True),
    ((2, 5, 5), (5, 3), True),
    ((5, 5), (4, 5, 3), True),
    ((5, 5), (4, 3, 5), False),
    ((2, 1, 5, 5), (3, 5, 2), True),
    ((3, 1, 2, 5, 5), (4, 1, 5, 2), True),
    ((1, 5, 5), (6, 5, 2), True),
    ((2, 3, 5, 5), (2, 3, 5), True),
    ((5, 5, 5), (5, 5), True),
    ((0, 5, 5), (0, 5, 2), True),
    ((0, 5, 5), (5, 2), True),
    ((2, 5, 5), (2, 5, 0), True),
    ((0, 0), (0, 3), True),
    ((3, 0, 0), (3, 0, 2), True),
    ((3, 0, 0), (3, 0), True),
    ((1, 1), (1,), True),
]


@pytest.mark.parametrize(("of_a", "of_b", "left"), SHAPES)
def test_shapes_are_those_of_torch(of_a, of_b, left):
    a = spd(*of_a[:-2], of_a[-1]) if math.prod(of_a) else torch.empty(of_a, dtype=torch.float64)
    b = torch.randn(of_b, dtype=torch.float64)
    want = torch.linalg.solve_ex(a, b, left=left)
    got = linalg.spd_solve_ex(a, b, left=left)
    assert got.result.shape == want.result.shape and got.info.shape == want.info.shape
    torch.testing.assert_close(got.result, want.result)
    torch.testing.assert_close(linalg.spd_solve(a, b, left=left), torch.linalg.solve(a, b, left=left))
    inverse = linalg.spd_inverse_ex(a)
    assert inverse.inverse.shape == torch.linalg.inv_ex(a).inverse.shape
    assert inverse.info.shape == torch.linalg.inv_ex(a).info.shape


def test_any_strides():
    a = spd(2, 3, 20, dtype=torch.float32)
    b = torch.randn(2, 3, 20, 7)
    inverse, x = linalg.spd_inverse(a), linalg.spd_solve(a, b)
    double = torch.stack([a, a], -1)[..., 0]
    for other in (a.mT.contiguous().mT, double, a.transpose(0, 1).contiguous().transpose(0, 1), a.flip(0).flip(0)):
        assert torch.equal(linalg.spd_inverse(other), inverse) and torch.equal(linalg.spd_solve(other, b), x)
    for right in (
        b.mT.contiguous().mT,
        torch.stack([b, b], -1)[..., 0],
        b.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(linalg.spd_solve(a, right), x)
    one = a[0, 0].expand(2, 3, 20, 20)
    assert torch.equal(linalg.spd_inverse(one)[1, 2], inverse[0, 0])
    assert torch.equal(linalg.spd_solve(one, b)[0, 0], x[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(dtype):
    a, b = spd(50, 70, dtype=dtype), torch.randn(50, 70, 33, dtype=dtype)
    wide = torch.randn(70, 2000, dtype=dtype)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append((linalg.spd_inverse(a), linalg.spd_solve(a, b), linalg.spd_solve(a[0], wide)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def symmetrised(function):
    return lambda a, *rest: function((a + a.mT) / 2, *rest)


GRADIENTS = [((4, 4), (4,)), ((2, 4, 4), (2, 4, 3)), ((3, 3), (2, 3, 2)), ((2, 1, 3, 3), (2, 3, 1)), ((1, 1), (1, 2))]


@pytest.mark.parametrize(("of_a", "of_b"), GRADIENTS)
def test_derivatives(of_a, of_b):
    a = spd(*of_a[:-2], of_a[-1], condition=5.0).requires_grad_()
    b = torch.randn(of_b, dtype=torch.float64, requires_grad=True)
    for left in (True, False) if len(of_b) > 1 and of_b[-1] == of_b[-2] else (True,):
        solve = symmetrised(lambda x, y, left=left: linalg.spd_solve(x, y, left=left))
        assert gradcheck(solve, (a, b), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(solve, (a, b), check_fwd_over_rev=True)
    inverse = symmetrised(linalg.spd_inverse)
    assert gradcheck(inverse, (a,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(inverse, (a,), check_fwd_over_rev=True)


def test_the_gradient_is_symmetric_and_that_of_cholesky():
    a, b = spd(2, 6), torch.randn(2, 6, 3, dtype=torch.float64)
    weight = torch.randn(2, 6, 3, dtype=torch.float64)

    def by_cholesky(x):
        return torch.cholesky_solve(b, torch.linalg.cholesky(x))

    for function, other in (
        (lambda x: linalg.spd_solve(x, b) * weight, lambda x: by_cholesky(x) * weight),
        (lambda x: (linalg.spd_inverse(x) @ b) * weight, lambda x: by_cholesky(x) * weight),
    ):
        x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
        function(x).sum().backward()
        other(y).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(x.grad, x.grad.mT)


def test_only_what_needs_a_gradient_gets_one():
    a, b = spd(4).requires_grad_(), torch.randn(4, 2, dtype=torch.float64)
    linalg.spd_solve(a, b).sum().backward()
    assert a.grad is not None
    c = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    result, info = linalg.spd_solve_ex(a.detach(), c)
    assert result.requires_grad and not info.requires_grad
    with torch.no_grad():
        assert not linalg.spd_inverse(a).requires_grad
    with torch.inference_mode():
        assert linalg.spd_inverse(a).is_inference()


def test_forward_mode_with_one_tangent():
    a, b = spd(4), torch.randn(4, 2, dtype=torch.float64)
    da, db = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    da = da + da.mT
    with forward_ad.dual_level():
        by_a = forward_ad.unpack_dual(linalg.spd_solve(forward_ad.make_dual(a, da), b)).tangent
        by_b = forward_ad.unpack_dual(linalg.spd_solve(a, forward_ad.make_dual(b, db))).tangent
    inverse = torch.linalg.inv(a)
    torch.testing.assert_close(by_a, -inverse @ da @ inverse @ b)
    torch.testing.assert_close(by_b, inverse @ db)


def test_transforms():
    a, b = spd(3, 4), torch.randn(3, 4, 2, dtype=torch.float64)
    want = torch.linalg.solve(a, b)
    torch.testing.assert_close(torch.vmap(linalg.spd_solve)(a, b), want)
    torch.testing.assert_close(torch.vmap(linalg.spd_inverse)(a), torch.linalg.inv(a))
    torch.testing.assert_close(torch.vmap(linalg.spd_inverse, in_dims=2)(a.movedim(0, 2)), torch.linalg.inv(a))
    torch.testing.assert_close(torch.vmap(linalg.spd_solve, in_dims=(None, 0))(a[0], b), torch.linalg.solve(a[0], b))
    torch.testing.assert_close(
        torch.vmap(linalg.spd_solve, in_dims=(0, None))(a, b[0]), torch.linalg.solve(a, b[0].expand_as(b))
    )
    outer = torch.vmap(torch.vmap(linalg.spd_solve, in_dims=(None, 0)), in_dims=(0, None))(a, b)
    assert outer.shape == (3, 3, 4, 2)
    torch.testing.assert_close(outer[1, 2], torch.linalg.solve(a[1], b[2]))

    def loss(x, y):
        return linalg.spd_solve(x, y).square().sum()

    def exact(x, y):
        return torch.linalg.solve((x + x.mT) / 2, y).square().sum()

    for argnums in (0, 1):
        got, wanted = (torch.func.grad(f, argnums)(a[0], b[0]) for f in (loss, exact))
        torch.testing.assert_close(got, wanted)
        got, wanted = (torch.func.hessian(f, argnums)(a[0], b[0]) for f in (loss, exact))
        torch.testing.assert_close(got, wanted)
    per_sample = torch.vmap(torch.func.grad(loss))(a, b)
    torch.testing.assert_close(per_sample[1], torch.func.grad(exact)(a[1], b[1]))
    with pytest.raises(torch.linalg.LinAlgError):
        torch.vmap(linalg.spd_inverse)(-a)


@pytest.mark.parametrize("n", [6, 260])
def test_compile_without_graph_breaks(n):
    a, b = spd(2, n, dtype=torch.float32, condition=3), torch.randn(2, n, 2)

    def step(x, y):
        return linalg.spd_solve(x, y, left=True).sum() + linalg.spd_inverse(x).square().sum()

    def with_info(x, y):
        return (*linalg.spd_solve_ex(x, y), *linalg.spd_inverse_ex(x))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        function(x, y).backward()
        grads.append((x.grad, y.grad))
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(torch.compile(with_info, fullgraph=True, backend="aot_eager")(a, b), with_info(a, b))
    with pytest.raises(torch.linalg.LinAlgError, match="leading minor of order 1"):
        compiled(-a, b)
    changing = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        changed = a[:1].expand(batch, n, n), b[:1].expand(batch, n, 2)
        torch.testing.assert_close(changing(*changed), step(*changed))

    def per_sample(x, y):
        return torch.vmap(torch.func.grad(lambda p, q: linalg.spd_solve_ex(p, q)[0].sum()))(x, y)

    torch.testing.assert_close(
        torch.compile(per_sample, fullgraph=True, backend="aot_eager")(a, b), per_sample(a, b), rtol=1e-4, atol=1e-5
    )


def test_inductor():
    a = spd(2, 6, dtype=torch.float32)
    compiled = torch.compile(lambda x: linalg.spd_inverse(x * 2) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(a), linalg.spd_inverse(a * 2) + 1)


def test_fake_and_meta_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        a, b = torch.empty(2, 3, 3), torch.empty(2, 3, 4)
        assert linalg.spd_solve(a, b).shape == (2, 3, 4) and linalg.spd_inverse_ex(a).info.shape == (2,)
    a = torch.empty(2, 3, 3, device="meta")
    assert linalg.spd_inverse(a).device.type == "meta"


def test_autocast_computes_in_float32():
    a = spd(3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inverse = linalg.spd_inverse(a.bfloat16())
        x = linalg.spd_solve(a.bfloat16(), torch.ones(3, 8, dtype=torch.bfloat16))
    assert inverse.dtype == x.dtype == torch.float32
    torch.testing.assert_close(inverse, linalg.spd_inverse(a.bfloat16().float()))


EYE = torch.eye(3)
WRONG = [
    (lambda f: f(EYE[0]), RuntimeError, "The input tensor A must have at least 2 dimensions"),
    (lambda f: f(torch.ones(2, 3)), RuntimeError, "must be batches of square matrices, but they are 2 by 3 matrices"),
    (lambda f: f(EYE.int()), RuntimeError, "Expected a floating point tensor as input. Got int32"),
    (lambda f: f(EYE.bool()), RuntimeError, "Expected a floating point tensor as input. Got bool"),
    (lambda f: f(EYE.half()), RuntimeError, "Low precision dtypes not supported. Got float16"),
    (lambda f: f(EYE.bfloat16()), RuntimeError, "Low precision dtypes not supported. Got bfloat16"),
    (lambda f: f(EYE + 0j), NotImplementedError, "A must be real, got complex64"),
    (lambda f: f(EYE.to_sparse()), NotImplementedError, "A must be a dense tensor"),
    (lambda f: f([[1.0]]), TypeError, "A must be a Tensor, got list"),
    (lambda f: f(None), TypeError, "A must be a Tensor, got NoneType"),
]
WRONG_SOLVE = [
    (lambda f: f(EYE, torch.tensor(1.0)), RuntimeError, "The input tensor B must have at least 2 dimensions"),
    (lambda f: f(EYE, torch.ones(4, 2)), RuntimeError, r"for the equation AX = B \(3x3 and 4x2\)"),
    (lambda f: f(EYE, torch.ones(4, 2), left=False), RuntimeError, r"for the equation XA = B \(3x3 and 4x2\)"),
    (lambda f: f(EYE, torch.ones(3), left=False), RuntimeError, r"for the equation XA = B \(3x3 and 3x1\)"),
    (lambda f: f(EYE, torch.ones(4)), RuntimeError, r"AX = B \(3x3 and 4x1\)"),
    (lambda f: f(EYE.expand(2, 3, 3), torch.ones(5, 3, 1)), RuntimeError, "broadcast|must match"),
    (lambda f: f(EYE.double(), torch.ones(3)), RuntimeError, "found A of type float64 and B of type float32 instead"),
    (lambda f: f(EYE, torch.ones(3, device="meta")), RuntimeError, "found A on cpu and B on meta instead"),
    (lambda f: f(EYE, 1.0), TypeError, "B must be a Tensor, got float"),
    (lambda f: f(EYE, torch.ones(3).int()), RuntimeError, "Got int32"),
    (lambda f: f(EYE, torch.ones(3), left=1), TypeError, "left must be a bool, got 1"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_matrices(number):
    call, error, words = WRONG[number]
    for name in ("spd_inverse", "spd_inverse_ex"):
        with pytest.raises(error, match=f"linalg.{name}: .*{words}"):
            call(getattr(linalg, name))
    for name in ("spd_solve", "spd_solve_ex"):
        with pytest.raises(error, match=f"linalg.{name}: .*{words}"):
            call(lambda a, name=name: getattr(linalg, name)(a, torch.ones(3)))


@pytest.mark.parametrize("number", range(len(WRONG_SOLVE)))
def test_wrong_right_hand_sides(number):
    call, error, words = WRONG_SOLVE[number]
    for name in ("spd_solve", "spd_solve_ex"):
        with pytest.raises(error, match=words):
            call(getattr(linalg, name))


def test_what_is_not_positive_definite_raises_as_cholesky_does():
    a = torch.eye(3).repeat(2, 2, 1, 1)
    a[1, 0, 1, 1] = -1
    want = None
    try:
        torch.linalg.cholesky(a)
    except torch.linalg.LinAlgError as error:
        want = str(error).partition(": ")[2]
    assert want.startswith("(Batch element 2)")
    calls = {
        "spd_inverse": lambda: linalg.spd_inverse(a),
        "spd_solve": lambda: linalg.spd_solve(a, torch.ones(2, 2, 3)),
        "spd_inverse_ex": lambda: linalg.spd_inverse_ex(a, check_errors=True),
        "spd_solve_ex": lambda: linalg.spd_solve_ex(a, torch.ones(2, 2, 3), check_errors=True),
    }
    for name, call in calls.items():
        with pytest.raises(torch.linalg.LinAlgError) as caught:
            call()
        assert str(caught.value) == f"linalg.{name}: {want}"
    with pytest.raises(torch.linalg.LinAlgError, match="linalg.spd_inverse: The factorization could not"):
        linalg.spd_inverse(a[1, 0])
    with pytest.raises(TypeError, match="check_errors must be a bool, got 1"):
        linalg.spd_inverse_ex(a, check_errors=1)
    with pytest.raises(TypeError, match="check_errors must be a bool, got None"):
        linalg.spd_solve_ex(a, a, check_errors=None)


def test_scales():
    """Neither large nor small matrices lose digits; what overflows is Inf, not an error."""
    a = spd(2, 40, dtype=torch.float32)
    for scale in (1e-30, 1e-10, 1e10, 1e30):
        torch.testing.assert_close(linalg.spd_inverse(a * scale) * scale, linalg.spd_inverse(a), rtol=1e-3, atol=1e-3)
    inverse, info = linalg.spd_inverse_ex(torch.full((1, 1), 1e-39))
    assert info == 0 and inverse.isinf().all()


def test_input_is_left_alone():
    a, b = spd(2, 20, dtype=torch.float32), torch.randn(2, 20, 3)
    before = a.clone(), b.clone()
    linalg.spd_solve(a, b)
    linalg.spd_inverse(a)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    library.co_cpu_isa.restype = ctypes.c_char_p
    before = library.co_cpu_isa()
    if library.co_set_cpu_isa(isa.encode()) != 0:
        pytest.skip(f"this machine has no {isa}")
    try:
        for dtype in DTYPES:
            a, b = spd(3, 70, dtype=dtype), torch.randn(3, 70, 20, dtype=dtype)
            assert residual_ratio(a, linalg.spd_solve(a, b), b) <= 3
            exact = torch.linalg.inv(a.double())
            error = (linalg.spd_inverse(a).double() - exact).abs().max()
            assert error <= 1e3 * torch.finfo(dtype).eps * exact.abs().max()
    finally:
        library.co_set_cpu_isa(before)


def test_the_public_names():
    assert set(linalg.__all__) == {name for name in vars(co.linalg) if name[0] != "_" and name != "ops"}
