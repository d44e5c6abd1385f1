"""What real training programs do with optimizers, rows and states; each has the right value beside it."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import consistency_ops as co
from consistency_ops import Preconditioner
from support.training import assert_equal, backward, data, gradients, mlp, train


def corrected(layer, rows, grads):
    """Weight gradient for these rows, by the functional operator."""
    weight, bias = (grad.clone() for grad in grads)
    return co.precondition(weight, rows, damping=0.1, scaling="trace", bias_grad=bias)[0]


def assert_corrected(layer, optimizer, rows):
    grads = [p.grad.detach().clone() for p in layer.parameters()]
    optimizer.step()
    torch.testing.assert_close(layer.weight.grad.detach(), corrected(layer, rows, grads), rtol=1e-4, atol=1e-6)


def linear(lr=0.0):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    return layer, torch.optim.SGD(layer.parameters(), lr=lr)


class Wrapper(torch.optim.Optimizer):
    """Updates through another optimizer, with a step of its own that calls no hooks of its own."""

    def __init__(self, name, inner):
        setattr(self, name, inner)
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, {}
        self._inner = inner

    def step(self, closure=None):
        return self._inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self._inner.zero_grad(set_to_none)


class Plain:
    """As ``schedulefree.ScheduleFreeWrapper`` and fastai's ``OptimWrapper``: no torch optimizer at all."""

    def __init__(self, name, inner):
        setattr(self, name, inner)
        self._inner, self.param_groups = inner, inner.param_groups

    def step(self):
        self._inner.step()

    def zero_grad(self):
        self._inner.zero_grad()


@pytest.mark.parametrize("kind", [Wrapper, Plain])
@pytest.mark.parametrize(
    "name", ["optimizer", "base_optimizer", "_base_optimizer", "original_optimizer", "optim", "opt", "base"]
)
def test_a_wrapped_optimizer_corrects_as_the_inner_one(kind, name):
    models, updated = [mlp(), mlp()], []
    for model in models:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = kind(name, inner) if model is models[1] else inner
        pre = Preconditioner(model, outer)
        assert Preconditioner.of(outer) == [pre]
        train(model, outer, 3)
        assert pre.steps == 3
        updated.append(list(model.parameters()))
    assert_equal(*updated)


def test_a_list_of_optimizers_updates_as_one_does_and_saves_with_each():
    one, two = mlp(), mlp()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    Preconditioner(one, optimizer, decay=0.5)
    parts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (two[0], two[2], two[4])]
    pre = Preconditioner(two, parts, decay=0.5)
    train(one, optimizer, 3)
    for step in range(3):
        two.zero_grad()
        backward(two, *data(seed=step))
        for part in parts:
            part.step()
    assert_equal(one.parameters(), two.parameters())
    assert pre.stats()["layers"] == 3 and pre.stats()["coverage"] == 1.0
    for part in parts:
        assert any(key == "consistency_covariance" for key in part.state_dict()["state"][0])
    pre.remove()
    assert not any(key.startswith("consistency") for p in parts for s in p.state.values() for key in s)


class Scheduled(torch.optim.SGD):
    """A subclass whose step calls that of its base: torch calls the hooks of both."""

    fails = False

    def step(self, scale=None):
        loss = super().step()
        if self.fails:
            raise RuntimeError("after the step")
        return loss


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(every=2), dict(mode="whiten", outputs=True)], ids=str)
def test_a_step_that_calls_the_step_of_its_base_counts_once(options):
    first, second = mlp(), mlp()
    plain = torch.optim.SGD(first.parameters(), lr=0.1)
    other = Scheduled(second.parameters(), lr=0.1)
    one, two = Preconditioner(first, plain, **options), Preconditioner(second, other, **options)
    train(first, plain, 4)
    train(second, other, 4)
    assert one.steps == two.steps == 4
    assert_equal(list(first.parameters()), list(second.parameters()))
    other.fails = True
    with pytest.raises(RuntimeError, match="after the step"):
        train(second, other, 1, first=4)
    other.fails = False
    train(first, plain, 3, first=4)
    train(second, other, 2, first=5)
    assert one.steps == two.steps == 7


def test_optimizers_that_share_a_parameter_are_refused_and_leave_nothing():
    model = mlp()
    parts = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(ValueError, match="must hold every parameter once"):
        Preconditioner(model, parts)
    first = Preconditioner(model, parts[0])
    with pytest.raises(ValueError, match="must not have another Preconditioner for the same layer"):
        Preconditioner(model, parts[1])
    first.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    del parts, first
    gc.collect()


def test_an_optimizer_that_was_thrown_away_does_not_bar_the_next(caplog):
    model = mlp()
    Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    assert "ended before it corrected a gradient" in caplog.text
    train(model, optimizer, 2)
    assert pre.stats()["layers"] == 3


