"""The model and the optimizer stay what they were, and nothing outlives its owner."""

import ast
import copy
import gc
import io
import itertools
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.preconditioner import Preconditioner
from support import processes
from support.training import (
    assert_equal,
    backward,
    data,
    hooks_of,
    mlp,
    train,
)


def test_model_gets_no_buffers_and_gradients_keep_their_place():
    model = mlp()
    keys = set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer, decay=0.5)
    backward(model, *data())
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    optimizer.step()
    assert set(model.state_dict()) == keys and not list(model.buffers())
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses


def test_deepcopy_neither_copies_nor_feeds_the_preconditioner():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    average = copy.deepcopy(model)
    backward(average, *data())
    assert [int(layer.capture.count) for layer in pre._layers] == [0, 0, 0]
    assert not any(isinstance(t, torch.Tensor) and t.numel() > 10_000 for t in gc.get_referents(*average.modules()))
    backward(model, *data())
    optimizer.step()
    assert pre.stats()["layers"] == 3
    assert copy.deepcopy(pre) is None  # of a module that holds it


def test_torch_save_of_the_whole_model():
    model = mlp()
    pre = Preconditioner(model)
    plain = io.BytesIO()
    torch.save(mlp(), plain)
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < plain.tell() + 4096
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, y = data()
    assert torch.equal(loaded(x), model(x))
    backward(loaded, x, y)
    assert [int(layer.capture.count) for layer in pre._layers] == [40, 40, 40]  # only the rows of model(x)


def attributes(model):
    return [set(vars(owner)) for owner in (*model.modules(), *model.parameters())]


@pytest.mark.parametrize("options", [{}, dict(decay=0.9), dict(every=2)], ids=str)
def test_remove_leaves_no_trace_of_any_kind_of_layer(options):
    model = Block()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = hooks_of(model, optimizer), attributes(model)
    pre = Preconditioner(model, optimizer, **options)
    train(model, optimizer, 3)
    assert pre.stats()["layers"] == 8 and len(pre._layers) == 9  # out_proj
    x = data()[0]
    pre.remove()
    assert (hooks_of(model, optimizer), attributes(model)) == before
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    assert not vars(x)
    fresh = copy.deepcopy(model)
    fresh(x).sum().backward()
    train(model, optimizer, 1)


def test_remove_leaves_no_trace():
    model, twin = mlp(), mlp()
    optimizer, plain = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin))
    before = hooks_of(model, optimizer)
    pre = Preconditioner(model, optimizer, decay=0.9)
    train(model, optimizer, 2)
    pre.remove()
    assert hooks_of(model, optimizer) == before
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state.values())
    assert train(model, optimizer, 3) == train(twin, plain, 3)
    assert_equal(model.parameters(), twin.parameters())


def test_a_forgotten_preconditioner_takes_its_hooks_along():
    model = mlp()
    pre = Preconditioner(model)
    before = hooks_of(model, torch.optim.SGD(model.parameters()))[0]
    assert sum(before) > 0
    del pre
    gc.collect()
    assert sum(hooks_of(model, torch.optim.SGD(model.parameters()))[0]) == 0


def test_the_model_is_not_kept_alive():
    model = mlp()
    pre = Preconditioner(model)
    backward(model, *data())
    pre.step()
    reference_to_model = weakref.ref(model[0])
    del model
    gc.collect()
    assert reference_to_model() is None and "gone" in pre.summary()
    pre.step()


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Block(nn.Module):
    """Every kind of capture: shared inputs, several weights in one module, convolutions, a module called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv1d(4, 6, 3, padding=1), nn.ConvTranspose1d(6, 4, 3, padding=1, groups=2)
        self.q, self.k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.up(F.relu(self.conv(x[:, None].expand(-1, 4, -1))))
        x = self.q(self.q(x)) * self.k(x)
        return self.head(self.attention(x, x, x)[0].mean(1))


def grown(options, leak=0):
    """Run by a process of its own: what two windows of 500 steps add to its tensors, objects and resident bytes.

    ``leak``: bytes that are lost in each step, to see that the measure notices them.
    """
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pre = Preconditioner(model, optimizer, max_rows=64, chunk=8, **options)
    lost = []
    if leak:
        optimizer.register_step_post_hook(lambda *_: lost.append(bytearray(leak)))

    def census():
        gc.collect()
        tensors = sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())
        return tensors, len(gc.get_objects()), resident()

    train(model, optimizer, 100)
    pre.stats()
    counts = [census()]
    for _ in range(2):
        train(model, optimizer, 500)
        pre.stats()
        counts.append(census())
    return [[after - before for before, after in zip(*window, strict=True)] for window in itertools.pairwise(counts)]


LIMIT = 2**18  # bytes in 500 steps; the loop alone shows up to 36 KiB


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
@pytest.mark.parametrize("leak", [0, 1000])
@pytest.mark.parametrize("options", [{}, dict(decay=0.9, every=3)], ids=str)
def test_memory_does_not_grow_over_a_thousand_steps(options, leak):
    # The heap of a process that has run other tests settles for a long time: a fresh one, with one arena.
    here = Path(__file__).resolve()
    program = f"from {here.stem} import grown; print(grown({options}, {leak}))"
    found = processes.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1])]),
            "MALLOC_ARENA_MAX": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    windows = ast.literal_eval(found.stdout)
    smallest = [min(column) for column in zip(*windows, strict=True)]  # a leak shows in both windows
    assert smallest[0] <= 0 and smallest[1] <= (500 if leak else 25)
    assert (smallest[2] >= LIMIT) == bool(leak)


def test_no_memory_growth():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    Preconditioner(model, optimizer, decay=0.9, every=2)
    train(model, optimizer, 4)

    def tensors():
        gc.collect()
        return sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())

    before = tensors()
    train(model, optimizer, 20)
    assert tensors() <= before
