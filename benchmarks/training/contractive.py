"""Contractive networks: the norm bound of network C by weight decay and activation, and what it certifies.

MNIST, raw pixels less their mean; SGD2, rate selected as in arXiv 1708.00631; all bounds are for raw pixel values, 0
to 255 (in units of [0, 1] they are 255 times larger).  "plain" is the paper's bound, the product of the spectral norms
over the product of the smallest RMS denominators; "folded" that of the same network with its norms multiplied into the
weights.  "clip" projects every weight onto spectral norm 1 or less every tenth step; "orthogonal" besides replaces the
square ones by the nearest orthogonal matrix, whose singular values are all 1, so that no RMS denominator is far below
the norm before it.  "rising": the decay grows linearly from 0 to its value in the first half of the training.
"whiten": Adam with whitened inputs and AdamW's decay instead of SGD2.

Dividing the last layer of a network by a number divides its bound and does not change its decisions: divided by its own
bound, every network is contractive at no cost in accuracy ("scaled" below).  The scale does not change the share of
certified test images, which are classified rightly, with a margin that no change of the image below a radius can undo.

"1-Lipschitz": for comparison a network of the same size of deel-torchlip (spectrally normalised, orthogonalised layers,
pairwise sorting for activation), trained with cross-entropy at a temperature, pixels in [0, 1]; deel-torchlip is no
requirement of this project and has to be installed for these runs.
"""

import math

import torch
from torch import nn

import consistency_ops as co
from benchmarks.training import fit, runner
from consistency_ops.nn import clip_spectral_norms_, deep_mlp, fold_rms_norm

TITLE = "contractive networks on MNIST: bound, accuracy, certified accuracy"
DATA = "mnist"
SETTINGS = (
    {
        f"{activation}, decay {decay:g}": {"activation": activation, "decay": decay, "depth": 11}
        for decay in (1e-4, 1e-3, 2e-3)
        for activation in ("modulus", "relu")
    }
    | {
        "modulus, decay 0.001, clip": {"activation": "modulus", "decay": 1e-3, "depth": 11, "clip": 1.0},
        "modulus, decay 0.0005, depth 4": {"activation": "modulus", "decay": 5e-4, "depth": 4},
        "modulus, decay 0.001, depth 4": {"activation": "modulus", "decay": 1e-3, "depth": 4},
        "relu, decay 0.001, depth 4": {"activation": "relu", "decay": 1e-3, "depth": 4},
        "modulus, decay 0.001, depth 6": {"activation": "modulus", "decay": 1e-3, "depth": 6},
        "modulus, decay 0.002, depth 6": {"activation": "modulus", "decay": 2e-3, "depth": 6},
        "modulus, decay 0.001, orthogonal": {
            "activation": "modulus",
            "decay": 1e-3,
            "depth": 11,
            "project": "orthogonal",
        },
        "relu, decay 0.001, orthogonal": {"activation": "relu", "decay": 1e-3, "depth": 11, "project": "orthogonal"},
        "modulus, decay 0.0001, orthogonal": {
            "activation": "modulus",
            "decay": 1e-4,
            "depth": 11,
            "project": "orthogonal",
        },
        "modulus, decay 0.1, whiten": {"activation": "modulus", "decay": 0.1, "depth": 11, "optimizer": "whiten"},
        "modulus, decay 0.1, whiten, orthogonal": {
            "activation": "modulus",
            "decay": 0.1,
            "depth": 11,
            "optimizer": "whiten",
            "project": "orthogonal",
        },
    }
    | {
        f"{activation}, decay {decay:g}, rising": {
            "activation": activation,
            "decay": decay,
            "depth": 11,
            "rising": True,
        }
        for activation, decays in (
            ("modulus", (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 0.012)),
            ("relu", (4e-3, 8e-3)),
        )
        for decay in decays
    }
    | {
        f"1-Lipschitz, depth {depth}, temperature {t:g}": {"activation": "sort", "depth": depth, "temperature": t}
        for depth in (4, 11)
        for t in (5.0, 20.0, 80.0)
    }
)
DEFAULT = [name for name in SETTINGS if "Lipschitz" not in name]
SIZE = {"epochs": 12, "train": 15_000, "test": 10_000, "batch": 250}
RADII = (2.55, 12.75, 25.5, 51.0)  # l2, raw pixel values: 0.01, 0.05, 0.1 and 0.2 in units of [0, 1]
EARLIER_RADII = (2.55, 10.0, 25.5, 51.0)  # of stored runs that do not name theirs
# Test error and log10 of the plain bound at the last epoch of an independent implementation in numpy: all images, 10 or
# 20 epochs.
NUMPY = {
    "modulus": [(0.0305, 4.40), (0.0189, 0.86), (0.0217, 0.54), (0.0262, 0.24), (0.1199, 0.39)],
    "relu": [(0.0224, 6.93), (0.0239, 2.13), (0.0672, 0.55), (0.1078, -0.15)],
}
DEPTHS = {11: 6, 6: 9, 4: 12}  # hidden layers: size of the marker
FIGSIZE = (13, 5.4)


