"""foreach_precondition_ against the strongest composition of torch operations, in the same run, interleaved.

    python -m benchmarks.micro.bench_precondition [--workloads mlp vit-b16] [--chunks 32 128] [--rows 512 2048]
                                                  [--threads N] [--seconds 4] [--compile few] [--json FILE] [--add]

Baselines (compositions.py): gather + bmm + cholesky + cholesky_solve; gather + bmm + cholesky_inverse + bmm; both
batched over equal layers; torch.compile of the first two, where a network has at most eight distinct layer shapes.
The ratio is to the fastest of them, by medians over interleaved rounds.  Inputs and gradients have the
dtypes of workloads.py; the baselines compute in float32.  GF/s counts the
useful operations, n B (B + 1) + B^3 + 2 o B^2 per chunk; its share is of a float32 matrix product of 2048 x 2048 that
runs in the same rounds.  The floor of a row is the longer of two times: of the useful operations at that rate, and of
the bytes that must move (X read once, G read and written once) at the rate of an in-place pass of torch over all
gradients, also in the same rounds.  More than 100 % is possible: products of bfloat16 inputs run at twice that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch

import consistency_ops as co
from benchmarks.micro.compositions import batched, by_inverse, by_solve, compiled, divide, per_layer, sgemm
from benchmarks.micro.timing import RESULTS, Group, add_clock, interleaved, medians, save
from benchmarks.micro.workloads import LARGE, WORKLOADS, LayerShape, useful_flops

DAMPING = 0.1
SGEMM = 2048  # rows and columns of the matrices whose product is the yardstick
FEW = 8  # most layers that torch.compile gets at once, and most distinct shapes that are compiled at all


def baselines(layers: list[LayerShape], compile_too: str) -> dict:
    """Return {name: function of (grads, inputs, divisions)}."""
    found = {}
    with_compile = compile_too == "all" or (compile_too == "few" and len(set(layers)) <= FEW)
    for finish in (by_solve, by_inverse):
        found[f"{finish.__name__[3:]}"] = lambda *a, f=finish: per_layer(*a, DAMPING, f)
        found[f"{finish.__name__[3:]}, batched"] = lambda *a, f=finish: batched(*a, DAMPING, f)
        if with_compile:
            fast = compiled(finish, whole=len(layers) <= FEW)
            found[f"{finish.__name__[3:]}, compiled"] = lambda *a, f=finish, c=fast: c(*a, DAMPING, f)
    return found


def relative_difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))


def group(name: str, chunk: int, rows: int, compositions: dict) -> tuple[Group, dict[str, float]]:
    """Ours, the compositions and two yardsticks, and how far the result of each composition is from ours."""
    workload = WORKLOADS[name]
    layers = workload.layers
    generator = torch.Generator().manual_seed(1)
    divisions = [divide(layer, chunk, workload.group, generator) for layer in layers]
    pristine, inputs = workload.tensors(rows)
    grads = [grad.clone() for grad in pristine]

    def restore():
        for grad, original in zip(grads, pristine, strict=True):
            grad.copy_(original)

    def ours(**keywords):
        co.foreach_precondition_(grads, inputs, damping=DAMPING, chunk=chunk, **keywords)

    candidates = {"ours": ours, "sgemm": sgemm(SGEMM)[0], "negate": lambda: torch._foreach_neg_(grads)}
    for label, composition in compositions.items():
        candidates[label] = lambda f=composition: f(pristine, inputs, divisions)

    # All must have the same division and the same result, or the comparison means nothing.
    ours(permutation=[d.permutation(layer.units) for d, layer in zip(divisions, layers, strict=True)])
    differences = {label: relative_difference(candidates[label](), grads) for label in compositions}
    assert max(differences.values()) < max(1e-3, 2 * torch.finfo(workload.grads).eps), differences
    return Group(candidates, restore, ours="ours", baselines=tuple(compositions)), differences


GROUPS = {
    f"{name}, chunk 128": lambda name=name: group(name, 128, 512, baselines(WORKLOADS[name].layers, "none"))[0]
    for name in ("mlp", "wide-mlp")
}


def measure(name: str, chunk: int, row_counts: list[int], arguments: argparse.Namespace) -> list[dict]:
    workload = WORKLOADS[name]
    layers = workload.layers
    torch.compiler.reset()
    compositions = baselines(layers, arguments.compile)
    results = []
    for rows in row_counts:
        found, differences = group(name, chunk, rows, compositions)
        times = interleaved(found.candidates, before=found.before, seconds=arguments.seconds, clock=arguments.clock)
        median = medians(times)
        strongest = min(compositions, key=median.get)
        flops = useful_flops(layers, rows, chunk)
        sgemm_rate = sgemm(SGEMM)[1] / median["sgemm"]
        pristine, inputs = workload.tensors(rows)
        gradient_bytes = 2 * sum(grad.nbytes for grad in pristine)
        moving = median["negate"] * (1 + sum(x.nbytes for x in inputs) / gradient_bytes)
        floor = max(flops / sgemm_rate, moving)
        results.append(
            {
                "workload": name,
                "chunk": chunk,
                "rows": rows,
                "layers": len(layers),
                "ms": {label: 1e3 * value for label, value in median.items()},
                "best_ms": {label: 1e3 * min(values) for label, values in times.items()},
                "rounds": len(times["ours"]),
                "strongest": strongest,
                "ratio": median[strongest] / median["ours"],
                "gflops": flops / median["ours"] / 1e9,
                "sgemm_gflops": sgemm_rate / 1e9,
                "share_of_sgemm": flops / median["ours"] / sgemm_rate,
                "floor_ms": {"operations": 1e3 * flops / sgemm_rate, "bytes": 1e3 * moving},
                "share_of_floor": floor / median["ours"],
                "largest_difference": max(differences.values()),
            }
        )
        print(row_of(results[-1]), flush=True)
    return results


HEADER = "workload         chunk  rows   ours ms  best torch ms  ratio   GF/s  of sgemm  of floor  strongest"


def row_of(result: dict) -> str:
    ours, theirs = result["ms"]["ours"], result["ms"][result["strongest"]]
    return (
        f"{result['workload']:<16} {result['chunk']:>5} {result['rows']:>5} {ours:>9.3f} {theirs:>14.3f} "
        f"{result['ratio']:>6.2f} {result['gflops']:>6.0f} {result['share_of_sgemm']:>9.0%} "
        f"{result['share_of_floor']:>9.0%}  {result['strongest']}"
    )


def summary(results: list[dict]) -> dict:
    ratios = [result["ratio"] for result in results]
    shares = {name: [row["share_of_sgemm"] for row in results if row["workload"] == name] for name in LARGE}
    shares = [share for share in shares.values() if share]
    return {
        "geometric_mean_ratio": statistics.geometric_mean(ratios),
        "smallest_ratio": min(ratios),
        "smallest_share_of_sgemm_large": min(map(min, shares), default=None),
        "smallest_mean_share_of_sgemm_large": min(map(statistics.geometric_mean, shares), default=None),
    }


def merged(before: list[dict], new: list[dict]) -> list[dict]:
    """The rows of both, in the order of the workloads; a new one takes the place of the old one."""
    rows = {(row["workload"], row["chunk"], row["rows"]): row for row in [*before, *new]}
    order = list(WORKLOADS)
    return [rows[key] for key in sorted(rows, key=lambda key: (order.index(key[0]), *key[1:]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--chunks", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed work for each row of the table")
    add_clock(parser)
    parser.add_argument(
        "--compile",
        choices=("none", "few", "all"),
        default="few",
        help="for which networks torch.compile competes: few distinct layer shapes, or all (minutes each)",
    )
    parser.add_argument("--json", help="write here instead of benchmarks/results/precondition.json")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of that file that are not measured here: a run in pieces"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 256
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

    print(HEADER)
    file = Path(arguments.json) if arguments.json else RESULTS / "precondition.json"
    before = json.loads(file.read_text())["rows"] if arguments.add and file.exists() else []
    results: list[dict] = []
    for name in arguments.workloads:
        for chunk in arguments.chunks:
            results += measure(name, chunk, arguments.rows, arguments)
            rows = merged(before, results)
            save("precondition", {**summary(rows), "rows": rows}, arguments.json)
    for key, value in summary(rows).items():
        print(f"{key}: {value:.2f}" if value is not None else f"{key}: -")


if __name__ == "__main__":
    main()
