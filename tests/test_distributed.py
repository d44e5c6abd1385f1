"""Several ranks equal one process that has all their data, and each other bit for bit (gloo, four processes)."""

import re

import pytest
import torch
import torch.distributed as dist

from consistency_ops.distributed.placement import Placement
from support import distributed_scenarios as scenarios
from support.ranks import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

SCENARIOS = [
    *("ddp_default", "ddp_decay", "ddp_every", "ddp_static_graph", "ddp_wrapped_late", "ddp_accumulation"),
    *("ddp_missing_layer", "averaged_by_hand", "broken_gradient", "disagreements", "unwrapped", "join"),
    *("going_alone", "going_back", "ddp_launches", "ddp_gathered"),
    *(
        "fsdp_default",
        "fsdp_decay",
        "fsdp_every",
        "fsdp_hybrid",
        "fsdp_convolutions",
        "fsdp_transposed",
        "fsdp_transposed_whiten",
        "fsdp_transposed_whiten_outputs",
        "units_in_two_dimensions",
        "flattened",
    ),
    *("tensor_parallel", "tensor_parallel_and_fully_shard", "dtensor_inputs", "checkpoint_fully_shard"),
    "tensor_parallel_whiten",
    *(
        "shared",
        "shared_absolute",
        "shared_every",
        "shared_convolutions",
        "one_unit_not_finite",
        "placements",
        "ddp_whiten",
        "fsdp_whiten",
        "ddp_whiten_outputs",
        "fsdp_whiten_outputs",
        "fsdp_both_sides",
        "column_parallel_both_sides",
        "ddp_wide",
    ),
]
SLOW = [
    *("ddp_absolute", "ddp_float32", "fsdp_accumulation", "fsdp_mixed_precision", "tensor_parallel_and_group"),
    *("checkpoint_ddp", "checkpoint_tensor_parallel", "compiled"),
]
# Sums of 40 float64 rows in another order: eps = 2e-16, times a condition number of at most 16 / damping = 160, in each
# of four steps.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("distributed_scenarios", SCENARIOS, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def slow_results(tmp_path_factory):
    return run("distributed_scenarios", SLOW, 4, tmp_path_factory.mktemp("ranks"))


