"""Experts in one parameter of three dimensions: stand-ins for those of transformers and torchtitan, known by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops import Preconditioner

EXPERTS, WIDTH, INNER = 4, 6, 5


def route(module, x, index, gate):
    """Each expert by itself, over the tokens that are its own; `gate` makes the inner rows."""
    out = torch.zeros_like(x)
    module.inner = []
    for e in range(EXPERTS):
        token = (index == e).any(1).nonzero().flatten()
        if len(token):
            inner = gate(x[token], e)
            module.inner.append(inner.detach())
            out = out.index_add(0, token, module.last(inner, e))
    return out


class ToyExperts(nn.Module):
    """As Mixtral's: (experts, out, in), one expert after the other."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 3)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 3)

    def forward(self, hidden_states, index):
        def gate(x, e):
            a, b = F.linear(x, self.gate_up_proj[e]).chunk(2, -1)
            return F.silu(a) * b

        return route(self, hidden_states, index, gate)

    def last(self, inner, e):
        return F.linear(inner, self.down_proj[torch.tensor(e)])


class TransposedExperts(nn.Module):
    """As GPT-OSS's: (experts, in, out), with biases."""

    def __init__(self):
        super().__init__()
        self.is_transposed = True
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) / 3)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 3)
        self.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))

    def forward(self, hidden_states, index):
        def gate(x, e):
            both = x @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
            return both[..., ::2].sigmoid() * both[..., 1::2]

        return route(self, hidden_states, index, gate)

    def last(self, inner, e):
        return inner @ self.down_proj[e] + self.down_proj_bias[e]


class BatchedExperts(TransposedExperts):
    """As Llama 4's: a batched product over all experts, each of which sees all tokens."""

    def __init__(self):
        super().__init__()
        del self.is_transposed, self.gate_up_proj_bias, self.down_proj_bias

    def forward(self, hidden_states, index):
        a, b = torch.bmm(hidden_states.expand(EXPERTS, -1, -1), self.gate_up_proj).chunk(2, -1)
        inner = F.silu(a) * b
        self.inner = [inner.detach().flatten(0, 1)]
        return torch.bmm(inner, self.down_proj).sum(0)


