"""Whether a call of a layer is activation checkpointing that runs a forward pass again."""

from __future__ import annotations

import sys
from types import FrameType

import torch.utils.checkpoint

_CHECKPOINT = torch.utils.checkpoint.__file__


def is_recomputed() -> bool:
    """Of the forward hook that calls this: whether its call was captured before, and checkpointing runs it again.

    Under reentrant checkpointing the first pass has no gradients, and this call is the only one that is seen.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _CHECKPOINT:
            if code.co_name == "unpack_hook":
                return True
            if code.co_name == "backward":
                return False
        frame = frame.f_back
    return False
