"""Modules that do not compute what their type says: hooks, replaced forwards, derived weights, other numbers."""

import contextlib
import math
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import consistency_ops as co
from consistency_ops.analysis.operator_norm import convolution_norm, matrix_norm
from support.lipschitz_networks import Function, jacobian_norm, steepest


def refusal(model, *example, **options):
    with pytest.raises(NotImplementedError) as caught:
        co.analysis.lipschitz_bound(model, *example, **options)
    assert str(caught.value).startswith("lipschitz_bound: ")
    return str(caught.value).removeprefix("lipschitz_bound: ")


def nest(layer):
    return nn.Sequential(nn.Sequential(nn.Identity(), layer))


# ---- hooks and replaced methods


def ten(module, args, output):
    return output * 10


HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(ten),
    "forward hook with keywords": lambda m: m.register_forward_hook(lambda m, a, k, o: o * 10, with_kwargs=True),
    "forward hook, always called": lambda m: m.register_forward_hook(ten, always_call=True),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 10,)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["layer", "block", "model"])
def test_hooks_are_refused_by_the_name_of_their_module(kind, where):
    model = nest(nn.Linear(3, 3))
    owner = {"layer": model[0][1], "block": model[0], "model": model}[where]
    HOOKS[kind](owner)
    name = {"layer": "0.1 (Linear)", "block": "0 (Sequential)", "model": "the model (Sequential)"}[where]
    assert refusal(model).startswith(f"{name}: its {kind.split(',')[0].removesuffix(' with keywords')}")


def test_hooks_of_all_modules_are_refused():
    handles = [
        nn.modules.module.register_module_forward_hook(ten),
        nn.modules.module.register_module_forward_pre_hook(lambda m, args: None),
    ]
    try:
        for handle in handles:
            assert "a forward hook of all modules" in refusal(nest(nn.Linear(3, 3)))
            handle.remove()
    finally:
        for handle in handles:
            handle.remove()
    assert co.analysis.lipschitz_bound(nest(nn.Linear(3, 3))).bound > 0


def test_hooks_of_this_package_only_read():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    expected = co.analysis.lipschitz_bound(model).bound
    pre = co.Preconditioner(model, torch.optim.SGD(model.parameters(), 0.1))
    with co.analysis.gradient_energy(model):
        assert co.analysis.lipschitz_bound(model, torch.randn(2, 3)).bound == expected
    pre.remove()


def test_what_older_versions_left_in_a_copied_model_in_place_of_a_hook_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    expected = co.analysis.lipschitz_bound(model).bound
    x = torch.randn(2, 3)
    output = model(x)
    model[0].register_forward_pre_hook(contextlib.nullcontext.__exit__)
    copied = pickle.loads(pickle.dumps(model))
    assert co.analysis.lipschitz_bound(copied, x).bound == expected
    assert torch.equal(copied(x), output)


def test_other_functions_of_context_managers_are_refused_as_hooks():
    layer = nn.Linear(3, 3)
    layer.register_forward_pre_hook(contextlib.nullcontext(torch.zeros(2, 3)).__exit__)
    assert "its forward pre-hook (nullcontext.__exit__) may change what it computes" in refusal(nest(layer))


def replaced(name, value):
    layer = nn.Conv1d(3, 3, 1) if name == "_conv_forward" else nn.Linear(3, 3)
    setattr(layer, name, value(layer))
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        replaced("forward", lambda m: lambda x: F.linear(x, m.weight * 10, m.bias)),
        replaced("_call_impl", lambda m: lambda x: 10 * m.forward(x)),
        replaced("_conv_forward", lambda m: lambda x, w, b: F.conv1d(x, 10 * w, b)),
    ],
    ids=["forward", "_call_impl", "_conv_forward"],
)
def test_methods_that_were_replaced_on_the_object_are_refused(layer):
    assert "was replaced on this object" in refusal(nest(layer))
    assert "was replaced on this object" in refusal(layer)


class Called(nn.Module):
    def __call__(self, x):
        return 10 * super().__call__(x)

    def forward(self, x):
        return x


class ScaledConv(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 10 * weight, bias)


class ScaledActivation(nn.LeakyReLU):
    def forward(self, x):
        return 10 * super().forward(x)


class Named(nn.Linear):
    """A subclass that changes nothing."""

    def extra_repr(self):
        return "named"


