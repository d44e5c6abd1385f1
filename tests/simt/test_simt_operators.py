"""The bindings of the CUDA kernels, on the host: what they refuse, and that support/kernels.py puts them in place.

The ordinary tests of the operators run on them too, as ``[simt-...]``.
"""

import shutil

import pytest
import simt_library
import torch

import consistency_ops as co
from support.kernels import OPERATORS, behind_the_operators, elsewhere

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def simt():
    with behind_the_operators("simt"):
        yield torch.ops.consistency_ops_simt


@pytest.fixture
def tune():
    yield simt_library.tune_operators
    simt_library.tune_operators()


def refuses_float64():
    with pytest.raises(RuntimeError, match="float64 has no CUDA kernel"):
        co.precondition(torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="float64 has no CUDA kernel"):
        co.batch_rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.zeros(3), training=True)


def test_what_has_no_kernel_is_refused(simt):
    refuses_float64()
    with pytest.raises(RuntimeError, match="complex tensors have no CUDA kernel"):
        simt.modulus(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="complex tensors have no CUDA kernel"):
        simt.modulus_complex_backward(torch.ones(3), torch.ones(3, dtype=torch.complex64))


def test_the_library_is_back_afterwards():
    with behind_the_operators("simt"):
        refuses_float64()
    grad = torch.ones(2, 3, dtype=torch.float64)
    assert co.precondition(grad, torch.zeros(4, 3, dtype=torch.float64), damping=1.0).equal(grad)


def test_every_operator_has_a_binding(simt):
    """Under the same schema, so that one paragraph of schemas.inc serves all devices."""
    for name in (*OPERATORS, "modulus_complex_backward"):
        ours, theirs = getattr(simt, name).default, getattr(torch.ops.consistency_ops, name).default
        assert str(ours._schema).replace("_simt::", "::") == str(theirs._schema)
    found = [s.name.partition("::") for s in torch._C._jit_get_all_schemas()]
    names = {name for namespace, _, name in found if namespace == "consistency_ops_simt"}
    assert names == {*OPERATORS, "modulus_complex_backward"}


def test_a_refused_call_changes_nothing(simt):
    """A bound of the kernel that Python does not know."""
    grad, rows = torch.randn(3, 8), torch.randn(1, 8).expand(2**30 + 1, 8)
    before = grad.clone()
    with pytest.raises(RuntimeError, match="at most 2\\^30 rows"):
        co.foreach_precondition_([grad], [rows])
    assert torch.equal(grad, before)


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_every_rung_is_reached_and_agrees(simt, tune, rung):
    grad, rows = torch.randn(20, 40), torch.randn(60, 40)
    want, got = grad.clone(), grad.clone()
    results = []
    for tensor, chosen in ((want, (0, 0)), (got, (rung, 2))):
        tune(*chosen)
        lists = ([], [rows], [], [], [], [], [], [0], [8])
        results.append(simt.foreach_precondition_([tensor], *lists, 0.1, True, 16, 100, 0, 0))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])
    assert simt_library.tune_operators(4) != 0 and simt_library.tune_operators(1, 1025) != 0


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_offsets_beyond_2_to_the_31_elements(simt, tune, tmp_path, rung):
    """Strides whose products need 64 bits, over a sparse file; only the pages that are used exist."""
    tune(rung, 2)
    wide, generator = 2**31 + 17, torch.Generator().manual_seed(0)
    store = torch.from_file(str(tmp_path / "sparse"), shared=True, size=8 * wide, dtype=torch.bfloat16)
    grad, inputs = (torch.randn(n, 5, generator=generator).bfloat16() for n in (3, 7))

    def run(g, x):
        lists = ([], [x], [], [], [], [], [], [0], [1])
        simt.foreach_precondition_([g], *lists, 0.1, False, 2, 100, 0, 0)
        return g

    want = run(grad.clone(), inputs)
    for strides in ((wide, 1), (1, wide)):
        far = store.as_strided((3, 5), strides, 64).copy_(grad)
        assert torch.equal(run(far, inputs), want)
        assert torch.equal(run(grad.clone(), store.as_strided((7, 5), strides, 128).copy_(inputs)), want)


