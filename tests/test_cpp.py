"""C and C++ programs use the library as a stranger would: found by CMake, no torch and no Python but for LibTorch's."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import consistency_ops as co
from support import processes

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "cpp"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def cmake(*arguments):
    done = processes.run(["cmake", *map(str, arguments)], capture_output=True, text=True, timeout=processes.LONG)
    assert done.returncode == 0, f"cmake {arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_and_run(build, prefix, *options, problems=12, train=True, emulator=()):
    cmake("-S", PROGRAMS, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCONSISTENCY_OPS_CUDA=OFF", *options)
    cmake("--build", build, "--parallel", "2")
    outputs = []
    environment = {"PATH": os.environ["PATH"]} if emulator else {}
    programs = [["cholesky"], ["correct"], ["launchers"], ["stress", str(problems)]] + [["train"]] * train
    for name, *arguments in programs:
        done = processes.run([*emulator, build / name, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{name}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    return outputs


@pytest.mark.slow
def test_from_the_package(tmp_path):
    cholesky, *_ = build_and_run(tmp_path / "build", co.cmake_prefix_path())
    assert cholesky.rstrip().endswith(f", {co.build_info()['cpu_isa']}")


def test_another_minor_version_is_refused(tmp_path):
    major, minor = co.__version__.split(".")[:2]
    wanted = f"find_package(ConsistencyOps {major}.{int(minor) + 1} REQUIRED)"
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.18)\nproject(user CXX)\n{wanted}\n")
    configure = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={co.cmake_prefix_path()}"]
    done = processes.run(configure, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ConsistencyOpsConfig.cmake, version: {co.__version__}" in done.stderr


def test_headers_are_c_and_cpp(tmp_path):
    """Every public header compiles alone; the C interfaces also as C99."""
    headers = sorted((Path(co.include_dir()) / "consistency_ops").glob("*.h"))
    assert len(headers) >= 5
    for header in headers:
        languages = [("c++", "-std=c++17")] + [("c", "-std=c99")] * header.name.startswith("c_api")
        for language, standard in languages:
            source = tmp_path / f"{header.stem}.{language}"
            source.write_text(f"#include <consistency_ops/{header.name}>\n")
            flags = ["-x", language, standard, "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
            done = processes.run(["c++", *flags, f"-I{co.include_dir()}", source], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param("OFF", marks=pytest.mark.nightly), "ON"])
def test_installed(tmp_path, shared):
    """Built and installed by CMake alone, as a static and as a shared library; a debug build, which compiles sooner."""
    build, prefix, debug = tmp_path / "library", tmp_path / "prefix", "-DCMAKE_BUILD_TYPE=Debug"
    options = [f"-DBUILD_SHARED_LIBS={shared}", "-DCONSISTENCY_OPS_CUDA=OFF", debug]
    cmake("-S", co.cmake_prefix_path(), "-B", build, *options)
    cmake("--build", build, "--parallel", "2")
    cmake("--install", build, "--prefix", prefix)
    build_and_run(tmp_path / "build", prefix, debug, problems=2)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizer):
    """No access out of bounds, undefined behaviour, leak or race over random problems, on every instruction set."""
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -g -O1"
    options = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    options.append("-DCMAKE_BUILD_TYPE=Debug")  # a release adds -O3, and takes minutes longer to compile
    build_and_run(tmp_path / "build", co.cmake_prefix_path(), *options, problems=20, train=False)


AARCH64 = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.fixture
def aarch64():
    missing = [name for name in AARCH64 if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


@pytest.mark.slow
def test_on_aarch64(tmp_path, aarch64):
    """Cross-compiled and run in an emulator, where only the portable code runs."""
    compilers = [f"-DCMAKE_{language}_COMPILER={name}" for language, name in zip(("C", "CXX"), AARCH64, strict=False)]
    target = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_FIND_ROOT_PATH_MODE_PACKAGE=BOTH",
    ]
    cholesky, *_ = build_and_run(
        tmp_path / "build", co.cmake_prefix_path(), *target, *compilers, train=False, emulator=aarch64
    )
    assert cholesky.rstrip().endswith(", portable")
    kind = processes.run(["readelf", "-h", tmp_path / "build" / "cholesky"], capture_output=True, text=True, check=True)
    assert "AArch64" in kind.stdout


@pytest.mark.slow
def test_bindings_compile_for_aarch64(aarch64):
    """With torch's headers; there is no torch for aarch64 here to link with."""
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_EXTENSION_NAME=_C"]
    csrc = Path(co.include_dir()).parent
    folders = [csrc, csrc / "include", *include_paths(), sysconfig.get_path("include")]
    for source in sorted((ROOT / "csrc" / "bindings").glob("*.cpp")):
        command = [AARCH64[1], "-std=c++17", "-fsyntax-only", *defines, *(f"-I{folder}" for folder in folders), source]
        done = processes.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.nightly  # five minutes of a core
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_launcher_links(tmp_path):
    """Compiled and linked where nvcc is found; compared with the CPU where there is a GPU, too."""
    build = tmp_path / "build"
    options = ["-DCONSISTENCY_OPS_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=75-real;80-real"]  # the kernels need sm_80
    cmake("-S", PROGRAMS, "-B", build, f"-DCMAKE_PREFIX_PATH={co.cmake_prefix_path()}", *options)
    cmake("--build", build, "--parallel", "2", "--target", "correct_cuda", "launchers_cuda")
    for program in ("correct_cuda", "launchers_cuda"):
        done = processes.run([build / program], capture_output=True, text=True)
        if done.returncode == 77:
            assert done.stdout == "no CUDA device\n"
        else:
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_libtorch(tmp_path):
    """The operators through torch's dispatcher, in a program without Python."""
    prefixes = f"{co.cmake_prefix_path()};{torch.utils.cmake_prefix_path}"
    build = tmp_path / "build"
    cmake("-S", PROGRAMS / "libtorch", "-B", build, f"-DCMAKE_PREFIX_PATH={prefixes}", "-DCONSISTENCY_OPS_CUDA=OFF")
    cmake("--build", build, "--target", "dispatcher")
    done = processes.run([build / "dispatcher"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chunk must be in [1, 256], got 257" in done.stdout
