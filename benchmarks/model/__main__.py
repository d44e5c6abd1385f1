"""A model of the correction's speed on an H200, from its compiled code and the launcher's own plan.  No GPU is needed.

    python -m benchmarks.model               print the table
    python -m benchmarks.model --json FILE   and write it

The machine code is run on the CPU (emulator.py) on small launches, alone on an SM (timing.py).  Two sizes of each give
the instructions a row of X and of G, and what does not depend on the rows; the plan of every workload says how many
rows and tasks there are.  Nothing of it was measured on a GPU.  What bounds a workload:

issue   warp instructions, one a cycle and sub-partition on 132 SMs
memory  X read once, G read and written once, at 4.3 TB/s
passes  through shared memory and the first-level cache, one of 128 bytes a cycle and SM
tensor  matrix instructions, at the rate of mma.sync (62 % of the peak)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from benchmarks import plans
from benchmarks.model import launch as launching
from benchmarks.model.launch import BFLOAT16, CLUSTER, FLOAT32, ONE_CTA, TASK_QUEUE, UNWHITENS, WHITENS, Launch
from benchmarks.model.timing import CLOCK_MHZ, OCCUPIES, SMS, Trace

BYTES_A_US = 4.3e6
CHUNK = 128
PARTS = {  # of a task: the files of what the kernel calls for it
    "gram": ("gram.cuh",),
    "factor": ("factor.cuh", "sweep.cuh"),  # above and up to 128 units
    "apply": ("apply.cuh", "gradient_rows.cuh", "plane_product.cuh"),
}


@dataclasses.dataclass
class Cost:
    """Of a CTA or a row: warp instructions, passes through shared memory and cache, matrix instructions, sectors."""

    instructions: float = 0.0
    passes: float = 0.0
    matrix: float = 0.0
    sectors: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(a * factor for a in dataclasses.astuple(self)))


def cost(trace: Trace) -> Cost:
    return Cost(trace.instructions, trace.passes, trace.matrix, trace.sectors)


@dataclasses.dataclass
class Shape:
    """Costs of chunks of 128 units of one pair of dtypes: a row of X and of G, and a task of either beside its rows."""

    x_row: Cost
    g_row: Cost
    gram_task: Cost
    apply_task: Cost


@functools.cache
def shape(x_dtype: int, g_dtype: int, taps: int = 1) -> Shape:
    """From two sizes of a gram task and of an apply task, 64 and 128 rows: whole stages."""
    outputs = 128 if taps == 1 else 2 * -(-64 // taps)
    rows = 128, 256
    small, large = (
        Launch(2 * CHUNK, rows[n], outputs * (1 + n), taps, x_dtype, g_dtype, TASK_QUEUE, ctas=2) for n in (0, 1)
    )
    gram, more_gram = cost(small.run(0)), cost(large.run(0))
    first_apply = 2 * 2 + 2  # after two gram tasks and a factor task of each of the two chunks
    apply, more_apply = cost(small.run(first_apply)), cost(large.run(first_apply))
    x_row = (more_gram + gram * -1) * (1 / 64)
    g_rows = outputs * taps / 2
    g_row = (more_apply + apply * -1) * (1 / g_rows)
    return Shape(x_row, g_row, gram + x_row * -64, apply + g_row * -g_rows)


@functools.cache
def alone() -> Trace:
    """One CTA that does everything for a chunk of 128 units: 128 rows of X, 64 of G, float32."""
    return Launch(2 * CHUNK, 128, 64).run(0)


@functools.cache
def factor_task() -> Cost:
    """Factor and inverse of a chunk of 128 units, and the beginning of a CTA."""
    of = shape(FLOAT32, FLOAT32)
    return cost(alone()) + of.x_row * -128 + of.g_row * -64


def workloads() -> dict[str, tuple[str, float, list[tuple[int, int, int]], int, int, int]]:
    """Name -> (what it is, target in us, layers as (outputs, units, taps), rows, dtype of X, dtype of G)."""
    resnet, channels = [(64, 3, 49)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            resnet += [(width, channels, 1), (width, width, 9), (4 * width, width, 1)]
            resnet += [(4 * width, channels, 1)] if block == 0 else []
            channels = 4 * width
    vit = [(2304, 768, 1), (768, 768, 1), (3072, 768, 1), (768, 3072, 1)] * 12
    llama = [(4096, 4096, 1)] * 4 + [(11008, 4096, 1)] * 2 + [(4096, 11008, 1)]
    mlp = [(100, 784, 1), (100, 100, 1), (100, 100, 1), (10, 100, 1)]
    return {
        "i": ("MLP 784-100-100-100-10", 25, mlp, 128, FLOAT32, FLOAT32),
        "ii": ("3 x Linear 512", 25, [(512, 512, 1)] * 3, 1024, FLOAT32, FLOAT32),
        "iii": ("ResNet-50", 130, resnet, 4096, BFLOAT16, FLOAT32),
        "iv": ("ViT-B/16", 400, vit, 4096, BFLOAT16, FLOAT32),
        "v": ("Linear 4096", 40, [(4096, 4096, 1)], 4096, BFLOAT16, BFLOAT16),
        "vi": ("Llama-7B block", 360, llama, 4096, BFLOAT16, BFLOAT16),
    }


LATENCY_OF = {"i": (784, 128, 100), "ii": (512, 1024, 512)}  # units, rows and outputs of the slowest layer


@functools.cache
def latency(name: str, cluster: int) -> float:
    """Of a CTA of the workload's slowest layer, in us; it does everything for a chunk, alone or in a cluster."""
    rung = CLUSTER if cluster > 1 else ONE_CTA
    return Launch(*LATENCY_OF[name], rung=rung, ctas=cluster).run(0).cycles / CLOCK_MHZ


