"""build.toml: the library as a kernel of the Hugging Face Hub, under a name that the Hub chooses."""

import importlib.util
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import consistency_ops as co
from support import processes

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "build.toml").exists(), reason="needs the checkout that holds build.toml")

# What kernel-builder accepts in edition 5; it refuses any other field.
GENERAL = {"name", "version", "edition", "license", "backends", "cuda", "hub", "python-depends"}
TORCH = {"include", "minver", "maxver", "pyext", "src", "stable-abi", "cxx-flags"}
KERNEL = {
    "cpu": {"backend", "depends", "include", "src", "cxx-flags"},
    "cuda": {"backend", "depends", "include", "src", "cxx-flags", "cuda-capabilities", "cuda-flags", "cuda-minver"},
}


@pytest.fixture(scope="module")
def config():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads((ROOT / "build.toml").read_text())


def kernels(config, backend):
    return [kernel for kernel in config["kernel"].values() if kernel["backend"] == backend]


def sources(*parts):
    return {file for part in parts for file in part["src"]}


def test_the_fields_are_those_of_the_format(config):
    assert set(config) == {"general", "torch", "kernel"}
    assert set(config["general"]) <= GENERAL and config["general"]["edition"] == 5
    assert set(config["torch"]) <= TORCH
    for kernel in config["kernel"].values():
        assert set(kernel) <= KERNEL[kernel["backend"]]
        assert {"backend", "depends", "src"} <= set(kernel)
    assert {kernel["backend"] for kernel in config["kernel"].values()} == set(config["general"]["backends"])


def files(*patterns):
    found = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    return sorted(str(path.relative_to(ROOT)) for path in found)


HEADERS = ("csrc/include/consistency_ops/*.h", "csrc/c_api/structs.h")
SOURCES = {  # the heading of each list in build.toml, and what it names
    "torch": ("csrc/bindings/*", "csrc/cuda/precondition/counter_slots.h", *HEADERS),
    "kernel.cpu": ("csrc/cpu/*", "csrc/c_api/c_api.cpp", *HEADERS),
    "kernel.cpu_beside_cuda": ("csrc/cpu/*", "csrc/c_api/c_api.cpp", *HEADERS),
    "kernel.cuda": ("csrc/cuda/*", "csrc/cuda/precondition/*", "csrc/c_api/*.cu", *HEADERS),
}


def with_sources(text):
    """build.toml with the lists that the files of csrc ask for."""
    for heading, patterns in SOURCES.items():
        names = "".join(f'    "{name}",\n' for name in files(*patterns))
        start = text.index(f"[{heading}]\n")
        opening = text.index("\nsrc = [\n", start) + len("\nsrc = [\n")
        text = text[:opening] + names + text[text.index("]", opening) :]
    return text


def test_every_file_that_setup_compiles_is_named(config):
    text = (ROOT / "build.toml").read_text()
    assert with_sources(text) == text, "run `PYTHONPATH=. python tests/test_hub.py`: it writes the lists"
    named = sources(config["torch"], *kernels(config, "cuda"))
    ours = {name for name in files("csrc/**/*") if name.endswith((".cpp", ".cu", ".h", ".cuh", ".inl"))}
    assert ours - named == set(files("csrc/torch_abi/*"))


def test_the_flags_are_those_of_setup(config):
    flags = [line for line in (ROOT / "csrc" / "flags.txt").read_text().splitlines() if line.startswith("-")]
    for part in (config["torch"], *config["kernel"].values()):
        assert set(flags) <= set(part["cxx-flags"])
    archs = ";".join(next(k["cuda-capabilities"] for k in kernels(config, "cuda") if "cuda-capabilities" in k))
    assert f'"{archs}"' in (ROOT / "csrc" / "bindings" / "build.h").read_text()


def test_the_package_imports_nothing_by_its_own_name():
    """The Hub loads it under another name, and several of its builds into one process."""
    absolute = re.compile(
        r"^\s*(import|from) consistency_ops|torch\.ops\.consistency_ops|[\"']consistency_ops\.[\w.]+[\"']"
    )
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in (ROOT / "consistency_ops").rglob("*.py")
        for line in file.read_text().splitlines()
        if absolute.search(line)
    ]
    assert found == ["consistency_ops/_ops.py: ops: Any = torch.ops.consistency_ops"]
    assert (ROOT / "torch-ext" / "consistency_ops").resolve() == ROOT / "consistency_ops"


NAME = "_consistency_ops_1a2b3c"
OPS = f"""
import torch
from torch.utils.cpp_extension import include_paths
from . import {NAME}
ops = torch.ops.{NAME}
def add_op_namespace_prefix(op_name):
    return f"{NAME}::{{op_name}}"
"""


@pytest.mark.slow
def test_a_build_under_another_name_works_beside_this_one(config, tmp_path):
    """The CPU variant, compiled from the lists of build.toml and loaded by its path as the Hub's library does."""
    package = tmp_path / "build" / "consistency_ops"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_ops.py", "csrc")
    shutil.copytree(ROOT / "torch-ext" / "consistency_ops", package, ignore=ignored)
    (package / "_ops.py").write_text(OPS)
    include = [*include_paths(), sysconfig.get_path("include")]
    objects = []
    for part in (config["torch"], *kernels(config, "cpu")):
        flags = [*part["cxx-flags"], *(f"-I{ROOT / folder}" for folder in part["include"])]
        for source in part["src"]:
            if source.endswith(".cpp"):
                objects.append(tmp_path / (source.replace("/", "_") + ".o"))
                command = ["c++", "-std=c++17", "-fPIC", "-c", str(ROOT / source), "-o", str(objects[-1]), *flags]
                command += [f"-DTORCH_EXTENSION_NAME={NAME}", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x030A0000"]
                command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{folder}" for folder in include)]
                processes.run(command, check=True)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-lpthread"]
    processes.run(["c++", "-shared", *objects, "-o", package / f"{NAME}.abi3.so", *libraries], check=True)

    name = "consistency_ops_of_the_hub"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    hub = importlib.util.module_from_spec(spec)
    sys.modules[name] = hub
    try:
        spec.loader.exec_module(hub)
        grad, inputs = torch.randn(6, 200), torch.randn(80, 200)
        assert torch.equal(hub.precondition(grad, inputs), co.precondition(grad, inputs))
        assert hub.verify("cpu").ok and hub.build_info()["library"].startswith(str(package))
        model = torch.nn.Linear(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hub.Preconditioner(model, optimizer)
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


if __name__ == "__main__":
    (ROOT / "build.toml").write_text(with_sources((ROOT / "build.toml").read_text()))
