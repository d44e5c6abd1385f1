"""The record of what has run on a GPU, and the driver of benchmarks/device_run.sh, as far as a CPU can show."""

import json
import os
import signal
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.device import attestation, run
from support import processes

ROOT = Path(__file__).resolve().parents[1]
DEVICE = {"device": "a GPU"}


def test_kernels_are_attested():
    """A warning, not a failure: most machines have no GPU."""
    if state := attestation.state():
        warnings.warn(pytest.PytestWarning(state), stacklevel=1)


@pytest.fixture
def tree(tmp_path):
    for folder in attestation.SOURCES:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.cuh").write_text("a kernel")
    return tmp_path


def test_every_change_of_the_sources_changes_the_hash(tree):
    seen = {attestation.tree_hash(tree)}
    (tree / "csrc/cuda/a.cuh").write_text("another")
    seen.add(attestation.tree_hash(tree))
    (tree / "csrc/cuda/a.cuh").rename(tree / "csrc/cuda/b.cuh")
    seen.add(attestation.tree_hash(tree))
    (tree / "csrc/include/new.h").write_text("")
    seen.add(attestation.tree_hash(tree))
    assert len(seen) == 4


def test_what_is_said(tree, tmp_path):
    path = tmp_path / "attestation.json"
    assert "never run on a GPU" in attestation.state(path, tree)
    kernels = attestation.tree_hash(tree)
    good = {"stage": "graphs", "status": "ok", "seconds": 1.0}
    attestation.write(tmp_path, DEVICE, [good, {"stage": "suite", "status": "left", "seconds": 0.0}], kernels)
    assert attestation.state(path, tree) is None
    attestation.write(tmp_path, DEVICE, [{"stage": "memcheck", "status": "failed", "seconds": 1.0}], kernels)
    assert attestation.state(path, tree) == "on a GPU these stages of benchmarks/device_run.sh failed: memcheck"
    assert set(json.loads(path.read_text())["stages"]) == {"graphs", "memcheck"}
    (tree / "csrc/cuda/a.cuh").write_text("changed")
    assert "have changed since they ran on a GPU" in attestation.state(path, tree)
    attestation.write(tmp_path, DEVICE, [good], attestation.tree_hash(tree))
    assert set(json.loads(path.read_text())["stages"]) == {"graphs"}, "results of other sources are dropped"


def a_stage(name, *commands, **options):
    return run.Stage(name, 20, [list(command) for command in commands], **options)


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OUT", tmp_path / "out")
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(run, "KILL_WAIT", 2.0)
    return run.Run()


def test_a_stage_ends_at_its_limit_and_reports_its_last_line(call):
    python = [sys.executable, "-c"]
    good = call.stage(a_stage("good", [*python, "print('all is well\\n')"]), 20)
    assert (good["status"], good["last"]) == ("ok", "all is well")
    bad = call.stage(a_stage("bad", [*python, "exit('this went wrong')"], [*python, "print('never')"]), 20)
    assert (bad["status"], bad["last"]) == ("failed", "this went wrong")
    assert call.stage(a_stage("missing", ["no-such-program"]), 20)["status"] == "failed"
    slow = call.stage(a_stage("slow", [*python, "import time; print('begun', flush=True); time.sleep(60)"]), 1.5)
    assert (slow["status"], slow["last"]) == ("timeout", "begun")
    assert slow["seconds"] < 20
    instead = a_stage("instead", [*python, "exit('no')"], instead=[[*python, "print('built')"]])
    assert call.stage(instead, 20) | {"seconds": 0} == {
        "stage": "instead",
        "status": "ok",
        "seconds": 0,
        "last": "built",
    }


def test_nothing_of_a_stage_outlives_it(call, tmp_path):
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert call.stage(a_stage("parent", [sys.executable, "-c", parent]), 2)["status"] == "timeout"
    time.sleep(4)
    assert not marker.exists()


def test_a_process_that_cannot_be_killed_does_not_hold_the_rest(call, monkeypatch):
    """As one that waits in the driver."""
    monkeypatch.setattr(run, "KILL_WAIT", 0.2)
    monkeypatch.setattr(run.os, "killpg", lambda *_: None)
    found = call.stage(a_stage("stuck", [sys.executable, "-c", "import time; time.sleep(8)"]), 0.5)
    assert found["status"] == "stuck" and found["seconds"] < 8


