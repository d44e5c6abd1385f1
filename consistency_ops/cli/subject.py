"""The network, batch and loss that ``python -m consistency_ops analyse`` examines."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ..analysis.recorder import first_tensor
from ..ops.checks import type_name
from . import data, inputs, models
from .errors import UserError


class Subject:
    """A network, called as ``model(*inputs, **keywords)``, and the loss of its output.

    ``about`` says where they come from.
    """

    def __init__(
        self,
        model: nn.Module,
        given: tuple[Any, ...],
        keywords: dict[str, Any],
        targets: Tensor | None,
        kind: str | None,
    ) -> None:
        self.model: nn.Module = model
        self.inputs: tuple[Any, ...] = given
        self.keywords: dict[str, Any] = keywords
        self.targets: Tensor | None = targets
        self.kind: str | None = kind
        self.random: bool = False  # whether the inputs are random numbers that were drawn here
        self.of_user: bool = False  # the inputs came with the network, and not from options
        self.about: dict[str, str] = {}

    @property
    def samples(self) -> int:
        return next((len(x) for x in tree_leaves((self.inputs, self.keywords)) if isinstance(x, Tensor) and x.dim()), 1)

    def keep(self, count: int) -> None:
        """Leave the first ``count`` samples."""
        batch = self.samples

        def first(x: Any) -> Any:
            return x[:count] if isinstance(x, Tensor) and x.dim() and len(x) == batch else x

        self.inputs, self.keywords, self.targets = tree_map(first, (self.inputs, self.keywords, self.targets))

    def to(self, device: torch.device) -> None:
        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        self.model.to(device)
        self.inputs, self.keywords, self.targets = tree_map(moved, (self.inputs, self.keywords, self.targets))

    def loss(self, output: Any) -> Tensor:
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if self.targets is None and self.kind is None and isinstance(own, Tensor) and own.numel() == 1:
            self.about["loss"] = "the network's own"
            return own
        name, logits = _logits(output)
        if logits is None:
            raise UserError("the network must return a floating-point tensor, or a tuple or dict that holds one.")
        if self.kind is None:  # features are no logits
            self.kind = "mse" if name not in ("", "logits") or logits.dim() < 2 else "cross-entropy"
            named = f" of {name}" if name else ""
            self.about["loss"] = self.kind + named + ("" if self.targets is not None else ", random targets")
        if self.targets is None:
            self.targets = self._random_targets(logits)
        if self.kind == "mse":
            if self.targets.shape != logits.shape:
                raise UserError(f"targets have shape {tuple(self.targets.shape)}, outputs {tuple(logits.shape)}.")
            return F.mse_loss(logits, self.targets.to(logits))
        classes = 1 if logits.dim() == 4 else -1
        if self.targets.shape != logits.movedim(classes, -1).shape[:-1]:
            raise UserError(
                f"cross-entropy needs targets of shape {tuple(logits.movedim(classes, -1).shape[:-1])} for outputs "
                f"{tuple(logits.shape)}, got {tuple(self.targets.shape)}; choose --loss mse for real targets."
            )
        return F.cross_entropy(logits.movedim(classes, -1).flatten(0, -2), self.targets.flatten())

    def _random_targets(self, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.kind == "mse":
            return torch.randn(logits.shape, generator=generator).to(logits.device)
        classes = 1 if logits.dim() == 4 else -1
        if logits.dim() < 2 or logits.shape[classes] < 2:
            raise UserError(f"cross-entropy needs outputs (N, classes), got {tuple(logits.shape)}; choose --loss mse.")
        shape = logits.movedim(classes, -1).shape[:-1]
        return torch.randint(logits.shape[classes], shape, generator=generator).to(logits.device)


def _logits(output: Any) -> tuple[str, Tensor | None]:
    """The name and the tensor of the output that the loss is computed of: ``logits`` if there are, else the first."""
    if isinstance(output, Mapping):
        named = [(str(name), first_tensor(value)) for name, value in output.items() if name != "loss"]
        named.sort(key=lambda pair: pair[0] != "logits")
        return next((pair for pair in named if pair[1] is not None), ("", None))
    return "", first_tensor(output)


def load(args: Namespace) -> Subject:
    """Build or import the network and its batch. Raises :class:`UserError` for mistakes of the user."""
    torch.manual_seed(args.seed)
    subject = _imported(args) if args.import_ else _built_in(args)
    if args.checkpoint is not None:
        _restore(subject.model, args.checkpoint)
        subject.about["weights"] = str(args.checkpoint)
    subject.model.train(args.mode == "train")
    subject.to(args.device)
    return subject


def _built_in(args: Namespace) -> Subject:
    images = data.load(args.data, args.data_dir or Path("data", args.data))
    count = min(args.samples, len(images.train_x))
    options = {"activation": args.activation, "normalization": args.normalization, "init": args.init}
    model = models.build(args.model, images.shape, images.classes, **options, seed=args.seed)
    choice = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(args.seed))[:count]
    x = data.scaling(images.train_x, "standard")(images.train_x[choice])
    subject = Subject(model, (x,), {}, images.train_y[choice], "cross-entropy")
    subject.about = {
        "built": f"{args.model}, {args.activation}, normalization {args.normalization}, init {args.init}",
        "data": f"{images.name}, {count} training images, standardised",
    }
    return subject


def _imported(args: Namespace) -> Subject:
    made = _call(args.import_)
    model, *rest = made if isinstance(made, tuple) and made else (made,)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"--import: {args.import_} must return a torch.nn.Module, or (module, inputs[, targets]), "
            f"got {type_name(model)}."
        )
    targets = rest[1] if len(rest) > 1 else None
    if rest:
        given, keywords = inputs.arguments(rest[0], model)
    elif args.inputs is not None:
        given, keywords, targets = inputs.of_file(_read(args.inputs, "--inputs"), model)
    else:
        given, keywords = inputs.drawn(args, model)
    subject = Subject(model, given, keywords, targets, args.loss)
    subject.random, subject.of_user = not rest and args.inputs is None, bool(rest)
    source = args.import_ if rest else str(args.inputs) if args.inputs is not None else "random"
    subject.about = {"imported": args.import_, "data": f"{source}, {inputs.described(given, keywords)}"}
    if args.loss is not None or targets is not None:
        subject.about["loss"] = (args.loss or "cross-entropy") + ("" if targets is not None else ", random targets")
    return subject


def _call(path: str) -> Any:
    name, colon, attribute = path.partition(":")
    if not colon or not name or not attribute:
        raise UserError(f"--import: must be package.module:callable, got {path!r}.")
    sys.path.insert(0, os.getcwd())  # python -m does the same
    try:
        module = importlib.import_module(name)
        maker: Any = module
        for part in attribute.split("."):
            maker = getattr(maker, part)
        return maker if isinstance(maker, nn.Module) else maker()
    except ImportError as error:
        raise UserError(f"--import: {name} cannot be imported ({error}).") from None
    except AttributeError as error:
        raise UserError(f"--import: {path}: {error}.") from None
    except TypeError as error:
        raise UserError(f"--import: {path} must be callable without arguments ({error}).") from None
    finally:
        sys.path.remove(os.getcwd())


def _read(path: Path, option: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{option}: {path}: cannot be read ({error.strerror or error}).") from None
    except Exception:  # torch.load raises KeyError for a text file, and other errors for other files
        sentence = f"{option}: {path}: is no file of tensors that torch.save made; whole models are not read."
        raise UserError(sentence) from None


def _restore(model: nn.Module, path: Path) -> None:
    state = _read(path, "--checkpoint")
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise UserError(f"--checkpoint: {path}: must hold a state_dict, got {type_name(state)}.")
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"--checkpoint: {path}: does not fit the network: {' '.join(lines)[:300]}") from None
