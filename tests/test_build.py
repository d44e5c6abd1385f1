"""Every problem of a build or import is answered by one sentence that says what to do, never by a traceback."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from consistency_ops.ops import library

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the checkout that holds setup.py")


@pytest.fixture
def checkout(tmp_path):
    """A small unbuilt checkout: all of the Python package, and of csrc what compiles in a second."""
    target = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "consistency_ops", target / "consistency_ops", ignore=ignored)
    shutil.copytree(ROOT / "csrc" / "include", target / "csrc" / "include")
    (target / "csrc" / "bindings").mkdir()
    shutil.copy(ROOT / "csrc" / "flags.txt", target / "csrc")
    for name in ("module.cpp", "schemas.inc"):
        shutil.copy(ROOT / "csrc" / "bindings" / name, target / "csrc" / "bindings")
    for name in ("setup.py", "README.md", "pyproject.toml", "build_backend.py"):
        shutil.copy(ROOT / name, target)
    return target


def python(checkout, *arguments, **environment):
    ours = ("CXX", "CUDA_HOME", "CUDA_PATH", "CONSISTENCY_OPS_CUDA", "CONSISTENCY_OPS_TORCH_ABI")
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env={**clean, **environment}, capture_output=True, text=True
    )


def build(checkout, **environment):
    return python(checkout, "setup.py", "-q", "build_ext", "--inplace", **environment)


def assert_one_sentence(done, *parts):
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("consistency_ops: ") and lines[-1].endswith("."), done.stderr
    for part in parts:
        assert part in lines[-1]


def fake_torch(folder, content):
    package = folder / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").touch()
    return str(folder)


MISSING = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
OLD = "__version__ = '2.9.1+cu128'\n"


def fake_toolkit(folder, nvcc):
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text(nvcc)
    (folder / "bin" / "nvcc").chmod(0o755)
    return str(folder)


OLD_NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n"


def test_no_compiler(checkout, tmp_path):
    assert_one_sentence(build(checkout, PATH=str(tmp_path)), "no C++ compiler (c++ is not on the PATH)", "apt-get")
    assert_one_sentence(build(checkout, CXX="no-such-compiler -pipe"), "(no-such-compiler is not on the PATH)")


def test_compiler_that_does_not_work(checkout, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert_one_sentence(build(checkout, CXX=str(broken)), f"{broken} does not compile", "g++ 11")


def test_no_torch(checkout, tmp_path):
    done = build(checkout, PYTHONPATH=fake_torch(tmp_path / "fake", MISSING))
    assert_one_sentence(done, "building needs torch >= 2.10", "pip install")


def test_old_torch(checkout, tmp_path):
    done = build(checkout, PYTHONPATH=fake_torch(tmp_path / "fake", OLD))
    assert_one_sentence(done, "torch 2.9.1+cu128 is too old", "pip install --upgrade")


def test_bad_switch(checkout):
    for name in ("CONSISTENCY_OPS_CUDA", "CONSISTENCY_OPS_TORCH_ABI"):
        assert_one_sentence(build(checkout, **{name: "yes"}), f"{name} must be 0 or 1, got 'yes'")


NODE = """
#include <Python.h>
#define NAME_(name) PyInit_##name
#define NAME(name) NAME_(name)
PyMODINIT_FUNC NAME(TORCH_EXTENSION_NAME)(void) { static PyModuleDef m = {}; return PyModule_Create(&m); }
"""


def with_node(checkout, content=NODE):
    """A checkout with one small file in csrc/torch_abi, which is built for one torch and one Python."""
    (checkout / "csrc" / "torch_abi").mkdir()
    (checkout / "csrc" / "torch_abi" / "node.cpp").write_text(content)
    return checkout


def test_the_accelerator_is_built_in_place(checkout):
    done = build(with_node(checkout))
    assert done.returncode == 0, done.stderr
    (node,) = (checkout / "consistency_ops").glob("_torch_abi_*.so")
    assert node.name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))
    (checkout / "csrc" / "torch_abi" / "node.cpp").write_text("#error nothing is compiled\n")
    assert build(checkout, CONSISTENCY_OPS_TORCH_ABI="0").returncode == 0


def test_a_torch_that_does_not_build_the_accelerator(checkout):
    done = build(with_node(checkout, "#error another torch\n"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("consistency_ops: without csrc/torch_abi")
    assert (checkout / "consistency_ops" / "_C.abi3.so").exists()
    done = build(checkout, CONSISTENCY_OPS_TORCH_ABI="1")
    assert_one_sentence(done, "csrc/torch_abi does not build with this torch", "CONSISTENCY_OPS_TORCH_ABI=0")


@pytest.mark.parametrize("switch", ["", "0", "1"])
def test_a_wheel_says_what_it_holds(checkout, switch):
    """The accelerator serves one Python: a wheel, which `pip install .` makes too, is tagged abi3 only without it."""
    done = python(with_node(checkout), "setup.py", "-q", "bdist_wheel", CONSISTENCY_OPS_TORCH_ABI=switch)
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    nodes = [name for name in zipfile.ZipFile(wheel).namelist() if "/_torch_abi_" in name]
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert ("-cp310-abi3-" if switch == "0" else f"-{python_tag}-{python_tag}-") in wheel.name
    assert len(nodes) == (0 if switch == "0" else 1)


def test_a_wheel_after_a_build_in_place_leaves_the_accelerator_out(checkout):
    assert build(with_node(checkout)).returncode == 0
    assert list((checkout / "build").glob("lib*/consistency_ops/_torch_abi_*"))
    done = python(checkout, "setup.py", "-q", "bdist_wheel", CONSISTENCY_OPS_TORCH_ABI="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*-cp310-abi3-*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/_torch_abi_" in name]


def test_no_toolkit(checkout, tmp_path):
    done = build(checkout, CONSISTENCY_OPS_CUDA="1", CUDA_HOME=str(tmp_path))
    assert_one_sentence(done, f"no CUDA toolkit with headers in {tmp_path}", "set CUDA_HOME")


def test_broken_nvcc(checkout, tmp_path):
    home = fake_toolkit(tmp_path / "cuda", "#!/bin/sh\nexit 3\n")
    done = build(checkout, CONSISTENCY_OPS_CUDA="1", CUDA_HOME=home)
    assert_one_sentence(done, f"{home}/bin/nvcc does not run", "set CUDA_HOME")


def test_old_toolkit(checkout, tmp_path):
    home = fake_toolkit(tmp_path / "cuda", OLD_NVCC)
    assert_one_sentence(build(checkout, CONSISTENCY_OPS_CUDA="1", CUDA_HOME=home), "is 11.8", "12.0 or newer")


def test_old_toolkit_builds_for_the_cpu_and_says_so(checkout, tmp_path):
    home = fake_toolkit(tmp_path / "cuda", OLD_NVCC)
    done = build(checkout, CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert "building for the CPU only" in done.stderr and "is 11.8" in done.stderr
    assert (checkout / "consistency_ops" / "_C.abi3.so").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_in_a_folder_whose_name_has_a_space(tmp_path):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    told = subprocess.run(["make", "-n", ".venv/.installed"], cwd=folder, capture_output=True, text=True, check=True)
    assert told.stdout.count(f'"{folder}/.venv/bin/python"') == 2
    assert told.stdout.count(f"{folder}/.venv") == 2


def imported(checkout, **environment):
    done = python(checkout, "-c", "import consistency_ops", **environment)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and last.endswith(".")
    return last


def test_import_unbuilt(checkout):
    message = imported(checkout)
    assert f"not built in {checkout / 'consistency_ops'}" in message and "make build" in message


def test_the_command_line_of_an_unbuilt_checkout_is_one_sentence(checkout):
    for arguments in ([], ["train", "--epochs", "1"]):
        done = python(checkout, "-m", "consistency_ops", *arguments)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and done.stdout == ""
        assert line.startswith("error: consistency_ops is not built in") and "make build" in line


def test_import_without_torch(checkout, tmp_path):
    assert "torch is not installed: run `pip" in imported(checkout, PYTHONPATH=fake_torch(tmp_path / "fake", MISSING))


def test_import_with_old_torch(checkout, tmp_path):
    assert "this is torch 2.9.1+cu128: run `pip" in imported(checkout, PYTHONPATH=fake_torch(tmp_path / "fake", OLD))


def test_import_of_a_damaged_library(checkout):
    (checkout / "consistency_ops" / "_C.abi3.so").write_bytes(b"\x7fELF, cut off")
    assert "does not load with torch" in imported(checkout)


def test_import_of_a_library_of_other_sources(checkout):
    """It happens after `git pull` without `make build`."""
    assert build(checkout).returncode == 0
    schemas = checkout / "csrc" / "bindings" / "schemas.inc"
    schemas.write_text(schemas.read_text().replace("modulus(Tensor x)", "modulus(Tensor x, bool changed=False)"))
    message = imported(checkout)
    assert "_C.abi3.so was built from other sources than the files beside it" in message
    assert "make build" in message and "pip install" in message


def test_the_library_was_compiled_with_the_list_of_operators_beside_it():
    import torch

    found = [s.name.partition("::") for s in torch._C._jit_get_all_schemas()]
    registered = {name for namespace, _, name in found if namespace == "consistency_ops"} - {"capture_traced_rows_"}
    text = (ROOT / "csrc" / "bindings" / "schemas.inc").read_text()
    assert registered == set(re.findall(r"^(\w+)\(", text, re.MULTILINE)), "one is defined in Python"
    library.library.co_schemas.restype = ctypes.c_char_p
    assert library.library.co_schemas().decode() == text.strip().removeprefix('R"(').removesuffix(')"')


def test_backend_downloads_torch_only_where_none_is_installed(checkout, tmp_path):
    """pip's isolated build asks the backend what to install first."""
    ask = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
    assert "torch" not in python(checkout, "-c", ask).stdout
    pretend = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}; "
    assert "torch>=2.10" in python(checkout, "-c", pretend + ask).stdout
    old = tmp_path / "torch-2.9.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    assert "torch>=2.10" in python(checkout, "-c", pretend + ask).stdout
