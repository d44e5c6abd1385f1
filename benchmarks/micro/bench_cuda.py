"""The fused launch on a CUDA device against plain torch, cuBLAS and cuSOLVER in one CUDA graph, and its own rungs.

    python -m benchmarks.micro.bench_cuda [--workloads mlp vit-b16] [--seconds 1] [--json FILE]

A: gather, bmm, cholesky and cholesky_solve, one layer after the other, eager.  B: expert.py in one CUDA graph.  C:
mathdx.cu, kernels written with cuBLASDx and cuSolverDx, in one CUDA graph, where libmathdx is installed (mathdx.py);
else a line says why not.  Ours: foreach_precondition_, in a graph (what the device does) and eager (what a training
loop sees), with groups of a sector and with the exact division, both on every rung (one CTA per chunk, a cluster, a
task queue).  The first two gather the units of the exact division, the task queue permutes the rows of large layers.

Times are of CUDA events around one call, medians over interleaved rounds.  Gradients are restored before every call.
`cold`: then 512 MiB are written, so that L2 holds nothing of the operands; `warm`: nothing.  `floor`: X read once, G
read and written once, at the bandwidth that a large copy reaches in the same run.  Launches, copies and waits of one
eager call are counted by torch.profiler.  What cannot be run or captured is left out and named; the file is written
after every workload.  Last come the kernels that are bound by memory (streaming.py), as a share of the same bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import consistency_ops as co
from benchmarks.micro import mathdx, streaming
from benchmarks.micro.compositions import Division, by_solve, divide, per_layer
from benchmarks.micro.expert import expert
from benchmarks.micro.timing import save
from benchmarks.micro.workloads import WORKLOADS, LayerShape
from consistency_ops.ops import library as compiled

DAMPING = 0.1
FLUSH_BYTES = 512 << 20  # several times the L2 of any device
TIER_C = "C: MathDx in a graph"
RUNGS = {"one CTA": 1, "cluster": 2, "task queue": 3}  # PreconditionRung


@dataclasses.dataclass(frozen=True)
class Setting:
    """A workload of workloads.py: rows, chunk, repetitions of its layers, and the target in microseconds."""

    workload: str
    rows: int
    chunk: int
    repeat: int = 1
    target_us: float | None = None


SETTINGS = {
    "i": Setting("mlp", 128, 128, target_us=12),
    "ii": Setting("wide-mlp", 1024, 128, target_us=15),
    "iii": Setting("resnet50", 4096, 128, target_us=130),
    "iv": Setting("vit-b16", 4096, 128, repeat=4, target_us=400),  # workloads.py has 3 of its 12 blocks
    "v": Setting("linear-4096", 4096, 128, target_us=40),
    "vi": Setting("llama-block", 4096, 128, target_us=360),
}


def moved_bytes(layers: Iterable[LayerShape], rows: int, input_size: int, grad_size: int) -> int:
    """Return the bytes of reading the inputs once, and of reading and writing the gradients once."""
    return sum(rows * layer.units * input_size + 2 * layer.rows * layer.units * grad_size for layer in layers)


def to_device(division: Division, device: str) -> Division:
    if division.order is None:
        return division
    return dataclasses.replace(division, order=division.order.to(device), inverse=division.inverse.to(device))


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def count_calls(device: Iterable[str], host: Iterable[tuple[str, float]], begin: float, end: float) -> dict[str, int]:
    """Kernels and copies (with fills) among the names of what ran on the device; waits among the (name, start) of host
    calls that begin within [begin, end]."""
    device = list(device)
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in device)
    waits = sum(name in WAITS and begin <= start <= end for name, start in host)
    return {"launches": len(device) - copies, "copies": copies, "waits": waits}


def profile_calls(run: Callable[[], object]) -> dict[str, int]:
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("measured"):
        run()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_host = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    (span,) = [e.time_range for e in on_host if e.name == "measured"]
    names = [e.name for e in on_device if e.name != "measured"]
    return count_calls(names, [(e.name, e.time_range.start) for e in on_host], span.start, span.end)


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def event_medians(
    candidates: dict[str, Callable], before: Callable[[], object], seconds: float, rounds: tuple[int, int] = (7, 201)
) -> dict[str, float]:
    """Return microseconds of every candidate; each round runs every candidate once."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.monotonic()
    for turn in range(rounds[1] + 2):
        if turn >= rounds[0] + 2 and time.monotonic() - start > seconds:
            break
        for name, run in candidates.items():
            before()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            if turn >= 2:
                times[name].append(1e3 * first.elapsed_time(last))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(elements: int = 1 << 28) -> float:
    """Return the bytes read and written per second by a device-to-device copy of 1 GiB."""
    source, target = torch.ones(elements, device="cuda"), torch.empty(elements, device="cuda")
    micro = event_medians({"copy": lambda: target.copy_(source)}, lambda: None, 0.5)["copy"]
    return 2 * source.nbytes / (1e-6 * micro)


