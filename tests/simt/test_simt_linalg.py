"""Batched inverse and solve by the CUDA kernels, run on the CPU: right against float64, the same bytes under every
schedule; tests/test_linalg.py says more of the operators."""

import shutil

import linalg_cases as cases
import pytest
import run_cases
import simt_library as simt

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
        names.append("solve of no rows")
    library = simt.build(kind)
    for name in names:
        done = simt.run_cases(kind, library, [cases.PREFIX + name])
        assert done.returncode == 0, name + (done.stdout + done.stderr)[-5000:]
