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
    optimizer: Optimizer,
    loss_fn: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    candidates: Sequence[float] = CANDIDATES,
    iterations: int = 30,
    largest: float | None = None,
) -> float:
    """Try every candidate for a few steps from the present state, set the best in all parameter groups, return it.

    A trial takes the first ``min(iterations, available)`` batches; the loss of the last one, before its update,
    decides, and the smallest wins. NaN and Inf lose. Between trials and at the end everything is put back bit for bit:
    parameters, buffers, gradients, the optimizer's state (and that of a :class:`consistency_ops.Preconditioner` on it),
    and the random numbers of torch, numpy and Python. A preconditioner that is stepped by hand is not put back.

    In the paper it is called at epochs 1, 11, 21, ..., later calls with ``largest`` = the first rate that was selected.

    Args:
        model: the network, in training mode.
        optimizer: any optimizer over its parameters.
        loss_fn: computes the loss, a scalar, of one batch.
        batches: batches as ``loss_fn`` takes them, e.g. a ``DataLoader``; only the first ``iterations`` are read.
        candidates: rates > 0. For adaptive methods (Adam, RMSprop, Adagrad) the paper takes a tenth of the default.
        iterations: length of a trial, >= 1.
        largest: candidates above it are skipped.

    Raises:
        ValueError: no batches, no candidates left, or an argument out of range. TypeError: one of the wrong type.
        RuntimeError: no candidate ended with a finite loss. The state is as before the call.
    """
    op = "select_learning_rate"
    check_module(op, model)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{op}: optimizer must be a torch.optim.Optimizer, got {type_name(optimizer)}")
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
    state = _State(model, optimizer)
    trial = list(islice(batches, iterations))
    if not trial:
        raise ValueError("select_learning_rate: batches must have at least one batch, got none")

    losses = {}
    try:
        for rate in tried:
            state.restore()
            _set_rate(optimizer, rate)
            losses[rate] = _last_loss(optimizer, loss_fn, trial)
    finally:
        state.restore(gradients=True)
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise RuntimeError(f"select_learning_rate: a candidate must end with a finite loss, got {losses}")
    best = min(finite, key=finite.__getitem__)
    _set_rate(optimizer, best)
    return best


def _last_loss(optimizer: Optimizer, loss_fn: Callable[[Batch], Tensor], trial: list[Batch]) -> float:
    for batch in trial[:-1]:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = loss_fn(batch)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]  # torch says float for a tensor
    loss = loss_fn(trial[-1])
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type_name(loss)
        raise TypeError(f"select_learning_rate: loss_fn must return a tensor with one element, got {got}")
    return float(loss.detach())


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _State:
    """A copy of everything that a trial may change, to put it back."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = {id(t): t for t in (*parameters, *model.parameters(), *model.buffers())}
        self.tensors = [(t, t.detach().clone()) for t in tensors.values()]
        self.gradients = [(t, t.grad) for t in tensors.values()]
        self.state = copy.deepcopy(optimizer.state_dict())
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
        self.optimizer.load_state_dict(copy.deepcopy(self.state))
        random.setstate(self.random[0])
        np.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
