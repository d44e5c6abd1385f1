"""FOOF and ISAAC in plain torch, as published: the closest relatives of the correction.

Both multiply a layer's gradient by the inverse damped second moment of all its inputs at once, bias included; for a
convolution these are its unfolded patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_ROWS = 4096  # patches of a convolution that are used, as in the preconditioner


class InputCorrection:
    """Base class: keeps the inputs of every Linear and Conv2d layer and corrects the gradients in :meth:`step`."""

    def __init__(self, model: nn.Module, damping: float) -> None:
        self.damping = damping
        self.inputs: dict[nn.Module, Tensor] = {}
        self.steps = 0
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.inputs[module] = args[0].detach()

    @torch.no_grad()
    def step(self) -> None:
        for module, inputs in self.inputs.items():
            x = rows(module, inputs)
            gradient = module.weight.grad.flatten(1)
            if module.bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
                gradient = torch.cat([gradient, module.bias.grad[:, None]], 1)
            corrected = self.correct(module, x, gradient)
            if module.bias is not None:
                module.bias.grad.copy_(corrected[:, -1])
                corrected = corrected[:, :-1]
            module.weight.grad.copy_(corrected.reshape_as(module.weight))
        self.inputs.clear()
        self.steps += 1

    def correct(self, module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        raise NotImplementedError


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs as a matrix (n, d); those of a convolution are unfolded to patches."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    patches = functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    flat = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return flat[:: -(-len(flat) // MAX_ROWS)]


class Foof(InputCorrection):
    """Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization", ICML 2022, alg. 1.

    The second moment is a running average that starts from its first value.  The inverse is renewed every ``every``
    steps, and in each of the first ``warm_up``.
    """

    def __init__(
        self, model: nn.Module, damping: float, *, decay: float = 0.95, every: int = 10, warm_up: int = 20
    ) -> None:
        super().__init__(model, damping)
        self.decay, self.every, self.warm_up = decay, every, warm_up
        self.moments: dict[nn.Module, Tensor] = {}
        self.inverses: dict[nn.Module, Tensor] = {}

    def correct(self, module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        new = x.T @ x / len(x)
        if module in self.moments:
            self.moments[module].lerp_(new, 1 - self.decay)
        else:
            self.moments[module] = new
        if self.steps < self.warm_up or self.steps % self.every == 0:
            damped = self.moments[module] + self.damping * torch.eye(x.shape[1])
            self.inverses[module] = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0])
        return gradient @ self.inverses[module]


class Isaac(InputCorrection):
    """Petersen et al., "ISAAC Newton: Input-based Approximate Curvature for Newton's Method", ICLR 2023, theorem 2.

    It uses the current batch only. With fewer rows than units the system is solved in the dual:
    G (X'X/n + l I)^-1 = (G - G X' (X X' + n l I)^-1 X) / l.
    """

    def correct(self, module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        n, d = x.shape
        if n < d:
            factor = torch.linalg.cholesky_ex(x @ x.T + n * self.damping * torch.eye(n))[0]
            return (gradient - torch.cholesky_solve(x @ gradient.T, factor).T @ x) / self.damping
        factor = torch.linalg.cholesky_ex(x.T @ x / n + self.damping * torch.eye(d))[0]
        return torch.cholesky_solve(gradient.T, factor).T
