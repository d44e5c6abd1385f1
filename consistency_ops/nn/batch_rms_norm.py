"""Batch RMS normalisation as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.batch_rms_norm import batch_rms_norm
from ..ops.checks import check_numbers, check_sizes


class BatchRMSNorm(nn.Module):
    """Scale every channel to root mean square one over batch and pixels; see :func:`consistency_ops.batch_rms_norm`.

    Input ``(N, C)`` or ``(N, C, *spatial)`` with C = ``num_features``, output of the same shape, dtype and memory
    format. No parameters: no mean is removed, nothing is rescaled. ``decay`` is the weight of the *old* statistics, in
    [0, 1) (torch's ``momentum`` is that of the new ones); ``eps`` > 0 is relative to the most active channel: 1e-2
    inside a network, 1e-10 to normalise data.

    Buffers: ``running_ms`` (C) and ``num_batches`` (1).  The statistics stay float32 (float64 after ``double()``) when
    the module is cast to a narrower type; bfloat16 and float16 inputs are accepted as they are.  Every training forward
    counts as a batch.  The recomputation of activation checkpointing does not (unless it is compiled or selective): it
    repeats the D of the last batch, which was its own if forward and backward passes alternate.
    """

    running_ms: Tensor
    num_batches: Tensor

    def __init__(
        self,
        num_features: int,
        decay: float = 0.1,
        eps: float = 1e-2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("BatchRMSNorm", num_features=num_features)
        check_numbers("BatchRMSNorm", decay=decay, eps=eps)
        if not 0 <= decay < 1:
            raise ValueError(f"BatchRMSNorm: decay must be in [0, 1), got {decay}")
        if not 0 < eps < float("inf"):
            raise ValueError(f"BatchRMSNorm: eps must be positive and finite, got {eps}")
        self.num_features: int = num_features
        self.decay: float = decay
        self.eps: float = eps
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("running_ms", torch.zeros(num_features, device=device, dtype=statistics))
        self.register_buffer("num_batches", torch.zeros(1, device=device, dtype=torch.int64))

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        self.running_ms.zero_()
        self.num_batches.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return batch_rms_norm(
            x,
            self.running_ms,
            training=self.training and not _recomputes(),
            num_batches=self.num_batches,
            decay=self.decay,
            eps=self.eps,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchRMSNorm:
        before = self.running_ms
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not annotate it
        if self.running_ms.dtype not in (torch.float32, torch.float64):
            self.running_ms = before.to(self.running_ms.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, decay={self.decay}, eps={self.eps}"


def _recomputes() -> bool:
    """Whether this forward pass is a recomputation of activation checkpointing: a backward pass is running.

    False for selective checkpointing, a dispatch mode that expects the same operators as in the first pass.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    return torch._C._len_torch_dispatch_stack() == 0
