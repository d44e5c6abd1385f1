"""Tier C of bench_cuda.py: that it corrects, with stand-ins for MathDx on the CPU, and that it compiles with MathDx.

Whether cuBLASDx and cuSolverDx do what the stand-ins do, only a GPU can show; bench_cuda.py compares there.
"""

import ctypes
import shutil
import sys

import pytest
import simt_library as simt
import torch

from benchmarks.micro import mathdx
from benchmarks.micro.compositions import by_solve, divide, per_layer
from benchmarks.micro.workloads import LayerShape

F, B = torch.float32, torch.bfloat16


class HostRun:
    """The kernels on the CPU, as mathdx.Cubin."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def launch(self, name, grid, shared, params):
        sizes = ctypes.c_int64(grid), ctypes.c_int64(shared)
        assert self.library.mathdx_launch(name.encode(), *sizes, ctypes.byref(params)) == 0


@pytest.fixture(scope="module")
def kernels():
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    units = [("tests/simt/runtime.cpp", ["-O2"]), ("tests/simt/mathdx_stand_in.cpp", ["-O2", *simt.KERNEL])]
    units.append(("benchmarks/micro/mathdx.cu", ["-O2", *simt.KERNEL]))
    kernels = HostRun(simt.link("mathdx", simt.ROOT, units, ["-O2"]))
    kernels.library.mathdx_chunk_bytes.restype = ctypes.c_int64
    assert kernels.library.mathdx_chunk_bytes() == ctypes.sizeof(mathdx.Chunk)
    return kernels


@pytest.mark.parametrize(
    ("layers", "rows", "group", "dtypes", "chunk"),
    [
        ([LayerShape(9, 40), LayerShape(70, 100), LayerShape(5, 33)], 50, 8, (F, F), 128),
        ([LayerShape(300, 300)], 530, 8, (F, F), 128),
        ([LayerShape(66, 256), LayerShape(4, 48, (3, 3))], 70, 16, (B, F), 128),
        ([LayerShape(70, 256)], 600, 16, (B, B), 64),
        ([LayerShape(20, 100)], 70, 1, (B, B), 50),
    ],
    ids=str,
)
def test_tier_c_is_the_correction(kernels, layers, rows, group, dtypes, chunk):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(layer.weight, generator=generator).to(dtypes[1]) for layer in layers]
    inputs = [torch.randn(rows, layer.units, generator=generator).to(dtypes[0]) for layer in layers]
    divisions = [divide(layer, chunk, group, generator) for layer in layers]
    wanted = per_layer([g.double() for g in grads], [x.double() for x in inputs], divisions, 0.1, by_solve)
    correct = mathdx.MathDx(kernels, grads, inputs, divisions, 0.1)
    correct()
    for got, want in zip(grads, wanted, strict=True):
        assert (got.double() - want).norm() / want.norm() < (3e-5 if dtypes[1] == F else 3e-3)


def test_a_chunk_that_fails_keeps_its_gradient(kernels):
    grad, rows = torch.randn(5, 80), torch.randn(20, 80)
    rows[3, 70] = float("nan")
    before = grad.clone()
    (division,) = [divide(LayerShape(5, 80), 40, 8, torch.Generator().manual_seed(0))]
    mathdx.MathDx(kernels, [grad], [rows], [division], 0.1)()
    spoiled = division.permutation(80).view(2, 40)
    of = int((spoiled == 70).any(1).nonzero())
    assert torch.equal(grad[:, spoiled[of]], before[:, spoiled[of]])
    assert not torch.equal(grad[:, spoiled[1 - of]], before[:, spoiled[1 - of]])


def test_what_tier_c_does_not_take(kernels):
    division = divide(LayerShape(2, 200), 256, 8, torch.Generator())
    with pytest.raises(ValueError, match="at most 128 units, got 200"):
        mathdx.MathDx(kernels, [torch.ones(2, 200)], [torch.ones(3, 200)], [division], 0.1)
    half = torch.ones(2, 200, dtype=torch.float16)
    with pytest.raises(ValueError, match="tier C takes float32 and bfloat16, got torch.float16"):
        mathdx.MathDx(kernels, [half], [half], [division], 0.1)


def test_where_mathdx_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("MATHDX_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", [])
    assert mathdx.missing() == "MathDx is not installed (pip install nvidia-libmathdx-cu13, or set MATHDX_ROOT)"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmathdx.so.0").touch()
    monkeypatch.setenv("MATHDX_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert mathdx.missing() == "nvcc is not on the PATH"
    monkeypatch.setattr(shutil, "which", lambda name: f"/{name}")
    assert mathdx.missing().startswith("libnvrtc.so.13 and libnvJitLink.so.13, which come with torch for CUDA 13")


@pytest.mark.nightly  # three minutes an architecture
@pytest.mark.skipif(mathdx.missing() is not None, reason=str(mathdx.missing()))
@pytest.mark.parametrize("sm", [80, 90])
def test_it_compiles_and_links_with_mathdx(tmp_path, sm):
    code = mathdx.build(sm, tmp_path).read_bytes()
    for size in mathdx.SIZES:
        for name in ("gram_4", "gram_2", "invert", "apply_4", "apply_2"):
            assert f".text.{name}_{size}\0".encode() in code
