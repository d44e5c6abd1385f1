"""Launches of the correction for the emulator: the launcher's plan, and data in emulated device memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import plans
from benchmarks.model.emulator import Code, Cta, Memory
from benchmarks.model.sass import ROOT, compile_kernels, read_jump_tables, read_kernel
from benchmarks.model.timing import Trace, run_cta

BUILD = ROOT / "build" / "model"
SOURCE = ROOT / "csrc" / "cuda" / "precondition.cu"
FLOAT32, BFLOAT16 = 0, 2  # DType
ONE_CTA, CLUSTER, TASK_QUEUE = 1, 2, 3  # PreconditionRung
WHITENS, UNWHITENS = 3, 5  # Mode
BYTES = {FLOAT32: 4, BFLOAT16: 2}


_codes: dict[str, Code] = {}
_cubin: list[Path] = []


def use_cubin(path: Path) -> None:
    """The next launches run this compiled kernel."""
    _codes.clear()
    _cubin[:] = [path]


def kernel(threads: int = 256, whitens: bool = False) -> Code:
    """The compiled correction, or whitening, for CTAs of this many threads (256: chunks up to 128 units)."""
    name = f"ILi{threads}ELb{int(whitens)}E"
    if name not in _codes:
        cubin = (
            _cubin[0]
            if _cubin
            else compile_kernels(SOURCE, BUILD / f"precondition-{plans.digest('cuda', 'include')}.cubin")
        )
        _codes[name] = Code(read_kernel(cubin, name), read_jump_tables(cubin, name))
    return _codes[name]


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    values = values.astype(np.float32)
    if dtype == FLOAT32:
        return values
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


class Launch:
    """One layer in emulated memory, and the CTAs of its launch one by one.

    Of a cluster the instructions and times are right and the numbers are not: a CTA finds itself in the place of every
    other one.
    """

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
        mode: int = 0,
    ):
        random = np.random.default_rng(seed)
        # What a CTA of a cluster gets from others is its own here, which is no covariance: the damping must decide.
        scale = 0.01 if rung == CLUSTER else 1.0
        self.x = (scale * random.standard_normal((rows, units))).astype(np.float32)
        self.g = random.standard_normal((outputs, units, taps)).astype(np.float32)
        self.memory = Memory((rows + 3 * outputs * taps) * units * 4 + (4 << 20))
        self.mode = mode
        x, g = encode(self.x, x_dtype), encode(self.g, g_dtype)
        self.shape, self.g_address = g, self.memory.place(g)
        group = 32 // BYTES[g_dtype]
        layer = plans.module().Shape(
            units, rows, outputs, taps, x_dtype, g_dtype, group, x=self.memory.place(x), g=self.g_address
        )
        workspace = self.memory.place(np.zeros(1 << 20, np.uint8))
        how = dict(rung=rung, ctas=ctas, workspace=workspace)
        if mode:
            how |= dict(whitening=self.whitening(g), trace_scaling=True)
        self.plan = plans.module().cuda_plan([layer], **how)
        self.counters = workspace - 0x10_0000_0000

    def whitening(self, g: np.ndarray):
        """What a launch of whitening needs beside; the factors of two chunks, which nobody made, are the identity."""
        place, chunk = self.memory.place, 128
        factors = np.tile(np.eye(chunk, dtype=np.float32), (2, 1, 1))
        average, one = 0.5 * factors, np.full(1, 0.5, np.float32)
        self.average_address = place(average)
        return plans.module().WhiteningPlan(
            self.mode,
            average=self.average_address,
            weight=place(one),
            has_gradient=place(np.ones(1, np.int32)),
            before=place(np.zeros_like(g)),
            factors=place(factors),
            info=place(np.zeros(2, np.int32)),
            squares=place(np.zeros(2, np.float32)),
        )

    def run(self, ticket: int) -> Trace:
        """The CTA that does this task; what it waits for counts as done."""
        counters = self.memory.bytes[self.counters : self.counters + 2048].view(np.uint32)
        counters[:] = 1 << 20
        counters[0], counters[1] = ticket, 0
        parameter, *shape = (self.plan[name] for name in ("parameter", "ctas", "threads", "shared_bytes"))
        code = kernel(self.plan["threads"], self.mode != 0)
        cta = Cta(self.memory, parameter, ticket, *shape, code.jump_tables)
        return run_cta(code, cta)

    def gradient(self) -> np.ndarray:
        return self.memory.read(self.g_address, self.shape)
