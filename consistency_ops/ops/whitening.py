"""The operators of ``mode="whiten"``: gradients into whitened coordinates of the inputs, and displacements back.

They are for the engine, which has checked its options: lists have one entry a layer. Native on the CPU and on CUDA,
one launch a call; elsewhere ``portable_whitening.py`` computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backend import call
from .registration import register_fake


@dataclass(frozen=True)
class Layers:
    """What all calls of a launch have in common.

    Args:
        biases: numbers of the layers in the launch whose bias is one more unit.
        indices: third argument of every layer's division.
        groups: consecutive units that stay together, of every layer.
        chunk: most units of a chunk; 0: whole layers.
        seed, step: of the division.
    """

    biases: list[int]
    indices: list[int]
    groups: list[int]
    chunk: int
    seed: int
    step: int

    def of(self, some: list[int]) -> Layers:
        """The same for some of the layers."""
        return replace(
            self,
            biases=[i for i, layer in enumerate(some) if layer in self.biases],
            indices=[self.indices[layer] for layer in some],
            groups=[self.groups[layer] for layer in some],
        )


def foreach_whiten_(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    inputs: list[Tensor],
    row_counts: list[Tensor],
    averages: list[Tensor],
    average_weights: list[Tensor],
    factors: list[Tensor],
    layers: Layers,
    *,
    damping: float,
    scaling: str,
    decay: float,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, running average, factor and ``G <- G L^-T`` of all layers in one call.

    Args:
        averages, average_weights: the running sum of covariances and the sum of the weights in it, of layers with one
            group; both change in place. Empty if ``decay`` is 0. Rows enter where they and the gradient are finite.
        factors: become ``L^-1``, as of :func:`foreach_inverse`.

    Returns:
        ``(info, damping_used, has_gradient)``: the first two as of :func:`foreach_inverse`; ``has_gradient``, int32, is
        0 for a layer whose gradient was zero.
    """
    result: tuple[Tensor, Tensor, Tensor] = call(
        "foreach_whiten_",
        layers.chunk,
        [*grads, *inputs],
        grads,
        bias_grads,
        inputs,
        row_counts,
        averages,
        average_weights,
        factors,
        layers.biases,
        layers.indices,
        layers.groups,
        damping,
        scaling == "trace",
        decay,
        layers.chunk,
        max_rows,
        layers.seed,
        layers.step,
    )
    return result


def foreach_whiten_by_(
    grads: list[Tensor], bias_grads: list[Tensor], factors: list[Tensor], info: Tensor, layers: Layers
) -> Tensor:
    """``G <- G L^-T`` by factors that are kept; returns ``has_gradient``. Chunks with ``info != 0`` are left alone."""
    result: Tensor = call(
        "foreach_whiten_by_",
        layers.chunk,
        [*grads, *factors],
        grads,
        bias_grads,
        factors,
        info,
        layers.biases,
        layers.indices,
        layers.groups,
        layers.chunk,
        layers.seed,
        layers.step,
    )
    return result


def foreach_unwhiten_(
    weights: list[Tensor],
    biases: list[Tensor],
    weights_before: list[Tensor],
    biases_before: list[Tensor],
    factors: list[Tensor],
    info: Tensor,
    has_gradient: Tensor,
    layers: Layers,
    *,
    keep_norm: bool,
    finish: bool = True,
) -> Tensor:
    """Map the displacement ``D`` of every weight, ``W - before``, to ``s D L^-1``, with ``s`` so that its norm is kept.

    Args:
        weights, biases: as the optimizer has left them; they become ``before + s D L^-1``. Those of layers with
            ``has_gradient`` 0 stay.
        weights_before, biases_before: of the same dtypes and strides.
        finish: if not, ``D L^-1`` is left in their place: the caller knows the norm of what other ranks hold.

    Returns:
        (layers, 2), in the dtype of the factors: ``|D|^2`` and ``|D L^-1|^2``.
    """
    counts = _chunks(weights, factors, layers)
    parts = [i for i, count in enumerate(counts) if count < len(factors[i])] if weights[0].is_cuda else []
    if not parts or len(parts) == len(weights):
        arguments = weights, biases, weights_before, biases_before, factors, info, has_gradient, layers
        return _unwhiten(*arguments, keep_norm, finish, cuda_kernel=not parts)
    # Groups of a convolution share one norm, for which there is no CUDA kernel.
    rows: list[Tensor] = [info] * len(weights)
    infos = torch.split(info, [len(factor) for factor in factors])
    whole = [i for i in range(len(weights)) if i not in parts]
    for some in (whole, parts):
        joined = [b for b, layer in enumerate(layers.biases) if layer in some]
        result = _unwhiten(
            [weights[i] for i in some],
            [biases[b] for b in joined],
            [weights_before[i] for i in some],
            [biases_before[b] for b in joined],
            [factors[i] for i in some],
            torch.cat([infos[i] for i in some]),
            torch.stack([has_gradient[i] for i in some]),
            layers.of(some),
            keep_norm,
            finish,
            cuda_kernel=some is whole,
        )
        for i, row in zip(some, result.unbind(), strict=True):
            rows[i] = row
    return torch.stack(rows)


