"""``mode="whiten", dct=True``: the optimizer has the kernels of convolutions as cosine coefficients."""

import copy

import pytest
import torch
from scipy import fft
from torch import nn

from consistency_ops.engine.kernel_cosines import cosines
from consistency_ops.preconditioner import Preconditioner
from support.training import backward, data, mlp
from support.whitening import (
    CPU_OPTIMIZERS,
    adamw,
    makes_the_optimizers_own_steps,
    optimizer_of,
    resumes_bitwise,
    same,
    steps_of,
    train_all_kinds_of_layers,
    trains_in_bfloat16,
    whitening,
    with_kernels_and_with_torch,
)


def convnet():
    """Takes the rows of :func:`support.training.data`."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(6, 4, (2, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)),
    )


def coefficients(kernels):
    """By scipy: of (outputs, units, *kernel) over the kernel."""
    axes = tuple(range(2, kernels.dim()))
    return torch.from_numpy(fft.dctn(kernels.numpy(), axes=axes, norm="ortho"))


def kernels_of(coefficients):
    axes = tuple(range(2, coefficients.dim()))
    return torch.from_numpy(fft.idctn(coefficients.numpy(), axes=axes, norm="ortho"))


@pytest.mark.parametrize("shape", [(3,), (5, 5), (1, 4), (2, 3, 4)])
def test_the_basis_is_the_orthonormal_cosine_transform(shape):
    kernels = torch.randn(4, 3, *shape, dtype=torch.float64)
    basis = cosines(torch.Size(shape), torch.float64, torch.device("cpu"))
    found = (kernels.flatten(2) @ basis.T).view_as(kernels)
    torch.testing.assert_close(found, coefficients(kernels), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep_norm", [True, False])
@pytest.mark.parametrize("outputs", [False, True])
def test_one_step_of_adamw_by_hand(outputs, keep_norm):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 4, (3, 2), bias=False).double(), torch.randn(6, 5, 7, 7, dtype=torch.float64)
    optimizer = optimizer_of("AdamW", layer.parameters(), weight_decay=0.1)
    Preconditioner(layer, optimizer, mode="whiten", outputs=outputs, dct=True, keep_norm=keep_norm)
    before = layer.weight.detach().clone()
    (layer(x) * torch.randn(4, 1, 1, dtype=torch.float64)).square().sum().backward()
    grad = layer.weight.grad.clone()
    optimizer.step()

    pixels = x.movedim(1, -1).reshape(-1, 5)
    right = torch.linalg.inv(whitening(pixels.T @ pixels / len(pixels), 0.1))
    white, left = torch.einsum("iu,ouhw->oihw", right, grad), torch.eye(4, dtype=torch.float64)
    if outputs:
        columns = white.transpose(0, 1).flatten(2).transpose(1, 2).reshape(-1, 4)
        left = torch.linalg.inv(whitening(columns.T @ columns / len(columns), 0.1))
        white = torch.einsum("po,oihw->pihw", left, white)
    twin = nn.Parameter(before.clone())
    twin.grad = coefficients(white)
    optimizer_of("AdamW", [twin], weight_decay=0.1).step()
    decayed = before * (1 - 0.01 * 0.1)
    displacement = twin.detach() - decayed
    move = torch.einsum("po,pihw,iu->ouhw", left, kernels_of(displacement), right)
    if keep_norm:
        move *= displacement.norm() / move.norm()
    torch.testing.assert_close(layer.weight.detach(), decayed + move, rtol=1e-8, atol=1e-11)


def test_an_optimizer_that_knows_no_basis_makes_the_same_steps():
    """SGD with momentum and coupled decay; and no linear layer is touched, whatever the optimizer."""
    models = [convnet().double() for _ in range(3)]
    for model, options in zip(models, ({}, dict(dct=True), None), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        if options is not None:
            Preconditioner(model, optimizer, mode="whiten", chunk=8, every=2, **options)
        for step in range(25):
            optimizer.zero_grad()
            x, y = data(seed=step)
            backward(model, x.double(), y)
            optimizer.step()
    same(*models[:2], rtol=1e-9, atol=1e-12)
    assert float((models[0][1].weight - models[2][1].weight).detach().norm()) > 1e-3
    plain, with_dct = mlp(), mlp()
    steps_of(plain, adamw(plain), 3)
    steps_of(with_dct, adamw(with_dct), 3, dct=True)
    same(plain, with_dct)


def test_adam_makes_other_steps():
    models = [convnet(), convnet()]
    for model, dct in zip(models, (False, True), strict=True):
        steps_of(model, adamw(model), 3, dct=dct)
    assert float((models[0][1].weight - models[1][1].weight).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", [name for name in CPU_OPTIMIZERS if name != "Muon"])  # Muon takes matrices only
def test_without_a_gradient_the_optimizer_makes_its_own_step_bit_for_bit(name):
    decay = {} if name == "Rprop" else dict(weight_decay=0.1)  # Rprop has none
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 4, 3, bias=False), torch.randn(6, 5, 7, 7)
    plain = copy.deepcopy(layer)
    optimizer, twin = (optimizer_of(name, m.parameters(), **decay) for m in (layer, plain))
    Preconditioner(layer, optimizer, mode="whiten", outputs=True, dct=True, chunk=4)
    makes_the_optimizers_own_steps(layer, plain, optimizer, twin, x)


@pytest.mark.parametrize("options", [{}, dict(outputs=True), dict(decay=0.0, every=2)], ids=str)
def test_resume_is_bitwise(options):
    resumes_bitwise(25, make=convnet, dct=True, **options)


@pytest.mark.parametrize("coupled", [False, True])
def test_torchs_own_operations_compute_the_same(coupled):
    kind = torch.optim.Adam if coupled else torch.optim.AdamW
    models = with_kernels_and_with_torch(
        lambda model: kind(model.parameters(), lr=0.01, weight_decay=0.3), 24, make=convnet, dct=True, every=2
    )
    same(*models, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("chunk", [4, None])
def test_all_kinds_of_layers_train(name, chunk, outputs):
    assert train_all_kinds_of_layers(name, 24, outputs=outputs, dct=True, chunk=chunk)["failed_chunks"] == 0


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_kernels_of_other_dimensions_and_layouts_train(kind):
    torch.manual_seed(0)
    layer = kind(4, 6, 3)
    optimizer = adamw(layer)
    pre = Preconditioner(layer, optimizer, mode="whiten", outputs=True, dct=True)
    x = torch.randn(8, 4, *[5] * (layer.weight.dim() - 2))
    if kind is nn.Conv3d:
        layer.to(memory_format=torch.channels_last_3d)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0] and pre.stats()["failed_chunks"] == 0


def test_weights_in_bfloat16_train():
    trains_in_bfloat16(convnet(), 30, outputs=True, dct=True)


def test_it_is_named_and_refused_where_it_means_nothing():
    model = mlp()
    assert "outputs=True, dct=True" in repr(steps_of(model, adamw(model), 1, outputs=True, dct=True))
    with pytest.raises(ValueError, match="dct must be False without mode='whiten', got True"):
        Preconditioner(mlp(), adamw(mlp()), dct=True)
    with pytest.raises(ValueError, match="dct must be True or False, got 1"):
        Preconditioner(mlp(), adamw(mlp()), mode="whiten", dct=1)
