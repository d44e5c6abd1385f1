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

from ..ops.checks import check_integers, check_numbers, check_sizes, type_name
from .activations import SLOPES, make_activation
from .orthogonal import OrthogonalFilter


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
        generator: random numbers of the filters; weights are those of ``nn.Linear``, from torch's own generator.

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
        self.alpha, self.beta = _weights("ROAFeedForward", alpha, beta)
        self.activation: str = activation
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
        filters = list(self.filters) * (len(self.layers) if len(self.filters) == 1 else 1)
        for layer, filter in zip(self.layers, filters, strict=True):
            x = torch.add(self.alpha * filter(x), self.phi(layer(x)), alpha=self.beta)
        return x

    def jacobian_bounds(self) -> JacobianBounds:
        """Bound the singular values of the Jacobian of :meth:`hidden` for all inputs, from the present weights."""
        norms = [spectral_norm(layer.get_parameter("weight")) for layer in self.layers]
        return roa_jacobian_bounds(self.alpha, self.beta, norms, slope=SLOPES[self.activation])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}"


class ROARNN(nn.Module):
    """A recurrent network with a random orthogonal additive update, called as ``nn.RNN`` is.

    For t = 1, ..., T ::

        h_t = alpha O h_{t-1} + beta phi(W_h h_{t-1} + W_x u_t + b)

    Args:
        input_size, hidden_size: sizes, at least 1.
        beta: weight of the new activation, > 0.  Gradients over T steps stay within bounds that do not depend on T
            when beta is about 1 / T.
        alpha: weight of the filtered past, >= 0.  Default: 1 - beta.
        activation, filter, generator: as for :class:`ROAFeedForward`.
        batch_first: inputs and outputs are (N, T, ...) instead of (T, N, ...).

    The states have about the size of beta. A read-out therefore learns far sooner from ``10 * states``, or with
    gradients corrected by :class:`consistency_ops.Preconditioner`; both together are best
    (``benchmarks/training/roa_memory.py``).

    Forward: ``u`` (T, N, input_size) and optionally ``h_0`` (N, hidden_size), by default zeros; returns all states
    (T, N, hidden_size) and the last one (N, hidden_size).

    Raises:
        ValueError: an unknown name, a number out of range, or inputs of another shape.

    Source: Ceni 2022, arXiv 2210.01245 (roaRNN).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        beta: float = 0.01,
        alpha: float | None = None,
        activation: str = "tanh",
        filter: str = "permutation",
        batch_first: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("ROARNN", input_size=input_size, hidden_size=hidden_size)
        self.alpha: float
        self.beta: float
        self.alpha, self.beta = _weights("ROARNN", alpha, beta)
        self.activation: str = activation
        self.phi: nn.Module = make_activation("ROARNN", activation)
        self.input_size: int = input_size
        self.hidden_size: int = hidden_size
        self.batch_first: bool = batch_first
        options: dict[str, Any] = dict(device=device, dtype=dtype)
        self.input: nn.Linear = nn.Linear(input_size, hidden_size, **options)
        self.recurrent: nn.Linear = nn.Linear(hidden_size, hidden_size, bias=False, **options)
        self.filter: OrthogonalFilter = OrthogonalFilter(hidden_size, filter, generator=generator, **options)

    def forward(self, u: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for name, value in (("u", u), ("h_0", h_0)):
            if not isinstance(value, Tensor) and not (name == "h_0" and value is None):
                raise TypeError(f"ROARNN: {name} must be a Tensor, got {type_name(value)}")
        if u.dim() != 3 or u.shape[-1] != self.input_size:
            order = "(N, T, input_size)" if self.batch_first else "(T, N, input_size)"
            raise ValueError(f"ROARNN: u must be {order} with input_size {self.input_size}, got {tuple(u.shape)}")
        if self.batch_first:
            u = u.transpose(0, 1)
        drive = self.input(u)
        h = drive.new_zeros(drive.shape[1:]) if h_0 is None else h_0
        if h.shape != drive.shape[1:]:
            raise ValueError(f"ROARNN: h_0 must be {tuple(drive.shape[1:])}, got {tuple(h.shape)}")
        states = []
        for step in drive.unbind(0):
            h = torch.add(self.alpha * self.filter(h), self.phi(step + self.recurrent(h)), alpha=self.beta)
            states.append(h)
        outputs = (
            torch.stack(states, 1 if self.batch_first else 0) if states else drive.transpose(0, int(self.batch_first))
        )
        return outputs, h

    def jacobian_bounds(self, steps: int) -> JacobianBounds:
        """Bound the singular values of dh_T / dh_0, T = ``steps``, for all inputs, from the present weights."""
        check_integers("ROARNN.jacobian_bounds", steps=steps)
        if steps < 0:
            raise ValueError(f"ROARNN.jacobian_bounds: steps must be at least 0, got {steps}")
        norm = spectral_norm(self.recurrent.weight)
        one = roa_jacobian_bounds(self.alpha, self.beta, [norm], slope=SLOPES[self.activation])
        return JacobianBounds(*(steps * value if steps else 0.0 for value in one))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, batch_first={self.batch_first}"


def spectral_norm(weight: Tensor) -> float:
    """Return the largest singular value of a matrix, computed in float64."""
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def _weights(owner: str, alpha: float | None, beta: float) -> tuple[float, float]:
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
