"""Cycles of one CTA alone on an SM of an H200: in-order issue with the scoreboards and stall counts of its code.

Optimistic where in doubt: no instruction-cache misses and no branch bubbles beyond the stall count.  Latencies are
those that microbenchmarks of Hopper report; none of them was measured here.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq

from benchmarks.model.emulator import Code, Cta, Warp

CLOCK_MHZ = 1980.0
SMS = 132
DRAM_LATENCY = 480  # cycles until a load of device memory is there; L2 hits take 260
BARRIER = 25
CLUSTER_BARRIER = 200  # cycles, as a load from another CTA of the cluster takes
LATENCY = {"LDS": 30, "LDSM": 33, "STS": 10, "ATOMS": 60, "SHFL": 24, "MUFU": 22, "I2F": 22, "F2I": 22, "F2F": 22}
LATENCY |= {"LDC": 30, "S2R": 25, "S2UR": 25, "STG": 20, "REDG": 20, "CCTL": 20, "LDG": DRAM_LATENCY, "LD": 200}
LATENCY |= {"ATOMG": 700, "LDGSTS": DRAM_LATENCY, "ST": 20, "R2UR": 12}
LSU = {"LDS", "LDSM", "STS", "ATOMS", "SHFL", "STG", "REDG", "LDG", "LD", "ST", "ATOMG", "LDGSTS", "CCTL"}
OCCUPIES = {"MUFU": 8, "I2F": 8, "F2I": 8, "F2F": 8, "HMMA": 6.5, "FFMA": 1, "FADD": 1, "FMUL": 1, "LDC": 2, "S2R": 2}
WARPGROUP = 16  # cycles of a tensor core for 16 of the 64 rows of a product with 32 columns and 16 units: its peak
OCCUPIES |= {
    "HGMMA": WARPGROUP,
    "BAR": 1,
    "BRA": 1,
    "NOP": 1,
    "BSSY": 1,
    "BSYNC": 1,
    "EXIT": 1,
    "S2UR": 2,
    "WARPSYNC": 1,
}
TWO_CYCLES = 2  # integer instructions: half of the lanes a cycle


@dataclasses.dataclass
class Trace:
    """What a CTA did."""

    cycles: float = 0.0
    issued: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by file
    span: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # file: first and last cycle
    passes: int = 0  # cycles of an SM's shared memory and first-level cache
    matrix: float = 0.0  # HMMA instructions, and others by the time of a tensor core that they take
    sectors: int = 0  # of 32 bytes, loaded from and stored to device memory
    barriers: list[tuple[float, str]] = dataclasses.field(default_factory=list)  # when, and the file that waited
    steps: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.issued.values())


def run_cta(code: Code, cta: Cta) -> Trace:
    """Runs all warps of a CTA to their end."""
    trace = Trace()
    warps = [Warp(cta, i) for i in range(cta.threads // 32)]
    free = [0.0] * len(warps)  # when the stall count of the last instruction is over
    boards = [[0.0] * 6 for _ in warps]
    products = [0.0] * len(warps)  # when the last product of a warpgroup is there
    slot = [0.0] * 4  # next free issue slot of a sub-partition
    pipes: list[dict[str, float]] = [{} for _ in range(4)]
    lsu = 0.0
    waiting: dict[int, list[tuple[int, float]]] = {}  # of every barrier: the warps that arrived, -1: it went on; when
    latency = {"BAR": BARRIER, "UCGABAR_WAIT": CLUSTER_BARRIER}
    living = len(warps)
    queue: list[tuple[float, int, int]] = []

    def pipe_of(name: str) -> str:
        if name in LSU:
            return "mio"
        if name in ("MUFU", "I2F", "F2I", "F2F"):
            return "xu"
        if name in ("FFMA", "FADD", "FMUL"):
            return "fp"
        if name in ("HMMA", "HGMMA"):
            return "HMMA"
        if name == "IMAD":
            return name
        return "mio" if name in ("LDC", "S2R", "S2UR") else "none" if name in OCCUPIES else "alu"

    def ready(i: int) -> float:
        instruction = code.instructions[warps[i].where]
        at = free[i]
        for board in range(6):
            if instruction.wait >> board & 1:
                at = max(at, boards[i][board])
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            at = max(at, products[i])
        name = instruction.opcode.partition(".")[0]
        return max(at, pipes[i % 4].get(pipe_of(name), 0.0), slot[i % 4])

    for i, warp in enumerate(warps):
        warp.choose()
        heapq.heappush(queue, (ready(i), i, 0))
    turn = 0
    while queue:
        at, i, _ = heapq.heappop(queue)
        warp = warps[i]
        now = ready(i)
        turn += 1
        if now > at:
            heapq.heappush(queue, (now, i, turn))
            continue
        instruction = code.step(warp)
        name = instruction.opcode.partition(".")[0]
        trace.steps += 1
        trace.issued[instruction.file] += 1
        span = trace.span.setdefault(instruction.file, [now, now])
        span[1] = now
        slot[i % 4] = now + 1
        pipe = pipe_of(name)
        pipes[i % 4][pipe] = now + (2 if pipe == "mio" else OCCUPIES.get(name, TWO_CYCLES))
        done, read = now + LATENCY.get(name, 0), now + 10
        if name == "HMMA":
            trace.matrix += 1
            done = now + 34
        if name == "HGMMA" and warp.accessed:
            trace.matrix += WARPGROUP / OCCUPIES["HMMA"]
            lsu = max(now, lsu) + warp.accessed[1]
            trace.passes += warp.accessed[1]
            products[i] = max(products[i], max(lsu, now + WARPGROUP) + 34)
        if name in LSU:
            waves = warp.accessed[-1] if warp.accessed else 1
            start = max(now, lsu)
            lsu = start + waves
            done, read = start + waves - 1 + LATENCY[name], start + waves + 9
            trace.passes += waves
            if warp.accessed and warp.accessed[0] == "global":
                trace.sectors += warp.accessed[1]
        if instruction.write < 6:
            boards[i][instruction.write] = max(boards[i][instruction.write], done)
        if instruction.read < 6:
            boards[i][instruction.read] = max(boards[i][instruction.read], read)
        free[i] = now + max(1, instruction.stall)
        trace.cycles = max(trace.cycles, now + 1)
        waits, number, expected = False, 0, 0
        if name in latency and warp.accessed[0] == "barrier":
            _, number, expected, waits = warp.accessed
            waiting.setdefault(number, []).append((i if waits else -1, now))
        if not waits:
            if warp.choose():
                heapq.heappush(queue, (ready(i), i, turn))
            else:
                living -= 1
        for barrier in (number, 0):  # the whole CTA's may be complete because a warp has ended
            arrived = waiting.get(barrier, [])
            if not arrived or len(arrived) != ((expected if barrier else 0) or living):
                continue
            release = max(time for _, time in arrived) + latency.get(name, BARRIER)
            trace.barriers.append((release, instruction.file))
            for j in (j for j, _ in arrived if j >= 0):
                free[j] = max(free[j], release)
                if warps[j].choose():
                    heapq.heappush(queue, (ready(j), j, turn))
            del waiting[barrier]
    assert not waiting and living == 0, "warps wait at a barrier that others never reach"
    return trace
