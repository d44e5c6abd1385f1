"""What a network is called with: tensors in order or by name, given, read or drawn, and how many samples of them."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ..analysis.propagation import frozen
from ..analysis.recorder import unrecorded
from .errors import UserError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# What one second of a time limit allows for a forward pass of the whole batch; the examination makes about eight of
# them. Two cores do some 40 GFLOP a second; many small operations are bound by the numbers that they write.
_FLOPS, _NUMBERS = 1.5e9, 1.5e7
_TARGET_LENGTH = 64  # tokens of the decoder, where only the inputs of the encoder are given


def arguments(value: Any, model: nn.Module) -> Arguments:
    """The call that a value stands for: a tensor, a tuple of arguments, or a dictionary.

    A dictionary is called by its names where ``forward`` takes them all, as Hugging Face's models do; else it is one
    argument.
    """
    if isinstance(value, Mapping):
        return ((), dict(value)) if takes(model, list(value)) else ((value,), {})
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict):
        return value[0], value[1]
    return (tuple(value) if isinstance(value, tuple | list) else (value,)), {}


def takes(model: nn.Module, names: list[Any]) -> bool:
    """Whether ``forward`` has parameters of all these names, or takes any."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # **kwargs alone are no promise: one name at least must be known, or all be words.
    return all(isinstance(name, str) for name in names) and (
        set(names) <= known or (anything and bool(known & set(names)))
    )


def of_file(value: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """The call and the targets that a file of ``torch.save`` holds: inputs, or (inputs, targets)."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return *arguments(value[0], model), value[1]
    return *arguments(value, model), None


def described(given: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    """The shapes of what the network is called with."""
    parts = [_shape(value) for value in given]
    parts += [f"{name} {_shape(value)}" for name, value in keywords.items()]
    return ", ".join(part for part in parts if part)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} {_shape(v)}" for name, v in value.items()) + "}"
    return str(value) if value is None or isinstance(value, bool | int | float | str) else ""


# ---- random ones


def drawn(args: Namespace, model: nn.Module) -> Arguments:
    """Random inputs as --input, --tokens or --input-shape say, or as the network itself does."""
    generator = torch.Generator().manual_seed(args.seed)
    named = {name: _random(kind, sizes, args.samples, generator) for name, kind, sizes in args.input or ()}
    given: tuple[Any, ...] = ()
    if args.tokens is not None:
        given = (_random("tokens", args.tokens, args.samples, generator),)
    elif args.input_shape is not None:
        given = (_random("normal", args.input_shape, args.samples, generator),)
    elif not named:
        suggested = _suggested(model)
        if suggested is None:
            raise UserError(
                "--import: say what the network takes: --input-shape 3,32,32 or --tokens VOCABULARY,LENGTH for random "
                "inputs, --input NAME=3,32,32 or NAME=tokens:VOCABULARY,LENGTH for inputs by name, --inputs FILE for a "
                "saved tensor or dictionary, or let the callable return (model, inputs)."
            )
        given = (_random(*suggested, args.samples, generator),)
    return given, _completed(model, named, args.samples, generator)


def _random(kind: str, sizes: list[int], samples: int, generator: torch.Generator) -> Tensor:
    try:
        if kind == "tokens":
            return torch.randint(sizes[0], (samples, *sizes[1:]), generator=generator)
        return torch.randn(samples, *sizes, generator=generator)
    except RuntimeError as error:
        raise UserError(f"--samples: {samples} of them do not fit ({str(error).splitlines()[0]}).") from None


def _suggested(model: nn.Module) -> tuple[str, list[int]] | None:
    """What timm's and Hugging Face's models say of their inputs."""
    pretrained = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(pretrained, Mapping) and pretrained.get("input_size"):
        return "normal", list(pretrained["input_size"])
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)

    def number(key: str) -> int | None:
        value = getattr(config, key, None)
        return value if isinstance(value, int) else None

    vocabulary, image, mels = number("vocab_size"), number("image_size"), number("num_mel_bins")
    if name == "input_ids" and vocabulary is not None:
        return "tokens", [vocabulary, min(128, number("max_position_embeddings") or 128)]
    if name == "pixel_values" and image is not None:
        return "normal", [number("num_channels") or 3, image, image]
    if name == "input_features" and mels is not None:
        return "normal", [mels, 2 * (number("max_source_positions") or 1500)]
    return None


def _completed(model: nn.Module, named: dict[str, Any], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """With random tokens for the decoder of an encoder-decoder model of Hugging Face, where none are given."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(vocabulary, int):
        return named
    given = {"decoder_input_ids", "labels", "decoder_inputs_embeds"} & set(named)
    if not given and takes(model, ["decoder_input_ids"]):
        longest = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
        length = min(_TARGET_LENGTH, longest) if isinstance(longest, int) else _TARGET_LENGTH
        named["decoder_input_ids"] = _random("tokens", [vocabulary, length], samples, generator)
    return named


# ---- how many


def affordable(model: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any], samples: int, seconds: float) -> int:
    """How many of the samples fit into the time limit, at least 2; by what two of them cost, not by a clock."""
    if samples <= 2:
        return samples

    def first(x: Any) -> Any:
        return x[:2] if isinstance(x, Tensor) and x.dim() and len(x) == samples else x

    few, few_named = tree_map(first, (given, keywords))
    numbers = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal numbers
        numbers += sum(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor))

    handles = [m.register_forward_hook(count) for m in model.modules() if not any(True for _ in m.children())]
    try:
        with (
            unrecorded(),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            frozen(model, lambda: None),
            FlopCounterMode(display=False) as counter,
        ):
            model(*few, **few_named)
    except Exception:  # the examination says what is wrong
        return samples
    finally:
        for handle in handles:
            handle.remove()
    costs = (counter.get_total_flops() / 2 / _FLOPS, numbers / 2 / _NUMBERS)
    return max(2, min(samples, int(seconds / max(*costs, 1e-9))))
