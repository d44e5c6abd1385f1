"""Short digests of values that must be the same on all ranks, or when a state is loaded."""

from __future__ import annotations

import hashlib


def digest(value: object) -> int:
    """56 bits of a hash of ``repr(value)``: the same in every process, and exact in a float64 or int64 tensor."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")
