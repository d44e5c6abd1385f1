"""Build consistency_ops: one abi3 extension that runs on any torch >= 2.10, with CUDA kernels when nvcc is found.

    pip install .                        # builds with the installed torch, or downloads one
    pip install --no-build-isolation .   # with the installed torch, setuptools, wheel and ninja
    make build                           # in place, for development

CONSISTENCY_OPS_CUDA=0|1       never | always build the CUDA kernels (default: if a CUDA toolkit is found)
CONSISTENCY_OPS_TORCH=PYTHON   the interpreter whose torch it is built with (default: build_backend.py finds one)
CONSISTENCY_OPS_REPOSITORY=URL where the README's links lead to on a package index (default: git's origin)
CONSISTENCY_OPS_TORCH_ABI=0|1  never | always build csrc/torch_abi, which serves one torch and one Python
                               (default: if this torch builds it; a wheel is tagged abi3 only with 0)
TORCH_CUDA_ARCH_LIST           architectures to build, e.g. "9.0a;10.0+PTX"
MAX_JOBS                       parallel compile jobs
"""

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from email.parser import Parser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from build_backend import torch_paths

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # 2.10: the oldest torch the binary runs on
TOOLKIT_MIN = (12, 1)  # the first with 32 KB of kernel parameters
ARCHS = {"8.0": (11, 0), "9.0a": (12, 0), "10.0": (12, 8), "12.0+PTX": (12, 8)}  # and the toolkit each needs


def fail(sentence: str) -> None:
    sys.exit(f"consistency_ops: {sentence}")


def torch_cpp_extension():
    """torch.utils.cpp_extension of the build environment, or of the environment that is being installed into."""
    # What pip's isolated build hides goes last, so that it hides nothing of the build environment.
    sys.path += [path for path in torch_paths() or () if path not in sys.path]
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which pip's build environment does not have
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(f"building needs torch >= 2.10 ({error}): run `pip install 'torch>=2.10'`, then install again.")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        fail(f"torch {torch.__version__} is too old: run `pip install --upgrade 'torch>=2.10'`, then install again.")
    return cpp_extension


def switch(name: str) -> str:
    """An environment variable: "0", "1", or "" for the default."""
    value = os.getenv(name, "")
    if value not in ("", "0", "1"):
        fail(f"{name} must be 0 or 1, got {value!r}.")
    return value


def check_compiler() -> None:
    compiler = shlex.split(os.getenv("CXX", "c++"))
    cure = "install g++ 11 or newer (Debian, Ubuntu: `apt-get install g++`) or set CXX to one."
    if shutil.which(compiler[0]) is None:
        fail(f"no C++ compiler ({compiler[0]} is not on the PATH): {cure}")
    # The newest that the kernels ask of the compiler: C++17; the AVX-512 bfloat16 instructions, on x86 only.
    newest = '#if defined(__x86_64__)\n#pragma GCC target("avx512bf16")\n#include <immintrin.h>\n#endif\n'
    # And of its assembler: AMX, on Linux.
    newest += '#if defined(__x86_64__) && defined(__linux__)\nvoid end() { asm volatile("tilerelease"); }\n#endif\n'
    flags = ["-std=c++17", "-x", "c++", "-c", "-o", os.devnull, "-"]
    if subprocess.run([*compiler, *flags], input=newest, text=True, capture_output=True).returncode != 0:
        fail(f"{shlex.join(compiler)} does not compile C++17 for this machine's instruction sets: {cure}")


def cuda_home() -> Path:
    """Where the CUDA toolkit should be.  A wrapper script called nvcc is not enough: the headers must be there too."""
    if named := os.getenv("CUDA_HOME") or os.getenv("CUDA_PATH"):
        return Path(named)
    nvcc = shutil.which("nvcc")
    beside = nvcc and Path(nvcc).resolve().parents[1]
    return beside if beside and (beside / "include" / "cuda_runtime.h").exists() else Path("/usr/local/cuda")


def cuda_toolkit() -> tuple[Path, tuple[int, int]] | None:
    """(root, version) of the CUDA toolkit; None to build for the CPU only."""
    wanted = switch("CONSISTENCY_OPS_CUDA")
    if wanted == "0":
        return None
    home = cuda_home()
    headers = (home / "include" / "cuda_runtime.h").exists()
    if not headers:
        problem = f"there is no CUDA toolkit with headers in {home}: install one and set CUDA_HOME to its root"
    else:
        try:
            nvcc = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True)
            release = tuple(map(int, re.search(r"release (\d+)\.(\d+)", nvcc.stdout).groups()))
        except (OSError, subprocess.CalledProcessError, AttributeError) as error:
            problem = f"{home}/bin/nvcc does not run ({error}): set CUDA_HOME to the root of a working toolkit"
        else:
            if release >= TOOLKIT_MIN:
                return home, release
            older = ".".join(map(str, release))
            problem = f"the CUDA toolkit in {home} is {older}: set CUDA_HOME to one that is 12.1 or newer"
    if wanted == "1":
        fail(f"CONSISTENCY_OPS_CUDA=1, but {problem}, or set CONSISTENCY_OPS_CUDA=0 to build for the CPU only.")
    print(f"consistency_ops: building without CUDA kernels: {problem}.", file=sys.stderr)
    return None


