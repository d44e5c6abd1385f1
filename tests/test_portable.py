"""The operators out of torch's own operations: random cases beside float64 and the kernels, every width, every device.

The ordinary tests of the operators run on them, too: the kinds ``torch`` and ``second`` of support/kernels.py.
"""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops import ops, reference
from consistency_ops.ops import portable
from consistency_ops.ops.division import divisions, philox
from support import processes, second_device
from support.samples import (
    average_bias,
    build,
    case,
    chunks,
    gather,
    layer,
    relative_error,
    rows_like,
    solve_float64,
)

CASES, BATCH = 300, 50
DEVICE = second_device.set_up()  # while the tests are collected: autograd counts the devices at its first backward pass


@pytest.fixture
def torch_backend():
    co.set_backend("torch")
    yield
    co.set_backend("auto")


def _compute_eps(*tensors):
    return torch.finfo(torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32).eps


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_random_cases_against_float64_and_the_kernels(first, torch_backend):
    """By chunk: error <= 50 eps cond + rounding of a 16-bit result, as for the kernels; info and damping are theirs."""
    for sample in map(case, range(first, first + BATCH)):
        grad, inputs, keywords = build(sample)
        co.set_backend("native")
        native = co.precondition_ex(grad, inputs, **keywords)
        co.set_backend("torch")
        portable = co.precondition_ex(grad, inputs, **keywords)
        assert torch.equal(portable.info, native.info), sample
        assert torch.equal(portable.damping_used, native.damping_used), sample
        weight, bias = portable.corrected if sample.bias else (portable.corrected, None)
        theirs, their_bias = native.corrected if sample.bias else (native.corrected, None)
        assert weight.dtype == grad.dtype and weight.stride() == theirs.stride(), sample
        eps = _compute_eps(grad, inputs)
        rounding = 0.0 if grad.dtype.itemsize > 2 else torch.finfo(grad.dtype).eps
        for chunk in chunks(grad, inputs, **keywords):
            want = average_bias(chunk, solve_float64(chunk), sample.bias, sample.units)
            bound = 50 * eps * np.linalg.cond(chunk.damped()) + rounding
            got = gather(chunk, weight, bias)
            assert relative_error(got, want) <= bound, sample
            assert relative_error(got, gather(chunk, theirs, their_bias)) <= 2 * bound, sample


def test_the_divisions_of_a_network_are_those_of_the_reference():
    units, groups, layers = [64, 65, 130, 1000, 9], [8, 1, 16, 8, 3], [0, 7, 2, 2**31, 4]
    for seed, step in ((0, 0), (2**63 + 11, 1), (5, 2**40 + 3)):
        for got, u, g, number in zip(
            divisions(units, groups, layers, 64, seed, step), units, groups, layers, strict=True
        ):
            assert np.array_equal(got, reference.division(u, 64, g, seed, step, number).numpy())
            words = philox(seed, step, np.array([number]), 1)[:, 0]
            assert tuple(map(int, words)) == reference.philox(seed, step, number, 1)


# Any width


def _bound(inputs, damping, bias=False):
    """50 eps cond, as for the random cases; no chunk's condition number is above that of all units together."""
    x = inputs.double().flatten(0, -2)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1) if bias else x
    second = x.T @ x / len(x)
    largest = float(second.norm() / second.diagonal().mean())  # at least the largest eigenvalue
    return 50 * torch.finfo(torch.float32).eps * (largest + damping) / damping


