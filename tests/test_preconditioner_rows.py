"""Which rows a step sees: accumulation, checkpointing, skipped steps, changed weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import assert_equal, backward, data, gradients, mlp

from consistency_ops.preconditioner import Preconditioner


def test_accumulated_micro_batches_equal_one_batch():
    a, b = mlp().double(), mlp().double()
    x, y = data(60)
    x = x.double()
    pre_a, pre_b = Preconditioner(a), Preconditioner(b)
    backward(a, x, y)
    for part, target in zip(x.split(20), y.split(20), strict=True):
        backward(b, part, target, scale=1 / 3)
    pre_a.step()
    pre_b.step()
    assert pre_a.stats()["rows"] == pre_b.stats()["rows"] == {"0": 60, "2": 60, "4": 60}
    for p, q in zip(gradients(a), gradients(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointing_counts_rows_once(reentrant, micro_batches):
    plain, inner = mlp(), mlp()
    model = Checkpointed(inner, reentrant)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    pres = [Preconditioner(m, o, chunk=8) for m, o in zip((plain, model), optimizers, strict=True)]
    for step in range(3):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            for micro in range(micro_batches):
                backward(m, *data(seed=10 * step + micro))
            optimizer.step()
        assert [list(p.stats()["rows"].values()) for p in pres] == [[40 * micro_batches] * 3] * 2
        assert_equal(plain.parameters(), inner.parameters())


def test_in_place_activation_does_not_change_the_rows():
    a = mlp()
    b = nn.Sequential(*(nn.ReLU(inplace=True) if isinstance(m, nn.ReLU) else m for m in mlp()))
    x, y = data()
    for model in (a, b):
        pre = Preconditioner(model)
        backward(model, x.clone(), y)
        pre.step()
    assert_equal(gradients(a), gradients(b))
    layer = nn.Linear(4, 3)
    pre = Preconditioner(layer)
    x = torch.randn(6, 4)
    before = x.clone()
    layer(x)
    x.zero_()
    assert torch.equal(pre.layers[0].capture.rows[:6], before)


@pytest.mark.parametrize("kind", ["no_grad", "inference", "eval", "frozen", "vmap", "func.grad", "sparse"])
def test_what_is_not_captured(kind):
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    first = pre.layers[0].capture
    if kind == "no_grad":
        with torch.no_grad():
            model(x)
    elif kind == "inference":
        with torch.inference_mode():
            model(x)
    elif kind == "eval":
        model.eval()(x)
    elif kind == "frozen":
        model[0].weight.requires_grad_(False)
        model(x)
    elif kind == "vmap":
        torch.vmap(model)(x)
    elif kind == "func.grad":
        weights = dict(model.named_parameters())
        torch.func.grad(lambda w: F.cross_entropy(torch.func.functional_call(model, w, (x,)), y))(weights)
    else:
        model[0](x.to_sparse())
    assert int(first.count) == 0


def test_rows_under_autocast_are_those_of_the_input():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    pre.step()
    assert pre.stats()["layers"] == 3 and torch.equal(pre.layers[0].capture.rows[:40], x)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_extra_gradient_of_the_same_forward_does_not_lose_rows():
    """A gradient penalty differentiates once before the backward pass."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
        (loss + penalty).backward()
        optimizer.step()
        assert pre.stats()["rows"] == {"0": 40, "2": 40, "4": 40}


@pytest.mark.parametrize("change", ["double", "bfloat16", "replaced"])
def test_the_buffer_follows_the_weight(change):
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    backward(model, x, y)
    pre.step()
    model.zero_grad()
    if change == "replaced":
        model[0] = nn.Linear(12, 20)
        model[2].weight = nn.Parameter(torch.randn(16, 20))
    else:
        model.to(getattr(torch, change))
        x = x.to(getattr(torch, change))
    backward(model, x, y)
    pre.step()
    assert pre.stats()["layers"] == (2 if change == "replaced" else 3)
    assert pre.layers[1].capture.rows.dtype == (torch.float64 if change == "double" else torch.float32)


@pytest.mark.parametrize("x", [torch.zeros(3, 7), torch.zeros(()), torch.zeros(3, 12, dtype=torch.int64)], ids=str)
def test_the_layer_itself_says_what_is_wrong_with_its_input(x):
    layer = nn.Linear(12, 5)
    with pytest.raises(RuntimeError) as plain:
        layer(x)
    Preconditioner(layer)
    with pytest.raises(RuntimeError) as hooked:
        layer(x)
    assert str(hooked.value) == str(plain.value)


def test_a_gradient_taken_by_another_hook():
    """Optimizers that step in the backward pass take the gradient before anybody else sees it."""
    model, (x, y) = mlp(), data()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    pre = Preconditioner(model)
    backward(model, x, y)
    pre.step()
    assert pre.stats()["layers"] == 2 and "no gradient in the last step" in pre.summary()
