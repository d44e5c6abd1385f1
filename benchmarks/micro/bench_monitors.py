"""The cost of the recorders of `co.analysis` and of `Preconditioner.stats()` against a training step.

    python -m benchmarks.micro.bench_monitors [--seconds 5] [--json FILE]

A pass of the twelve-layer MLP (batch 128, forward and backward) that is recorded, and one that is not although the
recorder is attached, are compared with the same pass without a recorder.  One call of `stats()` is compared with a step
of a four-layer transformer encoder (width 256, 1 024 tokens; AdamW with the preconditioner).  All run on one thread,
interleaved; figures are medians of processor time.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.micro.timing import interleaved, medians, one_thread, save
from consistency_ops.cli import models

RECORDERS = ("gradient_energy", "activation_statistics", "weight_domination", "conditioning")
NEVER = 10**9  # `every` of a recorder that records no pass after its first


def pass_of(recorder: str | None, every: int):
    """Return a function that makes one pass; work that conditioning defers counts in the next recorded pass."""
    model = models.build("deep-mlp", (1, 28, 28), 10, seed=0)
    monitor = None if recorder is None else getattr(co.analysis, recorder)(model, every=every)
    x, y = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))

    def run() -> None:
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()

    run.keep = monitor
    return run


def recorders(seconds: float) -> list[dict]:
    passes = {("", ""): pass_of(None, 1)}
    for name in RECORDERS:
        passes |= {(name, "recorded"): pass_of(name, 1), (name, "not recorded"): pass_of(name, NEVER)}
    times = interleaved(passes, seconds=seconds, rounds=(7, 501), clock=time.process_time)
    median = medians(times)
    plain = median.pop(("", ""))
    return [
        {"monitor": name, "pass": kind, "ms": 1e3 * value, "plain_ms": 1e3 * plain, "ratio": value / plain}
        for (name, kind), value in median.items()
    ]


def stats(seconds: float) -> list[dict]:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pre = co.Preconditioner(model, optimizer)
    x = torch.randn(8, 128, 256)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    calls = {"stats()": pre.stats, "stats(condition=False)": lambda: pre.stats(condition=False)}
    median = medians(interleaved({"step": step, **calls}, seconds=seconds, rounds=(7, 501), clock=time.process_time))
    plain = median.pop("step")
    return [
        {"monitor": name, "pass": "a call", "ms": 1e3 * value, "plain_ms": 1e3 * plain, "ratio": value / plain}
        for name, value in median.items()
    ]


def main() -> None:
    arguments = one_thread(__doc__, "monitors", seconds=5.0, of="of the two tables")
    torch.manual_seed(0)
    rows = recorders(arguments.seconds) + stats(arguments.seconds)
    for row in rows:
        print(f"{row['monitor']:<24} {row['pass']:<14} {row['ms']:9.2f} ms, {row['ratio']:8.4f} of a plain step")
    save("monitors", {"clock": "process_time, one thread", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
