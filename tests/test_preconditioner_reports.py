"""Arguments, refusals and reports."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.preconditioner import Preconditioner
from support.training import (
    backward,
    data,
    hooks_of,
    mlp,
    train,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(damping=-1.0), "damping must be a finite number >= 0, got -1.0"),
        (dict(damping=math.nan), "damping must be a finite number >= 0, got nan"),
        (dict(damping="0.1"), "damping must be a finite number >= 0, got '0.1'"),
        (dict(scaling="mean"), "scaling must be 'trace' or 'absolute', got 'mean'"),
        (dict(chunk=0), r"chunk must be None or in \[1, 16384\], got 0"),
        (dict(chunk=16385), r"chunk must be None or in \[1, 16384\], got 16385"),
        (dict(chunk=64.0), r"chunk must be None or in \[1, 16384\], got 64.0"),
        (dict(chunk=8, group=9), r"group must be None or in \[1, 8\], got 9"),
        (dict(max_rows=0), "max_rows must be an integer >= 1, got 0"),
        (dict(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (dict(every=0), "every must be an integer >= 1, got 0"),
        (dict(seed=-1), "seed must be an integer in"),
        (dict(keep_norm=1), "keep_norm must be True or False, got 1"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match="Preconditioner: " + message):
        Preconditioner(mlp(), **options)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        Preconditioner([mlp()])
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got float"):
        Preconditioner(mlp(), 0.1)
    with pytest.raises(ValueError, match="must have a layer to correct, got none"):
        Preconditioner(nn.ReLU())
    with pytest.raises(ValueError, match=r"got none[\s\S]*not in the optimizer"):
        Preconditioner(mlp(), torch.optim.SGD(mlp().parameters(), lr=0.1))
    model = mlp()
    pre = Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="must be called only when no optimizer was given"):
        pre.step()


def test_a_gradient_is_not_corrected_twice():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Preconditioner(model, optimizer, skip="4")
    before = hooks_of(model, optimizer)
    with pytest.raises(ValueError, match=r"must not have another Preconditioner for the same layer .* got one for '0'"):
        Preconditioner(model, optimizer)
    assert hooks_of(model, optimizer) == before
    second = Preconditioner(model, optimizer, skip=["0", "2"], damping=1.0)
    train(model, optimizer, 1)
    assert first.stats()["layers"] == 2 and second.stats()["layers"] == 1
    first.remove()
    Preconditioner(model, optimizer, skip="4")


def test_a_weight_that_stops_being_a_parameter():
    """Parametrization and pruning replace the weight by a computed tensor."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    nn.utils.parametrizations.weight_norm(model[2])
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 2 and "weight is no parameter any more" in pre.summary()


def test_the_summary_says_that_whitened_coordinates_want_another_rate():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    whitened = Preconditioner(model, optimizer, mode="whiten", skip="4")
    assert repr(whitened).startswith("Preconditioner(2 of 3 layers, mode='whiten', damping=0.1, scaling='trace'")
    assert "keep_norm" not in repr(whitened)
    assert "best learning rate was a third to six times" in whitened.summary().splitlines()[-1]
    whitened.remove()
    free = Preconditioner(model, optimizer, mode="whiten", skip="4", keep_norm=False)
    assert "keep_norm=False" in repr(free)
    assert "best learning rate was a half to twice" in free.summary().splitlines()[-1]
    free.remove()
    both = Preconditioner(model, optimizer, mode="whiten", skip="4", outputs=True)
    assert "a sixth to eighteen times" in both.summary() and both.summary().endswith("betas=(0.9, 0.95).")
    both.remove()
    for other in (torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), torch.optim.SGD(model.parameters(), 0.1)):
        assert "betas" not in Preconditioner(model, other, mode="whiten", skip="4", outputs=True).summary()
        Preconditioner.of(other)[0].remove()
    corrected = Preconditioner(model, optimizer, skip=["0", "2"])
    assert "mode" not in repr(corrected)
    assert "learning rate" not in corrected.summary()


