"""The compiled library and the namespace of its operators: the one place that names both.

The builder of the Hugging Face Hub, which gives every build of a library a namespace of its own so that several can be
loaded at once, puts a file of the same name and content in the place of this one.
"""

import importlib
from typing import Any

import torch

importlib.import_module("._C", __package__)

ops: Any = torch.ops.consistency_ops


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of an operator: ``namespace::op_name``."""
    return f"consistency_ops::{op_name}"
