"""The comparison with other optimizers: its tasks run, its tables say what the JSON says, README agrees with both."""

import dataclasses
import gc
import importlib
import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import markdown, report
from benchmarks.micro import MODULES, bench_host, bench_scaling
from benchmarks.micro import __main__ as summary
from benchmarks.micro.timing import Group
from benchmarks.micro.workloads import LayerShape, useful_flops
from benchmarks.peers import ablations, ideas, runs, tables
from benchmarks.peers.optimizers import PEERS
from benchmarks.peers.references import Foof, Isaac, rows
from benchmarks.peers.tasks import CHARACTERS, CONTEXT, TASKS, VARIANTS, Split, characters
from support import processes

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"cifar-convnet": (3, 16, 16), "cifar-resnet": (3, 16, 16), "autoencoder": (784,)}


def random_split(task: str, count: int = 20) -> Split:
    if task == "char-gpt":
        text = torch.randint(CHARACTERS, (count, CONTEXT + 1))
        return Split(*[(text[:, :-1], text[:, 1:])] * 3)
    x = torch.rand(count, *SHAPES.get(task, (1, 28, 28)))
    return Split(*[(x, x if task == "autoencoder" else torch.randint(10, (count,)))] * 3)


def train(task: str, peer: str, steps: int = 2) -> dict:
    small = dataclasses.replace(TASKS[task], batch=10)
    setting = {**PEERS[peer].trials[-1]}
    return runs.train(small, peer, setting, random_split(task), seed=0, steps=steps, judge="test")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_two_steps(task):
    result = train(task, "sgd+pre")
    assert result["failure"] is None
    assert [point[0] for point in result["curve"]] == [0, 1, 2]
    assert result["curve"][0][3] != result["curve"][2][3] or TASKS[task].metric == "test error"
    assert all(math.isfinite(point[3]) for point in result["curve"])


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("task", ["fashion-convnet", "char-gpt"])
def test_every_installed_optimizer_changes_all_parameters(task, peer):
    if PEERS[peer].version is None:
        pytest.skip(f"{PEERS[peer].package} is not installed")
    torch.manual_seed(0)
    model = TASKS[task].model(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = PEERS[peer].build(model, TASKS[task].loss_type, **{**PEERS[peer].trials[0], "lr": 1e-3})
    x, y = (t[:10] for t in random_split(task).train)
    losses = [step(x, y, TASKS[task].loss) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_equal_number_of_trials():
    counts = {name: len(peer.trials) + (len(runs.DAMPINGS) if peer.damped else 0) for name, peer in PEERS.items()}
    assert set(counts.values()) == {8}, counts


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    return torch.cat([model.weight.grad.flatten(1), model.bias.grad[:, None]], 1).double()


@pytest.mark.parametrize("count", [5, 50])  # fewer rows than units: the dual
def test_isaac_is_the_damped_inverse_of_the_batch(count):
    model, x, y = nn.Linear(20, 3), torch.randn(count, 20), torch.randint(3, (count,))
    correction = Isaac(model, damping=0.3)
    gradient = gradients(model, x, y)
    correction.step()
    joined = torch.cat([x, torch.ones(count, 1)], 1).double()
    expected = gradient @ torch.linalg.inv(joined.T @ joined / count + 0.3 * torch.eye(21))
    torch.testing.assert_close(model.weight.grad.double(), expected[:, :20], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bias.grad.double(), expected[:, 20], rtol=1e-4, atol=1e-6)


def test_foof_averages_and_keeps_its_inverse():
    model, y = nn.Linear(4, 3), torch.randint(3, (50,))
    correction = Foof(model, damping=0.1, decay=0.9, every=2, warm_up=0)
    moment = None
    for i in range(4):
        x = torch.randn(50, 4)
        gradient = gradients(model, x, y)
        joined = torch.cat([x, torch.ones(50, 1)], 1).double()
        new = joined.T @ joined / 50
        moment = new if moment is None else 0.9 * moment + 0.1 * new
        if i % 2 == 0:
            inverse = torch.linalg.inv(moment + 0.1 * torch.eye(5))
        correction.step()
        torch.testing.assert_close(model.weight.grad.double(), (gradient @ inverse)[:, :4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", [0, 11])  # units of small and of large variance
@pytest.mark.parametrize("graft", ["norm", "clip", "metric"])
def test_grafts_set_the_norm_of_the_corrected_gradient(graft, unit):
    torch.manual_seed(0)
    x, model = torch.randn(64, 12) * torch.linspace(0.1, 3, 12), nn.Linear(12, 5)
    steps, _ = ideas.actions(model, graft=graft, bias=False)
    (model(x) * x[:, unit : unit + 1]).mean().backward()
    raw = model.weight.grad.clone()
    for step in steps:
        step()
    moment = x.T @ x / len(x)
    expected = raw @ torch.linalg.inv(12 * moment / moment.trace() + 0.1 * torch.eye(12))
    length = (raw * expected).sum().sqrt() if graft == "metric" else expected.norm()
    scale = raw.norm() / length
    assert (scale < 1) == (unit == 0)
    torch.testing.assert_close(model.weight.grad, expected * (scale.clamp(max=1) if graft == "clip" else scale))


def test_momentum_before_the_correction_and_annealed_damping():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 2, bias=False), torch.randn(50, 6)
    steps, (preconditioner,) = ideas.actions(model, momentum_first=0.5, anneal=(1.0, 4.0, 2), scaling="absolute")
    used, total = [], torch.zeros(2, 6)
    for _ in range(3):
        model.zero_grad()
        model(x).sum().backward()
        total = 0.5 * total + model.weight.grad
        for step in steps:
            step()
        used.append(preconditioner._correction.last_damping)
        damped = x.T @ x / len(x) + used[-1] * torch.eye(6)
        torch.testing.assert_close(model.weight.grad, total @ torch.linalg.inv(damped))
    assert used == [1.0, 2.0, 4.0]


def test_ledoit_wolf_agrees_with_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    torch.manual_seed(0)
    for n, d in ((20, 30), (500, 10)):
        x = torch.randn(n, d) * torch.linspace(0.5, 2, d)
        share = covariance.ledoit_wolf_shrinkage(x.double().numpy(), assume_centered=True)
        assert ideas.ledoit_wolf(x, 0.0) == pytest.approx(share / (1 - share), rel=1e-3)


def test_shrinkage_gives_every_layer_its_own_damping():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(40, 8)
    steps, parts = ideas.actions(model, shrinkage=True)
    model(x).sum().backward()
    for step in steps:
        step()
    inputs = x, model[:2](x).detach()
    assert [part._correction.last_damping for part in parts] == pytest.approx([ideas.ledoit_wolf(t) for t in inputs])


def test_rows_of_a_convolution_are_its_patches():
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8)
    outputs = rows(layer, x) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(outputs, layer(x).permute(0, 2, 3, 1).reshape(-1, 5))


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setitem(runs.TASKS, "fashion-mlp", dataclasses.replace(TASKS["fashion-mlp"], batch=10))
    split, path = random_split("fashion-mlp"), tmp_path / "x.jsonl"
    runs.compete(runs.Store(path), "fashion-mlp", ["sgd", "isaac"], split, seeds=2, steps=6)
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for peer in ("sgd", "isaac"):
        mine = [line for line in lines if line["optimizer"] == peer]
        assert [line["phase"] for line in mine] == ["trial"] * 8 + ["final"] * 2
        assert {line["steps"] for line in mine} == {3, 6}
        best = min((line for line in mine if line["phase"] == "trial"), key=runs.last)
        assert all(line["setting"] == best["setting"] for line in mine if line["phase"] == "final")
    monkeypatch.setattr(runs, "train", None)
    runs.compete(runs.Store(path), "fashion-mlp", ["sgd", "isaac"], split, seeds=2, steps=6)
    assert path.read_text() == text


def test_a_diverging_run_is_recorded_as_failed():
    small = dataclasses.replace(TASKS["fashion-mlp"], batch=10)
    result = runs.train(small, "sgd", {"lr": 1e6}, random_split("fashion-mlp"), 0, 20, "test")
    assert "loss" in result["failure"] and runs.last(result) == math.inf
    json.dumps(result, allow_nan=False)


def test_a_trial_far_behind_stops():
    small = dataclasses.replace(TASKS["fashion-mlp"], batch=10)
    rival = [[step, 0.0, None, 1e-9] for step in range(9)]
    result = runs.train(small, "sgd", {"lr": 1e-5}, random_split("fashion-mlp"), 0, 8, "test", rival)
    assert "stopped" in result["failure"] and result["curve"][-1][0] == 4


def fake(peer: str, seed: int, ends: list[float], failure: str | None = None) -> dict:
    curve = [[10 * i, 0.5 * i, None, end] for i, end in enumerate(ends)]
    setting = PEERS[peer].trials[2]
    return dict(optimizer=peer, phase="final", seed=seed, steps=20, setting=setting, curve=curve, failure=failure) | {
        "ms_per_step": 50.0,
        "task": "fashion-mlp",
    }


def test_summary_and_tables():
    easy, hard = TASKS["fashion-mlp"].targets
    found = [
        fake("sgd", 1, [0.9, easy, hard]),
        fake("sgd", 2, [0.9, hard, hard / 2]),
        fake("adamw", 1, [0.9, 0.8, 0.7]),
    ]
    row = tables.summary(found, "fashion-mlp", "sgd")
    assert row["end"] == pytest.approx(0.75 * hard)
    assert [(t["steps"], t["seconds"], t["reached"]) for t in row["targets"]] == [(10, 0.5, 2), (15, 0.75, 2)]
    table = tables.finals(found, "fashion-mlp").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["torch SGD, momentum 0.9", "torch AdamW"]
    assert "15 (0.8)" in table[2] and table[3].split("|")[4].strip() == "-"
    failed = tables.finals([fake("sgd", 1, [0.9, 0.8, 0.7], "step 20: loss nan")], "fashion-mlp")
    assert "failed" in failed
    trials = [fake("kfac", 0, [0.9], "step 1: loss nan") | {"phase": "trial"} for _ in range(8)]
    assert "every trial failed" in tables.finals(found + trials, "fashion-mlp").splitlines()[-1]
    overview = tables.overview({"fashion-mlp": found})
    assert "15 (0.8)" in overview and "ends at 0.700" in overview


def test_ablations_choose_the_rate_with_seed_0_and_report_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(runs.TASKS, "fashion-mlp", dataclasses.replace(TASKS["fashion-mlp"], batch=10))
    store, split = runs.Store(tmp_path / "x.jsonl"), random_split("fashion-mlp")
    settings = [{"lr": 1e6, "graft": "norm"}, {"lr": 0.01, "graft": "norm"}]
    ablations.try_out(store, "fashion-mlp", "sgd+pre", "graft", settings, split, 2, 4)
    assert [(run["seed"], run["setting"]["lr"]) for run in store.runs] == [(0, 1e6), (0, 0.01), (1, 0.01), (2, 0.01)]
    ends = [runs.last(run) for run in store.runs[2:]]
    cell = ablations.table(store.runs)["graft"]["fashion-mlp, sgd+pre"]
    assert cell == pytest.approx((sum(ends) / 2, abs(ends[0] - ends[1]) / 2))
    store.runs[-1]["failure"] = "step 3: loss nan"
    assert "| graft | diverges |" in tables.ablations(store.runs)


@pytest.mark.parametrize(
    ("best", "tried"), [(0.03, 3), (1.0, 6), (3.0, 6), (0.0001, 7)], ids=["inside", "above", "at the top", "at the end"]
)
def test_best_rate_of_the_grid_is_not_at_an_end_of_those_tried(best, tried):
    seen = set()

    def metric(setting):
        seen.add(setting["lr"])
        return abs(math.log(setting["lr"] / best))

    assert ablations.best_in_grid(metric, 3) == {"lr": best}
    assert len(seen) == tried


def test_a_grid_that_fails_goes_on_to_smaller_rates():
    metric = lambda setting: math.inf if setting["lr"] > 0.001 else setting["lr"]  # noqa: E731
    assert ablations.best_in_grid(metric, 3) == {"lr": ablations.GRID[-1]}


def test_table_of_variants():
    run = fake("sgd", 1, [0.9, 0.5]) | {"phase": ablations.VARIANT_PHASE, "task": next(iter(VARIANTS))}
    lines = tables.variants([run]).splitlines()
    assert len(lines) == 3 and "| 0.500 ± 0.000 |  |" in lines[2]


def test_numbers_have_significant_digits():
    assert [tables.number(v) for v in (0.12345, 1.2345, 12.345, 123.45, 1234.5, None)] == [
        *("0.123", "1.23", "12.3", "123", "1234", "-"),
    ]


def test_characters_come_with_python():
    split = characters(Path())
    assert len(split.train[0]) > 3000
    assert all(part.min() >= 0 and part.max() < CHARACTERS for part in split.train)
    assert torch.equal(split.train[0][0, 1:], split.train[1][0, :-1])


@pytest.mark.parametrize("page", report.pages(), ids=lambda page: page.name)
def test_readme_tables_equal_the_results(page):
    text = page.read_text()
    assert report.rebuild(text) == text, "run python -m benchmarks.report"


def test_every_table_that_is_not_of_one_task_stands_on_a_page():
    text = "\n".join(page.read_text() for page in report.pages())
    shown = {match["name"] for match in report.BLOCK.finditer(text)}
    assert shown >= set(report.TABLES) - {f"peers-{task}" for task in TASKS}


def test_figure_of_the_readme_has_every_optimizer_and_what_its_step_costs(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    costs, model = report.read("peers/cost"), "deep MLP, batch 500"
    tables.summary_plot(report.stored("deep-mlp"), "deep-mlp", costs, model, tmp_path / "overview.png")
    curves, bars = kept[0].axes
    ratios = {row["optimizer"]: row["ratio"] for row in costs["rows"] if row["model"] == model}
    assert [line.get_label() for line in curves.get_lines()] == [text for text, _ in tables.SHOWN.values()]
    assert [bar.get_width() for bar in bars.patches] == [ratios[peer] for peer in tables.SHOWN]
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_table_of_the_simulation_has_the_choice_in_bold():
    rows = report.read("distributed")["rows"]
    first = next(row for row in rows if row["ranks"] == report.RANKS[0])
    chosen = first[first["chosen"] + "_simulated_us"]
    assert f"**{chosen:.0f}**" in report.distributed()


def test_tables_of_what_watching_and_sharing_cost():
    """Every row of the results has its line, with the ratio or the times that were measured."""
    for table, name, value in (
        (report.monitors(), "monitors", lambda row: f"{row['ratio']:.2g}"),
        (report.same_input(), "same_input", lambda row: f"| {row['shared_ms']:.1f} | {row['apart_ms']:.1f} |"),
    ):
        rows = report.read(name)["rows"]
        assert [row for row in rows if value(row) not in table and row.get("pass") != "not recorded"] == []
        assert len(table.splitlines()) == 2 + len({row.get("monitor", str(row)) for row in rows})


def test_a_table_has_a_cell_for_every_head():
    assert markdown.table(["", "a"], [["b", "1"]]) == "|  | a |\n| --- | --- |\n| b | 1 |"
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        markdown.table(["", "a"], [["b"]])


def test_report_replaces_only_its_blocks(tmp_path):
    text = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\n"
    made = report.rebuild(text, {"one": lambda: "1", "two": lambda: "2"})
    assert made == "a\n<!-- table: one -->\n1\n<!-- end -->\nb\n<!-- table: two -->\n2\n<!-- end -->\n"
    with pytest.raises(report.ReportError, match="no table 'two'"):
        report.rebuild(text, {"one": lambda: "1"})
    with pytest.raises(report.ReportError, match="needs an"):
        report.rebuild(text.replace("<!-- end -->\nb", "b"), {"one": lambda: "1", "two": lambda: "2"})


def test_report_check_exits_with_1_on_a_difference(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("<!-- table: step -->\nwrong\n<!-- end -->\n")
    command = [sys.executable, "-m", "benchmarks.report", "--check", "--file", str(path)]
    result = processes.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "-wrong" in result.stdout
    both = [*command, str(tmp_path / "page.md")]
    (tmp_path / "page.md").write_text("<!-- table: monitors -->\nother\n<!-- end -->\n")
    path.write_text(report.rebuild(path.read_text()))
    assert processes.run(command, cwd=ROOT, capture_output=True, text=True).returncode == 0
    result = processes.run(both, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "-other" in result.stdout and "wrong" not in result.stdout


@pytest.mark.parametrize("task", report.measured_tasks())
def test_committed_results_follow_the_rules(task):
    """Finals use the best trial, every optimizer had the same number of trials, and all have the same seeds."""
    stored = report.stored(task)
    finals = [run for run in stored if run["phase"] == "final"]
    seeds = {}
    for peer in dict.fromkeys(run["optimizer"] for run in finals):
        trials = [run for run in stored if run["optimizer"] == peer and run["phase"] == "trial"]
        best = min(trials, key=runs.last)["setting"]
        mine = [run for run in finals if run["optimizer"] == peer]
        assert len(trials) == 8 and all(run["setting"] == best for run in mine), peer
        seeds[peer] = sorted(run["seed"] for run in mine)
    assert len(set(map(tuple, seeds.values()))) == 1, seeds


def test_microbenchmarks_run_under_pytest_benchmark(tmp_path):
    target = tmp_path / "modulus.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks/micro",
        "-k",
        "modulus-1000_",
    ]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    processes.run([*command, "--benchmark-only", f"--benchmark-json={target}"], cwd=ROOT, check=True, env=alone)
    found = json.loads(target.read_text())["benchmarks"]
    assert {entry["group"] for entry in found} == {"modulus: 1000 elements"}
    assert {entry["name"] for entry in found} == {"modulus", "abs", "python"}
    assert all(entry["stats"]["median"] > 0 for entry in found)


def test_the_summary_compares_ours_with_the_strongest_baseline(caplog):
    passed = 0.0

    def takes(seconds):
        def run():
            nonlocal passed
            passed += seconds

        return run

    candidates = {"ours": takes(2.0), "slow": takes(8.0), "strong": takes(3.0), "another job": takes(1.0)}
    group = Group(candidates, ours="ours", baselines=("slow", "strong"))
    row = summary.compare(group, seconds=0, clock=lambda: passed)
    assert row == {"ours": "ours", "strongest": "strong", "rounds": 11, "times_as_fast": [1.5] * 3}
    for module in MODULES:
        for name, build in importlib.import_module(f"benchmarks.micro.bench_{module}").GROUPS.items():
            group = build()
            assert {group.ours, *group.baselines} <= {None, *group.candidates}, (module, name)
    del group
    with caplog.at_level(logging.CRITICAL, "consistency_ops"):  # they go without having run, and would say so
        gc.collect()


def test_host_benchmark_measures_every_phase_of_every_candidate():
    threads = torch.get_num_threads()
    rows = bench_host.measure(seconds=0, rounds=(4, 4))
    assert threads == torch.get_num_threads()
    assert {"hooks that do nothing", "preconditioner", "preconditioner, Python", "AdamW", "fused AdamW"} <= {
        row["name"] for row in rows
    }
    keeping = bench_host.measure(seconds=0, rounds=(4, 4), make=bench_host.keeping_candidates)
    assert {"preconditioner", "every=10", "every=10, Python", "decay=0.95"} < {row["name"] for row in keeping}
    loop = bench_host.measure_one_row(seconds=0, rounds=(2, 2))
    assert [row["name"] for row in loop] == ["Adam", "preconditioner", "preconditioner, Python"]
    assert loop[0]["added"] == 0 and all(row["ms"] > 0 for row in loop)


class Clocked:
    """A candidate whose step takes the given seconds, the first one ten times as long."""

    def __init__(self, *phases):
        self.phases, self.factor = phases, 10

    def run(self, x):
        factor, self.factor = self.factor, 1
        return [factor * seconds for seconds in self.phases]


def test_host_benchmark_tells_what_is_added_to_plain_steps_in_microseconds_a_layer():
    found = {"plain": Clocked(1.0, 2.0, 3.0), "ours": Clocked(1.1, 2.5, 3.0)}
    (row,) = bench_host.measure(seconds=0, rounds=(4, 4), make=lambda: found)
    assert row.pop("name") == "ours"
    expected = {"forward": 0.1e6, "backward": 0.5e6, "step": 0.0}
    assert row == pytest.approx({phase: us / bench_host.LAYERS for phase, us in expected.items()})


def test_host_benchmark_corrects_where_it_says_so():
    """The accelerator or not, the same gradients; hooks that do nothing leave them alone."""
    found, x = bench_host.candidates(), torch.randn(bench_host.BATCH, bench_host.WIDTH)
    for candidate in found.values():
        candidate.run(x)
    plain, hooks, ours, python = (
        found[name].model[-1].weight.grad
        for name in ("plain", "hooks that do nothing", "preconditioner", "preconditioner, Python")
    )
    assert torch.equal(plain, hooks) and not torch.allclose(plain, ours)
    torch.testing.assert_close(ours, python)


def test_slope_of_a_power_law():
    assert bench_scaling.slope([1, 2, 4], [3.0, 0.75, 0.1875]) == pytest.approx(-2)
    assert bench_scaling.slope([1], [3.0]) is None


def test_series_change_the_operation_count_by_the_expected_slope():
    for name, points in bench_scaling.series(1, 2).items():
        counts = [
            useful_flops([LayerShape(p.outputs, p.width)] * p.layers, p.rows, bench_scaling.CHUNK) / p.threads
            for p in points
        ]
        found = bench_scaling.slope([getattr(p, name) for p in points], counts)
        assert found == pytest.approx(bench_scaling.EXPECTED[name], abs=0.05), name


def test_scaling_benchmark_writes_its_json_and_plot(tmp_path, monkeypatch):
    target = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["bench_scaling", "--points", "2", "--seconds", "0", "--json", str(target)])
    bench_scaling.main()
    results = json.loads(target.read_text())
    assert [row["series"] for row in results["rows"]] == list(bench_scaling.EXPECTED)
    for row in results["rows"]:
        assert len(row["x"]) == len(row["ms"]) <= 2 and min(row["ms"]) > 0
        assert row["slope"] == pytest.approx(bench_scaling.slope(row["x"], row["ms"]))
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
