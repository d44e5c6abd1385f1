"""The groups of ``make bench`` in the form of pytest-benchmark.

    pytest benchmarks/micro --benchmark-only --benchmark-group-by=group
    pytest benchmarks/micro -k modulus --benchmark-json=now.json
    pytest benchmarks/micro --benchmark-compare --benchmark-histogram

Each module's ``GROUPS`` are timed one candidate after the other, on one thread.  The ratios of record are measured in
turns, in one run: ``python -m benchmarks.micro`` and the modules themselves.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
from collections.abc import Callable

import pytest
import torch

from benchmarks.micro import MODULES
from benchmarks.micro.timing import Group


@functools.lru_cache(maxsize=1)  # one group in memory at a time
def build(module: str, name: str) -> Group:
    groups: dict[str, Callable[[], Group]] = importlib.import_module(f"benchmarks.micro.bench_{module}").GROUPS
    return groups[name]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    modules = {module: importlib.import_module(f"benchmarks.micro.bench_{module}") for module in MODULES}
    cases = []
    logging.disable()  # groups are built for their names and thrown away: a preconditioner that never ran says so
    for module, found in modules.items():
        for name in found.GROUPS:
            cases += [(module, name, candidate) for candidate in build(module, name).candidates]
    build.cache_clear()
    gc.collect()
    logging.disable(logging.NOTSET)
    metafunc.parametrize(
        ("module", "name", "candidate"), cases, ids=["-".join(map(str, case)).replace(" ", "_") for case in cases]
    )


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_speed(benchmark, module, name, candidate):
    group = build(module, name)
    benchmark.group = f"{module}: {name}"
    benchmark.name = str(candidate)
    benchmark.pedantic(
        group.candidates[candidate], setup=lambda: group.before() and None, rounds=31, warmup_rounds=3, iterations=1
    )
