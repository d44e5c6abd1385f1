"""nn.MultiheadAttention: query, key and value projections are corrected; the output projection is left and reported."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from consistency_ops.preconditioner import Preconditioner
from support.training import DAMPING, dense

NAMES = ("query", "key", "value")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def third(tensor, i):
    return tensor.unflatten(0, (3, -1))[i]


def weight_of(attention, tensor, i):
    """The i-th projection's part of an attribute, ``data`` or ``grad``, of the weight."""
    if attention.in_proj_weight is not None:
        return third(getattr(attention.in_proj_weight, tensor), i)
    return getattr((attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)[i], tensor)


def check(attention, inputs, compiled=False, joint=True, **call):
    """One step against the dense solution; ``inputs`` are query, key and value."""
    torch.manual_seed(1)
    pre = Preconditioner(attention, damping=DAMPING, scaling="trace", chunk=256, bias=joint)
    forward = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    y = forward(*inputs, **call)[0]
    (y * torch.randn_like(y)).sum().backward()
    bias = attention.in_proj_bias
    expected = [
        dense(
            weight_of(attention, "grad", i)[:, :, None],
            None if bias is None else third(bias.grad, i),
            x.detach().flatten(0, -2),
            scaling="trace",
            joint=joint,
        )
        for i, x in enumerate(inputs)
    ]
    out_proj = attention.out_proj.weight.grad.clone()
    pre.step()
    for i, (weight, corrected_bias) in enumerate(expected):
        bound = 2e-5 * weight.abs().max().item()
        torch.testing.assert_close(weight_of(attention, "grad", i).double(), weight[:, :, 0], rtol=2e-5, atol=bound)
        if bias is not None:
            torch.testing.assert_close(third(bias.grad, i).double(), corrected_bias, rtol=2e-5, atol=bound)
    assert torch.equal(attention.out_proj.weight.grad, out_proj)
    assert "MultiheadAttention takes its weight and never calls it; gradient left as it is" in pre.summary()
    return pre


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(add_bias_kv=True, add_zero_attn=True)], ids=str)
def test_self_attention(options, batch_first, compiled):
    attention = nn.MultiheadAttention(12, 2, batch_first=batch_first, **options)
    x = torch.randn(5, 7, 12)
    pre = check(attention, (x, x, x), compiled, need_weights=False)
    assert pre.stats()["rows"] == {f"in_proj.{name}": 35 for name in NAMES}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(kdim=6, vdim=10)], ids=str)
def test_cross_attention(sizes, compiled):
    """Two or three inputs; with other sizes the weights are three parameters with one bias."""
    attention = nn.MultiheadAttention(12, 2, batch_first=True, **sizes)
    query, key = torch.randn(5, 3, 12), torch.randn(5, 8, sizes.get("kdim", 12))
    value = torch.randn(5, 8, sizes.get("vdim", 12)) if sizes else key
    pre = check(attention, (query, key, value), compiled)
    assert list(pre.stats()["rows"].values()) == [15, 40, 40]


def test_inputs_by_keyword_and_without_a_batch():
    attention = nn.MultiheadAttention(12, 2)
    pre = Preconditioner(attention)
    x, z = torch.randn(9, 12), torch.randn(4, 12)
    attention(value=z, query=x, key=z)[0].sum().backward()
    pre.step()
    assert pre.stats()["rows"] == {"in_proj.query": 9, "in_proj.key": 4, "in_proj.value": 4}


def test_bias_may_be_left_out():
    attention = nn.MultiheadAttention(12, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(5, 7, 12)
    check(attention, (x, x, x), joint=False)


@pytest.mark.parametrize("options", [dict(decay=0.6), dict(every=2), dict(decay=0.6, every=2)], ids=str)
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_stored_inverses_of_the_parts_are_kept_apart(options, with_optimizer):
    """The packed weight behaves as three linear layers."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 2, batch_first=True)
    layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
    pairs = [(attention, None), (layers, None)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({"weight": third(attention.in_proj_weight, i), "bias": third(attention.in_proj_bias, i)})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) if with_optimizer else None for m, _ in pairs]
    pres = [Preconditioner(m, o, **options) for (m, _), o in zip(pairs, optimizers, strict=True)]
    for _ in range(3):
        attention.zero_grad(), layers.zero_grad()
        inputs = torch.randn(3, 4, 7, 12)
        attention(*inputs)[0].sum().backward()
        for i, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
            layer(x)
            layer.weight.grad = third(attention.in_proj_weight.grad, i).clone()
            layer.bias.grad = third(attention.in_proj_bias.grad, i).clone()
        for pre, optimizer in zip(pres, optimizers, strict=True):
            pre.step() if optimizer is None else optimizer.step()
        for i, layer in enumerate(layers):
            assert torch.equal(layer.weight.grad, third(attention.in_proj_weight.grad, i))
            assert torch.equal(layer.bias.grad, third(attention.in_proj_bias.grad, i))
    stored = pres[0].state_dict()["layers"]
    assert list(stored) == [f"in_proj.{name}" for name in NAMES]
    again = Preconditioner(attention, **options)
    again.load_state_dict(pres[0].state_dict())
    for name, entries in again.state_dict()["layers"].items():
        assert all(torch.equal(value, stored[name][key]) for key, value in entries.items())


def test_skip_takes_the_module_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2), "other": nn.Linear(3, 2)})
    pre = Preconditioner(model, skip="attention")
    assert [layer.reason for layer in pre._layers[:3]] == ["skipped"] * 3


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("options", [{}, dict(every=2), dict(decay=0.9)], ids=str)
def test_transformer_encoder_trains_and_evaluates(options):
    """Evaluation between the steps (torch's fused path where it is taken) neither captures nor changes the training."""
    results = []
    x, y = torch.randn(6, 5, 12), torch.randn(6, 5, 12)
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:, 4] = True
    for evaluated in (False, True):
        model = encoder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pre = Preconditioner(model, optimizer, **options)
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x, src_key_padding_mask=mask), y)
            loss.backward()
            if evaluated:
                model.eval()
                with torch.inference_mode():
                    model(x)
                model.train()
            optimizer.step()
        assert set(pre.stats()["rows"].values()) == {30} and pre.stats()["layers"] == 2 * 5
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_encoder_has_no_graph_break():
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.randn(6, 5, 12)).square().sum().backward()
        optimizer.step()
    assert pre.stats()["layers"] == 10 and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
