"""Which layer types are covered: the public face of ``engine/layer_types.py``."""

from .engine.layer_types import register

__all__ = ["register"]
