"""The optimizers that are compared: how each is built, and its trials, the same number for all.

Trials are judged on held-out training examples.  A builder returns ``step(x, y, loss) -> float``, which does zero_grad,
forward, backward and update.  Peers are imported when they are used; those that are missing are listed and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import consistency_ops as co
from benchmarks.peers import ideas
from benchmarks.peers.references import Foof, Isaac

Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Loss], float]
MOMENTUM = 0.9
EVERY, WARM_UP = 10, 20  # steps between two inverses of K-FAC; steps at the start with a new one each
NEW = 0.05  # weight of the newest factors in K-FAC's average


@dataclass(frozen=True)
class Peer:
    """An optimizer. Each of ``trials`` is passed to ``build(model, loss_type, **setting)``."""

    text: str
    package: str  # distribution that must be installed; torch's own: "torch"
    order: int  # 1: gradients only, 2: with curvature, 3: this package's
    trials: list[dict[str, float]]
    build: Callable[..., Step]
    damped: bool = False  # the best of the trials is then tried with each of DAMPINGS

    @property
    def version(self) -> str | None:
        """Version of the package; None if it is not installed."""
        name = "torch" if self.package == "reference" else self.package
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None


def stepper(model: nn.Module, *actions: Callable[[], object]) -> Step:
    """Return the ordinary step, with ``actions`` called after the backward pass."""

    def step(x: Tensor, y: Tensor, loss: Loss) -> float:
        model.zero_grad(set_to_none=False)  # heavyball and the flat views of Muon keep addresses
        value = loss(model(x), y)
        value.backward()
        for action in actions:
            action()
        return float(value.detach())

    return step


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


class MatrixMuon(torch.optim.Optimizer):
    """torch.optim.Muon for weights of any number of dimensions: convolutions through flat views of their weights.

    ``match_rms_adamw`` is torch's own rule that makes one rate fit Muon and AdamW.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})
        self._views = [(p, nn.Parameter(p.detach().flatten(1)) if p.dim() > 2 else p) for p in parameters]
        flat = [view for _, view in self._views]
        self._muon = torch.optim.Muon(flat, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for parameter, view in self._views:
            if view is not parameter:
                view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        self._muon.step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "muon"})


class FlatMuon:
    """Muon on every weight matrix and convolution; AdamW at the same rate on the rest.

    Embeddings get AdamW, as Muon's authors advise.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in model.parameters() if p.dim() > 1 and id(p) not in tables]
        rest = [p for p in model.parameters() if p.dim() < 2 or id(p) in tables]
        self.parts: list[torch.optim.Optimizer] = [MatrixMuon(matrices, lr)]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr))

    def step(self) -> None:
        for part in self.parts:
            part.step()


BASES = {"sgd": sgd, "adam": adam, "adamw": adamw, "muon": FlatMuon}


def set_betas(parts: Sequence[torch.optim.Optimizer], betas: Sequence[float] | None) -> None:
    """Give Adam's betas to the param groups that have such; ``None`` leaves them."""
    for group in (group for part in parts for group in part.param_groups if betas and "betas" in group):
        group["betas"] = tuple(betas)


def plain(base: str) -> Callable[..., Step]:
    def build(model: nn.Module, loss_type: str, lr: float, betas: Sequence[float] | None = None) -> Step:
        optimizer = BASES[base](model, lr)
        set_betas(getattr(optimizer, "parts", [optimizer]), betas)
        step = stepper(model, optimizer.step)
        step.keep = [optimizer]
        return step

    return build


def corrected(base: str) -> Callable[..., Step]:
    """Return a builder of ``base`` with the correction in front; settings other than ``options`` are the defaults."""

    def build(model: nn.Module, loss_type: str, lr: float, **options: object) -> Step:
        if "momentum_first" in options:
            optimizer: object = torch.optim.SGD(model.parameters(), lr=lr)
        else:
            optimizer = BASES[base](model, lr)
        correct, parts = ideas.actions(model, **options)
        step = stepper(model, *correct, optimizer.step)
        step.keep = [optimizer, parts]
        return step

    return build


def whitened(base: str) -> Callable[..., Step]:
    """Return a builder of ``base``, AdamW with other ``betas``, in whitened coordinates.

    New factors in every step unless ``options`` say: so the first stored runs were made.
    """

    def build(
        model: nn.Module, loss_type: str, lr: float, betas: Sequence[float] | None = None, **options: object
    ) -> Step:
        optimizer = BASES[base](model, lr)
        parts = getattr(optimizer, "parts", [optimizer])
        set_betas(parts, betas)
        pre = co.Preconditioner(model, parts, mode="whiten", **{"every": 1, **options})
        step = stepper(model, *(part.step for part in parts))
        step.keep = [*parts, pre]
        return step

    return build


def reference(kind: type) -> Callable[..., Step]:
    def build(model: nn.Module, loss_type: str, lr: float, damping: float, **more: int) -> Step:
        correction, optimizer = kind(model, damping, **more), sgd(model, lr)
        step = stepper(model, correction.step, optimizer.step)
        step.keep = [optimizer, correction]
        return step

    return build


def heavyball(name: str, **options: object) -> Callable[..., Step]:
    """Return a builder of an optimizer of heavyball, without torch.compile, which would take minutes per run."""

    def build(model: nn.Module, loss_type: str, lr: float) -> Step:
        import heavyball as package

        package.utils.compile_mode = None
        optimizer = getattr(package, name)(model.parameters(), lr=lr, weight_decay=0.0, **options)
        step = stepper(model, optimizer.step)
        step.keep = [optimizer]
        return step

    return build


