"""The stages of benchmarks/device_run.sh, in two calls: each has a time limit, a log, and lines of JSON as it goes.

    python -m benchmarks.device.run [first | second | STAGE ...] [--minutes 5.5] [--list]
    python -m benchmarks.device.run first --rehearse [STAGE=fails|hangs|crashes ...]

A machine with a GPU is lent for fifteen minutes and may be taken away in the middle of a stage.  So what is wanted most
comes first; every line that a stage prints as JSON is written to results.jsonl at once; the attestation is written
after the first stage and after every other one; and all logs are one archive, renewed after every stage, because few
files come back.  A stage that fails does not stop the next.  After one that timed out or crashed a probe asks whether
the GPU still answers: if not, the stages that need it are left, and the rest goes on.

Only the stages import torch, so that a broken build fails a stage and not the run.  A rehearsal runs stub.py in the
place of every command, with limits of some seconds, and needs no GPU.
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
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from benchmarks.device import attestation

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("OUT", ROOT / "build" / "device"))
LOGS = Path(tempfile.gettempdir()) / f"device-logs-{os.getpid()}"  # not in OUT: only their archive goes there
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
CARRIED = ROOT / "build" / "device"  # golden, compiled here for sm_90a, travels with the library
STUB = Path(__file__).with_name("stub.py")
KILL_WAIT = 10.0  # seconds that a killed process may take to go: one that waits in the driver may never

# Exits with the sentence and the device's name in the log, before anything else is tried.
DEVICE = """
import json, sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch %s finds none" % torch.__version__)
p = torch.cuda.get_device_properties(0)
print(json.dumps({"device": p.name, "compute_capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count,
                  "memory_gib": round(p.total_memory / 2**30, 1), "torch": torch.__version__,
                  "cuda": torch.version.cuda, "driver_runs": float(torch.ones(3, device="cuda").sum())}))
