"""Averages and reused inverses; saving, resuming, loading what others saved."""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint_io
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from consistency_ops.engine.correction import Correction
from consistency_ops.preconditioner import Preconditioner
from support.training import (
    OPTIMIZERS,
    assert_equal,
    backward,
    data,
    gradients,
    mlp,
    train,
)


def test_every_reuses_the_inverse_and_captures_nothing_between():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model, every=3, chunk=8)
    changes = []
    for step in range(7):
        model.zero_grad()
        backward(model, x * (1 + step), y)
        captured = int(pre._layers[0].capture.count)
        assert captured == (40 if step % 3 == 0 else 0)
        grad = model[0].weight.grad.clone()
        pre.step()
        inverse = pre.state_dict()["layers"]["0"]["inverse"]
        changes.append(inverse)
        assert not torch.equal(grad, model[0].weight.grad)
    assert torch.equal(changes[0], changes[2]) and torch.equal(changes[3], changes[5])
    assert not torch.equal(changes[2], changes[3]) and not torch.equal(changes[5], changes[6])


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_average_is_gathered_in_20_steps_before_it_is_reused(decay):
    model = mlp()
    pre = Preconditioner(model, every=7, decay=decay, chunk=8)
    refreshed, inverse = [], torch.empty(0)
    for step in range(30):
        model.zero_grad()
        backward(model, *data(seed=step))
        captured = int(pre._layers[0].capture.count)
        pre.step()
        before, inverse = inverse, pre.state_dict()["layers"]["0"]["inverse"]
        assert captured == (0 if torch.equal(before, inverse) else 40)
        if captured:
            refreshed.append(step)
    assert refreshed == ([*range(20), 21, 28] if decay else [0, 7, 14, 21, 28])


