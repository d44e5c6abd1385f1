"""The preconditioner in front of any optimizer, and all the ways a training script may be written."""

import copy
import gc
import io
import itertools
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed.checkpoint as checkpoint_io
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from consistency_ops import reference
from consistency_ops.preconditioner import Preconditioner


def mlp(seed=0, widths=(12, 20, 16, 5)):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(n=40, seed=1, units=12, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, units, generator=generator), torch.randint(classes, (n,), generator=generator)


def backward(model, x, y, scale=1.0):
    loss = F.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(backward(model, *data(seed=step)).item())
        optimizer.step()
    return losses


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# What it computes


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


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


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


# Schedules, clipping, scalers, closures


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


def scaled_step(model, optimizer, scaler, x, y, poison=False):
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if poison:
        model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()


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
    assert pre.steps == 0 and int(pre.layers[0].capture.count) == 40
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
    with pytest.raises(RuntimeError, match="must call its closure once a step, got a second call by Twice"):
        optimizer.step(lambda: backward(model, *data()))
    with pytest.raises(ValueError, match="optimizer must be one that evaluates the gradient once a step"):
        Preconditioner(mlp(), torch.optim.LBFGS(mlp().parameters()))


# Gradient accumulation, checkpointing, and everything about rows


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


def test_a_module_called_twice_pools_its_rows():
    shared = nn.Linear(6, 6)
    pre = Preconditioner(shared)
    x = torch.randn(10, 6)
    shared(shared(x)).sum().backward()
    pre.step()
    assert pre.stats()["rows"] == {"": 20}


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


# Layers that keep their gradient


def corrected_layers(model, pre):
    """Names of parameters whose gradient was changed by a step."""
    backward(model, *data())
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pre.step()
    return {name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p.grad)}


@pytest.mark.parametrize(
    ("skip", "left"),
    [("0", "0"), (["2", "4"], "24"), ("[02]", "02"), (nn.Linear, None), ([nn.Conv2d, "4"], "4")],
    ids=str,
)
def test_skip(skip, left):
    model = mlp()
    if left is None:
        with pytest.raises(ValueError, match=r"must have a layer to correct, got none[\s\S]*skipped"):
            Preconditioner(model, skip=skip)
        return
    pre = Preconditioner(model, skip=skip)
    corrected = corrected_layers(model, pre)
    assert {name.split(".")[0] for name in corrected} == set("024") - set(left)
    assert pre.summary().count("skipped") == len(left)


def test_skip_pattern_without_a_match_warns():
    with pytest.warns(UserWarning, match="'haed' matches no module"):
        Preconditioner(mlp(), skip="haed")


def test_tied_weights_keep_their_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x.argmax(1) % 5)))

    model = Tied()
    pre = Preconditioner(model)
    assert corrected_layers(model, pre) == {"body.weight", "body.bias"}
    summary = pre.summary()
    assert "tied with embedding; gradient left as it is" in summary and "unsupported type" in summary


def test_attention_projection_whose_hook_never_fires_keeps_its_gradient():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 5)

        def forward(self, x):
            x = x[:, None]
            return self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])

    model = Attention()
    pre = Preconditioner(model)
    assert corrected_layers(model, pre) == {"head.weight", "head.bias"}
    assert "no input seen yet; gradient left as it is" in pre.summary()


def test_frozen_unused_and_parametrized_layers():
    model = mlp()
    model.extra = nn.Linear(3, 3)
    model[0].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[4])
    model.forward = lambda x: model[4](F.relu(model[2](F.relu(model[0](x)))))
    pre = Preconditioner(model)
    assert corrected_layers(model, pre) == {"2.weight", "2.bias"}
    summary = pre.summary()
    assert "frozen" in summary and "not a parameter of the module" in summary and "no input seen yet" in summary


def test_unfreezing_and_adding_a_group():
    model = mlp()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 1 and "not in the optimizer" in pre.summary()
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    train(model, optimizer, 2)
    assert pre.stats()["layers"] == 3 and pre.stats()["uncorrected"] == 0


def test_two_optimizers_correct_their_own_layers():
    model, (x, y) = mlp(), data()
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model[0], nn.Sequential(model[2], model[4])))
    a, b = Preconditioner(model, first), Preconditioner(model, second)
    backward(model, x, y)
    before = gradients(model)
    first.step()
    assert not torch.equal(before[0], model[0].weight.grad)
    assert_equal(before[2:], gradients(model)[2:])
    second.step()
    assert a.stats()["layers"] == 1 and b.stats()["layers"] == 2


def test_bias_false_leaves_biases():
    model = mlp()
    pre = Preconditioner(model, bias=False)
    assert corrected_layers(model, pre) == {"0.weight", "2.weight", "4.weight"}


