"""Pixel-wise decorrelation (outlook of arXiv 1708.00631) on a small convnet: does it pay?

Fashion-MNIST, convolutions 5x5 1-8 and 3x3 8-16 with 2x2 pooling and ReLU, a linear layer; SGD with momentum behind the
correction of the convolutions: none, between channels (the paper's), between channels and pixels exactly (im2col) or in
Fourier space.  All are scaled by the mean square of the layer's inputs, damping 0.1; the linear layer has the usual
correction in all four.  The rate is selected by the same trials.  "seconds" is the processor time of one thread.
"""

import math
import time
import weakref

import torch
from torch import nn

import consistency_ops as co
from benchmarks.training import fit, runner
from consistency_ops.experimental import decorrelate_fft, decorrelate_im2col

TITLE = "pixel-wise decorrelation by im2col and FFT against channels only, a small convnet"
DATA = "fashion-mnist"
SETTINGS = {name: {"correction": name} for name in ("none", "channels", "im2col", "fft")}
SIZE = {"epochs": 5, "train": 3_000, "test": 2_000, "batch": 100}
FIGSIZE = (12, 4)
RATES = (0.3, 0.1, 0.03, 0.01, 0.003)
DAMPING = 0.1


class Pixelwise:
    """Corrects the gradients of all Conv2d layers, by their last inputs, before every step of an optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, variant: str) -> None:
        self.variant, self.inputs = variant, weakref.WeakKeyDictionary()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(self._before_forward)
        optimizer.register_step_pre_hook(self._before_step)

    def _before_forward(self, module, args):
        if module.training and torch.is_grad_enabled():
            self.inputs[module] = args[0].detach()

    def _before_step(self, optimizer, args, kwargs):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._correct()
            return None

        def corrected():
            loss = closure()
            self._correct()
            return loss

        return (args[0], corrected, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _correct(self):
        for layer, x in self.inputs.items():
            scale = float(x.square().mean())
            if not 0 < scale < math.inf:  # a rate of the search that diverges
                continue
            options = dict(damping=DAMPING * scale, padding=layer.padding)
            if self.variant == "im2col":
                new = decorrelate_im2col(layer.weight.grad, x, stride=layer.stride, max_rows=4096, **options)
            else:
                new = decorrelate_fft(layer.weight.grad, x, **options)
            layer.weight.grad.copy_(new).mul_(scale)


def run(settings, size, seed, data, tick):
    data, correction = data.standard(), settings["correction"]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    skip = () if correction == "channels" else nn.Conv2d
    co.Preconditioner(model, optimizer, damping=DAMPING, max_rows=4096, skip=skip, seed=seed)
    if correction in ("im2col", "fft"):
        Pixelwise(model, optimizer, correction)
    seconds, start = [], time.process_time()
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick, search=RATES)
    after = lambda epoch: seconds.append(time.process_time() - start)  # noqa: E731
    outcome = fit.train(model, optimizer, data, after_epoch=after, **common)
    per_epoch = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)  # without the search
    return {"seconds_per_epoch": per_epoch, **outcome}


def plot(figure, results):
    axes = figure.subplots(1, 3)
    for i, (name, records) in enumerate(results.items()):
        loss, error = runner.mean(records, "train_loss"), runner.mean(records, "test_error")
        epoch = sum(r["seconds_per_epoch"] for r in records) / len(records)
        epochs = range(1, len(loss) + 1)
        axes[0].plot(epochs, loss, color=f"C{i}", label=name)
        axes[1].plot([epoch * e for e in epochs], loss, color=f"C{i}", label=f"{name}, {epoch:.1f} s per epoch")
        axes[2].plot(epochs, error, color=f"C{i}", label=name)
    axes[0].set(yscale="log", xlabel="epoch", ylabel="mean training loss")
    axes[1].set(yscale="log", xlabel="processor seconds, without rate search", ylabel="mean training loss")
    axes[2].set(xlabel="epoch", ylabel="test error")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    figure.suptitle("Decorrelation of the convolutions' gradients, Fashion-MNIST")


def lines(results):
    text = []
    for name, records in results.items():
        loss = runner.spread((r["train_loss"][-1] for r in records), "{:.3f}")
        error = runner.spread(min(r["test_error"]) for r in records)
        seconds = runner.spread((r["seconds_per_epoch"] for r in records), "{:.2f}")
        rates = [r["rates"] for r in records]
        text.append(f"{name}: training loss {loss}, best test error {error}, {seconds} s per epoch; rates {rates}")
    return text
