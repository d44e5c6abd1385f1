"""Fixtures that every test file may use."""

import gc
import os
import random

# Tests run side by side: threads of one that wait for a core which another has take a third of the time of them all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its waiting threads spin, and starve the tests that run beside
# torch's compiler waits without a limit for processes of its own, which are forked beside threads; here it needs none.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pytest
import torch

from consistency_ops.ops import backend
from support.kernels import AGAIN, KINDS, NOT_ON_SECOND, Kernels, behind_the_operators, is_for


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test starts from the same random numbers, threads and backend, whatever ran before it.

    The tests of single kernels share their work between two threads.
    """
    if "caplog" in request.fixturenames:
        gc.collect()  # a preconditioner of an earlier test may say, when it ends, that it has corrected nothing
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2 if file_of(request) in AGAIN else 1)
    before = backend._backend
    yield
    if backend._backend != before:
        backend.set_backend(before)


@pytest.fixture
def one_thread(seeded):
    """torch computes on one thread, also in the tests of single kernels."""
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The devices that an operation runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def file_of(test):
    return test.module.__file__.rpartition(os.sep)[2]


def pytest_generate_tests(metafunc):
    if metafunc.function.__name__ in AGAIN.get(file_of(metafunc), ()):
        name = metafunc.function.__name__
        metafunc.parametrize(
            "kernels", [kind for kind in KINDS if not (kind == "second" and name in NOT_ON_SECOND)], indirect=True
        )


@pytest.fixture(autouse=True)  # pytest forgets a fixture that is added to a test's names when it is parametrized
def kernels(request):
    """The kernels behind the operators: the library's own CPU kernels, or others (support/kernels.py)."""
    kind = getattr(request, "param", "library")
    with behind_the_operators(kind):
        yield Kernels(kind)


def pytest_collection_modifyitems(config, items):
    def stays(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        assert "kernels" in item.fixturenames, f"{item.nodeid} would run on the library whatever its name says"
        return is_for(parameters.get("kernels", "library"), parameters)

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]
    items.sort(key=lambda item: item.path.name != "test_wheel.py")  # minutes, which nobody is to wait for at the end
