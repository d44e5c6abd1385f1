"""Shared-memory passes and global-memory sectors of the correction's hot lines, counted on the CPU (access.cpp).

A performance regression that no GPU is needed to see: a pitch or a loop order that puts lanes into one bank, or a warp
that reads scattered sectors.
"""

import os
import shutil
import sys

import precondition_cases as cases
import pytest
import simt_library as simt

from support import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None or shutil.which("addr2line") is None, reason="needs g++, addr2line"),
]

# Source line, most passes a request of a warp.  1 is free of bank conflicts.
SHARED = [
    ("gram.cuh", "const float value = left[", 1.0),
    ("gram.cuh", "const float value = right[", 1.0),
    ("gram.cuh", "reinterpret_cast<Raw*>(chunk.arena()) + row * pitch + mine.run * 4) = four", 4.0),  # 512 bytes
    ("gram.cuh", "*element = first ?", 4.0),  # once in 512 rows
    ("sweep.cuh", "const Float4 of_block = *reinterpret_cast", 1.0),
    ("sweep.cuh", "factor_at(factors, i, t) = {{first.high", 4.0),  # 512 bytes
    ("sweep.cuh", "const float a = first, b = second", 2.5),  # the first rows take 2 passes, the second ones 3
    ("sweep.cuh", "const RightFactor right = mine[c * 32]", 4.0),
    ("sweep.cuh", "own[m][r] = mine[(2 * m + r) * 32]", 4.0),
    ("sweep.cuh", "first = upper_first ? sum[c][e] : sum[c][2 + e]", 2.0),
    ("sweep.cuh", "second = upper_first ? sum[c][2 + e] : sum[c][e]", 3.0),
    ("plane_product.cuh", "value[i][r][0] = from[0]", 1.0),
    ("plane_product.cuh", "*reinterpret_cast<uint32_t*>(to) = pair", 1.0),
]
# The same above 128 units.
LARGE = [
    ("factor.cuh", "row[c] = tile[lane * kTilePitch + c]", 1.0),
    ("factor.cuh", "panel[lane] = {row[j], row[j + 1]}", 2.0),  # 256 bytes
    ("factor.cuh", "const TwoColumns of_c = panel[c]", 1.0),
    ("factor.cuh", "sum -= x[m] * factor[j * kTilePitch + m]", 1.0),
    ("factor.cuh", "target[row * kTilePitch + column] -= sum", 4.0),  # once in a product, whose rows lie in 8 lanes
    ("factor.cuh", "tile[row * kTilePitch + column] = sign * value", 4.0),
    ("tile_product.cuh", "const float value = a[", 1.0),
    ("tile_product.cuh", "const float value = b[", 1.0),
]
# Sectors a request of 512 bytes, which fill 16.  Rows of X and G begin on 64 bytes here, arrays where malloc puts them.
GLOBAL = [
    ("gram.cuh", "four = *reinterpret_cast<const FourUnits<Raw>*>(column", 18.0),
    # 8 rows of 64 bytes
    ("gradient_rows.cuh", "to[r] = *reinterpret_cast<const FourUnits<Raw>*>(row[r] + unit)", 24.0),
    ("ptx_host.h", "*static_cast<Words*>(address) = words", 24.0),  # of gradient_rows.cuh
]


