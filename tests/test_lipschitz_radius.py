"""Certified radii: by hand, against attacks, and their mistakes as sentences."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from support.lipschitz_networks import ResNet, contractive_style


def test_samples_that_are_not_finite_have_no_radius():
    x = torch.randn(4, 3)
    x[1, 0], x[2, 1] = math.nan, math.inf
    radius = co.analysis.certified_radius(nn.Linear(3, 2), x)
    assert (radius > 0).tolist() == [True, False, False, True] and radius.isfinite().all()


def attack(model, x, label, radius, restarts=4, steps=40):
    """Projected gradient ascent of every rival's margin within the l2 ball: whether the class was ever changed."""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(restarts):
        delta = torch.randn_like(x)
        delta *= (radius / delta.flatten(1).norm(dim=1)).view(-1, *[1] * (x.dim() - 1))
        for step in range(steps):
            delta.requires_grad_()
            logits = model(x + delta)
            own = logits.gather(1, label[:, None])[:, 0]
            rival = logits.scatter(1, label[:, None], -math.inf).amax(1)
            broken |= (rival > own).detach()
            (gradient,) = torch.autograd.grad((rival - own).sum(), delta)
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
            rate = 0.5 * radius * (1 - step / steps)
            delta = delta.detach() + gradient * (rate / length).view(-1, *[1] * (x.dim() - 1))
            norm = delta.flatten(1).norm(dim=1)
            delta = delta * (radius / norm).clamp(max=1).view(-1, *[1] * (x.dim() - 1))
    return broken


def trained(model, x, y, steps=150):
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", ["one layer", "modulus", "residual"])
def test_an_attack_does_not_break_the_certificate(kind):
    if kind == "residual":
        model, x = ResNet().double(), torch.randn(60, 3, 6, 6, dtype=torch.float64)
    else:
        model = nn.Sequential(nn.Linear(12, 2)) if kind == "one layer" else contractive_style(3, 16)
        model, x = model.double(), torch.randn(60, 12, dtype=torch.float64)
    y = (x.flatten(1)[:, :2].sum(1) > 0).long()
    model = trained(model, x, y)
    radius = co.analysis.certified_radius(model, x)
    assert radius.dtype == torch.float64 and radius.shape == (60,) and (radius > 0).all()
    label = model(x).argmax(1)
    assert not attack(model, x, label, radius * (1 - 1e-9)).any()
    # The attack is no straw man: a little (one layer) or some way beyond the certificate it wins.
    factor = {"one layer": 2.0, "modulus": 12.0, "residual": 300.0}[kind]
    assert attack(model, x, label, factor * radius).float().mean() > 0.5
    # And no pair of points is stretched further than the bound.
    bound = co.analysis.lipschitz_bound(model, x[:1])
    other = x + torch.randn_like(x) * torch.logspace(-4, 1, 60, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))
    gains = (model(x) - model(other)).norm(dim=1) / (x - other).flatten(1).norm(dim=1)
    assert gains.max() <= bound.folded


def test_radius_by_hand_and_for_targets():
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    model[0].weight.data = torch.tensor([[2.0, 0], [0, 1], [0, 0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    model.train()
    radius = co.analysis.certified_radius(model, x)
    torch.testing.assert_close(radius, torch.tensor([2.0, 3.0], dtype=torch.float64) / math.sqrt(2) / 2)
    assert model.training
    assert co.analysis.certified_radius(model, x, torch.tensor([0, 0])).tolist() == [radius[0], 0]
    assert co.analysis.certified_radius(model, x, bound=4.0)[0] == pytest.approx(float(radius[0]) / 2)


def test_plain_result_and_plot(tmp_path):
    found = co.analysis.lipschitz_bound(contractive_style())
    assert found.to_dict()["factors"][1]["kind"] == "Linear"
    found.plot().savefig(tmp_path / "l.png")
    assert (tmp_path / "l.png").stat().st_size > 8_000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: co.analysis.lipschitz_bound(3),
            TypeError,
            "lipschitz_bound: model must be a torch.nn.Module, got int",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 1), torch.zeros(2, 3)),
            ValueError,
            "certified_radius: the model must return logits (N, C) with C >= 2, got shape (2, 1)",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 2), torch.zeros(2, 3), torch.zeros(3)),
            ValueError,
            "certified_radius: targets must be (2,), got shape (3,)",
        ),
        (
            lambda: co.analysis.certified_radius(
                nn.Linear(3, 2, dtype=torch.complex64), torch.zeros(2, 3, dtype=torch.complex64)
            ),
            TypeError,
            "certified_radius: the model must return real logits, got torch.complex64",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 2), torch.zeros(2, 3), bound=0),
            ValueError,
            "certified_radius: bound must be positive, got 0",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 2), torch.zeros(2, 3), bound="1"),
            TypeError,
            "certified_radius: bound must be a LipschitzBound or a number, got str",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 2), torch.zeros(2, 3), torch.zeros(2)),
            TypeError,
            "certified_radius: targets must be int64, got torch.float32",
        ),
        (
            lambda: co.analysis.certified_radius(nn.Linear(3, 2), torch.zeros(2, 3), torch.tensor([0, 2])),
            ValueError,
            "certified_radius: targets must be classes in [0, 2), got 0 to 2",
        ),
    ],
)
def test_mistakes_are_sentences(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
