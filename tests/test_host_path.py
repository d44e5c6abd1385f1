"""The fast ways of row capture and of a step in C++ (csrc/torch_abi): the bits of the Python code, and who sees them.

Every other test of this folder runs with them where they are built. ``test_the_suite_without_the_accelerator`` (slow)
runs those of capture and preconditioner once more without.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops.engine import capture as capture_module
from consistency_ops.engine import host_path, row_buffer
from consistency_ops.engine.correction import Correction
from consistency_ops.ops.library import torch_abi
from support import processes

ROOT = Path(__file__).resolve().parents[1]
needs_accelerator = pytest.mark.skipif(not host_path.is_bound, reason="csrc/torch_abi is not built for this torch")


@contextlib.contextmanager
def python_only():
    torch_abi.use_host_path(False)
    try:
        yield
    finally:
        torch_abi.use_host_path(True)


@pytest.fixture
def python_calls(monkeypatch):
    """Counts what the Python code does: operator calls of row capture, and corrections."""
    counts = {"rows": 0, "mark": 0, "step": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(capture_module, "capture_rows", counted("rows", capture_module.capture_rows))
    monkeypatch.setattr(capture_module, "capture_mark", counted("mark", capture_module.capture_mark))
    monkeypatch.setattr(row_buffer, "capture_mark", counted("mark", row_buffer.capture_mark))
    monkeypatch.setattr(Correction, "run", counted("step", Correction.run))
    return counts


class Attention(nn.Module):
    """Three layers share an input, and one of them has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        return self.out((scores @ self.v(x)).mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)), (16, 20)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(6, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 5),
    ).to(memory_format=torch.channels_last), (4, 6, 8, 8)


def attention():
    return Attention(), (3, 7, 24)


def called_twice():
    layer = nn.Linear(20, 20)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(20, 5)), (9, 20)


class SelfAttention(nn.Module):
    """torch's attention: query, key and value are parts of one weight, or weights of their own."""

    def __init__(self, kdim=None) -> None:
        super().__init__()
        self.attention, self.kdim = nn.MultiheadAttention(24, 2, kdim=kdim, batch_first=True), kdim or 24
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.attention(x, x[..., : self.kdim], x, need_weights=False)[0].mean(1))


def torchs_attention():
    return SelfAttention(), (3, 7, 24)


def attention_of_other_widths():
    return SelfAttention(kdim=17), (3, 7, 24)


def transposed_convolutions():
    return nn.Sequential(
        nn.ConvTranspose2d(6, 12, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 2, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3),
        nn.AdaptiveAvgPool2d(1),
    ), (4, 6, 4, 4)


def grouped_transposed_convolutions():
    """Whose step is left to Python: the matrix is a copy of the weight."""
    layers = nn.ConvTranspose2d(6, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 3, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers), (4, 6, 4, 4)


IN_CPP = [
    perceptron,
    convolutions,
    attention,
    called_twice,
    torchs_attention,
    attention_of_other_widths,
    transposed_convolutions,
]
NETWORKS = [*IN_CPP, grouped_transposed_convolutions]


def train(make, steps=8, dtype=torch.float32, micro=1, abandon=False, optimizers=1, **options):
    torch.manual_seed(0)
    model, shape = make()
    model.to(dtype)
    groups = [list(model.parameters())] if optimizers == 1 else [list(m.parameters()) for m in list(model)[::2]]
    attached = [torch.optim.SGD(parameters, lr=0.05, momentum=0.9) for parameters in groups]
    pre = co.Preconditioner(model, attached if optimizers > 1 else attached[0], chunk=16, max_rows=50, **options)
    reports = []
    for _ in range(steps):
        for _ in range(1 + abandon):  # the first gradient is thrown away
            for optimizer in attached:
                optimizer.zero_grad()
            for _ in range(micro):
                model(torch.randn(shape, dtype=dtype)).square().sum().backward()
        for optimizer in attached:
            optimizer.step()
        reports.append(pre.stats())
    return [p.detach().clone() for p in model.parameters()], reports


REUSED = {  # the inverses of a refresh in the two steps after it
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "micro": {"micro": 3},
    "abandoned": {"abandon": True},
    "absolute": {"scaling": "absolute", "group": 3, "bias": False, "damping": 30.0},
    "average": {"decay": 0.5, "steps": 24},
}
CASES = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "micro": {"micro": 3},
    "abandoned": {"abandon": True},
    "absolute": {"scaling": "absolute", "group": 3, "bias": False},
    "schedule": {"damping": lambda step: 0.1 + 0.01 * step},
    "rounded rows": {"rows_dtype": torch.bfloat16},
    "average": {"decay": 0.9},
    "every": {"decay": 0.5, "every": 3},
    **{f"reused {name}": {"every": 3, **options} for name, options in REUSED.items()},
}


@needs_accelerator
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", NETWORKS)
def test_the_same_bits(make, case):
    fast, fast_reports = train(make, **CASES[case])
    with python_only():
        slow, slow_reports = train(make, **CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))
    assert fast_reports == slow_reports


