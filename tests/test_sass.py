"""Static gates on the compiled CUDA kernels, where nvcc is found; no GPU is needed.

Registers, spills and shared memory as the assembler reports them, and the instructions that the design counts on.  They
say that the compiler did what the source asks for; they do not say that a kernel runs.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from consistency_ops import environment
from support import processes

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("sm_80", "sm_90a", "sm_100")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a kernel on every architecture.  ``static_shared`` includes the 1 KiB that CUDA keeps from sm_90 on."""

    registers: int
    static_shared: int = 0
    need: tuple[str, ...] = ()
    clusters: bool = False  # on sm_90 and newer, and only there
    warpgroups: bool = False  # products of four warps, on sm_90a and only there


CORRECTION = ("HMMA.1688.F32.TF32", "HMMA.16816.F32.BF16", "LDSM.16.MT88.4", "MUFU.RSQ", "FFMA")
CORRECTION += ("LDS", "BAR.SYNC", "SHFL", "CCTL.E.PF2", "LDG.E.128", "STG.E.128")  # the last two: the workspace
CLUSTER = ("UCGABAR_ARV", "UCGABAR_WAIT", "LD.E.128", "ST.E.128")  # and distributed shared memory

KERNELS = {
    ("precondition", r"precondition_kernel.*ILi256E"): Budget(
        registers=128,  # two CTAs of 256 threads an SM
        static_shared=6 << 10,  # kStaticShared of heuristics.h
        need=CORRECTION,
        clusters=True,
        warpgroups=True,
    ),
    ("precondition", r"precondition_kernel.*ILi512E"): Budget(
        registers=128,  # one CTA of 512 threads an SM
        static_shared=6 << 10,
        need=CORRECTION,
        clusters=True,
    ),
    ("batch_rms_norm", r"squares_of_maps_kernel"): Budget(registers=64, static_shared=2 << 10, need=("FFMA", "SHFL")),
    ("batch_rms_norm", r"squares_of_maps_kernel.*Lb1E"): Budget(
        registers=64, static_shared=2 << 10, need=("LDG.E.128",)
    ),
    ("batch_rms_norm", r"squares_of_pixels_kernel"): Budget(registers=64, static_shared=10 << 10, need=("FFMA",)),
    ("batch_rms_norm", r"squares_of_pixels_kernel.*Lb1E"): Budget(
        registers=64, static_shared=10 << 10, need=("LDG.E.128",)
    ),
    ("batch_rms_norm", r"finish_kernel"): Budget(registers=64, static_shared=2 << 10, need=("DADD", "SHFL")),
    ("batch_rms_norm", r"channel_divide_kernel"): Budget(registers=64, static_shared=1 << 10),
    ("batch_rms_norm", r"channel_divide_kernel.*Lb1E"): Budget(
        registers=64, static_shared=1 << 10, need=("LDG.E.128", "STG.E.128")
    ),
    # Three CTAs of 256 threads an SM.  Widths of 4 (float32), 8 (half types), 2 (float64) elements are 16 bytes.
    ("capture", r"capture_kernel"): Budget(registers=80, static_shared=19 << 10, need=("BAR.SYNC",)),
    ("capture", r"capture_kernel.*(ffLi4E|ttLi8E|ddLi2E)"): Budget(
        registers=80, static_shared=19 << 10, need=("LDG.E.128", "STG.E.128")
    ),
    ("capture", r"capture_kernel.*tfLi4E"): Budget(
        registers=80, static_shared=11 << 10, need=("LDG.E.64", "STG.E.128")
    ),
    # One CTA an SM at least, up to 512 threads; fixed arrays as those of the correction.
    # Up to 128 units in one sweep of matrix instructions, without shuffles (sweep.cuh); above by factor.cuh.
    ("linalg", r"spd_inverse_kernelILi8E"): Budget(
        registers=128, static_shared=6 << 10, need=("MUFU.RSQ", "FFMA", "BAR.SYNC", "HMMA")
    ),
    ("linalg", r"spd_inverse_kernelILi(?!8E)"): Budget(
        registers=128, static_shared=6 << 10, need=("MUFU.RSQ", "FFMA", "BAR.SYNC", "SHFL")
    ),
    ("linalg", r"spd_solve_kernel"): Budget(
        registers=128, static_shared=6 << 10, need=("MUFU.RSQ", "FFMA", "BAR.SYNC", "SHFL")
    ),
    ("modulus", r"modulus_kernel"): Budget(
        registers=64, static_shared=1 << 10, need=("LDG.E.128", "STG.E.128", "STG.E.U8")
    ),
    ("modulus", r"modulus_backward_kernel"): Budget(
        registers=64, static_shared=1 << 10, need=("LDG.E.128", "STG.E.128", "LDG.E.U8")
    ),
}


