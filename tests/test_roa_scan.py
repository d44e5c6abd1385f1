"""All steps of an additive network in one call: equal to its modules called one by one, and who is told of it."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import consistency_ops as co
from consistency_ops.nn import ROARNN, ROAFeedForward, roa_rnn, roa_steps
from consistency_ops.nn import roa as roa_layers
from consistency_ops.nn.orthogonal import FILTERS
from consistency_ops.ops import portable_scan
from consistency_ops.ops.portable_scan import ACTIVATIONS

ops = torch.ops.consistency_ops

# Relative to the largest entry: rounding of sums in another order, and of a state of 16 bits, which the plain loop
# rounds at every one of at most 9 steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 9 * 2**-8, torch.float16: 9 * 2**-11}


@pytest.fixture
def counted(monkeypatch):
    """How often all steps were computed in one call."""
    calls = []

    def count(function):
        def counting(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(result is not None)
            return result

        return counting

    monkeypatch.setattr(roa_rnn, "steps_at_once", count(roa_steps.steps_at_once))
    monkeypatch.setattr(roa_layers, "layers_at_once", count(roa_steps.layers_at_once))
    return calls


def one_by_one(model):
    """The same network whose modules are called: a hook that only looks is enough."""
    model = copy.deepcopy(model)
    model.phi.register_forward_hook(lambda *_: None)
    return model


def close(got, want, dtype):
    scale = max(float(want.detach().double().abs().max()) if want.numel() else 0.0, 1e-30)
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale)
    assert got.dtype == want.dtype


def gradients(model, outputs, weights):
    model.zero_grad()
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return [parameter.grad for parameter in model.parameters()]


# In half precision the rounded drive is on the other side of a kink now and then: the test of the operators has those.
KINKED, HALVES = ("relu", "modulus"), (torch.bfloat16, torch.float16)
PAIRS = [(dtype, phi) for dtype in TOLERANCE for phi in ACTIVATIONS if dtype not in HALVES or phi not in KINKED]


@pytest.mark.parametrize(("dtype", "activation"), PAIRS)
@pytest.mark.parametrize("filter", FILTERS)
def test_recurrent_network_and_its_gradients_are_those_of_the_loop(counted, dtype, activation, filter):
    """In float64, of the parameters and inputs that the rounded network has."""
    torch.manual_seed(0)
    units = {"tanh": 37, "modulus": 64}.get(activation, 5)
    rnn = ROARNN(3, units, beta=0.3, activation=activation, filter=filter, dtype=torch.float64)
    loop = one_by_one(rnn)
    rnn.to(dtype)
    loop.load_state_dict(rnn.state_dict())
    u = torch.randn(9, 14, 3).to(dtype).requires_grad_()
    h_0 = torch.randn(14, units).to(dtype).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (u, h_0)]
    outputs, want = rnn(u, h_0), loop(*wide)
    assert counted == [True, False]
    weights = [torch.randn(x.shape).to(dtype) for x in outputs]
    got = [*gradients(rnn, outputs, weights), u.grad, h_0.grad]
    expected = [*gradients(loop, want, [w.double() for w in weights]), *(x.grad for x in wide)]
    for a, b in zip([*outputs, *got], [*want, *expected], strict=True):
        close(a.detach(), b.detach().to(dtype), dtype)


# Steps, rows and units: less than a vector, several panels, one block of rows and several, nothing at all.
SHAPES = ((5, 3, 7), (4, 13, 33), (6, 1, 64), (3, 50, 70), (0, 2, 4), (2, 0, 4), (2, 3, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("filter", ["index", "matrix", "none"])
def test_operators_are_the_portable_ones_in_float64(dtype, activation, filter):
    torch.manual_seed(11)
    number = ACTIVATIONS.index(activation)
    for (steps, rows, units), own in itertools.product(SHAPES, (False, True)):
        lead = (steps,) if own else ()
        drive, initial, grad = (
            torch.randn(*shape, units).to(dtype) for shape in ((steps, rows), (rows,), (steps, rows))
        )
        weight = (torch.randn(*lead, units, units) / units**0.5).to(dtype)
        index = torch.rand(*lead, units).argsort(-1) if filter == "index" else None
        matrix = torch.linalg.qr(torch.randn(*lead, units, units)).Q.to(dtype) if filter == "matrix" else None
        got = ops.roa_scan(drive, initial, weight, index, matrix, 0.9, 0.3, number)
        kept, last = got[2], got[1]
        got += ops.roa_scan_backward(grad, last, kept, weight, index, matrix, 0.9, 0.3, number)
        wide = [x if x is None else x.double() for x in (drive, initial, weight, matrix)]
        want = portable_scan.roa_scan(*wide[:3], index, wide[3], 0.9, 0.3, number)
        want += portable_scan.roa_scan_backward(
            grad.double(), last.double(), kept.double(), wide[2], index, wide[3], 0.9, 0.3, number
        )
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.is_contiguous()
            close(a, b.to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("filter", FILTERS)
def test_layers_and_their_gradients_are_those_of_the_loop(counted, dtype, shared, filter):
    torch.manual_seed(1)
    net = ROAFeedForward(4, 33, 3, 7, filter=filter, shared_filter=shared, dtype=dtype)
    loop = one_by_one(net)
    x = torch.randn(2, 9, 4, dtype=dtype, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    outputs, want = [net(x)], [loop(again)]
    assert counted == [True, False]
    weights = [torch.randn(outputs[0].shape, dtype=dtype)]
    got, expected = gradients(net, outputs, weights), gradients(loop, want, weights)
    for a, b in zip([*outputs, *got, x.grad], [*want, *expected, again.grad], strict=True):
        close(a.detach(), b.detach(), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_by_finite_differences_also_the_second(counted, activation):
    torch.manual_seed(2)
    rnn = ROARNN(2, 3, beta=0.4, activation=activation, dtype=torch.float64)
    names = [name for name, _ in rnn.named_parameters()]

    def call(u, h_0, *parameters):
        return torch.func.functional_call(rnn, dict(zip(names, parameters, strict=True)), (u, h_0))

    u, h_0 = torch.randn(3, 2, 2).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    arguments = (u, h_0, *(p.detach().clone().requires_grad_() for p in rnn.parameters()))
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)
    assert all(counted)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_bitwise_the_same_for_any_number_of_threads(rows):
    torch.manual_seed(3)
    rnn = ROARNN(3, 70, beta=0.2)
    drive = torch.randn(11, rows, 70)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        kept = ops.roa_scan(
            drive, torch.ones(rows, 70), rnn.recurrent.weight.detach(), rnn.filter.index, None, 0.8, 0.2, 1
        )
        back = ops.roa_scan_backward(
            drive, None, kept[2], rnn.recurrent.weight.detach(), rnn.filter.inverse, None, 0.8, 0.2, 1
        )
        results.append((*kept, *back))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(4)
    rnn = ROARNN(3, 40, beta=0.2)
    drive = torch.randn(6, 29, 40)
    whole = ops.roa_scan(drive, torch.zeros(29, 40), rnn.recurrent.weight.detach(), rnn.filter.index, None, 0.8, 0.2, 1)
    for i in (0, 13, 28):
        alone = ops.roa_scan(
            drive[:, i : i + 1], torch.zeros(1, 40), rnn.recurrent.weight.detach(), rnn.filter.index, None, 0.8, 0.2, 1
        )
        assert torch.equal(whole[0][:, i], alone[0][:, 0])


@pytest.mark.parametrize("name", ["steps", "rows"])
def test_no_steps_and_no_rows(name):
    rnn = ROARNN(3, 5)
    u = torch.randn(0 if name == "steps" else 4, 0 if name == "rows" else 2, 3)
    h_0 = torch.randn(u.shape[1], 5, requires_grad=True)
    states, last = rnn(u, h_0)
    assert states.shape == (*u.shape[:2], 5) and torch.equal(last, h_0 if name == "steps" else last)
    (states.sum() + last.sum()).backward()
    assert torch.equal(h_0.grad, torch.ones_like(h_0))
    assert torch.equal(rnn.recurrent.weight.grad, torch.zeros(5, 5))


def test_nan_and_inf_stay_in_their_sequence():
    rnn = ROARNN(1, 5)
    u = torch.randn(4, 3, 1)
    u[1, 0], u[2, 1] = float("nan"), float("inf")
    states, last = rnn(u)
    assert states[1:, 0].isnan().all() and states[0].isfinite().all()
    assert last[1:].isfinite().all()  # tanh of Inf is 1


class Adapter(nn.Linear):
    """Another forward in the place of a layer."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("what", ["hook", "backward hook", "pre-hook", "subclass", "filter", "parametrised", "no bias"])