def test_gradients_without_a_step_are_said_once_and_captured_again_after_a_step(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    for step in range(25):
        model.zero_grad()
        backward(model, *data(seed=step))
    assert sum("no step() of the optimizer that was given followed" in m for m in caplog.messages) == 1
    train(model, optimizer, 2)
    assert pre.stats()["layers"] == 3 and len(caplog.messages) == 1


@pytest.mark.parametrize("early", [True, False])
def test_gradients_that_are_gone_at_the_step_are_said_within_ten_steps(early, caplog):
    """Whether the hook that takes them was registered before the preconditioner or after it."""
    model, (x, y) = mlp(), data()
    dummy = torch.optim.SGD(model.parameters(), lr=0.0)
    pre = None if early else Preconditioner(model, dummy)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    pre = pre or Preconditioner(model, dummy)
    for step in range(12):
        assert not caplog.text or step >= 10
        backward(model, x, y)
        dummy.step()
    assert caplog.text.count("gradients came in the backward passes") == 1
    assert pre._attachments[0].states.stopped


def test_ten_gradients_without_a_step_are_said_where_most_layers_are_frozen(caplog):
    """Ten of the layers that have gradients, not of all."""
    model, (x, y) = mlp(), data()
    model[0].requires_grad_(False)
    extra = nn.Sequential(model, *(nn.Linear(5, 5).requires_grad_(False) for _ in range(20)))
    held = [p for p in extra.parameters() if p.requires_grad]
    pre = Preconditioner(extra, torch.optim.SGD(held, lr=0.1))
    for step in range(12):
        extra.zero_grad()
        backward(extra, x, y)
        assert ("no step() of the optimizer" in caplog.text) == (step >= 10)
    assert pre.steps == 0


def test_a_model_that_was_thrown_away_is_said_while_the_preconditioner_is_kept(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    del model
    gc.collect()
    assert caplog.text.count("its model ended before it corrected a gradient") == 1
    del pre, optimizer
    gc.collect()
    assert caplog.text.count("before it corrected a gradient") == 1
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 1)
    del model
    gc.collect()
    assert caplog.text.count("before it corrected a gradient") == 1 and pre.steps == 1


def test_ten_micro_batches_a_step_are_no_alarm(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Preconditioner(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        for step in range(64):
            backward(model, *data(n=4, seed=step))
        optimizer.step()
    assert not caplog.messages


@pytest.mark.parametrize("passes", [2, 3, 5])
@pytest.mark.parametrize("skipped", [False, True])
def test_gradients_that_create_a_graph_count_all_rows_of_the_gradient(passes, skipped):
    layer, optimizer = linear()
    Preconditioner(layer, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        if skipped:
            layer(torch.randn(8, 6)).square().mean().backward(create_graph=True)
            optimizer.zero_grad()
        parts = [(i + 1) * torch.randn(8, 6) for i in range(passes)]
        for x in parts:
            layer(x).square().mean().backward(create_graph=True)
        assert_corrected(layer, optimizer, torch.cat(parts))


@pytest.mark.parametrize("by_hand", [True, False])
def test_rows_of_gradients_that_are_added_up_by_hand_count(by_hand):
    layer, optimizer = linear()
    pre = Preconditioner(layer, optimizer)
    for _ in range(5):
        total, parts = [torch.zeros_like(p) for p in layer.parameters()], []
        for i in range(3):
            optimizer.zero_grad()
            parts.append((i + 1) * torch.randn(5, 6))
            layer(parts[-1]).square().mean().backward()
            for t, p in zip(total, layer.parameters(), strict=True):
                t.add_(p.grad)
        if by_hand:
            for t, p in zip(total, layer.parameters(), strict=True):
                p.grad = t
        assert_corrected(layer, optimizer, torch.cat(parts) if by_hand else parts[-1])
    assert pre.stats()["rows"][""] == (15 if by_hand else 5)


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_plain_and_checkpointed_calls_of_one_layer_count_once_each(reentrant, plain_first):
    layer, optimizer = linear()
    Preconditioner(layer, optimizer)
    a, b = (torch.randn(8, 6, requires_grad=True) for _ in range(2))

    def loss(x, under):
        return (checkpoint(layer, x, use_reentrant=reentrant) if under else layer(x)).square().mean()

    for _ in range(2):
        optimizer.zero_grad()
        (loss(a, not plain_first) + loss(b, plain_first)).backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        optimizer.step()
        torch.testing.assert_close(
            layer.weight.grad, corrected(layer, torch.cat([a, b]).detach(), grads), rtol=1e-4, atol=1e-6
        )


def test_a_shared_input_whose_first_layer_has_no_gradient_forgets_a_skipped_step():
    torch.manual_seed(0)
    model = nn.ModuleDict({"unused": nn.Linear(6, 3), "used": nn.Linear(6, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Preconditioner(model, optimizer)
    for x in (100 * torch.randn(8, 6), torch.randn(8, 6)):
        optimizer.zero_grad()  # the first gradient is never stepped
        model["unused"](x)
        model["used"](x).square().mean().backward()
    assert_corrected(model["used"], optimizer, x)


def test_rows_that_are_dropped_do_not_count():
    layer, optimizer = linear()
    pre = Preconditioner(layer, optimizer)
    layer(100 * torch.randn(64, 6))
    pre.drop_rows()
    x = torch.randn(8, 6)
    layer(x).square().mean().backward()
    assert_corrected(layer, optimizer, x)


@pytest.mark.parametrize("dims", [1, 2])
def test_masked_rows_do_not_count(dims):
    layer, optimizer = linear()
    pre = Preconditioner(layer, optimizer)
    x = torch.randn(5, 7, 6)
    mask = torch.rand((5, 7)[:dims]) > 0.4
    pre.mask_rows(mask)
    layer(x).square().mean().backward()
    assert_corrected(layer, optimizer, x[mask])
    pre.mask_rows(None)
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    assert_corrected(layer, optimizer, x)
    with pytest.raises(TypeError, match="mask must be a bool tensor or None, got dtype torch.float32"):
        pre.mask_rows(torch.ones(5))


def test_a_module_with_the_name_of_an_old_one_and_an_appended_one_are_covered():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    train(model, optimizer, 2)
    model[4] = nn.Linear(16, 5)
    model.append(nn.Linear(5, 5))
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[5].parameters()]})
    train(model, optimizer, 2)
    before = gradients(model)
    assert pre.stats()["layers"] == 4 and [layer.name for layer in pre._layers] == ["0", "2", "4", "5"]
    assert len(before) == 8
    optimizer.state_dict()


@pytest.mark.parametrize("options", [{}, dict(decay=0.5), dict(decay=0.5, every=3)], ids=str)
def test_a_state_that_was_loaded_first_is_resumed(options):
    def start(seed):
        model = mlp(seed)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = start(0)
    Preconditioner(model, optimizer, chunk=8, **options)
    train(model, optimizer, 22)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, first=22)
    other, loaded = start(1)
    other.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    pre = Preconditioner(other, loaded, chunk=8, **options)
    assert pre.steps == 22
    train(other, loaded, 3, first=22)
    assert_equal(model.parameters(), other.parameters())


def test_a_load_that_calls_no_hooks_is_noticed_and_keeps_the_rows():
    class Own(torch.optim.SGD):
        def load_state_dict(self, saved):
            entries = copy.deepcopy(saved["state"])
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.__setstate__(
                {"state": {parameters[k]: v for k, v in entries.items()}, "param_groups": self.param_groups}
            )

    def start():
        model = mlp()
        optimizer = Own(model.parameters(), lr=0.1)
        return model, optimizer, Preconditioner(model, optimizer, chunk=8)

    model, optimizer, _ = start()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, first=5)
    other, loaded, pre = start()
    other.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    train(other, loaded, 2, first=5)
    assert pre.steps == 7 and pre.stats()["layers"] == 3
    assert_equal(model.parameters(), other.parameters())


class CastsOnLoad(torch.optim.SGD):
    """As the optimizers of bitsandbytes: a load of its own, which casts all but the entries that it has a list of."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.non_castable_tensor_keys = {"qmap"}

    def load_state_dict(self, state_dict):
        state_dict, state = copy.deepcopy(state_dict), {}
        for key, entries in state_dict["state"].items():
            parameter = self.param_groups[0]["params"][key]
            state[parameter] = {
                k: v if k in self.non_castable_tensor_keys else v.to(parameter.dtype) for k, v in entries.items()
            }
        self.__setstate__({"state": state, "param_groups": self.param_groups})


@pytest.mark.parametrize("attention", [False, True])
def test_a_load_that_casts_leaves_averages_and_steps_as_they_were(attention):
    torch.manual_seed(0)

    def make():
        model = nn.MultiheadAttention(8, 2) if attention else nn.Sequential(nn.Linear(8, 8))
        model = model.bfloat16()
        optimizer = CastsOnLoad(model.parameters(), 0.01)
        return model, optimizer, Preconditioner(model, optimizer, decay=0.5, chunk=4)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        (model(x, x, x)[0] if attention else model(x)).float().square().sum().backward()
        optimizer.step()

    (model, optimizer, pre), (twin, other, again) = make(), make()
    xs = [torch.randn(5, 3, 8).bfloat16() for _ in range(4)]
    for x in xs[:3]:
        step(model, optimizer, x)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    step(model, optimizer, xs[3])
    step(twin, other, xs[3])
    assert_equal(list(model.parameters()), list(twin.parameters()))
    one, two = pre.state_dict()["layers"], again.state_dict()["layers"]
    for name, entries in one.items():
        assert torch.equal(entries["covariance"], two[name]["covariance"]), name


def test_the_state_of_another_network_starts_anew_with_a_word(caplog):
    small, large = mlp(), mlp(widths=(12, 30, 40, 5))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (small, large)]
    for model, optimizer in zip((small, large), optimizers, strict=True):
        Preconditioner(model, optimizer, decay=0.5)
        train(model, optimizer, 2)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert "by another network, so it was dropped" in caplog.text
    train(large, optimizers[1], 2)


def attach_preconditioner(model):
    return Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))


def attach_two(model):
    first, second = (list(model[i].parameters()) for i in (0, 2))
    return [Preconditioner(model, torch.optim.SGD(part, lr=0.1)) for part in (first, second)]


def attach_by_position(model):
    return co.optim.SGD2(model, lr=0.1, conv_reduction="mean")


def attach_monitors(model):
    return co.analysis.weight_domination(model), co.analysis.gradient_energy(model)


@pytest.mark.parametrize("attach", [attach_preconditioner, attach_two, attach_by_position, attach_monitors])
def test_copied_and_pickled_models_carry_nothing_of_ours(attach):
    """They load where this library is not, and with ``weights_only``, whose readers know no functions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    model[2].register_forward_pre_hook(theirs)
    attached, x = attach(model), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    assert b"consistency" not in file.getvalue()
    file.seek(0)
    allowed = [nn.Sequential, nn.Linear, nn.ReLU, nn.Conv2d, nn.Flatten, theirs]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(file, weights_only=True)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()(x).sum().backward()
        hooks = [(m._forward_pre_hooks, m._forward_hooks, m._forward_pre_hooks_with_kwargs) for m in other.modules()]
        assert [list(d.values()) for of in hooks for d in of if d] == [[theirs]]
        notes = [(m._forward_hooks_with_kwargs, m._forward_hooks_always_called) for m in other.modules()]
        assert not any(d for of in notes for d in of)
    assert attached is not None


def theirs(module, args):
    return None


def test_own_forward_is_left_unless_it_is_registered(caplog):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = nn.Sequential(Scaled(6, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = Preconditioner(model, optimizer)
    assert "forward of its own, not registered" in pre.summary() and "Scaled" in caplog.text
    pre.remove()
    co.layers.register(Scaled)
    try:
        pre = Preconditioner(model, optimizer)
        assert "forward of its own" not in pre.summary()
    finally:
        from consistency_ops.engine import layer_types

        del layer_types._TYPES[Scaled]


def test_gradients_of_one_sample_each_are_refused():
    model = mlp()
    model[0].weight.grad_sample = None
    with pytest.raises(ValueError, match="must not be trained with differential privacy"):
        Preconditioner(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (nn.utils.parametrizations.weight_norm, "weight is computed by _WeightNorm"),
        (nn.utils.parametrizations.spectral_norm, "weight is computed by _SpectralNorm"),
        (nn.utils.spectral_norm, "weight is computed by a hook"),
    ],
)
def test_a_computed_weight_is_left_and_named(wrap, words):
    models, gradients = [], []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(wrap(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pre = Preconditioner(model, optimizer) if attached else None
        model(torch.linspace(-1, 1, 60).view(10, 6)).square().sum().backward()
        optimizer.step()
        models.append(model)
        gradients.append([p.grad for p in model[0].parameters()])
    assert_equal(*gradients)
    assert words in pre.summary() and pre.stats()["layers"] == 1


def programs_beside_the_training():
    """Uses of a model within a step that leave nothing in it: other weights, transforms, traces."""

    def other_weights(model, x):
        other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        torch.func.functional_call(model, other, (x[:5],)).sum().backward()

    def one_gradient_a_sample(model, x):
        def loss(parameters, row):
            return torch.func.functional_call(model, parameters, (row,)).sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)

    def trace(model, x):
        torch.jit.trace(model, (x,))

    def copied(model, x):
        copy.deepcopy(model)(x[:3]).sum().backward()

    return [other_weights, one_gradient_a_sample, trace, copied]


@pytest.mark.parametrize("beside", programs_beside_the_training(), ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_done_beside_the_training_changes_nothing(beside):
    updated = []
    for used in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = Preconditioner(model, optimizer)
        for step in range(3):
            x, y = data(seed=step)
            optimizer.zero_grad()
            if used:
                beside(model, x)
            backward(model, x, y)
            optimizer.step()
        assert [layer.captured_rows() for layer in pre._layers] == [40, 40, 40]
        updated.append(list(model.parameters()))
    assert_equal(*updated)
