"""The training loop of one method, its clock, and the test after every epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Images, Scaling
from .errors import UserError
from .optimizers import Method

_JUDGE_BATCH = 1000
_CHECK_EVERY = 50  # steps between two reads of the loss on a GPU, because a read waits for the device


@dataclass(frozen=True)
class Task:
    """Images to train on and images to judge by, as uint8 on the training device; each batch is scaled when it is used.

    ``judge`` is "test", or "validation" in the trials of the rate search.
    """

    train_x: Tensor
    train_y: Tensor
    judge_x: Tensor
    judge_y: Tensor
    judge: str
    scaling: Scaling
    batch_size: int

    @staticmethod
    def on(device: torch.device, images: Images, scaling: Scaling, batch_size: int) -> Task:
        train_x, train_y, test_x, test_y = (
            t.to(device) for t in (images.train_x, images.train_y, images.test_x, images.test_y)
        )
        return Task(train_x, train_y, test_x, test_y, "test", scaling.to(device), batch_size)

    def trial(self) -> Task:
        """Return the task of the rate search: a fixed fifth of the training images judges; test images are not used."""
        order = torch.randperm(len(self.train_x), generator=torch.Generator().manual_seed(0)).to(self.device)
        judge, train = order.tensor_split([-(-len(order) // 5)])
        if len(train) < self.batch_size:
            raise UserError(
                f"--batch-size: must be at most {len(train)}, as the rate search holds out a fifth of the images, "
                f"got {self.batch_size}; --lr sets the rates without a search."
            )
        split = (self.train_x[train], self.train_y[train], self.train_x[judge], self.train_y[judge])
        return Task(*split, "validation", self.scaling, self.batch_size)

    @property
    def device(self) -> torch.device:
        return self.train_x.device

    @property
    def steps(self) -> int:
        """Number of steps per epoch; an incomplete last batch is left out, so that all batches have one size."""
        return len(self.train_x) // self.batch_size

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the image numbers of the batches of one epoch; seed and epoch fix them, the same for all methods."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_x), generator=generator)
        return order[: self.steps * self.batch_size].view(self.steps, self.batch_size).to(self.device)


@dataclass
class Contestant:
    """A copy of the initial network that is trained with one method at one rate.

    ``seconds`` counts training steps only: forward, backward, correction and update, not tests and not the search.
    ``status`` is "running", "finished" or "diverged": its loss was not finite, and it takes no more steps.
    """

    method: Method
    lr: float
    model: nn.Module
    optimizer: torch.optim.Optimizer
    keep: object
    seconds: float = 0.0
    status: str = "running"
    epochs: list[dict[str, float | int]] = field(default_factory=list)

    @staticmethod
    def start(method: Method, lr: float, initial: nn.Module) -> Contestant:
        model = copy.deepcopy(initial)
        keep, optimizer = method.build(model, lr)
        return Contestant(method, lr, model, optimizer, keep)

    def train_epoch(self, task: Task, seed: int, tick: Callable[[float | None], None]) -> float:
        """Train one epoch and return the mean of the batches' losses before their updates; not finite if it diverged.

        ``tick(loss)`` is called after every step, with None where the loss was not read.
        """
        epoch = len(self.epochs) + 1
        order = task.order(seed, epoch)
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        look_every = 1 if task.device.type == "cpu" else _CHECK_EVERY
        self.model.train()
        start = _now(task.device)
        for step, rows in enumerate(order):
            x = task.scaling(task.train_x[rows])
            loss = functional.cross_entropy(self.model(x), task.train_y[rows])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            self.optimizer.step()
            total += loss.detach()
            value = loss.item() if step % look_every == 0 else None
            tick(value)
            if value is not None and not math.isfinite(value):
                break
        self.seconds += _now(task.device) - start
        return total.item() / len(order)

    def run_epoch(self, task: Task, seed: int, tick: Callable[[float | None], None]) -> dict[str, float | int]:
        """Train one epoch, judge the network, append the result to ``epochs`` and return it."""
        train_loss = self.train_epoch(task, seed, tick)
        loss, error = evaluate(self.model, task)
        if not (math.isfinite(train_loss) and math.isfinite(loss)):
            self.status = "diverged"
        self.epochs.append(
            {
                "epoch": len(self.epochs) + 1,
                "train_loss": train_loss,
                f"{task.judge}_loss": loss,
                f"{task.judge}_error": error,
                "seconds": self.seconds,
            }
        )
        return self.epochs[-1]

    def record(self) -> dict[str, object]:
        """Return the entry of report.json; a loss that is not finite becomes None, because JSON has no NaN."""
        epochs = [
            {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in epoch.items()}
            for epoch in self.epochs
        ]
        return {"method": self.method.name, "lr": self.lr, "status": self.status, "epochs": epochs}


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> tuple[float, float]:
    """Return mean loss and error rate in [0, 1] on the images that judge, in evaluation mode."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=task.device)
    wrong = torch.zeros((), dtype=torch.int64, device=task.device)
    batches = zip(torch.split(task.judge_x, _JUDGE_BATCH), torch.split(task.judge_y, _JUDGE_BATCH), strict=True)
    for x, y in batches:
        logits = model(task.scaling(x))
        loss += functional.cross_entropy(logits, y, reduction="sum")
        wrong += (logits.argmax(1) != y).sum()
    count = len(task.judge_y)
    return loss.item() / count, wrong.item() / count


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
