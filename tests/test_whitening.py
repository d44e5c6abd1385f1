"""``mode="whiten"``: the optimizer works in whitened coordinates of the inputs, as a float64 computation says."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops import ops, reference
from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp

CPU_OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Rprop": {},
    "SGD": dict(momentum=0.9),
    "Muon": {},
}


def optimizer_of(name, parameters, **options):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)
    return kind(parameters, **{"lr": 0.01, **CPU_OPTIMIZERS[name], **options})


def whitening(covariance, damping, scaling="trace"):
    """L with L L^T = A / tau + damping I."""
    tau = float(covariance.diagonal().mean()) if scaling == "trace" else 1.0
    return torch.linalg.cholesky(covariance / tau + damping * torch.eye(len(covariance), dtype=covariance.dtype))


# The stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 31, 64, 100, 128, 200, 256])
def test_the_triangular_factor_is_that_of_torch(chunk, dtype):
    torch.manual_seed(0)
    units = [chunk, 2 * chunk + 1]
    covariances = [ops.foreach_covariance([torch.randn(3 * u, u, dtype=dtype)], chunk=chunk)[0] for u in units]
    factors, info, used = ops.foreach_inverse(covariances, units=units, damping=0.1, chunk=chunk, triangular=True)
    assert not info.any() and torch.equal(used, torch.full_like(used, 0.1))
    for u, covariance, factor in zip(units, covariances, factors, strict=True):
        bounds = reference.chunk_bounds(u, chunk)
        for c, size in enumerate(b - a for a, b in itertools.pairwise(bounds)):
            damped = covariance[c, :size, :size].double() + 0.1 * torch.eye(size, dtype=torch.float64)
            want = torch.linalg.inv(torch.linalg.cholesky(damped))
            eps = torch.finfo(dtype).eps * float(torch.linalg.cond(damped))
            assert (factor[c, :size, :size] - want).abs().max() <= 50 * eps * want.abs().max()
            assert torch.equal(factor[c], factor[c].tril()) and not factor[c, size:].any()


@pytest.mark.parametrize("shape", [(7, 40), (33, 200), (10, 24, 3, 3), (50, 300), (5, 129), (16, 257)], ids=str)
@pytest.mark.parametrize("chunk", [8, 64, 100, 256])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_any_matrix_multiplies_from_the_right(shape, chunk, bias, strided):
    torch.manual_seed(0)
    grad = torch.randn(shape, dtype=torch.float64)
    grad = grad.mT.contiguous().mT if strided else grad
    column = torch.randn(shape[0], dtype=torch.float64) if bias else None
    units = shape[1] + bias
    bounds, order = reference.chunk_bounds(units, chunk), reference.division(units, chunk, 1)
    matrices = torch.zeros(len(bounds) - 1, chunk, chunk, dtype=torch.float64)
    whole = torch.zeros(units, units, dtype=torch.float64)
    for c, matrix in enumerate(matrices):
        index = order[bounds[c] : bounds[c + 1]]
        matrix[: len(index), : len(index)] = torch.randn(len(index), len(index))
        whole[index[:, None], index] = matrix[: len(index), : len(index)]
    taps = grad.flatten(2).transpose(1, 2) if grad.dim() > 2 else grad[:, None]
    if bias:
        taps = torch.cat([taps, column[:, None, None].expand(-1, taps.shape[1], 1)], 2)
    want = taps @ whole
    info = torch.zeros(len(matrices), dtype=torch.int32)
    ops.foreach_apply_([grad], [matrices], info, bias_grads=[column], chunk=chunk, group=1, triangular=True)
    got = grad.flatten(2).transpose(1, 2) if grad.dim() > 2 else grad[:, None]
    torch.testing.assert_close(got, want[..., : shape[1]], rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(column, want[..., -1].mean(1), rtol=1e-12, atol=1e-12)


# The mathematics


@pytest.mark.parametrize("chunk", [8, 64])
def test_for_sgd_it_is_the_correction(chunk):
    """G L^-T, a step of the rate, and L^-1: the step along G A^-1 with the running average A."""
    models = [mlp().double(), mlp().double()]
    for model, mode in zip(models, ("correct", "whiten"), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
        Preconditioner(model, optimizer, mode=mode, decay=0.95, chunk=chunk)
        for step in range(4):
            x, y = data(seed=step)
            optimizer.zero_grad()
            backward(model, x.double(), y)
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_one_step_by_hand(name):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).double(), torch.randn(50, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=0.1)
    Preconditioner(layer, optimizer, mode="whiten", chunk=12)
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()

    lower = whitening(x.T @ x / len(x), 0.1)
    before = plain.weight.detach().clone()
    twin = optimizer_of(name, plain.parameters(), weight_decay=0.1)
    plain.weight.grad = torch.linalg.solve_triangular(lower, grad.T, upper=False).T  # G L^-T
    twin.step()
    decayed = before * (1 - 0.01 * 0.1)
    displacement = plain.weight.detach() - decayed
    mapped = torch.linalg.solve_triangular(lower, displacement, upper=False, left=False)  # D L^-1
    want = decayed + mapped * displacement.norm() / mapped.norm()
    torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_coupled_weight_decay_acts_on_the_weight(name):
    """Seen by the optimizer as decay W L, which maps back to decay W; for SGD exactly the plain decay."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False).double(), torch.randn(50, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    optimizer = optimizer_of(name, layer.parameters(), weight_decay=0.3)
    Preconditioner(layer, optimizer, mode="whiten", chunk=12)
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()

    lower, before = whitening(x.T @ x / len(x), 0.1), plain.weight.detach().clone()
    twin = optimizer_of(name, plain.parameters(), weight_decay=0.0)
    plain.weight.grad = torch.linalg.solve_triangular(lower, grad.T, upper=False).T + 0.3 * before @ lower
    twin.step()
    displacement = plain.weight.detach() - before
    mapped = torch.linalg.solve_triangular(lower, displacement, upper=False, left=False)
    if name == "SGD":
        torch.testing.assert_close(
            mapped, -0.01 * (grad @ torch.linalg.inv(lower @ lower.T) + 0.3 * before), rtol=1e-9, atol=1e-12
        )
    else:
        mapped *= displacement.norm() / mapped.norm()
    torch.testing.assert_close(layer.weight.detach(), before + mapped, rtol=1e-9, atol=1e-12)


