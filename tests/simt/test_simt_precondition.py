"""The CUDA correction kernels, run on the CPU: right against float64 and the same bytes under every schedule.

These tests say what the kernels compute, that their barriers suffice and that they stay in bounds.  They say nothing of
PTX, of the rounding of tensor cores or of speed.
"""

import dataclasses
import shutil
import sys

import numpy as np
import precondition_cases as cases
import pytest
import run_cases
import simt_library as simt
import torch

from consistency_ops import reference
from support import processes

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


WITHOUT_WARPGROUPS = ("several layers", "bias", "nhwc", "float16", "mixed types", "one pass of TF32", "NaN in G")
WITHOUT_WARPGROUPS += ("overflow of float16", "96", "128", "128 bfloat16", "not aligned")


@pytest.mark.parametrize("name", WITHOUT_WARPGROUPS)
def test_devices_without_products_of_four_warps(library, name):
    run_cases.check_schedules(library, cases.named(f"{name}@sm_80"), seeds=2)


@pytest.mark.parametrize("name", cases.PERMUTED)
def test_permuted_rows(library, name):
    run_cases.check_schedules(library, cases.named(f"{name}@packed"), seeds=4)


@pytest.mark.parametrize("rung", ["one_cta", "cluster", "queue"])
@pytest.mark.parametrize("name", [*cases.SMALL, "96", "128 bfloat16", "256 on sm_80"])
def test_rungs(library, name, rung):
    """Several CTAs a chunk, although the launcher would not take so many for so little."""
    run_cases.check_schedules(library, cases.named(f"{name}@{rung}"), seeds=2 if name in cases.LARGE else 4)


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("rung", "seeds"), [("", 14), ("@cluster", 6), ("@queue", 6), ("@packed", 6)])
@pytest.mark.parametrize("name", [*cases.SMALL, "96", "128", "256"])
def test_many_schedules(library, name, rung, seeds, times):
    run_cases.check_schedules(library, cases.named(name + rung), times * seeds)


def launched(library, name, **change):
    """CTAs of a case's launch."""
    case = dataclasses.replace(cases.named(name), **change)
    library.schedule(device=case.device)
    cases.run(library, case)
    return library.stats().ctas


def test_rungs_launch_what_they_say(library):
    case = "several layers"  # 3 + 1 + 2 chunks
    assert launched(library, case) == 6 * 4, "70 rows: 16 or more for each of four CTAs"
    assert launched(library, case + "@one_cta") == 6
    assert launched(library, case + "@cluster") == 6 * 4
    assert launched(library, case + "@cluster", device="sm_80") == 6, "no clusters"
    assert launched(library, case + "@queue") == 6 * (3 + 1 + 3)
    permuting = 2 * (3 + 2 * 3)  # pack, permute and restore, of the two layers with several chunks
    assert launched(library, case + "@packed") == 6 * (3 + 1 + 3) + permuting
    assert launched(library, "permuted, X alone@packed") == (2 + 2) * (3 + 1 + 3) + 2 * 3, "kernel taps are gathered"
    assert launched(library, "permuted, G alone@packed") == (2 + 2) * (3 + 1 + 3) + 2 * 2 * 3, "and images in planes"
    same = "same input"  # 3 chunks for three layers, 2 for another one
    assert launched(library, same) == (3 + 2) * 4, "64 rows or more"
    assert launched(library, same + "@one_cta") == 3 + 2
    assert launched(library, same + "@cluster") == (3 + 2) * 4
    assert launched(library, same + "@queue") == (3 + 2) * (3 + 1 + 3)
    assert launched(library, f"permuted, {same}@packed") == (3 + 2) * (3 + 1 + 3) + 2 * (3 + 2 * 3)
    assert launched(library, f"permuted, {same}, another dtype@packed") == 2 * (3 + 1 + 3) + 3, "its G is gathered"
    assert launched(library, "trace@one_cta") == 3 + 2 + (3 + 1 + 2), "gram tasks of the layers with several chunks"
    assert launched(library, "128", rung=simt.AUTOMATIC) == 16, "two chunks, 520 rows: clusters of 8"


def test_a_device_that_refuses_clusters_gets_none(library):
    """Small MIG slices and MPS shares: one CTA a chunk corrects what a cluster would, to rounding."""
    case = cases.named("several layers@cluster")
    try:
        library.let_clusters_fit(False)
        library.schedule(seed=1)
        cases.check(library, case)
        assert library.stats().ctas == 6
        cases.check(library, cases.named("trace@cluster"))
    finally:
        library.let_clusters_fit(True)
    cases.check(library, case)
    assert library.stats().ctas == 6 * 4


