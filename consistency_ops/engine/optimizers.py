"""Which optimizer really updates the weights: inside wrappers, containers and lists; and who holds its state.

A wrapper (SAM, Lookahead, the optimizers of training frameworks) calls the ``step`` of another optimizer, and often has
a ``step`` of its own that no hook sees. The preconditioner is attached to the innermost ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..ops.checks import type_name

# Where wrappers keep the optimizer that they wrap, and containers those that they hold.
_INNER = "optimizer", "base_optimizer", "_base_optimizer", "original_optimizer", "optim", "opt", "_optimizer", "base"
_CONTAINED = "optimizers", "optimizer_dict"

PRIVATE = (
    "{} must not be trained with differential privacy (opacus): the correction uses the raw inputs, "
    "which the noise does not cover, so the guarantee would not hold; got {}"
)


@dataclass
class AttachedOptimizer:
    """An optimizer whose ``step`` updates weights, and the one whose ``state_dict`` saves what belongs to them."""

    stepping: Optimizer
    saving: Optimizer
    parts: tuple[Optimizer, ...] = ()  # optimizers that hold the state of some parameters in the place of `saving`
    _seen_state: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seen_state = self.saving.state

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.stepping.param_groups for p in group["params"]]

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The entries of a parameter, which may be added to."""
        return self._home(parameter)[parameter]

    def known_state_of(self, parameter: Tensor | None) -> dict[str, Any]:
        """The entries of a parameter; empty if there are none."""
        return {} if parameter is None else self._home(parameter).get(parameter, {})

    def has_state(self, parameter: Tensor) -> bool:
        return parameter in self._home(parameter)

    def states(self) -> list[dict[Tensor, dict[str, Any]]]:
        """All that may hold entries of ours."""
        return [optimizer.state for optimizer in (self.saving, *self.parts)]

    def state_was_replaced(self) -> bool:
        """Whether a ``load_state_dict`` that calls no hooks has put another state in the place of the last one."""
        if self.saving.state is self._seen_state:
            return False
        self._seen_state = self.saving.state
        return True

    def _home(self, parameter: Tensor) -> dict[Tensor, dict[str, Any]]:
        for part in self.parts:
            if any(p is parameter for group in part.param_groups for p in group["params"]):
                return part.state
        return self.saving.state


def find_optimizers(given: object) -> list[AttachedOptimizer]:
    """The innermost optimizers of what a user passed: one, a wrapper, a container, or a list of such.

    Raises:
        TypeError: there is no ``torch.optim.Optimizer`` in it.
        ValueError: one that cannot be supported.
    """
    found: list[AttachedOptimizer] = []
    _search(given, given, None, found, set())
    holders: dict[int, Optimizer] = {}
    for attached in found:
        for parameter in attached.parameters:
            other = holders.setdefault(id(parameter), attached.stepping)
            if other is not attached.stepping:
                raise ValueError(
                    "Preconditioner: optimizer must hold every parameter once, got a parameter of shape "
                    f"{tuple(parameter.shape)} in two of the optimizers, {type_name(other)} and "
                    f"{type_name(attached.stepping)}"
                )
    return found


def _search(
    given: object, at: object, saving: Optimizer | None, found: list[AttachedOptimizer], seen: set[int]
) -> None:
    if id(at) in seen:
        return
    seen.add(id(at))
    if isinstance(at, list | tuple):
        for item in at:
            _search(given, item, saving, found, seen)
        if not at:
            raise TypeError("Preconditioner: optimizer must be at least one optimizer, got an empty list")
        return
    _refuse(at)
    inner = _inner(at)
    if not isinstance(at, Optimizer) and not inner:
        raise TypeError(
            f"Preconditioner: optimizer must be a torch.optim.Optimizer, got {type_name(at)}"
            f"{f' in a {type_name(given)}' if at is not given else ''}, which has none. A list of optimizers, or "
            "an object that wraps one, will do, too."
        )
    if isinstance(at, Optimizer) and inner and not _covers(inner, at):
        # ZeroRedundancyOptimizer: each rank updates its share, so the outer one knows all parameters.
        _check_hooks(at)
        parts = tuple(i for i in inner if isinstance(i, Optimizer))
        found.append(AttachedOptimizer(at, at, parts))
    elif inner:
        # torch's own state_dict saves the state of the wrapper itself, and not of what it wraps.
        own_state = isinstance(at, Optimizer) and type(at).state_dict is Optimizer.state_dict and "state" in vars(at)
        if own_state and isinstance(at, Optimizer) and saving is None:
            saving = at
        for item in inner:
            _search(given, item, saving, found, seen)
    elif isinstance(at, Optimizer):
        _check_hooks(at)
        if saving is not None and not _has_load_hooks(saving):
            saving = None
        shares_state = saving is None or saving.state is at.state
        found.append(AttachedOptimizer(at, at if saving is None or shares_state else saving))


