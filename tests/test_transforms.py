"""Modulus and batch RMS norm under every transform that torch has, against the plain-torch reference."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

import consistency_ops as co
from consistency_ops import reference

D64, C128 = torch.float64, torch.complex128


def rms_norm(function):
    """Evaluation with fixed statistics of four channels, in dimension 1."""
    running, count = torch.tensor([0.5, 1.0, 0.1, 2.0], dtype=D64), torch.tensor([3])
    return lambda x: function(x, running, training=False, num_batches=count)


# name: (ours, reference, shape, dtype)
CASES = {
    "modulus": (co.modulus, reference.modulus, (3, 4, 5), D64),
    "complex modulus": (co.modulus, reference.modulus, (3, 4, 5), C128),
    "rms norm": (rms_norm(co.batch_rms_norm), rms_norm(reference.batch_rms_norm), (3, 4, 5), D64),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "permuted": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
}
both = pytest.mark.parametrize("case", CASES)
real = pytest.mark.parametrize("case", ["modulus", "rms norm"])


def sample(case, batch=()):
    ours, expected, shape, dtype = CASES[case]
    return ours, expected, torch.randn(*batch, *shape, dtype=dtype)


def scalar(function):
    """A scalar whose second derivative is not zero."""
    return lambda x: (function(x) ** 3 + function(x).sin()).sum()


def same(transformed, ours, expected, *arguments):
    torch.testing.assert_close(transformed(ours)(*arguments), transformed(expected)(*arguments))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(case, layout):
    ours, _, x = sample(case)
    x = LAYOUTS[layout](x).detach().requires_grad_()
    assert gradcheck(
        ours, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=case != "complex modulus"
    )


@both
def test_compiled_autograd_of_an_eager_forward(case):
    ours, expected, x = sample(case)
    x = x.requires_grad_()
    (wanted,) = torch.autograd.grad((expected(x) ** 2).sum(), x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        (ours(x) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, wanted)


@both
def test_gradgradcheck(case):
    ours, _, x = sample(case)
    assert gradgradcheck(ours, (x.requires_grad_(),), check_fwd_over_rev=True, check_rev_over_rev=True)


@both
def test_forward_mode(case):
    ours, expected, x = sample(case)
    tangent = torch.randn_like(x)
    results = []
    for function in (ours, expected):
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))))
    assert results[0].tangent is not None
    torch.testing.assert_close(results[0].tangent, results[1].tangent)


@real
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(scalar(f)),
        lambda f: grad(lambda x: grad(scalar(f))(x).square().sum()),
        lambda f: jacrev(f),
        lambda f: jacfwd(f),
        lambda f: hessian(scalar(f)),
        lambda f: jacfwd(jacrev(f)),
        lambda f: jacrev(lambda x: f(x.transpose(0, 2)).transpose(0, 2)),
        lambda f: lambda x: jvp(f, (x,), (x.cos(),)),
        lambda f: lambda x: vjp(f, x)[1](x.cos()),
        lambda f: lambda x: linearize(f, x)[1](x.cos()),
        lambda f: lambda x: jvp(lambda y: vjp(f, y)[1](y.cos())[0], (x,), (x.sin(),)),
    ],
    ids=["grad", "grad2", "jacrev", "jacfwd", "hessian", "fwd-rev", "jacrev-t", "jvp", "vjp", "linearize", "jvp-vjp"],
)
def test_func(case, transform):
    ours, expected, x = sample(case)
    same(transform, ours, expected, x)


@both
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_vmap(case, dim):
    ours, expected, x = sample(case, (6,))
    x = x.movedim(0, dim).contiguous()
    same(lambda f: vmap(f, in_dims=dim, out_dims=dim), ours, expected, x)


@real
def test_per_sample_gradients(case):
    ours, expected, x = sample(case, (6,))
    same(lambda f: vmap(grad(scalar(f))), ours, expected, x)
    same(lambda f: vmap(jacrev(f), in_dims=1), ours, expected, x.movedim(0, 1))
    same(lambda f: vmap(lambda y: jvp(f, (y,), (y.cos(),))), ours, expected, x)


@both
def test_nested_vmap(case):
    ours, expected, x = sample(case, (2, 3))
    same(lambda f: vmap(vmap(f)), ours, expected, x)
    same(lambda f: vmap(vmap(f, in_dims=2), in_dims=-1), ours, expected, x.movedim((0, 1), (-1, 2)))


def test_nested_vmap_of_gradients_keeps_bits_apart():
    """With samples of three elements, the bits of every sample start a new byte."""
    x = torch.randn(4, 5, 3, dtype=D64)
    same(lambda f: vmap(vmap(grad(scalar(f)))), co.modulus, reference.modulus, x)
    same(lambda f: vmap(vmap(hessian(scalar(f)))), co.modulus, reference.modulus, x)


@both
def test_batched_gradients_of_one_forward_pass(case):
    ours, expected, x = sample(case)
    results = []
    for function in (ours, expected):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        grads = torch.randn(7, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        results.append(torch.autograd.grad(y, leaf, grads, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


def test_ensemble_with_batched_statistics():
    """vmap over models in training: every model has its own statistics, updated in place."""
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), co.nn.Modulus(), co.nn.BatchRMSNorm(4)) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(10, 3)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(x))
        torch.testing.assert_close(buffers["2.running_ms"][i], model[2].running_ms)
        assert buffers["2.num_batches"][i].item() == 1
    # Statistics batched in another dimension, input not batched; then both.
    for x_dim in (None, 0):
        x = torch.randn(10, 4) if x_dim is None else torch.randn(2, 10, 4)
        running = torch.rand(4, 2).t().contiguous().t()
        expected = running.clone()
        out = vmap(lambda v, y: co.batch_rms_norm(y, v, training=True), in_dims=(1, x_dim))(running, x)
        for i in range(2):
            statistics = expected[:, i].contiguous()
            y = co.batch_rms_norm(x if x_dim is None else x[i], statistics, training=True)
            torch.testing.assert_close(out[i], y)
            torch.testing.assert_close(running[:, i], statistics)


def test_shared_statistics_under_vmap_are_refused():
    with pytest.raises(RuntimeError, match="batch_rms_norm: under vmap, training updates running_ms"):
        vmap(lambda x: co.batch_rms_norm(x, torch.zeros(4), training=True))(torch.randn(2, 3, 4))


def test_training_under_grad_updates_statistics_and_holds_the_denominator():
    x, running, count = torch.randn(5, 4, dtype=D64), torch.zeros(4, dtype=D64), torch.tensor([0])
    result = grad(lambda y: co.batch_rms_norm(y, running, training=True, num_batches=count).square().sum())(x)
    assert count.item() == 1
    y = co.batch_rms_norm(x, running, training=False, num_batches=count)
    torch.testing.assert_close(result, 2 * co.batch_rms_norm(y, running, training=False, num_batches=count))


def test_forward_mode_in_training_holds_the_denominator():
    x, running = torch.randn(5, 4, dtype=D64), torch.zeros(4, dtype=D64)
    y, tangent = jvp(lambda z: co.batch_rms_norm(z, running, training=True), (x,), (x,))
    torch.testing.assert_close(tangent, y)


@real
def test_the_two_homes_of_the_derivative_agree(case):
    """Autograd functions in eager mode; formulas registered on the operators for the compiler."""
    operators = torch.ops.consistency_ops
    running = torch.rand(4, dtype=D64)
    denominator = operators.batch_rms_norm_denominator(running, None, D64, 0.1, 1e-2)
    pairs = {
        "modulus": [
            (co.modulus, lambda x: operators.modulus_forward(x)[0]),
            (co.modulus, operators.modulus),
        ],
        "rms norm": [
            (
                lambda x: co.batch_rms_norm(x, running, training=False),
                lambda x: operators.batch_rms_norm_divide(x, denominator),
            )
        ],
    }
    x = CASES[case][2]
    for eager, registered in pairs[case]:
        results = []
        for function in (eager, registered):
            leaf = torch.linspace(-1, 1, 60, dtype=D64).view(x).requires_grad_()
            y = function(leaf)
            (first,) = torch.autograd.grad(y.sin().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.cos().sum(), leaf)
            results.append((y.detach(), first.detach(), second))
        torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


def test_the_two_homes_of_the_complex_derivative_agree():
    operators = torch.ops.consistency_ops
    x = torch.randn(4, 5, dtype=C128)
    x[0, 0] = 0
    incoming = torch.randn(4, 5, dtype=D64)
    results = []
    for function in (co.modulus, operators.modulus):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf, incoming)[0])
    torch.testing.assert_close(*results)
    x = torch.randn(4, 5, dtype=C128, requires_grad=True)
    assert gradcheck(operators.modulus_complex_backward, (incoming.requires_grad_(), x))


@real
def test_checkpointing_and_hooks(case):
    ours, _, x = sample(case)
    x.requires_grad_()
    seen = []
    y = ours(x)
    y.register_hook(lambda g: seen.append(g.shape))
    y.sum().backward(retain_graph=True)
    once = x.grad.clone()
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert len(seen) == 2
    x.grad = None
    torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, once)
