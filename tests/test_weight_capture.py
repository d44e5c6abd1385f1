"""`co.capture`: rows of weights that are used without calling their module."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops import Preconditioner
from support.training import assert_equal


class Called(nn.Module):
    """A network whose head is a layer that is called, or one whose weight alone is used."""

    def __init__(self, direct, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.direct, self.recompute = direct, recompute

    def loss(self, hidden, y):
        if self.direct:
            co.capture(hidden, self.head.weight)
            return F.cross_entropy(F.linear(hidden, self.head.weight, self.head.bias), y)
        return F.cross_entropy(self.head(hidden), y)

    def forward(self, x, y):
        hidden = self.body(x).relu()
        if self.recompute is None:
            return self.loss(hidden, y)
        return checkpoint(self.loss, hidden, y, use_reentrant=self.recompute)


def batches(steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(40, 12, generator=generator), torch.randint(5, (40,), generator=generator)


def trained(model, forward=None, after=0, micro=1, **options):
    """The parameters after some steps; the preconditioner is made after so many of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    pre = None if after else Preconditioner(model, optimizer, **options)
    for step, (x, y) in enumerate(batches()):
        if step == after and pre is None:
            pre = Preconditioner(model, optimizer, **options)
        optimizer.zero_grad()
        for part in range(micro):
            (model if forward is None else forward)(x[part::micro], y[part::micro]).backward()
        optimizer.step()
    return pre, list(model.parameters())


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize(
    ("after", "micro", "options"),
    [(0, 1, {}), (1, 2, {}), (0, 2, {"decay": 0.5, "every": 2}), (0, 1, {"max_rows": 16})],
)
def test_a_weight_that_is_used_directly_is_corrected_as_its_layer(after, micro, options, recompute):
    model = Called(True, recompute)
    pre, direct = trained(model, after=after, micro=micro, **options)
    _, called = trained(Called(False, recompute), after=after, micro=micro, **options)
    assert_equal(direct, called)
    assert pre.stats()["layers"] == 2 and "no input" not in pre.summary()


@pytest.mark.parametrize("mode", ["correct", "whiten"])
def test_both_modes(mode):
    assert_equal(trained(Called(True), mode=mode)[1], trained(Called(False), mode=mode)[1])


def test_compiled_without_a_graph_break():
    want = trained(Called(False))[1]
    model = Called(True)
    pre, got = trained(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want)
    assert pre.stats()["layers"] == 2


def test_each_of_two_models_has_its_own_rows_in_one_compiled_function():
    models = [Called(True), Called(True)]
    pres = [Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.0)) for model in models]
    compiled = torch.compile(Called.forward, fullgraph=True, backend="aot_eager")
    for model, rows in zip(models, (10, 20), strict=True):
        compiled(model, torch.randn(rows, 12), torch.zeros(rows, dtype=torch.int64)).backward()
    for pre, rows in zip(pres, (10, 20), strict=True):
        pre._attachments[0].optimizer.stepping.step()
        assert [layer.captured_rows() for layer in pre._layers] == [rows, rows]


class Attention(nn.Module):
    """Uses the weights of `nn.MultiheadAttention` with a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 5)

    def forward(self, x, y):
        co.capture(x, self.inner.in_proj_weight)
        parts = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(-2, -3) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        co.capture(mixed, self.inner.out_proj.weight)
        self.seen = x.detach(), mixed.detach()
        out = F.linear(mixed, self.inner.out_proj.weight, self.inner.out_proj.bias)
        return F.cross_entropy(self.last(out).flatten(0, 1), y.flatten())


class Scaled(nn.Linear):
    """A forward of its own: the weight multiplies something else than the input."""

    def forward(self, x):
        x = F.normalize(x, dim=-1)
        co.capture(x, self.weight)
        self.seen = x.detach()
        return F.linear(x, self.weight, self.bias)


class Router(nn.Module):
    """A type that nobody knows, with a weight under another name."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        co.capture(x, self.gate)
        self.seen = x.detach()
        return x @ self.gate.T


