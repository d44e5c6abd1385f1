"""Files that the commands write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def write_whole(path: Path, write: Callable[[Path], object], cure: str = "; choose another --out") -> None:
    """Write ``path`` atomically: ``write`` makes a file beside it, which then replaces it.

    Raises:
        UserError: it cannot be written; ``cure`` ends the sentence.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){cure}.") from None
