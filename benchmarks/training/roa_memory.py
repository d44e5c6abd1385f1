"""Memory of recurrent networks: copying, adding and permuted sequential MNIST; roaRNN against tanh RNN and LSTM.

Adam at one rate, clipped gradients for the baselines only (norm 1; the additive network does without), the same hidden
size for all.  roaRNN: beta = 2 / T, alpha = 1 - beta, permutation filter; its states are of the size of beta, so the
read-out sees them times ten.  "corrected": the input second moments of its linear layers (input, recurrent, read-out)
correct the gradients before Adam sees them (:class:`consistency_ops.Preconditioner`, damping 0.1 of the mean);
"whitened": its other mode, with its defaults; torch's RNN and LSTM are not made of linear layers and have no such run.
"both sides": what the search "roa-pixels" found (alpha 1, three times the initial input weights, whitening with
``outputs=True``, a rate that rises over the first "warm" of all steps and falls linearly to 0); beta, the factor of the
read-out and the rate were the best of six settings tried for copying, of six for adding, both over 1 000 steps.
"scaled": as "both sides", but the read-out sees states of unit size, and the weights of the recurrent layer learn at
100 / T of its rate.  Adding: states of the whole batch are normalised (``nn.BatchNorm1d`` without weights), which also
takes off what all sequences have in common, T times the size of what is to be kept; no filter ("identity"), so that
every unit is a sum over time, and ten times the initial input weights and biases, so that some units ignore what is not
marked.  Copying: states are divided by beta; the biases start so that a blank adds nothing to the states, the read-out
so that it answers "blank" (weights 0, its bias 8).  Found on 1 000 steps, 100 / T on both lengths.
A point of the curves is the loss of the training batches since the point before; batches are drawn anew, so it is a
test loss too (copying, adding).  "test_loss": on ten new batches after the training, in evaluation mode, with
statistics of the normalisation that are taken from ten others just before; "recalled": share of the ten symbols that is
right there.  psMNIST: error on test images; --pool 2 averages 2x2 pixels first, which leaves 196 steps of 784.
"roa-pixels" is a search for its settings.

The paper's size, resumable after every epoch:
    python -m benchmarks.training roa-memory --runs "psmnist, roa, corrected" --pool 1 --train 60000 --test 10000
        --pixel-epochs 10 --hidden 128 --out benchmarks/results/training/full
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

import consistency_ops as co
from benchmarks.training import runner, tasks
from consistency_ops.nn import ROARNN

TITLE = "roaRNN against tanh RNN and LSTM: copying, adding, permuted sequential MNIST"
DATA = "mnist"
STEPS = {"copying": 50, "adding": 50, "psmnist": 784} | {
    f"{task} {steps}": steps for task in ("copying", "adding") for steps in (1_000, 10_000)
}
KINDS = {
    "roa": {"kind": "roa", "beta_steps": 2.0, "scale": 10.0, "lr": 3e-3},
    "roa, corrected": {"kind": "roa", "beta_steps": 2.0, "scale": 10.0, "lr": 3e-3, "damping": 0.1},
    "roa, whitened": {"kind": "roa", "beta_steps": 2.0, "scale": 10.0, "lr": 3e-3, "mode": "whiten"},
    "rnn": {"kind": "rnn", "lr": 1e-3},
    "lstm": {"kind": "lstm", "lr": 3e-3},
    "roa, both sides": {
        "kind": "roa",
        "alpha": 1.0,
        "beta_steps": 8.0,
        "input": 3.0,
        "scale": 5.0,
        "lr": 2e-2,
        "mode": "whiten",
        "outputs": True,
        "warm": 0.02,
    },
    "roa, scaled": {
        "kind": "roa",
        "alpha": 1.0,
        "beta_steps": 2.0,
        "lr": 5e-2,
        "mode": "whiten",
        "outputs": True,
        "warm": 0.05,
        "norm": "batch",
        "slow": 100.0,
    },
}
LABELS = {
    "roa": "roaRNN",
    "roa, corrected": "roaRNN, corrected",
    "roa, whitened": "roaRNN, whitened",
    "rnn": "tanh RNN",
    "lstm": "LSTM",
    "roa, both sides": "roaRNN, both sides",
    "roa, scaled": "roaRNN, scaled",
}
OF_TASK = {
    ("copying", "roa, both sides"): {"beta_steps": 10.0, "scale": 10.0, "lr": 0.1},
    ("adding", "roa, both sides"): {"beta_steps": 2.0, "scale": 1.0, "lr": 0.05},
    ("copying", "roa, scaled"): {"beta_steps": 10.0, "lr": 0.1, "norm": "beta", "start": "blank"},
    ("adding", "roa, scaled"): {"filter": "identity", "input": 10.0, "bias": 10.0},
}
SETTINGS = {
    f"{task}, {name}": {"task": task.split()[0], "steps": steps, **kind} | OF_TASK.get((task.split()[0], name), {})
    for task, steps in STEPS.items()
    for name, kind in KINDS.items()
}
# The long ones take hours, and only there whitening was tried: ask for them by name.
DEFAULT = [n for n in SETTINGS if not any(part in n for part in ("000", "whitened", "both sides", "scaled"))]
SIZE = {
    "epochs": 20,
    "iterations": 1_500,
    "hidden": 128,
    "batch": 50,
    "train": 5_000,
    "test": 2_000,
    "pixel_epochs": 3,
    "pool": 2,
}
TEST_SEED, TEST_BATCHES = 1_000_000, 10
FIGSIZE = (12, 4)


def state_norm(hidden: int) -> nn.BatchNorm1d:
    # Variances of states are of the size of beta squared, far below the eps that is usual.
    return nn.BatchNorm1d(hidden, eps=1e-14, affine=False)


class Network(nn.Module):
    def __init__(self, settings: dict, inputs: int, hidden: int, outputs: int, steps: int) -> None:
        super().__init__()
        if settings["kind"] == "roa":
            beta = settings["beta_steps"] / steps
            filter = settings.get("filter", "permutation")
            self.recurrent = ROARNN(inputs, hidden, beta=beta, alpha=settings.get("alpha"), filter=filter)
            with torch.no_grad():
                self.recurrent.input.weight.mul_(settings.get("input", 1.0))
                self.recurrent.input.bias.mul_(settings.get("bias", 1.0))
        else:
            self.recurrent = (nn.RNN if settings["kind"] == "rnn" else nn.LSTM)(inputs, hidden)
        self.read = nn.Linear(hidden, outputs)
        norm = settings.get("norm")
        self.scale = 1 / beta if norm == "beta" else settings.get("scale", 1.0)
        self.norm = state_norm(hidden) if norm == "batch" else nn.Identity()
        if settings.get("start") == "blank":
            with torch.no_grad():
                self.recurrent.input.bias.copy_(-self.recurrent.input.weight[:, tasks.BLANK])
                self.read.weight.zero_()
                self.read.bias.zero_()
                self.read.bias[tasks.BLANK] = 8.0

    def forward(self, u, last=True):
        states = self.recurrent(u)[0]
        states = states[-1] if last else states.flatten(0, 1)
        return self.read(self.scale * self.norm(states))


def run(settings, size, seed, data, tick):
    task, hidden, length = settings["task"], size["hidden"], settings["steps"]
    steps = length + (2 * tasks.LENGTH if task == "copying" else 0)
    if task == "psmnist":
        steps //= size["pool"] ** 2
    inputs, outputs = {"copying": (10, 10), "adding": (2, 1), "psmnist": (1, 10)}[task]
    model = Network(settings, inputs, hidden, outputs, steps)
    slow = min(1.0, settings.get("slow", steps) / steps)
    groups = [
        {"params": model.recurrent.parameters(), "share": slow},
        {"params": model.read.parameters(), "share": 1.0},
    ]
    optimizer = torch.optim.Adam(groups)

    def set_rate(factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * group["share"] * factor

    set_rate(1.0)
    if "damping" in settings:
        co.Preconditioner(model, optimizer, damping=settings["damping"], scaling="trace")
    elif "mode" in settings:
        co.Preconditioner(model, optimizer, mode=settings["mode"], outputs=settings.get("outputs", False))

    def step(loss, done: float) -> float:
        """Take one step; ``done`` is the part of the training that lies behind it."""
        if "warm" in settings:
            set_rate((1 - done) * min(1.0, done / settings["warm"]))
        optimizer.zero_grad()
        loss.backward()
        if settings["kind"] != "roa":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    if task == "psmnist":
        return _pixels(model, optimizer, step, size, seed, data.standard(), tick)

    draw = partial(getattr(tasks, task), size["batch"], length)
    generator, losses = torch.Generator().manual_seed(seed), []
    restore(tick.progress.load(), model, optimizer, generator, losses)
    per_point = size["iterations"] // size["epochs"]
    while len(losses) < size["epochs"]:
        total = 0.0
        for i in range(per_point):
            loss, _ = loss_of(model, task, *draw(generator))
            total += step(loss, (len(losses) + i / per_point) / size["epochs"])
        losses.append(total / per_point)
        keep(tick.progress, model, optimizer, generator, losses)
        tick(f"loss {losses[-1]:.4f}")
    return {"loss": losses, **test(model, task, draw, torch.Generator().manual_seed(TEST_SEED + seed))}


def loss_of(model: Network, task: str, u: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of copying or adding, and the network's outputs."""
    outputs = model(u, last=task == "adding")
    if task == "copying":
        return functional.cross_entropy(outputs, target.flatten()), outputs
    return functional.mse_loss(outputs[:, 0], target), outputs


