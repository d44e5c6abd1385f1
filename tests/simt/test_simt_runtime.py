"""The host runtime notices what it claims to notice, and its wrappers compute what PTX documents."""

import math
import shutil
import sys

import numpy as np
import pytest
import simt_library as simt

from support import processes

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def library():
    return simt.load()


def results(library, name, variant, seeds, make):
    """Return what the kernel leaves in y, for every seed."""
    for seed in range(seeds):
        library.schedule(seed=seed)
        arrays = make()
        library.selftest(name, variant, **arrays)
        yield arrays["y"]


def reversed_array():
    return {"x": np.arange(64, dtype=np.float32), "y": np.zeros(64, np.float32)}


def test_barrier_orders_shared_memory(library):
    want = np.arange(64)[::-1]
    assert all(np.array_equal(y, want) for y in results(library, "reverse", 1, 20, reversed_array))
    missed = [y for y in results(library, "reverse", 0, 20, reversed_array) if np.array_equal(y, want)]
    assert not missed, "a missing barrier shows under every seed, because shared memory starts as NaN"


def test_named_barrier_orders_shared_memory(library):
    def make():
        return {"x": np.arange(32, dtype=np.float32), "y": np.zeros(32, np.float32)}

    want = np.arange(32)[::-1]
    assert all(np.array_equal(y, want) for y in results(library, "hand over", 1, 20, make))
    assert not all(np.array_equal(y, want) for y in results(library, "hand over", 0, 20, make))


def test_lanes_do_not_run_in_lock_step(library):
    def make():
        return {"y": np.arange(32, dtype=np.float32)}

    want = np.arange(32) ^ 1
    assert all(np.array_equal(y, want) for y in results(library, "exchange", 1, 20, make))
    assert not any(np.array_equal(y, want) for y in results(library, "exchange", 0, 20, make))


