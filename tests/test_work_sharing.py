"""The cost model that decides who factors the chunks, against the simulation of every message."""

import json

import pytest
import torch

from benchmarks.distributed import simulate
from benchmarks.micro.timing import RESULTS
from consistency_ops.distributed import cost_model
from consistency_ops.distributed.cost_model import GPU
from consistency_ops.distributed.triangles import DealtTriangles, Triangles


@pytest.mark.parametrize("ranks", [8, 32, 256])
@pytest.mark.parametrize("model", list(simulate.MODELS))
def test_model_agrees_with_the_simulation(model, ranks):
    """They differ by less than half: the model has no noise and no pipelining. Its choice costs at most 10 % more."""
    row = simulate.row(model, ranks)
    for way in ("alone", "shared"):
        assert row[f"{way}_model_us"] == pytest.approx(row[f"{way}_simulated_us"], rel=0.5)
    assert row["regret"] < 0.1


def test_recorded_simulation_is_of_this_model():
    recorded = json.loads((RESULTS / "distributed.json").read_text())
    assert recorded["note"].startswith("SIMULATED")
    assert {r["ranks"] for r in recorded["rows"]} == set(simulate.RANKS)
    for r in recorded["rows"]:
        chunks = simulate.chunks_of(simulate.MODELS[r["model"]])
        assert r["alone_model_us"] == pytest.approx(1e6 * cost_model.alone_seconds(GPU, r["ranks"], chunks, 128))
        assert r["shared_model_us"] == pytest.approx(1e6 * cost_model.shared_seconds(GPU, r["ranks"], chunks, 128))
        assert r["regret"] < 0.1


def test_limits():
    assert not cost_model.is_cheaper("cuda", 1, 10_000, 128)
    assert not cost_model.is_cheaper("cuda", 64, 1, 128)  # nothing to share
    assert cost_model.is_cheaper("cuda", 8, 8896, 128)
    assert not cost_model.is_cheaper("cuda", 16384, 8896, 128)  # two rings of 16384 hops
    assert cost_model.is_cheaper("cpu", 2, 500, 128)
    assert not cost_model.is_cheaper("cpu", 4, 8, 8)


def test_a_tree_of_one_node_is_a_chain():
    """With one node both give the same figure: 7 hops there and back, and all bytes twice."""
    size = 1e9
    seconds = cost_model.all_reduce_seconds(GPU, 8, size)
    assert seconds == pytest.approx(GPU.launch + 14 * GPU.node_latency + 2 * size * 7 / 8 / GPU.bandwidth)


def symmetric(units, chunk):
    """Return symmetric chunks of layers with these numbers of units; the rest is zero."""
    layers = []
    for u in units:
        count = -(-u // chunk)
        matrices = torch.zeros(count, chunk, chunk)
        for c in range(count):
            size = u // count + (c < u % count)
            square = torch.randn(size, size)
            matrices[c, :size, :size] = square + square.T
        layers.append(matrices)
    return layers


def test_flat_buffers_return_what_they_were_given():
    units = [5, 17, 8, 9]
    layers = symmetric(units, 8)
    triangles = Triangles(units, [len(m) for m in layers], 8, torch.device("cpu"))
    buffers = triangles.flatten(layers)
    assert sum(map(len, buffers)) == 3 * 21 + (1 + 2) * 15 + 36  # 17 is 6, 6, 5; 5 and 9 have chunks of 5; 8 is whole
    for got, want in zip(triangles.unflatten(buffers, layers[0]), layers, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_cover_every_chunk_once(ranks):
    units = [5, 17, 9]
    layers = symmetric(units, 8)
    sums, lengths = torch.cat(layers), [len(m) for m in layers]
    dealt = [DealtTriangles(units, lengths, 8, ranks, rank, torch.device("cpu")) for rank in range(ranks)]
    whole = dealt[0].deal(sums)
    shares = [d.my_means(part, torch.ones(3), None) for d, part in zip(dealt, whole.chunk(ranks), strict=True)]
    assert torch.equal(torch.cat(shares)[: len(sums)], sums)
    assert [u for d in dealt for u in d.my_units][: len(sums)] == [5, 6, 6, 5, 5, 4]
    rows = torch.full((3,), 2.0)
    tau = dealt[0].trace_scale(dealt[0].diagonals(sums.abs()), rows)
    want = [float(m.diagonal(dim1=1, dim2=2).abs().sum()) / u / 2 for m, u in zip(layers, units, strict=True)]
    assert tau.tolist() == pytest.approx([want[0], *[want[1]] * 3, *[want[2]] * 2])
    broken = sums.abs()
    broken[1, 2, 2], lost = torch.inf, float(sums[1, 2, 2].abs())
    tau = dealt[0].trace_scale(dealt[0].diagonals(broken), rows)
    want[1] = (want[1] * 2 * 17 - lost) / 16 / 2  # the mean of the 16 entries that are finite
    assert tau.tolist() == pytest.approx([want[0], *[want[1]] * 3, *[want[2]] * 2])
