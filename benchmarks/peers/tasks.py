"""The tasks: data, model, loss, test metric (smaller is better) and targets, sized for two CPU cores."""

from __future__ import annotations

import itertools
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from consistency_ops.cli import data, models
from consistency_ops.nn import deep_mlp

HELD_OUT = 2500  # training images that only judge the trials
TEST = 2500  # test images per evaluation, which then costs less than the steps between two evaluations


@dataclass(frozen=True)
class Split:
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A task. ``targets`` are values of the metric to which steps and seconds are counted, fixed before the runs.

    ``points`` is the number of points on a curve.
    """

    text: str
    metric: str
    load: Callable[[Path], Split]
    model: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], Tensor]  # per example
    batch: int
    steps: int
    targets: tuple[float, ...]
    points: int = 12
    loss_type: str = "cross_entropy"  # what K-FAC's Fisher matrix assumes


def images(name: str, kind: str, limit: int | None = None, shuffle: bool = False) -> Callable[[Path], Split]:
    """Return a loader of images. ``kind`` is their scaling; ``shuffle`` is for folders, which are read by class."""

    def load(directory: Path) -> Split:
        found = data.load(name, directory / name, limit=limit)
        train, test = torch.arange(len(found.train_x)), torch.arange(len(found.test_x))
        if shuffle:
            generator = torch.Generator().manual_seed(0)
            train, test = (order[torch.randperm(len(order), generator=generator)] for order in (train, test))
        scaled = data.scaling(found.train_x, kind)
        x, y = scaled(found.train_x[train]), found.train_y[train]
        held_out = min(HELD_OUT, len(x) // 5)
        test = test[:TEST]
        return Split(
            (x[:-held_out], y[:-held_out]),
            (x[-held_out:], y[-held_out:]),
            (scaled(found.test_x[test]), found.test_y[test]),
        )

    return load


def small_images(directory: Path) -> Split:
    """Load 10 000 training images of CIFAR-10 at 16 x 16 (means of 2 x 2 pixels), which costs a fourth."""
    full = images("cifar10", "standard", 12_500, shuffle=True)(directory)
    parts = [(functional.avg_pool2d(x, 2), y) for x, y in (full.train, full.held_out, full.test)]
    return Split(*parts)


def pictures(directory: Path) -> Split:
    """Load MNIST in [0, 1], each image its own target; 1000 test images, as the squared error varies little."""
    found = data.load("mnist", directory / "mnist")
    x, test = found.train_x.flatten(1) / 255.0, found.test_x[:1000].flatten(1) / 255.0
    return Split((x[:-1000],) * 2, (x[-1000:],) * 2, (test,) * 2)


CONTEXT = 64
CHARACTERS = 96  # printable ASCII and the newline; all others become "?"


def characters(directory: Path) -> Split:
    """Load the manual pages in Python (pydoc_data.topics) in pieces of 65 characters; the last tenth is the test."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    codes = torch.tensor([c - 32 if 32 <= c < 127 else 95 if c == 10 else 31 for c in text])
    pieces = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    x, y = pieces[:, :-1], pieces[:, 1:]
    tenth = len(x) // 10
    cuts = slice(0, -2 * tenth), slice(-2 * tenth, -2 * tenth + 200), slice(-tenth, -tenth + 200)
    return Split(*((x[cut], y[cut]) for cut in cuts))


BYTES_CONTEXT = 128


def source_bytes(directory: Path) -> Split:
    """Load the sources of Python's standard library as bytes, in pieces of 129; every tenth file is the test.

    It is the largest text that comes with every Python. The text depends on the version of Python.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.rglob("*.py")) if not _foreign(path.relative_to(folder))]
    files = [path for path in files if path.stat().st_size]
    x, y = (
        [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in some]
        for some in ([path for i, path in enumerate(files) if i % 10], files[::10])
    )
    train, test = (
        torch.cat(some)[: sum(map(len, some)) // (BYTES_CONTEXT + 1) * (BYTES_CONTEXT + 1)]
        .view(-1, BYTES_CONTEXT + 1)
        .long()[torch.randperm(sum(map(len, some)) // (BYTES_CONTEXT + 1), generator=torch.Generator().manual_seed(0))]
        for some in (x, y)
    )
    cuts = train[100:], train[:100], test[:100]
    return Split(*((cut[:, :-1], cut[:, 1:]) for cut in cuts))


def _foreign(path: Path) -> bool:
    """Whether a file below the standard library is a test, or was installed."""
    return bool({"site-packages", "dist-packages", "test", "tests", "__pycache__"} & set(path.parts))


def mlp(widths: list[int], activation: type[nn.Module], gain: float) -> Callable[[int], nn.Module]:
    """Return a builder of an MLP; its weights have variance ``gain`` / fan-in, its biases are 0."""

    def build(seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layer = nn.Linear(fan_in, fan_out)
            with torch.no_grad():
                layer.weight.normal_(0, math.sqrt(gain / fan_in), generator=generator)
                layer.bias.zero_()
            layers += [layer, activation()]
        return nn.Sequential(*layers[:-1])

    return build


def named(name: str, shape: tuple[int, int, int], **options: object) -> Callable[[int], nn.Module]:
    return lambda seed: models.build(name, shape, 10, seed=seed, **options)


def seeded_mlp(width: int, depth: int, activation: str, norm: str) -> Callable[[int], nn.Module]:
    return lambda seed: deep_mlp(
        784, 10, width=width, depth=depth, activation=activation, normalization=norm, init="he", seed=seed
    )


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Return ``build`` as a function of the seed, with torch's own initial weights."""

    def build_with(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return build_with


def small_convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU()),
        nn.Linear(64, 10),
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.activation = activation()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), activation()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.skip(x))


