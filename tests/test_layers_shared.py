"""One input for several layers, one weight for several modules, adapters: correct, or left alone and reported."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from consistency_ops import ops
from consistency_ops.engine import correction, host_path
from consistency_ops.preconditioner import Preconditioner
from support.training import DAMPING, corrected_layers, dense, train


class Projections(nn.Module):
    """Query, key and value as linear layers of their own."""

    def __init__(self, units=12, biases=(True, True, True)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(units, out, bias=b) for out, b in zip((8, 8, 5), biases, strict=True))

    def forward(self, x):
        return (self.q(x) * self.k(x)).sum(-1, keepdim=True) * self.v(x)


@pytest.fixture
def launched(monkeypatch):
    """Record for every launch the outputs of consecutive layers that have one input and one division."""
    launches = []
    launch = correction.launch_correction

    def record(grads, inputs, **options):
        bias_layers, ids = options["bias_layers"], options["layers"]
        keys = [(inputs[i].data_ptr(), ids[i], i in bias_layers) for i in range(len(grads))]
        runs = itertools.groupby(range(len(grads)), key=keys.__getitem__)
        launches.append([tuple(len(grads[i]) for i in run) for _, run in runs])
        return launch(grads, inputs, **options)

    monkeypatch.setattr(correction, "launch_correction", record)
    monkeypatch.setattr(host_path, "correct", lambda *_: False)  # it launches by itself, with the same bits
    return launches


def check_dense(layers, rows, pre):
    """One correction of ``layers``, each with its own ``rows``."""
    expected = [
        dense(m.weight.grad[:, :, None], None if m.bias is None else m.bias.grad, x)
        for m, x in zip(layers, rows, strict=True)
    ]
    pre.step()
    for layer, (weight, bias) in zip(layers, expected, strict=True):
        bound = 2e-5 * weight.abs().max().item()
        torch.testing.assert_close(layer.weight.grad.double(), weight[:, :, 0], rtol=2e-5, atol=bound)
        if bias is not None:
            bound = 2e-5 * bias.abs().max().item()
            torch.testing.assert_close(layer.bias.grad.double(), bias, rtol=2e-5, atol=bound)


OPTIONS = dict(damping=DAMPING, scaling="absolute", chunk=256)


@pytest.mark.parametrize("biases", [(True, True, True), (True, False, True), (False,) * 3], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_input_is_captured_and_factored_once(biases, micro_batches, launched):
    model = Projections(biases=biases)
    pre = Preconditioner(model, **OPTIONS)
    for _ in range(3):
        model.zero_grad()
        xs = [torch.randn(6, 5, 12) for _ in range(micro_batches)]
        for x in xs:
            model(x).square().sum().backward()
        assert [int(layer.capture.count) for layer in pre._layers] == [30 * micro_batches, 0, 0]
        rows = torch.cat([x.flatten(0, -2) for x in xs])
        check_dense((model.q, model.k, model.v), [rows] * 3, pre)
        assert pre.stats()["rows"] == dict.fromkeys("qkv", 30 * micro_batches) and pre.stats()["layers"] == 3
    alike = [[(8, 8, 5)], [(8, 5), (8,)]][len(set(biases)) > 1]  # together where both have a bias, or neither
    assert launched == [alike] * 3


def test_layers_of_one_inverse_report_one_condition():
    """It is that of the division that they shared, the division of the first layer."""
    model = Projections(units=40)
    pre = Preconditioner(model, chunk=8)
    model(torch.randn(50, 40)).square().sum().backward()
    pre.step()
    condition = pre.stats()["condition"]
    assert condition["q"] == condition["k"] == condition["v"] > 1


def test_no_gradient_is_copied():
    """The step makes no tensor as large as a gradient."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            new = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            given = {t.data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
            self.largest = max([self.largest, *(t.numel() for t in new if t.data_ptr() not in given)])
            return result

    model = Projections(units=64)
    pre = Preconditioner(model)
    for _ in range(2):
        model(torch.randn(30, 64)).square().sum().backward()
        with Sizes() as sizes:
            pre.step()
    assert 0 < sizes.largest < 5 * 64


