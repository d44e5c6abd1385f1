"""Other programs and threads that a test starts: each has a time limit, so that no test can wait for ever.

Nothing else in tests/ starts a program (``tests/test_package.py`` looks).  A limit is many times what the program takes
on a busy machine; it decides nothing but that a test which hangs fails, with the stacks of the Python programs that it
waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 900
LONG = 1800  # compiling all CUDA kernels; running them under a sanitizer
_GRACE = 5.0  # seconds for the stacks


def run(
    command: list | str, *, timeout: float = SECONDS, check: bool = False, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """subprocess.run, whose process and everything that it has started is killed at the limit, and the test fails.

    It has no input to wait for unless some is given.
    """
    text = options.pop("input", None)
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options.setdefault("stdin", subprocess.DEVNULL if text is None else subprocess.PIPE)
    process = subprocess.Popen(command, start_new_session=True, **_with_stacks(options))
    try:
        output, errors = process.communicate(text, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(_late(process, timeout)) from None
    except BaseException:  # an interrupt, or the limit of the whole test
        _end(process)
        raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check and done.returncode != 0:
        raise AssertionError(f"{_words(process)}: exit status {done.returncode}\n{_tail(output)}{_tail(errors)}")
    return done


@contextlib.contextmanager
def running(command: list, *, timeout: float = SECONDS, **options: Any) -> Iterator[subprocess.Popen]:
    """subprocess.Popen for a test that reads along or sends signals; what is left of it at the end is killed.

    It is killed at the limit, too, which ends every read and wait of the test.
    """
    options.setdefault("stdin", subprocess.DEVNULL)
    process = subprocess.Popen(command, start_new_session=True, **_with_stacks(options))
    late = threading.Event()

    def stop() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(timeout, stop)
    timer.daemon = True
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        _end(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        if late.is_set():
            raise AssertionError(f"{_words(process)} did not end within {timeout:g} s")


def in_threads(*works: Callable[[], Any], timeout: float = SECONDS) -> list[Any]:
    """The results of functions that run at the same time, each on its own thread; one that hangs is left behind."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"a thread did not end within {timeout:g} s"
    return [results[i] for i in range(len(works))]


def _with_stacks(options: dict[str, Any]) -> dict[str, Any]:
    """Python programs print the stacks of their threads when they are aborted."""
    environment = options.get("env")
    return {**options, "env": {"PYTHONFAULTHANDLER": "1", **(os.environ if environment is None else environment)}}


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # the process began the group, and may be gone while others of it are not


def _end(process: subprocess.Popen) -> None:
    _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _late(process: subprocess.Popen, timeout: float) -> str:
    _signal(process, signal.SIGABRT)
    output = errors = None
    for _ in range(2):
        try:
            output, errors = process.communicate(timeout=_GRACE)
            break
        except subprocess.TimeoutExpired as error:  # what has left the group may hold the pipes
            output, errors = error.stdout, error.stderr
            _signal(process, signal.SIGKILL)
    _end(process)
    return f"{_words(process)} did not end within {timeout:g} s\n{_tail(output)}{_tail(errors)}"


def _words(process: subprocess.Popen) -> str:
    args = process.args
    return args if isinstance(args, str) else " ".join(str(part)[:200] for part in args)


def _tail(output: str | bytes | None) -> str:
    if isinstance(output, bytes):
        output = output.decode(errors="replace")
    return f"{(output or '')[-5000:]}\n"
