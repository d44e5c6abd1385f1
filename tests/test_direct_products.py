"""Products that read the gradient where it lies (csrc/cpu/direct_kernels.inl), for every number of panels and rows."""

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops, reference

# One chunk of so many units: whole panels of 16, one to four units more, and the middle of a panel.
SIZES = (17, 32, 33, 40, 48, 50, 64, 65, 68, 69, 80, 81, 96, 97, 109, 112, 113, 116, 128, 129, 145, 193, 256)


def problem(units, outputs, with_bias, pitch=0):
    generator = torch.Generator().manual_seed(units)
    x = torch.randn(300, units, generator=generator) + 0.2
    room = torch.randn(outputs, units + pitch, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    return x, room, room[:, pitch : pitch + units], bias


def expected(grad, x, bias, chunk):
    group = ops.default_group(grad.dtype, chunk)
    want = reference.precondition(
        grad.double(),
        x.double(),
        bias_grad=None if bias is None else bias.double(),
        damping=0.1,
        scaling="trace",
        chunk=chunk,
        group=group,
    )
    return want[:2]


def correct(grad, x, bias, chunk):
    biases = None if bias is None else [bias]
    co.foreach_precondition_([grad], [x], bias_grads=biases, damping=0.1, scaling="trace", chunk=chunk)


def close(got, want):
    return float((got.double() - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_of_every_size(size, with_bias):
    for outputs in (3, 4, 23, 70):  # of blocks of 64 rows, of which 16, and 4, are corrected together
        x, _, grad, bias = problem(size - with_bias, outputs, with_bias)
        want, want_bias = expected(grad, x, bias, size)
        correct(grad, x, bias, size)
        assert close(grad, want)
        assert bias is None or close(bias, want_bias)


@pytest.mark.parametrize("units", [193, 300, 769])
def test_chunks_of_a_wide_layer_beside_other_numbers(units):
    """The rows are pieces of wider ones: what lies between them is neither read as a unit nor written."""
    x, room, grad, bias = problem(units, 37, True, pitch=3)
    before = room[:, :3].clone()
    want, want_bias = expected(grad, x, bias, 128)
    correct(grad, x, bias, 128)
    assert close(grad, want) and close(bias, want_bias) and torch.equal(room[:, :3], before)


@pytest.mark.parametrize("size", [65, 97, 112, 128])
def test_a_row_that_overflows_stays_with_its_bias(size):
    x, _, grad, bias = problem(size - 1, 40, True)
    grad[21] *= 1e38
    kept, kept_bias = grad[21].clone(), bias[21].clone()
    x = x * 1e-3  # so that damping and not the covariance decides
    inverse_of = {"damping": 1e-3, "scaling": "absolute", "chunk": size}
    want = reference.precondition(grad.double(), x.double(), bias_grad=bias.double(), **inverse_of)
    co.foreach_precondition_([grad], [x], bias_grads=[bias], **inverse_of)
    assert want[0][21].abs().max() > torch.finfo(torch.float32).max
    assert torch.equal(grad[21], kept) and bias[21] == kept_bias
    others = [i for i in range(40) if i != 21]
    assert float((grad[others].double() - want[0][others]).norm() / want[0][others].norm()) < 1e-4


def test_the_same_bits_on_all_threads():
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        grads, inputs, biases = [], [], []
        for units, outputs in ((193, 700), (97, 900), (640, 200), (65, 1000)):
            x, _, grad, bias = problem(units, outputs, True)
            grads, inputs, biases = [*grads, grad], [*inputs, x], [*biases, bias]
        co.foreach_precondition_(grads, inputs, bias_grads=biases, damping=0.1)
        results.append(grads + biases)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