HIDDEN = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]


def torch_include(cpp_extension) -> Path:
    return Path(cpp_extension.__file__).parents[1] / "include"


def prefix_maps(cpp_extension) -> list[str]:
    """Messages show csrc/..., not the build machine's paths.  The last map that fits counts."""
    return [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_include(cpp_extension)}/="]


def torch_abi_extension(cpp_extension) -> Extension:
    """csrc/torch_abi.  Its name says which torch may load it, its digest which Python files (ops/library.py)."""
    import torch

    sources = sorted(ROOT.glob("csrc/torch_abi/*.cpp"))
    files = [*sources, *sorted(ROOT.glob("csrc/torch_abi/*.h"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return cpp_extension.CppExtension(
        "consistency_ops._torch_abi_" + re.sub(r"\W", "_", torch.__version__),
        [str(path.relative_to(ROOT)) for path in sources],
        define_macros=[("CONSISTENCY_OPS_DIGEST", f'"{digest}"')],
        include_dirs=[str(ROOT / "csrc" / "include"), str(ROOT / "csrc")],
        extra_compile_args=[
            *("-O2", *HIDDEN, "-Wall", "-Wextra", "-g0", *prefix_maps(cpp_extension)),
            *("-isystem", str(torch_include(cpp_extension))),
        ],
    )


def configure(extension: Extension, cpp_extension) -> Extension:
    """The extension with sources, flags and torch's paths; called only when something is compiled."""
    common = ["-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags = [line for line in (ROOT / "csrc" / "flags.txt").read_text().splitlines() if line.startswith("-")]
    warnings = ["-Wall", "-Wextra", "-isystem", str(torch_include(cpp_extension))]  # in our code, not in torch's
    args = {"cxx": [*common, *HIDDEN, *flags, *warnings, *prefix_maps(cpp_extension), "-g0"]}
    sources = [path for room in ("bindings", "c_api", "cpu") for path in ROOT.glob(f"csrc/{room}/*.cpp")]
    link: dict[str, list[str]] = {"include_dirs": [str(ROOT / "csrc" / "include"), str(ROOT / "csrc")]}

    kernels = [
        path for glob in ("cuda/*.cu", "cuda/precondition/*.cpp", "c_api/*.cu") for path in ROOT.glob(f"csrc/{glob}")
    ]
    if (toolkit := cuda_toolkit()) and kernels:
        home, release = toolkit
        # The stable ABI needs neither c10_cuda nor torch_cuda, so CppExtension does: torch itself may be a CPU build.
        cpp_extension.CUDA_HOME = str(home)
        archs = os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST", ";".join(a for a, first in ARCHS.items() if release >= first)
        )
        sources += kernels
        define = ["-DUSE_CUDA", f'-DCONSISTENCY_OPS_CUDA_ARCHS="{archs}"']
        host = [f"-Xcompiler={flag}" for flag in (*HIDDEN, *prefix_maps(cpp_extension))]
        args["cxx"] += define
        # torch switches the operators of half and bfloat16 off.  (NVCC_APPEND_FLAGS=-lineinfo for a profiler.)
        undo = [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
        # The longest file takes most of the build, once an architecture: two of them at a time.
        args["nvcc"] = ["-O3", "--threads=2", *common, *define, *undo, "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", *host]
        link["include_dirs"] += [str(home / "include")]
        link["library_dirs"] = [str(home / folder) for folder in ("lib64", "lib")]
        link["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
    return cpp_extension.CppExtension(
        extension.name,
        sorted(str(s.relative_to(ROOT)) for s in sources),
        py_limited_api=True,  # adds -DPy_LIMITED_API and leaves out torch_python
        extra_compile_args=args,
        extra_link_args=[] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"],
        **link,
    )


def drop_interpreter_path(command: build_ext) -> None:
    """Old setuptools link with the interpreter's own flags, which may have its library folder for the run time."""
    for name in ("linker_so", "linker_so_cxx"):
        if words := getattr(command.compiler, name, None):
            setattr(command.compiler, name, [word for word in words if not word.startswith("-Wl,-rpath")])


@contextlib.contextmanager
def one_build_at_a_time():
    """Builds of one checkout share build/: the second waits.  macOS has no flock command, so it is done here."""
    import fcntl

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildExt(build_ext):
    """torch's BuildExtension, imported only when something is really built."""

    def run(self) -> None:
        with one_build_at_a_time():
            self.compile()

    def compile(self) -> None:
        check_compiler()
        cpp_extension = torch_cpp_extension()
        try:
            self.build([configure(e, cpp_extension) for e in self.extensions], cpp_extension)
        except RuntimeError as error:  # torch's word for a compiler that failed, and for a toolkit unlike torch's own
            fail(f"the build failed ({error}): the lines above say where.")
        wanted = switch("CONSISTENCY_OPS_TORCH_ABI")
        for built in Path(self.build_lib, "consistency_ops").glob("_torch_abi_*"):
            built.unlink()  # by an earlier build, perhaps for another torch: it would go into this wheel
        if wanted == "0" or not (ROOT / "csrc" / "torch_abi").is_dir():
            return
        try:
            self.build([torch_abi_extension(cpp_extension)], cpp_extension)
        except RuntimeError as error:
            if wanted == "1":
                fail(f"csrc/torch_abi does not build with this torch ({error}): set CONSISTENCY_OPS_TORCH_ABI=0.")
            print(
                "consistency_ops: without csrc/torch_abi, which this torch does not build; small layers and calls take "
                "some microseconds more.",
                file=sys.stderr,
            )

    def build(self, extensions: list[Extension], cpp_extension) -> None:
        self.distribution.ext_modules = extensions

        class Command(cpp_extension.BuildExtension):
            def build_extensions(self) -> None:
                drop_interpreter_path(self)
                super().build_extensions()

        command = Command(self.distribution)
        for name in ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "parallel"):
            setattr(command, name, getattr(self, name))
        command.ensure_finalized()
        command.run()


def version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "consistency_ops" / "environment.py").read_text())[1]


def repository() -> str:
    """The address of this repository's web pages, or "": a copy of the code need not have one."""
    address = os.getenv("CONSISTENCY_OPS_REPOSITORY", "")
    if not address and (ROOT / "PKG-INFO").exists():  # a source distribution: its README has links already
        urls = Parser().parsestr((ROOT / "PKG-INFO").read_text()).get_all("Project-URL", [])
        address = next((url.split(", ", 1)[1] for url in urls if url.startswith("Repository, ")), "")
    if not address and (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
        address = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    # https://name:password@host/owner/name.git, git@host:owner/name
    parts = re.fullmatch(r"(?:(?:https|ssh)://)?(?:[^@/]*@)?([\w-]+(?:\.[\w-]+)+)[:/](.+?)(?:\.git)?/?", address)
    return f"https://{parts[1]}/{parts[2]}" if parts else ""


def long_description(address: str) -> str:
    """The README for a package index, which has no other file of ours: links lead to this version in the repository.

    Without an address they become their text, which is better than a dead link.
    """

    def link(match: re.Match) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        folder = "raw" if image else "blob"
        return f"{image}[{text}]({address}/{folder}/v{version()}/{target})" if address else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, (ROOT / "README.md").read_text(encoding="utf-8"))


REPOSITORY = repository()
URLS = {"Repository": "", "Documentation": f"/blob/v{version()}/docs/index.md"}
URLS |= {"Changelog": f"/blob/v{version()}/CHANGELOG.md", "Issues": "/issues"}

setup(  # what is built, which files are shipped, and what depends on the repository; all else is in pyproject.toml
    long_description=long_description(REPOSITORY),
    long_description_content_type="text/markdown",
    project_urls={name: REPOSITORY + path for name, path in URLS.items()} if REPOSITORY else {},
    packages=[*find_packages(include=["consistency_ops", "consistency_ops.*"]), "consistency_ops.csrc"],
    package_dir={"consistency_ops.csrc": "csrc"},  # headers, sources and CMake files for C and C++ users
    package_data={
        "consistency_ops": ["py.typed"],
        "consistency_ops.csrc": [
            *("include/consistency_ops/*.h", "c_api/*", "cpu/*", "cuda/*", "cuda/precondition/*"),
            *("bindings/*", "torch_abi/*", "flags.txt", "CMakeLists.txt", "*.in", "cmake/*"),
        ],
    },
    include_package_data=False,  # of folders that MANIFEST.in names setuptools warns in forty lines each
    ext_modules=[Extension("consistency_ops._C", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if switch("CONSISTENCY_OPS_TORCH_ABI") == "0" else {},
)
