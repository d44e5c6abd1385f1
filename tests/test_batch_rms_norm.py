"""Batch RMS normalisation: the formulas, the constant-D derivative, memory layouts, limits, the module."""

import copy
import ctypes
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import consistency_ops as co
from consistency_ops import reference
from consistency_ops.ops.library import library as compiled

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (4, 3),
    (5, 1),
    (1, 7),
    (64, 300),
    (40_000, 2),
    (2, 40_000),
    (3, 4, 5),
    (2, 3, 4, 5),
    (1, 3, 100, 101),
    (6, 2, 150, 150),
    (8, 16, 9, 9),
    (2, 3, 2, 3, 4),
]
LAYOUTS = {
    "contiguous": lambda shape, dtype: torch.randn(shape).to(dtype),
    "channels_last": lambda shape, dtype: torch.randn(shape).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1),
    "channels_first": lambda shape, dtype: torch.randn(shape).to(dtype).transpose(0, 1).contiguous().transpose(0, 1),
    "every_other": lambda shape, dtype: torch.randn([2 * shape[0], 2 * shape[1], *shape[2:]]).to(dtype)[::2, ::2],
    "cropped": lambda shape, dtype: torch.randn([*shape[:2], *(n + 1 for n in shape[2:])]).to(dtype)[
        (slice(None), slice(None), *(slice(1, None) for _ in shape[2:]))
    ],
    "expanded": lambda shape, dtype: torch.randn([1, *shape[1:]]).to(dtype).expand(shape),
    "flipped": lambda shape, dtype: torch.flip(torch.randn(shape).to(dtype), (0, 1)),
}


CHAIN = 64  # additions in a row in the precision of the sums, each with half an eps; see csrc/cpu/batch_rms_norm.inl


def tolerances(dtype):
    """Return those of y: half the error of the mean square, a few roundings of the sums, one rounding of y."""
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return {"rtol": (CHAIN / 4 + 4) * torch.finfo(summed).eps + torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}


def statistics(channels, dtype, count=2):
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.rand(channels).to(dtype), torch.tensor([count])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(shape, dtype, layout):
    x = LAYOUTS[layout](shape, dtype)
    running, count = statistics(shape[1], dtype)
    expected_running, expected_count = running.double().clone(), count.clone()
    y = co.batch_rms_norm(x, running, training=True, num_batches=count)
    expected = reference.batch_rms_norm(x.double(), expected_running, training=True, num_batches=expected_count)
    torch.testing.assert_close(y.double(), expected, **tolerances(dtype))
    torch.testing.assert_close(
        running.double(), expected_running, rtol=(CHAIN / 2 + 4) * torch.finfo(running.dtype).eps, atol=0
    )
    assert count == expected_count == 3
    assert y.dtype == dtype
    # Evaluation repeats the last training batch and updates nothing.
    kept = running.clone()
    assert torch.equal(co.batch_rms_norm(x, running, training=False, num_batches=count), y)
    assert torch.equal(running, kept) and count == 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_first"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)], ids=str)
def test_dense_layouts_are_kept_and_not_copied(shape, layout):
    x = LAYOUTS[layout](shape, torch.float32).requires_grad_()
    running, count = statistics(shape[1], x.dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = co.batch_rms_norm(x, running, training=True, num_batches=count)
    assert y.stride() == x.stride()
    assert not [e.name for e in profile.events() if any(op in e.name for op in ("copy_", "clone", "contiguous"))]


def test_by_hand_at_the_first_batch():
    """t = 0: v = 0.9 m, corrected by 1 - 0.1; eps is relative to the uncorrected maximum."""
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    running, count = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    y = co.batch_rms_norm(x, running, training=True, num_batches=count, decay=0.1, eps=1e-2)
    assert count.item() == 1
    torch.testing.assert_close(running, torch.tensor([0.9 * 12.5, 0.0], dtype=torch.float64))
    eps = 1e-2 * (0.9 * 12.5 + 1e-6)
    torch.testing.assert_close(y[:, 0], x[:, 0] / math.sqrt(12.5 + eps))
    assert torch.equal(y[:, 1], torch.zeros(2, dtype=torch.float64))
    # The second batch: decay weighs the old value.
    co.batch_rms_norm(2 * x, running, training=True, num_batches=count)
    torch.testing.assert_close(running[0].item(), 0.1 * 0.9 * 12.5 + 0.9 * 50)


def test_without_a_counter_nothing_is_corrected():
    x = torch.randn(10, 3, dtype=torch.float64)
    running = torch.zeros(3, dtype=torch.float64)
    y = co.batch_rms_norm(x, running, training=True, decay=0.5)
    denominator = (running + 1e-2 * (running.max() + 1e-6)).sqrt()
    torch.testing.assert_close(y, x / denominator)
    torch.testing.assert_close(running, 0.5 * x.square().mean(0))


def test_evaluation_before_any_training_divides_by_the_floor():
    running, count = torch.zeros(3), torch.zeros(1, dtype=torch.int64)
    y = co.batch_rms_norm(torch.ones(2, 3), running, training=False, num_batches=count, eps=1e-2)
    torch.testing.assert_close(y, torch.full((2, 3), 1e4))
    assert count.item() == 0


def test_least_active_channel_is_amplified_at_most_tenfold():
    x = torch.stack([torch.randn(100), 1e-6 * torch.randn(100)], dim=1)
    running, count = torch.zeros(2), torch.zeros(1, dtype=torch.int64)
    y = co.batch_rms_norm(x, running, training=True, num_batches=count)
    gain = (y / x)[0]
    assert 9 < gain[1] / gain[0] < 11


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6, 5)], ids=str)
def test_backward_divides_by_the_same_denominator(shape, training, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    running, count = statistics(4, dtype)
    y = co.batch_rms_norm(x, running, training=training, num_batches=count)
    y.backward(grad)
    again = co.batch_rms_norm(grad, running, training=False, num_batches=count)
    assert torch.equal(x.grad, again)


def test_finite_differences_with_the_denominator_frozen():
    """The derivative is that of x / D for the D of this batch, in training too."""
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, dtype=torch.float64)
    running, count = statistics(4, torch.float64)
    (co.batch_rms_norm(x, running, training=True, num_batches=count) * weight).sum().backward()
    step, numeric = 1e-6, torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=torch.float64)
        shift[i] = step
        high, low = (
            (
                co.batch_rms_norm(x.detach() + s * shift.view(x.shape), running, training=False, num_batches=count)
                * weight
            )
            for s in (1, -1)
        )
        numeric.view(-1)[i] = (high - low).sum() / (2 * step)
    torch.testing.assert_close(x.grad, numeric, rtol=1e-7, atol=1e-7)


