"""What a refresh of the preconditioner costs on 8 to 16384 ranks: a simulation of every message, and the cost model.

    python -m benchmarks.distributed.simulate [--ranks 8 64 ...] [--json FILE] [--png FILE]

SIMULATED: no such machine was used. A refresh is the exchange of covariances and the factorisation of all chunks; the
covariances and the product with the gradient are the same on any number of ranks and are not in it. Nothing overlaps
with the backward pass. Inputs are those of ``consistency_ops.distributed.cost_model.GPU``, with their sources there:
nodes of 8 GPUs, NVLink 4 and 400 Gbit/s InfiniBand for each GPU, latencies of NCCL's own model. Every message and every
factorisation takes its time from these, times a log-normal factor of deviation 0.1, so that stragglers delay whoever
waits for them; the model in ``work_sharing`` knows nothing of that, nor of pipelining.

* ring (reduce-scatter, all-gather, all-reduce): rank i sends a block to i + 1 in each of N - 1 steps (twice for an
  all-reduce) as soon as it has the block of the step before; one hop in eight leaves the node. Eight rings, one for
  each network card, with an eighth of the bytes each.
* tree (all-reduce): a chain inside each node, a binary tree of nodes, up and down, in 64 pipelined pieces.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.micro.timing import RESULTS, save
from benchmarks.micro.workloads import WORKLOADS, LayerShape
from consistency_ops.distributed import cost_model
from consistency_ops.distributed.cost_model import GPU as MACHINE

RANKS = tuple(8 * 2**k for k in range(12))
CHUNK = 128
DEVIATION = 0.1
PIECES = 64
NVLINK = 450e9  # bytes a second, each way, of a GPU: NVIDIA H100 data sheet, 900 GB/s in both

_GPT2 = [LayerShape(2304, 768), LayerShape(768, 768), LayerShape(3072, 768), LayerShape(768, 3072)]
MODELS: dict[str, list[LayerShape]] = {
    "ResNet-50": WORKLOADS["resnet50"].layers,
    "GPT-2 small": _GPT2 * 12,
    "Llama-2 7B": WORKLOADS["llama-block"].layers * 32,
}


def chunks_of(layers: list[LayerShape]) -> int:
    return sum(math.ceil(layer.units / CHUNK) for layer in layers)


class Cluster:
    """Ranks in nodes of eight, with a random factor for every message and every factorisation."""

    def __init__(self, ranks: int, seed: int = 0) -> None:
        self.ranks = ranks
        self._random = np.random.default_rng(seed)
        self._pool = np.exp(DEVIATION * self._random.standard_normal(4 * ranks + 4096))
        crosses = (np.arange(ranks) + 1) % MACHINE.node == 0 if ranks > MACHINE.node else np.zeros(ranks, bool)
        self._latency = np.where(crosses, MACHINE.net_latency, MACHINE.node_latency)  # per sending rank
        per_ring = np.where(crosses, MACHINE.bandwidth, NVLINK) / MACHINE.node
        self._seconds_a_byte = 1 / per_ring

    def _noise(self, count: int) -> np.ndarray:
        """Return random factors from a pool, because drawing new ones would take most of the time."""
        begin = int(self._random.integers(len(self._pool) - count))
        return self._pool[begin : begin + count]

    def ring(self, ready: np.ndarray, size: float, trips: int) -> np.ndarray:
        """Return when each rank has finished; ``trips``: 1 for reduce-scatter or all-gather, 2 for all-reduce."""
        block = size / MACHINE.node / self.ranks
        done = ready + MACHINE.launch * self._noise(self.ranks)
        took = self._latency + block * self._seconds_a_byte
        for _ in range(trips * (self.ranks - 1)):
            arrives = done + took * self._noise(self.ranks)
            done = np.maximum(done, np.roll(arrives, 1))
        return done

    def tree(self, ready: np.ndarray, size: float) -> np.ndarray:
        nodes = self.ranks // MACHINE.node
        start = (ready + MACHINE.launch * self._noise(self.ranks)).reshape(nodes, MACHINE.node)
        piece = size / PIECES
        up = np.repeat(start[:, -1:], PIECES, 1)  # when the last of a chain has a piece
        for gpu in range(MACHINE.node - 2, -1, -1):
            arrived = self._pipe(up, MACHINE.node_latency, piece / NVLINK)
            up = np.maximum(arrived, start[:, gpu : gpu + 1])
        levels = [range(2**d - 1, min(2 ** (d + 1) - 1, nodes)) for d in range(max(1, nodes.bit_length()))]
        network = piece / MACHINE.bandwidth
        for level in reversed(levels[1:]):
            below = np.array(level)
            if len(below):
                arrived = self._pipe(up[below], MACHINE.net_latency, network)
                np.maximum.at(up, (below - 1) // 2, arrived)
        down = up
        for level in levels[1:]:
            below = np.array(level)
            if len(below):
                down[below] = self._pipe(down[(below - 1) // 2], MACHINE.net_latency, network)
        done = [down[:, -1]]
        for _ in range(MACHINE.node - 1):
            down = self._pipe(down, MACHINE.node_latency, piece / NVLINK)
            done.append(down[:, -1])
        return np.stack(done, 1).reshape(-1)

    def _pipe(self, ready: np.ndarray, latency: float, seconds: float) -> np.ndarray:
        """Return when the pieces have passed one link per row, one after the other."""
        free, arrived = np.zeros(len(ready)), np.empty_like(ready)
        for k in range(PIECES):
            free = np.maximum(free, ready[:, k]) + seconds * self._noise(len(ready))
            arrived[:, k] = free + latency * self._noise(len(ready))
        return arrived

    def all_reduce(self, ready: np.ndarray, size: float) -> np.ndarray:
        """Return the times of the faster of ring and tree, which a library that tunes itself would take."""
        tree = self.tree(ready, size)
        if tree.max() < ready.min() + cost_model.latency(MACHINE, self.ranks):
            return tree  # the ring has twice that in latency alone
        return min(self.ring(ready, size, 2), tree, key=np.max)

    def factor(self, ready: np.ndarray, chunks: int) -> np.ndarray:
        return ready + cost_model.factor_seconds(MACHINE, chunks, CHUNK) * self._noise(self.ranks)


def alone(cluster: Cluster, chunks: int) -> float:
    ready = cluster.all_reduce(np.zeros(cluster.ranks), chunks * CHUNK * (CHUNK + 1) / 2 * 4)
    return float(cluster.factor(ready, chunks).max())


def shared(cluster: Cluster, chunks: int) -> float:
    share = math.ceil(chunks / cluster.ranks)
    size = cluster.ranks * share * CHUNK * (CHUNK + 1) / 2 * 4
    ready = cluster.all_reduce(np.zeros(cluster.ranks), chunks * CHUNK * 4)
    ready = cluster.factor(cluster.ring(ready, size, 1), share)
    return float(cluster.ring(ready, size, 1).max())


def row(model: str, ranks: int) -> dict:
    chunks = chunks_of(MODELS[model])
    ways: dict[str, tuple[Callable, Callable]] = {
        "alone": (alone, cost_model.alone_seconds),
        "shared": (shared, cost_model.shared_seconds),
    }
    found: dict = {"model": model, "ranks": ranks, "chunks": chunks}
    for name, (simulate, formula) in ways.items():
        found[f"{name}_simulated_us"] = 1e6 * simulate(Cluster(ranks), chunks)
        found[f"{name}_model_us"] = 1e6 * formula(MACHINE, ranks, chunks, CHUNK)
    chosen = "shared" if cost_model.is_cheaper("cuda", ranks, chunks, CHUNK) else "alone"
    best = min(found["alone_simulated_us"], found["shared_simulated_us"])
    return {**found, "chosen": chosen, "regret": found[f"{chosen}_simulated_us"] / best - 1}


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(13, 4.2), sharey=True, layout="constrained")
    for axis, model in zip(axes, MODELS, strict=True):
        mine = [r for r in rows if r["model"] == model]
        ranks = [r["ranks"] for r in mine]
        for name, colour in (("alone", "tab:blue"), ("shared", "tab:orange")):
            label = "every rank factors all chunks" if name == "alone" else "every rank factors a share"
            axis.plot(ranks, [r[f"{name}_simulated_us"] for r in mine], "o", color=colour, label=f"{label}: simulated")
            axis.plot(ranks, [r[f"{name}_model_us"] for r in mine], "-", color=colour, lw=1, label="cost model")
        chosen = [r[f"{r['chosen']}_simulated_us"] for r in mine]
        axis.plot(ranks, chosen, "s", ms=11, mfc="none", color="black", label="what the model chooses")
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{model}, {mine[0]['chunks']} chunks of {CHUNK}")
        axis.set_xticks(ranks[::2], [str(n) for n in ranks[::2]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exchange and factorisation of one refresh, us")
    axes[0].legend(fontsize=7.5, loc="upper left")
    figure.suptitle("SIMULATED, not measured: DGX H100 nodes (NVLink 4, 8 x 400 Gbit/s), latencies of NCCL's model")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="multiples of 8")
    parser.add_argument("--json", help="write here instead of benchmarks/results/distributed.json")
    parser.add_argument("--png", type=Path, default=RESULTS / "distributed.png")
    arguments = parser.parse_args()
    rows = [row(model, ranks) for model in MODELS for ranks in arguments.ranks]
    print(f"{'model':12} {'ranks':>6} {'alone us':>10} {'shared us':>10}  chosen  {'regret':>6}")
    for r in rows:
        times = f"{r['alone_simulated_us']:10.0f} {r['shared_simulated_us']:10.0f}"
        print(f"{r['model']:12} {r['ranks']:6} {times}  {r['chosen']:6}  {r['regret']:6.1%}")
    inputs = {**vars(MACHINE), "nvlink": NVLINK, "chunk": CHUNK, "deviation": DEVIATION, "pieces": PIECES}
    note = "SIMULATED: no such machine was used. Sources of the inputs: consistency_ops/distributed/cost_model.py"
    save("distributed", {"note": note, "inputs": inputs, "rows": rows}, arguments.json)
    plot(rows, arguments.png)


if __name__ == "__main__":
    main()
