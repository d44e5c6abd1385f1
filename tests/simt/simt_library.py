"""Builds the CUDA kernels for the CPU and calls them: ctypes mirrors of the C++ structs, numpy arrays in and out.

Imports neither torch nor consistency_ops, so that it also runs in a Python whose allocator is a sanitizer's.

Not pybind11: the structs are plain data, whose mirrors `simt_size_of` checks, and the results are one struct, so that a
binding of them would be no shorter.  It would be compiled for one Python and once for each of the five ``BUILDS``, and
three fields of one struct take 6 s of processor time where all of library.cpp takes 0.4 s.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the scripts, and for pytest --noconftest
from support import processes

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("precondition.cu", "modulus.cu", "batch_rms_norm.cu", "capture.cu", "linalg.cu")
PLAN = "csrc/cuda/precondition/plan.cpp"
INCLUDES = ("tests", "csrc", "csrc/include")
KERNEL = ("-x", "c++", "-include", "simt/ptx_host.h")  # flags of a file with kernels: CUDA on the host runtime
COMPILER = os.environ.get("CXX", "c++")
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}
AUTOMATIC, ONE_CTA, CLUSTER, TASK_QUEUE = range(4)  # PreconditionRung
NEVER, ALWAYS = 1, 2  # Packing, where 0 is automatic too

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
BUILDS = {  # flags of the kernels, flags of the runtime
    "plain": (["-O2"], ["-O2"]),
    "rounding": (["-O2", "-DSIMT_TENSOR_CORES"], ["-O2"]),  # sums of products as tensor cores round them
    "memory": (["-O1", *SANITIZE], ["-O1", *SANITIZE]),
    "races": (["-O1", "-fsanitize=thread"], ["-O1", "-DSIMT_TSAN"]),
    "lines": (["-O1", "--coverage"], ["-O2"]),
    "accesses": (["-O1", "-fsanitize=thread"], ["-O2"]),  # ThreadSanitizer's calls, answered by access.cpp
}


def kernel_source(name: str, root: Path = ROOT) -> Path:
    """The file of this name below csrc/cuda, or beside this one."""
    (path,) = [*(root / "csrc" / "cuda").rglob(name), *(root / "tests" / "simt").glob(name)]
    return path


def build(kind: str, root: Path = ROOT) -> Path:
    """The shared library of one of ``BUILDS`` from the sources under ``root``; compiles only what has changed."""
    kernel_flags, runtime_flags = BUILDS[kind]
    units = [("tests/simt/runtime.cpp", runtime_flags)]
    units += [(f"tests/simt/{name}.cpp", [*kernel_flags, *KERNEL]) for name in ("selftest", "chunk_api")]
    units += [(name, kernel_flags) for name in ("tests/simt/library.cpp", PLAN)]
    units += [(f"csrc/cuda/{name}", [*kernel_flags, *KERNEL]) for name in KERNELS]
    units += [("csrc/cpu/capture.cpp", kernel_flags)]  # to compare with
    if kind == "accesses":
        units.append(("tests/simt/access.cpp", runtime_flags))
    return link(kind, root, units, runtime_flags if kind == "accesses" else kernel_flags)


def build_operators() -> Path:
    """The bindings of csrc/bindings with the host-run kernels behind them, for torch.ops.load_library.

    The operators are those of the package, in the namespace consistency_ops_simt, on CPU tensors.
    """
    torch = Path(importlib.util.find_spec("torch").origin).parent
    target = re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    flags = ["-O2", "-DCONSISTENCY_OPS_SIMT", f"-DTORCH_TARGET_VERSION={target}", "-isystem", str(torch / "include")]
    rounding = os.environ.get("SIMT_BUILD") == "rounding"
    kernel_flags = [*BUILDS["rounding" if rounding else "plain"][0], *KERNEL]
    units = [("tests/simt/runtime.cpp", ["-O2"])]
    units += [(f"csrc/cuda/{name}", kernel_flags) for name in KERNELS]
    others = "module.cpp", "host_calls.cpp"  # the Python module, and the kernels of the CPU
    names = sorted(path.name for path in (ROOT / "csrc" / "bindings").glob("*.cpp") if path.name not in others)
    units += [(f"csrc/bindings/{name}", flags) for name in names]
    units += [(PLAN, ["-O2"]), ("tests/simt/library.cpp", ["-O2"]), ("csrc/cpu/capture.cpp", ["-O2"])]  # for simt_stats
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    return link("rounding_operators" if rounding else "operators", ROOT, units, ["-O2"], libraries)


def operators_stats() -> Stats:
    """Return the counts of the last launch of an operator of build_operators."""
    library = ctypes.CDLL(str(build_operators()))
    library.simt_stats.restype = Stats
    return library.simt_stats()


def tune_operators(rung: int = AUTOMATIC, ctas: int = 0) -> int:
    """How the operators of build_operators launch the correction from now on; 0, or an error code."""
    return ctypes.CDLL(str(build_operators())).co_set_cuda_tuning(rung, ctas)


def link(
    kind: str,
    root: Path,
    units: list[tuple[str, list[str]]],
    flags: list[str],
    libraries: Sequence = (),
    program: bool = False,
) -> Path:
    """A shared library, or a ``program``."""
    folder = root / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [compile_object(root, source, unit_flags) for source, unit_flags in units]
        target = folder / f"{kind}-{digest(*(o.name for o in objects))}.so"
        if not target.exists():
            for old in folder.glob(f"{kind}-*.so"):
                old.unlink()
            partial = target.with_suffix(".partial")
            mode = [] if program else ["-shared"]
            run([COMPILER, *mode, *flags, *objects, "-o", partial, "-pthread", *libraries])
            os.replace(partial, target)
    return target


def compile_object(root: Path, source: str, flags: list[str]) -> Path:
    """An object named after what went into it; a copy of the sources shares those of the checkout."""
    flags = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *flags]
    seen: dict[Path, str] = {}
    if "-include" in flags:
        included(root, root / "tests" / flags[flags.index("-include") + 1], seen)
    name = f"{digest(COMPILER, *flags, *included(root, root / source, seen))}.o"
    found = [base / "build" / "simt" / name for base in (ROOT, root)]
    if not any(path.exists() for path in found):
        includes = [f"-I{root / folder}" for folder in INCLUDES]
        partial = found[1].with_suffix(".partial")
        run([COMPILER, *flags, *includes, "-c", root / source, "-o", partial])
        os.replace(partial, found[1])
    return next(path for path in found if path.exists())


def accesses(library: Path, report: Path) -> dict[tuple[str, int], list[tuple[str, int, float, float]]]:
    """(file, line) -> (space, requests, mean cost, mean least cost) a kind of memory, of a report of access.cpp."""
    rows = [line.split() for line in report.read_text().splitlines()]
    ask = ["addr2line", "-e", library]
    offsets = "\n".join(row[0] for row in rows)
    places = processes.run(ask, input=offsets, capture_output=True, text=True, check=True).stdout.split("\n")
    sums: dict[tuple[str, int, str], np.ndarray] = {}
    for place, (_, space, *numbers) in zip(places, rows, strict=False):
        file, line = re.match(r"(.*):(\d+|\?)", place).groups()
        if ("csrc/cuda/" in file or file.endswith("/ptx_host.h")) and line.isdigit():
            key = (Path(file).name, int(line), space)
            sums[key] = sums.get(key, 0) + np.array(numbers, np.int64)
    found: dict[tuple[str, int], list[tuple[str, int, float, float]]] = {}
    for (file, line, space), (requests, cost, least) in sums.items():
        found.setdefault((file, line), []).append((space, int(requests), cost / requests, least / requests))
    return found


def lines_not_run(folder: Path) -> dict[str, set[int]]:
    """File below csrc/cuda -> lines that no template's instance ran, after a run of the "lines" build in which
    GCOV_PREFIX was ``folder``."""
    counts: dict[str, dict[int, int]] = {}
    for data in folder.rglob("*.gcda"):
        notes = ROOT / "build" / "simt" / f"{data.stem}.gcno"
        shutil.copy(notes, data.parent)
        ask = ["gcov", "--json-format", "--stdout", data]
        report = processes.run(ask, capture_output=True, text=True, check=True, cwd=folder).stdout
        for file in (file for text in report.splitlines() for file in json.loads(text)["files"]):
            if "csrc/cuda/" not in file["file"]:
                continue
            seen = counts.setdefault(Path(file["file"]).name, {})
            for line in file["lines"]:
                seen[line["line_number"]] = seen.get(line["line_number"], 0) + line["count"]
    return {name: {line for line, count in seen.items() if count == 0} for name, seen in counts.items()}


def included(root: Path, path: Path, seen: dict[Path, str]) -> list[str]:
    """The text of a source and of every header of ours that it includes."""
    if path not in seen:
        seen[path] = path.read_text()
        for name in re.findall(r'^#include "(.+)"', seen[path], re.MULTILINE):
            header = next(root / folder / name for folder in INCLUDES if (root / folder / name).exists())
            included(root, header, seen)
    return list(seen.values())


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load() -> Library:
    """The plain build, or the one that SIMT_BUILD names; or the file that SIMT_LIBRARY names."""
    file = os.environ.get("SIMT_LIBRARY")
    return Library(Path(file) if file else build(os.environ.get("SIMT_BUILD", "plain")))


def sanitizer_environment(kind: str) -> dict[str, str]:
    """Return the environment for a Python that loads the library of ``kind``."""
    names = {"memory": ("libasan.so", "libubsan.so"), "races": ("libtsan.so",)}.get(kind, ())
    ask = [[COMPILER, f"-print-file-name={name}"] for name in names]
    found = [processes.run(a, capture_output=True, text=True, check=True).stdout.strip() for a in ask]
    return {
        **os.environ,
        "SIMT_BUILD": kind,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def run_cases(kind: str, library: Path, names: Sequence[str], seeds: int = 2, timeout: float = processes.LONG):
    """Run these cases in a process that has the sanitizer of ``kind`` in it.

    With ThreadSanitizer one case at a time: a process never gives back the memory maps of its threads, of which Linux
    allows it 65,530, and the case "whole stages of taps" takes 48,000.
    """
    return processes.run(
        [sys.executable, ROOT / "tests" / "simt" / "run_cases.py", library, str(seeds), *names],
        env=sanitizer_environment(kind),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run(command: list) -> None:
    done = processes.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


# Types

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = 0, 1, 2, 3  # DType


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    """Float values in the storage of ``dtype``: float32, or the bits of a 16-bit float."""
    values = np.asarray(values, np.float32)
    if dtype == FLOAT32:
        return values.copy()
    if dtype == FLOAT16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decode(stored: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FLOAT32:
        return stored
    if dtype == FLOAT16:
        return stored.view(np.float16).astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


class Layer(ctypes.Structure):
    """PreconditionLayer."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_row_size", ctypes.c_int64 * 4),
        ("x_row_stride", ctypes.c_int64 * 4),
        ("x_unit_stride", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("g", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("g_output_stride", ctypes.c_int64),
        ("g_unit_stride", ctypes.c_int64),
        ("g_tap_size", ctypes.c_int64 * 3),
        ("g_tap_stride", ctypes.c_int64 * 3),
        ("bias_grad", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64),
        ("x_dtype", ctypes.c_int32),
        ("g_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("has_bias", ctypes.c_bool),
        ("same_input", ctypes.c_bool),
        ("permutation", ctypes.c_void_p),
        ("row_count", ctypes.c_void_p),
        ("layer", ctypes.c_uint32),
        ("group", ctypes.c_int32),
        ("info", ctypes.c_void_p),
        ("damping_used", ctypes.c_void_p),
        ("covariance", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
    )


class Options(ctypes.Structure):
    """PreconditionOptions."""

    _fields_ = (
        ("damping", ctypes.c_double),
        ("trace_scaling", ctypes.c_bool),
        ("float64", ctypes.c_bool),
        ("chunk", ctypes.c_int32),
        ("max_rows", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("stages", ctypes.c_int32),
        ("triangular", ctypes.c_bool),
    )


class Whitened(ctypes.Structure):
    """WhitenedLayer."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("average", "average_weight", "has_gradient", "before", "bias_before")),
        ("moves", ctypes.c_bool),
        ("first", ctypes.c_bool),
    )


class WhiteningOptions(ctypes.Structure):
    _fields_ = (("decay", ctypes.c_double), ("keep_norm", ctypes.c_bool), ("finish", ctypes.c_bool))


class Spd(ctypes.Structure):
    """SpdParams."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "n", "nrhs")),
        ("dtype", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("a_strides", ctypes.c_int64 * 3),
        ("b", ctypes.c_void_p),
        ("b_strides", ctypes.c_int64 * 3),
        ("result", ctypes.c_void_p),
        ("info", ctypes.c_void_p),
    )


class Device(ctypes.Structure):
    """CudaDevice."""

    _fields_ = (("shared_bytes", ctypes.c_int32), ("compute_capability", ctypes.c_int32))


class Tuning(ctypes.Structure):
    """CudaTuning."""

    _fields_ = (
        ("rung", ctypes.c_int32),
        ("ctas", ctypes.c_int32),
        ("tf32", ctypes.c_bool),
        ("packing", ctypes.c_int32),
        ("counters", ctypes.c_int32),
    )

    def __init__(self, *values, counters: int = -1, **named):
        super().__init__(*values, counters=counters, **named)


class RowMatrix(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("run_bytes", ctypes.c_int64),
        ("element_bytes", ctypes.c_int64),
        ("unit_rows", ctypes.c_bool),
    )


class LayerWork(ctypes.Structure):
    _fields_ = (
        ("chunks", ctypes.c_int64),
        ("x_rows", ctypes.c_int64),
        ("g_rows", ctypes.c_int64),
        ("waits_for_trace", ctypes.c_bool),
        ("packs_x", ctypes.c_bool),
        ("permutes_g", ctypes.c_bool),
        ("unwhitens", ctypes.c_bool),
        ("finish_rows", ctypes.c_int64),
    )


class LaunchShape(ctypes.Structure):
    _fields_ = (("rung", ctypes.c_int32), ("cluster", ctypes.c_int32), ("parts", ctypes.c_int64))


class LayerTasks(ctypes.Structure):
    _fields_ = tuple((f"{kind}_tasks", ctypes.c_int16) for kind in ("gram", "apply", "pack", "permute", "finish"))


class CtaShape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("threads", "tile_floats", "arena_floats", "shared_bytes"))


class Modulus(ctypes.Structure):
    """ModulusParams and ModulusBackwardParams: (x, y, signs) or (grad, signs, grad_x), then the same."""

    _fields_ = (
        ("pointers", ctypes.c_void_p * 3),
        ("rows", ctypes.c_int64),
        ("row_length", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class ChannelView(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("outer", "channels", "inner", "outer_stride", "channel_stride", "inner_stride")
    )


class BatchRmsNorm(ctypes.Structure):
    """BatchRmsNormParams."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("view", ChannelView),
        ("dtype", ctypes.c_int32),
        ("running_ms", ctypes.c_void_p),
        ("running_dtype", ctypes.c_int32),
        ("num_batches", ctypes.c_void_p),
        ("denominator", ctypes.c_void_p),
        ("denominator_dtype", ctypes.c_int32),
        ("decay", ctypes.c_double),
        ("eps", ctypes.c_double),
    )


class ChannelDivide(ctypes.Structure):
    """ChannelDivideParams."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_view", ChannelView),
        ("y", ctypes.c_void_p),
        ("y_view", ChannelView),
        ("dtype", ctypes.c_int32),
        ("denominator", ctypes.c_void_p),
    )


class CaptureProblem(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("row_size", ctypes.c_int64 * 4),
        ("row_stride", ctypes.c_int64 * 4),
        ("unit_stride", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("x_dtype", ctypes.c_int32),
        ("rows_dtype", ctypes.c_int32),
        ("rows", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("state", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("layer", ctypes.c_uint32),
        ("in_backward", ctypes.c_bool),
        ("marks", ctypes.c_bool),
    )


class Stats(ctypes.Structure):
    """simt::Stats."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("switches", "ctas", "block_barriers", "warp_operations", "atomics", "shared_bytes")
    )


class Library:
    """The kernels.  Every call raises RuntimeError with the runtime's report."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        launchers = ("precondition", "modulus", "modulus_backward", "batch_rms_norm_denominator", "channel_divide")
        launchers += ("capture_rows", "capture_mark", "whiten", "spd")
        for name in ("selftest", *(f"simt_{launcher}" for launcher in launchers)):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.simt_batch_rms_norm_workspace.restype = ctypes.c_int64
        self._library.simt_size_of.restype = ctypes.c_int64
        self._library.simt_precondition_workspace.restype = ctypes.c_int64
        self._library.simt_whitening_workspace.restype = ctypes.c_int64
        self._library.simt_choose_cta.restype = CtaShape
        self._library.simt_choose_rung.restype = LaunchShape
        self._library.simt_tasks_of_layer.restype = LayerTasks
        self._library.simt_permutes.restype = ctypes.c_bool
        self._library.simt_trace_scale.restype = ctypes.c_double
        self._library.simt_damping_of_try.restype = ctypes.c_double
        self._library.simt_sample_rows.restype = ctypes.c_int64
        self._library.simt_stats.restype = Stats
        mirrors = {
            b"PreconditionLayer": Layer,
            b"PreconditionOptions": Options,
            b"CudaDevice": Device,
            b"CudaTuning": Tuning,
            b"WhitenedLayer": Whitened,
            b"WhiteningOptions": WhiteningOptions,
            b"SpdParams": Spd,
            b"LayerWork": LayerWork,
            b"RowMatrix": RowMatrix,
            b"ModulusParams": Modulus,
            b"BatchRmsNormParams": BatchRmsNorm,
            b"ChannelDivideParams": ChannelDivide,
            b"CaptureProblem": CaptureProblem,
        }
        for name, mirror in mirrors.items():
            assert ctypes.sizeof(mirror) == self._library.simt_size_of(name), name

    def selftest(self, name: str, variant: int = 1, x=None, y=None, z=None, counter=None) -> None:
        """One kernel of selftest.cpp on float32 arrays."""
        addresses = [ctypes.c_void_p(None if a is None else a.ctypes.data) for a in (x, y, z, counter)]
        self._call("selftest", name.encode(), variant, *addresses)

    def cholesky(self, n: int, a: np.ndarray, lda: int) -> tuple[int, int]:
        """co_simt_cholesky_f32: (status, info); ``a`` is column-major."""
        info = ctypes.c_int32(-99)
        status = self._library.co_simt_cholesky_f32(
            ctypes.c_int64(n), ctypes.c_void_p(a.ctypes.data), ctypes.c_int64(lda), ctypes.byref(info)
        )
        return status, info.value

    def cholesky_solve(
        self, n: int, nrhs: int, factor: np.ndarray, lda: int, b: np.ndarray, ldb: int, inverse: bool = False
    ) -> int:
        """co_simt_cholesky_solve_f32, or by the explicit inverse; ``b`` is column-major."""
        solve = self._library.simt_inverse_solve if inverse else self._library.co_simt_cholesky_solve_f32
        sizes = [ctypes.c_int64(size) for size in (n, nrhs, lda, ldb)]
        addresses = ctypes.c_void_p(factor.ctypes.data), ctypes.c_void_p(b.ctypes.data)
        return solve(*sizes[:2], addresses[0], sizes[2], addresses[1], sizes[3])

    def convert(self, name: str, value: float) -> float:
        """One of the wrappers float16_to_float, bfloat16_to_float, float_to_float16, float_to_bfloat16, to_tf32."""
        function = getattr(self._library, f"selftest_{name}")
        from_bits, to_bits = name.endswith("16_to_float"), name.startswith("float_to")
        function.argtypes = [ctypes.c_uint16 if from_bits else ctypes.c_float]
        function.restype = ctypes.c_uint16 if to_bits else ctypes.c_float
        return function(value)

    def schedule(self, seed: int = 1, order: int = 0, resident: int = 2, device: str = "sm_90") -> None:
        """How the next launches run: order 0 random, 1 ascending, 2 descending; CTAs in flight, 0: all."""
        self._library.simt_configure(
            ctypes.c_uint64(seed), order, ctypes.c_uint32(resident), ctypes.c_uint64(SHARED_BYTES[device])
        )

    def let_clusters_fit(self, fit: bool) -> None:
        """What the device answers when it is asked whether it can run a cluster."""
        self._library.simt_let_clusters_fit(ctypes.c_bool(fit))

    def stats(self) -> Stats:
        return self._library.simt_stats()

    def _call(self, name: str, *arguments) -> None:
        error = getattr(self._library, name)(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def precondition(
        self, layers: list[Layer], options: Options, device: str, workspace: np.ndarray, tuning: Tuning | None = None
    ) -> None:
        array = (Layer * len(layers))(*layers)
        address = ctypes.c_void_p(workspace.ctypes.data if len(workspace) else None)
        on, how = Device(SHARED_BYTES[device], int(device[3:])), tuning or Tuning()
        count = ctypes.c_int64(len(layers))
        self._call(
            "simt_precondition", array, count, ctypes.byref(options), ctypes.byref(on), address, ctypes.byref(how)
        )

    def whiten(
        self,
        layers: list[Layer],
        whitened: list[Whitened],
        options: Options,
        whitening: WhiteningOptions,
        squares: np.ndarray | None,
        device: str,
        workspace: np.ndarray,
        tuning: Tuning,
    ) -> None:
        """whiten_cuda, or with ``squares`` unwhiten_cuda."""
        arrays = (Layer * len(layers))(*layers), (Whitened * len(layers))(*whitened), ctypes.c_int64(len(layers))
        addresses = [ctypes.c_void_p(None if a is None or not len(a) else a.ctypes.data) for a in (squares, workspace)]
        on = Device(SHARED_BYTES[device], int(device[3:]))
        how = ctypes.byref(options), ctypes.byref(whitening)
        self._call("simt_whiten", *arrays, *how, addresses[0], ctypes.byref(on), addresses[1], ctypes.byref(tuning))

    def spd(self, problem, n: int, columns: int | None, device: str) -> None:
        """spd_inverse_cuda, or with ``columns`` of B spd_solve_cuda; ``problem``: the arrays of linalg_cases.py."""
        params = Spd(batch=len(problem.info), n=n, nrhs=columns or 0, dtype=FLOAT32)
        params.a, params.a_strides = problem.a.ctypes.data, problem.a_strides
        params.b = None if problem.b is None else problem.b.ctypes.data
        params.b_strides = problem.b_strides
        params.result, params.info = problem.result.ctypes.data, problem.info.ctypes.data
        on = Device(SHARED_BYTES[device], int(device[3:]))
        self._call("simt_spd", ctypes.byref(params), ctypes.byref(on))

    def whitening_workspace_bytes(
        self, layers: list[Layer], options: Options, whitening: WhiteningOptions, unwhitens: bool, tuning: Tuning
    ) -> int:
        array, count = (Layer * len(layers))(*layers), ctypes.c_int64(len(layers))
        how = ctypes.byref(options), ctypes.byref(whitening), ctypes.c_bool(unwhitens), ctypes.byref(tuning)
        return self._library.simt_whitening_workspace(array, count, *how)

    def modulus(self, x: int, y: int, signs: int | None, rows: int, row_length: int, dtype: int) -> None:
        """Run modulus on addresses, so that arrays may begin anywhere."""
        params = Modulus((x, y, signs), rows, row_length, dtype)
        self._call("simt_modulus", ctypes.byref(params))

    def modulus_backward(self, grad: int, signs: int, grad_x: int, rows: int, row_length: int, dtype: int) -> None:
        params = Modulus((grad, signs, grad_x), rows, row_length, dtype)
        self._call("simt_modulus_backward", ctypes.byref(params))

    def batch_rms_norm_denominator(self, params: BatchRmsNorm) -> None:
        bytes_ = self._library.simt_batch_rms_norm_workspace(ctypes.byref(params))
        workspace = np.full(bytes_ // 4, np.nan, np.float32)
        self._call("simt_batch_rms_norm_denominator", ctypes.byref(params), ctypes.c_void_p(workspace.ctypes.data))

    def channel_divide(self, params: ChannelDivide) -> None:
        self._call("simt_channel_divide", ctypes.byref(params))

    def capture_rows(self, problem: CaptureProblem, cpu: bool = False) -> None:
        """``cpu``: by csrc/cpu/capture.cpp instead."""
        self._call("simt_capture_rows", ctypes.byref(problem), ctypes.c_bool(cpu))

    def capture_mark(self, problem: CaptureProblem, restart: bool, cpu: bool = False) -> None:
        self._call("simt_capture_mark", ctypes.byref(problem), ctypes.c_bool(restart), ctypes.c_bool(cpu))

    def workspace_bytes(self, layers: list[Layer], options: Options, tuning: Tuning | None = None) -> int:
        array, count = (Layer * len(layers))(*layers), ctypes.c_int64(len(layers))
        how = tuning or Tuning()
        return self._library.simt_precondition_workspace(array, count, ctypes.byref(options), ctypes.byref(how))

    def counter_slots(self) -> None:
        """A new CounterSlots for the next two."""
        self._library.simt_counter_slots()

    def slot_of_stream(self, device: int, stream: int) -> int:
        return self._library.simt_slot_of_stream(device, ctypes.c_uint64(stream))

    def slot_of_capture(self, device: int) -> int:
        return self._library.simt_slot_of_capture(device)

    def permutes(self, matrix: RowMatrix, tuning: Tuning | None = None) -> bool:
        return self._library.simt_permutes(ctypes.byref(matrix), ctypes.byref(tuning or Tuning()))

    def tasks(
        self,
        layers: list[tuple[int, int, int]],
        clusters: bool,
        trace: bool = False,
        tuning: Tuning | None = None,
        permuted_bytes: int = 0,
    ) -> tuple[int, int, list[LayerTasks]]:
        """(rung, cluster, tasks of every layer) of layers with (chunks, rows of X, rows of G), which are permuted if
        ``permuted_bytes`` are."""
        how = tuning or Tuning()
        chunks, longest = sum(layer[0] for layer in layers), max(max(layer[1:]) for layer in layers)
        shape = self._library.simt_choose_rung(
            ctypes.c_int64(chunks),
            ctypes.c_int64(longest),
            ctypes.c_int64(permuted_bytes),
            int(clusters),
            ctypes.byref(how),
        )
        tasks = []
        for layer in layers:
            work = LayerWork(*layer, trace, permuted_bytes > 0, permuted_bytes > 0)
            tasks.append(self._library.simt_tasks_of_layer(ctypes.byref(work), ctypes.byref(shape), ctypes.byref(how)))
        return shape.rung, shape.cluster, tasks

    def choose_cta(self, units: int, device: str, slab_bytes: int = 0) -> CtaShape:
        return self._library.simt_choose_cta(units, SHARED_BYTES[device], slab_bytes)

    def trace_scale(self, total: float, count: int, multiplier: float) -> float:
        """damping.h."""
        numbers = ctypes.c_double(total), ctypes.c_int64(count), ctypes.c_double(multiplier)
        return self._library.simt_trace_scale(*numbers)

    def damping_of_try(self, damping: float, failed: int) -> float:
        return self._library.simt_damping_of_try(ctypes.c_double(damping), failed)

    def division(self, units: int, chunk: int, group: int, seed: int, step: int, layer: int) -> np.ndarray:
        order = np.empty(units, np.int64)
        self._library.simt_division(
            ctypes.c_int64(units),
            ctypes.c_int64(chunk),
            ctypes.c_int64(group),
            ctypes.c_uint64(seed),
            ctypes.c_uint64(step),
            ctypes.c_uint32(layer),
            ctypes.c_void_p(order.ctypes.data),
        )
        return order

    def sample_rows(self, rows: int, max_rows: int, seed: int, step: int, layer: int) -> np.ndarray:
        key = ctypes.c_uint64(seed), ctypes.c_uint64(step), ctypes.c_uint32(layer)
        arguments = ctypes.c_int64(rows), ctypes.c_int64(max_rows), *key
        taken = np.empty(self._library.simt_sample_rows(*arguments, None), np.int64)
        self._library.simt_sample_rows(*arguments, ctypes.c_void_p(taken.ctypes.data))
        return taken
