"""Pixel-wise decorrelation: against brute force, and the two variants against each other where they must agree."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.experimental import decorrelate_fft, decorrelate_im2col


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding=2),
        dict(stride=2, padding=(1, 0)),
        dict(stride=(1, 3), dilation=2, padding=2),
    ],
    ids=str,
)
def test_im2col_is_the_layers_least_squares_step(options):
    """A linear convolution and its square loss: without momentum and with hardly any damping one step solves it."""
    layer = nn.Conv2d(2, 3, 3, bias=False, **options).double()
    x = torch.randn(6, 2, 11, 12).double()
    y = layer(x)
    target = torch.randn_like(y)
    (0.5 * (y - target).square().sum() / (y.numel() / y.shape[1])).backward()
    step = decorrelate_im2col(layer.weight.grad, x, damping=1e-12, **options)
    rows = F.unfold(x, 3, **options).transpose(1, 2).flatten(0, 1)
    solution = torch.linalg.lstsq(rows, target.movedim(1, -1).flatten(0, 2)).solution.T
    torch.testing.assert_close((layer.weight - step).flatten(1), solution, rtol=1e-8, atol=1e-9)

    grad = torch.randn_like(layer.weight)
    moment = rows.T @ rows / len(rows) + 0.3 * torch.eye(18).double()
    expected = torch.linalg.solve(moment, grad.flatten(1).T).T.view_as(grad)
    torch.testing.assert_close(decorrelate_im2col(grad, x, damping=0.3, **options), expected, rtol=1e-9, atol=1e-10)


def circular_patches(x, height, width):
    """Every window of the periodic image, (N H W, in height width)."""
    tiled = torch.cat([torch.cat([x, x], 2)] * 2, 3)
    windows = tiled.unfold(2, height, 1).unfold(3, width, 1)[:, :, : x.shape[2], : x.shape[3]]
    return windows.movedim(1, 3).flatten(3).flatten(0, 2)


@pytest.mark.parametrize("size", [(5, 6), (6, 5)])
def test_fourier_is_exact_for_periodic_images(size):
    x, grad = torch.randn(4, 3, *size).double(), torch.randn(2, 3, *size).double()
    rows = circular_patches(x, *size)
    moment = rows.T @ rows / len(rows) + 0.2 * torch.eye(rows.shape[1]).double()
    expected = torch.linalg.solve(moment, grad.flatten(1).T).T.view_as(grad)
    torch.testing.assert_close(decorrelate_fft(grad, x, damping=0.2), expected, rtol=1e-9, atol=1e-10)


def test_fourier_crops_the_solution_of_the_embedded_kernel():
    x, grad = torch.randn(4, 3, 6, 7).double(), torch.randn(2, 3, 3, 2).double()
    embedded = F.pad(grad, (0, 5, 0, 3))
    full = decorrelate_fft(embedded, x, damping=0.2)
    torch.testing.assert_close(decorrelate_fft(grad, x, damping=0.2), full[..., :3, :2], rtol=1e-10, atol=1e-12)


def test_on_white_images_both_are_a_scaling():
    x, grad = torch.randn(500, 2, 8, 8).double(), torch.randn(3, 2, 3, 3).double()
    for correct in (decorrelate_im2col, decorrelate_fft):
        torch.testing.assert_close(correct(grad, x, damping=1.0), grad / 2, rtol=0.2, atol=0.03)


def test_smooth_images_are_sharpened():
    """Neighbouring pixels that agree: the corrected kernel weighs differences between taps more than their sum."""
    x = F.avg_pool2d(torch.randn(50, 1, 20, 20).double(), 5, stride=1)
    total, difference = torch.ones(1, 1, 2, 2).double(), torch.tensor([[[[1.0, -1], [-1, 1]]]]).double()
    for correct in (decorrelate_im2col, decorrelate_fft):
        gains = [correct(g, x, damping=1e-3).norm() / g.norm() for g in (total, difference)]
        assert gains[1] > 5 * gains[0]


def test_subsampled_patches():
    x, grad = torch.randn(40, 2, 10, 10).double(), torch.randn(3, 2, 3, 3).double()
    full = decorrelate_im2col(grad, x, damping=1.0)
    few = decorrelate_im2col(grad, x, damping=1.0, max_rows=500)
    assert not torch.equal(full, few)
    rows = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)[::6]
    moment = rows.T @ rows / len(rows) + torch.eye(18).double()
    expected = torch.linalg.solve(moment, grad.flatten(1).T).T.view_as(grad)
    torch.testing.assert_close(few, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("correct", [decorrelate_im2col, decorrelate_fft])
def test_types_and_empty_batches(correct):
    x, grad = torch.randn(8, 2, 6, 6), torch.randn(3, 2, 3, 3)
    expected = correct(grad.double(), x.double())
    torch.testing.assert_close(correct(grad, x).double(), expected, rtol=1e-4, atol=1e-5)
    low = correct(grad.bfloat16(), x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(correct(grad, x[:0], damping=2.0), grad)
    for bad in (float("nan"), float("inf")):
        x[3, 1, 2, 2] = bad
        assert torch.equal(correct(grad, x), grad)


@pytest.mark.parametrize("correct", [decorrelate_im2col, decorrelate_fft])
def test_errors(correct):
    x, grad = torch.randn(8, 2, 6, 6), torch.randn(3, 2, 3, 3)
    name = correct.__name__
    with pytest.raises(ValueError, match=rf"{name}: grad must be \(out, in, kh, kw\) and inputs .*\(3, 2\)"):
        correct(grad[..., 0, 0], x)
    with pytest.raises(ValueError, match=f"{name}: damping must be positive and finite, got 0"):
        correct(grad, x, damping=0)
    with pytest.raises(ValueError, match=rf"{name}: the kernel must fit the padded image, got \(3, 3\)"):
        correct(grad, x[..., :2])
    with pytest.raises(ValueError, match="decorrelate_im2col: max_rows must be at least 1, got 0"):
        decorrelate_im2col(grad, x, max_rows=0)
