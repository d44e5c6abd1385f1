"""The experiments: every one runs, resumes and draws at a tiny size; tasks and certificates are what they say."""

import json
import sys
from unittest.mock import Mock

import pytest
import torch

import consistency_ops as co
from benchmarks.training import __main__ as command
from benchmarks.training import contractive, fit, glorot, init_tolerance, roa_depth, roa_memory, runner, tasks
from consistency_ops.nn import deep_mlp

TINY = dict(epochs=2, train=60, test=20, batch=20, iterations=2, pixel_epochs=1, n=1, hidden=8, width=8)
TINY |= dict(pool=2, steps=2, points=2, examples=60, validation=20, networks=2)


def images(name):
    """60 images of noise in the shape of a data set; 28x28 ones are cut to 8x8 where a test only needs an image."""
    if name is None:
        return None
    channels, size = {"mnist": (1, 28), "fashion-mnist": (1, 28), "cifar10": (3, 32), "digits": (1, 8)}[name]
    generator = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(60, channels, size, size, generator=generator)
    y = torch.randint(10, (60,), generator=generator)
    return fit.Split(x, y, x[:20], y[:20], 50.0)


def chosen(name, experiment):
    """The first run, and one that takes another branch."""
    names = [run for run in experiment.SETTINGS if "5000" not in run and "200" not in run]
    wanted = {
        "deep-narrow": ["relu, as released, depth 50"],
        "contractive": [
            "modulus, decay 0.001, clip",
            "modulus, decay 0.1, whiten, orthogonal",
            "relu, decay 0.004, rising",
        ],
        "modern": ["vit, modulus", "gpt, speed"],
        "narrow-search": ["relu, sgd2, depth 20, width 10", "modulus, sgd2, depth 20, width 10, noise"],
        "roa-memory": [
            "adding, roa, corrected",
            "copying, rnn",
            "psmnist, roa, both sides",
            "copying, roa, scaled",
            "adding, roa, scaled",
        ],
        "roa-pixels": ["both sides, ten epochs", "batch norm"],
        "pixelwise": ["im2col", "fft"],
        "noise": ["relu, depth 50, residual 0.01", "relu, depth 50, gradient 0.01"],
        "glorot": ["tanh, glorot"],
    }.get(name, names[1:2])
    return [names[0], *wanted]


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.EXPERIMENTS)
def test_every_experiment_runs_resumes_and_draws(name, tmp_path, monkeypatch, capsys):
    experiment = runner.load(name)
    runs = chosen(name, experiment)
    calls = []
    original = experiment.run
    monkeypatch.setattr(experiment, "run", lambda *args: calls.append(args[0]) or original(*args))
    monkeypatch.setattr(fit, "load", lambda data, size, directory: images(data))
    monkeypatch.setattr(sys, "argv", ["training", name])
    options = [f"--{key.replace('_', '-')}={TINY[key]}" for key in experiment.SIZE if key in TINY]
    arguments = [name, "--runs", *runs, *options, "--out", str(tmp_path)]
    command.main(arguments)
    assert calls == [experiment.SETTINGS[run] for run in runs]
    printed = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(run) for line in printed) for run in runs)
    figure = tmp_path / f"{name}.png"
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size < 150_000

    stored = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)["runs"]
    assert [record["run"] for record in stored] == runs
    for record in stored:
        assert {"settings", "size", "seed", "seconds", "date", "command", "versions"} <= set(record)

    command.main(arguments)  # all is there: nothing runs
    assert len(calls) == len(runs)
    command.main([*arguments, "--seeds", "0", "1"])
    assert len(calls) == 2 * len(runs)
    command.main([*arguments, "--plot", "--seeds", "5"])
    assert len(calls) == 2 * len(runs)
    size = {**experiment.SIZE, **{key: TINY[key] for key in experiment.SIZE if key in TINY}}
    store = runner.Store(tmp_path / f"{name}.json")
    first = experiment.SETTINGS[runs[0]]
    assert store.find(runs[0], first, size, 1) is not None
    assert store.find(runs[0], {**first, "other": 1}, size, 0) is None
    assert store.find(runs[0], first, {**size, "batch": 7}, 0) is None


