"""The CUDA kernels with sums of products rounded as tensor cores round them (ptx_host.h), under the ordinary tests.

The plain build rounds every addition to nearest; a tensor core aligns all terms to the largest one and cuts.  A kernel
whose accuracy, or whose guard against overflow, holds only with the former would fail on its first GPU.
"""

import os
import shutil
import sys

import precondition_cases as cases
import pytest
import run_cases
import simt_library as simt

from support import processes

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
RUNGS = [f"{name}@{rung}" for name in ("several layers", "trace", "NaN in X") for rung in ("cluster", "queue")]
TESTS = {
    "tests/simt/test_simt_lapack_ratios.py": "",
    "tests/test_precondition.py": "simt",
    "tests/test_precondition_determinism.py": "simt",
    "tests/test_bad_values.py": "simt",
    "tests/test_same_input.py": "simt",
    "tests/test_linalg.py": "simt",
}
LONG = "tests/test_precondition_determinism.py"  # three minutes: every night


@pytest.fixture(scope="module")
def library():
    return simt.Library(simt.build("rounding"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cases.SMALL, *RUNGS, "96", "128", "256"])
def test_cases(library, name):
    run_cases.check_schedules(library, cases.named(name), 2)


@pytest.mark.parametrize(
    ("file", "selection"),
    [pytest.param(*test, marks=pytest.mark.nightly if test[0] == LONG else pytest.mark.slow) for test in TESTS.items()],
)
def test_ordinary_tests(file, selection):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-m", "not slow and not nightly"]
    environment = {**os.environ, "SIMT_BUILD": "rounding"}
    done = processes.run(
        [*command, "-k", selection], cwd=simt.ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_two_builds_differ(library):
    """Or this file would test nothing new; to rounding they agree."""
    plain = simt.Library(simt.build("plain"))
    written = [cases.written(cases.check(kind, cases.named("96"))) for kind in (plain, library)]
    assert written[0] != written[1]