@torch.no_grad()
def test(model: Network, task: str, draw, generator: torch.Generator) -> dict[str, float]:
    """Return the mean loss on new sequences, and for copying the share of the ten symbols that is right."""
    # The running mean lags by some steps, in which the states move by T times the change of a weight.
    update_bn((draw(generator)[0] for _ in range(TEST_BATCHES)), model)
    model.eval()
    sums = {"test_loss": 0.0} | ({"recalled": 0.0} if task == "copying" else {})
    for _ in range(TEST_BATCHES):
        u, target = draw(generator)
        loss, outputs = loss_of(model, task, u, target)
        sums["test_loss"] += float(loss)
        if task == "copying":
            symbols = target[-tasks.LENGTH :].flatten()
            sums["recalled"] += float((outputs[-len(symbols) :].argmax(1) == symbols).double().mean())
    return {key: value / TEST_BATCHES for key, value in sums.items()}


@torch.no_grad()
def image_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (T, N, 1) that the model, in evaluation mode, gives another label."""
    model.eval()
    guesses = torch.cat([model(images[:, b]).argmax(1) for b in torch.arange(images.shape[1]).split(250)])
    model.train()
    return float((guesses != labels).double().mean())


def keep(progress, model, optimizer, generator, *curves) -> None:
    trained = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    progress.save(**trained, curves=curves)


def restore(saved: dict | None, model, optimizer, generator, *curves) -> None:
    if saved is None:
        return
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    for curve, values in zip(curves, saved["curves"], strict=True):
        curve[:] = values


def _pixels(model, optimizer, step, size, seed, data, tick):
    train, test = (tasks.permuted_pixels(functional.avg_pool2d(x, size["pool"])) for x in (data.train_x, data.test_x))
    shuffle, errors, losses = torch.Generator().manual_seed(seed), [], []
    restore(tick.progress.load(), model, optimizer, shuffle, losses, errors)
    while len(errors) < size["pixel_epochs"]:
        batches = torch.randperm(len(data.train_y), generator=shuffle).split(size["batch"])
        total = 0.0
        for i, b in enumerate(batches):
            loss = functional.cross_entropy(model(train[:, b]), data.train_y[b])
            total += step(loss, (len(losses) + i / len(batches)) / size["pixel_epochs"])
        losses.append(total / len(batches))
        errors.append(image_error(model, test, data.test_y))
        keep(tick.progress, model, optimizer, shuffle, losses, errors)
        tick(f"loss {losses[-1]:.3f}, test error {errors[-1]:.2%}")
    return {"loss": losses, "test_error": errors}


def plot(figure, results):
    baselines = {task: tasks.copying_baseline(steps) for task, steps in STEPS.items() if "copying" in task}
    baselines |= {task: tasks.ADDING_BASELINE for task in STEPS if "adding" in task} | {"psmnist": 0.9}
    of_task = {task: [r for name in KINDS for r in results.get(f"{task}, {name}", [])] for task in STEPS}
    tasks_run = [task for task in STEPS if of_task[task]]
    # A run of one point has no curve, and no panel if there are others.
    tasks_run = [task for task in tasks_run if max(len(r["loss"]) for r in of_task[task]) > 1] or tasks_run
    for axis, task in zip(figure.subplots(1, len(tasks_run), squeeze=False)[0], tasks_run, strict=True):
        key = "test_error" if task == "psmnist" else "loss"
        size = {}
        for i, name in enumerate(KINDS):
            records = results.get(f"{task}, {name}", [])
            if records:
                size = records[0]["size"]
                values = runner.mean(records, key)
                unit = 1 if task == "psmnist" else size["iterations"] // len(values)
                axis.plot(
                    [unit * (k + 1) for k in range(len(values))], values, color=f"C{i}", marker=".", label=LABELS[name]
                )
        axis.axhline(baselines[task], color="grey", linewidth=0.8, label="without memory")
        steps = STEPS[task] // (size.get("pool", 1) ** 2 if task == "psmnist" else 1)
        kind = task.split()[0]
        title = f"{kind}, {steps} {'blanks' if kind == 'copying' else 'steps'},\n{size.get('hidden')} units"
        axis.set(xlabel="epoch" if task == "psmnist" else "iteration", title=title)
        axis.set(ylabel={"copying": "cross-entropy", "adding": "mean square error", "psmnist": "test error"}[kind])
        if kind == "copying":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1 if task == "psmnist" else 2.5 * baselines[task])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize="small")
    batches = ", ".join(sorted({str(records[0]["size"]["batch"]) for records in results.values()}))
    figure.suptitle(f"Memory tasks, Adam with and without the correction or whitening; batches of {batches}")


def lines(results):
    text = []
    for name, records in results.items():
        key = "test_error" if "psmnist" in name else "loss"
        line = f"{name}: last {key} {runner.spread((r[key][-1] for r in records), '{:.4f}')}"
        if "test_loss" in records[0]:
            line += f", on new sequences {runner.spread((r['test_loss'] for r in records), '{:.2g}')}"
        if "recalled" in records[0]:
            line += f", {runner.spread(r['recalled'] for r in records)} of the symbols right"
        text.append(line)
    return text
