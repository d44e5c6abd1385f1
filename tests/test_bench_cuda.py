"""The parts of the CUDA benchmark that a CPU can check: baseline numbers, counts, bytes, texts."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import report
from benchmarks.device import smoke
from benchmarks.micro import bench_cuda, streaming
from benchmarks.micro.compositions import by_solve, divide, per_layer
from benchmarks.micro.expert import expert
from benchmarks.micro.workloads import WORKLOADS, LayerShape
from support import processes


@pytest.mark.parametrize("chunk", [16, 64])
def test_the_expert_baseline_is_the_correction(chunk):
    generator = torch.Generator().manual_seed(0)
    layers = [LayerShape(9, 40), LayerShape(5, 33), LayerShape(6, 40), LayerShape(4, 24, (3, 3))]
    grads = [torch.randn(layer.weight, generator=generator, dtype=torch.float64).float() for layer in layers]
    inputs = [torch.randn(50, layer.units, generator=generator) for layer in layers]
    divisions = [divide(layer, chunk, 8, generator) for layer in layers]
    want = per_layer(grads, inputs, divisions, 0.1, by_solve)
    for ours, theirs in zip(expert(grads, inputs, divisions, 0.1), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_table():
    """Inputs read once, gradients read and written: (ii) 6.3 + 6.3 MB, (v) 33.6 + 67.1 MB in bfloat16."""
    for number, megabytes in (("ii", 12.6), ("v", 100.7), ("vi", 292 + 810)):
        setting = bench_cuda.SETTINGS[number]
        workload = WORKLOADS[setting.workload]
        sizes = workload.inputs.itemsize, workload.grads.itemsize
        bytes_ = bench_cuda.moved_bytes(workload.layers * setting.repeat, setting.rows, *sizes)
        assert bytes_ / 1e6 == pytest.approx(megabytes, rel=0.01), number


def test_counting():
    device = ["precondition_kernel<256>", "Memset (Device)", "fill", "Memcpy DtoH"]
    host = [
        ("cudaStreamSynchronize", 1.0),
        ("cudaStreamSynchronize", 5.0),
        ("aten::add", 5.0),
        ("cudaLaunchKernel", 6.0),
    ]
    assert bench_cuda.count_calls(device, host, 2.0, 9.0) == {"launches": 2, "copies": 2, "waits": 1}


def a_result() -> dict:
    return {
        "workload": "iii",
        "name": "resnet50",
        "cold_us": {"ours": 130.0, "A: plain torch": 25_000.0, "B: library in a graph": 2000.0},
        "warm_us": {"ours": 120.0},
        "floor_us": 87.0,
        "share_of_floor": 0.67,
        "target_us": 130,
        "ratio_to_A": 192.0,
        "ratio_to_B": 15.4,
        "ratio_to_C": None,
        "calls": {"ours": {"launches": 1}},
    }


def test_a_row_of_the_table_is_as_wide_as_its_header():
    result = a_result()
    rows = [bench_cuda.row_of(result)]
    result["cold_us"][bench_cuda.TIER_C], result["ratio_to_C"] = 321.0, 2.5
    rows.append(bench_cuda.row_of(result))
    assert {len(row) for row in rows} == {len(bench_cuda.HEADER)}
    assert rows[0].split()[-5:] == ["-", "192.0", "15.4", "-", "1"]
    assert rows[1].split()[-5:] == ["321.0", "192.0", "15.4", "2.5", "1"]


def test_table_and_plot_of_the_readme(tmp_path, monkeypatch):
    """Without results every target stands beside "never run"; with some, beside what was measured."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.cuda().splitlines()
    assert len(lines) == 2 + len(bench_cuda.SETTINGS)
    assert all("| never run |" in line for line in lines[2:])
    assert tmp_path / "cuda.png" not in report.plots()
    result = a_result()
    result["cold_us"] |= {"ours, exact division": 180.0, bench_cuda.TIER_C: 321.0}
    results = {"machine": {"date": "2026-11-21T00:00"}, "device": "a GPU", "tier_c": "C: MathDx", "rows": [result]}
    (tmp_path / "cuda.json").write_text(json.dumps(results))
    lines = report.cuda().splitlines()
    assert lines[4] == "| (iii) resnet50 | 130 | 130.0 | 120.0 | 67% | 15.4 | - | 1 |"
    assert "never run" in lines[3] and lines[-1] == "a GPU, 2026-11-21. C: MathDx."
    report.plots()[tmp_path / "cuda.png"](tmp_path / "cuda.png")
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("channels_last", [False, True])
def test_calls_that_stream(channels_last):
    """They run, and move the bytes of a copy: (2 maps + 1 bit per element, ..., 1 map, 2 maps, all rows twice)."""
    calls = streaming.calls("cpu", torch.float32, channels_last, (2, 16, 4, 4))
    for run, _ in calls.values():
        run()
    assert [moved for _, moved in calls.values()] == [4096 + 64, 4096 + 64, 2048, 4096, 4096]


def test_settings_name_workloads():
    assert all(setting.workload in WORKLOADS for setting in bench_cuda.SETTINGS.values())
    assert list(bench_cuda.SETTINGS) == ["i", "ii", "iii", "iv", "v", "vi"]


def test_a_division_moves_to_its_device():
    division = divide(LayerShape(3, 40), 16, 8, torch.Generator().manual_seed(0))
    moved = bench_cuda.to_device(division, "meta")
    assert moved.order.is_meta and moved.inverse.is_meta
    assert dataclasses.replace(moved, order=division.order, inverse=division.inverse) == division
    whole = divide(LayerShape(3, 10), 16, 8, torch.Generator())
    assert bench_cuda.to_device(whole, "meta") is whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so():
    command = [sys.executable, "-m", "benchmarks.micro.bench_cuda", "--workloads", "i"]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "no CUDA device: nothing was measured"
    assert done.stdout.startswith("C: ")


def test_the_smoke_test_knows_every_operator():
    cases = smoke.cases()
    assert set(smoke.RUNGS) < set(cases) and {"spd_solve", "modulus", "foreach_precondition_"} < set(cases)
    found = smoke.check("spd_solve", "cpu")
    assert found["case"] == "spd_solve" and found["problems"] >= 1 and found["wrong"] == [] and found["error"] < 1e-3
