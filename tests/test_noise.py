"""Gradient noise and residual noise: their law, their place before the correction, and that nothing else changes."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.experimental import ResidualNoise
from consistency_ops.optim import SGD2, GradientNoise, select_learning_rate


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_noise_has_the_scheduled_variance():
    parameter = nn.Parameter(torch.zeros(100_000))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    noise = GradientNoise(optimizer, eta=0.3, gamma=0.55)
    seen = []
    for step in range(4):
        parameter.grad = torch.full_like(parameter, 2.0)
        optimizer.step()
        assert noise.std(step) == math.sqrt(0.3 / (1 + step) ** 0.55)
        added = parameter.grad - 2.0
        # 100 000 samples: the mean is known to 0.3 % of the deviation, the deviation to 0.22 %; five times that.
        assert abs(added.mean()) < 0.016 * noise.std(step)
        assert abs(added.std() / noise.std(step) - 1) < 0.011
        assert abs((added / added.std()).pow(4).mean() - 3) < 0.1
        seen.append(added / noise.std(step))
    assert all(abs((seen[0] * other).mean()) < 0.016 for other in seen[1:])


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("closure", [False, True])
def test_noise_comes_before_the_correction(attached_first, closure):
    layer = nn.Linear(5, 4).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    make = [
        lambda: GradientNoise(optimizer, eta=0.5, seed=3),
        lambda: co.Preconditioner(layer, optimizer, damping=0.1),
    ]
    for attach in make if attached_first else reversed(make):
        attach()
    x = torch.randn(50, 5).double()

    def backward():
        optimizer.zero_grad()
        layer(x).square().mean().backward()

    backward()
    generator = torch.Generator().manual_seed(3 << 31)
    noisy = [p.grad + math.sqrt(0.5) * torch.empty_like(p).normal_(generator=generator) for p in layer.parameters()]
    expected = co.precondition(noisy[0], x, damping=0.1, scaling="trace", bias_grad=noisy[1])
    if closure:
        optimizer.step(backward)
    else:
        optimizer.step()
    torch.testing.assert_close(layer.weight.grad, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bias.grad, expected[1], rtol=1e-9, atol=1e-9)


def test_noise_resumes_and_leaves_torch_alone():
    model = network()
    optimizer = SGD2(model, lr=0.1)
    GradientNoise(optimizer, eta=1.0)
    before = torch.get_rng_state()
    train(model, optimizer, 3)
    assert torch.equal(torch.get_rng_state(), before)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 3, first=3)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = network()
    other = SGD2(resumed, lr=0.5)
    GradientNoise(other, eta=1.0)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, 3, first=3)
    assert same(model, resumed)


def test_a_rate_search_leaves_the_noise_as_it_was():
    models = [network(), network()]
    for i, model in enumerate(models):
        optimizer = SGD2(model, lr=0.05)
        GradientNoise(optimizer, eta=0.1)
        train(model, optimizer, 2)
        if i:
            batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(3)]
            loss = lambda batch, model=model: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
            select_learning_rate(model, optimizer, loss, batches, candidates=(0.05,))
        train(model, optimizer, 2, first=2)
    assert same(*models)


def test_removed_or_zero_noise_is_none():
    models = [network() for _ in range(3)]
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if i:
            noise = GradientNoise(optimizer, eta=0.0 if i == 1 else 1.0)
            residual = ResidualNoise(model, scale=0.0 if i == 1 else 1.0)
            if i == 2:
                noise.remove()
                residual.remove()
        train(model, optimizer, 3)
    assert same(models[0], models[1]) and same(models[0], models[2])


def test_residual_noise_has_its_scale_and_goes_on():
    """Below the layer, the residual is that of the network without noise plus scale rms N(0, 1)."""
    top, bottom = nn.Linear(400, 300, bias=False).double(), nn.Linear(20, 400).double()
    model = nn.Sequential(bottom, nn.Tanh(), top)
    x, residual = torch.randn(50, 20).double(), torch.randn(50, 300).double()
    hidden = torch.tanh(bottom(x)).detach()

    def top_gradient():
        model.zero_grad()
        model(x).backward(residual)
        return top.weight.grad.clone(), bottom.weight.grad.clone()

    clean, clean_below = top_gradient()
    noise = ResidualNoise(model, scale=0.1, layers="2")
    added, below = (new - old for new, old in zip(top_gradient(), (clean, clean_below), strict=True))
    # G = R^T X: invert for R, which has more columns than rows here.
    found = torch.linalg.lstsq(hidden.T, added.T).solution
    expected = 0.1 * residual.square().mean().sqrt()
    assert abs(found.std() / expected - 1) < 0.05 and abs(found.mean()) < 0.05 * expected
    assert below.abs().max() > 0

    model.eval()
    assert torch.equal(top_gradient()[0], clean)
    model.train()
    noise.remove()
    assert torch.equal(top_gradient()[0], clean)


def test_residual_noise_keeps_the_forward_pass_and_dead_residuals():
    model = network()
    x = torch.randn(4, 6)
    expected = model(x)
    ResidualNoise(model, scale=1.0)
    assert torch.equal(model(x), expected)
    model(x).backward(torch.zeros(4, 3))
    assert all(not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_both_compile():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradientNoise(optimizer, eta=0.1)
    ResidualNoise(model, scale=0.1)
    before = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, 2)
    assert not same(model, before)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, o: GradientNoise(m), TypeError, "GradientNoise: optimizer must be a torch.optim.Optimizer, got Seq"),
        (lambda m, o: GradientNoise(o, eta=-1), ValueError, "GradientNoise: eta must be at least 0 and finite, got -1"),
        (lambda m, o: GradientNoise(o, gamma=math.nan), ValueError, "gamma must be at least 0 and finite, got nan"),
        (lambda m, o: GradientNoise(o, seed=-1), ValueError, r"seed must be in \[0, 2\^32\), got -1"),
        (lambda m, o: ResidualNoise(m, scale=math.inf), ValueError, "ResidualNoise: scale must be at least 0"),
        (
            lambda m, o: ResidualNoise(m, layers="no"),
            ValueError,
            r"layers must name modules .*, got tuple \('no'\)",
        ),
        (lambda m, o: ResidualNoise(p := nn.Sequential(Pair()), layers=Pair) and p(1), TypeError, "must be a Tensor"),
    ],
)
def test_errors(make, error, message):
    model = network()
    with pytest.raises(error, match=message):
        make(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    GradientNoise(optimizer)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="GradientNoise: gradients must be dense, got layout torch.sparse_coo"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(30, 6), (5, 6, 6)], ids=str)
def test_residual_noise_before_an_activation_in_place(shape):
    """The residual is that of the layer's own output, before it was overwritten."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x, results = torch.randn(shape), []
    for inplace in (True, False):
        model[1].inplace = inplace
        noise = ResidualNoise(model, scale=0.5, layers="0")
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        noise.remove()
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    model.zero_grad()
    model(x).square().sum().backward()
    assert not torch.equal(results[0][0], model[0].weight.grad) and torch.equal(results[0][2], model[2].weight.grad)


def test_noise_has_its_scale_where_a_fused_optimizer_unscales():
    weights = []
    for fused in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        GradientNoise(optimizer, eta=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 6)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
