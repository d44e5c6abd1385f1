"""set_backend, the check before the kernels of a device are trusted, co.verify, and what is said when they are not."""

import logging
import os
import sys
import warnings

import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops.ops import backend, verification
from consistency_ops.ops.registration import NAMESPACE
from support import processes, second_device
from support.samples import layer


@pytest.fixture(autouse=True)
def auto_backend():
    """Whatever a test chooses, the next one starts as a process does."""
    yield
    co.set_backend("auto")
    backend._take_away("CPU")


@pytest.fixture
def wrong_kernel():
    """Replaces the CPU kernel of an operator by another function, as a device would that does not run it right."""
    libraries = []

    def replace(name, function):
        library = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl(name, function, "CPU", allow_override=True)
        libraries.append(library)

    yield replace
    backend._take_away("CPU")
    for library in reversed(libraries):
        library._destroy()


def _gate_before_the_cpu():
    backend._put_gate("CPU")


def _twice_as_long(grads, bias_grads, inputs, *rest):
    info, used = backend.kernel("foreach_precondition_")(grads, bias_grads, inputs, *rest)
    for grad in grads:
        grad.mul_(2)
    return info, used


def _fails_to_launch(*args):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def _train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    co.Preconditioner(model, optimizer)
    x, y = torch.randn(64, 40), torch.randn(64, 3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_torch_backend_computes_what_the_kernels_compute():
    grad, inputs = layer(units=300)
    native = co.precondition_ex(grad, inputs, chunk=64)
    co.set_backend("torch")
    portable = co.precondition_ex(grad, inputs, chunk=64)
    assert torch.equal(portable.info, native.info)
    torch.testing.assert_close(portable.corrected, native.corrected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(portable.corrected, native.corrected)  # two ways to sum: it was not the kernel
    co.set_backend("native")
    assert torch.equal(co.precondition(grad, inputs, chunk=64), native.corrected)


def test_a_training_on_the_torch_backend_goes_as_on_the_kernels():
    native = _train()
    co.set_backend("torch")
    torch.testing.assert_close(torch.tensor(_train()), torch.tensor(native), rtol=1e-5, atol=0)
    assert native[-1] < native[0]


def test_kernels_that_agree_are_used_from_then_on(caplog):
    grad, inputs = layer()
    native = co.precondition(grad, inputs)
    _gate_before_the_cpu()
    assert torch.equal(co.precondition(grad, inputs), native)
    assert "CPU" not in backend._before and not caplog.records


@pytest.mark.parametrize("kernel", [_twice_as_long, _fails_to_launch], ids=["wrong result", "no launch"])
def test_a_broken_kernel_is_replaced_with_one_log_line_and_training_goes_on(kernel, wrong_kernel, caplog):
    right = _train()
    wrong_kernel("foreach_precondition_", kernel)
    _gate_before_the_cpu()
    with caplog.at_level(logging.WARNING, "consistency_ops"):
        torch.testing.assert_close(torch.tensor(_train()), torch.tensor(right), rtol=1e-5, atol=0)
    (record,) = [r for r in caplog.records if r.name == "consistency_ops"]
    said = record.getMessage()
    assert "torch's own operations take their place" in said and 'set_backend("torch")' in said
    assert "foreach_precondition_" in said if kernel is _twice_as_long else "no kernel image" in said


def test_a_broken_kernel_of_another_operator_is_found_at_the_first_call(wrong_kernel, caplog):
    wrong_kernel("batch_rms_norm_divide", lambda x, denominator: x / 2)
    _gate_before_the_cpu()
    x = torch.randn(8, 5)
    assert torch.equal(co.modulus(x), x.abs())
    assert "batch_rms_norm_divide" in caplog.text
    running = torch.zeros(5)
    want = x / (x.square().mean(0) * 0.9 + 0.01 * (x.square().mean(0).max() * 0.9 + 1e-6)).sqrt()
    torch.testing.assert_close(co.batch_rms_norm(x, running, training=True), want)


def test_the_kernels_are_checked_when_a_preconditioner_is_made(monkeypatch, wrong_kernel, caplog):
    """A CUDA graph may capture its first step, and under a capture nothing can be checked."""
    wrong_kernel("foreach_precondition_", _twice_as_long)
    _gate_before_the_cpu()
    model = nn.Linear(4, 3)
    pre = co.Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "torch's own operations take their place" in caplog.text and pre.steps == 0
    monkeypatch.setattr(backend, "decide", lambda *args: pytest.fail("checked twice"))
    other = nn.Linear(4, 3)
    co.Preconditioner(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_inside_a_capture_nothing_is_checked_and_the_kernels_are_not_used(monkeypatch, wrong_kernel):
    wrong_kernel("foreach_precondition_", _twice_as_long)
    grad, inputs = layer()
    co.set_backend("torch")
    portable = co.precondition(grad, inputs)
    monkeypatch.setattr(backend, "_capturing", lambda device: True)
    monkeypatch.setattr(backend, "decide", lambda *args: pytest.fail("checked inside a capture"))
    _gate_before_the_cpu()
    assert torch.equal(co.precondition(grad, inputs), portable)


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((8, 0), ["8.0", "9.0a", "10.0", "12.0+PTX"], True),
        ((8, 6), ["8.0"], True),
        ((9, 0), ["9.0a"], True),
        ((10, 3), ["10.0"], True),
        ((12, 1), ["12.0+PTX"], True),
        ((13, 0), ["12.0+PTX"], True),
        ((7, 5), ["8.0", "9.0a", "10.0", "12.0+PTX"], False),
        ((11, 0), ["8.0", "9.0a", "10.0", "12.0+PTX"], False),
        ((9, 1), ["9.0a"], False),
        ((9, 0), [], False),
    ],
)
def test_which_devices_the_compiled_architectures_serve(capability, compiled, runs):
    said = backend.missing_architecture(*capability, compiled)
    if runs:
        assert said is None
    else:
        major, minor = capability
        assert f"compute capability {major}.{minor}" in said
        cure = "the kernels need 8.0 or newer" if major < 8 else f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
        assert cure in said


def test_a_device_without_code_in_the_build_computes_the_portable_way(monkeypatch, wrong_kernel, caplog):
    wrong_kernel("foreach_precondition_", _twice_as_long)
    said = backend.missing_architecture(7, 5, ["8.0"])
    monkeypatch.setattr(backend, "unfit_architecture", lambda device: said)
    monkeypatch.setattr(backend, "differences_of", lambda device: pytest.fail("ran kernels that are not there"))
    grad, inputs = layer()
    co.set_backend("torch")
    portable = co.precondition(grad, inputs)
    _gate_before_the_cpu()
    assert torch.equal(co.precondition(grad, inputs), portable)
    assert "compute capability 7.5" in caplog.text


def test_native_on_a_device_without_kernels_says_what_helps():
    device = second_device.set_up()
    co.set_backend("native")
    with pytest.raises(NotImplementedError, match=r'modulus: .*no kernels for second_device.*set_backend\("auto"\)'):
        co.modulus(torch.ones(3).to(device))


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="set_backend: name must be 'auto', 'native' or 'torch', got 'cuda'"):
        co.set_backend("cuda")


