"""The modulus: its values, its derivative, what it keeps for backward, and how it treats memory."""

import cmath
import ctypes
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import consistency_ops as co
from consistency_ops import reference
from consistency_ops.ops.library import library as compiled

REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]
LAYOUTS = {
    "scalar": lambda make: make(()),
    "one": lambda make: make((1,)),
    "empty": lambda make: make((3, 0, 2)),
    "seven": lambda make: make((7,)),
    "vector": lambda make: make((33,)),
    "matrix": lambda make: make((13, 21)),
    "tasks": lambda make: make((70_001,)),  # more than one task of 32768, and a tail
    "transposed": lambda make: make((5, 9)).t(),
    "channels_last": lambda make: make((2, 5, 4, 3)).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda make: make((2, 3, 4, 3, 2)).contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda make: make((3, 4, 5)).permute(2, 0, 1),
    "strided": lambda make: make((8, 12))[::2, ::3],
    "offset": lambda make: make((50,))[3:36],
    "expanded": lambda make: make((4, 1)).expand(4, 6),
    "flipped": lambda make: torch.flip(make((4, 6)), (0, 1)),
    "conjugate": lambda make: make((4, 6)).conj(),
    "size_one": lambda make: make((4, 1, 3)).as_strided((4, 1, 3), (3, 99, 1)),
}


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    library = compiled
    library.co_cpu_isa.restype = ctypes.c_char_p
    before = library.co_cpu_isa()
    if library.co_set_cpu_isa(request.param.encode()) != 0:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.co_set_cpu_isa(before)


def specials(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny, math.inf, -math.inf, math.nan, -math.nan]
    subnormal = info.smallest_normal / 2
    # 41 puts each value at other places of the words and in the tail.
    return torch.tensor(([*values, subnormal, -subnormal]) * 41, dtype=dtype)


def make_in(dtype):
    return lambda shape: torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def run_backward(function, x, grad):
    x = x.detach().requires_grad_()
    y = function(x)
    (result,) = torch.autograd.grad(y, x, grad)
    return y.detach(), result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_values_derivative_and_layout(layout, dtype):
    x = LAYOUTS[layout](make_in(dtype))
    grad = torch.randn(x.shape).to(dtype)
    y, grad_x = run_backward(co.modulus, x, grad)
    assert torch.equal(y, x.abs())
    assert torch.equal(co.modulus(x), y)
    assert torch.equal(grad_x, torch.where(x < 0, -grad, grad))
    assert y.stride() == torch.empty_like(x).stride()
    assert y.dtype == grad_x.dtype == dtype


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_special_values_on_every_instruction_set(dtype, isa):
    x = specials(dtype)
    grad = torch.randn(x.shape).to(dtype)
    y, grad_x = run_backward(co.modulus, x, grad)
    assert not torch.signbit(y).any()
    torch.testing.assert_close(y, x.abs(), rtol=0, atol=0, equal_nan=True)
    # -1 strictly below zero, +1 at zero, at -0.0 and at NaN.
    assert torch.equal(grad_x, torch.where(x < 0, -grad, grad))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", [1, 8, 31, 32, 33, 100, 40_000])
def test_instruction_sets_agree(dtype, size, isa):
    x = torch.randn(size).to(dtype)
    grad = torch.randn(size).to(dtype)
    y, signs = torch.ops.consistency_ops.modulus_forward(x)
    bits = torch.arange(8)
    negative = (signs.long()[:, None] >> bits & 1).flatten()[:size].bool()
    assert torch.equal(negative, x < 0)
    assert torch.equal(y, x.abs())
    assert torch.equal(torch.ops.consistency_ops.modulus_backward(grad, signs), torch.where(x < 0, -grad, grad))


