"""The Lipschitz bound: exact where it says so, never below a dense norm, and a sentence where there is none."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import consistency_ops as co
from consistency_ops.analysis.operator_norm import convolution_norm, gram_bound, matrix_norm
from support.lipschitz_networks import Function, ResNet, contractive_style, norm_with_statistics, steepest


def dense_norm(function, shape):
    """Spectral norm of a linear function of inputs (1, *shape)."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        zero = function(torch.zeros(1, *shape, dtype=torch.float64))
        return float(torch.linalg.matrix_norm((function(basis) - zero).flatten(1), 2))


def bound_of(*modules, example=None):
    model = nn.Sequential(*modules).double()
    return co.analysis.lipschitz_bound(model, *(() if example is None else (example,)))


# ---- norms of single operations


def test_matrices():
    for shape in ((5, 9), (9, 5), (1, 4), (40, 40)):
        weight = torch.randn(shape, dtype=torch.float64)
        value, exact = matrix_norm(weight)
        truth = float(torch.linalg.matrix_norm(weight, 2))
        assert exact and truth <= value <= truth * (1 + 1e-12)
    assert matrix_norm(torch.zeros(3, 4))[0] < 1e-30
    assert matrix_norm(torch.full((2, 2), math.nan))[0] == math.inf


def test_gram_iteration_comes_from_above():
    matrices = torch.randn(6, 30, 20, dtype=torch.float64)
    truth = torch.linalg.svdvals(matrices)[:, 0]
    last = torch.full_like(truth, math.inf)
    for iterations in range(14):
        bound = gram_bound(matrices, iterations)
        assert (bound >= truth).all() and (bound <= last * (1 + 1e-11)).all()
        assert (bound <= truth * 20 ** (0.5 ** (iterations + 1)) * (1 + 1e-9)).all()
        last = bound
    assert torch.allclose(last, truth, rtol=1e-3)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("groups", "dims"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_are_bounded_and_nearly_reached(kernel, stride, dilation, groups, dims):
    weight = torch.randn(4, 6 // groups, *[kernel] * dims, dtype=torch.float64)
    options = dict(stride=stride, dilation=dilation, groups=groups)
    size = 60 if dims == 1 else 12
    pad = dilation * (kernel - 1)
    conv = {1: F.conv1d, 2: F.conv2d}[dims]
    truth = dense_norm(lambda x: conv(x, weight, padding=pad, **options), (6, *[size] * dims))
    bound, exact = convolution_norm(weight, stride=(stride,), dilation=(dilation,), groups=groups)
    assert bound >= truth
    assert bound <= truth * (1.03 if dims == 1 else 1.35)  # the image is finite: most of the gap is its border
    if exact:
        assert bound == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (1, 1)])
