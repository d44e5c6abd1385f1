"""Every problem of a build or import is answered by one sentence that says what to do, never by a traceback."""

import ctypes
import functools
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

import consistency_ops as co
from consistency_ops.ops import backend, library
from support import documents, processes

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
    for name in ("module.cpp", "build.h", "schemas.inc"):
        shutil.copy(ROOT / "csrc" / "bindings" / name, target / "csrc" / "bindings")
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml", "build_backend.py"):
        shutil.copy(ROOT / name, target)
    return target


def python(checkout, *arguments, **environment):
    ours = ("CXX", "CUDA_HOME", "CUDA_PATH")
    clean = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("CONSISTENCY_OPS_")}
    return processes.run(
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
    assert_one_sentence(build(checkout, CONSISTENCY_OPS_CUDA="1", CUDA_HOME=home), "is 11.8", "12.1 or newer")


def test_old_toolkit_builds_for_the_cpu_and_says_so(checkout, tmp_path):
    home = fake_toolkit(tmp_path / "cuda", OLD_NVCC)
    done = build(checkout, CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert "building without CUDA kernels" in done.stderr and "is 11.8" in done.stderr
    assert (checkout / "consistency_ops" / "_C.abi3.so").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_in_a_folder_whose_name_has_a_space(tmp_path):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    told = processes.run(["make", "-n", ".venv/.installed"], cwd=folder, capture_output=True, text=True, check=True)
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
    found = [s.name.partition("::") for s in torch._C._jit_get_all_schemas()]
    registered = {name for namespace, _, name in found if namespace == "consistency_ops"} - {"capture_traced_rows_"}
    text = (ROOT / "csrc" / "bindings" / "schemas.inc").read_text()
    assert registered == set(re.findall(r"^(\w+)\(", text, re.MULTILINE)), "one is defined in Python"
    library.library.co_schemas.restype = ctypes.c_char_p
    assert library.library.co_schemas().decode() == text.strip().removeprefix('R"(').removesuffix(')"')


ASK = (
    "import build_backend as b; b.build_meta.get_requires_for_build_wheel = lambda settings: []; "
    "print(b.get_requires_for_build_wheel())"
)


def torch_in(folder, version="2.10.0+cu130"):
    """What an installation of torch leaves for others to see, without torch."""
    fake_torch(folder, f"__version__ = {version!r}\n")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return folder


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without packages."""
    processes.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)
    return tmp_path / "environment"


def site_packages(environment):
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def requirements(interpreter, folder=None, **variables):
    """What the backend asks for in pip's isolated build: setuptools comes by PYTHONPATH, all else is hidden by it."""
    variables = {"PYTHONPATH": f"{ROOT}:{isolated(folder)}", **variables}
    clean = {k: v for k, v in os.environ.items() if k not in ("UV", "VIRTUAL_ENV", "CONSISTENCY_OPS_TORCH")}
    program = [
        interpreter,
        "-c",
        f"import sys; sys.path = [p for p in sys.path if not p.endswith('site-packages')]; {ASK}",
    ]
    return processes.run(program, cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True)


def isolated(folder):
    """setuptools alone, as in the folder that pip makes for a build."""
    folder = folder or Path(tempfile.mkdtemp())
    packages = Path(setuptools.__file__).parents[1]
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources", "wheel*"):
        for found in packages.glob(pattern):
            if not (folder / found.name).exists():
                (folder / found.name).symlink_to(found)
    return folder


@pytest.mark.parametrize("version", [None, "2.9.1", "2.10.0+cu130", "3.0.0"])
def test_backend_downloads_torch_only_where_none_is_installed(environment, tmp_path, version):
    """pip's isolated build asks the backend what to install first."""
    if version:
        torch_in(site_packages(environment), version)
    done = requirements(environment / "bin" / "python", tmp_path)
    downloads = version in (None, "2.9.1")
    assert ("torch>=2.10" in done.stdout) == downloads, done.stderr
    assert ("CONSISTENCY_OPS_TORCH=/path/to/python names an interpreter" in done.stderr) == downloads


def test_backend_finds_torch_through_a_pth_file(environment, tmp_path):
    torch_in(tmp_path / "elsewhere")
    (site_packages(environment) / "elsewhere.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    done = requirements(environment / "bin" / "python", tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_backend_finds_the_torch_of_the_system_below_a_virtual_environment(tmp_path):
    """The tests' interpreter stands for the system: a container's, with torch in it."""
    folder = tmp_path / "environment"
    processes.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", folder], check=True)
    if sys.prefix != sys.base_prefix:  # the system of a virtual environment is that of its own system
        (site_packages(folder) / "system.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    done = requirements(folder / "bin" / "python", tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc, as on Linux")
@pytest.mark.parametrize(
    "how", ["--python environment", "-p environment/bin/python", "VIRTUAL_ENV", ".venv", "project"]
)
def test_backend_finds_the_environment_that_uv_installs_into(environment, tmp_path, how):
    """uv builds with an interpreter of another environment; the parent process says which one it installs into."""
    torch_in(site_packages(environment))
    other = tmp_path / "other"
    processes.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    folder = tmp_path / "project" / "inner"
    folder.mkdir(parents=True)
    arguments, variables = ["pip", "install", "."], {}
    if how.startswith("-"):
        option, name = how.split()
        arguments += [option, str(tmp_path / name)]
    elif how == "VIRTUAL_ENV":
        variables = {"VIRTUAL_ENV": str(environment)}
    elif how == "project":
        arguments, variables = ["sync"], {"UV_PROJECT_ENVIRONMENT": str(environment), "VIRTUAL_ENV": str(other)}
    else:
        (tmp_path / "project" / ".venv").symlink_to(environment)
    # As uv does: its own process, and in it a build with the other interpreter, which is told of nothing but that.
    build = (
        "import os, subprocess, sys; env = {**os.environ, 'UV': 'uv', 'VIRTUAL_ENV': '/build'}; "
        "env.pop('UV_PROJECT_ENVIRONMENT', None); "
        f"subprocess.run([{str(other / 'bin' / 'python')!r}, '-c', {ASK!r}], cwd={str(ROOT)!r}, env=env, check=True)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("UV", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    done = processes.run(
        [sys.executable, "-c", build, *arguments],
        cwd=folder,
        env={**clean, **variables, "PYTHONPATH": f"{ROOT}:{isolated(None)}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_interpreter_to_build_with_can_be_named(environment, tmp_path):
    torch_in(site_packages(environment))
    other = tmp_path / "other"
    processes.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    named = str(environment / "bin" / "python")
    assert requirements(other / "bin" / "python", CONSISTENCY_OPS_TORCH=named).stdout == "[]\n"
    for wrong in (str(other / "bin" / "python"), str(tmp_path), "no-such-python"):
        done = requirements(other / "bin" / "python", CONSISTENCY_OPS_TORCH=wrong)
        assert_one_sentence(done, "CONSISTENCY_OPS_TORCH must be a Python", f"got '{wrong}'")


def test_setup_builds_with_the_torch_that_the_backend_finds(environment, tmp_path):
    """And not only asks for none: a torch too old to build with says which one it found."""
    folder = torch_in(tmp_path / "elsewhere", "2.10.0")
    (folder / "torch" / "__init__.py").write_text("__version__ = '2.9.0'  # to be seen in the sentence\n")
    (site_packages(environment) / "elsewhere.pth").write_text(f"{folder}\n")
    done = processes.run(
        [environment / "bin" / "python", "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(isolated(None))},
        capture_output=True,
        text=True,
    )
    assert_one_sentence(done, "torch 2.9.0 is too old")


def test_requirements_of_this_repository_are_constraints_too():
    """As docs/install.md uses them: names and versions; pip refuses extras, and -r would bring other files in."""
    assert "PIP_BUILD_CONSTRAINT=requirements.txt pip install -c requirements.txt ." in documents.read(
        "docs/install.md"
    )
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    assert [str(one) for one in found if one.extras or one.url] == []
    assert "torch" in {one.name for one in found if str(one.specifier).startswith("==")}


def test_an_installation_does_not_warn_of_the_sources_that_it_brings(checkout, tmp_path):
    """pip shows every line; setuptools has forty for each folder that only MANIFEST.in names."""
    shutil.copy(ROOT / "MANIFEST.in", checkout)
    done = python(checkout, "-W", "always", "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib"))
    assert done.returncode == 0 and "would be ignored" not in done.stdout + done.stderr, done.stderr
    assert (tmp_path / "lib" / "consistency_ops" / "csrc" / "bindings" / "module.cpp").exists()


def test_windows_is_one_sentence(checkout):
    program = "import setuptools.build_meta, sys; sys.platform = 'win32'; import build_backend"
    assert_one_sentence(python(checkout, "-c", program), "Windows is not supported", "WSL 2")
    assert "from build_backend import" in (ROOT / "setup.py").read_text()


def test_two_builds_of_one_checkout_wait_for_each_other_without_the_flock_command(checkout):
    """macOS has no flock; setup.py locks by itself."""
    assert "flock" not in (ROOT / "Makefile").read_text()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    clean = {**os.environ, "CONSISTENCY_OPS_CUDA": "0"}
    build = functools.partial(processes.run, command, cwd=checkout, env=clean, capture_output=True, text=True)
    both = processes.in_threads(build, build)
    assert [one.returncode for one in both] == [0, 0], [one.stderr for one in both]
    assert (checkout / "consistency_ops" / "_C.abi3.so").exists()


# What the package index gets to see


def metadata(checkout, **environment):
    done = python(checkout, "setup.py", "-q", "dist_info", **environment)
    assert done.returncode == 0, done.stderr
    (folder,) = checkout.glob("*.dist-info")
    text = (folder / "METADATA").read_text(encoding="utf-8")
    shutil.rmtree(folder)
    return text


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize(
    "address", ["https://git.example.org/a/b", "https://user:secret@git.example.org/a/b.git", "git@git.example.org:a/b"]
)
def test_links_of_the_long_description_are_absolute(checkout, address):
    text = metadata(checkout, CONSISTENCY_OPS_REPOSITORY=address)
    links = LINK.findall(text)
    assert len(links) > 30 and "secret" not in text
    ours = f"https://git.example.org/a/b/(?:blob|raw)/v{co.__version__}/(.+?)(?:#.*)?"
    assert [link for link in links if not link.startswith("https://")] == []
    files = [match[1] for link in links if (match := re.fullmatch(ours, link))]
    assert len(files) > 30 and [file for file in files if not (ROOT / file).exists()] == []
    assert "/raw/" in text and "Project-URL: Repository, https://git.example.org/a/b\n" in text


def test_without_an_address_the_long_description_has_no_dead_links(checkout):
    text = metadata(checkout)
    assert [link for link in LINK.findall(text) if not link.startswith("https://")] == []
    assert "Project-URL" not in text and "another one than without: how to choose." in " ".join(text.split())


def test_the_address_comes_from_git_and_goes_on_through_a_source_distribution(checkout):
    processes.run(["git", "init", "-q"], cwd=checkout, check=True)
    processes.run(["git", "remote", "add", "origin", "git@git.example.org:a/b.git"], cwd=checkout, check=True)
    text = metadata(checkout)
    assert "https://git.example.org/a/b/blob/" in text
    shutil.rmtree(checkout / ".git")
    (checkout / "PKG-INFO").write_text(text)
    assert metadata(checkout).count("https://git.example.org/a/b/") == text.count("https://git.example.org/a/b/")


# What a build without CUDA kernels says


@pytest.mark.parametrize(
    ("files", "cuda", "level"),
    [(["/dev/nvidiactl"], "13.0", "WARNING"), ([], "13.0", "INFO"), (["/dev/nvidiactl"], None, "INFO")],
)
def test_a_build_without_cuda_kernels_warns_where_there_is_a_gpu(monkeypatch, caplog, files, cuda, level):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(os.path, "exists", files.__contains__)
    with caplog.at_level(logging.INFO, "consistency_ops"):
        backend._say_that_there_are_no_cuda_kernels()
    (record,) = caplog.records
    assert record.levelname == level and "has no CUDA kernels" in record.message and "CUDA_HOME" in record.message


def test_it_is_said_once_when_the_package_is_imported():
    program = "import logging; logging.basicConfig(level=logging.INFO); import consistency_ops as co; co.modulus"
    done = processes.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no CUDA kernels") == (0 if backend.has_kernels("CUDA") else 1)


def test_the_report_of_a_build_without_cuda_kernels_says_what_helps(monkeypatch):
    monkeypatch.setattr(co.environment, "build_config", lambda: {"torch": "2.13.0", "compiler": "GCC"})
    lines = [line for line in co.environment.format_report().splitlines() if line.startswith("cuda_")]
    assert ["none" in line for line in lines] == [True, True] and "set CUDA_HOME" in lines[1]