@needs_accelerator
def test_two_optimizers_have_the_same_bits():
    fast, _ = train(perceptron, optimizers=3)
    with python_only():
        slow, _ = train(perceptron, optimizers=3)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


@needs_accelerator
@pytest.mark.parametrize("make", IN_CPP)
@pytest.mark.parametrize("case", ["plain", "bf16", "micro"])
def test_python_does_the_first_step_only(make, case, python_calls):
    train(make, steps=2, **CASES[case])
    before = dict(python_calls)
    train(make, steps=7, **CASES[case])
    after = dict(python_calls)
    # Both trainings have the same calls in Python: buffers that are made, grow, or are trimmed after the first steps.
    assert after == {name: 2 * count for name, count in before.items()}
    assert before["step"] == 1


@needs_accelerator
@pytest.mark.parametrize("make", IN_CPP)
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("reused")])
def test_python_does_the_refreshes_only(make, case, python_calls):
    train(make, **{**CASES[case], "steps": 1})
    launches = python_calls["step"]  # of a refresh: one, and one more for each size of convolution groups
    train(make, **CASES[case])
    # Of 8 steps the first, fourth and seventh; with an average the first 20 of 24 as well, and the 22nd.
    assert python_calls["step"] == launches * (1 + (21 if "average" in case else 3))


@needs_accelerator
def test_stored_inverses_that_do_not_fit_are_left_to_python(python_calls):
    """Lost, of another type, of a bias that was frozen since: the result of Python, whatever it is."""

    def lose(state, model):
        del state[model[2].weight]["consistency_inverse"]

    def cast(state, model):
        entries = state[model[2].weight]
        entries["consistency_inverse"] = entries["consistency_inverse"].double()

    def freeze(state, model):
        model[2].bias.requires_grad_(False)
        model[2].bias.grad = None

    for change in (lose, cast, freeze):
        results = []
        for used in (True, False):
            torch_abi.use_host_path(used)
            try:
                torch.manual_seed(0)
                model, shape = perceptron()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                co.Preconditioner(model, optimizer, every=4)
                for step in range(7):
                    if step == 2:
                        before = python_calls["step"]
                        change(optimizer.state, model)
                    optimizer.zero_grad()
                    model(torch.randn(shape)).square().sum().backward()
                    optimizer.step()
                    if used and step == 2:
                        assert python_calls["step"] == before + 1, change
            finally:
                torch_abi.use_host_path(True)
            results.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), change


@needs_accelerator
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_state_that_was_loaded_between_two_refreshes_has_the_same_bits(steps):
    results = []
    for used in (True, False):
        torch_abi.use_host_path(used)
        try:
            torch.manual_seed(0)
            weights = saved = None
            for _ in range(2):
                model, shape = perceptron()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                co.Preconditioner(model, optimizer, every=3)
                if saved is not None:
                    model.load_state_dict(weights)
                    optimizer.load_state_dict(saved)
                for _ in range(3 + steps):
                    optimizer.zero_grad()
                    model(torch.randn(shape)).square().sum().backward()
                    optimizer.step()
                weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        finally:
            torch_abi.use_host_path(True)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_accelerator
def test_recomputed_inputs_are_left_to_python(python_calls):
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    results = []
    for used in (True, False):
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        pre = co.Preconditioner(layers, optimizer)
        torch_abi.use_host_path(used)
        try:
            for reentrant in (False, True, False, True):
                optimizer.zero_grad()
                x = torch.randn(6, 8, requires_grad=True)
                checkpoint(layers, x, use_reentrant=reentrant).sum().backward()
                optimizer.step()
        finally:
            torch_abi.use_host_path(True)
        results.append([p.detach().clone() for p in layers.parameters()])
        pre.remove()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Step:
    """One training step; the first three have been made."""

    def __init__(self, model, shape) -> None:
        self.model, self.shape = model, shape
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        co.Preconditioner(model, self.optimizer)
        for _ in range(3):
            self()

    def forward_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(self.shape)).sum().backward()

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()


def test_modes_and_the_profiler_see_the_operators():
    model, shape = perceptron()
    step = Step(model, shape)
    with Names() as names:
        step()
    ours = [name.split("::")[1].split(".")[0] for name in names.seen if "consistency_ops" in name]
    assert ours == ["capture_rows_"] * 3 + ["foreach_precondition_"]  # so marks launch nothing: they are on the host
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    counts = {event.key: event.count for event in profile.key_averages() if "consistency_ops" in event.key}
    assert counts["consistency_ops::capture_rows_"] == 3 and counts["consistency_ops::foreach_precondition_"] == 1


@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_marks_launch_nothing(backwards):
    """The rows of the next micro-batch bring the mark of the backward pass before them."""
    model, shape = perceptron()
    step = Step(model, shape)
    step.optimizer.zero_grad()
    with Names() as names:
        for _ in range(backwards):
            model(torch.randn(shape)).sum().backward()
        step.optimizer.step()
    ours = [name.split("::")[1].split(".")[0] for name in names.seen if "consistency_ops" in name]
    assert ours == ["capture_rows_"] * 3 * backwards + ["foreach_precondition_"]


