"""Properties that every implementation of the method of arXiv 1708.00631 must have."""

import copy
import gzip
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.optim import SGD2, select_learning_rate
from consistency_ops.preconditioner import Preconditioner
from support.data import published


def half_square(y, target):
    """Mean over the samples of half the squared error: the residual of the layer is y - target."""
    return 0.5 * (y - target).square().sum(1).mean()


def newton(model, damping=0.0, **options):
    """SGD2 at rate 1 without momentum and decay: one step subtracts the corrected gradient."""
    return SGD2(model, lr=1.0, momentum=0.0, weight_decay=0.0, damping=damping, **options)


def one_step(model, optimizer, x, target):
    optimizer.zero_grad()
    half_square(model(x), target).backward()
    optimizer.step()


@pytest.mark.parametrize("units", [3, 100, 255, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_undamped_step_solves_least_squares(units, dtype):
    x, target = torch.randn(2 * units + 50, units, dtype=dtype), torch.randn(2 * units + 50, 7, dtype=dtype)
    layer = nn.Linear(units, 7, dtype=dtype)
    one_step(layer, newton(layer), x, target)
    ones = torch.ones(len(x), 1).double()
    solution = torch.linalg.lstsq(torch.cat([x.double(), ones], 1), target.double()).solution.T
    got = torch.cat([layer.weight, layer.bias[:, None]], 1).double()
    bound = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got, solution, rtol=bound, atol=bound)


def test_limits_of_the_damping():
    x, grad = torch.randn(200, 60), torch.randn(30, 60)
    large = 1e6
    scaled = large * co.precondition(grad, x, damping=large)
    torch.testing.assert_close(scaled, grad, rtol=1e-4, atol=1e-5)
    direct = torch.linalg.solve(x.double().T @ x.double() / 200 + torch.eye(60).double(), grad.double().T).T
    torch.testing.assert_close(co.precondition(grad, x, damping=1.0).double(), direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("damping", "kind"), [(0.0, "invertible"), (0.5, "orthogonal")])
def test_one_step_is_equivariant(damping, kind):
    """Input A x and weights W A^-1: the same function before and after."""
    a = torch.randn(20, 20).double()
    a = torch.linalg.qr(a).Q if kind == "orthogonal" else a + 3 * torch.eye(20).double()
    x, target = torch.randn(100, 20).double(), torch.randn(100, 4).double()
    layer = nn.Linear(20, 4).double()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(layer.weight @ torch.linalg.inv(a))
    y = x @ a.T
    torch.testing.assert_close(layer(x), other(y))
    before = layer(x).detach()
    one_step(layer, newton(layer, damping), x, target)
    one_step(other, newton(other, damping), y, target)
    assert (layer(x) - before).abs().max() > 0.1
    torch.testing.assert_close(layer(x), other(y), rtol=1e-9, atol=1e-9)


def test_the_damped_step_is_not_equivariant_to_a_skew_map():
    """The test of equivariance can fail: damping breaks it for maps that are not orthogonal."""
    x, grad = torch.randn(100, 20).double(), torch.randn(4, 20).double()
    a = torch.diag(torch.logspace(-1, 1, 20)).double()
    one = co.precondition(grad, x, damping=0.5) @ x.T
    two = co.precondition(grad @ a, x @ a, damping=0.5) @ (x @ a).T
    assert (one - two).abs().max() > 0.1


def test_a_chunk_as_large_as_the_layer_is_the_full_solve():
    x, grad = torch.randn(150, 60).double(), torch.randn(9, 60).double()
    full = torch.linalg.solve(x.T @ x / 150 + 0.3 * torch.eye(60).double(), grad.T).T
    for chunk in (60, 61, 200):
        torch.testing.assert_close(co.precondition(grad, x, damping=0.3, chunk=chunk), full, rtol=1e-10, atol=1e-10)
    assert (co.precondition(grad, x, damping=0.3, chunk=59) - full).abs().max() > 1e-3


def test_aligned_chunks_of_a_block_diagonal_moment_are_the_full_solve():
    x = torch.zeros(160, 32).double()
    for block in range(4):
        x[40 * block : 40 * block + 40, 8 * block : 8 * block + 8] = torch.randn(40, 8).double()
    grad = torch.randn(9, 32).double()
    full = torch.linalg.solve(x.T @ x / 160 + 0.1 * torch.eye(32).double(), grad.T).T
    aligned = co.precondition(grad, x, damping=0.1, chunk=8, permutation=torch.arange(32))
    torch.testing.assert_close(aligned, full, rtol=1e-10, atol=1e-10)
    mixed = co.precondition(grad, x, damping=0.1, chunk=8, permutation=torch.randperm(32))
    assert (mixed - full).abs().max() > 1e-3


@pytest.mark.parametrize("group", [1, 4, None])
def test_the_seed_fixes_the_division_and_every_column_is_updated_once(group):
    units, damping = 203, 0.25
    # Orthonormal columns: whatever the division, every column is divided by 1 + damping exactly once.
    x = torch.linalg.qr(torch.randn(400, units).double()).Q * math.sqrt(400)
    grad = torch.randn(5, units).double()
    once = co.precondition(grad, x, damping=damping, chunk=16, group=group, seed=1)
    torch.testing.assert_close(once, grad / (1 + damping), rtol=1e-9, atol=1e-12)
    x = torch.randn(400, units)
    results = [co.precondition(grad.float(), x, chunk=16, group=group, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_subsample_factors_of_the_cifar_network():
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]

    model = nn.Sequential(
        *block(3, 32), *block(32, 32), *block(32, 64), nn.Conv2d(64, 64, 4), nn.ReLU(), nn.Conv2d(64, 10, 1)
    )
    optimizer = SGD2(model, lr=0.1)
    assert model(torch.randn(500, 3, 32, 32)).shape == (500, 10, 1, 1)
    captures = [layer.capture for layer in optimizer.preconditioner._layers]
    seen, stride = zip(*(capture.state[i, 1:3].tolist() for i, capture in enumerate(captures)), strict=True)
    assert seen == (512_000, 128_000, 32_000, 8_000, 500)
    assert stride == (50, 13, 4, 1, 1)


def test_convolution_on_one_pixel_is_the_connected_layer():
    conv, linear = nn.Conv2d(30, 8, 1).double(), nn.Linear(30, 8).double()
    x, target = torch.randn(90, 30).double(), torch.randn(90, 8).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    one_step(nn.Sequential(nn.Unflatten(1, (30, 1, 1)), conv, nn.Flatten()), newton(conv, 0.2), x, target)
    one_step(linear, newton(linear, 0.2), x, target)
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-10, atol=1e-10)


def test_every_tap_is_solved_with_the_same_matrix():
    conv = nn.Conv2d(6, 5, (3, 2)).double()
    x = torch.randn(4, 6, 9, 8).double()
    pre = Preconditioner(conv, damping=0.4, scaling="absolute")
    conv(x).square().sum().backward()
    weight, bias = conv.weight.grad.clone(), conv.bias.grad.clone()
    pre.step()
    rows = torch.cat([x.movedim(1, -1).flatten(0, -2), torch.ones(4 * 72, 1).double()], 1)
    matrix = rows.T @ rows / len(rows) + 0.4 * torch.eye(7).double()
    biases = torch.zeros(5).double()
    for i in range(3):
        for j in range(2):
            slice_ = torch.cat([weight[:, :, i, j], bias[:, None]], 1)  # (O, C + 1)
            solved = torch.linalg.solve(matrix, slice_.T).T
            torch.testing.assert_close(conv.weight.grad[:, :, i, j], solved[:, :-1], rtol=1e-9, atol=1e-9)
            biases += solved[:, -1] / 6
    torch.testing.assert_close(conv.bias.grad, biases, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(50, 6), (5, 6, 4, 3)], ids=str)
