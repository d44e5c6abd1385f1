"""Several gloo ranks on one machine: ``run`` starts them, calls the scenarios of a module on each, collects results.

    PYTHONPATH=.:tests python -m support.ranks MODULE WORLD FOLDER SCENARIO...

One process imports torch and forks the ranks, so that four of them cost one import. A scenario is a function of no
arguments, called on every rank after ``init_process_group``; what it returns is saved, or the traceback of what it
raises.
"""

from __future__ import annotations

import datetime
import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support import processes

TIMEOUT = datetime.timedelta(seconds=60)  # a rank that waits for another that does not come


def run(module: str, scenarios: list[str], world: int, folder: Path) -> dict[str, list[Any]]:
    """Return the results of every scenario, one per rank."""
    command = [sys.executable, "-m", "support.ranks", f"support.{module}", str(world), str(folder), *scenarios]
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    done = processes.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ranks failed with {done.returncode}\n{done.stdout}\n{done.stderr}")
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [results[name] for results in ranks] for name in scenarios}


def same_bits(tensors: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> bool:
    """Whether all ranks of the group have them bit for bit."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, flat, group=group)
    return all(torch.equal(flat, other) for other in gathered)


def _rank(module: str, rank: int, world: int, folder: Path, scenarios: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world, timeout=TIMEOUT
    )
    results = {}
    for name in scenarios:
        torch.manual_seed(0)
        try:
            results[name] = getattr(importlib.import_module(module), name)()
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    module, world, folder, *scenarios = sys.argv[1:]
    importlib.import_module(module)
    children = []
    for rank in range(int(world)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _rank(module, rank, int(world), Path(folder), scenarios)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
