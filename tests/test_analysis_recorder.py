"""The recorder and its two cheap monitors: exact against brute force, on any model, gone without a trace."""

import copy
import gc
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import consistency_ops as co


def tanh_net(depth=3, width=12):
    layers = [nn.Linear(10, width), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def run(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def by_hand(model, x, y):
    """Outputs and output gradients of the children of a Sequential, without hooks."""
    outputs = []
    for layer in model:
        x = layer(x)
        x.retain_grad()
        outputs.append(x)
    F.cross_entropy(x, y).backward()
    return [o.detach() for o in outputs], [o.grad for o in outputs]


@pytest.fixture
def data():
    return torch.randn(32, 10), torch.randint(4, (32,))


def test_activation_statistics_equal_brute_force(data):
    model = tanh_net()
    with torch.no_grad():
        model[0].weight.mul_(8)  # saturated
    outputs, gradients = by_hand(model, *data)
    with co.analysis.activation_statistics(model) as monitor:
        run(model, *data)
    result = monitor.result()
    assert [layer.name for layer in result.layers] == [str(i) for i in range(7)]
    for layer, output, gradient in zip(result.layers, outputs, gradients, strict=True):
        z, g = output.double().numpy(), gradient.double().numpy()
        got = layer.mean[0], layer.std[0], layer.rms[0], layer.gradient_mean[0], layer.gradient_std[0]
        wanted = z.mean(), z.std(), math.sqrt((z**2).mean()), g.mean(), g.std()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-8)
        assert layer.percentile[0] == pytest.approx(np.sort(z.ravel())[math.ceil(0.98 * z.size) - 1], rel=1e-6)
        edges = np.concatenate([[-np.inf], layer.histogram.edges, [np.inf]])
        for histogram, values in ((layer.histogram, z), (layer.gradient_histogram, g)):
            wanted = np.histogram(values / math.sqrt((values**2).mean()), edges)[0] / values.size
            np.testing.assert_allclose(histogram.frequencies[0], wanted, atol=1.5 / values.size)
            assert sum(histogram.frequencies[0]) == pytest.approx(1)
    slopes = 1 - outputs[1].double() ** 2
    assert result.layers[1].saturation[0] == pytest.approx(float((slopes < 0.05).double().mean()))
    assert result.layers[1].saturation[0] > 0.3 > result.layers[3].saturation[0]
    assert math.isnan(result.layers[0].saturation[0])


@pytest.mark.parametrize(
    "activation",
    [nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Softplus(),
     nn.ELU(), nn.ELU(2.0), nn.LeakyReLU(0.01), nn.LeakyReLU(0.2), nn.GELU(), nn.SiLU(), co.nn.Modulus()],
    ids=str,
)  # fmt: skip
def test_saturation_is_where_the_slope_is_small(activation):
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    expected = slope.abs() < 0.05 * slope.abs().max()
    model = nn.Sequential(activation)
    with co.analysis.activation_statistics(model) as monitor:
        model(x)
    assert monitor.result().layers[0].saturation[0] == pytest.approx(float(expected.double().mean()), abs=2 / 4001)


def test_gradient_energy_equals_brute_force(data):
    model = tanh_net()
    _, gradients = by_hand(model, *data)
    with co.analysis.gradient_energy(model) as monitor:
        run(model, *data)
    result = monitor.result()
    assert [layer.kind for layer in result.layers] == ["Linear"] * 4
    for layer, g in zip(result.layers, gradients[::2], strict=True):
        assert layer.energy[0] == pytest.approx(float(g.double().square().mean()), rel=1e-5)
        assert layer.norm[0] == pytest.approx(float(g.double().norm(dim=1).mean()), rel=1e-5)
    ends = gradients[-1].square().mean() / gradients[0].square().mean()
    assert result.decades() == pytest.approx(math.log10(ends), rel=1e-4)


def test_points_every_and_average(data):
    model = tanh_net()
    x, y = data
    energies = []
    for part in x.split(4):
        _, gradients = by_hand(model, part, y[: len(part)])
        energies.append(gradients[0].double().square().mean())
    monitor = co.analysis.gradient_energy(model, every=2, average=2, layers="0")
    for part in x.split(4):
        with torch.no_grad():
            model(part)  # a validation pass does not count
        run(model, part, y[: len(part)])
    result = monitor.result()
    assert result.steps == [0, 4]  # passes 0 and 2, 4 and 6
    np.testing.assert_allclose(
        result.layers[0].energy, [(energies[0] + energies[2]) / 2, (energies[4] + energies[6]) / 2], rtol=1e-5
    )


def test_gradient_belongs_to_its_own_pass(data):
    model = tanh_net()
    x, y = data
    with co.analysis.gradient_energy(model, layers="0") as monitor:
        first, second = model(x), model(2 * x)
        F.cross_entropy(second, y).backward()
        (100 * F.cross_entropy(first, y)).backward()
    energy = monitor.result().layers[0].energy
    assert energy[0] > 100 * energy[1]


def test_the_model_trains_as_without_recorders_and_is_left_as_it_was(data):
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 4))
    twin = copy.deepcopy(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {n: {k: len(v) for k, v in d.items() if "hooks" in k and v is not None} for n, d in before.items()}
    with co.analysis.activation_statistics(model), co.analysis.gradient_energy(model):
        torch.manual_seed(1)
        run(model, *data)
        # A copy, and a pickle, carry no recorder.
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            run(other, *data)
    torch.manual_seed(1)
    run(twin, *data)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for name, module in model.named_modules():
        assert set(vars(module)) == set(before[name])
        assert {k: len(v) for k, v in vars(module).items() if "hooks" in k and v is not None} == hooks[name]


def test_a_recorder_that_is_dropped_removes_its_hooks(data):
    model = tanh_net()
    monitor = co.analysis.gradient_energy(model)
    assert model[0]._forward_hooks
    del monitor
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_recording_does_not_wait_for_the_device(data):
    """On the meta device there are no values: whatever asks for one fails."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5), nn.Tanh()).to("meta")
    with co.analysis.activation_statistics(model) as a, co.analysis.gradient_energy(model) as b:
        model(torch.randn(4, 3, 8, 8, device="meta")).sum().backward()
    assert len(a.points) == len(b.points) == 1


def test_shared_modules_tuples_and_checkpoints(data):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.act = nn.Linear(10, 6), nn.Linear(6, 9), nn.ReLU(inplace=True)
            self.rnn = nn.LSTM(9, 5, batch_first=True)

        def forward(self, x):
            x = self.act(self.first(x))
            x = self.act(checkpoint(self.second, x, use_reentrant=False))
            return self.rnn(x[:, None])[0][:, 0, :4]

    model = Odd()
    with co.analysis.activation_statistics(model) as monitor:
        run(model, *data)
    layers = {layer.name: layer for layer in monitor.result().layers}
    assert list(layers) == ["first", "act", "second", "rnn"]
    assert all(not math.isnan(layer.gradient_rms[0]) for layer in layers.values())
    x = data[0]
    a = F.relu(model.first(x))
    b = F.relu(model.second(a))
    both = torch.cat([a.flatten(), b.flatten()])
    assert layers["act"].rms[0] == pytest.approx(float(both.detach().square().mean().sqrt()), rel=1e-5)
    dead = torch.cat([(a == 0).all(0), (b == 0).all(0)]).double().mean()
    assert layers["act"].dead[0] == pytest.approx(float(dead))


def test_dead_units_are_counted_over_pixels_and_samples():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, -100.0, 0.0]))
    with co.analysis.activation_statistics(model, layers=nn.ReLU) as monitor:
        model(torch.randn(8, 2, 6, 6))
    assert monitor.result().layers[0].dead == [0.5]


def test_half_precision_and_constant_signals():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(torch.bfloat16)
    with torch.no_grad():
        model[0].bias.fill_(-50)
    with co.analysis.activation_statistics(model) as monitor:
        model(torch.randn(8, 4, dtype=torch.bfloat16)).sum().backward()
    relu = monitor.result().layers[1]
    assert relu.std == [0] and relu.saturation == [1] and relu.dead == [1]
    assert monitor.result().layers[0].gradient_rms == [0]


def test_results_are_plain_and_plots_are_drawn(data, tmp_path):
    model = tanh_net()
    a, b = co.analysis.activation_statistics(model), co.analysis.gradient_energy(model)
    for _ in range(3):
        run(model, *data)
    for result in (a.result(), b.result()):
        text = json.dumps(result.to_dict(), allow_nan=False)
        assert json.loads(text)["steps"] == [0, 1, 2]
        path = tmp_path / f"{type(result).__name__}.png"
        result.plot().savefig(path)
        assert path.stat().st_size > 10_000
    lines = a.result().plot_histograms(most=4).axes[0].patches
    assert len(lines) == 4
    areas = [sum(line.get_data().values) * 0.125 for line in lines]
    assert all(0.99 < area <= 1 + 1e-9 for area in areas)  # all but the values beyond four times the root mean square


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: co.analysis.gradient_energy(3),
            TypeError,
            "gradient_energy: model must be a torch.nn.Module, got int",
        ),
        (
            lambda: co.analysis.gradient_energy(nn.ReLU()),
            ValueError,
            "gradient_energy: the model has no layer to measure by default; name some with layers=",
        ),
        (
            lambda: co.analysis.gradient_energy(tanh_net(), layers=["0", "x*"]),
            ValueError,
            "gradient_energy: layers: 'x*' matches no module of the model",
        ),
        (
            lambda: co.analysis.activation_statistics(tanh_net(), every=0),
            ValueError,
            "activation_statistics: every must be a whole number, at least 1, got 0",
        ),
        (
            lambda: co.analysis.activation_statistics(tanh_net()).result(),
            RuntimeError,
            "activation_statistics: nothing was recorded; run the model, with gradients enabled, while the recorder is "
            "attached",
        ),
    ],
)
def test_mistakes_are_sentences(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
