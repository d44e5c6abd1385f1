"""Chunks wider than the kernels', and whole layers: ``Preconditioner(chunk=None)`` through ``torch.linalg``."""

import copy
import itertools

import pytest
import torch
from torch import nn

from consistency_ops import reference
from consistency_ops.preconditioner import Preconditioner


def network(*widths):
    torch.manual_seed(0)
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers)).double()


def backward(model, seed):
    x = torch.randn(40, model[0].in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().sum().backward()
    inputs = [x]
    for linear, activation in zip(model[::2], model[1::2], strict=True):
        inputs.append(activation(linear(inputs[-1])).detach())
    return inputs


@pytest.mark.parametrize("chunk", [None, 300, 1000, 16384])
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_is_that_of_the_reference(chunk, bias):
    model = network(700, 400, 20)
    pre = Preconditioner(model, chunk=chunk, bias=bias)
    inputs = backward(model, 1)
    expected = []
    for i, layer in enumerate(model[::2]):
        units = layer.in_features + bias
        width = min(chunk or units, units)
        expected.append(
            reference.precondition(
                layer.weight.grad.clone(),
                inputs[i],
                damping=0.1,
                scaling="trace",
                chunk=width,
                group=min(4, width),
                layer=i,
                bias_grad=layer.bias.grad.clone() if bias else None,
            )
        )
    pre.step()
    for layer, (weight, bias_grad, *_) in zip(model[::2], expected, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight, rtol=1e-9, atol=1e-10)
        if bias:
            torch.testing.assert_close(layer.bias.grad, bias_grad, rtol=1e-9, atol=1e-10)
    assert pre.stats()["failed_chunks"] == 0 and f"{700 + bias} -> " in pre.summary()


def test_the_published_setting_of_newton_muon():
    """Damping 0.2 of the trace, average 0.95, an inverse every 32 steps, layers whole but for the contraction, which
    is wider and comes in blocks: one call, as a plain float64 computation (arXiv 2604.01472)."""
    model = network(96, 96, 384, 96)
    pre = Preconditioner(model, damping=0.2, decay=0.95, every=32, chunk=97, bias=False)
    averages, weight, inverses = [0, 0, 0], 0.0, []
    for step in range(40):
        inputs = backward(model, step)
        if step < 20 or step % 32 == 0:
            weight = 0.95 * weight + 0.05
            averages = [0.95 * a + 0.05 * x.T @ x / len(x) for a, x in zip(averages, inputs[:-1], strict=True)]
            inverses = []
            for i, average in enumerate(averages):
                matrix = average / weight
                matrix = matrix / matrix.diagonal().mean()
                units = len(matrix)
                order, bounds = reference.division(units, 97, 4, 0, 0, i), reference.chunk_bounds(units, 97)
                inverse = torch.zeros_like(matrix)
                for a, b in itertools.pairwise(bounds):
                    index = order[a:b]
                    damped = matrix[index][:, index] + 0.2 * torch.eye(b - a, dtype=torch.float64)
                    inverse[index[:, None], index] = torch.linalg.inv(damped)
                inverses.append(inverse)
        expected = [layer.weight.grad @ inverse for layer, inverse in zip(model[::2], inverses, strict=True)]
        pre.step()
        for layer, grad in zip(model[::2], expected, strict=True):
            torch.testing.assert_close(layer.weight.grad, grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [dict(decay=0.5), dict(every=2, decay=0.5), dict(mode="whiten"), dict(mode="whiten", outputs=True), {}],
    ids=str,
)
def test_wide_chunks_train_and_resume(options):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return model, optimizer, Preconditioner(model, optimizer, chunk=None, **options)

    def go(model, optimizer, steps):
        losses = []
        for step in steps:
            x = torch.randn(50, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (model(x) - x[:, :10]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer, pre = start()
    losses = go(model, optimizer, range(6))
    assert losses[-1] < losses[0] and pre.stats()["failed_chunks"] == 0
    again, other, _ = start()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, optimizer, range(6, 9))
    go(again, other, range(6, 9))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
