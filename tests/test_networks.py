"""Builders of deep networks, and what contractive networks need: folded norms and clipped spectral norms."""

import math

import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops.nn import clip_spectral_norms_, deep_convnet, deep_mlp, fold_rms_norm


def test_defaults_are_network_c_of_the_paper():
    model = deep_mlp(784, 10)
    linear = [nn.Linear] + [co.nn.BatchRMSNorm, nn.Linear] * 11
    assert [type(m) for m in model if not isinstance(m, nn.ReLU)] == [nn.Flatten, *linear]
    sizes = [tuple(m.weight.shape) for m in model if isinstance(m, nn.Linear)]
    assert sizes == [(128, 784), *[(128, 128)] * 10, (10, 128)]
    assert all(abs(p.std() / 0.01 - 1) < 0.1 if p.dim() == 2 else not p.any() for p in model.parameters())


@pytest.mark.parametrize("activation", ["relu", "modulus", "tanh", "softsign", "sigmoid", "identity"])
@pytest.mark.parametrize("normalization", ["rms", "batch", "none"])
@pytest.mark.parametrize("init", [0.1, "he", "glorot", "standard", "orthogonal"])
def test_sizes_and_names(activation, normalization, init):
    options = dict(activation=activation, normalization=normalization, init=init)
    mlp = deep_mlp(20, 3, width=8, depth=5, **options)
    assert [m.out_features for m in mlp if isinstance(m, nn.Linear)] == [8] * 5 + [3]
    assert mlp(torch.randn(6, 4, 5)).shape == (6, 3)
    net = deep_convnet(2, 3, width=4, depth=5, pools=2, **options)
    assert sum(isinstance(m, nn.Conv2d) for m in net) == 5 and sum(isinstance(m, nn.MaxPool2d) for m in net) == 2
    assert net(torch.randn(6, 2, 12, 12)).shape == (6, 3)
    for model in (mlp, net):
        assert sum("Norm" in type(m).__name__ for m in model) == (0 if normalization == "none" else 5)


def test_initial_weights_have_their_law():
    def weight(init, activation="identity"):
        return deep_mlp(4, 4, width=300, depth=2, init=init, activation=activation)[3 + 1].weight

    for init, variance in (("he", 1 / 300), ("glorot", 2 / 600), ("standard", 1 / 900), (0.2, 0.04)):
        assert abs(weight(init).var() / variance - 1) < 0.03
    assert abs(weight("he", "relu").var() / (2 / 300) - 1) < 0.03
    for init, bound in (("glorot", math.sqrt(6 / 600)), ("standard", 1 / math.sqrt(300))):
        assert 0.99 * bound < weight(init).abs().max() <= bound
    torch.testing.assert_close(torch.linalg.svdvals(weight("orthogonal")), torch.ones(300), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(weight("orthogonal", "relu")), torch.full((300,), 2**0.5))


