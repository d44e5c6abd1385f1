"""GPT-2 of 124 million parameters to a fixed validation loss: how many steps does an optimizer need?

    torchrun --nproc-per-node 8 -m benchmarks.training.gpt2 \\
        --train 'fineweb10B/fineweb_train_*.bin' --val 'fineweb10B/fineweb_val_*.bin' \\
        --out runs/muon-whiten --optimizer muon --mode whiten --lr 0.02
    python -m benchmarks.training.gpt2 --report runs/*

The setting is that in which the community compares optimizers: FineWeb in GPT-2's tokens, batches of 524 288 tokens in
rows of 1024, validation on 10 485 760 tokens, and the steps to a loss of 3.28 are counted. A schedule ends with its
last step, so the steps that count are those of a run that ends at or below 3.28: try several values of ``--steps``.

The data are files of 16-bit tokens behind a header of 256 32-bit integers (20240520, 1, number of tokens), as llm.c and
modded-nanogpt write them; none is downloaded here. The model is sharded by ``fully_shard`` over all ranks
(``--parallel ddp``: copied). ``--resume`` goes on from the last checkpoint in ``--out``, with the same bits as a run
that was not interrupted on the same number of ranks.

This has been started on two CPU ranks with a tiny model (the tests do that), and never on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import consistency_ops as co
from benchmarks import markdown

MAGIC, VERSION, HEADER = 20240520, 1, 256
TARGET = 3.28
KEPT = 2  # checkpoints


# Data


def shard(path: str) -> Tensor:
    """Return the tokens of a file, mapped and not read."""
    header = torch.from_file(path, size=HEADER, dtype=torch.int32)
    if header[:2].tolist() != [MAGIC, VERSION]:
        raise SystemExit(f"{path}: no file of tokens: it begins with {header[:2].tolist()}, not {[MAGIC, VERSION]}")
    count = int(header[2])
    return torch.from_file(path, size=2 * HEADER + count, dtype=torch.uint16)[2 * HEADER :]


class Tokens:
    """Batches in the order of the files. The place is the number of batches, so that it is resumed by a number."""

    def __init__(self, pattern: str, rows: int, context: int, rank: int, world: int) -> None:
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise SystemExit(f"no file matches {pattern}")
        self.shards = [shard(path) for path in paths]
        self.rows, self.context, self.rank, self.world = rows, context, rank, world
        step = rows * context * world
        self.batches = [(len(tokens) - 1) // step for tokens in self.shards]
        if not sum(self.batches):
            raise SystemExit(f"{pattern}: no file has the {step + 1} tokens of a batch of all ranks")

    def __len__(self) -> int:
        return sum(self.batches)

    def batch(self, place: int) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of batch ``place``; after the last file the first one comes again."""
        place %= len(self)
        for tokens, batches in zip(self.shards, self.batches, strict=True):
            if place < batches:
                size = self.rows * self.context
                start = (place * self.world + self.rank) * size
                piece = tokens[start : start + size + 1].to(torch.int64)
                return piece[:-1].view(self.rows, -1), piece[1:].view(self.rows, -1)
            place -= batches
        raise AssertionError("place is smaller than the sum")


# Model


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (rotated(functional.rms_norm(part, (part.shape[-1],)), turn) for part in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: each pair (x_i, x_{i + half}) is turned by an angle that grows with the position."""
    first, second = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1).type_as(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(functional.rms_norm(x, (x.shape[-1],)), turn)
        return x + self.down(functional.relu(self.up(functional.rms_norm(x, (x.shape[-1],)))).square())


class Gpt2(nn.Module):
    """GPT-2 as the community's benchmark has it: rotary positions, RMS norm without weights, squared ReLU, no biases,
    head apart from the embedding. The projections into the residual and the head start at 0.
    """

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        with torch.no_grad():
            for block in self.blocks:
                block.attention.out.weight.zero_()
                block.down.weight.zero_()
            self.head.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        turn = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        x = functional.rms_norm(self.embedding(x), (self.embedding.embedding_dim,))
        for block in self.blocks:
            x = block(x, turn)
        return self.head(functional.rms_norm(x, (x.shape[-1],))).float()


# Optimizers


def optimizers_of(model: Gpt2, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return AdamW for all, or Muon for the matrices of the blocks and AdamW for embedding and head."""
    rest = [model.embedding.weight, model.head.weight]
    blocks = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    adam_rate = options.adam_lr or options.lr
    if options.optimizer == "muon":
        muon = torch.optim.Muon(
            blocks, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)]
    groups = [{"params": blocks, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))]


