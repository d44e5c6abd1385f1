"""What a Preconditioner keeps from step to step: the calculator of docs/choosing.md, and buffers as large as needed."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def kept_bytes():
    """The function as the page has it."""
    text = (ROOT / "docs" / "choosing.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def kept_bytes" in block)
    names = {}
    exec(code.split("\nmodel = ")[0], names)
    return names["kept_bytes"]


class RMSNorm(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """Attention with fewer keys than queries, and a gated feed-forward part, without biases."""

    def __init__(self, units, heads, hidden):
        super().__init__()
        self.heads, self.size = heads, units // heads
        self.q_proj, self.o_proj = nn.Linear(units, units, bias=False), nn.Linear(units, units, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(units, units // 2, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = (nn.Linear(units, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, units, bias=False)
        self.input_norm, self.post_norm = RMSNorm(units), RMSNorm(units)

    def forward(self, x):
        h = self.input_norm(x)
        q = self.q_proj(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (
            p(h).unflatten(-1, (self.heads // 2, self.size)).transpose(1, 2).repeat_interleave(2, 1)
            for p in (self.k_proj, self.v_proj)
        )
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, units=128, blocks=4, heads=8, hidden=344, words=500):
        super().__init__()
        self.embed = nn.Embedding(words, units)
        self.blocks = nn.Sequential(*(LlamaBlock(units, heads, hidden) for _ in range(blocks)))
        self.norm, self.head = RMSNorm(units), nn.Linear(units, words, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.down = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.down(x))


def resnet(width=16, classes=10):
    stages = [(1, width, width), (2, width, 2 * width), (2, 2 * width, 4 * width)]
    blocks = [Residual(i, o, s) for s, i, o in stages]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class Experts(nn.Module):
    """Every expert sees a part of the rows."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])

    def forward(self, x):
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.split([3, 20, 41]), strict=True)])


class Twice(nn.Module):
    """A layer that is called several times."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        for _ in range(5):
            x = torch.tanh(self.cell(x))
        return self.head(x)


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


def tokens():
    return torch.randint(0, 500, (4, 64))


def mlp(*widths):
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS = {
    "mlp": lambda: (mlp(784, 300, 100, 10), torch.randn(500, 784)),
    "deep mlp": lambda: (mlp(*[64] * 20), torch.randn(100, 64)),
    "more rows than max_rows": lambda: (mlp(30, 40, 5), torch.randn(5000, 30)),
    "llama": lambda: (Llama(), tokens()),
    "llama in bfloat16": lambda: (Llama().bfloat16(), tokens()),
    "resnet": lambda: (resnet(), torch.randn(8, 3, 32, 32)),
    "grouped convolutions": lambda: (
        nn.Sequential(nn.Conv1d(12, 24, 3, groups=3), nn.ReLU(), nn.Conv1d(24, 6, 1)),
        torch.randn(7, 12, 50),
    ),
    "vision transformer": lambda: (
        nn.Sequential(nn.Conv2d(3, 48, 4, 4), nn.Flatten(2), Transposed(), LlamaBlock(48, 4, 96), nn.Linear(48, 10)),
        torch.randn(4, 3, 32, 32),
    ),
    "experts": lambda: (Experts(), torch.randn(64, 24)),
    "a layer called five times": lambda: (Twice(), torch.randn(33, 20)),
    "float64": lambda: (mlp(50, 60, 7).double(), torch.randn(90, 50, dtype=torch.float64)),
}


def buffers(pre):
    """Bytes of the row buffers, each counted once."""
    rows = {id(c.rows): c.rows for layer in pre._layers if (c := layer.capture) is not None and c.rows is not None}
    return sum(r.untyped_storage().nbytes() for r in rows.values())


@pytest.mark.parametrize(
    "options", [{}, dict(max_rows=70), dict(decay=0.5, every=2), dict(chunk=None, decay=0.5)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_the_calculator_is_right_within_five_percent(name, options, kept_bytes):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    expected = kept_bytes(model, x, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pre = co.Preconditioner(model, optimizer, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    matrices = ("consistency_covariance", "consistency_inverse")
    stored = [v for entries in optimizer.state.values() for k, v in entries.items() if k.startswith(matrices)]
    measured = buffers(pre) + sum(v.untyped_storage().nbytes() for v in stored)
    assert abs(measured - expected) <= 0.05 * expected, (measured, expected)


def test_layers_that_share_an_input_have_one_buffer():
    model = Llama(blocks=1)
    pre = co.Preconditioner(model)
    model(tokens()).square().mean().backward()
    held = {layer.name: layer.capture.rows is not None for layer in pre._layers if layer.capture}
    assert [name for name, has in held.items() if not has] == [f"blocks.0.{n}_proj" for n in ("k", "v", "up")]


def test_a_buffer_grows_with_the_rows_and_no_further():
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = co.Preconditioner(model, optimizer, max_rows=100)
    capture, sizes = pre._layers[0].capture, []
    assert capture.rows is None
    for calls in ([10], [10], [10, 10, 10], [10, 10, 10], [2], [90, 90], [5]):
        inputs = [torch.randn(n, 6) for n in calls]
        for x in inputs:
            model(x).sum().backward()
        kept = capture.rows[: int(capture.count)]
        if sum(calls) <= 100:
            assert torch.equal(kept, torch.cat(inputs))
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(capture.rows))
    assert sizes == [10, 10, 30, 30, 30, 100, 100]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_kept_until_others_come(half):
    model = nn.Sequential(nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    capture = co.Preconditioner(model, optimizer)._layers[0].capture
    first, second, third = torch.randn(9, 6).to(half), torch.randn(5, 6), torch.randn(4, 6).to(half)
    with torch.autocast("cpu", torch.bfloat16):
        model(first)
        assert capture.rows.dtype == half and len(capture.rows) == 9
        for x in (second, third):
            model(x)
    assert capture.rows.dtype == torch.float32
    assert torch.equal(capture.rows[: int(capture.count)], torch.cat([first.float(), second, third.float()]))


def test_a_compiled_model_has_the_largest_buffers_where_they_stay():
    torch._dynamo.reset()
    model = mlp(6, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = co.Preconditioner(model, optimizer, max_rows=64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    held = []
    for rows in (10, 12, 100):
        compiled(torch.randn(rows, 6)).sum().backward()
        model(torch.randn(7, 6)).sum().backward()
        held.append([layer.capture.rows for layer in pre._layers])
        assert [int(layer.capture.count) for layer in pre._layers] == [
            min(rows + 7, int(c)) for c in [layer.capture.count for layer in pre._layers]
        ]
        optimizer.step()
        optimizer.zero_grad()
    assert all(a is b for later in held[1:] for a, b in zip(held[0], later, strict=True))
    assert [r.shape for r in held[0]] == [(64, 6), (64, 8)]
