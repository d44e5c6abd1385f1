"""Tier C of bench_cuda.py: mathdx.cu with NVIDIA's cuBLASDx and cuSolverDx, where libmathdx is installed.

libmathdx (``pip install nvidia-libmathdx-cu13``; proprietary, so nothing here depends on it) generates the functions
that mathdx.cu calls as LTO-IR with NVRTC, nvcc makes LTO-IR of mathdx.cu, and nvJitLink links both to a cubin: a minute
or two, and no GPU.  NVRTC and nvJitLink come with torch for CUDA.  (The package nvidia-mathdx 25.6.0 has cuSolverDx's
headers without its device code.)  ``MATHDX_ROOT`` names a folder with lib/libmathdx.so.0 that is not on Python's path,
such as build/mathdx/nvidia/cu13 after ``pip install --no-deps --target build/mathdx nvidia-libmathdx-cu13``.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.micro.compositions import Division, by_solve, divide, per_layer
from benchmarks.micro.workloads import LayerShape

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cu")
SIZES = (64, 128)  # units that a chunk is padded to
THREADS = 256
SPLIT_ROWS, TILE_ROWS, TASK_ROWS = 512, 64, 256  # as in mathdx.cu
DEPTH = 64

LIBMATHDX, NVRTC, NVJITLINK = "libmathdx.so.0", "libnvrtc.so.13", "libnvJitLink.so.13"
# Enumerators of libcommondx.h, libcublasdx.h and libcusolverdx.h
SYMBOL_NAME, TARGET_SM, BLOCK = 0, 1, 1
BF16, F32 = 2, 5
COLUMNS, ROWS = 0, 1
INPUT_LTOIR, INPUT_FATBIN, MAX_DYNAMIC_SHARED = 3, 4, 8  # of nvJitLink.h, cuda.h
GEMM = dict(
    function=0, size=1, type=2, precision=3, sm=4, execution=5, block_dim=6, api=9, arrangement=10, alignment=11
)
SOLVER = dict(
    size=0, type=1, precision=2, sm=3, execution=4, block_dim=5, api=6, function=7, arrangement=8, fill_mode=9
)
POSV, LOWER = 11, 1


def folders() -> list[Path]:
    """Return the folders in which libmathdx and NVRTC may be."""
    root = os.environ.get("MATHDX_ROOT")
    given = [Path(root) / "lib", Path(root)] if root else []
    return given + [Path(entry) / "nvidia" / "cu13" / "lib" for entry in sys.path]


def find(name: str) -> Path | None:
    return next((folder / name for folder in folders() if (folder / name).is_file()), None)


def missing() -> str | None:
    """Return why there is no tier C here, or None if there is."""
    if find(LIBMATHDX) is None:
        return "MathDx is not installed (pip install nvidia-libmathdx-cu13, or set MATHDX_ROOT)"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    absent = [name for name in (NVRTC, NVJITLINK) if find(name) is None]
    return f"{' and '.join(absent)}, which come with torch for CUDA 13, are not there" if absent else None


@functools.cache
def libmathdx() -> ctypes.CDLL:
    nvrtc = find(NVRTC)
    for path in (*nvrtc.parent.glob("libnvrtc-builtins.so.*"), nvrtc):  # the first by name, when NVRTC compiles
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(find(LIBMATHDX)))


def call(function: str, *arguments: int | bytes | ctypes._SimpleCData) -> None:
    """Wrap a function of libmathdx; integers are passed as 64 bits, except enumerators, which are c_int."""
    library = libmathdx()
    status = library[function](*[ctypes.c_longlong(a) if isinstance(a, int) else a for a in arguments])
    if status == 0:
        return
    code, size = ctypes.c_int(), ctypes.c_size_t()
    library.commondxGetLastErrorStrSize(ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value + 1)
    library.commondxGetLastErrorStr(ctypes.byref(code), ctypes.c_size_t(size.value), text)
    raise RuntimeError(f"{function} of libmathdx: status {status} {text.value.decode()[-500:]}".strip())


def generate(symbol: str, sm: int, prefix: str, numbers: dict[str, int], operators: dict) -> bytes:
    """Return the LTO-IR of one device function; ``prefix`` is cublasdx or cusolverdx."""
    handle, code, size = ctypes.c_longlong(), ctypes.c_longlong(), ctypes.c_size_t()
    call(f"{prefix}CreateDescriptor", ctypes.byref(handle))
    for name, value in {**operators, "sm": 10 * sm, "execution": BLOCK, "block_dim": (THREADS, 1, 1)}.items():
        number = ctypes.c_int(numbers[name])
        if isinstance(value, tuple):
            array = (ctypes.c_longlong * len(value))(*value)
            call(f"{prefix}SetOperatorInt64s", handle, number, ctypes.c_size_t(len(value)), array)
        else:
            call(f"{prefix}SetOperatorInt64", handle, number, value)
    call(f"{prefix}SetOptionStr", handle, ctypes.c_int(SYMBOL_NAME), symbol.encode())
    call("commondxCreateCode", ctypes.byref(code))
    call("commondxSetCodeOptionInt64", code, ctypes.c_int(TARGET_SM), 10 * sm)
    call(f"{prefix}FinalizeCode", code, handle)
    call("commondxGetCodeLTOIRSize", code, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    call("commondxGetCodeLTOIR", code, size, buffer)
    call("commondxDestroyCode", code)
    call(f"{prefix}DestroyDescriptor", handle)
    return buffer.raw


def solver_library(path: Path) -> None:
    """Write the fat binary, for all architectures, that the LTO-IR of cuSolverDx's functions calls."""
    handle, size = ctypes.c_longlong(), ctypes.c_size_t()
    call("cusolverdxCreateDescriptor", ctypes.byref(handle))
    call("cusolverdxGetUniversalFATBINSize", handle, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    call("cusolverdxGetUniversalFATBIN", handle, size, buffer)
    call("cusolverdxDestroyDescriptor", handle)
    path.write_bytes(buffer.raw)


def functions(size: int) -> dict[str, tuple[str, dict[str, int], dict]]:
    """Return {symbol: (prefix, operators' numbers, operators)} of what mathdx.cu declares for one size."""
    gemm = dict(function=0, type=0, api=0, alignment=(16, 16, 16))
    gram = {**gemm, "size": (size, size, DEPTH), "arrangement": (COLUMNS, ROWS, COLUMNS)}
    apply = {**gemm, "size": (TILE_ROWS, size, size), "arrangement": (ROWS, ROWS, ROWS)}
    posv = dict(function=POSV, size=(size, size, size), type=0, precision=F32, api=0, fill_mode=LOWER)
    return {
        f"dx_gram_4_{size}": ("cublasdx", GEMM, {**gram, "precision": (F32, F32, F32)}),
        f"dx_gram_2_{size}": ("cublasdx", GEMM, {**gram, "precision": (BF16, BF16, F32)}),
        f"dx_apply_{size}": ("cublasdx", GEMM, {**apply, "precision": (BF16, BF16, F32)}),
        f"dx_posv_{size}": ("cusolverdx", SOLVER, {**posv, "arrangement": (COLUMNS, COLUMNS)}),
    }


def link(sm: int, parts: list[Path]) -> bytes:
    """Link files of LTO-IR and a fat binary to a cubin."""
    library, handle, size = ctypes.CDLL(str(find(NVJITLINK))), ctypes.c_void_p(), ctypes.c_size_t()

    def call(function: str, *arguments) -> None:
        if library[function](*arguments) == 0:
            return
        library.nvJitLinkGetErrorLogSize(handle, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        library.nvJitLinkGetErrorLog(handle, log)
        raise RuntimeError(f"{function}: {log.value.decode()[-500:]}")

    options = (ctypes.c_char_p * 2)(b"-lto", f"-arch=sm_{sm}".encode())
    call("nvJitLinkCreate", ctypes.byref(handle), ctypes.c_uint32(2), options)
    for part in parts:
        code = part.read_bytes()
        kind = INPUT_FATBIN if part.suffix == ".fatbin" else INPUT_LTOIR
        call("nvJitLinkAddData", handle, kind, code, ctypes.c_size_t(len(code)), part.name.encode())
    call("nvJitLinkComplete", handle)
    call("nvJitLinkGetLinkedCubinSize", handle, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    call("nvJitLinkGetLinkedCubin", handle, cubin)
    library.nvJitLinkDestroy(ctypes.byref(handle))
    return cubin.raw


def build(sm: int, folder: Path = ROOT / "build" / "mathdx") -> Path:
    """Return the cubin for one architecture, such as 90; it is made again when a source has changed."""
    headers = [ROOT / "csrc" / "cuda" / name for name in ("port.cuh", "ptx.cuh", "convert.cuh")]
    sources = [SOURCE, *headers, Path(__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = folder / f"mathdx-sm_{sm}-{digest}.cubin"
    if target.exists():
        return target
    parts = folder / f"sm_{sm}-{digest}"
    parts.mkdir(parents=True, exist_ok=True)
    wanted = {symbol: how for size in SIZES for symbol, how in functions(size).items()}
    # Each takes up to half a minute of one core; libmathdx is not documented to be safe for threads.
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        codes = {symbol: pool.submit(generate, symbol, sm, *how) for symbol, how in wanted.items()}
        pool.submit(solver_library, parts / "solver.fatbin").result()
    for symbol, code in codes.items():
        (parts / f"{symbol}.ltoir").write_bytes(code.result())
    includes = [f"-I{ROOT / name}" for name in ("csrc", "csrc/include")]
    command = ["nvcc", "-std=c++17", "-rdc=true", "-dlto", "-ltoir", f"-arch=sm_{sm}", *includes, SOURCE]
    done = subprocess.run([*command, "-o", parts / "mathdx.ltoir"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc: {done.stdout}{done.stderr}")
    partial = target.with_suffix(".partial")
    partial.write_bytes(link(sm, sorted(parts.iterdir())))
    os.replace(partial, target)
    return target


class Params(ctypes.Structure):
    """The struct Params of mathdx.cu."""

    _fields_ = (("chunks", ctypes.c_void_p), ("tasks", ctypes.c_void_p), ("damping", ctypes.c_float))


class Cubin:
    """The kernels of a cubin, launched with the CUDA driver in torch's context."""

    def __init__(self, path: Path):
        torch.cuda.current_stream()  # this makes the context
        self.driver, self.module, self.functions = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), {}
        self._call("cuModuleLoadData", ctypes.byref(self.module), path.read_bytes())

    def _call(self, function: str, *arguments) -> None:
        if (status := self.driver[function](*arguments)) != 0:
            raise RuntimeError(f"{function}: CUDA driver error {status}")

    def launch(self, name: str, grid: int, shared: int, params: Params) -> None:
        if name not in self.functions:
            function = self.functions[name] = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
            self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
        argument = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("cuLaunchKernel", self.functions[name], grid, 1, 1, THREADS, 1, 1, shared, stream, argument, None)


class Chunk(ctypes.Structure):
    """The struct Chunk of mathdx.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "g", "units", "partials", "inverse", "info")),
        *((name, ctypes.c_int64) for name in ("x_pitch", "g_pitch")),
        *((name, ctypes.c_int32) for name in ("rows", "g_rows", "taps", "size")),
        *((name, ctypes.c_bool) for name in ("x_vectors", "g_vectors")),
    )


def in_vectors(pitch: int, division: Division, size: int, itemsize: int) -> bool:
    """Whether the rows of a chunk can be read in aligned vectors of 16 bytes."""
    width = 16 // itemsize
    together = division.order is None or division.group % width == 0
    return together and pitch % width == 0 and size % width == 0


class Group:
    """The chunks of one padded size and type, which one call of mathdx_correct corrects."""

    def __init__(self, size: int, device: torch.device):
        self.size, self.device, self.chunks, self.kept = size, device, [], []

    def add(self, grad: Tensor, rows: Tensor, division: Division, units: Tensor) -> None:
        x_pitch, g_pitch, size = rows.stride(0), grad.stride(0), len(units)
        taps = grad[0, 0].numel()
        splits = -(-len(rows) // SPLIT_ROWS)
        partials = torch.empty(splits, self.size, self.size, device=self.device)
        inverse = torch.empty(2, self.size, self.size, dtype=torch.bfloat16, device=self.device)
        info = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.kept.append((grad, rows, units, partials, inverse, info))
        self.chunks.append(
            Chunk(
                *(tensor.data_ptr() for tensor in (rows, grad, units, partials, inverse, info)),
                x_pitch,
                g_pitch,
                len(rows),
                len(grad) * taps,
                taps,
                size,
                in_vectors(x_pitch, division, size, rows.itemsize),
                taps == 1 and in_vectors(g_pitch, division, size, grad.itemsize),
            )
        )

    def finish(self) -> None:
        """Copy the descriptions to the device."""
        described = bytearray((Chunk * len(self.chunks))(*self.chunks))
        self.described = torch.frombuffer(described, dtype=torch.uint8).to(self.device)
        self.grams = self._tasks("rows", SPLIT_ROWS)
        self.applies = self._tasks("g_rows", TASK_ROWS)

    def _tasks(self, rows: str, step: int) -> Tensor:
        tasks = [(c, first) for c, chunk in enumerate(self.chunks) for first in range(0, getattr(chunk, rows), step)]
        return torch.tensor(tasks, dtype=torch.int32).to(self.device)

    def run(self, kernels, damping: float) -> None:
        x, g, matrix = self.kept[0][1].itemsize, self.kept[0][0].itemsize, 4 * self.size**2
        for name, tasks, shared in (
            (f"gram_{x}_{self.size}", self.grams, matrix + DEPTH * self.size * x),
            (f"invert_{self.size}", None, 2 * matrix),
            (f"apply_{g}_{self.size}", self.applies, matrix + TILE_ROWS * self.size * (4 + g)),
        ):
            grid = len(self.chunks) if tasks is None else len(tasks)
            params = Params(self.described.data_ptr(), None if tasks is None else tasks.data_ptr(), damping)
            kernels.launch(name, grid, shared, params)


class MathDx:
    """The correction of these gradients in place by the kernels of a Cubin; a call queues it on the current stream."""

    def __init__(self, kernels, grads: list[Tensor], inputs: list[Tensor], divisions: list[Division], damping: float):
        self.kernels, self.damping, self.groups = kernels, damping, {}
        for grad, rows, division in zip(grads, inputs, divisions, strict=True):
            if {grad.dtype, rows.dtype} - {torch.float32, torch.bfloat16}:
                raise ValueError(f"tier C takes float32 and bfloat16, got {grad.dtype} and {rows.dtype}")
            order = division.permutation(grad.shape[1]).to(grad.device, torch.int32)
            for begin, count, size in division.blocks:
                if size > max(SIZES):
                    raise ValueError(f"tier C takes chunks of at most {max(SIZES)} units, got {size}")
                padded = next(s for s in SIZES if size <= s)
                key = padded, rows.dtype, grad.dtype
                group = self.groups.setdefault(key, Group(padded, grad.device))
                for units in order[begin : begin + count * size].split(size):
                    group.add(grad, rows, division, units)
        for group in self.groups.values():
            group.finish()
        self.streams = [torch.cuda.Stream() for _ in self.groups] if grads[0].is_cuda else []

    def __call__(self) -> None:
        """Queue the correction; the groups run side by side."""
        if not self.streams:
            for group in self.groups.values():
                group.run(self.kernels, self.damping)
            return
        here = torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(here)
        for group, stream in zip(self.groups.values(), self.streams, strict=True):
            with torch.cuda.stream(stream):
                group.run(self.kernels, self.damping)
        for stream in self.streams:
            here.wait_stream(stream)


def main() -> None:
    """Make the cubin for the device; with an argument test it on a small problem against float64."""
    if len(sys.argv) == 1:
        major, minor = torch.cuda.get_device_capability()
        print(missing() or build(10 * major + minor))
        return
    kernels, generator = Cubin(Path(sys.argv[1])), torch.Generator().manual_seed(0)
    layers = [LayerShape(70, 256), LayerShape(9, 40)]
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        grads = [torch.randn(layer.weight, generator=generator).to(dtype) for layer in layers]
        inputs = [torch.randn(600, layer.units, generator=generator).to(dtype) for layer in layers]
        divisions = [divide(layer, 128, 16, generator) for layer in layers]
        wanted = per_layer([g.double() for g in grads], [x.double() for x in inputs], divisions, 0.1, by_solve)
        got = [grad.cuda() for grad in grads]
        MathDx(kernels, got, [x.cuda() for x in inputs], divisions, 0.1)()
        pairs = zip(got, wanted, strict=True)
        error = max(float((g.cpu().double() - w).norm() / w.norm()) for g, w in pairs)
        if not error < most:
            sys.exit(f"tier C is wrong: error {error:.1e} in {dtype}")
    print("right on a small problem")


if __name__ == "__main__":
    main()
