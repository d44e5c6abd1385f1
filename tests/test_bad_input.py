"""Bad arguments of the correction: an exception before anything is touched, `op: what must hold, got value`.

Also what memory it may touch, and the modes of torch it works in.
"""

import math
import multiprocessing

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops, reference
from support.samples import layer, relative_error, same_bits

# Arguments

GRAD, INPUTS = layer()
RANGES = {  # keyword arguments: what the message must say after "precondition: "
    "chunk must be None or in [1, 16384], got 0": {"chunk": 0},
    "chunk must be None or in [1, 16384], got 16385": {"chunk": 16385},
    "chunk must be None or in [1, 16384], got -128": {"chunk": -128},
    "group must be in [1, ": {"group": 0},
    "got 129": {"group": 129},
    "got 17": {"group": 17, "chunk": 16},
    "max_rows must be at least 1, got 0": {"max_rows": 0},
    "got -5": {"max_rows": -5},
    "damping must be": {"damping": -1.0},
    "got nan": {"damping": math.nan},
    "got inf": {"damping": math.inf},
    "scaling must be": {"scaling": "relative"},
}
TYPES = [
    {"chunk": 12.5},
    {"chunk": "128"},
    {"group": 1.5},
    {"max_rows": None},
    {"max_rows": 1e4},
    {"damping": "1"},
    {"damping": None},
    {"damping": 1j},
    {"seed": 0.5},
    {"seed": None},
    {"step": 0.5},
    {"permutation": [0, 1]},
    {"bias_grad": 3.0},
]


@pytest.mark.parametrize("message", RANGES)
def test_ranges(message):
    for function in (co.precondition, co.precondition_ex):
        with pytest.raises(ValueError) as error:
            function(GRAD, INPUTS, **RANGES[message])
        text = str(error.value)
        assert text.startswith("precondition") and ": " in text and message in text, text
    before = GRAD.clone()
    with pytest.raises(ValueError) as error:
        co.foreach_precondition_([GRAD], [INPUTS], **RANGES[message])
    assert str(error.value).startswith("foreach_precondition_: "), error.value
    assert message in str(error.value)
    assert same_bits(GRAD, before)


@pytest.mark.parametrize("keywords", TYPES, ids=str)
def test_types_of_arguments(keywords):
    with pytest.raises(TypeError):
        co.precondition(GRAD, INPUTS, **keywords)


def test_the_exact_message_of_the_contract():
    with pytest.raises(ValueError) as error:
        co.precondition(GRAD, INPUTS, chunk=0)
    assert str(error.value) == "precondition: chunk must be None or in [1, 16384], got 0"


