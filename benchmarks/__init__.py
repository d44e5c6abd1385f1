"""What the library costs and what it is good for, measured beside the alternatives in the same run."""

import os
from pathlib import Path

# Holds mnist/, fashion-mnist/ and cifar10/ with the published files.
DATA = Path(os.getenv("CONSISTENCY_OPS_DATA") or Path(__file__).resolve().parents[1] / "data")
