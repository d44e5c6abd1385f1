"""A small network, its data and its training steps, for the tests of the preconditioner."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

DAMPING = 0.3


def dense(gradient, bias, rows, groups=1, scaling="absolute", joint=True):
    """(gradient, bias) corrected without chunks; ``gradient`` is (out, in / groups, taps), ``rows`` (n, in)."""
    gradient, rows = gradient.double(), rows.double()
    out, bias_out = torch.empty_like(gradient), None if bias is None else bias.double().clone()
    for g in range(groups):
        o = slice(g * len(gradient) // groups, (g + 1) * len(gradient) // groups)
        x = rows[:, g * gradient.shape[1] : (g + 1) * gradient.shape[1]]
        matrix = gradient[o].transpose(1, 2).flatten(0, 1)  # every tap and output is a row
        taps = gradient.shape[2]
        if bias is not None and joint:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            matrix = torch.cat([matrix, bias[o].double().repeat_interleave(taps)[:, None]], 1)
        a = x.T @ x / len(x)
        if scaling == "trace":
            a = a / (a.trace() / len(a))
        solved = torch.linalg.solve(a + DAMPING * torch.eye(len(a), dtype=a.dtype), matrix.T).T
        if bias is not None and joint:
            bias_out[o] = solved[:, -1].view(-1, taps).mean(1)
            solved = solved[:, :-1]
        out[o] = solved.view(-1, taps, gradient.shape[1]).transpose(1, 2)
    return out, bias_out


def mlp(seed=0, widths=(12, 20, 16, 5)):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(n=40, seed=1, units=12, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, units, generator=generator), torch.randint(classes, (n,), generator=generator)


def backward(model, x, y, scale=1.0):
    loss = F.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        losses.append(backward(model, *data(seed=step)).item())
        optimizer.step()
    return losses


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def corrected_layers(model, pre):
    """Names of parameters whose gradient was changed by a step."""
    backward(model, *data())
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    pre.step()
    return {name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p.grad)}


def scaled_step(model, optimizer, scaler, x, y, poison=False):
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    if poison:
        model[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()


def hooks_of(model, optimizer):
    module_hooks = [len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    weight_hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    names = ("step_pre", "step_post", "load_state_dict_pre", "load_state_dict_post")
    return module_hooks, weight_hooks, [len(getattr(optimizer, f"_optimizer_{name}_hooks")) for name in names]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=3e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=3e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=3e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}
