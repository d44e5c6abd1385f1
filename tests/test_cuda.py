"""Tests that need a CUDA device: streams, graphs, devices, memory, one launch, no synchronisation.

The values are tested by the ordinary tests, which run on the device as ``[cuda-...]`` (support/kernels.py).
"""

import gc

import pytest
import torch

import consistency_ops as co
from consistency_ops import ops
from consistency_ops.engine.capture_states import STATE_SIZE
from support import processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
capture = torch.ops.consistency_ops.capture_rows_.default


def layers(device="cuda"):
    """Gradients and inputs of three layers: several chunks, an odd width, a convolution."""
    generator = torch.Generator().manual_seed(1)
    shapes = [((40, 300), (500, 300)), ((10, 33), (70, 33)), ((8, 24, 3, 3), (4, 24, 9, 7))]
    grads = [torch.randn(g, generator=generator).to(device) for g, _ in shapes]
    return grads, [torch.randn(x, generator=generator).to(device) for _, x in shapes]


def corrected(grads, inputs, **keywords):
    copies = [grad.clone() for grad in grads]
    co.foreach_precondition_(copies, inputs, damping=0.1, **keywords)
    return copies


@pytest.mark.parametrize("group", [1, 8])
def test_the_division_is_that_of_the_cpu_bit_for_bit(group):
    """Unit u has the moment (u + 1)^2 / 2, exact in float32 and in TF32, so covariances name the units of a chunk."""
    units = 512
    inputs = 16 * torch.diag(torch.arange(1.0, units + 1))
    for seed in (0, 7, 2**63 + 5):
        keywords = dict(chunk=100, group=group, seed=seed, step=3)
        want = co.chunked_covariance(inputs, **keywords)
        assert torch.equal(co.chunked_covariance(inputs.cuda(), **keywords).cpu(), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_rows_are_those_of_the_cpu_bit_for_bit(layout, dtype):
    x = torch.randn(20, 72, 13, 11).to(dtype).contiguous(memory_format=layout)
    states = []
    for device in ("cpu", "cuda"):
        rows = torch.zeros(1000, 72, device=device)
        state = torch.zeros(2, STATE_SIZE, dtype=torch.int64, device=device)
        for part in x.to(device).split([3, 16, 1]):
            capture(rows, state, part, 1, 1, 5)
        states.append((rows.cpu(), state.cpu()))
    assert torch.equal(states[0][1], states[1][1])
    used = int(states[0][1][1, 0])
    assert torch.equal(states[0][0][:used], states[1][0][:used])


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
def test_runs_are_bitwise_equal(scaling):
    grads, inputs = layers()
    first = corrected(grads, inputs, scaling=scaling)
    for _ in range(10):
        again = corrected(grads, inputs, scaling=scaling)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_waits_for_the_device():
    grads, inputs = layers()
    rows, state = torch.zeros(50, 300, device="cuda"), torch.zeros(1, STATE_SIZE, dtype=torch.int64, device="cuda")
    permutation = torch.randperm(300).cuda()
    running, count = torch.zeros(24, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scaling in ("absolute", "trace"):
            co.foreach_precondition_(grads, inputs, scaling=scaling, permutation=[permutation, None, None])
        capture(rows, state, inputs[0], 0, -1, 0)
        covariances = ops.foreach_covariance(inputs, grads=grads)
        inverses, info, _ = ops.foreach_inverse(covariances, units=[300, 33, 24])
        ops.foreach_apply_(grads, inverses, info)
        ops.foreach_correct_(grads, covariances)
        co.foreach_precondition_([grads[0], grads[0].clone()], [inputs[0]] * 2, layers=[0, 0])
        y = co.modulus(inputs[2].requires_grad_())
        co.batch_rms_norm(y, running, training=True, num_batches=count).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_permutation_is_an_assertion_on_the_device():
    """It runs in its own process, because a device assertion ends all CUDA work of a process."""
    import sys

    code = (
        "import torch, consistency_ops as co; g = torch.ones(2, 3, device='cuda'); x = torch.ones(4, 3, device='cuda')"
    )
    code += "; co.precondition(g, x, permutation=torch.tensor([0, 0, 9], device='cuda')); torch.cuda.synchronize()"
    done = processes.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr


def test_other_streams_are_respected():
    """The call waits for what its stream does before it, and is done when its stream says so."""
    grads, inputs = layers()
    want = corrected([2 * grad for grad in grads], inputs)
    stream = torch.cuda.Stream()
    for _ in range(5):
        late = [grad.clone() for grad in grads]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            for grad in late:
                grad.mul_(2)
            co.foreach_precondition_(late, inputs, damping=0.1)
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(a, b) for a, b in zip(late, want, strict=True))


@pytest.mark.parametrize("scaling", ["absolute", "trace"])
def test_a_whole_step_is_captured_and_replayed(scaling):
    """Forward, row capture, backward, correction and SGD in one graph, against the same step without one."""

    def setup():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), co.nn.Modulus(), torch.nn.Linear(200, 10)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        pre = co.Preconditioner(model, optimizer, damping=0.1, scaling=scaling, decay=0.5, max_rows=256)
        return model, optimizer, pre

    x, target = torch.randn(128, 300, device="cuda"), torch.randn(128, 10, device="cuda")

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()

    model, optimizer, _pre = setup()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(20):
        x.normal_(generator=torch.Generator("cuda").manual_seed(len(losses)))
        graph.replay()
        losses.append(float(torch.nn.functional.mse_loss(model(x), target)))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert losses[-1] < losses[0]


