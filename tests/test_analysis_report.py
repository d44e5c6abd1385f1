"""``analyse``: the right advice for known troubles, and one self-contained page by one command."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.__main__ import main

HERE = Path(__file__).parent / "support"


class Page(HTMLParser):
    """Checks the nesting of tags and gathers what a page refers to."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attributes):
        self._seen(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._seen(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _seen(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href", "action", "data"):
                self.links.append(value)
            else:
                self.links += re.findall(r"url\((.*?)\)", value or "")


def check_page(path):
    text = Path(path).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.tags.count("svg") >= 4
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "@import" not in text
    return " ".join(page.text)


def titles(model, x, y=None, classes=10):
    y = torch.randint(classes, (len(x),)) if y is None else y
    result = co.analysis.analyse(model, x, loss=lambda z: F.cross_entropy(z, y))
    return {finding.title: finding for finding in result.findings}, result


def he(depth=8, act=nn.ReLU, gain=2.0):
    layers = [nn.Linear(20, 32), act()]
    for _ in range(depth):
        layers += [nn.Linear(32, 32), act()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0, math.sqrt(gain / layer.in_features))
        nn.init.zeros_(layer.bias)
    return model


def test_a_healthy_network_has_no_serious_finding():
    model = he(2, co.nn.Modulus, 1.0)
    for layer in model[::2]:
        nn.init.orthogonal_(layer.weight)
    found, result = titles(model, torch.randn(256, 20))
    assert all(finding.severity == 1 for finding in found.values())
    assert "training" in result.mode and result.samples == 256


def test_vanishing_and_exploding_gradients():
    found, _ = titles(he(10, gain=0.02), torch.randn(200, 20))
    assert next(iter(found)) == "Vanishing gradient"
    assert "From 22 back to 0" in found["Vanishing gradient"].measured
    assert "Signals of different scale" in found
    found, _ = titles(he(10, gain=12.0), torch.randn(200, 20))
    assert "Exploding gradient" in found and "Vanishing gradient" not in found
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 10))
    nn.init.constant_(model[0].bias, -1000.0)
    found, _ = titles(model, torch.randn(30, 20))
    assert found["No gradient"].layers == ["0"] and "Dead units" in found and "Saturated activations" in found


def test_saturation_and_its_advice():
    model = he(3, nn.Tanh, 400.0)
    found, _ = titles(model, torch.randn(100, 20))
    assert found["Saturated activations"].layers == ["1", "3", "5", "7"]
    assert "30 %" in found["Saturated activations"].rule


def test_conditioning_names_the_remedy_that_was_measured_to_help():
    x = torch.randn(500, 20) * torch.logspace(-2.5, 0, 20)  # scales alone: a normalisation is enough
    found, _ = titles(he(1), x)
    text = found["Ill-conditioned inputs"].advice
    assert found["Ill-conditioned inputs"].layers[0] == "0"
    assert "Best value for its cost: Preconditioner" in text or "Best value for its cost: both" in text
    mixed = torch.randn(500, 20) @ torch.randn(20, 20) @ torch.diag(torch.logspace(-2, 0, 20)) @ torch.randn(20, 20)
    found, result = titles(he(1), mixed)
    layer = result.conditioning.layers[0]
    assert layer.kappa("input", 0.8) > 50 * layer.kappa("preconditioned", 0.8)
    assert "Preconditioner(model, optimizer, damping=0.1, chunk=128)" in found["Ill-conditioned inputs"].advice
    # Too few rows: no verdict on the condition number.
    found, _ = titles(he(1), mixed[:10])
    assert "Too few samples to judge" in found and "Ill-conditioned inputs" not in found


def test_direction_image_and_curvature():
    found, _ = titles(he(1), torch.randn(300, 20) * 0.1 + 1)
    assert "0" in found["One direction dominates"].layers
    wide = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 10))
    found, _ = titles(wide, torch.randn(200, 4))
    assert found["Residual outside the image"].layers == ["input to 0"]
    assert "widens from 4 to 100" in found["Residual outside the image"].advice
    steep = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10))
    with torch.no_grad():
        steep[0].weight.mul_(1e-3)
    found, _ = titles(steep, 1000 * torch.randn(200, 10))
    assert found["No common learning rate"].layers == ["0", "2"]