def _python(code, **environment):
    return processes.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_the_environment_variable_chooses_the_backend():
    code = "import consistency_ops.ops.backend as b; print(b._backend, 'CPU' in b._before)"
    assert _python(code, CONSISTENCY_OPS_BACKEND="torch").stdout.split() == ["torch", "True"]
    assert _python(code, CONSISTENCY_OPS_BACKEND="").stdout.split() == ["auto", "False"]
    assert "must be 'auto', 'native' or 'torch', got 'gpu'" in _python(code, CONSISTENCY_OPS_BACKEND="gpu").stderr


# co.verify


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_every_operator_agrees_with_float64_on_the_cpu(kind):
    co.set_backend(kind)
    verification = co.verify("cpu")
    assert verification.ok, str(verification)
    assert {finding.operator for finding in verification.findings} >= set(backend.PORTABLE) - {
        "modulus_complex_backward"
    }


def test_every_operator_agrees_with_float64_on_a_device_without_kernels():
    verification = co.verify(second_device.set_up())
    assert verification.ok, str(verification)


@pytest.mark.parametrize("name", sorted(set(backend.PORTABLE) - {"modulus_complex_backward"}))
def test_verify_finds_a_wrong_operator(name, wrong_kernel):
    """Each operator in turn: its results, or what it writes, are off by a thousandth, or by one."""
    right = backend.kernel(name)

    def wrong(*args):
        results = right(*args)
        written = [t for group in (args, results or ()) for t in verification._tensors(list(group))]
        changed = [t for t in written if t.numel() and not any(t is a for a in verification._tensors(list(args)))]
        for tensor in changed or verification._tensors(list(args))[:1]:
            tensor.mul_(1.001) if tensor.is_floating_point() else tensor.add_(1)
        return results

    if name == "modulus" or name.startswith("batch"):
        wrong = lambda *args: right(*args) * 1.001  # noqa: E731
    wrong_kernel(name, wrong)
    found = co.verify("cpu")
    assert not found.ok and {f.operator for f in found.findings if not f.ok} == {name}, str(found)
    assert "with a difference" in str(found)


def test_the_command_prints_a_table_and_its_status_says_whether_something_differs(capsys, wrong_kernel):
    from consistency_ops.__main__ import main

    assert main(["verify", "--device", "cpu"]) == 0
    assert "no difference" in capsys.readouterr().out
    wrong_kernel("modulus", lambda x: x)
    assert main(["verify", "--device", "cpu"]) == 1
    assert "result 0 differs" in capsys.readouterr().out
    assert main(["verify", "--device", "nowhere"]) == 2
    assert "torch has no device 'nowhere' here" in capsys.readouterr().err