def test_circular_convolutions_are_exact(stride, kernel, dilation):
    conv = nn.Conv2d(3, 4, kernel, stride, dilation * (kernel // 2), dilation, padding_mode="circular").double()
    x = torch.zeros(1, 3, 6, 12, dtype=torch.float64)
    found = bound_of(conv, example=x)
    assert found.factors[0].exact
    assert found.bound == pytest.approx(dense_norm(conv, (3, 6, 12)), rel=1e-10)
    assert bound_of(conv).bound >= found.bound * (1 - 1e-12)  # for images of any size


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),  # pixels appear more than once
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=3, padding_mode="replicate"),
        nn.Conv2d(3, 4, (3, 2), padding="same"),
        nn.Conv1d(6, 4, 3, padding=(1,), groups=2, padding_mode="replicate"),
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose1d(6, 4, 5, stride=2, groups=2),
        nn.Conv3d(2, 3, 3, padding=1),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2),
        nn.AvgPool1d(3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.ZeroPad2d(2),
        nn.PixelShuffle(1),
    ],
    ids=str,
)
def test_linear_operations_are_bounded_by_their_dense_norm(layer):
    layer = layer.double()
    channels = getattr(layer, "in_channels", 3)
    dims = 1 if "1d" in type(layer).__name__ else 3 if "3d" in type(layer).__name__ else 2
    shape = (channels, *[5, 7, 4][:dims])
    found = bound_of(layer, example=torch.randn(1, *shape, dtype=torch.float64))
    truth = dense_norm(layer, shape)
    assert found.bound >= truth * (1 - 1e-12)
    if found.factors[0].exact:
        assert found.bound == pytest.approx(truth, rel=1e-9)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        assert found.factors[0].exact


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(2, 2, 1), (3, 2, 1), (3, 1, 1), (2, 3, 1), (2, 2, 2), (3, 2, 2), (3, 2, 3)]
)
def test_max_pooling_is_bounded_and_reached(kernel, stride, dilation):
    pool = nn.MaxPool1d(kernel, stride, dilation=dilation)
    found = bound_of(pool)
    base = torch.zeros(1, 1, 40, dtype=torch.float64)
    gains = []
    for i in range(15, 25):  # one pixel grows: every window that holds it grows
        x = base.clone()
        x[0, 0, i] = 1
        gains.append(float((pool(x) - pool(base)).norm()))
    assert found.bound == pytest.approx(max(gains))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Softplus(),
     nn.ELU(2.0), nn.LeakyReLU(0.2), nn.LeakyReLU(-3.0), nn.PReLU(init=1.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
     nn.SELU(), nn.Mish(), nn.Hardswish(), co.nn.Modulus(), nn.Tanhshrink(), nn.LogSigmoid()],
    ids=str,
)  # fmt: skip
def test_activations_have_their_largest_slope(activation):
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(activation.double()(x).sum(), x)
    largest = float(slope.abs().max())
    assert largest <= bound_of(activation).bound <= largest * (1 + 1e-3) + 1e-9


# ---- networks


def test_bound_is_the_product_of_the_method():
    """The bound is kept as a logarithm: against the products themselves, plain and folded."""
    model = contractive_style().eval()
    plain, folded, gain = 1.0, 1.0, None
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().double()
            plain *= float(torch.linalg.svdvals(weight)[0])
            folded *= float(torch.linalg.svdvals(weight if gain is None else weight * gain)[0])
            gain = None
        elif isinstance(layer, co.nn.BatchRMSNorm):
            gain = layer(torch.ones(1, 10))[0].double()
            plain *= float(gain.max())
    found = co.analysis.lipschitz_bound(model)
    assert found.bound == pytest.approx(plain, rel=1e-9)
    assert found.folded == pytest.approx(folded, rel=1e-9)
    assert found.folded < 0.5 * found.bound
    # The same folding as a network: its plain bound is our folded one.
    assert co.analysis.lipschitz_bound(co.nn.fold_rms_norm(model)).bound == pytest.approx(folded, rel=1e-6)
    assert steepest(model.double(), (12,)) <= folded


def test_deep_networks_stay_in_the_log_domain():
    linear = nn.Linear(8, 8)
    nn.init.orthogonal_(linear.weight)
    linear.weight.data *= 100
    found = co.analysis.lipschitz_bound(nn.Sequential(*[linear] * 400))
    assert found.log_bound == pytest.approx(400 * math.log(100), rel=1e-6)
    assert found.bound == math.inf and not found.contractive


