"""The family of whitened coordinates in plain torch, for the search (``search``): the product has one member of it.

For a layer with input rows X and weight gradient G (bias joined), by chunks of units that are drawn once:

    M = A / tau + damping I,   A: running average of X^T X / n
    G <- G M^-inner            before the optimizer's step
    D <- D M^-outer            its displacement, after the step; then scaled to a norm

With ``root="cholesky"`` and both powers 1/2, M^-1/2 is L^-T on the way in and L^-1 on the way out.  ``output`` does the
same from the left with the second moment of the gradients of the layer's outputs.  An optimizer that acts on single
numbers, as Adam, depends on the basis, too: ``root="eigen"`` gives it the eigenvectors of M.  ``kernels`` changes the
basis of the taps of convolutions.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers.optimizers import BASES, Step, set_betas, stepper
from consistency_ops.engine.kernel_cosines import cosines

WARM_UP = 20  # steps at the start in which the factors are renewed each time
MAX_ROWS = 4096


class CoveredLayer:
    """One layer: its parameters as a matrix (rows, units), its averages and its factors."""

    def __init__(self, module: nn.Module, bias: bool, chunk: int | None, generator: torch.Generator) -> None:
        self.module = module
        self.conv = isinstance(module, nn.Conv2d)
        self.has_taps = self.conv and module.weight[0, 0].numel() > 1
        bias = bias and module.bias is not None and not self.has_taps
        self.parameters = [module.weight, *([module.bias] if bias else [])]
        self.units = module.weight.shape[1] + len(self.parameters) - 1
        self.division = Division(self.units, chunk, generator)
        self.left = Division(module.weight.shape[0], chunk, generator)
        self.rows: Tensor | None = None
        self.signals: Tensor | None = None
        self.moment: Tensor | None = None
        self.left_moment: Tensor | None = None
        self.count = 0
        self.factors: tuple[Tensor | None, Tensor | None] | None = None
        self.left_factors: tuple[Tensor | None, Tensor | None] = None, None
        self.tap_moment: Tensor | None = None
        self.tap_basis: Tensor | None = None
        self.tap_factors: tuple[Tensor, Tensor] | None = None
        self.basis: Tensor | None = None
        self.left_basis: Tensor | None = None
        self.scale = 1.0
        self.damping = 0.0
        self.momentum: Tensor | None = None
        self.mean: Tensor | None = None
        self.mean_factor: tuple[Tensor, float] | None = None

    def matrix(self, tensors: list[Tensor]) -> Tensor:
        """Return weight (and bias) as rows; of a convolution every output channel and tap is a row, with its bias."""
        weight = tensors[0]
        if self.conv:
            weight = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])
        if len(tensors) == 1:
            return weight
        bias = tensors[1].repeat(len(weight) // len(tensors[1]))
        return torch.cat([weight, bias[:, None]], 1)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        shape = self.module.weight.shape
        found = [matrix[:, : shape[1]], *([matrix[:, -1]] if len(self.parameters) > 1 else [])]
        if self.conv:
            found[0] = found[0].reshape(*shape[2:], *shape[:2]).permute(2, 3, 0, 1)
            found[1:] = [bias.view(-1, shape[0]).mean(0) for bias in found[1:]]
        return found


class Division:
    """Units dealt to chunks of equal size, the last one padded."""

    def __init__(self, units: int, chunk: int | None, generator: torch.Generator) -> None:
        self.units = units
        self.count = 1 if chunk is None else -(-units // chunk)
        self.size = -(-units // self.count)
        self.order = torch.randperm(units, generator=generator) if self.count > 1 else torch.arange(units)
        self.back = self.order.argsort()

    def cut(self, x: Tensor) -> Tensor:
        """(rows, units) to (chunks, rows, size)."""
        x = nn.functional.pad(x[:, self.order], (0, self.count * self.size - self.units))
        return x.view(len(x), self.count, self.size).transpose(0, 1)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(x.shape[1], -1)[:, : self.units][:, self.back]


class Family:
    """Steps optimizers in whitened coordinates of the layers of ``model``.

    Args:
        optimizers: step in between; together they hold all parameters.
        inner, outer: powers of M in front of and behind the step; 0 leaves that side out.
        root: ``"cholesky"`` (both powers 1/2), ``"symmetric"``, or ``"eigen"``: the optimizer works in the basis of the
            eigenvectors of M, which follow M by one step of a QR iteration at each renewal, as in SOAP.
        damping: in units of the mean eigenvalue, or with ``relative="largest"`` of the largest one.
        decay: of the averages, corrected for their start at 0.
        every: steps between two factors.
        norm: of the mapped displacement of a layer: ``"keep"`` the optimizer's, ``"clip"`` to it, or ``"free"``; or
            times a number that only the factor says: ``"white"`` keeps the norm that a displacement of white noise has
            on average, ``"outputs"`` what such a displacement does to the outputs.
        chunk: largest number of units together; None: whole layers.
        bias: whether the bias is a unit; that of a kernel with several taps never is.
        skip: patterns of names.
        output: power on the output side, in front and behind (symmetric or eigen root, same damping, average, chunk).
        output_inner: whether the output side acts in front, too.
        output_root: ``"symmetric"`` or ``"cholesky"`` (power 1/2), where ``root`` is not ``"eigen"``.
        output_of: the moments on the output side are of the ``"signals"``, the gradients of the layer's outputs, or of
            the ``"gradients"`` of the weights in the whitened coordinates of the inputs, their columns as rows: this
            needs no hook in the backward pass.
        kernels: of convolutions: ``""`` leaves their taps alone; ``"dct"`` takes their cosine coefficients,
            ``"eigen"`` coordinates in the eigenvectors of the second moment of the taps of the whitened gradients, and
            ``"cholesky"`` whitens by that moment, damped, on the way in and back.
        momentum: decay of an average of the gradients that is taken before they are whitened, for an optimizer without
            momentum of its own.
        mean_apart: whether the inputs' mean is taken from A and M has it whole, across chunks, as its rank-one part.
        last_damping: damping of the last layer; those in between have equal ratios of one to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        inner: float = 0.5,
        outer: float = 0.5,
        root: str = "cholesky",
        damping: float = 0.1,
        relative: str = "mean",
        decay: float = 0.95,
        every: int = 1,
        norm: str = "keep",
        chunk: int | None = 128,
        bias: bool = True,
        skip: tuple[str, ...] = (),
        output: float = 0.0,
        output_inner: bool = True,
        output_root: str = "symmetric",
        output_of: str = "signals",
        kernels: str = "",
        momentum: float = 0.0,
        mean_apart: bool = False,
        last_damping: float | None = None,
    ) -> None:
        self.optimizers, self.inner, self.outer, self.root = optimizers, inner, outer, root
        self.relative, self.decay, self.every, self.norm = relative, decay, every, norm
        self.output, self.output_inner = output, output_inner
        self.output_root, self.output_of, self.kernels = output_root, output_of, kernels
        self.momentum, self.mean_apart = momentum, mean_apart
        self.steps = 0
        self.layers: list[CoveredLayer] = []
        generator = torch.Generator().manual_seed(0)
        for name, module in model.named_modules():
            covered = isinstance(module, nn.Linear | nn.Conv2d)
            if covered and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
                layer = CoveredLayer(module, bias, chunk, generator)
                self.layers.append(layer)
                module.register_forward_pre_hook(lambda module, args, layer=layer: self._keep(layer, args[0]))
                if output and output_of == "signals":
                    module.register_full_backward_hook(lambda m, i, o, layer=layer: self._keep_signals(layer, o[0]))

        ratio = (last_damping or damping) / damping
        for i, layer in enumerate(self.layers):
            layer.damping = damping * ratio ** (i / max(len(self.layers) - 1, 1))

    def _keep(self, layer: CoveredLayer, x: Tensor) -> None:
        if layer.module.training:
            layer.rows = sampled(x.detach(), layer.conv)

    def _keep_signals(self, layer: CoveredLayer, signals: Tensor) -> None:
        layer.signals = sampled(signals.detach(), layer.conv)

    @torch.no_grad()
    def step(self) -> None:
        groups = {id(p): group for one in self.optimizers for group in one.param_groups for p in group["params"]}
        before = []
        for layer in self.layers:
            gradient = layer.matrix([p.grad for p in layer.parameters])
            self._renew(layer, gradient)
            if self.momentum:
                gradient = averaged(layer.momentum, gradient, weight_of_new(self.momentum, layer.count))
                layer.momentum = gradient
            for p, new in zip(layer.parameters, layer.tensors(self._mapped(layer, gradient, 0)), strict=True):
                p.grad.copy_(new)
            decays = [1 - (group := groups[id(p)])["lr"] * group.get("weight_decay", 0.0) for p in layer.parameters]
            before.append([p * decay for p, decay in zip(layer.parameters, decays, strict=True)])
        for optimizer in self.optimizers:
            optimizer.step()
        for layer, old in zip(self.layers, before, strict=True):
            moved = layer.matrix([p - b for p, b in zip(layer.parameters, old, strict=True)])
            new = self._mapped(layer, moved, 1)
            if self.norm in ("keep", "clip"):
                ratio = moved.norm() / new.norm().clamp(min=1e-30)
                new = new * (ratio.clamp(max=1) if self.norm == "clip" else ratio)
            elif self.norm != "free":
                new = new * layer.scale
            for p, b, change in zip(layer.parameters, old, layer.tensors(new), strict=True):
                p.copy_(b + change)
        self.steps += 1

    def _mapped(self, layer: CoveredLayer, matrix: Tensor, side: int) -> Tensor:
        matrix = self._of_channels(layer, matrix, side)
        if layer.tap_factors is not None:
            factor = layer.tap_factors[side]
            matrix = (factor.T @ matrix.view(len(factor), -1)).view_as(matrix)
        return matrix

    def _of_channels(self, layer: CoveredLayer, matrix: Tensor, side: int) -> Tensor:
        return self._left(layer, self._right(layer, matrix, side), side)

    def _right(self, layer: CoveredLayer, matrix: Tensor, side: int) -> Tensor:
        factor = layer.factors[side]
        if side == 1:
            matrix = without_mean(layer, matrix)
        if factor is not None:
            matrix = layer.division.join(layer.division.cut(matrix) @ factor)
        return without_mean(layer, matrix) if side == 0 else matrix

    def _left(self, layer: CoveredLayer, matrix: Tensor, side: int) -> Tensor:
        left = layer.left_factors[side]
        if left is not None and (side == 1 or self.output_inner):
            taps = matrix.view(-1, layer.left.units, matrix.shape[1])
            parts = [layer.left.join(layer.left.cut(tap.T) @ left).T for tap in taps]
            matrix = torch.cat(parts)
        return matrix

    def _renew(self, layer: CoveredLayer, gradient: Tensor) -> None:
        x = layer.rows
        if len(layer.parameters) > 1:
            x = nn.functional.pad(x, (0, 1), value=1.0)
        layer.count += 1
        weight = weight_of_new(self.decay, layer.count)
        if self.mean_apart:
            layer.mean = averaged(layer.mean, x.mean(0), weight)
            x = x - layer.mean
        layer.moment = averaged(layer.moment, moments(layer.division.cut(x)), weight)
        renewed = layer.factors is None or self.steps < WARM_UP or self.steps % self.every == 0
        if renewed:
            self._renew_inputs(layer)
        if self.output:
            signals = layer.signals if self.output_of == "signals" else self._columns(layer, gradient)
            layer.left_moment = averaged(layer.left_moment, moments(layer.left.cut(signals)), weight)
            if renewed:
                self._renew_outputs(layer)
        if self.kernels and layer.has_taps:
            self._renew_kernels(layer, gradient, weight, renewed)

    def _renew_kernels(self, layer: CoveredLayer, gradient: Tensor, weight: float, renewed: bool) -> None:
        shape = layer.module.weight.shape[2:]
        if self.kernels == "dct":
            if layer.tap_factors is None:
                basis = cosines(shape, gradient.dtype, gradient.device)
                layer.tap_factors = basis.T, basis
            return
        taps = self._of_channels(layer, gradient, 0).view(shape.numel(), -1)
        layer.tap_moment = averaged(layer.tap_moment, moments(taps.T[None]), weight)
        if not renewed:
            return
        damped = self._damped(layer, layer.tap_moment, shape.numel())
        if self.kernels == "eigen":
            layer.tap_basis = followed(damped, layer.tap_basis)
            into, back = in_basis(damped, layer.tap_basis, 0.0, 0.0)
        else:
            into, back = cholesky_factors(damped)
        layer.tap_factors = into[0], back[0]

    def _columns(self, layer: CoveredLayer, gradient: Tensor) -> Tensor:
        """Return the columns of the whitened gradient, of all taps of a convolution, as rows (n, outputs)."""
        whitened = self._right(layer, gradient, 0)
        return whitened.view(-1, layer.left.units, whitened.shape[1]).mT.flatten(0, 1)

    def _renew_inputs(self, layer: CoveredLayer) -> None:
        if self.mean_apart:
            self._renew_with_mean(layer)
            return
        damped = self._damped(layer, layer.moment, layer.units)
        if self.norm in ("white", "outputs"):
            layer.scale = self._scale_of(layer, damped)
        if self.root == "cholesky":
            layer.factors = cholesky_factors(damped)
        elif self.root == "eigen":
            layer.basis = followed(damped, layer.basis)
            layer.factors = in_basis(damped, layer.basis, self.inner, self.outer)
        else:
            values, vectors = torch.linalg.eigh(damped)
            layer.factors = tuple(power(values, vectors, -p) for p in (self.inner, self.outer))

    def _renew_with_mean(self, layer: CoveredLayer) -> None:
        """M = L (I + u u^T) L^T with L block diagonal and u = L^-1 of the mean, so L^-1 takes a rank-one part more."""
        tau = mean_eigenvalue(layer.moment, layer.units) + layer.mean.square().mean()
        scaled = layer.moment / tau + layer.damping * torch.eye(layer.division.size)
        layer.factors = cholesky_factors(scaled)
        u = layer.division.join(layer.division.cut(layer.mean[None]) @ layer.factors[0])[0] / tau.sqrt()
        layer.mean_factor = u / u.norm().clamp(min=1e-30), 1 - float(1 + u.square().sum()) ** -0.5

    def _renew_outputs(self, layer: CoveredLayer) -> None:
        damped = self._damped(layer, layer.left_moment, layer.left.units)
        if self.root == "eigen":
            layer.left_basis = followed(damped, layer.left_basis)
            layer.left_factors = in_basis(damped, layer.left_basis, self.output, self.output)
        elif self.output_root == "cholesky":
            layer.left_factors = cholesky_factors(damped)
        else:
            layer.left_factors = (power(*torch.linalg.eigh(damped), -self.output),) * 2

    def _scale_of(self, layer: CoveredLayer, damped: Tensor) -> float:
        """The fixed scale: E |D L^-1|^2 is |D|^2 tr(M^-1) / d for white D, and of the outputs' change 1 - damping times
        that."""
        padding = damped.shape[0] * damped.shape[1] - layer.units
        inverse = torch.linalg.inv(damped).diagonal(dim1=1, dim2=2).sum() - padding / layer.damping
        share = float(inverse) / layer.units
        return share**-0.5 if self.norm == "white" else max(1 - layer.damping * share, 1e-3) ** -0.5

    def _damped(self, layer: CoveredLayer, moment: Tensor, units: int) -> Tensor:
        """M; padding has the eigenvalue of the damping."""
        scaled = moment / mean_eigenvalue(moment, units)
        damping = layer.damping
        if self.relative == "largest":
            damping = damping * float(torch.linalg.eigvalsh(scaled).max())
        return scaled + damping * torch.eye(scaled.shape[1])


