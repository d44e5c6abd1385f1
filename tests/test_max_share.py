"""``max_share``: the count that decides, and what becomes of the layers that are left alone."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from torch import nn

from consistency_ops import Preconditioner, capture
from consistency_ops.engine.layer_cost import (
    CALL,
    COVARIANCE,
    FACTOR,
    GRADIENT_BYTE,
    GROUP_CALL,
    NARROW_OPERATION,
    OWN_BYTE,
    OWN_CALL,
    PRODUCT,
    ROW_BYTE,
    STORED_CALL,
    WHITENED_PASSES,
    LayerSize,
    Method,
    correction_cost,
    own_cost,
    share,
)
from support.ranks import run

PAPER = Method(chunk=128, max_rows=4096)


def linear(rows: int, width: int, outputs: int, **more) -> LayerSize:
    sizes = dict(output_rows=rows, units=width, groups=1, taps=1, held=outputs, computed=outputs)
    return LayerSize(rows=rows, width=width, **{**sizes, **more})


# The count


def test_forward_and_backward_are_counted():
    n, d, m = 512, 256, 64
    assert own_cost(linear(n, d, m)) == 6 * n * d * m + 12 * OWN_BYTE * (n * d + n * m + d * m) + OWN_CALL


def test_the_correction_is_counted():
    n, d, m, c = 512, 256, 64, 128
    refresh = 12 * ROW_BYTE * n * d + COVARIANCE * n * d * c + FACTOR * d * c * c
    product = 2 * PRODUCT * m * d * c + 8 * GRADIENT_BYTE * m * d
    assert correction_cost(linear(n, d, m), PAPER) == pytest.approx(refresh + product + CALL)
    stored = 4 * ROW_BYTE * d * c  # inverses, read in every step
    every = dataclasses.replace(PAPER, every=4)
    assert correction_cost(linear(n, d, m), every) == pytest.approx(refresh / 4 + product + stored + STORED_CALL)
    averaged = dataclasses.replace(PAPER, averages=True)
    kept = refresh + 3 * stored + product + STORED_CALL
    assert correction_cost(linear(n, d, m), averaged) == pytest.approx(kept)
    whitened = dataclasses.replace(averaged, whitens=True)
    more = 4 * WHITENED_PASSES * GRADIENT_BYTE * m * d
    assert correction_cost(linear(n, d, m), whitened) == pytest.approx(kept + more)
    both = dataclasses.replace(whitened, outputs=True)
    assert correction_cost(linear(n, d, m), both) > correction_cost(linear(n, d, m), whitened)


def test_few_rows_are_cheaper_and_whole_panels():
    d, m, r = 256, 64, 16
    want = 12 * ROW_BYTE * 5 * d + COVARIANCE * d * r * r + FACTOR * 2 * r**3
    want += 4 * PRODUCT * m * d * r + 8 * GRADIENT_BYTE * m * d + CALL
    assert correction_cost(linear(5, d, m), PAPER) == pytest.approx(want)
    assert correction_cost(linear(5, d, m), PAPER) < correction_cost(linear(33, d, m), PAPER)


def test_rows_beyond_the_sample_cost_the_layer_alone():
    few, many = linear(4096, 256, 256), linear(65536, 256, 256)
    assert correction_cost(many, PAPER) == correction_cost(few, PAPER)
    assert share(many, PAPER) < share(few, PAPER) / 8


@pytest.mark.parametrize("more", [{"chunk": 256}, {"chunk": None}])
def test_larger_chunks_cost_more(more):
    size = linear(4096, 1024, 1024)
    assert correction_cost(size, dataclasses.replace(PAPER, **more)) > correction_cost(size, PAPER)


def test_kept_matrices_are_padded():
    """A layer of few units has a matrix of a whole chunk, as the operators keep it; convolution groups have not."""
    averaged = dataclasses.replace(PAPER, averages=True)

    def added(size):
        return correction_cost(size, averaged) - correction_cost(size, PAPER)

    assert added(linear(512, 1, 64)) > 3 * 128**2 * 4 * ROW_BYTE
    groups = linear(512, 1, 64 * 9, groups=64, taps=9)
    of_groups = 64 * (2 * GROUP_CALL + ROW_BYTE * 64 * 512)
    assert added(groups) < of_groups + 64 * 128**2 * 4 * ROW_BYTE / 100 + added(linear(512, 1, 64))


def test_layers_that_share_rows_share_their_factor():
    size = linear(512, 256, 256)
    assert correction_cost(size, PAPER, sharers=3) < correction_cost(size, PAPER)


def test_groups_of_few_units_are_no_matrix_product():
    narrow = linear(512, 1, 64 * 9, groups=64, taps=9)
    extra = own_cost(narrow) - own_cost(dataclasses.replace(narrow, groups=1))
    moved = 12 * OWN_BYTE * 512 * 63
    assert extra == pytest.approx(6 * 512 * 64 * 9 * (NARROW_OPERATION - 1) + moved)


def test_the_order_of_some_layers():
    """Shares grow with outputs over rows: the last layers of a convnet at a small batch are the dearest."""
    early = LayerSize(8192, 8192, 64, 64, 1, 9, 64 * 9, 64 * 9)
    late = LayerSize(128, 32, 256, 256, 1, 9, 512 * 9, 512 * 9)
    assert share(early, PAPER) < 0.1 < 0.3 < share(late, PAPER)


# What becomes of the layers


def model_of(widths=(64, 64, 1000), seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:]))


X = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
FEW = X[:4]


def shares(model, x, **options) -> list[float]:
    """What a first step counts for each layer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    pre = Preconditioner(model, optimizer, max_share=1e9, **options)
    step(model, optimizer, x)
    return [layer["share"][1].item() for layer in pre.state_dict()["layers"].values()]


