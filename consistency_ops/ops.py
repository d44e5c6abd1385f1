"""The functional API: the correction of arXiv 1708.00631 for one layer, for all layers, and stage by stage.

Checks that a user can trip are here, as Python exceptions; the compiled operators (``torch.ops.consistency_ops``) check
what memory safety needs and compute.  None of these functions is differentiable: they work on gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from consistency_ops import _library  # noqa: F401  (loading registers the operators)
from consistency_ops.batch_rms_norm import batch_rms_norm
from consistency_ops.modulus import modulus

__all__ = [
    "batch_rms_norm",
    "chunked_covariance",
    "foreach_apply_",
    "foreach_covariance",
    "foreach_inverse",
    "foreach_precondition_",
    "modulus",
    "precondition",
    "precondition_ex",
]

Scaling = Literal["absolute", "trace"]
MAX_CHUNK = 256  # kMaxChunk of csrc/include/consistency_ops/types.h
_SECTOR = 32  # bytes: the unit in which GPUs move memory; the default group is one sector of the gradient
_FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


# Checks


def _check_tensor(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        if tensor.is_complex():
            raise NotImplementedError(f"{op}: {name} must be real, got {tensor.dtype}")
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise NotImplementedError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    if hasattr(tensor, "to_local"):
        raise NotImplementedError(
            f"{op}: {name} must be a plain tensor, got {type(tensor).__name__}; pass its to_local()"
        )


def _check_device(op: str, tensors: Sequence[Tensor]) -> None:
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(f"{op}: all tensors must be on one device, got {device} and {tensor.device}")
    if device.type not in ("cpu", "meta"):
        raise NotImplementedError(f"{op}: this build has kernels for the CPU only, got a tensor on {device}")


def _check_options(op: str, damping: float, scaling: str, chunk: int, group: int | None, max_rows: int) -> None:
    _check_chunk(op, chunk, group, max_rows)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"{op}: damping must be finite and at least 0, got {damping}")
    if scaling not in ("absolute", "trace"):
        raise ValueError(f"{op}: scaling must be 'absolute' or 'trace', got {scaling!r}")


def _check_integers(op: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}")


def _check_chunk(op: str, chunk: int, group: int | None, max_rows: int = 1) -> None:
    _check_integers(op, chunk=chunk, group=group, max_rows=max_rows)
    if not 1 <= chunk <= MAX_CHUNK:
        raise ValueError(f"{op}: chunk must be in [1, {MAX_CHUNK}], got {chunk}")
    if group is not None and not 1 <= group <= chunk:
        raise ValueError(f"{op}: group must be in [1, chunk = {chunk}], got {group}")
    if max_rows < 1:
        raise ValueError(f"{op}: max_rows must be at least 1, got {max_rows}")


def _check_layer(op: str, grad: Tensor, inputs: Tensor, bias_grad: Tensor | None) -> int:
    """Shapes of one layer; returns the number of convolution groups."""
    _check_tensor(op, "grad", grad)
    _check_tensor(op, "inputs", inputs)
    if not 2 <= grad.dim() <= 5:
        raise ValueError(f"{op}: grad must have 2 to 5 dimensions, got shape {tuple(grad.shape)}")
    if grad.dim() == 2:
        fits, groups = inputs.dim() >= 1 and inputs.shape[-1] == grad.shape[1], 1
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
        _check_tensor(op, "bias_grad", bias_grad)
        if bias_grad.shape != grad.shape[:1]:
            raise ValueError(
                f"{op}: bias_grad must be ({grad.shape[0]},) for grad {tuple(grad.shape)}, got {tuple(bias_grad.shape)}"
            )
    return groups


def _check_permutation(op: str, permutation: Tensor, units: int) -> Tensor:
    if not isinstance(permutation, Tensor) or permutation.dtype not in (torch.int64, torch.int32):
        kind = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"{op}: permutation must be an int64 or int32 tensor, got {kind}")
    if permutation.shape != (units,):
        raise ValueError(f"{op}: permutation must have shape ({units},), got {tuple(permutation.shape)}")
    if not torch.equal(
        permutation.sort().values, torch.arange(units, device=permutation.device, dtype=permutation.dtype)
    ):
        raise ValueError(f"{op}: permutation must be a bijection of the {units} units")
    return permutation.to(torch.int64).contiguous()


def _check_row_counts(op: str, row_counts: list[Tensor]) -> None:
    for count in row_counts:
        if not isinstance(count, Tensor) or count.dtype != torch.int64 or count.numel() != 1:
            raise TypeError(f"{op}: row_counts must be one-element int64 tensors, got {count!r}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last byte that a tensor may touch."""
    begin = tensor.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (span + 1) * tensor.element_size()


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices of a strided tensor name one element."""
    reach = 0  # furthest element of the dimensions so far, the smallest strides first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += (size - 1) * stride
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.unique().numel() < tensor.numel()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of overlapping extents have a byte in common; interleaved views may not."""
    begin, end = min(a.data_ptr(), b.data_ptr()), max(_extent(a)[1], _extent(b)[1])
    touched = torch.zeros(end - begin, dtype=torch.uint8)
    for tensor in (a, b):
        width = tensor.element_size()
        strides = [*(stride * width for stride in tensor.stride()), 1]
        touched.as_strided((*tensor.shape, width), strides, tensor.data_ptr() - begin).add_(1)
    return bool((touched > 1).any())


