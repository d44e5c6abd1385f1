"""The preconditioner in front of any optimizer: what it computes, schedules, clipping, scalers, closures."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops import reference
from consistency_ops.preconditioner import Preconditioner
from support.training import OPTIMIZERS, assert_equal, backward, data, gradients, mlp, parameters_of, scaled_step, train


def test_gradient_is_the_reference_one():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model, damping=0.2, scaling="trace", chunk=8, group=2, seed=5)
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().clone())) for m in model[::2]]
    for step in range(3):
        model.zero_grad()
        inputs.clear()
        backward(model, x, y)
        expected = [
            reference.precondition(
                layer.weight.grad.double(), seen.double(), damping=0.2, scaling="trace", chunk=8, group=2, seed=5,
                step=step, layer=i, bias_grad=layer.bias.grad.double(),
            )
            for i, (layer, seen) in enumerate(zip(model[::2], inputs, strict=True))
        ]  # fmt: skip
        pre.step()
        for layer, (weight, bias, _, _) in zip(model[::2], expected, strict=True):
            torch.testing.assert_close(layer.weight.grad.double(), weight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(layer.bias.grad.double(), bias, rtol=1e-4, atol=1e-6)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, dict(decay=0.9, every=2)], ids=["plain", "decay"])
def test_any_optimizer_receives_the_corrected_gradient(name, options):
    """The same as correcting by hand before each step; and its state survives a round trip."""
    attached, by_hand = mlp(), mlp()
    optimizer, other = OPTIMIZERS[name](attached.parameters()), OPTIMIZERS[name](by_hand.parameters())
    Preconditioner(attached, optimizer, seed=2, **options)
    manual = Preconditioner(by_hand, seed=2, **options)
    for step in range(5):
        for model in (attached, by_hand):
            model.zero_grad()
            backward(model, *data(seed=step))
        optimizer.step()
        manual.step()
        other.step()
    assert_equal(attached.parameters(), by_hand.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    train(attached, optimizer, 1)
    assert all(p.isfinite().all() for p in attached.parameters())


def test_it_helps():
    """On an ill-conditioned regression the corrected gradient is far ahead after the same steps at the same rate."""
    torch.manual_seed(0)
    x = torch.randn(500, 32) @ torch.diag(torch.logspace(0, -2, 32))
    y = x @ torch.randn(32, 4)
    losses = []
    for corrected in (False, True):
        model = nn.Linear(32, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        if corrected:
            Preconditioner(model, optimizer, damping=1e-3)
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.05 * losses[0]


def test_same_seed_same_training_and_other_seed_another():
    results = []
    for seed in (1, 1, 2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Preconditioner(model, optimizer, chunk=4, seed=seed)
        train(model, optimizer, 3)
        results.append(parameters_of(model))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


def test_learning_rate_schedule():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            train(model, optimizer, 1)
            schedule.step()
    assert pre.steps == 5 and pre.stats()["layers"] == 3


def test_correction_follows_clipping():
    a, b = mlp(), mlp()
    optimizer = torch.optim.SGD(a.parameters(), lr=1.0)
    Preconditioner(a, optimizer)
    pre = Preconditioner(b)
    for model in (a, b):
        backward(model, *data())
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    pre.step()
    assert_equal(gradients(a), gradients(b))


def test_damping_schedule():
    seen = []
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, damping=lambda step: seen.append(step) or 0.5 / (step + 1))
    train(model, optimizer, 3)
    assert seen == [0, 1, 2]
    assert pre.stats()["max_damping"] == pytest.approx(0.5 / 3)
    bad = Preconditioner(model, damping=lambda step: -1.0)
    backward(model, *data())
    with pytest.raises(ValueError, match="damping at step 0 must be a finite number >= 0, got -1.0"):
        bad.step()


def test_scaler_unscales_before_the_correction():
    a, b = mlp(), mlp()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b))
    Preconditioner(a, optimizer)
    Preconditioner(b, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaled_step(a, optimizer, scaler, *data(seed=step))
    train(b, plain, 3)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["zero_grad first", "forward first"])
def test_rows_of_a_skipped_step_are_dropped(order):
    """A step that the scaler skips must leave the next one as if it had never been."""
    a, b = mlp(), mlp()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b))
    pre, reference_pre = Preconditioner(a, optimizer, chunk=8), Preconditioner(b, plain, chunk=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data(seed=7)
    scaled_step(a, optimizer, scaler, x * 100, y, poison=True)
    assert pre.steps == 0 and int(pre._layers[0].capture.count) == 40
    for step in range(2):
        x, y = data(seed=step)
        if order == "zero_grad first":
            optimizer.zero_grad()
        loss = F.cross_entropy(a(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert pre.stats()["rows"] == {"0": 40, "2": 40, "4": 40}
    train(b, plain, 2)
    assert reference_pre.steps == pre.steps == 2
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_closure_is_wrapped():
    a, b = mlp(), mlp()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (a, b))
    Preconditioner(a, optimizer)
    Preconditioner(b, plain)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(a, *data(seed=step))

        loss = optimizer.step(closure) if step else optimizer.step(closure=closure)
        assert loss.item() == train(b, plain, 1, first=step)[0]
    assert_equal(a.parameters(), b.parameters())


def test_several_calls_of_the_closure_are_refused():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    model = mlp()
    optimizer = Twice(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer)
    with pytest.raises(
        RuntimeError, match="must call its closure once a step, got a second call by test_preconditioner.Twice"
    ):
        optimizer.step(lambda: backward(model, *data()))
    with pytest.raises(ValueError, match="optimizer must be one that evaluates the gradient once a step"):
        Preconditioner(mlp(), torch.optim.LBFGS(mlp().parameters()))