def test_input_by_keyword():
    layer = nn.Linear(4, 3)
    pre = Preconditioner(layer)
    layer(input=torch.randn(6, 4)).sum().backward()
    pre.step()
    assert pre.stats()["rows"] == {"": 6}


def test_step_without_any_gradient_does_nothing():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    pre = Preconditioner(model, optimizer)
    optimizer.step()
    assert all(not state for state in optimizer.state.values())
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 3


def test_reports():
    model = nn.Sequential(nn.Linear(200, 30), nn.ReLU(), nn.Unflatten(1, (6, 5)), nn.Conv1d(6, 4, 3, groups=2))
    pre = Preconditioner(model, chunk=64)
    assert repr(pre) == "Preconditioner(2 of 2 layers, damping=0.1, scaling='trace', chunk=64, max_rows=4096)"
    assert "waiting for the first step" in pre.summary()
    model(torch.randn(10, 200)).sum().backward()
    pre.step()
    lines = [line.split() for line in pre.summary().splitlines()[1:]]
    assert lines == [
        ["0", "Linear", "201", "->", "4", "of", "51", "10", "ok"],
        ["3", "Conv1d", "2", "x", "4", "->", "1", "of", "4", "50", "ok"],
    ]
    stats = pre.stats()
    assert {k: v for k, v in stats.items() if "condition" not in k} == {
        "steps": 1, "layers": 2, "uncorrected": 0, "coverage": 1.0, "chunks": 6, "failed_chunks": 0,
        "max_damping": pytest.approx(0.1), "rows": {"0": 10, "3": 50}, "rows_seen": {"0": 10, "3": 50},
        "failed": {}, "damping": {"0": pytest.approx(0.1), "3": pytest.approx(0.1)},
    }  # fmt: skip
    assert stats["max_condition"] == max(stats["condition"].values()) and list(stats["condition"]) == ["0", "3"]
    assert pre.stats(condition=False)["condition"] == {}


