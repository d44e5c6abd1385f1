"""The launches of whitening on the CPU: right against float64, and the same bytes under every schedule."""

import shutil

import pytest
import run_cases
import simt_library as simt
import whitening_cases as cases

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library():
    return simt.load()


@pytest.mark.parametrize("name", cases.SMALL)
def test_small(library, name):
    run_cases.check_schedules(library, cases.SMALL[name], seeds=4)


@pytest.mark.parametrize("name", [*cases.LARGE, "128@sm_80", "bias@sm_80", "128 bfloat16@sm_80", "float16@sm_80"])
def test_large(library, name):
    run_cases.check_schedules(library, cases.named(name), seeds=2)