def resnet(width: int = 16, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Return a builder of ResNet-8, which has three residual blocks."""
    sizes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation()),
        *(Residual(*size, activation) for size in sizes),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


class Block(nn.Module):
    """A transformer block with its norms before attention and MLP."""

    def __init__(self, width: int, heads: int, causal: bool, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, activation()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A GPT: symbols (n, t) to logits (n, t, symbols); embedding and head are not tied."""

    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        context: int = CONTEXT,
        symbols: int = CHARACTERS,
        activation: Callable[[], nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, 0, 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, True, activation) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def wrong(output: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(1) != y).float()


def squared(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum(1)


def nats(output: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def _classify(text: str, load, model, batch: int, steps: int, *more) -> Task:
    return Task(text, "test error", load, model, functional.cross_entropy, wrong, batch, steps, *more)


TASKS = {
    "autoencoder": Task(
        "MNIST autoencoder 784-250-100-30-100-250-784, tanh, squared error of an image; Glorot-like start",
        "squared error",
        pictures,
        mlp([784, 250, 100, 30, 100, 250, 784], nn.Tanh, 1.0),
        lambda output, y: squared(output, y).mean(),
        squared,
        *(250, 128, (20.0, 15.0), 16, "mse"),
    ),
    "deep-mlp": _classify(
        "MNIST, 784, 11 x 128, 10, ReLU, RMS norm, raw pixels, weights of deviation 0.01 (net C of the paper)",
        images("mnist", "raw"),
        named("deep-mlp", (1, 28, 28)),
        *(500, 160, (0.1, 0.05), 20),
    ),
    "fashion-mlp": _classify(
        "Fashion-MNIST, 784, 6 x 256, 10, ReLU, He start, no normalisation",
        images("fashion-mnist", "standard"),
        mlp([784, *[256] * 6, 10], nn.ReLU, 2.0),
        *(250, 120, (0.16, 0.14)),
    ),
    "fashion-convnet": _classify(
        "Fashion-MNIST, 3 convolutions 3x3 (16, 32, 32), 64, 10, ReLU",
        images("fashion-mnist", "standard"),
        seeded(small_convnet),
        *(128, 120, (0.18, 0.15)),
    ),
    "cifar-convnet": _classify(
        "CIFAR-10 (JPEG) at 16 x 16, 10 000 images; 3 convolutions 5x5 (32, 32, 64), 64, 10, RMS norm, He (net B)",
        small_images,
        named("convnet", (3, 16, 16), init="he"),
        *(64, 120, (0.6, 0.55), 10),
    ),
    "cifar-resnet": _classify(
        "CIFAR-10 (JPEG) at 16 x 16, 10 000 training images, ResNet-8 of width 16, batch norm",
        small_images,
        seeded(resnet),
        *(64, 120, (0.6, 0.55), 10),
    ),
    "char-gpt": Task(
        "characters of Python's manual pages, transformer 2 x 64, 4 heads, context 64",
        "test loss (nats)",
        characters,
        seeded(Gpt),
        lambda output, y: functional.cross_entropy(output.reshape(-1, CHARACTERS), y.flatten()),
        nats,
        *(16, 100, (2.8, 2.6), 10),
    ),
    "narrow-mlp": _classify(
        "MNIST, 784, 49 x 32, 10, ReLU, He start, no normalisation: 50 weight layers",
        images("mnist", "standard"),
        mlp([784, *[32] * 49, 10], nn.ReLU, 2.0),
        *(250, 100, (0.5, 0.3), 10),
    ),
}

# For the ablations: activations and normalisations of the two MLPs, from a start that lets all of them train.
VARIANTS = {
    f"{name}, He start, {activation}, {norm}": _classify(
        f"{name} with {activation}, {'RMS norm' if norm == 'rms' else 'no norm'}, He start",
        images(folder, "standard"),
        seeded_mlp(width, depth, activation, norm),
        *(batch, 160, (0.05, 0.03)),
    )
    for name, folder, width, depth, batch in (
        ("deep-mlp", "mnist", 128, 11, 500),
        ("fashion-mlp", "fashion-mnist", 256, 6, 250),
    )
    for activation in ("relu", "modulus")
    for norm in ("rms", "none")
}