def shampoo(model: nn.Module, loss_type: str, lr: float) -> Step:
    from pytorch_optimizer import ScalableShampoo

    optimizer = ScalableShampoo(
        model.parameters(), lr=lr, start_preconditioning_step=5, preconditioning_compute_steps=10
    )
    step = stepper(model, optimizer.step)
    step.keep = [optimizer]
    return step


def kfac(model: nn.Module, loss_type: str, lr: float, damping: float, warm_up: int = WARM_UP) -> Step:
    """Build K-FAC: averaged factors, one Monte Carlo sample per step, inverses every 10 steps (at first every step)."""
    from asdl import KfacGradientMaker, PreconditioningConfig

    if not torch.cuda.is_available():  # it marks ranges for NVIDIA's profiler, which raises in a CPU build of torch
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    optimizer = sgd(model, lr)

    def flat_model(x: Tensor) -> Tensor:
        return model(x).flatten(0, -2)  # K-FAC's rows: examples, or the positions of a text

    def start(rows: int) -> KfacGradientMaker:
        config = PreconditioningConfig(
            damping=damping,
            ema_decay=NEW,
            preconditioner_upd_interval=EVERY,
            preconditioner_warmup_steps=warm_up,
            curvature_upd_interval=1,
            data_size=rows,
            ignore_modules=[nn.Embedding],  # not supported
        )
        return KfacGradientMaker(model, config, fisher_type="fisher_mc", loss_type=loss_type)

    def step(x: Tensor, y: Tensor, loss: Loss) -> float:
        rows = y.numel() if loss_type == "cross_entropy" else len(y)

        def summed(output: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
            return loss(output, y) * rows  # asdfghjkl divides by the rows

        first = not step.keep[1:]
        if first:
            step.keep.append(start(rows))
        maker = step.keep[1]
        maker.scale = 1 / NEW if first else 1.0  # the average starts from its first value, not from 0
        optimizer.zero_grad()
        output = maker.setup_model_call(flat_model, x)
        maker.setup_logits_repr(output)
        maker.setup_loss_call(summed, output, y)
        _, value = maker.forward_and_backward()
        optimizer.step()
        return float(value.detach())

    step.keep = [optimizer]
    return step


def singd(model: nn.Module, loss_type: str, lr: float, damping: float) -> Step:
    """Build SINGD; embeddings and norms, which it does not cover, get SGD."""
    from singd.optim.optimizer import SINGD

    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    covered = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in covered]
    text = any(isinstance(module, nn.Embedding) for module in model.modules())
    average = "batch+sequence" if text else "batch"
    parts: list = [SINGD(model, lr=lr, damping=damping, T=EVERY, loss_average=average, warn_unsupported=False)]
    if rest:
        parts.append(torch.optim.SGD(rest, lr=lr, momentum=MOMENTUM))
    step = stepper(model, *(part.step for part in parts))
    step.keep = parts
    return step


def rates(*values: float) -> list[dict[str, float]]:
    return [{"lr": value} for value in values]


GRADIENT = rates(1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
ADAPTIVE = rates(0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003)
# Six rates at damping 0.1 (our default), then the best of them at the two other dampings.
DAMPED = [{**setting, "damping": 0.1} for setting in GRADIENT[1:-1]]
DAMPINGS = (1.0, 0.01)

PEERS = {
    "sgd": Peer("torch SGD, momentum 0.9", "torch", 1, GRADIENT, plain("sgd")),
    "adam": Peer("torch Adam", "torch", 1, ADAPTIVE, plain("adam")),
    "adamw": Peer("torch AdamW", "torch", 1, ADAPTIVE, plain("adamw")),
    "muon": Peer("torch Muon, AdamW for the rest", "torch", 1, ADAPTIVE, plain("muon")),
    "sgd+pre": Peer("SGD, preconditioned", "torch", 3, GRADIENT[1:-1], corrected("sgd"), True),
    "adamw+pre": Peer("AdamW, preconditioned", "torch", 3, ADAPTIVE[1:-1], corrected("adamw"), True),
    "muon+pre": Peer("Muon, preconditioned", "torch", 3, ADAPTIVE[1:-1], corrected("muon"), True),
    "soap": Peer("heavyball SOAP, every 10", "heavyball", 2, ADAPTIVE, heavyball("SOAP", precondition_frequency=10)),
    "shampoo": Peer(
        "pytorch_optimizer ScalableShampoo, SGD graft, inverses every 10", "pytorch-optimizer", 2, GRADIENT, shampoo
    ),
    "kl-shampoo": Peer(
        "heavyball KLShampoo, every 10", "heavyball", 2, ADAPTIVE, heavyball("KLShampoo", precondition_frequency=10)
    ),
    "psgd": Peer("heavyball PSGDKron", "heavyball", 2, ADAPTIVE, heavyball("PSGDKron")),
    "kfac": Peer("asdfghjkl K-FAC, inverses every 10", "asdfghjkl", 2, DAMPED, kfac, True),
    "singd": Peer("SINGD, dense: inverse-free K-FAC, every 10", "singd", 2, DAMPED, singd, True),
    "foof": Peer("FOOF, our reference, inverses every 10", "reference", 2, DAMPED, reference(Foof), True),
    "isaac": Peer("ISAAC, our reference", "reference", 2, DAMPED, reference(Isaac), True),
}
MISSING = {
    "kfac-pytorch": "not in the package index",
    "emerging-optimizers": "needs Python 3.12, this is 3.11",
}