def without_mean(layer: CoveredLayer, matrix: Tensor) -> Tensor:
    if layer.mean_factor is None:
        return matrix
    unit, share = layer.mean_factor
    return matrix - share * torch.outer(matrix @ unit, unit)


def sampled(x: Tensor, conv: bool) -> Tensor:
    """Return at most ``MAX_ROWS`` rows (n, units), evenly spread."""
    x = (x.movedim(1, -1) if conv else x).reshape(-1, x.shape[1] if conv else x.shape[-1])
    return x[:: -(-len(x) // MAX_ROWS)]


def moments(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[1]


def mean_eigenvalue(moment: Tensor, units: int) -> Tensor:
    return (moment.diagonal(dim1=1, dim2=2).sum() / units).clamp(min=1e-30)


def weight_of_new(decay: float, count: int) -> float:
    """Return the weight of the newest of ``count`` values in a running average, corrected for its start at 0."""
    return (1 - decay) / (1 - decay**count)


def averaged(old: Tensor | None, new: Tensor, weight: float) -> Tensor:
    return new if old is None else old.lerp(new, weight)


def cholesky_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(matrix.shape[1])
    lower = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrix)[0], eye, upper=False)
    return lower.mT, lower


def power(values: Tensor, vectors: Tensor, exponent: float) -> Tensor | None:
    if exponent == 0:
        return None
    return (vectors * values.clamp(min=1e-6).pow(exponent)[:, None, :]) @ vectors.mT


def followed(matrix: Tensor, basis: Tensor | None) -> Tensor:
    """Return eigenvectors of ``matrix``; with an earlier basis one step of the QR iteration from it.

    The columns keep their order and signs, so that an optimizer's state for them stays valid.
    """
    if basis is None:
        return torch.linalg.eigh(matrix)[1]
    vectors, upper = torch.linalg.qr(matrix @ basis)
    return vectors * upper.diagonal(dim1=1, dim2=2).sign()[:, None, :]


def in_basis(matrix: Tensor, basis: Tensor, inner: float, outer: float) -> tuple[Tensor, Tensor]:
    """Return the factor into the coordinates of ``basis`` and the one back."""
    values = (basis * (matrix @ basis)).sum(1).clamp(min=1e-6)
    return basis * values.pow(-inner)[:, None, :], (basis * values.pow(-outer)[:, None, :]).mT


def build_family(base: str) -> Callable[..., Step]:
    """Return a builder of ``base`` in the family's coordinates, with ``alone`` outside of them.

    ``betas`` are Adam's, also where it steps the rest beside Muon.
    """

    def build(
        model: nn.Module, loss_type: str, lr: float, betas: tuple | None = None, alone: bool = False, **options: object
    ) -> Step:
        optimizer = BASES[base](model, lr)
        parts = getattr(optimizer, "parts", [optimizer])
        set_betas(parts, betas)
        if alone:
            step = stepper(model, *(part.step for part in parts))
            step.keep = parts
            return step
        family = Family(model, parts, **options)
        step = stepper(model, family.step)
        step.keep = [*parts, family]
        return step

    return build