SHAPES = {  # gradient, inputs, what the message names
    "0-dim gradient": (torch.tensor(1.0), INPUTS, "dimension"),
    "1-dim gradient": (torch.ones(40), INPUTS, "dimension"),
    "0-dim inputs": (GRAD, torch.tensor(1.0), "()"),
    "other units": (GRAD, INPUTS[:, :39], "39"),
    "transposed": (GRAD, INPUTS.T, "50"),
    "6-dim gradient": (torch.ones(2, 3, 1, 1, 1, 1), torch.ones(2, 3, 1, 1, 1, 1), "dimension"),
    "conv groups that do not divide": (torch.ones(6, 4, 3, 3), torch.ones(2, 10, 5, 5), "10"),
    "conv groups that do not divide the outputs": (torch.ones(7, 4, 3, 3), torch.ones(2, 8, 5, 5), "7"),
    "conv of another rank": (torch.ones(6, 4, 3, 3), torch.ones(2, 4, 5), ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    grad, inputs, part = SHAPES[name]
    before = grad.clone()
    with pytest.raises(ValueError) as error:
        co.precondition(grad, inputs)
    assert str(error.value).startswith("precondition: "), error.value
    assert part in str(error.value), error.value
    with pytest.raises(ValueError) as error:
        co.foreach_precondition_([grad], [inputs])
    assert str(error.value).startswith("foreach_precondition_: "), error.value
    assert same_bits(grad, before)


BIAS_AND_PERMUTATION = {
    "bias of another length": (ValueError, {"bias_grad": torch.ones(5)}),
    "2-dim bias": (ValueError, {"bias_grad": torch.ones(6, 1)}),
    "integer bias": (TypeError, {"bias_grad": torch.ones(6, dtype=torch.int64)}),
    "complex bias": (NotImplementedError, {"bias_grad": torch.ones(6, dtype=torch.complex64)}),
    "permutation too short": (ValueError, {"permutation": torch.arange(39)}),
    "permutation without the bias": (ValueError, {"permutation": torch.arange(40), "bias_grad": torch.ones(6)}),
    "duplicated index": (ValueError, {"permutation": torch.cat([torch.arange(39), torch.tensor([0])])}),
    "index too large": (ValueError, {"permutation": torch.cat([torch.arange(39), torch.tensor([40])])}),
    "huge index": (ValueError, {"permutation": torch.cat([torch.arange(39), torch.tensor([2**62])])}),
    "negative index": (ValueError, {"permutation": torch.cat([torch.arange(39), torch.tensor([-1])])}),
    "2-dim permutation": (ValueError, {"permutation": torch.arange(40).reshape(8, 5)}),
    "float permutation": (TypeError, {"permutation": torch.arange(40.0)}),
    "int16 permutation": (TypeError, {"permutation": torch.arange(40, dtype=torch.int16)}),
}


@pytest.mark.parametrize("name", BIAS_AND_PERMUTATION)
def test_bias_and_permutation(name):
    kind, keywords = BIAS_AND_PERMUTATION[name]
    with pytest.raises(kind) as error:
        co.precondition(GRAD, INPUTS, **keywords)
    assert str(error.value).startswith("precondition: "), error.value


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_bad_permutation_is_refused_even_where_it_makes_no_difference(chunk):
    with pytest.raises(ValueError):
        co.precondition(GRAD, INPUTS, permutation=torch.zeros(40, dtype=torch.int64), chunk=chunk)


def nested():
    return torch.nested.nested_tensor([torch.ones(2, 40), torch.ones(3, 40)], layout=torch.jagged)


KINDS = {  # a bad gradient, a bad input
    "int64": (TypeError, GRAD.long(), INPUTS.long()),
    "bool": (TypeError, GRAD.bool(), INPUTS.bool()),
    "float8": (TypeError, GRAD.to(torch.float8_e4m3fn), INPUTS.to(torch.float8_e4m3fn)),
    "complex64": (NotImplementedError, GRAD.to(torch.complex64), INPUTS.to(torch.complex64)),
    "complex128": (NotImplementedError, GRAD.to(torch.complex128), INPUTS.to(torch.complex128)),
    "sparse": (NotImplementedError, GRAD.to_sparse(), INPUTS.to_sparse()),
    "sparse rows": (NotImplementedError, GRAD.to_sparse_csr(), INPUTS.to_sparse_csr()),
    "nested": (NotImplementedError, nested(), nested()),
    "list": (TypeError, GRAD.tolist(), INPUTS.tolist()),
    "array": (TypeError, GRAD.numpy(), INPUTS.numpy()),
    "None": (TypeError, None, None),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_kinds_of_tensor(name):
    kind, bad_grad, bad_inputs = KINDS[name]
    for grad, inputs in ((bad_grad, INPUTS), (GRAD, bad_inputs)):
        with pytest.raises(kind) as error:
            co.precondition(grad, inputs)
        assert "precondition: " in str(error.value), error.value
        with pytest.raises(kind):
            co.foreach_precondition_([grad], [inputs])


def test_devices():
    meta = torch.ones(6, 40, device="meta")
    for grad, inputs in ((meta, INPUTS), (GRAD, torch.ones(50, 40, device="meta"))):
        with pytest.raises(RuntimeError) as error:
            co.precondition(grad, inputs)
        assert "cpu" in str(error.value) and "meta" in str(error.value), error.value
        with pytest.raises(RuntimeError):
            co.foreach_precondition_([grad], [inputs])
    with pytest.raises(RuntimeError):
        co.precondition(GRAD, INPUTS, bias_grad=torch.ones(6, device="meta"))
    with pytest.raises(RuntimeError):
        co.precondition(GRAD, INPUTS, permutation=torch.arange(40, device="meta"))


def test_meta_tensors_give_shapes():
    grad, inputs = torch.ones(6, 40, device="meta"), torch.ones(50, 40, device="meta")
    corrected, info, used = co.precondition_ex(grad, inputs, chunk=16)
    assert corrected.device.type == info.device.type == "meta"
    assert corrected.shape == (6, 40) and info.shape == used.shape == (3,)
    assert co.foreach_precondition_([grad, grad.clone()], [inputs, inputs], chunk=16).shape == (6,)
    assert co.chunked_covariance(inputs, chunk=16).shape == (3, 16, 16)


def test_lists():
    for grads, inputs in (([GRAD], []), ([], [INPUTS]), ([GRAD, GRAD.clone()], [INPUTS])):
        with pytest.raises(ValueError):
            co.foreach_precondition_(grads, inputs)
    for keywords in ({"bias_grads": []}, {"permutation": []}, {"layers": []}, {"row_counts": []}):
        with pytest.raises(ValueError):
            co.foreach_precondition_([GRAD.clone()], [INPUTS], **keywords)
    with pytest.raises(TypeError):
        co.foreach_precondition_([GRAD, None], [INPUTS, INPUTS])
    with pytest.raises((TypeError, ValueError)):
        co.foreach_precondition_(GRAD, INPUTS)
    assert co.foreach_precondition_([], []).shape == (0,)


def test_a_refused_call_changes_nothing():
    first, inputs = layer(seed=1)
    before = first.clone()
    bad = {
        "units": (GRAD[:, :39].clone(), INPUTS, {}),
        "dtype": (GRAD.long(), INPUTS, {}),
        "complex": (GRAD.to(torch.complex64), INPUTS, {}),
        "meta": (GRAD.to("meta"), INPUTS, {}),
        "bias": (GRAD.clone(), INPUTS, {"bias_grads": [None, torch.ones(9)]}),
        "permutation": (GRAD.clone(), INPUTS, {"permutation": [None, torch.zeros(40, dtype=torch.int64)]}),
        "row count": (GRAD.clone(), INPUTS, {"row_counts": [None, torch.ones(2)]}),
    }
    for name, (grad, x, keywords) in bad.items():
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            co.foreach_precondition_([first, grad], [inputs, x], **keywords)
        assert same_bits(first, before), name


def test_overlapping_gradients_are_refused():
    grad = torch.randn(8, 40)
    flat = torch.randn(700)
    overlaps = {
        "the same tensor": [grad, grad],
        "rows of the other": [grad, grad[2:4]],
        "a transposed view": [flat[:64].view(8, 8), flat[:64].view(8, 8).T],
        "an expanded gradient": [torch.randn(1, 40).expand(8, 40)],
        "rows that share elements": [torch.as_strided(flat, (8, 40), (20, 1))],
    }
    for name, grads in overlaps.items():
        before = [g.clone() for g in grads]
        inputs = [torch.randn(30, g.shape[1]) for g in grads]
        with pytest.raises((ValueError, RuntimeError)) as error:
            co.foreach_precondition_(grads, inputs)
        assert "overlap" in str(error.value), (name, error.value)
        assert all(same_bits(a, b) for a, b in zip(grads, before, strict=True)), name
    other, bias, inputs = torch.randn(8, 40), torch.randn(8), torch.randn(30, 40)
    with pytest.raises((ValueError, RuntimeError), match="overlap"):
        co.foreach_precondition_([grad], [inputs], bias_grads=[grad[:, 0]])
    with pytest.raises((ValueError, RuntimeError), match="overlap"):
        co.foreach_precondition_([grad, other], [inputs, inputs], bias_grads=[bias, bias])


def test_gradients_side_by_side_in_one_buffer_are_not_an_overlap():
    flat = torch.randn(8 * 40 + 6 * 40 + 8)
    grads, bias = [flat[:320].view(8, 40), flat[320:560].view(6, 40)], flat[560:]
    want = [g.clone() for g in grads]
    inputs = [torch.randn(30, 40), torch.randn(20, 40)]
    co.foreach_precondition_(grads, inputs, bias_grads=[bias, None])
    co.foreach_precondition_(want, inputs, bias_grads=[torch.zeros(8), None])
    assert same_bits(grads[1], want[1])
    # The columns of one buffer, as of a fused projection whose blocks are corrected apart.
    fused = torch.randn(8, 80)
    left, right = fused[:, :40].clone(), fused[:, 40:].clone()
    co.foreach_precondition_([fused[:, :40], fused[:, 40:]], [inputs[0], inputs[0]])
    co.foreach_precondition_([left, right], [inputs[0], inputs[0]])
    assert same_bits(fused[:, :40], left)
    assert same_bits(fused[:, 40:], right)


def test_an_input_that_is_the_gradient():
    """A gradient that is its own input is refused, or corrected as a copy would be."""
    square = torch.randn(40, 40)
    want = co.precondition(square.clone(), square.clone())
    aliased = square.clone()
    refusal = ""
    try:
        co.foreach_precondition_([aliased], [aliased])
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    assert same_bits(aliased, square if refusal else want)
    assert not refusal or "overlap" in refusal
    assert same_bits(co.precondition(square, square), want)


# Memory


def test_offsets_beyond_2_to_the_31_elements(tmp_path):
    """Strides whose products need 64 bits, over a sparse file; only the pages that are used exist."""
    grad, inputs = layer(outputs=3, units=5, rows=4)
    wide = 2**31 + 17
    elements = 5 * wide
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(4 * elements)
    store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=elements, dtype=torch.float32)
    want, want_bias = co.precondition(grad, inputs, damping=0.1, chunk=2, group=1, bias_grad=torch.ones(3))
    far = ((wide, 1), (1, wide))
    for grad_strides, input_strides in (*((f, (8, 1)) for f in far), *(((8, 1), f) for f in far)):
        far_grad = store.as_strided((3, 5), grad_strides, 64).copy_(grad)
        far_inputs = store.as_strided((4, 5), input_strides, 128).copy_(inputs)
        got, got_bias = co.precondition(far_grad, far_inputs, damping=0.1, chunk=2, group=1, bias_grad=torch.ones(3))
        assert same_bits(got, want)
        assert same_bits(got_bias, want_bias)
        co.foreach_precondition_([far_grad], [far_inputs], damping=0.1, chunk=2, group=1, bias_grads=[torch.ones(3)])
        assert same_bits(far_grad, want), (grad_strides, input_strides)


def test_nothing_is_read_or_written_outside_the_tensors():
    """Guard elements around strided gradients stay, guard NaNs around strided inputs are never seen."""
    for units in (1, 7, 15, 16, 17, 31, 33, 100):
        for grad_dtype, input_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
            guard_x = torch.full((40, 3 * units + 8), math.nan, dtype=input_dtype)
            guard_g = torch.full((20, 2 * units + 8), 77.0, dtype=grad_dtype)
            x, g = guard_x[3:33, 5 : 5 + units], guard_g[4:16, 6 : 6 + units]
            x.normal_()
            g.normal_()
            want = co.precondition(g.clone(), x.clone(), chunk=16, damping=0.5)
            co.foreach_precondition_([g], [x], chunk=16, damping=0.5)
            assert same_bits(g, want)
            g.fill_(77.0)
            assert (guard_g == 77.0).all()


# Modes


def test_inference_mode_and_no_grad():
    grad, inputs = layer()
    want = co.precondition(grad, inputs)
    with torch.inference_mode():
        assert same_bits(co.precondition(grad.clone(), inputs.clone()), want)
        inside = [grad.clone()]
        co.foreach_precondition_(inside, [inputs])
        assert same_bits(inside[0], want)
    with torch.no_grad():
        parameter = torch.nn.Parameter(grad.clone())
        co.foreach_precondition_([parameter], [inputs.clone().requires_grad_()])
        assert same_bits(parameter.data, want)


def test_tensors_that_require_grad():
    """The correction has no derivative; the result is detached, or backward says so; never a silent zero."""
    grad, inputs = layer()
    corrected = co.precondition(grad.clone().requires_grad_(), inputs)
    if corrected.requires_grad:
        with pytest.raises(RuntimeError):
            corrected.sum().backward()
    leaf = grad.clone().requires_grad_()
    before = leaf.detach().clone()
    try:
        co.foreach_precondition_([leaf], [inputs])
    except RuntimeError:
        assert same_bits(leaf.detach(), before)
    else:
        assert same_bits(leaf.detach(), co.precondition(grad, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    grad, inputs = layer(dtype=dtype)
    want = co.precondition(grad, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(co.precondition(grad, inputs), want)


def results(grad, inputs):
    """Of operators that use several threads at these sizes."""
    found = co.precondition(grad, inputs), co.modulus(inputs), co.chunked_covariance(inputs, chunk=64)
    return [tensor.numpy().tobytes() for tensor in found]


def correct_in_child(queue, threads, grad, inputs):
    if threads is not None:
        torch.set_num_threads(threads)
    queue.put(results(grad, inputs))


@pytest.mark.parametrize("threads", [None, 1])
def test_after_fork(threads):
    """A forked worker can use the operators after its parent has, with the parent's threads: they are gone in it."""
    torch.set_num_threads(2)
    grad, inputs = layer(256, 512, 2000)
    want = results(grad, inputs)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=correct_in_child, args=(queue, threads, grad, inputs))
    child.start()
    try:
        got = queue.get(timeout=60)
        child.join(60)
    finally:
        child.kill()
    assert child.exitcode == 0
    assert got == want


def test_stages_check_their_arguments():
    grad, inputs = layer()
    covariance = ops.foreach_covariance([inputs], bias=[False], chunk=16, group=8, max_rows=100, seed=0, step=0)
    keywords = {"units": [40], "damping": 0.1, "scaling": "absolute", "chunk": 16}
    inverses, info, _ = ops.foreach_inverse(covariance, **keywords)
    division = {"bias_grads": None, "chunk": 16, "group": 8, "seed": 0, "step": 0}
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.foreach_inverse([covariance[0][:, :8]], **keywords)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.foreach_inverse(covariance, **{**keywords, "units": [400]})
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.foreach_inverse([covariance[0].long()], **keywords)
    before = grad.clone()
    for bad in ([inverses[0][:1]], [inverses[0].long()], [], [inverses[0], inverses[0]]):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.foreach_apply_([grad], bad, info, **division)
    for bad in (info[:1], info.long(), info.to("meta")):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.foreach_apply_([grad], inverses, bad, **division)
    for bad in ([covariance[0][:1]], [covariance[0].long()], [], [covariance[0]] * 2, [covariance[0].to("meta")]):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.foreach_correct_([grad], bad, **division)
    with pytest.raises(RuntimeError, match="foreach_correct_: gradients must not overlap"):
        ops.foreach_correct_([grad, grad], covariance * 2, **{**division, "bias_grads": None})
    with pytest.raises(ValueError, match="foreach_correct_: damping must be finite and at least 0, got -1"):
        ops.foreach_correct_([grad], covariance, damping=-1, **division)
    assert same_bits(grad, before)
    bad = covariance[0].clone()
    bad[1, 0, 0] = math.nan
    inverses, info, _ = ops.foreach_inverse([bad], **keywords)
    assert (info > 0).tolist() == [False, True, False]
    ops.foreach_apply_([grad], inverses, info, **division)
    order = reference.division(40, 16, 8)
    assert same_bits(grad[:, order[14:27]], before[:, order[14:27]])
    kept = torch.cat([order[:14], order[27:]])
    want, *_ = reference.precondition(before.double(), inputs.double(), damping=0.1, chunk=16, group=8)
    assert relative_error(grad[:, kept].double().numpy(), want[:, kept].numpy()) < 1e-4
