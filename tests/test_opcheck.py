"""torch.library.opcheck on every operator that is registered: schema, fake tensors, autograd, dynamic shapes."""

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops
from support.samples import rows_like

NAMESPACE = "consistency_ops"
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def registered():
    """Every overload of the namespace, so that none can be forgotten."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{NAMESPACE}::")}
    packets = {name: getattr(torch.ops.consistency_ops, name.split("::")[1]) for name in sorted(names)}
    return {f"{name}.{kind}": getattr(packet, kind) for name, packet in packets.items() for kind in packet.overloads()}


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments, copied, with which operators of the namespace are called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE:
            name = f"{function._schema.name}.{function._overloadname}"
            self.calls.setdefault(name, []).append(torch.utils._pytree.tree_map(copied, (args, kwargs or {})))
        return function(*args, **(kwargs or {}))


def copied(value):
    if not isinstance(value, torch.Tensor):
        return value
    if 0 in value.stride():  # expanded, as the gradient of a sum is
        copy = value.detach()[:1].clone().expand_as(value) if value.stride(0) == 0 else value.detach().clone()
    else:
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value.detach())
    return copy.requires_grad_(value.requires_grad)


def network(dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    grads = [normal(5, 33), normal(6, 4, 3, 3), normal(40, 3).T]
    inputs = [rows_like(20, 33, generator).to(dtype), normal(2, 8, 5, 5), normal(4, 6, 40)]
    return grads, inputs, [normal(5), None, normal(3)]


def call_everything():
    """The public functions on small samples of every operator's forms."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        grads, inputs, biases = network(dtype)
        permutation = [torch.randperm(34), None, None]
        counts = [None, torch.tensor([17]), None]
        options = {"chunk": 16, "group": 1, "seed": 3, "step": 1, "permutation": permutation}
        ops.foreach_precondition_(grads, inputs, bias_grads=biases, damping=0.1, row_counts=counts, **options)
        bias = [b is not None for b in biases]
        covariances = ops.foreach_covariance(inputs, grads=grads, bias=bias, row_counts=counts, **options)
        units = [grad.shape[1] + with_bias for grad, with_bias in zip(grads, bias, strict=True)]
        inverses, info, _ = ops.foreach_inverse(covariances, units=units, damping=0.1, scaling="trace", chunk=16)
        ops.foreach_apply_(grads, inverses, info, bias_grads=biases, **options)
        ops.foreach_correct_(grads, covariances, bias_grads=biases, damping=0.1, **options)
        ops.foreach_precondition_([grads[0], grads[0].clone()], [inputs[0]] * 2, layers=[0, 0], chunk=16)
        ops.precondition(grads[0], inputs[0], chunk=16)
        ops.chunked_covariance(inputs[0], chunk=16)
    elementwise()
    capture()
    matrices()
    scans()


def scans():
    """Recurrent and feed-forward networks in one call, by a permutation, by matrices, and without a filter."""
    for dtype in (torch.float32, torch.bfloat16):
        for filter in ("permutation", "dense", "identity"):
            rnn = co.nn.ROARNN(3, 6, filter=filter, dtype=dtype)
            states, last = rnn(torch.randn(4, 2, 3, dtype=dtype))
            states.sum().backward(retain_graph=True)
            last.sum().backward()
            rnn.requires_grad_(False)(torch.randn(4, 2, 3, dtype=dtype))
            co.nn.ROAFeedForward(3, 6, 2, 4, filter=filter, dtype=dtype)(
                torch.randn(5, 3, dtype=dtype)
            ).sum().backward()


def matrices():
    """Batches and single matrices, with and without a derivative."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 2, 9, 5, dtype=dtype)
        a, b = x.mT @ x, torch.randn(3, 2, 5, 4, dtype=dtype)
        for matrix, right in ((a, b), (a[0, 0].mT, b[0, 0, :, :1]), (a[:0], b[:0])):
            co.linalg.spd_inverse_ex(matrix)
            co.linalg.spd_solve_ex(matrix, right)
        a, b = a[0].clone().requires_grad_(), b[0].clone().requires_grad_()
        (co.linalg.spd_solve(a, b).sum() + co.linalg.spd_inverse(a).sum()).backward()


def elementwise():
    """Modulus and RMS norm, forward and backward, so that the operators of their autograd formulas are called too."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        x = torch.randn(7, 9).to(dtype).requires_grad_()
        y = ops.modulus(x)
        y.backward(torch.ones_like(y))
    for x in (torch.randn(6, 10), torch.randn(2, 10, 3, 4)):
        x.requires_grad_()
        running, count = torch.zeros(10), torch.zeros(1, dtype=torch.int64)
        ops.batch_rms_norm(x, running, training=True, num_batches=count).sum().backward()
        ops.batch_rms_norm(x, running, training=False, num_batches=count).sum().backward()


def capture():
    """A training step under the preconditioner: the operators that only it calls."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options in ({"mode": "whiten", "every": 2}, {"mode": "correct", "decay": 0.5}):
        pre = co.Preconditioner(model, optimizer, chunk=16, **options)
        for _ in range(2 + 20 * (options["mode"] == "whiten")):  # whose first 20 steps all renew the factors
            optimizer.zero_grad()
            for _ in range(2):  # the second forward pass lets the state know of the first backward pass
                model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.zero_grad()  # a gradient that is thrown away: its rows are, too
            model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()
        if options["mode"] == "whiten":
            pre.remove()
    linear = pre._layers[1].capture
    torch.ops.consistency_ops.capture_traced_rows_(linear.rows, linear.state, torch.randn(8, 36), 1, -1, 0)
    pre.remove()


@pytest.fixture(scope="module")
def calls():
    recorder = Recorder()
    with recorder:
        call_everything()
    return recorder.calls


def test_every_operator_has_a_sample(calls):
    assert len(registered()) >= 4
    assert set(calls) == set(registered())


@pytest.mark.parametrize("name", registered())
def test_opcheck(name, calls):
    operator, samples = registered()[name], calls[name]
    chosen = {str([(type(a), getattr(a, "shape", a)) for a in args]): (args, kwargs) for args, kwargs in samples}
    for args, kwargs in chosen.values():
        torch.library.opcheck(operator, args, kwargs, test_utils=TESTS)