def difference(got, want):
    """Largest difference of any entry, over the largest entry of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def of(results, name):
    for rank, result in enumerate(results[name]):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return results[name]


@pytest.mark.slow
def test_torchs_own_operations_on_several_ranks(tmp_path, monkeypatch):
    """The portable path, against one process on the kernels: DistributedDataParallel and fully_shard."""
    monkeypatch.setenv("CONSISTENCY_OPS_BACKEND", "torch")
    names = [f"{kind}_{name}" for kind in ("ddp", "fsdp") for name in ("default", "decay", "every")]
    found = run("distributed_scenarios", ["backend", *names], 4, tmp_path)
    assert of(found, "backend") == [{"computes": "torch"}] * 4
    for name in names:
        want = scenarios.single(scenarios.OPTIONS[name.partition("_")[2]])
        for result in of(found, name):
            assert difference(result["parameters"], want) < TOLERANCE


@pytest.mark.parametrize("name", ["default", "decay", "every"])
def test_ddp_with_uneven_batches_equals_one_process(results, name):
    want = scenarios.single(scenarios.OPTIONS[name])
    for result in of(results, f"ddp_{name}"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


def test_an_average_is_gathered_in_20_steps_before_it_is_reused(results):
    """Its first 20 refreshes, and every third step from then on, pool over ranks; the others send nothing of ours."""
    want = scenarios.single(scenarios.GATHERED, steps=24)
    for result in of(results, "ddp_gathered"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]
        least = min(result["sent"])
        assert [n - least for n in result["sent"]] == [1] * 20 + [0, 1, 0, 0]


@pytest.mark.parametrize("name", ["ddp_static_graph", "ddp_wrapped_late", "ddp_accumulation", "averaged_by_hand"])
def test_every_way_to_average_gradients(results, name):
    want = scenarios.single({})
    for result in of(results, name):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


def test_uneven_rows_are_captured(results):
    rows = [result["rows"]["module.0"] for result in of(results, "ddp_default")]
    assert rows == list(scenarios.SHARES)


@pytest.mark.parametrize("name", list(scenarios.OPTIONS))
def test_one_all_reduce_between_two_launches(results, name):
    """The first step also compares the options of the ranks."""
    refresh = [f"consistency_ops.{op}.default" for op in ("foreach_covariance", "foreach_correct_")]
    refresh.insert(1, "c10d.allreduce_.default")
    for calls in of(results, "ddp_launches"):
        if name == "every":  # two steps share the inverses
            launches = [
                [call.split(".")[1] for call in step if call.startswith("consistency_ops")] for step in calls[name]
            ]
            stages = ["foreach_covariance", "foreach_inverse", "foreach_apply_"]
            assert launches == [stages, stages[2:], stages]
        else:
            assert calls[name][1:] == [refresh] * 2
            assert calls[name][0] == ["c10d.allgather_.default", *refresh]


@pytest.mark.slow
def test_ddp_with_absolute_damping(slow_results):
    want = scenarios.single(scenarios.OPTIONS["absolute"])
    for result in of(slow_results, "ddp_absolute"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


@pytest.mark.slow
def test_ddp_in_float32(slow_results):
    """AdamW divides by the size of the gradient, so small differences of small entries grow: eps 1.2e-7 times 160
    times four steps, times ten for that."""
    want = scenarios.single({}, torch.float32, name="adamw")
    for result in of(slow_results, "ddp_float32"):
        assert difference(result["parameters"], want) < 1e-3
        assert result["same"]


def test_a_layer_that_ran_on_one_rank_only(results):
    want = scenarios.single_missing_layer()
    for result in of(results, "ddp_missing_layer"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]
        assert "never  Linear" in result["summary"]
        assert "no input seen yet; gradient left as it is" in result["summary"]


def test_inf_on_one_rank_keeps_the_step_out_of_the_average_on_all(results):
    for result in of(results, "broken_gradient"):
        assert result["weights"] == [0.5, 0.5, 0.75]
        assert result["same"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", r"seed must be the same on all ranks, but rank \d has \d, rank \d has \d"),
        ("model", r"layers must be the same on all ranks, but those of rank \d and rank \d differ"),
        ("options", r"options must be the same on all ranks, but those of rank \d and rank \d differ"),
        ("outputs", r"options must be the same on all ranks, but those of rank \d and rank \d differ"),
        ("dct", r"options must be the same on all ranks, but those of rank \d and rank \d differ"),
        ("step", r"step must be the same on all ranks, but rank \d has \d, rank \d has \d"),
    ],
)
def test_ranks_that_disagree_are_refused(results, what, message):
    for rank, errors in enumerate(of(results, "disagreements")):
        assert re.match(f"RuntimeError: Preconditioner: {message}", errors[what])
        assert f"rank {rank}" in errors[what]


@pytest.mark.parametrize(
    ("what", "who"),
    [
        ("one", "rank 2 alone"),
        ("three", "3 of 4 ranks"),
        ("shared", "rank 0 alone"),
        ("every", "rank 3 alone"),
        ("frozen", "rank 1 alone"),
    ],
)
def test_ranks_that_go_alone_are_told_so_instead_of_waiting(results, what, who):
    for errors in of(results, "going_alone"):
        assert errors[what] == (
            "RuntimeError: Preconditioner: states must be loaded, and layers changed, on all ranks between the same "
            f"two steps, but {who} did so"
        )


def test_ranks_that_go_back_together_repeat_their_steps(results):
    for same in of(results, "going_back"):
        assert same == [True] * 3


def test_ranks_without_a_wrapper_are_noticed(results):
    for result in of(results, "unwrapped"):
        assert not result["same"]  # so pooling is what makes the others equal
        (message,) = result["messages"]
        assert "there are 4 ranks, but some layers are neither in a DistributedDataParallel nor sharded" in message


def test_join_is_refused(results):
    for message in results["join"]:
        assert "all ranks must make the same number of steps, got DistributedDataParallel.join()" in message


@pytest.mark.parametrize("name", ["default", "decay", "every", "hybrid"])
def test_fully_shard_equals_one_process(results, name):
    want = scenarios.single(scenarios.OPTIONS.get(name, {}))
    for rank, result in enumerate(of(results, f"fsdp_{name}")):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]
        assert result["rows"]["0"] == scenarios.SHARES[rank]
        if name != "hybrid":
            assert result["local"] == (2, 2, 1, 0)[rank]


@pytest.mark.slow
@pytest.mark.parametrize("sync", [False, True])
def test_fully_shard_with_micro_batches(slow_results, sync):
    want = scenarios.single({})
    for result in of(slow_results, "fsdp_accumulation"):
        assert difference(result[sync]["parameters"], want) < TOLERANCE
        assert result[sync]["same"]


def test_fully_shard_with_convolutions(results):
    want = scenarios.single_convolutions()
    for result in of(results, "fsdp_convolutions"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert "groups of a convolution are sharded; gradient left as it is" in result["summary"]


@pytest.mark.slow
def test_fully_shard_in_mixed_precision(slow_results):
    """bfloat16 has 8 bits: eps 4e-3, of inputs, weights and outputs, in four steps."""
    want = scenarios.single({}, torch.float32)
    for rank, result in enumerate(of(slow_results, "fsdp_mixed_precision")):
        assert difference(result["parameters"], want) < 0.1
        assert result["same"]
        assert result["rows"]["0"] == scenarios.SHARES[rank]
        assert result["failed"] == 0


@pytest.mark.parametrize("name", ["late", "early", "stored"])
def test_fully_shard_of_a_weight_stored_as_in_out(results, name):
    """Its shards are units: the gradient is exchanged for whole rows, corrected, and returned."""
    want = scenarios.single_transposed(scenarios.STORED if name == "stored" else {})
    for found in of(results, "fsdp_transposed"):
        assert difference(found[name]["parameters"], want) < TOLERANCE
        assert found[name]["same"] and found[name]["failed"] == 0
        assert found[name]["summary"].count("  ok") == 2


def test_what_cannot_be_supported_is_reported(results):
    for summary, unchanged in of(results, "units_in_two_dimensions"):
        assert "weight is sharded over its units, the input is not; gradient left as it is" in summary
        assert unchanged
    for both in of(results, "flattened"):
        for summary, unchanged in both:
            assert "weight is flattened (FullyShardedDataParallel and DeepSpeed ZeRO 3 do that; " in summary
            assert unchanged


def named_difference(got, want):
    return difference([got[name] for name in want], list(want.values()))


@pytest.mark.parametrize("name", list(scenarios.OPTIONS))
def test_tensor_parallel_equals_one_process(results, name):
    """The row-parallel layer is one layer for each shard of its units."""
    want = scenarios.single_split(4, scenarios.OPTIONS[name])
    for both in of(results, "tensor_parallel"):
        result = both[name]
        assert named_difference(result["named"], want) < TOLERANCE
        assert result["same"]
        assert result["calls"] == []  # the correction sends nothing
        assert re.search(r"up +Linear +13 -> 2 of 7 +40 +ok", result["summary"])
        assert re.search(r"down +Linear +4 -> 1 of 4 +40 +ok", result["summary"])  # the bias is not joined


@pytest.mark.parametrize("name", list(scenarios.OPTIONS))
def test_tensor_parallel_with_fully_shard_equals_one_process(results, name):
    want = scenarios.single_split(2, scenarios.OPTIONS[name])
    refreshes = name != "every"  # the last step reuses the inverse
    for both in of(results, "tensor_parallel_and_fully_shard"):
        result = both[name]
        assert named_difference(result["named"], want) < TOLERANCE
        assert result["same"]
        assert result["calls"] == ["c10d.allreduce_.default"] * refreshes


@pytest.mark.slow
def test_tensor_parallel_with_gradients_averaged_by_hand(slow_results):
    want = scenarios.single_split(2, {})
    for result in of(slow_results, "tensor_parallel_and_group"):
        assert named_difference(result["named"], want) < TOLERANCE
        assert result["same"]


def test_replicated_weights_with_sharded_rows(results):
    want = scenarios.single_squares()
    for result in of(results, "dtensor_inputs"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]
        assert result["rows"] == {"up": 10, "down": 10}


@pytest.mark.parametrize("state", [0, 1, 2], ids=["decay", "every", "both sides"])
def test_checkpoint_of_four_ranks_resumes_on_four_and_on_two(results, state):
    for both in of(results, "checkpoint_fully_shard"):
        uninterrupted = both[state]["uninterrupted"]["parameters"]
        assert all(map(torch.equal, both[state]["four"]["parameters"], uninterrupted))
        assert difference(both[state]["two"]["parameters"], uninterrupted) < TOLERANCE
        assert both[state]["two"]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("state", [0, 1], ids=["decay", "every"])
def test_checkpoint_of_ddp(slow_results, state):
    """Not bitwise, with or without us: DistributedDataParallel sorts its buckets anew after the first step, so its sums
    differ in the last bit after any resume."""
    for both in of(slow_results, "checkpoint_ddp"):
        uninterrupted = both[state]["uninterrupted"]["parameters"]
        for ranks in ("four", "two"):
            assert difference(both[state][ranks]["parameters"], uninterrupted) < TOLERANCE
            assert both[state][ranks]["same"]


@pytest.mark.slow
def test_checkpoint_of_row_parallel_state(slow_results):
    """It is bitwise on the same number of ranks; with fewer ranks the chunks are others, and start anew."""
    for uninterrupted, resumed, fewer in of(slow_results, "checkpoint_tensor_parallel"):
        assert resumed["error"] == ""
        assert all(map(torch.equal, resumed["parameters"], uninterrupted["parameters"]))
        assert torch.equal(resumed["state"]["down"], uninterrupted["state"]["down"])
        assert resumed["weight"] == 1 - 0.5**5
        assert re.search(r"Missing key in checkpoint .*down.weight.consistency_\w+_of_2", fewer["error"])
        assert fewer["weight"] == 1 - 0.5**2
        assert difference([fewer["state"]["up"]], [uninterrupted["state"]["up"]]) < 1e-3
        assert fewer["same"]


@pytest.mark.parametrize("name", ["default", "absolute", "every"])
def test_shared_factorisation_equals_one_process(results, name):
    want = scenarios.single(scenarios.OPTIONS[name])
    for both in of(results, "shared" if name == "default" else f"shared_{name}"):
        for result in both:
            assert difference(result["parameters"], want) < TOLERANCE
            assert result["same"]
            assert result["damping"] == pytest.approx(0.1)
            assert result["failed"] == 0
            assert any("reduce_scatter" in call for call in result["calls"])


def test_shared_factorisation_of_convolutions(results):
    want = scenarios.single_convolutions(skip=())
    for result in of(results, "shared_convolutions"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


@pytest.mark.slow
def test_compiled_models_on_several_ranks(slow_results):
    want, split = scenarios.single({}, steps=3), scenarios.single_split(4, {}, steps=3)
    transposed = scenarios.single_transposed({}, steps=3, left=1)
    for result in of(slow_results, "compiled"):
        assert difference(result["ddp"]["parameters"], want) < TOLERANCE
        assert difference(result["fully_shard"]["parameters"], want) < TOLERANCE
        assert named_difference(result["tensor_parallel"]["named"], split) < TOLERANCE
        assert "left as it is" not in result["tensor_parallel"]["summary"]
        # A compiled model finds out in its first step that units are sharded in a weight and not in its input.
        assert difference(result["transposed"]["parameters"], transposed) < TOLERANCE
        assert result["transposed"]["summary"].count("  ok") == 2


def test_a_unit_that_is_not_finite_spares_the_other_chunks_on_ranks_too(results):
    """The trace scale is the mean of the entries that are finite after pooling, whoever factors the chunks."""
    for found in of(results, "one_unit_not_finite"):
        for before, single, alone, shared in found.values():
            corrected = (single != before).all(0)
            assert 48 <= corrected.sum() < 64  # the one chunk of the unit is left alone
            assert torch.equal((alone != before).all(0), corrected) and torch.equal(
                alone[:, ~corrected], before[:, ~corrected]
            )
            assert torch.equal((shared != before).all(0), corrected)
            assert difference([alone], [single]) < TOLERANCE and difference([shared], [single]) < TOLERANCE


def test_the_log_says_who_holds_what_when_it_changes(results):
    for rank, found in enumerate(of(results, "placements")):
        first, *later = found["ddp"]
        assert first[0] == (
            f"Preconditioner: rank {rank}: Placement('module.0': holds the whole gradient, pools the covariance over "
            "ranks 0-3, bias joined)"
        )
        assert len(first) == 3 and later == [[], []]
        first, *later = found["fully_shard"]
        assert (
            "Placement('0': holds its rows of the gradient, pools the covariance over ranks 0-3, bias joined)"
            in first[0]
        )
        assert len(first) == 3 and later == [[], []]


def test_a_placement_is_one_readable_line():
    groups = ((0, 1, 2, 3, 8), (5,))
    placement = Placement("up", groups, "its units of the gradient", False, True)
    assert repr(placement) == (
        "Placement('up': holds its units of the gradient, pools the covariance over ranks 0-3, 8, then over ranks 5, "
        "exchanges units for rows and back, bias not joined)"
    )
    assert repr(Placement("up", reason="weight is flattened")) == "Placement('up': left alone, weight is flattened)"


@pytest.mark.parametrize("name", ["ddp_whiten", "fsdp_whiten"])
def test_whitened_coordinates_on_ranks_equal_one_process(results, name):
    """The norm that a layer's step keeps is that of all its shards."""
    want = scenarios.single(scenarios.WHITEN, name="adamw")
    for result in of(results, name):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


