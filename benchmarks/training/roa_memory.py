"""Memory of recurrent networks: copying, adding and permuted sequential MNIST; roaRNN against tanh RNN and LSTM.

Adam at one rate, clipped gradients for the baselines only (norm 1; the additive network does without), the same hidden
size for all.  roaRNN: beta = 2 / T, alpha = 1 - beta, permutation filter; its states are of the size of beta, so the
read-out sees them times ten.  "corrected": the input second moments of its linear layers (input, recurrent, read-out)
correct the gradients before Adam sees them (:class:`consistency_ops.Preconditioner`, damping 0.1 of the mean);
"whitened": its other mode, with its defaults; torch's RNN and LSTM are not made of linear layers and have no such run.
"both sides": what the search "roa-pixels" found (alpha 1, three times the initial input weights, whitening with
``outputs=True``, a rate that rises over the first "warm" of all steps and falls linearly to 0); beta, the factor of the
read-out and the rate were the best of six settings tried for copying, of six for adding, both over 1 000 steps.
A point of the curves is the loss of the training batches since the point before; batches are drawn anew, so it is a
test loss too (copying, adding).  psMNIST: error on test images; --pool 2 averages 2x2 pixels first, which leaves 196
steps of 784.  "roa-pixels" is a search for its settings.

The paper's size, resumable after every epoch:
    python -m benchmarks.training roa-memory --runs "psmnist, roa, corrected" --pool 1 --train 60000 --test 10000
        --pixel-epochs 10 --hidden 128 --out benchmarks/results/training/full
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

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
}
LABELS = {
    "roa": "roaRNN",
    "roa, corrected": "roaRNN, corrected",
    "roa, whitened": "roaRNN, whitened",
    "rnn": "tanh RNN",
    "lstm": "LSTM",
    "roa, both sides": "roaRNN, both sides",
}
BOTH_SIDES = {
    "copying": {"beta_steps": 10.0, "scale": 10.0, "lr": 0.1},
    "adding": {"beta_steps": 2.0, "scale": 1.0, "lr": 0.05},
}
SETTINGS = {
    f"{task}, {name}": {"task": task.split()[0], "steps": steps, **kind}
    | (BOTH_SIDES.get(task.split()[0], {}) if "both sides" in name else {})
    for task, steps in STEPS.items()
    for name, kind in KINDS.items()
}
# The long ones take hours, and only there whitening was tried: ask for them by name.
DEFAULT = [name for name in SETTINGS if "000" not in name and "whitened" not in name and "sides" not in name]
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
FIGSIZE = (12, 4)


class Network(nn.Module):
    def __init__(self, settings: dict, inputs: int, hidden: int, outputs: int, steps: int) -> None:
        super().__init__()
        if settings["kind"] == "roa":
            beta = settings["beta_steps"] / steps
            self.recurrent = ROARNN(inputs, hidden, beta=beta, alpha=settings.get("alpha"))
            with torch.no_grad():
                self.recurrent.input.weight.mul_(settings.get("input", 1.0))
        else:
            self.recurrent = (nn.RNN if settings["kind"] == "rnn" else nn.LSTM)(inputs, hidden)
        self.read = nn.Linear(hidden, outputs)
        self.scale = settings.get("scale", 1.0)

    def forward(self, u, last=True):
        states = self.recurrent(u)[0]
        return self.read(self.scale * (states[-1] if last else states))


def run(settings, size, seed, data, tick):
    task, hidden, length = settings["task"], size["hidden"], settings["steps"]
    steps = length + (2 * tasks.LENGTH if task == "copying" else 0)
    if task == "psmnist":
        steps //= size["pool"] ** 2
    inputs, outputs = {"copying": (10, 10), "adding": (2, 1), "psmnist": (1, 10)}[task]
    model = Network(settings, inputs, hidden, outputs, steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    if "damping" in settings:
        co.Preconditioner(model, optimizer, damping=settings["damping"], scaling="trace")
    elif "mode" in settings:
        co.Preconditioner(model, optimizer, mode=settings["mode"], outputs=settings.get("outputs", False))

    def step(loss, done: float) -> float:
        """Take one step; ``done`` is the part of the training that lies behind it."""
        if "warm" in settings:
            optimizer.param_groups[0]["lr"] = settings["lr"] * (1 - done) * min(1.0, done / settings["warm"])
        optimizer.zero_grad()
        loss.backward()
        if settings["kind"] != "roa":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    if task == "psmnist":
        return _pixels(model, optimizer, step, size, seed, data.standard(), tick)
    generator, losses = torch.Generator().manual_seed(seed), []
    restore(tick.progress.load(), model, optimizer, generator, losses)
    per_point = size["iterations"] // size["epochs"]
    while len(losses) < size["epochs"]:
        total = 0.0
        for i in range(per_point):
            u, target = getattr(tasks, task)(size["batch"], length, generator)
            if task == "copying":
                loss = functional.cross_entropy(model(u, last=False).flatten(0, 1), target.flatten())
            else:
                loss = functional.mse_loss(model(u)[:, 0], target)
            total += step(loss, (len(losses) + i / per_point) / size["epochs"])
        losses.append(total / per_point)
        keep(tick.progress, model, optimizer, generator, losses)
        tick(f"loss {losses[-1]:.4f}")
    return {"loss": losses}


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
        with torch.no_grad():
            guesses = torch.cat([model(test[:, b]).argmax(1) for b in torch.arange(test.shape[1]).split(250)])
        errors.append(float((guesses != data.test_y).double().mean()))
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
    figure.suptitle(f"Memory tasks, Adam with and without the correction; batches of {batches}")


def lines(results):
    text = []
    for name, records in results.items():
        key = "test_error" if "psmnist" in name else "loss"
        text.append(f"{name}: last {key} {runner.spread((r[key][-1] for r in records), '{:.4f}')}")
    return text
