"""What computes behind the operators: the library's kernels, or torch's own operations (``portable.py``).

The portable operators are the default kernels, so a device for which the library has none gets them from torch's
dispatcher.  Where it has kernels, nothing stands in their way, with two exceptions.  ``set_backend("torch")`` puts the
portable operators before them.  And on CUDA a gate stands before them until a few small problems have shown, once a
process, that they compute on this device what the portable operators do: after that it is gone, and a call costs what
it cost without it.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from .._ops import add_op_namespace_prefix, ops
from . import portable, portable_capture, portable_elementwise, portable_memory, portable_scan, portable_whitening
from .checks import MAX_CHUNK, shown
from .library import build_config, torch_abi
from .registration import NAMESPACE, PORTABLE_NAMESPACE, portable_ops

Backend = Literal["auto", "native", "torch"]
_BACKENDS = ("auto", "native", "torch")
_KEYS = ("CPU", "CUDA")  # dispatch keys that the library may have kernels for
_OLDEST = (8, 0)  # compute capability that the CUDA kernels are written for
_NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # of Linux and of WSL 2; an import does not start CUDA to find one
NO_CUDA_KERNELS = (
    "this build of consistency_ops has no CUDA kernels: no CUDA toolkit (nvcc) was found when it was built, or "
    "CONSISTENCY_OPS_CUDA=0 was set; on a GPU torch's own operations compute, slower. For kernels on an NVIDIA GPU "
    "install it again with CUDA_HOME set to a toolkit of 12.1 or newer"
)
_log = logging.getLogger("consistency_ops")
_SAME_WITH_TORCH = 'consistency_ops.set_backend("torch") or CONSISTENCY_OPS_BACKEND=torch'

PORTABLE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        portable.foreach_precondition_,
        portable.foreach_covariance,
        portable.foreach_inverse,
        portable.foreach_apply_,
        portable.foreach_correct_,
        portable_whitening.foreach_whiten_,
        portable_whitening.foreach_whiten_by_,
        portable_whitening.foreach_unwhiten_,
        portable_capture.capture_rows_,
        portable_capture.capture_mark_,
        portable_elementwise.modulus,
        portable_elementwise.modulus_forward,
        portable_elementwise.modulus_backward,
        portable_elementwise.modulus_complex_backward,
        portable_elementwise.batch_rms_norm_denominator_,
        portable_elementwise.batch_rms_norm_denominator,
        portable_elementwise.batch_rms_norm_divide,
        portable_scan.roa_scan,
        portable_scan.roa_scan_backward,
        reference.spd_inverse,
        reference.spd_solve,
    )
}


# torch does not annotate its class; what is made of it is used as it is.
_new_library: Callable[..., Any] = torch.library.Library


def kernel(name: str) -> Callable[..., Any]:
    """The portable operator ``name`` as a kernel: below autograd and autocast, as the compiled ones are."""
    function = PORTABLE[name]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                raise _with_a_cure(name, error, args) from error

    return run


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator had not enough: those of GPUs have a type for it, that of the CPU has not."""
    return any(part in str(error) for part in ("out of memory", "allocate memory"))


def _with_a_cure(name: str, error: RuntimeError, args: tuple[Any, ...]) -> RuntimeError:
    """The error of an allocator as one that says which operator had no memory for how much; others as they are."""
    text = str(error)
    if "MiB of workspace" in text or not is_out_of_memory(error):
        return error
    needed = portable_memory.workspace_bytes(name, args)
    if needed is None:
        return torch.OutOfMemoryError(f"{name}: out of memory ({text.splitlines()[0]})")
    return torch.OutOfMemoryError(
        f"{name}: out of memory: the call needs about {needed / 2**20:.0f} MiB of workspace; a smaller chunk, fewer "
        f"max_rows, smaller batches or fewer layers a call need less ({text.splitlines()[0]})"
    )


def _first_tensor(values: Any) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and (found := _first_tensor(value)) is not None:
            return found
    return None


def _default(name: str) -> Callable[..., Any]:
    run = kernel(name)

    @functools.wraps(run)
    def refuse_or_run(*args: Any, **kwargs: Any) -> Any:
        if _backend == "native":
            tensor = _first_tensor(args)
            raise NotImplementedError(
                f"{name}: this build has no kernels for {tensor.device.type if tensor is not None else 'this device'}, "
                'and the backend is "native"; ' + cure_for_missing_kernels(tensor)
            )
        return run(*args, **kwargs)

    return refuse_or_run