def _inner(at: object) -> list[object]:
    """The optimizers that an object wraps or holds."""
    for name in _CONTAINED:
        held = getattr(at, name, None)
        if isinstance(held, Mapping):
            held = list(held.values())
        if isinstance(held, list | tuple) and held and all(map(_is_optimizer, held)):
            return list(held)
    for name in _INNER:
        held = getattr(at, name, None)
        if held is not at and _is_optimizer(held):
            return [held]
    return []


def _is_optimizer(value: object) -> bool:
    if isinstance(value, Optimizer):
        return True
    return not isinstance(value, type | nn.Module) and hasattr(value, "param_groups") and hasattr(value, "step")


def _covers(inner: Iterable[object], outer: Optimizer) -> bool:
    """Whether the inner optimizers update every parameter of the outer one."""
    held = {id(p) for i in inner for group in getattr(i, "param_groups", ()) for p in group["params"]}
    held |= {
        id(p) for i in inner for deeper in _inner(i) for g in getattr(deeper, "param_groups", ()) for p in g["params"]
    }
    return all(id(p) in held for group in outer.param_groups for p in group["params"])


def _refuse(optimizer: object) -> None:
    """Those that cannot be supported, in words."""
    modules = [base.__module__ for base in type(optimizer).__mro__]
    if any(module.split(".")[0] == "opacus" for module in modules):
        raise ValueError("Preconditioner: " + PRIVATE.format("optimizer", type_name(optimizer)))
    if any(module.startswith("deepspeed.runtime.") for module in modules):
        raise ValueError(
            "Preconditioner: optimizer must update the weights of the model themselves, got "
            f"{type_name(optimizer)}, which updates flat copies of them. Use ZeRO stage 0, "
            "DistributedDataParallel, fully_shard or ZeroRedundancyOptimizer."
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"Preconditioner: optimizer must be one that evaluates the gradient once a step, got {type_name(optimizer)}"
        )


def refuse_private_model(model: nn.Module) -> None:
    """opacus marks the parameters of a model that is trained with differential privacy.

    Raises:
        ValueError: this model is one.
    """
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "opacus" and hasattr(module, "_module"):
            raise ValueError("Preconditioner: " + PRIVATE.format("model", f"{type_name(module)} {name!r}"))
    for name, parameter in model.named_parameters():
        refuse_private(parameter, name)


def refuse_private(parameter: Tensor, name: str) -> None:
    """As :func:`refuse_private_model`, for one parameter."""
    if is_private(parameter):
        raise ValueError("Preconditioner: " + PRIVATE.format("model", f"a per-sample gradient of {name!r}"))


def is_private(parameter: Tensor | None) -> bool:
    """Whether opacus has marked a parameter."""
    return parameter is not None and ("grad_sample" in parameter.__dict__ or "_norm_sample" in parameter.__dict__)


def _has_load_hooks(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")


def _check_hooks(optimizer: Optimizer) -> None:
    """A subclass that never calls ``Optimizer.__init__`` has no hooks, or torch never calls them."""
    names = ("step_pre", "step_post", "load_state_dict_pre", "load_state_dict_post")
    has_all = all(hasattr(optimizer, f"_optimizer_{name}_hooks") for name in names)
    if not has_all or not hasattr(type(optimizer).step, "hooked"):
        raise TypeError(
            f"Preconditioner: optimizer must call torch.optim.Optimizer.__init__, got {type_name(optimizer)}, whose "
            "step calls no hooks. If it wraps an optimizer, pass that one."
        )
