"""Propagation against dense Jacobians by torch.autograd.functional.jacobian."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional as F

import consistency_ops as co


def dense(function, x, residual, tau):
    """Return the figures that one sample's block should have, from its whole Jacobian."""
    j = jacobian(function, x[None])[0].reshape(residual.numel(), x.numel()).double()
    u, s, _ = torch.linalg.svd(j, full_matrices=False)
    kept = s > tau * s[0]
    r = residual.double().flatten()
    return {
        "sigma_max": s[0],
        "sigma_min": s[-1],
        "mean_singular_value": s.mean(),
        "rank": kept.sum().double(),
        "image_fraction": (u[:, kept].T @ r).square().sum() / r.square().sum(),
        "gain": (j.T @ r).norm() / r.norm(),
        "decay": (j.T @ r).norm() / (s[0] * r.norm()),
    }


def check(block, wanted, rel=1e-5, skip=()):
    for key in wanted[0]:
        if key not in skip:
            mean = float(torch.stack([w[key] for w in wanted]).mean())
            assert getattr(block, key) == pytest.approx(mean, rel=rel, abs=1e-6), key


def mlp():
    return nn.Sequential(
        nn.Linear(9, 14), nn.ReLU(inplace=True), nn.Linear(14, 6), co.nn.Modulus(), nn.Linear(6, 11), nn.Tanh()
    )


@pytest.mark.parametrize("exact", [512, 0])
def test_blocks_equal_dense_jacobians(exact):
    model, x, y = mlp(), torch.randn(5, 9), torch.randint(11, (5,))
    found = co.analysis.propagation(
        model, x, loss=lambda z: F.cross_entropy(z, y), samples=5, exact=exact, steps=40, tau=1e-2
    )
    assert [(b.start, b.end) for b in found.blocks] == [("input", "0"), ("0", "2"), ("2", "4"), ("4", "output")]
    assert {b.method for b in found.blocks} == {"exact" if exact else "lanczos"}
    pieces = [model[:1], nn.Sequential(nn.ReLU(), model[2]), model[3:5], model[5:]]
    values = [x, *(t.detach() for t in (model[0](x), model[:3](x), model[:5](x), model(x)))]
    for k, block in enumerate(found.blocks):
        end = values[k + 1].clone().requires_grad_()
        rest = [nn.Sequential(nn.ReLU(), *model[2:]), model[3:], model[5:], nn.Identity()][k]
        (residual,) = torch.autograd.grad(F.cross_entropy(rest(end), y), end)
        wanted = [dense(pieces[k], values[k][i], residual[i], 1e-2) for i in range(5)]
        # Estimates of traces have the noise of their random vector; all else is exact after enough steps.
        check(block, wanted, rel=1e-4, skip=() if exact else ("sigma_min", "mean_singular_value", "rank"))
        assert block.nullity == pytest.approx(block.outputs - block.rank)
        if not exact:
            assert block.mean_singular_value == pytest.approx(
                float(torch.stack([w["mean_singular_value"] for w in wanted]).mean()), rel=0.5
            )


def test_lanczos_trace_estimates_are_close_on_a_convolution():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    x = torch.randn(4, 2, 8, 8)
    exact = co.analysis.propagation(model, x, to="output", layers="0", tau=4 / 32).blocks
    rough = co.analysis.propagation(model, x, to="output", layers="0", exact=0, steps=32).blocks
    for a, b in zip(exact, rough, strict=True):
        assert a.tau == b.tau == 4 / 32
        assert b.sigma_max == pytest.approx(a.sigma_max, rel=1e-3)
        assert b.mean_singular_value == pytest.approx(a.mean_singular_value, rel=0.1)
        assert b.rank == pytest.approx(a.rank, rel=0.15)
        assert b.decay == pytest.approx(a.decay, rel=1e-3)
        assert b.image_fraction == pytest.approx(a.image_fraction, abs=0.1)


def test_modulus_keeps_the_image_and_relu_loses_half():
    """Behind an orthogonal layer ReLU passes back half of the energy of a random residual, the modulus all of it."""
    weight = nn.init.orthogonal_(torch.empty(64, 64))
    x = torch.randn(16, 64)
    for activation, wanted in ((co.nn.Modulus(), 1.0), (nn.ReLU(), 0.5)):
        linear = nn.Linear(64, 64, bias=False)
        linear.weight.data = weight
        model = nn.Sequential(linear, activation)
        block = co.analysis.propagation(model, x, layers=type(activation), samples=16).blocks[0]
        assert block.image_fraction == pytest.approx(wanted, abs=1e-12 if wanted == 1 else 0.05)
        assert block.sigma_max == pytest.approx(1, rel=1e-5)
    assert block.mean_singular_value == pytest.approx(0.5, abs=0.05)


