"""Normalisations that are folded into weights, and what stands between: exact where it is done, and done only there."""

import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import consistency_ops as co
from consistency_ops.analysis.operator_norm import matrix_norm
from consistency_ops.nn import clip_spectral_norms_, fold_rms_norm
from support.lipschitz_networks import steepest


def uneven(norm, gain=50.0):
    """A norm that scales its first channel by ``gain`` and the others by 0.1."""
    with torch.no_grad():
        norm.weight.fill_(0.1)
        norm.weight[0] = gain
    return norm


def second_only(layer):
    """Weights that read the second channel only."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, 1] = 1.0
    return layer


def folds(model, shape, *, given=True):
    """The bounds of a model, which must hold; whether folding did anything."""
    model = model.double().eval()
    example = [torch.randn(2, *shape, dtype=torch.float64)] if given else []
    found = co.analysis.lipschitz_bound(model, *example)
    assert steepest(model, shape, steps=6) <= found.folded * (1 + 1e-9)
    return any("folded" in factor.note for factor in found.factors)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1), nn.AdaptiveAvgPool1d(4)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no example", "example"])
def test_pooling_over_the_features_lets_no_factor_pass(pool, given):
    behind = second_only(nn.Linear(4, 1, bias=False))
    if given or not isinstance(pool, nn.AdaptiveAvgPool1d):
        assert not folds(nn.Sequential(uneven(nn.BatchNorm1d(4)), pool, behind), (4,), given=given)
        front = nn.Linear(4, 4)
        assert (
            not folds(nn.Sequential(front, nn.ReLU(), uneven(nn.BatchNorm1d(4)), pool, behind), (4,), given=given)
            or given
        )


def test_pooling_within_the_channels_lets_factors_pass():
    model = nn.Sequential(uneven(nn.BatchNorm1d(4)), nn.MaxPool1d(2), second_only(nn.Conv1d(4, 2, 1)))
    assert folds(model, (4, 6))
    model = nn.Sequential(uneven(nn.BatchNorm2d(4)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    assert folds(model, (4, 2, 2)) and folds(model, (4, 2, 2), given=False)


@pytest.mark.parametrize(
    ("between", "shape", "folded"),
    [
        (nn.MaxPool2d(3, 1, 1), (4, 6), False),  # (N, C, L) is one image of N channels for torch
        (nn.AvgPool2d((3, 1), 1, (1, 0)), (4, 6), False),
        (nn.MaxPool1d(3, 1, 1), (4, 6), True),
        (nn.ReLU(), (4, 6), True),
        (nn.GELU(), (4, 6), True),
        (nn.Softmax(1), (4, 6), False),
    ],
    ids=str,
)
def test_what_stands_between_a_norm_and_a_convolution(between, shape, folded):
    assert folds(nn.Sequential(uneven(nn.BatchNorm1d(4)), between, second_only(nn.Conv1d(4, 2, 1))), shape) is folded


def test_a_flatten_of_some_dimensions_does_not_make_features_of_channels():
    # (N, C, H, W) to (N, C H, W): the Linear layer runs over W = 4, as many as the norm has channels.
    model = nn.Sequential(uneven(nn.BatchNorm2d(4)), nn.Flatten(1, 2), second_only(nn.Linear(4, 1, bias=False)))
    assert not folds(model, (4, 2, 4)) and not folds(model, (4, 2, 4), given=False)
    model = nn.Sequential(uneven(nn.BatchNorm2d(4)), nn.Flatten(), second_only(nn.Linear(32, 1, bias=False)))
    assert folds(model, (4, 2, 4)) and folds(model, (4, 2, 4), given=False)


def test_a_norm_over_tokens_is_not_folded_into_the_linear_layers_around_it():
    # (N, T, C) with T = C: the channels of a BatchNorm1d are the tokens.
    model = nn.Sequential(nn.Linear(4, 4), uneven(nn.BatchNorm1d(4)), second_only(nn.Linear(4, 1, bias=False)))
    assert not folds(model, (4, 4)) and not folds(model, (4, 4), given=False)
    assert folds(model, (4,))


def test_a_norm_that_is_read_twice_or_written_to_is_not_folded():
    class Twice(nn.Module):
        def __init__(self, write):
            super().__init__()
            self.norm, self.a, self.write = uneven(nn.BatchNorm1d(4)), second_only(nn.Linear(4, 4, bias=False)), write

        def forward(self, x):
            h = self.norm(x)
            if self.write:
                h.mul_(3)
            return self.a(h) + (x if self.write else h)

    assert not folds(Twice(False), (4,))
    assert folds(Twice(True), (4,)) in (False, True)


# ---- fold_rms_norm


def trained(norm):
    norm.running_ms.copy_(torch.rand(norm.num_features, generator=torch.Generator().manual_seed(3)) * 4 + 0.01)
    norm.num_batches.fill_(5)
    return norm


def norm4():
    return trained(co.nn.BatchRMSNorm(4))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (lambda lin: [norm4(), lin, nn.ReLU(), lin], (4,)),  # a layer at two places
        (lambda lin: [lin, norm4(), co.nn.Modulus(), lin, norm4(), lin], (4,)),
        (lambda lin: [norm4(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.Dropout(), lin], (4,)),
        (lambda lin: [nn.Conv1d(3, 4, 2), norm4(), nn.MaxPool1d(2), nn.Conv1d(4, 2, 1)], (3, 9)),
        (
            lambda lin: [
                nn.Conv2d(3, 4, 2), nn.Tanh(), norm4(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), lin,
            ],
            (3, 5, 5),
        ),
        (lambda lin: [norm4(), norm4(), lin], (4,)),
    ],
)  # fmt: skip
def test_the_folded_copy_computes_the_same(layers, shape):
    model = nn.Sequential(*layers(nn.Linear(4, 4))).double().eval()
    x = torch.randn(7, *shape, dtype=torch.float64)
    folded = fold_rms_norm(model.train())
    assert not any(isinstance(module, co.nn.BatchRMSNorm) for module in folded.modules())
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-12, atol=1e-12)


class Scaled(nn.Sequential):
    def forward(self, x):
        return 10 * super().forward(x)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output * 10)
    return layer


def patched(layer):
    layer.forward = lambda x: 10 * nn.functional.linear(x, layer.weight)
    return layer


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Scaled(norm4(), nn.Linear(4, 4)),
            TypeError,
            "must be a plain nn.Sequential, got .*Scaled with a forward",
        ),
        (lambda: nn.Sequential(norm4(), Scaled(nn.Linear(4, 4))), ValueError, r"layer, got Scaled \(1\)"),
        (lambda: nn.Sequential(norm4(), nn.MaxPool1d(3, 1, 1), nn.Linear(4, 4)), ValueError, r"got MaxPool1d \(1\)"),
        (lambda: nn.Sequential(norm4(), nn.AvgPool2d(3, 1, 1), nn.Conv1d(4, 4, 1)), ValueError, r"got AvgPool2d \(1\)"),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1), norm4(), nn.MaxPool2d(3, 1, 1), nn.Conv1d(4, 4, 1)),
            ValueError,
            r"got MaxPool2d \(2\)",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1), norm4(), nn.Linear(4, 4)),
            ValueError,
            r"got Linear \(2\) behind 1 dimensions of pixels",
        ),
        (lambda: nn.Sequential(norm4(), nn.Flatten(2), nn.Linear(4, 4)), ValueError, r"got Flatten \(1\)"),
        (
            lambda: hooked(nn.Sequential(norm4(), nn.Linear(4, 4))),
            NotImplementedError,
            r"model \(Sequential\): its forward hook",
        ),
        (
            lambda: nn.Sequential(norm4(), hooked(nn.Linear(4, 4))),
            NotImplementedError,
            r"1 \(Linear\): its forward hook",
        ),
        (
            lambda: nn.Sequential(hooked(norm4()), nn.Linear(4, 4)),
            NotImplementedError,
            r"0 \(BatchRMSNorm\): its forward hook",
        ),
        (lambda: nn.Sequential(norm4(), patched(nn.Linear(4, 4))), NotImplementedError, "its forward was replaced"),
        (
            lambda: nn.Sequential(norm4(), parametrizations.weight_norm(nn.Linear(4, 4))),
            NotImplementedError,
            r"1 \(ParametrizedLinear\): its weight is computed by a parametrization \(WeightNorm\)",
        ),
        (
            lambda: nn.Sequential(norm4(), prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)),
            NotImplementedError,
            "L1Unstructured recomputes its weight before every forward pass",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        fold_rms_norm(make())


# ---- clip_spectral_norms_


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (weight_norm, "WeightNorm recomputes its weight before every forward pass"),
        (torch.nn.utils.spectral_norm, "SpectralNorm recomputes its weight before every forward pass"),
        (parametrizations.weight_norm, r"its weight is computed by a parametrization \(WeightNorm\)"),
        (parametrizations.spectral_norm, r"its weight is computed by a parametrization \(SpectralNorm\)"),
        (parametrizations.orthogonal, r"its weight is computed by a parametrization \(Orthogonal\)"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.3), "L1Unstructured recomputes its weight"),
        (patched, "its forward was replaced on this object"),
    ],
)
def test_weights_that_are_recomputed_are_not_clipped_and_nothing_else_is_then(wrap, reason):
    model = nn.Sequential(nn.Linear(6, 6), wrap(nn.Linear(6, 6)))
    with torch.no_grad():
        model[0].weight.mul_(10)
    before = model[0].weight.clone()
    with pytest.raises(NotImplementedError, match=rf"clip_spectral_norms_: 1 \(.*Linear\): {reason}"):
        clip_spectral_norms_(model, 0.3)
    assert torch.equal(model[0].weight, before)


def test_lazy_and_infinite_weights_are_not_clipped():
    with pytest.raises(NotImplementedError, match=r"0 \(LazyLinear\): its weight has no shape yet"):
        clip_spectral_norms_(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or Inf in 0\.weight"):
        clip_spectral_norms_(model)


def test_complex_weights_are_projected():
    layer = nn.Linear(6, 6, dtype=torch.complex64)
    with torch.no_grad():
        layer.weight.copy_(1j * torch.randn(6, 6) + 0.1 * torch.randn(6, 6))
    before = layer.weight.detach().clone()
    assert clip_spectral_norms_(nn.Sequential(layer), 0.3) == pytest.approx(matrix_norm(before)[0], rel=1e-6)
    sigma = torch.linalg.svdvals(layer.weight.detach())
    torch.testing.assert_close(sigma, torch.linalg.svdvals(before).clamp_max(0.3))
    least = (torch.linalg.svdvals(before) - sigma).norm()
    torch.testing.assert_close((layer.weight - before).norm(), least)


# ---- random ones


def random_sequential(rng, depth=5):
    """Layers for samples (4, 6) or (4,), norms among them, also in places where they cannot be folded."""
    pixels = rng.random() < 0.6
    layers = [nn.Conv1d(4, 4, 1) if pixels else nn.Linear(4, 4)]
    between = [
        nn.ReLU(), co.nn.Modulus(), nn.LeakyReLU(0.3), nn.Tanh(), nn.Dropout(), nn.Identity(), nn.PReLU(4),
        nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.AdaptiveAvgPool1d(4),
        nn.Sequential(nn.ReLU(), nn.Dropout()),
    ]  # fmt: skip
    width = 6 if pixels else 4
    for _ in range(depth):
        layers += [norm4()] * (rng.random() < 0.6)
        layers += [rng.choice(between)] * rng.randint(0, 2)
        layers.append(rng.choice([layers[0], nn.Conv1d(4, 4, 1), nn.Linear(width, width)]))
    return nn.Sequential(*layers).double().eval(), ((4, 6) if pixels else (4,))


def test_random_networks_are_folded_rightly_or_refused():
    counts = {"folded": 0, "refused": 0}
    for seed in range(400):
        rng = random.Random(seed)
        model, shape = random_sequential(rng)
        x = torch.randn(3, *shape, dtype=torch.float64)
        try:
            expected = model(x)
        except (RuntimeError, ValueError):  # does not fit
            continue
        try:
            folded = fold_rms_norm(model)
        except ValueError:
            counts["refused"] += 1
            continue
        counts["folded"] += 1
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    print(counts)
    assert counts["folded"] >= 40 and counts["refused"] >= 40


def test_after_clipping_every_linear_layer_computes_with_a_small_matrix():
    for seed in range(20):
        model, _ = random_sequential(random.Random(seed))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.mul_(5)
        clip_spectral_norms_(model, 0.3)
        norms = [matrix_norm(module.weight)[0] for module in model.modules() if isinstance(module, nn.Linear)]
        assert all(norm <= 0.3 * (1 + 1e-9) for norm in norms)
