"""Modulus and batch RMS norm compiled and exported: no graph break, no recompilation over lengths, the same results."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import consistency_ops as co

operators = torch.ops.consistency_ops


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def convolutional():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), co.nn.Modulus(), co.nn.BatchRMSNorm(4), torch.nn.Conv2d(4, 2, 3), co.nn.Modulus()
    )


def linear():
    return torch.nn.Sequential(
        torch.nn.Linear(9, 4), co.nn.Modulus(), co.nn.BatchRMSNorm(4), torch.nn.Linear(4, 2), co.nn.Modulus()
    )


def run(model, x):
    """Output, gradients and statistics after one training call."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


# torch 2.13 guards any convolution on batches below 16, and under inductor recompiles it for every size.
@pytest.mark.parametrize(
    ("backend", "network", "shape"),
    [("aot_eager", convolutional, (3, 14, 9)), ("aot_eager", linear, (9,)), ("inductor", linear, (9,))],
)
def test_training_a_network(backend, network, shape):
    model = network()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (5, 6, 7, 15):
        x = torch.randn(n, *shape)
        torch.testing.assert_close(run(compiled, x), run(eager, x), rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4
    assert model[2].num_batches.item() == 4
    model.eval(), eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert model[2].num_batches.item() == 4


def test_training_in_channels_last():
    model = convolutional()
    eager = copy.deepcopy(model)
    x = torch.randn(4, 3, 9, 8).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), run(eager, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_modulus_over_lengths(dtype):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(co.modulus, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n in (5, 7, 8, 33, 1000):
        x = torch.randn(3, n, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
        grad = torch.randn(3, n).to(dtype.to_real())
        results = []
        for function in (compiled, co.modulus):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.backward(grad)
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 5


def test_compiled_graph_keeps_bits():
    kept = []
    compiled = torch.compile(co.modulus, fullgraph=True, backend="aot_eager")
    x = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.nbytes)) or t, lambda t: t):
        compiled(x)
    assert kept == [(torch.uint8, 8)]


def test_gradient_layouts_in_a_compiled_backward():
    """The incoming gradient is expanded, or in another memory format than the forward result."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2, 3, 4, 5)
    for function in (lambda t: co.modulus(t).sum(), lambda t: (co.modulus(t).contiguous() * weight).sum()):
        results = []
        for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
            leaf = x.clone().requires_grad_()
            f(leaf).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["modulus", "batch_rms_norm"])
def test_transforms_inside_a_compiled_region(name):
    running = torch.rand(4)
    function = {
        "modulus": co.modulus,
        "batch_rms_norm": lambda x: co.batch_rms_norm(x, running, training=False),
    }[name]
    x = torch.randn(5, 4, 4)
    for transformed in (
        lambda t: torch.func.vmap(function)(t),
        lambda t: torch.func.grad(lambda u: function(u).square().sum())(t),
        lambda t: torch.func.vmap(torch.func.grad(lambda u: function(u).square().sum()))(t),
        lambda t: torch.func.jvp(function, (t,), (t.cos(),)),
    ):
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), transformed(x))


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model = convolutional().train(training)
    x = torch.randn(4, 3, 9, 9)
    program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert set(dict(program.named_buffers())) == {"2.running_ms", "2.num_batches"}
    exported = program.module()
    for n in (2, 7):
        x = torch.randn(n, 3, 9, 9)
        torch.testing.assert_close(exported(x), model(x))
        torch.testing.assert_close(exported.state_dict()["2.running_ms"], model[2].running_ms)
        assert exported.state_dict()["2.num_batches"] == model[2].num_batches == (training and (1 if n == 2 else 2))


def operator_samples():
    x = torch.randn(3, 5, 4)
    lasting = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    z = torch.randn(3, 5, dtype=torch.complex64)
    for t in (x, lasting, x.bfloat16(), x[:, ::2], torch.randn(()), torch.zeros(0, 3), x.double()):
        yield operators.modulus.default, (t.clone().requires_grad_(),)
        yield operators.modulus_forward.default, (t.detach().requires_grad_(), 0)
        y, signs = operators.modulus_forward(t)
        yield operators.modulus_backward.default, (torch.ones_like(y).requires_grad_(), signs)
        yield (
            operators.modulus_backward.default,
            (torch.ones(y.shape, dtype=y.dtype).requires_grad_(), signs, y.stride()),
        )
    yield operators.modulus_forward.default, (x.requires_grad_(), 1)
    yield operators.modulus.default, (z.clone().requires_grad_(),)
    yield operators.modulus_complex_backward.default, (torch.randn(3, 5, requires_grad=True), z.requires_grad_())
    for t in (
        torch.randn(3, 5, 4),
        lasting,
        torch.randn(6, 5).bfloat16(),
        torch.randn(2, 10, 3)[:, ::2],
        lasting.double(),
    ):
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        for count in (None, torch.tensor([2])):
            yield operators.batch_rms_norm_denominator_.default, (t, torch.rand(5), count, 0.1, 1e-2)
            yield operators.batch_rms_norm_denominator.default, (torch.rand(5), count, wide, 0.1, 1e-2)
        yield (
            operators.batch_rms_norm_divide.default,
            (t.clone().requires_grad_(), torch.rand(5, dtype=wide) + 0.1),
        )


@pytest.mark.parametrize(
    ("operator", "arguments"), [pytest.param(*s, id=f"{i}-{s[0].name()}") for i, s in enumerate(operator_samples())]
)
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, arguments)
