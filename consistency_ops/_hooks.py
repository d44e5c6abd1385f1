"""Hooks on modules that a copied or pickled model does not carry, so that it loads elsewhere, ``weights_only`` too."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# The dictionaries of a module that have hooks, and those that have notes about them under the same keys.
_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
# What stands in the place of a hook where a dictionary was copied in another way than by copy or pickle: a function of
# the standard library that takes anything and does nothing.
nothing: Callable[..., None] = contextlib.nullcontext.__exit__


class Unpickled:
    """Base of the hooks on modules; :func:`hide` keeps them out of copies and pickles."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext, "__exit__")


def hide(module: nn.Module) -> None:
    """Let copies and pickles of a module be without its hooks of ours; those of others stay.

    The readers of ``torch.load(weights_only=True)`` take only what they know, and a function in the place of a hook is
    not of that. ``pickle`` and ``copy`` ask each dictionary how it is to be made again; these answer without ours.
    """
    for name, notes in _HOOKS.items():
        hooks = getattr(module, name, None)
        if type(hooks) is OrderedDict and any(isinstance(hook, Unpickled) for hook in hooks.values()):
            for at in (hooks, *(getattr(module, note, None) for note in notes)):
                if type(at) is OrderedDict and "__reduce_ex__" not in vars(at):
                    vars(at)["__reduce_ex__"] = _WithoutOurs(at, hooks)


class _WithoutOurs:
    """``__reduce_ex__`` of one dictionary of a module."""

    def __init__(self, entries: OrderedDict[int, Any], hooks: OrderedDict[int, Any]) -> None:
        self._entries, self._hooks = weakref.ref(entries), weakref.ref(hooks)

    def __call__(self, protocol: int) -> tuple[Any, ...]:
        entries, hooks = self._entries(), self._hooks()
        assert entries is not None
        ours = {key for key, hook in (hooks or {}).items() if isinstance(hook, Unpickled)}
        others: Iterator[tuple[int, Any]] = iter([item for item in entries.items() if item[0] not in ours])
        return OrderedDict, (), None, None, others
