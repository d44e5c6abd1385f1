"""What a copied or pickled model carries in place of a hook: nothing that keeps it from loading elsewhere."""

from __future__ import annotations

import contextlib

import torch

# What a copied or unpickled model carries in place of a hook: a function of the standard library that takes anything
# and does nothing, so that the model loads where this package is not installed.
nothing = contextlib.nullcontext.__exit__
torch.serialization.add_safe_globals([contextlib.nullcontext, getattr])


def reduce_to_nothing() -> tuple:
    """The result of ``__reduce__`` for hooks that a pickled model must not carry."""
    return getattr, (contextlib.nullcontext, "__exit__")
