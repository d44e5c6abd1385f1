"""Files that the commands write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def write_whole(path: Path, write: Callable[[Path], object], cure: str = "; choose another --out") -> None:
    """Let ``write`` make a file next to ``path``, and put it there in one stroke: nobody meets half a file.

    Raises:
        UserError: it cannot be written; ``cure`` ends the sentence.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){cure}.") from None
