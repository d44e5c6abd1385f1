"""Gradient noise: a residual that is perturbed cannot stay in the kernel of the adjoint.

Section "noise injection" of arXiv 1708.00631, which found it promising but not always successful.  The paper gives no
formula; the schedule is that of the work it cites (Neelakantan et al. 2015, arXiv 1511.06807).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..ops.checks import check_integers, check_numbers, type_name

_STEP = "gradient_noise_step"


class GradientNoise:
    """Adds N(0, s_t^2) to every gradient before each step, s_t^2 = eta / (1 + t)^gamma, t = 0, 1, ...

    One line after the optimizer::

        optimizer = co.optim.SGD2(model, lr=1.0)
        noise = co.optim.GradientNoise(optimizer, eta=0.01)

    The noise comes before the correction of a :class:`consistency_ops.Preconditioner` on the same optimizer, whenever
    that was attached, so that the correction shapes it; and after gradient clipping and unscaling.  It depends on
    ``seed``, t and the order of the parameters only: it is the same on every rank, and torch's random state stays.
    t is kept in ``optimizer.param_groups[0]``: checkpoints and ``select_learning_rate`` restore it.

    Args:
        optimizer: any ``torch.optim.Optimizer``; it keeps this object alive.
        eta: variance at t = 0, >= 0; the cited work uses 0.01, 0.3 and 1.
        gamma: exponent of the decay of the variance, >= 0.
        seed: in [0, 2^32).

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or another argument has the wrong type.
        ValueError: an argument out of range.
        RuntimeError: from the optimizer's step, when a gradient is sparse.
    """

    def __init__(self, optimizer: Optimizer, *, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"GradientNoise: optimizer must be a torch.optim.Optimizer, got {type_name(optimizer)}")
        check_numbers("GradientNoise", eta=eta, gamma=gamma)
        check_integers("GradientNoise", seed=seed)
        for name, value in (("eta", eta), ("gamma", gamma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"GradientNoise: {name} must be at least 0 and finite, got {value}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"GradientNoise: seed must be in [0, 2^32), got {seed}")
        self.eta: float = eta
        self.gamma: float = gamma
        self.seed: int = seed
        before = optimizer.register_step_pre_hook(self._before_step)
        # Ahead of the hook of a preconditioner that is there already.
        hooks: OrderedDict[int, Any] = optimizer._optimizer_step_pre_hooks  # type: ignore[assignment]  # torch says dict
        hooks.move_to_end(before.id, last=False)
        self._handles = [before, optimizer.register_step_post_hook(self._after_step)]

    def std(self, step: int) -> float:
        """Return s_t at t = ``step``."""
        return math.sqrt(self.eta / (1 + step) ** self.gamma)

    def remove(self) -> None:
        """Add no more noise."""
        for handle in self._handles:
            handle.remove()

    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add(optimizer)
            return None

        def noisy() -> Any:
            loss = closure()
            self._add(optimizer)
            return loss

        return ((*args[:1], *args[2:]), {**kwargs, "closure": noisy})

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        group = optimizer.param_groups[0]
        group[_STEP] = group.get(_STEP, 0) + 1

    @torch.no_grad()
    def _add(self, optimizer: Optimizer) -> None:
        step = optimizer.param_groups[0].get(_STEP, 0)
        # With a fused optimizer GradScaler leaves the gradients scaled; with others they are unscaled by now.
        scale = getattr(optimizer, "grad_scale", None)
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"GradientNoise: gradients must be dense, got layout {grad.layout}")
            if grad.device not in generators:
                generators[grad.device] = torch.Generator(grad.device).manual_seed(self.seed << 31 | step)
            noise = torch.empty_like(grad).normal_(0.0, 1.0, generator=generators[grad.device])
            if scale is not None:
                noise.mul_(scale.to(grad.device))
            grad.add_(noise, alpha=self.std(step))