def factor(step: int, options: argparse.Namespace) -> float:
    """Return the factor of the rates in ``step``, from 1: up to 1 in a line, then 1, and down to 0 at the end."""
    warm, steps = options.warm_up, options.steps
    cooling = max(1, round(options.cool_down * steps))
    return min(1.0, step / max(1, warm), (steps - step + 1) / cooling)


# Checkpoints


class Checkpoints:
    """The last ``KEPT`` checkpoints in a folder; a file names the newest that is complete."""

    def __init__(self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.folder, self.model, self.optimizers = folder, model, optimizers
        self.newest = folder / "newest"

    def save(self, step: int, record: dict) -> None:
        name = f"step-{step:06d}"
        weights, state = get_state_dict(self.model, self.optimizers)
        checkpoint.save({"model": weights, "optimizers": state}, checkpoint_id=self.folder / name)
        if dist.get_rank() == 0:
            new = self.folder / "newest.part"
            new.write_text(json.dumps({"name": name, "step": step, **record}))
            os.replace(new, self.newest)
            for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self) -> dict | None:
        """Put the newest checkpoint into model and optimizers, and return its record; None if there is none."""
        if not self.newest.exists():
            return None
        record = json.loads(self.newest.read_text())
        weights, state = get_state_dict(self.model, self.optimizers)
        saved = {"model": weights, "optimizers": state}
        checkpoint.load(saved, checkpoint_id=self.folder / record["name"])
        set_state_dict(
            self.model, self.optimizers, model_state_dict=saved["model"], optim_state_dict=saved["optimizers"]
        )
        return record


# Training