def test_every_gradient_keeps_its_place_and_division():
    """Joined layers get what each would get alone with the division of the first."""
    model = Projections(units=40)
    pre = Preconditioner(model, chunk=8, group=2)
    x = torch.randn(50, 40)
    model(x).sum().backward()
    expected = [
        ops.precondition(m.weight.grad, x, damping=0.1, scaling="trace", chunk=8, group=2, bias_grad=m.bias.grad)
        for m in (model.q, model.k, model.v)
    ]
    places = [p.grad.data_ptr() for p in model.parameters()]
    pre.step()
    assert [p.grad.data_ptr() for p in model.parameters()] == places
    for layer, (weight, bias) in zip((model.q, model.k, model.v), expected, strict=True):
        assert torch.equal(layer.weight.grad, weight) and torch.equal(layer.bias.grad, bias)


@pytest.mark.parametrize("options", [dict(every=2), dict(decay=0.5), dict(decay=0.5, every=2)], ids=str)
def test_shared_rows_with_stored_inverses(options):
    """The same as with a copy of the input for each layer."""
    results = []
    for copies in (False, True):
        torch.manual_seed(0)
        model = Projections()
        if copies:
            for layer in (model.q, model.k, model.v):
                layer.register_forward_pre_hook(lambda module, args: args[0].clone())
        pre = Preconditioner(model, chunk=4, **options)
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(30, 12)).square().sum().backward()
            pre.step()
        assert pre.stats()["layers"] == 3 and set(pre.stats()["rows"].values()) == {30}
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_convolutions_of_a_residual_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.skip = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x):
            return self.a(x) * self.b(x) + self.skip(x)

    block, twin = Block(), Block()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for m in (block, twin):
        if m is twin:
            for layer in (twin.a, twin.b, twin.skip):
                layer.register_forward_pre_hook(lambda module, args: args[0].clone())
        pre = Preconditioner(m, **OPTIONS)
        m(x).square().sum().backward()
        assert [int(layer.capture.count) for layer in pre._layers] == [[50, 0, 0], [50, 50, 50]][m is twin]
        pre.step()
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5 * b.grad.abs().max().item())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_projections(reentrant):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Projections()
        pre = Preconditioner(model, chunk=4)
        for _ in range(2):
            model.zero_grad()
            x = torch.randn(30, 12, requires_grad=True)
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            y.square().sum().backward()
            pre.step()
            assert set(pre.stats()["rows"].values()) == {30}
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_input_changed_in_place_is_another_input():
    a, b = nn.Linear(6, 4), nn.Linear(6, 4)
    pre = Preconditioner(nn.ModuleList([a, b]), **OPTIONS)
    x = torch.randn(20, 6)
    first = x.clone()
    loss = a(x).detach().square().sum()
    loss = loss + F.linear(first, a.weight, a.bias).square().sum()
    x.mul_(torch.randn(6))
    (loss + b(x).square().sum()).backward()
    check_dense((a, b), (first, x), pre)


@pytest.mark.parametrize(
    "calls",
    ["follower sees more", "follower sees less", "other order", "follower alone", "one input twice", "later and less"],
)
def test_sharing_that_ends_is_never_silently_wrong(calls):
    """Each layer is corrected with exactly its rows, or its gradient is left for that step and the summary says so."""
    a, b = nn.Linear(6, 4), nn.Linear(6, 3)
    pre = Preconditioner(nn.ModuleList([a, b]), **OPTIONS)
    x, y = torch.randn(20, 6), torch.randn(30, 6)
    script = {
        "follower sees more": [(a, x), (b, x), (b, y)],
        "follower sees less": [(a, x), (b, x), (a, y)],
        "other order": [(a, x), (a, y), (b, y), (b, x)],
        "one input twice": [(a, x), (a, y), (b, y), (b, y)],
        "later and less": [(a, x), (a, y), (b, x)],
        "follower alone": [(a, x), (b, x), (b, y), (a, y)],
    }[calls]
    for step in range(3):
        pre._layers[0].module().zero_grad(), pre._layers[1].module().zero_grad()
        seen = {a: [], b: []}
        for layer, z in script:
            layer(z).square().sum().backward()
            seen[layer].append(z)
        if calls == "follower sees less" and step == 0:
            before = b.weight.grad.clone()
            pre.step()
            assert torch.equal(b.weight.grad, before) and pre.stats()["layers"] == 1
            assert "called less often than the layer whose input it shared; gradient left as it is" in pre.summary()
        else:
            check_dense((a, b), [torch.cat(seen[a]), torch.cat(seen[b])], pre)
            assert pre.stats()["layers"] == 2


