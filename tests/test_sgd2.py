"""SGD2 and the selection of learning rates, against arXiv 1708.00631 as released."""

import copy
import io
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.nn import BatchRMSNorm
from consistency_ops.optim import SGD2, select_learning_rate
from consistency_ops.preconditioner import Preconditioner


class Model(nn.Module):
    """A convolution, a hidden layer and a head, in float64."""

    def __init__(self, hidden=20):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, hidden), nn.Linear(hidden, 5)
        self.double()

    def forward(self, x):
        self.seen = [x, (y := F.relu(self.conv(x)).flatten(1)), (z := F.relu(self.hidden(y)))]
        return self.head(z)


def data(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=generator).double(), torch.randint(5, (n,), generator=generator)


def solve(weight, bias, rows, damping, positions=1):
    """One layer's corrected (weight, bias): the bias is unit 0, as in the released code; copies of it are averaged."""
    taps = weight[0, 0].numel()
    matrix = weight.flatten(2).permute(2, 0, 1).flatten(0, 1) if taps > 1 else weight.flatten(1)
    matrix = torch.cat([bias.repeat(taps)[:, None], matrix], 1) / positions
    x = torch.cat([torch.ones(len(rows), 1).double(), rows], 1)
    solved = torch.linalg.solve(x.T @ x / len(x) + damping * torch.eye(x.shape[1]).double(), matrix.T).T
    new_bias, new = solved[:, 0].view(taps, -1).mean(0), solved[:, 1:]
    if taps > 1:
        new = new.view(taps, *weight.shape[:2]).permute(1, 2, 0)
    return new.reshape(weight.shape), new_bias


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("hidden", [20, 300])  # the kernels; torch.linalg for the head's 301 units
def test_steps_are_those_of_the_paper(hidden, reduction):
    lr, momentum, decay, damping = 0.3, 0.9, 1e-2, 0.7
    model = Model(hidden)
    optimizer = SGD2(model, lr=lr, momentum=momentum, weight_decay=decay, damping=damping, conv_reduction=reduction)
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in weights]
    for t in range(1, 4):
        x, y = data(seed=t)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows = [model.seen[0].movedim(1, -1).flatten(0, -2), *model.seen[1:]]
        gradients = []
        for i, layer in enumerate((model.conv, model.hidden, model.head)):
            positions = 16 if i == 0 and reduction == "mean" else 1
            gradients += solve(layer.weight.grad, layer.bias.grad, rows[i].detach(), damping, positions)
        optimizer.step()
        for w, m, g in zip(weights, buffers, gradients, strict=True):
            m.mul_(momentum).sub_((1 - momentum) * g).sub_(decay * w if w.dim() > 1 else 0)
            w.add_(lr * m / (1 - momentum**t))
        for p, w in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-8, atol=1e-9)
    assert optimizer.preconditioner.stats()["layers"] == 3


def test_wide_layers_are_left_unless_divided():
    model = nn.Sequential(nn.Linear(600, 8), nn.Linear(8, 4))
    x = torch.randn(30, 600)
    for chunk, layers in ((None, 1), (100, 2)):
        optimizer = SGD2(model, lr=0.1, chunk=chunk)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = model[0].weight.grad.clone()
        optimizer.step()
        assert torch.equal(before, model[0].weight.grad) == (chunk is None)
        assert optimizer.preconditioner.stats()["layers"] == layers
        summary = optimizer.preconditioner.summary()
        assert ("601 units, more than max_size=500" in summary) == (chunk is None)
        assert ("601 -> 7 of 86" in summary) == (chunk is not None)
        optimizer.preconditioner.remove()


