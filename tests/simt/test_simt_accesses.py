"""Shared-memory passes and global-memory sectors of the correction's hot lines, counted on the CPU (access.cpp).

A performance regression that no GPU is needed to see: a pitch or a loop order that puts lanes into one bank, or a warp
that reads scattered sectors.
"""

import os
import shutil
import subprocess
import sys

import pytest
import simt_library as simt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None or shutil.which("addr2line") is None, reason="needs g++, addr2line"),
]

# Source line, most passes a request of a warp.  1 is free of bank conflicts.
SHARED = [
    ("gram.cuh", "const float value = left[", 1.0),
    ("gram.cuh", "const float value = right[", 1.0),
    ("gram.cuh", "chunk.arena[at] = chunk.shared.tf32", 1.0),
    ("gram.cuh", "*element = first ?", 4.0),  # once in 512 rows
    ("factor.cuh", "row[c] = tile[lane * kTilePitch + c]", 1.0),
    ("factor.cuh", "row[c] -= row[j] * tile[c * kTilePitch + j]", 1.0),
    ("factor.cuh", "sum -= x[m] * factor[j * kTilePitch + m]", 1.0),
    ("factor.cuh", "left[x] = a[", 1.0),
    ("factor.cuh", "right[y] = b[", 1.0),
    ("factor.cuh", "target[at] -= sum", 1.0),
    ("factor.cuh", "tile[at] = -value", 1.0),
    ("apply.cuh", "const SplitFloat split(inverse[", 1.0),
    ("apply.cuh", "const float value = half * 32", 1.1),  # past the last row some lanes read nothing
    ("apply.cuh", "chunk.arena[at] = value;", 2.0),
]
# Sectors a request: 32 floats fill 4.  Rows of X and G begin on 64 bytes here, arrays where malloc puts them.
GLOBAL = [
    ("gram.cuh", "raw[i] = x[", 5.0),
    ("apply.cuh", "value = to_float<Raw>(layer.g_dtype, g[", 5.0),
    ("apply.cuh", "g[chunk.shared.row_offset[row]", 5.0),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    report = tmp_path_factory.mktemp("accesses") / "report"
    library = simt.build("accesses")
    command = [sys.executable, simt.ROOT / "tests/simt/run_cases.py", library, "1", "64"]
    done = subprocess.run(command, env={**os.environ, "SIMT_ACCESS_OUT": str(report)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return simt.accesses(library, report)


@pytest.mark.parametrize(
    ("space", "file", "snippet", "most"),
    [("shared", *row) for row in SHARED] + [("global", *row) for row in GLOBAL],
)
def test_cost_of_a_line(counted, space, file, snippet, most):
    text = (simt.ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    numbers = [n for n, line in enumerate(text, 1) if snippet in line and not line.lstrip().startswith("//")]
    assert numbers, "the line is still there"
    found = [row for n in numbers for row in counted.get((file, n), []) if row[0] == space]
    assert found, "the line was run"
    requests = sum(row[1] for row in found)
    assert sum(row[1] * row[2] for row in found) / requests <= most
