"""The published data sets, for the tests that need real images."""

from pathlib import Path

import pytest

from benchmarks import DATA


def published(name: str) -> Path:
    """The folder of the data set's files; skips the test where there is none."""
    if not (DATA / name).is_dir():
        pytest.skip(f"no folder {name} in {DATA}: set CONSISTENCY_OPS_DATA to the folder that holds {name}")
    return DATA / name
