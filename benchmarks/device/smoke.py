"""Every operator and every rung of the correction on a CUDA device against float64, one process and one line each.

    python -m benchmarks.device.smoke             all, eight processes at a time
    python -m benchmarks.device.smoke CASE        one: the name of an operator, or rung-1, rung-2, rung-3

A kernel that fails ends all CUDA work of its process, and of no other.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import subprocess
import sys

import torch

import consistency_ops as co
from consistency_ops.ops import verification
from consistency_ops.ops.library import library

RUNGS = {"rung-1": 1, "rung-2": 2, "rung-3": 3}  # PreconditionRung
SECONDS = 40


def cases() -> list[str]:
    return [*RUNGS, *sorted({problem.operator for problem in verification.problems()})]


def check(case: str, device: str = "cuda") -> dict:
    """The worst finding of one case."""
    co.set_backend("native")
    operator = "foreach_precondition_" if case in RUNGS else case
    if case in RUNGS:
        library.co_set_cuda_tuning(RUNGS[case], 0)
    findings = list(verification.check(torch.device(device), operator))
    wrong = [f"{f.name}: {f.problem}" for f in findings if not f.ok]
    errors = [f.error for f in findings if not math.isnan(f.error)]
    return {"case": case, "problems": len(findings), "error": max(errors, default=None), "wrong": wrong}


def apart(case: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.device.smoke", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"case": case, "wrong": [f"no answer in {SECONDS} s"]}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"case": case, "wrong": [f"exit status {done.returncode}: {(done.stderr or done.stdout)[-300:]}"]}


def main() -> int:
    if len(sys.argv) > 1:
        found = check(sys.argv[1])
        print(json.dumps(found), flush=True)
        return 0
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in concurrent.futures.as_completed([pool.submit(apart, case) for case in cases()]):
            bad += bool(future.result()["wrong"])
            print(json.dumps(future.result()), flush=True)
    print(f"{bad} of {len(cases())} cases are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
