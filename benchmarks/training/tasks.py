"""Three tasks for the memory of recurrent networks, in their usual definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SYMBOLS, LENGTH = 8, 10  # of the copying task: symbols, and length of a sequence
BLANK, DELIMITER = SYMBOLS, SYMBOLS + 1


def copying(batch: int, blanks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Copying memory: inputs (T, N, 10) one-hot and targets (T, N), T = ``blanks`` + 20.

    Ten random symbols of eight, ``blanks - 1`` blanks, a delimiter, ten blanks; the target is blank everywhere but in
    the last ten steps, where it is the ten symbols.  Without memory the best mean cross-entropy is 10 ln 8 / T.
    """
    symbols = torch.randint(SYMBOLS, (LENGTH, batch), generator=generator)
    inputs = torch.full((blanks + 2 * LENGTH, batch), BLANK)
    targets = inputs.clone()
    inputs[:LENGTH], targets[-LENGTH:] = symbols, symbols
    inputs[-LENGTH - 1] = DELIMITER
    return torch.nn.functional.one_hot(inputs, SYMBOLS + 2).float(), targets


def copying_baseline(blanks: int) -> float:
    return LENGTH * math.log(SYMBOLS) / (blanks + 2 * LENGTH)


def adding(batch: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adding problem: inputs (T, N, 2), targets (N).

    Channel 0 is uniform in [0, 1], channel 1 marks one step in each half; the target is the sum of the two values that
    are marked.  Always answering 1 has a mean square error of 1/6.
    """
    values = torch.rand(steps, batch, generator=generator)
    half = steps // 2
    first = torch.randint(half, (batch,), generator=generator)
    second = torch.randint(half, steps, (batch,), generator=generator)
    marks = torch.zeros(steps, batch)
    columns = torch.arange(batch)
    marks[first, columns] = marks[second, columns] = 1
    return torch.stack([values, marks], 2), (values * marks).sum(0)


ADDING_BASELINE = 1 / 6


def permuted_pixels(images: Tensor, seed: int = 0) -> Tensor:
    """Rearrange images (N, 1, H, W) to (H W, N, 1): one pixel per step, in one fixed random order."""
    order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(seed))
    return images.flatten(1)[:, order].T.unsqueeze(-1)