def test_rms_norm(shape):
    norm, rho, eps = co.nn.BatchRMSNorm(6).double(), 0.1, 1e-2
    scale = torch.logspace(-3, 1, 6).double().view(1, -1, *[1] * (len(shape) - 2))
    v, dims = torch.zeros(6).double(), [0, *range(2, len(shape))]

    def denominator(t):
        return (v / (1 - rho**t) + eps * (v + 1e-6).max()).sqrt().view_as(scale)

    for t in range(1, 4):
        x = (torch.randn(shape).double() * scale).requires_grad_()
        v = rho * v + (1 - rho) * x.detach().square().mean(dims)
        weight = torch.randn(shape).double()
        y = norm(x)
        torch.testing.assert_close(y, x / denominator(t), rtol=1e-12, atol=1e-12)
        (y * weight).sum().backward()
        torch.testing.assert_close(x.grad, weight / denominator(t), rtol=1e-12, atol=1e-12)
    # A unit is amplified at most about 1 / sqrt(eps) = 10 times more than the most active one.
    assert 9 < denominator(3).max() / denominator(3).min() < 10.1
    norm.eval()
    x, kept = torch.randn(shape).double(), norm.running_ms.clone()
    torch.testing.assert_close(norm(x), x / denominator(3), rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.running_ms, kept)
    # Finite differences see the derivative for the D of evaluation, which does not move.
    assert torch.autograd.gradcheck(norm, (x.requires_grad_(),))


def test_first_step_of_a_constant_gradient():
    layer = nn.Linear(4, 3)
    optimizer = SGD2(layer, lr=0.2, momentum=0.9, weight_decay=0.0)
    optimizer.preconditioner.remove()
    before, grad = layer.weight.detach().clone(), torch.randn(3, 4)
    for t in range(1, 6):
        layer.weight.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), before - 0.2 * t * grad, rtol=1e-5, atol=1e-6)