def want(weight, bias, rows):
    grads = weight.grad.clone(), None if bias is None else bias.grad.clone()
    options = {"damping": 0.1, "scaling": "trace"}
    if bias is None:
        return co.precondition(grads[0], rows, **options), None
    return co.precondition(grads[0], rows, bias_grad=grads[1], **options)


def test_weights_of_an_attention_that_is_not_called():
    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    assert "takes its weight and never calls it" in pre.summary()
    model(torch.randn(3, 7, 8), torch.randint(5, (3, 7))).backward()
    inner = model.inner
    rows, mixed = model.seen
    expected = want(inner.out_proj.weight, inner.out_proj.bias, mixed)
    value = inner.in_proj_weight.grad[16:].clone(), inner.in_proj_bias.grad[16:].clone()
    optimizer.step()
    torch.testing.assert_close(inner.out_proj.weight.grad, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(inner.out_proj.bias.grad, expected[1], rtol=1e-4, atol=1e-6)
    value = co.precondition(value[0], rows, bias_grad=value[1], damping=0.1, scaling="trace")
    torch.testing.assert_close(inner.in_proj_weight.grad[16:], value[0], rtol=1e-4, atol=1e-6)
    assert pre.stats()["coverage"] == 1.0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [lambda: Scaled(8, 5), Router])
def test_weights_whose_module_is_left_alone_are_covered_when_they_are_captured(kind, compiled):
    torch.manual_seed(0)
    last = kind()
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    weight = last.gate if isinstance(last, Router) else last.weight
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(2):
        optimizer.zero_grad()
        forward(torch.randn(30, 12)).square().sum().backward()
        bias = getattr(last, "bias", None)
        expected, _ = want(weight, bias if pre._layers[-1].joins_bias else None, last.seen)
        optimizer.step()
        torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert pre.stats()["layers"] == 2
    assert "left as it is" not in pre.summary()


def test_without_a_preconditioner_nothing_happens():
    model = Called(True)
    x, y = next(batches())
    model(x, y).backward()
    pre = Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1), skip="head")
    model(x, y).backward()  # it does not cover this weight
    assert "skipped" in pre.summary()
    pre.remove()
    model(x, y).backward()
    del pre
    gc.collect()


def test_what_cannot_be_right_is_said():
    model = Called(True)
    pre = Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weight = model.head.weight
    with pytest.raises(ValueError, match=r"capture: x must have 8 units in dimension -1, .* got shape \(3, 5\)"):
        co.capture(torch.zeros(3, 5), weight)
    with pytest.raises(ValueError, match="capture: weight must be the parameter itself, got a view"):
        co.capture(torch.zeros(3, 5), weight.T)
    with pytest.raises(TypeError, match="capture: x must be a tensor, got list"):
        co.capture([1.0], weight)
    with pytest.raises(TypeError, match="capture: weight must be a tensor, got str"):
        co.capture(torch.zeros(3, 5), "head.weight")
    co.capture(torch.zeros(3, 5), torch.zeros(2, 2))  # another network's
    pre.remove()


def test_evaluation_and_no_grad_capture_nothing():
    model = Called(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    x, y = next(batches())
    model.eval()
    model(x, y)
    model.train()
    with torch.no_grad():
        model(x, y)
    model(x[:7], y[:7]).backward()
    optimizer.step()
    assert [layer.captured_rows() for layer in pre._layers] == [7, 7]


def test_a_resumed_average_of_a_weight_that_is_found_late():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), Router())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return model, optimizer, Preconditioner(model, optimizer, decay=0.7, every=2)

    def run(model, optimizer, steps):
        for x, _ in list(batches(6))[steps]:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer, pre = made()
    run(model, optimizer, slice(0, 3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, other, resumed = made()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (again, other)):
        run(m, o, slice(3, 6))
    assert resumed.steps == pre.steps == 6
    assert_equal(model.parameters(), again.parameters())
