"""What a copied or pickled model carries in place of a hook: nothing that keeps it from loading elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

# What a copied or unpickled model carries in place of a hook: a function of the standard library that takes anything
# and does nothing, so that the model loads where this package is not installed. (With ``weights_only=True`` the reader
# must allow it, and the model's own classes, by ``torch.serialization.safe_globals``: we open no door for others.)
nothing: Callable[..., None] = contextlib.nullcontext.__exit__


def reduce_to_nothing() -> tuple[Any, ...]:
    """The result of ``__reduce__`` for hooks that a pickled model must not carry."""
    return getattr, (contextlib.nullcontext, "__exit__")