def test_rungs_agree(library):
    """The part of the rows that a CTA sums decides the rounding, nothing more."""
    case = cases.Case(
        [cases.LayerCase(70, 9, rows=200, bias=True, taps=(3,)), cases.LayerCase(33, 5, rows=90, layer=1)]
    )
    library.schedule()
    first, *others = [cases.run(library, dataclasses.replace(case, **rung)) for rung in cases.RUNGS.values()]
    for other in others:
        for got, want in zip(other, first, strict=True):
            assert 0 < cases.relative_error(got.grads(), want.grads()) < 1e-5
            assert cases.relative_error(got.bias, want.bias) < 1e-5 if got.bias is not None else True


@pytest.mark.parametrize("rung", cases.RUNGS)
@pytest.mark.parametrize("trace", [False, True])
def test_the_same_input_gives_the_bits_of_an_input_of_its_own(library, rung, trace):
    """The bits are equal if as many CTAs share the rows."""
    query = cases.LayerCase(70, 20, rows=90, bias=True, layer=3)
    together = cases.Case([query, query.also(9), query.also(33)], trace=trace, **cases.RUNGS[rung])
    library.schedule()
    problems = cases.run(library, together)
    for position, problem in enumerate(problems):
        alone = dataclasses.replace(problem.case, same_input=False)
        fillers = [dataclasses.replace(layer, same_input=False) for layer in together.layers[:position]]  # draw numbers
        case = dataclasses.replace(together, layers=[*fillers, alone])
        own = cases.problems_of(case)[-1]
        own.x[:] = problems[0].x
        options = cases.options_of(case)
        options.stages = COVARIANCE | FACTOR | APPLY
        layers, tuning = [own.describe(3)], simt.Tuning(case.rung, case.ctas, False, case.packing)
        workspace = np.zeros(library.workspace_bytes(layers, options, tuning), np.uint8)
        library.precondition(layers, options, case.device, workspace, tuning)
        assert cases.written([own]) == cases.written([problem])


@pytest.mark.parametrize(("before", "run"), [(0, 112), (3, 111), (0, 113)])
def test_layers_with_the_same_input_are_in_one_launch(library, before, run):
    first = cases.LayerCase(6, 2, rows=9)
    layers = [cases.LayerCase(5, 2, rows=9, layer=1 + i) for i in range(before)]
    layers += [first, *(first.also(1 + i % 3) for i in range(run - 1))]
    library.schedule()
    case = cases.Case(layers, chunk=4)
    if run > 112:
        with pytest.raises(RuntimeError, match="status 1"):
            cases.run(library, case)
        return
    cases.check(library, case)
    assert library.stats().ctas == 2 * 8, "of the last launch: the chunks of the run, a cluster each for 222 rows of G"


@pytest.mark.parametrize("change", [{"units": 41}, {"has_bias": True}, {"same_input": True}])
def test_refused_same_input(library, change):
    """The layer before has other units, or there is none."""
    case = cases.SMALL["same input, no outputs of the first"]
    layers = [p.describe(2) for p in cases.problems_of(case)]
    for name, value in change.items():
        setattr(layers["same_input" not in change], name, value)
    with pytest.raises(RuntimeError, match="status 1"):
        library.precondition(layers, cases.options_of(case), case.device, np.zeros(0, np.uint8))


@pytest.mark.parametrize("rung", cases.RUNGS)
def test_one_pass_of_tf32(library, rung):
    """Right to the ten bits of TF32 and no more: the option takes effect, and only where it was asked for."""
    case = cases.Case([cases.LayerCase(40, 9, rows=90)], tf32=True, **cases.RUNGS[rung])
    library.schedule()
    (problem,) = cases.run(library, case)
    ((want, *_),) = cases.solve(library, case)
    error = cases.relative_error(problem.grads(), want)
    assert 2e-5 < error < 2e-3