def test_a_replayed_correction_is_the_eager_one():
    grads, inputs = layers()
    static = [grad.clone() for grad in grads]
    graph = torch.cuda.CUDAGraph()
    corrected(grads, inputs, scaling="trace")  # loads the kernels
    with torch.cuda.graph(graph):
        info = co.foreach_precondition_(static, inputs, damping=0.1, scaling="trace")
    for factor in (1.0, 3.0):
        for copy, grad in zip(static, grads, strict=True):
            copy.copy_(factor * grad)
        graph.replay()
        want = corrected([factor * grad for grad in grads], inputs, scaling="trace")
        assert all(torch.equal(a, b) for a, b in zip(static, want, strict=True))
        assert not info.any()


def test_one_kernel_corrects_all_layers():
    """And nothing else runs: not even where thread blocks meet in device memory are counters cleared first."""
    grads, inputs = layers()
    for scaling in ("absolute", "trace"):
        corrected(grads, inputs, scaling=scaling)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            co.foreach_precondition_(grads, inputs, damping=0.1, scaling=scaling)
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(names) == 1 and "precondition_kernel" in names[0], names


def overlapping(rounds=20):
    """Eager on three streams and replayed from two graphs at once; True if every result is that of a call alone."""
    grads, inputs = layers()
    want = corrected(grads, inputs, scaling="trace")
    streams = [torch.cuda.Stream() for _ in range(5)]
    graphs, results = [], [[grad.clone() for grad in grads] for _ in streams]
    for copies in results[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            co.foreach_precondition_(copies, inputs, damping=0.1, scaling="trace")
    for _ in range(rounds):
        torch._foreach_copy_([copy for copies in results for copy in copies], grads * len(streams))
        torch.cuda.synchronize()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < len(graphs):
                    graphs[i].replay()
                else:
                    co.foreach_precondition_(results[i], inputs, damping=0.1, scaling="trace")
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for copies in results for a, b in zip(copies, want, strict=True)):
            return False
    return True


def test_calls_that_overlap_do_not_meet():
    """Each counts in a place of its own; a shared one would hang or spoil a result."""
    assert overlapping()


def test_more_captured_calls_than_places():
    """The 193rd of a process counts in its workspace, which its graph fills with zeros first."""
    grads, inputs = layers()
    corrected(grads, inputs, scaling="trace")
    for _ in range(200):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            co.foreach_precondition_(grads, inputs, damping=0.1, scaling="trace")
        del graph
    assert overlapping(rounds=3)


def test_the_current_device_does_not_matter():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    grads, inputs = layers("cuda:1")
    want = corrected(*layers("cuda:0"))
    with torch.cuda.device(0):
        got = corrected(grads, inputs)
        assert torch.equal(co.modulus(inputs[0]), inputs[0].abs())
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_out_of_memory_leaves_the_gradients():
    """The workspace of the traces of 128 chunks of 256 units is 32 MiB; the allocator may hand out no more."""
    gc.collect()
    torch.cuda.empty_cache()
    grad, rows = torch.randn(8, 256 * 128, device="cuda"), torch.randn(64, 256 * 128, device="cuda")
    before = grad.clone()
    torch.cuda.synchronize()
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        with pytest.raises(RuntimeError):
            co.foreach_precondition_([grad], [rows], chunk=256, scaling="trace")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(grad, before)
    co.foreach_precondition_([grad], [rows], chunk=256, scaling="trace")
    assert not torch.equal(grad, before)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    x = torch.ones(2**31 + 1000, dtype=torch.bfloat16, device="cuda")
    x[-3:] = -2
    y, signs = torch.ops.consistency_ops.modulus_forward(x)
    assert y[-5:].tolist() == [1, 1, 2, 2, 2]
    assert signs[-1].item() == 0b11100000
    del y, signs
    wide = x.view(-1, 8)[: 2**28 + 100]
    rows, state = torch.zeros(100, 8, device="cuda"), torch.zeros(1, STATE_SIZE, dtype=torch.int64, device="cuda")
    capture(rows, state, wide, 0, -1, 0)
    assert (rows[: int(state[0, 0])] == 1).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_modulus_is_that_of_torch(dtype):
    x = torch.randn(50, dtype=dtype, device="cuda", requires_grad=True)
    y = co.modulus(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.abs())
    torch.testing.assert_close(x.grad, x.detach().sgn())
