"""Kernels on Intel's tiles (AMX): by a model of the instructions on every machine, by the hardware where there is some.

``co_set_cpu_isa("amx_model")`` chooses the same kernels (csrc/cpu/tile_kernels.inl) with the instructions in plain C++
(csrc/cpu/tile_model.h); "amx" the instructions themselves.
"""

import ctypes
import os
import re
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import consistency_ops as co
import consistency_ops._C as extension
from consistency_ops import ops
from support import processes
from support.samples import relative_error

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ctypes.CDLL(extension.__file__)
LIBRARY.co_cpu_isa.restype = ctypes.c_char_p


@pytest.fixture(params=["amx_model", "amx"])
def tiles(request):
    before = LIBRARY.co_cpu_isa()
    if LIBRARY.co_set_cpu_isa(request.param.encode()) != 0:
        pytest.skip("no AMX here")
    yield request.param
    LIBRARY.co_set_cpu_isa(before)


def other_kernels(call):
    """What the kernels without tiles make of it."""
    before = LIBRARY.co_cpu_isa()
    assert LIBRARY.co_set_cpu_isa(b"portable") == 0
    try:
        return call()
    finally:
        LIBRARY.co_set_cpu_isa(before)


def tensors(outputs, units, rows, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(outputs, units, generator=generator).bfloat16()
    x = (torch.randn(rows, units, generator=generator) + 0.2) * scale
    return grad, x.bfloat16(), torch.randn(outputs, generator=generator).bfloat16()


# The instruction


def subnormal_is_zero(x: Fraction) -> Fraction:
    return x if abs(x) >= Fraction(2) ** -126 else Fraction(0)


def rounded(x: Fraction) -> Fraction:
    """To 24 bits, nearest even, by the definition; subnormal results are zero."""
    if x == 0:
        return x
    exponent = 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return subnormal_is_zero(round(x / unit) * unit)


def widened(bits: int) -> Fraction:
    return subnormal_is_zero(Fraction(struct.unpack("<f", struct.pack("<I", bits << 16))[0]))


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


@pytest.fixture(scope="module")
def instruction(tmp_path_factory):
    """Multiply three tiles by the model of the instruction."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("tile_model")
    (folder / "model.cpp").write_text(
        '#include "cpu/tile_model.h"\n'
        "using namespace consistency_ops::cpu;\n"
        'extern "C" void multiply(void* c, const void* a, const void* b) {\n'
        "  tile_model::begin();\n"
        "  tile_model::load(0, c, 64); tile_model::load(1, a, 64); tile_model::load(2, b, 64);\n"
        "  tile_model::multiply(0, 1, 2);\n"
        "  tile_model::store(0, c, 64);\n"
        "  tile_model::end();\n"
        "}\n"
    )
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    processes.run(["g++", *flags, str(folder / "model.cpp"), "-o", str(folder / "model.so")], check=True)
    library = ctypes.CDLL(str(folder / "model.so"))

    def multiply(c, a, b):
        c = c.clone()
        library.multiply(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (c, a, b)))
        return c

    return multiply


@pytest.mark.parametrize("kind", ["normal", "wide", "small", "subnormal"])
def test_the_model_of_the_instruction_is_its_description(instruction, kind):
    """Intel's description in rational numbers, every result to the bit."""
    generator = torch.Generator().manual_seed(5)
    spread = {"normal": 0, "wide": 20, "small": 6, "subnormal": 3}[kind]
    centre = {"normal": 0, "wide": 0, "small": -62, "subnormal": -126}[kind]

    def numbers(*shape):
        exponents = centre + (torch.rand(*shape, generator=generator) * 2 - 1) * spread
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())

    a, b = numbers(16, 32).bfloat16(), numbers(16, 32).bfloat16()
    if kind == "subnormal":  # times numbers near one, so that the products are at the edge
        b = torch.randn(16, 32, generator=generator).bfloat16()
    c = numbers(16, 16).float() if kind != "small" else numbers(16, 16).float() * 2.0**-62
    got = instruction(c, a, b)
    left, right = (tensor.view(torch.int16).int().bitwise_and(0xFFFF).tolist() for tensor in (a, b))
    for m in range(0, 16, 3):
        for n in range(16):
            chains = [Fraction(0), Fraction(0)]
            for k in range(16):
                for odd in (0, 1):
                    product = widened(left[m][2 * k + odd]) * widened(right[k][2 * n + odd])
                    chains[odd] = rounded(chains[odd] + product)
            want = rounded(subnormal_is_zero(Fraction(float(c[m, n]))) + rounded(sum(chains)))
            assert Fraction(float(got[m, n])) == want, (kind, m, n)


