"""The benchmarks of training frameworks measure what they say, and README's table is made of what they wrote."""

import json

import pytest
import torch

from benchmarks import report
from benchmarks.micro import bench_frameworks, bench_trainers
from support import frameworks

MODELS = {"gpt2": (3454464, 16), "vit": (1803850, 26), "resnet": (11181642, 21)}  # parameters, corrected layers


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_round_of_every_model(name, one_thread):
    frameworks.require("transformers", "timm")
    row = bench_frameworks.measure(name, seconds=0, rounds=(1, 1))
    assert (row["parameters"], row["layers"], row["rounds"]) == (*MODELS[name], 1)
    assert row["added"] == pytest.approx(row["added_by_capture"] + row["added_by_launch"])
    assert row["added"] == pytest.approx(row["ms"]["preconditioned"] / row["ms"]["plain"] - 1)
    assert min(row["ms"].values()) > 1


def small():
    """A layer in front of a step that changes nothing."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 4), torch.randn(20, 6)
    return model, torch.optim.SGD(model.parameters(), lr=0.0), lambda: model(x).square().sum()


def test_what_the_three_kinds_of_step_do():
    """Capture takes the rows and corrects nothing; the whole step corrects."""
    steps = [bench_frameworks.step_of(small, *kind) for kind in ((False, True), (True, False), (True, True))]
    for step in steps:
        step()
        step()  # the first one takes another way than all later ones
    assert steps[0].preconditioner is None
    assert [step.preconditioner.stats(condition=False)["rows"] for step in steps[1:]] == [{"": 20}] * 2
    assert [step.preconditioner.stats(condition=False)["layers"] for step in steps[1:]] == [0, 1]
    model, _, loss = small()
    loss().backward()
    grads = [step.preconditioner._layers[0].weight.grad for step in steps[1:]]
    assert torch.equal(grads[0], model.weight.grad) and not torch.equal(grads[1], model.weight.grad)


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(frameworks, "missing", list)
    monkeypatch.setitem(bench_frameworks.MODELS, "gpt2", small)
    target = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["bench", "--models", "gpt2", "--seconds", "0", "--json", str(target)])
    bench_frameworks.main()
    results = json.loads(target.read_text())
    (row,) = results["rows"]
    assert results["clock"] == "CPU time of one thread, interleaved" and results["machine"]["threads"] == 1
    assert (row["parameters"], row["layers"], row["rounds"]) == (28, 1, 9)
    low, high = row["added_quartiles"]
    assert low <= row["added"] <= high
    assert f"both {row['added']:+.1%}" in capsys.readouterr().out


def test_a_missing_framework_is_named(monkeypatch, capsys):
    monkeypatch.setattr(frameworks, "missing", lambda: ["timm"])
    for benchmark in (bench_frameworks, bench_trainers):
        monkeypatch.setattr("sys.argv", ["bench"])
        with pytest.raises(SystemExit):
            benchmark.main()
        assert "timm is not installed: pip install -r requirements-frameworks.txt" in capsys.readouterr().err


def test_committed_results_are_of_these_models():
    rows = {row["name"]: row for row in report.read("frameworks")["rows"]}
    assert {name: (row["parameters"], row["layers"]) for name, row in rows.items()} == MODELS
    for row in report.read("trainers")["rows"]:
        pairs = list(zip(row["without"], row["with"], strict=True))
        assert len(pairs) == 3 and row["lower"] == sum(b < a for a, b in pairs)
        assert sum(row["with"]) < sum(row["without"])


def test_table_of_the_readme():
    lines = report.frameworks().splitlines()
    assert len(lines) == 2 + len(MODELS)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    for line, name in zip(lines[2:], MODELS, strict=True):
        row = next(row for row in report.read("trainers")["rows"] if row["name"] == name)
        assert f"{sum(row['with']) / 3:.3g}" in line and row["trainer"] in line