@pytest.mark.parametrize("scaling", ["trace", "absolute"])
@pytest.mark.parametrize("options", [{}, dict(every=3), dict(decay=0.8)], ids=str)
def test_condition_numbers_are_those_of_a_dense_computation(options, scaling):
    """This holds two steps after the last inversion, and after a forward pass, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 8), nn.Unflatten(1, (4, 2)), nn.Conv1d(4, 4, 1))
    model[4] = nn.Conv1d(4, 4, 1, groups=2, bias=False)
    pre = Preconditioner(model, damping=0.05, scaling=scaling, chunk=256, **options)
    inputs, average, weight = {}, {}, 0.0
    for i in (0, 2, 4):
        model[i].register_forward_pre_hook(lambda m, args, i=i: inputs.update({i: args[0].detach().double()}))
    for step in range(3):
        model.zero_grad()
        model(torch.randn(30, 9) * 3).square().sum().backward()
        if step == 0 or "decay" in options or not options:
            decay = options.get("decay", 0.0)
            weight = decay * weight + 1 - decay
            for i, x in inputs.items():
                parts = [x] if i < 4 else [part.movedim(1, -1).flatten(0, 1) for part in x.chunk(2, 1)]
                if i < 4:
                    parts = [torch.cat([x, torch.ones(30, 1)], 1)]
                a = torch.stack([part.T @ part / len(part) for part in parts])
                average[i] = decay * average.get(i, 0) + (1 - decay) * a
        pre.step()
    expected = {}
    for i, a in average.items():
        a = a / weight
        if scaling == "trace":
            a = a / a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        expected[str(i)] = torch.linalg.cond(a + 0.05 * torch.eye(a.shape[1]).double(), p=1).max().item()
    assert pre.stats()["condition"] == pytest.approx(expected, rel=1e-3)


def test_condition_of_a_failed_chunk_is_infinite():
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3))
    pre = Preconditioner(model, damping=0.0)
    model(torch.zeros(5, 6)).sum().backward()
    pre.step()
    stats = pre.stats()
    assert stats["failed"] == {"0": 1, "1": 1} and stats["condition"] == {} and stats["coverage"] == 0.0


def test_rows_seen_and_coverage():
    model = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, max_rows=16, bias=False, skip="2")
    train(model, optimizer, 1)
    stats = pre.stats()
    assert stats["rows_seen"] == {"0": 40} and 8 <= stats["rows"]["0"] <= 16
    assert stats["coverage"] == pytest.approx(240 / (260 + 40 + 105))


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = float(value), step


def test_scalars_for_tensorboard():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    empty, writer = Writer(), Writer()
    pre.log_to(empty)
    assert empty.scalars["preconditioner/layers"] == (0, 0) and "preconditioner/max_damping" not in empty.scalars
    train(model, optimizer, 2)
    pre.log_to(writer)
    assert writer.scalars["preconditioner/failed_chunks"] == (0, 2) and writer.scalars["preconditioner/coverage"] == (
        1,
        2,
    )
    assert {f"preconditioner/{key}/{i}" for key in ("rows", "damping", "condition") for i in "024"} <= set(
        writer.scalars
    )
    assert all(math.isfinite(value) for value, _ in writer.scalars.values())
    pre.log_to(writer, step=70, prefix="second order")
    assert writer.scalars["second order/max_condition"][1] == 70


def test_writer_of_torch(tmp_path):
    SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    with SummaryWriter(tmp_path) as writer:
        pre.log_to(writer)
    assert any(tmp_path.iterdir())


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "consistency_ops"]


def test_nothing_is_logged_when_all_is_well(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 3)
    pre.stats()
    assert messages(caplog) == []


def test_unseen_layers_are_named_once(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer)
    body = model[2]
    model.forward = lambda x: model[4](F.relu(F.linear(F.relu(model[0](x)), body.weight, body.bias)))
    train(model, optimizer, 3)
    (message,) = messages(caplog)
    assert "1 of 3 layers with a gradient have seen no input, so it was left as it is: 2." in message
    assert "torch.compiler.reset()" in message


def test_failed_chunks_are_logged_once(caplog):
    """The first step logs them by itself, later ones when stats() is called."""
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    for step in range(3):
        model.zero_grad()
        backward(model, x, y)
        if step == 0:
            pre._layers[1].capture.rows[3, 3] = math.nan
        pre.step()
        pre.stats()
    (message,) = messages(caplog)
    assert "1 chunks could not be inverted" in message and "as they are: 2." in message and "raise damping" in message


def test_weights_tied_later_are_logged_once(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5, bias=False)

        def forward(self, x):
            return self.head(self.body(self.embedding(x.argmax(1) % 5)))

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer)
    model.head.weight = model.embedding.weight
    train(model, optimizer, 3)
    (message,) = messages(caplog)
    assert "weights were tied after the Preconditioner was constructed" in message and ": head." in message


@pytest.mark.parametrize("options", [{}, dict(every=2)], ids=str)
def test_the_condition_of_a_chunk_that_was_given_up_is_infinite(options):
    """The other layers' are finite, and so is the trace scale of this one: the mean of its finite entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 8, bias=False), nn.Linear(8, 4, bias=False))
    pre = Preconditioner(model, chunk=128, group=1, **options)
    x = 10 * torch.randn(1024, 512)
    x[0, 5] = math.nan
    model[0](x)
    model[1](torch.randn(20, 8))
    for layer in model:
        layer.weight.grad = torch.randn_like(layer.weight)
    pre.step()
    found = pre.stats()["condition"]
    assert found["0"] == math.inf and 1 < found["1"] < math.inf


@pytest.mark.parametrize("options", [{}, dict(decay=0.5)], ids=str)
def test_the_condition_of_a_layer_whose_bias_another_optimizer_has(options):
    """Muon takes matrices only: the matrices have no unit for the bias, although the layer has one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 4))
    twin = nn.Sequential(nn.Linear(128, 4, bias=False))
    x, found = torch.randn(50, 128), []
    for m in (model, twin):
        optimizer = torch.optim.SGD([m[0].weight], lr=0.1)
        pre = Preconditioner(m, optimizer, chunk=128, **options)
        m(x).sum().backward()
        optimizer.step()
        found.append(pre.stats()["condition"]["0"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
