"""The time that the preconditioner adds to a training step of GPT-2, ViT and ResNet: capture, launch and both.

    python -m benchmarks.micro.bench_frameworks [--models gpt2 vit resnet] [--clock cpu|wall] [--seconds 20]
    python -m benchmarks.micro.bench_frameworks --json benchmarks/results/small_batches.json --max-share 0.2 \\
        --models mobilenetv3_small_100 efficientnet_b0 convnext_atto vit_tiny_patch16_224 resnet18

Needs requirements-frameworks.txt.  Models have random weights and random data, because time does not depend on values.
A step is zero_grad, forward, backward and the optimizer's step, on one thread.  The three kinds of step take turns.
"capture" copies rows in the forward pass but corrects no gradient; the rest is the launch.  The figures are medians and
quartiles of the ratio to the plain step of the same round.  Use ``--clock cpu`` on a busy machine: shares of a step are
reproducible, milliseconds less so.  With ``--max-share`` a fourth kind of step leaves dear layers alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional

import consistency_ops as co
from benchmarks.micro.timing import RESULTS, interleaved, medians, save
from consistency_ops.engine import host_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support import frameworks


def gpt2():
    """4 blocks of width 256, batch 8 of 128 tokens; AdamW."""
    (transformers,) = frameworks.require("transformers")
    size = dict(vocab_size=1024, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    ids = torch.randint(1024, (8, 128))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), lambda: model(input_ids=ids, labels=ids).loss


def vit():
    """ViT-Ti with 4 blocks (width 192), patches of 4 x 4, batch 32 of 3 x 32 x 32; AdamW."""
    (transformers,) = frameworks.require("transformers")
    size = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768)
    config = transformers.ViTConfig(image_size=32, patch_size=4, num_labels=10, **size)
    model = transformers.ViTForImageClassification(config)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), lambda: model(pixel_values=x, labels=y).loss


def resnet():
    """timm's resnet18, batch 32 of 3 x 64 x 64; SGD with momentum."""
    (timm,) = frameworks.require("timm")
    model = timm.create_model("resnet18", num_classes=10)
    x, y = torch.randn(32, 3, 64, 64), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return model, optimizer, lambda: functional.cross_entropy(model(x), y)


def of_timm(name: str):
    """A network of timm with few rows a layer: batch 8 of 3 x 64 x 64; SGD with momentum."""
    (timm,) = frameworks.require("timm")
    model = timm.create_model(name, num_classes=10, **({"img_size": 64} if name.startswith("vit") else {}))
    x, y = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return model, optimizer, lambda: functional.cross_entropy(model(x), y)


MODELS = {"gpt2": gpt2, "vit": vit, "resnet": resnet}
SMALL_BATCHES = ("mobilenetv3_small_100", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "resnet18")
MODELS |= {name: functools.partial(of_timm, name) for name in SMALL_BATCHES}


def nothing(*_) -> bool:
    """In place of the correction, in Python (the first step) or in C++ (the others): says that it is done."""
    return True


def step_of(build, preconditioned: bool, corrects: bool = True, max_share: float | None = None):
    model, optimizer, loss = build()
    model.train()
    preconditioner = co.Preconditioner(model, optimizer, max_share=max_share) if preconditioned else None
    if not corrects:
        preconditioner._correction.run = nothing
    in_cpp = contextlib.nullcontext() if corrects else mock.patch.object(host_path, "correct", nothing)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        with in_cpp:
            optimizer.step()

    step.preconditioner = preconditioner
    return step


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def measure(
    name: str, seconds: float, clock: str = "cpu", rounds: tuple[int, int] = (9, 500), max_share: float | None = None
) -> dict:
    build = MODELS[name]
    steps = {
        "plain": step_of(build, False),
        "capture": step_of(build, True, corrects=False),
        "preconditioned": step_of(build, True),
    }
    if max_share is not None:
        steps["limited"] = step_of(build, True, max_share=max_share)
    times = interleaved(steps, seconds=seconds, rounds=rounds, clock=CLOCKS[clock])
    added = {
        kind: [with_it / plain - 1 for with_it, plain in zip(times[kind], times["plain"], strict=True)]
        for kind in times
        if kind != "plain"
    }
    capture, both = added["capture"], added["preconditioned"]
    pre = steps["preconditioned"].preconditioner
    row = {
        "name": name,
        "model": of_timm.__doc__ if name in SMALL_BATCHES else build.__doc__,
        "parameters": sum(p.numel() for p in build()[0].parameters()),
        "layers": sum(layer.capture is not None for layer in pre._layers),
        "rounds": len(both),
        "ms": {key: 1e3 * value for key, value in medians(times).items()},
        "added_by_capture": statistics.median(capture),
        "added_by_launch": statistics.median(both) - statistics.median(capture),
        "added": statistics.median(both),
        "added_quartiles": quartiles(both),
    }
    if max_share is not None:
        limited = steps["limited"].preconditioner
        row["limited"] = {
            "max_share": max_share,
            "left": sum(layer.dear for layer in limited._layers),
            "coverage": limited.stats(condition=False)["coverage"],
            "added": statistics.median(added["limited"]),
            "added_quartiles": quartiles(added["limited"]),
        }
    return row


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4)[::2] if len(values) > 1 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2", "vit", "resnet"])
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="for every model, all three kinds of step together")
    parser.add_argument("--max-share", type=float, help="of one more kind of step; see Preconditioner")
    parser.add_argument("--append", action="store_true", help="keep the rows of other models that are there")
    parser.add_argument("--json", help="write here instead of benchmarks/results/frameworks.json")
    arguments = parser.parse_args()
    if missing := frameworks.missing():
        parser.error(f"{missing[0]} is not installed: pip install -r requirements-frameworks.txt")
    torch.set_num_threads(1)  # CPU time is fair for one thread only
    torch.manual_seed(0)
    rows = []
    for name in arguments.models:
        rows.append(row := measure(name, arguments.seconds, arguments.clock, max_share=arguments.max_share))
        print(
            f"{name:<8} {row['ms']['plain']:7.1f} ms per step, capture {row['added_by_capture']:+.1%}, "
            f"launch {row['added_by_launch']:+.1%}, both {row['added']:+.1%}"
        )
        if limited := row.get("limited"):
            print(f"{'':<8} max_share {limited['max_share']:g}: {limited['left']} layers left, {limited['added']:+.1%}")
    target = Path(arguments.json or RESULTS / "frameworks.json")
    if arguments.append and target.exists():  # a run in pieces, each on a quiet machine
        rows = [row for row in json.loads(target.read_text())["rows"] if row["name"] not in arguments.models] + rows
    clock = {"cpu": "CPU time of one thread", "wall": "wall clock, one thread"}[arguments.clock]
    save("frameworks", {"clock": f"{clock}, interleaved", "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
