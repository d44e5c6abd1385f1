"""Conditioning against dense covariances and their eigenvalues."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops import reference
from consistency_ops.analysis.second_moment import SecondMoment, chunks_of


def spectrum(rows, scale=1.0):
    """All eigenvalues, largest first, of the second moment of rows, in numpy."""
    rows = rows.double().numpy() * scale
    return np.linalg.eigvalsh(rows.T @ rows / len(rows))[::-1]


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-12 * wanted[0])


@pytest.mark.parametrize("samples", [8, 12, 64])  # fewer than, as many as and more than the 12 units
def test_linear_layers_equal_dense_covariances(samples):
    model = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(samples, 12) * torch.logspace(0, 2, 12), torch.randint(3, (samples,))
    with co.analysis.conditioning(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    first, second = monitor.result().layers
    hidden = model[:2](x).detach()
    logits = model[2](hidden).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)  # per sample: no 1/m
    close(first.input[0], spectrum(x))
    close(second.input[0], spectrum(hidden))
    close(second.gradient[0], spectrum(g))
    assert second.rank("gradient") == 2  # softmax: every gradient sums to zero
    assert second.kappa("gradient") == math.inf
    assert second.kappa("gradient", 0.5) == pytest.approx(second.gradient[0][0] / second.gradient[0][1])
    assert first.rank() == min(samples, 12)
    assert first.rows == [samples]


def test_convolutions_take_pixels_as_rows_and_channels_as_units():
    model = nn.Sequential(nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6 * 9, 4))
    x, y = torch.randn(10, 5, 7, 7), torch.randint(4, (10,))
    with co.analysis.conditioning(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    conv = monitor.result().layers[0]
    close(conv.input[0], spectrum(x.movedim(1, -1).flatten(0, -2)))
    out = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[3](out.relu().flatten(1)), y), out)
    close(conv.gradient[0], spectrum(g.movedim(1, -1).flatten(0, -2), scale=10 * 9))
    # C3: sigma_g = (N H W) G^T G
    flat = g.movedim(1, -1).flatten(0, -2).double().numpy()
    close(conv.gradient[0], np.linalg.eigvalsh(90 * flat.T @ flat)[::-1])


@pytest.mark.parametrize("samples", [9, 200])
@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize("chunk", [8, 64])
def test_preconditioned_spectrum_is_that_of_the_correction(samples, scaling, chunk):
    """The correction multiplies by P: the spectrum is that of Sigma P, taken from the reference operation itself."""
    d = 20
    model = nn.Linear(d, 3)
    x = torch.randn(samples, d) @ torch.randn(d, d)
    with co.analysis.conditioning(model, damping=0.1, scaling=scaling, chunk=chunk) as monitor:
        model(x).sum().backward()
    layer = monitor.result().layers[0]
    identity = torch.eye(d, dtype=torch.float64)
    p = reference.precondition(
        identity, x.double(), damping=0.1, scaling=scaling, chunk=chunk, group=min(8, chunk), max_rows=10_000
    )[0]
    sigma = x.double().T @ x.double() / samples
    tau = float(sigma.trace()) / d if scaling == "trace" else 1.0
    wanted = np.sort(np.linalg.eigvals((sigma @ p / tau).numpy()).real)[::-1]
    np.testing.assert_allclose(layer.preconditioned[0], wanted, rtol=1e-6, atol=1e-8)
    if chunk >= d:  # the closed form
        values = np.array(layer.input[0])
        np.testing.assert_allclose(layer.preconditioned[0], values / (values + 0.1 * tau), rtol=1e-6, atol=1e-9)
        assert layer.kappa("preconditioned", 0.4) < layer.kappa("input", 0.4)


@pytest.mark.parametrize("samples", [9, 200])
def test_normalised_spectrum_is_that_behind_a_batch_rms_norm(samples):
    x = torch.randn(samples, 16) * torch.logspace(-2, 1, 16)
    norm = co.nn.BatchRMSNorm(16, decay=0.0).double()
    y = norm(x.double())
    model = nn.Linear(16, 2)
    with co.analysis.conditioning(model, chunk=256) as monitor:
        model(x).sum().backward()
    layer = monitor.result().layers[0]
    close(layer.normalised[0], spectrum(y))
    values = np.array(layer.normalised[0])
    np.testing.assert_allclose(layer.both[0], values / (values + 0.1 * values.mean()), rtol=1e-6, atol=1e-9)


def test_calls_and_passes_are_pooled_whatever_their_number_of_rows():
    moment = SecondMoment()
    parts = [torch.randn(n, 10, dtype=torch.float64) for n in (3, 4, 20, 2)]
    for part in parts:
        moment.add(part)
    close(moment.spectrum().numpy(), spectrum(torch.cat(parts)))
    few = SecondMoment()
    for part in parts[:2]:
        few.add(part)
    close(few.spectrum().numpy()[:7], spectrum(torch.cat(parts[:2]))[:7])

    model = nn.Linear(10, 2)
    with co.analysis.conditioning(model, average=2) as monitor:
        for part in parts:
            model(part.float()).sum().backward()
    result = monitor.result()
    assert result.steps == [0, 2] and result.layers[0].rows == [7, 22]
    close(result.layers[0].input[1], spectrum(torch.cat(parts[2:]).float()))


def test_fisher_block_against_the_kronecker_product():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(50, 5)
    with co.analysis.conditioning(model) as monitor:
        model(x).square().mean(0).sum().backward()
    layer = monitor.result().layers[0]
    products = np.sort(np.kron(layer.input[0], layer.gradient[0]))[::-1]
    assert layer.fisher_lambda_max() == pytest.approx(products[0])
    assert layer.fisher_kappa() == pytest.approx(products[0] / products[-1])
    assert layer.fisher_kappa(p=0.5) == pytest.approx(products[0] / products[9])


def test_grouped_convolutions_are_preconditioned_by_group():
    assert [c.tolist() for c in chunks_of(6, 3, 128)] == [[0, 1], [2, 3], [4, 5]]
    model = nn.Conv1d(6, 6, 1, groups=3)
    x = torch.randn(40, 6, 1) * torch.tensor([1.0, 1, 1, 1, 100, 100])[:, None]
    with co.analysis.conditioning(model, scaling="absolute", damping=1e-6) as monitor:
        model(x).sum().backward()
    layer = monitor.result().layers[0]
    assert layer.kappa("input") > 1e3 and layer.kappa("preconditioned") < 10


def test_rows_are_sampled_and_bad_data_are_not_hidden():
    model = nn.Linear(4, 2)
    x = torch.randn(1000, 4)
    with co.analysis.conditioning(model, max_rows=100) as monitor:
        model(x).mean(0).sum().backward()
        model(x * math.nan).sum().backward()
    layer = monitor.result().layers[0]
    assert layer.rows == [100, 100]
    close(layer.input[0], spectrum(x[reference.sample_rows(1000, 100)]))
    assert math.isnan(layer.kappa()) and layer.to_dict()["input"][1] == [None] * 4


def test_plain_results_and_plot(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with co.analysis.conditioning(model) as monitor:
        model(torch.randn(3, 6)).sum().backward()
    result = monitor.result()
    json.dumps(result.to_dict(), allow_nan=False)
    result.plot().savefig(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1}, "conditioning: damping must be finite and at least 0, got -1"),
        ({"scaling": "x"}, "conditioning: scaling must be 'absolute' or 'trace', got 'x'"),
        ({"chunk": 0}, "conditioning: chunk must be at least 1, got 0"),
        ({"max_rows": 0}, "conditioning: max_rows must be at least 1, or None for all, got 0"),
        ({"reduction": "none"}, "conditioning: reduction must be 'mean' or 'sum', got 'none'"),
    ],
)
def test_mistakes_are_sentences(options, message):
    with pytest.raises(ValueError) as caught:
        co.analysis.conditioning(nn.Linear(2, 2), **options)
    assert str(caught.value) == message
