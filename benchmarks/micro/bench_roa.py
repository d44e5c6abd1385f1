"""roaRNN in one call against the loop over its modules, and against torch's own RNN and LSTM.

    python -m benchmarks.micro.bench_roa [--seconds 20] [--json FILE]

Forward and backward of a sequence, gradient of the last state, float32 on one thread, in turns; figures are medians and
minima of processor time.  `loop` is the network whose modules are called step by step, as a hook on one of them
demands; `products` are its matrix products alone, in torch: two a step and one for the gradient of the weight.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.micro.timing import Group, interleaved, one_thread, save
from consistency_ops.nn import ROARNN

SHAPES = ((784, 50, 128, 1), (196, 50, 64, 1), (784, 100, 256, 1), (1000, 20, 128, 10), (784, 1, 128, 1))
KINDS = ("native", "loop", "products", "rnn", "lstm")


def group(steps: int, rows: int, units: int, inputs: int) -> Group:
    u = torch.randn(steps, rows, inputs)
    native = ROARNN(inputs, units, beta=2 / steps)
    loop = ROARNN(inputs, units, beta=2 / steps)
    loop.phi.register_forward_hook(lambda *_: None)
    models = {"native": native, "loop": loop, "rnn": nn.RNN(inputs, units), "lstm": nn.LSTM(inputs, units)}
    h, weight, all_h = torch.randn(rows, units), torch.randn(units, units), torch.randn(steps * rows, units)

    def train(model: nn.Module) -> None:
        model.zero_grad()
        model(u)[0][-1].square().mean().backward()

    def products() -> None:
        for _ in range(2 * steps):
            h @ weight
        all_h.T @ all_h

    return Group({**{name: lambda m=model: train(m) for name, model in models.items()}, "products": products})


GROUPS = {"50 steps": lambda: group(50, 10, 32, 1)}


def measure(shape: tuple[int, int, int, int], seconds: float) -> dict:
    times = interleaved(group(*shape).candidates, seconds=seconds, rounds=(5, 51), clock=time.process_time)
    row: dict = dict(zip(("steps", "rows", "units", "inputs"), shape, strict=True))
    for name in KINDS:
        ordered = sorted(times[name])
        row[name] = {"median_ms": round(1e3 * ordered[len(ordered) // 2], 3), "least_ms": round(1e3 * ordered[0], 3)}
    for name in ("loop", "rnn", "lstm"):
        row[f"{name}_over_native"] = round(row[name]["median_ms"] / row["native"]["median_ms"], 2)
    row["share_of_products_in_loop"] = round(row["products"]["median_ms"] / row["loop"]["median_ms"], 2)
    return row


def main() -> None:
    arguments = one_thread(__doc__, "roa", seconds=20.0)
    print("steps x rows x units" + "".join(f"{kind + ' ms':>14}" for kind in KINDS) + "     loop / native")
    rows = []
    for shape in SHAPES:
        row = measure(shape, arguments.seconds)
        rows.append(row)
        print(
            f"{'x'.join(map(str, shape[:3])):<20}"
            + "".join(f"{row[kind]['median_ms']:>14.1f}" for kind in KINDS)
            + f"{row['loop_over_native']:>14.2f}"
        )
    save("roa", {"clock": "process_time, one thread", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
