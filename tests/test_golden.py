"""The host bodies of csrc/cuda/ptx.cuh against the instructions of a GPU, where benchmarks/device_run.sh has run.

One program, golden.cu, prints every wrapper's results; here with the host bodies, there with the instructions.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simt_library as simt

from support import processes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "golden.txt"
# Without a result of their own, or part of another line ("cluster", "add_acquire_release", "load_matrices_transposed").
NOT_FOR_A_LINE = {
    *("cluster_barrier", "load_cluster", "store_cluster", "load_acquire", "barrier_arrive"),
    # They order what others do, or say which others there are.
    *("by_warpgroups", "keep_order", "publish_to_warpgroups", "begin_warpgroup_products", "end_warpgroup_products"),
}


@pytest.fixture(scope="module")
def host():
    """name -> bits."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    units = [("tests/simt/runtime.cpp", ["-O2"]), ("tests/golden/golden.cu", ["-O2", *simt.KERNEL])]
    program = simt.link("golden", simt.ROOT, units, ["-O2"], program=True)
    return parse(processes.run([program], capture_output=True, text=True, check=True).stdout)


def parse(text):
    lines = [line.split() for line in text.splitlines()]
    return {name: np.array([int(bits, 16) for bits in values], np.uint32) for name, *values in lines}


def test_every_wrapper_has_a_line(host):
    source = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
    wrappers = set(re.findall(r"^(?:CO_DEVICE|inline) \w+[ *]+(\w+)\(", source, re.MULTILINE)) - NOT_FOR_A_LINE
    assert wrappers | {"cluster", "bfloat16_to_float"} == {name.partition("<")[0] for name in host}


def test_host_bodies_convert_as_numpy(host):
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = halves.view(np.float16).astype(np.float32)
    got = host["float16_to_float"].view(np.float32)
    assert np.array_equal(got, wide, equal_nan=True)
    assert np.array_equal(host["bfloat16_to_float"], halves.astype(np.uint32) << 16)
    assert host["add_acquire_release"].tolist() == [256, 256]
    assert host["fresh_thread"].tolist() == list(range(64))


LARGEST = np.finfo(np.float32).max


def compare_ends(name, host, device):
    """NaN where NaN, infinite where an operand is, and beyond the range infinity or the largest float, alike in sign.

    Which of the two a sum becomes that overflows is the device's own: the kernels take both for an overflow.
    """
    assert np.array_equal(np.isnan(host), np.isnan(device)), name
    beyond = np.abs(host) >= LARGEST
    assert np.array_equal(beyond, np.abs(device) >= LARGEST), name
    assert np.array_equal(np.sign(host[beyond]), np.sign(device[beyond])), name


def test_the_ends_of_the_range_are_reached(host):
    """By the vectors that a GPU will be compared with: finite, infinite and NaN results, and sums that overflow."""
    for name in (line for line in host if line.endswith("ends>")):
        values = host[name].view(np.float32)
        assert np.isnan(values).any() and np.isinf(values).any() and np.isfinite(values).any(), name
    for name in (line for line in host if line.endswith("overflow>")):
        values = host[name].view(np.float32)
        assert (np.abs(values) >= LARGEST).any() and (np.abs(values) < LARGEST).any(), name
    other = host["mma_m16n8k8_tf32<overflow>"].view(np.float32).copy()
    other[np.isinf(other)] = np.copysign(LARGEST, other[np.isinf(other)])
    compare_ends("clamped", host["mma_m16n8k8_tf32<overflow>"].view(np.float32), other)
    with pytest.raises(AssertionError):
        compare_ends("wrong", host["mma_m16n8k8_tf32<overflow>"].view(np.float32), -other)


def test_host_bodies_are_the_instructions(host):
    if not RESULTS.exists():
        pytest.skip("no golden vectors yet: benchmarks/device_run.sh writes them on a GPU")
    device = parse(RESULTS.read_text())
    assert set(device) == set(host)
    for name, want in device.items():
        if name.endswith(("ends>", "overflow>")):
            compare_ends(name, host[name].view(np.float32), want.view(np.float32))
        elif name.startswith(("mma", "wgmma")):  # sums of at most 32 products of numbers below 1, in any order
            bound = 2.0**-17 if name.startswith("wgmma") else 2.0**-18
            np.testing.assert_allclose(host[name].view(np.float32), want.view(np.float32), rtol=0, atol=bound)
        elif name == "inverse_root_approximately":  # the host's error is as large as the instruction's may be
            np.testing.assert_allclose(host[name].view(np.float32), want.view(np.float32), rtol=2.0**-21.5, atol=0)
        elif name.startswith("float_to"):  # NaN has many encodings
            nan = (0x7C00, 0x3FF) if name == "float_to_float16" else (0x7F80, 0x7F)
            is_nan = ((want & nan[0]) == nan[0]) & ((want & nan[1]) != 0)
            assert np.array_equal(is_nan, ((host[name] & nan[0]) == nan[0]) & ((host[name] & nan[1]) != 0)), name
            assert np.array_equal(host[name][~is_nan], want[~is_nan]), name
        elif name in ("to_tf32", "float16_to_float"):
            assert np.array_equal(host[name].view(np.float32), want.view(np.float32), equal_nan=True), name
        else:
            assert np.array_equal(host[name], want), name