"""
# Loads the library that was carried, and runs one call of it; "build" follows where that fails.
LOAD = """
import torch, consistency_ops as co
g, x = torch.ones(8, 64, device="cuda"), torch.eye(64, device="cuda")
co.set_backend("native")
assert co.build_info()["cuda_toolkit"], "the library has no CUDA kernels"
print("one call:", float(co.precondition(g, x).sum()))
"""
PROBE = (
    "import torch; assert float(torch.ones(3, device='cuda').sum()) == 3; torch.cuda.synchronize(); print('answers')"
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """``commands`` run one after the other until one fails, ``instead`` if one does; ``seconds`` limits all of it."""

    name: str
    seconds: int
    commands: list[list]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    needs_device: bool = True
    instead: list[list] = dataclasses.field(default_factory=list)


def nvcc() -> str:
    return shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")


def sanitizer(tool: str, seconds: int) -> Stage:
    # Without torch's caching allocator every tensor has bounds of its own.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", PYTHON, "-m", "benchmarks.device.short"]
    return Stage(tool, seconds, [command], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def golden() -> Stage:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    built, printed = LOGS / "golden", OUT / "golden.txt"
    compile_it = [nvcc(), "-std=c++17", "-O2", "-arch=native", *includes, "-o", built, "tests/golden/golden.cu"]

    def printing(program: Path) -> list:
        return ["sh", "-c", f"{program} > {printed}.partial && mv {printed}.partial {printed}"]

    if (CARRIED / "golden").exists():
        return Stage("golden", 60, [printing(CARRIED / "golden")], instead=[compile_it, printing(built)])
    return Stage("golden", 60, [compile_it, printing(built)])


def pytest_stage(name: str, seconds: int, *arguments: str, workers: int = 0) -> Stage:
    command = [*PYTEST, *arguments]
    if workers and has("xdist"):
        command += ["-n", str(workers)]
    if has("pytest_timeout"):
        command += ["--timeout", "30", "--timeout-method", "thread"]
    return Stage(name, seconds, [command])


def first() -> list[Stage]:
    """Right or wrong, and how fast: what the next change of a kernel needs to know."""
    build = {"CONSISTENCY_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a", "CONSISTENCY_OPS_TORCH_ABI": "0"}
    build = {name: os.environ.get(name, value) for name, value in build.items()} | {"MAX_JOBS": str(os.cpu_count())}
    load = [PYTHON, "-c", LOAD]
    compiling = [PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
    files = ["precondition", "precondition_determinism", "bad_values", "same_input", "capture", "linalg"]
    return [
        Stage("device", 40, [[PYTHON, "-c", DEVICE]]),
        Stage("library", 120, [load], build, instead=[compiling, load]),
        golden(),
        Stage("smoke", 60, [[PYTHON, "-m", "benchmarks.device.smoke"]]),
        Stage("timings", 60, [[PYTHON, "-m", "benchmarks.device.timings"]]),
        pytest_stage("graphs", 60, "tests/test_cuda.py"),
        pytest_stage("operators", 80, "-m", "gpu", *(f"tests/test_{name}.py" for name in files), workers=8),
    ]


def second() -> list[Stage]:
    """How it compares, and what the tools say."""
    kernels = "regex:precondition|spd_"
    ncu = ["ncu", "--clock-control", "none", "-k", kernels, "-c", "6", "--set", "basic"]
    files = ["batch_rms_norm", "modulus"]
    stages = [
        Stage("peers", 180, [[PYTHON, "-m", "benchmarks.micro.bench_cuda", "--json", str(OUT / "cuda.json")]]),
        sanitizer("memcheck", 90),
        Stage("ncu", 80, [[*ncu, PYTHON, "-m", "benchmarks.device.timings", "--workloads", "v", "iv", "--once"]]),
        sanitizer("racecheck", 100),
        pytest_stage("elementwise", 60, "-m", "gpu", *(f"tests/test_{name}.py" for name in files), workers=8),
    ]
    if os.environ.get("MATHDX_ROOT"):
        stages.append(Stage("tier-c", 60, [[PYTHON, "-m", "benchmarks.micro.mathdx"]]))
    return stages


def has(module: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode == 0


class Run:
    """One call: what it has found so far, and the files that say so."""

    def __init__(self, stub: dict[str, str] | None = None):
        self.stub = stub
        self.results: list[dict] = []
        self.device: dict | None = None
        self.answers = True
        OUT.mkdir(parents=True, exist_ok=True)
        LOGS.mkdir(parents=True, exist_ok=True)

    def say(self, **line: object) -> None:
        """One line of results.jsonl, on the disk when this returns."""
        with open(OUT / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def stage(self, stage: Stage, seconds: float) -> dict:
        start = time.monotonic()
        with open(LOGS / f"{stage.name}.log", "w") as log:
            status = self.commands(stage, stage.commands, log, start, seconds)
            if status not in ("ok", "stuck") and stage.instead:
                status = self.commands(stage, stage.instead, log, start, seconds)
        text = (LOGS / f"{stage.name}.log").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        took = round(time.monotonic() - start, 1)
        return {"stage": stage.name, "status": status, "seconds": took, "last": (lines or [""])[-1][:300]}

    def commands(self, stage: Stage, commands: list[list], log: IO, start: float, seconds: float) -> str:
        status = "ok"
        for command in commands:
            left = seconds - (time.monotonic() - start)
            if self.stub is not None:
                command = [PYTHON, "-S", STUB, stage.name, self.stub.get(stage.name, "works")]
            print("$", *command, file=log, flush=True)
            try:
                status = self.finish(stage, [str(c) for c in command], log, max(1.0, left))
            except OSError as error:
                print(error, file=log)
                status = "failed"
            if status != "ok":
                break
        return status

    def finish(self, stage: Stage, command: list[str], log: IO, seconds: float) -> str:
        """Run a command, its JSON lines to results.jsonl and all of it to the log; what it started ends with it."""
        environment = {**os.environ, **stage.environment, "OUT": str(OUT)}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self.read, args=(stage.name, process.stdout, log), daemon=True)
        reader.start()
        status = "timeout"
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else "crashed" if code < 0 else "failed"
            reader.join(min(2.0, seconds))
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(KILL_WAIT)
        except subprocess.TimeoutExpired:
            status = "stuck"
        reader.join(2.0)
        return status

    def read(self, name: str, output: IO[str], log: IO) -> None:
        for line in output:
            with contextlib.suppress(ValueError):  # the log was closed: the process did not go
                log.write(line)
                log.flush()
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    self.say(stage=name, **json.loads(line))

    def probe(self) -> None:
        """Whether the GPU answers; a process that was killed may still hold it for some seconds."""
        for seconds in (20, 40):
            status = self.stage(Stage("probe", seconds, [[PYTHON, "-c", PROBE]]), 3 if self.stub else seconds)["status"]
            if status == "ok":
                return
        self.answers = False

    def write(self) -> None:
        """summary.json, the attestation and the archive of the logs, each put in place when it is complete."""
        summary = {"device": self.device, "kernels": attestation.tree_hash(), "stages": self.results}
        partial = OUT / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        os.replace(partial, OUT / "summary.json")
        if self.device:
            attestation.write(OUT, self.device, self.results)
        with tarfile.open(OUT / "logs.tar.gz.partial", "w:gz") as tar:
            for log in sorted(LOGS.glob("*.log")):
                tar.add(log, log.name)
        os.replace(OUT / "logs.tar.gz.partial", OUT / "logs.tar.gz")

    def all(self, stages: list[Stage], minutes: float, limit: float | None) -> None:
        deadline = time.monotonic() + 60 * minutes
        for stage in stages:
            left = deadline - time.monotonic()
            reason = None
            if stage.needs_device and stage.name != "device":
                reason = self.results[0]["last"] if not self.device else None if self.answers else "the GPU went silent"
            if reason is not None:
                result = {"stage": stage.name, "status": "no device", "seconds": 0.0, "last": reason}
            elif left < (0.2 if limit else 15):
                result = {"stage": stage.name, "status": "left", "seconds": 0.0, "last": "no time left in this call"}
            else:
                print(f"{stage.name} ...", flush=True)
                result = self.stage(stage, min(limit or stage.seconds, left))
            if stage.name == "device" and result["status"] == "ok":
                self.device = json.loads(result["last"])
            self.results.append(result)
            self.say(**result)
            self.write()
            if result["status"] in ("timeout", "crashed", "stuck") and self.device:
                self.probe()
                if not self.answers:
                    self.say(stage=stage.name, probe="the GPU does not answer any more")
                self.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="first (default), second, or names of stages")
    parser.add_argument("--minutes", type=float, help="of this call, default 5.5 or, for second, 6.5")
    parser.add_argument("--list", action="store_true", help="names and time limits")
    parser.add_argument("--rehearse", nargs="*", metavar="STAGE=BEHAVIOUR", help="stub.py instead of every command")
    parser.add_argument("--limit", type=float, help="seconds of every stage, at most")
    arguments = parser.parse_args()
    calls = {"first": first(), "second": second()}
    every = {stage.name: stage for stages in calls.values() for stage in stages}
    if arguments.list:
        for call, stages in calls.items():
            print(f"{call}: at most {sum(stage.seconds for stage in stages)} s in all")
            for stage in stages:
                print(f"  {stage.name:12} at most {stage.seconds} s")
        return 0
    chosen: list[Stage] = []
    for name in arguments.stages or ["first"]:
        if name not in every and name not in calls:
            parser.error(f"there is no stage {name}: choose from {', '.join([*calls, *every])}")
        chosen += calls.get(name) or [every[name]]
    if chosen[0].name != "device":
        chosen = [every["device"], *(stage for stage in chosen if stage.name != "device")]
    stub = None if arguments.rehearse is None else dict(pair.split("=", 1) for pair in arguments.rehearse)
    minutes = arguments.minutes or (6.5 if arguments.stages == ["second"] else 5.5)
    run = Run(stub)
    run.all(chosen, minutes, arguments.limit)
    print_table(run.results)
    shutil.rmtree(LOGS, ignore_errors=True)
    return 0 if all(result["status"] == "ok" for result in run.results) else 1


def print_table(results: list[dict]) -> None:
    print(f"\n{'stage':12} {'status':10} {'seconds':>7}  last line of its log")
    for result in results:
        print(f"{result['stage']:12} {result['status']:10} {result['seconds']:>7.1f}  {result['last'][:90]}")
    if left := [result["stage"] for result in results if result["status"] == "left"]:
        print(f"run again: benchmarks/device_run.sh {' '.join(left)}")


if __name__ == "__main__":
    sys.exit(main())
