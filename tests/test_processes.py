"""The time limits of what tests start (support/processes.py), and that nothing in tests/ is started without one."""

import ast
import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from support import processes

TESTS = Path(__file__).parent
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
def waits_for_ever():
    time.sleep(600)
waits_for_ever()
"""


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody has waited for yet has ended
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def ends(pid):
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def late(stop, came_so_far):
    """What ``stop(limit)`` returns for the first limit at which the program had time to come as far as it should.

    On a busy machine an interpreter can need seconds to start; that decides only how long this test takes.
    """
    for limit in (2, 10, 60):
        found = stop(limit)
        if came_so_far(found):
            return found
    raise AssertionError(f"within {limit} s: {found}")


def stopped(program):
    def stop(limit):
        with pytest.raises(AssertionError, match=f"did not end within {limit} s") as caught:
            processes.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=limit)
        return str(caught.value).splitlines()

    return stop


def pids(lines):
    return [int(line) for line in lines if line.isdigit()]


def test_a_program_that_hangs_is_killed_with_its_children_and_shows_where_it_waited():
    output = late(stopped(PARENT), lambda lines: any("in waits_for_ever" in line for line in lines))
    assert ends(pids(output)[0])


def test_a_child_that_keeps_the_output_open_is_no_reason_to_wait():
    program = PARENT.partition("def ")[0]  # ends at once
    assert ends(pids(late(stopped(program), pids))[0])


@pytest.mark.parametrize("limited", [True, False])
def test_a_program_that_is_read_along_ends_at_the_limit_or_with_the_test(limited):
    def stop(limit):
        found, limit = [], limit if limited else processes.SECONDS
        program, options = [sys.executable, "-c", PARENT], dict(stdout=-1, text=True, timeout=limit)
        failure = pytest.raises(AssertionError, match=f"did not end within {limit} s")
        with failure if limited else contextlib.nullcontext(), processes.running(program, **options) as process:
            found += [process.pid, *pids([process.stdout.readline().strip()])]
            if limited:
                process.stdout.read()
        return found

    assert all(map(ends, late(stop, lambda found: len(found) == 2)))


def test_results_input_and_failures_of_programs():
    done = processes.run(["cat"], input="words", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "words", "")
    assert processes.run(["cat"], capture_output=True).stdout == b""  # there is nothing to wait for
    with pytest.raises(AssertionError, match="exit status 3\n.*it went wrong"):
        processes.run(["sh", "-c", "echo it went wrong; exit 3"], check=True, capture_output=True, text=True)


def test_threads():
    assert processes.in_threads(lambda: 1, lambda: 2) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        processes.in_threads(lambda: 1 / 0, lambda: 2)
    stop = threading.Event()
    with pytest.raises(AssertionError, match="a thread did not end within 0.2 s"):
        processes.in_threads(lambda: 1, stop.wait, timeout=0.2)
    stop.set()


def without_limit(tree):
    """Lines that start a program by other means than support.processes, or wait for something without a limit."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        place, name = ast.unparse(node.func.value), node.func.attr
        if place == "subprocess" or (place, name) in {("os", "system"), ("os", "popen")}:
            yield node.lineno
        waits = name in ("wait", "join", "communicate", "get", "acquire") and not node.args and not node.keywords
        if waits and (place, name) != ("wrapped", "join"):  # which is DistributedDataParallel's context
            yield node.lineno


def test_what_counts_as_without_a_limit():
    program = "subprocess.run(a)\nsubprocess.Popen(a)\nos.system(a)\nthread.join()\nprocess.wait()\nqueue.get()\n"
    assert list(without_limit(ast.parse(program))) == [1, 2, 3, 4, 5, 6]
    assert list(without_limit(ast.parse("', '.join(a)\nprocess.wait(60)\nqueue.get(timeout=1)\nd.get(k)"))) == []


def test_nothing_in_the_tests_waits_without_a_limit():
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        if path.name != "processes.py"
        for line in without_limit(ast.parse(path.read_text()))
    }
    assert found == set()