def test_rows_of_a_skipped_step_are_dropped():
    model = Projections()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    for size in (30, 20):
        x = torch.randn(size, 12)
        optimizer.zero_grad()
        model(x).sum().backward()
    optimizer.step()
    assert pre.stats()["rows"] == dict.fromkeys("qkv", 20)
    assert torch.equal(pre._layers[0].capture.rows[:20], x)


# Adapters


class LoRALinear(nn.Module):
    """The layout of PEFT's lora.Linear: a frozen base layer, and two small linear layers for every adapter."""

    def __init__(self, base, rank):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        a, b, dropout = self.lora_A["default"], self.lora_B["default"], self.lora_dropout["default"]
        return self.base_layer(x) + b(a(dropout(x))) * 2.0


def test_adapters_are_corrected_and_the_frozen_base_costs_nothing(launched):
    model = Projections()
    for name in "qkv":
        setattr(model, name, LoRALinear(getattr(model, name), 2))
    frozen = copy.deepcopy(model.q.base_layer.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pre = Preconditioner(model, optimizer)
    assert all((layer.capture.state is None) == ("base_layer" in layer.name) for layer in pre._layers)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(30, 12)).square().sum().backward()
        optimizer.step()
    rows = pre.stats()["rows"]
    assert {name for name, count in rows.items() if count} == {n for n in rows if "lora" in n}
    assert launched[-1] == [(2, 2, 2), (8,), (8,), (5,)]  # the three lora_A have one input
    assert pre.summary().count("frozen") == 3
    assert all(torch.equal(v, frozen[k]) for k, v in model.q.base_layer.state_dict().items())
    model.q.base_layer.requires_grad_(True)
    optimizer.zero_grad()
    model(torch.randn(30, 12)).square().sum().backward()
    optimizer.step()
    assert pre.stats()["rows"]["q.base_layer"] == 30


# Tied weights


def tied(embedding_first=True):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)

        def forward(self, x):
            return self.head(self.body(self.embedding(x.argmax(1) % 5)))

    return Tied()


@pytest.mark.parametrize("when", ["before", "after", "head after", "after a step", "by the other side"])
def test_tied_weights_keep_their_gradient(when):
    model = tied()
    if when == "before":
        model.head.weight = model.embedding.weight
    pre = Preconditioner(model)
    if when == "after a step":
        assert corrected_layers(model, pre) == {"body.weight", "body.bias", "head.weight"}
    if when in ("after", "after a step", "head after"):
        model.head.weight = model.embedding.weight
    if when == "by the other side":
        model.embedding.weight = model.head.weight
    model.zero_grad()
    assert corrected_layers(model, pre) == {"body.weight", "body.bias"}
    summary = pre.summary()
    assert "tied with embedding; gradient left as it is" in summary and "unsupported type" in summary


def test_untied_weights_are_corrected_again():
    model = tied()
    model.head.weight = model.embedding.weight
    pre = Preconditioner(model)
    assert corrected_layers(model, pre) == {"body.weight", "body.bias"}
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    model.body.weight = nn.Parameter(model.body.weight.detach().clone())
    model.zero_grad()
    corrected_layers(model, pre)
    model.zero_grad()
    assert corrected_layers(model, pre) == {"body.weight", "body.bias", "head.weight"}


def test_one_module_under_two_names_is_one_layer():
    layer = nn.Linear(12, 12)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(12, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 2)
    assert pre.stats()["rows"] == {"0": 80, "3": 40}


def test_a_module_called_several_times_has_the_moments_of_all_its_inputs():
    layer = nn.Linear(6, 6)
    pre = Preconditioner(layer, **OPTIONS)
    x = torch.randn(10, 6)
    y = layer(x)
    layer(y.tanh()).sum().backward()
    check_dense((layer,), (torch.cat([x, y.detach().tanh()]),), pre)
