"""Layers that keep their gradient, and what the summary says of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from consistency_ops.preconditioner import Preconditioner
from support.training import assert_equal, backward, corrected_layers, data, gradients, mlp, train


@pytest.mark.parametrize(
    ("skip", "left"),
    [("0", "0"), (["2", "4"], "24"), ("[02]", "02"), (nn.Linear, None), ([nn.Conv2d, "4"], "4")],
    ids=str,
)
def test_skip(skip, left):
    model = mlp()
    if left is None:
        with pytest.raises(ValueError, match=r"must have a layer to correct, got none[\s\S]*skipped"):
            Preconditioner(model, skip=skip)
        return
    pre = Preconditioner(model, skip=skip)
    corrected = corrected_layers(model, pre)
    assert {name.split(".")[0] for name in corrected} == set("024") - set(left)
    assert pre.summary().count("skipped") == len(left)


def test_skip_pattern_without_a_match_warns():
    with pytest.warns(UserWarning, match="'haed' matches no module"):
        Preconditioner(mlp(), skip="haed")


def test_frozen_unused_and_parametrized_layers():
    model = mlp()
    model.extra = nn.Linear(3, 3)
    model[0].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[4])
    model.forward = lambda x: model[4](F.relu(model[2](F.relu(model[0](x)))))
    pre = Preconditioner(model)
    assert corrected_layers(model, pre) == {"2.weight", "2.bias"}
    summary = pre.summary()
    assert "frozen" in summary and "weight is computed by _WeightNorm" in summary and "no input seen yet" in summary


def test_unfreezing_and_adding_a_group():
    model = mlp()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    assert pre.stats()["layers"] == 1 and "not in the optimizer" in pre.summary()
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    train(model, optimizer, 2)
    assert pre.stats()["layers"] == 3 and pre.stats()["uncorrected"] == 0


def test_two_optimizers_correct_their_own_layers():
    model, (x, y) = mlp(), data()
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model[0], nn.Sequential(model[2], model[4])))
    a, b = Preconditioner(model, first), Preconditioner(model, second)
    backward(model, x, y)
    before = gradients(model)
    first.step()
    assert not torch.equal(before[0], model[0].weight.grad)
    assert_equal(before[2:], gradients(model)[2:])
    second.step()
    assert a.stats()["layers"] == 1 and b.stats()["layers"] == 2


def test_bias_false_leaves_biases():
    model = mlp()
    pre = Preconditioner(model, bias=False)
    assert corrected_layers(model, pre) == {"0.weight", "2.weight", "4.weight"}


def test_sparse_gradient_is_left():
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    backward(model, x, y)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    pre.step()
    assert model[0].weight.grad.is_sparse and pre.stats()["layers"] == 2
    assert "gradient is sparse" in pre.summary()


def test_bad_values_stay_in_their_layer():
    """NaN in the input of one layer: its gradient stays, the others are corrected; nothing is raised."""
    model, (x, y) = mlp(), data()
    pre = Preconditioner(model)
    backward(model, x, y)
    pre._layers[1].capture.rows[3, 3] = math.nan
    before = gradients(model)
    pre.step()
    after = gradients(model)
    assert_equal(before[2:4], after[2:4])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[4], after[4])
    assert pre.stats()["failed_chunks"] == 1 and "1 of 1 chunks failed" in pre.summary()


@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_keeps_its_gradient(sparse):
    """Its input is a number, not a row of units."""
    model = nn.Sequential(nn.Embedding(7, 6, sparse=sparse), nn.Linear(6, 3))
    pre = Preconditioner(model)
    model(torch.arange(5)).square().sum().backward()
    before = model[0].weight.grad.clone()
    pre.step()
    after = model[0].weight.grad
    assert torch.equal(*(grad.to_dense() if sparse else grad for grad in (before, after)))
    assert pre.stats()["layers"] == 1
    assert "unsupported type; gradient left as it is" in pre.summary()