def _check_overlap(op: str, written: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Refuses gradients that overlap; returns the inputs, those that alias a gradient copied."""
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


def _default_group(dtype: torch.dtype, chunk: int) -> int:
    return min(_SECTOR // dtype.itemsize, chunk)


def _signed(seed: int) -> int:
    return (int(seed) + 2**63) % 2**64 - 2**63


def _dense(entries: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
    """The entries that are there, and the layers they belong to: the form that operator schemas can carry."""
    if entries is None:
        return [], []
    present = [(entry, i) for i, entry in enumerate(entries) if entry is not None]
    return [entry for entry, _ in present], [i for _, i in present]


def _is_real(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and not _is_fake(tensor)


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, torch.nn.Parameter) and isinstance(tensor, torch._subclasses.FakeTensor)


# The correction


def foreach_precondition_(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
    return_damping: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Correct the gradients of all layers in place, in one call: ``G[:, c] <- G[:, c] (X_c^T X_c / n + damping I)^-1``.

    Args are those of :func:`precondition`, one entry a layer.  ``bias_grads``, ``permutation`` and ``row_counts`` may
    have ``None`` for some layers.

    Args:
        layers: third argument of the random division, next to ``seed`` and ``step``; default: the position in the list.
        row_counts: one-element int64 tensors; only so many leading rows of that input are used.
        return_damping: also return the damping used.

    Returns:
        ``info``, int32, one entry a chunk in the order of the layers (and of the groups of a convolution): 0, or the
        order of the leading minor that was not positive definite when the chunk was given up and its gradient left
        unchanged. With ``return_damping``: ``(info, damping_used)``.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: shapes, ranges, dtypes, devices, overlapping
            gradients; nothing has been changed then.
    """
    return _foreach_precondition_(
        "foreach_precondition_",
        grads,
        inputs,
        bias_grads,
        damping,
        scaling,
        chunk,
        group,
        max_rows,
        permutation,
        seed,
        step,
        layers,
        row_counts,
        return_damping,
    )


def _foreach_precondition_(
    op: str,
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    bias_grads: Sequence[Tensor | None] | None,
    damping: float,
    scaling: str,
    chunk: int,
    group: int | None,
    max_rows: int,
    permutations: Sequence[Tensor | None] | None,
    seed: int,
    step: int,
    layers: Sequence[int] | None,
    row_counts: Sequence[Tensor | None] | None,
    return_damping: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_options(op, damping, scaling, chunk, group, max_rows)
    _check_integers(op, seed=seed, step=step)
    grads, inputs = list(grads), list(inputs)
    for name, entries in (
        ("inputs", inputs),
        ("bias_grads", bias_grads),
        ("permutation", permutations),
        ("row_counts", row_counts),
        ("layers", layers),
    ):
        if entries is not None and len(entries) != len(grads):
            raise ValueError(f"{op}: {name} must have one entry for each of the {len(grads)} grads, got {len(entries)}")
    if not grads:
        empty = torch.empty(0, dtype=torch.int32)
        return (empty, empty.float()) if return_damping else empty
    for i, grad in enumerate(grads):
        _check_layer(op, grad, inputs[i], bias_grads[i] if bias_grads is not None else None)
    biases, bias_layers = _dense(bias_grads)
    counts, count_layers = _dense(row_counts)
    _check_row_counts(op, counts)
    _check_device(op, [*grads, *inputs, *biases, *counts])
    if permutations is not None:
        has_bias = set(bias_layers)
        permutations = [
            None if p is None else _check_permutation(op, p, grads[i].shape[1] + (i in has_bias))
            for i, p in enumerate(permutations)
        ]
    orders, order_layers = _dense(permutations)
    if _is_real(grads[0]):
        inputs = _check_overlap(op, [*grads, *biases], inputs)
    groups = [_default_group(g.dtype, chunk) if group is None else group for g in grads]
    with torch.no_grad():
        info, used = torch.ops.consistency_ops.foreach_precondition_(
            grads,
            biases,
            inputs,
            orders,
            counts,
            bias_layers,
            order_layers,
            count_layers,
            list(range(len(grads))) if layers is None else list(layers),
            groups,
            float(damping),
            scaling == "trace",
            chunk,
            max_rows,
            _signed(seed),
            _signed(step),
        )
    return (info, used) if return_damping else info


def precondition_ex(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    """:func:`precondition`, and what became of every chunk.

    Returns:
        ``(corrected, info, damping_used)``.  ``info``: int32, (chunks,): 0, or the order of the leading minor of the
        damped chunk that is not positive definite, as in ``torch.linalg.cholesky_ex``, when the chunk was given up.
        ``damping_used``: float32, (chunks,): ``damping``, or 10 or 100 times that where the factorisation had failed.
        With ``bias_grad``, ``corrected`` is ``(corrected, corrected_bias)``.
    """
    return _precondition(
        "precondition_ex", grad, inputs, damping, scaling, chunk, group, max_rows, permutation, seed, step, bias_grad
    )


def _precondition(
    op: str,
    grad: Tensor,
    inputs: Tensor,
    damping: float,
    scaling: str,
    chunk: int,
    group: int | None,
    max_rows: int,
    permutation: Tensor | None,
    seed: int,
    step: int,
    bias_grad: Tensor | None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
    _check_options(op, damping, scaling, chunk, group, max_rows)
    _check_layer(op, grad, inputs, bias_grad)
    corrected = grad.detach().clone()
    bias = None if bias_grad is None else bias_grad.detach().clone()
    info, used = _foreach_precondition_(
        op,
        [corrected],
        [inputs],
        None if bias is None else [bias],
        damping,
        scaling,
        chunk,
        group,
        max_rows,
        None if permutation is None else [permutation],
        seed,
        step,
        None,
        None,
        True,
    )
    return (corrected if bias is None else (corrected, bias)), info, used


def precondition(
    grad: Tensor,
    inputs: Tensor,
    *,
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    bias_grad: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second-order correction of one layer: ``G[:, c] (X_c^T X_c / n + damping I)^-1`` for every chunk c of units.

    The normal equations of the layer's local linear model (arXiv 1708.00631; METHOD 1.2-1.7): the gradient is
    multiplied from the right by the inverse damped second moment of the layer's input, on a uniform subsample of the
    rows and a random division of the units.

    Args:
        grad: weight gradient, (out, in), or (out, in / groups, *kernel) of a convolution with up to three kernel
            dimensions.  float32, float64, bfloat16 or float16; any strides.
        inputs: what the layer saw, (..., in), or (N, in, *spatial) in any memory format, or (rows, in).  Every leading
            or spatial position is a row; of a convolution, units are input channels and every tap and output is a row
            of grad. May differ from ``grad`` in dtype.  Sums are float32, or float64 if either is float64.
        damping: lambda, at least 0.
        scaling: ``"absolute"``: ``A + damping I`` (the paper).  ``"trace"``: ``A / tau + damping I`` with
            ``tau = trace(A) / units`` of the layer (of each group of a convolution), which keeps the corrected
            gradient on the scale of the gradient.
        chunk: largest number of units that are inverted together, 1 to 256.  There are ``ceil(units / chunk)`` chunks,
            equal within one unit.
        group: consecutive units that are dealt to chunks together, 1 to ``chunk``; 1 is the exact division of the
            paper.
            Default: one 32-byte sector of ``grad`` (8 for float32), or ``chunk`` if that is smaller.
        max_rows: at most so many rows enter the second moment, every ``ceil(rows / max_rows)``-th after a random
            offset.
        permutation: int64, (units,), or (units + 1,) with ``bias_grad``: deals these units in this order instead of
            drawing a division.
        seed, step: decide the division and the offset of the rows; the layer counts as position 0 of
            :func:`foreach_precondition_`.
        bias_grad: (out,); the bias is one more unit, with input 1, and the last index.  With several taps each
            corrects a copy, and the copies are averaged (METHOD 1.5).

    Returns:
        The corrected gradient with the shape, dtype and layout of ``grad``; with ``bias_grad`` ``(grad, bias_grad)``.

        It never raises for the values of its data and never writes a NaN that was not in ``grad``: a chunk whose
        factorisation fails is tried again with 10 and 100 times the damping and then left as it was (so are all chunks
        that saw NaN or Inf, or rows so large that their squares overflow, beyond about 1e19 in float32), and so is
        every row of a chunk whose result would not be finite.  No rows: the gradient is returned as it is.

    Raises:
        ValueError: a shape, ``chunk``, ``group``, ``damping``, ``scaling``, ``max_rows`` or ``permutation`` out of
        range. TypeError, NotImplementedError: dtypes that are not floating point; complex, sparse or distributed
        tensors. RuntimeError: tensors on several devices.
    """
    return _precondition(
        "precondition", grad, inputs, damping, scaling, chunk, group, max_rows, permutation, seed, step, bias_grad
    )[0]


def chunked_covariance(
    inputs: Tensor,
    *,
    chunk: int,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """Second moments ``X_c^T X_c / n`` of every chunk of units of ``inputs`` (..., units); the mean is not removed.

    The division, the rows and the defaults are those of :func:`precondition` (``group``: of the dtype of ``inputs``).

    Returns:
        (chunks, chunk, chunk), float32 (float64 for float64), in the order of the division; the tails of chunks
        smaller than ``chunk`` are zero.  No rows: all zero.

    Raises:
        As :func:`precondition`.
    """
    op = "chunked_covariance"
    _check_chunk(op, chunk, group, max_rows)
    _check_tensor(op, "inputs", inputs)
    if inputs.dim() < 1 or inputs.shape[-1] == 0:
        raise ValueError(f"{op}: inputs must be (..., units) with at least one unit, got {tuple(inputs.shape)}")
    _check_device(op, [inputs])
    if permutation is not None:
        permutation = _check_permutation(op, permutation, inputs.shape[-1])
    return foreach_covariance(
        [inputs], chunk=chunk, group=group, max_rows=max_rows, permutation=[permutation], seed=seed, step=step
    )[0]


# The stages, for running averages, reuse of an inverse over several steps, and sums over ranks


def foreach_covariance(
    inputs: Sequence[Tensor],
    *,
    grads: Sequence[Tensor] | None = None,
    bias: Sequence[bool] | None = None,
    chunk: int = 128,
    group: int | None = None,
    max_rows: int = 10_000,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
    row_counts: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """First stage of :func:`foreach_precondition_`: each layer's chunked second moments, undamped.

    Args:
        grads: the gradients that will be corrected; their shapes tell convolutions and their groups, their dtypes the
            default ``group``.  Without them every input is (..., units).
        bias: whether the layer's bias is one more unit.

    Returns:
        A (chunks, chunk, chunk) tensor for each layer, (groups * chunks, chunk, chunk) for a grouped convolution;
        float32, or float64 if any input is float64.
    """
    op = "foreach_covariance"
    _check_chunk(op, chunk, group, max_rows)
    _check_integers(op, seed=seed, step=step)
    inputs = list(inputs)
    if not inputs:
        return []
    for x in inputs:
        _check_tensor(op, "inputs", x)
    dims, units, groups = [], [], []
    for i, x in enumerate(inputs):
        grad = None if grads is None else grads[i]
        conv = grad is not None and grad.dim() > 2 and x.dim() == grad.dim()
        dims.append(1 if conv else x.dim() - 1)
        units.append(x.shape[-1] if grad is None else grad.shape[1])
        groups.append(_default_group((x if grad is None else grad).dtype, chunk) if group is None else group)
    orders, order_layers = _dense(permutation)
    counts, count_layers = _dense(row_counts)
    _check_row_counts(op, counts)
    _check_device(op, [*inputs, *counts])
    with torch.no_grad():
        return torch.ops.consistency_ops.foreach_covariance(
            inputs,
            orders,
            counts,
            order_layers,
            count_layers,
            list(range(len(inputs))) if layers is None else list(layers),
            groups,
            dims,
            units,
            [False] * len(inputs) if bias is None else list(bias),
            chunk,
            max_rows,
            _signed(seed),
            _signed(step),
        )


def foreach_inverse(
    covariances: Sequence[Tensor],
    *,
    units: Sequence[int],
    damping: float = 1.0,
    scaling: Scaling = "absolute",
    chunk: int = 128,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Second stage: ``(A_c + damping I)^-1`` of the results of :func:`foreach_covariance`, or of averages of them.

    Args:
        units: of each layer (of one group of a convolution), with the bias.

    Returns:
        ``(inverses, info, damping_used)``; the inverse of a chunk that was given up is zero.
    """
    op = "foreach_inverse"
    _check_options(op, damping, scaling, chunk, None, 1)
    _check_device(op, list(covariances))
    with torch.no_grad():
        return torch.ops.consistency_ops.foreach_inverse(
            list(covariances), list(units), float(damping), scaling == "trace", chunk
        )


def foreach_apply_(
    grads: Sequence[Tensor],
    inverses: Sequence[Tensor],
    info: Tensor,
    *,
    bias_grads: Sequence[Tensor | None] | None = None,
    chunk: int = 128,
    group: int | None = None,
    permutation: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    layers: Sequence[int] | None = None,
) -> None:
    """Third stage: multiply the gradients in place by the inverses of :func:`foreach_inverse`.

    ``chunk``, ``group``, ``permutation``, ``seed``, ``step`` and ``layers`` must be those of the covariance.  Chunks
    with ``info != 0`` are left alone.
    """
    op = "foreach_apply_"
    _check_chunk(op, chunk, group)
    _check_integers(op, seed=seed, step=step)
    grads = list(grads)
    biases, bias_layers = _dense(bias_grads)
    _check_device(op, [*grads, *biases, *inverses, info])
    orders, order_layers = _dense(permutation)
    if _is_real(grads[0]):
        _check_overlap(op, [*grads, *biases], [])
    groups = [_default_group(g.dtype, chunk) if group is None else group for g in grads]
    with torch.no_grad():
        torch.ops.consistency_ops.foreach_apply_(
            grads,
            biases,
            list(inverses),
            info,
            orders,
            bias_layers,
            order_layers,
            list(range(len(grads))) if layers is None else list(layers),
            groups,
            chunk,
            _signed(seed),
            _signed(step),
        )


# Shapes for tracing


def _chunks(units: int, chunk: int) -> int:
    return -(-units // chunk)


@torch.library.register_fake("consistency_ops::foreach_precondition_")
def _(
    grads,
    bias_grads,
    inputs,
    permutations,
    row_counts,
    bias_layers,
    permutation_layers,
    row_count_layers,
    layers,
    groups,
    damping,
    trace_scaling,
    chunk,
    max_rows,
    seed,
    step,
):
    total = 0
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        conv_groups = x.shape[1] // grad.shape[1] if grad.dim() > 2 else 1
        total = total + conv_groups * _chunks(grad.shape[1] + (i in bias_layers), chunk)
    return grads[0].new_empty(total, dtype=torch.int32), grads[0].new_empty(total, dtype=torch.float32)


@torch.library.register_fake("consistency_ops::foreach_covariance")
def _(
    inputs,
    permutations,
    row_counts,
    permutation_layers,
    row_count_layers,
    layers,
    groups,
    unit_dims,
    units,
    bias,
    chunk,
    max_rows,
    seed,
    step,
):
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [
        x.new_empty(x.shape[dim] // u * _chunks(u + b, chunk), chunk, chunk, dtype=dtype)
        for x, dim, u, b in zip(inputs, unit_dims, units, bias, strict=True)
    ]


@torch.library.register_fake("consistency_ops::foreach_inverse")
def _(covariances, units, damping, trace_scaling, chunk):
    total = sum(c.shape[0] for c in covariances)
    first = covariances[0]
    return (
        [torch.empty_like(c) for c in covariances],
        first.new_empty(total, dtype=torch.int32),
        first.new_empty(total, dtype=torch.float32),
    )


@torch.library.register_fake("consistency_ops::foreach_apply_")
def _(
    grads, bias_grads, inverses, info, permutations, bias_layers, permutation_layers, layers, groups, chunk, seed, step
):
    return None