def cure_for_missing_kernels(tensor: Tensor | None) -> str:
    torch_way = 'consistency_ops.set_backend("auto") computes with torch\'s own operations'
    if tensor is not None and tensor.device.type == "cuda":
        return f"{torch_way}, or build again where nvcc is found (CUDA_HOME)"
    return torch_way


# Registration

_library = _new_library(NAMESPACE, "IMPL")
for _name in PORTABLE:
    _library.impl(_name, _default(_name), "CompositeExplicitAutograd")

_portable_library = _new_library(PORTABLE_NAMESPACE, "DEF")
for _name in PORTABLE:
    if _name.startswith(("foreach_", "spd_")):
        _schema = str(getattr(ops, _name).default._schema)
        _portable_library.define(_schema.removeprefix(f"{NAMESPACE}::"))
        _portable_library.impl(_name, kernel(_name), "CompositeExplicitAutograd")


@functools.cache
def has_kernels(key: str) -> bool:
    """Whether the compiled library that runs has kernels for a dispatch key, ``"CPU"`` or ``"CUDA"``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("foreach_precondition_"), key))


for _key in _KEYS:
    has_kernels(_key)  # before anything stands in front of them

_backend: str = "auto"
_before: dict[str, Any] = {}  # by key: what stands before the library's kernels
_undecided: set[str] = set()  # keys before whose kernels the gate stands
_kept_alive: list[object] = []  # kernels that were taken away, perhaps while they ran
_turn = threading.RLock()


def differences_of(device: torch.device) -> list[str]:
    """``verification.differences``, which takes this place: it is made of the operators."""
    raise NotImplementedError


def _put_before(key: str, make: Callable[[str], Callable[..., Any]]) -> None:
    _take_away(key)
    library = _new_library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that a kernel is overridden: that is the purpose
        for name in PORTABLE:
            library.impl(name, make(name), key, allow_override=True)
    _before[key] = library
    _tell_torch_abi(key)


def _put_gate(key: str) -> None:
    _put_before(key, lambda name: _gated(name, key))
    _undecided.add(key)


def _take_away(key: str) -> None:
    _undecided.discard(key)
    if (library := _before.pop(key, None)) is not None:
        _kept_alive.extend(torch.library.get_kernel(add_op_namespace_prefix(name), key) for name in PORTABLE)
        library._destroy()
    _tell_torch_abi(key)


def _tell_torch_abi(key: str) -> None:
    """csrc/torch_abi calls the kernels of the CPU past torch's dispatcher: not while something stands before them."""
    if key == "CPU" and torch_abi is not None:
        torch_abi.use_host_path(key not in _before)


def set_backend(name: Backend) -> None:
    """Choose what computes behind every operator of this process, from now on.

    Args:
        name: ``"auto"``, the default: the library's kernels where it has some for the device, else torch's own
            operations.  On CUDA the kernels must first agree with the latter on a few small problems, once a process;
            if they do not, or cannot be launched, the log says so once and torch's operations take over.
            ``"native"``: the kernels, unchecked; NotImplementedError on a device for which there are none.
            ``"torch"``: torch's own operations on every device.  The environment variable ``CONSISTENCY_OPS_BACKEND``
            says the same at import.

    Raises:
        ValueError: another name.
    """
    global _backend
    if name not in _BACKENDS:
        raise ValueError(f"set_backend: name must be 'auto', 'native' or 'torch', got {shown(name)}")
    with _turn:
        _backend = name
        for key in _KEYS:
            if not has_kernels(key):
                continue
            if name == "torch":
                _put_before(key, kernel)
            elif name == "auto" and key == "CUDA":
                _put_gate(key)
            else:
                _take_away(key)


# The gate


def _gated(name: str, key: str = "CUDA") -> Callable[..., Any]:
    run = kernel(name)
    operator = getattr(ops, name).default

    @functools.wraps(run)
    def decide_or_run(*args: Any, **kwargs: Any) -> Any:
        tensor = _first_tensor(args)
        if tensor is None or _capturing(tensor.device):
            return run(*args, **kwargs)  # what the kernels would compute is not known yet
        with _turn:
            decide(tensor.device, key)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **kwargs)

    return decide_or_run


