"""Layer-wise conditioning of a ResNet with and without a last BatchNorm (Huang et al., ECCV 2020).

A ResNet of 6 n + 2 layers as for CIFAR-10 (shortcut A, He's weights by fan-out), 8, 16 and 32 channels instead of 16,
32 and 64, on images averaged to 16x16; SGD at rate 0.1, momentum 0.9, decay 1e-4, no augmentation.  "last BN" has a
BatchNorm between the global average pool and the linear layer.  Spectra of the layers' input and output-gradient second
moments by consistency_ops.analysis.conditioning, once per epoch.
"""

import torch
from torch import nn
from torch.nn import functional

import consistency_ops as co
from benchmarks.training import fit, runner

TITLE = "layer-wise conditioning of a ResNet, with and without a last BatchNorm"
DATA = "cifar10"
SETTINGS = {"plain": {"last_norm": False}, "last BN": {"last_norm": True}}
SIZE = {"epochs": 6, "train": 1_500, "test": 500, "batch": 100, "n": 5}
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


def small(data: fit.Split) -> fit.Split:
    x, y = (functional.avg_pool2d(part, 2) for part in (data.train_x, data.test_x))
    return fit.Split(x, data.train_y, y, data.test_y, float(x.std())).standard()


def run(settings, size, seed, data, tick):
    data = small(data)
    torch.manual_seed(seed)
    model = resnet(size["n"], last_norm=settings["last_norm"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = len(data.train_y) // size["batch"]
    with co.analysis.conditioning(model, every=steps, max_rows=4000) as monitor:
        common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick)
        outcome = fit.train(model, optimizer, data, **common)
    found = monitor.result()
    points = range(len(found.steps))
    layers = [
        {
            "name": layer.name,
            "lambda_max_x": [fit.finite(layer.lambda_max("input", p)) for p in points],
            "lambda_max_g": [fit.finite(layer.lambda_max("gradient", p)) for p in points],
            "kappa_x": [fit.finite(layer.kappa("input", 0.8, p)) for p in points],
            "kappa_g": [fit.finite(layer.kappa("gradient", 0.8, p)) for p in points],
            "kappa_preconditioned": [fit.finite(layer.kappa("preconditioned", 0.8, p)) for p in points],
        }
        for layer in found.layers
    ]
    return {"layers": layers, **outcome}


def plot(figure, results):
    axes = figure.subplots(1, 3)
    for colour, (name, records) in zip(("C0", "C3"), results.items(), strict=False):
        layers = records[0]["layers"]
        axes[0].plot([x["kappa_x"][-1] for x in layers], color=colour, label=f"{name}, input")
        axes[0].plot([x["kappa_preconditioned"][-1] for x in layers], ":", color=colour, label=f"{name}, corrected")
        axes[1].plot([x["lambda_max_x"][-1] for x in layers], color=colour, label=f"{name}, input")
        axes[1].plot([x["lambda_max_g"][-1] for x in layers], ":", color=colour, label=f"{name}, gradient")
        for record in records:
            last, first = record["layers"][-1], record is records[0]
            axes[2].plot(last["kappa_x"], color=colour, marker=".", label=f"{name}, kappa (80 %)" if first else None)
            label = f"{name}, lambda max" if first else None
            axes[2].plot(last["lambda_max_x"], ":", color=colour, marker=".", label=label)
    axes[0].set(title="condition number by layer, last epoch", xlabel="layer", ylabel="kappa (80 %) of the inputs")
    axes[1].set(title="largest eigenvalue by layer, last epoch", xlabel="layer", ylabel="lambda max")
    axes[2].set(title="last linear layer, all seeds (gaps: infinite)", xlabel="epoch")
    for axis in axes:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    size = next(iter(results.values()))[0]["size"]
    figure.suptitle(f"ResNet-{6 * size['n'] + 2}, {size['train']} CIFAR-10 images of 16x16")


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
