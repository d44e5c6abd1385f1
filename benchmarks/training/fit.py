"""Data in the pixel units of arXiv 1708.00631, and a training loop with its learning-rate search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.training.muon import Muon
from benchmarks.training.runner import Progress
from consistency_ops.cli import data as datasets

ADAPTIVE = tuple(rate / 10 for rate in (1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0005))


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) as raw pixels less their training mean, and the standard deviation of all pixels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    deviation: float

    def standard(self) -> Split:
        """Return the images in units of the standard deviation."""
        one = 1 / self.deviation
        return Split(self.train_x * one, self.train_y, self.test_x * one, self.test_y, 1.0)


def load(name: str | None, size: dict, directory: Path) -> Split | None:
    """Load the first ``size["train"]`` and ``size["test"]`` images of a fixed random order; by default all of them."""
    if name is None:
        return None
    limit = max(size.get("train", 10**9), size.get("test", 10**9))
    images = datasets.load(name, None if name == "digits" else directory, limit=limit)
    parts = []
    for x, y, part in ((images.train_x, images.train_y, "train"), (images.test_x, images.test_y, "test")):
        keep = torch.from_numpy(np.random.default_rng(1).permutation(len(x))[: size.get(part, len(x))])
        parts += [x[keep], y[keep]]
    scale = datasets.scaling(parts[0], "raw")
    train_x, test_x = scale(parts[0]), scale(parts[2])
    return Split(train_x, parts[1], test_x, parts[3], float(train_x.std()))


# Adam alone, and the options of its whitened coordinates.
ADAM: dict[str, dict | None] = {
    "adam": None,
    "adam, whiten": {},
    "adam, whiten both, dct": {"outputs": True, "dct": True},
}


def optimizer_of(name: str, model: nn.Module, *, lr: float = 1.0, seed: int = 0, **options) -> torch.optim.Optimizer:
    """Build "sgd2", "sgd" (sgd2 without its correction), or "muon" or one of ``ADAM`` (all without decay)."""
    if name == "muon":
        return Muon(model, lr)
    if name in ADAM:
        adam = torch.optim.Adam(model.parameters(), lr=lr)
        if (whiten := ADAM[name]) is not None:
            co.Preconditioner(model, adam, mode="whiten", seed=seed, **whiten)
        return adam
    optimizer = co.optim.SGD2(model, lr=lr, seed=seed, **options)
    if name == "sgd":
        optimizer.preconditioner.remove()
    return optimizer


def select(model, optimizer, split: Split, batch: int, candidates: tuple[float, ...], seed: int) -> float:
    """Run the rate search of arXiv 1708.00631 once, before training."""
    order = torch.randperm(len(split.train_y), generator=torch.Generator().manual_seed(seed))
    loss = lambda rows: functional.cross_entropy(model(split.train_x[rows]), split.train_y[rows])  # noqa: E731
    whole = order[: len(order) // batch * batch].split(batch)
    return co.optim.select_learning_rate(model, optimizer, loss, whole, candidates=candidates)


def error_of(model: nn.Module, split: Split) -> float:
    """Return the share of test images that are classified wrongly, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        pairs = zip(split.test_x.split(1000), split.test_y.split(1000), strict=True)
        wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in pairs)
    model.train()
    return wrong / len(split.test_y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    *,
    epochs: int,
    batch: int,
    seed: int,
    tick: Callable[[str], None],
    search: tuple[float, ...] | None = None,
    search_every: int = 10,
    after_step: Callable[[int], object] = lambda step: None,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    notes: dict[str, list] | None = None,
) -> dict:
    """Train, and return ``train_loss`` and ``test_error`` by epoch and the ``rates`` that were selected.

    ``search``: the candidates of the rate search of arXiv 1708.00631 at epochs 1, 1 + ``search_every``, ...; None: the
    optimizer's rate stays.  Incomplete batches are left out.  A loss that is not finite ends the training.
    ``after_step`` is called before the next gradient, ``after_epoch`` when its test is done.  With a ``progress`` the
    training goes on from the last epoch that was finished; ``notes`` are lists of the caller that are kept with it.
    """
    loss_of = loss_of or (lambda model, x, y: functional.cross_entropy(model(x), y))
    losses, errors, rates, steps, done = [], [], {}, 0, 0
    shuffle = torch.Generator().manual_seed(seed)
    saved = None if progress is None else progress.load()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        shuffle.set_state(saved["shuffle"])
        losses, errors, rates, steps, done = (saved[key] for key in ("losses", "errors", "rates", "steps", "epoch"))
        for name, values in (notes or {}).items():
            values[:] = saved["notes"][name]
    for epoch in range(done + 1, epochs + 1):
        order = torch.randperm(len(split.train_y), generator=shuffle)
        batches = order[: len(order) // batch * batch].split(batch)
        if search is not None and (epoch - 1) % search_every == 0:
            loss_of_batch = lambda rows: loss_of(model, split.train_x[rows], split.train_y[rows])  # noqa: E731
            rates[epoch] = co.optim.select_learning_rate(
                model, optimizer, loss_of_batch, batches, candidates=search, largest=rates.get(1)
            )
        total = 0.0
        for rows in batches:
            optimizer.zero_grad()
            loss = loss_of(model, split.train_x[rows], split.train_y[rows])
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
            steps += 1
            after_step(steps)
        losses.append(total / len(batches))
        errors.append(error_of(model, split))
        after_epoch(epoch)
        tick(f"loss {losses[-1]:.3g}, test error {errors[-1]:.2%}")
        if not math.isfinite(losses[-1]):
            break
        if progress is not None:
            trained = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "notes": notes or {}}
            counts = {"losses": losses, "errors": errors, "rates": rates, "steps": steps, "epoch": epoch}
            progress.save(**trained, **counts, shuffle=shuffle.get_state())
    return {"train_loss": [finite(x) for x in losses], "test_error": errors, "rates": rates}


def finite(value: float) -> float | None:
    """Replace NaN and Inf by None, because JSON has neither."""
    return value if math.isfinite(value) else None
