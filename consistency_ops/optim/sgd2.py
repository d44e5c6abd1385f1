"""SGD2, the optimizer of arXiv 1708.00631 as its authors released it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import reference
from .._hooks import Unpickled, hide
from ..engine.correction import Correction
from ..engine.layer import Layer
from ..engine.layer_step import LayerStep
from ..engine.options import CorrectionOptions
from ..engine.state import StateStore
from ..ops.checks import MAX_CHUNK, check_integers, check_module, check_numbers, shown
from ..preconditioner import Preconditioner


class SGD2(Optimizer):
    r"""Stochastic gradient descent on second-order corrected gradients (arXiv 1708.00631).

    Every step, each layer's gradient ``G``, its bias joined as one more unit, becomes ``G (X^T X / n + damping I)^-1``
    with the inputs ``X`` of the current step only. Then, with ``t`` = 1, 2, ... and the corrected gradient ``g``,

    .. math::
        m \leftarrow \mu m - (1 - \mu) g - \omega w \qquad w \leftarrow w + \eta m / (1 - \mu^t)

    where the decay term is left out for biases and all other parameters with fewer than two dimensions. As it is not
    multiplied by :math:`1 - \mu`, weights shrink by :math:`\eta \omega / (1 - \mu)` a step, ten times the nominal rate.
    The good learning rate is often near 1; :func:`select_learning_rate` finds it.

    Args:
        model: all its parameters are optimized; covered layers as for :class:`consistency_ops.Preconditioner`.
        lr: learning rate, > 0.
        momentum: in [0, 1).
        weight_decay: >= 0; coupled and not scaled, see above.
        damping: >= 0, absolute.
        max_size: layers with more units (bias included) are left to plain SGD, as wide first layers are in the paper.
        chunk: if given, these layers are divided at random into chunks of at most so many units, 1 to 256.
        bias: join the bias to its layer.
        conv_reduction: ``"sum"`` leaves the gradient of a convolution summed over output positions, as released;
            ``"mean"`` divides it by their number, which is the scale of the normal equations.
        max_rows: input rows of a layer that are used; with the default every 50th pixel of the first layer of the
            paper's CIFAR-10 network at batch size 500.
        seed: of the random division and the row sample.

    Layers of 257 to ``max_size`` units are solved by ``torch.linalg``, all others by the compiled kernels.

    Raises:
        ValueError: an argument out of range. TypeError: one of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        damping: float = 1.0,
        max_size: int = 500,
        chunk: int | None = None,
        bias: bool = True,
        conv_reduction: str = "sum",
        max_rows: int = 10_240,
        seed: int = 0,
    ) -> None:
        check_module("SGD2", model)
        check_numbers("SGD2", momentum=momentum, weight_decay=weight_decay)
        if not isinstance(lr, Tensor):
            check_numbers("SGD2", lr=lr)
        check_integers("SGD2", max_size=max_size, chunk=1 if chunk is None else chunk)
        _check(isinstance(lr, Tensor) or 0 < lr < math.inf, "lr", "a finite number > 0", lr)
        _check(0 <= momentum < 1, "momentum", "in [0, 1)", momentum)
        _check(0 <= weight_decay < math.inf, "weight_decay", "a finite number >= 0", weight_decay)
        _check(max_size >= 1, "max_size", "an integer >= 1", max_size)
        _check(chunk is None or 1 <= chunk <= MAX_CHUNK, "chunk", f"None or in [1, {MAX_CHUNK}]", chunk)
        _check(conv_reduction in ("sum", "mean"), "conv_reduction", "'sum' or 'mean'", conv_reduction)
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__((p for p in model.parameters()), defaults)
        self.preconditioner: Preconditioner = _WholeLayerPreconditioner(
            model,
            self,
            max_size=max_size,
            divide=chunk,
            conv_mean=conv_reduction == "mean",
            damping=damping,
            max_rows=max_rows,
            bias=bias,
            seed=seed,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` reevaluates the model and returns the loss, and is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("SGD2: gradients must be dense, got a sparse one")
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["step"] = 0
                state["step"] += 1
                by_step.setdefault(state["step"], []).append(p)
            for step, parameters in by_step.items():
                self._update(parameters, step, **{k: group[k] for k in ("lr", "momentum", "weight_decay")})
        return loss

    def _update(self, parameters: list[Tensor], step: int, lr: float, momentum: float, weight_decay: float) -> None:
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, [p.grad for p in parameters if p.grad is not None], alpha=momentum - 1)
        decayed = [p for p in parameters if p.dim() > 1]
        if weight_decay and decayed:
            torch._foreach_add_([self.state[p]["momentum_buffer"] for p in decayed], decayed, alpha=-weight_decay)
        torch._foreach_add_(parameters, buffers, alpha=float(lr) / (1 - momentum**step))


class _WholeLayerPreconditioner(Preconditioner):
    """A preconditioner whose correction is :class:`_WholeLayerCorrection`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        max_size: int,
        divide: int | None,
        conv_mean: bool,
        **options: Any,
    ) -> None:
        self._choices = max_size, divide, conv_mean
        super().__init__(model, optimizer, scaling="absolute", chunk=MAX_CHUNK, decay=0.0, every=1, **options)
        for attachment in self._attachments:
            attachment.vigil.may_end = True

    def _make_correction(
        self, options: CorrectionOptions, store: StateStore, optimizer: Optimizer | None
    ) -> Correction:
        return _WholeLayerCorrection(options, store, *self._choices)


class _WholeLayerCorrection(Correction):
    """Inverts layers of up to ``max_size`` units undivided, larger ones in chunks of ``divide`` units, or not at all.

    Args:
        options, store: as for :class:`Correction`.
        max_size: units, the bias included.
        divide: chunk of the larger layers; ``None`` leaves them alone.
        conv_mean: whether the gradient of a convolution is divided by the number of its output positions.
    """

    pools = False

    def __init__(
        self, options: CorrectionOptions, store: StateStore, max_size: int, divide: int | None, conv_mean: bool
    ) -> None:
        super().__init__(options, store)
        self._max_size, self._divide, self._conv_mean = max_size, divide, conv_mean
        self._positions: dict[int, _OutputPositions] = {}  # by layer index

    def declines(self, layer: Layer) -> str | None:
        if self._divide is None and layer.units > self._max_size:
            return f"{layer.units} units, more than max_size={self._max_size}"
        return None

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        module, weight = layer.module(), layer.weight
        if not self._conv_mean or module is None or weight is None or weight.dim() <= 2:
            return []
        self._positions[layer.index] = hook = _OutputPositions(weight.dim() - 2)
        handle = module.register_forward_hook(hook)
        hide(module)
        return [handle]

    def chunk_of(self, units: int, groups: int = 1) -> int:
        if self._divide is not None and units > self._max_size:
            return self._divide
        return max(units, MAX_CHUNK)

    def run(self, steps: list[LayerStep]) -> None:
        by_chunk: dict[int, list[LayerStep]] = {}
        for step in steps:
            hook = self._positions.get(step.layer.index)
            if hook is not None and hook.count > 0:
                for gradient in step.gradients:
                    gradient.div_(hook.count)
            by_chunk.setdefault(self.chunk_of(step.units), []).append(step)
        for chunk, batch in by_chunk.items():
            if chunk <= MAX_CHUNK:
                self.fused(batch, chunk, None)
            else:
                for step in batch:
                    self._solve(step)

    def _solve(self, step: LayerStep) -> None:
        """One layer that is too large for the compiled kernels, by ``torch.linalg``."""
        rows = step.rows[: int(step.count)].to(step.compute_dtype)
        with torch.autocast(rows.device.type, enabled=False):  # the step may be inside an autocast region
            grad, bias_grad, info, used = reference.precondition(
                step.grad.to(rows.dtype),
                rows,
                damping=self.damping(),
                chunk=step.units,
                max_rows=self.options.max_rows,
                bias_grad=None if step.bias_grad is None else step.bias_grad.to(rows.dtype),
            )
        step.grad.copy_(grad)
        if step.bias_grad is not None and bias_grad is not None:
            step.bias_grad.copy_(bias_grad)
        self.record_outcome([step], info, used)


class _OutputPositions(Unpickled):
    """Forward hook: how many output positions a convolution has for one image."""

    def __init__(self, spatial: int) -> None:
        self.count = 0
        self._spatial = spatial

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module.training:
            self.count = math.prod(output.shape[output.dim() - self._spatial :])


def _check(condition: bool, name: str, requirement: str, value: object) -> None:
    if not condition:
        raise ValueError(f"SGD2: {name} must be {requirement}, got {shown(value)}")
