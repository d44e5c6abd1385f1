"""The machine code of a kernel: instructions with their control bits, and the source line that each came from."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ToolError(RuntimeError):
    """nvcc or a disassembler is missing or failed; the text says which."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of sm_90.

    ``stall``: cycles until the warp may issue the next one.  ``write`` and ``read``: scoreboard (0 to 5, 7 for none)
    that is released when the result is there, and when the operands have been read.  ``wait``: the mask of scoreboards
    that must be free before it issues.  ``file``: where the code was written, inside precondition.cu's own functions.
    """

    address: int
    predicate: str  # "", "P0", "!UP1"
    opcode: str
    operands: tuple[str, ...]
    stall: int
    write: int
    read: int
    wait: int
    file: str


def tool(name: str) -> str:
    """Path of a tool of the toolkit: on the PATH, or in the wheels nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    found = shutil.which(name) or next((str(path) for path in wheels), None)
    if found is None:
        raise ToolError(f"{name} is not on the PATH")
    return found


def run(*command) -> str:
    environment = {**os.environ}
    if "nvdisasm" in str(command[0]) or "cuobjdump" in str(command[0]):
        environment["PATH"] += os.pathsep + str(Path(tool("nvdisasm")).parent)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ToolError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def compile_kernels(source: Path, target: Path, arch: str = "sm_90a") -> Path:
    """The cubin of one source file, as the build compiles it, with line numbers (which change no instruction)."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        includes = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include")]
        run(tool("nvcc"), "-std=c++17", "-O3", "-lineinfo", f"-arch={arch}", *includes, "-cubin", "-o", partial, source)
        os.replace(partial, target)
    return target


def source_files(cubin: Path) -> dict[str, dict[int, str]]:
    """Kernel -> address -> file name of the outermost function inlined into the kernel's own file."""
    found: dict[str, dict[int, str]] = {}
    kernel, file, in_comment = "", "", False
    for line in run(tool("nvdisasm"), "-hex", "-gi", "-c", cubin).splitlines():
        if line.startswith(".text."):
            kernel = line[len(".text.") :].rstrip(":").strip()
            found[kernel] = {}
        elif match := re.match(r'\s*//## File "([^"]+)", line \d+', line):
            name = Path(match[1]).name
            if not in_comment or name != "precondition.cu":
                file = name
            in_comment = True
        elif kernel and (match := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)):
            found[kernel][int(match[1], 16)] = file
            in_comment = False
    return found


def read_jump_tables(cubin: Path, pattern: str) -> bytes:
    """Constant bank 2 of the kernel whose name contains ``pattern``: the tables of its BRX instructions."""
    elf = cubin.read_bytes()
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, at + i * size) for i in range(count)]
    for name, _, _, _, offset, length in sections:
        begin = sections[names][4] + name
        text = elf[begin : elf.index(b"\0", begin)].decode()
        if text.startswith(".nv.constant2.") and pattern in text:
            return elf[offset : offset + length]
    return b""


def read_kernel(cubin: Path, pattern: str) -> list[Instruction]:
    """The instructions of the only kernel whose mangled name contains ``pattern``."""
    files = source_files(cubin)
    kernel, pending, code = "", None, []
    for line in run(tool("cuobjdump"), "-sass", cubin).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
        elif pattern not in kernel:
            continue
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/", line):
            pending = int(match[1], 16), match[2].strip()
        elif pending and (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            control = int(match[1], 16) >> 41  # bits 105 and up of the 128
            address, text = pending
            guard = re.match(r"@(!?U?P\w+)\s+", text)
            predicate = guard[1] if guard else ""
            opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
            code.append(
                Instruction(
                    address,
                    predicate,
                    opcode,
                    tuple(part.strip() for part in rest.split(",")) if rest.strip() else (),
                    stall=control & 15,
                    write=control >> 5 & 7,
                    read=control >> 8 & 7,
                    wait=control >> 11 & 63,
                    file=files[kernel].get(address, ""),
                )
            )
            pending = None
    if not code:
        raise ToolError(f"{cubin}: no kernel has {pattern} in its name")
    return code
