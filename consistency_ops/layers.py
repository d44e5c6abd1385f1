"""Which layer types are covered: the public face of ``engine/layer_types.py``."""

from .engine.layer_types import layer_type, register

__all__ = ["layer_type", "register"]
