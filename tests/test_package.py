"""The package: one abi3 library that needs only torch's stable symbols, headers, types, and commands that exist."""

import ast
import ctypes
import logging
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

import consistency_ops as co
from consistency_ops.ops.library import library
from support import documents, frameworks, processes

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(library._name)


def symbols(*options):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = processes.run(["nm", "-D", *options, LIBRARY], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines()}


def test_one_version_everywhere():
    text = (Path(co.include_dir()) / "consistency_ops" / "version.h").read_text()
    numbers = [int(n) for n in re.findall(r"#define CONSISTENCY_OPS_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text)]
    assert ".".join(map(str, numbers)) == co.__version__ == co.build_info()["version"]
    library.co_version.restype = ctypes.c_int32
    assert library.co_version() == numbers[0] * 10000 + numbers[1] * 100 + numbers[2]


def test_the_library_needs_only_stable_symbols_of_torch():
    """A mangled C++ name of torch would tie the binary to one release of torch."""
    undefined = symbols("--undefined-only")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert [name for name in undefined if re.match(r"_ZN?K?(St)?\d*(2at|3c10|5torch|8caffe2)", name)] == []


def test_the_library_exports_its_entry_points_only():
    """Hidden visibility: nothing of ours can clash with another extension's symbols."""
    defined = symbols("--defined-only")
    assert {name for name in defined if not name.startswith(("co_", "_"))} == {"PyInit__C"}
    assert not [name for name in defined if "consistency_ops" in name]  # mangled C++ names
    headers = ["c_api.h"] + ["c_api_cuda.h"] * (co.build_info()["cuda_toolkit"] is not None)
    text = "".join((Path(co.include_dir()) / "consistency_ops" / header).read_text() for header in headers)
    declared = set(re.findall(r"\b(co_\w+)\(", text))
    assert declared <= defined


def test_the_library_is_abi3():
    assert LIBRARY.name == "_C.abi3.so"


def test_no_paths_of_the_build_machine_in_the_library():
    content = LIBRARY.read_bytes()
    places = {str(ROOT), str(Path.home()), sys.prefix, str(Path(torch.__file__).parents[1])} - {"/", ""}
    assert [place for place in places if place.encode() in content] == []


def test_types_and_headers_are_shipped():
    package = Path(co.__file__).parent
    assert (package / "py.typed").exists()
    assert {"c_api.h", "precondition.h", "version.h"} <= {
        h.name for h in (Path(co.include_dir()) / "consistency_ops").iterdir()
    }
    assert list(Path(co.cmake_prefix_path()).glob("**/ConsistencyOpsConfig.cmake"))


def test_headers_are_free_of_torch_and_python():
    for header in (Path(co.include_dir()) / "consistency_ops").glob("*.h"):
        included = re.findall(r"#include [<\"](.+?)[>\"]", header.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10|Python)", name)], header


def test_build_info():
    info = co.build_info()
    assert info["torch"] == torch.__version__
    assert info["torch_build"].startswith("2.") and info["compiler"]
    assert info["cpu_isa"] in ("amx", "avx512bf16", "avx512", "avx2", "portable")
    assert info["threads"] == torch.get_num_threads()
    assert len(info["gpus"]) == torch.cuda.device_count()
    assert (info["cuda_toolkit"] is None) == (info["cuda_archs"] is None)


def test_the_report_on_the_command_line(tmp_path):
    done = processes.run(
        [sys.executable, "-m", "consistency_ops"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(co.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    report = dict(re.split(r"\s{2,}|(?<=\S) (?=\S)", line, maxsplit=1) for line in done.stdout.splitlines())
    assert report["version"] == co.__version__
    assert report["cpu_isa"] == co.build_info()["cpu_isa"]


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the checkout that holds the Makefile")
def test_the_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    texts = "\n".join(map(documents.read, documents.texts()))
    named = set(re.findall(r"^\s*make ([a-z-]+)", texts, re.MULTILINE)) | set(re.findall(r"`make ([a-z-]+)", texts))
    assert {"train", "test", "docs"} <= named <= targets
    if shutil.which("make"):
        listed = processes.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert set(re.findall(r"^make (\S+)", listed, re.MULTILINE)) == targets


PAGES_WITH_EXAMPLES = [
    name for name in documents.manual() if any(not frameworks.used_by(block) for block in documents.examples(name))
]


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES)
def test_the_examples_of_the_readme_run(page, capsys, monkeypatch):
    """Each page of the manual runs as one program; tests/test_trainers.py runs the examples of frameworks."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(name, value)  # as torchrun does
    logger = logging.getLogger("consistency_ops")
    level = logger.level
    namespace = {}
    try:
        for example in documents.examples(page):
            if not frameworks.used_by(example):
                exec(compile(example, page, "exec"), namespace)
    finally:
        logger.setLevel(level)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert capsys.readouterr().out


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs the checkout that holds the README")
def test_the_pages_with_examples_are_found():
    assert {"README.md", "docs/usage.md", "docs/distributed.md", "docs/choosing.md"} <= set(PAGES_WITH_EXAMPLES)


def named_tests(text):
    """Return what a text names in backticks: (a file or folder of tests, a function or None).

    ``::test_name`` and ``test_name`` alone are of the file that was named last.
    """
    file = None
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if match := re.fullmatch(r"(tests/[\w./]*\w)/?(?:::(\w+))?(?:\[.*\])?", span):
            file = match[1]
            yield file, match[2]
        elif match := re.fullmatch(r"(?:::)?(test_\w+)(?:\[.*\])?", span):
            yield file, match[1]


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", documents.texts())
def test_the_tests_of_the_readme_exist(document):
    """Every test that a text names exists; two pages are lists of tests."""
    named = list(named_tests(documents.read(document)))
    if document in ("docs/compatibility.md", "tests/README.md"):
        assert len([name for _, name in named if name]) > 50
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or (name is not None and name not in functions_of(ROOT / file))
    ]
    assert not missing


def test_a_test_that_is_gone_would_be_noticed():
    text = "| `tests/test_package.py::test_build_info`, `::test_gone` | `tests/gone.py` |\n```\n`test_other`\n```"
    assert list(named_tests(text)) == [
        ("tests/test_package.py", "test_build_info"),
        ("tests/test_package.py", "test_gone"),
        ("tests/gone.py", None),
    ]
    assert "test_build_info" in functions_of(Path(__file__)) and "test_gone" not in functions_of(Path(__file__))
