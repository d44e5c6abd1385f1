"""Trouble that others bring: graphs on gradients, parameters given twice or not at all, states that do not fit."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.optim import SGD2
from consistency_ops.preconditioner import Preconditioner
from support import processes
from support.training import assert_equal, backward, data, gradients, mlp, train

STORED = [{}, dict(decay=0.9), dict(every=2)]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("options", STORED, ids=str)
def test_gradients_that_carry_a_graph(options):
    """backward(create_graph=True): corrected all the same, and without a part in the graph."""
    models = mlp(), mlp()
    pres = [Preconditioner(model, **options) for model in models]
    x, y = data()
    for _ in range(2):
        for model, create_graph in zip(models, (False, True), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward(create_graph=create_graph)
        assert models[1][0].weight.grad.requires_grad
        for pre in pres:
            pre.step()
        assert pres[1].stats()["layers"] == 3
        assert_equal(gradients(models[0]), [grad.detach() for grad in gradients(models[1])])


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
def test_a_parameter_that_the_optimizer_has_twice_is_corrected_once():
    model, twin = mlp(), mlp()
    optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    pre, twin_pre = Preconditioner(model, optimizer), Preconditioner(twin)
    for m in (model, twin):
        backward(m, *data())
    optimizer.step()
    twin_pre.step()
    assert pre.stats()["layers"] == 3
    assert_equal(gradients(model), gradients(twin))


def test_models_without_anything_to_correct_are_refused():
    with pytest.raises(ValueError, match="must have a layer to correct, got none"):
        Preconditioner(nn.ReLU())
    with pytest.raises(ValueError, match="empty parameter list"):
        SGD2(nn.ReLU(), lr=0.1)


@pytest.mark.parametrize("options", STORED, ids=str)
def test_a_load_that_the_optimizer_refuses_changes_nothing(options):
    """The state of another model: torch raises, and training goes on as if nobody had tried."""

    def start():
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, Preconditioner(model, optimizer, chunk=8, **options)

    other = mlp(widths=(12, 5))
    foreign = torch.optim.Adam(other.parameters())
    Preconditioner(other, foreign, **options)
    train(other, foreign, 2)
    found = []
    for tries in (False, True):
        model, optimizer, pre = start()
        train(model, optimizer, 3)
        if tries:
            with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
                optimizer.load_state_dict(copy.deepcopy(foreign.state_dict()))
        assert pre.steps == 3
        train(model, optimizer, 3, first=3)
        found.append(list(model.parameters()))
    assert_equal(*found)


OUT_OF_MEMORY = """
import resource, torch, consistency_ops as co

def train(x, **options):
    model = torch.nn.Linear(x.shape[1], 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = co.Preconditioner(model, optimizer, **options)
    model(x).sum().backward()
    optimizer.step()

x = torch.randn(8, 12_000)
torch.set_num_threads(1)
train(x, max_rows=8)  # the threads and buffers of a step
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, -1))
many = x[:1].expand(100_000, -1)  # takes no memory, but its captured rows would
for inputs, options in ((many, dict(max_rows=100_000)), (x, dict(chunk=None, decay=0.9, every=2, max_rows=8))):
    try:
        train(inputs, **options)
    except torch.OutOfMemoryError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_has_torchs_type_and_says_what_needs_less():
    """Searches for a batch size (Lightning's, Accelerate's) look for torch.OutOfMemoryError."""
    done = processes.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, step = done.stdout.splitlines()
    assert "out of memory for the input rows of a layer, 4578 MiB for 100000 rows of 12000 units: a smaller" in rows
    assert "out of memory" in step and ("MiB of workspace" in step or "a smaller chunk" in step)
