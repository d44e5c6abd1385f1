"""The fused launch on a CUDA device against plain torch, cuBLAS and cuSOLVER in one CUDA graph, and its own rungs.

    python -m benchmarks.micro.bench_cuda [--workloads mlp vit-b16] [--seconds 1] [--json FILE]

A: gather, bmm, cholesky and cholesky_solve, a layer after the other, eager.  B: expert.py in one CUDA graph.  C:
MathDx; there is no kernel for it yet, and a line says whether it is installed.  Ours: foreach_precondition_, in a graph
(what the device does) and eager (what a training loop sees), with groups of a sector and with the exact division, both
on the rungs V0, V1, V2 too.  V0 and V1 gather the units of the exact division, V2 permutes the rows of large layers.

Times are of CUDA events around one call, medians over interleaved rounds.  Gradients are restored before every call.
`cold`: then 512 MiB are written, so that L2 holds nothing of the operands; `warm`: nothing.  `floor`: X read once, G
read and written once, at the bandwidth that a large copy reaches in the same run.  Launches, copies and waits of one
eager call are counted by torch.profiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch

import consistency_ops as co
from benchmarks.micro.compositions import Division, by_solve, divide, per_layer
from benchmarks.micro.expert import expert
from benchmarks.micro.timing import save
from benchmarks.micro.workloads import WORKLOADS, LayerShape

DAMPING = 0.1
FLUSH_BYTES = 512 << 20  # several times the L2 of any device
RUNGS = {"V0": 1, "V1": 2, "V2": 3}  # PreconditionRung


@dataclasses.dataclass(frozen=True)
class Setting:
    """A workload of KERNELS.md section 3: rows, chunk, repetitions of its layers, and the target in microseconds."""

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
    """X once, G twice."""
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
    """Microseconds of every candidate, one of each a round."""
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
    """Bytes a second of a device-to-device copy of 1 GiB, read and written bytes counted."""
    source, target = torch.ones(elements, device="cuda"), torch.empty(elements, device="cuda")
    micro = event_medians({"copy": lambda: target.copy_(source)}, lambda: None, 0.5)["copy"]
    return 2 * source.nbytes / (1e-6 * micro)


def raw_call(grads: list, inputs: list, group: int, chunk: int, rung: int = 0) -> None:
    """foreach_precondition_ without Python's checks, on one rung of the ladder."""
    layers = list(range(len(grads)))
    lists: tuple = ([], inputs, [], [], [], [], [], layers, [group] * len(grads))
    torch.ops.consistency_ops.foreach_precondition_(grads, *lists, DAMPING, False, chunk, 10_000, 0, 0, False, rung)


def measure(number: str, setting: Setting, bandwidth: float, seconds: float) -> dict:
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

    # The same division and the same result, or the comparison means nothing.
    restore()
    ours(
        permutation=[
            division.permutation(layer.units).cuda() for division, layer in zip(divisions, layers, strict=True)
        ]
    )
    differences = {}
    for name, run in (("A", plain), ("B", library)):
        pairs = zip(grads, run(), strict=True)
        differences[name] = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)

    candidates = {
        "ours": graphed(ours),
        "ours, exact division": graphed(lambda: ours(group=1)),
        "ours, eager": ours,
        "A: plain torch": plain,
        "B: library in a graph": graphed(library),
    }
    for rung, value in RUNGS.items():
        candidates[f"ours, {rung}"] = graphed(lambda v=value: raw_call(grads, inputs, workload.group, chunk, v))
        candidates[f"ours, exact division, {rung}"] = graphed(lambda v=value: raw_call(grads, inputs, 1, chunk, v))
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
        "ratio_to_A": cold_us["A: plain torch"] / cold_us["ours"],
        "ratio_to_B": cold_us["B: library in a graph"] / cold_us["ours"],
        "calls": {"ours": profile_calls(ours), "A": profile_calls(plain), "B": profile_calls(library)},
        "differences": differences,
    }


def mathdx() -> str:
    """What is to be said of tier C here."""
    found = [name for name in ("nvidia.libmathdx", "nvidia.mathdx") if _installed(name)]
    if not found:
        return "C: MathDx is not installed, so there is no tier C"
    return f"C: {', '.join(found)} is installed, but this benchmark has no kernel for it: not measured"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


HEADER = "     workload        ours us   warm  floor  share  target   A us      B us      x A    x B  launches"


def row_of(result: dict) -> str:
    cold = result["cold_us"]
    return (
        f"{result['workload']:>4} {result['name']:<14} {cold['ours']:>8.1f} {result['warm_us']['ours']:>6.1f} "
        f"{result['floor_us']:>6.1f} {result['share_of_floor']:>6.0%} {result['target_us']:>7.0f} "
        f"{cold['A: plain torch']:>9.1f} {cold['B: library in a graph']:>9.1f} {result['ratio_to_A']:>6.1f} "
        f"{result['ratio_to_B']:>6.1f}  {result['calls']['ours']['launches']:>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of timed work for each workload, cold and warm each"
    )
    parser.add_argument("--json", help="write here instead of benchmarks/results/cuda.json")
    arguments = parser.parse_args()
    print(mathdx())
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    if co.build_info()["cuda_toolkit"] is None:
        sys.exit("this library was built without CUDA kernels: CONSISTENCY_OPS_CUDA=1 make build")
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s\n{HEADER}")
    results = []
    for number in arguments.workloads:
        results.append(measure(number, SETTINGS[number], bandwidth, arguments.seconds))
        print(row_of(results[-1]), flush=True)
        save("cuda", {"copy_bandwidth": bandwidth, "tier_c": mathdx(), "rows": results}, arguments.json)


if __name__ == "__main__":
    main()
