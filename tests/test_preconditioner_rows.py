"""Which rows a step sees: accumulation, checkpointing, skipped steps, changed weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops.preconditioner import Preconditioner
from support.training import assert_equal, backward, data, gradients, mlp


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
    assert torch.equal(pre._layers[0].capture.rows[:6], before)


@pytest.mark.parametrize("kind", ["no_grad", "inference", "eval", "frozen", "vmap", "func.grad", "sparse", "nested"])
def test_what_is_not_captured(kind):
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    first = pre._layers[0].capture
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
    elif kind == "sparse":
        model[0](x.to_sparse())
    else:
        model(torch.nested.nested_tensor([x[:7], x[7:]], layout=torch.jagged))
    assert int(first.count) == 0


def test_rows_under_autocast_are_those_of_the_input():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    pre.step()
    assert pre.stats()["layers"] == 3 and torch.equal(pre._layers[0].capture.rows[:40], x)
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
    assert pre._layers[1].capture.rows.dtype == (torch.float64 if change == "double" else torch.float32)


with torch.inference_mode():
    INFERENCE = torch.zeros(3, 12)
WRONG = {
    "units": torch.zeros(3, 7),
    "no dimension": torch.zeros(()),
    "integers": torch.zeros(3, 12, dtype=torch.int64),
    "inference": INFERENCE,
}


@pytest.mark.parametrize("x", WRONG.values(), ids=WRONG)
def test_the_layer_itself_says_what_is_wrong_with_its_input(x):
    layer = nn.Linear(12, 5)
    with pytest.raises(RuntimeError) as plain:
        layer(x)
    pre = Preconditioner(layer)
    with pytest.raises(RuntimeError) as hooked:
        layer(x)
    assert str(hooked.value) == str(plain.value) and layer._forward_pre_hooks and pre._layers


def test_a_gradient_taken_by_another_hook():
    """Optimizers that step in the backward pass take the gradient before anybody else sees it."""
    model, (x, y) = mlp(), data()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    pre = Preconditioner(model)
    backward(model, x, y)
    pre.step()
    assert pre.stats()["layers"] == 2 and "no gradient in the last step" in pre.summary()


@pytest.mark.parametrize("options", [{}, dict(decay=0.8), dict(every=3)], ids=str)
@pytest.mark.parametrize("sizes", [(20, 20, 20), (7, 30, 1, 22)], ids=str)
def test_micro_batches_of_any_size_equal_one_batch(options, sizes):
    """The same rows in the same order, and the same gradient up to the order of its sum, over several steps."""
    models = mlp().double(), mlp().double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    pres = [Preconditioner(m, o, chunk=8, max_rows=60, **options) for m, o in zip(models, optimizers, strict=True)]
    for step in range(4):
        x, y = data(60, seed=step)
        x = x.double()
        for model, optimizer, split in zip(models, optimizers, (sizes, (60,)), strict=True):
            optimizer.zero_grad()
            for part, target in zip(x.split(split), y.split(split), strict=True):
                backward(model, part, target, scale=len(part) / 60)
        rows = [pre._layers[0].capture.rows[: int(pre._layers[0].capture.count)] for pre in pres]
        assert torch.equal(*rows) and len(rows[0]) == (60 if step % options.get("every", 1) == 0 else 0)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, dict(decay=0.8), dict(every=2)], ids=str)
def test_a_layer_that_is_not_called_in_some_steps(options):
    """Experts and branches: nothing is raised, nothing of them changes, and afterwards they go on."""
    model = mlp()
    model.add_module("expert", nn.Linear(12, 5))
    plain = torch.nn.Sequential.forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, **options)
    body = nn.Sequential(*list(model)[:-1])
    for step in range(6):
        used = step in (0, 3, 4)
        before = model.expert.weight.detach().clone()
        state = {k: v.clone() for k, v in pre.state_dict()["layers"].get("expert", {}).items()}
        x, y = data(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(plain(body, x) + (model.expert(x) if used else 0.0), y).backward()
        optimizer.step()
        assert torch.equal(before, model.expert.weight) != used
        if not used:
            after = pre.state_dict()["layers"].get("expert", {})
            if step == 2 and "every" in options:  # others invert: its division is no longer that of the steps
                assert state.pop("info").eq(0).all() and after["info"].ne(0).all()
            assert all(torch.equal(value, after[key]) for key, value in state.items())


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(every=4), dict(decay=0.5, every=4)], ids=str)
@pytest.mark.parametrize("called", [False, True])
def test_an_expert_without_tokens_is_corrected_as_soon_as_it_has_some(options, called, caplog):
    """Also where the step that inverts for the next ones finds it without: by the first rows that come."""
    experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.01)
    pre = Preconditioner(experts, optimizer, chunk=7, **options)
    changed, first_rows = [], {}
    for step in range(12):
        x, mask = torch.randn(16, 6), torch.rand(16) > 0.5
        if step % 4 == 0:
            mask[:] = False
        optimizer.zero_grad()
        loss = experts[0](x[~mask]).square().sum()
        if called or mask.any():
            loss = loss + experts[1](x[mask]).square().sum()
        loss.backward()
        grad = experts[1].weight.grad
        if grad is None:
            optimizer.step()
            continue
        before, bias = grad.clone(), experts[1].bias.grad.clone()
        if mask.any():
            first_rows.setdefault(step // 4, x[mask])
        optimizer.step()
        if mask.any():
            changed.append(not torch.equal(before, grad))
            if options == dict(every=4):
                want, want_bias = co.precondition(
                    before, first_rows[step // 4], damping=0.1, scaling="trace", chunk=7, bias_grad=bias
                )
                torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(experts[1].bias.grad, want_bias, rtol=1e-4, atol=1e-5)
                assert pre.stats()["rows"]["1"] == len(first_rows[step // 4])
    assert all(changed) and len(changed) == 9
    assert pre.stats()["failed_chunks"] == 0 and not caplog.records


def test_a_recurrent_cell_called_hundreds_of_times():
    cell, head = nn.RNNCell(6, 8), nn.Linear(8, 1)
    project = nn.Linear(8, 8)
    model = nn.ModuleList([cell, head, project])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pre = Preconditioner(model, optimizer, max_rows=64)
    for _ in range(2):
        optimizer.zero_grad()
        h = torch.zeros(4, 8)
        for x in torch.randn(300, 4, 6):
            h = project(cell(x, h))
        head(h).square().sum().backward()
        assert len(pre._attachments[0].states.inputs) <= 2 * len(pre._layers) + 1
        optimizer.step()
    stats = pre.stats()
    assert stats["rows_seen"]["2"] == 1200 and 32 <= stats["rows"]["2"] <= 64 and stats["rows"]["1"] == 4
    assert "unsupported type" in pre.summary()
