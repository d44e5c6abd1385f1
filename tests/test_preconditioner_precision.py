"""Mixed precision: autocast, gradient scaling with skipped steps, bfloat16 parameters; statistics stay in float32."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.preconditioner import Preconditioner
from support.training import DAMPING, assert_equal, data, dense, mlp, scaled_step, train


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, compiled):
    """Each layer is corrected with what it saw: the first with float32 rows, the second with half precision ones."""
    torch._dynamo.reset()
    model, (x, y) = mlp(widths=(12, 20, 5)), data()
    pre = Preconditioner(model, damping=DAMPING, scaling="absolute", chunk=256)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(forward(x), y)
    loss.backward()
    with torch.autocast("cpu", dtype):
        seen = model[1](model[0](x)).detach()
    assert seen.dtype == dtype
    expected = [dense(m.weight.grad[:, :, None], m.bias.grad, r) for m, r in ((model[0], x), (model[2], seen.float()))]
    pre.step()
    for layer, (weight, bias) in zip((model[0], model[2]), expected, strict=True):
        torch.testing.assert_close(layer.weight.grad.double(), weight[:, :, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad.double(), bias, rtol=1e-4, atol=1e-5)
    assert [layer.capture.rows.dtype for layer in pre._layers] == [torch.float32, dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, dict(decay=0.9), dict(every=3)], ids=str)
def test_training_under_autocast_follows_float32(dtype, options):
    losses = []
    for enabled in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        pre = Preconditioner(model, optimizer, chunk=8, **options)
        x, y = data(200)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        assert pre.stats()["failed_chunks"] == 0
        losses.append(loss.item())
    first = F.cross_entropy(mlp()(x), y).item()
    assert abs(losses[1] - losses[0]) < 0.1 * (first - losses[0])


@pytest.mark.parametrize("options", [{}, dict(decay=0.9), dict(every=2), dict(decay=0.9, every=2)], ids=str)
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(options):
    """Rows, averages, schedule and counter are as if it had not been, also where it held Inf."""
    models = mlp(), mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    pres = [Preconditioner(m, o, chunk=8, **options) for m, o in zip(models, optimizers, strict=True)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step in range(6):
        if step in (0, 3, 4):
            x, y = data(seed=70 + step)
            scaled_step(models[0], optimizers[0], scaler, torch.where(x > 2, math.inf, x), y, poison=True)
        scaled_step(models[0], optimizers[0], scaler, *data(seed=step))
    train(models[1], optimizers[1], 6)
    assert pres[0].steps == pres[1].steps == 6
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    states = [pre.state_dict()["layers"] for pre in pres]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        assert states[0][name]["division"].equal(states[1][name]["division"])
        for key in states[0][name].keys() - {"division"}:
            torch.testing.assert_close(states[0][name][key], states[1][name][key], rtol=1e-3, atol=1e-4)


def test_bfloat16_parameters_have_float32_statistics():
    """512 equal rows and one large one: a sum in bfloat16 would stop growing at 256."""
    layer = nn.Linear(6, 4, bias=False).bfloat16()
    pre = Preconditioner(layer, damping=0.1, scaling="absolute", decay=0.5, chunk=256)
    x = torch.ones(513, 6, dtype=torch.bfloat16)
    x[-1] = torch.arange(6)
    layer(x).float().square().sum().backward()
    pre.step()
    state = pre.state_dict()["layers"][""]
    assert state["covariance"].dtype == state["weight"].dtype == torch.float32
    second_moment = x.double().T @ x.double() / 513
    units = state["covariance"].shape[-1]
    covariance = (state["covariance"] / state["weight"])[0, :6, :6].double()
    assert units >= 6
    torch.testing.assert_close(covariance.diagonal().sort()[0], second_moment.diagonal().sort()[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, dict(decay=0.9), dict(every=2)], ids=str)
def test_pure_bfloat16_training(options):
    """The corrected gradient is the float32 one, rounded once; training goes down and resumes to the bit."""
    model = mlp().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Preconditioner(model, optimizer, chunk=8, **options)
    x, y = data(50)
    x = x.bfloat16()

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0] and model[0].weight.grad.dtype == torch.bfloat16
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rest = [step(model, optimizer) for _ in range(3)]
    other = mlp(seed=1).bfloat16()
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    Preconditioner(other, again, chunk=8, **options)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [step(other, again) for _ in range(3)] == rest
    assert_equal(model.parameters(), other.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_float32_master_weights_over_a_bfloat16_model(compiled):
    """The optimizer holds copies of the weights: the model's own are corrected by an explicit step()."""
    torch._dynamo.reset()
    model = mlp().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1.0)
    pre = Preconditioner(model)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    losses = []
    x, y = data(50)
    for _ in range(10):
        model.zero_grad()
        loss = F.cross_entropy(forward(x.bfloat16()).float(), y)
        loss.backward()
        pre.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and pre.stats()["layers"] == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_float32_are_kept_in_bfloat16_on_request(compiled):
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model, rows_dtype=torch.bfloat16)
    assert "rows_dtype=torch.bfloat16" in repr(pre)
    forward = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    F.cross_entropy(forward(x), y).backward()
    rows = [layer.capture.rows for layer in pre._layers]
    assert all(buffer.dtype == torch.bfloat16 for buffer in rows)
    assert torch.equal(rows[0][: len(x)], x.bfloat16())
    first = model[0]
    want = co.precondition(
        first.weight.grad, x.bfloat16(), bias_grad=first.bias.grad, damping=0.1, scaling="trace", max_rows=4096
    )
    pre.step()
    assert torch.equal(first.weight.grad, want[0]) and torch.equal(first.bias.grad, want[1])


def test_only_rows_of_float32_are_rounded():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model.double(), rows_dtype=torch.bfloat16)
    F.cross_entropy(model(x.double()), y).backward()
    assert all(layer.capture.rows.dtype == torch.float64 for layer in pre._layers)
    pre.remove()

    pre = Preconditioner(model.float(), rows_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        model(x).sum().backward()
    dtypes = [layer.capture.rows.dtype for layer in pre._layers]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float16]  # the first sees x before autocast does
    F.cross_entropy(model(x), y).backward()  # a layer that has seen both types has float32, and all rows
    dtypes = [layer.capture.rows.dtype for layer in pre._layers]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(pre._layers[0].capture.rows[: 2 * len(x)], x.bfloat16().repeat(2, 1))


def test_only_bfloat16_is_a_type_to_round_to():
    for dtype in (torch.float16, torch.float32, "bfloat16", torch.zeros(2)):
        with pytest.raises(ValueError, match="Preconditioner: rows_dtype must be None or torch.bfloat16, got"):
            Preconditioner(mlp(), rows_dtype=dtype)
