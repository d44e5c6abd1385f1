"""The preconditioner corrects every kind of layer as a dense float64 computation does."""

import copy

import pytest
import torch
from torch import nn

from consistency_ops import layers
from consistency_ops.engine import layer_types
from consistency_ops.engine.capture_states import STATE_SIZE
from consistency_ops.preconditioner import Preconditioner
from support.training import DAMPING, dense


def check(layer, x, rows, scaling="absolute", joint=True, view=lambda w: w):
    torch.manual_seed(1)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    model = nn.Sequential(layer)
    pre = Preconditioner(model, damping=DAMPING, scaling=scaling, chunk=256, bias=joint)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    weight = view(layer.weight.grad)
    bias = None if layer.bias is None else layer.bias.grad
    expected, expected_bias = dense(
        weight.flatten(2) if weight.dim() > 2 else weight[:, :, None],
        bias,
        rows,
        getattr(layer, "groups", 1),
        scaling,
        joint,
    )
    address = layer.weight.grad.data_ptr()
    pre.step()
    assert layer.weight.grad.data_ptr() == address
    got = view(layer.weight.grad)
    torch.testing.assert_close(
        got.double(), expected.view(got.shape), rtol=2e-5, atol=2e-5 * expected.abs().max().item()
    )
    if bias is not None:
        bound = 2e-5 * expected_bias.abs().max().item()
        torch.testing.assert_close(layer.bias.grad.double(), expected_bias, rtol=2e-5, atol=bound)
    assert pre.stats()["failed_chunks"] == 0
    return pre


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("shape", [(40, 7), (5, 8, 7), (7,), (2, 3, 4, 7)], ids=str)
def test_linear(shape, joint, scaling):
    x = torch.randn(shape)
    check(nn.Linear(7, 5), x, x.reshape(-1, 7), scaling, joint)


CONVOLUTIONS = [
    (nn.Conv1d, dict(kernel_size=3)),
    (nn.Conv1d, dict(kernel_size=5, stride=2, padding=2, dilation=2, groups=2)),
    (nn.Conv2d, dict(kernel_size=3)),
    (nn.Conv2d, dict(kernel_size=1, bias=False)),
    (nn.Conv2d, dict(kernel_size=(3, 2), stride=(2, 1), padding=1, dilation=(1, 2))),
    (nn.Conv2d, dict(kernel_size=3, padding="same", groups=2)),
    (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="reflect")),
    (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="replicate")),
    (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="circular", bias=False)),
    (nn.Conv2d, dict(kernel_size=3, groups=4)),
    (nn.Conv3d, dict(kernel_size=(1, 2, 3))),
    (nn.Conv3d, dict(kernel_size=2, stride=2, groups=2, bias=False)),
]


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS, ids=str)
def test_convolution(kind, options, scaling):
    layer = kind(4, 8, **options)
    x = torch.randn(3, 4, *[9, 8, 7][: layer.weight.dim() - 2])
    check(layer, x, x.movedim(1, -1).flatten(0, -2), scaling)


def gradient_taps(weight, groups):
    """(out, in / groups, taps) of a transposed convolution's weight, (in, out / groups, *kernel)."""
    parts = [w.transpose(0, 1).flatten(2) for w in weight.chunk(groups)]
    return torch.cat(parts)