@torch.no_grad()
def validation(model: nn.Module, tokens: Tokens, batches: int, device: torch.device) -> float:
    """Return the mean loss over the first batches of the validation tokens of all ranks."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for place in range(batches):
        x, y = (t.to(device) for t in tokens.batch(place))
        with precision(device):
            total += functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).double()
    dist.all_reduce(total)
    model.train()
    return float(total) / (batches * dist.get_world_size())


def precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def digest(model: nn.Module) -> str:
    """Return a number for the bits of all weights, the same on every rank."""
    found = hashlib.sha256()
    for p in model.parameters():
        whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        found.update(whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def ranks(cpu: bool) -> Iterator[torch.device]:
    """Start the process group that torchrun describes, or one of a single rank; yield this rank's device."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29531")):
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available() and not cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        dist.barrier()  # one that leaves while another still talks to it may end that one
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    accumulate, rest = divmod(options.batch, world * options.rows * options.context)
    if rest or not accumulate:
        raise SystemExit(
            f"--batch {options.batch} must be a multiple of ranks * rows * context = "
            f"{world * options.rows * options.context}"
        )
    train = Tokens(options.train, options.rows, options.context, rank, world)
    held = Tokens(options.val, options.rows, options.context, rank, world)
    batches = min(len(held), max(1, options.val_tokens // (world * options.rows * options.context)))
    torch.manual_seed(options.seed)
    model = Gpt2(options.vocabulary, options.width, options.blocks, options.heads, options.context).to(device)
    trained: nn.Module = model
    if options.parallel == "fsdp":
        mesh = init_device_mesh(device.type, (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizers = optimizers_of(model, options)
    if options.parallel == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    if options.compile:
        trained = torch.compile(trained)
    if options.mode != "none":
        more = {} if options.damping is None else {"damping": options.damping}
        pre = co.Preconditioner(trained, optimizers, mode=options.mode, every=options.every, skip=options.skip, **more)
        if rank == 0:
            print(pre.summary(), flush=True)
    rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(options.out, model, optimizers)
    log = Log(options.out / "log.jsonl", rank == 0)
    record = checkpoints.load() if options.resume else None
    first, seconds, reached = (record["step"] + 1, record["seconds"], record["reached"]) if record else (1, 0.0, None)
    log.cut(first - 1)
    loss_at_end = None
    for step in range(first, options.steps + 1):
        begin = time.perf_counter()
        for one, values in zip(optimizers, rates, strict=True):
            for group, value in zip(one.param_groups, values, strict=True):  # loading a state makes new groups
                group["lr"] = value * factor(step, options)
        total = torch.zeros((), device=device)
        for part in range(accumulate):
            x, y = (t.to(device, non_blocking=True) for t in train.batch((step - 1) * accumulate + part))
            with precision(device):
                loss = functional.cross_entropy(trained(x).flatten(0, 1), y.flatten()) / accumulate
            loss.backward()
            total += loss.detach()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        line = {"step": step}
        if step % options.log_every == 0 or step == options.steps:
            dist.all_reduce(total)
            line["train_loss"] = float(total) / world
        seconds += time.perf_counter() - begin
        if step % options.val_every == 0 or step == options.steps:
            loss_at_end = line["val_loss"] = validation(trained, held, batches, device)
            if reached is None and loss_at_end <= options.target:
                reached = step
        if len(line) > 1:
            log.add(line | {"tokens": step * options.batch, "seconds": round(seconds, 3)})
        if step % options.save_every == 0 and step < options.steps:
            checkpoints.save(step, {"seconds": seconds, "reached": reached})
        if step == options.stop_after:  # an interruption, for the tests
            return {}
    result = {
        "steps": options.steps,
        "val_loss": loss_at_end,
        "target": options.target,
        "first_step_at_target": reached,
        "seconds": round(seconds, 3),
        "ranks": world,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": digest(model),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "build": co.build_info(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if rank == 0:
        (options.out / "result.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(
            f"{options.steps} steps: validation loss {loss_at_end:.4f}, "
            f"{'never at' if reached is None else f'in step {reached} at'} {options.target}",
            flush=True,
        )
    return result


class Log:
    """The losses, a JSON line each."""

    def __init__(self, path: Path, mine: bool) -> None:
        self.path, self.mine = path, mine

    def cut(self, step: int) -> None:
        """Forget the lines after ``step``, which are made again."""
        if not self.mine:
            return
        old = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, line: dict) -> None:
        if self.mine:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def report(folders: list[Path]) -> str:
    """Return a table of finished runs, fewest steps first, those that end above the target last."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    results.sort(key=lambda r: (not r["val_loss"] <= r["target"], r["steps"], r["val_loss"]))
    rows = []
    for r in results:
        o = r["options"]
        met = "yes" if r["val_loss"] <= r["target"] else "no"
        rows.append([o["optimizer"], o["mode"], f"{o['lr']:g}", str(r["steps"]), f"{r['val_loss']:.4f}", met])
    return markdown.table(["optimizer", "mode", "rate", "steps", "validation loss", "at the target"], rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="benchmarks.training.gpt2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--report", nargs="+", type=Path, metavar="DIR", help="only print a table of finished runs")
    made.add_argument("--train", help="pattern of the files of training tokens")
    made.add_argument("--val", help="pattern of the files of validation tokens")
    made.add_argument("--out", type=Path, help="folder of log, checkpoints and result")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    made.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    made.add_argument("--mode", choices=("none", "correct", "whiten"), default="whiten")
    made.add_argument("--lr", type=float, default=0.01, help="of AdamW, or of Muon on the scale of AdamW's")
    made.add_argument("--adam-lr", type=float, help="of embedding and head beside Muon (default: --lr)")
    made.add_argument("--weight-decay", type=float, default=0.0, help="of the blocks' matrices, decoupled")
    made.add_argument("--damping", type=float, help="default: the preconditioner's")
    made.add_argument("--every", type=int, default=1, help="steps between two factors")
    made.add_argument("--skip", nargs="*", default=[], metavar="PATTERN", help="layers that keep their gradient")
    made.add_argument("--steps", type=int, default=3250)
    made.add_argument("--warm-up", type=int, default=100, help="steps")
    made.add_argument("--cool-down", type=float, default=0.5, help="share of the steps in which the rate falls to 0")
    made.add_argument("--batch", type=int, default=524_288, help="tokens of all ranks in a step")
    made.add_argument("--rows", type=int, default=16, help="of a rank in one pass")
    made.add_argument("--context", type=int, default=1024)
    made.add_argument("--vocabulary", type=int, default=50_304)
    made.add_argument("--width", type=int, default=768)
    made.add_argument("--blocks", type=int, default=12)
    made.add_argument("--heads", type=int, default=12)
    made.add_argument("--val-tokens", type=int, default=10_485_760)
    made.add_argument("--val-every", type=int, default=125, help="steps")
    made.add_argument("--log-every", type=int, default=25, help="steps")
    made.add_argument("--save-every", type=int, default=250, help="steps")
    made.add_argument("--target", type=float, default=TARGET)
    made.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--cpu", action="store_true", help="use gloo on the CPU where there is a GPU")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--stop-after", type=int, help="leave after this step, as if interrupted")
    return made


def main() -> None:
    made = parser()
    options = made.parse_args()
    if options.report:
        print(report(options.report))
        return
    for name in ("train", "val", "out"):
        if getattr(options, name) is None:
            made.error(f"--{name} is needed")
    if not options.resume and (options.out / "log.jsonl").exists():
        made.error(f"{options.out} has a run: --resume goes on with it")
    with ranks(options.cpu) as device:
        run(options, device)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; torch 2.13 aborts a rank of gloo now and then while the interpreter ends
