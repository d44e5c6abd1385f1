"""Small fixed problems for every operator, and how far a device is from float64 and from torch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import ops
from . import backend
from .backend import PORTABLE, kernel

_EXACT = 0.0
# Relative to the largest entry of a result: what a float32 sum of some hundred terms, and the inverse of a matrix with
# condition number below 100, may be off by; and, of a result of 16 bits, half of its last bit.
_FLOAT32, _FLOAT64 = 2e-5, 1e-12
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Problem:
    """One call: the operator, its arguments, which of them it writes, and the float64 answer."""

    name: str
    operator: str
    args: tuple[Any, ...]
    exact: bool = False
    reference: Callable[..., list[Tensor]] | None = None  # of the arguments in float64; None: the portable operator


@dataclass
class Finding:
    """What came of one problem."""

    name: str
    operator: str
    error: float = math.nan  # largest relative error against float64
    bound: float = 0.0
    problem: str = ""  # what is wrong, or nothing

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass
class Verification:
    """The result of :func:`verify`; as text, a table."""

    device: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every operator computes what it should."""
        return all(finding.ok for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{'operator':<28} {'problem':<34} {'error':>9} {'bound':>9}  on {self.device}"]
        for f in self.findings:
            lines.append(f"{f.operator:<28} {f.name:<34} {f.error:>9.1e} {f.bound:>9.1e}  {f.problem or 'ok'}")
        wrong = sum(not f.ok for f in self.findings)
        lines.append(
            f"{len(self.findings)} problems, {wrong} with a difference"
            if wrong
            else f"{len(self.findings)} problems, no difference"
        )
        return "\n".join(lines)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _precondition(
    grads: list[Tensor],
    biases: list[Tensor],
    inputs: list[Tensor],
    bias_layers: list[int],
    *,
    groups: int = 8,
    damping: float = 0.3,
    trace: bool = True,
    chunk: int = 32,
    rows: int = 10_000,
) -> tuple[Any, ...]:
    count = len(grads)
    return (
        grads,
        biases,
        inputs,
        [],
        [],
        bias_layers,
        [],
        [],
        list(range(count)),
        [groups] * count,
        damping,
        trace,
        chunk,
        rows,
        7,
        3,
    )


def _by_reference(grads: list[Tensor], biases: list[Tensor], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    """The correction in float64 by ``reference.py``: (info, damping_used, grads, bias_grads)."""
    bias_layers, groups, damping, trace, chunk, rows, seed, step = (rest[i] for i in (2, 6, 7, 8, 9, 10, 11, 12))
    infos, useds, corrected, corrected_biases = [], [], [], []
    of_layer = dict(zip(bias_layers, biases, strict=True))
    for i, (grad, x) in enumerate(zip(grads, inputs, strict=True)):
        weight, bias, info, used = reference.precondition(
            grad,
            x,
            damping=damping,
            scaling="trace" if trace else "absolute",
            chunk=chunk,
            group=groups[i],
            max_rows=rows,
            seed=seed,
            step=step,
            layer=i,
            bias_grad=of_layer.get(i),
        )
        infos.append(info)
        useds.append(used)
        corrected.append(weight)
        if bias is not None:
            corrected_biases.append(bias)
    return [torch.cat(infos), torch.cat(useds).float(), *corrected, *corrected_biases]


def _whitening(x: Tensor, g: Tensor, b: Tensor, wide: Tensor, wide_g: Tensor) -> Iterator[Problem]:
    """Two layers, one with a bias, in whitened coordinates: with an average, by stored factors, and back."""
    shape = [0], [0, 1], [8, 8]  # the layer with a bias, the numbers of the layers, their groups
    seen = [_random(200, 70, seed=20), _random(300, 300, seed=21)]
    counts = [torch.tensor([len(x)]), torch.tensor([len(wide)])]
    of_rows = [0, 1], [0, 1], [8, 8], [1, 1], [70, 300], [True, False], 64, 512, 7, 0
    averages = PORTABLE["foreach_covariance"](seen, [], counts, [], *of_rows)
    weights = [torch.full((1,), 0.4), torch.full((1,), 0.4)]
    options = 0.3, True, 0.9, 64, 512, 7, 0
    factors = [torch.zeros_like(average) for average in averages]
    arguments = [g, wide_g], [b], [x, wide], counts, averages, weights, factors, *shape, *options
    yield Problem("an average", "foreach_whiten_", arguments)
    inverses, info, _ = PORTABLE["foreach_inverse"](averages, [71, 300], 0.3, True, 64, True)
    yield Problem("stored factors", "foreach_whiten_by_", ([g, wide_g], [b], inverses, info, *shape, 64, 7, 0))
    before = [_random(24, 70, seed=22), _random(40, 300, seed=23)], [_random(24, seed=24)]
    after = [w + 0.1 * d for w, d in zip(before[0], [g, wide_g], strict=True)], [before[1][0] + 0.1 * b]
    moved = torch.tensor([1, 1], dtype=torch.int32)
    rest = inverses, info, moved, *shape
    yield Problem("a step", "foreach_unwhiten_", (*after, *before, *rest, True, True, 64, 7, 0))
    yield Problem("a step, norm free", "foreach_unwhiten_", (*after, *before, *rest, False, True, 64, 7, 0))
    images, conv = _random(6, 24, 5, 5, seed=30), _random(16, 12, 3, 3, seed=31)
    factors, counts = [torch.zeros(4, 8, 8)], [torch.tensor([150])]
    place: tuple[Any, ...] = [], [0], [8], 0.3, True, 0.0, 8, 512, 7, 0
    of_groups: tuple[Any, ...] = [conv], [], [images], counts, [], [], factors, *place
    yield Problem("a grouped convolution", "foreach_whiten_", of_groups)


def _scans() -> Iterator[Problem]:
    """The additive recurrence: a permutation and one weight, a matrix and one weight a step."""
    drive, initial, weight = _random(6, 5, 40, seed=24), _random(5, 40, seed=25), _random(40, 40, seed=26) / 8
    order = torch.randperm(40, generator=torch.Generator().manual_seed(27))
    filters = torch.linalg.qr(_random(6, 40, 40, seed=28)).Q
    kept, grad = _random(6, 5, 40, seed=29).tanh(), _random(6, 5, 40, seed=30)
    for name, w, index, filter, activation in (
        ("a permutation, tanh", weight, order, None, 1),
        ("matrices of their own, modulus", weight.repeat(6, 1, 1), None, filters, 5),
    ):
        rest = w, index, filter, 0.9, 0.3, activation
        yield Problem(name, "roa_scan", (drive, initial, *rest))
        yield Problem(name, "roa_scan_backward", (grad, initial, kept, *rest))
    half = [t.to(torch.bfloat16) for t in (drive, initial, weight)]
    yield Problem("bfloat16", "roa_scan", (*half, order, None, 0.9, 0.3, 1))


def problems() -> Iterator[Problem]:
    """All problems, their tensors on the CPU; the same ones on every machine."""
    x, g, b = _random(200, 70, seed=1), _random(24, 70, seed=2), _random(24, seed=3)
    wide, wide_g = _random(300, 300, seed=4), _random(40, 300, seed=5)
    images, conv = _random(6, 24, 5, 5, seed=6), _random(16, 12, 3, 3, seed=7)
    yield Problem(
        "two layers, a bias, trace",
        "foreach_precondition_",
        _precondition([g, wide_g], [b], [x, wide], [0]),
        reference=_by_reference,
    )
    yield Problem(
        "chunks of 128 and of 256",
        "foreach_precondition_",
        _precondition([wide_g], [], [wide], [], chunk=256, trace=False),
        reference=_by_reference,
    )
    yield Problem(
        "exact division, sampled rows",
        "foreach_precondition_",
        _precondition([wide_g], [], [wide], [], groups=1, chunk=128, rows=200),
        reference=_by_reference,
    )
    yield Problem(
        "a grouped convolution",
        "foreach_precondition_",
        _precondition([conv], [_random(16, seed=8)], [images], [0], chunk=8),
        reference=_by_reference,
    )
    for dtype in (torch.bfloat16, torch.float16):
        yield Problem(
            str(dtype).removeprefix("torch."),
            "foreach_precondition_",
            _precondition([wide_g.to(dtype)], [], [wide.to(dtype)], [], groups=16, chunk=64),
            reference=_by_reference,
        )
    broken = x.clone()
    broken[5, 9] = math.nan
    yield Problem(
        "a NaN in one unit", "foreach_precondition_", _precondition([g], [], [broken], []), reference=_by_reference
    )
    without = x.clone()
    without[:, 30] = 0
    yield Problem(
        "a unit without input or damping",
        "foreach_precondition_",
        _precondition([g], [], [without], [], damping=0.0, trace=False),
        reference=_by_reference,
    )
    covariance = PORTABLE["foreach_covariance"]([wide], [], [], [], [], [0], [8], [1], [300], [False], 64, 250, 7, 3)
    yield Problem(
        "chunks of 60", "foreach_covariance", ([wide], [], [], [], [], [0], [8], [1], [300], [False], 64, 250, 7, 3)
    )
    yield Problem("chunks of 60", "foreach_inverse", (covariance, [300], 0.3, True, 64))
    yield Problem(
        "chunks of 60", "foreach_correct_", ([wide_g], [], covariance, [], [], [], [0], [8], 0.3, True, 64, 7, 3)
    )
    inverses, info, _ = PORTABLE["foreach_inverse"](covariance, [300], 0.3, True, 64)
    yield Problem("chunks of 60", "foreach_apply_", ([wide_g], [], inverses, info, [], [], [], [0], [8], 64, 7, 3))
    factors, info, _ = PORTABLE["foreach_inverse"](covariance, [300], 0.3, True, 64, True)
    yield Problem("lower triangular", "foreach_inverse", (covariance, [300], 0.3, True, 64, True))
    yield Problem(
        "lower triangular", "foreach_apply_", ([wide_g], [], factors, info, [], [], [], [0], [8], 64, 7, 3, True)
    )
    yield from _whitening(x, g, b, wide, wide_g)
    yield from _scans()
    special = torch.tensor([0.0, -0.0, 1.5, -1.5, math.inf, -math.inf])
    values = torch.cat([special, _random(1000, seed=10)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Problem(str(dtype).removeprefix("torch."), "modulus", (values.to(dtype),), exact=True)
    _, signs = PORTABLE["modulus_forward"](values)
    yield Problem("float32", "modulus_forward", (values,), exact=True)
    yield Problem("float32", "modulus_backward", (_random(len(values), seed=11), signs), exact=True)
    count = torch.tensor([3])
    yield Problem(
        "channels first", "batch_rms_norm_denominator_", (images, _random(24, seed=12).abs(), count, 0.9, 0.01)
    )
    yield Problem(
        "channels last",
        "batch_rms_norm_denominator_",
        (images.to(memory_format=torch.channels_last), _random(24, seed=12).abs(), count, 0.9, 0.01),
    )
    yield Problem(
        "evaluation", "batch_rms_norm_denominator", (_random(24, seed=12).abs(), count, torch.float32, 0.9, 0.01)
    )
    yield Problem("channels first", "batch_rms_norm_divide", (images, _random(24, seed=13).abs().add(0.5)))
    matrices = wide[:150].view(3, 50, 300)[:, :, :40].mT @ wide[:150].view(3, 50, 300)[:, :, :40] + 40 * torch.eye(40)
    matrices[1, 20, 20] = -1
    yield Problem("one is not positive definite", "spd_inverse", (matrices,))
    yield Problem("one is not positive definite", "spd_solve", (matrices, _random(3, 40, 35, seed=15)))
    state = torch.zeros(3, 11, dtype=torch.int64)  # CaptureState of capture.h
    yield Problem("more rows than room", "capture_rows_", (torch.zeros(64, 70), state, x, 1, -1, 5, False), exact=True)
    begun = state.clone()
    begun[1, :7] = torch.tensor([60, 60, 1, 60, 20, 0, 1])
    yield Problem(
        "a buffer that is thinned out",
        "capture_rows_",
        (_random(64, 70, seed=14), begun, x, 1, -1, 5, False),
        exact=True,
    )
    yield Problem(
        "rows after a backward pass",
        "capture_rows_",
        (_random(64, 70, seed=14), begun, x, 1, -1, 5, False, True),
        exact=True,
    )
    yield Problem("a restart", "capture_mark_", (_random(64, 70, seed=14), begun, 1, True), exact=True)


def _map(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    return type(values)(_map(v, function) for v in values) if isinstance(values, (list, tuple)) else values


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in _tensors(v)] if isinstance(values, (list, tuple)) else []


def _call(function: Callable[..., Any], problem: Problem, args: tuple[Any, ...]) -> list[Tensor]:
    """What the operator returns and then what it has written, all on the CPU."""
    schema = getattr(ops, problem.operator).default._schema
    results = _tensors(function(*args))
    for argument, value in zip(schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            results += _tensors(value)
    return [t.detach().to("cpu", copy=True) for t in results]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _answers(problem: Problem) -> list[Tensor]:
    args = _map(problem.args, _wide)
    if problem.reference is not None:
        return problem.reference(*args)
    if problem.exact:
        args = _map(problem.args, torch.clone)
    elif problem.operator == "batch_rms_norm_denominator":
        args = (*args[:2], torch.float64, *args[3:])
    return _call(kernel(problem.operator), problem, args)


def _bound(problem: Problem, result: Tensor) -> float:
    if problem.exact or not result.is_floating_point():
        return _EXACT
    return _FLOAT64 if result.dtype == torch.float64 else _ROUNDING.get(result.dtype, 0) + _FLOAT32


def _compare(problem: Problem, results: list[Tensor], answers: list[Tensor]) -> Finding:
    finding = Finding(problem.name, problem.operator, 0.0)
    for number, (result, answer) in enumerate(zip(results, answers, strict=True)):
        bound = _bound(problem, result)
        finding.bound = max(finding.bound, bound)
        if result.shape != answer.shape:
            finding.problem = f"result {number} has shape {tuple(result.shape)}, not {tuple(answer.shape)}"
            continue
        got, want = result.double(), answer.double()
        same = (got == want) | (got.isnan() & want.isnan())
        scale = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
        apart = torch.where(same, 0, (got - want).abs() / (scale or 1.0))
        error = float(apart.max()) if apart.numel() else 0.0
        error = math.inf if math.isnan(error) else error
        finding.error = max(finding.error, error)
        if error > bound and not finding.problem:
            finding.problem = f"result {number} differs"
    return finding


def _on(device: torch.device, problem: Problem, run: Callable[..., Any]) -> list[Tensor]:
    return _call(run, problem, _map(problem.args, lambda t: t.to(device, copy=True)))


def _operator(name: str) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(ops, name).default
    return operator


def check(device: torch.device, operator: str | None = None) -> Iterator[Finding]:
    """Every problem on a device, or those of one operator, against float64."""
    with torch.no_grad():
        for problem in problems():
            if operator not in (None, problem.operator):
                continue
            try:
                results = _on(device, problem, _operator(problem.operator))
            except Exception as error:
                yield Finding(problem.name, problem.operator, problem=str(error).splitlines()[0])
                continue
            yield _compare(problem, results, _answers(problem))


def differences(device: torch.device) -> list[str]:
    """Where the operators do not compute on a device what the portable operators compute there; empty: nowhere."""
    found = []
    with torch.no_grad():
        for problem in problems():
            answers = _on(device, problem, kernel(problem.operator))
            finding = _compare(problem, _on(device, problem, _operator(problem.operator)), answers)
            if not finding.ok:
                found.append(f"{finding.operator}, {finding.name}: {finding.problem}")
    return found


backend.differences_of = differences


def verify(device: torch.device | str | None = None) -> Verification:
    """Run every operator on a device and compare what it computes with float64 on the CPU: some seconds.

    Args:
        device: default: the current CUDA device where there is one, else torch's accelerator, else the CPU.

    Returns:
        A :class:`Verification`: ``ok``, ``findings`` (one a problem), and a table when it is printed.

    Raises:
        RuntimeError: torch has no such device here.
    """
    if device is None:
        device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"verify: torch has no device {str(device)!r} here: {reason}") from None
    return Verification(str(device), list(check(device)))
