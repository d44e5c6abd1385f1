"""What correcting one layer costs beside its own forward and backward pass, measured and by the count of max_share.

    python -m benchmarks.micro.bench_layer_cost [--seconds 1.5] [--json FILE]

The constants of ``consistency_ops/engine/layer_cost.py`` are a least-squares fit, of relative errors, to a run of this
table.  One thread, processor time; the layer alone, its corrected copy in front of SGD, and its whitened one take
turns.  The share is the median time that the copy adds over the median of forward and backward pass.  A call for one
layer takes about 25 us more than its part of a call for all layers of a network, so that is taken off.
"""

from __future__ import annotations

import time

import torch
from torch import nn

import consistency_ops as co
from benchmarks.micro.timing import one_thread, save

LINEAR = [  # rows, units, outputs
    *((8, 64, 64), (64, 64, 64), (1024, 64, 64), (32, 256, 256), (512, 256, 256), (4096, 256, 256), (16, 1024, 1024)),
    *((136, 192, 576), (136, 192, 192), (136, 192, 768), (136, 768, 192), (512, 1024, 1024), (2048, 1024, 256)),
    *((8, 512, 1000), (8, 1024, 10)),
]
CONVOLUTIONS = [  # channels in and out, pixels a side, kernel, stride, groups; batch 8
    *((3, 64, 64, 7, 2, 1), (64, 64, 16, 3, 1, 1), (64, 128, 16, 3, 2, 1), (128, 128, 8, 3, 1, 1)),
    *((256, 256, 4, 3, 1, 1), (512, 512, 2, 3, 1, 1), (256, 512, 4, 3, 2, 1), (256, 512, 4, 1, 2, 1)),
    *((64, 128, 16, 1, 2, 1), (16, 64, 32, 1, 1, 1), (96, 24, 16, 1, 1, 1), (240, 40, 4, 1, 1, 1)),
    *((576, 96, 2, 1, 1, 1), (120, 120, 1, 1, 1, 1), (1152, 320, 2, 1, 1, 1), (72, 72, 16, 3, 2, 72)),
    *((240, 240, 4, 5, 1, 240), (576, 576, 2, 5, 1, 576), (40, 40, 16, 7, 1, 40), (320, 320, 2, 7, 1, 320)),
    *((3, 192, 64, 16, 16, 1), (3, 40, 64, 4, 4, 1), (40, 80, 16, 2, 2, 1)),
]
MODES = {"correct": {}, "whiten": {"mode": "whiten", "every": 1}}
ONE_CALL = 25e-6  # seconds; bench_host has a call for 50 layers


def linear(rows: int, units: int, outputs: int) -> tuple[nn.Module, torch.Tensor]:
    return nn.Linear(units, outputs), torch.randn(rows, units, requires_grad=True)


def convolution(
    units: int, outputs: int, side: int, kernel: int, stride: int, groups: int
) -> tuple[nn.Module, torch.Tensor]:
    padding = kernel // 2 if kernel % 2 else 0
    module = nn.Conv2d(units, outputs, kernel, stride, padding, groups=groups, bias=False)
    return module, torch.randn(8, units, side, side, requires_grad=True)


class Candidate:
    def __init__(self, build, sizes: tuple[int, ...], options: dict | None) -> None:
        self.module, self.x = build(*sizes)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-6, foreach=True)
        self.pre = None
        if options is not None:
            self.pre = co.Preconditioner(self.module, self.optimizer, max_share=1e9, **options)
        self.gradient = torch.randn_like(self.module(self.x))

    def run(self) -> tuple[float, float]:
        """Seconds of forward and backward pass, and of the optimizer's step."""
        self.x.grad = None
        self.optimizer.zero_grad()
        begin = time.process_time()
        self.module(self.x).backward(self.gradient)
        middle = time.process_time()
        self.optimizer.step()
        return middle - begin, time.process_time() - middle

    def counted(self) -> float:
        (layer,) = self.pre.state_dict()["layers"].values()
        return layer["share"][1].item()


def measure_layer(build, sizes: tuple[int, ...], seconds: float, rounds: int = 15) -> dict:
    candidates = {"plain": Candidate(build, sizes, None)}
    candidates |= {mode: Candidate(build, sizes, options) for mode, options in MODES.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.run()
    end = time.perf_counter() + seconds
    while len(times["plain"]) < rounds or time.perf_counter() < end:
        for name, candidate in candidates.items():
            times[name].append(candidate.run())
    # Passes and steps apart: they vary for different reasons.
    passes, steps = (
        {name: torch.tensor([run[i] for run in runs]).median().item() for name, runs in times.items()} for i in (0, 1)
    )
    row = {"layer": build.__name__, "sizes": sizes, "rounds": len(times["plain"]), "passes_us": 1e6 * passes["plain"]}
    for mode in MODES:
        added = passes[mode] - passes["plain"] + steps[mode] - steps["plain"]
        row[mode] = {"share": max(added - ONE_CALL, 0) / passes["plain"], "counted": candidates[mode].counted()}
    return row


def measure(seconds: float, rounds: int = 15) -> list[dict]:
    torch.manual_seed(0)
    cases = [(linear, sizes) for sizes in LINEAR] + [(convolution, sizes) for sizes in CONVOLUTIONS]
    return [measure_layer(build, sizes, seconds, rounds) for build, sizes in cases]


GROUPS: dict = {}  # nothing to compare with


def main() -> None:
    arguments = one_thread(__doc__, "layer_cost", 1.5)
    rows = measure(arguments.seconds)
    for row in rows:
        shares = ", ".join(f"{mode} {row[mode]['share']:.2f} (counted {row[mode]['counted']:.2f})" for mode in MODES)
        print(f"{row['layer']:<12} {row['sizes']!s:<28} {row['passes_us']:9.0f} us, {shares}")
    save("layer_cost", {"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