def test_other_coordinates_of_the_inputs_change_nothing():
    """Without damping, one chunk, the norm free (SGD): weights W R^-1 on inputs R x train as W on x."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 10, dtype=torch.float64), torch.randn(60, 4, dtype=torch.float64)
    mix = torch.randn(10, 10, dtype=torch.float64) + 3 * torch.eye(10, dtype=torch.float64)
    first = nn.Linear(10, 4, bias=False).double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.weight.copy_(first.weight @ torch.linalg.inv(mix))
    for layer, inputs in ((first, x), (second, x @ mix.T)):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        Preconditioner(layer, optimizer, mode="whiten", damping=0.0, scaling="absolute", chunk=10, decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(inputs) - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(second.weight @ mix, first.weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CPU_OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, dict(foreach=True), dict(foreach=False), dict(fused=True)], ids=str)
def test_without_a_gradient_the_optimizer_makes_its_own_step_bit_for_bit(name, options):
    decay = {} if name == "Rprop" else dict(weight_decay=0.1)  # Rprop has none
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7, bias=False), torch.randn(50, 12)
    plain = copy.deepcopy(layer)
    try:
        optimizer, twin = (optimizer_of(name, m.parameters(), **decay, **options) for m in (layer, plain))
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"{name} does not take {options}: {error}")
    Preconditioner(layer, optimizer, mode="whiten", chunk=8)
    for _ in range(3):
        layer(x)
        for model in (layer, plain):
            model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        twin.step()
        assert torch.equal(layer.weight, plain.weight)


def test_the_step_keeps_the_norm_that_the_optimizer_gave_it():
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 9), torch.randn(50, 40) * torch.logspace(-2, 1, 40)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten", chunk=16)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(x).square().sum().backward()
    optimizer.step()
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(layer.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(0.01 * math.sqrt(9 * 41), rel=1e-3)  # Adam's first step: lr in every entry


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_torchs_own_operations_whiten_the_same(name):
    models, options = [mlp().double(), mlp().double()], dict(weight_decay=0.1)
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        co.set_backend(backend)
        try:
            optimizer = optimizer_of(name, model.parameters(), **options)
            Preconditioner(model, optimizer, mode="whiten", chunk=8)
            for step in range(3):
                x, y = data(seed=step)
                optimizer.zero_grad()
                backward(model, x.double(), y)
                optimizer.step()
        finally:
            co.set_backend("auto")
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# In a training


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_all_kinds_of_layers_train(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 5)),
    )
    x, y = torch.randn(64, 3, 10, 10), torch.randint(5, (64,))
    weights = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else list(model.parameters())
    optimizer = optimizer_of(name, weights)
    pre = Preconditioner(model, optimizer, mode="whiten")
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    assert pre.stats()["failed_chunks"] == 0 and pre.stats()["layers"] == (1 if name == "Muon" else 4)


@pytest.mark.parametrize("options", [{}, dict(every=3), dict(decay=0.0), dict(decay=0.0, every=2)], ids=str)
@pytest.mark.parametrize("at", [2, 25])
def test_resume_is_bitwise(options, at):
    def start():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        return model, optimizer, Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)

    def go(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(model, *data(seed=step))
            optimizer.step()

    model, optimizer, _ = start()
    go(model, optimizer, 0, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer, at, at + 4)
    again, other, pre = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert pre.steps == at
    go(again, other, at, at + 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_state_of_the_other_mode_is_dropped_with_a_word(caplog):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    Preconditioner(model, optimizer, mode="correct", decay=0.9, every=2, chunk=8)
    backward(model, *data())
    optimizer.step()
    other = mlp()
    twin = torch.optim.AdamW(other.parameters())
    pre = Preconditioner(other, twin, mode="whiten", every=2, chunk=8)
    twin.load_state_dict(optimizer.state_dict())
    assert "saved with another" in caplog.text and pre.state_dict()["layers"] == {}


def test_a_chunk_that_is_given_up_takes_the_optimizers_own_direction():
    """Its units are neither whitened nor mapped; the norm of the whole layer's step is kept."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 5, bias=False), torch.randn(50, 32)
    plain, before, x[0, 3] = copy.deepcopy(layer), layer.weight.detach().clone(), math.inf
    optimizer, twin = (torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.0) for m in (layer, plain))
    pre = Preconditioner(layer, optimizer, mode="whiten", chunk=8, group=1, decay=0.0)
    layer(x)
    for model in (layer, plain):
        model.weight.grad = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    twin.step()
    assert pre.stats()["failed_chunks"] == 1 and layer.weight.isfinite().all()
    ratio = (layer.weight - before) / (plain.weight - before)
    same = (ratio / ratio[0, 3] - 1).abs().amax(0) < 1e-3
    assert same[3] and same.sum() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="both"), "mode must be None, 'correct' or 'whiten', got 'both'"),
        (dict(mode="whiten", optimizer=None), "optimizer must be given with mode='whiten', got None"),
    ],
)
def test_arguments(options, message):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        Preconditioner(model, options.pop("optimizer", optimizer), **options)


