"""The model of the correction's speed (benchmarks/model), from the compiled code: its trace is right, its figures do
not grow.  No GPU is needed.
"""

import json
import shutil

import numpy as np
import pytest
import torch

import consistency_ops as co
from benchmarks.model import launch, sass
from benchmarks.model.emulator import bank_waves

RESULT = sass.ROOT / "benchmarks" / "results" / "kernel-model.json"


def missing_tool() -> str:
    for name in ("nvcc", "cuobjdump", "nvdisasm"):
        try:
            sass.tool(name)
        except sass.ToolError as error:
            return str(error)
    return "" if shutil.which("c++") else "needs a C++ compiler"


needs_tools = pytest.mark.skipif(missing_tool() != "", reason=missing_tool())


def test_bank_conflicts_are_counted():
    lanes = np.arange(32)
    assert bank_waves(lanes * 4, 4) == 1
    assert bank_waves(lanes * 0, 4) == 1  # one word for all
    assert bank_waves(lanes * 8, 4) == 2
    assert bank_waves(lanes * 128, 4) == 32
    assert bank_waves(lanes * 16, 16) == 4  # 512 bytes


@pytest.mark.nightly  # two minutes and a half
@needs_tools
def test_the_emulated_machine_code_gives_the_result():
    """What the model counts is what the kernel does: its compiled code, run lane by lane, corrects a gradient."""
    emulated = launch.Launch(64, rows=40, outputs=24)
    for cta in range(emulated.plan["ctas"]):
        emulated.run(cta)
    grad, inputs = (torch.from_numpy(array) for array in (emulated.g[..., 0].copy(), emulated.x))
    expected = co.precondition(grad.double(), inputs.double(), damping=0.1, chunk=128, group=8)
    torch.testing.assert_close(torch.from_numpy(emulated.gradient()[..., 0]).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_tools
def test_the_emulated_machine_code_whitens():
    """Gram tasks, factor and apply tasks of the launch before the optimizer's step, with an average."""
    units, chunk = 64, 128
    emulated = launch.Launch(units, rows=40, outputs=24, rung=launch.TASK_QUEUE, ctas=2, mode=launch.WHITENS)
    for cta in range(emulated.plan["ctas"]):
        emulated.run(cta)
    grad, inputs = (torch.from_numpy(array) for array in (emulated.g[..., 0].copy(), emulated.x))
    average, factor = torch.zeros(2, 1, chunk, chunk)
    average[0, :units, :units] = 0.5 * torch.eye(units)
    lists = [grad], [], [inputs], [torch.tensor([40])], [average], [torch.tensor([0.5])], [factor], [], [0], [8]
    torch.ops.consistency_ops_torch.foreach_whiten_(*lists, 0.1, True, 0.95, chunk, 10_000, 0, 0)
    torch.testing.assert_close(torch.from_numpy(emulated.gradient()[..., 0]), grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_tools
def test_tasks_of_the_queue_are_emulated():
    """A task finds what it waits for through a table of jumps, which lies in a constant bank of its own."""
    queued = launch.Launch(64, 8, 8, rung=launch.TASK_QUEUE, ctas=2)
    roles = [queued.run(ticket).issued for ticket in (0, queued.plan["ctas"] - 1)]
    assert roles[0]["gram.cuh"] > 1000 > roles[1]["gram.cuh"]
    assert roles[1]["apply.cuh"] > 1000 > roles[0]["apply.cuh"]


@pytest.mark.slow
@needs_tools
def test_figures_of_the_model_do_not_grow():
    """Against the stored ones of one chunk, with 3 % for another release of the compiler."""
    from benchmarks.model.__main__ import one_chunk

    stored, found = json.loads(RESULT.read_text())["steps"][-1]["one_chunk"], one_chunk()
    assert found["factor_inverse_us"] <= 1.03 * stored["factor_inverse_us"]
    for name, count in stored["instructions"].items():
        assert found["instructions"][name] <= 1.03 * count, name
