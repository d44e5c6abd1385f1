"""Optimizers, and trainings with ``mode="whiten"``."""

import copy

import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops.preconditioner import Preconditioner

from .training import backward, data, mlp

CPU_OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": dict(momentum=0.9),
    "Muon": {},
}


def optimizer_of(name, parameters, **options):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)
    return kind(parameters, **{"lr": 0.01, **CPU_OPTIMIZERS[name], **options})


def whitening(covariance, damping, scaling="trace"):
    """L with L L^T = A / tau + damping I."""
    tau = float(covariance.diagonal().mean()) if scaling == "trace" else 1.0
    return torch.linalg.cholesky(covariance / tau + damping * torch.eye(len(covariance), dtype=covariance.dtype))


def steps_of(model, optimizer, count, first=0, **options):
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)
    for step in range(first, first + count):
        optimizer.zero_grad()
        backward(model, *data(seed=step))
        optimizer.step()
    return pre


def makes_the_optimizers_own_steps(layer, plain, optimizer, twin, x):
    """Without a gradient ``layer``, which is whitened, steps as ``plain``, bit for bit."""
    for _ in range(3):
        layer(x)
        for model in (layer, plain):
            model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        twin.step()
        assert torch.equal(layer.weight, plain.weight)


def trains_in_bfloat16(model, steps, **options):
    model = model.bfloat16()
    optimizer = adamw(model)
    Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(backward(model, data()[0].bfloat16(), data()[1]).item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and all(p.isfinite().all() for p in model.parameters())


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})


def same(model, other, rtol=0.0, atol=0.0):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def resumes_bitwise(at, make=mlp, **options):
    """A training that goes on from its saved state after ``at`` steps makes the same steps."""

    def start():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return model, optimizer, Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)

    def go(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(model, *data(seed=step))
            optimizer.step()

    model, optimizer, _ = start()
    go(model, optimizer, 0, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, at, at + 4)
    again, other, pre = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert pre.steps == at
    go(again, other, at, at + 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def with_kernels_and_with_torch(optimizer_on, steps, make=mlp, **options):
    """Two float64 models after the same steps: by the kernels, and by torch's own operations."""
    models = [make().double(), make().double()]
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        co.set_backend(backend)
        try:
            optimizer = optimizer_on(model)
            Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)
            for step in range(steps):
                x, y = data(seed=step)
                optimizer.zero_grad()
                backward(model, x.double(), y)
                optimizer.step()
        finally:
            co.set_backend("auto")
    return models


def train_all_kinds_of_layers(name, steps, **options):
    """A training with convolutions, groups and a transposed one lowers its loss; returns what ``stats()`` says then."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)),
    )
    x, y = torch.randn(64, 3, 10, 10), torch.randint(5, (64,))
    weights = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else list(model.parameters())
    optimizer = optimizer_of(name, weights)
    pre = Preconditioner(model, optimizer, mode="whiten", **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    return pre.stats()
