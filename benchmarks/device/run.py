"""Runs the stages of benchmarks/device_run.sh: each has a time limit, a log and an entry in summary.json.

    python -m benchmarks.device.run [--minutes 9.5] [--list] [STAGE ...]

Only the stages import torch, so that a broken build fails a stage and not the run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from benchmarks.device import attestation

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", ROOT / "build" / "device"))
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
GOLDEN = OUT / "golden.txt"

# Exits with 3, the sentence and the device's name in the log, before anything else is tried.
DEVICE = """
import json, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch %s finds none" % torch.__version__)
p = torch.cuda.get_device_properties(0)
print(json.dumps({"device": p.name, "compute_capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
                  "memory_gib": round(p.total_memory / 2**30, 1), "torch": torch.__version__,
                  "cuda": torch.version.cuda, "driver_runs": float(torch.ones(3, device="cuda").sum())}))
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """``commands`` run one after the other until one fails; ``seconds`` limits their total time."""

    name: str
    seconds: int
    commands: list[list]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    needs_device: bool = True


def nvcc() -> str:
    return shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")


def sanitizer(tool: str) -> Stage:
    # Without torch's caching allocator every tensor has bounds of its own.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", PYTHON, "-m", "benchmarks.device.short"]
    return Stage(tool, 150, [command], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def stages() -> list[Stage]:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    golden = str(OUT / "golden")
    compile_golden = [nvcc(), "-std=c++17", "-O2", "-arch=native", *includes, "-o", golden, "tests/golden/golden.cu"]
    workers = ["-n", "4"] if has_xdist() else []
    build = {"CONSISTENCY_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": str(os.cpu_count())}
    build = {name: os.environ.get(name, value) for name, value in build.items()}
    return [
        Stage("device", 60, [[PYTHON, "-c", DEVICE]]),
        Stage("build", 300, [[PYTHON, "setup.py", "-q", "build_ext", "--inplace"]], build, needs_device=False),
        Stage(
            "golden", 60, [compile_golden, ["sh", "-c", f"{golden} > {GOLDEN}.partial && mv {GOLDEN}.partial {GOLDEN}"]]
        ),
        Stage("graphs", 90, [[*PYTEST, "tests/test_cuda.py"]]),
        Stage("operators", 180, [[*PYTEST, *workers, "-m", "gpu", "tests"]]),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        sanitizer("synccheck"),
        Stage("tier-c", 150, [[PYTHON, "-m", "benchmarks.micro.mathdx"]]),  # or says that MathDx is not installed
        Stage("benchmarks", 240, [[PYTHON, "-m", "benchmarks.micro.bench_cuda", "--json", str(OUT / "cuda.json")]]),
        Stage("suite", 420, [[*PYTEST, *workers, "-m", "not slow and not nightly", "tests"]], needs_device=False),
    ]


def has_xdist() -> bool:
    return subprocess.run([PYTHON, "-c", "import xdist"], capture_output=True).returncode == 0


def run(stage: Stage, seconds: float) -> dict:
    """Run the commands with output to OUT/<name>.log; the status is ok, failed or timeout."""
    start, status, last = time.monotonic(), "ok", ""
    with open(OUT / f"{stage.name}.log", "w") as log:
        for command in stage.commands:
            left = seconds - (time.monotonic() - start)
            print("$", *command, file=log, flush=True)
            try:
                status = finish([str(c) for c in command], {**os.environ, **stage.environment}, log, max(1.0, left))
            except OSError as error:
                print(error, file=log)
                status = "failed"
            if status != "ok":
                break
    lines = [line for line in (OUT / f"{stage.name}.log").read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - start, 1), "last": last[:300]}


def finish(command: list[str], environment: dict[str, str], log: IO, seconds: float) -> str:
    """Run a command and return its status; all processes that it started end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return "ok" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all, in order")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call; a stage that does not fit is left")
    parser.add_argument("--list", action="store_true", help="names and time limits")
    arguments = parser.parse_args()
    every = {stage.name: stage for stage in stages()}
    if arguments.list:
        for stage in every.values():
            print(f"{stage.name:12} at most {stage.seconds} s")
        return 0
    if unknown := set(arguments.stages) - set(every):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    OUT.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    chosen = arguments.stages or list(every)
    if "device" not in chosen:
        chosen = ["device", *chosen]
    results, device = [], None
    for name in chosen:
        stage, left = every[name], deadline - time.monotonic()
        if stage.needs_device and name != "device" and not device:
            result = {"stage": name, "status": "no device", "seconds": 0.0, "last": results[0]["last"]}
        elif left < 20:
            result = {"stage": name, "status": "left", "seconds": 0.0, "last": "no time left in this call"}
        else:
            print(f"{name} ...", flush=True)
            result = run(stage, min(stage.seconds, left))
        if name == "device" and result["status"] == "ok":
            device = json.loads(result["last"])
        results.append(result)
        summary = {"device": device, "kernels": attestation.tree_hash(), "stages": results}
        (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if device:
        attestation.write(OUT, device, results)
    print_table(results)
    return 0 if all(result["status"] == "ok" for result in results) else 1


def print_table(results: list[dict]) -> None:
    print(f"\n{'stage':12} {'status':10} {'seconds':>7}  last line of its log")
    for result in results:
        print(f"{result['stage']:12} {result['status']:10} {result['seconds']:>7.1f}  {result['last'][:90]}")
    left = [result["stage"] for result in results if result["status"] == "left"]
    if left:
        print(f"run again: benchmarks/device_run.sh {' '.join(left)}")


if __name__ == "__main__":
    sys.exit(main())
