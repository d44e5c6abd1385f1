"""Who factors the chunks: every rank all of them, or every rank a share. The cost model that decides.

N ranks pool C chunks of at most S units; a chunk's triangle is ``p = S (S + 1) / 2`` numbers, all of them V bytes.

* *alone*: one all-reduce of V, then every rank factors all C chunks::

      T = allreduce(V) + factor(C)

* *shared*: an all-reduce of row counts and diagonals (C S numbers), a reduce-scatter that leaves each rank the sums
  of its ``c = ceil(C / N)`` chunks, their factorisation, and an all-gather of the inverses, V' >= V bytes::

      T = allreduce(C S) + reduce_scatter(V') + factor(c) + all_gather(V')

An all-reduce is a reduce-scatter and an all-gather, so sharing sends the same bytes and saves
``factor(C) - factor(c)``; it costs one more collective, padding where N does not divide C, and latency: reduce-scatter
and all-gather are rings, whose latency grows with N, where an all-reduce may be a tree, whose latency grows with log N.
With nodes of n ranks, ``m = N / n`` nodes, latencies a (inside a node) and A (between nodes), launch b, and bandwidth B
of a rank::

      reduce_scatter(V) = all_gather(V) = b + (N - 1 - m) a + m A + V (N - 1) / (N B)        m = 0 inside one node
      ring_allreduce(V) = b + 2 ((N - 1 - m) a + m A) + 2 V (N - 1) / (N B)
      tree_allreduce(V) = b + 2 ((n - 1) a + log2(m) A) + 2 V / B
      allreduce = the smaller of the two
      factor(c) = ceil(c / P) S f                           P chunks at a time, f seconds a pivot

The decision needs neither a clock nor a message, so all ranks make the same one. The figures are of ``Machine`` below;
``benchmarks/distributed/simulate.py`` checks the model against a simulation of every message on 8 to 16384 ranks.
Running averages (``decay > 0``) are kept on every rank, so they are never shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Seconds, and bytes a second. Published figures, not measured by us, but for the factorisation on the CPU."""

    node: int  # ranks of a node
    node_latency: float
    net_latency: float
    launch: float
    bandwidth: float  # of a rank in a ring that crosses nodes
    parallel: int  # chunks factored at once
    pivot: float  # of factorisation and inverse, a unit of a chunk


# DGX H100: 8 GPUs, NVLink 4 (450 GB/s each way a GPU), 8 ConnectX-7 of 400 Gbit/s = 50 GB/s, over which the 8 rings of
# NCCL spread: 400 GB/s (NVIDIA DGX H100 data sheet). Latencies of NCCL's own model, protocol Simple (NVIDIA/nccl,
# src/graph/tuning.cc: NVLink ring 3.4 us, network ring 14 us, base 8.4 us). 132 SMs, one chunk each; 310 ns a pivot of
# factor and inverse, the best public figure for chunks of 128 (on B200; our kernels have never run on a GPU).
GPU = Machine(8, 3.4e-6, 14e-6, 8.4e-6, 400e9, 132, 310e-9)
# Gloo over 10 Gbit Ethernet, 1.25 GB/s, 50 us a message; 0.5 us a pivot, measured: 62 us for a chunk of 128 on one core
# with AVX-512.
CPU = Machine(1, 50e-6, 50e-6, 50e-6, 1.25e9, 1, 0.5e-6)


def latency(machine: Machine, ranks: int) -> float:
    """Of one trip around the ring."""
    hops, nodes = ranks - 1, math.ceil(ranks / machine.node)
    across = min(hops, nodes) if nodes > 1 else 0
    return (hops - across) * machine.node_latency + across * machine.net_latency


def reduce_scatter_seconds(machine: Machine, ranks: int, size: float) -> float:
    """Also of an all-gather. ``size``: bytes of the whole buffer."""
    if ranks == 1:
        return 0.0
    return machine.launch + latency(machine, ranks) + size * (ranks - 1) / ranks / machine.bandwidth


def all_reduce_seconds(machine: Machine, ranks: int, size: float) -> float:
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / machine.node)
    depth = (min(ranks, machine.node) - 1) * machine.node_latency + math.ceil(math.log2(nodes)) * machine.net_latency
    ring = 2 * latency(machine, ranks) + 2 * size * (ranks - 1) / ranks / machine.bandwidth
    return machine.launch + min(ring, 2 * depth + 2 * size / machine.bandwidth)


def factor_seconds(machine: Machine, chunks: int, units: int) -> float:
    return math.ceil(chunks / machine.parallel) * units * machine.pivot


def alone_seconds(machine: Machine, ranks: int, chunks: int, units: int, itemsize: int = 4) -> float:
    """One refresh without sharing. ``units``: of the largest chunk."""
    size = chunks * units * (units + 1) // 2 * itemsize
    return all_reduce_seconds(machine, ranks, size) + factor_seconds(machine, chunks, units)


def shared_seconds(machine: Machine, ranks: int, chunks: int, units: int, itemsize: int = 4) -> float:
    """One refresh in which every rank factors a share."""
    share = math.ceil(chunks / ranks)
    size = ranks * share * units * (units + 1) // 2 * itemsize
    diagonals = all_reduce_seconds(machine, ranks, chunks * units * itemsize)
    moved = diagonals + 2 * reduce_scatter_seconds(machine, ranks, size)
    return moved + factor_seconds(machine, share, units)


def is_cheaper(device: str, ranks: int, chunks: int, units: int, itemsize: int = 4) -> bool:
    """Whether ranks should share the work; the same answer on all of them."""
    machine = CPU if device == "cpu" else GPU
    arguments = machine, ranks, chunks, units, itemsize
    return ranks > 1 and shared_seconds(*arguments) < alone_seconds(*arguments)
