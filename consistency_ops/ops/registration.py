"""What registers an operator and its derivative with torch, with the types that torch leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")  # CO_NAMESPACE of csrc/bindings/registration.h
PORTABLE_NAMESPACE = f"{NAMESPACE}_torch"  # the correction without the library's kernels: backend.py
portable_ops: Any = getattr(torch.ops, PORTABLE_NAMESPACE)

P = ParamSpec("P")
R = TypeVar("R")


def register_fake(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate the function that says shape, strides, dtype and device of the results of operator ``name``.

    ``torch.compile``, ``torch.export`` and fake tensors call it instead of the operator. It takes the operator's
    arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        torch.library.register_fake(add_op_namespace_prefix(name), function, _stacklevel=2)
        if hasattr(portable_ops, name):
            torch.library.register_fake(f"{PORTABLE_NAMESPACE}::{name}", function, _stacklevel=2)
        return function

    return decorate


def register_vmap(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate the function that ``torch.vmap`` calls instead of operator ``name``: ``(info, in_dims, *arguments)``."""
    decorator: Callable[[Callable[P, R]], Callable[P, R]] = torch.library.register_vmap(add_op_namespace_prefix(name))
    return decorator


def register_autograd(name: str, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
    """Give operator ``name`` its derivative, and the function that saves what the derivative needs."""
    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup_context)
    if hasattr(portable_ops, name):
        torch.library.register_autograd(f"{PORTABLE_NAMESPACE}::{name}", backward, setup_context=setup_context)
