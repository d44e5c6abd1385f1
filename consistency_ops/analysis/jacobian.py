"""The Jacobian between two tensors of a recorded graph, computed whole or only through products with vectors."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

# Lanczos in m steps tells singular values apart from 0 down to a few times sigma_max / m: the zeros of the Chebyshev
# polynomial of degree m on [0, sigma_max^2] that are nearest to 0 are of the order of (sigma_max / m)^2.
RESOLUTION = 4.0
LARGEST = 2**27  # numbers that the vectors of a Lanczos process may have, in float64: 1 GiB


class Block:
    """J = d end / d start of every sample (dimension 0), and the residual at ``end``."""

    def __init__(self, start: Tensor, end: Tensor, residual: Tensor, tau: float, generator: torch.Generator) -> None:
        self.start: Tensor = start
        self.end: Tensor = end
        self.tau: float = tau
        self.generator: torch.Generator = generator
        self.samples: int = len(end)
        self.residual: Tensor = residual.detach().to(end).reshape(self.samples, -1)
        self.by_rows: bool = False  # where an operation has no second derivative
        self._pull: tuple[Tensor, Tensor] | None = None

    def vjp(self, v: Tensor) -> Tensor:
        """Return J^T v, (samples, d_start)."""
        (g,) = torch.autograd.grad(self.end, self.start, v.reshape(self.end.shape).to(self.end), retain_graph=True)
        return g.reshape(self.samples, -1)

    def jvp(self, w: Tensor) -> Tensor:
        """Return J w, (samples, d_end). J^T u is linear in u, so that its derivative, applied backwards, is J."""
        if self._pull is None:
            u = torch.zeros_like(self.end, requires_grad=True)
            (g,) = torch.autograd.grad(self.end, self.start, u, create_graph=True)
            self._pull = u, g
        u, g = self._pull
        (jw,) = torch.autograd.grad(g, u, w.reshape(g.shape).to(g), retain_graph=True)
        return jw.reshape(self.samples, -1)

    def matrix(self) -> Tensor:
        """Return J, (samples, d_end, d_start), float64: one backward pass per row, or per column if these are fewer."""
        d_start, d_end = self.start[0].numel(), self.end[0].numel()
        by_rows = self.by_rows or d_end <= d_start
        unit = torch.zeros(self.samples, d_end if by_rows else d_start, dtype=self.end.dtype, device=self.end.device)
        parts = []
        for k in range(unit.shape[1]):
            unit.zero_()[:, k] = 1
            parts.append((self.vjp if by_rows else self.jvp)(unit).double())
        return torch.stack(parts, dim=1 if by_rows else 2)

    def measure(self, exact: int, steps: int, seconds: float = math.inf) -> dict[str, Any]:
        """Everything that can be measured: of the whole J if its smaller side is at most ``exact``, else by Lanczos.

        Where an operation has no second derivative, there are no products with J: then it is rows alone, or the gain.
        So it is, too, where the vectors of a Lanczos process would not fit into memory, or all would take more than
        ``seconds``, by the time of the first product.
        """
        small = min(self.start[0].numel(), self.end[0].numel())
        begin = time.monotonic()
        norms = self._norms()
        allowed = seconds / max(time.monotonic() - begin, 1e-9)  # in products with the adjoint
        try:
            if small <= exact and small * 2 <= allowed:
                return {"method": "exact", **self.exact()}
            if self.end.numel() * steps <= LARGEST and 8 * steps <= allowed:  # a product with J takes two to three
                return {"method": "lanczos", **self.lanczos(steps)}
        except RuntimeError as error:  # NotImplementedError is one
            if "derivative" not in str(error):
                raise
            self.by_rows = True
        if self.by_rows and self.end[0].numel() <= min(2 * exact, allowed):
            return {"method": "exact", **self.exact()}
        none = torch.full((self.samples,), torch.nan, dtype=torch.float64)
        found = self._summary(none, none, none, none, *norms)
        return {"method": "gradient", **found, "sigma_min": math.nan, "singular_values": []}

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Return |r| and |J^T r| of every sample."""
        return self.residual.double().norm(dim=1), self.vjp(self.residual).double().norm(dim=1)

    def exact(self) -> dict[str, Any]:
        matrix = self.matrix()
        bad = ~matrix.isfinite().all(2).all(1)
        left, sigma, _ = torch.linalg.svd(torch.where(bad[:, None, None], 0.0, matrix), full_matrices=False)
        sigma[bad] = torch.nan
        kept = sigma > self.tau * sigma[:, :1]
        r, back = self._norms()
        inside = (torch.einsum("nek,ne->nk", left, self.residual.double()) * kept).norm(dim=1)
        return self._summary(sigma[:, 0], sigma.mean(1), kept.sum(1).double(), (inside / r).square(), r, back) | {
            "sigma_min": finite_mean(sigma[:, -1]),
            "singular_values": sigma.tolist(),
        }

    def lanczos(self, steps: int) -> dict[str, Any]:
        """Estimate by two Lanczos processes on J J^T: one starts at the residual, one at a random vector.

        A process gives nodes and weights of a Gauss quadrature for the spectral measure of its start vector. The one
        of the residual gives the share of the residual in the image; the one of a random vector, times d_end, estimates
        traces.
        """
        r, back = self._norms()
        d_end, small = self.end[0].numel(), min(self.start[0].numel(), self.end[0].numel())
        start = torch.randn(self.samples, d_end, generator=self.generator).to(self.end)
        nodes, weights = self._quadrature(self.residual, steps)
        random_nodes, random_weights = self._quadrature(start, steps)
        top = torch.maximum(nodes.amax(1), random_nodes.amax(1))
        if steps < d_end:  # else the process ends with all of J J^T
            self.tau = max(self.tau, RESOLUTION / steps)
        floor = self.tau**2 * top[:, None]
        inside = (weights * (nodes > floor)).sum(1)
        rank = d_end * (random_weights * (random_nodes > floor)).sum(1)
        mean = d_end * (random_weights * random_nodes.sqrt()).sum(1) / small
        inside[r == 0] = torch.nan
        return self._summary(top.sqrt(), mean, rank.clamp(max=small), inside, r, back) | {
            "sigma_min": float("nan"),
            "singular_values": [],
        }

    def _quadrature(self, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return Ritz values of J J^T (>= 0) and the squared first components of their vectors, (samples, steps)."""
        steps = min(steps, start.shape[1])
        tiny = torch.finfo(torch.float64).tiny
        q = start.double() / start.double().norm(dim=1, keepdim=True).clamp(min=tiny)
        basis, alphas, betas = [q], [], []
        for k in range(steps):
            w = self.jvp(self.vjp(q)).double()
            alphas.append((w * q).sum(1))
            if k + 1 == steps:
                break
            for _ in range(2):  # twice is enough for full orthogonality
                stack = torch.stack(basis, 1)
                w = w - torch.einsum("nkd,nk->nd", stack, torch.einsum("nkd,nd->nk", stack, w))
            beta = w.norm(dim=1)
            # The invariant subspace is complete, and the rest would be rounding. Zeros have no weight.
            beta = torch.where(beta > 1e-6 * torch.stack(alphas).amax(0), beta, 0.0)
            q = torch.where(beta[:, None] > 0, w / beta[:, None].clamp(min=tiny), 0.0)
            basis.append(q)
            betas.append(beta)
        tridiagonal = torch.diag_embed(torch.stack(alphas, 1))
        if betas:
            off = torch.stack(betas, 1)
            tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
        bad = ~tridiagonal.isfinite().all(2).all(1)
        values, vectors = torch.linalg.eigh(torch.where(bad[:, None, None], 0.0, tridiagonal))
        values[bad] = torch.nan
        return values.clamp(min=0), vectors[:, 0].square()

    def _summary(
        self, sigma_max: Tensor, mean: Tensor, rank: Tensor, inside: Tensor, r: Tensor, back: Tensor
    ) -> dict[str, float]:
        gain = back / r
        return {
            "tau": self.tau,
            "sigma_max": finite_mean(sigma_max),
            "mean_singular_value": finite_mean(mean),
            "rank": finite_mean(rank),
            "nullity": self.end[0].numel() - finite_mean(rank),
            "image_fraction": finite_mean(inside),
            "gain": finite_mean(gain),
            "decay": finite_mean(gain / sigma_max),
        }


def finite_mean(values: Tensor) -> float:
    """Return the mean over the samples whose value is finite."""
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else math.nan