def test_whoever_looks_into_the_modules_gets_them_called(counted, what):
    net, rnn = ROAFeedForward(3, 6, 2, 3, dtype=torch.float64), ROARNN(3, 6, dtype=torch.float64)
    seen = []
    for model, layer in ((net, net.layers[1]), (rnn, rnn.recurrent)):
        if what == "hook":
            layer.register_forward_hook(lambda *_: seen.append(1))
        elif what == "backward hook":
            layer.register_full_backward_hook(lambda *_: seen.append(1))
        elif what == "pre-hook":
            layer.register_forward_pre_hook(lambda *_: seen.append(1))
        elif what == "filter":
            (model.filters[0] if model is net else model.filter).register_forward_hook(lambda *_: seen.append(1))
        elif what == "parametrised":
            nn.utils.parametrizations.spectral_norm(layer)
        elif what == "no bias" and model is net:
            layer.bias = None
        elif what == "subclass":
            layer.__class__ = Adapter
    net(torch.randn(4, 3).double()).sum().backward()
    rnn(torch.randn(5, 4, 3).double())[0].sum().backward()
    assert counted == [False, what == "no bias"]  # the recurrent layer never has one
    assert bool(seen) == (what in ("hook", "backward hook", "pre-hook", "filter"))


def test_transforms_and_forward_mode_see_the_plain_loop(counted):
    rnn = ROARNN(2, 4, dtype=torch.float64)
    u = torch.randn(5, 3, 2).double()
    torch.testing.assert_close(torch.vmap(lambda x: rnn(x)[1], in_dims=1)(u), rnn(u)[1])
    jacobian = torch.func.jacfwd(lambda h: rnn(u[:, :1], h)[1])(torch.zeros(1, 4).double())
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda h: rnn(u[:, :1], h)[1])(torch.zeros(1, 4).double()))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, torch.ones_like(u))
        assert torch.autograd.forward_ad.unpack_dual(rnn(dual)[1]).tangent is not None
    assert counted.count(True) == 1