def shapes_of(layers: list[tuple[int, int, int]], rows: int, x_dtype: int, g_dtype: int) -> list:
    """The layers of a workload for the launcher's plan, in groups of a sector."""
    group = 32 // launching.BYTES[g_dtype]
    return [
        plans.module().Shape(units, rows, outputs, taps, x_dtype, g_dtype, group=group)
        for outputs, units, taps in layers
    ]


def bounds_of(total: Cost, moved: float) -> dict[str, float]:
    """What the device needs at least for so many instructions, and so many bytes, in us."""
    cycles = 1 / (SMS * CLOCK_MHZ)
    return {
        "issue_us": total.instructions / 4 * cycles,
        "memory_us": moved / BYTES_A_US,
        "passes_us": total.passes * cycles,
        "tensor_us": total.matrix * OCCUPIES["HMMA"] / 4 * cycles,
    }


def model(name: str) -> dict:
    """The bounds of one workload, in us."""
    title, target, layers, rows, x_dtype, g_dtype = workloads()[name]
    x_bytes, g_bytes = launching.BYTES[x_dtype], launching.BYTES[g_dtype]
    described = shapes_of(layers, rows, x_dtype, g_dtype)
    planned = plans.module().cuda_plan(described)
    total, moved = Cost(), planned["workspace_bytes"] * 2.0
    for of_layer in planned["layers"]:
        chunks, units = of_layer["chunks"], of_layer["units"]
        outputs, width, taps = layers[of_layer["layer"]]
        padded = (units + 31) // 32 * 32
        of = shape(x_dtype, g_dtype, min(taps, 9))
        wide = padded / CHUNK  # of the cost of a row of 128 units
        total += of.x_row * (wide * rows * chunks) + of.g_row * (wide * outputs * taps * chunks)
        total += factor_task() * (chunks * planned["cluster"] * wide * wide)
        total += of.gram_task * (chunks * of_layer["gram_tasks"] * wide)
        total += of.apply_task * (chunks * of_layer["apply_tasks"] * wide)
        moved += (rows * x_bytes + 2 * outputs * taps * g_bytes) * width
    bounds = bounds_of(total, moved)
    result = {"title": title, "ctas": planned["ctas"], "waves": planned["ctas"] / (2 * SMS), "sectors": total.sectors}
    if name in LATENCY_OF:
        bounds["latency_us"] = latency(name, planned["cluster"])
    largest = max(bounds, key=bounds.get)
    return result | bounds | {"bound_us": bounds[largest], "bound_by": largest[:-3], "target_us": target}