NAMES = [stage.name for stage in (*run.first(), *run.second())]
STATUS = {"fails": "failed", "hangs": "timeout", "crashes": "crashed", "forks": "ok"}


def rehearse(out, *behaviours, limit="1", **variables):
    command = [sys.executable, "-m", "benchmarks.device.run", "first", "second", "--limit", limit, "--rehearse"]
    environment = {**os.environ, "OUT": str(out), **variables}
    done = processes.run([*command, *behaviours], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done, lines, json.loads((out / "summary.json").read_text())


# Every stage misbehaves in two ways, its neighbours in the other two.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "behaviour"),
    [(name, list(STATUS)[(2 * i + j) % 4]) for i, name in enumerate(NAMES) for j in range(2)],
)
def test_rehearsal_with_a_stage_that_misbehaves(tmp_path, name, behaviour):
    """The stages before and after it are done, and what it had printed is kept."""
    done, lines, summary = rehearse(tmp_path, f"{name}={behaviour}")
    status = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert list(status) == NAMES
    others = "ok" if name != "device" or behaviour == "forks" else "no device"
    assert status == {other: STATUS[behaviour] if other == name else others for other in NAMES}
    assert done.returncode == (behaviour != "forks"), done.stderr
    assert any(line["stage"] == name and ("line" in line or "device" in line) for line in lines)
    probes = [line for line in lines if line["stage"] == "probe"]
    assert len(probes) == (behaviour in ("hangs", "crashes") and name != "device")
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= {"results.jsonl", "summary.json", "attestation.json", "golden.txt", "cuda.json", "logs.tar.gz"}
    with tarfile.open(tmp_path / "logs.tar.gz") as tar:
        assert f"{name}.log" in tar.getnames()
    attested = tmp_path / "attestation.json"
    assert attested.exists() == (others == "ok")
    if attested.exists():
        assert json.loads(attested.read_text())["stages"][name]["status"] == STATUS[behaviour]


def test_a_gpu_that_went_silent_leaves_the_rest_of_its_stages(tmp_path):
    _, lines, summary = rehearse(tmp_path, "smoke=crashes", "probe=hangs", limit="0.5")
    status = [stage["status"] for stage in summary["stages"]]
    at = NAMES.index("smoke")
    assert status == ["ok"] * at + ["crashed"] + ["no device"] * (len(NAMES) - at - 1)
    assert {"stage": "smoke", "probe": "the GPU does not answer any more"} in lines
    assert summary["stages"][-1]["last"] == "the GPU went silent"


def test_a_call_that_is_killed_has_kept_what_it_had(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device.run", "first", "--limit", "60", "--rehearse", "timings=hangs"]
    with processes.running(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and '"line": "timings"' not in read(tmp_path / "results.jsonl"):
            time.sleep(0.1)
    lines = [json.loads(line) for line in read(tmp_path / "results.jsonl").splitlines()]
    assert {"stage": "timings", "line": "timings"} in lines
    assert set(json.loads(read(tmp_path / "attestation.json"))["stages"]) == {"device", "library", "golden", "smoke"}
    for line in processes.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
        if "stub.py timings hangs" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)


def read(path):
    return path.read_text() if path.exists() else ""


def test_both_calls_fit_fifteen_minutes():
    """With the start of a machine; a call is at most ten minutes, and ends by its own minutes before that."""
    assert 60 * (5.5 + 6.5) < 15 * 60 - 120
    text = (ROOT / "benchmarks" / "device_run.sh").read_text()
    assert "first  [--minutes 5.5]" in text and "second [--minutes 6.5]" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_goes_on(tmp_path):
    """Every stage that needs one is reported, none stops the next, and nothing is attested."""
    names = ["device", "golden", "graphs", "memcheck", "peers"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "device_run.sh"), *names]
    done = processes.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"] is None
    assert [s["stage"] for s in summary["stages"]] == names
    assert [s["status"] for s in summary["stages"]] == ["failed", *["no device"] * 4]
    assert all("no CUDA device" in s["last"] for s in summary["stages"])
    assert not (tmp_path / "attestation.json").exists()
    assert done.stdout.splitlines()[-1].startswith("peers")


def test_unknown_stage_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device.run", "nonsense"]
    done = processes.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no stage nonsense: choose from first, second, device, library" in done.stderr