@pytest.mark.parametrize("kind", ["rnn", "net"])
@pytest.mark.parametrize("mode", ["correct", "whiten"])
def test_the_preconditioner_gets_the_rows_of_all_steps(counted, kind, mode):
    """In one call and one by one: the same rows, so the same corrected gradients, where none is left out."""
    torch.manual_seed(5)
    make = (lambda: ROARNN(3, 8, beta=0.3)) if kind == "rnn" else (lambda: ROAFeedForward(3, 8, 2, 4))
    model = make().double()
    x = torch.randn(6, 7, 3).double()
    results = []
    for together in (True, False):
        twin = copy.deepcopy(model)
        if not together:
            twin.phi.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        pre = co.Preconditioner(twin, optimizer, mode=mode, damping=0.1)
        output = twin(x)[0] if kind == "rnn" else twin(x)
        (output * torch.linspace(-1, 1, output.numel()).double().view_as(output)).sum().backward()
        optimizer.step()
        results.append((twin.state_dict(), str(pre.summary())))
    assert counted == [True, False]
    assert results[0][1] == results[1][1] and "42" in results[0][1]
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-10, atol=1e-12, msg=name)


def test_mask_rows_leaves_out_steps_of_padding():
    rnn, lengths = ROARNN(3, 8), torch.tensor([6, 2])
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    pre = co.Preconditioner(rnn, optimizer)
    pre.mask_rows(torch.arange(6).unsqueeze(1) < lengths)
    rnn(torch.randn(6, 2, 3))[0].sum().backward()
    optimizer.step()
    assert set(pre.stats()["rows"].values()) == {8}


# Inputs as nn.RNN takes them


