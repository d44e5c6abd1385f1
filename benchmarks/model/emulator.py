"""Runs the machine code (SASS of sm_90) of a kernel on the CPU: one warp at a time, 32 lanes in numpy.

What it is for: the instructions that a warp really issues, with every branch and trip count of a given launch, the
bank conflicts and sectors of every access, and the results, which the tests hold against the reference: a trace whose
numbers are right is the trace of the kernel.  It knows the instructions that the correction uses; another one is an
error, never a guess.  Rounding of matrix products is that of float32, and MUFU's functions are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.model.sass import Instruction

U32, U64, I64, F32 = np.uint32, np.uint64, np.int64, np.float32
LANES = np.arange(32)
PARAMETERS = 0x210  # of a kernel, in constant bank 0
GLOBAL = 0x10_0000_0000  # where device memory begins
SHARED_WINDOW = 1 << 24  # of generic addresses; every CTA of a cluster has the shared memory of the one that runs


class Memory:
    """Device memory: one array, from ``GLOBAL`` on."""

    def __init__(self, size: int):
        self.bytes = np.zeros(size, np.uint8)
        self.used = 256

    def place(self, data: np.ndarray) -> int:
        """Copies an array there, on 256 bytes; returns its address."""
        at = self.used
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self.bytes[at : at + raw.size] = raw
        self.used = (at + raw.size + 255) // 256 * 256
        assert self.used <= self.bytes.size, "the emulated device memory is too small"
        return GLOBAL + at

    def read(self, address: int, like: np.ndarray) -> np.ndarray:
        at = address - GLOBAL
        return self.bytes[at : at + like.nbytes].view(like.dtype).reshape(like.shape).copy()


class Cta:
    """What the warps of a CTA share."""

    def __init__(
        self,
        memory: Memory,
        parameters: bytes,
        block: int,
        grid: int,
        threads: int,
        shared_bytes: int,
        jump_tables: bytes = b"",
    ):
        self.memory, self.threads = memory, threads
        self.constants = np.zeros(1 << 16, np.uint8)
        self.constants[0:4].view(U32)[0] = threads
        self.constants[0xC:0x10].view(U32)[0] = grid
        self.constants[PARAMETERS : PARAMETERS + len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.shared = np.zeros(max(shared_bytes, 232448) + 2048, np.uint8)
        self.shared.view(U32)[: self.shared.size // 4] = 0x7FC00000  # NaN where nothing was written
        self.block = block
        self.jump_tables = np.zeros(1 << 16, np.uint8)
        self.jump_tables[: len(jump_tables)] = np.frombuffer(jump_tables, np.uint8)


class Warp:
    def __init__(self, cta: Cta, index: int):
        self.cta, self.index = cta, index
        self.R = np.zeros((256, 32), U32)
        self.UR = [0] * 64
        self.P = np.zeros((8, 32), bool)
        self.P[7] = True
        self.UP = [False] * 7 + [True]
        self.pc = np.zeros(32, I64)  # index of the next instruction, for every lane
        self.blocked = np.zeros(32, bool)  # lanes that wait at a BSYNC
        self.live = np.ones(32, bool)
        self.B = np.zeros((16, 32), bool)  # lanes of every convergence barrier
        self.where = 0  # of the group that runs
        self.active: np.ndarray | None = None  # its lanes; None: all
        self.straight = False
        self.accessed: tuple = ()  # kind, lanes' addresses and bytes of the last access

    def choose(self) -> bool:
        """The lanes that run next: those that are furthest behind.  False when all have ended."""
        if self.straight:  # all lanes were together, and the instruction was no branch
            self.where += 1
            return True
        ready = self.live & ~self.blocked
        if not ready.any():
            assert not self.live.any(), "all lanes of a warp wait for one another"
            return False
        self.where = int(self.pc[ready].min())
        group = ready & (self.pc == self.where)
        self.active = None if group.all() else group
        return True


def signed(x):
    return np.asarray(x).astype(U32).view(np.int32).astype(I64)


def f(x) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(x, U32), (32,))).view(F32)


def bits(x) -> np.ndarray:
    return np.asarray(x, F32).view(U32)


class Operand:
    """One source: ``get(warp)`` gives unsigned numbers of 32 bits, for a lane or for all."""

    def __init__(self, text: str, is_float: bool = False):
        text = text.replace(".reuse", "")
        self.negative = text.startswith("-") and not re.match(r"-(0x|\d|\+?INF|QNAN)", text)
        text = text[1:] if self.negative else text
        self.inverted = text.startswith("~")
        text = text[1:] if self.inverted else text
        self.absolute = text.startswith("|")
        text = text.strip("|")
        self.half = text.partition(".")[2] if ".H" in text else ""
        text = text.partition(".")[0] if re.match(r"U?R", text) else text
        self.register = -1
        if text == "RZ":
            self.register, self.raw = 255, lambda w: w.R[255]
        elif match := re.fullmatch(r"R(\d+)", text):
            self.register = number = int(match[1])
            self.raw = lambda w: w.R[number]
        elif text == "URZ":
            self.raw = lambda w: 0
        elif match := re.fullmatch(r"UR(\d+)", text):
            self.register = number = int(match[1])
            self.raw = lambda w: w.UR[number]
        elif text.startswith("c["):
            self.raw = constant(text, 4)
        else:
            value = literal(text, is_float)
            self.raw = lambda w: value
        self.uniform = text.startswith("UR")
        self.is_float = is_float

    def get(self, w: Warp):
        value = self.raw(w)
        if not (self.negative or self.inverted or self.absolute):
            return value
        if self.is_float:
            value = np.asarray(value, U32)
            if self.absolute:
                value = value & U32(0x7FFFFFFF)
            return value ^ U32(0x80000000) if self.negative else value
        if self.inverted:
            return np.asarray(value, U64).astype(U32) ^ U32(0xFFFFFFFF)
        return (-np.asarray(value, I64)).astype(U64).astype(U32) if self.negative else value

    def wide(self, w: Warp):
        """The pair of registers that begins here, as one number of 64 bits."""
        if self.register < 0 or self.register == 255:
            return np.asarray(self.get(w), U64)
        bank = w.UR if self.uniform else w.R
        low, high = np.asarray(bank[self.register], U64), np.asarray(bank[self.register + 1], U64)
        value = low | high << U64(32)
        return (~value + U64(1)) if self.negative else value


def literal(text: str, is_float: bool) -> int:
    if text.lstrip("+-").startswith("0x"):
        return int(text, 16) & 0xFFFFFFFF
    special = {"+INF": 0x7F800000, "-INF": 0xFF800000, "+QNAN": 0x7FFFFFFF, "INF": 0x7F800000}
    if text in special:
        return special[text]
    return int(bits(float(text))) if is_float or "." in text or "e" in text else int(text) & 0xFFFFFFFF


def constant(text: str, size: int) -> Callable:
    match = re.fullmatch(r"c\[0x(\w+)\]\[([^\]]*)\]", text)
    bank, inside = int(match[1], 16), match[2]
    register, offset = split_address(inside)

    def read(w: Warp):
        if bank == 4:
            return 0  # addresses of the library's own device memory, which the launches here do not use
        table = w.cta.jump_tables if bank == 2 else w.cta.constants
        if register is None:
            at = offset & 0xFFFF
            return int.from_bytes(table[at : at + size].tobytes(), "little")
        at = ((np.asarray(register.get(w), I64) + offset) & 0xFFFF).reshape(-1)
        value = np.zeros(at.shape, U64)
        for i in range(size):
            value |= table[at + i].astype(U64) << U64(8 * i)
        return np.broadcast_to(value, (32,))

    return read


def split_address(inside: str) -> tuple[Operand | None, int]:
    """Register and number of "R3+0x22e", "-0x7e94", "RZ"."""
    match = re.fullmatch(r"(?:(U?R(?:Z|\d+)(?:\.\w+)?)\+?)?(-?0x[0-9a-f]+)?", inside)
    if match is None:
        raise NotImplementedError(inside)
    return Operand(match[1]) if match[1] else None, int(match[2], 16) if match[2] else 0


def address_of(text: str) -> Callable:
    """Addresses of the lanes: "[R10+0x1030]", "[UR9+0x20]", "[R2+UR4+0x8]", "desc[UR6][R2.64+0x4]"."""
    match = re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", text)
    parts, offset = match[1].replace("+-", "+@").split("+"), 0
    terms: list[Callable] = []
    for part in parts:
        part = part.replace("@", "-").replace(".reuse", "")
        if re.match(r"-?0x", part):
            offset += int(part, 16)
            continue
        name, _, kind = part.partition(".")
        operand = Operand(name)
        if kind == "64" or (kind == "" and name.startswith("UR") and ".U32" in text):
            terms.append(operand.wide)
        elif kind.startswith("X"):
            scale = int(kind[1:])
            terms.append(lambda w, o=operand, s=scale: np.asarray(o.get(w), U64) * U64(s))
        else:
            terms.append(lambda w, o=operand: np.asarray(o.get(w), U64))

    def addresses(w: Warp) -> np.ndarray:
        total = np.full(32, offset, I64)
        for term in terms:
            total = total + term(w).astype(I64)
        return total

    return addresses


def predicate(text: str) -> Callable:
    inverse = text.startswith("!")
    name = text.lstrip("!")
    number = 7 if name.endswith("T") else int(name.lstrip("UP"))
    if name.startswith("UP"):
        return lambda w: w.UP[number] != inverse
    return (lambda w: ~w.P[number]) if inverse else (lambda w: w.P[number])


def write(w: Warp, register: int, value, mask) -> None:
    if register == 255:
        return
    if mask is None:
        w.R[register] = value
    else:
        np.copyto(w.R[register], np.asarray(value, U32), where=mask)


def write_wide(w: Warp, register: int, value, mask) -> None:
    value = np.asarray(value, U64)
    write(w, register, (value & U64(0xFFFFFFFF)).astype(U32), mask)
    if register != 255:
        write(w, register + 1, (value >> U64(32)).astype(U32), mask)


def write_predicate(w: Warp, number: int, value, mask) -> None:
    if number != 7:
        np.copyto(w.P[number], value, where=True if mask is None else mask)


def target(text: str) -> int:
    name = text.replace(".reuse", "").partition(".")[0]
    return 255 if name in ("RZ", "URZ") else int(name.lstrip("UR"))


def low(x) -> np.ndarray:
    return (np.asarray(x).astype(I64) & 0xFFFFFFFF).astype(U32)


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", text) is not None


def parted(operands: Sequence[str]) -> tuple[list[int], str, list[str], list[str]]:
    """Predicates written, the register written, registers read, predicates read."""
    operands = list(operands)
    out, read = [], []
    while is_predicate(operands[0]):
        out.append(7 if operands[0].endswith("T") else int(operands[0].lstrip("UP")))
        operands.pop(0)
    destination = operands.pop(0)
    while operands and is_predicate(operands[0]):  # carries written
        out.append(7 if operands[0].endswith("T") else int(operands[0].lstrip("UP")))
        operands.pop(0)
    while operands and is_predicate(operands[-1]):
        read.insert(0, operands.pop())
    return out, destination, operands, read


COMPARE: dict[str, Callable] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def round_to(value: np.ndarray, upward: bool | None) -> np.ndarray:
    """float64 to float32, to nearest, or up or down."""
    near = value.astype(F32)
    if upward is None:
        return near
    wrong = near < value if upward else near > value
    return np.where(wrong, np.nextafter(near, F32(np.inf if upward else -np.inf)), near)


def bank_waves(addresses: np.ndarray, size: int) -> int:
    """Passes that shared memory needs: lanes go in groups of 128 bytes, words of one bank one after the other."""
    lanes, waves = 32 if size <= 4 else 128 // size, 0
    words = (addresses >> 2).tolist()
    for first in range(0, len(words), lanes):
        used = set(words[first : first + lanes])
        if size > 4:
            used = {word + n for word in used for n in range(size // 4)}
        banks = [word & 31 for word in used]
        waves += max(map(banks.count, set(banks))) if len(set(banks)) < len(banks) else 1
    return waves


BRANCHES = {"BRA", "BRX", "CALL", "RET", "EXIT", "BSYNC", "BREAK", "BSSY"}


class Code:
    """The instructions of a kernel, made executable, and its jump tables."""

    def __init__(self, instructions: list[Instruction], jump_tables: bytes = b""):
        self.instructions, self.jump_tables = instructions, jump_tables
        self.index = {instruction.address: i for i, instruction in enumerate(instructions)}
        self.steps: list[Callable | None] = [None] * len(instructions)
        self.branches = [i.opcode.partition(".")[0] in BRANCHES for i in instructions]
        self.guards = [predicate(i.predicate) if i.predicate else None for i in instructions]

    def step(self, w: Warp) -> Instruction:
        """Issues the next instruction of the warp; ``w.choose()`` has been called."""
        where = w.where
        instruction = self.instructions[where]
        run = self.steps[where]
        if run is None:
            run = self.steps[where] = self.compile(instruction)
        mask = w.active
        guard = self.guards[where]
        w.accessed = ()
        if guard is not None:
            taken = guard(w)
            if isinstance(taken, bool | np.bool_):
                taken = np.full(32, taken)
            taken = taken if mask is None else taken & mask
            mask = None if taken.all() else taken
            nobody = mask is not None and not mask.any()
        else:
            nobody = False
        group = w.active
        w.straight = group is None and not self.branches[where]
        if group is None:
            w.pc += 1
        else:
            w.pc[group] += 1
        if nobody:
            w.accessed = ("nothing", 0)
        else:
            run(w, mask)
        return instruction

    def compile(self, instruction: Instruction) -> Callable:
        name, *modifiers = instruction.opcode.split(".")
        maker = getattr(self, f"make_{name.lower()}", None)
        if maker is None:
            raise NotImplementedError(f"{instruction.opcode} {', '.join(instruction.operands)}")
        return maker(instruction, modifiers, list(instruction.operands))

    # Control

    def jump(self, w: Warp, mask, where) -> None:
        w.pc[slice(None) if mask is None else mask] = where

    def make_nop(self, i, m, o):
        return lambda w, mask: None

    make_warpsync = make_cctl = make_errbar = make_cgaerrbar = make_membar = make_nanosleep = make_nop
    make_ldgdepbar = make_depbar = make_yield = make_fence = make_nop

    def make_bra(self, i, m, o):
        if "DIV" in m:  # only taken by a warp that has not come together again
            return lambda w, mask: self._converged(w)
        where = self.index[int(o[-1], 16)]
        if len(o) == 2 and is_predicate(o[0]):
            guard = predicate(o[0])
            return lambda w, mask: self.jump(
                w, np.broadcast_to(guard(w), (32,)) & (True if mask is None else mask), where
            )
        return lambda w, mask: self.jump(w, mask, where)

    def _converged(self, w):
        assert w.active is None, "a warp is divergent where it must not be"

    def make_brx(self, i, m, o):
        base = i.address + 16 + int(o[0].split()[-1], 16)
        register = Operand(o[0].split()[0])

        def run(w, mask):
            for lane in np.flatnonzero(np.ones(32, bool) if mask is None else mask):
                at = base + int(np.int32(np.broadcast_to(register.get(w), (32,))[lane]))
                w.pc[lane] = self.index[at]

        return run

    def make_call(self, i, m, o):
        where = self.index[int(o[-1], 16)]
        return lambda w, mask: self.jump(w, mask, where)

    def make_ret(self, i, m, o):
        register = Operand(o[0].split()[0])

        def run(w, mask):
            for lane in np.flatnonzero(np.ones(32, bool) if mask is None else mask):
                w.pc[lane] = self.index[int(register.get(w)[lane])]

        return run

    def make_exit(self, i, m, o):
        def run(w, mask):
            w.live &= np.zeros(32, bool) if mask is None else ~mask
            w.B &= w.live
            self._release(w)

        return run

    def make_bssy(self, i, m, o):
        number = int(o[0].lstrip("B"))

        def run(w, mask):
            w.B[number] = np.ones(32, bool) if mask is None else mask
            w.B[number] &= w.live

        return run

    def make_bsync(self, i, m, o):
        number, at = int(o[0].lstrip("B")), self.index[i.address]

        def run(w, mask):
            group = w.active if w.active is not None else np.ones(32, bool)
            if not (w.B[number] & ~group).any():
                return
            w.pc[group] = at
            w.blocked |= group
            self._release(w)

        return run

    def make_break(self, i, m, o):
        number = int(o[-1].lstrip("B"))

        def run(w, mask):
            w.B[number] &= np.zeros(32, bool) if mask is None else ~mask
            self._release(w)

        return run

    def _release(self, w):
        for at in np.unique(w.pc[w.blocked]):
            number = int(self.instructions[at].operands[0].lstrip("B"))
            arrived = w.blocked & (w.pc == at)
            if not (w.B[number] & w.live & ~arrived).any():
                w.blocked &= ~arrived
                w.pc[arrived] += 1

    def make_bar(self, i, m, o):
        """``accessed``: which barrier, how many warps meet there (0: all), and whether this one waits for them."""
        number, threads = (Operand(o[j]) if len(o) > j else None for j in range(2))

        def run(w, mask):
            assert mask is None or (mask == w.live).all(), "a barrier that not all threads of a warp reach"
            which, count = (int(np.asarray(x.get(w)).flat[0]) if x else 0 for x in (number, threads))
            w.accessed = ("barrier", which, count // 32, "ARV" not in m)

        return run

    def make_ucgabar_wait(self, i, m, o):
        """The barrier of a cluster, whose other CTAs do the same at the same time."""
        return self.make_bar(i, m, o)

    def make_vote(self, i, m, o):
        assert m == ["ANY"] and o[1] == "PT", o  # the ballot of the active lanes, and no predicate
        d, a = target(o[0]), predicate(o[2])

        def run(w, mask):
            votes = np.broadcast_to(a(w), (32,)) & (True if mask is None else mask)
            write(w, d, U32(sum(1 << lane for lane in np.flatnonzero(votes).tolist())), mask)

        return run

    def make_voteu(self, i, m, o):
        if len(o) == 2:
            return self._vote_uniform(m, o)
        assert m == ["ANY"] and o[1:] == ["UPT", "PT"], o  # the active lanes
        d = target(o[0])

        def run(w, mask):
            w.UR[d] = sum(1 << lane for lane in range(32) if mask is None or mask[lane])

        return run

    def make_redux(self, i, m, o):
        assert m == ["OR"], m
        d, a = target(o[0]), Operand(o[1])

        def run(w, mask):
            values = np.broadcast_to(a.get(w), (32,))
            w.UR[d] = int(np.bitwise_or.reduce(values if mask is None else values[mask]))

        return run

    def make_uflo(self, i, m, o):
        assert m == ["U32"], m  # the highest bit that is set
        d, a = target(o[0]), Operand(o[1])

        def run(w, mask):
            w.UR[d] = (int(a.get(w)) & 0xFFFFFFFF).bit_length() - 1 & 0xFFFFFFFF

        return run

    def _vote_uniform(self, m, o):
        assert m in (["ALL"], ["ANY"]) and len(o) == 2, (m, o)  # one predicate of the active lanes
        d, a, join = int(o[0].lstrip("UP")), predicate(o[1]), np.all if m == ["ALL"] else np.any

        def run(w, mask):
            votes = np.broadcast_to(a(w), (32,))
            w.UP[d] = bool(join(votes if mask is None else votes[mask]))

        return run

    # Moves

    def make_mov(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])
        return lambda w, mask: write(w, d, a.get(w), mask)

    def make_umov(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])

        def run(w, mask):
            w.UR[d] = int(a.get(w))

        return run

    def make_r2ur(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])

        def run(w, mask):
            w.UR[d] = int(a.get(w)[0 if mask is None else int(np.argmax(mask))])

        return run

    def make_cs2r(self, i, m, o):
        d = target(o[0])
        assert o[1] == "SRZ"
        return lambda w, mask: write_wide(w, d, np.zeros(32, U64), mask) if "32" not in m else write(w, d, 0, mask)

    def make_s2r(self, i, m, o):
        d, name = target(o[0]), o[1]

        def value(w):
            if name == "SR_TID.X":
                return (w.index * 32 + LANES).astype(U32)
            return {"SR_CTAID.X": w.cta.block, "SR_CgaCtaId": 0, "SR_SWINHI": SHARED_WINDOW >> 32, "SR_LANEID": LANES}[
                name
            ]

        return lambda w, mask: write(w, d, value(w), mask)

    def make_s2ur(self, i, m, o):
        d, name = target(o[0]), o[1]

        def run(w, mask):
            w.UR[d] = {"SR_CTAID.X": w.cta.block, "SR_CgaCtaId": 0, "SR_SWINHI": SHARED_WINDOW >> 32}[name]

        return run

    def _load_constant(self, m, text):
        size = {"64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(m[0] if m else "", 4)
        read = constant(text, size)

        def value(w):
            x = np.asarray(read(w), U64)
            if m and m[0] in ("S8", "S16"):
                x = (x.astype(I64) << (64 - 8 * size)) >> (64 - 8 * size)
            return x

        return value, size

    def make_ldc(self, i, m, o):
        d = target(o[0])
        value, size = self._load_constant(m, o[1])
        put = write_wide if size == 8 else write
        return lambda w, mask: put(w, d, value(w) if size == 8 else low(value(w)), mask)

    def make_uldc(self, i, m, o):
        d = target(o[0])
        value, size = self._load_constant(m, o[1])

        def run(w, mask):
            x = int(value(w)) & (2 ** (8 * max(size, 4)) - 1)
            w.UR[d] = x & 0xFFFFFFFF
            if size == 8:
                w.UR[d + 1] = x >> 32

        return run

    def make_sel(self, i, m, o):
        d, a, b, p = target(o[0]), Operand(o[1]), Operand(o[2]), predicate(o[3])
        return lambda w, mask: write(w, d, np.where(p(w), a.get(w), b.get(w)).astype(U32), mask)

    def make_fsel(self, i, m, o):
        d, a, b, p = target(o[0]), Operand(o[1], True), Operand(o[2], True), predicate(o[3])
        return lambda w, mask: write(w, d, np.where(p(w), a.get(w), b.get(w)).astype(U32), mask)

    def make_prmt(self, i, m, o):
        d, a, s, c = target(o[0]), Operand(o[1]), Operand(o[2]), Operand(o[3])

        def value(w):
            both = np.asarray(a.get(w), U64) | np.asarray(c.get(w), U64) << U64(32)
            select, out = np.asarray(s.get(w), U64), U64(0)
            for byte in range(4):
                nibble = select >> U64(4 * byte)
                x = both >> ((nibble & U64(7)) * U64(8)) & U64(0xFF)
                x = np.where(nibble & U64(8), np.where(x & U64(0x80), U64(0xFF), U64(0)), x)
                out = out | x << U64(8 * byte)
            return out

        return lambda w, mask: write(w, d, low(value(w)), mask)

    def make_uprmt(self, i, m, o):
        d, a, s, c = target(o[0]), Operand(o[1]), Operand(o[2]), Operand(o[3])

        def run(w, mask):
            both, select, out = int(a.get(w)) | int(c.get(w)) << 32, int(s.get(w)), 0
            for byte in range(4):
                nibble = select >> 4 * byte & 15
                out |= (both >> (nibble & 7) * 8 & 0xFF) << 8 * byte
            w.UR[d] = out

        return run

    def make_p2r(self, i, m, o):
        d, keep = target(o[0]), int(o[3], 16)

        def run(w, mask):
            value = sum(w.P[n].astype(U32) << U32(n) for n in range(7)) & U32(keep)
            write(w, d, value | (np.asarray(Operand(o[2]).get(w), U32) & U32(~keep & 0xFFFFFFFF)), mask)

        return run

    def make_r2p(self, i, m, o):
        a, keep = Operand(o[1]), int(o[2], 16)

        def run(w, mask):
            for n in range(7):
                if keep >> n & 1:
                    write_predicate(w, n, (np.asarray(a.get(w), U32) >> U32(n) & U32(1)) != 0, mask)

        return run

    # Integers

    def make_iadd3(self, i, m, o):
        carries, d, terms, carried = parted(o)
        d = target(d)
        sources, guards, extended = [Operand(t) for t in terms], [predicate(p) for p in carried], "X" in m
        if not carries and not extended:
            x, y, z = sources

            def add(w, mask):
                with np.errstate(over="ignore"):
                    write(w, d, np.asarray(x.get(w), U32) + np.asarray(y.get(w), U32) + np.asarray(z.get(w), U32), mask)

            return add

        def run(w, mask):
            total = np.zeros(32, U64)
            for s in sources:
                value = np.asarray(s.raw(w), U64) & U64(0xFFFFFFFF)
                if s.negative or s.inverted:
                    value = value ^ U64(0xFFFFFFFF)
                    if s.negative and not extended:
                        value = value + U64(1)
                total = total + value
            if extended:
                for guard in guards:
                    total = total + np.asarray(guard(w), U64)
            write(w, d, (total & U64(0xFFFFFFFF)).astype(U32), mask)
            for n, number in enumerate(carries):
                write_predicate(w, number, total >> U64(32) > U64(n), mask)

        return run

    def make_uiadd3(self, i, m, o):
        d, sources = target(o[0]), [Operand(t) for t in o[1:4]]
        assert "X" not in m and len(o) == 4, o

        def run(w, mask):
            w.UR[d] = sum(int(s.get(w)) for s in sources) & 0xFFFFFFFF

        return run

    def make_imad(self, i, m, o):
        carries, d, terms, carried = parted(o)
        d, (a, b, c) = target(d), [Operand(t) for t in terms]
        unsigned = "U32" in m

        if "WIDE" in m:

            def run(w, mask):
                x, y = a.get(w), b.get(w)
                product = np.asarray(x, U64) * np.asarray(y, U64) if unsigned else (signed(x) * signed(y)).astype(U64)
                addend = c.wide(w)
                total = product + addend
                for number in carries:
                    write_predicate(w, number, np.broadcast_to(total < product, (32,)), mask)
                if "X" in m:
                    total = total + np.asarray(predicate(carried[0])(w), U64)
                write_wide(w, d, np.broadcast_to(total, (32,)), mask)

            return run
        if "HI" in m:

            def high(w, mask):
                product = np.asarray(a.get(w), U64) * np.asarray(b.get(w), U64)
                if not unsigned:
                    product = (signed(a.get(w)) * signed(b.get(w))).astype(U64)
                total = product + c.wide(w)
                write(w, d, np.broadcast_to(total >> U64(32), (32,)).astype(U32), mask)

            return high
        carry = predicate(carried[0]) if "X" in m and carried else None

        def multiply(w, mask):
            if carry is None:
                with np.errstate(over="ignore"):
                    write(w, d, np.asarray(a.get(w), U32) * np.asarray(b.get(w), U32) + np.asarray(c.get(w), U32), mask)
                return
            total = np.asarray(a.get(w), U64) * np.asarray(b.get(w), U64) + np.asarray(c.get(w), U64)
            if carry is not None:
                total = total + np.asarray(carry(w), U64)
            write(w, d, (total & U64(0xFFFFFFFF)).astype(U32), mask)

        return multiply

    def make_uimad(self, i, m, o):
        d, (a, b, c) = target(o[0]), [Operand(t) for t in o[1:4]]

        def run(w, mask):
            if "WIDE" in m:
                total = int(a.get(w)) * int(b.get(w)) + int(c.wide(w))
                w.UR[d], w.UR[d + 1] = total & 0xFFFFFFFF, total >> 32 & 0xFFFFFFFF
            else:
                w.UR[d] = (int(a.get(w)) * int(b.get(w)) + int(c.get(w))) & 0xFFFFFFFF

        return run

    def make_viadd(self, i, m, o):
        d, a, b = target(o[0]), Operand(o[1]), Operand(o[2])
        return lambda w, mask: write(w, d, low(np.asarray(a.get(w), I64) + np.asarray(b.get(w), I64)), mask)

    def make_vimnmx(self, i, m, o):
        d, a, b, p = target(o[0]), Operand(o[1]), Operand(o[2]), predicate(o[3])
        view = (lambda x: np.asarray(x, I64)) if "U32" in m else signed

        def run(w, mask):
            x, y = view(a.get(w)), view(b.get(w))
            write(w, d, low(np.where(p(w), np.minimum(x, y), np.maximum(x, y))), mask)

        return run

    def make_viaddmnmx(self, i, m, o):
        d, a, b, c, p = target(o[0]), Operand(o[1]), Operand(o[2]), Operand(o[3]), predicate(o[4])
        view = (lambda x: np.asarray(x, I64)) if "U32" in m else signed

        def run(w, mask):
            x = view(low(np.asarray(a.get(w), I64) + np.asarray(b.get(w), I64)))
            y = view(c.get(w))
            write(w, d, low(np.where(p(w), np.minimum(x, y), np.maximum(x, y))), mask)

        return run

    def make_iabs(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])
        return lambda w, mask: write(w, d, low(np.abs(signed(a.get(w)))), mask)

    def make_lea(self, i, m, o):
        carries, d, terms, carried = parted(o)
        d = target(d)
        shift = U64(int(terms[-1], 16))
        a, b = Operand(terms[0]), Operand(terms[1])
        c = Operand(terms[2]) if len(terms) == 4 else None
        high, carry = "HI" in m, predicate(carried[0]) if "X" in m and carried else None

        def run(w, mask):
            value = np.asarray(a.get(w), U64)
            if high:
                upper = np.asarray(c.get(w), U64) if c is not None else U64(0)
                if "SX32" in m:
                    upper = np.where(value >> U64(31), U64(0xFFFFFFFF), U64(0))
                value = ((value | upper << U64(32)) << shift) >> U64(32)
            else:
                value = (value << shift) & U64(0xFFFFFFFF)
            addend = np.asarray(b.get(w), U64)
            total = value + addend
            if carry is not None:
                total = total + np.asarray(carry(w), U64)
            write(w, d, (total & U64(0xFFFFFFFF)).astype(U32), mask)
            for number in carries:
                write_predicate(w, number, np.broadcast_to(total >> U64(32) > 0, (32,)), mask)

        return run

    def make_ulea(self, i, m, o):
        d, a, b, shift = target(o[0]), Operand(o[1]), Operand(o[2]), int(o[-1], 16)
        assert m in ([], ["HI"]) and (m == [] or o[3] == "URZ"), (m, o)

        def run(w, mask):
            shifted = int(a.get(w)) >> (32 - shift) if m else int(a.get(w)) << shift
            w.UR[d] = (shifted + int(b.get(w))) & 0xFFFFFFFF

        return run

    def make_shf(self, i, m, o):
        d, a, s, c = target(o[0]), Operand(o[1]), Operand(o[2]), Operand(o[3])
        right, high = m[0] == "R", "HI" in m
        is_signed = any(x in m for x in ("S32", "S64"))

        def value(w):
            lower, upper = np.asarray(a.get(w), U64), np.asarray(c.get(w), U64)
            shift = np.asarray(s.get(w), U64)
            shift = shift & U64(31 if "64" not in "".join(m) else 63) if "W" in m else np.minimum(shift, U64(63))
            both = lower | upper << U64(32)
            if right:
                both = (both.view(I64) >> shift.astype(I64)).view(U64) if is_signed else both >> shift
            else:
                both = both << shift
            return both >> U64(32) if high else both & U64(0xFFFFFFFF)

        return lambda w, mask: write(w, d, np.broadcast_to(value(w) & U64(0xFFFFFFFF), (32,)).astype(U32), mask)

    def make_ushf(self, i, m, o):
        d, (a, s, c) = target(o[0]), [Operand(t) for t in o[1:4]]

        def run(w, mask):
            both, shift = int(a.get(w)) | int(c.get(w)) << 32, int(s.get(w))
            if m[0] == "R":
                if "S32" in m or "S64" in m:
                    both = both - (1 << 64) if both >> 63 else both
                both >>= shift
            else:
                both <<= shift
            w.UR[d] = (both >> 32 if "HI" in m else both) & 0xFFFFFFFF

        return run

    def make_lop3(self, i, m, o):
        out, d, terms, _ = parted(o)
        d, table = target(d), int(terms[3], 16)
        a, b, c = [Operand(t) for t in terms[:3]]

        simple = {0xC0: np.bitwise_and, 0xFC: np.bitwise_or, 0x3C: np.bitwise_xor}.get(table)

        def run(w, mask):
            if simple is not None:
                value = np.broadcast_to(simple(np.asarray(a.get(w), U32), np.asarray(b.get(w), U32)), (32,))
                write(w, d, value, mask)
                for number in out:
                    write_predicate(w, number, value != 0, mask)
                return
            x, y, z = (np.asarray(s.get(w), I64).astype(U32) for s in (a, b, c))
            value = np.zeros(32, U32)
            for n in range(8):
                if table >> n & 1:
                    value = value | ((x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z))
            write(w, d, value, mask)
            for number in out:
                write_predicate(w, number, value != 0, mask)

        return run

    def make_ulop3(self, i, m, o):
        d, table = target(o[0]), int(o[4], 16)
        a, b, c = [Operand(t) for t in o[1:4]]

        def run(w, mask):
            x, y, z = (int(s.get(w)) for s in (a, b, c))
            value = 0
            for n in range(8):
                if table >> n & 1:
                    value |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
            w.UR[d] = value & 0xFFFFFFFF

        return run

    def make_plop3(self, i, m, o):
        d, e = (7 if p.endswith("T") else int(p.lstrip("UP")) for p in o[:2])
        sources, tables = [predicate(p) for p in o[2:5]], (int(o[5], 16), int(o[6], 16))

        def run(w, mask):
            x, y, z = (np.broadcast_to(s(w), (32,)) for s in sources)
            n = x * 4 + y * 2 + z * 1
            for number, table in zip((d, e), tables, strict=True):
                write_predicate(w, number, (table >> n & 1) != 0, mask)

        return run

    def make_isetp(self, i, m, o):
        d, e = (7 if p.endswith("T") else int(p.lstrip("UP")) for p in o[:2])
        a, b, combine = Operand(o[2]), Operand(o[3]), predicate(o[4])
        lower = predicate(o[5]) if "EX" in m else None
        view = (lambda x: np.asarray(x, I64)) if "U32" in m else signed
        compare = COMPARE[m[0]]

        def run(w, mask):
            x, y = view(a.get(w)), view(b.get(w))
            result = compare(x, y)
            if lower is not None:
                result = np.where(x == y, lower(w), result)
            result = np.broadcast_to(result, (32,))
            other = combine(w)
            joined = (result & other, ~result & other) if "AND" in m else (result | other, ~result | other)
            for number, value in zip((d, e), joined, strict=True):
                write_predicate(w, number, value, mask)

        return run

    def make_uisetp(self, i, m, o):
        d, e = (7 if p.endswith("T") else int(p.lstrip("UP")) for p in o[:2])
        a, b, combine, compare = Operand(o[2]), Operand(o[3]), predicate(o[4]), COMPARE[m[0]]
        assert "EX" not in m and ("AND" in m or "OR" in m), m
        join = (lambda x, y: x and y) if "AND" in m else (lambda x, y: x or y)
        view = int if "U32" in m else lambda x: int(signed(x))

        def run(w, mask):
            result, other = compare(view(a.get(w)), view(b.get(w))), bool(combine(w))
            for number, value in ((d, join(result, other)), (e, join(not result, other))):
                if number != 7:
                    w.UP[number] = value

        return run

    # Floats

    def make_fadd(self, i, m, o):
        d, a, b = target(o[0]), Operand(o[1], True), Operand(o[2], True)
        return lambda w, mask: write(w, d, bits(f(a.get(w)) + f(b.get(w))), mask)

    def make_fmul(self, i, m, o):
        d, a, b = target(o[0]), Operand(o[1], True), Operand(o[2], True)
        return lambda w, mask: write(w, d, bits(f(a.get(w)) * f(b.get(w))), mask)

    def make_ffma(self, i, m, o):
        d, a, b, c = target(o[0]), Operand(o[1], True), Operand(o[2], True), Operand(o[3], True)
        upward = True if "RP" in m else False if "RM" in m or "RZ" in m else None

        def run(w, mask):
            product = f(a.get(w)).astype(np.float64) * f(b.get(w)).astype(np.float64)
            write(w, d, bits(round_to(product + f(c.get(w)).astype(np.float64), upward)), mask)

        return run

    def make_fsetp(self, i, m, o):
        d, e = (7 if p.endswith("T") else int(p.lstrip("UP")) for p in o[:2])
        a, b, combine = Operand(o[2], True), Operand(o[3], True), predicate(o[4])
        name = m[0]

        def run(w, mask):
            x, y = f(a.get(w)), f(b.get(w))
            unordered = np.isnan(x) | np.isnan(y)
            if name.endswith("U") and name[:-1] in COMPARE:
                result = COMPARE[name[:-1]](x, y) | unordered
            else:
                result = COMPARE[name](x, y) & ~unordered
            other = combine(w)
            joined = (result & other, ~result & other) if "AND" in m else (result | other, ~result | other)
            for number, value in zip((d, e), joined, strict=True):
                write_predicate(w, number, value, mask)

        return run

    def make_fmnmx(self, i, m, o):
        d, a, b, p = target(o[0]), Operand(o[1], True), Operand(o[2], True), predicate(o[3])

        def run(w, mask):
            x, y = f(a.get(w)), f(b.get(w))
            write(w, d, bits(np.where(p(w), np.fmin(x, y), np.fmax(x, y))), mask)

        return run

    def make_fchk(self, i, m, o):
        number = int(o[0].lstrip("P"))
        return lambda w, mask: write_predicate(w, number, np.zeros(32, bool), mask)

    def make_mufu(self, i, m, o):
        d, a = target(o[0]), Operand(o[1], True)
        function = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "SQRT": np.sqrt}[m[0]]
        return lambda w, mask: write(w, d, bits(function(f(a.get(w)).astype(np.float64)).astype(F32)), mask)

    def make_i2f(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])
        upward = True if "RP" in m else None

        def run(w, mask):
            if "U64" in m or "S64" in m:
                value = a.wide(w)
                value = value.view(I64) if "S64" in m else value
                exact = value.astype(np.longdouble)
                near = exact.astype(F32)
                if upward:
                    near = np.where(near < exact, np.nextafter(near, F32(np.inf)), near)
                write(w, d, bits(near), mask)
                return
            value = np.asarray(a.get(w), I64) if "U32" in m else signed(a.get(w))
            write(w, d, bits(round_to(value.astype(np.float64), upward)), mask)

        return run

    def make_i2fp(self, i, m, o):
        d, a = target(o[0]), Operand(o[1])
        view = (lambda x: np.asarray(x, I64)) if "U32" in m else signed
        return lambda w, mask: write(w, d, bits(view(a.get(w)).astype(F32)), mask)

    def make_f2i(self, i, m, o):
        d, a = target(o[0]), Operand(o[1], True)

        def run(w, mask):
            value = np.trunc(f(a.get(w)).astype(np.longdouble))
            if "U64" in m:
                write_wide(w, d, np.clip(value, 0, np.longdouble(2**64 - 1)).astype(U64), mask)
            elif "U32" in m:
                write(w, d, np.clip(value, 0, 2**32 - 1).astype(I64).astype(U32), mask)
            else:
                write(w, d, low(np.clip(value, -(2**31), 2**31 - 1).astype(I64)), mask)

        return run

    def make_f2f(self, i, m, o):
        d, a = target(o[0]), Operand(o[1], True)
        if m == ["F32", "F64"]:
            return lambda w, mask: write(
                w, d, bits(np.ascontiguousarray(np.broadcast_to(a.wide(w), (32,))).view(np.float64).astype(F32)), mask
            )
        assert m[:2] == ["BF16", "F32"], m
        return lambda w, mask: write(w, d, to_bfloat16(f(a.get(w))), mask)

    def make_f2fp(self, i, m, o):
        d, a, b = target(o[0]), Operand(o[1], True), Operand(o[2], True)
        convert = to_bfloat16 if m[0] == "BF16" else to_float16
        return lambda w, mask: write(w, d, convert(f(b.get(w))) | convert(f(a.get(w))) << U32(16), mask)

    def make_hadd2(self, i, m, o):
        assert m == ["F32"] and o[1] in ("-RZ", "RZ"), o
        d, a = target(o[0]), Operand(o[2])
        shift = U32(16 if a.half.startswith("H1") else 0)

        def run(w, mask):
            half = ((np.asarray(a.get(w), U32) >> shift) & U32(0xFFFF)).astype(np.uint16).view(np.float16)
            write(w, d, bits(half.astype(F32)), mask)

        return run

    # Lanes and matrices

    def make_shfl(self, i, m, o):
        number = 7 if o[0].endswith("T") else int(o[0].lstrip("P"))
        d, a, b = target(o[1]), Operand(o[2]), Operand(o[3])

        def run(w, mask):
            amount = np.broadcast_to(np.asarray(b.get(w), I64), (32,)) & 31
            source = {"IDX": amount, "BFLY": LANES ^ amount, "UP": LANES - amount, "DOWN": LANES + amount}[m[0]]
            inside = (source >= 0) & (source < 32)
            value = np.broadcast_to(np.asarray(a.get(w), U32), (32,))
            write(w, d, value[np.where(inside, source, LANES)], mask)
            write_predicate(w, number, inside, mask)

        return run

    def make_hmma(self, i, m, o):
        d, (a, b, c) = target(o[0]), [Operand(t) for t in o[1:4]]
        shape, bfloat = m[0], "BF16" in m
        g, t = LANES // 4, LANES % 4

        def pair(x):
            x = np.asarray(x, U32)
            if bfloat:
                return (x << U32(16)).view(F32), (x & U32(0xFFFF0000)).view(F32)
            halves = np.ascontiguousarray(x).view(np.uint16).view(np.float16).astype(F32)
            return halves[0::2], halves[1::2]

        def registers(w, operand, count):
            return [w.R[255] if operand.register == 255 else w.R[operand.register + n] for n in range(count)]

        assert not (a.negative or b.negative or c.negative), "a matrix instruction that turns a sign"

        def run(w, mask):
            assert mask is None, "a matrix instruction of a part of a warp"
            if shape == "1688":
                left, right = np.empty((16, 8), F32), np.empty((8, 8), F32)
                for n, x in enumerate(registers(w, a, 4)):
                    left[g + n % 2 * 8, t + n // 2 * 4] = (x & U32(0xFFFFE000)).view(F32)
                for n, x in enumerate(registers(w, b, 2)):
                    right[t + n * 4, g] = (x & U32(0xFFFFE000)).view(F32)
            else:
                left, right = np.empty((16, 16), F32), np.empty((16, 8), F32)
                for n, x in enumerate(registers(w, a, 4)):
                    low_half, high_half = pair(x)
                    left[g + n % 2 * 8, 2 * t + n // 2 * 8] = low_half
                    left[g + n % 2 * 8, 2 * t + 1 + n // 2 * 8] = high_half
                for n, x in enumerate(registers(w, b, 2)):
                    low_half, high_half = pair(x)
                    right[2 * t + n * 8, g] = low_half
                    right[2 * t + 1 + n * 8, g] = high_half
            product = left.astype(np.float64) @ right.astype(np.float64)
            old = registers(w, c, 4)
            for n in range(4):
                value = product[g + n // 2 * 8, 2 * t + n % 2] + f(old[n]).astype(np.float64)
                write(w, d + n, bits(value.astype(F32)), None)

        return run

    def make_hgmma(self, i, m, o):
        """A warp's 16 of the 64 rows; the right operand lies in shared memory, with the swizzle of 64 bytes."""
        if o[1].startswith("gdesc"):  # of no registers: closes a group
            return lambda w, mask: None
        assert m[0] == "64x32x16" and m[1:3] == ["F32", "BF16"], m
        d, a = target(o[0]), target(o[1])
        descriptor = re.fullmatch(r"gdesc\[UR(\d+)\](\.tnspB)?", o[2])
        number, transposed = int(descriptor[1]), descriptor[2] is not None
        adds = o[3] != "RZ"
        assert adds or "!UPT" in o, o
        assert not adds or (target(o[3]) == d and "UPT" not in "".join(o[4:])), o
        g, t = LANES // 4, LANES % 4
        k, n = np.meshgrid(np.arange(16), np.arange(32), indexing="ij")

        def run(w, mask):
            assert mask is None, "a matrix instruction of a part of a warp"
            where = w.UR[number + 2] | w.UR[number + 3] << 32  # behind the left operand's, which is in registers
            assert where >> 62 == 2 and where >> 49 & 7 == 0, "the swizzle of 64 bytes, from 512 bytes on"
            eight_rows = (where >> 32 & 0x3FFF) << 4
            row, column = (k, n) if transposed else (n, k)
            at = ((where & 0x3FFF) << 4) + row % 8 * 64 + row // 8 * eight_rows + column * 2
            at ^= at >> 3 & 0x30
            right = (w.cta.shared.view(np.uint16)[at >> 1].astype(U32) << U32(16)).view(F32)
            left = np.empty((16, 16), F32)
            for i in range(4):
                x = w.R[a + i]
                left[g + i % 2 * 8, 2 * t + i // 2 * 8] = (x << U32(16)).view(F32)
                left[g + i % 2 * 8, 2 * t + 1 + i // 2 * 8] = (x & U32(0xFFFF0000)).view(F32)
            product = left.astype(np.float64) @ right.astype(np.float64)
            for i in range(16):
                value = product[g + i // 2 % 2 * 8, i // 4 * 8 + 2 * t + i % 2]
                if adds:
                    value = value + f(w.R[d + i]).astype(np.float64)
                write(w, d + i, bits(value.astype(F32)), None)
            w.accessed = ("operand", 2)  # 1 KiB for the four warps

        return run

    def make_warpgroup(self, i, m, o):
        return lambda w, mask: None

    def make_ldsm(self, i, m, o):
        d, where, count = target(o[0]), address_of(o[1]), int(m[-1]) if m[-1] in "24" else 1
        transposed = "MT88" in m
        g, t = LANES // 4, LANES % 4

        def run(w, mask):
            assert mask is None
            addresses = where(w)[: 8 * count]
            w.accessed = ("shared", sum(bank_waves(addresses[8 * n : 8 * n + 8], 16) for n in range(count)))
            half = w.cta.shared.view(np.uint16)
            for n in range(count):
                matrix = half[(addresses[8 * n : 8 * n + 8, None] >> 1) + np.arange(8)]
                if transposed:
                    matrix = matrix.T
                value = matrix[g, 2 * t].astype(U32) | matrix[g, 2 * t + 1].astype(U32) << U32(16)
                write(w, d + n, value, None)

        return run

    # Memory

    def _access(self, w, addresses, mask, size, space):
        chosen = addresses if mask is None else addresses[mask]
        assert not (chosen % size).any(), f"an access of {size} bytes that is not aligned"
        if space == "generic" and len(chosen) and chosen[0] < GLOBAL:
            space = "shared"  # of another CTA of the cluster
        if space == "shared":
            w.accessed = ("shared", bank_waves(addresses if mask is None else chosen, size))
        else:
            sectors = set((chosen >> 5).tolist()) | (set((chosen + size - 1 >> 5).tolist()) if size > 4 else set())
            w.accessed = ("global", len(sectors), len({sector >> 2 for sector in sectors}))
        return chosen

    def _load(self, m, o, space):
        d, where = target(o[0]), address_of(o[1])
        kind = next((x for x in m if x in ("U8", "S8", "U16", "S16", "64", "128")), "32")
        size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "32": 4, "64": 8, "128": 16}[kind]

        def run(w, mask):
            addresses = where(w)
            chosen = self._access(w, addresses, mask, size, space)
            table, at = self._table(w, chosen, space)
            if size < 4:
                raw = table.view({1: np.uint8, 2: np.uint16}[size])[at // size]
                if kind in ("S8", "S16"):
                    raw = raw.view(np.int8 if size == 1 else np.int16).astype(np.int32).view(U32)
                self._put(w, d, raw.astype(U32), mask)
                return
            words = table.view(U32)
            for n in range(size // 4):
                self._put(w, d + n, words[(at >> 2) + n], mask)

        return run

    def _put(self, w, register, value, mask):
        if register == 255:
            return
        if mask is None:
            w.R[register] = value
        else:
            w.R[register][mask] = value

    def _table(self, w, addresses, space):
        if space == "generic":
            space = "global" if len(addresses) and addresses[0] >= GLOBAL else "shared"
        if space == "shared":
            return w.cta.shared, addresses & 0xFFFFFF
        at = addresses - GLOBAL
        assert ((at >= 0) & (at < w.cta.memory.bytes.size)).all(), "an address outside of device memory"
        return w.cta.memory.bytes, at

    def _store(self, m, o, space):
        where, a = address_of(o[0]), Operand(o[1])
        kind = next((x for x in m if x in ("U8", "U16", "64", "128")), "32")
        size = {"U8": 1, "U16": 2, "32": 4, "64": 8, "128": 16}[kind]

        def run(w, mask):
            addresses = where(w)
            chosen = self._access(w, addresses, mask, size, space)
            table, at = self._table(w, chosen, space)
            for n in range(max(1, size // 4)):
                from_register = a.register >= 0 and not a.uniform
                at_register = 255 if a.register == 255 else a.register + n
                value = w.R[at_register] if from_register else a.get(w)
                value = np.broadcast_to(np.asarray(value, U32), (32,))
                value = value if mask is None else value[mask]
                if size < 4:
                    kind_ = {1: np.uint8, 2: np.uint16}[size]
                    table.view(kind_)[at // size] = value.astype(kind_)
                else:
                    table.view(U32)[(at >> 2) + n] = value

        return run

    def make_lds(self, i, m, o):
        return self._load(m, o, "shared")

    def make_sts(self, i, m, o):
        return self._store(m, o, "shared")

    def make_ldg(self, i, m, o):
        return self._load(m, o, "global")

    def make_stg(self, i, m, o):
        return self._store(m, o, "global")

    def make_ld(self, i, m, o):
        return self._load(m, o, "generic")

    def make_st(self, i, m, o):
        return self._store(m, o, "generic")

    def make_ldgsts(self, i, m, o):
        """Asynchronous copy; done at once, which the barriers behind it make no difference to."""
        to, source = address_of(o[0]), address_of(o[1])
        size = 16 if "128" in m else 8 if "64" in m else 4

        def run(w, mask):
            addresses = source(w)
            chosen = self._access(w, addresses, mask, size, "global")
            table, at = self._table(w, chosen, "global")
            target_ = to(w) if mask is None else to(w)[mask]
            for n in range(size // 4):
                w.cta.shared.view(U32)[((target_ & 0xFFFFFF) >> 2) + n] = table.view(U32)[(at >> 2) + n]

        return run

    def _atomic(self, w, mask, where, value, update):
        old = np.zeros(32, U32)
        addresses = where(w)
        for lane in np.flatnonzero(np.ones(32, bool) if mask is None else mask):
            table, at = self._table(w, addresses[lane : lane + 1], "generic")
            words = table.view(U32)
            old[lane] = words[at[0] >> 2]
            words[at[0] >> 2] = update(old[lane], np.broadcast_to(np.asarray(value, U32), (32,))[lane])
        w.accessed = ("global", 1, 1)
        return old

    def make_atomg(self, i, m, o):
        d, where, a = target(o[1]), address_of(o[2]), Operand(o[3])
        update = (lambda x, y: x + y) if "ADD" in m else (lambda x, y: y)
        return lambda w, mask: write(w, d, self._atomic(w, mask, where, a.get(w), update), mask)

    def make_redg(self, i, m, o):
        where, a = address_of(o[0]), Operand(o[1])
        update = (lambda x, y: x | y) if "OR" in m else (lambda x, y: x + y)
        return lambda w, mask: self._atomic(w, mask, where, a.get(w), update)

    def make_atoms(self, i, m, o):
        where, a = address_of(o[1]), Operand(o[2])
        assert m == ["OR"] and o[0] == "RZ", (m, o)
        return lambda w, mask: self._atomic(w, mask, where, a.get(w), lambda x, y: x | y)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    raw = bits(value).astype(U64)
    rounded = ((raw + U64(0x7FFF) + (raw >> U64(16) & U64(1))) >> U64(16)).astype(U32)
    return np.where(np.isnan(value), U32(0x7FFF), rounded)


def to_float16(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return value.astype(np.float16).view(np.uint16).astype(U32)
