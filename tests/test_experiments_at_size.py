"""What the experiments at the sources' own size compute by themselves: pictures, steps written out, intervals."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.peers import tasks
from benchmarks.training import contractive, fit, modern, muon, narrow_search, shapes, shapeset


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_pictures_have_the_published_greys_and_classes():
    x, y = shapes.draw(3000, seeded(0))
    assert x.shape == (3000, 1024) and x.dtype == torch.float32
    shares = torch.bincount(y, minlength=9) / len(y)
    assert len(shares) == 9 and shares[:3].sum() == pytest.approx(0.5, abs=0.04)
    assert shares[[4, 5, 7]].sum() > 1.5 * shares[[3, 6, 8]].sum()  # two kinds can be drawn in two orders
    for picture, number in zip(x[:200], y[:200].tolist(), strict=True):
        greys = ((picture.unique() + 1) / 2).tolist()
        assert 2 <= len(greys) <= 1 + len(shapes.CLASSES[number])
        assert all(0 <= g <= 0.45 or 0.55 <= g <= 1 for g in greys)
        ground = float((picture[0] + 1) / 2)  # no object touches the border
        assert all((g > 0.5) != (ground > 0.5) for g in greys if abs(g - ground) > 1e-6)
        square = picture.view(32, 32)
        assert torch.cat([square[[0, -1]].flatten(), square[:, [0, -1]].flatten()]).unique().numel() == 1
    again = shapes.draw(3000, seeded(0))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert not torch.equal(shapes.draw(3000, seeded(1))[0], x)


@pytest.mark.parametrize("kind", range(3))
def test_a_shape_covers_the_pixels_of_its_area(kind):
    kinds = torch.full((500,), kind)
    points, sizes, places = shapes._placed(kinds, seeded(2))
    x, y = points[..., 0], points[..., 1]
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2  # shoelace: positive, the corners run counter-clockwise
    torch.testing.assert_close(area, shapes._area(kinds, sizes) / 8, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(shapes._inside(points).sum(1).float(), area, rtol=0.1, atol=12)
    assert points.min() >= 1 - 1e-3 and points.max() <= shapes.SIDE - 1 + 1e-3
    assert ((places > 1) & (places < shapes.SIDE - 1)).all()
    edges = (points - points.roll(1, 1)).norm(dim=2)
    assert ((edges > 1e-3).sum(1) == shapes.CORNERS[kind]).all()
    if kind == 1:  # opposite sides of a parallelogram are alike
        side = points[:, 1] - points[:, 0]
        torch.testing.assert_close(side, points[:, 2] - points[:, 3], rtol=1e-4, atol=1e-3)


def test_a_second_object_does_not_hide_the_first():
    """Measured in pixels; the generator's own rule is an estimate, so that a few pictures break it."""
    count = 400
    generator = seeded(3)
    x, y = shapes.draw(count, generator)
    alike = sum(len(p.unique()) == 3 for p, n in zip(x, y.tolist(), strict=True) if n >= 3)
    assert alike >= 0.98 * int((y >= 3).sum())  # both are seen
    first, _, places = shapes._placed(torch.ones(1, dtype=torch.long), generator)
    area = torch.ones(1)
    far = first + 100.0
    assert shapes._hidden_share(first, places, area, far, places + 100.0, area) == 0
    near = shapes._hidden_share(first, places, area, first + 1e-3, places + 1e-3, area)
    assert near == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softsign"])