def plain_rnn(rnn):
    """torch's own tanh RNN of the same function: alpha 0, beta 1."""
    twin = nn.RNN(rnn.input_size, rnn.hidden_size, batch_first=rnn.batch_first, dtype=torch.float64)
    with torch.no_grad():
        twin.weight_ih_l0.copy_(rnn.input.weight)
        twin.weight_hh_l0.copy_(rnn.recurrent.weight)
        twin.bias_ih_l0.copy_(rnn.input.bias)
        twin.bias_hh_l0.zero_()
    return twin


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_inputs_are_those_of_torchs_rnn(batch_first, with_state, together):
    torch.manual_seed(6)
    rnn = ROARNN(3, 5, beta=1.0, alpha=0.0, batch_first=batch_first, dtype=torch.float64)
    twin = plain_rnn(rnn)
    rnn = rnn if together else one_by_one(rnn)
    u, h_0 = torch.randn(4, 6, 3).double(), torch.randn(4 if batch_first else 6, 5).double()
    states, last = rnn(u, h_0 if with_state else None)
    want, final = twin(u, h_0.unsqueeze(0) if with_state else None)
    torch.testing.assert_close(states, want)
    torch.testing.assert_close(last, final[0])
    # without a batch
    states, last = rnn(u[:, 0], h_0[0] if with_state else None)
    want, final = twin(u[:, 0], h_0[:1] if with_state else None)
    torch.testing.assert_close(states, want)
    torch.testing.assert_close(last, final[0])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_are_those_of_torchs_rnn(enforce_sorted, with_state, together):
    torch.manual_seed(7)
    rnn = ROARNN(3, 5, beta=1.0, alpha=0.0, dtype=torch.float64)
    twin = plain_rnn(rnn)
    rnn = rnn if together else one_by_one(rnn)
    lengths = [5, 4, 4, 1] if enforce_sorted else [4, 1, 5, 4]
    u = [torch.randn(n, 3).double().requires_grad_() for n in lengths]
    h_0 = torch.randn(4, 5).double() if with_state else None
    packed, last = rnn(pack_sequence(u, enforce_sorted=enforce_sorted), h_0)
    got_gradients = torch.autograd.grad(packed.data.square().sum() + last.sum(), u)
    want, final = twin(pack_sequence(u, enforce_sorted=enforce_sorted), h_0 if h_0 is None else h_0.unsqueeze(0))
    want_gradients = torch.autograd.grad(want.data.square().sum() + final.sum(), u)
    torch.testing.assert_close(packed.data, want.data)
    torch.testing.assert_close(last, final[0])
    assert torch.equal(packed.batch_sizes, want.batch_sizes)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b)
    padded, counts = pad_packed_sequence(packed)
    assert counts.tolist() == lengths
    for i, n in enumerate(lengths):  # every sequence by itself
        alone, end = rnn(u[i], None if h_0 is None else h_0[i])
        torch.testing.assert_close(padded[:n, i], alone)
        torch.testing.assert_close(last[i], end)


def test_padding_is_no_row_of_a_packed_sequence():
    rnn = ROARNN(3, 8)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    pre = co.Preconditioner(rnn, optimizer)
    rnn(pack_padded_sequence(torch.randn(6, 2, 3), torch.tensor([6, 2])))[0].data.sum().backward()
    optimizer.step()
    assert set(pre.stats()["rows"].values()) == {8}


@pytest.mark.parametrize(
    ("u", "h_0", "error", "message"),
    [
        ([1.0], None, TypeError, "u must be a Tensor, got list"),
        (torch.ones(2, 3), [1.0], TypeError, "h_0 must be a Tensor, got list"),
        (pack_sequence([torch.ones(2, 4)]), None, ValueError, r"with input_size 3, got data of shape \(2, 4\)"),
        (pack_sequence([torch.ones(2)]), None, ValueError, r"packed from sequences \(T, input_size\)"),
        (pack_sequence([torch.ones(2, 3)]), torch.ones(2, 5), ValueError, r"h_0 must be \(1, 5\), got \(2, 5\)"),
        (torch.ones(2, 3), torch.ones(1, 5), ValueError, r"h_0 must be \(5,\), got \(1, 5\)"),
        (torch.ones(2, 4, 3), torch.ones(1, 4, 5), ValueError, r"h_0 must be \(4, 5\), got \(1, 4, 5\)"),
    ],
)
def test_wrong_inputs(u, h_0, error, message):
    with pytest.raises(error, match="ROARNN: .*" + message):
        ROARNN(3, 5)(u, h_0)


# Memory


def kept_bytes(function):
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        function()
    return sum(sizes.values())


