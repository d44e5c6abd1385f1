"""Arguments, refusals and reports."""

import math

import pytest
import torch
from torch import nn
from training import (
    hooks_of,
    mlp,
    train,
)

from consistency_ops.preconditioner import Preconditioner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(damping=-1.0), "damping must be a finite number >= 0, got -1.0"),
        (dict(damping=math.nan), "damping must be a finite number >= 0, got nan"),
        (dict(damping="0.1"), "damping must be a finite number >= 0, got '0.1'"),
        (dict(scaling="mean"), "scaling must be 'trace' or 'absolute', got 'mean'"),
        (dict(chunk=0), r"chunk must be in \[1, 256\], got 0"),
        (dict(chunk=257), r"chunk must be in \[1, 256\], got 257"),
        (dict(chunk=64.0), r"chunk must be in \[1, 256\], got 64.0"),
        (dict(chunk=8, group=9), r"group must be None or in \[1, 8\], got 9"),
        (dict(max_rows=0), "max_rows must be an integer >= 1, got 0"),
        (dict(decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (dict(every=0), "every must be an integer >= 1, got 0"),
        (dict(seed=-1), "seed must be an integer in"),
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
    assert pre.stats() == {
        "steps": 1, "layers": 2, "uncorrected": 0, "chunks": 6, "failed_chunks": 0,
        "max_damping": pytest.approx(0.1), "rows": {"0": 10, "3": 50},
    }  # fmt: skip