def test_one_input_given_several_times_is_one_covariance(simt, tune):
    """Neighbours with one tensor and one layer number share it, and no others; counted in CTAs, one per chunk."""
    tune(simt_library.ONE_CTA)
    x, counts = torch.randn(30, 40), [torch.tensor([20]), torch.tensor([20])]
    orders = [torch.randperm(40), torch.randperm(40)]

    def ctas(inputs=(x, x, x), numbers=(5, 5, 5), groups=(8, 8, 8), biases=(), counts=(), orders=(), shape=(6, 40)):
        lists = [torch.randn(len(biases), 6).unbind(), inputs, orders, counts, biases]
        lists += [range(len(orders)), range(len(counts)), numbers, groups]
        grads = torch.randn(len(inputs), *shape).unbind()
        simt.foreach_precondition_(grads, *map(list, lists), 0.1, False, 16, 100, 0, 0)
        return simt_library.operators_stats().ctas

    assert ctas() == ctas(biases=(0, 1, 2)) == 3
    assert ctas(counts=(counts[0],) * 3) == ctas(orders=(orders[0],) * 3) == 3
    assert ctas(numbers=(5, 5, 6)) == ctas(groups=(8, 8, 4)) == ctas(biases=(0, 1)) == 6
    assert ctas(counts=counts) == ctas(orders=orders) == ctas((x, x.clone(), x)) == 9
    assert ctas((x, x[:29], x[:29])) == ctas((x, x, x.view(5, 6, 40)[:, ::2])) == 6
    assert ctas((x, x.view(5, 6, 40), x.view(torch.int32).view(torch.float32))) == 3, "the same elements"
    assert ctas((torch.randn(2, 80, 5),) * 3, shape=(6, 40, 1)) == 3 * 2 * 3, "groups of a convolution are layers"
    covariance = torch.eye(16).repeat(3, 1, 1)
    for given, expected in (([covariance] * 3, 3), ([covariance, covariance, covariance.clone()], 6)):
        grads = torch.randn(3, 6, 40).unbind()
        simt.foreach_correct_(grads, [], given, [], [], [], [5] * 3, [8] * 3, 0.1, False, 16, 0, 0)
        assert simt_library.operators_stats().ctas == expected


def test_arguments_go_to_a_device_and_back_as_they_are():
    """support/kernels.py does it for a GPU; here the device is a copy on the CPU: strides, offsets, shared storages."""
    flat = torch.randn(1000)
    grad, bias = flat[3:243].view(40, 6).T, flat[300:306]  # two views of one storage
    rows = torch.randn(60, 80)[:, ::2]
    want_grad, want_bias = co.precondition(grad, rows, chunk=16, bias_grad=bias, damping=0.1)
    untouched = torch.cat([flat[:3], flat[243:300], flat[306:]])
    run = elsewhere(torch.ops.consistency_ops.foreach_precondition_.default, "cpu")
    info, used = run([grad], [bias], [rows], [], [], [0], [], [], [0], [8], 0.1, False, 16, 10_000, 0, 0)
    assert torch.equal(grad, want_grad) and torch.equal(bias, want_bias)
    assert torch.equal(torch.cat([flat[:3], flat[243:300], flat[306:]]), untouched)
    assert info.tolist() == [0, 0, 0] and used.shape == (3,)
    x = torch.randn(4, 6)[::2].T
    y = elsewhere(torch.ops.consistency_ops.modulus.default, "cpu")(x)
    assert torch.equal(y, x.abs()) and y.stride() == torch.empty_like(x).stride()
    assert elsewhere(torch.ops.consistency_ops.modulus.default, "cpu")(torch.empty(0, 3)).shape == (0, 3)


def test_one_tf32_pass_is_less_accurate_and_only_that(simt):
    grad, rows = torch.randn(20, 40), torch.randn(60, 40)
    lists = ([], [rows], [], [], [], [], [], [0], [8])
    results = []
    for tf32 in (False, True):
        results.append(grad.clone())
        simt.foreach_precondition_([results[-1]], *lists, 0.1, False, 16, 100, 0, 0, tf32)
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert 1e-6 < error < 1e-2


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize("mode", ["correct", "whiten", "whiten, coupled decay"])
def test_whole_training_steps(scaling, mode):
    """Capture, mark, covariance, inverse and correction of a network as the preconditioner calls them."""

    def train(kind):
        torch.manual_seed(3)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1 if "decay" in mode else 0.0)
        if mode == "whiten":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        options = dict(mode=mode.partition(",")[0], scaling=scaling, every=2)
        pre = co.Preconditioner(model, optimizer, chunk=16, max_rows=50, damping=0.1, **options)
        with behind_the_operators(kind):
            for _ in range(3):
                for _ in range(2):
                    model(torch.randn(4, 3, 5, 5)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        pre.remove()
        return [p.detach().clone() for p in model.parameters()]

    for ours, theirs in zip(train("simt"), train("library"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