def test_classes_with_methods_of_their_own():
    assert "its class has a __call__ of its own" in refusal(Called())
    assert "there is no rule for conv1d" in refusal(nest(ScaledConv(3, 3, 1)))
    assert co.analysis.lipschitz_bound(nest(ScaledActivation(2.0))).bound == pytest.approx(20)
    layer = Named(3, 3)
    assert co.analysis.lipschitz_bound(nest(layer)).bound == pytest.approx(matrix_norm(layer.weight)[0])


def test_a_method_that_was_replaced_on_the_class_is_no_longer_the_one_of_torch(monkeypatch):
    forward = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: 10 * forward(self, x))
    assert "0.1 (Tanh): there is no rule for this module" in refusal(nest(nn.Tanh()))


def test_a_compiled_model_has_the_bound_of_the_model():
    model = nn.Sequential(nn.Linear(3, 3))
    expected = co.analysis.lipschitz_bound(model).bound
    assert co.analysis.lipschitz_bound(torch.compile(model)).bound == expected


class Stubborn(nn.Sequential):
    """Keeps its dropout on."""

    def train(self, mode=True):
        super().train(mode)
        self[0].training = True
        return self


class Merging(nn.Linear):
    """Like LoRA layers: evaluation mode changes the weight, training mode changes it back."""

    merged = False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data *= 0.5 if mode else 2
            self.merged = not mode
        return super().train(mode)


def test_training_mode():
    assert "0 (Dropout): it stays in training mode after eval()" in refusal(Stubborn(nn.Dropout(0.5)))
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(1, rel=1e-4)
    assert model.training and model[0].training and model[1].training
    layer = Merging(3, 3)
    weight = layer.weight.detach().clone()
    found = co.analysis.lipschitz_bound(nest(layer).train())
    assert found.bound == pytest.approx(2 * matrix_norm(weight)[0])
    assert torch.equal(layer.weight, weight) and not layer.merged and layer.training


# ---- derived weights


OLD = {
    "weight_norm": (weight_norm, "weight_g"),
    "spectral_norm": (spectral_norm, "weight_orig"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "weight_orig"),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(6, 6, 1)], ids=["Linear", "Conv1d"])
def test_the_bound_is_that_of_the_weight_that_the_next_forward_pass_computes(name, make):
    wrap, key = OLD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = wrap(make())
    layer(torch.randn(6, 6))
    with torch.no_grad():  # what an optimizer's step does
        old = getattr(layer, key)
        old.copy_(10 * torch.randn_like(old) if name == "spectral_norm" else 10 * old)
    found = co.analysis.lipschitz_bound(nest(layer))
    model = nest(layer).eval()
    model(torch.randn(6, 6))
    assert found.bound == pytest.approx(matrix_norm(layer.weight.flatten(1))[0], rel=1e-9)


class Tenfold(nn.Module):
    def forward(self, weight):
        return 10 * weight


class Random(nn.Module):
    def forward(self, weight):
        return weight * torch.rand(())


def test_parametrized_weights():
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        layer = wrap(nn.Linear(6, 6)).eval()
        with torch.no_grad():
            for original in layer.parametrizations.weight.parameters():
                original.mul_(3)
        found = co.analysis.lipschitz_bound(nest(layer))
        assert found.bound == pytest.approx(matrix_norm(layer.weight)[0], rel=1e-9)
    layer = nn.Linear(3, 3)
    plain = matrix_norm(layer.weight)[0]
    parametrize.register_parametrization(layer, "weight", Tenfold())
    assert co.analysis.lipschitz_bound(nest(layer)).bound == pytest.approx(10 * plain)
    with parametrize.cached():
        assert "its weight may be a cached one" in refusal(nest(layer))
    parametrize.register_parametrization(layer, "weight", Random())
    assert "it has another weight at every access" in refusal(nest(layer))


class Property(nn.Linear):
    """A weight that is computed at every access."""

    weight = property(lambda self: self.scale() * torch.eye(3), lambda self, value: None)


def test_weights_that_are_properties():
    layer = Property(3, 3, bias=False)
    del layer._parameters["weight"]
    layer.scale = lambda: 10
    assert co.analysis.lipschitz_bound(nest(layer)).bound == pytest.approx(10)
    layer.scale = lambda: torch.rand(())
    assert "it has another weight at every access" in refusal(nest(layer))


class Quantized(torch.Tensor):
    """A tensor with operations of its own."""