def test_not_a_number_is_the_only_finding():
    model = he(2)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    found, result = titles(model, torch.randn(50, 20))
    assert list(found) == ["Not a number"] and found["Not a number"].layers == ["2"]
    Page(result.to_html())
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_monitors_do_not_change_what_the_model_would_do():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))
    weights = [p.detach().clone() for p in model.parameters()]
    titles(model, torch.randn(40, 20))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert int(model[1].num_batches_tracked) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def run(capsys, *options):
    status = main(["analyse", *map(str, options)])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        ("resnet", ("--input-shape", "3,16,16", "--samples", 16), ["layer2.0.downsample.0", "log10 of the bound"]),
        (
            "gpt",
            ("--tokens", "50,16", "--samples", 8),
            ["h.1.mlp.2", "There is no global bound for this network: wte (Embedding): a table of numbers"],
        ),
        ("with_data", (), ["analysis_networks:with_data, (40, 5)", "Tanh"]),
        ("NETWORK", ("--input-shape", "4", "--loss", "mse"), ["mse, random targets"]),
    ],
)
def test_a_strangers_network_by_one_command(network, options, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    out, numbers = tmp_path / "new" / "report.html", tmp_path / "report.json"
    imported = f"analysis_networks:{network}"
    status, text, error = run(capsys, "--import", imported, *options, "--out", out, "--json", numbers)
    assert status == 0 and str(out) in text
    assert [line.split("  ")[-1] for line in error.splitlines()][-1] == "the page" and "backward pass" in error
    page = check_page(out)
    for words in expected:
        assert words in page
    found = json.loads(numbers.read_text())
    assert {"statistics", "energy", "conditioning", "propagation", "findings"} <= set(found)


def test_the_default_network_and_a_checkpoint(tmp_path, capsys):
    pytest.importorskip("sklearn")
    from consistency_ops.cli import models

    bad = models.build("mlp", (1, 8, 8), 10, normalization="none", init="he", seed=5)
    with torch.no_grad():
        bad[3].bias.fill_(-100)
    torch.save({"state_dict": {f"module.{k}": v for k, v in bad.state_dict().items()}}, tmp_path / "last.pt")
    options = "--model", "mlp", "--normalization", "none", "--out", tmp_path / "a.html"
    status, before, _ = run(capsys, *options, "--init", "he")
    assert status == 0 and "Dead units" not in before
    status, after, _ = run(capsys, *options, "--checkpoint", tmp_path / "last.pt")
    assert status == 0 and "Dead units" in after
    assert "mlp, relu, normalization none, init 0.01" in check_page(tmp_path / "a.html")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--import", "analysis_networks"),
            "error: --import: must be package.module:callable, got 'analysis_networks'.",
        ),
        (("--import", "no_such_module:f"), "error: --import: no_such_module cannot be imported"),
        (
            ("--import", "analysis_networks:f"),
            "error: --import: analysis_networks:f: module 'analysis_networks' has no",
        ),
        (("--import", "analysis_networks:BasicBlock"), "must be callable without arguments"),
        (("--import", "analysis_networks:number"), "must return a torch.nn.Module"),
        (("--import", "analysis_networks:resnet"), "error: --import: say what the network takes: --input-shape"),
        (
            ("--import", "analysis_networks:resnet", "--input-shape", "5"),
            "error: the network cannot be examined on these",
        ),
        (("--import", "analysis_networks:gpt", "--inputs", "none.pt"), "error: --inputs: none.pt: cannot be read"),
        (
            ("--import", "analysis_networks:gpt", "--inputs", "samples.py"),
            "is no file of tensors that torch.save made",
        ),
        (("--checkpoint", "samples.py"), "error: --checkpoint: samples.py: is no file of tensors that torch.save made"),
        (("--checkpoint", "none.pt"), "error: --checkpoint: none.pt: cannot be read (No such file or directory)."),
        (("--out", "."), "error: .: cannot be written to; choose another --out."),
        (("--model", "mlp", "--layers", "x*"), "layers: 'x*' matches no module of the model"),
    ],
)
def test_mistakes_are_one_sentence(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    options = options if "--out" in options else (*options, "--out", tmp_path / "r.html")
    status, _, error = run(capsys, *options)
    assert status == 2
    *progress, last = error.splitlines()
    assert message in last and not any("error" in line for line in progress)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input-shape", "3,x"), "must be sizes like 3,32,32, got '3,x'"),
        (("--tokens", "5"), "must be VOCABULARY,LENGTH, got '5'"),
        (("--samples", "1"), "must be a whole number, at least 2, got '1'"),
        (("--seed", "99999999999999999999"), "must be a whole number in [0, 2^32)"),
        (("--threads", "1000000"), "must be at most 1024, got '1000000'"),
    ],
)
def test_wrong_options_end_with_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyse", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
