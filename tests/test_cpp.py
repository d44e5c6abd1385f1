"""A C and a C++ program use the library as a stranger would: found by CMake, no torch, no Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

import consistency_ops as co

PROGRAMS = Path(__file__).parent / "cpp"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def cmake(*arguments):
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"cmake {arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_and_run(build, prefix, *options, problems=12):
    cmake("-S", PROGRAMS, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCONSISTENCY_OPS_CUDA=OFF", *options)
    cmake("--build", build, "--parallel", "2")
    outputs = []
    for name, *arguments in (["cholesky"], ["correct"], ["stress", str(problems)]):
        done = subprocess.run([build / name, *arguments], capture_output=True, text=True, env={})
        assert done.returncode == 0, f"{name}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    return outputs


def test_from_the_package(tmp_path):
    cholesky, *_ = build_and_run(tmp_path / "build", co.cmake_prefix_path())
    assert cholesky.rstrip().endswith(f", {co.build_info()['cpu_isa']}")


def test_headers_are_c_and_cpp(tmp_path):
    """Every public header compiles alone; the C interface also as C99."""
    headers = sorted((Path(co.include_dir()) / "consistency_ops").glob("*.h"))
    assert len(headers) >= 5
    for header in headers:
        languages = [("c++", "-std=c++17")] + [("c", "-std=c99")] * (header.name == "c_api.h")
        for language, standard in languages:
            source = tmp_path / f"{header.stem}.{language}"
            source.write_text(f"#include <consistency_ops/{header.name}>\n")
            flags = ["-x", language, standard, "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
            done = subprocess.run(["c++", *flags, f"-I{co.include_dir()}", source], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["OFF", "ON"])
def test_installed(tmp_path, shared):
    """Built and installed by CMake alone, as a static and as a shared library."""
    build, prefix = tmp_path / "library", tmp_path / "prefix"
    cmake("-S", co.cmake_prefix_path(), "-B", build, f"-DBUILD_SHARED_LIBS={shared}", "-DCONSISTENCY_OPS_CUDA=OFF")
    cmake("--build", build, "--parallel", "2")
    cmake("--install", build, "--prefix", prefix)
    build_and_run(tmp_path / "build", prefix)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizer):
    """No access out of bounds, undefined behaviour, leak or race over random problems, on every instruction set."""
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g -O1"
    options = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    build_and_run(tmp_path / "build", co.cmake_prefix_path(), *options, problems=40)
