"""What a caller of the functional API can get wrong, as Python exceptions: ``op: what must hold, got value``."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._ops import add_op_namespace_prefix

T = TypeVar("T")

MAX_CHUNK = 256  # of the kernels: kMaxChunk of csrc/include/consistency_ops/types.h
MAX_WIDTH = 16_384  # of a chunk that torch.linalg inverts: 1 GiB of float32
_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_INTEGERS = (int, torch.SymInt)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def type_name(value: object) -> str:
    """Module and name of the type of a value, or the name alone for types of torch and of Python."""
    kind = value if isinstance(value, type) else type(value)
    own = kind.__module__.split(".")[0] in ("torch", "builtins")
    short = kind.__qualname__.rpartition("<locals>.")[2]
    name = short if own else f"{kind.__module__}.{short}"
    return f"the class {name}" if kind is value else name


def shown(value: object) -> str:
    """What a message says of a value that does not fit: a number or a word as it is, of all else the class.

    The ``repr`` of a model or an optimizer has many lines, and that of a tensor its numbers.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    if not isinstance(value, tuple | list | set | frozenset | dict):
        return type_name(value)
    name = type_name(value)
    if len(value) <= 8:
        items = [f"{shown(k)}: {shown(v)}" for k, v in value.items()] if isinstance(value, dict) else map(shown, value)
        text = f"{name} ({', '.join(items)})"
        if len(text) <= 80:
            return text
    return f"{name} of {len(value)}"


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a plain dense tensor of a floating dtype that the operators know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type_name(tensor)}")
    if tensor.dtype not in _FLOATS:
        if tensor.is_complex():
            raise NotImplementedError(f"{op}: {name} must be real, got {tensor.dtype}")
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise NotImplementedError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    if type(tensor) is not Tensor and hasattr(tensor, "to_local"):
        raise NotImplementedError(f"{op}: {name} must be a plain tensor, got {type_name(tensor)}; pass its to_local()")


def check_device(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless all tensors are on one device."""
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(f"{op}: all tensors must be on one device, got {device} and {tensor.device}")


@functools.cache
def has_cuda_kernels() -> bool:
    """Whether the compiled library that runs was built with CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("foreach_precondition_"), "CUDA")


def check_options(
    op: str, damping: float, scaling: str, chunk: int | None, group: int | None, max_rows: int, **seeds: int
) -> None:
    """Raise unless every option of the correction has its type and is in its range; ``seeds`` are any integers."""
    check_integers(op, max_rows=max_rows, **seeds)
    if chunk is not None:
        check_integers(op, chunk=chunk)
        if not 1 <= chunk <= MAX_WIDTH:
            raise ValueError(f"{op}: chunk must be None or in [1, {MAX_WIDTH}], got {chunk}")
    if group is not None:
        check_integers(op, group=group)
        if not 1 <= group <= (MAX_WIDTH if chunk is None else chunk):
            raise ValueError(f"{op}: group must be in [1, chunk = {chunk}], got {group}")
    if max_rows < 1:
        raise ValueError(f"{op}: max_rows must be at least 1, got {max_rows}")
    check_numbers(op, damping=damping)
    if not 0 <= damping < math.inf:
        raise ValueError(f"{op}: damping must be finite and at least 0, got {damping}")
    if scaling not in ("absolute", "trace"):
        raise ValueError(f"{op}: scaling must be 'absolute' or 'trace', got {shown(scaling)}")


def check_widths(op: str, chunk: int | None, units: Iterable[int]) -> None:
    """Raise unless a layer of so many units, the bias included, can be one chunk, where ``chunk`` is ``None``."""
    if chunk is None:
        for of_layer in units:
            if of_layer > MAX_WIDTH:
                raise ValueError(f"{op}: chunk must not be None for a layer above {MAX_WIDTH} units, got {of_layer}")


def check_integers(op: str, **values: int) -> None:
    """Raise unless every value is an integer, under ``torch.compile`` perhaps a symbolic one."""
    for name, value in values.items():
        if not isinstance(value, _INTEGERS):
            raise TypeError(f"{op}: {name} must be an integer, got {shown(value)}")


def check_numbers(op: str, **values: float) -> None:
    """Raise unless every value is a real number, under ``torch.compile`` perhaps a symbolic one."""
    for name, value in values.items():
        if not isinstance(value, _NUMBERS):
            raise TypeError(f"{op}: {name} must be a number, got {shown(value)}")


def check_list(op: str, name: str, values: Iterable[T], count: int | None = None) -> list[T]:
    """Return ``values`` as a list; raise unless they can be one, with an entry for each of the ``count`` layers."""
    # A list, the usual case, needs none of the other questions, which cost half a microsecond.
    if type(values) is not list and (isinstance(values, Tensor) or not isinstance(values, Iterable)):
        raise TypeError(f"{op}: {name} must be a list, got {type_name(values)}")
    values = list(values)
    if count is not None and len(values) != count:
        raise ValueError(f"{op}: {name} must have one entry for each of the {count} layers, got {len(values)}")
    return values