def test_derivative_at_zero_lets_zero_initialised_layers_train():
    x = torch.tensor([0.0, -0.0], requires_grad=True)
    co.modulus(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", [1, 8, 1001])
def test_keeps_one_bit_an_element(dtype, size):
    kept = []
    x = torch.randn(size).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.nbytes)) or t, lambda t: t):
        y = co.modulus(x)
    assert kept == [(torch.uint8, (size + 7) // 8)]
    y.sum().backward()


def test_input_may_be_overwritten_after_the_call():
    x = torch.randn(100, requires_grad=True)
    hidden = x * 2
    y = co.modulus(hidden)
    hidden.zero_()
    y.mul_(3)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(x < 0, -6.0, 6.0))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_no_bits_without_a_gradient(context):
    x = torch.randn(10, requires_grad=True)
    with Calls() as calls, context():
        y = co.modulus(x)
    assert calls.names == ["consistency_ops::modulus"]
    assert torch.equal(y, x.abs())
    plain = x.detach()
    with Calls() as calls:
        co.modulus(plain)
    assert calls.names == ["consistency_ops::modulus"]
    assert not y.requires_grad


def test_dense_layouts_are_not_copied():
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        co.modulus(x).backward(torch.ones_like(x))
    assert not [e.name for e in profile.events() if "copy_" in e.name or "clone" in e.name]


@pytest.mark.parametrize("layout", ["matrix", "channels_last", "permuted", "strided", "expanded"])
def test_gradients_of_any_layout(layout):
    x = LAYOUTS[layout](make_in(torch.float32))
    dense = torch.randn(x.shape)
    grads = [
        torch.randn(()).expand(x.shape),
        dense.transpose(0, -1).contiguous().transpose(0, -1),
        torch.randn(*x.shape, 2)[..., 1],
        torch.flip(dense, (0,)),
    ]
    for grad in grads:
        _, grad_x = run_backward(co.modulus, x, grad)
        assert torch.equal(grad_x, torch.where(x < 0, -grad, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    x = make_in(dtype)((300_007,))
    grad = torch.randn(x.shape).to(dtype.to_real())
    torch.set_num_threads(1)
    one = run_backward(co.modulus, x, grad)
    torch.set_num_threads(2)
    two = run_backward(co.modulus, x, grad)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


# Complex


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_values_and_derivative(layout, dtype):
    x = LAYOUTS[layout](make_in(dtype))
    grad = torch.randn(x.shape, dtype=dtype.to_real())
    y, grad_x = run_backward(co.modulus, x, grad)
    expected, expected_grad = run_backward(torch.abs, x.to(torch.complex128), grad.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=0)
    # Relative to |grad|, the size of the whole: one part of it may be far smaller.
    assert ((grad_x - expected_grad).abs() <= 4 * eps * grad.abs()).all()
    assert y.dtype == dtype.to_real() and grad_x.dtype == dtype
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_extremes(dtype, isa):
    info = torch.finfo(dtype)
    huge, tiny, least = info.max / 2, info.tiny, info.tiny * info.eps
    parts = [
        (3.0, -4.0), (huge, huge), (huge, 1.0), (tiny, tiny), (least, least), (5 * least, 0.0), (huge, least),
        (0.0, 0.0), (-0.0, -0.0), (1.0, 0.0), (0.0, -2.0),
    ]  # fmt: skip
    x = torch.tensor([complex(a, b) for a, b in parts] * 3, dtype=dtype)
    y, grad_x = run_backward(co.modulus, x, torch.ones(x.shape, dtype=dtype.to_real()))
    for value, magnitude, direction in zip(x.tolist(), y.tolist(), grad_x.tolist(), strict=True):
        expected = math.hypot(value.real, value.imag)
        assert abs(magnitude - expected) <= max(2 * info.eps * expected, least)
        if expected == 0:
            assert direction == 0
        else:
            unit = cmath.rect(1, math.atan2(value.imag, value.real))
            assert abs(direction - unit) <= 4 * info.eps


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_infinity_and_nan_as_hypot(dtype, isa):
    inf, nan = math.inf, math.nan
    parts = [(inf, nan), (nan, -inf), (-inf, 1.0), (nan, 1.0), (0.0, nan), (inf, inf)]
    x = torch.tensor([complex(a, b) for a, b in parts], dtype=dtype)
    y, grad_x = run_backward(co.modulus, x, torch.ones(len(parts), dtype=dtype.to_real()))
    assert torch.equal(y.isinf(), torch.tensor([True, True, True, False, False, True]))
    assert torch.equal(y.isnan(), ~y.isinf())
    assert grad_x.isnan().all()


# Errors


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"modulus: x must be floating point or complex, got {dtype}"):
        co.modulus(torch.zeros(3, dtype=dtype))


def test_only_tensors():
    with pytest.raises(TypeError, match="modulus: x must be a Tensor, got list"):
        co.modulus([1.0, -1.0])


def test_sparse_is_refused():
    with pytest.raises(NotImplementedError, match="modulus"):
        co.modulus(torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    ("grad", "signs", "strides"),
    [
        (torch.zeros(16), torch.zeros(1, dtype=torch.uint8), None),
        (torch.zeros(16), torch.zeros(2, dtype=torch.int8), None),
        (torch.zeros(16), torch.zeros(2, dtype=torch.uint8), (0,)),
        (torch.zeros(1).expand(16), torch.zeros(2, dtype=torch.uint8), None),
        (torch.zeros(4, 4), torch.zeros(2, dtype=torch.uint8), (1,)),
    ],
)
def test_operator_refuses_what_would_leave_memory(grad, signs, strides):
    with pytest.raises(RuntimeError, match="modulus_backward"):
        torch.ops.consistency_ops.modulus_backward(grad, signs, strides)


def test_meta_tensors():
    x = torch.empty(3, 5, device="meta", requires_grad=True)
    y = co.modulus(x)
    assert y.shape == (3, 5) and y.device.type == "meta"


# Module


def test_module():
    module = co.nn.Modulus()
    x = torch.randn(3, 4)
    assert torch.equal(module(x), reference.modulus(x))
    assert not module.state_dict() and repr(module) == "Modulus()"


def test_module_on_autocast():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), co.nn.Modulus())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
