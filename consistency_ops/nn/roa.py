"""Random orthogonal additive networks: deep and recurrent nets that neither explode nor die (arXiv 2210.01245).

The published equations could not be read; these are the additive update of the same author's ResESN code with trained
weights, and the bounds are our own, from the triangle inequality of singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from ..ops.checks import check_integers, check_numbers, check_sizes
from .activations import SLOPES, make_activation
from .orthogonal import OrthogonalFilter
from .roa_steps import layers_at_once

_FORWARD_ONLY = 32  # layers at once without gradients: their states are in memory together


class JacobianBounds(NamedTuple):
    """Natural logarithms: ``log_lower`` bounds the smallest singular value from below, ``log_upper`` the largest."""

    log_lower: float
    log_upper: float


def roa_jacobian_bounds(
    alpha: float, beta: float, weight_norms: Sequence[float] | Tensor, *, slope: float = 1.0
) -> JacobianBounds:
    """Bound all singular values of the Jacobian of x <- alpha O_l x + beta phi(W_l x + b_l), l = 1, ..., L.

    With ``|phi'|`` <= ``slope`` and spectral norms w_l = ``weight_norms``::

        prod_l max(0, alpha - beta slope w_l)  <=  sigma_min  <=  sigma_max  <=  prod_l (alpha + beta slope w_l)

    whatever the inputs.  They do not depend on the depth when beta falls like 1 / L.  ``log_lower`` is -inf when a
    factor is 0.  For a recurrent network the norm of its one matrix is repeated for every step.

    Raises:
        ValueError: alpha, beta, slope or a norm is negative or not finite.
    """
    check_numbers("roa_jacobian_bounds", alpha=alpha, beta=beta, slope=slope)
    norms = torch.as_tensor(weight_norms, dtype=torch.float64).flatten()
    values = [alpha, beta, slope, *norms.tolist()]
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(
            f"roa_jacobian_bounds: alpha, beta, slope and weight_norms must be at least 0 and finite, got {alpha}, "
            f"{beta}, {slope}, {norms.tolist() if len(norms) < 9 else f'{len(norms)} norms'}"
        )
    steps = beta * slope * norms
    lower, upper = (alpha - steps).clamp_min(0).log().sum(), (alpha + steps).log().sum()
    return JacobianBounds(float(lower), float(upper))


class ROAFeedForward(nn.Module):
    """A deep network of random orthogonal additive layers: (..., in_features) to (..., out_features).

    A linear map to ``hidden_features`` units, ``num_layers`` times ::

        x <- alpha O_l x + beta phi(W_l x + b_l)

    with fixed random orthogonal O_l (:class:`OrthogonalFilter`) and trained W_l, b_l, and a linear map to the outputs.

    Args:
        in_features, hidden_features, out_features, num_layers: sizes, at least 1.
        beta: weight of the new activation, > 0.  Default: 1 / num_layers, at most 1/2; with it the singular values of
            the Jacobian stay within bounds that do not depend on the depth, see :meth:`jacobian_bounds`.
        alpha: weight of the filtered past, >= 0.  Default: 1 - beta, the convex combination of the paper.
        activation: tanh, modulus, relu, softsign, sigmoid or identity.
        filter: kind of all filters, see :class:`OrthogonalFilter`.
        shared_filter: one filter for all layers.
        checkpoint: keep for backward only the state after every so many layers, and compute the others again, segment
            by segment: memory for ``num_layers / checkpoint + checkpoint`` states instead of ``num_layers``, for one
            more forward pass. About the root of ``num_layers`` needs least. 0: keep all.
        generator: random numbers of the filters; weights are those of ``nn.Linear``, from torch's own generator.

    On a CPU all layers are computed in one call where nothing can tell: plain ``nn.Linear`` layers without hooks other
    than those of a :class:`consistency_ops.Preconditioner`, one dtype, no transform of ``torch.func``.

    Raises:
        ValueError: an unknown name, or a number out of range.

    Source: Ceni 2022, arXiv 2210.01245 (roaFNN).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_layers: int,
        *,
        beta: float | None = None,
        alpha: float | None = None,
        activation: str = "tanh",
        filter: str = "permutation",
        shared_filter: bool = False,
        checkpoint: int = 0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(in_features=in_features, hidden_features=hidden_features, out_features=out_features)
        check_sizes("ROAFeedForward", **sizes, num_layers=num_layers)
        beta = min(0.5, 1 / num_layers) if beta is None else beta
        self.alpha: float
        self.beta: float
        self.alpha, self.beta = check_weights("ROAFeedForward", alpha, beta)
        self.activation: str = activation
        self.checkpoint: int = check_segment("ROAFeedForward", checkpoint)
        self.phi: nn.Module = make_activation("ROAFeedForward", activation)
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        self.encoder: nn.Linear = nn.Linear(in_features, hidden_features, **options)
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.Linear(hidden_features, hidden_features, **options) for _ in range(num_layers)
        )
        self.filters: nn.ModuleList = nn.ModuleList(
            OrthogonalFilter(hidden_features, filter, generator=generator, **options)
            for _ in range(1 if shared_filter else num_layers)
        )
        self.decoder: nn.Linear = nn.Linear(hidden_features, out_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.hidden(self.encoder(x)))
        return y

    def hidden(self, x: Tensor) -> Tensor:
        """Apply only the additive layers: (..., hidden_features) to the same shape."""
        total, with_gradients = len(self.layers), torch.is_grad_enabled()
        segment = self.checkpoint or total if with_gradients else _FORWARD_ONLY
        again: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=False)
        for first in range(0, total, segment):
            last = min(first + segment, total)
            if with_gradients and self.checkpoint:
                x = run_again_in_backward(self._some_layers, x, first, last, **again)
            else:
                x = self._some_layers(x, first, last)
        return x

    def _some_layers(self, x: Tensor, first: int, last: int) -> Tensor:
        layers = list(self.layers)[first:last]
        filters = list(self.filters) if len(self.filters) == 1 else list(self.filters)[first:last]
        options = dict(alpha=self.alpha, beta=self.beta, activation=self.activation)
        together = layers_at_once(x, layers, filters, self.phi, **options)
        if together is not None:
            return together
        for i, layer in enumerate(layers):
            filter = filters[i % len(filters)]
            x = torch.add(self.alpha * filter(x), self.phi(layer(x)), alpha=self.beta)
        return x

    def jacobian_bounds(self) -> JacobianBounds:
        """Bound the singular values of the Jacobian of :meth:`hidden` for all inputs, from the present weights."""
        norms = [spectral_norm(layer.get_parameter("weight")) for layer in self.layers]
        return roa_jacobian_bounds(self.alpha, self.beta, norms, slope=SLOPES[self.activation])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}"


def spectral_norm(weight: Tensor) -> float:
    """Return the largest singular value of a matrix, computed in float64."""
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def check_weights(owner: str, alpha: float | None, beta: float) -> tuple[float, float]:
    check_numbers(owner, beta=beta, **({} if alpha is None else {"alpha": alpha}))
    if not 0 < beta < math.inf:
        raise ValueError(f"{owner}: beta must be positive and finite, got {beta}")
    if alpha is None:
        if beta > 1:
            raise ValueError(f"{owner}: beta must be at most 1 where alpha is not given, got {beta}")
        alpha = 1 - beta
    if not 0 <= alpha < math.inf:
        raise ValueError(f"{owner}: alpha must be at least 0 and finite, got {alpha}")
    return float(alpha), float(beta)


def check_segment(owner: str, checkpoint: int) -> int:
    check_integers(owner, checkpoint=checkpoint)
    if checkpoint < 0:
        raise ValueError(f"{owner}: checkpoint must be at least 0, got {checkpoint}")
    return int(checkpoint)
