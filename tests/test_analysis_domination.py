"""Weight domination: the singular values of weights and gradients against brute force, and gone without a trace."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import consistency_ops as co
from consistency_ops.analysis.weight_domination import largest_singular_value

UP_TO = 1e-3  # what the Gram iteration may be too large


def top(matrix):
    return float(torch.linalg.svdvals(matrix.detach().double().flatten(1))[0])


def close(values, wanted):
    for value, exact in zip(values, wanted, strict=True):
        assert exact * (1 - 1e-6) <= value <= exact * (1 + UP_TO)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (30, 5), (64, 64), (8, 3, 5, 5), (200, 300)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_largest_singular_value(shape, scale):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = (scale * torch.randn(shape)).to(dtype)
        close([float(largest_singular_value(weight))], [top(weight)])
    orthogonal = nn.init.orthogonal_(torch.empty(300, 200))  # all singular values alike: the slowest case
    close([float(largest_singular_value(orthogonal))], [1.0])
    assert float(largest_singular_value(torch.zeros(3, 4))) == 0
    assert math.isnan(float(largest_singular_value(torch.tensor([[1.0, math.nan]]))))


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def step(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def test_equals_brute_force_at_every_point_and_changes_nothing():
    x, y = torch.randn(12, 3, 16, 16), torch.randint(5, (12,))
    model, other = convnet(), convnet()
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights, gradients = [], []
    with co.analysis.weight_domination(model, every=2) as monitor:
        for i in range(4):
            before = [top(model[k].weight) for k in (0, 2, 4)]
            step(model, x, y)
            if i % 2 == 0:
                weights.append(before)
                gradients.append([top(model[k].weight.grad) for k in (0, 2, 4)])
            if i == 0:
                step(other, x, y)
                for p, q in zip(model.parameters(), other.parameters(), strict=True):
                    assert torch.equal(p.grad, q.grad)
            optimizer.step()
    result = monitor.result()
    assert result.steps == [0, 2] and [layer.name for layer in result.layers] == ["0", "2", "4"]
    for k, layer in enumerate(result.layers):
        close(layer.weight, [row[k] for row in weights])
        close(layer.gradient, [row[k] for row in gradients])
        assert layer.ratio(0) == layer.gradient[0] / layer.weight[0]
    assert not any(p._backward_hooks for p in model.parameters())
    step(model, x, y)
    assert monitor.result().steps == [0, 2]
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.plot().axes) == 2


def test_a_weight_behind_a_normalisation_dominates_its_gradient_when_it_grows():
    """The output does not depend on the scale s of the weight, so the gradient is 1/s times as large."""
    x, y = torch.randn(200, 10), torch.randint(4, (200,))
    model = nn.Sequential(nn.Linear(10, 16, bias=False), nn.BatchNorm1d(16, eps=1e-30), nn.ReLU(), nn.Linear(16, 4))
    ratios = []
    for scale in (1.0, 1e3):
        with torch.no_grad():
            model[0].weight.mul_(scale)
        with co.analysis.weight_domination(model) as monitor:
            step(model, x, y)
        result = monitor.result()
        ratios.append(result.layers[0].ratio())
        assert result.dominated() == (["0"] if scale > 1 else [])
    assert ratios[1] == pytest.approx(1e-6 * ratios[0], rel=1e-2)


def test_average_shared_and_frozen_weights_and_layers_without():
    x, y = torch.randn(20, 6), torch.randint(6, (20,))
    shared = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(shared, nn.Tanh(), nn.Linear(6, 6), shared)
    model[2].requires_grad_(False)
    with co.analysis.weight_domination(model, layers=("*",), average=2) as monitor:
        grads = []
        for _ in range(2):
            step(model, x, y)
            grads.append(top(shared.weight.grad))
    by_name = {layer.name: layer for layer in monitor.result().layers}
    close(by_name["0"].gradient, [sum(grads) / 2])  # the sum over both uses
    close(by_name["0"].weight, [top(shared.weight)])
    assert by_name["2"].weight[0] > 0 and math.isnan(by_name["2"].gradient[0])
    assert math.isnan(by_name["1"].weight[0]) and math.isnan(by_name["1"].ratio())
    parametrised = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)))
    with co.analysis.weight_domination(parametrised) as monitor:
        step(parametrised, x, y)
    assert math.isnan(monitor.result().layers[0].weight[0])


def test_a_copy_of_the_model_carries_no_hook():
    x, y = torch.randn(20, 6), torch.randint(6, (20,))
    model = nn.Sequential(nn.Linear(6, 6))
    with co.analysis.weight_domination(model) as monitor:
        step(model, x, y)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            step(other, x, y)
        assert len(monitor.points) == 1
    with pytest.raises(ValueError, match="weight_domination: every must be a whole number"):
        co.analysis.weight_domination(model, every=0)


def test_analyse_finds_a_dominated_layer():
    x, y = torch.randn(200, 10), torch.randint(4, (200,))
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e3)
    result = co.analysis.analyse(model, x, loss=lambda z: F.cross_entropy(z, y))
    (finding,) = (f for f in result.findings if f.title == "Weight domination")
    assert finding.layers == ["0"] and "sigma_max" in finding.measured
    assert "Weight domination" in result.to_html()
    assert result.domination.layers[0].ratio() < 1e-5
