"""Ideas around the correction that were measured (``ablations``) and are not in the product."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import consistency_ops as co
from benchmarks.peers.references import rows


def actions(
    model: nn.Module,
    *,
    graft: str | None = None,
    momentum_first: float = 0.0,
    anneal: tuple[float, float, int] | None = None,
    shrinkage: bool = False,
    **options: object,
) -> tuple[list[Callable[[], None]], list[co.Preconditioner]]:
    """Return the functions to call between backward pass and optimizer: the correction with one idea around it.

    Args:
        graft: sets the norm of every corrected weight gradient. ``"norm"``: to the raw gradient's; ``"clip"``: to that
            at most; ``"metric"``: so that the change of the layer's outputs, ``sqrt(<G, G A^-1>)``, has the raw
            gradient's norm.
        momentum_first: weight of the old value in a momentum that the correction follows; the base must have none.
        anneal: damping from the first value to the second over so many steps, geometrically.
        shrinkage: every layer's damping is the ratio of Ledoit and Wolf's optimal shrinkage of its second moment
            (J. Multivariate Analysis 88, 2004) on the current batch, at least 0.01.
    """
    if anneal is not None:
        begin, end, steps = anneal
        options["damping"] = lambda step: begin * (end / begin) ** min(1.0, step / steps)
    parts = _by_layer(model, options) if shrinkage else [co.Preconditioner(model, **options)]
    covered = [model.get_submodule(name).weight for part in parts for name in part.stats(condition=False)["rows"]]
    raw: list[Tensor] = []
    sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def accumulate() -> None:
        for p in model.parameters():
            sums[p] = p.grad.clone() if p not in sums else sums[p].mul_(momentum_first).add_(p.grad)
            p.grad.copy_(sums[p])

    def keep() -> None:
        raw[:] = [weight.grad.clone() for weight in covered]

    @torch.no_grad()
    def rescale() -> None:
        for weight, before in zip(covered, raw, strict=True):
            after = weight.grad
            product = (before * after).sum().clamp(min=0)
            ratio = before.norm() / (product.sqrt() if graft == "metric" else after.norm()).clamp(min=1e-30)
            after.mul_(ratio.clamp(max=1.0) if graft == "clip" else ratio)

    correct = [part.step for part in parts]
    found = [accumulate, *correct] if momentum_first else correct
    return ([keep, *found, rescale] if graft else found), parts


def _by_layer(model: nn.Module, options: dict) -> Iterable[co.Preconditioner]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = []
    for name, module in layers.items():
        inputs: list[Tensor] = []
        module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.__setitem__(slice(None), args))
        damping = lambda _, module=module, inputs=inputs: ledoit_wolf(rows(module, inputs[0].detach()))  # noqa: E731
        skip = [other for other in layers if other != name]
        found.append(co.Preconditioner(model, skip=skip, **options, damping=damping))
    return found


def ledoit_wolf(x: Tensor, least: float = 0.01) -> float:
    """Return the damping r >= ``least`` for which S / tau + r I is the optimal shrinkage of ``x``'s second moment S."""
    n, d = x.shape
    moment = x.T @ x / n
    tau = moment.trace() / d
    distance = (moment - tau * torch.eye(d)).square().sum()
    noise = (x.square().sum(1).square().sum() / n - moment.square().sum()) / n
    share = (noise.clamp(min=0) / distance).clamp(max=0.99)
    return max(least, float(share / (1 - share)))
