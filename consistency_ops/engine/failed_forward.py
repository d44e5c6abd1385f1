"""A forward pass that raises: what it has captured is forgotten."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .._hooks import Unpickled
from .capture_states import CaptureStates
from .layer import Layer


class FailedForward(Unpickled):
    """Forward hook of the model, called even if the pass raises: then the rows that it has left are forgotten."""

    def __init__(self, states: list[CaptureStates], layers: list[Layer]) -> None:
        self._states, self._layers = states, layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if output is not None or torch.compiler.is_compiling() or sys.exc_info()[0] is None:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # checkpointing breaks off a recomputation as soon as it has what it needs
        captures = [layer.capture for layer in self._layers if layer.capture is not None]
        for capture in captures:
            capture.note_mark()
        for states in self._states:
            states.drop_unmarked()
        for capture in captures:
            capture.drop_unmarked()