# Chunks, rows of X and of G of the layers: the workloads of benchmarks/, (i) MLP, (ii) 3 x 512, (iii) like ResNet-50,
# (iv) ViT-B/16, (v) 4096 x 4096, (vi) a Llama-7B block.
WORKLOADS = {
    "i": [(7, 128, 100), (1, 128, 100), (1, 128, 100), (1, 128, 10)],
    "ii": [(4, 1024, 512)] * 3,
    "iii": [(4, 4096, 1024)] * 40 + [(2, 4096, 4608)] * 10,
    "iv": [(6, 4096, 2304), (6, 4096, 768), (6, 4096, 3072), (24, 4096, 768)] * 12,
    "v": [(32, 4096, 4096)],
    "vi": [(32, 4096, 12288), (32, 4096, 4096), (32, 4096, 22016), (86, 4096, 4096)],
}


@pytest.mark.parametrize(
    ("name", "clusters", "rung", "cluster"),
    [
        ("i", True, simt.CLUSTER, 8),
        ("i", False, simt.ONE_CTA, 1),
        ("ii", True, simt.CLUSTER, 8),
        ("ii", False, simt.ONE_CTA, 1),
        ("iii", True, simt.TASK_QUEUE, 1),
        ("iv", True, simt.TASK_QUEUE, 1),
        ("v", True, simt.CLUSTER, 8),
        ("v", False, simt.TASK_QUEUE, 1),
        ("vi", True, simt.TASK_QUEUE, 1),
    ],
)
def test_choice_of_the_rung(library, name, clusters, rung, cluster):
    got_rung, got_cluster, tasks = library.tasks(WORKLOADS[name], clusters)
    assert (got_rung, got_cluster) == (rung, cluster)
    chunks = sum(layer[0] for layer in WORKLOADS[name])
    assert rung == simt.TASK_QUEUE or chunks * cluster <= 264
    for (_, x_rows, g_rows), of_layer in zip(WORKLOADS[name], tasks, strict=True):
        gram, apply = of_layer.gram_tasks, of_layer.apply_tasks
        assert (of_layer.pack_tasks, of_layer.permute_tasks) == (0, 0)
        if rung != simt.TASK_QUEUE:
            assert (gram, apply) == (0, 0)
            assert max(x_rows, g_rows) <= 1024 * cluster
            continue
        assert gram <= 1 or x_rows / gram >= 256, "at least half of the least part"
        assert x_rows / max(gram, 1) <= 4096
        assert g_rows / max(apply, 1) <= 4096
    with_trace = library.tasks(WORKLOADS[name], clusters, trace=True)[2]
    assert with_trace[0].gram_tasks >= 1, "a trace needs gram tasks"


def test_tasks_of_a_large_launch(library):
    """Enough tasks for the device, and no more than twice."""
    for name in ("iii", "iv", "vi"):
        layers = WORKLOADS[name]
        tasks = library.tasks(layers, True)[2]
        for kind in ("gram_tasks", "apply_tasks"):
            all_ = sum(layer[0] * max(getattr(one, kind), 1) for layer, one in zip(layers, tasks, strict=True))
            assert 400 <= all_ <= 1600, (name, kind, all_)


ROWS = dict(rows=4096, units=4096, chunks=32, run_bytes=4, element_bytes=4, unit_rows=True)


@pytest.mark.parametrize(
    ("change", "automatic", "always"),
    [
        ({}, True, True),
        ({"run_bytes": 2, "element_bytes": 2}, True, True),
        ({"run_bytes": 8}, True, True),
        ({"run_bytes": 8, "element_bytes": 2}, True, True),
        ({"run_bytes": 16}, False, True),  # pairs of sectors, 16 bytes wanted: 2.75 times the bytes
        ({"run_bytes": 32}, False, True),  # the default: a sector
        ({"chunks": 4, "units": 512}, False, True),
        ({"rows": 60}, False, True),  # 960 KiB
        ({"units": 15_600}, True, True),
        ({"units": 15_800}, False, False),  # the rows do not fit in shared memory
        ({"units": 23_400, "run_bytes": 2, "element_bytes": 2}, True, True),
        ({"units": 23_700, "run_bytes": 2, "element_bytes": 2}, False, False),
        ({"units": 2**31 - 2}, False, False),
        ({"unit_rows": False}, False, False),
        ({"rows": 0}, False, False),
        ({"chunks": 1, "units": 100}, False, False),
    ],
    ids=str,
)
def test_choice_of_permuted_rows(library, change, automatic, always):
    matrix = simt.RowMatrix(**{**ROWS, **change})
    assert library.permutes(matrix) == automatic
    assert library.permutes(matrix, simt.Tuning(packing=simt.ALWAYS)) == always
    assert not library.permutes(matrix, simt.Tuning(packing=simt.NEVER))