TRANSPOSED = [
    (nn.ConvTranspose1d, dict(kernel_size=3)),
    (nn.ConvTranspose1d, dict(kernel_size=4, stride=2, padding=1, output_padding=1, dilation=2, groups=2)),
    (nn.ConvTranspose2d, dict(kernel_size=3, stride=2, bias=False)),
    (nn.ConvTranspose2d, dict(kernel_size=(3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2)),
    (nn.ConvTranspose2d, dict(kernel_size=3, groups=4)),
    (nn.ConvTranspose3d, dict(kernel_size=(1, 2, 3), stride=2)),
    (nn.ConvTranspose3d, dict(kernel_size=2, groups=2, bias=False)),
]


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
@pytest.mark.parametrize(("kind", "options"), TRANSPOSED, ids=str)
def test_transposed_convolution(kind, options, scaling):
    layer = kind(4, 8, **options)
    x = torch.randn(3, 4, *[5, 6, 4][: layer.weight.dim() - 2])
    check(layer, x, x.movedim(1, -1).flatten(0, -2), scaling, view=lambda w: gradient_taps(w, layer.groups))


@pytest.mark.parametrize("options", [dict(every=2), dict(decay=0.5)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_with_a_stored_inverse(options, groups):
    layer, twin = nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(4, 6, 3, groups=groups)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for module, settings in ((layer, options), (twin, {})):
        pre = Preconditioner(module, seed=3, **settings)
        module(x).square().sum().backward()
        pre.step()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "one image"])
def test_convolution_of_any_strides(layout):
    x = torch.randn(3, 4, 9, 8)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    else:
        x = x[0]
    check(nn.Conv2d(4, 6, 3), x, x.movedim(-3, -1).reshape(-1, 4))


def test_linear_of_any_strides():
    x = torch.randn(7, 6, 5, 4).permute(1, 3, 2, 0)
    check(nn.Linear(7, 5), x, x.reshape(-1, 7))


@pytest.mark.parametrize(("lazy", "shape", "unit_dim"), [(nn.LazyLinear, (6, 5), -1), (nn.LazyConv2d, (3, 4, 6, 6), 1)])
def test_lazy_layer_is_covered_from_its_first_forward(lazy, shape, unit_dim):
    layer = lazy(8) if lazy is nn.LazyLinear else lazy(8, 3)
    x = torch.randn(shape)
    model = nn.Sequential(layer)
    pre = Preconditioner(model, damping=DAMPING, scaling="absolute")
    model(x).square().sum().backward()
    plain = layer.weight.grad.clone()
    rows = x.movedim(unit_dim, -1).flatten(0, -2)
    gradient = plain.flatten(2) if plain.dim() > 2 else plain[:, :, None]
    expected, _ = dense(gradient, layer.bias.grad, rows)
    pre.step()
    torch.testing.assert_close(layer.weight.grad.double(), expected.view(plain.shape), rtol=1e-4, atol=1e-4)


def test_float64_layer_is_computed_in_float64():
    layer = nn.Linear(9, 4).double()
    x = torch.randn(30, 9, dtype=torch.float64)
    pre = Preconditioner(nn.Sequential(layer), damping=DAMPING, scaling="absolute", chunk=256)
    layer(x).square().sum().backward()
    expected, expected_bias = dense(layer.weight.grad[:, :, None], layer.bias.grad, x)
    pre.step()
    torch.testing.assert_close(layer.weight.grad, expected[:, :, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, expected_bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer_is_computed_in_float32(dtype):
    layer = nn.Linear(9, 4).to(dtype)
    x = torch.randn(30, 9, dtype=dtype)
    pre = Preconditioner(nn.Sequential(layer), damping=DAMPING, scaling="absolute", chunk=256)
    layer(x).square().sum().backward()
    expected, _ = dense(layer.weight.grad[:, :, None], layer.bias.grad, x)
    pre.step()
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight.grad.double(), expected[:, :, 0], rtol=bound, atol=bound)


class TransposedLinear(nn.Module):
    """A linear layer that stores (in, out), as GPT-2 checkpoints do."""

    def __init__(self, units, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_users_layer_type_is_covered_once_registered():
    model = nn.Sequential(TransposedLinear(7, 5), nn.Linear(5, 2))
    assert "unsupported type" in Preconditioner(model).summary()
    layers.register(TransposedLinear, matrix=lambda weight: weight.T)
    try:
        x = torch.randn(20, 7)
        check(TransposedLinear(7, 5), x, x, view=lambda w: w.T)
    finally:
        del layer_types._TYPES[TransposedLinear]


def test_conv1d_of_transformers_is_known_by_name():
    """A class of that module and name is enough; the package is not needed."""
    kind = type("Conv1D", (TransposedLinear,), {"__module__": "transformers.pytorch_utils"})
    x = torch.randn(20, 7)
    check(kind(7, 5), x, x, view=lambda w: w.T)


def test_conv1d_of_transformers_itself():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.randn(4, 5, 7)
    check(conv1d(5, 7), x, x.flatten(0, 1), view=lambda w: w.T)


def test_linear_of_torch_geometric_is_known_by_name():
    """It is no subclass of nn.Linear."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)

    names = {"__module__": "torch_geometric.nn.dense.linear", "forward": forward}
    layer = type("Linear", (nn.Module,), names)()
    layer.weight, layer.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(5))
    x = torch.randn(20, 7)
    check(layer, x, x)


def test_layers_of_timm_are_known_by_name():
    """Their forward is their own, and does what that of their base does."""

    def linear(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def convolution(self, x):  # padded as TensorFlow does, on the right and below
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    names = {"__module__": "timm.layers.linear", "forward": linear}
    x = torch.randn(20, 7)
    check(type("Linear", (nn.Linear,), names)(7, 5), x, x)
    names = {"__module__": "timm.layers.conv2d_same", "forward": convolution}
    images = torch.randn(3, 4, 6, 6)
    check(type("Conv2dSame", (nn.Conv2d,), names)(4, 5, 2), images, images.movedim(1, -1).reshape(-1, 4))


def test_subclass_is_covered_as_its_base():
    class Named(nn.Linear):
        pass

    x = torch.randn(20, 7)
    check(Named(7, 5), x, x)


def test_registration_is_checked():
    with pytest.raises(TypeError, match="must be a subclass of torch.nn.Module"):
        layers.register(torch.relu)
    with pytest.raises(ValueError, match="unit_dim must be negative"):
        layers.register(nn.Bilinear, unit_dim=1)
    with pytest.raises(TypeError, match="weight must be the name of a parameter, got 3"):
        layers.register(nn.Bilinear, weight=3)
    with pytest.raises(TypeError, match="matrix must be a function of the weight, got 'T'"):
        layers.register(nn.Bilinear, matrix="T")


@pytest.mark.parametrize("matrix", [lambda w: w.T.contiguous(), lambda w: w * 2, lambda w: w.flatten(), lambda w: None])
def test_a_matrix_that_is_no_view_is_refused(matrix, monkeypatch):
    """The correction would go to a copy, and nobody would notice."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

    monkeypatch.setattr(layer_types, "_TYPES", dict(layer_types._TYPES))
    layers.register(Transposed, bias=None, matrix=matrix)
    with pytest.raises(ValueError, match="matrix= of the registered Transposed must return a view of the weight"):
        Preconditioner(nn.Sequential(Transposed()))


def test_rows_of_large_inputs_are_a_uniform_sample():
    """Each row is taken as often as any other, over many steps, also when calls of different sizes are pooled."""
    layer = nn.Linear(1, 1, bias=False)
    pre = Preconditioner(nn.Sequential(layer), max_rows=16, seed=3)
    capture = pre._layers[0].capture
    sizes, taken, steps = (37, 5, 30, 64), torch.zeros(136), 600
    for _ in range(steps):
        begin = 0
        for size in sizes:
            layer(torch.arange(begin, begin + size, dtype=torch.float32)[:, None])
            begin += size
        rows = capture.rows[: int(capture.count), 0].long()
        assert 0 < len(rows) <= 16 and len(rows.unique()) == len(rows)
        taken[rows] += 1
        pre.step()
    expected = taken.sum() / len(taken)
    # A row is taken with probability p in each of the steps: five standard deviations of the binomial.
    p = expected / steps
    assert (taken - expected).abs().max() < 5 * (steps * p * (1 - p)).sqrt()


def test_capture_agrees_with_the_reference_sample():
    from consistency_ops import reference

    layer = nn.Linear(3, 2)
    pre = Preconditioner(nn.Sequential(nn.Identity(), layer), max_rows=10, seed=7)
    x = torch.randn(95, 3)
    for step in range(5):
        layer(x)
        capture = pre._layers[0].capture
        expected = x[reference.sample_rows(95, 10, seed=7, step=step, layer=0)]
        assert torch.equal(capture.rows[: int(capture.count)], expected)
        pre.step()


@pytest.mark.parametrize("layout", ["rows", "channels first"])
def test_capture_operators_are_well_registered(layout):
    x = torch.randn(9, 4) if layout == "rows" else torch.randn(2, 4, 5)
    rows, state = torch.zeros(8, 4), torch.zeros(3, STATE_SIZE, dtype=torch.int64)
    capture = torch.ops.consistency_ops.capture_rows_.default
    torch.library.opcheck(capture, (rows, state, x, 1, -1 if layout == "rows" else 1, 7))
    torch.library.opcheck(capture, (rows, state, x.requires_grad_(), 1, -1 if layout == "rows" else 1, 7))
    torch.library.opcheck(torch.ops.consistency_ops.capture_mark_.default, (rows, state, 1, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=torch.zeros(4, 8).T), "rows must be contiguous"),
        (dict(state=torch.zeros(3, 2, dtype=torch.int64)), "state must be contiguous int64"),
        (dict(index=3), r"index must be in \[0, 3\), got 3"),
        (dict(x=torch.zeros(9, 5)), "must have 4 units"),
        (dict(x=torch.zeros(9, 4, dtype=torch.float64)), "at least as wide"),
        (dict(x=torch.zeros(9, 4, dtype=torch.int32)), "x must be float32"),
        (dict(unit_dim=2), "dimension 2 of x"),
    ],
    ids=str,
)
def test_capture_operator_refuses_what_it_cannot_write(change, message):
    arguments = dict(
        rows=torch.zeros(8, 4),
        state=torch.zeros(3, STATE_SIZE, dtype=torch.int64),
        x=torch.zeros(9, 4),
        index=0,
        unit_dim=1,
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.consistency_ops.capture_rows_(**{**arguments, **change}, seed=0)


def test_several_calls_leave_what_one_call_leaves():
    layer = nn.Linear(6, 3)
    model = nn.Sequential(layer)
    twin = copy.deepcopy(model)
    pre, twin_pre = Preconditioner(model, seed=1), Preconditioner(twin, seed=1)
    x = torch.randn(50, 6)
    model(x).sum().backward()
    for part in x.split(17):
        twin(part).sum().backward()
    a, b = pre._layers[0].capture, twin_pre._layers[0].capture
    assert torch.equal(a.rows[:50], b.rows[:50]) and int(a.count) == int(b.count) == 50


@pytest.mark.parametrize("swapped", [False, True])
def test_keywords_of_a_transposed_convolution(swapped):
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    pre = Preconditioner(layer)
    keywords = {"input": torch.randn(2, 3, 4, 4), "output_size": (9, 9)}
    layer(**dict(reversed(keywords.items())) if swapped else keywords).sum().backward()
    assert int(pre._layers[0].capture.count) == 32


def test_a_registered_bias_of_another_shape_is_not_joined():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(1, 3))

        def forward(self, x):
            return x @ self.weight.T + self.bias

    layers.register(Wide)
    try:
        model = Wide()
        pre = Preconditioner(model)
        model(torch.randn(5, 4)).square().sum().backward()
        before = model.weight.grad.clone(), model.bias.grad.clone()
        pre.step()
        assert not torch.equal(model.weight.grad, before[0]) and torch.equal(model.bias.grad, before[1])
    finally:
        del layer_types._TYPES[Wide]


@pytest.mark.parametrize("registered", [False, True])
def test_an_attribute_called_groups_makes_no_convolution(registered, monkeypatch):
    """Only what the layer type says counts: a subclass of a linear layer may use the name for its own purpose."""

    class Experts(nn.Linear):
        groups = 2

    if registered:
        monkeypatch.setattr(layer_types, "_TYPES", dict(layer_types._TYPES))
        layers.register(Experts)
    x = torch.randn(50, 16)
    torch.manual_seed(0)
    own = Experts(16, 8)
    plain = nn.Linear(16, 8)
    plain.load_state_dict(own.state_dict())
    for layer in (own, plain):
        model = nn.Sequential(layer)
        pre = Preconditioner(model, chunk=8)
        model(x).square().sum().backward()
        pre.step()
    assert torch.equal(own.weight.grad, plain.weight.grad) and torch.equal(own.bias.grad, plain.bias.grad)


def test_a_registered_convolution_names_its_groups(monkeypatch):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.weight = 2, nn.Parameter(torch.randn(6, 4, 3, 3))

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, groups=self.parts)

    monkeypatch.setattr(layer_types, "_TYPES", dict(layer_types._TYPES))
    layers.register(Grouped, unit_dim=-3, bias=None, groups="parts")
    torch.manual_seed(0)
    own, x = Grouped(), torch.randn(5, 8, 6, 6)
    plain = nn.Conv2d(8, 6, 3, groups=2, bias=False)
    plain.weight.data.copy_(own.weight.data)
    for layer in (own, plain):
        model = nn.Sequential(layer)
        pre = Preconditioner(model)
        model(x).square().sum().backward()
        pre.step()
    assert torch.equal(own.weight.grad, plain.weight.grad)