def settle(device: torch.device) -> None:
    """Let the gate decide now, if it has not: a ``Preconditioner`` asks, since a CUDA graph may capture its first step.

    Under a graph's capture nothing is checked, and torch's operations would be in the graph for good.
    """
    key = device.type.upper()
    if key in _undecided and not _capturing(device) and (key != "CUDA" or torch.cuda.is_available()):
        with _turn:
            decide(device, key)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def decide(device: torch.device, key: str = "CUDA") -> None:
    """Let the kernels of this device compute from now on, or, if they do not agree, torch's operations."""
    if key not in _before:  # another thread was faster
        return
    _take_away(key)
    reason = unfit_architecture(device)
    if reason is None:
        try:
            if found := differences_of(device):
                reason = f"the kernels of this build compute something else than torch on {device} ({found[0]})"
        except Exception as error:  # whatever it is, a gradient must not depend on it
            reason = f"the kernels of this build do not run on {device} ({str(error).splitlines()[0]})"
    if reason is not None:
        _put_before(key, kernel)
        _log.warning(
            "%s; torch's own operations take their place, slower. `python -m consistency_ops verify` tells more, "
            '%s says that it is meant so, set_backend("native") uses the kernels nevertheless',
            reason,
            _SAME_WITH_TORCH,
        )


def unfit_architecture(device: torch.device) -> str | None:
    """Why this build has no code for a CUDA device, in a sentence, or None."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    compiled = build_config().get("cuda_archs", "")
    return missing_architecture(major, minor, [text for text in compiled.replace(" ", ";").split(";") if text])


def missing_architecture(major: int, minor: int, compiled: list[str]) -> str | None:
    """Whether code for ``compiled``, such as ``["8.0", "9.0a", "12.0+PTX"]``, runs on compute capability major.minor.

    Code for x.y runs on x.z with z >= y; with an architecture-specific ``a`` on x.y alone; PTX on everything newer.
    """
    for text in compiled:
        base = text.removesuffix("+PTX")
        x, y = (int(part) for part in base.rstrip("af").split("."))
        if (x, y) == (major, minor) or (base[-1].isdigit() and x == major and y <= minor):
            return None
        if text.endswith("+PTX") and (x, y) <= (major, minor):
            return None
    if (major, minor) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"the device is of compute capability {major}.{minor}, and the kernels need {oldest} or newer"
    return (
        f"this build has CUDA code for {', '.join(compiled) or 'no architecture'} and the device is of compute "
        f"capability {major}.{minor}: build again with TORCH_CUDA_ARCH_LIST={major}.{minor} for kernels"
    )


_NATIVE, _WIDE = (
    {name: getattr(space, name).default for name in PORTABLE if name.startswith(("foreach_", "spd_"))}
    for space in (ops, portable_ops)
)


def call(name: str, chunk: int, tensors: Sequence[Tensor], *args: Any, cuda_kernel: bool = True) -> Any:
    """Call operator ``name`` of the correction for chunks of ``chunk`` units; 0: whole layers.

    The kernels know chunks of up to ``MAX_CHUNK`` units, and on CUDA no float64 among ``tensors``: whatever is beyond
    goes to the portable operator, on every device and with every backend. ``cuda_kernel=False``: there is none on CUDA
    for these ``args``.

    Raises:
        torch.OutOfMemoryError: there was no memory for the workspace, whose size the message says.
    """
    beyond = not 0 < chunk <= MAX_CHUNK
    if tensors[0].is_cuda:
        beyond = beyond or not cuda_kernel or any(t.dtype == torch.float64 for t in tensors)
    try:
        return (_WIDE if beyond else _NATIVE)[name](*args)
    except RuntimeError as error:
        raise _with_a_cure(name, error, args) from None


def _say_that_there_are_no_cuda_kernels() -> None:
    """Once, when the package is imported: a warning only where there is a GPU that they would serve."""
    gpu = torch.version.cuda is not None and any(map(os.path.exists, _NVIDIA_DEVICES))
    _log.log(logging.WARNING if gpu else logging.INFO, "%s", NO_CUDA_KERNELS)


_chosen: Any = os.environ.get("CONSISTENCY_OPS_BACKEND", "auto") or "auto"
if _chosen not in _BACKENDS:
    raise ImportError(f"CONSISTENCY_OPS_BACKEND must be 'auto', 'native' or 'torch', got {_chosen!r}")
if not has_kernels("CUDA"):
    _say_that_there_are_no_cuda_kernels()
if _chosen != "auto" or has_kernels("CUDA"):
    set_backend(_chosen)
