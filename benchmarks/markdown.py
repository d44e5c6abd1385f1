"""Tables of the manual's pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown.  Raises ValueError where a row has not as many cells as there are heads."""
    lines = [heads, ["---"] * len(heads), *rows]
    for line in lines:
        if len(line) != len(heads):
            raise ValueError(f"a row of {len(line)} cells in a table of {len(heads)}: {line}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
