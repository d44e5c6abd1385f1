"""The network, batch and loss that ``python -m consistency_ops analyse`` examines."""

from __future__ import annotations

import importlib
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..analysis.recorder import first_tensor
from ..ops.checks import type_name
from . import data, models
from .errors import UserError


class Subject:
    """A network, called as ``model(*inputs)``, and the loss of its output; ``about`` says where they come from."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], targets: Tensor | None, kind: str) -> None:
        self.model: nn.Module = model
        self.inputs: tuple[Any, ...] = inputs
        self.targets: Tensor | None = targets
        self.kind: str = kind
        self.about: dict[str, str] = {}

    def loss(self, output: Any) -> Tensor:
        logits = first_tensor(output)
        if logits is None:
            raise UserError("the network must return a floating-point tensor, or a tuple or dict that holds one.")
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


def load(args: Namespace) -> Subject:
    """Build or import the network and its batch. Raises :class:`UserError` for mistakes of the user."""
    torch.manual_seed(args.seed)
    subject = _imported(args) if args.import_ else _built_in(args)
    if args.checkpoint is not None:
        _restore(subject.model, args.checkpoint)
        subject.about["weights"] = str(args.checkpoint)
    subject.model.train(args.mode == "train").to(args.device)
    subject.inputs = tuple(x.to(args.device) if isinstance(x, Tensor) else x for x in subject.inputs)
    if subject.targets is not None:
        subject.targets = subject.targets.to(args.device)
    return subject


def _built_in(args: Namespace) -> Subject:
    images = data.load(args.data, args.data_dir or Path("data", args.data))
    count = min(args.samples, len(images.train_x))
    options = {"activation": args.activation, "normalization": args.normalization, "init": args.init}
    model = models.build(args.model, images.shape, images.classes, **options, seed=args.seed)
    choice = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(args.seed))[:count]
    x = data.scaling(images.train_x, "standard")(images.train_x[choice])
    subject = Subject(model, (x,), images.train_y[choice], "cross-entropy")
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
    inputs = rest[0] if rest else _inputs(args)
    targets = rest[1] if len(rest) > 1 else None
    if not rest and isinstance(inputs, tuple) and args.inputs is not None:
        inputs, targets = inputs
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    subject = Subject(model, inputs, targets, args.loss or "cross-entropy")
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
    source = args.import_ if rest else str(args.inputs) if args.inputs is not None else "random"
    subject.about = {
        "imported": args.import_,
        "data": f"{source}, {shapes}",
        "loss": subject.kind + ("" if targets is not None else ", random targets"),
    }
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


def _inputs(args: Namespace) -> Any:
    """Read or draw the inputs as --inputs, --tokens or --input-shape says."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.inputs is not None:
        return _read(args.inputs, "--inputs")
    try:
        if args.tokens is not None:
            vocabulary, length = args.tokens
            return torch.randint(vocabulary, (args.samples, length), generator=generator)
        if args.input_shape is not None:
            return torch.randn(args.samples, *args.input_shape, generator=generator)
    except RuntimeError as error:
        raise UserError(f"--samples: {args.samples} of them do not fit ({str(error).splitlines()[0]}).") from None
    raise UserError(
        "--import: say what the network takes: --input-shape 3,32,32 or --tokens VOCABULARY,LENGTH for random inputs, "
        "--inputs FILE for a saved tensor, or let the callable return (model, inputs)."
    )


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
