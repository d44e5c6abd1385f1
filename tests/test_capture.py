"""Row capture: which rows land in the buffer, whatever the strides, dtypes and sizes, and how calls are pooled."""

import random

import pytest
import torch

from consistency_ops import reference
from consistency_ops.engine.capture_states import STATE_SIZE

capture = torch.ops.consistency_ops.capture_rows_.default
mark = torch.ops.consistency_ops.capture_mark_.default
USED, SEEN, STRIDE, STEP, PAUSED = 0, 1, 2, 7, 8
HALVES = (torch.bfloat16, torch.float16)


def random_input():
    """A tensor of 1 to 7 dimensions, sliced, permuted and sometimes expanded, and its unit dimension."""
    dims = random.randint(1, 7)
    dtype = random.choice([torch.float32, torch.float64, *HALVES])
    shape = [random.choice([1, 2, 3, 5, 8]) for _ in range(dims)]
    x = torch.randn([size * random.choice([1, 2]) for size in shape]).to(dtype)
    order = random.sample(range(dims), dims)
    x = x[tuple(slice(size) for size in shape)].permute(order)
    if x.shape[0] == 1 and random.random() < 0.5:
        x = x.expand(4, *x.shape[1:])
    return x, random.randrange(dims)


def buffer_dtypes(dtype):
    wide = [torch.float64] if dtype == torch.float64 else [torch.float32, torch.float64]
    return [*wide, dtype] if dtype in HALVES else wide


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_one_call_are_the_reference_sample(seed):
    random.seed(seed)
    for _ in range(100):
        x, unit_dim = random_input()
        capacity, units = random.choice([1, 2, 7, 64, 1000]), x.shape[unit_dim]
        guarded = torch.full((capacity + 2, units), 7.0, dtype=random.choice(buffer_dtypes(x.dtype)))
        rows, state = guarded[1:-1], torch.zeros(5, STATE_SIZE, dtype=torch.int64)
        index, key = random.randrange(5), random.randint(0, 2**62)
        state[index, STEP] = step = random.randint(0, 9)
        capture(rows, state, x, index, unit_dim - random.choice([0, x.dim()]), key)
        expected = x.movedim(unit_dim, -1).reshape(-1, units)
        expected = expected[reference.sample_rows(len(expected), capacity, key, step, index)].to(rows.dtype)
        count = int(state[index, USED])
        assert torch.equal(rows[:count], expected), (x.shape, x.stride(), x.dtype, rows.dtype)
        assert (rows[count:] == 7).all() and (guarded[[0, -1]] == 7).all()


def test_every_half_is_widened_exactly():
    for dtype in HALVES:
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        rows, state = torch.zeros(65536, 1), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
        capture(rows, state, x, 0, 1, 0)
        torch.testing.assert_close(rows, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sizes", [(10, 10, 10), (3, 90, 1, 40), (200, 5), (1,) * 50], ids=str)
@pytest.mark.parametrize("capacity", [1, 8, 33, 1000])
def test_pooled_calls_are_one_evenly_strided_stream(sizes, capacity):
    total = sum(sizes)
    stream = torch.arange(total, dtype=torch.float32)[:, None]
    rows, state = torch.empty(capacity, 1), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
    for part in stream.split(sizes):
        capture(rows, state, part, 0, -1, 5)
    taken, stride = rows[: int(state[0, USED]), 0], int(state[0, STRIDE])
    assert int(state[0, SEEN]) == total and len(taken) <= capacity
    assert total // stride <= len(taken) <= -(-total // stride)
    assert torch.equal(taken.diff(), torch.full((max(0, len(taken) - 1),), float(stride)))
    if total <= capacity:
        assert torch.equal(rows[:total], stream)


def test_a_paused_layer_and_an_empty_input_leave_everything_alone():
    rows, state = torch.full((4, 3), 7.0), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
    capture(rows, state, torch.zeros(0, 3), 0, -1, 0)
    state[0, PAUSED] = 1
    before = state.clone()
    capture(rows, state, torch.zeros(2, 3), 0, -1, 0)
    assert torch.equal(state, before) and (rows == 7).all()


def test_a_restart_removes_the_rows_before_the_mark():
    rows, state = torch.zeros(8, 2), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
    first, second = torch.randn(3, 2), torch.randn(4, 2)
    capture(rows, state, first, 0, -1, 0)
    mark(rows, state, 0, False)
    capture(rows, state, second, 0, -1, 0)
    mark(rows, state, 0, False)  # accumulation: nothing is lost
    assert torch.equal(rows[: int(state[0, USED])], torch.cat([first, second]))
    state.zero_()
    capture(rows, state, first, 0, -1, 0)
    mark(rows, state, 0, False)
    capture(rows, state, second, 0, -1, 0)
    mark(rows, state, 0, True)
    assert torch.equal(rows[: int(state[0, USED])], second)
    mark(rows, state, 0, True)  # no rows since: the same forward pass, differentiated again
    assert torch.equal(rows[: int(state[0, USED])], second)


def test_results_do_not_depend_on_the_number_of_threads():
    x, results = torch.randn(64, 48, 40, 10), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows, state = torch.zeros(20_000, 48), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
            capture(rows, state, x, 0, 1, 3)
            results.append((rows, state))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_recomputation_counts_only_where_the_forward_pass_did_not():
    rows, state = torch.zeros(8, 2), torch.zeros(2, STATE_SIZE, dtype=torch.int64)
    x = torch.randn(3, 2)
    for index, calls in enumerate([(False, True, False, True), (True, True)]):
        for in_backward in calls:
            capture(rows, state, x, index, -1, 0, in_backward)
    assert state[:, USED].tolist() == [6, 6]
