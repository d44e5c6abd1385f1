"""Kinds of layer, precision and checkpointing on four ranks equal one process with all their data."""

import re

import pytest
import torch
import torch.distributed as dist
from test_distributed import TOLERANCE, difference, of

from support import distributed_layers as scenarios
from support.distributed_scenarios import SHARES, single
from support.ranks import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

SCENARIOS = [
    *("ddp_layers", "fully_shard_layers", "packed_columns", "uneven_shards", "sgd2"),
    *("scaler", "autocast", "bfloat16", "checkpointed", "resumed_layers", "fully_shard_experts", "flat_parameters"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("distributed_layers", SCENARIOS, 4, tmp_path_factory.mktemp("ranks"))


def status(summary):
    """Return the last column of a summary by the name of the layer."""
    rows = (re.split(r"  +", line.strip()) for line in summary.splitlines()[1:])
    return {row[0].removeprefix("module."): row[-1] for row in rows}


CORRECTED = [f"{name}.in_proj.{part}" for name in ("attention", "cross") for part in ("query", "key", "value")]


@pytest.mark.parametrize("name", scenarios.LAYERS)
def test_attention_and_transposed_convolutions_in_ddp(results, name):
    want = scenarios.single_mixed(scenarios.LAYERS[name])
    for found in of(results, "ddp_layers"):
        assert difference(found[name]["parameters"], want) < TOLERANCE
        assert found[name]["same"]
        layers = status(found[name]["summary"])
        assert {k for k, v in layers.items() if v == "ok"} == {"up", "same", "head", *CORRECTED}


@pytest.mark.parametrize("name", [*scenarios.LAYERS, "hybrid"])
def test_attention_and_transposed_convolutions_in_fully_shard(results, name):
    """Query, key and value share one sharded weight, whose parts begin and end inside of shards."""
    want = scenarios.single_mixed(scenarios.LAYERS.get(name, {}), skip="up")
    for found in of(results, "fully_shard_layers"):
        assert difference(found[name]["parameters"], want) < TOLERANCE
        assert found[name]["same"] and found[name]["failed"] == 0
        layers = status(found[name]["summary"])
        assert {k for k, v in layers.items() if v == "ok"} == {"same", "head", *CORRECTED}
        assert layers["up"] == "groups of a convolution are sharded; gradient left as it is"


def test_a_packed_weight_sharded_over_its_units_is_left(results):
    for found in of(results, "packed_columns"):
        assert found["unchanged"]
        left = "query, key and value share one weight that is not sharded over whole rows; gradient left as it is"
        assert found["summary"].count(left) == 3


def test_unequal_shards_of_units_are_left(results):
    want = scenarios.single_uneven()
    for found in of(results, "uneven_shards"):
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"]
        layers = status(found["summary"])
        assert layers == {"0": "ok", "2": "18 units are sharded unevenly over 4 ranks; gradient left as it is"}


def test_sgd2_on_ranks_is_plain_and_says_so(results):
    want = scenarios.single_sgd2()
    for found in of(results, "sgd2"):
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"]
        assert found["summary"].count("SGD2 does not pool over ranks; gradient left as it is") == 3
        (message,) = found["messages"]
        assert "SGD2 does not pool covariances over ranks" in message and "use Preconditioner" in message


@pytest.mark.parametrize("name", ["ddp", "fully_shard"])
def test_a_step_that_all_ranks_skip_leaves_nothing_behind(results, name):
    """The scale is a power of two, so nothing is rounded by it."""
    want = single({"decay": 0.5})
    for found in of(results, "scaler"):
        assert difference(found[name]["parameters"], want) < TOLERANCE
        assert found[name]["same"] and found[name]["steps"] == 4 and found[name]["failed"] == 0


def test_autocast_on_ranks(results):
    """Weight gradients are rounded to bfloat16 (eps 8e-3) on each rank, in four steps; so are the rows."""
    want = scenarios.single_autocast()
    for found in of(results, "autocast"):
        assert difference(found["parameters"], want) < 0.03
        assert found["same"] and found["rows"] == "torch.bfloat16"


def test_bfloat16_parameters_on_ranks(results):
    want = scenarios.single_bfloat16()
    for found in of(results, "bfloat16"):
        assert difference(found["parameters"], want) < 0.03
        assert found["same"]
        assert "covariance" in found["dtypes"] and set(found["dtypes"].values()) == {"torch.float32"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_on_ranks(results, reentrant):
    want = single({})
    for rank, both in enumerate(of(results, "checkpointed")):
        found = both[0 if reentrant else 1]
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"] and set(found["rows"].values()) == {SHARES[rank]}


def test_ddp_resumes_the_state_of_every_part(results):
    """Up to the order of DistributedDataParallel's buckets, see test_distributed.py."""
    for found in of(results, "resumed_layers"):
        assert difference(found["parameters"], found["uninterrupted"]) < TOLERANCE
        assert found["same"]
        assert not any(
            torch.equal(p, q) for p, q in zip(found["parameters"], scenarios.mixed().parameters(), strict=True)
        )


@pytest.mark.parametrize("name", [*scenarios.EXPERT_OPTIONS, "hybrid"])
def test_experts_in_one_parameter_in_fully_shard(results, name):
    """Every rank has some experts, with all units of each, so what it holds are rows of the gradient."""
    model = scenarios.Network(scenarios.ToyExperts).double()
    scenarios.train_experts(model, scenarios.EXPERT_OPTIONS.get(name, {}), range(4))
    for found in of(results, "fully_shard_experts"):
        assert difference(found[name]["parameters"], [p.detach() for p in model.parameters()]) < TOLERANCE
        assert found[name]["same"] and found[name]["failed"] == 0
        assert found[name]["summary"].count("  ok") == 3


@pytest.mark.parametrize("keeps_names", [True, False])
def test_parameters_that_are_flattened_later_are_said_and_capture_stops(results, keeps_names):
    for rank, found in enumerate(of(results, "flat_parameters")):
        case = found[keeps_names]
        assert case["stopped"], rank
        (message,) = case["log"]
        assert "FullyShardedDataParallel" in message and "fully_shard" in message
        assert "FullyShardedDataParallel" in case["refusal"] and "gradient left as it is" in case["summary"]