def test_the_model_keeps_infinities_and_nan_in_their_row_and_column(instruction):
    a, b = torch.ones(16, 32).bfloat16(), torch.ones(16, 32).bfloat16()
    a[3, 4], b[5, 2 * 7], a[9, 0] = torch.inf, torch.nan, 3e38
    a[9, 2] = a[9, 4] = 3e38
    got = instruction(torch.zeros(16, 16), a, b)
    assert torch.equal(got.isnan().nonzero(), torch.tensor([[m, 7] for m in range(16)]))
    keeps = [n for n in range(16) if n != 7]
    assert (got[3, keeps] == torch.inf).all() and (got[9, keeps] == torch.inf).all()
    assert (got[:3, keeps] == 32).all()


# The kernels


@pytest.mark.parametrize(
    ("units", "chunk"), [(16, 16), (40, 64), (100, 100), (128, 128), (300, 256), (577, 128), (96, 96)]
)
@pytest.mark.parametrize("rows", [33, 64, 129, 400])
def test_the_covariance_of_integers_is_exact(tiles, units, chunk, rows):
    """Sums of products of small integers need no rounding: nothing may be missing, twice or in a wrong place."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-8, 9, (rows, units), generator=generator).bfloat16()
    # Divided by the number of rows at the end: one product with its reciprocal, rounded.
    got = co.chunked_covariance(x, chunk=chunk, group=8, seed=1)
    want = co.chunked_covariance(x.double(), chunk=chunk, group=8, seed=1) * rows
    assert torch.equal(got, want.round().float() * (1 / torch.tensor(float(rows))))


@pytest.mark.parametrize(
    ("units", "chunk"), [(64, 64), (65, 128), (100, 100), (129, 128), (300, 256), (577, 128), (130, 80)]
)
@pytest.mark.parametrize("outputs", [1, 16, 17, 33, 150])
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_more_is_lost_than_the_rounding_of_the_result(tiles, units, chunk, outputs, with_bias):
    grad, x, bias = tensors(outputs, units, 200)
    options = {"damping": 1e-3, "scaling": "trace", "chunk": chunk, "group": 16, "seed": 2}

    def call(*, double):
        g, b = (grad.double(), bias.double()) if double else (grad, bias)
        result = co.precondition(g, x.double() if double else x, bias_grad=b if with_bias else None, **options)
        return torch.cat([part.double().flatten() for part in (result if with_bias else (result,))])

    want = other_kernels(lambda: call(double=True))
    least = relative_error(want.bfloat16().double().numpy(), want.numpy())  # of the exact result, rounded
    assert relative_error(call(double=False).numpy(), want.numpy()) <= 1.02 * least + 2e-5


@pytest.mark.parametrize("scale", [1e-17, 1e-9, 1.0, 1e9, 1e17])
def test_inputs_of_any_size(tiles, scale):
    """The inverse is between 1e-34 and 1e34: the lower terms of the small ones would be subnormal."""
    grad, x, _ = tensors(20, 128, 300, scale=scale)
    grad = (grad.float() * min(1.0, scale * scale)).bfloat16()
    options = {"damping": 1e-2 * scale * scale, "group": 16}
    got = co.precondition(grad, x, **options)
    want = other_kernels(lambda: co.precondition(grad.double(), x.double(), **options))
    least = relative_error(want.bfloat16().double().numpy(), want.numpy())
    assert relative_error(got.double().numpy(), want.numpy()) <= 1.02 * least + 2e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_row_that_is_not_finite_stays_as_it_is_and_alone(tiles, bad):
    grad, x, _ = tensors(40, 160, 300)
    clean = co.precondition(grad, x, damping=1e-3, chunk=80, group=16)
    grad[7, 3] = grad[33, 100] = bad
    got = co.precondition(grad, x, damping=1e-3, chunk=80, group=16)
    others = [row for row in range(40) if row not in (7, 33)]
    assert torch.equal(got[others], clean[others])
    want = other_kernels(lambda: co.precondition(grad, x, damping=1e-3, chunk=80, group=16))
    assert torch.equal(got.isfinite(), want.isfinite())
    for row in (7, 33):  # the chunk with the bad unit is left, the other one corrected
        left = (got[row] == grad[row]) | (got[row].isnan() & grad[row].isnan())
        assert left.sum() >= 80 and torch.equal(got[row][~left], clean[row][~left])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_leave_their_chunk(tiles, value):
    grad, x, _ = tensors(20, 160, 300)
    x[5, 17] = value
    options = {"damping": 1e-3, "chunk": 80, "group": 16}
    got, info, _ = co.precondition_ex(grad, x, **options)
    want, want_info, _ = other_kernels(lambda: co.precondition_ex(grad, x, **options))
    assert torch.equal(info, want_info) and (info != 0).sum() == 1
    assert torch.equal(got == grad, want == grad)


def test_neither_other_layers_nor_their_types_matter(tiles):
    """A layer in float32 with the input of one in bfloat16: the inverse is kept in both forms."""
    grad, x, _ = tensors(30, 200, 150)
    other = torch.randn(17, 200)
    turned = grad.flip(0).t().contiguous().t()  # units apart
    together = [grad.clone(), other.clone(), turned.clone()]
    options = {"damping": 0.1, "chunk": 100, "group": 16}
    co.foreach_precondition_(together, [x] * 3, layers=[0, 0, 0], **options)
    for result, alone in zip(together, [grad, other, turned], strict=True):
        assert torch.equal(result, co.precondition(alone, x, **options))


@pytest.mark.parametrize("shape", ["linear", "channels last", "channels first"])
def test_the_stages_apart_give_the_bits_of_one_call(tiles, shape):
    grad, x, _ = tensors(12, 130, 300)
    if shape != "linear":
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(12, 130, 3, 3, generator=generator).bfloat16()
        x = torch.randn(2, 130, 9, 9, generator=generator).bfloat16()
        if shape == "channels last":
            grad = grad.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
    options = {"chunk": 130, "group": 16}
    covariances = ops.foreach_covariance([x], grads=[grad], **options)
    want, got = grad.clone(), grad.clone()
    ops.foreach_correct_([want], covariances, damping=0.1, **options)
    inverses, info, _ = ops.foreach_inverse(covariances, units=[130], damping=0.1, chunk=130)
    ops.foreach_apply_([got], inverses, info, **options)
    assert torch.equal(got, want)
    at_once = co.precondition(grad, x, damping=0.1, **options)
    assert relative_error(got.double().numpy(), at_once.double().numpy()) < 1e-3  # a rare last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_are_left_to_the_other_kernels(tiles, dtype):
    grad, x, _ = tensors(20, 130, 300)
    grad, x = grad.to(dtype), x.to(dtype)
    before = LIBRARY.co_cpu_isa()
    got = co.precondition(grad, x, damping=0.1)
    for isa in (b"avx512bf16", b"avx512", b"avx2", b"portable"):
        if LIBRARY.co_set_cpu_isa(isa) == 0:
            break
    want = co.precondition(grad, x, damping=0.1)
    LIBRARY.co_set_cpu_isa(before)
    assert torch.equal(got, want)


def test_a_child_process_goes_on(tiles):
    grad, x, _ = tensors(20, 130, 300)
    want = co.precondition(grad, x, damping=0.1)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(co.precondition(grad, x, damping=0.1), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The machine code


TILE_INSTRUCTION = re.compile(r"\s(ldtilecfg|sttilecfg|tilerelease|tilezero|tileloaddt?1?|tilestored|tdp\w+)\b")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_tile_instructions_are_where_they_may_run():
    """No compiler has put one elsewhere, and a configuration is loaded with all of its 64 bytes written."""
    code = processes.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, list[str]] = {}
    name = ""
    for line in code.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = heading[1]
        elif found := TILE_INSTRUCTION.search(line):
            functions.setdefault(name, []).append(found[1])
    if not functions and (os.uname().machine != "x86_64" or os.uname().sysname != "Linux"):
        pytest.skip("no tiles in this build")
    assert all(name.startswith("consistency_ops::cpu::amx::") for name in functions), sorted(functions)
    every = [instruction for found in functions.values() for instruction in found]
    assert every.count("ldtilecfg") == 1 and every.count("tilerelease") == 1
    assert not {"sttilecfg"} & set(every)
    for name, found in functions.items():
        if "tdpbf16ps" not in found:
            assert set(found) <= {"ldtilecfg"} or set(found) == {"tilerelease"}, (name, found)
            continue
        # Whoever multiplies neither begins nor ends: TileScope (csrc/cpu/launch.h) does, once a task.
        assert not {"ldtilecfg", "tilerelease"} & set(found)
        assert {"tileloadd", "tilestored", "tilezero"} <= set(found)
    begins = next(name for name, found in functions.items() if "ldtilecfg" in found)
    body = code[code.index(f"<{begins}>:") :].split("\n\n")[0]
    written = re.findall(r"\b(?:v?mov\w+)\s+(%[xyz]mm\d+|%r\w+|\$0x[0-9a-f]+),-?(?:0x[0-9a-f]+)?\(%r[sb]p\)", body)
    sizes = {"x": 16, "y": 32, "z": 64}
    assert sum(sizes.get(register[1], 8) for register in written) >= 64, body


def test_the_instruction_set_is_named():
    assert co.build_info()["cpu_isa"] in ("amx", "avx512bf16", "avx512", "avx2", "portable")
