"""In-place operations, views and hidden state: counted in the bound, or refused with a sentence."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from support.lipschitz_networks import Function, quotient_norm


class Written(nn.Module):
    """An orthogonal map, statements that write, another orthogonal map: the bound is the factor of the statements."""

    def __init__(self, write, act=None):
        super().__init__()
        self.a, self.b = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
        for layer in (self.a, self.b):
            nn.init.orthogonal_(layer.weight)
        self.write, self.act = write, act
        self.register_buffer("buffer", torch.ones(1, 6, dtype=torch.float64))

    def forward(self, x):
        h = self.a(x)
        return self.b(self.write(self, h, x))


def statement(text):
    """A function of (self, h, x) that runs the statements and returns h."""
    names = {"torch": torch, "F": F}
    body = "\n    ".join(["def write(self, h, x):", *text.split("; "), "return h"])
    exec(body, names)
    return names["write"]


COUNTED = {  # statements, with the factor that they have
    "h.mul_(10)": 10,
    "h.div_(0.1)": 10,
    "h *= 10": 10,
    "h /= 0.1": 10,
    "h.add_(x, alpha=3)": 4,
    "h.sub_(x, alpha=3)": 4,
    "h += x": 2,
    "h -= x": 2,
    "k = h; k += x": 2,
    "k = h; k *= 3; k -= x": 4,
    "torch.mul(h, 7.0, out=h)": 7,
    "torch.add(h, x, alpha=2, out=h)": 3,
    "y = h.mul_(5); h = h + y": 10,
    "y = torch.mul(h, 5); h = torch.add(h, y, out=y)": 6,
    "h.add_(h)": 2,
    "F.leaky_relu(h, 5.0, inplace=True)": 5,
    "F.leaky_relu_(h, 5.0)": 5,
    "F.elu_(h, 4.0)": 4,
    "torch.relu_(h); h.mul_(3)": 3,
    "h.sigmoid_(); h.mul_(8)": 2,
    "self.act(h)": 5,
    "self.act(h); h = h + x": 6,
    "h.neg_(); h.abs_(); h.mul_(2)": 2,
    "h.clone().mul_(10)": 1,
    "k = h.clone(); k.mul_(10); h = k": 10,
    "k = h.view(-1, 6).mul_(10); h = k": 10,
    "h = h.transpose(0, 1).mul_(2).transpose(0, 1)": 2,
}


@pytest.mark.parametrize("text", COUNTED)
@pytest.mark.parametrize("given", [False, True], ids=["no example", "example"])
def test_a_write_counts_wherever_the_tensor_is_used_afterwards(text, given):
    model, x = Written(statement(text), nn.LeakyReLU(5.0, inplace=True)), -torch.rand(1, 6, dtype=torch.float64)
    found = co.analysis.lipschitz_bound(model, *([x] if given else []))
    assert found.bound == pytest.approx(COUNTED[text], rel=1e-9)
    seen = max(quotient_norm(model, sign * torch.rand(1, 6, dtype=torch.float64)) for sign in (-1, 1, 1e-3))
    assert seen <= found.folded * (1 + 1e-6)


REFUSED = {  # statements, with the reason
    "h[:, :6].mul_(10)": "it writes into memory that a, which is used later, may share",
    "h[:, :3].mul_(10)": "it writes into memory that a, which is used later, may share",
    "h.view(-1).mul_(10)": "it writes into memory that a, which is used later, may share",
    "h.T.mul_(10)": "it writes into memory that a, which is used later, may share",
    "h.detach().mul_(10)": "it writes into memory that a, which is used later, may share",
    "h.data.mul_(10)": "it writes into memory that a, which is used later, may share",
    "v = h.T; v += 3 * v": "it writes into memory that a, which is used later, may share",
    "v = h.reshape(-1, 6); h.mul_(10); h = v": "may share",
    "v = h.flatten(1); self.act(v)": "may share",
    "v = F.dropout(h, 0.5, False); v.mul_(10)": "may share",
    "torch.mul(x, 10.0, out=h[:, :6])": "may share",
    "torch.mul(x, 10.0, out=self.buffer); h = self.buffer": "it writes to a parameter, a buffer or a constant",
    "self.buffer.copy_(h); h = self.buffer": "it writes to a parameter, a buffer or a constant",
    "self.buffer.mul_(2); h = h + self.buffer": "it writes to a parameter, a buffer or a constant",
    "self.b.weight.mul_(10)": "it writes to a parameter, a buffer or a constant",
    "h[:, 0] = x[:, 0]": "an assignment to a part of a tensor cannot be followed",
    "h[:] = 10 * h": "an assignment to a part of a tensor cannot be followed",
    "h.data = 10 * h": "an attribute of a tensor is assigned, which cannot be followed",
    "h.data *= 10": "cannot be followed",
    "torch.Tensor.mul_(h, 10)": "the model cannot be traced by torch.fx",
    "h.copy_(10 * h)": "copy_ (at copy_): it combines several signals",
    "torch._foreach_mul_([h], 10.0)": "it writes to a parameter, a buffer or a constant",
    "h.pow_(2)": "there is no rule for pow_",
    "h **= 2": "there is no rule for ipow",
    "h = h.view(torch.int64).view(torch.float64)": "rounding is not continuous",
    "h = torch.cat([h.view(torch.complex128).real] * 2, 1)": "it reads the bits of numbers as other numbers",
    "self.calls = getattr(self, 'calls', 0) + 1; h = h * self.calls": "two calls in a row compute different functions",
    "h = h * float(torch.rand(()))": "two calls in a row compute different functions",
    "h = h + torch.rand(1, 6)": "two calls in a row compute different functions",
    "h = h * 3 if type(x) is torch.Tensor else h": "the traced graph gives another result than the model",
    "h = h.to(torch.bfloat16).to(torch.float64)": "rounding is not continuous",
    "self.act.negative_slope = 9.0; h = self.act(h); self.act.negative_slope = 5.0": "forward changes it before",
    "h = torch.func.functional_call(self.b, {'weight': torch.eye(6).double()}, (h,))": "forward changes it before",
    "h = h + h[:1]": "it picks samples of the batch, which others may then depend on",
    "h = h[0][None]": "it picks samples of the batch, which others may then depend on",
    "h = F.log_softmax(h, 0)": "it runs over the samples, of which there may be any number",
    "with torch.autocast('cpu'): h = self.a(h)": "it rounds to a coarser type",
    "h = h.half().double()": "there is no rule for half",
    "h = h.to(torch.int32).to(torch.float64)": "rounding is not continuous",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(text):
    model, x = Written(statement(text), nn.LeakyReLU(5.0, inplace=True)), torch.randn(1, 6, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotImplementedError) as caught:
        co.analysis.lipschitz_bound(model, x)
    assert str(caught.value).startswith("lipschitz_bound: ") and REFUSED[text] in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "calls") and not any(name.startswith("_tensor") for name in vars(model))


def test_the_radius_counts_writes_too():
    model = Function(lambda x: x.clone().mul_(10))
    x = torch.tensor([[1.0, 0.5]])
    assert float(co.analysis.certified_radius(model, x)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-6)


def test_a_branch_on_the_type_of_the_input_is_the_one_that_a_tensor_takes():
    model = Function(lambda x: 10 * x if isinstance(x, torch.Tensor) and torch.is_tensor(x) else x)
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(10)


def test_attributes_are_those_of_tensors():
    model = Function(lambda x: x if hasattr(x, "logits") or getattr(x, "sample", None) is not None else 10 * x)
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(10)


@pytest.mark.parametrize("f", [lambda x: x if type(x) is int else 3 * x, lambda x: x if x.__class__ is int else 3 * x])
def test_a_branch_on_an_exact_type_needs_an_example(f):
    with pytest.raises(NotImplementedError, match="it asks for the type of a value; pass an example input"):
        co.analysis.lipschitz_bound(Function(f))
    assert co.analysis.lipschitz_bound(Function(f), torch.randn(1, 3)).bound == pytest.approx(3)


class Gated(nn.Module):
    def forward(self, x, gate=None, scale=2.0):
        return x * scale if gate is not None else 10 * x


def test_arguments_left_out_have_their_defaults():
    model, x = Gated(), torch.randn(1, 3)
    assert co.analysis.lipschitz_bound(model).bound == pytest.approx(10)
    assert co.analysis.lipschitz_bound(model, x).bound == pytest.approx(10)
    assert co.analysis.lipschitz_bound(model, x, True, 3.0).bound == pytest.approx(3)


class Remembering(nn.Module):
    """Harmless: what is kept is never read."""

    def forward(self, x):
        self.last, self.seen = x * 2, [x]
        return x * 3


def test_what_a_forward_pass_keeps_is_as_before():
    model = Remembering()
    model.last = None
    assert co.analysis.lipschitz_bound(model, torch.randn(1, 3)).bound == pytest.approx(3)
    assert model.last is None and not hasattr(model, "seen")


class Accumulating(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = torch.zeros(1, 3)

    def forward(self, x):
        self.state.add_(1)
        return x + self.state


def test_a_plain_tensor_that_forward_writes_to_is_refused():
    with pytest.raises(NotImplementedError, match="Accumulating: forward writes to its attribute state"):
        co.analysis.lipschitz_bound(Accumulating(), torch.randn(1, 3))


@torch.fx.wrap
def relu(x):
    return 10 * x


class Wrapped(nn.Module):
    def forward(self, x):
        return relu(x)


def test_a_function_of_the_users_is_not_taken_for_the_one_of_its_name():
    with pytest.raises(NotImplementedError, match="relu .at relu.: it is no function of torch"):
        co.analysis.lipschitz_bound(Wrapped())