def test_training_mode_uses_the_statistics_of_the_batch_and_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), co.nn.BatchRMSNorm(8), nn.Dropout(0.5), nn.Linear(8, 3))
    x = 5 * torch.randn(400, 6)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    found = co.analysis.propagation(model, x, layers="*", samples=3)
    norms = {b.end: b for b in found.blocks}
    deviation = model[0](x).detach().std(0)
    assert norms["1"].sigma_max == pytest.approx(float((1 / deviation).max()), rel=1e-2)
    assert norms["2"].sigma_max == pytest.approx(1, rel=2e-2)
    assert norms["3"].mean_singular_value == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()
    assert {b.end: b for b in co.analysis.propagation(model, x, layers=["0", "1"]).blocks}[
        "1"
    ].sigma_max == pytest.approx(1, rel=1e-4)


def test_branches_frozen_weights_and_tokens():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, tokens):
            x = self.embed(tokens)
            h = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return x + self.out(h)

    model = Attention().requires_grad_(False)
    tokens = torch.randint(7, (3, 5))
    for exact in (512, 0):
        found = co.analysis.propagation(model, tokens, layers=["embed", "q", "k", "v", "out"], exact=exact)
        assert [(b.start, b.end) for b in found.blocks] == [
            ("embed", "q"), ("q", "out"), ("k", "out"), ("v", "out"), ("out", "output"),
        ]  # fmt: skip
    assert found.blocks[-1].sigma_max == pytest.approx(1, rel=1e-4)


def test_probe_is_the_monitor_of_glorot_and_bengio():
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(30, 20)
    monitor = co.analysis.activation_statistics(model)
    model(x).sum().backward()
    probe = monitor.probe(x, samples=4)
    assert list(probe) == ["input", "1", "3"]
    z = model[:2](x)[0].detach()
    wanted = torch.linalg.svdvals(jacobian(model[2:4], z)).mean()
    one = co.analysis.propagation(model, x, layers=nn.Tanh, samples=1).blocks[1]
    assert one.mean_singular_value == pytest.approx(float(wanted), rel=1e-5)
    assert monitor.result().jacobian == [probe] and monitor.result().probe_steps == [1]
    assert len(monitor.points) == 1  # the passes of the probe are not recorded


def test_plain_results_and_plot(tmp_path):
    found = co.analysis.propagation(mlp(), torch.randn(4, 9), exact=6)
    text = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {b["method"] for b in text["blocks"]} == {"exact", "lanczos"}
    found.plot().savefig(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x.flatten(0, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: co.analysis.propagation(mlp()), TypeError, "propagation: inputs are missing"),
        (
            lambda: co.analysis.propagation(mlp(), torch.randn(2, 9), to="end"),
            ValueError,
            "to must be 'next' or 'output'",
        ),
        (
            lambda: co.analysis.propagation(mlp(), torch.randn(2, 9), tau=1),
            ValueError,
            "tau in (0, 1), got 8, 24, 512, 1",
        ),
        (
            lambda: co.analysis.propagation(Flat(), torch.randn(2, 3, 4)),
            ValueError,
            "propagation: dimension 0 must be the batch of 2, but a has shape (6, 4)",
        ),
        (
            lambda: co.analysis.propagation(mlp(), torch.randn(2, 9), loss=lambda z: z),
            TypeError,
            "propagation: loss must return a tensor with one element",
        ),
    ],
)
def test_mistakes_are_sentences(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_dead_gradient_is_nan_not_zero_over_zero_crash():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = co.analysis.propagation(model, torch.randn(3, 4), loss=lambda z: 0 * z.sum())
    assert all(math.isnan(b.image_fraction) and math.isnan(b.decay) for b in found.blocks)


@pytest.mark.parametrize("exact", [512, 0])
def test_values_that_are_not_finite_stay_in_their_sample(exact):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    good = co.analysis.propagation(model, x[:2], layers="0", exact=exact).blocks[0]
    x[2, 1] = math.nan
    mixed = co.analysis.propagation(model, x, layers="0", exact=exact).blocks[0]
    assert mixed.sigma_max == pytest.approx(good.sigma_max, rel=1e-5)
    model[0].weight.data[0, 0] = math.nan
    assert math.isnan(co.analysis.propagation(model, x, layers="0", exact=exact).blocks[1].sigma_max)
