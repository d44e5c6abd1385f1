"""Optimizers, and trainings with ``mode="whiten"``."""

import pytest
import torch

from consistency_ops.preconditioner import Preconditioner

from .training import backward, data

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


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})


def same(model, other, rtol=0.0, atol=0.0):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
