"""Changes that a script makes to model, optimizer and training loop between two steps or in the middle of one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.engine.capture_states import CaptureStates
from consistency_ops.preconditioner import Preconditioner
from support import processes
from support.training import assert_equal, backward, data, gradients, hooks_of, mlp, train


def replace_weight(model, optimizer, index, weight):
    """Replace a weight as scripts do that grow or prune a layer; the optimizer has as many parameters as before."""
    old, model[index].weight = model[index].weight, nn.Parameter(weight)
    for group in optimizer.param_groups:
        group["params"] = [model[index].weight if p is old else p for p in group["params"]]


def test_a_weight_that_is_replaced_in_the_optimizer_too():
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    replace_weight(model, optimizer, 2, torch.randn(16, 20))
    optimizer.zero_grad()
    backward(model, x, y)
    before = model[2].weight.grad.clone()
    optimizer.step()
    assert pre.stats()["layers"] == 3 and not torch.equal(model[2].weight.grad, before)


def test_parameters_that_change_places_between_optimizers():
    """One optimizer hands a layer to another; both keep the number of their parameters."""
    model, (x, y) = mlp(widths=(12, 12, 12, 5)), data()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2))
    a, b = Preconditioner(model, first), Preconditioner(model, second)
    backward(model, x, y)
    first.step()
    second.step()
    one, two = first.param_groups[0], second.param_groups[0]
    one["params"], two["params"] = two["params"], one["params"]
    for step in range(2):  # in the first one the new owners have seen no input
        model.zero_grad()
        backward(model, x, y)
        before = gradients(model)
        first.step()
        assert torch.equal(model[0].weight.grad, before[0]) and torch.equal(model[2].weight.grad, before[2]) == (
            not step
        )
        second.step()
        assert torch.equal(model[0].weight.grad, before[0]) == (not step)
    assert a.stats()["layers"] == b.stats()["layers"] == 1


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(every=3), dict(decay=0.5, every=3)], ids=str)
def test_a_weight_of_another_shape_in_place(options):
    """Structured pruning that assigns to ``weight.data``; a new optimizer is not needed for plain SGD."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, chunk=8, **options)
    train(model, optimizer, 2)
    model[0].weight.data, model[0].bias.data = model[0].weight.data[:15], model[0].bias.data[:15]
    model[2].weight.data = model[2].weight.data[:, :15].clone()
    for step in range(4):
        optimizer.zero_grad()
        backward(model, x, y)
        before = gradients(model)
        optimizer.step()
        if step > 0:
            assert pre.stats()["layers"] == 3
            assert all(not torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))
    assert pre._layers[1].capture.rows.shape[1] == 15


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(every=2)], ids=str)
def test_one_forward_pass_and_one_backward_pass_a_task(options):
    """Gradient surgery: the gradients of the tasks are taken one after the other, and then put together."""
    models = mlp(), mlp()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    pres = [Preconditioner(m, o, **options) for m, o in zip(models, optimizers, strict=True)]
    for step in range(3):
        x, y = data(seed=step)
        optimizers[0].zero_grad()
        backward(models[0], x, y)
        optimizers[0].step()
        losses = F.cross_entropy(models[1](x), y, reduction="none") / len(y)
        parts = []
        for loss in (losses[:10].sum(), losses[10:].sum()):
            optimizers[1].zero_grad()
            loss.backward(retain_graph=True)
            parts.append(gradients(models[1]))
        for parameter, a, b in zip(models[1].parameters(), *parts, strict=True):
            parameter.grad = a + b
        optimizers[1].step()
        assert pres[0].stats()["rows"] == pres[1].stats()["rows"] == {"0": 40, "2": 40, "4": 40}
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(every=2), dict(decay=0.5, every=2)], ids=str)
def test_layers_of_several_precisions_of_which_some_rest(options):
    """Each is computed in its own precision, whichever others have a gradient."""
    both, alone = (nn.ModuleList([nn.Linear(12, 5), nn.Linear(12, 5)]) for _ in range(2))
    for model in (both, alone):
        model[1].double()
        model[1].load_state_dict(both[1].state_dict())
        model[0].load_state_dict(both[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (both, *alone)]
    for model, optimizer in zip((both, *alone), optimizers, strict=True):
        # The same number among the layers as in the pair, so the same division.
        Preconditioner(both if model is both else alone, optimizer, chunk=4, **options)
    x, y = data()
    for step in range(5):
        for models in (both, alone):
            models[0](x).square().mean().backward()
            if step % 4 != 2:
                F.cross_entropy(models[1](x.double()), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(both.parameters(), alone.parameters())


def test_a_device_that_is_first_used_in_the_middle_of_a_step():
    states = CaptureStates(2)
    rows = states.on(torch.device("cpu"))
    states.step, states.paused = 3, False
    rows[0, 0] = 7
    other = states.on(torch.device("meta"))
    assert rows[0, 0] == 7 and other.shape == rows.shape


def test_a_step_that_the_optimizer_breaks_off():
    """The next step goes on as if the broken one had been done, and refreshes when it is due."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, every=2)

    def fail(*args):
        raise MemoryError

    for step in range(6):
        handle = optimizer.register_step_pre_hook(fail) if step in (0, 3) else None
        optimizer.zero_grad()
        backward(model, *data(seed=step))
        before = gradients(model)
        if handle is None:
            optimizer.step()
            assert pre.stats()["failed_chunks"] == 0
        else:
            with pytest.raises(MemoryError):
                optimizer.step()
            handle.remove()
        assert all(not torch.equal(a, b) for a, b in zip(before, gradients(model), strict=True)), step


def test_a_schedule_that_fails_leaves_gradients_and_rows_alone():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer, damping=lambda step: -1 if step == 1 else 0.1)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    backward(model, *data())
    before, weights = gradients(model), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="damping at step 1 must be a finite number >= 0, got -1"):
        optimizer.step()
    assert_equal(before, gradients(model))
    assert_equal(weights, model.parameters())
    pre.damping = 0.1
    optimizer.step()
    assert pre.stats()["rows"] == {"0": 40, "2": 40, "4": 40} and pre.stats()["layers"] == 3


def test_a_constructor_that_fails_leaves_no_hooks(monkeypatch):
    """Out of memory at the second layer, say."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, on, devices = hooks_of(model, optimizer), CaptureStates.on, []

    def limited(states, device):
        devices.append(device)
        if len(devices) == 2:
            raise MemoryError
        return on(states, device)

    monkeypatch.setattr(CaptureStates, "on", limited)
    with pytest.raises(MemoryError):
        Preconditioner(model, optimizer)
    assert hooks_of(model, optimizer) == before


def test_a_default_device_is_not_that_of_the_model():
    model, x, y = mlp(), *data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.device("meta"):
        pre = Preconditioner(model, optimizer, decay=0.5)
        for _ in range(2):
            backward(model, x, y)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state[model[0].weight]["consistency_step"].device.type == "cpu"
        assert optimizer.state[model[0].weight]["consistency_division"].device.type == "cpu"
    assert pre.steps == 2
    backward(model, x, y)
    optimizer.step()
    assert pre.stats()["layers"] == 3


def test_parameters_that_are_swapped_when_they_are_cast():
    """``module.to`` swaps DTensors, and with this option all parameters."""
    model, (x, y) = mlp(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for _ in range(2):  # the rows of the first are dropped: it is not followed by a step
        optimizer.zero_grad()
        backward(model, x.double(), y)
    optimizer.step()
    assert pre.stats()["rows"] == {"0": 40, "2": 40, "4": 40} and pre.stats()["layers"] == 3


def test_threads_that_share_a_model():
    """Their rows are pooled, as those of micro-batches."""
    model = nn.Linear(64, 3)
    pre = Preconditioner(model, max_rows=4096)
    x = torch.randn(64, 8, 500).transpose(0, 2)  # strided, so that a copy takes its time
    threads, calls = 4, 200

    def work():
        for _ in range(calls):
            model(x)

    processes.in_threads(*[work] * threads)
    capture = pre._layers[0].capture
    used, seen, stride = capture.state[0, :3].tolist()
    assert seen == threads * calls * 4000
    assert seen // stride <= used <= -(-seen // stride)


@pytest.mark.parametrize("options", [dict(decay=0.5), dict(every=2)], ids=str)
def test_a_neighbour_that_is_removed(options):
    """Two preconditioners of one optimizer: what the other one has stored stays."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (Preconditioner(model, optimizer, skip=skip, **options) for skip in ("4", ("0", "2")))
    train(model, optimizer, 3)
    before = second.state_dict()
    first.remove()
    after = second.state_dict()
    assert before["layers"].keys() == after["layers"].keys() == {"4"}
    assert before["layers"]["4"].keys() == after["layers"]["4"].keys()
    assert not any(key.startswith("consistency_") for key in optimizer.state[model[0].weight])
    optimizer.load_state_dict(optimizer.state_dict())
    assert second.steps == 3


def test_an_expanded_gradient_is_left():
    """Its rows are one row in memory, which would be corrected once for each."""
    model = nn.Linear(4, 3)
    pre = Preconditioner(model)
    model(torch.randn(5, 4)).sum().backward()
    model.weight.grad = torch.ones(1, 4).expand(3, 4)
    pre.step()
    assert (model.weight.grad == 1).all() and "gradient is sparse, expanded or a tensor subclass" in pre.summary()
