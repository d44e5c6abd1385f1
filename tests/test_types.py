"""The types that the package declares hold in a user's program: mypy --strict accepts it, and finds its mistakes."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from support import processes

ROOT = Path(__file__).resolve().parents[1]
USER = ROOT / "tests" / "typed_user.py"
# What a line must be reported for stands behind it.
MISTAKES = """
import torch

import consistency_ops as co

grad, x = torch.ones(2, 3), torch.ones(4, 3)
co.precondition(grad, x, bias_grad=torch.ones(2)).shape  # attr-defined
co.precondition(grad, x, scaling="relative")  # call-overload
corrected, info = co.precondition_ex(grad, x)  # misc
co.foreach_precondition_([grad], [x], return_damping=True).shape  # attr-defined
co.precondition_ex(grad, x).corrected[0].nothing  # attr-defined
model = torch.nn.Linear(3, 2)
pre = co.Preconditioner(model, chunk="128")  # arg-type
pre.stats()["failed"] + 1  # operator
pre.stats()["faild_chunks"]  # typeddict-item
co.optim.SGD2(model)  # call-arg
co.layers.register(model)  # arg-type
co.build_info()["gpu"]  # typeddict-item
"""


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Run mypy once over both programs; returns error codes by file name and line."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy (requirements.txt)")
    mistakes = tmp_path_factory.mktemp("types") / "mistakes.py"
    mistakes.write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(USER), str(mistakes)]
    done = processes.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    found: dict[str, dict[int, str]] = {}
    for path, line, code in re.findall(r"^(.+?):(\d+): error: .*?\[([\w-]+)\]$", done.stdout, re.MULTILINE):
        found.setdefault(Path(path).name, {})[int(line)] = code
    return found


def test_a_users_program_has_no_type_errors(reported):
    assert reported.get(USER.name, {}) == {}


def test_mistakes_of_a_user_are_found(reported):
    lines = enumerate(MISTAKES.splitlines(), 1)
    expected = {number: line.partition("# ")[2] for number, line in lines if "# " in line}
    assert len(expected) == 11
    assert reported["mistakes.py"] == expected


def test_a_users_program_runs():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run([sys.executable, str(USER)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 chunks failed" in done.stdout
