"""The record of what has run on a GPU, and the driver of benchmarks/device_run.sh, as far as a CPU can show."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.device import attestation, run

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


def stage(name, *commands, seconds=20):
    return run.Stage(name, seconds, [list(command) for command in commands])


def test_a_stage_ends_at_its_limit_and_reports_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OUT", tmp_path)
    python = [sys.executable, "-c"]
    good = run.run(stage("good", [*python, "print('all is well\\n')"]), 20)
    assert (good["status"], good["last"]) == ("ok", "all is well")
    bad = run.run(stage("bad", [*python, "exit('this went wrong')"], [*python, "print('never')"]), 20)
    assert (bad["status"], bad["last"]) == ("failed", "this went wrong")
    assert run.run(stage("missing", ["no-such-program"]), 20)["status"] == "failed"
    slow = run.run(stage("slow", [*python, "import time; print('begun', flush=True); time.sleep(60)"]), 1.5)
    assert (slow["status"], slow["last"]) == ("timeout", "begun")
    assert slow["seconds"] < 20


def test_nothing_of_a_stage_outlives_it(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OUT", tmp_path)
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert run.run(stage("parent", [sys.executable, "-c", parent]), 2)["status"] == "timeout"
    time.sleep(4)
    assert not marker.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_rehearsal_without_a_device_says_so_and_goes_on(tmp_path):
    """Every stage that needs one is reported, none stops the next, and nothing is attested."""
    names = ["device", "golden", "graphs", "memcheck", "benchmarks"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "device_run.sh"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"] is None
    assert [s["stage"] for s in summary["stages"]] == names
    assert [s["status"] for s in summary["stages"]] == ["failed", *["no device"] * 4]
    assert all("no CUDA device" in s["last"] for s in summary["stages"])
    assert not (tmp_path / "attestation.json").exists()
    assert done.stdout.splitlines()[-1].startswith("benchmarks")


def test_unknown_stage_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks.device.run", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no stage nonsense: choose from device, build" in done.stderr
