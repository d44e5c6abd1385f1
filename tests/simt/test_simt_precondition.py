"""The CUDA correction kernels, run on the CPU: right against float64 and the same bytes under every schedule.

These tests say what the kernels compute, that their barriers suffice and that they stay in bounds.  They say nothing of
PTX, of the rounding of tensor cores or of speed.
"""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import precondition_cases as cases
import pytest
import run_cases
import simt_library as simt
import torch

from consistency_ops import reference

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
COVARIANCE, FACTOR, APPLY = 1, 2, 4


@pytest.fixture(scope="module")
def library():
    return simt.load()


@pytest.mark.parametrize("name", cases.SMALL)
def test_small(library, name):
    run_cases.check_schedules(library, cases.SMALL[name], seeds=8)


@pytest.mark.parametrize("name", cases.LARGE)
def test_large(library, name):
    run_cases.check_schedules(library, cases.LARGE[name], seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cases.SMALL, *cases.LARGE])
def test_forty_schedules(library, name):
    run_cases.check_schedules(library, {**cases.SMALL, **cases.LARGE}[name], seeds=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "races"])
def test_sanitizers(kind):
    """Bounds, alignment and undefined behaviour; data races of shared and global memory."""
    script = simt.ROOT / "tests" / "simt" / "run_cases.py"
    command = [sys.executable, script, simt.build(kind), "2", *cases.SMALL, "96", "128", "256 on sm_80"]
    done = subprocess.run(command, env=simt.sanitizer_environment(kind), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "selection"),
    [
        ("memory", "modulus", ""),
        ("memory", "batch_rms_norm", ""),
        ("races", "batch_rms_norm", "evaluation or unaligned"),
    ],
)
def test_sanitizers_of_elementwise_kernels(kind, name, selection):
    simt.build(kind)  # here, because a preloaded sanitizer slows the compiler down
    file = simt.ROOT / "tests" / "simt" / f"test_simt_{name}.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-k",
        selection,
        file,
    ]
    done = subprocess.run(command, env=simt.sanitizer_environment(kind), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_same_division_and_rows_as_the_reference(library):
    """Same seed, step and layer: reference.py, which draws its own numbers, gets the same gradient."""
    torch.manual_seed(0)
    for trace in (False, True):
        layer = cases.LayerCase(90, 7, rows=75, bias=True, group=4, layer=2)
        case = cases.Case([layer], chunk=32, damping=0.3, trace=trace, max_rows=30, seed=2**40 + 5, step=17)
        problem = cases.problems_of(case)[0]
        grad, bias, info, used = reference.precondition(
            torch.from_numpy(problem.grads()[:, 0, :-1].copy()),
            torch.from_numpy(problem.values().copy()),
            damping=case.damping,
            scaling="trace" if trace else "absolute",
            chunk=case.chunk,
            group=layer.group,
            max_rows=case.max_rows,
            seed=case.seed,
            step=case.step,
            layer=layer.layer,
            bias_grad=torch.from_numpy(problem.bias.astype(np.float64)),
        )
        library.schedule()
        (got,) = cases.run(library, case)
        assert cases.relative_error(got.grads()[:, 0, :-1], grad.numpy()) < 2e-5
        assert cases.relative_error(got.bias, bias.numpy()) < 2e-5
        assert got.info.tolist() == info.tolist()
        np.testing.assert_allclose(got.damping_used, used, rtol=1e-6)


def test_workspace_is_left_ready_for_the_next_launch(library):
    """As a CUDA graph replays it: the same workspace again, nothing cleared in between."""
    case = cases.SMALL["trace"]
    problems, options = cases.problems_of(case), cases.options_of(case)
    options.stages = COVARIANCE | FACTOR | APPLY
    layers = [p.describe(cases.num_chunks(p.all_units, case.chunk)) for p in problems]
    workspace = np.zeros(library.workspace_bytes(layers, options), np.uint8)
    library.schedule(seed=1)
    first = cases.written(cases.run(library, case, workspace))
    library.schedule(seed=2, resident=1)
    assert cases.written(cases.run(library, case, workspace)) == first


def test_more_layers_than_one_launch_describes(library):
    case = cases.Case([cases.LayerCase(6 + i % 3, 2, rows=9, layer=i) for i in range(125)], chunk=4, trace=True)
    library.schedule()
    cases.check(library, case)


@pytest.mark.parametrize("trace", [False, True])
def test_stages_apart_are_the_fused_call(library, trace):
    layers = [cases.LayerCase(70, 6, bias=True, group=4), cases.LayerCase(20, 5, layer=1)]
    layers += [cases.LayerCase(40, 4, spoil=("x", 3, np.nan), layer=2)]
    case = cases.Case(layers, trace=trace)
    library.schedule()
    fused = cases.run(library, case)
    apart = cases.run(library, dataclasses.replace(case, stages=(COVARIANCE, FACTOR, APPLY)))
    for got, want in zip(apart, fused, strict=True):
        assert np.array_equal(got.info, want.info)
        assert np.array_equal(got.damping_used, want.damping_used)
        assert cases.relative_error(got.grads(), want.grads()) < 2e-5
        covariance, inverse = got.covariance, got.inverse
        assert np.array_equal(covariance, covariance.transpose(0, 2, 1), equal_nan=True)
        for chunk, size in enumerate(np.diff(cases.bounds(got.all_units, case.chunk))):
            assert not covariance[chunk, size:].any()
            assert not inverse[chunk, size:].any()
            assert got.info[chunk] == 0 or not inverse[chunk].any()


@pytest.mark.parametrize(("lowest", "used", "info"), [(-0.2, 0.5, 0), (-2, 5, 0), (-20, 50, 0), (-100, 50, 33)])
def test_retries_raise_the_damping(library, lowest, used, info):
    """A given covariance whose 33rd leading minor is the first that is not positive: 0.5, 5 and 50 are tried."""
    case = cases.Case([cases.LayerCase(40, 3)], chunk=40, damping=0.5)
    problem, options = cases.problems_of(case)[0], cases.options_of(case)
    covariance = np.diag(np.linspace(1, 2, 40)).astype(np.float32)
    covariance[0, 1] = covariance[1, 0] = 0.25
    covariance[32, 32] = lowest
    inverse = np.full((40, 40), np.nan, np.float32)
    layer = problem.describe(1)
    layer.covariance, layer.inverse = covariance.ctypes.data, inverse.ctypes.data
    options.stages = FACTOR
    library.schedule()
    library.precondition([layer], options, case.device, np.zeros(0, np.uint8))
    assert problem.info[0] == info
    assert problem.damping_used[0] == used
    want = np.linalg.inv(covariance + used * np.eye(40)) if info == 0 else np.zeros((40, 40))
    np.testing.assert_allclose(inverse, want, rtol=1e-5, atol=1e-7)


def test_a_retry_sums_the_covariance_again(library):
    """Rank-one inputs whose covariance is rounded by more than the first damping, and by less than the last."""
    case = cases.Case([cases.LayerCase(32, 3, rows=8)], damping=0.02)
    problem = cases.problems_of(case)[0]
    problem.x[:] = 1e3 * np.random.default_rng(5).standard_normal((1, 32))
    before = problem.g.copy()
    layer = problem.describe(1)
    library.schedule()
    options = cases.options_of(case)
    options.stages = COVARIANCE | FACTOR | APPLY
    library.precondition([layer], options, case.device, np.zeros(0, np.uint8))
    assert problem.info[0] == 0
    assert problem.damping_used[0] > case.damping
    values = problem.x.astype(np.float64)
    want = before[:, :, 0] @ np.linalg.inv(values.T @ values / 8 + problem.damping_used[0] * np.eye(32))
    assert cases.relative_error(problem.g[:, :, 0], want) < 0.25


@pytest.mark.parametrize(
    "change",
    [
        {"float64": True},
        {"chunk": 0},
        {"chunk": 257},
        {"damping": float("nan")},
        {"max_rows": 0},
        {"stages": COVARIANCE | APPLY},
    ],
    ids=str,
)
def test_refused(library, change):
    case = cases.SMALL["one chunk"]
    problem, options = cases.problems_of(case)[0], cases.options_of(case)
    options.stages = COVARIANCE | FACTOR | APPLY
    before = problem.g.copy()
    layer = problem.describe(1)
    for name, value in change.items():
        setattr(options, name, value)
    with pytest.raises(RuntimeError, match="status 1"):
        library.precondition([layer], options, case.device, np.zeros(0, np.uint8))
    assert np.array_equal(problem.g, before)
    assert problem.info[0] == -9


def test_refused_without_workspace_or_room(library):
    trace = cases.SMALL["trace"]
    with pytest.raises(RuntimeError, match="status 1"):
        cases.run(library, trace, workspace=np.zeros(0, np.uint8))
    large = dataclasses.replace(cases.LARGE["256"], device="sm_86")
    with pytest.raises(RuntimeError, match="status 1"):
        cases.run(library, large)


@pytest.mark.parametrize("device", simt.SHARED_BYTES)
def test_plan(library, device):
    """Every chunk that fits gets whole stages, within the shared memory of the device."""
    for units in range(1, 257):
        plan = library.plan(units, device)
        padded = -(-units // 32) * 32
        if plan.threads == 0:
            assert device == "sm_86"
            assert units > 192
            continue
        side = padded // 32
        assert plan.threads == (256 if units <= 128 else 512)
        assert plan.tile_floats == side * (side + 1) // 2 * 32 * 33
        assert plan.shared_bytes == 4 * (plan.tile_floats + plan.arena_floats)
        assert plan.shared_bytes + 6 * 1024 <= simt.SHARED_BYTES[device]
        assert plan.arena_floats >= max(8 * (padded + 8), plan.apply_rows * (padded + 4))
        assert plan.apply_rows in (8, 16, 32, 64)
    assert library.plan(128, "sm_90").apply_rows == 64
    assert library.plan(256, "sm_80").apply_rows == 8