def test_steady_decay_is_ten_times_the_nominal_one():
    lr, decay, momentum = 0.1, 1e-4, 0.9
    layer = nn.Linear(4, 3).double()
    optimizer = SGD2(layer, lr=lr, momentum=momentum, weight_decay=decay)
    optimizer.preconditioner.remove()
    bias = layer.bias.detach().clone()
    for _ in range(300):
        before = layer.weight.detach().clone()
        layer.weight.grad, layer.bias.grad = torch.zeros(3, 4).double(), torch.zeros(3).double()
        optimizer.step()
    shrink = 1 - layer.weight.detach() / before
    # The momentum lags by about ten steps, in which the weight itself shrinks by 1e-3: one percent is generous.
    torch.testing.assert_close(shrink, torch.full_like(shrink, lr * decay / (1 - momentum)), rtol=1e-2, atol=0)
    assert torch.equal(layer.bias, bias)


class FirstEpoch:
    """Net C of the paper on real MNIST: raw pixels minus their mean, weights N(0, 0.01^2), batches of 500."""

    def __init__(self, folder):
        def read(name, skip):
            return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=skip)

        images = {split: read(f"{split}-images-idx3-ubyte.gz", 16).reshape(-1, 784) for split in ("train", "t10k")}
        self.y = {split: torch.tensor(read(f"{split}-labels-idx1-ubyte.gz", 8)).long() for split in images}
        mean = images["train"].mean(0, dtype=np.float64)
        self.x = {split: torch.tensor(images[split] - mean, dtype=torch.float32) for split in images}

    def net(self, normalized):
        torch.manual_seed(0)
        sizes = [784, *[128] * 11, 10]
        layers = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            if i > 0:
                layers += [nn.ReLU(), *[co.nn.BatchRMSNorm(inputs)] * normalized]
            layers.append(nn.Linear(inputs, outputs))
            nn.init.normal_(layers[-1].weight, std=0.01)
            nn.init.zeros_(layers[-1].bias)
        return nn.Sequential(*layers)

    def batches(self):
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))
        return [(self.x["train"][i], self.y["train"][i]) for i in order.split(500)]

    def error(self, model, optimizer):
        """Test error after one epoch."""
        for x, y in self.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            return (model(self.x["t10k"]).argmax(1) != self.y["t10k"]).double().mean().item()


@pytest.fixture(scope="module")
def first_epoch():
    return FirstEpoch(published("mnist"))


def test_first_epoch_on_mnist(first_epoch):
    model = first_epoch.net(normalized=True)
    optimizer = SGD2(model, lr=1.0)
    loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    rate = select_learning_rate(model, optimizer, loss, first_epoch.batches(), candidates=(1.0, 0.5, 0.1, 0.05))
    assert rate in (1.0, 0.5)  # the paper selects 1
    assert first_epoch.error(model, optimizer) < 0.06

    # The same optimizer without its correction, at the rate that the released code selects.
    model = first_epoch.net(normalized=True)
    plain = SGD2(model, lr=0.05)
    plain.preconditioner.remove()
    assert first_epoch.error(model, plain) > 0.25


def test_without_normalization_the_deep_net_stays_at_chance(first_epoch):
    model = first_epoch.net(normalized=False)
    assert first_epoch.error(model, SGD2(model, lr=1.0)) > 0.85


def jacobian_of(activation, weight, x):
    return torch.autograd.functional.jacobian(lambda x: activation(weight @ x), x)


def test_modulus_keeps_the_volume_of_the_linear_part():
    for _ in range(5):
        weight, x = torch.randn(12, 12).double(), torch.randn(12).double()
        torch.testing.assert_close(
            jacobian_of(co.modulus, weight, x).det().abs(), weight.det().abs(), rtol=1e-10, atol=0
        )
    assert jacobian_of(F.relu, weight, x).det() == 0


def test_image_fraction_of_modulus_is_one_and_of_relu_one_half():
    """phi = ||U U^T r||^2 / ||r||^2; U: left singular vectors of the layer's Jacobian with a singular value above 0."""
    fractions = {co.modulus: [], F.relu: []}
    for _ in range(20):
        weight = torch.linalg.qr(torch.randn(64, 64).double()).Q
        x, residual = torch.randn(64).double(), torch.randn(64).double()
        for activation, values in fractions.items():
            u, sigma, _ = torch.linalg.svd(jacobian_of(activation, weight, x))
            image = u[:, sigma > 1e-6 * sigma[0]]
            values.append((image.T @ residual).square().sum() / residual.square().sum())
    torch.testing.assert_close(torch.stack(fractions[co.modulus]), torch.ones(20).double())
    assert 0.4 < torch.stack(fractions[F.relu]).mean() < 0.6
