"""``mode="whiten"``: the mathematics, as a float64 computation says."""

import copy
import math

import pytest
import torch
from torch import nn

from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp
from support.whitening import (
    CPU_OPTIMIZERS,
    makes_the_optimizers_own_steps,
    optimizer_of,
    same,
    whitening,
    with_kernels_and_with_torch,
)


@pytest.mark.parametrize("chunk", [8, 64])
def test_for_sgd_it_is_the_correction(chunk):
    """G L^-T, a step of the rate, and L^-1: the step along G A^-1 with the running average A."""
    models = [mlp().double(), mlp().double()]
    for model, mode in zip(models, ("correct", "whiten"), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
        Preconditioner(model, optimizer, mode=mode, decay=0.95, chunk=chunk)
        for step in range(4):
            x, y = data(seed=step)
            optimizer.zero_grad()
            backward(model, x.double(), y)
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("options", [{}, dict(keep_norm=False)], ids=str)
def test_one_step_by_hand(name, options):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).double(), torch.randn(50, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=0.1)
    Preconditioner(layer, optimizer, mode="whiten", chunk=12, **options)
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()

    lower = whitening(x.T @ x / len(x), 0.1)
    before = plain.weight.detach().clone()
    twin = optimizer_of(name, plain.parameters(), weight_decay=0.1)
    plain.weight.grad = torch.linalg.solve_triangular(lower, grad.T, upper=False).T  # G L^-T
    twin.step()
    decayed = before * (1 - 0.01 * 0.1)
    displacement = plain.weight.detach() - decayed
    mapped = torch.linalg.solve_triangular(lower, displacement, upper=False, left=False)  # D L^-1
    want = decayed + (mapped if options else mapped * displacement.norm() / mapped.norm())
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_coupled_weight_decay_acts_on_the_weight(name):
    """Seen by the optimizer as decay W L, which maps back to decay W; for SGD exactly the plain decay."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).double(), torch.randn(50, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=0.3)
    Preconditioner(layer, optimizer, mode="whiten", chunk=12)
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()

    lower, before = whitening(x.T @ x / len(x), 0.1), plain.weight.detach().clone()
    twin = optimizer_of(name, plain.parameters(), weight_decay=0.0)
    plain.weight.grad = torch.linalg.solve_triangular(lower, grad.T, upper=False).T + 0.3 * before @ lower
    twin.step()
    displacement = plain.weight.detach() - before
    mapped = torch.linalg.solve_triangular(lower, displacement, upper=False, left=False)
    if name == "SGD":
        torch.testing.assert_close(
            mapped, -0.01 * (grad @ torch.linalg.inv(lower @ lower.T) + 0.3 * before), rtol=1e-9, atol=1e-12
        )
    else:
        mapped *= displacement.norm() / mapped.norm()
    torch.testing.assert_close(layer.weight.detach(), before + mapped, rtol=1e-9, atol=1e-12)


class Orthogonal(torch.optim.Optimizer):
    """Muon in float64 and exactly: momentum, then the nearest matrix with orthonormal rows."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                left, _, right = torch.linalg.svd(momentum, full_matrices=False)
                p.sub_(group["lr"] * left @ right)


@pytest.mark.parametrize(
    ("kind", "options", "mixed"),
    [
        (torch.optim.SGD, dict(momentum=0.9), True),
        (Orthogonal, {}, True),
        # Adam looks at single entries, so a rotation of the whitened coordinates is not the same to it; a scale is.
        (torch.optim.AdamW, dict(weight_decay=0.0, eps=0.0), False),
    ],
    ids=["SGD", "Muon", "AdamW"],
)
def test_other_coordinates_of_the_inputs_change_nothing(kind, options, mixed):
    """Without damping, one chunk, the norm free: weights W R^-1 on inputs R x train as W on x.

    ``R`` is any invertible matrix, or any scales of the units.
    """
    torch.manual_seed(0)
    x, y = torch.randn(60, 10, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    if mixed:
        mix = torch.randn(10, 10, dtype=torch.float64) + 3 * torch.eye(10, dtype=torch.float64)
    else:
        mix = torch.logspace(-2, 2, 10, dtype=torch.float64).diag()
    first = nn.Linear(10, 4, bias=False).double()
    second = copy.deepcopy(first)
    start = first.weight.detach().clone()
    with torch.no_grad():
        second.weight.copy_(first.weight @ torch.linalg.inv(mix))
    for layer, inputs in ((first, x), (second, x @ mix.T)):
        optimizer = kind(layer.parameters(), lr=0.1, **options)
        Preconditioner(
            layer, optimizer, mode="whiten", damping=0.0, scaling="absolute", chunk=10, decay=0.0, keep_norm=False
        )
        for _ in range(5):
            optimizer.zero_grad()
            (layer(inputs) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(second.weight @ mix, first.weight, rtol=1e-8, atol=1e-9)
    assert float((first.weight - start).norm()) > 0.1


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, dict(foreach=True), dict(foreach=False), dict(fused=True)], ids=str)
def test_without_a_gradient_the_optimizer_makes_its_own_step_bit_for_bit(name, options):
    decay = {} if name == "Rprop" else dict(weight_decay=0.1)  # Rprop has none
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False), torch.randn(50, 12)
    plain = copy.deepcopy(layer)
    try:
        optimizer, twin = (optimizer_of(name, m.parameters(), **decay, **options) for m in (layer, plain))
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"{name} does not take {options}: {error}")
    Preconditioner(layer, optimizer, mode="whiten", chunk=8)
    makes_the_optimizers_own_steps(layer, plain, optimizer, twin, x)


