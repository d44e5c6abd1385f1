"""The modulus as a C++ node of autograd (csrc/torch_abi) and in Python: whatever autograd offers, the same on both."""

import copy
import gc
import importlib
import re
import sys
import sysconfig
import weakref

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops import reference
from consistency_ops.ops import library
from support import processes

implementation = sys.modules[co.modulus.__module__]  # the function hides the module of its name


@pytest.fixture(params=["C++", "Python"], autouse=True)
def path(request, monkeypatch):
    if request.param == "C++" and library.torch_abi is None:
        pytest.skip("csrc/torch_abi is not built for this torch")
    if request.param == "Python":
        monkeypatch.setattr(implementation, "_node", None)
    return request.param


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def is_node(y):
    return y.grad_fn.name() == "ModulusBackward"


def test_which_of_them_runs(path):
    assert is_node(co.modulus(leaf(3))) == (path == "C++")
    assert is_node(co.nn.Modulus()(leaf(3))) == (path == "C++")


def test_the_name_says_the_torch_it_was_built_for(path):
    if path == "C++":
        assert library.torch_abi.__spec__.name.endswith("._torch_abi_" + re.sub(r"\W", "_", torch.__version__))
        assert co.build_info()["torch_abi"] == "loaded"


def test_one_of_another_torch_or_a_damaged_one_is_left_alone(path, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert library._load_torch_abi() is None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / f"_torch_abi_2_99_0_cpu{suffix}").write_bytes(b"\x7fELF, cut off")
    monkeypatch.setattr(co, "__path__", [*co.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="too short|invalid ELF|not a mach-o|slice"):
        importlib.import_module("consistency_ops._torch_abi_2_99_0_cpu")
    assert library._load_torch_abi() is None


def test_one_of_other_sources_is_left_alone(path, monkeypatch):
    """It happens after `git pull` without `make build`."""
    if library.torch_abi is None:
        pytest.skip("csrc/torch_abi is not built for this torch")
    assert library._load_torch_abi() is library.torch_abi
    for digest in ("0" * 64, None):
        monkeypatch.setattr(library.torch_abi, "digest", digest)
        assert library._load_torch_abi() is None
    monkeypatch.delattr(library.torch_abi, "digest")  # older than this check
    assert library._load_torch_abi() is None
    monkeypatch.setattr(library, "_sources", lambda *patterns: [])  # shipped without its sources
    assert library._load_torch_abi() is library.torch_abi


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "empty", "scalar"])
def test_derivatives_of_any_order(layout):
    x = {
        "contiguous": lambda: torch.randn(3, 5),
        "channels_last": lambda: torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(4, 6)[:, ::2],
        "empty": lambda: torch.randn(0, 3),
        "scalar": lambda: torch.randn(()),
    }[layout]()
    x = x.double().requires_grad_()
    assert gradcheck(co.modulus, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(co.modulus, (x,), check_fwd_over_rev=True)


def test_second_derivative_of_a_composition():
    x = leaf(20, dtype=torch.float64)
    results = []
    for function in (co.modulus, reference.modulus):
        (first,) = torch.autograd.grad((function(x * x - 1) ** 3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), x)[0])
    torch.testing.assert_close(*results)


def test_tangent_of_the_incoming_gradient():
    """Forward mode over a backward whose graph was recorded before."""
    x, grad, tangent = leaf(9), torch.randn(9), torch.randn(9)
    y = co.modulus(x)
    with forward_ad.dual_level():
        (result,) = torch.autograd.grad(y, x, forward_ad.make_dual(grad, tangent))
        value, moved = forward_ad.unpack_dual(result)
    assert torch.equal(value, torch.where(x < 0, -grad, grad))
    assert torch.equal(moved, torch.where(x < 0, -tangent, tangent))


