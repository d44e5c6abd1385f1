"""Launches of the correction for the emulator: the launcher's plan, and data in emulated device memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.model.emulator import Code, Cta, Memory
from benchmarks.model.sass import ROOT, compile_kernels, read_jump_tables, read_kernel
from benchmarks.model.timing import Trace, run_cta

BUILD = ROOT / "build" / "model"
SOURCES = [ROOT / "csrc" / "cuda" / "precondition.cu", ROOT / "csrc" / "cuda" / "precondition" / "plan.cpp"]
FLOAT32, BFLOAT16 = 0, 2  # DType
ONE_CTA, TASK_QUEUE = 1, 3  # PreconditionRung
BYTES = {FLOAT32: 4, BFLOAT16: 2}


class Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("x", "rows", "units", "g", "outputs", "taps", "x_dtype", "g_dtype", "group", "same_input")
    )


class How(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("layers", "trace", "rung", "ctas_a_chunk", "workspace"))


class Plan(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in ("ctas", "threads", "shared_bytes", "cluster", "workspace", "parameter_bytes")),
        ("tasks", ctypes.c_int64 * 7 * 118),
    )


def digest() -> str:
    """Of everything that is compiled here."""
    sources = [p for folder in ("cuda", "include") for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.is_file()]
    return hashlib.sha256(
        b"".join(p.read_bytes() for p in [*sources, Path(__file__).with_name("plan.cpp")])
    ).hexdigest()[:16]


def library() -> ctypes.CDLL:
    """plan.cpp with the launcher's host code, compiled."""
    target = BUILD / f"plan-{digest()}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", partial, Path(__file__).with_name("plan.cpp"), SOURCES[1]], check=True)
        os.replace(partial, target)
    return ctypes.CDLL(str(target))


def plan(
    layers: list[Layer], trace: bool = False, rung: int = 0, ctas: int = 0, workspace: int = 0
) -> tuple[Plan, bytes]:
    """The plan of one launch, and its kernel's parameter."""
    result, parameter = Plan(), ctypes.create_string_buffer(32764)
    how = How(len(layers), trace, rung, ctas, workspace)
    array = (Layer * len(layers))(*layers)
    if library().model_plan(ctypes.byref(how), array, ctypes.byref(result), parameter) != 0:
        raise ValueError("the launcher refuses this launch")
    return result, parameter.raw[: result.parameter_bytes]


_codes: dict[int, Code] = {}
_cubin: list[Path] = []


def use_cubin(path: Path) -> None:
    """The next launches run this compiled kernel."""
    _codes.clear()
    _cubin[:] = [path]


def kernel(threads: int = 256) -> Code:
    """The compiled correction for CTAs of this many threads (256: chunks up to 128 units)."""
    if threads not in _codes:
        cubin = _cubin[0] if _cubin else compile_kernels(SOURCES[0], BUILD / f"precondition-{digest()}.cubin")
        _codes[threads] = Code(read_kernel(cubin, f"ILi{threads}E"), read_jump_tables(cubin, f"ILi{threads}E"))
    return _codes[threads]


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    values = values.astype(np.float32)
    if dtype == FLOAT32:
        return values
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


class Launch:
    """One layer of two chunks in emulated memory, and the CTAs of its launch one by one."""

    def __init__(
        self,
        units: int,
        rows: int,
        outputs: int,
        taps: int = 1,
        x_dtype: int = FLOAT32,
        g_dtype: int = FLOAT32,
        rung: int = ONE_CTA,
        ctas: int = 0,
        seed: int = 0,
    ):
        random = np.random.default_rng(seed)
        self.x = random.standard_normal((rows, units)).astype(np.float32)
        self.g = random.standard_normal((outputs, units, taps)).astype(np.float32)
        self.memory = Memory((rows + 2 * outputs * taps) * units * 4 + (4 << 20))
        x, g = encode(self.x, x_dtype), encode(self.g, g_dtype)
        self.shape, self.g_address = g, self.memory.place(g)
        group = 32 // BYTES[g_dtype]
        layer = Layer(self.memory.place(x), rows, units, self.g_address, outputs, taps, x_dtype, g_dtype, group, 0)
        workspace = self.memory.place(np.zeros(1 << 20, np.uint8))
        self.plan, self.parameter = plan([layer], rung=rung, ctas=ctas, workspace=workspace)
        self.counters = workspace - 0x10_0000_0000

    def run(self, ticket: int) -> Trace:
        """The CTA that does this task; what it waits for counts as done."""
        counters = self.memory.bytes[self.counters : self.counters + 2048].view(np.uint32)
        counters[:] = 1 << 20
        counters[0], counters[1] = ticket, 0
        plan = self.plan
        code = kernel(plan.threads)
        cta = Cta(self.memory, self.parameter, ticket, plan.ctas, plan.threads, plan.shared_bytes, code.jump_tables)
        return run_cta(code, cta)

    def gradient(self) -> np.ndarray:
        return self.memory.read(self.g_address, self.shape)
