"""benchmarks/training/gpt2.py: started by torchrun on two gloo ranks with a tiny model; interrupted and resumed."""

import array
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import gpt2
from support import processes

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"batch": 256, "rows": 2, "context": 32, "vocabulary": 64, "width": 32, "blocks": 2, "heads": 2}
STEPS = {"steps": 6, "warm-up": 2, "val-every": 3, "log-every": 2, "save-every": 2, "val-tokens": 256}
TINY = [text for name, value in (SIZES | STEPS).items() for text in (f"--{name}", str(value))]


def tokens(path: Path, count: int) -> None:
    values = array.array("H", [(7 * i * i + i // 3) % 61 for i in range(count)])
    path.write_bytes(struct.pack("<256i", gpt2.MAGIC, gpt2.VERSION, count, *[0] * 253) + values.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokens")
    tokens(folder / "train_0.bin", 700)
    tokens(folder / "train_1.bin", 900)
    tokens(folder / "val_0.bin", 600)
    return ["--train", str(folder / "train_*.bin"), "--val", str(folder / "val_*.bin")]


def start(data: list[str], out: Path, *more: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "benchmarks.training.gpt2", *data, *TINY, "--cpu", "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = start(data, whole, "--target", "4.1")
    assert "9 of 10 layers" in said
    assert "neither in a" not in said  # the head belongs to the other optimizer, and is sharded
    start(data, parts, "--target", "4.1", "--stop-after", "5")
    assert not (parts / "result.json").exists()
    start(data, parts, "--target", "4.1", "--resume")
    one, other = (json.loads((out / "result.json").read_text()) for out in (whole, parts))
    assert one["weights"] == other["weights"]
    assert losses(whole) == losses(parts)
    assert [line["step"] for line in losses(whole)] == [2, 3, 4, 6]
    assert one["val_loss"] == losses(whole)[-1]["val_loss"] < losses(whole)[1]["val_loss"] < 4.16  # ln 64 at the start
    assert one["first_step_at_target"] == next(r["step"] for r in losses(whole) if r.get("val_loss", 9) <= 4.1)
    assert one["ranks"] == 2
    assert sorted(path.name for path in parts.glob("step-*")) == ["step-000002", "step-000004"]
    table = gpt2.report([whole])
    assert f"| muon | whiten | 0.01 | 6 | {one['val_loss']:.4f} | yes |" in table


def test_ranks_and_places_deal_every_token_once(data):
    readers = [gpt2.Tokens(data[1], 2, 32, rank, 2) for rank in range(2)]
    assert len(readers[0]) == 700 // 128 + 900 // 128
    seen = [reader.batch(place) for place in range(5) for reader in readers]
    whole = gpt2.shard(data[1].replace("*", "0")).to(torch.int64)
    assert torch.equal(torch.cat([x.flatten() for x, _ in seen]), whole[: 5 * 128])
    assert torch.equal(torch.cat([y.flatten() for _, y in seen]), whole[1 : 5 * 128 + 1])
    again = readers[1].batch(len(readers[1]) + 2)
    assert all(torch.equal(a, b) for a, b in zip(again, readers[1].batch(2), strict=True))


def test_a_file_that_has_no_tokens_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(4096))
    with pytest.raises(SystemExit, match="no file of tokens"):
        gpt2.Tokens(str(tmp_path / "*.bin"), 1, 8, 0, 1)
    with pytest.raises(SystemExit, match="no file matches"):
        gpt2.Tokens(str(tmp_path / "*.none"), 1, 8, 0, 1)


def test_the_default_model_has_the_parameters_of_gpt2():
    """124 million with one table; the head is apart here, which adds 50 304 x 768."""
    with torch.device("meta"):
        o = gpt2.parser().parse_args([])
        model = gpt2.Gpt2(o.vocabulary, o.width, o.blocks, o.heads, o.context)
    count = sum(p.numel() for p in model.parameters())
    assert count - model.head.weight.numel() == 123_568_128


def test_the_rate_rises_stays_and_falls():
    options = gpt2.parser().parse_args(["--steps", "100", "--warm-up", "10", "--cool-down", "0.5"])
    values = [gpt2.factor(step, options) for step in range(1, 101)]
    assert values[0] == 0.1
    assert values[9:51] == [1.0] * 42
    assert values[-1] == 0.02
    assert values[51:] == sorted(values[51:], reverse=True)