def step(model, optimizer, *batches):
    optimizer.zero_grad()
    for x in batches:
        model(x).square().mean().backward()
    optimizer.step()


def mixed(dtype=torch.float32):
    """The layer with many outputs is dearer than the other; a limit between both."""
    model = model_of().to(dtype)
    cheap, dear = sorted(shares(copy.deepcopy(model), X[:32].to(dtype)))
    return model, (cheap * dear) ** 0.5


METHODS = [{}, {"every": 3}, {"decay": 0.5}, {"mode": "whiten"}, {"mode": "whiten", "outputs": True, "dct": True}]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_a_dear_layer_is_as_if_it_were_skipped(options):
    found = []
    for more in ({"max_share": 1e-3}, {"skip": ["2"]}):
        model = model_of()
        if "max_share" in more:
            one, other = shares(copy.deepcopy(model), X[:32], **options)
            more = {"max_share": (one + other) / 2}
            assert one != other
            skipped = "2" if other > one else "0"
        else:
            more = {"skip": [skipped]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pre = Preconditioner(model, optimizer, **options, **more)
        for _ in range(4):
            step(model, optimizer, X[:32])
        found.append([p.detach() for p in model.parameters()])
        assert [layer.capture is None for layer in pre._layers] == [skipped == "0", skipped == "2"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_left_has_no_hooks_and_is_named(caplog):
    model, limit = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer, max_share=limit)
    with caplog.at_level(logging.INFO, "consistency_ops"):
        for _ in range(3):
            step(model, optimizer, X[:32])
    left = [layer for layer in pre._layers if layer.capture is None]
    assert len(left) == 1
    module = left[0].module()
    assert not module._forward_pre_hooks and not module.weight._post_accumulate_grad_hooks
    assert len([r for r in caplog.records if f"{left[0].name}: correcting it counts" in r.message]) == 1
    (said,) = [r.message for r in caplog.records if "left alone, because" in r.message]
    assert left[0].name in said
    assert pre.summary().count("of its passes, max_share=") == 1
    assert f"max_share={limit:g}" in repr(pre)
    assert pre.stats()["layers"] == 1 and pre.stats()["uncorrected"] == 1
    pre.remove()
    assert not any(key.startswith("consistency_") for state in optimizer.state.values() for key in state)


def test_nothing_is_stored_without_it():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer)
    step(model, optimizer, X[:32])
    assert pre.state_dict()["layers"] == {}


