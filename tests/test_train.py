"""``python -m consistency_ops train``: fair, repeatable, honest about what it saw, and clear about every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import consistency_ops
from consistency_ops import __main__
from consistency_ops.cli import data, models, optimizers
from consistency_ops.cli import results as report
from consistency_ops.cli import train as cli
from consistency_ops.cli.comparison import Comparison, Settings
from consistency_ops.cli.console import Console
from consistency_ops.cli.errors import UserError
from consistency_ops.cli.files import write_whole
from consistency_ops.cli.training_loop import Contestant, Task
from support import processes

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
ALL = ",".join(optimizers.NAMES)


def command(*args):
    return [sys.executable, "-m", "consistency_ops", *args]


def run(*args, cwd):
    return processes.run(command(*args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def load(folder):
    """The report, which must be JSON as the standard has it, without NaN."""
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def small_task(batch_size=50, limit=200, device="cpu"):
    images = data.load("digits", limit=limit)
    return Task.on(torch.device(device), images, data.scaling(images.train_x, "standard"), batch_size)


def epoch(number, error, seconds):
    loss, error = (None, 0.9) if error is None else (1.0, error)
    return {"epoch": number, "train_loss": loss, "test_loss": loss, "test_error": error, "seconds": seconds}


def synthetic(**curves):
    """Return a report whose runs have these test errors, one second per epoch; None is a loss that is not finite."""
    runs = []
    for name, seeds in curves.items():
        for seed, errors in enumerate(seeds):
            epochs = [epoch(i, e, float(i)) for i, e in enumerate(errors, 1)]
            status = "diverged" if None in errors else "finished"
            runs.append({"seed": seed, "method": name, "lr": 0.1, "status": status, "epochs": epochs})
    result = {"runs": runs, "data": {"test_images": 1000}, "rate_search": {"trials": {}, "chosen": {}}}
    result["summary"] = report.summarise(result)
    return result


# ---- the whole command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small but complete run: every method, two seeds, with the rate search."""
    folder = tmp_path_factory.mktemp("train")
    options = ("--optimizer", ALL, "--epochs", "2", "--trial-epochs", "1", "--limit", "300", "--seeds", "1..2")
    done = run("train", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "runs" / "train"


def test_output(finished):
    done, folder = finished
    assert done.stderr == ""  # no progress bar, no warning where there is no terminal
    for seed in (1, 2):
        for number in (1, 2):
            for name in optimizers.NAMES:
                line = rf"seed {seed}  epoch +{number}/2  {re.escape(name)} +loss +\S+  test error +\S+ %  +\S+ s"
                assert len(re.findall(line, done.stdout)) == 1
    assert f"{len(optimizers.GRADIENT_RATES)} trials of 1 epoch for each method" in done.stdout
    assert re.search(r"^Final test error: lowest .*, highest ", done.stdout, re.M)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png"]


def test_report(finished):
    result = load(finished[1])
    assert result["format"] == report.FORMAT and result["status"] == "finished"
    assert result["config"]["seeds"] == [1, 2] and result["config"]["batch_size"] == 100
    assert result["data"]["train_images"] == 300 and result["data"]["image_shape"] == [1, 8, 8]
    assert result["build"]["torch"] == torch.__version__ and "library" not in result["build"]
    assert set(result["packages"]) == {"numpy", "matplotlib", "scikit-learn"}
    assert result["machine"]["threads"] == 1 and result["machine"]["processor"]
    assert list(result["methods"]) == list(optimizers.NAMES)
    assert "Preconditioner(12 of 12 layers" in result["methods"]["adam+pre"]
    assert [(r["seed"], r["method"]) for r in result["runs"]] == [(s, m) for s in (1, 2) for m in optimizers.NAMES]
    for one in result["runs"]:
        assert one["status"] == "finished" and [e["epoch"] for e in one["epochs"]] == [1, 2]
        assert all(0 <= e["test_error"] <= 1 and e["train_loss"] > 0 and e["test_loss"] > 0 for e in one["epochs"])
        assert 0 < one["epochs"][0]["seconds"] < one["epochs"][1]["seconds"]
        assert one["lr"] == result["rate_search"]["chosen"][one["method"]]
    assert set(result["summary"]["methods"]) == set(optimizers.NAMES)


def test_every_method_gets_the_same_trials(finished):
    search = load(finished[1])["rate_search"]
    assert set(search["trials"]) == set(optimizers.NAMES)
    for name, trials in search["trials"].items():
        assert len(trials) == len(optimizers.GRADIENT_RATES)
        assert all(len(trial["epochs"]) == 1 for trial in trials)
        errors = {t["lr"]: t["epochs"][-1]["validation_error"] for t in trials if t["status"] == "finished"}
        assert errors[search["chosen"][name]] == min(errors.values())
        assert not any("test_error" in epoch for trial in trials for epoch in trial["epochs"])
    assert [t["lr"] for t in search["trials"]["sgd"]] == [t["lr"] for t in search["trials"]["sgd+pre"]]
    assert [t["lr"] for t in search["trials"]["adam"]] == [t["lr"] for t in search["trials"]["adam+pre"]]


def test_picture(finished):
    with Image.open(finished[1] / "report.png") as image:
        assert image.width > 1000 and image.height > 700
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # curves, not an empty page


def test_same_seed_same_curves(tmp_path):
    options = ("--epochs", "2", "--limit", "300", "--lr", "0.01", "--seeds", "3")
    curves = []
    for name in ("a", "b"):
        assert run("train", *options, "--out", name, cwd=tmp_path).returncode == 0
        runs = load(tmp_path / name)["runs"]
        curves.append([{k: v for k, v in e.items() if k != "seconds"} for one in runs for e in one["epochs"]])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2 * len(optimizers.DEFAULT)


def test_preconditioning_needs_fewer_epochs(tmp_path):
    """The reason for the package, on real data: less than half the epochs to 20 % test error, at the same rate."""
    options = ("--optimizer", "sgd,sgd+pre", "--lr", "0.01", "--epochs", "12", "--seeds", "1")
    assert run("train", *options, "--out", "here", cwd=tmp_path).returncode == 0
    summary = load(tmp_path / "here")["summary"]
    index = summary["levels"].index(0.2)
    plain, corrected = (summary["methods"][name]["reached"][index] for name in ("sgd", "sgd+pre"))
    assert corrected is not None and (plain is None or corrected["epochs"] < plain["epochs"] / 2)


def test_interrupt_writes_what_was_done(tmp_path):
    options = ("train", "--epochs", "100000", "--lr", "0.01", "--out", "here")
    # A job in the background of a shell ignores the signal, and so would its children.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    started = processes.running(
        command(*options), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **heeds
    )
    with started as process:
        for line in process.stdout:
            if "epoch   2/" in line and "adam+pre" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130
    assert "interrupted" in rest and "Traceback" not in rest
    result = load(tmp_path / "here")
    assert result["status"] == "interrupted"
    assert all(len(one["epochs"]) >= 2 for one in result["runs"])
    assert (tmp_path / "here" / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("epochs", [0, 1, 9, 15, 18])
def test_interrupt_at_any_moment(epochs, tmp_path, monkeypatch, capsys):
    """The interrupt comes in the rate search (14 epochs here), between the seeds, or in the middle of one."""
    left, whole = iter(range(epochs)), Contestant.run_epoch

    def run_epoch(self, *args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Contestant, "run_epoch", run_epoch)
    options = ("--optimizer", "sgd,adam", "--epochs", "2", "--seeds", "1,2", "--limit", "200", "--model", "mlp")
    assert cli.main([*options, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    result = load(tmp_path)
    assert result["status"] == "interrupted"
    assert sum(len(one["epochs"]) for one in result["runs"]) == max(0, epochs - 14)
    assert (tmp_path / "report.png").exists() == (epochs > 14)


def test_killed_run_leaves_a_report(tmp_path):
    options = ("train", "--epochs", "100000", "--lr", "0.01", "--out", "here")
    started = processes.running(command(*options), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    with started as process:
        for _ in process.stdout:
            if (tmp_path / "here" / "report.json").exists() and load(tmp_path / "here")["runs"][0]["epochs"]:
                break
        process.kill()
    assert load(tmp_path / "here")["status"] == "running"


def test_divergence_is_a_result(tmp_path, capsys):
    options = ("--optimizer", "sgd,adam", "--lr", "sgd=1e30,adam=0.001", "--epochs", "2", "--seeds", "1")
    assert cli.main(["--normalization", "none", *options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "diverged: the loss is not finite any more (rate 1e+30)" in said
    assert "sgd: 1 of 1 runs diverged" in said
    plain, adam = load(tmp_path)["runs"]
    assert plain["status"] == "diverged" and len(plain["epochs"]) == 1 and plain["epochs"][0]["train_loss"] is None
    assert adam["status"] == "finished" and len(adam["epochs"]) == 2


def test_all_diverge(tmp_path, capsys):
    options = ("--normalization", "none", "--optimizer", "sgd", "--lr", "1e30", "--epochs", "2")
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    assert "sgd: 3 of 3 runs diverged" in capsys.readouterr().out


def test_without_a_command_it_reports_the_build(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout and "cpu_isa" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    """For example in `python -m consistency_ops | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = processes.run(
            [sys.executable, "-m", "consistency_ops"], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
    assert done.stderr == b""


def test_unknown_command_and_help(capsys):
    assert __main__.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "there is no command 'trian'" in error and "train" in error
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"consistency_ops {consistency_ops.__version__}\n"
    assert __main__.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["train", "--help"])
    assert capsys.readouterr().out.count("\n") > 50
    for spelling in ("analyse", "analyze"):
        with pytest.raises(SystemExit, match="0"):
            __main__.main([spelling, "--help"])
        assert "Examine one network" in capsys.readouterr().out


# ---- mistakes: one sentence, exit status 2, no traceback


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--optimizer lion", "--optimizer: must be a comma list of .*; got 'lion'"),
        ("--optimizer ,", "--optimizer: must be a comma list"),
        ("--optimizer sgd,sgd", "each method once"),
        ("--lr lion=1", "lion is not among the methods"),
        ("--lr sgd=x", "must be a number above 0, got 'x'"),
        ("--lr 0", "must be a number above 0, got '0'"),
        ("--lr inf", "must be a number above 0, got 'inf'"),
        ("--epochs 0", "must be a whole number, at least 1, got '0'"),
        ("--epochs 1.5", "must be a whole number, at least 1, got '1.5'"),
        ("--seeds 1..", "must be different whole numbers"),
        ("--seeds 2..1", "must be different whole numbers"),
        ("--seeds 1,1", "must be different whole numbers"),
        ("--seeds 1..99999999999999", "must be different whole numbers"),
        ("--seeds 4294967296", r"below 2\^32, got .4294967296."),
        ("--threads 1000000", "must be at most 1024, got '1000000'"),
        ("--init -1", "must be a number above 0, got '-1'"),
        ("--device tpu", "must be cpu or cuda"),
        ("--device cuda:99", "cuda:99 cannot be used here"),
        ("--chunk 20000", r"sgd\+pre: .*chunk must be None or in \[1, 16384\], got 20000"),
        ("--batch-size 2000", "--batch-size: must be at most 1437"),
        ("--limit 20", "--batch-size: must be at most 20"),
        ("--limit 100", "--batch-size: must be at most 80, as the rate search holds out a fifth of the images"),
        ("--data mnist", r"data/mnist: there is no such folder"),
        ("--data mnist --data-dir empty", r"empty/train-images-idx3-ubyte\[\.gz\]: there is no such file"),
        ("--data imagenet", "invalid choice: 'imagenet'"),
        ("--model transformer", "invalid choice: 'transformer'"),
        ("--out file", "file: cannot be made"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    try:
        status = cli.main(options.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(sentence, error)
    assert "Traceback" not in error


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("sklearn.datasets", "scikit-learn")])
def test_missing_package(module, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["--out", str(tmp_path / "out")]) == 2
    assert re.search(f"pip install {package}", capsys.readouterr().err)


# ---- fairness


def test_all_start_from_the_same_weights_and_see_the_same_batches():
    task = small_task()
    network = models.build("deep-mlp", (1, 8, 8), 10, seed=5)
    started = [Contestant.start(m, m.rates[0], network) for m in optimizers.choose_methods(list(optimizers.NAMES))]
    for contestant in started:
        for mine, wanted in zip(contestant.model.parameters(), network.parameters(), strict=True):
            assert torch.equal(mine, wanted) and mine is not wanted
    assert torch.equal(task.order(1, 2), task.order(1, 2))
    assert not torch.equal(task.order(1, 2), task.order(1, 3))
    assert not torch.equal(task.order(1, 2), task.order(2, 2))
    assert task.order(1, 1).unique().numel() == 200  # every image once


def test_the_rate_search_never_sees_the_test_images():
    task = small_task()
    trial = task.trial()
    assert len(trial.judge_x) == 40 and len(trial.train_x) == 160

    def rows(x):
        return sorted(map(bytes, x.flatten(1).numpy()))

    assert rows(torch.cat([trial.train_x, trial.judge_x])) == rows(task.train_x)


def test_methods_do_not_disturb_each_other():
    """A method's curve is the same alone and beside the others."""

    def curve(names):
        settings = Settings(optimizers.choose_methods(names), [1], 2, 1, dict.fromkeys(names, 0.01))
        result = {}
        Comparison(
            settings,
            small_task(),
            lambda seed: models.build("mlp", (1, 8, 8), 10, seed=seed),
            result,
            Console(),
            lambda: None,
        ).run()
        last = next(one for one in result["runs"] if one["method"] == "adam+pre")
        return [(e["train_loss"], e["test_error"]) for e in last["epochs"]]

    assert curve(["adam+pre"]) == curve(["sgd+pre", "sgd", "adam+pre", "sgd2"])


@pytest.mark.parametrize("model", models.MODELS)
@pytest.mark.parametrize("activation", models.ACTIVATIONS)
@pytest.mark.parametrize("normalization", models.NORMALIZATIONS)
def test_every_network_takes_a_step_with_every_method(model, activation, normalization):
    task = small_task(batch_size=100, limit=100)
    network = models.build(model, (1, 8, 8), 10, activation=activation, normalization=normalization, init="he", seed=1)
    for method in optimizers.choose_methods(list(optimizers.NAMES)):
        contestant = Contestant.start(method, 1e-3, network)
        result = contestant.run_epoch(task, 1, lambda loss: None)
        assert contestant.status == "running" and result["train_loss"] < 10
        for before, after in zip(network.parameters(), contestant.model.parameters(), strict=True):
            assert after.isfinite().all()
            if after.dim() > 1:
                assert not torch.equal(before, after), method.name


@pytest.mark.parametrize(("shape", "weights"), [((1, 28, 28), 3), ((3, 32, 32), 3), ((1, 8, 8), 3), ((2, 5, 1), 3)])
def test_networks_take_any_image_size(shape, weights):
    for name, layers in (("mlp", 3), ("deep-mlp", 12), ("convnet", 5)):
        network = models.build(name, shape, 7, seed=0)
        assert network(torch.randn(4, *shape)).shape == (4, 7)
        assert sum(p.dim() > 1 for p in network.parameters()) == layers


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_he_initialisation_keeps_the_scale(activation):
    network = models.build("deep-mlp", (1, 28, 28), 10, activation=activation, normalization="none", init="he", seed=0)
    assert 0.2 < network(torch.randn(1000, 1, 28, 28)).std() < 5
    assert models.build("mlp", (1, 28, 28), 10, init=0.5)[1].weight.std().item() == pytest.approx(0.5, rel=0.02)


# ---- the summary


def test_summary_of_known_curves():
    result = synthetic(fast=[[0.3, 0.08, 0.02], [0.5, 0.12, 0.04]], slow=[[0.8, 0.5, 0.3], [0.8, 0.5, 0.1]])
    summary = result["summary"]
    fast, slow = summary["methods"]["fast"], summary["methods"]["slow"]
    assert fast["final_test_error"] == pytest.approx({"mean": 0.03, "min": 0.02, "max": 0.04})
    assert slow["best_test_error"] == pytest.approx({"mean": 0.2, "min": 0.1, "max": 0.3})
    reached = dict(zip(summary["levels"], fast["reached"], strict=True))
    assert reached[0.4]["epochs"] == 1 and reached[0.1]["epochs"] == 2 and reached[0.03]["seconds"] == 3.0
    assert reached[0.02] is None
    shown = [summary["levels"][i] for i in summary["shown"]]
    assert shown == [0.2, 0.03]  # the hardest that both reached, and the hardest of any
    assert summary["headline"] == summary["shown"][0]
    assert report.verdict(result)[0] == "Epochs to 20 % test error: fast 2, slow 3."
    assert report.verdict(result)[1] == "Seconds to 20 % test error: fast 2.00 s, slow 3.00 s."
    assert len(report.table(summary)) == 3


def test_the_headline_is_what_most_methods_reached():
    result = synthetic(a=[[0.02]], b=[[0.04]], c=[[0.12]], d=[[0.3]])
    summary = result["summary"]
    assert summary["levels"][summary["headline"]] == 0.12
    assert [summary["levels"][i] for i in summary["shown"]] == [0.3, 0.12, 0.02]
    assert "a 1, b 1, c 1; not reached by d." in report.verdict(result)[0]


def test_summary_says_who_lost():
    result = synthetic(**{"sgd": [[0.5, 0.3, 0.1]], "sgd+pre": [[0.6, 0.5, 0.3]], "adam": [[0.7, None]]})
    words = " ".join(report.verdict(result))
    assert "not reached by adam" in words
    assert "it loses here" in words
    assert "highest adam" not in words and "adam: 1 of 1 runs diverged" in words
    assert result["summary"]["methods"]["adam"]["epochs"] == 1


def test_summary_without_a_finished_epoch():
    result = synthetic(sgd=[[None]], adam=[[]])
    assert result["summary"]["shown"] == [] and result["summary"]["headline"] is None
    assert report.verdict(result) == ["sgd: 1 of 1 runs diverged at rate 0.1."]
    assert len(report.table(result["summary"])) == 3


def test_an_unfinished_seed_does_not_shorten_the_others():
    result = synthetic(sgd=[[0.5, 0.3, 0.1], [0.6]])
    result["runs"][1]["status"] = "running"
    assert report.summarise(result)["methods"]["sgd"]["epochs"] == 3
    result["runs"] = result["runs"][1:]
    assert report.summarise(result)["methods"]["sgd"]["epochs"] == 1


def test_rates_at_the_edge_are_named():
    result = synthetic(sgd=[[0.5]], adam=[[0.4]])
    trials = [{"lr": 1.0}, {"lr": 0.1}, {"lr": 0.01}]
    result["rate_search"] = {"trials": {"sgd": trials, "adam": trials}, "chosen": {"sgd": 0.01, "adam": 0.1}}
    assert report.verdict(result)[-1].endswith("perhaps not at their best: sgd.")


def test_report_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report.write({"a": 1}, path)
    with pytest.raises(ValueError, match="JSON"):
        report.write({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_long_epochs_give_a_sign_of_life(capsys, monkeypatch):
    console = Console()
    console.start(100)
    console.where("sgd")
    console.tick(1.0)
    assert capsys.readouterr().out == ""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    console.tick(0.5)
    assert capsys.readouterr().out == "  ... sgd: step 2 of 100, loss 0.5\n"


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run("train", "--device", "cuda", "--epochs", "2", "--lr", "0.01", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(one["status"] == "finished" for one in load(tmp_path / "here")["runs"])


def test_files_are_written_whole(tmp_path):
    """A disk that is full in the middle leaves the file of before, and says so in a sentence."""
    path = tmp_path / "report.json"
    path.write_text("before")

    def fill(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"report\.json: cannot be written \(No space left on device\); choose another"):
        write_whole(path, fill)
    assert path.read_text() == "before"
    write_whole(path, lambda part: part.write_text("after"))
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
