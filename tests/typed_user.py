"""A program as a user writes it, which must pass ``mypy --strict`` without a cast: see test_types.py. It also runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import consistency_ops as co


class InputOutputLinear(nn.Module):
    """A layer that stores its weight as (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def correct_by_hand(grad: Tensor, bias_grad: Tensor, inputs: Tensor) -> float:
    corrected: Tensor = co.precondition(grad, inputs, damping=0.1, scaling="trace", chunk=64)
    both: tuple[Tensor, Tensor] = co.precondition(grad, inputs, bias_grad=bias_grad)
    result = co.precondition_ex(grad, inputs, seed=1, step=2)
    failed: int = int(result.info.count_nonzero())
    with_bias: co.PreconditionResult[tuple[Tensor, Tensor]] = co.precondition_ex(grad, inputs, bias_grad=bias_grad)
    weight, bias = with_bias.corrected
    info: Tensor = co.foreach_precondition_([weight], [inputs], bias_grads=[bias])
    info, damping = co.foreach_precondition_([weight], [inputs], bias_grads=[None], return_damping=True)
    assert corrected.shape == both[0].shape == result.corrected.shape
    return float(result.damping_used.max() + damping.max()) + failed + len(info)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    loss = torch.zeros(())
    pre = co.Preconditioner(model, optimizer, damping=lambda step: 0.1, scaling="trace", chunk=32, skip=["*.skipped"])
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
    stats = pre.stats()
    failed_chunks: int = stats["failed_chunks"]
    worst: float = max(stats["condition"].values(), default=0.0)
    summary: str = pre.summary()
    pre.remove()
    print(f"{len(summary)} characters of summary, {failed_chunks} chunks failed, condition at most {worst:.1f}")
    return float(loss.detach())


def main() -> None:
    torch.manual_seed(0)
    co.layers.register(InputOutputLinear, bias=None, matrix=lambda weight: weight.T)
    model = nn.Sequential(nn.Linear(20, 16), co.nn.Modulus(), InputOutputLinear(16, 10))
    x, y = torch.randn(50, 20), torch.arange(50) % 10
    print(correct_by_hand(torch.randn(16, 20), torch.randn(16), x))
    print(train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), x, y))
    second = co.optim.SGD2(nn.Sequential(co.nn.BatchRMSNorm(20), nn.Linear(20, 10)), lr=0.1, momentum=0.9)
    print(second.preconditioner.steps, co.build_info()["cpu_isa"], co.__version__)


if __name__ == "__main__":
    main()