class GatheredExperts(ToyExperts):
    """As the batched implementation of transformers: a copy of the weight for every token."""

    def forward(self, hidden_states, index):
        chosen = index[:, 0]
        a, b = torch.bmm(self.gate_up_proj[chosen], hidden_states.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        inner = F.silu(a) * b
        self.inner = [inner.detach()]
        return torch.bmm(self.down_proj[chosen], inner.unsqueeze(-1)).squeeze(-1)


class GroupedExperts(nn.Module):
    """As torchtitan's: three weights, used in another precision."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 3)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 3)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 3)

    def forward(self, x, index):
        weights = [w.bfloat16().transpose(-2, -1) for w in (self.w1, self.w2, self.w3)]
        self.inner, out = [], []
        for e, part in enumerate(x.bfloat16().chunk(EXPERTS)):
            inner = F.silu(torch.matmul(part, weights[0][e])) * torch.matmul(part, weights[2][e])
            self.inner.append(inner.detach())
            out.append(torch.matmul(inner, weights[1][e]))
        return torch.cat(out).float()


for _kind in (ToyExperts, TransposedExperts, BatchedExperts, GatheredExperts):
    _kind.__module__ = "transformers.models.toy.modeling_toy"
GroupedExperts.__module__ = "torchtitan.models.moe.moe"


class Network(nn.Module):
    def __init__(self, kind, recompute=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts, self.recompute = nn.Linear(WIDTH, WIDTH), kind(), recompute

    def forward(self, x):
        generator = torch.Generator().manual_seed(len(x))
        index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in x])  # the last one is idle
        self.hidden = self.first(x)
        if self.recompute is None:
            return self.experts(self.hidden, index)
        return checkpoint(self.experts, self.hidden, index, use_reentrant=self.recompute)


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("kind", [ToyExperts, TransposedExperts, BatchedExperts, GatheredExperts, GroupedExperts])
def test_every_expert_is_corrected_with_the_moment_of_all_rows(kind, recompute):
    model = Network(kind, recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    for rows in (24, 32):
        optimizer.zero_grad()
        model(torch.randn(rows, WIDTH)).square().sum().backward()
        experts = model.experts
        inside = experts.w2 if kind is GroupedExperts else experts.down_proj
        outside = experts.w3 if kind is GroupedExperts else experts.gate_up_proj
        transposed = kind in (TransposedExperts, BatchedExperts)
        out_in = (lambda w: w.permute(2, 1, 0)) if transposed else (lambda w: w.permute(1, 2, 0))
        raw = inside.grad.clone(), outside.grad.clone()
        optimizer.step()
        for weight, grad, seen in (
            (inside, raw[0], torch.cat(experts.inner)),
            (outside, raw[1], model.hidden.detach()),
        ):
            a = seen.double().T @ seen.double() / len(seen)
            a = a / (a.trace() / len(a)) + 0.1 * torch.eye(len(a), dtype=a.dtype)
            got, wanted = out_in(weight.grad), torch.einsum("oie,ij->oje", out_in(grad).double(), a.inverse())
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    table = pre.summary()
    assert f"experts.{'w2' if kind is GroupedExperts else 'down_proj'}" in table and "no input" not in table


def test_nothing_is_left_behind_and_nothing_goes_with_a_copy():
    model = Network(ToyExperts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    copied = copy.deepcopy(model)
    copied(torch.randn(8, WIDTH)).sum().backward()
    assert [layer.captured_rows() for layer in pre._layers] == [0, 0, 0]
    assert model.experts._forward_hooks and not copied.experts._forward_hooks
    model.eval()
    model(torch.randn(8, WIDTH))
    with pytest.raises(RuntimeError):
        model.train()(torch.randn(8, WIDTH + 1))
    assert torch.overrides._get_current_function_mode() is None
    pre.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_raises_ends_the_watch():
    model = Network(ToyExperts)
    pre = Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(RuntimeError):
        model.experts(torch.randn(8, WIDTH + 1), torch.zeros(8, 2, dtype=torch.int64))
    assert torch.overrides._get_current_function_mode() is None
    pre.remove()


def test_a_compiled_model_corrects_what_it_sees(caplog):
    model = Network(BatchedExperts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = Preconditioner(model, optimizer)
    torch.compile(model.experts, backend="aot_eager")(torch.randn(8, WIDTH), None).sum().backward()
    optimizer.step()
    assert "experts.gate_up_proj" in pre.summary()


class LowRank(nn.Linear):
    """As loralib's: two trained matrices beside a frozen weight, in one module."""

    def __init__(self):
        super().__init__(WIDTH, INNER)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(INNER, 2))

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out + F.dropout(x, 0.0) @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1) * 2.0


LowRank.__module__, LowRank.__qualname__ = "loralib.layers", "Linear"


def test_low_rank_matrices_of_loralib():
    torch.manual_seed(0)
    model = LowRank()
    optimizer = torch.optim.SGD([model.lora_A, model.lora_B], lr=0.0)
    pre = Preconditioner(model, optimizer)
    x = torch.randn(20, WIDTH)
    model(x).square().sum().backward()
    raw = model.lora_A.grad.clone(), model.lora_B.grad.clone()
    optimizer.step()
    inner = (x @ model.lora_A.T).detach()
    for weight, grad, rows in ((model.lora_A, raw[0], x), (model.lora_B, raw[1], inner)):
        want = co.precondition(grad, rows, damping=0.1, scaling="trace")
        torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-5)
    assert pre.stats()["coverage"] == 1.0


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def forward(self, x):
        return torch.einsum("ni,eio->no", x, self.weight)


def test_own_experts_are_registered_with_their_matrix(monkeypatch):
    monkeypatch.setattr("consistency_ops.engine.layer_types._TYPES", dict(co.engine.layer_types._TYPES))
    co.layers.register(Own, bias=None, matrix=lambda weight: weight.permute(2, 1, 0))
    model = Own()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Preconditioner(model, optimizer)
    x = torch.randn(20, WIDTH)
    model(x).square().sum().backward()
    raw = model.weight.grad.clone()
    optimizer.step()
    a = x.T @ x / len(x)
    a = a / (a.trace() / len(a)) + 0.1 * torch.eye(len(a))
    torch.testing.assert_close(model.weight.grad, torch.einsum("ij,ejo->eio", a.inverse(), raw), rtol=1e-3, atol=1e-4)
