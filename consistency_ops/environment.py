"""Where the C++ files are, and what this build is: for C++ users and for bug reports."""

import ctypes
import os
import platform
from pathlib import Path
from typing import TypedDict

import torch

from .ops.library import build_config, is_torch_abi_off, library, torch_abi

__version__ = "0.1.0"


class BuildInfo(TypedDict):
    """What :func:`build_info` returns.

    Keys: ``version`` of this package; ``torch``, the version that runs; ``torch_build``, the one it was compiled with;
    ``compiler``; ``cuda_toolkit`` and ``cuda_archs`` (``None`` in a build without CUDA kernels); ``cpu``, its name;
    ``cpu_isa``, the kernels in use: "amx", "avx512bf16", "avx512", "avx2" or "portable"; ``threads`` of torch;
    ``omp_wait_policy``; ``gpus``, their names, empty without a CUDA device; ``os``; ``python``; ``library``, the path
    of the compiled file; ``torch_abi``: "loaded" if ``csrc/torch_abi``, which makes small layers and calls faster, was
    built for this torch and this Python from the sources that lie there, "off" where ``CONSISTENCY_OPS_TORCH_ABI=0``
    says so, else "not built".
    """

    version: str
    torch: str
    torch_build: str
    compiler: str
    cuda_toolkit: str | None
    cuda_archs: str | None
    cpu: str
    cpu_isa: str
    threads: int
    omp_wait_policy: str | None
    gpus: list[str]
    os: str
    python: str
    library: str
    torch_abi: str


def _csrc() -> Path:
    """The installed copy of csrc, or that of the checkout that this package is used from."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def include_dir() -> str:
    """Directory to put on the compiler's include path: it holds `consistency_ops/c_api.h` and the C++ headers."""
    return str(_csrc() / "include")


def cmake_prefix_path() -> str:
    """Directory for `CMAKE_PREFIX_PATH`, so that `find_package(ConsistencyOps)` finds this package.

    The package builds the kernels from the sources that are shipped here; torch and Python are not needed. Link the
    target `ConsistencyOps::consistency_ops`.
    """
    return str(_csrc())


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def build_info() -> BuildInfo:
    """Return what a bug report needs: versions, compilers, and what the code runs on here.

    Returns:
        A dict with the keys of :class:`BuildInfo`.
    """
    compiled = build_config()
    toolkit = compiled.get("cuda")
    library.co_cpu_isa.restype = ctypes.c_char_p
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_build": compiled["torch"],
        "compiler": compiled["compiler"],
        "cuda_toolkit": toolkit and f"{int(toolkit) // 1000}.{int(toolkit) % 1000 // 10}",
        "cuda_archs": compiled.get("cuda_archs"),
        "cpu": _cpu_name(),
        "cpu_isa": library.co_cpu_isa().decode(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.getenv("OMP_WAIT_POLICY"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": platform.platform(),
        "python": platform.python_version(),
        "library": library._name,
        "torch_abi": "loaded" if torch_abi is not None else "off" if is_torch_abi_off() else "not built",
    }


def format_report() -> str:
    """Return :func:`build_info` as aligned lines of text."""
    info = build_info()
    lines: dict[str, object] = {**info}
    if info["cuda_toolkit"] is None:
        lines["cuda_toolkit"] = "none: built without CUDA kernels"
        lines["cuda_archs"] = "none: on a GPU torch's own operations compute; for kernels set CUDA_HOME, reinstall"
    lines["gpus"] = ", ".join(info["gpus"]) or "none: no CUDA device"
    lines["omp_wait_policy"] = info["omp_wait_policy"] or "not set (PASSIVE helps on a busy machine)"
    return "\n".join(f"{key:16} {value}" for key, value in lines.items())
