"""Whether torch's own functions and classes are still what they were: a replaced one computes something else."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
# Modules that are no part of a chain of maps with known constants: others replace what they call for good reasons.
_OTHERS = ("Loss", "Attention", "Transformer", "RNN", "LSTM", "GRU", "Embedding")
_SO = ", so nobody knows what the modules compute"
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _collect() -> dict[tuple[Any, str], Any]:
    """What the forward passes of torch's modules are made of: their methods, and the functions that these name."""
    found: dict[tuple[Any, str], Any] = {(nn.Module, name): vars(nn.Module).get(name) for name in _CALLS}
    kinds = (k for k in vars(nn).values() if isinstance(k, type) and not any(part in k.__name__ for part in _OTHERS))
    classes = {base for kind in kinds for base in kind.__mro__}
    codes = []
    for kind in classes - {nn.Module, object}:
        for name, value in vars(kind).items():
            if isinstance(value, types.FunctionType) and (not name.startswith("__")) and issubclass(kind, nn.Module):
                if name != "forward":  # plain_layers.table_type knows a replaced one
                    found[kind, name] = value
                codes.append(value.__code__)
    seen: set[str] = set()
    while codes:
        for name in _names(codes.pop()):
            if name in seen:
                continue
            seen.add(name)
            if name.startswith("__"):
                continue
            for home in (F, torch, torch.Tensor):
                value = vars(home).get(name)
                if callable(value) and not isinstance(value, type):
                    found[home, name] = value
                    if isinstance(value, types.FunctionType):
                        codes.append(value.__code__)
                elif home is torch.Tensor and hasattr(home, name):
                    found[home, name] = value  # of the base in C: a replacement stands before it
    return found


_originals = _collect()


def _is_torchs(value: Any) -> bool:
    code = getattr(value, "__code__", None)
    return code is None or code.co_filename.startswith((_TORCH, "<"))


def replaced() -> str:
    """What was replaced, before this library was imported or after it, as a sentence; empty if nothing was."""
    for (home, name), value in _originals.items():
        now = vars(home).get(name)
        if now is not value or not _is_torchs(now):
            whose = f"{home.__module__}.{home.__qualname__}" if isinstance(home, type) else home.__name__
            return f"{whose}.{name} was replaced for the whole process{_SO}"
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch's gap
    for mode in modes:
        if not type(mode).__module__.startswith("torch."):
            return f"a {type(mode).__qualname__} stands before all functions{_SO}"
    dispatch = torch.utils._python_dispatch._get_current_dispatch_mode()
    if dispatch is not None and not type(dispatch).__module__.startswith("torch."):
        return f"a {type(dispatch).__qualname__} stands before all operators{_SO}"
    return ""
