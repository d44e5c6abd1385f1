"""Layer-wise conditioning of a ResNet with and without a last BatchNorm (Huang et al., ECCV 2020).

A ResNet of 6 n + 2 layers as for CIFAR-10 (shortcut A, He's weights by fan-out), by default with 8, 16 and 32 channels
instead of 16, 32 and 64 (--width), on images averaged to 16x16 (--pool); SGD at rate 0.1, momentum 0.9, decay 1e-4,
no augmentation.  "last BN" has a BatchNorm between the global average pool and the linear layer; "corrected" and
"whitened" have the two modes of :class:`consistency_ops.Preconditioner` before SGD.  Spectra of the layers' input and
output-gradient second moments by consistency_ops.analysis.conditioning, at the first step of every epoch.

The paper's width and a fifth of its images, resumable after every epoch:
    python -m benchmarks.training conditioning --runs all --train 10000 --test 2000 --epochs 20 --width 16 --pool 1
        --out benchmarks/results/training/full
"""

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.training import fit, runner

TITLE = "layer-wise conditioning of a ResNet, with and without a last BatchNorm"
DATA = "cifar10"
SETTINGS = {"plain": {"last_norm": False}, "last BN": {"last_norm": True}} | {
    f"{name}, {word}": {"last_norm": name == "last BN", "mode": mode}
    for name in ("plain", "last BN")
    for word, mode in (("corrected", "correct"), ("whitened", "whiten"))
}
DEFAULT = ["plain", "last BN"]
SIZE = {"epochs": 6, "train": 1_500, "test": 500, "batch": 100, "n": 5, "width": 8, "pool": 2}
FIGSIZE = (12, 4)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        # Shortcut A: every second pixel, and zeros in the new channels.
        return functional.relu(y + functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


def resnet(n: int, width: int = 8, last_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(3):
        for i in range(n):
            outputs = width << stage
            layers.append(Block(channels, outputs, 2 if stage and i == 0 else 1))
            channels = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()] + [nn.BatchNorm1d(channels)] * last_norm
    model = nn.Sequential(*layers, nn.Linear(channels, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


def small(data: fit.Split, pool: int) -> fit.Split:
    x, y = (functional.avg_pool2d(part, pool) for part in (data.train_x, data.test_x))
    return fit.Split(x, data.train_y, y, data.test_y, float(x.std())).standard()


def run(settings, size, seed, data, tick):
    data = small(data, size["pool"])
    torch.manual_seed(seed)
    # With 16 channels in a stage, oneDNN takes a third less time for a step with the channels last.
    model = resnet(size["n"], size["width"], settings["last_norm"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    if "mode" in settings:
        co.Preconditioner(model, optimizer, mode=settings["mode"])
    steps = len(data.train_y) // size["batch"]
    points: list[dict[str, dict]] = []
    with co.analysis.conditioning(model, every=steps, max_rows=4000) as monitor:

        def take_point(epoch: int) -> None:
            points.append({layer.name: figures(layer) for layer in monitor.result().layers})
            monitor.clear()

        common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, progress=tick.progress)
        outcome = fit.train(model, optimizer, data, after_epoch=take_point, notes={"points": points}, **common)
    layers = [
        {"name": name, **{key: [point[name][key] for point in points] for key in points[0][name]}} for name in points[0]
    ]
    return {"layers": layers, **outcome}


def figures(layer) -> dict[str, float | None]:
    """What is kept of a layer at the one step that was recorded."""
    values = {
        "lambda_max_x": layer.lambda_max("input", 0),
        "lambda_max_g": layer.lambda_max("gradient", 0),
        "kappa_x": layer.kappa("input", 0.8, 0),
        "kappa_g": layer.kappa("gradient", 0.8, 0),
        "kappa_preconditioned": layer.kappa("preconditioned", 0.8, 0),
    }
    return {key: fit.finite(value) for key, value in values.items()}


def plot(figure, results):
    axes = figure.subplots(1, 3)
    for colour, (name, records) in zip(("C0", "C3", "C1", "C2", "C4", "C5"), results.items(), strict=False):
        layers = records[0]["layers"]
        axes[0].plot([x["kappa_x"][-1] for x in layers], color=colour, label=name)
        axes[0].plot([x["kappa_preconditioned"][-1] for x in layers], ":", color=colour)
        axes[1].plot([x["lambda_max_x"][-1] for x in layers], color=colour)
        axes[1].plot([x["lambda_max_g"][-1] for x in layers], ":", color=colour)
        for record in records:
            last = record["layers"][-1]
            axes[2].plot(last["kappa_x"], color=colour, marker=".")
            axes[2].plot(last["lambda_max_x"], ":", color=colour, marker=".")
    axes[0].set(title="inputs of each layer, last epoch\n(dotted: preconditioned)", ylabel="kappa (80 %)")
    axes[1].set(title="inputs of each layer, last epoch\n(dotted: output gradients)", ylabel="lambda max")
    axes[2].set(
        title="inputs of the last layer, all seeds\n(dotted: lambda max; gaps: infinite)", ylabel="kappa (80 %)"
    )
    for axis, across in zip(axes, ("layer", "layer", "epoch"), strict=True):
        axis.set(xlabel=across, yscale="log")
        axis.grid(alpha=0.3)
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=len(results), fontsize="small")
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(
        f"ResNet-{6 * size['n'] + 2}, {size['train']} CIFAR-10 images of {32 // size['pool']}x{32 // size['pool']}"
    )


def lines(results):
    text = []
    for name, records in results.items():
        last = [r["layers"][-1] for r in records]
        figures = ", ".join(
            f"{label} {runner.spread((x[key][-1] for x in last), '{:.3g}')}"
            for key, label in (("kappa_x", "kappa"), ("lambda_max_x", "lambda max"), ("lambda_max_g", "of gradients"))
        )
        error, loss = (runner.spread((r[k][-1] for r in records), "{:.3f}") for k in ("test_error", "train_loss"))
        text.append(f"{name}: last linear layer {figures}; training loss {loss}, test error {error}")
    return text