def test_every_first_step_equals_the_one_launch():
    a, b = mlp().double(), mlp().double()
    x, y = data()
    for model, every in ((a, 1), (b, 2)):
        pre = Preconditioner(model, every=every, chunk=8)
        backward(model, x.double(), y)
        pre.step()
    for p, q in zip(gradients(a), gradients(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_inverses_are_made_and_kept_only_where_they_are_used_again(decay):
    """``every=1``: one launch inverts and corrects, with the bits of inverting and correcting apart."""

    class InStages(Preconditioner):
        def _make_correction(self, options, store, optimizer):
            return CorrectionInStages(options, store)

    class CorrectionInStages(Correction):
        def from_covariances(self, steps, covariances):
            self.remember_inverses(steps, *self.invert(steps, covariances))
            self.apply_stored(steps)

    models, calls = [mlp(), mlp()], []
    pres = [kind(m, chunk=8, decay=decay, every=1) for kind, m in zip((Preconditioner, InStages), models, strict=True)]
    for step in range(3):
        for model, pre in zip(models, pres, strict=True):
            model.zero_grad()
            backward(model, *data(seed=step))
            with Operators() as operators:
                pre.step()
            calls.append(operators.names)
        assert_equal(*map(gradients, models))
    stages = ["foreach_covariance", "foreach_inverse", "foreach_apply_"]
    fused = ["foreach_covariance", "foreach_correct_"] if decay else ["foreach_precondition_"]
    assert calls == [fused, stages if decay else fused] * 3
    assert all("inverse" not in entries for entries in pres[0].state_dict()["layers"].values())
    if decay:  # what an older version has kept is dropped
        pres[0].load_state_dict(pres[1].state_dict())
        assert pres[0].state_dict()["layers"]["0"].keys() == {"covariance", "weight", "division"}


class Operators(TorchDispatchMode):
    """Names of the operators of the package that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "consistency_ops":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_decay_is_a_bias_corrected_average():
    layer = nn.Linear(6, 4, bias=False).double()
    pre = Preconditioner(layer, decay=0.7, damping=0.1, scaling="absolute", chunk=256)
    average, weight = torch.zeros(6, 6).double(), 0.0
    for _ in range(4):
        x = torch.randn(20, 6).double()
        layer.zero_grad()
        layer(x).square().sum().backward()
        grad = layer.weight.grad.clone()
        pre.step()
        average, weight = 0.7 * average + 0.3 * x.T @ x / 20, 0.7 * weight + 0.3
        expected = grad @ torch.linalg.inv(average / weight + 0.1 * torch.eye(6).double())
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["input", "gradient", "no rows"])
def test_bad_steps_do_not_enter_the_average(where):
    layer = nn.Linear(6, 4)
    pre = Preconditioner(layer, decay=0.5)

    def step(bad):
        layer.zero_grad()
        layer.eval() if bad and where == "no rows" else layer.train()
        layer(torch.randn(20, 6)).square().sum().backward()
        if bad and where == "input":
            pre._layers[0].capture.rows[2, 1] = math.inf
        if bad and where == "gradient":
            layer.weight.grad[1, 2] = math.nan
        pre.step()
        state = pre.state_dict()["layers"][""]
        return state["covariance"].clone(), state["weight"].clone()

    step(bad=True)
    assert pre.state_dict()["layers"][""]["weight"] == 0
    before = step(bad=False)
    after = step(bad=True)
    assert_equal(before, after)
    assert layer.weight.grad.isfinite().sum() == (23 if where == "gradient" else 24)
    assert not torch.equal(step(bad=False)[0], after[0])


RESUME = [{}, dict(every=3), dict(decay=0.9), dict(decay=0.9, every=2), dict(max_rows=16)]


GATHERED = [(options, 4) for options in RESUME] + [(dict(decay=0.9, every=3), steps) for steps in (19, 20, 22)]


@pytest.mark.parametrize(("options", "steps"), GATHERED, ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_resume_is_bitwise(options, steps, name):
    def start(seed):
        model = mlp(seed)
        optimizer = OPTIMIZERS[name](model.parameters())
        Preconditioner(model, optimizer, chunk=8, seed=4, **options)
        return model, optimizer

    model, optimizer = start(0)
    train(model, optimizer, steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, first=steps)

    resumed, other = start(9)
    train(resumed, other, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 5, first=steps)
    assert_equal(model.parameters(), resumed.parameters())


@pytest.mark.parametrize(("options", "start"), GATHERED, ids=str)
def test_resume_without_an_optimizer(options, start):
    def steps(model, pre, first, count):
        for step in range(first, first + count):
            model.zero_grad()
            backward(model, *data(seed=step))
            pre.step()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    model = mlp()
    pre = Preconditioner(model, chunk=8, **options)
    steps(model, pre, 0, start)
    weights, state = copy.deepcopy(model.state_dict()), pickle.loads(pickle.dumps(pre.state_dict()))
    steps(model, pre, start, 3)
    resumed = mlp(3)
    again = Preconditioner(resumed, chunk=8, **options)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    steps(resumed, again, start, 3)
    assert_equal(model.parameters(), resumed.parameters())


@pytest.mark.parametrize("options", RESUME, ids=str)
@pytest.mark.parametrize("name", ["plain SGD", "Adam"])
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_distributed_checkpoint_keeps_the_state(options, name, tmp_path):
    def start(seed):
        model = mlp(seed)
        model.add_module("norm", nn.LayerNorm(5))
        optimizer = OPTIMIZERS[name](model.parameters()) if name == "Adam" else torch.optim.SGD(model.parameters(), 0.1)
        Preconditioner(model, optimizer, chunk=8, **options)
        return model, optimizer

    model, optimizer = start(0)
    train(model, optimizer, 4)
    weights, state = get_state_dict(model, optimizer)
    checkpoint_io.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    train(model, optimizer, 3, first=4)

    resumed, other = start(9)
    weights, state = get_state_dict(resumed, other)
    saved = {"model": weights, "optimizer": state}
    checkpoint_io.load(saved, checkpoint_id=tmp_path)
    set_state_dict(resumed, other, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(resumed, other, 3, first=4)
    assert_equal(model.parameters(), resumed.parameters())


def test_the_step_is_beside_every_parameter_that_was_updated():
    """Whatever becomes of the optimizer's entries between two steps."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pre = Preconditioner(model, optimizer, chunk=8)
    parameters = list(model.parameters())
    late = parameters[-1].requires_grad_(False)

    def step():
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
        steps = [optimizer.state[p].get("consistency_step") for p in parameters if p in optimizer.state]
        assert all(int(s) == pre.steps for s in steps)
        return len(steps)

    assert [step() for _ in range(3)] == [5, 5, 5]
    late.requires_grad_(True)
    assert step() == 6
    optimizer.state.clear()
    assert step() == 6
    del optimizer.state[parameters[2]]
    assert step() == 6
    optimizer.state = type(optimizer.state)(dict)
    assert step() == 6
    optimizer.state[parameters[1]].clear()  # one alone comes back with its turn
    for _ in parameters:
        backward(model, x, y)
        optimizer.step()
    assert all(int(optimizer.state[p]["consistency_step"]) == pre.steps for p in parameters)


def test_state_by_name_beside_an_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    saved = copy.deepcopy(pre.state_dict())
    train(model, optimizer, 2)
    pre.load_state_dict(saved)
    assert pre.steps == 2
    assert torch.equal(saved["layers"]["0"]["covariance"], optimizer.state[model[0].weight]["consistency_covariance"])
    fresh = mlp()
    pre = Preconditioner(fresh, torch.optim.Adam(fresh.parameters()), decay=0.9)
    with pytest.raises(RuntimeError, match="the optimizer must have its state first, got none"):
        pre.load_state_dict(saved)


def test_loading_foreign_state_is_refused():
    pre = Preconditioner(mlp())
    with pytest.raises(ValueError, match="state_dict version must be 1 or 2, got 7"):
        pre.load_state_dict({"version": 7, "layers": {}})
    with pytest.raises(ValueError, match=r"got list \('other'\)"):
        pre.load_state_dict({"version": 1, "step": 1, "layers": {"other": {}}})


def test_state_stays_float32_beside_half_precision_weights():
    model, (x, y) = mlp().bfloat16(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer, decay=0.9)
    backward(model, x.bfloat16(), y)
    optimizer.step()
    before = optimizer.state[model[0].weight]["consistency_covariance"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state[model[0].weight]["consistency_covariance"]
    assert after.dtype == torch.float32 and torch.equal(before, after)


def test_loading_a_state_saved_without_a_preconditioner():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    optimizer.load_state_dict(saved)
    assert pre.steps == 0
    train(model, optimizer, 2)


# Other versions, other options


def own_steps(model, pre, first, count):
    for step in range(first, first + count):
        model.zero_grad()
        backward(model, *data(seed=step))
        pre.step()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


@pytest.mark.parametrize("how", ["attached", "alone"])
def test_state_of_version_0_1_0_goes_on_as_it_did(how):
    """Saved by that release after five steps, with what its next three gave.

    It did not treat the first 20 steps of an average apart, so the state is moved to step 25.
    """
    saved = torch.load(Path(__file__).parent / "data" / "state_0.1.0.pt", weights_only=True)[how]
    model = mlp(seed=3, widths=(12, 8, 5))
    model.load_state_dict(saved["model"])
    if how == "attached":
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        pre = Preconditioner(model, optimizer, chunk=4, seed=4, decay=0.9, every=2)
        for entries in saved["optimizer"]["state"].values():
            entries["consistency_step"] = entries["consistency_step"] + 20
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, 3, first=5)
    else:
        pre = Preconditioner(model, chunk=4, seed=4, decay=0.9, every=2)
        saved["preconditioner"]["step"] += 20
        pre.load_state_dict(saved["preconditioner"])
        own_steps(model, pre, 5, 3)
    assert pre.steps == 28
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["later"][name], rtol=1e-5, atol=1e-6)


CHANGES = [dict(seed=5), dict(chunk=6), dict(group=1), dict(every=2)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("how", ["attached", "alone"])
def test_matrices_of_another_division_are_dropped(change, how, caplog):
    """The same steps as a preconditioner whose state was not loaded, but for the count; and the log says why."""
    options = dict(chunk=8, group=4, seed=4, every=4)
    source = mlp()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    pre = Preconditioner(source, optimizer, **options)
    train(source, optimizer, 5)
    model = copy.deepcopy(source)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    again = Preconditioner(model, other if how == "attached" else None, **{**options, **change})
    if how == "attached":
        other.load_state_dict(optimizer.state_dict())
    else:
        again.load_state_dict(pre.state_dict())
    assert again.steps == 5 and again.state_dict()["layers"] == {}
    (message,) = [record.getMessage() for record in caplog.records if record.name == "consistency_ops"]
    assert "saved with another seed, chunk, group or every" in message and ": 0, 2, 4." in message
    model.zero_grad()
    backward(model, *data())
    before = gradients(model)
    other.step() if how == "attached" else again.step()
    # Nothing is stored that fits, so the layers that waited begin with the rows of this step.
    corrected = gradients(model)
    assert all(gradient.isfinite().all() for gradient in corrected)
    assert not any(torch.equal(old, new) for old, new in zip(before[::2], corrected[::2], strict=True))


@pytest.mark.parametrize("options", [dict(decay=0.9), dict(every=4)], ids=str)
def test_a_layer_before_the_others_moves_their_divisions(options, caplog):
    body = mlp()
    pre = Preconditioner(body, chunk=8, **options)
    own_steps(body, pre, 0, 2)
    state = pre.state_dict()
    longer = nn.ModuleDict({"first": nn.Linear(3, 3), "body": mlp()})
    again = Preconditioner(longer, chunk=8, **options)
    again.load_state_dict({**state, "layers": {f"body.{name}": entries for name, entries in state["layers"].items()}})
    assert again.state_dict()["layers"] == {} and "with other layers before these" in caplog.text


@pytest.mark.parametrize("options", [dict(decay=0.9), dict(every=3), dict(decay=0.9, every=3)], ids=str)
def test_a_bias_that_is_frozen_between_inversions(options):
    """The stored inverse has one unit more than the gradient: it waits for the next one."""
    layer = nn.Linear(12, 5)
    pre = Preconditioner(layer, chunk=8, **options)
    pre.load_state_dict({"version": 2, "step": 21, "layers": {}})  # in the first 20 an average is inverted every time
    for step in range(4):
        layer.zero_grad(set_to_none=True)
        layer.bias.requires_grad_(step == 0)
        layer(data(seed=step)[0]).square().sum().backward()
        grad = layer.weight.grad.clone()
        pre.step()
        assert torch.equal(grad, layer.weight.grad) == ("every" in options and step in (1, 2))