def test_batch_norms_fold_into_the_convolution_before_and_the_linear_behind():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), norm_with_statistics(6),
        nn.Conv2d(6, 5, 3, groups=1), nn.ReLU(), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4, 3),
    )  # fmt: skip
    for norm in (model[1], model[7]):
        nn.init.uniform_(norm.weight, -2, 2)
        nn.init.uniform_(norm.running_var, 0.2, 5)
    model.double()
    found = co.analysis.lipschitz_bound(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [f.note for f in found.factors].count("folded into its neighbour") == 3
    assert found.log_folded < found.log_bound
    assert model.training and model[1].training  # as it was
    model.eval()
    # Folded factors equal those of a network whose weights were multiplied by hand.
    d1 = model[1].weight.abs() / (model[1].running_var + model[1].eps).sqrt()
    w1, _ = convolution_norm((model[0].weight * d1[:, None, None, None]).detach())
    assert math.exp(found.factors[0].log_folded) == pytest.approx(w1, rel=1e-9)
    d7 = (model[7].weight.abs() / (model[7].running_var + model[7].eps).sqrt()).repeat_interleave(4)
    truth = float(torch.linalg.svdvals((model[9].weight * d7).detach())[0])
    assert math.exp(found.factors[-1].log_folded) == pytest.approx(truth, rel=1e-9)
    assert steepest(model, (3, 8, 8), steps=5) <= found.folded <= found.bound


def test_a_norm_over_channels_is_not_folded_into_a_linear_layer_over_pixels():
    model = nn.Sequential(nn.Conv1d(6, 6, 1), norm_with_statistics(6), nn.Linear(6, 6)).double().eval()
    example = torch.zeros(1, 6, 6, dtype=torch.float64)
    for found in (co.analysis.lipschitz_bound(model), co.analysis.lipschitz_bound(model, example)):
        assert dense_norm(model, (6, 6)) <= found.folded
    wrong = nn.Sequential(nn.Linear(6, 6), norm_with_statistics(6), nn.Linear(6, 6)).double().eval()
    assert dense_norm(wrong, (6, 6)) <= co.analysis.lipschitz_bound(wrong, example).folded


def test_residual_networks():
    model = ResNet().double().eval()
    example = torch.zeros(1, 3, 6, 6, dtype=torch.float64)
    found = co.analysis.lipschitz_bound(model, example)
    assert found.notes == []
    assert co.analysis.lipschitz_bound(model).notes == [
        "the terms of sums are taken to have equal shapes; an example input checks this"
    ]
    gain = 1.0
    for block in model.layers:
        inner = convolution_norm(block.conv1.weight)[0] * convolution_norm(block.conv2.weight)[0] / (1 + 1e-5)
        gain *= inner + (1 if block.short is None else matrix_norm(block.short.weight.flatten(1))[0])
    gain *= matrix_norm(model.fc.weight)[0] / 6  # mean of 36 pixels
    assert found.bound == pytest.approx(gain, rel=1e-6)
    assert steepest(model, (3, 6, 6), steps=4) <= found.folded <= found.bound


def test_other_graphs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 3)
            self.c = nn.Linear(7, 2)

        def forward(self, x):
            x = x.view(x.size(0), -1)
            y = torch.cat([torch.tanh(self.a(x)) * 3, F.leaky_relu(self.b(x), 2.0) / 4], dim=1)
            return 0.5 * self.c(y) - self.c(y[:, :7]) + 1

    model = Odd().double()
    a, b, c = (matrix_norm(m.weight)[0] for m in (model.a, model.b, model.c))
    found = co.analysis.lipschitz_bound(model)
    assert found.bound == pytest.approx(math.hypot(3 * a, 2 * b / 4) * (0.5 * c + c), rel=1e-9)
    assert steepest(model, (5,)) <= found.bound
    roa = co.nn.ROAFeedForward(6, 8, 3, 20).double()
    found = co.analysis.lipschitz_bound(roa)
    ends = matrix_norm(roa.encoder.weight)[0] * matrix_norm(roa.decoder.weight)[0]
    assert found.log_bound == pytest.approx(roa.jacobian_bounds().log_upper + math.log(ends), rel=1e-6)
    norm = nn.LayerNorm(6).double()
    x = 1e-4 * torch.randn(200, 6, dtype=torch.float64)
    near = torch.stack([torch.linalg.matrix_norm(torch.autograd.functional.jacobian(norm, v), 2) for v in x])
    assert near.max() <= co.analysis.lipschitz_bound(norm).bound == pytest.approx(1 / math.sqrt(1e-5))


def test_a_single_module_and_rules():
    assert co.analysis.lipschitz_bound(nn.Linear(3, 2)).bound > 0

    class Cube(nn.Module):
        def forward(self, x):
            return x.clamp(-1, 1) ** 3

    model = nn.Sequential(Cube(), nn.ReLU())
    with pytest.raises(NotImplementedError, match="lipschitz_bound: clamp .at clamp.: there is no rule for clamp"):
        co.analysis.lipschitz_bound(model)
    assert co.analysis.lipschitz_bound(model, rules={Cube: lambda module: 3.0}).bound == pytest.approx(3)
    with pytest.raises(ValueError, match="the constant of 0 must be at least 0, got -1.0"):
        co.analysis.lipschitz_bound(model, rules={Cube: lambda module: -1.0})


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


