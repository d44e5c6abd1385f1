"""A second device for torch, in Python: ``second_device``, whose memory is the host's under another name.

It has no kernel of its own, so whatever runs on it runs out of torch's own operations, one by one.  ``waits`` names the
operators for which the host would have to wait on a real device: those that look at values.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.dlpack import from_dlpack, to_dlpack

# torch gives every tensor and module a method of this name, which hides a layer of that name: none is called so.
NAME = "second_device"
waits: list[str] = []

_LOOKING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::unique_dim",
}
_HOST, _EXTENSION = 1, 12  # device types of DLPack
_set_, _CPU = torch.ops.aten.set_.source_Storage_storage_offset, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _elsewhere(tensor: Tensor, device_type: int) -> Tensor:
    """The same memory as a tensor of another device: the second field of DLPack's struct, after the pointer."""
    capsule = to_dlpack(tensor.detach())
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = device_type
    return from_dlpack(capsule)


def there(tensor: Tensor) -> Tensor:
    """A CPU tensor's memory as a tensor of this device."""
    return _elsewhere(tensor, _EXTENSION)


def here(tensor: Tensor) -> Tensor:
    """The opposite."""
    return _elsewhere(tensor, _HOST)


def _run(op: torch._ops.OpOverload, *args, **kwargs):
    name = op._schema.name
    if name in _LOOKING:
        waits.append(name)
    if kwargs.get("device") is not None and kwargs["device"].type == NAME:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    given: dict[int, Tensor] = {}  # by id of the tensor on the host
    resized: list[tuple[Tensor, Tensor]] = []

    def to_host(tensor: Tensor) -> Tensor:
        if tensor.device.type != NAME:
            return tensor
        host = here(tensor)
        given[id(host)] = tensor
        return host

    def out_to_host(tensor: Tensor) -> Tensor:
        """An ``out`` that the operator sizes first, which it cannot do with memory that is not its own."""
        if tensor.device.type != NAME or tensor.numel():
            return to_host(tensor)
        host = torch.empty_like(tensor, device="cpu")
        given[id(host)] = tensor
        resized.append((tensor, host))
        return host

    def back(tensor: Tensor) -> Tensor:
        if id(tensor) in given or tensor.device.type != "cpu":
            return given.get(id(tensor), tensor)
        return there(tensor)

    if name == "aten::_copy_from":
        source, target = args[:2]
        if target.device.type == "cpu":
            waits.append(name)
        to_host(target).copy_(to_host(source))
        return target
    args = [  # a number that stands for a tensor has become one again on its way through Python
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if isinstance(value, int | float) and str(argument.type) == "Tensor"
        else value
        for value, argument in zip(args, op._schema.arguments, strict=False)
    ]
    results = op(*tree_map_only(Tensor, to_host, args), **tree_map_only(Tensor, out_to_host, kwargs))
    for tensor, host in resized:
        memory = there(host)
        _set_.redispatch(_CPU, tensor, memory.untyped_storage(), 0, memory.shape, memory.stride())
    return tree_map_only(Tensor, back, results)


class _Module:
    """What ``torch.second_device`` is.  Code that looks for an accelerator finds none: other tests notice nothing."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There are no random numbers here."""


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return False

    def has_primary_context(self, device: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


_libraries: list[torch.library.Library] = []


def set_up() -> str:
    """Make the device known to torch, once a process; returns its name."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, "PrivateUse1")
        _libraries.append(library)
    return NAME
