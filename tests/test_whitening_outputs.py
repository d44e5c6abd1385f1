"""``mode="whiten", outputs=True``: whitened coordinates of the outputs as well as of the inputs."""

import copy
import math

import pytest
import torch
from torch import nn

from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp
from support.whitening import (
    CPU_OPTIMIZERS,
    adamw,
    makes_the_optimizers_own_steps,
    optimizer_of,
    resumes_bitwise,
    same,
    steps_of,
    train_all_kinds_of_layers,
    whitening,
    with_kernels_and_with_torch,
)


def inverse_times(lower, matrix):
    return torch.linalg.solve_triangular(lower, matrix, upper=False)


def by_hand(matrix, x, damping=0.1):
    """Whitened gradient, and L and K, of a gradient (outputs, units) and input rows with a unit for the bias."""
    right = whitening(x.T @ x / len(x), damping)
    half = inverse_times(right, matrix.T).T
    left = whitening(half @ half.T / half.shape[1], damping)
    return inverse_times(left, half), right, left


def mapped(displacement, right, left):
    half = torch.linalg.solve_triangular(left.T, displacement, upper=True)  # K^-T D
    return torch.linalg.solve_triangular(right, half, upper=False, left=False)  # ... L^-1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("keep_norm", [True, False])
def test_one_step_by_hand(name, bias, keep_norm):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=bias).double(), torch.randn(50, 12, dtype=torch.float64)
    decay = 0.1 if name == "AdamW" else 0.0
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=decay)
    Preconditioner(layer, optimizer, mode="whiten", outputs=True, keep_norm=keep_norm)
    before = torch.cat([p.detach().view(7, -1) for p in layer.parameters()], 1)
    layer(x).square().sum().backward()
    grad = torch.cat([p.grad.view(7, -1) for p in layer.parameters()], 1)
    optimizer.step()

    rows = torch.cat([x, torch.ones(50, 1)], 1) if bias else x
    white, right, left = by_hand(grad, rows)
    twin = nn.Parameter(before.clone())
    twin.grad = white
    optimizer_of(name, [twin], weight_decay=decay).step()
    decayed = before * (1 - 0.01 * decay)
    displacement = twin.detach() - decayed
    move = mapped(displacement, right, left)
    if name == "SGD":  # the whole inverses on either side
        damped = (right @ right.T, left @ left.T)
        want = -0.01 * torch.linalg.inv(damped[1]) @ grad @ torch.linalg.inv(damped[0])
        torch.testing.assert_close(move, want, rtol=1e-9, atol=1e-12)
    elif keep_norm:
        move = move * displacement.norm() / move.norm()
    after = torch.cat([p.detach().view(7, -1) for p in layer.parameters()], 1)
    torch.testing.assert_close(after, decayed + move, rtol=1e-8, atol=1e-11)


