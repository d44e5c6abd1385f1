"""A wrong type, anywhere in the public interface, is a TypeError: `name: argument must be ..., got ...`."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import consistency_ops as co
from consistency_ops import nn as conn
from consistency_ops import optim
from consistency_ops.engine import layer_types
from consistency_ops.experimental import ResidualNoise, decorrelate_fft, decorrelate_im2col
from consistency_ops.ops.checks import shown

GRAD, INPUTS = torch.randn(5, 20), torch.randn(30, 20)
KERNEL, IMAGES = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)


def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def select(**options):
    model = mlp()
    return optim.select_learning_rate(
        model, sgd(model), lambda x: model(x).square().mean(), [torch.ones(2, 4)], **options
    )


CALLS = {  # name in the message: (call, arguments that are numbers, arguments that are integers)
    "precondition": (lambda **o: co.precondition(GRAD, INPUTS, **o), "damping", "chunk max_rows seed step"),
    "precondition_ex": (lambda **o: co.precondition_ex(GRAD, INPUTS, **o), "damping", "chunk max_rows seed step"),
    "foreach_precondition_": (
        lambda **o: co.foreach_precondition_([GRAD.clone()], [INPUTS], **o),
        "damping",
        "chunk max_rows seed step",
    ),
    "chunked_covariance": (
        lambda **o: co.chunked_covariance(INPUTS, **{"chunk": 8, **o}),
        "",
        "chunk max_rows seed step",
    ),
    "batch_rms_norm": (
        lambda **o: co.batch_rms_norm(torch.ones(2, 3), torch.zeros(3), training=True, **o),
        "decay eps",
        "",
    ),
    "BatchRMSNorm": (lambda **o: conn.BatchRMSNorm(**{"num_features": 3, **o}), "decay eps", "num_features"),
    "deep_mlp": (
        lambda **o: conn.deep_mlp(**{"inputs": 4, "classes": 2, "depth": 2, **o}),
        "",
        "inputs classes width depth",
    ),
    "deep_convnet": (
        lambda **o: conn.deep_convnet(**{"channels": 3, "classes": 2, "depth": 3, **o}),
        "",
        "channels classes width depth pools",
    ),
    "initialise": (lambda **o: conn.deep_mlp(4, 2, depth=1, **o), "", "seed"),
    "clip_spectral_norms_": (lambda **o: conn.clip_spectral_norms_(mlp(), **o), "limit", ""),
    "OrthogonalFilter": (lambda **o: conn.OrthogonalFilter(**{"features": 4, **o}), "", "features reflections"),
    "ROAFeedForward": (
        lambda **o: conn.ROAFeedForward(
            **{"in_features": 3, "hidden_features": 4, "out_features": 2, "num_layers": 2, **o}
        ),
        "",
        "in_features hidden_features out_features num_layers checkpoint",
    ),
    "ROARNN": (
        lambda **o: conn.ROARNN(**{"input_size": 3, "hidden_size": 4, **o}),
        "beta",
        "input_size hidden_size checkpoint",
    ),
    "ROARNN.jacobian_bounds": (lambda **o: conn.ROARNN(3, 4).jacobian_bounds(**o), "", "steps"),
    "roa_jacobian_bounds": (
        lambda **o: conn.roa_jacobian_bounds(**{"alpha": 0.5, "beta": 0.5, "weight_norms": [1.0], **o}),
        "alpha beta slope",
        "",
    ),
    "SGD2": (lambda **o: optim.SGD2(mlp(), **{"lr": 0.1, **o}), "momentum weight_decay", "max_size"),
    "select_learning_rate": (select, "", "iterations"),
    "GradientNoise": (lambda **o: optim.GradientNoise(sgd(mlp()), **o), "eta gamma", "seed"),
    "ResidualNoise": (lambda **o: ResidualNoise(mlp(), **o), "scale", ""),
    "decorrelate_im2col": (lambda **o: decorrelate_im2col(KERNEL, IMAGES, **o), "damping", "max_rows"),
    "decorrelate_fft": (lambda **o: decorrelate_fft(KERNEL, IMAGES, **o), "damping", ""),
    "conditioning": (lambda **o: co.analysis.conditioning(mlp(), **o), "damping", "chunk"),
    "condition_number": (lambda **o: co.analysis.condition_number([2.0, 1.0], **o), "p", ""),
    "propagation": (
        lambda **o: co.analysis.propagation(mlp(), torch.ones(2, 4), **o),
        "tau",
        "samples exact steps seed",
    ),
    "register": (lambda **o: co.layers.register(nn.Bilinear, **o), "", "unit_dim"),
}
ARGUMENTS = [
    (owner, name, kind)
    for owner, (_, numbers, integers) in CALLS.items()
    for names, kind in ((numbers, "a number"), (integers, "an integer"))
    for name in names.split()
]


@pytest.mark.parametrize(("owner", "name", "kind"), ARGUMENTS)
def test_numbers(owner, name, kind):
    whole_layers = name == "chunk" and owner != "conditioning"  # what None means there
    for value in (
        *([] if whole_layers else [None]),
        "1",
        [1],
        torch.ones(2),
        1j,
        *([1.5, math.nan] if kind == "an integer" else []),
    ):
        with pytest.raises(TypeError) as caught:
            CALLS[owner][0](**{name: value})
        assert str(caught.value).startswith(f"{owner}: {name} must be {kind}, got "), caught.value
    assert nn.Bilinear not in layer_types._TYPES


TENSORS = {  # name in the message: a call with the argument under test
    "precondition: grad": lambda x: co.precondition(x, INPUTS),
    "precondition: inputs": lambda x: co.precondition(GRAD, x),
    "precondition: bias_grad": lambda x: co.precondition(GRAD, INPUTS, bias_grad=x),
    "foreach_precondition_: grad": lambda x: co.foreach_precondition_([x], [INPUTS]),
    "chunked_covariance: inputs": lambda x: co.chunked_covariance(x, chunk=8),
    "modulus: x": co.modulus,
    "batch_rms_norm: x": lambda x: co.batch_rms_norm(x, torch.zeros(3), training=True),
    "batch_rms_norm: running_ms": lambda x: co.batch_rms_norm(torch.ones(2, 3), x, training=True),
    "decorrelate_im2col: grad": lambda x: decorrelate_im2col(x, IMAGES),
    "decorrelate_im2col: inputs": lambda x: decorrelate_im2col(KERNEL, x),
    "decorrelate_fft: grad": lambda x: decorrelate_fft(x, IMAGES),
    "OrthogonalFilter: x": lambda x: conn.OrthogonalFilter(3)(x),
    "ROARNN: u": lambda x: conn.ROARNN(3, 4)(x),
    "ROARNN: h_0": lambda x: conn.ROARNN(3, 4)(torch.ones(2, 1, 3), x),
    "certified_radius: inputs": lambda x: co.analysis.certified_radius(mlp(), x),
    "certified_radius: targets": lambda x: co.analysis.certified_radius(mlp(), torch.ones(2, 4), x),
}


@pytest.mark.parametrize("argument", TENSORS)
def test_tensors(argument):
    for value, got in ((3, "int"), ("x", "str"), ([[1.0, 2.0]], "list"), (np.ones((2, 3)), "numpy.ndarray")):
        with pytest.raises(TypeError) as caught:
            TENSORS[argument](value)
        assert str(caught.value) == f"{argument} must be a Tensor, got {got}"


MODULES = {
    "Preconditioner": co.Preconditioner,
    "SGD2": lambda x: optim.SGD2(x, lr=0.1),
    "select_learning_rate": lambda x: optim.select_learning_rate(x, sgd(mlp()), abs, [1]),
    "ResidualNoise": ResidualNoise,
    "clip_spectral_norms_": conn.clip_spectral_norms_,
    "activation_statistics": co.analysis.activation_statistics,
    "gradient_energy": co.analysis.gradient_energy,
    "conditioning": co.analysis.conditioning,
    "weight_domination": co.analysis.weight_domination,
    "propagation": lambda x: co.analysis.propagation(x, INPUTS),
    "lipschitz_bound": co.analysis.lipschitz_bound,
}


@pytest.mark.parametrize("owner", MODULES)
def test_modules(owner):
    for value, got in ((None, "NoneType"), (3, "int"), ("model", "str"), (nn.Linear, "the class Linear")):
        with pytest.raises(TypeError) as caught:
            MODULES[owner](value)
        assert str(caught.value) == f"{owner}: model must be a torch.nn.Module, got {got}"


NAMES = {
    "Preconditioner: skip": lambda x: co.Preconditioner(mlp(), skip=x),
    "ResidualNoise: layers": lambda x: ResidualNoise(mlp(), layers=x),
    "gradient_energy: layers": lambda x: co.analysis.gradient_energy(mlp(), layers=x),
}


@pytest.mark.parametrize("argument", NAMES)
def test_names(argument):
    for value in (3, [3], [None], mlp()[0]):
        with pytest.raises(TypeError) as caught:
            NAMES[argument](value)
        assert str(caught.value).startswith(f"{argument} must be names, patterns or types, got "), caught.value


def test_a_message_names_the_class_of_what_was_given_and_never_prints_it():
    model, optimizer = mlp(), sgd(mlp())
    given = (model, optimizer, torch.ones(50, 50), [model] * 3, {"a": model}, np.ones((30, 30)), "x" * 500)
    for value in given:
        for owner, (call, numbers, integers) in CALLS.items():
            for name in (*numbers.split(), *integers.split()):
                with pytest.raises((TypeError, ValueError)) as caught:
                    call(**{name: value})
                assert "\n" not in str(caught.value) and len(str(caught.value)) < 250, (owner, name, caught.value)
        calls = {} if isinstance(value, torch.Tensor) else TENSORS
        if not isinstance(value, str | dict):  # a name is allowed there, and so are the names of a dict
            calls = calls | NAMES
        for argument, call in calls.items():
            with pytest.raises((TypeError, ValueError)) as caught:
                call(value)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 250, (argument, caught.value)
    assert shown(model) == "Sequential" and shown(sgd) == "function" and shown(nn.Linear) == "the class Linear"
    assert shown(co.nn.Modulus()) == "consistency_ops.nn.modulus.Modulus"
    assert shown((1, "a")) == "tuple (1, 'a')" and shown([model] * 20) == "list of 20"
    assert len(shown("x" * 500)) == 80 and shown({"a": optimizer}) == "dict ('a': SGD)"