def tool(name: str) -> str | None:
    """Find a tool on the PATH, or in the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    wheels = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    return shutil.which(name) or next((str(p) for p in wheels), None)


pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH"),
    pytest.mark.skipif(
        tool("cuobjdump") is None or tool("nvdisasm") is None,
        reason="needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm",
    ),
]


# The correction takes five minutes of a core: every night; with the slow tests it is read from the built library.
FILES = [
    pytest.param(file, marks=pytest.mark.nightly if file == "precondition" else pytest.mark.slow)
    for file in sorted({file for file, _ in KERNELS})
]


@pytest.fixture(scope="module", params=FILES)
def compiled(request):
    """(file, object for all architectures); compiled again when a source has changed."""
    sources = [p for folder in ("cuda", "include") for p in sorted((ROOT / "csrc" / folder).rglob("*")) if p.is_file()]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    target = ROOT / "build" / "sass" / f"{request.param}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC", "-c", "-o", partial]
        command += [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include")]
        command += [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
        source = ROOT / f"csrc/cuda/{request.param}.cu"
        done = processes.run([*command, source], capture_output=True, text=True, timeout=processes.LONG)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        assert "wgmma" not in done.stderr, f"products of warpgroups wait for one another: {done.stderr}"
        os.replace(partial, target)
    return request.param, target


def cuobjdump(*arguments) -> str:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(tool('nvdisasm')).parent}"}
    command = [tool("cuobjdump"), *map(str, arguments)]
    return processes.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def resources(target) -> dict[tuple[str, str], dict[str, int]]:
    """Return {(arch, kernel): REG, STACK, SHARED, LOCAL}."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-res-usage", target).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def instructions(target) -> dict[tuple[str, str], list[str]]:
    """Return {(arch, kernel): opcodes in order}."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-sass", target).splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
            found[arch, kernel] = []
        elif kernel and (match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]+)", line)):
            found[arch, kernel].append(match[1])
    return found


def test_budgets(compiled):
    check_budgets(*compiled, ARCHS)


@pytest.mark.slow
def test_budgets_of_the_correction_in_this_library():
    info = environment.build_info()
    if info["cuda_toolkit"] is None:
        pytest.skip("built without CUDA kernels")
    built = {arch for arch, _ in resources(info["library"])}
    if built.isdisjoint(ARCHS):
        pytest.skip(f"built for {', '.join(sorted(built))} alone")
    check_budgets("precondition", info["library"], built.intersection(ARCHS))


def check_budgets(file, target, archs):
    used, code = resources(target), instructions(target)
    for (of_file, pattern), budget in KERNELS.items():
        if of_file != file:
            continue
        for arch in archs:
            kernels = [key for key in code if key[0] == arch and re.search(pattern, key[1])]
            assert kernels, (arch, pattern)
            for key in kernels:
                use, opcodes = used[key], code[key]
                assert use["REG"] <= budget.registers, (key, use)
                assert use["SHARED"] <= budget.static_shared, (key, use)
                assert use["STACK"] == use["LOCAL"] == 0, (key, use)
                assert not [op for op in opcodes if op.startswith(("LDL", "STL"))], key
                used_clusters = [name for name in CLUSTER if any(op.startswith(name) for op in opcodes)]
                assert used_clusters == (list(CLUSTER) if budget.clusters and arch != "sm_80" else []), key
                used_warpgroups = any(op.startswith("HGMMA.64x32x16.F32.BF16") for op in opcodes)
                assert used_warpgroups == (budget.warpgroups and arch == "sm_90a"), key
                missing = [name for name in budget.need if not any(op.startswith(name) for op in opcodes)]
                assert not missing, (key, missing)


def test_every_file_has_a_budget():
    files = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in path.read_text()}
    assert files == {file for file, _ in KERNELS}