def test_the_step_written_out_is_that_of_autograd(activation):
    network = shapeset.Network([12, 9, 9, 5], activation, "glorot", 0)
    layers = [nn.Linear(w.shape[1], w.shape[0]) for w in network.weights]
    for layer, weight in zip(layers, network.weights, strict=True):
        layer.weight.data.copy_(weight)
        layer.bias.data.zero_()
    act = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softsign": nn.Softsign}[activation]
    model = nn.Sequential(layers[0], act(), layers[1], act(), layers[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    generator = seeded(0)
    for _ in range(5):
        x, y = torch.randn(7, 12, generator=generator), torch.randint(5, (7,), generator=generator)
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            found, gradients = network.gradients(network.values(x), y, 0.3)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(gradients[0].sum(0), layers[0].bias.grad)
    for layer, weight, bias in zip(layers, network.weights, network.biases, strict=True):
        torch.testing.assert_close(weight, layer.weight.detach())
        torch.testing.assert_close(bias, layer.bias.detach())


@pytest.mark.parametrize("optimizer", ["adam", "sgd2"])
@pytest.mark.parametrize("activation", ["modulus", "relu"])
def test_networks_side_by_side_take_the_steps_of_the_optimizers(optimizer, activation):
    settings = {"activation": activation, "optimizer": optimizer, "depth": 3, "width": 6, **narrow_search.BASE}
    settings |= {"decay": 1e-2}
    networks = narrow_search.Networks(settings, range(2))
    rates = narrow_search.RATES[optimizer]
    chosen = 1 * len(rates) + 2  # second seed, third rate
    model = co.nn.deep_mlp(
        784, 10, width=6, depth=3, activation=activation, normalization="none", init="orthogonal", seed=1
    )
    if optimizer == "adam":
        weights = [p for p in model.parameters() if p.dim() > 1]
        biases = [p for p in model.parameters() if p.dim() == 1]
        other = torch.optim.Adam([{"params": weights, "weight_decay": 1e-2}, {"params": biases}], lr=rates[2])
    else:
        other = co.optim.SGD2(model, lr=rates[2], weight_decay=1e-2)
    generator = seeded(0)
    for _ in range(4):
        x, y = torch.randn(30, 784, generator=generator), torch.randint(10, (30,), generator=generator)
        logits = networks(x.expand(len(networks.rates), -1, -1))
        loss = functional.cross_entropy(logits.mT, y.expand(len(logits), -1), reduction="none").mean(1)
        networks.step(list(torch.autograd.grad(loss.sum(), networks.weights)), settings, generator)
        expected = functional.cross_entropy(model(x), y)
        assert loss[chosen].item() == pytest.approx(expected.item(), rel=1e-4)
        other.zero_grad()
        expected.backward()
        other.step()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for layer, weight in zip(layers, networks.weights, strict=True):
        torch.testing.assert_close(weight[chosen, :, :-1].detach(), layer.weight.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight[chosen, :, -1].detach(), layer.bias.detach(), rtol=1e-3, atol=1e-4)


def test_a_network_that_diverges_leaves_its_neighbours_alone():
    gradient, inputs = torch.randn(2, 3, 5, generator=seeded(0)), torch.randn(2, 8, 4, generator=seeded(1))
    alone = narrow_search.corrected(gradient[1:], inputs[1:])
    inputs[0] = math.inf
    both = narrow_search.corrected(gradient, inputs)
    torch.testing.assert_close(both[1:], alone)
    assert torch.equal(both[0], torch.zeros(3, 5))


def test_share_of_networks_that_train():
    losses = [[2.3, 1.0, None], [1.9, 1.5, None], [2.3, 2.2, 0.1]]
    record = {"rates": [0.1, 0.03, 0.01], "final_losses": losses}
    assert narrow_search.trained([record]) == (2, 3, 0.03)
    # A table of Wilson's intervals: 0 of 5, 5 of 5, 8 of 10.
    for counts, expected in (((0, 5), (0, 0.4345)), ((5, 5), (0.5655, 1)), ((8, 10), (0.4902, 0.9433))):
        assert narrow_search.wilson(*counts) == pytest.approx(expected, abs=1e-4)


def test_the_modulus_keeps_one_bit_and_gelu_a_float_an_element_more_than_relu():
    """ReLU's output is kept by the linear layer after it in any case."""
    x, y = torch.randn(modern.BATCH["vit"], 3, 16, 16, generator=seeded(0)), torch.zeros(modern.BATCH["vit"]).long()
    split = tasks.Split((x, y), (x, y), (x, y))
    relu, gelu, modulus = (modern.kept_for_backward("vit", name, split) for name in modern.ACTIVATIONS)
    elements = 2 * len(x) * 16 * 256  # two blocks, sixteen tokens
    assert modulus - relu == elements // 8
    assert gelu - relu == 4 * elements


def test_networks_of_today_differ_in_their_activation_only():
    for network in modern.NETWORKS:
        states = [modern.build(network, name, 3).state_dict() for name in modern.ACTIVATIONS]
        for state in states[1:]:
            assert state.keys() == states[0].keys()
            assert all(torch.equal(state[key], value) for key, value in states[0].items())
        for name, kind in modern.ACTIVATIONS.items():
            found = {type(m) for m in modern.build(network, name, 0).modules()} & set(modern.ACTIVATIONS.values())
            assert found == {kind}


def test_orthogonal_projection():
    model = co.nn.deep_mlp(50, 10, width=20, depth=4, activation="modulus", init="he")
    contractive.orthogonalise_(model)
    for layer in (m for m in model if isinstance(m, nn.Linear)):
        values = torch.linalg.svdvals(layer.weight.detach())
        if layer.in_features == layer.out_features:
            torch.testing.assert_close(values, torch.ones_like(values))
        else:
            assert values.max() <= 1 + 1e-4


def test_a_network_of_the_other_package_is_certified_by_its_own_norms():
    pytest.importorskip("deel.torchlip", reason="the comparison needs deel-torchlip")
    generator = seeded(0)
    x, y = 50 * torch.randn(40, 1, 28, 28, generator=generator), torch.randint(10, (40,), generator=generator)
    data = fit.Split(x, y, x[:20], y[:20], 50.0)
    size = {"epochs": 1, "batch": 20}
    settings = contractive.SETTINGS["1-Lipschitz, depth 4, temperature 20"]
    record = contractive.run(settings, size, 0, data, lambda text: None)
    assert record["plain"] == pytest.approx(-math.log10(255), abs=0.01)
    assert sorted(record["certified_plain"], reverse=True) == record["certified_plain"]


def test_muon_is_that_of_torch_with_adam_on_the_biases():
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    other = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    other.load_state_dict(model.state_dict())
    ours = muon.Muon(model, 0.02)
    matrices, biases = ([p for p in other.parameters() if p.dim() == d] for d in (2, 1))
    theirs = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(biases, lr=0.02),
    ]
    generator = seeded(0)
    for _ in range(3):
        x = torch.randn(7, 12, generator=generator)
        for network, optimizers in ((model, [ours]), (other, theirs)):
            network.zero_grad()
            network(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02 * 0.05)  # torch iterates in bfloat16
    kernel = torch.randn(6, 2, 3, 3, generator=generator)
    convolution = nn.Conv2d(2, 6, 3, bias=False)
    before, convolution.weight.grad = convolution.weight.detach().clone(), kernel
    muon.Muon(convolution, 1 / (0.2 * math.sqrt(18))).step()
    values = torch.linalg.svdvals((before - convolution.weight.detach()).flatten(1))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_goes_on_from_its_state():
    networks = [nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)) for _ in range(2)]
    optimizers = [muon.Muon(network, 0.02) for network in networks]
    x = torch.randn(7, 2, 5, 5, generator=seeded(0))

    def step(i: int) -> None:
        networks[i].zero_grad()
        networks[i](x).square().mean().backward()
        optimizers[i].step()

    step(0)
    step(0)
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    step(0)
    step(1)
    assert all(torch.equal(p, q) for p, q in zip(*(network.parameters() for network in networks), strict=True))
