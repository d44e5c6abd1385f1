"""The launch of csrc/cuda/port.cuh under the driver's rules, which no GPU is needed for: a fake runtime has them."""

import shutil
from pathlib import Path

import pytest

from support import processes

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def run(tmp_path, *flags, csrc=ROOT / "csrc"):
    program = tmp_path / "launch_limits"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread", *flags, f"-I{csrc}"]
    command += [f"-I{csrc / 'include'}", f"-I{ROOT / 'tests/cpp/fake_cuda'}", ROOT / "tests/cpp/launch_limits.cpp"]
    done = processes.run([*command, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return processes.run([program], capture_output=True, text=True)


def test_shared_memory_and_clusters(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout


@pytest.mark.parametrize(
    ("original", "mutant", "words"),
    [
        ("if (dynamic_shared > 0) {", "if (dynamic_shared > 48 * 1024) {", "a first launch is refused"),
        ("if (done) return cudaSuccess;", "", "the attribute is set at every launch"),
        ("allowed[{kernel, device}]", "allowed[{kernel, 0}]", "a first launch is refused"),
        ("most - static_cast<int>(attributes.sharedSizeBytes)", "most", "a first launch is refused"),
        ("&& clusters > 0;", "&& clusters >= 0;", "clusters that do not fit are taken"),
        ("if (error != cudaSuccess) (void)cudaGetLastError();", "", "the query leaves its error behind"),
    ],
)
def test_it_would_notice(tmp_path, original, mutant, words):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    port = tmp_path / "csrc" / "cuda" / "port.cuh"
    text = port.read_text()
    assert text.count(original) == 1, original
    port.write_text(text.replace(original, mutant))
    done = run(tmp_path, csrc=tmp_path / "csrc")
    assert done.returncode == 1 and words in done.stdout, done.stdout


def test_an_older_toolkit_is_refused(tmp_path):
    """12.0 has 4 KB of kernel parameters; nvcc's own message would not say so."""
    header = (ROOT / "tests/cpp/fake_cuda/cuda_runtime.h").read_text()
    (tmp_path / "cuda_runtime.h").write_text(header.replace("CUDART_VERSION 12010", "CUDART_VERSION 12000"))
    source = tmp_path / "user.cpp"
    source.write_text('#define __CUDACC__\n#include <cuda_runtime.h>\n#include "cuda/port.cuh"\n')
    command = [
        "c++",
        "-std=c++17",
        "-fsyntax-only",
        f"-I{tmp_path}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/include'}",
    ]
    done = processes.run([*command, source], capture_output=True, text=True)
    assert done.returncode != 0 and "needs CUDA toolkit 12.1 or newer" in done.stderr