# The operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 40, 128])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_native_operators_compute_what_torchs_operations_compute(dtype, chunk, decay):
    """Linear and convolution, with and without a bias, a transposed weight, and a layer without rows."""
    torch.manual_seed(0)
    shapes, biased = [(7, 40), (10, 24, 3, 3), (33, 200), (5, 9)], [0, 1]
    grads = [torch.randn(s) for s in shapes]
    grads[2] = grads[2].T.contiguous().T
    units = [s[1] + (i in biased) for i, s in enumerate(shapes)]
    inputs = [torch.randn(50, s[1]) for s in shapes]
    counts = [torch.tensor([n]) for n in (50, 30, 50, 0)]
    averages = [torch.zeros(-(-u // chunk), chunk, chunk) for u in units] if decay else []
    weights = [torch.zeros(1) for _ in averages]
    rest = biased, [3, 1, 2, 0], [min(8, chunk)] * 4, 0.1, True, decay, chunk, 4096, 5, 0

    def cast(tensors, kind):
        return [torch.empty_strided(t.shape, t.stride(), dtype=kind).copy_(t) for t in tensors]

    def run(space, kind, wide):
        g, b = cast(grads, kind), cast([grad.flatten(1)[:, 0] * 3 for grad in grads[:2]], kind)
        a, w = cast(averages, wide), cast(weights, wide)
        factors = [torch.zeros(-(-u // chunk), chunk, chunk, dtype=wide) for u in units]
        info, _, flags = space.foreach_whiten_(g, b, cast(inputs, kind), counts, a, w, factors, *rest)
        before = cast([torch.randn(s, generator=torch.Generator().manual_seed(9)) for s in shapes], kind)
        before[2] = cast([before[2].T.contiguous().T], kind)[0]
        after = [x + y for x, y in zip(before, g, strict=True)]
        biases = [torch.zeros_like(x) for x in b]
        moved = [x + y for x, y in zip(biases, b, strict=True)]
        place = rest[:3]
        space.foreach_unwhiten_(after, moved, before, biases, factors, info, flags, *place, True, True, chunk, 5, 0)
        return [*g, *b, *a, *w, *after, *moved], info, flags

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got, info, flags = run(torch.ops.consistency_ops, dtype, wide)
    want, info_too, flags_too = run(torch.ops.consistency_ops_torch, dtype, wide)
    assert torch.equal(info, info_too) and torch.equal(flags, flags_too)
    assert info[-1] and not info[0]  # no rows: given up
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y.double()).abs().max() <= bound * max(1.0, float(y.double().abs().max()))


@pytest.mark.parametrize("shape", [(7, 40), (10, 24, 3, 3), (33, 200)], ids=str)
@pytest.mark.parametrize("chunk", [16, 40, 128])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_norm", [False, True])
def test_the_operators_are_those_of_the_reference(shape, chunk, bias, keep_norm):
    torch.manual_seed(0)
    units = shape[1] + bias
    covariance = torch.randn(units, 2 * units, dtype=torch.float64)
    covariance = covariance @ covariance.T / units
    bounds, options = reference.chunk_bounds(units, chunk), dict(chunk=chunk, group=4, seed=3, layer=2)
    order, stored = reference.division(units, chunk, 4, 3, 0, 2), torch.zeros(len(bounds) - 1, chunk, chunk).double()
    for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
        index = order[begin:end]
        stored[c, : end - begin, : end - begin] = covariance[index][:, index]
    want = reference.whitening_factors(covariance, **options)
    (factors,), info, _ = ops.foreach_inverse(
        [stored], units=[units], damping=0.1, scaling="trace", chunk=chunk, triangular=True
    )
    for c, factor in enumerate(want):
        torch.testing.assert_close(factors[c, : len(factor), : len(factor)], factor, rtol=1e-9, atol=1e-11)

    grad, step = torch.randn(2, *shape, dtype=torch.float64)
    column, step_of_bias = torch.randn(2, shape[0], dtype=torch.float64) if bias else (None, None)
    whitened = reference.multiply_by_chunks(grad, column, [factor.T for factor in want], **options)
    native, place = torch.ops.consistency_ops, ([0] if bias else [], [2], [4])
    got, got_bias = grad.clone(), [] if column is None else [column.clone()]
    assert native.foreach_whiten_by_([got], got_bias, [factors], info, *place, chunk, 3, 0).tolist() == [1]
    torch.testing.assert_close(got, whitened[0], rtol=1e-9, atol=1e-11)

    before, after = grad, grad + step
    biases = (None, None) if column is None else (column + step_of_bias, column)
    moved = reference.unwhiten(after, before, *biases, want, keep_norm=keep_norm, **options)
    now, now_bias = after.clone(), [] if column is None else [biases[0].clone()]
    flags, old_bias = torch.ones(1, dtype=torch.int32), [] if column is None else [column]
    native.foreach_unwhiten_(
        [now], now_bias, [before], old_bias, [factors], info, flags, *place, keep_norm, True, chunk, 3, 0
    )
    torch.testing.assert_close(now, moved[0], rtol=1e-9, atol=1e-11)
    if bias:
        torch.testing.assert_close(got_bias[0], whitened[1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(now_bias[0], moved[1], rtol=1e-9, atol=1e-11)


def test_a_gradient_that_is_not_finite_stays_out_of_the_average():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    backward(model, *data())
    model[2].weight.grad[0, 0] = math.inf
    optimizer.step()
    weights = {name: float(state["weight"]) for name, state in pre.state_dict()["layers"].items()}
    assert weights["0"] == pytest.approx(0.05) and weights["2"] == 0


# What a user may combine it with


def steps_of(model, optimizer, count, first=0, **options):
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8, **options)
    for step in range(first, first + count):
        optimizer.zero_grad()
        backward(model, *data(seed=step))
        optimizer.step()
    return pre


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})


def same(model, other, rtol=0.0, atol=0.0):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_the_same_whatever_the_number_of_threads(threads):
    def go(count):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 30))
        optimizer = adamw(model)
        Preconditioner(model, optimizer, mode="whiten", every=2)
        before = torch.get_num_threads()
        x = torch.randn(64, 300)
        gradients = [torch.randn_like(p) for p in model.parameters()]
        torch.set_num_threads(count)
        try:
            for _ in range(3):
                model(x)
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p.grad = g.clone()
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return model

    same(go(threads), go(1))


@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True), dict(capturable=True)], ids=str)
def test_all_implementations_of_an_optimizer_step_alike(options):
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0], foreach=False), 3)
    try:
        steps_of(models[1], adamw(models[1], **options), 3)
    except (AssertionError, RuntimeError) as error:
        pytest.skip(f"not on the CPU: {error}")
    same(*models, rtol=1e-4, atol=1e-5)


