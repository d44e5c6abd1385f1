"""``mode="whiten"``: the optimizer works in whitened coordinates of the inputs, as a float64 computation says."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops import ops, reference
from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp

CPU_OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": dict(momentum=0.9),
    "Muon": {},
}


def optimizer_of(name, parameters, **options):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)
    return kind(parameters, **{"lr": 0.01, **CPU_OPTIMIZERS[name], **options})


def whitening(covariance, damping, scaling="trace"):
    """L with L L^T = A / tau + damping I."""
    tau = float(covariance.diagonal().mean()) if scaling == "trace" else 1.0
    return torch.linalg.cholesky(covariance / tau + damping * torch.eye(len(covariance), dtype=covariance.dtype))


# The stages


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


# The mathematics


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
def test_one_step_by_hand(name):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).double(), torch.randn(50, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=0.1)
    Preconditioner(layer, optimizer, mode="whiten", chunk=12)
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
    want = decayed + mapped * displacement.norm() / mapped.norm()
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


def test_other_coordinates_of_the_inputs_change_nothing():
    """Without damping, one chunk, the norm free (SGD): weights W R^-1 on inputs R x train as W on x."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 10, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    mix = torch.randn(10, 10, dtype=torch.float64) + 3 * torch.eye(10, dtype=torch.float64)
    first = nn.Linear(10, 4, bias=False).double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.weight.copy_(first.weight @ torch.linalg.inv(mix))
    for layer, inputs in ((first, x), (second, x @ mix.T)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        Preconditioner(layer, optimizer, mode="whiten", damping=0.0, scaling="absolute", chunk=10, decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(inputs) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(second.weight @ mix, first.weight, rtol=1e-8, atol=1e-10)


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
    for _ in range(3):
        layer(x)
        for model in (layer, plain):
            model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        twin.step()
        assert torch.equal(layer.weight, plain.weight)


def test_the_step_keeps_the_norm_that_the_optimizer_gave_it():
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 9), torch.randn(50, 40) * torch.logspace(-2, 1, 40)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten", chunk=16)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(x).square().sum().backward()
    optimizer.step()
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(layer.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.01 * math.sqrt(9 * 41), rel=1e-3)  # Adam's first step: lr in every entry


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_torchs_own_operations_whiten_the_same(name):
    models, options = [mlp().double(), mlp().double()], dict(weight_decay=0.1)
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        co.set_backend(backend)
        try:
            optimizer = optimizer_of(name, model.parameters(), **options)
            Preconditioner(model, optimizer, mode="whiten", chunk=8)
            for step in range(3):
                x, y = data(seed=step)
                optimizer.zero_grad()
                backward(model, x.double(), y)
                optimizer.step()
        finally:
            co.set_backend("auto")
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# In a training


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_all_kinds_of_layers_train(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)),
    )
    x, y = torch.randn(64, 3, 10, 10), torch.randint(5, (64,))
    weights = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else list(model.parameters())
    optimizer = optimizer_of(name, weights)
    pre = Preconditioner(model, optimizer, mode="whiten")
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    assert pre.stats()["failed_chunks"] == 0 and pre.stats()["layers"] == (1 if name == "Muon" else 4)


@pytest.mark.parametrize("options", [{}, dict(every=3), dict(decay=0.0), dict(decay=0.0, every=2)], ids=str)
@pytest.mark.parametrize("at", [2, 25])
def test_resume_is_bitwise(options, at):
    def start():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return model, optimizer, Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)

    def go(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(model, *data(seed=step))
            optimizer.step()

    model, optimizer, _ = start()
    go(model, optimizer, 0, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, at, at + 4)
    again, other, pre = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert pre.steps == at
    go(again, other, at, at + 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_state_of_the_other_mode_is_dropped_with_a_word(caplog):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    Preconditioner(model, optimizer, mode="correct", decay=0.9, every=2, chunk=8)
    backward(model, *data())
    optimizer.step()
    other = mlp()
    twin = torch.optim.AdamW(other.parameters())
    pre = Preconditioner(other, twin, mode="whiten", every=2, chunk=8)
    twin.load_state_dict(optimizer.state_dict())
    assert "saved with another" in caplog.text and pre.state_dict()["layers"] == {}


def test_a_chunk_that_is_given_up_takes_the_optimizers_own_direction():
    """Its units are neither whitened nor mapped; the norm of the whole layer's step is kept."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 5, bias=False), torch.randn(50, 32)
    plain, before, x[0, 3] = copy.deepcopy(layer), layer.weight.detach().clone(), math.inf
    optimizer, twin = (torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.0) for m in (layer, plain))
    pre = Preconditioner(layer, optimizer, mode="whiten", chunk=8, group=1, decay=0.0)
    layer(x)
    for model in (layer, plain):
        model.weight.grad = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    twin.step()
    assert pre.stats()["failed_chunks"] == 1 and layer.weight.isfinite().all()
    ratio = (layer.weight - before) / (plain.weight - before)
    same = (ratio / ratio[0, 3] - 1).abs().amax(0) < 1e-3
    assert same[3] and same.sum() == 8


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