@dataclasses.dataclass
class Whitening:
    """As Shape, in whitened coordinates: the two launches."""

    x_row: Cost
    seen_row: Cost  # of G, that a gram task looks at
    g_row: Cost
    moved_row: Cost  # of a weight, in an apply task
    finished_row: Cost  # and in a restore task
    gram_task: Cost
    factor_task: Cost
    apply_task: Cost
    moved_task: Cost
    finish_task: Cost


@functools.cache
def whitening(x_dtype: int, g_dtype: int) -> Whitening:
    """From launches of two chunks, with twice the rows of X or twice those of G; two tasks a chunk share them."""

    def launch(rows: int, outputs: int, mode: int) -> Launch:
        return Launch(2 * CHUNK, rows, outputs, 1, x_dtype, g_dtype, TASK_QUEUE, ctas=2, mode=mode)

    both, more_x, more_g = launch(128, 128, WHITENS), launch(256, 128, WHITENS), launch(128, 256, WHITENS)
    back, more_back = launch(128, 128, UNWHITENS), launch(128, 256, UNWHITENS)
    gram, apply, moved, finish = cost(both.run(0)), cost(both.run(6)), cost(back.run(0)), cost(back.run(4))
    x_row = (cost(more_x.run(0)) + gram * -1) * (1 / 64)
    seen_row = (cost(more_g.run(0)) + gram * -1) * (1 / 64)  # 32 rows of two chunks
    g_row = (cost(more_g.run(6)) + apply * -1) * (1 / 64)
    moved_row = (cost(more_back.run(0)) + moved * -1) * (1 / 64)
    finished_row = (cost(more_back.run(4)) + finish * -1) * (1 / 128)  # 64 rows of two chunks
    return Whitening(
        x_row,
        seen_row,
        g_row,
        moved_row,
        finished_row,
        gram + x_row * -64 + seen_row * -64,
        cost(both.run(4)),
        apply + g_row * -64,
        moved + moved_row * -64,
        finish + finished_row * -128,
    )


def model_whitening(name: str) -> dict:
    """The bounds of the two launches of whitening for one workload, in us, as `model` has them for one correction."""
    title, _, layers, rows, x_dtype, g_dtype = workloads()[name]
    x_bytes, g_bytes = launching.BYTES[x_dtype], launching.BYTES[g_dtype]
    described = shapes_of(layers, rows, x_dtype, g_dtype)
    of, found = whitening(x_dtype, g_dtype), {}
    for key, mode in (("whiten", WHITENS), ("unwhiten", UNWHITENS)):
        plan = plans.module().cuda_plan(described, trace_scaling=True, whitening=plans.module().WhiteningPlan(mode))
        total, moved = Cost(), plan["workspace_bytes"] * 2.0
        for of_layer in plan["layers"]:
            chunks, units = of_layer["chunks"], of_layer["units"]
            outputs, width, taps = layers[of_layer["layer"]]
            wide = (units + 31) // 32 * 32 / CHUNK
            g_rows = outputs * taps * chunks * wide
            if mode == WHITENS:
                total += of.x_row * (wide * rows * chunks) + (of.seen_row + of.g_row) * g_rows
                total += of.factor_task * (chunks * wide * wide)
                total += of.gram_task * (chunks * of_layer["gram_tasks"] * wide)
                total += of.apply_task * (chunks * of_layer["apply_tasks"] * wide)
                # the average read and written, the factor written; G read twice
                moved += rows * x_bytes * width + 3 * outputs * taps * g_bytes * width + 12 * chunks * CHUNK**2
            else:
                total += (of.moved_row + of.finished_row) * g_rows
                total += of.moved_task * (chunks * of_layer["apply_tasks"] * wide)
                total += of.finish_task * of_layer["finish_tasks"]
                moved += 6 * outputs * taps * g_bytes * width + 4 * chunks * CHUNK**2
        found[key] = {"ctas": plan["ctas"], **bounds_of(total, moved)}
    return {"title": title, **found}


