"""Warnings of the preconditioner in the log ``consistency_ops``, each written once."""

from __future__ import annotations

import logging
from collections.abc import Iterable

log: logging.Logger = logging.getLogger("consistency_ops")
_SHOWN = 5  # names that one message lists


class Notices:
    """Remembers what it has said: a training of a million steps says everything once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, key: str, text: str) -> None:
        """Log ``text`` as a warning, unless something was logged under ``key`` before.

        The text says what happened and what to do about it.
        """
        if key not in self._said:
            self._said.add(key)
            log.warning("Preconditioner: %s", text)


def some(names: Iterable[str]) -> str:
    """The first names of a list, and the number of those that are left out."""
    names = [name or "(model)" for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
