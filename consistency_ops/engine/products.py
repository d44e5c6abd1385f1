"""Sees the inputs of a weight that multiplies something inside of its module's forward, where no hook is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .._hooks import Unpickled, hide

# Products and where they have the two factors. Under a TorchFunctionMode functions and methods come with their names.
_PRODUCTS = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm"), (0, 1)),
    **dict.fromkeys(("grouped_mm_fallback", "_grouped_mm_fallback"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), (1, 2)),
    "__rmatmul__": (1, 0),
}


class Taker(Protocol):
    """Who takes the rows: the capture of the weight."""

    @property
    def weight(self) -> Tensor | None:
        """The parameter."""

    def take(self, x: Tensor) -> None:
        """Capture the input of a product."""


def watch_products(module: nn.Module, taker: Taker) -> list[RemovableHandle]:
    """Hand over what the weight of ``taker`` multiplies within the forward of ``module``.

    In eager mode only: a compiled forward is not watched.
    """
    modes: list[_Products | None] = []  # of the calls that are running
    handles = [
        module.register_forward_pre_hook(_Enter(taker, modes)),
        module.register_forward_hook(_Leave(taker, modes), always_call=True),
    ]
    hide(module)
    return handles


class _Enter(Unpickled):
    def __init__(self, taker: Taker, modes: list[_Products | None]) -> None:
        self._taker, self._modes = taker, modes

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        weight = self._taker.weight
        takes = module.training and torch.is_grad_enabled() and weight is not None and weight.requires_grad
        mode = _Products(weight, self._taker.take) if takes and weight is not None else None
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._modes.append(mode)


class _Leave(_Enter):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object = None) -> None:
        if torch.compiler.is_compiling() or not self._modes:
            return
        mode = self._modes.pop()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Products(TorchFunctionMode):
    def __init__(self, weight: Tensor, take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._take = take
        self._forms: dict[int, Tensor] = {id(weight): weight}  # the weight, its views, parts and copies

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places = _PRODUCTS.get(getattr(func, "__name__", ""))
        if places is None:
            result = func(*args, **kwargs)
            if args and id(args[0]) in self._forms:
                self._note(result)
            return result
        factors = [args[at] if len(args) > at else None for at in places]
        if places == (0, 1) and factors[1] is None:
            factors[1] = kwargs.get("weight", kwargs.get("mat2", kwargs.get("other")))
        left, right = factors
        if isinstance(left, Tensor) and id(right) in self._forms:
            self._take(left)
        elif isinstance(right, Tensor) and id(left) in self._forms and right.dim() > 1:
            self._take(right.transpose(-1, -2))  # a weight times columns
        return func(*args, **kwargs)

    def _note(self, result: object) -> None:
        for form in result if isinstance(result, list | tuple) else [result]:
            if isinstance(form, Tensor) and form.is_floating_point() and form.dim() > 1:
                self._forms[id(form)] = form