def test_a_micro_batch_runs_the_operations_of_torch_alone_and_one_capture_a_layer():
    """Beside what a network without a preconditioner runs: nothing that a GPU would launch for a mark."""

    def of_micro_batches(preconditioned):
        model, shape = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = co.Preconditioner(model, optimizer) if preconditioned else None
        x = torch.randn(shape)
        for _ in range(3):  # later steps find their buffers
            optimizer.zero_grad()
            for _ in range(4):
                model(x).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
        with Names() as names:
            for _ in range(4):
                model(x).sum().backward()
        assert pre is None or pre.summary()
        return names.seen

    with_ours = of_micro_batches(True)
    assert [name for name in with_ours if "consistency_ops" not in name] == of_micro_batches(False)
    assert [name for name in with_ours if "consistency_ops" in name] == ["consistency_ops::capture_rows_"] * 12


@needs_accelerator
def test_torchs_own_operations_are_used_where_they_are_chosen(python_calls):
    model, shape = perceptron()
    step = Step(model, shape)
    before = dict(python_calls)
    step()
    assert python_calls == before
    co.set_backend("torch")
    try:
        step()
    finally:
        co.set_backend("auto")
    assert python_calls["rows"] == before["rows"] + 3 and python_calls["step"] == before["step"] + 1
    step()
    assert python_calls["rows"] == before["rows"] + 3


@needs_accelerator
def test_a_class_whose_call_is_patched_is_called_in_python(monkeypatch):
    model, shape = perceptron()
    step = Step(model, shape)
    seen = []
    original = capture_module.Capture.__call__
    monkeypatch.setattr(
        capture_module.Capture, "__call__", lambda *args: (seen.append(type(args[1]).__name__), original(*args))[1]
    )
    step()
    assert seen == ["Linear"] * 3


@needs_accelerator
def test_errors_are_those_of_python():
    model, shape = perceptron()
    step = Step(model, shape)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(4, 7))
    shared = torch.randn(40 * 40)
    step.forward_backward()
    model[2].weight.grad = shared.view(40, 40)
    model[4].weight.grad = shared[:200].view(5, 40)
    with pytest.raises(RuntimeError, match="gradients must not overlap"):
        step.optimizer.step()
    step()


@needs_accelerator
def test_nothing_is_kept_or_lost():
    model, shape = perceptron()
    step = Step(model, shape)
    hook = next(iter(model[0]._forward_pre_hooks.values()))

    def counts():
        gc.collect()
        objects = [hook, hook.states, hook.rows, hook.state, model[0], model[0].weight]
        return [sys.getrefcount(o) for o in objects], len(gc.get_objects())

    for _ in range(20):
        step()
    references, before = counts()
    for _ in range(300):
        step()
    again, after = counts()
    assert again == references
    assert after < before + 50


@needs_accelerator
def test_threads_share_a_model():
    """Rows of calls from several threads are all there, in the order in which the calls came."""
    layer = nn.Linear(64, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    co.Preconditioner(layer, optimizer, max_rows=4096)
    hook = next(iter(layer._forward_pre_hooks.values()))
    layer(torch.zeros(2048, 64)).sum().backward()
    optimizer.step()

    def work(value):
        for _ in range(20):
            layer(torch.full((64, 64), float(value)))

    processes.in_threads(lambda: work(1), lambda: work(2))
    rows = hook.rows[: int(hook.count)]
    assert sorted(rows[:, 0].tolist()) == 1280 * [1.0] + 1280 * [2.0]
    assert bool((rows == rows[:, :1]).all())


NAMES = (
    "capture",
    "preconditioner*",
    "programs",
    "same_input",
    "weight_capture",
    "experts",
    "layers_shared",
    "modulus_node",
)
FILES = sorted(path.name for name in NAMES for path in (ROOT / "tests").glob(f"test_{name}.py"))
WITHOUT = {**os.environ, "CONSISTENCY_OPS_TORCH_ABI": "0"}


def test_the_accelerator_can_be_left_out():
    told = "import consistency_ops as co; print(co.build_info()['torch_abi'], co.engine.host_path.is_bound)"
    done = processes.run(
        [sys.executable, "-c", told], env=WITHOUT, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["off", "False"]


@pytest.mark.slow
@needs_accelerator
@pytest.mark.parametrize("file", FILES)
def test_the_suite_without_the_accelerator(file):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not nightly", "-p", "no:cacheprovider"]
    command += ["-k", "not [second and not [simt"]  # kernels that no accelerator calls
    run = {"env": WITHOUT, "cwd": ROOT, "timeout": processes.LONG, "capture_output": True, "text": True}
    done = processes.run([*command, f"tests/{file}"], **run)
    assert done.returncode == 0, done.stdout[-5000:]