def test_weights_of_other_tensor_types_are_refused():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.randn(3, 3).as_subclass(Quantized))
    assert "its weight is a Quantized, which may compute otherwise than a plain tensor" in refusal(nest(layer))


class Doubling(nn.Module):
    """Doubles its weights at every call, through a door that leaves no trace."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        for parameter in self.parameters():
            parameter.data.mul_(2)
        return self.a(x)


def test_a_forward_that_writes_to_its_parameters_is_refused():
    assert "forward writes to its attribute weight" in refusal(Doubling())


def test_compiled_layers_are_what_they_were():
    model = nest(nn.Linear(3, 3))
    expected = co.analysis.lipschitz_bound(model).bound
    model[0][1].compile()
    assert co.analysis.lipschitz_bound(model).bound == expected
    model[0][1]._compiled_call_impl = lambda x: 10 * x
    assert "its _compiled_call_impl was replaced on this object" in refusal(model)


def test_weights_without_a_shape_are_refused():
    assert "its weight has no shape yet; call the model once" in refusal(nest(nn.LazyLinear(3)))


# ---- numbers that are complex, coarse, or not as they were made


def test_complex_weights():
    torch.manual_seed(1)
    layer = nn.Linear(4, 4, dtype=torch.complex64)
    with torch.no_grad():
        layer.weight.copy_(1j * torch.randn(4, 4))
    truth = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    for model in (nest(layer), nn.Sequential(layer, co.nn.Modulus())):
        assert co.analysis.lipschitz_bound(model).bound == pytest.approx(truth, rel=1e-6)
    conv = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", dtype=torch.complex128)
    x = torch.randn(1, 2, 9, dtype=torch.complex128)
    truth = jacobian_norm(conv, x)
    assert co.analysis.lipschitz_bound(conv, x).bound == pytest.approx(truth, rel=1e-9)
    assert truth * (1 - 1e-12) <= convolution_norm(conv.weight)[0] <= 1.2 * truth
    assert co.analysis.lipschitz_bound(Function(lambda x: x * (3 + 4j))).bound == pytest.approx(5)


def test_functions_of_real_numbers_are_refused_for_complex_signals():
    message = "its constant is known for real signals only, and this one may be complex"
    assert f"1 (Tanh): {message}" in refusal(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64), nn.Tanh()))
    assert message in refusal(nn.Sequential(nn.Tanh()), torch.randn(1, 2, dtype=torch.complex64))
    assert message in refusal(Function(lambda x: torch.sin(x * 1j)))
    assert message in refusal(Function(lambda x: torch.sigmoid(x.to(torch.complex64))))
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64), co.nn.Modulus(), nn.Tanh())
    assert co.analysis.lipschitz_bound(model, torch.randn(1, 2, dtype=torch.complex64)).bound > 0  # real again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_types_are_refused(dtype):
    assert f"its weight is {dtype}, whose rounding is no continuous map" in refusal(nest(nn.Linear(3, 3, dtype=dtype)))
    assert f"a signal is {dtype}" in refusal(nest(nn.ReLU()), torch.randn(1, 3, dtype=dtype))
    assert co.analysis.lipschitz_bound(nest(nn.Linear(3, 3).to(dtype).float())).bound > 0


class Mixed(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("other", torch.ones(1, dtype=dtype))

    def forward(self, x):
        return self.a(x).double().to(x.dtype).to(self.other)


def test_casts_to_the_type_of_another_tensor():
    assert "it may round to the type of another tensor" in refusal(Mixed(torch.int64))
    assert "it may round to the type of another tensor" in refusal(Mixed(torch.float16))
    model = Mixed(torch.float32)
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(matrix_norm(model.a.weight)[0])


def test_the_epsilon_of_an_rms_norm_is_that_of_its_precision():
    for dtype in (torch.float32, torch.float64):
        norm, x = nn.RMSNorm(6, dtype=dtype), torch.randn(1, 6, dtype=dtype)
        expected = 1 / math.sqrt(torch.finfo(dtype).eps)
        assert co.analysis.lipschitz_bound(norm).bound == pytest.approx(expected)
        assert co.analysis.lipschitz_bound(norm, x).bound == pytest.approx(expected)
        assert jacobian_norm(norm, 0 * x) == pytest.approx(expected, rel=1e-3)
    assert co.analysis.lipschitz_bound(nn.LayerNorm(3, eps=0.0)).bound == math.inf


def test_instance_norms_with_running_statistics_are_frozen():
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True).double()
    norm.running_var.fill_(4.0)
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    assert co.analysis.lipschitz_bound(norm, x).bound == pytest.approx(jacobian_norm(norm.eval(), x), rel=1e-9)
    norm.track_running_stats = False  # from now on by the sample
    assert co.analysis.lipschitz_bound(norm).bound == pytest.approx(1 / math.sqrt(norm.eps))
    norm.track_running_stats = True
    norm.running_var.fill_(math.nan)
    assert co.analysis.lipschitz_bound(norm).bound == math.inf


@pytest.mark.parametrize("kind", ["permutation", "shift", "householder", "hadamard", "dense", "identity"])
def test_filters_whose_buffers_were_changed(kind):
    module = co.nn.OrthogonalFilter(6, kind, dtype=torch.float64)
    x = torch.randn(1, 6, dtype=torch.float64)
    assert co.analysis.lipschitz_bound(module).bound == pytest.approx(1, rel=1e-6)
    for tensor in module.buffers():
        tensor.mul_(2) if tensor.is_floating_point() else tensor.zero_()
    if kind == "hadamard":
        assert "its Hadamard matrix was changed" in refusal(module)
        module.sylvester.div_(2)
    assert co.analysis.lipschitz_bound(module).bound >= jacobian_norm(module, x) * (1 - 1e-9)


def test_large_and_small_weights_neither_overflow_nor_vanish():
    for scale in (1e200, 1e-200):
        conv = nn.Conv1d(2, 2, 3, padding=1).double()
        plain = co.analysis.lipschitz_bound(conv).log_bound
        with torch.no_grad():
            conv.weight *= scale
        assert co.analysis.lipschitz_bound(conv).log_bound == pytest.approx(plain + math.log(scale), rel=1e-6)


def test_a_module_that_is_used_twice_counts_twice():
    layer, act = nn.Linear(4, 4, bias=False).double(), nn.LeakyReLU(3.0, inplace=True)
    model = nn.Sequential(layer, act, layer, act)
    expected = 9 * matrix_norm(layer.weight)[0] ** 2
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(expected, rel=1e-9)
    assert steepest(model, (4,), steps=6) <= expected


def ten_times(function):
    return lambda *args, **kwargs: 10 * function(*args, **kwargs)


REPLACED = {
    "torch.nn.functional.linear": (F, "linear"),
    "torch.nn.functional.relu": (F, "relu"),
    "torch.relu": (torch, "relu"),
    "torch.nn.functional.conv1d": (F, "conv1d"),
    "torch.nn.modules.conv.Conv1d._conv_forward": (nn.Conv1d, "_conv_forward"),
    "torch.nn.modules.module.Module.__call__": (nn.Module, "__call__"),
    "torch.nn.modules.module.Module._call_impl": (nn.Module, "_call_impl"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_for_the_whole_process_is_refused_by_name(what, monkeypatch):
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    x, (owner, name) = torch.randn(2, 3, 1), REPLACED[what]
    expected = co.analysis.lipschitz_bound(model, x).bound
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, ten_times(getattr(owner, name)))
        with pytest.raises(NotImplementedError, match=f"lipschitz_bound: {re.escape(what)} was replaced"):
            co.analysis.lipschitz_bound(model, x)
        with pytest.raises(NotImplementedError, match=f"fold_rms_norm: {re.escape(what)} was replaced"):
            co.nn.fold_rms_norm(nn.Sequential(nn.Linear(3, 3)))
    assert co.analysis.lipschitz_bound(model, x).bound == expected


def test_another_function_of_torch_in_the_place_of_one_is_refused(monkeypatch):
    monkeypatch.setattr(F, "relu", F.gelu)
    with pytest.raises(NotImplementedError, match="functional.relu was replaced"):
        co.analysis.lipschitz_bound(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def test_a_mode_that_stands_before_all_functions_is_refused():
    class Scales(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 10 * result if function is F.linear else result

    model = nn.Sequential(nn.Linear(3, 3))
    with Scales(), pytest.raises(NotImplementedError, match="a .*Scales stands before all functions"):
        co.analysis.lipschitz_bound(model)
    with torch.device("cpu"):
        assert co.analysis.lipschitz_bound(model).bound > 0