def test_only_the_denominator_is_kept_for_backward():
    kept = []
    x = torch.randn(8, 16, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        co.batch_rms_norm(x, torch.zeros(16), training=True).sum().backward()
    assert sum(kept) == 16


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_a_bit(dtype, layout):
    x = LAYOUTS[layout]((9, 7, 70, 71), dtype)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        running = torch.zeros(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        results.append((co.batch_rms_norm(x, running, training=True), running))
    for y, running in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(running, results[0][1])


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set(name, dtype):
    library = compiled
    library.co_cpu_isa.restype = ctypes.c_char_p
    before = library.co_cpu_isa()
    if library.co_set_cpu_isa(name.encode()) != 0:
        pytest.skip(f"this processor has no {name}")
    try:
        for shape in ((70, 33), (3, 5, 37, 3)):
            for layout in ("contiguous", "channels_last"):
                x = LAYOUTS[layout](shape, dtype)
                running = torch.zeros(shape[1], dtype=torch.float64)
                y = co.batch_rms_norm(x, running, training=True)
                expected = reference.batch_rms_norm(x.double(), torch.zeros_like(running), training=True)
                torch.testing.assert_close(y.double(), expected, **tolerances(dtype))
    finally:
        library.co_set_cpu_isa(before)


def test_long_sums_stay_accurate():
    """With eight million terms per channel a plain float32 sum would have lost four digits."""
    x = torch.rand(2, 1, 2000, 2000).add_(0.5)
    for layout in (x, x.expand(2, 1, 2000, 2000).movedim(1, -1).contiguous().movedim(-1, 1)):
        running = torch.zeros(1, dtype=torch.float64)
        co.batch_rms_norm(layout, running, training=True, decay=0.0)
        torch.testing.assert_close(running[0], x.double().square().mean(), rtol=1e-6, atol=0)


# Limits


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_updates_nothing(shape):
    running, count = torch.rand(3), torch.tensor([5])
    kept = running.clone()
    x = torch.zeros(shape, requires_grad=True)
    y = co.batch_rms_norm(x, running, training=True, num_batches=count)
    assert y.shape == shape and torch.equal(running, kept) and count.item() == 5
    y.sum().backward()
    assert x.grad.shape == shape


def test_no_channels():
    y = co.batch_rms_norm(torch.zeros(4, 0), torch.zeros(0), training=True)
    assert y.shape == (4, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_input_shows_in_every_channel(value):
    x = torch.ones(3, 2)
    x[1, 0] = value
    running = torch.zeros(2)
    y = co.batch_rms_norm(x, running, training=True)
    assert not running[0].isfinite() and running[1] == pytest.approx(0.9)
    # NaN, or x divided by infinity.
    assert (y.isnan() | (y == 0)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must be \(N, C\) or \(N, C, \*spatial\), got shape \(3,\)"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"running_ms must be contiguous of shape \(4,\), got shape \(3,\)"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be float32, .* got torch.int64"),
        ({"x": torch.zeros(2, 3, dtype=torch.complex64)}, NotImplementedError, "got torch.complex64"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.zeros(2, 3, device="meta")}, RuntimeError, "running_ms must be on meta, got cpu"),
        ({"running_ms": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, "float32 or float64, got torch.bfloat16"),
        ({"running_ms": torch.zeros(6)[::2]}, ValueError, r"contiguous of shape \(3,\), got .* strides \(2,\)"),
        ({"running_ms": torch.zeros(3, requires_grad=True)}, RuntimeError, "must not require a gradient"),
        ({"num_batches": torch.zeros(1)}, TypeError, "num_batches must be int64, got torch.float32"),
        ({"num_batches": torch.tensor(0)}, ValueError, r"num_batches must have shape \(1,\), got \(\)"),
        ({"num_batches": 3}, TypeError, "num_batches must be a Tensor, got int"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": math.nan}, ValueError, "decay"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"eps": math.inf}, ValueError, "eps"),
    ],
)
def test_refused_and_nothing_changed(change, error, message):
    arguments = {"x": torch.ones(2, 3), "running_ms": torch.ones(3), "num_batches": torch.tensor([1])} | change
    kept = {k: v.detach().clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match="batch_rms_norm: .*" + message):
        co.batch_rms_norm(arguments.pop("x"), arguments.pop("running_ms"), training=True, **arguments)
    for name in ("running_ms", "num_batches"):
        if name in kept and name in arguments and isinstance(arguments[name], torch.Tensor):
            assert torch.equal(kept[name], arguments[name].detach())


# Module


def test_module_trains_then_evaluates():
    module = co.nn.BatchRMSNorm(4)
    assert module.running_ms.eq(0).all() and module.num_batches.shape == (1,)
    x = torch.randn(20, 4, 3, 3)
    y = module(x)
    assert module.num_batches.item() == 1
    module.eval()
    assert torch.equal(module(x), y)
    assert module.num_batches.item() == 1
    # Root mean square one, but for eps.
    torch.testing.assert_close(y.square().mean((0, 2, 3)).sqrt(), torch.ones(4), rtol=1e-2, atol=0)
    module.reset_running_stats()
    assert module.running_ms.eq(0).all() and module.num_batches.item() == 0


def test_module_state_and_copies():
    module = co.nn.BatchRMSNorm(3, decay=0.3, eps=1e-3)
    module(torch.randn(5, 3))
    assert set(module.state_dict()) == {"running_ms", "num_batches"} and not list(module.parameters())
    assert repr(module) == "BatchRMSNorm(3, decay=0.3, eps=0.001)"
    clone = copy.deepcopy(module)
    clone(torch.randn(5, 3))
    assert module.num_batches.item() == 1 and clone.num_batches.item() == 2
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).running_ms, module.running_ms)
    other = co.nn.BatchRMSNorm(3)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.running_ms, module.running_ms) and other.num_batches.item() == 1


