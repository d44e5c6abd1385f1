"""Runs the precondition cases under several schedules, without torch or pytest, so that a sanitizer can be preloaded.

    python run_cases.py LIBRARY SEEDS [NAME ...]        NAME of a case (cases.named); default: all small ones

Prints one line a case; exit status 1 at the first wrong result, a sanitizer's own at its report.
"""

import sys
from pathlib import Path

import precondition_cases as cases
import simt_library as simt
import whitening_cases

SCHEDULES = (dict(order=1, resident=2), dict(order=2, resident=1), dict(resident=0), dict(resident=3))


def check_schedules(library: simt.Library, case: cases.Case | whitening_cases.WhiteningCase, seeds: int) -> None:
    """Ascending, descending and random orders, one to all CTAs in flight: always right, always the same bytes."""
    of = whitening_cases if isinstance(case, whitening_cases.WhiteningCase) else cases
    first = None
    for seed in range(seeds):
        library.schedule(seed=seed, device=case.device, **SCHEDULES[seed % len(SCHEDULES)])
        result = of.written(of.check(library, case))
        first = first or result
        assert result == first, f"the result depends on the schedule: {case}"


if __name__ == "__main__":
    library = simt.Library(Path(sys.argv[1]))
    for name in sys.argv[3:] or cases.SMALL:
        whitens = name.startswith(whitening_cases.PREFIX)
        case = whitening_cases.named(name.removeprefix(whitening_cases.PREFIX)) if whitens else cases.named(name)
        check_schedules(library, case, int(sys.argv[2]))
        print(name, flush=True)
