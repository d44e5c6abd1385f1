"""The library with CUDA kernels, built here without a GPU: it loads beside a CPU build of torch, kernels registered.

Nothing is launched: what the kernels compute is tested in tests/simt, and on a GPU by tests/test_cuda.py.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from consistency_ops import environment
from support import processes
from support.kernels import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
WITH_KERNELS = environment.build_info()["cuda_toolkit"] is not None
CHECK = f"""
import sys, torch
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
on_cpu_only = {{"roa_scan", "roa_scan_backward"}}
missing = [name for name in {OPERATORS!r} if not has(f"consistency_ops::{{name}}", "CPU")]
missing += [n for n in {OPERATORS!r} if has(f"consistency_ops::{{n}}", "CUDA") == (n in on_cpu_only)]
assert not missing, missing
assert torch.equal(torch.ops.consistency_ops.modulus(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 2.0]))
"""
# A launch that cannot be queued is a status with the runtime's text, and nothing is written.
LAUNCH = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.co_launch_error.restype = ctypes.c_char_p
x, y = (ctypes.c_float * 4)(-1, 2, 3, 4), (ctypes.c_float * 4)()
assert library.co_modulus_cuda(0, ctypes.c_int64(4), x, y, None, None) == -4
assert library.co_launch_error() not in (b"", b"no error", b"no CUDA call has failed")
assert list(y) == [0] * 4
"""


def check_library(library):
    for code in [CHECK] if torch.cuda.is_available() else [CHECK, LAUNCH]:
        done = processes.run([sys.executable, "-c", code, library], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(WITH_KERNELS, reason="built with CUDA kernels: this library is checked instead of another")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_library_with_cuda_kernels_loads_without_a_gpu(tmp_path):
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    environment = {**os.environ, "CONSISTENCY_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=processes.LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr
    (library,) = tmp_path.glob("lib/consistency_ops/_C*.so")
    check_library(library)


@pytest.mark.skipif(not WITH_KERNELS, reason="built without CUDA kernels")
def test_this_library_has_its_cuda_kernels():
    check_library(environment.build_info()["library"])


@pytest.mark.skipif(WITH_KERNELS, reason="built with CUDA kernels")
def test_without_cuda_kernels_the_functions_compute_with_torch():
    """On fake CUDA tensors, which need no device."""
    import consistency_ops as co

    with torch._subclasses.FakeTensorMode():
        grad, rows = torch.empty(4, 3, device="cuda"), torch.empty(5, 3, device="cuda")
        assert co.precondition(grad, rows).device.type == "cuda"


def test_float64_on_cuda_is_corrected_by_torch_and_refused_by_batch_rms_norm():
    import consistency_ops as co

    with torch._subclasses.FakeTensorMode():
        wide = torch.empty(4, 3, device="cuda", dtype=torch.float64)
        assert co.precondition(wide, wide).dtype == torch.float64
        with pytest.raises(NotImplementedError, match="batch_rms_norm: the CUDA kernels compute in float32"):
            co.batch_rms_norm(wide, torch.empty(3, device="cuda"), training=True)