def test_rung_of_permuted_rows(library):
    """A task queue from 16 MiB on; tasks for whole rows, enough of them, and gram and apply tasks."""
    layer = [(32, 4096, 4096)]
    assert library.tasks(layer, True, permuted_bytes=15 << 20)[0] == simt.CLUSTER
    rung, _, (tasks,) = library.tasks(layer, True, permuted_bytes=96 << 20)
    assert rung == simt.TASK_QUEUE
    assert (tasks.pack_tasks, tasks.permute_tasks) == (128, 128)
    assert tasks.gram_tasks > 1
    assert tasks.apply_tasks > 1
    (tasks,) = library.tasks([(8, 100, 10_000)], True, permuted_bytes=96 << 20)[2]
    assert (tasks.gram_tasks, tasks.pack_tasks, tasks.permute_tasks) == (1, 4, 264)


def test_large_inputs_are_packed_without_being_asked(library):
    """1 MiB in 256 chunks with a task queue; 31 rows are less."""

    def run(rows):
        case = cases.Case([cases.LayerCase(8192, 0, rows=rows)], rung=simt.TASK_QUEUE)
        (problem,), options = cases.problems_of(case), cases.options_of(case)
        options.stages = COVARIANCE
        layer, tuning = problem.describe(256), simt.Tuning(case.rung)
        problem.keep_matrices(layer, case.chunk)
        workspace = np.zeros(library.workspace_bytes([layer], options, tuning), np.uint8)
        library.schedule()
        library.precondition([layer], options, case.device, workspace, tuning)
        values = problem.values()[:, library.division(8192, 32, 1, case.seed, 0, 0)].reshape(rows, 256, 32)
        want = np.einsum("rcu,rcv->cuv", values, values) / rows
        assert cases.relative_error(problem.covariance, want) < 1e-5
        return library.stats().ctas

    assert run(31) == 256
    assert run(32) == 256 + 256 + 1, "a pack task, and gram tasks"


def test_workspace_of_permuted_rows(library):
    """Two places for packed X, each as large as the largest needs, however many layers there are; G needs none."""
    layers = [cases.LayerCase(64, 2, rows=50, layer=i) for i in range(4)] + [cases.LayerCase(68, 2, rows=30, layer=4)]

    def workspace(count, **change):
        case = cases.Case(layers[:count], **cases.RUNGS["packed"], **change)
        problems = [p.describe(3) for p in cases.problems_of(case)]
        options, tuning = cases.options_of(case), simt.Tuning(case.rung, case.ctas)
        options.stages = COVARIANCE | FACTOR | APPLY
        gathered = library.workspace_bytes(problems, options, tuning)
        tuning.packing = simt.ALWAYS
        return library.workspace_bytes(problems, options, tuning) - gathered

    assert [workspace(count) for count in (1, 2, 4, 5)] == [50 * 64 * 4, *[2 * 50 * 64 * 4] * 3]
    assert workspace(1, max_rows=7) == 7 * 64 * 4