def count(folder, *case, script="run_cases.py"):
    """Return the counts of simt.accesses for one case, or for another script."""
    library, report = simt.build("accesses"), folder / "report"
    command = [sys.executable, simt.ROOT / "tests/simt" / script, library, *(("1", *case) if case else ())]
    done = processes.run(command, env={**os.environ, "SIMT_ACCESS_OUT": str(report)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return simt.accesses(library, report)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return count(tmp_path_factory.mktemp("accesses"), "64@one_cta")  # a stage of 64 rows of G, and one of 6


@pytest.fixture(scope="module")
def counted_large(tmp_path_factory):
    return count(tmp_path_factory.mktemp("accesses"), "160")


@pytest.mark.parametrize(("file", "snippet", "most"), LARGE)
def test_cost_of_a_line_above_128_units(counted_large, file, snippet, most):
    assert_cost(counted_large, "shared", file, snippet, most)


@pytest.mark.parametrize(
    ("space", "file", "snippet", "most"),
    [("shared", *row) for row in SHARED] + [("global", *row) for row in GLOBAL],
)
def test_cost_of_a_line(counted, space, file, snippet, most):
    assert_cost(counted, space, file, snippet, most)


def numbers_of(file, snippet):
    text = simt.kernel_source(file).read_text().splitlines()
    numbers = [n for n, line in enumerate(text, 1) if snippet in line and not line.lstrip().startswith("//")]
    assert numbers, "the line is still there"
    return numbers


def assert_cost(counted, space, file, snippet, most):
    found = [row for n in numbers_of(file, snippet) for row in counted.get((file, n), []) if row[0] == space]
    assert found, "the line was run"
    requests = sum(row[1] for row in found)
    assert sum(row[1] * row[2] for row in found) / requests <= most


# Of permute.cuh, 16 bytes a lane: 16 sectors a request, one more where an array does not begin on a sector.
VECTORS = [
    ("global", "batch[i] = *reinterpret_cast<const Vector*>(global_memory(work.from)", 17.0),
    ("global", "*reinterpret_cast<Vector*>(global_memory(work.to)", 17.0),
    ("shared", "*reinterpret_cast<Vector*>(work.slab", 4.0),  # 512 bytes are 4 passes
    ("shared", "const auto unit = *reinterpret_cast<const RowVector<uint16_t, kWidth>*>(work.table", 4.0),
    ("shared", "out.v[i] = work.slab[", 4.0),  # 32 random elements: 3.5 words in the fullest bank
]
READS_AND_WRITES = [  # of X and of G, four units at once and one by one
    ("gram.cuh", "four = *reinterpret_cast<const FourUnits<Raw>*>(column"),
    ("gram.cuh", "raw[i] = column[row_offset[i]]"),
    ("gram.cuh", "raw[i] = x[chunk.scratch.row_offset[row]"),
    ("gradient_rows.cuh", "to[r] = *reinterpret_cast<const FourUnits<Raw>*>(row[r] + unit)"),
    ("ptx_host.h", "*static_cast<Words*>(address) = words"),
    ("gradient_rows.cuh", "to[r].set(i, unwhitens() ?"),
    ("gradient_rows.cuh", "row[r][single * layer.g_unit_stride] = from_float"),
]


def moved_sectors(counted):
    """Return the sectors moved by the lines that read and write X and G."""
    total = 0
    permuted = [("permute.cuh", snippet) for space, snippet, _ in VECTORS if space == "global"]
    for file, snippet in (*READS_AND_WRITES, *permuted):
        rows = [row for n in numbers_of(file, snippet) for row in counted.get((file, n), [])]
        total += sum(requests * sectors for space, requests, sectors, _ in rows if space == "global")
    return total


@pytest.mark.parametrize(
    ("case", "element", "gathered", "permuted"),
    [("permuted, 16 chunks", 4, 6.0, 3.4), ("permuted, 16 chunks of bfloat16", 2, 10.0, 3.7)],
)
def test_exact_division_reads_whole_sectors(tmp_path, case, element, gathered, permuted):
    """Sectors moved for every sector of X, read, and of G, read and written: at least ``gathered`` where the units of a
    chunk are gathered, at most ``permuted`` with permuted rows, three passes.
    """
    layer = cases.named(case).layers[0]
    ideal = (layer.rows + 2 * layer.outputs) * layer.units * element / 32
    assert moved_sectors(count(tmp_path, case + "@queue")) >= gathered * ideal
    counted = count(tmp_path, case + "@packed")
    assert 3 * ideal <= moved_sectors(counted) <= permuted * ideal
    for space, snippet, most in VECTORS:
        assert_cost(counted, space, "permute.cuh", snippet, most)


# Kernels that stream: 16 bytes a lane are 16 sectors a request, 32 neighbouring floats 4, a byte a vector 1.
STREAMING = [
    ("global", "modulus.cu", "v = *reinterpret_cast<const Vector<Traits>*>(row + first);", 16),
    ("global", "modulus.cu", "*reinterpret_cast<Vector<Traits>*>(row + first) = v;", 16),
    ("global", "modulus.cu", "params.signs[r * ((length + 7) / 8) + at / 8] = ", 1),
    ("global", "modulus.cu", "signs[u] = at < length ?", 1),
    ("global", "capture.cu", "v[s] = *reinterpret_cast<const typename Traits::FromVector*>", 16),
    ("global", "capture.cu", "*reinterpret_cast<typename Traits::ToVector*>", 16),
    ("global", "capture.cu", "turned[u][r] = converted<From, To>", 4),
    ("shared", "capture.cu", "turned[u][r] = converted<From, To>", 1.5),  # 1, and 2 for the 8 bytes of an offset
    ("global", "capture.cu", "rows[r * p.units + lane] = turned[lane][r]", 4),
    ("shared", "capture.cu", "rows[r * p.units + lane] = turned[lane][r]", 1),
    ("global", "batch_rms_norm.cu", "const auto v = *reinterpret_cast<const typename Traits::Vector*>(map", 16),
    ("global", "batch_rms_norm.cu", "const auto v = *reinterpret_cast<const typename Traits::Vector*>(at", 16),
    ("shared", "batch_rms_norm.cu", "warp_sum[warp][j * 32 + lane] = sum[j]", 1),
    ("shared", "batch_rms_norm.cu", "total += warp_sum[w][e]", 1),
    ("global", "batch_rms_norm.cu", "v[u] = *reinterpret_cast<const Vector*>(static_cast<const Raw*>(params.x)", 16),
    ("global", "batch_rms_norm.cu", "*reinterpret_cast<Vector*>(static_cast<Raw*>(params.y)", 16),
]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    return count(tmp_path_factory.mktemp("streaming"), script="run_streaming.py")


@pytest.mark.parametrize(("space", "file", "snippet", "most"), STREAMING)
def test_cost_of_a_line_that_streams(streamed, space, file, snippet, most):
    assert_cost(streamed, space, file, snippet, most)