def raw_call(grads: list, inputs: list, group: int, chunk: int, rung: int = 0) -> None:
    """foreach_precondition_ without Python's checks, on one rung of the ladder."""
    layers = list(range(len(grads)))
    lists: tuple = ([], inputs, [], [], [], [], [], layers, [group] * len(grads))
    compiled.library.co_set_cuda_tuning(rung, 0)
    try:
        torch.ops.consistency_ops.foreach_precondition_(grads, *lists, DAMPING, False, chunk, 10_000, 0, 0)
    finally:
        compiled.library.co_set_cuda_tuning(0, 0)


def measure(number: str, setting: Setting, bandwidth: float, seconds: float, tier_c: Path | None) -> dict:
    workload = WORKLOADS[setting.workload]
    workload = dataclasses.replace(workload, layers=workload.layers * setting.repeat)
    layers, chunk = workload.layers, setting.chunk
    pristine, inputs = ([t.cuda() for t in tensors] for tensors in workload.tensors(setting.rows))
    grads = [grad.clone() for grad in pristine]
    generator = torch.Generator().manual_seed(1)
    divisions = [to_device(divide(layer, chunk, workload.group, generator), "cuda") for layer in layers]
    flush = torch.empty(FLUSH_BYTES // 4, device="cuda")

    def restore() -> None:
        torch._foreach_copy_(grads, pristine)

    def cold() -> None:
        restore()
        flush.fill_(1.0)

    def ours(**keywords) -> None:
        co.foreach_precondition_(grads, inputs, damping=DAMPING, chunk=chunk, **keywords)

    def plain() -> list:
        return per_layer(pristine, inputs, divisions, DAMPING, by_solve)

    def library() -> list:
        return expert(pristine, inputs, divisions, DAMPING)

    # All must have the same division and the same result, or the comparison means nothing.
    restore()
    ours(
        permutation=[
            division.permutation(layer.units).cuda() for division, layer in zip(divisions, layers, strict=True)
        ]
    )
    corrected = [grad.clone() for grad in grads]

    def difference(others: list) -> float:
        pairs = zip(corrected, others, strict=True)
        return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)

    differences: dict[str, float] = {}
    failed: dict[str, str] = {}  # what could not be run or captured ends nothing else
    candidates: dict[str, Callable] = {}
    calls: dict[str, Callable] = {}

    def add(name: str, make: Callable[[], Callable]) -> None:
        try:
            candidates[name] = make()
        except RuntimeError as error:
            failed[name] = str(error)[:300]
            torch.cuda.synchronize()

    def peer(tier: str, name: str, run: Callable, result: Callable[[], list], captured: bool) -> None:
        try:
            differences[tier] = difference(result())
        except RuntimeError as error:
            failed[name] = str(error)[:300]
            return
        calls[tier] = run
        add(name, lambda: graphed(run) if captured else run)

    calls["ours"] = ours
    add("ours", lambda: graphed(ours))
    add("ours, exact division", lambda: graphed(lambda: ours(group=1)))
    add("ours, eager", lambda: ours)
    for rung, value in RUNGS.items():
        add(f"ours, {rung}", lambda v=value: graphed(lambda: raw_call(grads, inputs, workload.group, chunk, v)))
        add(f"ours, exact division, {rung}", lambda v=value: graphed(lambda: raw_call(grads, inputs, 1, chunk, v)))
    peer("A", "A: plain torch", plain, plain, captured=False)
    peer("B", "B: library in a graph", library, library, captured=True)
    if tier_c is not None:
        by_mathdx = mathdx.MathDx(mathdx.Cubin(tier_c), grads, inputs, divisions, DAMPING)

        def corrected_by_mathdx() -> list:
            restore()
            by_mathdx()
            return grads

        peer("C", TIER_C, by_mathdx, corrected_by_mathdx, captured=True)
    cold_us = event_medians(candidates, cold, seconds)
    warm_us = event_medians(candidates, restore, seconds)
    floor_us = 1e6 * moved_bytes(layers, setting.rows, workload.inputs.itemsize, workload.grads.itemsize) / bandwidth
    return {
        "workload": number,
        "name": setting.workload,
        "layers": len(layers),
        "rows": setting.rows,
        "chunk": chunk,
        "cold_us": cold_us,
        "warm_us": warm_us,
        "floor_us": floor_us,
        "share_of_floor": floor_us / cold_us["ours"],
        "target_us": setting.target_us,
        **{
            f"ratio_to_{name[0]}": cold_us[name] / cold_us["ours"] if name in cold_us else None
            for name in ("A: plain torch", "B: library in a graph", TIER_C)
        },
        "failed": failed,
        "calls": {name: profile_calls(run) for name, run in calls.items()},
        "differences": differences,
    }