RUNGS = [f"{name}@{rung}" for name in ("several layers", "bias", "trace", "NaN in X") for rung in ("cluster", "queue")]
PACKED = [f"{name}@packed" for name in cases.PERMUTED if "16 chunks" not in name]
PACKED_RACES = [f"permuted, {name}@packed" for name in ("aligned, bias", "not aligned", "blocks")]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param("memory", [*cases.SMALL, "96", "128", "256 on sm_80", *RUNGS, *PACKED], marks=pytest.mark.slow),
        pytest.param("races", [*cases.SMALL, "96", *RUNGS], marks=pytest.mark.slow),
        pytest.param("races", ["128", "256 on sm_80", *PACKED_RACES], marks=pytest.mark.nightly),  # half a minute each
    ],
    ids=["memory", "races", "races of large cases"],
)
def test_sanitizers(kind, names):
    """Bounds, alignment and undefined behaviour; data races of shared and global memory."""
    library = simt.build(kind)
    for name in names:
        done = simt.run_cases(kind, library, [name])
        assert done.returncode == 0, name + (done.stdout + done.stderr)[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "selection"),
    [
        ("memory", "modulus", ""),
        ("memory", "batch_rms_norm", ""),
        ("races", "batch_rms_norm", "evaluation or unaligned"),
        ("memory", "capture", ""),
        ("races", "capture", "many_tiles or restart or thin or paused"),  # 2,048 CTAs take longer than a launch may
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
    done = processes.run(
        command, env=simt.sanitizer_environment(kind), capture_output=True, text=True, timeout=processes.LONG
    )
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
    """A CUDA graph replays a launch with the same workspace and clears nothing in between."""
    case = cases.SMALL["trace"]
    problems, options = cases.problems_of(case), cases.options_of(case)
    options.stages = COVARIANCE | FACTOR | APPLY
    layers = [p.describe(cases.num_chunks(p.all_units, case.chunk)) for p in problems]
    workspace = np.zeros(library.workspace_bytes(layers, options), np.uint8)
    library.schedule(seed=1)
    first = cases.written(cases.run(library, case, workspace))
    library.schedule(seed=2, resident=1)
    assert cases.written(cases.run(library, case, workspace)) == first


@pytest.mark.parametrize(
    "name", ["trace@one_cta", "trace@cluster", "bias@queue", "same input@queue", "permuted, four layers@packed"]
)
def test_counters_of_the_library(library, name):
    """Launch after launch in one slot, then in another: each leaves zeros there, and the workspace alone."""
    for slot in (7, 255):
        run_cases.check_schedules(library, dataclasses.replace(cases.named(name), counters=slot), seeds=4)


def test_slots_of_the_counters(library):
    """A slot belongs to one stream of a device, or to one captured launch, for good; -1 when all are given away."""
    library.counter_slots()
    streams = [library.slot_of_stream(0, 10 + s) for s in range(65)]
    assert streams == [*range(64), -1]
    assert [library.slot_of_stream(0, 10 + s) for s in range(65)] == streams
    assert [library.slot_of_capture(0) for _ in range(194)] == [*range(64, 256), -1, -1]
    assert library.slot_of_stream(1, 10) == 0, "another device has slots of its own"
    assert library.slot_of_stream(1, 2**63) == 1
    assert library.slot_of_capture(1) == 64


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


def test_trace_scale_is_the_mean_of_the_finite_diagonal(library):
    """1 where that is not positive: zeros, negative covariances of a caller, or nothing finite."""
    assert library.trace_scale(6.0, 3, 0.25) == 0.5
    for total, count in ((0.0, 3), (-1.0, 3), (0.0, 0)):
        assert library.trace_scale(total, count, 0.25) == 1.0
    assert [library.damping_of_try(0.5, failed) for failed in range(cases.MAX_TRIES)] == [0.5, 5.0, 50.0]


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


@pytest.mark.parametrize(
    "tuning",
    [dict(rung=simt.CLUSTER, ctas=9), dict(rung=simt.TASK_QUEUE, ctas=1025), dict(ctas=-1), dict(counters=256)],
    ids=str,
)
def test_refused_tuning(library, tuning):
    case = dataclasses.replace(cases.SMALL["one chunk"], **tuning)
    with pytest.raises(RuntimeError, match="status 1"):
        cases.run(library, case)


def test_refused_without_workspace_or_room(library):
    trace = cases.SMALL["trace"]
    with pytest.raises(RuntimeError, match="status 1"):
        cases.run(library, trace, workspace=np.zeros(0, np.uint8))
    large = dataclasses.replace(cases.LARGE["256"], device="sm_86")
    with pytest.raises(RuntimeError, match="status 1"):
        cases.run(library, large)


@pytest.mark.parametrize("device", simt.SHARED_BYTES)
def test_shape_of_a_cta(library, device):
    """Every chunk that fits gets whole stages, within the shared memory of the device."""
    for units in range(1, 257):
        cta = library.choose_cta(units, device)
        padded = -(-units // 32) * 32
        if cta.threads == 0:
            assert device == "sm_86"
            assert units > 192
            continue
        side = padded // 32
        assert cta.threads == (256 if units <= 128 else 512)
        assert cta.tile_floats == side * (side + 1) // 2 * 32 * 33
        planes = 2 * 3 * 32 * 32 * (side * (side + 1) // 2) if units <= 128 else 0
        # The sweep: two crosses of 128 x 8 numbers, and two Z of which every number is two.
        sweep = 4 * (cta.tile_floats + 2 * 128 * 8 * (1 + 2)) if units <= 128 else 0
        assert cta.shared_bytes == max(4 * (cta.tile_floats + cta.arena_floats), planes, sweep)
        assert cta.shared_bytes + 6 * 1024 <= simt.SHARED_BYTES[device]
        assert library.choose_cta(units, device, 90 << 10).shared_bytes == max(cta.shared_bytes, 90 << 10)
        assert cta.arena_floats >= 8 * (padded + 8)