def _chunks(weights: list[Tensor], factors: list[Tensor], layers: Layers) -> list[int]:
    """The chunks of one group of every layer."""
    if layers.chunk == 0:
        return [len(factor) for factor in factors]  # whole layers have no kernel anyway
    units = [weight.shape[1] + (i in layers.biases) for i, weight in enumerate(weights)]
    return [-(-count // layers.chunk) for count in units]


def _unwhiten(
    weights: list[Tensor],
    biases: list[Tensor],
    weights_before: list[Tensor],
    biases_before: list[Tensor],
    factors: list[Tensor],
    info: Tensor,
    has_gradient: Tensor,
    layers: Layers,
    keep_norm: bool,
    finish: bool,
    *,
    cuda_kernel: bool,
) -> Tensor:
    result: Tensor = call(
        "foreach_unwhiten_",
        layers.chunk,
        [*weights, *factors],
        weights,
        biases,
        weights_before,
        biases_before,
        factors,
        info,
        has_gradient,
        layers.biases,
        layers.indices,
        layers.groups,
        keep_norm,
        finish,
        layers.chunk,
        layers.seed,
        layers.step,
        cuda_kernel=cuda_kernel,
    )
    return result


def foreach_multiply_(
    tensors: list[Tensor], biases: list[Tensor], matrices: list[Tensor], info: Tensor, layers: Layers
) -> None:
    """Multiply by lower triangular matrices from the right, chunk by chunk, as :func:`foreach_apply_`."""
    call(
        "foreach_apply_",
        layers.chunk,
        [*tensors, *matrices],
        tensors,
        biases,
        matrices,
        info,
        [],
        layers.biases,
        [],
        layers.indices,
        layers.groups,
        layers.chunk,
        layers.seed,
        layers.step,
        True,
    )


@register_fake("foreach_whiten_")
def _(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    inputs: list[Tensor],
    row_counts: list[Tensor],
    averages: list[Tensor],
    average_weights: list[Tensor],
    factors: list[Tensor],
    bias_layers: list[int],
    layers: list[int],
    groups: list[int],
    damping: float,
    trace_scaling: bool,
    decay: float,
    chunk: int,
    max_rows: int,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    info = grads[0].new_empty(sum(map(len, factors)), dtype=torch.int32)
    return info, torch.empty_like(info, dtype=torch.float32), info.new_empty(len(grads))


@register_fake("foreach_whiten_by_")
def _(
    grads: list[Tensor],
    bias_grads: list[Tensor],
    factors: list[Tensor],
    info: Tensor,
    bias_layers: list[int],
    layers: list[int],
    groups: list[int],
    chunk: int,
    seed: int,
    step: int,
) -> Tensor:
    return info.new_empty(len(grads))


@register_fake("foreach_unwhiten_")
def _(
    weights: list[Tensor],
    biases: list[Tensor],
    weights_before: list[Tensor],
    biases_before: list[Tensor],
    factors: list[Tensor],
    info: Tensor,
    has_gradient: Tensor,
    bias_layers: list[int],
    layers: list[int],
    groups: list[int],
    keep_norm: bool,
    finish: bool,
    chunk: int,
    seed: int,
    step: int,
) -> Tensor:
    return factors[0].new_empty(len(weights), 2)