def certified(model: nn.Sequential, log10_bound: float, data: fit.Split) -> list[float]:
    """Return, for each of RADII, the share of test images that no change of smaller l2 norm makes wrong."""
    radius = co.analysis.certified_radius(model, data.test_x, data.test_y, bound=10**log10_bound)
    return [float((radius > r).double().mean()) for r in RADII]


@torch.no_grad()
def orthogonalise_(model: nn.Module) -> None:
    """Replace the square weights by the nearest orthogonal matrices, and clip the norms of the others to 1."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.in_features == layer.out_features:
            u, _, v = torch.linalg.svd(layer.weight)
            layer.weight.copy_(u @ v)
    clip_spectral_norms_(model, 1.0)


def optimizer_for(settings: dict, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    if settings.get("optimizer") != "whiten":
        return fit.optimizer_of("sgd2", model, seed=seed, weight_decay=settings["decay"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=settings["decay"])
    co.Preconditioner(model, optimizer, mode="whiten")
    return optimizer


def run(settings, size, seed, data, tick):
    if settings["activation"] == "sort":
        return _one_lipschitz(settings, size, seed, data, tick)
    options = {key: settings[key] for key in ("activation", "depth")}
    model = deep_mlp(784, 10, seed=seed, **options)
    optimizer = optimizer_for(settings, model, seed)
    clip, orthogonal = settings.get("clip"), settings.get("project") == "orthogonal"
    rising = size["epochs"] * (len(data.train_y) // size["batch"]) / 2 if settings.get("rising") else 0

    def project(step: int, last: bool = False) -> None:
        if rising:
            optimizer.param_groups[0]["weight_decay"] = settings["decay"] * min(1.0, step / rising)
        if (clip or orthogonal) and (last or step % 10 == 0):
            orthogonalise_(model) if orthogonal else clip_spectral_norms_(model, clip)

    project(0)
    common = dict(epochs=size["epochs"], batch=size["batch"], seed=seed, tick=tick)
    rates = (1.0, 0.5, 0.1) if settings.get("optimizer") != "whiten" else (0.01, 0.003, 0.001)
    progress = getattr(tick, "progress", None)
    outcome = fit.train(model, optimizer, data, search=rates, after_step=project, progress=progress, **common)
    if clip or orthogonal:
        project(0, last=True)
        outcome["test_error"][-1] = fit.error_of(model, data)
    found = co.analysis.lipschitz_bound(model)
    plain, tight = found.log_bound / math.log(10), found.log_folded / math.log(10)
    scaled = fold_rms_norm(model)
    with torch.no_grad():
        for parameter in scaled[-1].parameters():
            parameter.div_(1.001 * 10**tight)
    bound = co.analysis.lipschitz_bound(scaled).log_bound / math.log(10)
    return {
        **outcome,
        "radii": RADII,
        "factors": [[x.kind, x.log_factor / math.log(10)] for x in found.factors if x.log_factor],
        "plain": plain,
        "folded": tight,
        "certified_plain": certified(model, plain, data),
        "certified_folded": certified(model, tight, data),
        "scaled": {
            "plain": bound,
            "test_error": fit.error_of(scaled, data),
            "certified": certified(scaled, bound, data),
        },
    }


def _one_lipschitz(settings, size, seed, data, tick):
    """The same sizes from deel-torchlip: its bound is 1 for pixels in [0, 1] by construction."""
    from deel import torchlip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten(), torchlip.SpectralLinear(784, 128), torchlip.GroupSort2()]
        for _ in range(settings["depth"] - 1):
            layers += [torchlip.SpectralLinear(128, 128), torchlip.GroupSort2()]
        model = torchlip.Sequential(*layers, torchlip.SpectralLinear(128, 10))
    scaled = fit.Split(data.train_x / 255, data.train_y, data.test_x / 255, data.test_y, data.deviation / 255)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    t = settings["temperature"]
    steps = size["epochs"] * (len(data.train_y) // size["batch"])

    def fall(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)

    outcome = fit.train(
        model,
        optimizer,
        scaled,
        epochs=size["epochs"],
        batch=size["batch"],
        seed=seed,
        tick=tick,
        after_step=fall,
        loss_of=lambda model, x, y: nn.functional.cross_entropy(t * model(x), y) / t,
    )
    model.eval()
    linear = [layer for layer in model.vanilla_export() if isinstance(layer, nn.Linear)]
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) for layer in linear]
    bound = math.prod(norms) / 255  # of raw pixel values; sorting is 1-Lipschitz
    with torch.no_grad():
        two = [model(x).topk(2, 1) for x in scaled.test_x.split(1000)]
    values, classes = (torch.cat([getattr(t, key) for t in two]) for key in ("values", "indices"))
    right = classes[:, 0] == data.test_y
    radius = (values[:, 0] - values[:, 1]).double() / (math.sqrt(2) * bound) * right
    shares = [float((radius > r).double().mean()) for r in RADII]
    log = math.log10(bound)
    return {
        **outcome,
        "radii": RADII,
        "plain": log,
        "folded": log,
        "certified_plain": shares,
        "certified_folded": shares,
    }


def plot(figure, results):
    left, middle, right = figure.subplots(1, 3)
    for activation, marker, colour in (("modulus", "o", "C0"), ("relu", "s", "C3")):
        left.plot(*zip(*NUMPY[activation], strict=True), "x", color=colour, label=f"{activation}, numpy, plain")
        for depth, size in DEPTHS.items():
            chosen = [r for rs in results.values() for r in rs if r["settings"]["activation"] == activation]
            chosen = [r for r in chosen if r["settings"]["depth"] == depth]
            for key, fill in (("plain", "full"), ("folded", "none")):
                x, y = [r["test_error"][-1] for r in chosen], [r[key] for r in chosen]
                style = dict(marker=marker, markersize=size, fillstyle=fill, color=colour, linestyle="")
                left.plot(x, y, **style, label=f"{activation}, {key}" if depth == 11 else None)
    left.plot([], [], "o", fillstyle="none", markersize=12, color="grey", label="large, middle: 4, 6 layers, not 11")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xscale="log", xlabel="test error", ylabel="log10 of the bound (raw pixels)", title="bound and accuracy")
    left.set(xlim=(0.015, 0.2), ylim=(-2, 9))
    left.set_xticks([0.02, 0.03, 0.05, 0.1], ["2 %", "3 %", "5 %", "10 %"])
    left.set_xticks([], minor=True)
    for i, decay in enumerate(("0.0001", "0.001", "0.004, rising", "0.008, rising")):
        for activation, line in (("modulus", "-"), ("relu", "--")):
            records = results.get(f"{activation}, decay {decay}")
            if records:
                total = torch.tensor([x for _, x in records[0]["factors"]]).cumsum(0)
                middle.plot(total, line, color=f"C{i}", label=f"{activation}, decay {decay}")
    middle.axhline(0, color="grey", linewidth=0.8)
    middle.set(
        xlabel="layer: linear, norm, linear, ...",
        ylabel="log10 of the product so far",
        title="zig-zag of the bound, 11 layers",
    )
    lasting = [item for item in results.items() if item[1][0]["certified_folded"][2] > 0.05] or list(results.items())
    for i, (name, records) in enumerate(lasting):
        values = [sum(r["certified_folded"][k] for r in records) / len(records) for k in range(len(RADII))]
        clean = 1 - sum(r["test_error"][-1] for r in records) / len(records)
        radii = [0, *(r / 255 for r in records[0].get("radii", EARLIER_RADII))]
        style = dict(marker=".", color=f"C{i % 10}", linestyle=("-", ":", "--")[i // 10])
        right.plot(radii, [clean, *values], **style, label=name)
    right.set(xlabel="radius, l2, pixels in [0, 1]", ylabel="certified share of test images", ylim=(0, 1))
    right.set_title("certified accuracy, where any at 0.1")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.suptitle("Norm bounds on MNIST: 4, 6 and 11 hidden layers of 128 units")


def lines(results):
    text = []
    for name, records in results.items():
        last = runner.spread(r["test_error"][-1] for r in records)
        plain, folded = (runner.spread((r[key] for r in records), "{:.2f}") for key in ("plain", "folded"))
        certified = [f"{x:.1%}" for x in records[0]["certified_folded"]]
        run = f"{name}, {records[0]['size']['train']} images"
        bounds = f"log10 bound {plain}, folded {folded}"
        text.append(
            f"{run}: test error {last}, {bounds}; certified {certified} at {records[0].get('radii', EARLIER_RADII)}"
        )
    return text