@pytest.mark.parametrize("name", ["ddp_whiten_outputs", "fsdp_whiten_outputs"])
def test_both_sides_on_ranks_equal_one_process(results, name):
    """Under fully_shard every rank has some rows of a gradient; the last one has none of the last layer's five."""
    want, other = (scenarios.single(o, name="adamw") for o in (scenarios.BOTH_SIDES, scenarios.WHITEN))
    assert difference(want, other) > 1e-3
    for result in of(results, name):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]


def test_both_sides_of_convolutions_whose_outputs_are_dealt_to_ranks(results):
    """With coupled weight decay; and where no layer has a gradient the step is the optimizer's own, bit for bit."""
    options = scenarios.BOTH_SIDES_AND_COSINES, scenarios.BOTH_SIDES, scenarios.WHITEN
    want, *others = map(scenarios.single_both_sides, options)
    assert min(difference(want, other) for other in others) > 1e-3
    for found in of(results, "fsdp_both_sides"):
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"]
        for ours, plain in zip(*found["idle"], strict=True):
            assert torch.equal(ours, plain)
    moved = torch.cat([found["idle"][0][0] for found in of(results, "fsdp_both_sides")])
    assert float((moved - found["start"][0]).abs().min()) > 0


def test_both_sides_of_column_parallel_layers_equal_one_process(results):
    """Of row-parallel ones, which have the inputs' side alone, the log says so."""
    want = scenarios.single(scenarios.BOTH_SIDES, name="adamw")
    for found in of(results, "column_parallel_both_sides"):
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"]
        (message,) = [text for text in found["messages"] if "outputs" in text]
        assert message.endswith("so only their inputs are whitened: down.")


