"""The time of a training step with ``mode="whiten"`` over that of plain AdamW, in one interleaved run.

    python -m benchmarks.micro.bench_whiten [--threads N] [--seconds 20] [--json FILE]

A step is zero_grad, forward, backward and the optimizer's step, in eager mode, with torch's default AdamW.  The data
is random and the rate small (1e-6), so that nothing diverges: time does not depend on the values.  The candidates take
steps in turns; ten steps are one measurement, because the default makes new factors in one of ten.  The first steps, in
which an average is gathered, are not timed, and all but one of them take a small batch.  ``host``: a network of 50
layers of 8 units, where nearly all of the time is the host's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.micro.timing import add_clock, interleaved, save
from benchmarks.peers.cost import Sequence
from benchmarks.peers.tasks import named, small_convnet
from consistency_ops.engine.correction import GATHERING_STEPS

STEPS = 10  # a measurement
SETTINGS: dict[str, dict | None] = {  # arguments of Preconditioner, None without one
    "adamw": None,
    "correct": {"mode": "correct"},
    "whiten": {"mode": "whiten"},
    "whiten, every=1": {"mode": "whiten", "every": 1},
    "whiten, outputs": {"mode": "whiten", "outputs": True},
    "whiten, outputs, every=10": {"mode": "whiten", "outputs": True, "every": 10},
    "whiten, outputs, dct": {"mode": "whiten", "outputs": True, "dct": True},
}


def tiny_layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(50)), nn.Linear(8, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "deep MLP, batch 500": (lambda: named("deep-mlp", (1, 28, 28))(0), (500, 1, 28, 28)),
    "GPT-2 small block, 2048 tokens": (lambda: Sequence(768, 12, True), (2, 1024, 768)),
    "convnet B, batch 128": (lambda: named("convnet", (3, 32, 32))(0), (128, 3, 32, 32)),
    "small convnet, batch 128": (small_convnet, (128, 1, 28, 28)),
    "host": (tiny_layers, (8, 8)),
}


def step_of(build: Callable[[], nn.Module], options: dict | None, x: torch.Tensor, y: torch.Tensor):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    preconditioner = None if options is None else co.Preconditioner(model, optimizer, **options)

    def step(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(GATHERING_STEPS):
        step(x[:2, :16] if x.dim() == 3 else x[:2], y[:2])  # 16 tokens of a sequence
    step()
    step.keep = preconditioner  # the hooks live as long as this object
    return step


def of_ten_steps(seconds: list[float]) -> list[float]:
    whole = len(seconds) // STEPS * STEPS
    return [sum(seconds[i : i + STEPS]) for i in range(0, whole, STEPS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed work for each model")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    add_clock(parser)
    parser.add_argument("--json", help="write here instead of benchmarks/results/whiten.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.models:
        build, shape = MODELS[name]
        torch.manual_seed(0)
        x, y = torch.randn(shape), torch.randint(10, (shape[0],))
        candidates = {setting: step_of(build, SETTINGS[setting], x, y) for setting in arguments.settings}
        times = interleaved(candidates, seconds=arguments.seconds, rounds=(STEPS, 5000), clock=arguments.clock)
        times = {setting: of_ten_steps(seconds) for setting, seconds in times.items()}
        plain = times["adamw"]
        for setting, seconds in times.items():
            ratios = sorted(a / b for a, b in zip(seconds, plain, strict=True))
            ratio, best = ratios[len(ratios) // 2], min(seconds) / min(plain)
            row = {"model": name, "setting": setting, "ms": 1e3 * min(seconds) / STEPS, "ratio": ratio}
            rows.append({**row, "ratio_of_best": best, "rounds": len(seconds)})
            print(
                f"{name:<32} {setting:<18} {row['ms']:9.3f} ms  x {ratio:.3f} (of the best rounds: {best:.3f})",
                flush=True,
            )
    save("whiten", {"steps_of_a_round": STEPS, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
