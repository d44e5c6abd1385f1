"""Batched inverse and solve by the CUDA kernels, run on the CPU: right against float64, the same bytes under every
schedule; tests/test_linalg.py says more of the operators."""

import shutil
import sys

import linalg_cases as cases
import pytest
import run_cases
import simt_library as simt

from support import processes

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library():
    return simt.load()


@pytest.mark.parametrize("name", [*cases.SMALL, *cases.LARGE])
def test_values(library, name):
    run_cases.check_schedules(library, cases.named(name), seeds=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "races"])
def test_sanitizers(kind):
    """Bounds, alignment and undefined behaviour; data races of shared and global memory."""
    names = [*cases.SMALL, *cases.LARGE]
    if kind == "races":  # two minutes of many matrices
        names = ["inverse of 20", "inverse of 100", "inverse, spoiled", "solve of 40", "solve of 70, by columns"]
    script = simt.ROOT / "tests" / "simt" / "run_cases.py"
    for name in names:  # one process each, as test_simt_precondition.py says why
        done = processes.run(
            [sys.executable, script, simt.build(kind), "2", cases.PREFIX + name],
            env=simt.sanitizer_environment(kind),
            capture_output=True,
            text=True,
            timeout=processes.LONG,
        )
        assert done.returncode == 0, name + (done.stdout + done.stderr)[-5000:]