@pytest.mark.parametrize("outputs", [False, True])
def test_whitened_coordinates_of_a_weight_stored_as_in_out(results, outputs):
    want = scenarios.single_transposed_whiten(outputs=outputs)
    for found in of(results, f"fsdp_transposed_whiten{'_outputs' * outputs}"):
        assert difference(found["parameters"], want) < TOLERANCE
        assert found["same"] and found["failed"] == 0
        assert found["summary"].count("  ok") == 2


@pytest.mark.parametrize("parts", [4, 2])
@pytest.mark.parametrize("name", list(scenarios.TENSOR_PARALLEL_WHITEN))
def test_whitened_coordinates_of_tensor_parallel_layers_equal_one_process(results, name, parts):
    """Without fully_shard on four ranks, and with it on two by two."""
    want = scenarios.single_split(parts, scenarios.TENSOR_PARALLEL_WHITEN[name], name=name)
    for found in of(results, "tensor_parallel_whiten"):
        assert named_difference(found[name, parts]["named"], want) < TOLERANCE
        assert found[name, parts]["same"]


def test_the_norm_of_a_tensor_parallel_step_is_that_of_all_ranks(results):
    """Adam's first step is the rate in every entry. Kept and free norm have one direction in a whole layer."""
    for found in of(results, "tensor_parallel_whiten"):
        kept, free = found["moves", True], found["moves", False]
        layer = torch.cat([kept["up.weight"].flatten(), kept["up.bias"]])  # the bias is joined
        for moved in (layer, kept["down.weight"], kept["down.bias"]):
            assert float(moved.norm()) == pytest.approx(0.01 * moved.numel() ** 0.5, rel=1e-3)
        for name in ("up.weight", "down.weight"):
            ratio = float(kept[name].norm() / free[name].norm())
            assert abs(ratio - 1) > 0.01
            torch.testing.assert_close(kept[name], ratio * free[name], rtol=1e-9, atol=1e-12)


def test_whole_layers_on_ranks_equal_one_process(results):
    want = scenarios.single(dict(chunk=None))
    for result in of(results, "ddp_wide"):
        assert difference(result["parameters"], want) < TOLERANCE
        assert result["same"]