def test_module_keeps_wide_statistics():
    module = co.nn.BatchRMSNorm(3)
    module(torch.randn(5, 3))
    exact = module.running_ms.clone()
    for dtype in (torch.bfloat16, torch.float16):
        module.to(dtype)
        assert torch.equal(module.running_ms, exact) and module.running_ms.dtype == torch.float32
        assert module(torch.randn(5, 3, dtype=dtype)).dtype == dtype
        exact = module.running_ms.clone()
    module.double()
    assert module.running_ms.dtype == torch.float64 and module.num_batches.dtype == torch.int64
    assert co.nn.BatchRMSNorm(3, dtype=torch.bfloat16).running_ms.dtype == torch.float32
    with torch.device("meta"):
        module = co.nn.BatchRMSNorm(3)
    assert module.to_empty(device="cpu").running_ms.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_features"), ((3, 1.0), "decay"), ((3, -0.1), "decay"), ((3, 0.1, 0.0), "eps")],
)
def test_module_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"BatchRMSNorm: {message}"):
        co.nn.BatchRMSNorm(*arguments)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_has_the_gradients_and_statistics_of_a_plain_step(reentrant):
    """Its recomputation is not another batch."""
    norm = co.nn.BatchRMSNorm
    models = [nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 4), norm(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for scale in (1.0, 3.0, 0.2):
        x = (scale * torch.randn(16, 6)).requires_grad_()
        for model in models:
            model.zero_grad()
            y = checkpoint(model, x, use_reentrant=reentrant) if model is models[1] else model(x)
            y.square().sum().backward()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
            assert torch.equal(a, b)


def test_a_selective_checkpoint_runs():
    """It replays the operators of the forward pass, so its recomputation counts as a batch."""
    model = nn.Sequential(nn.Linear(6, 8), co.nn.BatchRMSNorm(8), nn.Linear(8, 4))
    x = torch.randn(16, 6, requires_grad=True)

    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])

    checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and x.grad.isfinite().all()
    assert model[1].num_batches.tolist() == [2]
