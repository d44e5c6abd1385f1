"""Records which kernel sources have run on which GPU, in benchmarks/results/attestation.json.

    python -m benchmarks.device.attestation OUT      keep what a device run left in OUT

A stage counts only for the sources that it ran on: the first result of another tree hash starts a new attestation.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ATTESTATION = RESULTS / "attestation.json"
SOURCES = ("csrc/cuda", "csrc/include")


def tree_hash(root: Path = ROOT) -> str:
    """Return the SHA-256 of the names and contents of the kernel sources and public headers."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write(out: Path, device: dict, results: list[dict], kernels: str | None = None) -> dict:
    """Add the finished stages to ``out``/attestation.json, and return its content."""
    kernels = kernels or tree_hash()
    path = out / "attestation.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    stages = before.get("stages", {}) if before.get("kernels") == kernels else {}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for result in results:
        if result["status"] in ("ok", "failed", "timeout", "crashed", "stuck"):
            stages[result["stage"]] = {"status": result["status"], "seconds": result["seconds"], "date": now}
    attested = {"kernels": kernels, "device": device, "stages": stages}
    path.write_text(json.dumps(attested, indent=1) + "\n")
    return attested


def state(attestation: Path = ATTESTATION, root: Path = ROOT) -> str | None:
    """Return a warning, or None if these sources have run on a GPU and every stage passed."""
    if not attestation.exists():
        return "the CUDA kernels have never run on a GPU: run benchmarks/device_run.sh on one"
    attested = json.loads(attestation.read_text())
    where = attested["device"]["device"]
    if attested["kernels"] != tree_hash(root):
        return f"the CUDA kernels have changed since they ran on {where}: run benchmarks/device_run.sh again"
    failed = [name for name, stage in attested["stages"].items() if stage["status"] != "ok"]
    return f"on {where} these stages of benchmarks/device_run.sh failed: {', '.join(failed)}" if failed else None


def keep(out: Path) -> list[Path]:
    """Copy the results of a device run to the repository."""
    kept = [
        out / name for name in ("attestation.json", "golden.txt", "cuda.json", "results.jsonl") if (out / name).exists()
    ]
    for path in kept:
        shutil.copy(path, RESULTS / ("device.jsonl" if path.suffix == ".jsonl" else path.name))
    return kept


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m benchmarks.device.attestation OUT")
    found = keep(Path(sys.argv[1]))
    if not found:
        sys.exit(f"{sys.argv[1]} holds no results of benchmarks/device_run.sh")
    print("\n".join(f"kept {path.name}" for path in found))
    print(state() or "these kernels have run on a GPU and every stage passed")