def measure_streaming(bandwidth: float, seconds: float) -> list[dict]:
    """Return the share of the copy bandwidth that each memory-bound operator reaches on maps larger than L2."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            calls = streaming.calls("cuda", dtype, channels_last)
            times = event_medians({name: run for name, (run, _) in calls.items()}, lambda: None, seconds)
            for name, (_, moved) in calls.items():
                share = moved / (1e-6 * times[name]) / bandwidth
                about = {"name": name, "dtype": str(dtype), "channels_last": channels_last}
                rows.append({**about, "us": times[name], "bytes": moved, "share_of_copy": share})
    return rows


def find_tier_c() -> tuple[Path | None, str]:
    """Return the cubin of tier C (or None) and a sentence about it.

    It runs in its own process first, because a kernel that fails would end all CUDA work of this process.
    """
    if (reason := mathdx.missing()) is not None:
        return None, f"C: {reason}, so there is no tier C"
    if not torch.cuda.is_available():
        return None, "C: MathDx is installed"
    major, minor = torch.cuda.get_device_capability()
    try:
        cubin = mathdx.build(10 * major + minor)
        command = [sys.executable, "-m", "benchmarks.micro.mathdx", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return None, f"C: MathDx is installed, but not measured: {error}"
    if done.returncode != 0:
        return None, f"C: MathDx is installed, but not measured: {done.stderr.strip()[-300:]}"
    return cubin, f"C: cuBLASDx and cuSolverDx of libmathdx, {done.stdout.strip()}"


WIDTHS = {"ours us": 8, "warm": 6, "floor": 6, "share": 6, "target": 7, "A us": 9, "B us": 8, "C us": 8}
WIDTHS |= {"x A": 7, "x B": 6, "x C": 6, "launches": 9}
HEADER = f"{'workload':<19}" + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())


def row_of(result: dict) -> str:
    cold, warm = result["cold_us"], result["warm_us"]["ours"]
    peers = ("A: plain torch", "B: library in a graph", TIER_C)
    cells = [f"{cold['ours']:.1f}", f"{warm:.1f}", f"{result['floor_us']:.1f}", f"{result['share_of_floor']:.0%}"]
    cells += [f"{result['target_us']:.0f}", *(f"{cold[name]:.1f}" if name in cold else "-" for name in peers)]
    ratios = (result[f"ratio_to_{tier}"] for tier in "ABC")
    cells += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
    cells += [str(result["calls"]["ours"]["launches"])]
    label = f"{result['workload']:>4} {result['name']:<14}"
    return label + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS.values(), strict=True))


def plot(results: dict, path: Path) -> None:
    """Draw a group of bars per workload (cold, log scale) with its target as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axis = pyplot.subplots(figsize=(10, 4), layout="constrained")
    names = ("ours", "ours, exact division", "A: plain torch", "B: library in a graph", TIER_C)
    for i, name in enumerate(names):
        bars = [(r + 0.15 * (i - 2), row["cold_us"][name]) for r, row in enumerate(rows) if name in row["cold_us"]]
        axis.bar(*zip(*bars, strict=True), 0.14, label=name) if bars else None
    for r, row in enumerate(rows):
        axis.hlines(row["target_us"], r - 0.4, r + 0.4, colors="black", label="target" if r == 0 else None)
        axis.hlines(row["floor_us"], r - 0.4, r + 0.4, colors="grey", label="copy floor" if r == 0 else None)
    axis.set_yscale("log")
    axis.set_xticks(range(len(rows)), [f"({row['workload']}) {row['name']}" for row in rows])
    axis.set_ylabel("us, cold L2")
    axis.set_title(f"foreach_precondition_ on {results['device']}, {results['machine']['date'][:10]}")
    axis.legend(frameon=False, fontsize=9, ncols=3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of timed work for each workload, cold and warm each"
    )
    parser.add_argument("--json", help="write here instead of benchmarks/results/cuda.json")
    arguments = parser.parse_args()
    tier_c, about_c = find_tier_c()
    print(about_c)
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    if co.build_info()["cuda_toolkit"] is None:
        sys.exit("this library was built without CUDA kernels: CONSISTENCY_OPS_CUDA=1 make build")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    about = {"device": torch.cuda.get_device_name(), "copy_bandwidth": bandwidth, "tier_c": about_c}
    results: list[dict] = []
    streamed: list[dict] = []
    failed: dict[str, str] = {}

    def keep() -> None:
        save("cuda", {**about, "streaming": streamed, "rows": results, "failed": failed}, arguments.json)

    print(HEADER)
    for number in arguments.workloads:
        try:
            results.append(measure(number, SETTINGS[number], bandwidth, arguments.seconds, tier_c))
            print(row_of(results[-1]), flush=True)
        except RuntimeError as error:  # the other workloads may still be measured
            failed[number] = str(error)[:300]
            print(f"({number}) {failed[number]}", flush=True)
        keep()
    streamed += measure_streaming(bandwidth, 0.25 * arguments.seconds)
    keep()
    for row in streamed:
        layout = "channels last" if row["channels_last"] else "contiguous"
        print(f"{row['name']:<18} {row['dtype']:<15} {layout:<13} {row['us']:>8.1f} us {row['share_of_copy']:>5.0%}")


if __name__ == "__main__":
    main()
