"""Random orthogonal additive networks: orthogonal filters, and Jacobians within their certified bounds at any depth."""

import math

import pytest
import torch
from torch import nn

from consistency_ops.nn import ROARNN, OrthogonalFilter, ROAFeedForward, roa_jacobian_bounds
from consistency_ops.nn.orthogonal import FILTERS

# Rounding: of the bounds' logarithms, and of a float64 product over 5000 layers.
SLACK = 1e-9


@pytest.mark.parametrize("features", [1, 2, 7, 64, 100, 257, 1024])
@pytest.mark.parametrize("kind", FILTERS)
def test_filters_are_orthogonal(kind, features):
    filter = OrthogonalFilter(features, kind, dtype=torch.float64)
    matrix = filter.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(features, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(3, 2, features, dtype=torch.float64)
    torch.testing.assert_close(filter(x), x @ matrix.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in FILTERS if kind != "identity"])
def test_filters_are_not_the_identity_and_mix(kind):
    matrix = OrthogonalFilter(64, kind).matrix()
    assert (matrix - torch.eye(64).double()).norm() > 1
    touched = (matrix.abs() > 1e-9).sum(1)
    assert (touched == (1 if kind in ("permutation", "shift") else 64)).all()


@pytest.mark.parametrize("kind", FILTERS)
def test_filter_derivatives(kind):
    filter = OrthogonalFilter(12, kind, reflections=3, dtype=torch.float64)
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(filter, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(filter, (x,))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(filter)(x.detach()[0]), filter.matrix(), rtol=1e-12, atol=1e-12)


