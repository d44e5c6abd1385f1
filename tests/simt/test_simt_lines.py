"""Every line of the correction kernels runs under the schedules of run_cases.py."""

import shutil
import sys

import precondition_cases as cases
import pytest
import simt_library as simt
import whitening_cases

from support import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("c++") is None or shutil.which("gcov") is None, reason="needs a C++ compiler, gcov"
    ),
]
FILES = (
    "apply.cuh",
    "chunk.cuh",
    "chunk_io.cuh",
    "convert.cuh",
    "factor.cuh",
    "gradient_rows.cuh",
    "gram.cuh",
    "permute.cuh",
    "plan.cpp",
    "plane_product.cuh",
    "precondition.cu",
    "scheduler.cuh",
    "sweep.cuh",
    "tile_product.cuh",
    "whitening.cuh",
)
RUNGS = [f"{name}@{rung}" for name in ("several layers", "trace", "NaN in X") for rung in ("cluster", "queue")]
RUNGS += ["same input@queue"]
RUNGS += [f"permuted, {name}@packed" for name in ("aligned, bias", "not aligned", "four layers")]
# The launcher's refusals, which test_simt_precondition.py provokes, clusters that do not fit among them, and what one
# thread of many launches would reach.
HOST = ("without_clusters", "return Status::kInvalidArgument;", "return false;", "return plan;", "return status;")


def test_every_line_runs(tmp_path):
    library = simt.build("lines")
    large = ("96", "128 bfloat16", "256", "160 of 16 bits", "160, one pass of TF32", "160, overflow of float16")
    large += ("not aligned", "128, X of 16 bits", "mixed types@sm_80", "96@sm_80", "128 bfloat16@sm_80")
    large += tuple(
        whitening_cases.PREFIX + name for name in (*whitening_cases.SMALL, "160", "160 of 16 bits", "bias@sm_80")
    )
    command = [sys.executable, simt.ROOT / "tests/simt/run_cases.py", library, "1", *cases.SMALL, *RUNGS, *large]
    environment = {**simt.sanitizer_environment("lines"), "GCOV_PREFIX": str(tmp_path)}
    done = processes.run(command, env=environment, capture_output=True, text=True, timeout=processes.LONG)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    missed = simt.lines_not_run(tmp_path)
    assert set(FILES) <= set(missed), "gcov reports every file"
    left = []
    for name in FILES:
        text = simt.kernel_source(name).read_text().splitlines()
        left += [f"{name}:{n}: {text[n - 1]}" for n in sorted(missed[name]) if not any(h in text[n - 1] for h in HOST)]
    assert not left, "\n".join(left)
