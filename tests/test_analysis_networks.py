"""``analyse`` on the networks that people have: inputs by name, residual blocks, wide layers, and little time."""

import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.__main__ import main
from consistency_ops.analysis import examination
from consistency_ops.analysis.results import shortened
from consistency_ops.analysis.roles import by_role, comparable, role
from consistency_ops.analysis.time_limit import spread
from consistency_ops.analysis.weight_domination import largest_singular_value, power_iteration
from consistency_ops.cli import inputs
from support import processes

HERE = Path(__file__).parent / "support"


def analyse(model, *given, **options):
    classes = options.pop("classes", 10)
    return co.analysis.analyse(
        model, *given, loss=lambda z: F.cross_entropy(z, torch.arange(len(z)) % classes), **options
    )


def titles(result):
    return {finding.title: finding for finding in result.findings}


# ---- like with like


def test_roles():
    assert role("blocks.3.attn.qkv") == role("blocks.11.attn.qkv") != role("blocks.3.attn.proj")
    names = [SimpleNamespace(name=n) for n in ("stem", "b.0.up", "b.0.down", "b.1.up", "b.1.down", "head")]
    assert [[x.name for x in group] for group in by_role(names)] == [["b.0.up", "b.1.up"], ["b.0.down", "b.1.down"]]
    assert comparable(names[:1]) == [] and comparable([names[0], names[-1]]) == [[names[0], names[-1]]]
    assert (
        spread(5) == [0, 4, 2, 1, 3] and sorted(spread(17)) == list(range(17)) and spread(0) == [] and spread(1) == [0]
    )


class Residual(nn.Module):
    def __init__(self, width, inner, skip=True, zero=False):
        super().__init__()
        self.up, self.act, self.down, self.skip = nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), skip
        self.norm = nn.BatchNorm1d(width)
        if zero:
            nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        y = self.norm(self.down(self.act(self.up(x))))
        return x + y if self.skip else y


def stack(depth=4, width=16, inner=64, **options):
    blocks = OrderedDict(
        stem=nn.Linear(8, width), blocks=nn.Sequential(*[Residual(width, inner, **options) for _ in range(depth)])
    )
    return nn.Sequential(OrderedDict(**blocks, head=nn.Linear(width, 10)))


def test_a_skip_connection_that_is_there_is_not_advised():
    result = analyse(stack(), torch.randn(300, 8))
    assert "Residual outside the image" not in titles(result)
    around = {(b.start, b.end): b.bypassed for b in result.propagation.blocks}
    assert around["blocks.1.up", "blocks.1.down"] and around["blocks.1.down", "blocks.2.up"]
    assert around["blocks.3.down", "head"]  # the skip connection comes in before the head
    assert not around["head", "output"] and not around["input", "stem"]
    plain = {(b.start, b.end): b.bypassed for b in analyse(stack(skip=False), torch.randn(300, 8)).propagation.blocks}
    assert not any(plain.values())


def test_widening_as_bottlenecks_do_is_no_fault_and_a_narrow_waist_is():
    assert "Residual outside the image" not in titles(analyse(stack(skip=False, inner=64), torch.randn(300, 8)))
    waist = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 10))
    assert titles(analyse(waist, torch.randn(300, 8)))["Residual outside the image"].layers[0] == "1 to 2"


def test_a_parameter_that_is_used_twice_is_no_skip_connection():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    assert not any(b.bypassed for b in analyse(Tied(), torch.randn(50, 8), classes=8).propagation.blocks)


def test_branches_with_a_zero_scale_are_closed_and_not_broken():
    found = titles(analyse(stack(zero=True), torch.randn(300, 8)))
    assert "No gradient" not in found and found["Branches that are still closed"].severity == 1
    assert "blocks.0.down" in found["Branches that are still closed"].layers
    small = stack()
    for block in small.blocks:
        block.norm.weight.data.fill_(1e-6)  # a layer scale, as in ConvNeXt
    found = titles(analyse(small, torch.randn(300, 8)))
    assert "Weight domination" not in found and "4 branches" in found["Branches that are still closed"].measured
    cut = stack()
    cut.blocks[3].up.bias.data.fill_(-1e3)  # no scale: nothing comes through
    assert "blocks.3.up" in titles(analyse(cut, torch.randn(300, 8)))["No gradient"].layers