def test_batched_gradients():
    x, grads = leaf(4, 3), torch.randn(5, 4, 3)
    y = co.modulus(x)
    (result,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    assert torch.equal(result, torch.where(x < 0, -grads, grads))
    result = torch.func.vmap(lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0])(grads)
    assert torch.equal(result, torch.where(x < 0, -grads, grads))


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_what_transforms_and_modes_ask_for_goes_to_python():
    x = leaf(7)
    torch.func.vmap(lambda row: co.modulus(row))(leaf(2, 3)).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: co.modulus(x).sum())(x), torch.where(x < 0, -1.0, 1.0))
    with forward_ad.dual_level():
        assert not is_node(co.modulus(forward_ad.make_dual(x, torch.ones(7))))
    for mode in (Passing(), BaseTorchFunctionMode()):
        with mode:
            assert not is_node(co.modulus(x))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert co.modulus(x).shape == (7,)
    graph = make_fx(lambda x: co.modulus(x))(x)
    assert [n.target for n in graph.graph.nodes if "consistency_ops" in str(n.target)]


class Counting(torch.Tensor):
    """A subclass sees the operators that run on it."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_go_to_python():
    x = torch.randn(5).as_subclass(Counting).requires_grad_()
    before = Counting.seen
    y = co.modulus(x)
    assert Counting.seen > before and type(y) is Counting and not is_node(y)
    assert is_node(co.modulus(torch.nn.Parameter(torch.randn(3)))) == is_node(co.modulus(leaf(3)))


def test_compile_traces_through_it():
    x = leaf(6)
    y = torch.compile(lambda x: co.modulus(2 * x).sum(), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.where(x < 0, -2.0, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_compiled_autograd_of_an_eager_forward(dtype):
    x = leaf(6, dtype=dtype)
    expected = torch.autograd.grad((reference.modulus(x * 2) ** 2).sum(), x)[0]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        (co.modulus(x * 2) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_nothing_is_recorded_where_no_gradient_is_needed():
    x = leaf(4)
    with torch.no_grad():
        assert not co.modulus(x).requires_grad
    with torch.inference_mode():
        assert co.modulus(x).is_inference()
    assert not co.modulus(x.detach()).requires_grad
    with torch.no_grad(), torch.enable_grad():
        assert co.modulus(x).requires_grad


def test_graph_is_kept_only_when_asked():
    x = leaf(5)
    y = co.modulus(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.sum(), x)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


def test_bits_are_freed_by_backward_and_with_the_graph():
    for backward in (True, False):
        kept = []
        y = None

        def pack(tensor, kept=kept):
            kept.append(weakref.ref(tensor))
            return tensor.clone()

        with saved_tensors_hooks(pack, lambda t: t):
            y = co.modulus(leaf(100))
        if backward:
            y.sum().backward()
        del y
        gc.collect()
        assert kept[0]() is None


def test_saved_tensors_hooks_pack_and_unpack():
    x, packed = leaf(16), []
    with saved_tensors_hooks(lambda t: packed.append(t) or ~t, lambda t: t):
        y = co.modulus(x)
    assert [(t.dtype, t.numel()) for t in packed] == [(torch.uint8, 2)]
    y.backward(torch.ones(16))
    assert torch.equal(x.grad, torch.where(x < 0, 1.0, -1.0))  # every bit inverted


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, runs = leaf(3, 4), []

    def block(x):
        runs.append(1)
        return co.modulus(torch.sin(co.modulus(x - 0.5)))

    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert len(runs) == 2
    expected = x.detach().requires_grad_()
    block(expected).sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_result_changed_in_place_goes_through_its_own_graph():
    x = leaf(6)
    y = co.modulus(x)
    y.mul_(3).add_(1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(x < 0, -3.0, 3.0))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x.abs_()


def test_views_of_input_and_result():
    x = leaf(4, 6)
    y = co.modulus(x.t()[1:, :2])
    y[0].zero_()
    y.sum().backward()
    expected = torch.zeros(4, 6)
    expected[:2, 2:] = torch.where(x[:2, 2:] < 0, -1.0, 1.0)
    assert torch.equal(x.grad, expected)


def test_hooks_of_tensors_and_of_the_node():
    x, calls = leaf(3), []
    y = co.modulus(x)
    y.register_hook(lambda g: calls.append("tensor") or 2 * g)
    y.grad_fn.register_prehook(lambda g: calls.append("before") or (g[0] * 3,))
    y.grad_fn.register_hook(lambda inputs, outputs: calls.append("after") or (inputs[0] * 5,))
    x.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    y.retain_grad()
    y.backward(torch.ones(3))
    assert calls == ["tensor", "before", "after", "accumulated"]
    assert torch.equal(x.grad, torch.where(x < 0, -30.0, 30.0))
    assert torch.equal(y.grad, torch.full((3,), 2.0))
    assert y.grad_fn.next_functions[0][0].variable is x


def test_module_hooks():
    module, seen = co.nn.Modulus(), []
    module.register_full_backward_hook(lambda m, into, out: seen.append((into[0].clone(), out[0].clone())))
    x = leaf(3)
    module(x).backward(torch.ones(3))
    assert torch.equal(seen[0][0], torch.where(x < 0, -1.0, 1.0)) and torch.equal(seen[0][1], torch.ones(3))


def test_no_gradient_arrives():
    x, z = leaf(3), leaf(3)
    y = co.modulus(x)
    grads = torch.autograd.grad((torch.zeros(3) * z).sum(), (z, y), allow_unused=True)
    assert grads[1] is None

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    Nothing.apply(y).sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.filterwarnings("ignore:(Anomaly|Error)")
def test_anomaly_mode_names_the_call():
    x = leaf(3)
    with torch.autograd.detect_anomaly(check_nan=True):
        y = co.modulus(x)
        with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
            y.backward(torch.tensor([1.0, float("nan"), 1.0]))


def test_error_in_backward_reaches_the_caller(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("from the differentiable form")

    monkeypatch.setattr(implementation, "_flip", fail)
    x = leaf(3)
    with pytest.raises(ZeroDivisionError, match="from the differentiable form"):
        torch.autograd.grad(co.modulus(x), x, leaf(3), create_graph=True)


def test_autocast_leaves_the_dtype_alone():
    x = leaf(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = co.modulus(x)
        z = co.modulus(x @ x)
    assert y.dtype == torch.float32 and z.dtype == torch.bfloat16
    (y.sum() + z.float().sum()).backward()
    assert x.grad.dtype == torch.float32


def test_threads_share_a_graph():
    x = leaf(40_000)
    y = co.modulus(x)
    results = []

    def run():
        for _ in range(10):
            results.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
            torch.autograd.grad(co.modulus(x).sum(), x)

    processes.in_threads(*[run] * 4)
    assert all(torch.equal(r, results[0]) for r in results) and len(results) == 40


def test_a_long_chain_is_freed_without_recursion():
    y = leaf(1)
    for _ in range(40_000):
        y = co.modulus(y)
    del y
    gc.collect()


def test_the_graph_holds_no_cycle():
    x = leaf(3)
    dead = weakref.ref(x)
    gc.disable()
    try:
        y = co.modulus(x)
        del x, y
        assert dead() is None
    finally:
        gc.enable()


def test_copies():
    y = co.modulus(leaf(3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(y)
    module = copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(2, 2), co.nn.Modulus()))
    module(torch.randn(1, 2)).sum().backward()


@pytest.mark.parametrize("bad", [[1.0], None, torch.zeros(2, dtype=torch.int64), 3])
def test_errors_are_the_same(bad):
    with pytest.raises(TypeError, match="modulus: x must be"):
        co.modulus(bad)


def test_sparse_and_complex_go_to_python():
    with pytest.raises(NotImplementedError, match="modulus"):
        co.modulus(torch.eye(3).to_sparse().requires_grad_())
    assert not is_node(co.modulus(leaf(3, dtype=torch.complex64)))


def test_meta_tensors():
    y = co.modulus(torch.empty(3, 5, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.shape == (3, 5)
