"""``mode="whiten"`` in a training loop, and what a user may combine it with."""

import math

import pytest
import torch
from torch import nn

from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp
from support.whitening import adamw, same, steps_of, train_all_kinds_of_layers, trains_in_bfloat16


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_all_kinds_of_layers_train(name):
    stats = train_all_kinds_of_layers(name, 8)
    assert stats["failed_chunks"] == 0 and stats["layers"] == (1 if name == "Muon" else 4)


@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True), dict(capturable=True)], ids=str)
def test_all_implementations_of_an_optimizer_step_alike(options):
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0], foreach=False), 3)
    try:
        steps_of(models[1], adamw(models[1], **options), 3)
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"not on the CPU: {error}")
    same(*models, rtol=1e-4, atol=1e-5)


def test_a_rate_in_a_tensor():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    steps_of(models[1], adamw(models[1], lr=torch.tensor(0.01), fused=True), 3)
    same(*models, rtol=1e-4, atol=1e-5)


def test_transposed_convolutions_in_groups_train():
    """Their matrix is a copy of the weight, which the step must read again."""
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(8, 6, 3, groups=2), torch.randn(4, 8, 5, 5)
    optimizer = adamw(layer, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten")
    before = layer.weight.detach().clone()
    layer(x).square().mean().backward()
    optimizer.step()
    entries = layer.weight.numel() + layer.bias.numel()
    length = (layer.weight - before).detach().norm()
    assert 0.3 * 0.01 * math.sqrt(layer.weight.numel()) < float(length) <= 0.0101 * math.sqrt(entries)


def test_a_step_that_the_scaler_skips_leaves_nothing():
    model, plain = mlp(), mlp()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(data(seed=step)[0]), data(seed=step)[1])).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    twin = adamw(plain)
    pre_twin = Preconditioner(plain, twin, mode="whiten", chunk=8)
    for step in (0, 2):
        twin.zero_grad()
        backward(plain, *data(seed=step))
        twin.step()
    assert pre.steps == pre_twin.steps == 2
    same(model, plain, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_stays_out_of_the_average():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    backward(model, *data())
    model[2].weight.grad[0, 0] = math.inf
    optimizer.step()
    weights = {name: float(state["weight"]) for name, state in pre.state_dict()["layers"].items()}
    assert weights["0"] == pytest.approx(0.05) and weights["2"] == 0


def test_micro_batches_count_as_one_batch():
    models, (x, y) = [mlp().double(), mlp().double()], data(n=40)
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = adamw(model)
        Preconditioner(model, optimizer, mode="whiten", chunk=8)
        for _ in range(2):
            optimizer.zero_grad()
            for rows, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                backward(model, rows, labels, 1 / parts)
            optimizer.step()
    same(*models, rtol=1e-8, atol=1e-10)


def test_a_closure():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    optimizer = adamw(models[1])
    Preconditioner(models[1], optimizer, mode="whiten", chunk=8)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(models[1], *data(seed=step))

        optimizer.step(closure)
    same(*models)


def test_autocast_in_bfloat16_trains():
    model = mlp()
    optimizer = adamw(model)
    Preconditioner(model, optimizer, mode="whiten", chunk=8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(data()[0]), data()[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_weights_in_bfloat16_train():
    trains_in_bfloat16(mlp(), 20)


def test_two_optimizers_over_one_model():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    both = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    pre = Preconditioner(model, both, mode="whiten", chunk=8)
    losses = []
    for _ in range(20):
        for optimizer in both:
            optimizer.zero_grad()
        losses.append(backward(model, *data()).item())
        for optimizer in both:
            optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and pre.stats()["layers"] == 3


def test_weights_that_are_replaced_or_converted_between_steps():
    model = mlp()
    optimizer = adamw(model)
    steps_of(model, optimizer, 3)
    for p in model.parameters():
        p.data = p.data.clone()
    for step in range(3):
        if step == 1:
            model.double()
            for state in optimizer.state.values():
                state.update({k: v.double() for k, v in state.items() if k.startswith("exp_avg")})
        dtype = model[0].weight.dtype
        optimizer.zero_grad()
        x, y = data(seed=step)
        backward(model, x.to(dtype), y)
        before = model[0].weight.detach().clone()
        optimizer.step()
        moved = (model[0].weight - before).norm()
        assert 0.3 * 0.01 * math.sqrt(before.numel()) < float(moved) < 3 * 0.01 * math.sqrt(before.numel())


def test_during_the_step_one_copy_of_the_weights_is_kept_in_their_dtype():
    model = mlp().bfloat16()
    optimizer = adamw(model)
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    kept = []

    def look(*_):
        (whitened,) = pre._attachments[0].correction._whitened
        kept.append(sum(t.numel() * t.element_size() for t in (*whitened.weights, *whitened.biases)))

    optimizer.register_step_pre_hook(look)
    backward(model, data()[0].bfloat16(), data()[1])
    optimizer.step()
    assert kept == [sum(p.numel() * 2 for p in model.parameters())]
    assert not pre._attachments[0].correction._whitened


def test_a_compiled_model_trains_as_in_eager_mode():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    optimizer = adamw(models[1])
    Preconditioner(models[1], optimizer, mode="whiten", chunk=8)
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    for step in range(3):
        optimizer.zero_grad()
        backward(compiled, *data(seed=step))
        optimizer.step()
    same(*models, rtol=1e-5, atol=1e-6)
