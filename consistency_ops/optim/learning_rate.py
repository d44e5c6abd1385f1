"""Selection of a learning rate by short trials: "Selective-SGD" of arXiv 1708.00631."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ops.checks import check_integers, check_module, check_numbers, type_name

CANDIDATES = (1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001, 0.0005)

Batch = TypeVar("Batch")


def select_learning_rate(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    candidates: Sequence[float] = CANDIDATES,
    iterations: int = 30,
    largest: float | None = None,
    decay: bool = False,
) -> float:
    """Try every candidate for a few steps from the present state, set the best in all parameter groups, return it.

    A trial takes the first ``min(iterations, available)`` batches; the loss of the last one, before its update,
    decides, and the smallest wins. NaN and Inf lose. Between trials and at the end everything is put back bit for bit:
    parameters, buffers, gradients, the optimizer's state (and that of a :class:`consistency_ops.Preconditioner` on it),
    and the random numbers of torch, numpy and Python. A preconditioner that is stepped by hand is not put back.

    The best rate of a few steps is not that of a training: it is often too large. ``decay=True`` with a third of the
    training's steps chooses the rate of a training whose rate falls to 0.

    In the paper it is called at epochs 1, 11, 21, ..., later calls with ``largest`` = the first rate that was selected.

    Args:
        model: the network, in training mode.
        optimizer: any optimizer over its parameters, or several that share them (Muon and AdamW) and get the same rate.
        loss_fn: computes the loss, a scalar, of one batch.
        batches: batches as ``loss_fn`` takes them, e.g. a ``DataLoader``; only the first ``iterations`` are read.
        candidates: rates > 0. For adaptive methods (Adam, RMSprop, Adagrad) the paper takes a tenth of the default.
        iterations: length of a trial, >= 1.
        largest: candidates above it are skipped.
        decay: whether the rate of a trial rises over its first twentieth and then falls to 0 in a line.

    Raises:
        ValueError: no batches, no candidates left, or an argument out of range. TypeError: one of the wrong type.
        RuntimeError: no candidate ended with a finite loss. The state is as before the call.
    """
    op = "select_learning_rate"
    check_module(op, model)
    optimizers: list[Optimizer] = []
    for one in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        if not isinstance(one, Optimizer):
            raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type_name(one)}")
        optimizers.append(one)
    if not optimizers:
        raise ValueError(f"{op}: optimizer must be at least one optimizer, got an empty list")
    check_integers(op, iterations=iterations)
    check_numbers(op, largest=math.inf if largest is None else largest)
    for rate in candidates:
        check_numbers(op, candidates=rate)
    if iterations < 1:
        raise ValueError(f"select_learning_rate: iterations must be >= 1, got {iterations}")
    if not all(0 < rate < math.inf for rate in candidates):
        raise ValueError(f"select_learning_rate: candidates must be finite numbers > 0, got {list(candidates)}")
    tried = [rate for rate in candidates if largest is None or rate <= largest]
    if not tried:
        raise ValueError(f"select_learning_rate: candidates must have one at or below largest, got {largest}")
    state = _State(model, optimizers)
    trial = list(islice(batches, iterations))
    if not trial:
        raise ValueError("select_learning_rate: batches must have at least one batch, got none")

    losses = {}
    try:
        for rate in tried:
            state.restore()
            losses[rate] = _last_loss(optimizers, loss_fn, trial, rate, decay)
    finally:
        state.restore(gradients=True)
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise RuntimeError(f"select_learning_rate: a candidate must end with a finite loss, got {losses}")
    best = min(finite, key=finite.__getitem__)
    _set_rate(optimizers, best)
    return best


def _last_loss(
    optimizers: list[Optimizer], loss_fn: Callable[[Batch], Tensor], trial: list[Batch], rate: float, decay: bool
) -> float:
    steps = len(trial) - 1
    _set_rate(optimizers, rate)
    for i, batch in enumerate(trial[:-1], 1):
        if decay:
            _set_rate(optimizers, rate * _share(i, steps))

        def closure(batch: Batch = batch) -> Tensor:
            for one in optimizers:
                one.zero_grad()
            with torch.enable_grad():
                loss = loss_fn(batch)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            return loss

        if len(optimizers) == 1:
            optimizers[0].step(closure)  # type: ignore[arg-type]  # torch says float for a tensor
        else:
            closure()
            for one in optimizers:
                one.step()
    loss = loss_fn(trial[-1])
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type_name(loss)
        raise TypeError(f"select_learning_rate: loss_fn must return a tensor with one element, got {got}")
    return float(loss.detach())


def _share(step: int, steps: int) -> float:
    """The factor of the rate in ``step``, from 1: up to 1 in a twentieth of the steps, then down to nearly 0."""
    rise = max(1, steps // 20)
    return step / rise if step <= rise else (steps - step + 1) / (steps - rise + 1)


def _set_rate(optimizers: list[Optimizer], rate: float) -> None:
    for group in (group for one in optimizers for group in one.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _State:
    """A copy of everything that a trial may change, to put it back."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        parameters = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        tensors = {id(t): t for t in (*parameters, *model.parameters(), *model.buffers())}
        self.tensors = [(t, t.detach().clone()) for t in tensors.values()]
        self.gradients = [(t, t.grad) for t in tensors.values()]
        self.states = [copy.deepcopy(one.state_dict()) for one in optimizers]
        self.random: tuple[Any, ...] = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self.cuda: list[Tensor] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch does not annotate it
            self.cuda = torch.cuda.get_rng_state_all()

    @torch.no_grad()
    def restore(self, gradients: bool = False) -> None:
        for tensor, value in self.tensors:
            tensor.copy_(value)
        for tensor, grad in self.gradients:
            tensor.grad = grad if gradients else None
        for one, state in zip(self.optimizers, self.states, strict=True):
            one.load_state_dict(copy.deepcopy(state))
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
