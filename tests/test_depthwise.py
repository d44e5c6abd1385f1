"""Layers of one unit a group, which the CPU corrects apart (csrc/cpu/one_unit.cpp), against the general definition."""

import copy
import math

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops, reference
from consistency_ops.engine.correction import Correction

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tolerance(*dtypes):
    return 8 * max(torch.finfo(dtype).eps for dtype in dtypes)


def correct(grad, x, bias=None, **options):
    """Corrected copies of the gradient and the bias gradient, and info."""
    grad, bias = grad.clone(), None if bias is None else bias.clone()
    info = co.foreach_precondition_([grad], [x], bias_grads=[bias], **options)
    return grad, bias, info


def layer(channels, multiplier=1, kernel=(3, 3), images=(4, 6, 5), dtype=torch.float32, grad_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images[0], channels, *images[1:], generator=generator) + 0.3
    grad = torch.randn(channels * multiplier, 1, *kernel, generator=generator)
    bias = torch.randn(channels * multiplier, generator=generator)
    grad_dtype = dtype if grad_dtype is None else grad_dtype
    return grad.to(grad_dtype), x.to(dtype), bias.to(grad_dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scaling", ["trace", "absolute"])
@pytest.mark.parametrize("channels", [1, 3, 16, 64, 65, 130])
def test_every_channel_is_a_layer_of_its_own(channels, scaling, with_bias):
    grad, x, bias = layer(channels, multiplier=2)
    options = {"damping": 0.05, "scaling": scaling}
    corrected, corrected_bias, info = correct(grad, x, bias if with_bias else None, **options)
    want, want_bias, want_info, _ = reference.precondition(
        grad.double(), x.double(), bias_grad=bias.double() if with_bias else None, **options
    )
    assert torch.equal(info, want_info)
    torch.testing.assert_close(corrected.double(), want, rtol=tolerance(torch.float32), atol=1e-6)
    if with_bias:
        torch.testing.assert_close(corrected_bias.double(), want_bias, rtol=tolerance(torch.float32), atol=1e-6)


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype(dtype, grad_dtype):
    grad, x, bias = layer(20, dtype=dtype, grad_dtype=grad_dtype)
    corrected, corrected_bias, _ = correct(grad, x, bias, damping=0.1, scaling="trace")
    want, want_bias, _, _ = reference.precondition(
        grad.double(), x.double(), bias_grad=bias.double(), damping=0.1, scaling="trace"
    )
    double = torch.float64 in (dtype, grad_dtype)
    rtol = tolerance(grad_dtype, torch.float64 if double else torch.float32)
    torch.testing.assert_close(corrected.double(), want, rtol=rtol, atol=rtol)
    torch.testing.assert_close(corrected_bias.double(), want_bias, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kernel", [(5,), (1, 1), (3, 3), (2, 3, 2)])
def test_every_number_of_dimensions_and_layout(kernel):
    images = (3, 6, 7, 5)[: len(kernel) + 1]
    grad, x, bias = layer(18, kernel=kernel, images=images)
    plain = correct(grad, x, bias, damping=0.1)
    rows = x.movedim(1, -1).reshape(-1, 18)  # as row capture keeps them
    gaps = torch.zeros(*grad.shape[:-1], 2 * grad.shape[-1])[..., ::2].copy_(grad)
    for other_grad, other_x in ((grad, rows), (gaps, x), (grad, x.movedim(1, -1).contiguous().movedim(-1, 1))):
        target, target_bias = other_grad, bias.clone()
        if other_grad is grad:
            target = grad.clone()
        co.foreach_precondition_([target], [other_x], bias_grads=[target_bias], damping=0.1)
        torch.testing.assert_close(target, plain[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(target_bias, plain[1], rtol=1e-6, atol=1e-6)


def test_sampled_rows_are_those_of_the_definition():
    grad, x, _ = layer(33, images=(8, 16, 16))
    options = {"damping": 0.1, "max_rows": 100, "seed": 7}
    want = reference.precondition(grad.double(), x.double(), **options)[0]
    torch.testing.assert_close(correct(grad, x, **options)[0].double(), want, rtol=1e-5, atol=1e-6)


def test_a_channel_is_the_same_alone_and_among_others_and_on_all_threads():
    grad, x, bias = layer(200, images=(8, 32, 32))
    all_channels = correct(grad, x, bias, damping=0.1, scaling="trace")
    for c in (0, 63, 64, 199):
        alone = correct(grad[c : c + 1], x[:, c : c + 1], bias[c : c + 1], damping=0.1, scaling="trace")
        assert torch.equal(alone[0], all_channels[0][c : c + 1]) and torch.equal(alone[1], all_channels[1][c : c + 1])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        again = correct(grad, x, bias, damping=0.1, scaling="trace")
        assert torch.equal(again[0], all_channels[0]) and torch.equal(again[1], all_channels[1])


def test_beside_other_layers():
    grad, x, bias = layer(40)
    dense_grad, rows = torch.randn(30, 20), torch.randn(50, 20)
    want = correct(grad, x, bias, damping=0.1)
    want_dense = co.precondition(dense_grad, rows, damping=0.1)
    grads, biases = [grad.clone(), dense_grad.clone(), grad.clone()], [bias.clone(), None, bias.clone()]
    co.foreach_precondition_(grads, [x, rows, x], bias_grads=biases, layers=[0, 0, 0], damping=0.1)
    assert torch.equal(grads[0], want[0]) and torch.equal(grads[2], want[0]) and torch.equal(biases[2], want[1])
    assert torch.equal(grads[1], want_dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_channel_with_bad_inputs_keeps_its_gradient(bad, with_bias):
    grad, x, bias = layer(70)
    x[1, 5, 2, 2] = bad
    corrected, corrected_bias, info = correct(grad, x, bias if with_bias else None, damping=0.1, scaling="trace")
    assert info.nonzero().flatten().tolist() == [5] and int(info[5]) == 1
    assert torch.equal(corrected[5], grad[5]) and not torch.equal(corrected[4], grad[4])
    if with_bias:
        assert corrected_bias[5] == bias[5] and corrected_bias[6] != bias[6]


def test_bad_gradients_stay_and_spoil_nothing_else():
    grad, x, bias = layer(10)
    grad[3, 0, 1, 1] = math.inf
    corrected, corrected_bias, _ = correct(grad, x, bias, damping=0.1)
    assert corrected[3, 0, 1, 1] == math.inf
    corrected[3, 0, 1, 1] = 0
    assert corrected.isfinite().all() and corrected_bias.isfinite().all()


def test_a_result_that_overflows_stays_as_it_was():
    grad, x, _ = layer(4, dtype=torch.float16)
    x, grad = x * 1e-3, grad.fill_(60000)
    corrected, _, info = correct(grad, x, damping=1e-6)
    assert torch.equal(corrected, grad) and not info.any()


def test_zero_inputs_without_damping_fail_after_three_tries():
    grad, x, bias = layer(6)
    x[:, 2] = 0
    result = ops.precondition_ex(grad.clone(), x, damping=0.0)
    assert result.info.nonzero().flatten().tolist() == [2] and torch.equal(result.corrected[2], grad[2])
    x[:, 3] = 1.0  # with the bias: [[1, 1], [1, 1]]
    _, corrected_bias, info = correct(grad, x, bias, damping=0.0)
    assert int(info[2]) == 1 and int(info[3]) == 2
    assert corrected_bias[2] == bias[2] and corrected_bias[3] == bias[3]


def test_chunks_of_one_unit_divide_weight_and_bias():
    grad, x, bias = layer(5)
    corrected, corrected_bias, info = correct(grad, x, bias, damping=0.1, chunk=1)
    want, want_bias, want_info, _ = reference.precondition(
        grad.double(), x.double(), bias_grad=bias.double(), damping=0.1, chunk=1
    )
    assert torch.equal(info, want_info) and len(info) == 10
    torch.testing.assert_close(corrected.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(corrected_bias.double(), want_bias, rtol=1e-5, atol=1e-6)


def test_no_rows_and_empty_gradients_change_nothing():
    grad, x, _ = layer(5)
    assert torch.equal(correct(grad, x[:0], damping=0.1)[0], grad)
    info = co.foreach_precondition_([grad[:, :, :0]], [x], damping=0.1)
    assert info.tolist() == [0] * 5


def test_training_of_a_depthwise_network_matches_the_portable_path():
    def train():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU(), torch.nn.Conv2d(12, 12, 3, groups=12), torch.nn.Flatten(),
            torch.nn.Linear(12 * 16, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pre = co.Preconditioner(model, optimizer, damping=0.1)
        for step in range(5):
            x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        pre.remove()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    native = train()
    co.set_backend("torch")
    try:
        portable = train()
    finally:
        co.set_backend("auto")
    torch.testing.assert_close(native, portable, rtol=1e-4, atol=1e-5)


def network(groups=12, bias=True):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU(), torch.nn.Conv2d(12, 12, 3, groups=groups, bias=bias)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(12 * 16, 5))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


KEPT = [{"decay": 0.9}, {"every": 3}, {"decay": 0.9, "every": 3}, {"mode": "whiten", "every": 2}, {"mode": "whiten"}]


@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("options", KEPT, ids=str)
def test_stored_matrices_of_groups_are_as_large_as_their_units(options, groups):
    """Not padded to the chunk: a depthwise layer has hundreds of them, of one or two units each."""
    model = network(groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    co.Preconditioner(model, optimizer, **options)
    train(model, optimizer, 3)
    state = optimizer.state[model[2].weight]
    units = 12 // groups + ("mode" not in options)  # whitened coordinates join no bias of a kernel
    kept = [name for name in ("consistency_covariance", "consistency_inverse") if name in state]
    assert kept and all(state[name].shape == (groups, units, units) for name in kept)
    padded = optimizer.state[model[0].weight]
    assert all(padded[name].shape == (1, 128, 128) for name in kept)  # one launch with all others


@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("options", KEPT, ids=str)
def test_the_result_is_that_of_padded_matrices(options, groups, monkeypatch):
    chunk_of, results = Correction.chunk_of, []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(Correction, "chunk_of", lambda self, units, groups=1: chunk_of(self, units))
        model = network(groups)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        co.Preconditioner(model, optimizer, **options)
        train(model, optimizer, 7)
        results.append([p.detach() for p in model.parameters()])
        state = optimizer.state[model[2].weight]
        assert any(t.dim() == 3 and (t.shape[1] == 128) == padded for t in state.values())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", KEPT, ids=str)
def test_a_state_with_padded_matrices_goes_on(options):
    """As an earlier version saved it."""

    def pad(tensor):
        return torch.nn.functional.pad(tensor, (0, 128 - tensor.shape[2], 0, 128 - tensor.shape[1]))

    results = []
    for padded in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        co.Preconditioner(model, optimizer, **options)
        train(model, optimizer, 4)
        weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        for entries in saved["state"].values() if padded else ():
            for name in ("consistency_covariance", "consistency_inverse"):
                if name in entries:
                    entries[name] = pad(entries[name])
        model = network()
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        co.Preconditioner(model, optimizer, **options)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 5, seed=1)
        results.append([p.detach() for p in model.parameters()])
        state = optimizer.state[model[2].weight]
        units = 1 + ("mode" not in options)
        assert all(t.shape == (12, units, units) for t in state.values() if t.dim() == 3)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
