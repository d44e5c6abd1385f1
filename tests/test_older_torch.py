"""The bindings compile with every torch that is promised, not only with the one that is installed.

What is new in the headers of the installed torch is easily used by mistake: ``TORCH_TARGET_VERSION`` hides new
functions, not new members of old classes.
"""

import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support import processes

ROOT = Path(__file__).resolve().parents[1]
BINDINGS = sorted((ROOT / "csrc" / "bindings").glob("*.cpp"))


@pytest.fixture(scope="module", params=["2.10.0", "2.11.0", "2.12.0"])
def include(request, tmp_path_factory):
    """torch/include of the published wheel, without its libraries."""
    folder = tmp_path_factory.mktemp("torch")
    command = ["pip", "download", "-q", "--no-deps", "--dest", folder, f"torch=={request.param}"]
    found = processes.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"the package index has no torch {request.param}: {found.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    wheel.unlink()
    return folder / "torch" / "include"


@pytest.mark.nightly  # half a gigabyte a version
@pytest.mark.parametrize("binding", BINDINGS, ids=lambda path: path.stem)
def test_bindings_compile_with_older_torch(include, binding):
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_EXTENSION_NAME=_C"]
    folders = [ROOT / "csrc", ROOT / "csrc" / "include", include, sysconfig.get_path("include")]
    done = processes.run(
        ["g++", "-std=c++17", "-fsyntax-only", *defines, *[f"-I{folder}" for folder in folders], binding],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