def test_orthogonal_modulus_networks_are_isometries():
    mlp = deep_mlp(16, 16, width=16, depth=100, activation="modulus", normalization="none", init="orthogonal").double()
    net = deep_convnet(8, 8, width=8, depth=30, pools=0, activation="modulus", normalization="none")[:-3].double()
    for model, shape in ((mlp, (16,)), (net, (8, 5, 5))):
        x = torch.randn(3, *shape).double().requires_grad_()
        y = model(x)
        residual = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, residual)
        for new, old in ((y, x), (grad, residual)):
            torch.testing.assert_close(new.flatten(1).norm(dim=1), old.flatten(1).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deep_mlp(4, 2, depth=0), "deep_mlp: depth must be at least 1, got 0"),
        (lambda: deep_mlp(4, 2, activation="gelu"), "deep_mlp: activation must be one of modulus, .*, got 'gelu'"),
        (lambda: deep_mlp(4, 2, normalization="layer"), "normalization must be one of rms, batch, none, got 'layer'"),
        (lambda: deep_mlp(4, 2, init="xavier"), "init must be a standard deviation or one of he, .*, got 'xavier'"),
        (lambda: deep_mlp(4, 2, init=0.0), "init must be positive and finite, got 0.0"),
        (lambda: deep_convnet(3, 2, depth=3, pools=3), r"deep_convnet: pools must be in \[0, depth = 3\), got 3"),
    ],
)
def test_errors_of_builders(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def trained_norms(model, x):
    model.train()
    for scale in (1.0, 0.3, 0.5):
        model(x * scale)
    return model.eval()


def bound(model):
    """Return the plain bound of a fully connected net: log of the product of spectral norms over smallest D."""
    total = 0.0
    for module in model:
        if isinstance(module, nn.Linear):
            total += float(torch.linalg.matrix_norm(module.weight.detach().double(), 2).log())
        elif isinstance(module, co.nn.BatchRMSNorm):
            total += float(module(torch.ones(1, module.num_features).double()).max().log())
    return total


@pytest.mark.parametrize("activation", ["modulus", "relu"])
def test_folding_keeps_the_function_and_tightens_the_bound(activation):
    model = deep_mlp(20, 5, width=16, depth=6, activation=activation, init="he").double()
    x = torch.randn(200, 4, 5).double() * torch.logspace(-1, 1, 5).double()
    folded = fold_rms_norm(trained_norms(model, x))
    assert not any(isinstance(m, co.nn.BatchRMSNorm) for m in folded)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert bound(folded) < bound(model) - 0.1
    # The certificate holds, and the model was not touched.
    y = x + 1e-3 * torch.randn_like(x)
    ratio = (folded(x) - folded(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max().log() <= bound(folded)
    assert sum(isinstance(m, co.nn.BatchRMSNorm) for m in model) == 6


def test_folding_convolutions():
    model = deep_convnet(2, 3, width=4, depth=4, pools=1, init="he").double()
    x = torch.randn(10, 2, 12, 12).double()
    folded = fold_rms_norm(nn.Sequential(trained_norms(model, x)))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    grouped = nn.Sequential(co.nn.BatchRMSNorm(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, padding=1)).double()
    x = torch.randn(10, 4, 5, 5).double() * torch.arange(1, 5).double().view(4, 1, 1)
    torch.testing.assert_close(fold_rms_norm(trained_norms(grouped, x))(x), grouped(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([co.nn.BatchRMSNorm(4)], ValueError, "must be followed by a Linear or convolution layer, got the end"),
        ([co.nn.BatchRMSNorm(4), nn.Tanh(), nn.Linear(4, 4)], ValueError, r"got Tanh \(1\)"),
        ([co.nn.BatchRMSNorm(4), nn.Flatten(), nn.Linear(16, 4)], ValueError, r"\(2\), got 4 and 16"),
        (None, TypeError, "fold_rms_norm: model must be an nn.Sequential, got Linear"),
    ],
)
def test_errors_of_folding(layers, error, message):
    with pytest.raises(error, match=message):
        fold_rms_norm(nn.Linear(2, 2) if layers is None else nn.Sequential(*layers))


def test_clipping_is_the_projection():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4), nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[1].weight.mul_(1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    assert clip_spectral_norms_(model, 0.5) == pytest.approx(float(torch.linalg.svdvals(before[0])[0]), rel=1e-5)
    sigma = torch.linalg.svdvals(model[0].weight)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(before[0]).clamp_max(0.5))
    # Nearest: by von Neumann's inequality the distance is at least that of the singular values.
    least = (torch.linalg.svdvals(before[0]) - sigma).norm()
    torch.testing.assert_close((model[0].weight - before[0]).norm(), least)
    assert all(torch.equal(p, q) for p, q in list(zip(model.parameters(), before, strict=True))[1:])
    with pytest.raises(ValueError, match="clip_spectral_norms_: limit must be positive and finite, got 0"):
        clip_spectral_norms_(model, 0)
