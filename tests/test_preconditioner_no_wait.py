"""A step never waits for the device: it runs on fake tensors, of which no value can be read.

With a torch for CUDA also on a fake CUDA device, which shows tensors of two devices in one operation; no GPU is needed.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import consistency_ops as co
from consistency_ops import attachment
from consistency_ops.engine import layer_step

NETWORKS = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(32, 64), co.nn.Modulus(), co.nn.BatchRMSNorm(64), nn.Linear(64, 10)),
        (50, 32),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 10)
        ),
        (5, 4, 8, 8),
    ),
    "attention": lambda: (nn.TransformerEncoderLayer(32, 2, batch_first=True), (5, 4, 32)),
}
OPTIONS = {
    "defaults": {},
    "every": dict(every=2),
    "decay": dict(decay=0.9),
    "decay-every": dict(decay=0.9, every=2),
    "max_rows": dict(max_rows=20),
    "absolute": dict(scaling="absolute", chunk=16),
    "whiten": dict(mode="whiten"),
    "whiten-every": dict(mode="whiten", every=2, decay=0.0),
    "whiten-outputs": dict(mode="whiten", outputs=True),
    "whiten-dct": dict(mode="whiten", dct=True),
    "whiten-outputs-every": dict(mode="whiten", outputs=True, every=2, decay=0.0),
    "schedule": dict(damping=lambda step: 1 / (1 + step)),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.version.cuda, reason="torch without CUDA"))]


class Names(TorchDispatchMode):
    """The operators of this library that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "consistency_ops":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    # Subclasses of Tensor keep their gradient; the fake ones stand for plain tensors here.
    monkeypatch.setattr(layer_step, "is_plain", lambda grad: type(grad) is FakeTensor)
    monkeypatch.setattr(layer_step, "as_plain", lambda grad: grad)
    # Reads on purpose, in the first step that has gradients: whether all their layers have seen inputs.
    monkeypatch.setattr(attachment, "notice_unseen", lambda *_: False)
    with FakeTensorMode(), torch.device(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def step(model, optimizer, shape):
    optimizer.zero_grad()
    model(torch.randn(shape))
    for p in model.parameters():  # the engine's threads want a real device for backward
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_reads_nothing_back(network, options, dtype, device):
    model, shape = NETWORKS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    co.Preconditioner(model, optimizer, **options)
    for _ in range(3):
        step(model, optimizer, shape)
    assert all(p.grad.device.type == device and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_one_call_corrects_all_layers(network, device):
    model, shape = NETWORKS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    co.Preconditioner(model, optimizer)
    optimizer.step = counted = Counted(optimizer.step)
    step(model, optimizer, shape)
    assert counted.names == ["foreach_precondition_"]


class Counted:
    def __init__(self, call):
        self.call, self.names = call, None

    def __call__(self):
        with Names() as seen:
            self.call()
        self.names = seen.names


def test_reading_a_value_would_be_noticed(device):
    with pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()