def factor_us(trace: Trace) -> float:
    """From the first instruction of the factor to the last of the inverse."""
    spans = [trace.span[name] for name in PARTS["factor"] if name in trace.span]
    return (max(end for _, end in spans) - min(begin for begin, _ in spans)) / CLOCK_MHZ


def one_chunk() -> dict:
    """A CTA that does everything for one chunk of 128 units: 64 rows of X, 64 of G, float32."""
    trace = Launch(2 * CHUNK, 64, 64).run(0)
    return {
        "us": trace.cycles / CLOCK_MHZ,
        "factor_inverse_us": factor_us(trace),
        "instructions": {part: sum(trace.issued[file] for file in files) for part, files in PARTS.items()},
    }


def model_all() -> dict:
    """All figures: what ``--json`` writes."""
    found = {name: model(name) for name in workloads()}
    per_32 = {
        "x16": shape(BFLOAT16, FLOAT32).x_row,
        "x32": shape(FLOAT32, FLOAT32).x_row,
        "g32": shape(BFLOAT16, FLOAT32).g_row,
        "g32_taps": shape(BFLOAT16, FLOAT32, 9).g_row,
        "g16": shape(BFLOAT16, BFLOAT16).g_row,
    }
    return {
        "kind": "model",
        "one_chunk": one_chunk(),
        "workloads": found,
        "whitening": {name: model_whitening(name) for name in ("iv",)},
        "factor_inverse_128_us": factor_us(alone()),
        "factor_task_instructions": factor_task().instructions,
        "apply_task_instructions": shape(BFLOAT16, BFLOAT16).apply_task.instructions,
        "instructions_per_32": {name: row.instructions * 32 / CHUNK for name, row in per_32.items()},
        "passes_per_32": {name: row.passes * 32 / CHUNK for name, row in per_32.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(
        "--cubin", type=Path, help="an older kernel, with the same parameter; else this one is compiled"
    )
    arguments = parser.parse_args()
    np.seterr(all="ignore")  # what a GPU says nothing about: 1 / 0, overflow, NaN
    if arguments.cubin:
        launching.use_cubin(arguments.cubin)
    result = model_all()
    found = result["workloads"]
    print("model (nothing was measured on a GPU), us:")
    columns = ("issue_us", "memory_us", "passes_us", "tensor_us", "latency_us", "bound_us", "target_us")
    print(f"{'':28}{'CTAs':>6}" + "".join(f"{column[:-3]:>9}" for column in columns))
    for name, row in found.items():
        cells = "".join(f"{row[column]:9.0f}" if column in row else f"{'-':>9}" for column in columns)
        print(f"{name:5}{row['title']:23}{row['ctas']:6}{cells}  {row['bound_by']}")
    for name, launches in result["whitening"].items():
        for key in ("whiten", "unwhiten"):
            cells = "".join(
                f"{launches[key][column]:9.0f}" if column in launches[key] else f"{'-':>9}" for column in columns
            )
            print(f"{name:5}{launches['title'] + ', ' + key:23}{launches[key]['ctas']:6}{cells}")
    for key, value in result.items():
        if key in ("kind", "one_chunk", "workloads", "whitening"):
            continue
        shown = {k: round(v, 1) for k, v in value.items()} if isinstance(value, dict) else round(value, 1)
        print(f"{key}: {shown}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
