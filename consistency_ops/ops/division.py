"""The random division and the rows of all layers of a call at once, on the host: the numbers of ``random.h``.

``reference.py`` says the same for one layer and in fewer words; here one pass of numpy serves a whole network, because
a call of numpy costs the same for one layer as for fifty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(seed: int, step: int, layers: np.ndarray, purpose: int) -> np.ndarray:
    """Philox4x32-10 of (step, layer, purpose) under the key ``seed`` for every layer: uint64, (4, layers)."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    c0 = np.full(len(layers), step & 0xFFFFFFFF, np.uint64)
    c1 = np.full(len(layers), (step >> 32) & 0xFFFFFFFF, np.uint64)
    c2, c3 = layers.astype(np.uint64) & _MASK, np.full(len(layers), purpose, np.uint64)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _mix(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    h = value + key  # uint32: modulo 2^32
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    mixed: np.ndarray = h ^ (h >> np.uint32(16))
    return mixed


def _bijections(sizes: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """For every layer a permutation of ``range(sizes[l])``, drawn from its eight ``keys[:, l]``."""
    bits = np.array([max(2, int(size - 1).bit_length()) for size in sizes], np.uint32)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    x = (np.arange(begin[-1]) - begin[owner]).astype(np.uint32)
    left_bits = bits // 2
    right_bits = bits - left_bits
    one = np.uint32(1)
    left_masks, right_masks = (one << left_bits) - one, (one << right_bits) - one
    pending = np.arange(len(x))
    while pending.size:
        of = owner[pending]
        shift, left_mask, right_mask, key = right_bits[of], left_masks[of], right_masks[of], keys[:, of]
        left, right = x[pending] >> shift, x[pending] & right_mask
        for r in range(0, 8, 2):
            left ^= _mix(right, key[r]) & left_mask
            right ^= _mix(left, key[r + 1]) & right_mask
        walked = (left << shift) | right
        x[pending] = walked
        pending = pending[walked >= sizes[of]]
    return np.split(x.astype(np.int64), begin[1:-1])


def divisions(
    units: Sequence[int], groups: Sequence[int], layers: Sequence[int], chunk: int, seed: int, step: int
) -> list[np.ndarray]:
    """``reference.division`` of every layer: its units, int64, in the order in which they are dealt to chunks.

    ``units``: with the bias; ``groups``: consecutive units that move together; ``layers``: the layer numbers; all of
    one length.  A layer of at most ``chunk`` units keeps its order.
    """
    orders = [np.arange(u) for u in units]
    several = [i for i, u in enumerate(units) if u > chunk]
    if not several:
        return orders
    count, group = np.array([units[i] for i in several]), np.array([groups[i] for i in several])
    numbers = np.array([layers[i] for i in several])
    keys = np.concatenate([philox(seed, step, numbers, 1), philox(seed, step, numbers, 2)]).astype(np.uint32)
    turn = np.where(group % 8 == 0, group // 2, 1)
    rotated = count // turn * turn
    offsets = ((philox(seed, step, numbers, 0)[1] * (count // turn).astype(np.uint64)) >> _HALF).astype(np.int64) * turn
    permuted = _bijections(count // group, keys)
    for n, i in enumerate(several):
        moved = (permuted[n][:, None] * group[n] + np.arange(group[n])).ravel()
        positions = np.concatenate([moved, np.arange(len(moved), units[i])])
        orders[i] = np.where(positions < rotated[n], (positions + offsets[n]) % rotated[n], positions)
    return orders