def test_state_is_saved_and_resumed_bitwise():
    def steps(model, optimizer, first, count):
        for seed in range(first, first + count):
            optimizer.zero_grad()
            F.cross_entropy(model(data(seed=seed)[0]), data(seed=seed)[1]).backward()
            optimizer.step()

    model = Model()
    optimizer = SGD2(model, lr=0.1, chunk=16, max_size=16)
    steps(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    steps(model, optimizer, 3, 3)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = Model()
    other = SGD2(resumed, lr=0.5, chunk=16, max_size=16)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    steps(resumed, other, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=0.0), "lr must be a finite number > 0, got 0.0"),
        (dict(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (dict(weight_decay=-1.0), "weight_decay must be a finite number >= 0"),
        (dict(damping=-0.5), "damping must be a finite number >= 0, got -0.5"),
        (dict(max_size=0), "max_size must be an integer >= 1, got 0"),
        (dict(chunk=300), r"chunk must be None or in \[1, 256\], got 300"),
        (dict(conv_reduction="max"), "conv_reduction must be 'sum' or 'mean', got 'max'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SGD2(Model(), **{"lr": 0.1, **options})


# Selection of learning rates


class Noisy(nn.Module):
    """Everything that a trial may change: parameters, running statistics, random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), BatchRMSNorm(16), nn.Dropout(0.2), nn.Linear(16, 3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        jitter = random.random() + np.random.rand()
        return self.norm(self.body(x)) * (1 + 1e-3 * jitter)


def batches(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 32, 10, generator=generator)
    return [(a, a[:, :3].argmax(1)) for a in x]


def loss_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def everything(model, optimizer):
    """All state as one flat list of tensors and numbers."""
    state = optimizer.state_dict()["state"]
    values = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    values += [v for p in sorted(state) for _, v in sorted(state[p].items())]
    values += [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]
    return copy.deepcopy(values)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


OPTIMIZERS = {
    "SGD2": lambda m: SGD2(m, lr=0.1, chunk=8, max_size=12),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Adam, preconditioned", "Adam, whiten", "SGD, decay"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "fresh"])
def test_selection_restores_every_bit(name, warm):
    model = Noisy()
    optimizer = OPTIMIZERS[name.split(",")[0]](model)
    pre = None
    options = dict(chunk=8, decay=0.9 if "decay" in name else 0.0, every=2)
    options |= dict(mode="whiten", decay=0.9) if "whiten" in name else {}
    if "," in name:
        pre = Preconditioner(model, optimizer, **options)
    loss = loss_of(model)

    def step(batch):
        def closure():
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            return value

        optimizer.step(closure)

    if warm:
        for batch in batches(3):
            step(batch)
    before, addresses = everything(model, optimizer), [p.data_ptr() for p in model.parameters()]
    steps = pre.steps if pre is not None else None
    rate = select_learning_rate(model, optimizer, loss, batches(), candidates=(0.1, 0.01, 0.001))
    after = everything(model, optimizer)
    assert len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert rate in (0.1, 0.01, 0.001) and all(group["lr"] == rate for group in optimizer.param_groups)
    assert pre is None or pre.steps == steps

    # and training goes on as if nothing had been tried
    twin, plain = copy.deepcopy(model), None
    plain = OPTIMIZERS[name.split(",")[0]](twin)
    if pre is not None:
        Preconditioner(twin, plain, **options)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for batch in batches(3, seed=5):
        step(batch)
    torch.set_rng_state(randomness[0])
    random.setstate(randomness[1])
    np.random.set_state(randomness[2])
    optimizer, loss = plain, loss_of(twin)
    for batch in batches(3, seed=5):
        step(batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_selection_takes_the_smallest_last_loss():
    """The loss of a trial is that of its last batch, before its update."""
    expected = {}
    for rate in (0.5, 0.1, 0.02):
        model = nn.Linear(10, 3)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for batch in batches()[:4]:
            optimizer.zero_grad()
            loss = loss_of(model)(batch)
            loss.backward()
            optimizer.step()
        expected[rate] = loss.item()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    chosen = select_learning_rate(
        model, optimizer, loss_of(model), iter(batches()), candidates=tuple(expected), iterations=4
    )
    assert chosen == min(expected, key=expected.get)


def test_selection_with_a_rate_that_falls():
    """Up to the rate in a twentieth of the steps, then in a line to nearly 0; the last batch makes no step."""
    model = nn.Linear(10, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    used = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    options = dict(candidates=(0.1,), iterations=41, decay=True)
    select_learning_rate(model, optimizer, loss_of(model), batches(41), **options)
    assert used[:2] == [0.05, 0.1]
    assert len(used) == 40
    assert used[2:] == pytest.approx([0.1 * (40 - i + 1) / 39 for i in range(3, 41)])
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_selection_of_one_rate_for_two_optimizers_in_whitened_coordinates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() == 1]
    both = [torch.optim.Muon(matrices, lr=0.3), torch.optim.AdamW(others, lr=0.3)]
    pre = Preconditioner(model, both, mode="whiten")
    loss = loss_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    rate = select_learning_rate(model, both, loss, batches(), candidates=(1e-9, 0.1))
    assert rate == 0.1
    assert [group["lr"] for one in both for group in one.param_groups] == [0.1, 0.1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert pre.steps == 0
    with pytest.raises(ValueError, match="at least one optimizer"):
        select_learning_rate(model, [], loss, batches())
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got int"):
        select_learning_rate(model, [both[0], 3], loss, batches())


def test_selection_reads_no_more_batches_than_it_uses():
    source = iter(batches(6))
    model = nn.Linear(10, 3)
    select_learning_rate(model, torch.optim.SGD(model.parameters(), lr=1.0), loss_of(model), source, iterations=4)
    assert len(list(source)) == 2


def test_not_finite_loses_and_later_searches_stay_below_the_first():
    model = nn.Linear(10, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tried = []

    def loss(batch):
        rate = optimizer.param_groups[0]["lr"]
        tried.append(rate)
        return loss_of(model)(batch) * (float("nan") if rate > 0.2 else 1.0)

    assert select_learning_rate(model, optimizer, loss, batches()) <= 0.1
    assert max(tried) == 1.0
    tried.clear()
    select_learning_rate(model, optimizer, loss, batches(), largest=0.05)
    assert max(tried) == 0.05
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="a candidate must end with a finite loss"):
        select_learning_rate(model, optimizer, loss, batches(), candidates=(1.0, 0.5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_selection_checks_its_arguments():
    model = nn.Linear(10, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for options, message in (
        (dict(iterations=0), "iterations must be >= 1, got 0"),
        (dict(candidates=(0.1, -1.0)), "candidates must be finite numbers > 0"),
        (dict(largest=1e-9), "candidates must have one at or below largest"),
    ):
        with pytest.raises(ValueError, match=message):
            select_learning_rate(model, optimizer, loss_of(model), batches(), **options)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        select_learning_rate(model, optimizer, loss_of(model), [])


def test_a_step_inside_an_autocast_region():
    """Layers of more than 256 units are solved by torch, which autocast would do in bfloat16."""
    weights = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(300, 20)
        optimizer = SGD2(model, lr=0.1)
        model(torch.randn(64, 300)).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
