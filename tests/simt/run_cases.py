"""Runs the precondition cases under several schedules, without torch or pytest, so that a sanitizer can be preloaded.

    python run_cases.py LIBRARY SEEDS [NAME ...]        NAME of a case (cases.named); default: all small ones

Prints one line a case; exit status 1 at the first wrong result, a sanitizer's own at its report.
"""

import sys
from pathlib import Path

import linalg_cases
import precondition_cases as cases
import simt_library as simt
import whitening_cases

SCHEDULES = (dict(order=1, resident=2), dict(order=2, resident=1), dict(resident=0), dict(resident=3))


Case = cases.Case | whitening_cases.WhiteningCase | linalg_cases.SpdCase
MODULES = {whitening_cases.WhiteningCase: whitening_cases, linalg_cases.SpdCase: linalg_cases, cases.Case: cases}


def named(name: str) -> Case:
    """A case of any of the modules, by its name with the module's prefix."""
    for module in (whitening_cases, linalg_cases):
        if name.startswith(module.PREFIX):
            return module.named(name.removeprefix(module.PREFIX))
    return cases.named(name)


def check_schedules(library: simt.Library, case: Case, seeds: int) -> None:
    """Ascending, descending and random orders, one to all CTAs in flight: always right, always the same bytes."""
    of = MODULES[type(case)]
    first = None
    for seed in range(seeds):
        library.schedule(seed=seed, device=case.device, **SCHEDULES[seed % len(SCHEDULES)])
        result = of.written(of.check(library, case))
        first = first or result
        assert result == first, f"the result depends on the schedule: {case}"


if __name__ == "__main__":
    library = simt.Library(Path(sys.argv[1]))
    for name in sys.argv[3:] or cases.SMALL:
        check_schedules(library, named(name), int(sys.argv[2]))
        print(name, flush=True)