@pytest.mark.parametrize("damping", [0.1, 1.0])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_how_long_a_step_is(keep_norm, damping):
    """As long as the optimizer's if its norm is kept; else up to ``damping ** -0.5`` times as long."""
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 9), torch.randn(50, 40) * torch.logspace(-2, 1, 40)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten", chunk=16, keep_norm=keep_norm, damping=damping)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(x).square().sum().backward()
    optimizer.step()
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(layer.parameters(), before, strict=True))
    )
    plain = 0.01 * math.sqrt(9 * 41)  # Adam's first step: lr in every entry
    if keep_norm:
        assert moved == pytest.approx(plain, rel=1e-3)
    else:
        assert 0.5 * plain * damping**-0.5 < moved < plain * damping**-0.5


def test_a_bias_in_a_group_of_its_own_has_its_own_decay():
    """The bias has no weight decay: without a learning rate of its own nothing but the weight may shrink."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7).double(), torch.randn(50, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.fill_(100.0)
    plain = copy.deepcopy(layer)

    def groups(model):
        return [dict(params=[model.weight], weight_decay=0.5), dict(params=[model.bias], weight_decay=0.0)]

    optimizer = torch.optim.AdamW(groups(layer), lr=0.01)
    Preconditioner(layer, optimizer, mode="whiten", chunk=16)
    layer(x).square().sum().backward()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.step()
    moved = [layer.weight.detach() - before[0] * (1 - 0.01 * 0.5), layer.bias.detach() - before[1]]
    length = math.sqrt(sum(float(m.square().sum()) for m in moved))
    assert length == pytest.approx(0.01 * math.sqrt(7 * 13), rel=1e-3)  # Adam's first step: lr in every entry
    assert not torch.equal(plain.bias, layer.bias)


@pytest.mark.parametrize("coupled", ["SGD", "Adam"])
def test_coupled_decay_with_stored_factors(coupled):
    """Every second step uses the factor of the step before, and its L."""
    models = with_kernels_and_with_torch(
        lambda model: optimizer_of(coupled, model.parameters(), weight_decay=0.3), 4, decay=0.0, every=2
    )
    same(*models, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_a_chunk_that_is_given_up_takes_the_optimizers_own_direction(keep_norm):
    """Its units are neither whitened nor mapped; a norm that is kept is that of the whole layer's step."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 5, bias=False), torch.randn(50, 32)
    plain, before, x[0, 3] = copy.deepcopy(layer), layer.weight.detach().clone(), math.inf
    optimizer, twin = (torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.0) for m in (layer, plain))
    pre = Preconditioner(layer, optimizer, mode="whiten", chunk=8, group=1, decay=0.0, keep_norm=keep_norm)
    layer(x)
    for model in (layer, plain):
        model.weight.grad = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    twin.step()
    assert pre.stats()["failed_chunks"] == 1 and layer.weight.isfinite().all()
    ratio = (layer.weight - before) / (plain.weight - before)
    same = (ratio / ratio[0, 3] - 1).abs().amax(0) < 1e-3
    assert same[3] and same.sum() == 8
    assert keep_norm or float(ratio[0, 3]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="both"), "mode must be None, 'correct' or 'whiten', got 'both'"),
        (dict(mode="whiten", optimizer=None), "optimizer must be given with mode='whiten', got None"),
    ],
)
def test_arguments(options, message):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        Preconditioner(model, options.pop("optimizer", optimizer), **options)
