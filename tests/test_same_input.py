"""Several gradients for one input (q, k, v): one covariance and one inverse, and the numbers of one call for each."""

import itertools

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops
from support.samples import relative_error, rows_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {"damping": 0.1, "scaling": "trace", "chunk": 48, "max_rows": 400, "seed": 9, "group": 8, "step": 2}


def projections(dtype, seed=0):
    """Gradients, inputs, bias gradients and layer numbers: runs of 3, 1, 2, 1 and 2, with convolutions among them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, y = rows_like(500, 130, generator).to(dtype), rows_like(90, 60, generator).to(dtype)
    maps = rows_like(4 * 13 * 11, 20, generator).reshape(4, 13, 11, 20).movedim(-1, 1).to(dtype)
    grads = [normal(64, 130), normal(0, 130), normal(17, 130), normal(9, 60), normal(70, 60), normal(33, 60)]
    grads += [normal(5, 60), normal(12, 20, 3, 3), normal(7, 20, 1, 1)]
    inputs = [x, x, x, y, y, y, y, maps, maps]
    biases = [normal(64), normal(0), normal(17), None, normal(70), normal(33), None, None, None]
    return grads, inputs, biases, [4, 4, 4, 1, 1, 1, 1, 6, 6]


def clones(tensors):
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def together(grads, inputs, biases, layers):
    grads, biases = clones(grads), clones(biases)
    info, used = co.foreach_precondition_(
        grads, inputs, bias_grads=biases, layers=layers, return_damping=True, **OPTIONS
    )
    return [*grads, *(b for b in biases if b is not None), info, used]


def apart(grads, inputs, biases, layers):
    """Run the call with a copy of the input for each layer."""
    return together(grads, clones(inputs), biases, layers)


def close(got, want, dtype, kernels):
    """Compare the bits on the CPU; on CUDA other CTAs share the rows, so that sums are rounded otherwise."""
    eps = torch.finfo(torch.float32).eps
    bound = 4 * eps * (1 + OPTIONS["chunk"] / 0.1) + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    for a, b in zip(got, want, strict=True):
        if kernels.kind == "library":
            assert torch.equal(a, b)
        elif b.numel():
            assert relative_error(a.double().numpy(), b.double().numpy()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_numbers_as_one_copy_of_the_input_each(dtype, kernels):
    problem = projections(dtype)
    close(together(*problem), apart(*problem), dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_covariance_given_several_times(dtype, kernels):
    grads, inputs, biases, layers = projections(dtype)
    division = {key: OPTIONS[key] for key in ("chunk", "group", "seed", "step")}
    once = {}
    covariances = []
    for grad, x, bias, layer in zip(grads, inputs, biases, layers, strict=True):
        key = id(x), bias is None
        if key not in once:
            (once[key],) = ops.foreach_covariance(
                [x], grads=[grad], bias=[bias is not None], layers=[layer], max_rows=400, **division
            )
        covariances.append(once[key])
    results = []
    for given in (covariances, clones(covariances)):
        got, got_biases = clones(grads), clones(biases)
        info = ops.foreach_correct_(
            got, given, bias_grads=got_biases, damping=0.1, scaling="trace", layers=layers, **division
        )
        results.append([*got, *(b for b in got_biases if b is not None), *info])
    close(*results, dtype, kernels)
    close(results[0], together(grads, inputs, biases, layers), dtype, type(kernels)("rounded"))


def test_a_chunk_that_fails_fails_for_all(kernels):
    grads, inputs, biases, layers = projections(torch.float32)
    inputs[0][2:4, 7] = torch.nan  # every second row is used
    grads[1], biases[1] = torch.ones(2, 130), torch.ones(2)  # without outputs it would say nothing of its own
    results = together(grads, inputs, biases, layers)
    info = results[-2].split([3, 3, 3, 2, 2, 2, 2, 1, 1])
    assert info[0].count_nonzero() == 1 and torch.equal(info[0], info[1]) and torch.equal(info[0], info[2])
    assert not any(i.any() for i in info[3:])
    close(results, apart(grads, inputs, biases, layers), torch.float32, kernels)
    kept = (results[0] == grads[0]).all(0)
    assert kept[7] and 40 <= kept.sum() <= 48 and torch.equal((results[2] == grads[2]).all(0), kept)


@pytest.mark.parametrize("rows", [0, 5])
def test_rows_that_are_counted(rows, kernels):
    grads, inputs, _, layers = (values[:3] for values in projections(torch.float32))
    counts = [torch.tensor([rows])] * 3
    got, want = clones(grads), clones(grads)
    info = co.foreach_precondition_(got, inputs, layers=layers, row_counts=counts, **OPTIONS)
    other = co.foreach_precondition_(want, clones(inputs), layers=layers, row_counts=counts, **OPTIONS)
    close([*got, info], [*want, other], torch.float32, kernels)
    assert torch.equal(got[0], grads[0]) == (rows == 0)


def test_what_differs_is_not_shared():
    """Position by position, each entry alone decides: nothing is taken from a neighbour that is another layer."""
    grads, x = [torch.randn(6, 60) for _ in range(4)], torch.randn(90, 60)
    generator = torch.Generator().manual_seed(1)
    permutation = torch.randperm(60, generator=generator)
    differing = {
        "layers": [0, 1, 1, 2],
        "inputs": [x, x[:80], x[:80], x.T.contiguous().T],
        "row_counts": [None, torch.tensor([30]), torch.tensor([40]), None],
        "permutation": [None, permutation, permutation.flip(0), None],
    }
    for name, values in differing.items():
        keywords = {"inputs": [x] * 4, "layers": [0] * 4, "chunk": 16, "damping": 0.1} | {name: values}
        got = clones(grads)
        co.foreach_precondition_(got, **keywords)
        for i, grad in enumerate(clones(grads)):
            co.foreach_precondition_([grad], **{k: [v[i]] if isinstance(v, list) else v for k, v in keywords.items()})
            assert torch.equal(got[i], grad), name


def test_the_order_of_the_layers_is_free():
    """Only neighbours share; the results do not depend on who is whose neighbour."""
    problem = projections(torch.float32)
    want = together(*problem)
    order = [3, 0, 7, 5, 2, 8, 1, 6, 4]
    got = together(*([values[i] for i in order] for values in problem))
    for position, i in enumerate(order):
        assert torch.equal(got[position], want[i])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads):
    generator = torch.Generator().manual_seed(0)
    x = rows_like(600, 512, generator)
    grads = [torch.randn(out, 512, generator=generator) for out in (512, 256, 300)]
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append(clones(grads))
        co.foreach_precondition_(results[-1], [x] * 3, layers=[0] * 3, damping=0.1)
    assert all(map(torch.equal, *results))


def test_many_layers_of_one_input():
    """They are more than one launch on CUDA can describe."""
    generator = torch.Generator().manual_seed(0)
    x, grads = rows_like(50, 40, generator), torch.randn(150, 3, 40, generator=generator).unbind()
    got, want = clones(grads), torch.cat(grads)
    co.foreach_precondition_(got, [x] * 150, layers=[0] * 150, chunk=16, damping=0.1)
    co.foreach_precondition_([want], [x], chunk=16, damping=0.1)
    assert torch.equal(torch.cat(got), want)


def test_overlapping_gradients_are_still_refused():
    x, flat = torch.randn(20, 8), torch.randn(6, 8)
    for a, b in itertools.permutations([flat, flat[2:]]):
        with pytest.raises(RuntimeError, match="gradients must not overlap"):
            co.foreach_precondition_([a, b], [x, x], layers=[0, 0])