def test_sparse_gradient_is_left():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    backward(model, x, y)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    pre.step()
    assert model[0].weight.grad.is_sparse and pre.stats()["layers"] == 2
    assert "gradient is sparse" in pre.summary()


def test_bad_values_stay_in_their_layer():
    """NaN in the input of one layer: its gradient stays, the others are corrected; nothing is raised."""
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    backward(model, x, y)
    pre.layers[1].capture.rows[3, 3] = math.nan
    before = gradients(model)
    pre.step()
    after = gradients(model)
    assert_equal(before[2:4], after[2:4])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[4], after[4])
    assert pre.stats()["failed_chunks"] == 1 and "1 of 1 chunks failed" in pre.summary()


# every and decay


def test_every_reuses_the_inverse_and_captures_nothing_between():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model, every=3, chunk=8)
    changes = []
    for step in range(7):
        model.zero_grad()
        backward(model, x * (1 + step), y)
        captured = int(pre.layers[0].capture.count)
        assert captured == (40 if step % 3 == 0 else 0)
        grad = model[0].weight.grad.clone()
        pre.step()
        inverse = pre.state_dict()["layers"]["0"]["inverse"]
        changes.append(inverse)
        assert not torch.equal(grad, model[0].weight.grad)
    assert torch.equal(changes[0], changes[2]) and torch.equal(changes[3], changes[5])
    assert not torch.equal(changes[2], changes[3]) and not torch.equal(changes[5], changes[6])


