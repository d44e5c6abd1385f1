"""ReLU, GELU and the modulus in networks of today: error, time of a step and bytes kept for backward.

The small networks of ``benchmarks/peers``: ResNet-8 (16 channels, batch norm) and a vision transformer (4 x 4 pixels a
token, two blocks of 64 units) on CIFAR-10 at 16 x 16, a GPT (two blocks of 64 units, context 64) on characters of
Python's manual.  Only the activation changes.  Adam, rate falling linearly to 0; every run tries the same three rates
and keeps the one with the least held-out loss, so that all activations are tuned alike; then the error on test data
counts.

"bytes": what autograd keeps for backward in one training step, without parameters, each buffer once; the modulus keeps
one bit an element (:func:`consistency_ops.modulus`), ReLU its output, which the next layer keeps anyway, GELU its
input.  "milliseconds": the least of many steps of one thread, forward and backward, of all three activations in turn;
"ratios": of the modulus over the others, the median over the rounds of these turns (and its quartiles), so that a
machine whose speed changes changes both sides.  On a quiet machine:
    python -m benchmarks.training modern --steps 1000 --runs "resnet, speed" "vit, speed" "gpt, speed"
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional

import consistency_ops as co
from benchmarks import DATA as FOLDER
from benchmarks.peers import tasks
from benchmarks.training import runner

TITLE = "ReLU, GELU and the modulus in a ResNet, a vision transformer and a GPT"
DATA = "cifar10"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "modulus": co.nn.Modulus}
NETWORKS = ("resnet", "vit", "gpt")
RATES = {"resnet": (0.03, 0.01, 0.003), "vit": (0.01, 0.003, 0.001), "gpt": (0.01, 0.003, 0.001)}
BATCH = {"resnet": 64, "vit": 64, "gpt": 16}
SETTINGS = {f"{n}, {a}": {"network": n, "activation": a, "rates": RATES[n]} for n in NETWORKS for a in ACTIVATIONS} | {
    f"{n}, speed": {"network": n, "activation": "all", "rates": ()} for n in NETWORKS
}
DEFAULT = [name for name in SETTINGS if "speed" not in name]
SIZE = {"steps": 100, "train": 12_500, "test": 2_500}
FIGSIZE = (12, 4)


class Vit(nn.Module):
    """Images (n, 3, 16, 16) to ten logits: tokens of 4 x 4 pixels, transformer blocks, the mean of the tokens."""

    def __init__(self, activation: type[nn.Module], width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(tasks.Block(width, 4, False, activation) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def build(network: str, activation: str, seed: int) -> nn.Module:
    made = {"resnet": tasks.resnet, "vit": Vit, "gpt": tasks.Gpt}[network]
    return tasks.seeded(lambda: made(activation=ACTIVATIONS[activation]))(seed)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def parts(network: str, data) -> tasks.Split:
    if network == "gpt":
        return tasks.characters(FOLDER)
    images = data.standard()
    x, test = (functional.avg_pool2d(x, 2) for x in (images.train_x, images.test_x))
    held_out = len(x) // 5
    return tasks.Split(
        (x[:-held_out], images.train_y[:-held_out]), (x[-held_out:], images.train_y[-held_out:]), (test, images.test_y)
    )


def run(settings, size, seed, data, tick):
    split = parts(settings["network"], data)
    if settings["activation"] == "all":
        return speed(settings["network"], split, size["steps"])
    trials = (tick.progress.load() or {"trials": {}})["trials"]
    for rate in settings["rates"]:
        if rate not in trials:
            trials[rate] = _train(settings, split, rate, size["steps"], seed)
            tick.progress.save(trials=trials)
            tick(f"rate {rate:g}: {trials[rate]['held_out']:.3f}")
    best = min(trials, key=lambda rate: trials[rate]["held_out"])
    bytes_kept = kept_for_backward(settings["network"], settings["activation"], split)
    held_out = {rate: trial["held_out"] for rate, trial in trials.items()}
    return {"rate": best, "held_out": held_out, "test": trials[best]["test"], "bytes": bytes_kept}


def _train(settings: dict, split: tasks.Split, rate: float, steps: int, seed: int) -> dict[str, float]:
    network = settings["network"]
    model = build(network, settings["activation"], seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    x, y = split.train
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(x), (BATCH[network],), generator=generator)
        optimizer.zero_grad()
        loss_of(model, x[rows], y[rows]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        metric = tasks.nats if network == "gpt" else tasks.wrong
        held_out = [float(loss_of(model, a, b)) for a, b in _pieces(split.held_out)]
        test = torch.cat([metric(model(a), b) for a, b in _pieces(split.test)])
    return {"held_out": sum(held_out) / len(held_out), "test": float(test.mean())}


def _pieces(pair: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pair[0].split(250), pair[1].split(250), strict=True))


def kept_for_backward(network: str, activation: str, split: tasks.Split) -> int:
    """Return the bytes that autograd keeps of one forward pass, without parameters and the batch; a buffer once."""
    model = build(network, activation, 0)
    x, y = (part[: BATCH[network]] for part in split.train)
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), x, y)}
    kept: dict[int, int] = {}
    alive = []  # what is freed may be given out again at the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, x, y)
    del loss
    return sum(kept.values())


def speed(network: str, split: tasks.Split, steps: int) -> dict[str, dict]:
    """Return the time of a step, forward and backward, by activation, measured in turn; two rounds warm up."""
    models = {activation: build(network, activation, 0) for activation in ACTIVATIONS}
    x, y = (part[: BATCH[network]] for part in split.train)
    times: dict[str, list[float]] = {activation: [] for activation in models}
    names = list(models)
    for turn in range(2 + max(2, steps // 10)):
        for name in names[turn % 3 :] + names[: turn % 3]:  # each of them is now the first, now the last one
            models[name].zero_grad()
            start = time.perf_counter()
            loss_of(models[name], x, y).backward()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    ratios = {
        name: torch.tensor(times["modulus"]).div(torch.tensor(times[name])).quantile(torch.tensor([0.25, 0.5, 0.75]))
        for name in names
        if name != "modulus"
    }
    return {
        "milliseconds": {name: min(values) for name, values in times.items()},
        "ratios": {name: [round(v, 4) for v in values.tolist()] for name, values in ratios.items()},
    }


def plot(figure, results):
    axes = figure.subplots(1, 3)
    for axis, network in zip(axes, NETWORKS, strict=True):
        names = [a for a in ACTIVATIONS if f"{network}, {a}" in results]
        for i, activation in enumerate(names):
            records = results[f"{network}, {activation}"]
            values = [r["test"] for r in records]
            axis.bar(i, sum(values) / len(values), color=f"C{i}", alpha=0.5)
            axis.plot([i] * len(values), values, "k.")
            axis.annotate(f"{records[0]['bytes'] / 1e6:.2f} MB", (i, 0), ha="center", va="bottom", fontsize="small")
        axis.set_xticks(range(len(names)), names)
        axis.set(title=network, ylabel="test loss (nats)" if network == "gpt" else "test error")
        axis.grid(alpha=0.3, axis="y")
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(f"{size['steps']} steps of Adam, best of three rates; dots: seeds; below: bytes kept for backward")


def lines(results):
    text = []
    for name, records in results.items():
        if "milliseconds" in records[0]:
            times = ", ".join(f"{a} {ms:.2f} ms" for a, ms in records[0]["milliseconds"].items())
            ratios = [
                f"{values[1]:.3f} ({values[0]:.3f} to {values[2]:.3f}) of {a}"
                for a, values in records[0]["ratios"].items()
            ]
            text.append(f"{name}: {times}; the modulus takes {', '.join(ratios)}")
        else:
            text.append(
                f"{name}: test {runner.spread((r['test'] for r in records), '{:.4f}')}, rates "
                f"{[r['rate'] for r in records]}, {records[0]['bytes'] / 1e6:.3f} MB kept for backward"
            )
    return text