def test_a_rate_in_a_tensor():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    steps_of(models[1], adamw(models[1], lr=torch.tensor(0.01), fused=True), 3)
    same(*models, rtol=1e-4, atol=1e-5)


def test_a_bias_in_a_group_of_its_own_has_its_own_decay():
    """The bias has no weight decay: without a learning rate of its own nothing but the weight may shrink."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 7).double(), torch.randn(50, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.fill_(100.0)
    plain = copy.deepcopy(layer)

    def groups(model):
        return [dict(params=[model.weight], weight_decay=0.5), dict(params=[model.bias], weight_decay=0.0)]

    optimizer = torch.optim.AdamW(groups(layer), lr=0.01)
    Preconditioner(layer, optimizer, mode="whiten", chunk=16)
    layer(x).square().sum().backward()
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.step()
    moved = [layer.weight.detach() - before[0] * (1 - 0.01 * 0.5), layer.bias.detach() - before[1]]
    length = math.sqrt(sum(float(m.square().sum()) for m in moved))
    assert length == pytest.approx(0.01 * math.sqrt(7 * 13), rel=1e-3)  # Adam's first step: lr in every entry
    assert not torch.equal(plain.bias, layer.bias)


def test_transposed_convolutions_in_groups_train():
    """Their matrix is a copy of the weight, which the step must read again."""
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(8, 6, 3, groups=2), torch.randn(4, 8, 5, 5)
    optimizer = adamw(layer, weight_decay=0.0)
    Preconditioner(layer, optimizer, mode="whiten")
    before = layer.weight.detach().clone()
    layer(x).square().mean().backward()
    optimizer.step()
    entries = layer.weight.numel() + layer.bias.numel()
    length = torch.cat([(layer.weight - before).flatten().detach(), layer.bias.new_zeros(0)]).norm()
    assert 0.3 * 0.01 * math.sqrt(layer.weight.numel()) < float(length) <= 0.0101 * math.sqrt(entries)


def test_a_step_that_the_scaler_skips_leaves_nothing():
    model, plain = mlp(), mlp()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(data(seed=step)[0]), data(seed=step)[1])).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    twin = adamw(plain)
    pre_twin = Preconditioner(plain, twin, mode="whiten", chunk=8)
    for step in (0, 2):
        twin.zero_grad()
        backward(plain, *data(seed=step))
        twin.step()
    assert pre.steps == pre_twin.steps == 2
    same(model, plain, rtol=1e-4, atol=1e-5)


def test_micro_batches_count_as_one_batch():
    models, (x, y) = [mlp().double(), mlp().double()], data(n=40)
    for model, parts in zip(models, (1, 4), strict=True):
        optimizer = adamw(model)
        Preconditioner(model, optimizer, mode="whiten", chunk=8)
        for _ in range(2):
            optimizer.zero_grad()
            for rows, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                backward(model, rows, labels, 1 / parts)
            optimizer.step()
    same(*models, rtol=1e-8, atol=1e-10)


def test_a_closure():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    optimizer = adamw(models[1])
    Preconditioner(models[1], optimizer, mode="whiten", chunk=8)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(models[1], *data(seed=step))

        optimizer.step(closure)
    same(*models)


def test_autocast_in_bfloat16_trains():
    model = mlp()
    optimizer = adamw(model)
    Preconditioner(model, optimizer, mode="whiten", chunk=8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(data()[0]), data()[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_weights_in_bfloat16_train():
    model = mlp().bfloat16()
    optimizer = adamw(model)
    Preconditioner(model, optimizer, mode="whiten", chunk=8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(backward(model, data()[0].bfloat16(), data()[1]).item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_two_optimizers_over_one_model():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    both = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    pre = Preconditioner(model, both, mode="whiten", chunk=8)
    losses = []
    for _ in range(20):
        for optimizer in both:
            optimizer.zero_grad()
        losses.append(backward(model, *data()).item())
        for optimizer in both:
            optimizer.step()
    assert losses[-1] < 0.9 * losses[0] and pre.stats()["layers"] == 3


def test_weights_that_are_replaced_or_converted_between_steps():
    model = mlp()
    optimizer = adamw(model)
    steps_of(model, optimizer, 3)
    for p in model.parameters():
        p.data = p.data.clone()
    for step in range(3):
        if step == 1:
            model.double()
            for state in optimizer.state.values():
                state.update({k: v.double() for k, v in state.items() if k.startswith("exp_avg")})
        dtype = model[0].weight.dtype
        optimizer.zero_grad()
        x, y = data(seed=step)
        backward(model, x.to(dtype), y)
        before = model[0].weight.detach().clone()
        optimizer.step()
        moved = (model[0].weight - before).norm()
        assert 0.3 * 0.01 * math.sqrt(before.numel()) < float(moved) < 3 * 0.01 * math.sqrt(before.numel())


@pytest.mark.parametrize("coupled", ["SGD", "Adam"])
def test_coupled_decay_with_stored_factors(coupled):
    """Every second step uses the factor of the step before, and its L."""
    models = [mlp().double(), mlp().double()]
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        co.set_backend(backend)
        try:
            optimizer = optimizer_of(coupled, model.parameters(), weight_decay=0.3)
            Preconditioner(model, optimizer, mode="whiten", decay=0.0, every=2, chunk=8)
            for step in range(4):
                x, y = data(seed=step)
                optimizer.zero_grad()
                backward(model, x.double(), y)
                optimizer.step()
        finally:
            co.set_backend("auto")
    same(*models, rtol=1e-9, atol=1e-12)


def test_during_the_step_one_copy_of_the_weights_is_kept_in_their_dtype():
    model = mlp().bfloat16()
    optimizer = adamw(model)
    pre = Preconditioner(model, optimizer, mode="whiten", chunk=8)
    kept = []

    def look(*_):
        (whitened,) = pre._attachments[0].correction._whitened
        kept.append(sum(t.numel() * t.element_size() for t in (*whitened.weights, *whitened.biases)))

    optimizer.register_step_pre_hook(look)
    backward(model, data()[0].bfloat16(), data()[1])
    optimizer.step()
    assert kept == [sum(p.numel() * 2 for p in model.parameters())]
    assert not pre._attachments[0].correction._whitened


def test_a_compiled_model_trains_as_in_eager_mode():
    models = [mlp(), mlp()]
    steps_of(models[0], adamw(models[0]), 3)
    optimizer = adamw(models[1])
    Preconditioner(models[1], optimizer, mode="whiten", chunk=8)
    compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
    for step in range(3):
        optimizer.zero_grad()
        backward(compiled, *data(seed=step))
        optimizer.step()
    same(*models, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_torch_distributed_resumes(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = mlp()
    optimizer = adamw(model)
    steps_of(model, optimizer, 3, every=2)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    again = mlp(seed=5)
    other = adamw(again)
    pre = Preconditioner(again, other, mode="whiten", chunk=8, every=2)
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (again, other)):
            o.zero_grad()
            backward(m, *data(seed=step))
            o.step()
    same(model, again)
    assert pre.steps == 6
