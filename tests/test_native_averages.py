"""Running averages in one call of the accelerator have the bits of those that torch makes, a layer at a time."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from consistency_ops import Preconditioner
from consistency_ops.engine import correction
from consistency_ops.ops.library import torch_abi

pytestmark = pytest.mark.skipif(
    not hasattr(torch_abi, "update_averages"), reason="without the accelerator csrc/torch_abi"
)


def train(native: bool, dtype: torch.dtype, spoil: str | None, **options) -> list[torch.Tensor]:
    """Weights and state after some steps; the third one has a spoilt gradient, spoilt inputs, or is not in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer, decay=0.9, chunk=8, **options)
    calls = []
    update = torch_abi.update_averages
    stand_in = mock.Mock(update_averages=lambda *a: calls.append(update(*a)) or calls[-1])
    with mock.patch.object(correction, "torch_abi", stand_in if native else None):
        for i in range(6):
            x = torch.randn(40, 20, generator=torch.Generator().manual_seed(i)).to(dtype)
            if spoil == "inputs" and i in (0, 2):
                x[3, 4] = torch.inf
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if spoil == "gradient" and i in (0, 2):
                model[2].weight.grad[1, 1] = torch.nan
            if spoil == "inputs" and i in (0, 2):
                for p in model.parameters():
                    p.grad.nan_to_num_(0, 0, 0)
            optimizer.step()
            if spoil == "gradient":
                with torch.no_grad():
                    for p in model.parameters():
                        p.nan_to_num_(0)
    assert bool(calls) is native and all(found is not None for found in calls)
    state = copy.deepcopy(pre.state_dict()["layers"])
    return [p.detach() for p in model.parameters()] + [v for layer in state.values() for v in layer.values()]


@pytest.mark.parametrize("spoil", [None, "gradient", "inputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"bias": False}], ids=str)
def test_the_same_bits(dtype, spoil, options):
    native, python = train(True, dtype, spoil, **options), train(False, dtype, spoil, **options)
    assert len(native) == len(python) > 6
    for a, b in zip(native, python, strict=True):
        assert a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
