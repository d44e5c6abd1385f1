"""Other people's training frameworks, where they are installed (requirements-frameworks.txt, `make test-slow`)."""

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

NAMES = ("accelerate", "lightning", "timm", "transformers")


def used_by(source):
    """The frameworks that a piece of Python imports."""
    return [name for name in NAMES if re.search(rf"^\s*(import|from) {name}\b", source, re.MULTILINE)]


def missing():
    """The frameworks that are not installed."""
    return [name for name in NAMES if importlib.util.find_spec(name) is None]


def require(*names):
    """Import the modules, or skip the test with the first that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    _torchvision()
    return [importlib.import_module(name) for name in names]


@functools.cache
def _torchvision():
    """Let torchvision be imported beside a CPU build of torch, which timm and transformers do.

    The registry's torchvision is compiled for CUDA. Its library does not load without CUDA's, and its Python code then
    stops because two operators are missing. No test calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