TWICE = {  # with the constant
    "x + x": (lambda x: x + x, 2),
    "add": (lambda x: torch.add(x, x, alpha=3), 4),
    "by name": (lambda x: torch.add(x, other=x), 2),
    "both by name": (lambda x: torch.add(input=x, other=torch.relu(x)), 2),
    "sub": (lambda x: torch.sub(torch.relu(x), other=x, alpha=5), 6),
    "cat": (lambda x: torch.cat(tensors=[x, x], dim=1), math.sqrt(2)),
    "again": (lambda x: (lambda y: y + y)(x + x), 4),
    "number by name": (lambda x: torch.mul(x, other=3), 3),
    "by zero": (lambda x: x / 0, math.inf),
    "not a number": (lambda x: x * math.nan, math.inf),
}


@pytest.mark.parametrize("name", TWICE)
def test_operands_that_are_one_signal_or_given_by_name(name):
    f, constant = TWICE[name]
    assert co.analysis.lipschitz_bound(Function(f)).bound == pytest.approx(constant, rel=1e-12)


class Tenfold(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


def test_a_forward_of_the_users_is_looked_into():
    with pytest.raises(NotImplementedError, match="there is no rule for linear"):
        co.analysis.lipschitz_bound(nn.Sequential(Tenfold(3, 3)))
    rules = {Tenfold: lambda module: 10 * matrix_norm(module.weight)[0]}
    model = Tenfold(3, 3)
    assert co.analysis.lipschitz_bound(model, rules=rules).bound == pytest.approx(rules[Tenfold](model))


@pytest.mark.parametrize(
    "broken", [nn.BatchNorm1d(3), co.nn.BatchRMSNorm(3), nn.LayerNorm(3), nn.Linear(3, 3)], ids=lambda m: str(m)[:9]
)
def test_what_is_not_a_number_certifies_nothing(broken):
    for tensor in (*broken.buffers(), *broken.parameters()):
        if tensor.is_floating_point():
            tensor.data.fill_(math.nan)
    model = nn.Sequential(nn.Linear(4, 3), broken, nn.Linear(3, 2))
    bound = co.analysis.lipschitz_bound(model)
    assert bound.bound == bound.folded == math.inf and not bound.contractive
    assert co.analysis.certified_radius(model, torch.randn(5, 4)).tolist() == [0.0] * 5


class Product(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Broadcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 4))

    def forward(self, x):
        return x + self.shift


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Embedding(3, 4)), "0 (Embedding): a table of numbers is no continuous map"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "0 (BatchNorm1d): it has no running statistics"),
        (nn.Sequential(nn.LSTM(3, 4)), "0 (LSTM): recurrent modules have no rule"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "0 (AdaptiveAvgPool2d): its windows depend on the size of the image"),
        (Attention(), "there is no rule for chunk"),
        (Branching(), "the model cannot be traced by torch.fx"),
        (Product(), "mul (at mul): it combines several signals"),
        (Broadcast(), "add (at add): a tensor is combined with the signal and may be broadcast; pass an example input"),
        (Function(lambda x: x * x), "mul (at mul): it combines several signals"),
        (Function(F.dropout), "dropout (at dropout): it is random in evaluation mode, too"),
        (Function(lambda x: torch.div(x, 2, rounding_mode="floor")), "div (at div): rounding is not continuous"),
        (nn.Sequential(nn.Upsample(scale_factor=2)), "0 (Upsample): there is no rule for this module"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_constant_is_a_sentence(model, message):
    with pytest.raises(NotImplementedError) as caught:
        co.analysis.lipschitz_bound(model)
    assert str(caught.value).startswith("lipschitz_bound: ") and message in str(caught.value)