def test_every_first_step_equals_the_one_launch():
    a, b = mlp().double(), mlp().double()
    x, y = data()
    for model, every in ((a, 1), (b, 2)):
        pre = Preconditioner(model, every=every, chunk=8)
        backward(model, x.double(), y)
        pre.step()
    for p, q in zip(gradients(a), gradients(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_decay_is_a_bias_corrected_average():
    layer = nn.Linear(6, 4, bias=False).double()
    pre = Preconditioner(layer, decay=0.7, damping=0.1, scaling="absolute", chunk=256)
    average, weight = torch.zeros(6, 6).double(), 0.0
    for _ in range(4):
        x = torch.randn(20, 6).double()
        layer.zero_grad()
        layer(x).square().sum().backward()
        grad = layer.weight.grad.clone()
        pre.step()
        average, weight = 0.7 * average + 0.3 * x.T @ x / 20, 0.7 * weight + 0.3
        expected = grad @ torch.linalg.inv(average / weight + 0.1 * torch.eye(6).double())
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["input", "gradient", "no rows"])
def test_bad_steps_do_not_enter_the_average(where):
    layer = nn.Linear(6, 4)
    pre = Preconditioner(layer, decay=0.5)

    def step(bad):
        layer.zero_grad()
        layer.eval() if bad and where == "no rows" else layer.train()
        layer(torch.randn(20, 6)).square().sum().backward()
        if bad and where == "input":
            pre.layers[0].capture.rows[2, 1] = math.inf
        if bad and where == "gradient":
            layer.weight.grad[1, 2] = math.nan
        pre.step()
        state = pre.state_dict()["layers"][""]
        return state["covariance"].clone(), state["weight"].clone()

    step(bad=True)
    assert pre.state_dict()["layers"][""]["weight"] == 0
    before = step(bad=False)
    after = step(bad=True)
    assert_equal(before, after)
    assert layer.weight.grad.isfinite().sum() == (23 if where == "gradient" else 24)
    assert not torch.equal(step(bad=False)[0], after[0])


# State


RESUME = [{}, dict(every=3), dict(decay=0.9), dict(decay=0.9, every=2), dict(max_rows=16)]


@pytest.mark.parametrize("options", RESUME, ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_resume_is_bitwise(options, name):
    def start(seed):
        model = mlp(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        Preconditioner(model, optimizer, chunk=8, seed=4, **options)
        return model, optimizer

    model, optimizer = start(0)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, first=4)

    resumed, other = start(9)
    train(resumed, other, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 5, first=4)
    assert_equal(model.parameters(), resumed.parameters())


@pytest.mark.parametrize("options", RESUME, ids=str)
def test_resume_without_an_optimizer(options):
    def steps(model, pre, first, count):
        for step in range(first, first + count):
            model.zero_grad()
            backward(model, *data(seed=step))
            pre.step()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    model = mlp()
    pre = Preconditioner(model, chunk=8, **options)
    steps(model, pre, 0, 4)
    weights, state = copy.deepcopy(model.state_dict()), pickle.loads(pickle.dumps(pre.state_dict()))
    steps(model, pre, 4, 3)
    resumed = mlp(3)
    again = Preconditioner(resumed, chunk=8, **options)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    steps(resumed, again, 4, 3)
    assert_equal(model.parameters(), resumed.parameters())


@pytest.mark.parametrize("options", RESUME, ids=str)
@pytest.mark.parametrize("name", ["plain SGD", "Adam"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_distributed_checkpoint_keeps_the_state(options, name, tmp_path):
    def start(seed):
        model = mlp(seed)
        model.add_module("norm", nn.LayerNorm(5))
        optimizer = OPTIMIZERS[name](model.parameters()) if name == "Adam" else torch.optim.SGD(model.parameters(), 0.1)
        Preconditioner(model, optimizer, chunk=8, **options)
        return model, optimizer

    model, optimizer = start(0)
    train(model, optimizer, 4)
    weights, state = get_state_dict(model, optimizer)
    checkpoint_io.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    train(model, optimizer, 3, first=4)

    resumed, other = start(9)
    weights, state = get_state_dict(resumed, other)
    saved = {"model": weights, "optimizer": state}
    checkpoint_io.load(saved, checkpoint_id=tmp_path)
    set_state_dict(resumed, other, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(resumed, other, 3, first=4)
    assert_equal(model.parameters(), resumed.parameters())


def test_state_by_name_beside_an_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    saved = copy.deepcopy(pre.state_dict())
    train(model, optimizer, 2)
    pre.load_state_dict(saved)
    assert pre.steps == 2
    assert torch.equal(saved["layers"]["0"]["covariance"], optimizer.state[model[0].weight]["consistency_covariance"])
    fresh = mlp()
    pre = Preconditioner(fresh, torch.optim.Adam(fresh.parameters()), decay=0.9)
    with pytest.raises(RuntimeError, match="the optimizer must have its state first, got none"):
        pre.load_state_dict(saved)


def test_loading_foreign_state_is_refused():
    pre = Preconditioner(mlp())
    with pytest.raises(ValueError, match="state_dict version must be 1, got 7"):
        pre.load_state_dict({"version": 7, "layers": {}})
    with pytest.raises(ValueError, match=r"got \['other'\]"):
        pre.load_state_dict({"version": 1, "step": 1, "layers": {"other": {}}})


def test_state_stays_float32_beside_half_precision_weights():
    model, (x, y) = mlp().bfloat16(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer, decay=0.9)
    backward(model, x.bfloat16(), y)
    optimizer.step()
    before = optimizer.state[model[0].weight]["consistency_covariance"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state[model[0].weight]["consistency_covariance"]
    assert after.dtype == torch.float32 and torch.equal(before, after)


def test_loading_a_state_saved_without_a_preconditioner():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    optimizer.load_state_dict(saved)
    assert pre.steps == 0
    train(model, optimizer, 2)


# The model stays what it was


def test_model_gets_no_buffers_and_gradients_keep_their_place():
    model = mlp()
    keys = set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer, decay=0.5)
    backward(model, *data())
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    optimizer.step()
    assert set(model.state_dict()) == keys and not list(model.buffers())
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses


def test_deepcopy_neither_copies_nor_feeds_the_preconditioner():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    average = copy.deepcopy(model)
    backward(average, *data())
    assert [int(layer.capture.count) for layer in pre.layers] == [0, 0, 0]
    assert not any(isinstance(t, torch.Tensor) and t.numel() > 10_000 for t in gc.get_referents(*average.modules()))
    backward(model, *data())
    optimizer.step()
    assert pre.stats()["layers"] == 3
    with pytest.raises(TypeError, match="must be constructed anew for a copied model"):
        copy.deepcopy(pre)


def test_torch_save_of_the_whole_model():
    model = mlp()
    pre = Preconditioner(model)
    plain = io.BytesIO()
    torch.save(mlp(), plain)
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < plain.tell() + 4096
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, y = data()
    assert torch.equal(loaded(x), model(x))
    backward(loaded, x, y)
    assert [int(layer.capture.count) for layer in pre.layers] == [40, 40, 40]  # of model(x) alone


def hooks_of(model, optimizer):
    module_hooks = [len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    weight_hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    names = ("step_pre", "step_post", "load_state_dict_pre", "load_state_dict_post")
    return module_hooks, weight_hooks, [len(getattr(optimizer, f"_optimizer_{name}_hooks")) for name in names]


def test_remove_leaves_no_trace():
    model, twin = mlp(), mlp()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
    before = hooks_of(model, optimizer)
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    pre.remove()
    assert hooks_of(model, optimizer) == before
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state.values())
    assert train(model, optimizer, 3) == train(twin, plain, 3)
    assert_equal(model.parameters(), twin.parameters())


def test_a_forgotten_preconditioner_takes_its_hooks_along():
    model = mlp()
    pre = Preconditioner(model)
    before = hooks_of(model, torch.optim.SGD(model.parameters()))[0]
    assert sum(before) > 0
    del pre
    gc.collect()
    assert sum(hooks_of(model, torch.optim.SGD(model.parameters()))[0]) == 0


def test_the_model_is_not_kept_alive():
    model = mlp()
    pre = Preconditioner(model)
    backward(model, *data())
    pre.step()
    reference_to_model = weakref.ref(model[0])
    del model
    gc.collect()
    assert reference_to_model() is None and "gone" in pre.summary()
    pre.step()


def test_no_memory_growth():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    Preconditioner(model, optimizer, decay=0.9, every=2)
    train(model, optimizer, 4)

    def tensors():
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())

    before = tensors()
    train(model, optimizer, 20)
    assert tensors() <= before


# Arguments and reports


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(damping=-1.0), "damping must be a finite number >= 0, got -1.0"),
        (dict(damping=math.nan), "damping must be a finite number >= 0, got nan"),
        (dict(damping="0.1"), "damping must be a finite number >= 0, got '0.1'"),
        (dict(scaling="mean"), "scaling must be 'trace' or 'absolute', got 'mean'"),
        (dict(chunk=0), r"chunk must be in \[1, 256\], got 0"),
        (dict(chunk=257), r"chunk must be in \[1, 256\], got 257"),
        (dict(chunk=64.0), r"chunk must be in \[1, 256\], got 64.0"),
        (dict(chunk=8, group=9), r"group must be None or in \[1, 8\], got 9"),
        (dict(max_rows=0), "max_rows must be an integer >= 1, got 0"),
        (dict(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (dict(every=0), "every must be an integer >= 1, got 0"),
        (dict(seed=-1), "seed must be an integer in"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match="Preconditioner: " + message):
        Preconditioner(mlp(), **options)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        Preconditioner([mlp()])
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got float"):
        Preconditioner(mlp(), 0.1)
    with pytest.raises(ValueError, match="must have a layer to correct, got none"):
        Preconditioner(nn.ReLU())
    with pytest.raises(ValueError, match=r"got none[\s\S]*not in the optimizer"):
        Preconditioner(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1))
    model = mlp()
    pre = Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="must be called only when no optimizer was given"):
        pre.step()


def test_a_gradient_is_not_corrected_twice():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Preconditioner(model, optimizer, skip="4")
    before = hooks_of(model, optimizer)
    with pytest.raises(ValueError, match=r"must not have another Preconditioner for the same layer .* got one for '0'"):
        Preconditioner(model, optimizer)
    assert hooks_of(model, optimizer) == before
    second = Preconditioner(model, optimizer, skip=["0", "2"], damping=1.0)
    train(model, optimizer, 1)
    assert first.stats()["layers"] == 2 and second.stats()["layers"] == 1
    first.remove()
    Preconditioner(model, optimizer, skip="4")


def test_a_weight_that_stops_being_a_parameter():
    """Parametrization and pruning replace the weight by a computed tensor."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    nn.utils.parametrizations.weight_norm(model[2])
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 2 and "weight is no parameter any more" in pre.summary()


def test_input_by_keyword():
    layer = nn.Linear(4, 3)
    pre = Preconditioner(layer)
    layer(input=torch.randn(6, 4)).sum().backward()
    pre.step()
    assert pre.stats()["rows"] == {"": 6}


def test_step_without_any_gradient_does_nothing():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    pre = Preconditioner(model, optimizer)
    optimizer.step()
    assert all(not state for state in optimizer.state.values())
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 3


def test_reports():
    model = nn.Sequential(nn.Linear(200, 30), nn.ReLU(), nn.Unflatten(1, (6, 5)), nn.Conv1d(6, 4, 3, groups=2))
    pre = Preconditioner(model, chunk=64)
    assert repr(pre) == "Preconditioner(2 of 2 layers, damping=0.1, scaling='trace', chunk=64, max_rows=4096)"
    assert "waiting for the first step" in pre.summary()
    model(torch.randn(10, 200)).sum().backward()
    pre.step()
    lines = [line.split() for line in pre.summary().splitlines()[1:]]
    assert lines == [
        ["0", "Linear", "201", "->", "4", "of", "51", "10", "ok"],
        ["3", "Conv1d", "2", "x", "4", "->", "1", "of", "4", "50", "ok"],
    ]
    assert pre.stats() == {
        "steps": 1, "layers": 2, "uncorrected": 0, "chunks": 6, "failed_chunks": 0,
        "max_damping": pytest.approx(0.1), "rows": {"0": 10, "3": 50},
    }  # fmt: skip