@pytest.mark.parametrize(("units", "chunk"), [(300, None), (768, None), (768, 384), (700, 257), (1000, 999)])
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_chunks_wider_than_the_kernels(units, chunk, kind):
    co.set_backend(kind)
    try:
        grad, inputs = layer(outputs=24, units=units, rows=900)
        bias = torch.randn(24)
        options = dict(damping=0.2, scaling="trace", max_rows=700)
        result = co.precondition_ex(grad, inputs, bias_grad=bias, chunk=chunk, **options)
        want, want_bias, info, _ = reference.precondition(
            grad.double(), inputs.double(), bias_grad=bias.double(), chunk=chunk or units + 1, group=8, **options
        )
    finally:
        co.set_backend("auto")
    assert torch.equal(result.info, info) and len(info) == (1 if chunk is None else -(-(units + 1) // chunk))
    bound = _bound(inputs, 0.2, bias=True)
    assert relative_error(result.corrected[0].double().numpy(), want.numpy()) < bound < 0.02
    assert relative_error(result.corrected[1].double().numpy(), want_bias.numpy()) < bound


def test_layers_of_several_widths_are_one_chunk_each():
    shapes = [(10, 40), (7, 300), (6, 12, 3, 3)]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs = [rows_like(500, shape[1] * (2 if len(shape) > 2 else 1), generator).float() for shape in shapes]
    before = [grad.clone() for grad in grads]
    info = co.foreach_precondition_(grads, inputs, chunk=None, damping=0.1)
    assert info.tolist() == [0, 0, 0, 0]  # the convolution has two groups
    for grad, old, x in zip(grads, before, inputs, strict=True):
        want = reference.precondition(old.double(), x.double(), chunk=10**6, damping=0.1)[0]
        assert relative_error(grad.double().numpy(), want.numpy()) < 1e-4


@pytest.mark.parametrize("chunk", [None, 320])
def test_stages_of_wide_chunks_equal_the_fused_call(chunk):
    grad, inputs = layer(outputs=20, units=640, rows=700)
    fused = co.precondition(grad, inputs, chunk=chunk, damping=0.3, scaling="trace")
    covariances = ops.foreach_covariance([inputs], grads=[grad], chunk=chunk)
    assert covariances[0].shape == ((1, 640, 640) if chunk is None else (2, 320, 320))
    inverses, info, _ = ops.foreach_inverse(covariances, units=[640], chunk=chunk, damping=0.3, scaling="trace")
    staged, at_once = grad.clone(), grad.clone()
    ops.foreach_apply_([staged], inverses, info, chunk=chunk)
    ops.foreach_correct_([at_once], covariances, chunk=chunk, damping=0.3, scaling="trace")
    for result in (staged, at_once):
        torch.testing.assert_close(result, fused, rtol=1e-4, atol=1e-5)


def test_the_setting_of_newton_muon_is_one_call():
    """Whole layers of 768 units, damping 0.2 of the trace, and the contraction of 3072 units in four blocks."""
    generator = torch.Generator().manual_seed(0)
    for units, chunk in ((768, None), (3072, 768)):
        grad = torch.randn(32, units, generator=generator)
        inputs = rows_like(1000, units, generator).float()
        order = torch.arange(units)  # consecutive blocks
        got = co.precondition(grad, inputs, chunk=chunk, damping=0.2, scaling="trace", permutation=order)
        x = inputs.double()
        second = x.T @ x / len(x)
        tau = second.diagonal().mean()
        want = torch.empty_like(grad, dtype=torch.float64)
        for begin in range(0, units, 768):
            block = slice(begin, begin + 768)
            damped = second[block, block] / tau + 0.2 * torch.eye(768, dtype=torch.float64)
            want[:, block] = torch.linalg.solve(damped, grad[:, block].double(), left=False)
        assert relative_error(got.double().numpy(), want.numpy()) < _bound(inputs, 0.2) < 0.02


def test_wide_chunks_under_compile():
    grad, inputs = layer(outputs=8, units=300, rows=400)

    def corrected(grad, inputs):
        return co.precondition(grad, inputs, chunk=None, damping=0.5)

    got = torch.compile(corrected, fullgraph=True, backend="aot_eager")(grad, inputs)
    assert torch.equal(got, corrected(grad, inputs))


def test_a_layer_too_wide_for_one_chunk_is_refused():
    grad, inputs = torch.empty(1, 16_385), torch.empty(1, 16_385)
    with pytest.raises(
        ValueError, match="precondition: chunk must not be None for a layer above 16384 units, got 16385"
    ):
        co.precondition(grad, inputs, chunk=None)
    with pytest.raises(ValueError, match="chunked_covariance: chunk must not be None"):
        co.chunked_covariance(inputs, chunk=None)


# Devices


def test_a_training_on_a_device_without_kernels_goes_as_on_the_cpu():
    def train(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 3)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        co.Preconditioner(model, optimizer, max_rows=50)
        x, y = torch.randn(64, 40).to(device), torch.randn(64, 3).to(device)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            for half in (slice(0, 32), slice(32, 64)):
                loss = (model(x[half]) - y[half]).square().mean()
                loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        return torch.stack([loss.cpu() for loss in losses])

    here = train("cpu")
    torch.testing.assert_close(train(DEVICE), here, rtol=1e-5, atol=0)
    assert here[-1] < here[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_does_not_reach_into_the_operators(device, torch_backend):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    grad, inputs = (t.to(device) for t in layer())
    want = co.precondition(grad, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(co.precondition(grad, inputs), want)


@pytest.mark.gpu
def test_a_captured_graph_computes_again():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    co.set_backend("torch")
    try:
        grad, inputs = (t.cuda() for t in layer(units=300))
        want = co.precondition(2 * grad, inputs, chunk=64)
        static = grad.clone()
        co.foreach_precondition_([static], [inputs], chunk=64)
        graph = torch.cuda.CUDAGraph()
        static.copy_(grad)
        with torch.cuda.graph(graph):
            co.foreach_precondition_([static], [inputs], chunk=64)
        static.copy_(2 * grad)
        graph.replay()
        torch.testing.assert_close(static, want)
    finally:
        co.set_backend("auto")


def test_rows_that_do_not_count_are_zero_on_a_device():
    """The masked sum beside the sum of the rows that count."""
    device = DEVICE
    grad, inputs = layer(units=60, rows=200)
    inputs[120:] = float("nan")
    for max_rows in (300, 50):
        there = grad.to(device)
        counts = [torch.tensor([120]).to(device)]
        co.foreach_precondition_([there], [inputs.to(device)], chunk=32, max_rows=max_rows, row_counts=counts)
        want = co.precondition(grad, inputs[:120], chunk=32, max_rows=max_rows)
        torch.testing.assert_close(there.cpu(), want, rtol=1e-4, atol=1e-5)


# Wide chunks: blocks of a triangle's inverse, panels of a symmetric product


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("units", [256, 257, 300, 513, 1000])
def test_stages_of_a_wide_layer_are_those_of_linalg(units, dtype, where):
    """A layer of two parts, one of them not positive definite and given up."""
    rows = torch.randn(2 * units, 2 * units, dtype=dtype)
    rows[:, units] = float("nan")
    of_layer = dict(layers=[0], groups=[1], unit_dims=[1], units=[units], bias=[False])
    (found,) = portable.foreach_covariance(
        [rows.to(where)], [], [], [], [], **of_layer, chunk=units, max_rows=len(rows), seed=0, step=0
    )
    want = torch.stack([part.T.double() @ part.double() for part in rows.split(units, 1)]) / len(rows)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].cpu().double(), want[0], rtol=0, atol=8 * eps)
    for triangular in (False, True):
        (made,), info, _ = portable.foreach_inverse([found], [units], 0.1, False, units, triangular)
        damped = want[0] + 0.1 * torch.eye(units, dtype=torch.float64)
        right = torch.linalg.inv(torch.linalg.cholesky(damped) if triangular else damped)
        assert info.tolist() == [0, 1] and made[1].count_nonzero() == 0
        error = (made[0].cpu().double() - right).norm() / right.norm()
        assert error < 2 * eps * torch.linalg.cond(damped)
        assert made.is_contiguous()
        assert not triangular or made[0].triu(1).count_nonzero() == 0


# Memory


_TOO_LARGE = """
import resource, torch, consistency_ops as co
torch.set_num_threads(1)
grad, inputs = torch.ones(1, 8192), torch.ones(1, 8192)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, -1))
try:
    co.precondition(grad, inputs, chunk=None)
except torch.OutOfMemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_without_memory_the_error_says_how_much_is_needed():
    done = processes.run([sys.executable, "-c", _TOO_LARGE], capture_output=True, text=True)
    assert "foreach_precondition_: out of memory: the call needs about 768 MiB of workspace" in done.stdout, done.stderr
    assert "a smaller chunk" in done.stdout


@pytest.mark.parametrize(
    "call",
    [
        lambda x: co.modulus(x.expand(1 << 46)),
        lambda x: co.modulus(x.requires_grad_().expand(1 << 46)),
        lambda x: co.batch_rms_norm(x.expand(1 << 42, 4), torch.zeros(4), training=True),
        lambda x: co.linalg.spd_inverse_ex(x.expand(1 << 30, 100, 100)),
        lambda x: co.linalg.spd_solve_ex(torch.eye(9), x.expand(9, 1 << 42)),
        lambda x: co.chunked_covariance(x.expand(2, 1 << 40), chunk=128),
    ],
)
def test_an_allocation_that_fails_is_told_in_the_allocators_words(call):
    """Not as "API call failed at": accelerate and Lightning look for torch's text."""
    with pytest.raises(RuntimeError, match="can't allocate memory|out of memory"):
        call(torch.ones(1))


def test_the_kernels_without_memory_raise_what_batch_size_finders_know(monkeypatch):
    from consistency_ops.ops import backend

    def full(*args):
        raise RuntimeError("foreach_precondition_: out of memory for the workspace; no gradient was changed")

    monkeypatch.setitem(backend._NATIVE, "foreach_precondition_", full)
    grad, inputs = layer(outputs=1000, units=512, rows=2000)
    with pytest.raises(torch.OutOfMemoryError, match=r"needs about \d+ MiB of workspace.*no gradient was changed"):
        co.precondition(grad, inputs)