def test_the_taps_of_a_kernel_are_columns_of_their_own():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 4, 3, bias=False).double(), torch.randn(6, 5, 7, 7, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    Preconditioner(layer, optimizer, mode="whiten", outputs=True)
    before = layer.weight.detach().clone()
    layer(x).square().sum().backward()
    taps = layer.weight.grad.permute(0, 2, 3, 1).clone()  # (outputs, 3, 3, inputs)
    optimizer.step()
    pixels = x.movedim(1, -1).reshape(-1, 5)
    right = whitening(pixels.T @ pixels / len(pixels), 0.1)
    half = (taps @ torch.linalg.inv(right).T).reshape(4, -1)
    left = whitening(half @ half.T / half.shape[1], 0.1)
    inner = torch.linalg.inv(left @ left.T) @ (taps @ torch.linalg.inv(right @ right.T)).reshape(4, -1)
    want = before - 0.01 * inner.view(4, 3, 3, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
def test_coupled_weight_decay_acts_on_the_weight(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=bias).double(), torch.randn(50, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=0.3)
    Preconditioner(layer, optimizer, mode="whiten", outputs=True)
    before = torch.cat([p.detach().view(7, -1) for p in layer.parameters()], 1)
    layer(x).square().sum().backward()
    grad = torch.cat([p.grad.view(7, -1) for p in layer.parameters()], 1)
    optimizer.step()
    _, right, left = by_hand(grad, torch.cat([x, torch.ones(50, 1)], 1) if bias else x)
    inner = torch.linalg.inv(left @ left.T) @ grad @ torch.linalg.inv(right @ right.T)
    after = torch.cat([p.detach().view(7, -1) for p in layer.parameters()], 1)
    torch.testing.assert_close(after, before - 0.01 * (inner + 0.3 * before), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
def test_without_a_gradient_the_optimizer_makes_its_own_step_bit_for_bit(name):
    decay = {} if name == "Rprop" else dict(weight_decay=0.1)  # Rprop has none
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False), torch.randn(50, 12)
    plain = copy.deepcopy(layer)
    optimizer, twin = (optimizer_of(name, m.parameters(), **decay) for m in (layer, plain))
    Preconditioner(layer, optimizer, mode="whiten", outputs=True, chunk=4)
    makes_the_optimizers_own_steps(layer, plain, optimizer, twin, x)


def test_other_coordinates_of_the_outputs_change_nothing():
    """Without damping, one chunk, the norm free: what reads a layer's outputs through R trains R W as W.

    Its gradient is that of W times R^-T.
    """
    torch.manual_seed(0)
    x, y = torch.randn(60, 10, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    mix = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4, dtype=torch.float64)
    first = nn.Linear(10, 4, bias=False).double()
    second, start = copy.deepcopy(first), first.weight.detach().clone()
    second.weight.data = mix @ first.weight.data
    options = dict(damping=0.0, scaling="absolute", decay=0.0, keep_norm=False)
    for layer, read in ((first, lambda out: out), (second, lambda out: out @ torch.linalg.inv(mix).T)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        Preconditioner(layer, optimizer, mode="whiten", outputs=True, **options)
        for _ in range(5):
            optimizer.zero_grad()
            (read(layer(x)) - y).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(mix @ first.weight, second.weight, rtol=1e-7, atol=1e-8)
    assert float((first.weight.detach() - start).norm()) > 1e-3


@pytest.mark.parametrize("options", [{}, dict(every=3), dict(decay=0.0), dict(decay=0.0, every=2)], ids=str)
@pytest.mark.parametrize("at", [2, 25])
def test_resume_is_bitwise(options, at):
    resumes_bitwise(at, outputs=True, **options)


def test_a_step_that_is_broken_off_does_not_count_in_the_averages():
    model, plain = mlp(), mlp()
    optimizer, twin = adamw(model), adamw(plain)
    pres = [Preconditioner(m, o, mode="whiten", outputs=True, chunk=8) for m, o in ((model, optimizer), (plain, twin))]

    def refuse(*_):
        raise RuntimeError("broken off")

    for seed in range(3):
        if seed == 1:
            handle = optimizer.register_step_pre_hook(refuse)  # called after ours
            backward(model, *data(seed=seed))
            with pytest.raises(RuntimeError, match="broken off"):
                optimizer.step()
            handle.remove()
        for m, o in ((model, optimizer), (plain, twin)):
            o.zero_grad()
            backward(m, *data(seed=seed))
            o.step()
    same(model, plain)
    stored, want = (pre.state_dict()["layers"] for pre in pres)
    for name in want:
        assert torch.equal(stored[name]["output_covariance"], want[name]["output_covariance"])
        assert float(stored[name]["output_weight"]) == pytest.approx(1 - 0.95**3)


@pytest.mark.parametrize("coupled", [False, True])
def test_torchs_own_operations_compute_the_same(coupled):
    kind = torch.optim.Adam if coupled else torch.optim.AdamW
    models = with_kernels_and_with_torch(
        lambda model: kind(model.parameters(), lr=0.01, weight_decay=0.3), 24, outputs=True, every=2
    )
    same(*models, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
@pytest.mark.parametrize("chunk", [4, None])
def test_all_kinds_of_layers_train(name, chunk):
    assert train_all_kinds_of_layers(name, 24, outputs=True, chunk=chunk)["failed_chunks"] == 0


def test_weights_in_bfloat16_and_a_bias_that_is_frozen_later_train():
    model = mlp().bfloat16()
    optimizer = adamw(model)
    Preconditioner(model, optimizer, mode="whiten", outputs=True, chunk=8)
    losses = []
    for step in range(30):
        if step == 10:
            model[0].bias.requires_grad_(False)
        optimizer.zero_grad()
        losses.append(backward(model, data()[0].bfloat16(), data()[1]).item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_stays_out_of_the_average():
    model = mlp()
    optimizer = adamw(model)
    pre = Preconditioner(model, optimizer, mode="whiten", outputs=True, chunk=8)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, *data(seed=step))
        if step == 1:
            kept = copy.deepcopy(pre.state_dict())
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        if step == 1:
            break
    for key in ("output_covariance", "output_weight"):
        now, before = (state["layers"]["0"][key] for state in (pre.state_dict(), kept))
        assert torch.equal(now, before) and now.isfinite().all()


def test_the_step_keeps_the_norm_that_the_optimizer_gave_it():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(50, 64) * torch.linspace(0.1, 3, 64)
    optimizer = adamw(layer, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten", outputs=True, chunk=16)
    before = [p.detach().clone() for p in layer.parameters()]
    (layer(x) * torch.linspace(0.1, 3, 48)).square().sum().backward()
    optimizer.step()
    moved = sum(float((p.detach() - b).square().sum()) for p, b in zip(layer.parameters(), before, strict=True))
    assert math.sqrt(moved) == pytest.approx(0.01 * math.sqrt(48 * 65), rel=1e-3)  # Adam's first: lr in every entry


def test_it_is_named_and_refused_where_it_means_nothing():
    model = mlp()
    optimizer = adamw(model)
    pre = steps_of(model, optimizer, 1, outputs=True)
    assert "outputs=True" in repr(pre) and "every" not in repr(pre)
    assert "a sixth to eighteen times" in pre.summary().splitlines()[-1]
    with pytest.raises(ValueError, match="outputs must be False without mode='whiten', got True"):
        Preconditioner(mlp(), adamw(mlp()), outputs=True)
    with pytest.raises(ValueError, match="outputs must be True or False, got 1"):
        Preconditioner(mlp(), adamw(mlp()), mode="whiten", outputs=1)
