"""Networks for the tests of certificates, and how steep they really are."""

import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops import modulus


class Function(nn.Module):
    """f(x), behind a layer that does nothing."""

    def __init__(self, f):
        super().__init__()
        self.start, self.f = nn.Identity(), f

    def forward(self, x):
        return self.f(self.start(x))


def modulus_of(x):
    """Here, where the tracer looks for the function that ``Function`` calls."""
    return modulus(x)


def jacobian_norm(model, x):
    """Spectral norm of the Jacobian at one point, in the precision of ``x``; complex signals as pairs of real ones."""

    def real(z):
        y = model((torch.view_as_complex(z) if x.is_complex() else z).clone())
        return torch.view_as_real(y.contiguous()) if y.is_complex() else y

    at = torch.view_as_real(x.contiguous()) if x.is_complex() else x
    jacobian = torch.autograd.functional.jacobian(real, at.contiguous())
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, at.numel()), 2))


def quotient_norm(model, x, step=1e-6):
    """The same by differences, for what autograd refuses, such as ``out=``."""
    with torch.no_grad():
        moves = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        columns = [(model(x + move) - model(x - move)).reshape(-1) / (2 * step) for move in moves]
    return float(torch.linalg.matrix_norm(torch.stack(columns, 1), 2))


def steepest(model, shape, steps=30):
    """Largest local gain found at random points."""
    model.eval()
    return max(jacobian_norm(model, 3 * torch.randn(1, *shape, dtype=torch.float64)) for _ in range(steps))


def norm_with_statistics(channels, seed=0):
    norm = co.nn.BatchRMSNorm(channels)
    generator = torch.Generator().manual_seed(seed)
    norm.running_ms.copy_(torch.rand(channels, generator=generator) * 4 + 0.01)
    norm.num_batches.fill_(7)
    return norm


def contractive_style(depth=5, width=10):
    layers = [nn.Flatten(), nn.Linear(12, width), co.nn.Modulus()]
    for i in range(depth - 1):
        layers += [norm_with_statistics(width, i), nn.Linear(width, width), co.nn.Modulus()]
    return nn.Sequential(*layers, norm_with_statistics(width, 99), nn.Linear(width, 4))


class Block(nn.Module):
    def __init__(self, inside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, 6, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1, bias=False)
        self.short = None if inside == 6 else nn.Conv2d(inside, 6, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.short is None else self.short(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Block(3), Block(6), Block(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.layers(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))