def test_filters_are_random_reproducible_and_saved():
    for kind in ("permutation", "householder", "hadamard", "dense"):
        one, two = (OrthogonalFilter(32, kind, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        other = OrthogonalFilter(32, kind)
        assert torch.equal(one.matrix(), two.matrix()) and not torch.equal(one.matrix(), other.matrix())
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.matrix(), other.matrix())
        assert not list(one.parameters())


def jacobian_of(function, x):
    """Jacobian at the vector x of a function of rows, from autograd: every row of a batch asks for one output."""
    rows = x.repeat(len(x), 1).requires_grad_()
    return torch.autograd.grad(function(rows), rows, torch.eye(len(x), dtype=x.dtype))[0]


@pytest.mark.parametrize("activation", ["tanh", "modulus"])
@pytest.mark.parametrize("depth", [50, 500, 5000])
def test_jacobian_is_within_its_bounds_at_any_depth(depth, activation):
    width = 8
    model = ROAFeedForward(5, width, 3, depth, activation=activation, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.normal_(0.0, 0.7 / math.sqrt(width))
            layer.bias.normal_()
    bounds = model.jacobian_bounds()
    # c = 1 and norms of about 1.1: the bounds hardly depend on the depth.
    assert -4 < bounds.log_lower < bounds.log_upper < 1
    sigma = torch.linalg.svdvals(jacobian_of(model.hidden, torch.randn(width, dtype=torch.float64)))
    assert bounds.log_lower - SLACK <= math.log(sigma[-1]) and math.log(sigma[0]) <= bounds.log_upper + SLACK

    x = torch.randn(16, width, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(16, width, dtype=torch.float64)
    (first,) = torch.autograd.grad(model.hidden(x), x, residual)
    ratio = (first.norm(dim=1) / residual.norm(dim=1)).log()
    assert bounds.log_lower - SLACK <= ratio.min() and ratio.max() <= bounds.log_upper + SLACK

    # The gradient of the plain network with the same weights dies.
    y = x
    for layer in model.layers:
        y = model.phi(layer(y))
    (plain,) = torch.autograd.grad(y, x, residual)
    assert plain.norm() < math.exp(bounds.log_lower - 5) * residual.norm()


def test_bounds_are_attained():
    """W = O and phi = id: every factor is alpha + beta; with W = -O it is alpha - beta."""
    model = ROAFeedForward(4, 6, 2, 30, activation="identity", filter="dense", dtype=torch.float64)
    for sign in (1, -1):
        with torch.no_grad():
            for layer, filter in zip(model.layers, model.filters, strict=True):
                layer.weight.copy_(sign * filter.weight)
        bounds = model.jacobian_bounds()
        sigma = torch.linalg.svdvals(jacobian_of(model.hidden, torch.randn(6, dtype=torch.float64))).log()
        expected = bounds.log_upper if sign > 0 else bounds.log_lower
        torch.testing.assert_close(sigma, torch.full_like(sigma, expected), rtol=0, atol=1e-10)


def test_bounds_of_degenerate_weights():
    assert roa_jacobian_bounds(0.9, 0.1, []) == (0.0, 0.0)
    assert roa_jacobian_bounds(0.9, 0.1, [9.5]).log_lower == -math.inf
    assert roa_jacobian_bounds(0.5, 0.5, [2.0], slope=0.25) == (math.log(0.25), math.log(0.75))
    with pytest.raises(ValueError, match="roa_jacobian_bounds: alpha, beta, slope and weight_norms must be at least 0"):
        roa_jacobian_bounds(0.9, -0.1, [1.0])


def test_shared_filter_and_given_weights():
    model = ROAFeedForward(4, 6, 2, 5, beta=0.25, alpha=0.9, shared_filter=True, filter="householder")
    assert len(model.filters) == 1 and (model.alpha, model.beta) == (0.9, 0.25)
    x = torch.randn(3, 6)
    expected = x
    for layer in model.layers:
        expected = 0.9 * expected @ model.filters[0].matrix().float().T + 0.25 * torch.tanh(layer(expected))
    torch.testing.assert_close(model.hidden(x), expected)
    assert model(torch.randn(7, 3, 4)).shape == (7, 3, 2)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_network_is_its_formula(filter, batch_first):
    rnn = ROARNN(3, 6, beta=0.3, filter=filter, batch_first=batch_first, dtype=torch.float64)
    u, h_0 = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    h, states = h_0, []
    for step in u:
        drive = step @ rnn.input.weight.T + h @ rnn.recurrent.weight.T + rnn.input.bias
        h = 0.7 * h @ rnn.filter.matrix().T + 0.3 * torch.tanh(drive)
        states.append(h)
    expected = torch.stack(states, 1 if batch_first else 0)
    outputs, last = rnn(u.transpose(0, 1) if batch_first else u, h_0)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, h, rtol=1e-12, atol=1e-12)
    zeros = torch.zeros(2, 6, dtype=torch.float64)
    torch.testing.assert_close(rnn(u)[1], rnn(u, zeros[:4] if not batch_first else torch.zeros(4, 6).double())[1])


@pytest.mark.parametrize("steps", [50, 500, 5000])
def test_recurrent_jacobian_is_within_its_bounds(steps):
    width = 8
    rnn = ROARNN(2, width, beta=1 / steps, dtype=torch.float64)
    u = torch.randn(steps, 1, 2, dtype=torch.float64).expand(-1, width, -1)
    jacobian = jacobian_of(lambda h: rnn(u, h)[1], torch.randn(width).double())
    sigma = torch.linalg.svdvals(jacobian)
    bounds = rnn.jacobian_bounds(steps)
    assert -4 < bounds.log_lower < bounds.log_upper < 1
    assert bounds.log_lower - SLACK <= math.log(sigma[-1]) and math.log(sigma[0]) <= bounds.log_upper + SLACK


def test_works_with_the_preconditioner_and_torch_transforms():
    import consistency_ops as co

    model = ROAFeedForward(6, 16, 3, 4, filter="hadamard")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = co.Preconditioner(model, optimizer)
    nn.functional.cross_entropy(model(torch.randn(32, 6)), torch.randint(3, (32,))).backward()
    optimizer.step()
    assert pre.stats()["layers"] == 6

    rnn = ROARNN(3, 16, beta=0.1)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    pre = co.Preconditioner(rnn, optimizer)
    rnn(torch.randn(10, 8, 3))[1].square().mean().backward()
    optimizer.step()
    assert pre.stats()["layers"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrthogonalFilter(0), "OrthogonalFilter: features must be at least 1, got 0"),
        (lambda: OrthogonalFilter(4, "random"), "OrthogonalFilter: kind must be one of permutation, .*, got 'random'"),
        (lambda: OrthogonalFilter(4, reflections=0), "reflections must be at least 1, got 0"),
        (lambda: OrthogonalFilter(4)(torch.ones(2, 5)), r"x must be \(..., 4\), got \(2, 5\)"),
        (lambda: ROAFeedForward(4, 4, 4, 0), "ROAFeedForward: num_layers must be at least 1, got 0"),
        (lambda: ROAFeedForward(4, 4, 4, 2, beta=0), "ROAFeedForward: beta must be positive and finite, got 0"),
        (lambda: ROAFeedForward(4, 4, 4, 2, beta=2.0), "beta must be at most 1 where alpha is not given, got 2.0"),
        (lambda: ROARNN(4, 4, alpha=-0.5), "ROARNN: alpha must be at least 0 and finite, got -0.5"),
        (lambda: ROARNN(4, 4, activation="gelu"), "ROARNN: activation must be one of modulus, .*, got 'gelu'"),
        (lambda: ROARNN(4, 4, checkpoint=-1), "ROARNN: checkpoint must be at least 0, got -1"),
        (lambda: ROAFeedForward(4, 4, 4, 2, checkpoint=-1), "ROAFeedForward: checkpoint must be at least 0, got -1"),
        (
            lambda: ROARNN(4, 4)(torch.ones(4)),
            r"ROARNN: u must be \(T, N, input_size\), or \(T, input_size\) without a",
        ),
        (lambda: ROARNN(4, 4)(torch.ones(2, 5)), "without a batch, with input_size 4, got \\(2, 5\\)"),
        (lambda: ROARNN(4, 5)(torch.ones(2, 4), torch.ones(1, 5)), r"ROARNN: h_0 must be \(5,\), got \(1, 5\)"),
        (lambda: ROARNN(4, 5)(torch.ones(2, 3, 4), torch.ones(5)), r"ROARNN: h_0 must be \(3, 5\), got \(5,\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