def check_module(op: str, model: nn.Module) -> None:
    """Raise unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type_name(model)}")


def check_names(op: str, name: str, values: str | type[Any] | Iterable[str | type[Any]]) -> tuple[str | type[Any], ...]:
    """Return what chooses layers, one or several names, ``fnmatch`` patterns or types, as a tuple."""
    found: tuple[Any, ...]
    found = (values,) if isinstance(values, str | type) or not isinstance(values, Iterable) else tuple(values)
    for one in found:
        if not isinstance(one, str | type):
            raise TypeError(f"{op}: {name} must be names, patterns or types, got {shown(one)}")
    return found


def check_sizes(op: str, **values: int) -> None:
    """Raise unless every value is an integer of at least 1."""
    check_integers(op, **values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_layer(op: str, grad: Tensor, inputs: Tensor, bias_grad: Tensor | None) -> None:
    """Raise unless the tensors of one layer have dtypes that the operators know, and shapes that fit together."""
    check_tensor(op, "grad", grad)
    check_tensor(op, "inputs", inputs)
    if not 2 <= grad.dim() <= 5:
        raise ValueError(f"{op}: grad must have 2 to 5 dimensions, got shape {tuple(grad.shape)}")
    if grad.dim() == 2:
        fits = inputs.dim() >= 1 and inputs.shape[-1] == grad.shape[1]
    else:
        fits = inputs.dim() in (2, grad.dim())
        units = inputs.shape[1] if fits else 0
        groups = units // grad.shape[1] if grad.shape[1] else 1
        fits = fits and groups * grad.shape[1] == units and groups > 0 and grad.shape[0] % groups == 0
    if not fits:
        wanted = "(..., in)" if grad.dim() == 2 else "(N, in, *spatial)"
        raise ValueError(
            f"{op}: inputs must be {wanted} with the units of grad, got inputs {tuple(inputs.shape)} "
            f"and grad {tuple(grad.shape)}"
        )
    if bias_grad is not None:
        check_tensor(op, "bias_grad", bias_grad)
        if bias_grad.shape != grad.shape[:1]:
            raise ValueError(
                f"{op}: bias_grad must be ({grad.shape[0]},) for grad {tuple(grad.shape)}, got {tuple(bias_grad.shape)}"
            )


def check_permutation(op: str, permutation: Tensor, units: int) -> Tensor:
    """Return ``permutation`` as the operators want it, int64 and contiguous; raise unless it is one of the units.

    On CUDA its values are checked on the device, without waiting: a wrong one ends the process later.
    """
    if not isinstance(permutation, Tensor) or permutation.dtype not in (torch.int64, torch.int32):
        kind = permutation.dtype if isinstance(permutation, Tensor) else type_name(permutation)
        raise TypeError(f"{op}: permutation must be an int64 or int32 tensor, got {kind}")
    if permutation.shape != (units,):
        raise ValueError(f"{op}: permutation must have shape ({units},), got {tuple(permutation.shape)}")
    message = f"{op}: permutation must be a bijection of the {units} units"
    expected = torch.arange(units, device=permutation.device, dtype=permutation.dtype)
    if permutation.is_cuda:  # asserted on the device: the host does not wait, and a graph can be captured
        torch._assert_async((permutation.sort().values == expected).all(), message)
    elif not torch.equal(permutation.sort().values, expected):
        raise ValueError(message)
    return permutation.to(torch.int64).contiguous()


def check_row_counts(op: str, row_counts: list[Tensor]) -> None:
    """Raise unless every count is a one-element int64 tensor."""
    for count in row_counts:
        if not isinstance(count, Tensor) or count.dtype != torch.int64 or count.numel() != 1:
            got = f"{count.dtype} {tuple(count.shape)}" if isinstance(count, Tensor) else type_name(count)
            raise TypeError(f"{op}: row_counts must be one-element int64 tensors, got {got}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte that a tensor may touch, and of the one behind the last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (span + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two different indices of a strided tensor name the same element."""
    reach = 0  # furthest element of the dimensions so far, the smallest strides first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += (size - 1) * stride
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    distinct: Tensor = offsets.unique()  # type: ignore[no-untyped-call]  # torch does not annotate unique
    return distinct.numel() < tensor.numel()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of overlapping extents have a byte in common; interleaved views may not."""
    begin, end = min(a.data_ptr(), b.data_ptr()), max(_extent(a)[1], _extent(b)[1])
    touched = torch.zeros(end - begin, dtype=torch.uint8, device="cpu")
    for tensor in (a, b):
        width = tensor.element_size()
        strides = [*(stride * width for stride in tensor.stride()), 1]
        touched.as_strided((*tensor.shape, width), strides, tensor.data_ptr() - begin).add_(1)
    return bool((touched > 1).any())


def check_overlap(op: str, written: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Raise if tensors that will be ``written`` overlap; return the inputs, copied where they overlap one of those."""
    for tensor in written:
        if not tensor.is_contiguous() and _overlaps_itself(tensor):
            raise RuntimeError(
                f"{op}: gradients must not overlap, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    extents = sorted(((*_extent(t), i) for i, t in enumerate(written) if t.numel()), key=lambda e: e[:2])
    reach, widest = -1, -1
    overlapping = False
    for begin, end, i in extents:
        if begin < reach:
            overlapping = True
            if _share_elements(written[widest], written[i]):
                raise RuntimeError(f"{op}: gradients must not overlap")
        if end > reach:
            reach, widest = end, i
    if overlapping:  # more than neighbours may be interleaved
        for n, (begin, end, i) in enumerate(extents):
            for other_begin, _, j in extents[n + 1 :]:
                if begin <= other_begin < end and _share_elements(written[i], written[j]):
                    raise RuntimeError(f"{op}: gradients must not overlap")
    lowest, highest = (extents[0][0], reach) if extents else (0, 0)
    safe = []
    for x in inputs:
        begin, end = _extent(x) if x.numel() else (0, 0)
        if begin < highest and end > lowest and any(begin < e and end > b for b, e, _ in extents):
            x = x.clone()
        safe.append(x)
    return safe


def is_real(tensor: Tensor) -> bool:
    """Whether ``tensor`` has memory; one that is traced, fake or on ``meta`` has none."""
    return not torch.compiler.is_compiling() and tensor.device.type not in ("meta", "xla") and not _is_fake(tensor)


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter) and isinstance(tensor, torch._subclasses.FakeTensor)
