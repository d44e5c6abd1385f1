"""Bitwise promises: equal over runs, threads, layers in one call, and whether stages are fused or apart."""

import ctypes
import math

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops
from support.samples import build, case, lay_out, relative_error, rows_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {"damping": 0.1, "scaling": "trace", "chunk": 48, "max_rows": 400, "seed": 9}


def network(dtype, input_dtype=None, seed=0):
    """Gradients, inputs and bias gradients of layers of every kind and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    input_dtype = input_dtype or dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    linear, counts = [(100, 333), (7, 48), (129, 49), (1, 1), (10, 700)], (513, 90, 3, 64, 900)
    grads = [normal(out, units) for out, units in linear]
    inputs = [
        rows_like(rows, units, generator).to(input_dtype) for rows, (_, units) in zip(counts, linear, strict=True)
    ]
    grads += [normal(24, 20, 3, 3), normal(12, 8, 5)]
    maps = rows_like(4 * 13 * 11, 20, generator).reshape(4, 13, 11, 20).movedim(-1, 1)
    inputs += [maps.to(input_dtype), rows_like(300, 24, generator).to(input_dtype)]
    bias_grads = [normal(len(grad)) if i % 3 else None for i, grad in enumerate(grads)]
    grads[0] = lay_out(grads[0], "transposed")
    return grads, inputs, bias_grads


def clones(tensors):
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def fused(grads, inputs, bias_grads, **keywords):
    grads, bias_grads = clones(grads), clones(bias_grads)
    info = co.foreach_precondition_(grads, inputs, bias_grads=bias_grads, **OPTIONS, **keywords)
    return [*grads, *(bias for bias in bias_grads if bias is not None), info]


def staged(grads, inputs, bias_grads):
    grads, bias_grads = clones(grads), clones(bias_grads)
    bias = [b is not None for b in bias_grads]
    division = {key: OPTIONS[key] for key in ("chunk", "seed")}
    # The group defaults to a sector of the gradient's dtype, which these stages learn from `grads`.
    covariances = ops.foreach_covariance(inputs, grads=grads, bias=bias, max_rows=OPTIONS["max_rows"], **division)
    units = [grad.shape[1] + with_bias for grad, with_bias in zip(grads, bias, strict=True)]
    inverses, info, _ = ops.foreach_inverse(
        covariances, units=units, damping=OPTIONS["damping"], scaling=OPTIONS["scaling"], chunk=OPTIONS["chunk"]
    )
    ops.foreach_apply_(grads, inverses, info, bias_grads=bias_grads, **division)
    return [*grads, *(b for b in bias_grads if b is not None), info]


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        assert a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers)), i


@pytest.mark.parametrize("run", [fused, staged])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_over_runs_and_threads(dtype, run):
    problem = network(dtype)
    torch.set_num_threads(1)
    want = run(*problem)
    for count in (1, 2, 2, 3, 7):
        torch.set_num_threads(count)
        assert_same_bits(run(*problem), want)


def test_same_bits_for_a_large_layer_over_threads():
    """Rows, outputs and chunks are each split over threads somewhere; the result must not know."""
    generator = torch.Generator().manual_seed(1)
    for rows, units, outputs, chunk in (
        (4096, 64, 8, 64),
        (256, 2048, 2, 128),
        (128, 256, 4096, 256),
        (2048, 1024, 1024, 32),
    ):
        inputs, grad = torch.randn(rows, units, generator=generator), torch.randn(outputs, units, generator=generator)
        torch.set_num_threads(1)
        want = co.precondition_ex(grad, inputs, chunk=chunk, damping=0.1)
        torch.set_num_threads(2)
        for _ in range(3):
            assert_same_bits(co.precondition_ex(grad, inputs, chunk=chunk, damping=0.1), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_foreach_equals_one_call_a_layer(dtype, kernels):
    """On CUDA up to rounding, because the other layers of a launch decide how many CTAs share the rows of one."""
    grads, inputs, bias_grads = network(dtype)
    together = fused(grads, inputs, bias_grads)
    apart, biases, infos = [], [], []
    for layer, problem in enumerate(zip(grads, inputs, bias_grads, strict=True)):
        *result, info = fused(*([value] for value in problem), layers=[layer])
        apart.append(result[0])
        biases += result[1:]
        infos.append(info)
    if kernels.kind == "library":
        assert_same_bits([*apart, *biases, torch.cat(infos)], together)
    else:
        bound = 4 * torch.finfo(torch.float32).eps * (1 + OPTIONS["chunk"] / OPTIONS["damping"])
        bound += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        for got, want in zip([*apart, *biases, torch.cat(infos)], together, strict=True):
            assert relative_error(got.double().numpy(), want.double().numpy()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_precondition_is_position_zero_of_the_foreach_form(dtype):
    for grad, inputs, bias_grad in zip(*network(dtype), strict=True):
        result = co.precondition_ex(grad, inputs, bias_grad=bias_grad, **OPTIONS)
        corrected = result[0] if bias_grad is not None else (result[0],)
        assert_same_bits([*corrected, result[1]], fused([grad], [inputs], [bias_grad]))
        plain = co.precondition(grad, inputs, bias_grad=bias_grad, **OPTIONS)
        assert_same_bits(plain if bias_grad is not None else [plain], corrected)


def test_layer_number_decides_the_division_not_the_position():
    grads, inputs, bias_grads = network(torch.float32)
    reverse = [values[::-1] for values in (grads, inputs, bias_grads)]
    count = len(grads)
    want = fused(grads, inputs, bias_grads)[:count]
    got = fused(*reverse, layers=list(range(count))[::-1])[:count]
    assert_same_bits(got[::-1], want)
    other = fused(grads, inputs, bias_grads, layers=list(range(5, 5 + count)))[:count]
    assert not torch.equal(other[0], want[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_apart_equal_the_fused_call(dtype):
    """They are equal up to the rounding of the stored matrices; cond <= 1 + units / damping with trace scaling."""
    problem = network(dtype)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    for got, want in zip(staged(*problem), fused(*problem), strict=True):
        units = OPTIONS["chunk"]
        bound = 4 * eps * (1 + units / OPTIONS["damping"]) + rounding
        assert relative_error(got.double().numpy(), want.double().numpy()) <= bound


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_and_apply_in_one_launch_give_the_same_bits(dtype, scaling):
    """This holds too if a chunk needs a retry or has no inverse, or a layer has no outputs."""
    grads, inputs, bias_grads = network(dtype)
    grads, inputs, bias_grads = (
        [*grads, torch.empty(0, 30).to(dtype)],
        [*inputs, inputs[1][:, :30]],
        [*bias_grads, None],
    )
    options = {"chunk": 48, "seed": 9}
    bias = [b is not None for b in bias_grads]
    covariances = ops.foreach_covariance(inputs, grads=grads, bias=bias, **options)
    covariances[0][2, 7, 7] = math.nan
    covariances[4][3] -= 0.5 * torch.eye(48)
    units = [grad.shape[1] + with_bias for grad, with_bias in zip(grads, bias, strict=True)]
    damping = {"damping": 0.1, "scaling": scaling}
    got, want = (clones(grads), clones(bias_grads)), (clones(grads), clones(bias_grads))
    inverses, info, used = ops.foreach_inverse(covariances, units=units, chunk=48, **damping)
    ops.foreach_apply_(want[0], inverses, info, bias_grads=want[1], **options)
    results = ops.foreach_correct_(got[0], covariances, bias_grads=got[1], **damping, **options)
    assert_same_bits([t for ts in got for t in ts if t is not None], [t for ts in want for t in ts if t is not None])
    assert_same_bits(results, [info, used])
    assert (info != 0).sum() == 1 and (used > 0.1).sum() >= 2
    assert not torch.equal(got[0][0], grads[0]) and not torch.equal(got[0][4], grads[4])


def test_row_counts_use_the_first_rows_only():
    grads, inputs, bias_grads = network(torch.float32)
    keep = [200, 90, 1, 10, 450]
    garbage = clones(inputs[:5])
    for tensor, count in zip(garbage, keep, strict=True):
        tensor[count:] = float("nan")
    want = fused(grads[:5], [x[:count].contiguous() for x, count in zip(inputs[:5], keep, strict=True)], bias_grads[:5])
    counts = [torch.tensor([count]) for count in keep]
    assert_same_bits(fused(grads[:5], garbage, bias_grads[:5], row_counts=counts), want)


def test_damping_used_is_returned_in_layer_order():
    grads, inputs, bias_grads = network(torch.float32)
    info, used = co.foreach_precondition_(
        clones(grads), inputs, bias_grads=clones(bias_grads), return_damping=True, **OPTIONS
    )
    assert used.shape == info.shape and used.dtype == torch.float32
    assert torch.equal(used, torch.full_like(used, OPTIONS["damping"]))


# Instruction sets


@pytest.fixture
def library():
    import consistency_ops._C as extension

    library = ctypes.CDLL(extension.__file__)
    library.co_cpu_isa.restype = ctypes.c_char_p
    before = library.co_cpu_isa()
    yield library
    library.co_set_cpu_isa(before)


def available_isas(library):
    names = (b"portable", b"avx2", b"avx512", b"avx512bf16", b"amx", b"amx_model")
    return [name for name in names if library.co_set_cpu_isa(name) == 0]


def test_unknown_instruction_set_is_refused(library):
    before = library.co_cpu_isa()
    for name in (b"", b"sse9", None):
        assert library.co_set_cpu_isa(name) == -1
    assert library.co_cpu_isa() == before


def test_every_instruction_set_agrees(library):
    """The same cases on every path this machine has: each within the accuracy of a chunk of the portable one."""
    isas = available_isas(library)
    assert b"portable" in isas
    for index in range(120):
        grad, inputs, keywords = build(case(index))
        keywords["damping"] = max(keywords["damping"], 0.1)
        results = {}
        for isa in isas:
            assert library.co_set_cpu_isa(isa) == 0 and library.co_cpu_isa() == isa
            corrected, info, _ = co.precondition_ex(grad, inputs, **keywords)
            corrected = corrected if isinstance(corrected, tuple) else (corrected,)
            results[isa] = torch.cat([part.double().flatten() for part in corrected])
            assert not info.any()
        eps = torch.finfo(torch.float64 if torch.float64 in (grad.dtype, inputs.dtype) else torch.float32).eps
        rounding = 2 * torch.finfo(grad.dtype).eps if grad.itemsize == 2 else 0
        rows = inputs.double().movedim(1, -1).flatten(0, -2) if inputs.dim() == grad.dim() > 2 else inputs.double()
        # cond of a damped chunk <= 1 + trace / damping: the rows here have second moments of at most one or two a unit.
        largest = float(rows.square().sum(-1).mean()) + 1
        condition = 1 + largest / keywords["damping"] * (1 if keywords["scaling"] == "absolute" else 10)
        for isa in isas[1:]:
            error = relative_error(results[isa].numpy(), results[b"portable"].numpy())
            assert error <= 20 * eps * condition + rounding, (index, isa, error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_deterministic(library, dtype):
    problem = network(dtype)
    for isa in available_isas(library):
        library.co_set_cpu_isa(isa)
        torch.set_num_threads(1)
        want = fused(*problem)
        torch.set_num_threads(2)
        assert_same_bits(fused(*problem), want)
