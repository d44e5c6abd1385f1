"""The old name of :mod:`consistency_ops.cli`: scripts of earlier checkouts that import ``train.data`` go on working."""

from __future__ import annotations

import sys

from .cli import data, data_formats, errors, models

__all__ = ["data", "data_formats", "errors", "models"]

for _module in (data, data_formats, errors, models):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