def test_same_seed_same_result():
    experiment = runner.load("deep-mlp")
    size = {**TINY, "epochs": 1}
    curves = [
        experiment.run(experiment.SETTINGS["sgd2"], size, seed, images("mnist"), lambda text: None)["train_loss"]
        for seed in (3, 3, 4)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_a_store_replaces_a_run_and_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    store = runner.Store(path)
    for value in (1, 2):
        store.put({"run": "a", "settings": {"k": (1, 2)}, "size": {}, "seed": 0, "value": value})
    store.put({"run": "b", "settings": {}, "size": {}, "seed": 0, "value": 3})
    assert [r["value"] for r in runner.Store(path).records] == [2, 3]
    assert runner.Store(path).find("a", {"k": (1, 2)}, {}, 0)["value"] == 2
    assert list(runner.Store(path).results(["b", "a", "c"])) == ["b", "a"]

    wide = runner.Store(tmp_path / "wide.json", ["hidden"])
    for hidden, value in ((1, 1), (2, 2), (1, 3)):
        wide.put({"run": "a", "settings": {}, "size": {"hidden": hidden}, "seed": 0, "value": value})
    assert [r["value"] for r in wide.results(["a"])["a"]] == [2, 3]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put({"run": "c", "settings": {}, "size": {}, "seed": 0})
    assert [r["value"] for r in runner.Store(path).records] == [2, 3]


def test_command_line(capsys, tmp_path):
    command.main([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(runner.EXPERIMENTS)
    with pytest.raises(SystemExit, match=r"deep-mlp.json: holds no finished run of deep-mlp; run it without --plot"):
        command.main(["deep-mlp", "--plot", "--out", str(tmp_path)])
    for arguments, message in (
        (["nothing"], "invalid choice: 'nothing'"),
        (["deep-mlp", "--runs", "nothing"], "invalid choice: 'nothing'"),
        (["deep-mlp", "--epochs", "many"], "invalid int value: 'many'"),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_copying_task():
    u, target = tasks.copying(5, 30, torch.Generator().manual_seed(0))
    assert u.shape == (50, 5, 10) and target.shape == (50, 5)
    symbols = u.argmax(2)
    assert (u.sum(2) == 1).all() and (symbols[:10] < tasks.SYMBOLS).all()
    assert (symbols[10:39] == tasks.BLANK).all() and (symbols[39] == tasks.DELIMITER).all()
    assert (symbols[40:] == tasks.BLANK).all()
    assert (target[:40] == tasks.BLANK).all() and torch.equal(target[40:], symbols[:10])
    # Blanks known, symbols guessed: the baseline is that predictor's cross-entropy.
    logits = torch.full((50, 5, 10), -1e9)
    logits[:40, :, tasks.BLANK] = 0
    logits[40:, :, : tasks.SYMBOLS] = 0
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert float(loss) == pytest.approx(tasks.copying_baseline(30), rel=1e-5)


def test_adding_task():
    u, target = tasks.adding(4000, 40, torch.Generator().manual_seed(0))
    assert u.shape == (40, 4000, 2)
    assert (u[:20, :, 1].sum(0) == 1).all() and (u[20:, :, 1].sum(0) == 1).all()
    torch.testing.assert_close((u[..., 0] * u[..., 1]).sum(0), target)
    assert (target - 1).square().mean() == pytest.approx(tasks.ADDING_BASELINE, rel=0.05)


def test_pixels_of_all_images_have_one_order():
    x = torch.arange(2 * 784.0).view(2, 1, 28, 28)
    u = tasks.permuted_pixels(x)
    assert u.shape == (784, 2, 1) and not torch.equal(u[:, 0, 0], x[0].flatten())
    torch.testing.assert_close(u[:, 1] - u[:, 0], torch.full((784, 1), 784.0))
    assert torch.equal(u[:, 0, 0].sort().values, x[0].flatten())


def test_init_tolerance_says_which_epoch_left_the_recorded_band():
    errors = [0.30, 0.107, 0.06, 0.04, 0.036, 0.034, 0.03, 0.026, 0.026, 0.026] + [0.0195] * 10
    record = {"settings": {"std": 1.0}, "test_error": errors}
    assert init_tolerance.outside(record) == []
    assert init_tolerance.outside({**record, "test_error": errors[:5]}) == []
    assert init_tolerance.outside({**record, "test_error": [0.38, *errors[1:]]}) == [
        "epoch 1: 0.3800, recorded 0.277 to 0.319"
    ]
    assert [x[:8] for x in init_tolerance.outside({**record, "test_error": [*errors[:-1], 0.03]})] == ["epoch 20"]


def test_contractive_networks_are_contractive_and_decide_the_same():
    """Scaled by its own bound a network keeps decisions and certificates, and gradient attacks do not break them."""
    data, size = images("mnist"), {"epochs": 2, "batch": 20}
    record = contractive.run({"activation": "modulus", "depth": 3, "decay": 1e-3}, size, 0, data, lambda text: None)
    scaled = record["scaled"]
    assert -0.01 < scaled["plain"] < 0 and record["folded"] < record["plain"]
    assert scaled["test_error"] == record["test_error"][-1]
    assert scaled["certified"] == record["certified_folded"]
    assert record["plain"] == pytest.approx(sum(x for _, x in record["factors"]))

    model = deep_mlp(784, 10, width=32, depth=3, activation="modulus", init="he")
    for _ in range(3):
        model(data.train_x)
    bound = co.analysis.lipschitz_bound(model)
    x = data.test_x.clone().requires_grad_()
    logits = model.eval()(x)
    top = logits.topk(2).values
    (direction,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), x)
    radius = co.analysis.certified_radius(model, data.test_x, bound=bound.bound)
    steps = (0.999 * radius / direction.flatten(1).norm(dim=1)).float().view(-1, 1, 1, 1)
    assert (radius > 0).all()
    assert torch.equal(model(data.test_x - direction * steps).argmax(1), logits.argmax(1))


def test_mean_singular_value_of_a_linear_network_is_that_of_its_weights():
    model = deep_mlp(64, 10, width=20, depth=3, activation="tanh", normalization="none", init="orthogonal")
    for parameter in model[1].parameters():
        parameter.data.mul_(1e-4)  # small signals: tanh is the identity
    values = glorot.mean_singular_values(model, (torch.nn.Tanh,), torch.randn(4, 64))
    assert values == pytest.approx([1.0, 1.0], rel=1e-4)


def test_plain_network_is_a_network_without_filters():
    model = roa_depth.network({"kind": "mlp", "depth": 3}, {"width": 6}, 0)
    x = torch.randn(2, 6)
    expected = x
    for layer in model.layers:
        expected = torch.tanh(layer(expected))
    assert torch.equal(model.hidden(x), expected)


@pytest.mark.parametrize("steps", [30, 300])
def test_a_copying_network_that_starts_blank_answers_blank_and_stores_no_blanks(steps):
    settings = {**roa_memory.SETTINGS["copying, roa, scaled"], "steps": steps}
    model = roa_memory.Network(settings, 10, 16, 10, steps + 20)
    u, _ = tasks.copying(3, steps, torch.Generator().manual_seed(0))
    answers = model(u, last=False)
    assert answers.shape == ((steps + 20) * 3, 10)
    assert (answers.argmax(1) == tasks.BLANK).all()
    blanks = torch.nn.functional.one_hot(torch.full((steps, 3), tasks.BLANK), 10).float()
    assert torch.equal(model.recurrent(blanks)[1], torch.zeros(3, 16))
    states = model.scale * model.recurrent(u)[0]
    assert 0.1 < states.std() < 10


def test_a_scaled_network_learns_to_add_in_two_hundred_iterations(tmp_path):
    settings = {**roa_memory.SETTINGS["adding, roa, scaled"], "steps": 200}
    size = {**roa_memory.SIZE, "iterations": 200, "epochs": 10, "hidden": 64, "batch": 20}
    torch.manual_seed(0)
    outcome = roa_memory.run(settings, size, 0, None, runner.Ticker(Mock(), runner.Progress(tmp_path / "run.pt")))
    assert outcome["loss"][-1] < 0.2 * tasks.ADDING_BASELINE, outcome
    assert outcome["test_loss"] < 0.5 * tasks.ADDING_BASELINE, outcome


def test_the_error_on_images_takes_no_statistics_from_them():
    model = roa_memory.Network({**roa_memory.SETTINGS["psmnist, roa, scaled"]}, 1, 8, 10, 20)
    images, labels = torch.randn(20, 30, 1), torch.randint(10, (30,))
    model(images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    error = roa_memory.image_error(model, images, labels)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    alone = [roa_memory.image_error(model, images[:, i : i + 1], labels[i : i + 1]) for i in range(30)]
    assert sum(alone) / 30 == pytest.approx(error)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("roa-memory", "adding, roa, corrected"),
        ("roa-memory", "copying, lstm"),
        ("roa-memory", "psmnist, roa, corrected"),
        ("roa-memory", "adding, roa, both sides"),
        ("roa-memory", "adding, roa, scaled"),
        ("roa-memory", "copying, roa, scaled"),
        ("roa-pixels", "whiten"),
        ("roa-pixels", "both sides, ten epochs"),
        ("shapeset", "tanh, glorot"),
        ("modern", "gpt, modulus"),
        ("convnet", "adam, whiten"),
        ("convnet", "adam, whiten both, dct"),
        ("conditioning", "last BN, whitened"),
        ("convnet", "muon"),
        ("contractive", "modulus, decay 0.004, rising"),
        ("init-tolerance", "sgd2, 0.01"),
        ("roa-depth", "roa, depth 50000"),
        ("roa-depth", "roa, depth 50000, mnist 1400"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(name, run, tmp_path, monkeypatch):
    experiment = runner.load(name)
    if name == "roa-depth":  # as the deepest, with 12 layers
        monkeypatch.setattr(roa_depth, "DEEP", 6)
        monkeypatch.setitem(experiment.SETTINGS, run, {**experiment.SETTINGS[run], "depth": 12, "checkpoint": 4})
    monkeypatch.setattr(fit, "load", lambda data, size, directory: images(data))
    monkeypatch.setattr(sys, "argv", ["training", name])
    tiny = {**TINY, "epochs": 4, "iterations": 8, "pixel_epochs": 4, "pool": 7, "points": 4}
    options = [f"--{key.replace('_', '-')}={tiny[key]}" for key in experiment.SIZE if key in tiny]
    arguments = [name, "--runs", run, *options, "--out"]
    command.main([*arguments, str(tmp_path / "whole")])

    calls, original = [], runner.Ticker.__call__

    def tick(self, text):
        calls.append(text)
        original(self, text)
        if len(calls) == 2:
            raise Interrupted

    monkeypatch.setattr(runner.Ticker, "__call__", tick)
    with pytest.raises(Interrupted):
        command.main([*arguments, str(tmp_path / "parts")])
    (kept,) = (tmp_path / "parts" / "runs").iterdir()
    assert not (tmp_path / "parts" / f"{name}.json").exists()
    command.main([*arguments, str(tmp_path / "parts")])
    assert not kept.exists()  # it is finished
    whole, parts = (
        json.loads((tmp_path / part / f"{name}.json").read_text())["runs"][0] for part in ("whole", "parts")
    )
    differ = {"seconds", "cpu_seconds", "date", "command", "memory"}
    assert {k: v for k, v in whole.items() if k not in differ} == {k: v for k, v in parts.items() if k not in differ}


def test_what_another_run_kept_is_not_used(tmp_path):
    progress = runner.Progress(tmp_path / "one.pt", run="a", size={"epochs": 3})
    progress.save(epoch=1)
    assert runner.Progress(tmp_path / "one.pt", run="a", size={"epochs": 3}).load() == {"epoch": 1}
    assert runner.Progress(tmp_path / "one.pt", run="a", size={"epochs": 4}).load() is None
    assert runner.Progress(tmp_path / "none.pt", run="a").load() is None