def test_a_stem_of_many_pixels_is_not_compared_with_a_head():
    """The mean square of the gradient of a pixel is some 10^8 times smaller than that of a logit, in any network."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(
        OrderedDict(body=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 10))
    )
    result = analyse(net, torch.randn(8, 3, 64, 64), synthetic=True)
    energy = {x.name: x.energy[-1] for x in result.energy.layers}
    assert energy["head"] > 1e5 * energy["body.0"]
    assert not {"Vanishing gradient", "Signals of different scale", "No common learning rate"} & set(titles(result))
    deep = stack(12, skip=False)
    for block in deep.blocks:
        block.norm.weight.data.fill_(0.2)
    deep.blocks[0].norm.weight.data.fill_(0.2)
    for block in deep.blocks:
        block.norm = nn.Identity()
        block.up.weight.data.mul_(0.2)
    assert "of one role" in titles(analyse(deep, torch.randn(300, 8)))["Vanishing gradient"].rule


def test_short_names_keep_the_number_of_the_block():
    names = ["bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.2.attention.output.dense", "bert.pooler"]
    assert shortened(names) == ["…11…self.query", "…2…output.dense", "pooler"]
    assert shortened(["blocks.4.2.se.conv_reduce", "head"]) == ["…4.2.se.conv_reduce", "head"]
    assert shortened(["a.b.1", "a.b.2"]) == ["1", "2"] and shortened(["fc"]) == ["fc"]


# ---- what a network is called with


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, *, x, scale=None):
        return self.b(self.a(x).relu() * (1.0 if scale is None else scale))


class ByDictionary(ByName):
    def forward(self, batch):
        return {"hidden": batch["x"], "logits": self.b(self.a(batch["x"]).relu())}


class Own(ByName):
    def forward(self, x, labels=None):
        logits = self.b(self.a(x).relu())
        return (
            {"loss": 7 * F.cross_entropy(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


class Broken(ByName):
    def forward(self, x):
        return self.a(x).no_such_method()


class Features(ByName):
    def forward(self, x):
        return {"last_hidden_state": self.a(x)}


X, Y = torch.randn(32, 8), torch.randint(3, (32,))


def by_name():
    return ByName(), {"x": X}, Y


def by_dictionary():
    return ByDictionary(), {"x": X}, Y


def own_loss():
    return Own(), {"x": X, "labels": Y}


def broken():
    return Broken(), (X,), Y


def features():
    return Features()


def tuple_of_two():
    return Own(), (X, Y)


def run(capsys, tmp_path, monkeypatch, *options):
    monkeypatch.chdir(Path(__file__).parent)
    out = tmp_path / "page.html"
    status = main(["analyse", *map(str, options), "--out", str(out)])
    said = capsys.readouterr()
    return status, said.out, said.err, out.read_text(encoding="utf-8") if out.exists() else ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("by_name", ["x (32, 8)", "Propagation", "input → a"]),
        ("by_dictionary", ["{x (32, 8)}", "Propagation"]),
        ("own_loss", ["the network&#x27;s own", "labels (32,)"]),
        ("tuple_of_two", ["the network&#x27;s own", "(32, 8), (32,)"]),
    ],
)
def test_inputs_by_name_dictionaries_and_own_losses(name, words, capsys, tmp_path, monkeypatch):
    status, _, error, page = run(capsys, tmp_path, monkeypatch, "--import", f"test_analysis_networks:{name}")
    assert status == 0 and "backward pass" in error
    assert all(word in page for word in words), [word for word in words if word not in page]


def test_options_that_draw_inputs_by_name(capsys, tmp_path, monkeypatch):
    options = "--import", "test_analysis_networks:Own", "--input", "x=8", "--input", "labels=tokens:3,1"
    assert run(capsys, tmp_path, monkeypatch, *options)[0] == 2  # labels have one dimension too many
    options = "--import", "test_analysis_networks:ByName", "--input", "x=8", "--input", "scale=8", "--samples", 50
    status, _, _, page = run(capsys, tmp_path, monkeypatch, *options)
    assert status == 0 and "x (50, 8), scale (50, 8)" in page and "random targets" in page
    status, _, _, page = run(
        capsys, tmp_path, monkeypatch, "--import", "test_analysis_networks:features", "--input-shape", 8
    )
    assert status == 0 and "mse of last_hidden_state, random targets" in page
    for text in ("x", "x=a", "x=tokens:5", "3=4"):
        with pytest.raises(SystemExit):
            main(["analyse", "--import", "test_analysis_networks:Own", "--input", text])


def test_a_network_that_does_not_run_gets_a_page_that_says_where(capsys, tmp_path, monkeypatch):
    status, text, _, page = run(capsys, tmp_path, monkeypatch, "--import", "test_analysis_networks:broken")
    assert status == 0 and "does not run on these inputs: AttributeError" in text
    assert "no_such_method" in page and "test_analysis_networks.py, line" in page and "Weights" in page


def test_what_networks_say_of_their_inputs():
    config = SimpleNamespace(vocab_size=100, max_position_embeddings=12, is_encoder_decoder=False)
    language = SimpleNamespace(config=config, main_input_name="input_ids")
    assert inputs._suggested(language) == ("tokens", [100, 12])
    assert inputs._suggested(SimpleNamespace(pretrained_cfg={"input_size": (3, 224, 224)})) == ("normal", [3, 224, 224])
    audio = SimpleNamespace(config=SimpleNamespace(num_mel_bins=80), main_input_name="input_features")
    assert inputs._suggested(audio) == ("normal", [80, 3000]) and inputs._suggested(nn.Linear(2, 2)) is None

    class Decoding(nn.Module):
        config = SimpleNamespace(vocab_size=100, is_encoder_decoder=True)

        def forward(self, input_ids, decoder_input_ids=None, labels=None):
            pass

    def completed(named):
        return inputs._completed(Decoding(), named, 4, torch.Generator())

    assert completed({})["decoder_input_ids"].shape == (4, 64) and list(completed({"labels": X})) == ["labels"]
    assert inputs.arguments({"x": X}, ByName()) == ((), {"x": X})
    assert inputs.arguments({"y": X}, ByName()) == (({"y": X},), {})


def test_as_many_samples_as_the_time_allows():
    wide = nn.Sequential(nn.Linear(1000, 4000), nn.Linear(4000, 1000))
    x = torch.randn(4000, 1000)
    fit = [inputs.affordable(wide, (x,), {}, len(x), seconds) for seconds in (1, 2, 1e9)]
    assert 2 < fit[0] < fit[1] < fit[2] == 4000 and abs(fit[1] - 2 * fit[0]) <= 1
    assert inputs.affordable(wide, (), {"input": x}, len(x), 1e-9) == 2
    norm = nn.Sequential(nn.BatchNorm1d(6))
    inputs.affordable(norm, (torch.randn(9, 6),), {}, 9, 1.0)
    assert int(norm[0].num_batches_tracked) == 0 and norm.training


# ---- little time, and parts that fail


def hard(width=600):
    return nn.Sequential(
        nn.Linear(8, width), nn.Hardsigmoid(), nn.Linear(width, width), nn.Hardsigmoid(), nn.Linear(width, 10)
    )


def test_an_operation_without_a_second_derivative():
    result = analyse(hard(), torch.randn(32, 8))
    blocks = {b.start: b for b in result.propagation.blocks}
    assert blocks["0"].method == "gradient" and blocks["0"].gain > 0 and blocks["0"].rank != blocks["0"].rank
    assert blocks["2"].method == "exact" and blocks["input"].method == "exact"
    small = analyse(hard(300), torch.randn(32, 8)).propagation.blocks[1]
    assert small.method == "exact" and small.sigma_max > 0
    assert "gradient" in result.to_html()


def test_little_time_leaves_out_what_it_names():
    model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(30)], nn.Linear(200, 10))
    result = analyse(model, torch.randn(300, 200), seconds=1e-6)
    assert len(result.conditioning.layers) == 31 and not any(x.input[-1] for x in result.conditioning.layers)
    assert "left out" in result.failed["conditioning"] and "left out" in result.failed["propagation"]
    first, *lines = str(result).splitlines()
    assert first == repr(result) and first.startswith("Analysis(") and len(first) < 120
    assert len(lines) == len(result.findings) + len(result.failed)
    assert any(line.startswith("conditioning could not be measured: ") for line in lines)
    page = result.to_html()
    assert page.count("Not measured, or not everywhere") >= 4 and "Gradient energy" in page
    assert result.lipschitz.log_bound >= analyse(model, torch.randn(300, 200)).lipschitz.log_bound


@pytest.mark.parametrize("part", ["propagation", "lipschitz_bound"])
def test_a_part_that_fails_does_not_cost_the_page(part, monkeypatch):
    def fails(*_, **__):
        raise KeyError("lost")

    monkeypatch.setattr(examination, part, fails)
    result = analyse(hard(20), torch.randn(32, 8), seconds=60.0)
    assert result.failed[part.removesuffix("_bound")] == "KeyError: 'lost'"
    assert "KeyError" in result.to_html() and result.conditioning.layers[0].input[-1]
    with pytest.raises(KeyError):
        analyse(hard(20), torch.randn(32, 8))


def test_a_layer_that_cannot_be_measured_does_not_cost_the_pass(monkeypatch):
    monkeypatch.setattr(co.analysis.activation_statistics.__globals__["ActivationRecorder"], "_forward", None)
    result = analyse(hard(20), torch.randn(32, 8), seconds=60.0)
    assert "could not be measured (TypeError" in result.failed["activation_statistics"]
    assert "could not be measured" in result.to_html()


def test_spectra_of_some_units_and_of_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 10))
    with co.analysis.conditioning(model, max_units=64) as monitor:
        model(torch.randn(500, 300)).square().mean().backward()
    first = monitor.result().layers[0]
    assert (len(first.spectrum("input")), len(first.spectrum("gradient"))) == (64, 64)
    assert (first.inputs, first.outputs) == (300, 200)
    with pytest.raises(ValueError, match="max_units must be at least 1"):
        co.analysis.conditioning(model, max_units=0)
    # Channels of different groups may be alike: no weight sees both.
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    with co.analysis.conditioning(depthwise) as monitor:
        depthwise(torch.randn(4, 1, 9, 9).expand(-1, 6, -1, -1)).square().mean().backward()
    assert monitor.result().layers[0].kappa() < 1.001
    with co.analysis.conditioning(depthwise, max_units=4) as few:
        depthwise(torch.randn(4, 6, 9, 9)).square().mean().backward()
    assert len(few.result().layers[0].spectrum("input")) == 4


def test_the_rough_norm_is_near_the_true_one():
    for shape in ((300, 500), (500, 300), (70, 2000), (20, 30), (80, 10, 3, 3)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        rough, true = float(power_iteration(weight)), float(largest_singular_value(weight))
        assert 0.9 * true <= rough <= 1.001 * true
    assert float(power_iteration(torch.zeros(200, 200))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_timm(name, tmp_path):
    try:
        import timm  # noqa: F401
    except Exception as error:  # a torchvision of another torch raises what it likes
        pytest.skip(f"timm does not import here: {error}")
    (tmp_path / "nets.py").write_text(
        f"def net():\n    import timm\n    return timm.create_model({name!r}, num_classes=10)\n"
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "consistency_ops",
        "analyse",
        "--import",
        "nets:net",
        "--out",
        "o.html",
    ]
    done = processes.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "prevents training." not in page.partition("<h2>Layer by layer")[0].replace("Nothing here prevents", "")
    assert "Residual outside the image" not in page