# A kernel of selftest.cpp without its __syncwarp() (0), with it (1), with a shuffle in its place (2).
WARP = """
import sys
from pathlib import Path
import numpy as np
import simt_library as simt
name, variant = sys.argv[2:]
arrays = {key: np.zeros((16, 16), np.float32) for key in "xyz"}
simt.Library(Path(sys.argv[1])).selftest(name, int(variant), **arrays)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "races"),
    [
        ("exchange", 0, True),
        ("exchange", 1, False),
        ("exchange", 2, True),
        ("multiply bfloat16", 0, True),
        ("multiply bfloat16", 1, False),
    ],
)
def test_only_syncwarp_orders_the_memory_of_a_warp(name, variant, races):
    """Lanes that meet in a shuffle or a matrix instruction are still in a data race, as CUDA has it."""
    command = [sys.executable, "-c", WARP, simt.build("races"), name, str(variant)]
    environment = simt.sanitizer_environment("races")
    folder = simt.ROOT / "tests" / "simt"
    done = processes.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ("ThreadSanitizer: data race" in done.stderr) == races, done.stderr[-3000:]
    assert (done.returncode == 0) == (not races), done.stdout + done.stderr


def test_cluster_barriers(library):
    def make():
        return {"y": np.zeros(512, np.float32)}

    want = np.repeat([10.0, 26.0], 256)
    assert all(np.array_equal(y, want) for y in results(library, "cluster sum", 3, 20, make))
    assert not any(np.array_equal(y, want) for y in results(library, "cluster sum", 2, 20, make))
    late = [np.array_equal(y, want) for y in results(library, "cluster sum", 1, 40, make)]
    assert not all(late), "shared memory of a CTA that has exited reads as NaN"


@pytest.mark.parametrize(
    ("name", "report"),
    [
        (
            "divergent barrier",
            r"divergent __syncthreads: thread \d+ .*selftest.cpp:\d+ while thread \d+ waits at .*:\d+",
        ),
        ("early exit", r"deadlock: no thread can run\n(.|\n)*63 threads: __syncthreads at .*selftest.cpp:\d+"),
        ("half a barrier", r"deadlock: no thread can run\n(.|\n)*32 threads: named barrier at .*selftest.cpp:\d+"),
        ("two sizes", r"barrier 2 of \d+ threads, where others meet as \d+"),
        ("wrong mask", r"shuffles from lane \d+, which is not in mask 0000ffff"),
        ("lane outside mask", r"lane \d+ is not in the mask 000000ff"),
    ],
)
def test_reports(library, name, report):
    for seed in range(5):
        library.schedule(seed=seed)
        with pytest.raises(RuntimeError, match=report):
            library.selftest(name, y=np.zeros(32, np.float32))


def test_shared_memory_limit(library):
    library.schedule()
    library.selftest("too much shared")
    library._library.simt_configure(1, 0, 2, 40 << 10)
    with pytest.raises(RuntimeError, match="49152 bytes of shared memory are over the limit of 40960"):
        library.selftest("too much shared")
    library.schedule()


def test_last_block(library):
    def make():
        x = np.arange(1, 7, dtype=np.float32)
        return {"x": x, "y": np.zeros(1, np.float32), "z": np.zeros(6, np.float32), "counter": np.zeros(1, np.uint32)}

    assert all(y[0] == 21 for y in results(library, "last block", 1, 20, make))


def test_mma_layout(library):
    rng = np.random.default_rng(0)
    # Small integers: exact in TF32, so that the layout alone decides.
    a, b, d = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    want = d + a @ b
    library.schedule()
    library.selftest("multiply", 1, a, b, d)
    assert np.array_equal(d, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mma_and_ldmatrix_layout_of_16_bits(library, dtype):
    rng = np.random.default_rng(0)
    a, b, d = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    want = d + a @ b
    library.schedule()
    library.selftest(f"multiply {dtype}", 1, a, b, d)
    assert np.array_equal(d, want)


def test_mma_drops_what_tf32_does_not_hold(library):
    a, b, d = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32), np.zeros((16, 8), np.float32)
    a[3, 2], b[2, 5] = 1 + 2.0**-10 + 2.0**-11, 1
    library.selftest("multiply", 1, a, b, d)
    assert d[3, 5] == 1 + 2.0**-10


def same(got, want):
    return got == want or (math.isnan(got) and math.isnan(want))


def test_every_16_bit_float(library):
    for bits in range(1 << 16):
        half = float(np.uint16(bits).view(np.float16))
        brain = float(np.uint32(bits << 16).view(np.float32))
        assert same(library.convert("float16_to_float", bits), half), bits
        assert same(library.convert("bfloat16_to_float", bits), brain), bits
        if not math.isnan(half):
            assert library.convert("float_to_float16", half) == bits
        if not math.isnan(brain):
            assert library.convert("float_to_bfloat16", brain) == bits


def test_rounding_to_16_bits(library):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20_000) * 10.0 ** rng.uniform(-9, 6, 20_000)).astype(np.float32)
    halfway = np.array(
        [1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.9, 65520, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-8], np.float32
    )
    values = np.concatenate([values, halfway, -halfway])
    half, brain = simt.encode(values, simt.FLOAT16), simt.encode(values, simt.BFLOAT16)
    for value, want_half, want_brain in zip(values, half, brain, strict=True):
        assert library.convert("float_to_float16", value) == want_half, value
        assert library.convert("float_to_bfloat16", value) == want_brain, value
    for name in ("float_to_float16", "float_to_bfloat16"):
        assert library.convert(name, math.nan) & 0x7FFF == 0x7FFF


def test_rounding_to_tf32(library):
    for value, want in ((1 + 2.0**-11, 1 + 2.0**-10), (1 + 2.0**-12, 1), (-(1 + 2.0**-11), -(1 + 2.0**-10))):
        assert library.convert("to_tf32", value) == want, "ties go away from zero"
    assert math.isnan(library.convert("to_tf32", math.nan))
    assert library.convert("to_tf32", math.inf) == math.inf