@pytest.mark.parametrize("how", ["optimizer", "own", "early"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_decides_as_before(how, dtype):
    """Its batches are much larger: by them both layers would be corrected."""
    model, limit = mixed(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pre = Preconditioner(model, optimizer, max_share=limit)
    step(model, optimizer, X[:32].to(dtype))
    want = [layer.capture is None for layer in pre._layers]
    assert sum(want) == 1
    saved, own = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(pre.state_dict())

    model = model_of().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if how == "early":
        optimizer.load_state_dict(saved)
    pre = Preconditioner(model, optimizer, max_share=limit)
    if how == "optimizer":
        optimizer.load_state_dict(saved)
    elif how == "own":
        step(model, optimizer, X.to(dtype))
        assert not any(layer.capture is None for layer in pre._layers)
        pre.load_state_dict(own)
    for _ in range(2):
        step(model, optimizer, X.to(dtype))
        assert [layer.capture is None for layer in pre._layers] == want
    assert pre.state_dict()["layers"].keys() == own["layers"].keys()


def test_a_state_that_corrects_more_brings_the_hooks_back():
    model, limit = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pre = Preconditioner(model, optimizer, max_share=limit)
    step(model, optimizer, X)
    saved = copy.deepcopy(optimizer.state_dict())
    other = model_of()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    pre = Preconditioner(other, optimizer, max_share=limit)
    step(other, optimizer, X[:32])
    assert sum(layer.capture is None for layer in pre._layers) == 1
    optimizer.load_state_dict(saved)
    step(other, optimizer, X[:32])
    assert all(layer.capture is not None for layer in pre._layers) and pre.stats()["layers"] == 2


def test_another_limit_decides_by_the_share_that_was_counted():
    model, limit = mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    Preconditioner(model, optimizer, max_share=limit)
    step(model, optimizer, X[:32])
    saved = optimizer.state_dict()
    for other, left in ((1e9, 0), (1e-9, 2), (None, 0)):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pre = Preconditioner(model, optimizer, max_share=other)
        optimizer.load_state_dict(copy.deepcopy(saved))
        step(model, optimizer, X[:32])
        assert sum(layer.capture is None for layer in pre._layers) == left


def test_all_layers_left_is_no_alarm(caplog):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer, max_share=1e-9)
    for _ in range(30):
        step(model, optimizer, FEW)
    del pre, optimizer, model
    assert len(caplog.records) == 1 and "left alone, because" in caplog.records[0].message


def test_micro_batches_count_together():
    model = model_of()
    whole = shares(copy.deepcopy(model), X[:512])
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    pre = Preconditioner(model, optimizer, max_share=1e9)
    step(model, optimizer, X[:256], X[256:512])
    assert [layer["share"][1].item() for layer in pre.state_dict()["layers"].values()] == whole


def test_a_stride_makes_fewer_outputs():
    def of(stride):
        torch.manual_seed(0)
        return shares(nn.Conv2d(8, 8, 3, stride=stride, padding=1), torch.randn(4, 8, 16, 16))[0]

    assert of(2) > of(1)


@pytest.mark.parametrize("module", [nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2), nn.Conv1d(8, 4, 3)])
def test_other_layers_are_counted(module):
    x = torch.randn(4, 8, 16) if isinstance(module, nn.Conv1d) else torch.randn(4, 8, 16, 16)
    (found,) = shares(module, x)
    assert 0 < found < 10


def test_weights_that_are_captured_by_hand():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 64))

        def forward(self, x):
            capture(x, self.weight)
            return x @ self.weight.T

    model = nn.Sequential(nn.Linear(64, 64), Scores())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer, max_share=1e-9)
    for _ in range(3):
        step(model, optimizer, FEW)
    assert all(layer.capture is None for layer in pre._layers)


def test_compiled_models_are_compiled_once_more():
    torch._dynamo.reset()
    model, limit = mixed()
    compiled = []

    def backend(graph, inputs):
        compiled.append(sum("capture" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pre = Preconditioner(model, optimizer, max_share=limit)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(5):
        step(fast, optimizer, X[:32])
    assert compiled == [2, 1]
    assert sum(layer.capture is None for layer in pre._layers) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "half"])
def test_bad_limits(value):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(ValueError, match=r"max_share must be None or a finite number > 0, got"):
        Preconditioner(model, optimizer, max_share=value)


def test_layers_of_two_optimizers():
    model, limit = mixed()
    one, other = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)
    pre = Preconditioner(model, [one, other], max_share=limit)
    model(X[:32]).square().mean().backward()
    one.step()
    other.step()
    assert pre.summary().count("of its passes, max_share=") == 1
    assert set(pre.state_dict()["layers"]) == {"0", "2"}


# Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    names = ["ddp_max_share", "fully_shard_max_share"]
    return run("max_share_ranks", names, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["ddp_max_share", "fully_shard_max_share"])
def test_ranks_with_other_batches_decide_alike(ranks, name):
    """One rank has two rows, the other hundreds: alone they would decide in two ways. The mean of both counts."""
    assert not [found for found in ranks[name] if isinstance(found, str)]  # a traceback
    for case in ranks[name][0]:
        here, there = (found[case] for found in ranks[name])
        assert here["left"] == there["left"] and sum(here["left"]) == 1
        assert here["shares"] == there["shares"]
        assert here["same"] and there["same"]
        assert here["resumed"] == there["resumed"] == here["left"]