def test_checkpoints_change_memory_and_nothing_else():
    torch.manual_seed(8)
    rnn, net = ROARNN(3, 8, beta=0.1, dtype=torch.float64), ROAFeedForward(3, 8, 2, 10, dtype=torch.float64)
    u, x = torch.randn(10, 4, 3).double(), torch.randn(4, 3).double()
    for model, call in ((rnn, lambda: rnn(u)[0]), (net, lambda: net(x))):
        results, memory = [], []
        for checkpoint in (0, 3, 10):
            model.checkpoint = checkpoint
            model.zero_grad()
            output = call()
            output.square().sum().backward()
            results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
            memory.append(kept_bytes(call))
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert memory[1] < memory[0] / 2


def test_rows_are_captured_once_with_checkpoints():
    rnn = ROARNN(3, 8, checkpoint=2)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    pre = co.Preconditioner(rnn, optimizer)
    rnn(torch.randn(6, 2, 3))[0].sum().backward()
    optimizer.step()
    assert set(pre.stats()["rows"].values()) == {12}


# Other ways to call


def test_compiled_without_graph_breaks():
    torch.manual_seed(9)
    rnn, net = ROARNN(3, 8, beta=0.2), ROAFeedForward(3, 8, 2, 5)
    u, x = torch.randn(6, 4, 3), torch.randn(4, 3)
    for model, inputs in ((rnn, u), (net, x)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(inputs)
            output = output[0] if isinstance(output, tuple) else output
            output.square().sum().backward()
            results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["rnn", "net"])
def test_compiled_with_a_preconditioner(kind):
    torch.manual_seed(10)
    model = ROARNN(3, 8, beta=0.2).double() if kind == "rnn" else ROAFeedForward(3, 8, 2, 5).double()
    x = torch.randn(6, 4, 3).double()
    weights = []
    for compiled in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        co.Preconditioner(twin, optimizer)
        function = torch.compile(twin, fullgraph=True, backend="aot_eager") if compiled else twin
        output = function(x)
        (output[0] if kind == "rnn" else output).square().sum().backward()
        optimizer.step()
        weights.append(twin.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], msg=name)


def test_autocast_computes_in_bfloat16(counted):
    rnn = ROARNN(3, 8, beta=0.2)
    u = torch.randn(6, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        states, last = rnn(u)
        want, _ = one_by_one(rnn)(u)
    assert counted == [True, False] and states.dtype == last.dtype == want.dtype == torch.bfloat16
    states.sum().backward()
    assert rnn.recurrent.weight.grad.dtype == torch.float32
    close(states, want, torch.bfloat16)


def test_exported_programs_hold_torchs_operators_only():
    rnn = ROARNN(3, 8, beta=0.2)
    u = torch.randn(3, 2, 3)
    program = torch.export.export(rnn, (u,))
    assert not any("consistency_ops" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(u)[0], rnn(u)[0])


def test_a_call_that_kept_nothing_has_no_derivative():
    drive = torch.ones(2, 4, 5, requires_grad=True)
    states, *_ = ops.roa_scan(drive, torch.ones(4, 5), torch.ones(5, 5), None, None, 0.5, 0.5, 1, False)
    with pytest.raises(RuntimeError, match="there is no derivative of a call with keep=False"):
        states.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        dict(weight=torch.ones(4, 5)),
        dict(weight=torch.ones(3, 5, 5)),
        dict(weight=torch.ones(5, 5).double()),
        dict(index=torch.tensor([0, 1, 2, 3, 5])),
        dict(index=torch.tensor([0, 1, 2, 3, -1])),
        dict(index=torch.ones(5)),
        dict(index=torch.ones(4, dtype=torch.int64)),
        dict(filter=torch.ones(5, 4)),
        dict(initial=torch.ones(3, 5)),
        dict(drive=torch.ones(2, 5)),
        dict(activation=6),
    ],
)
def test_the_operator_refuses_what_it_would_read_beyond(change):
    arguments = dict(
        drive=torch.ones(2, 4, 5), initial=torch.ones(4, 5), weight=torch.ones(5, 5), index=None, filter=None
    )
    numbers = dict(alpha=0.5, beta=0.5, activation=1)
    arguments.update({k: v for k, v in change.items() if k in arguments})
    numbers.update({k: v for k, v in change.items() if k in numbers})
    with pytest.raises(RuntimeError, match="roa_scan"):
        ops.roa_scan(*arguments.values(), **numbers)
