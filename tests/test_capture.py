"""Row capture: which rows land in the buffer, whatever the strides, dtypes and sizes, and how calls are pooled."""

import random

import pytest
import torch

import consistency_ops as co
from consistency_ops import reference
from consistency_ops.engine.capture_states import STATE_SIZE
from consistency_ops.ops import portable_capture

capture = torch.ops.consistency_ops.capture_rows_.default
mark = torch.ops.consistency_ops.capture_mark_.default
USED, SEEN, STRIDE, MARK, STEP, PAUSED = 0, 1, 2, 4, 7, 8
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
    if dtype == torch.float32:
        return [*wide, torch.bfloat16]  # rounded
    return [*wide, dtype] if dtype in HALVES else wide


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_one_call_are_the_reference_sample(seed, kernels):
    random.seed(seed)
    for _ in range(20 if kernels.kind == "second" else 100):  # many of torch's operations a call, each sent elsewhere
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


def test_rows_are_rounded_to_bfloat16_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (4096, 16), generator=generator).to(torch.int32)
    words[:1024] &= -65536 >> 1  # ties and numbers in between
    words[1024:1040, 0] = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F7FFFFF] * 4, dtype=torch.int32)
    for x in (
        words.view(torch.float32),
        words.view(torch.float32).t().contiguous().t(),
        words.view(torch.float32)[:, :13],
    ):
        rows, state = torch.zeros(x.shape, dtype=torch.bfloat16), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
        capture(rows, state, x, 0, 1, 0)
        torch.testing.assert_close(rows, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


class Stream:
    """What capture.h says of several calls, in lists: the kept rows of the stream, one of every block."""

    def __init__(self, capacity, seed, step, layer):
        self.capacity, self.key = capacity, (seed, step, layer)
        self.kept, self.stride, self.level, self.position = [], 0, 0, 0

        self.words = {}

    def word(self, kind, level, block):
        if (kind, level) not in self.words:
            self.words[kind, level] = reference.block_words(kind, level, 400, *self.key).tolist()
        return self.words[kind, level][block]

    def row_of(self, block):
        return block * self.stride + ((self.word(reference.ROW_DRAW, self.level, block) * self.stride) >> 32)

    def due_below(self, end):
        rows, row = [], self.due
        while row < end:
            rows.append(row)
            row = self.row_of(len(self.kept) + len(rows))
        return rows, row

    def double(self):
        """Every pair of blocks keeps the row of one; the block of the row that is due may be either."""
        old, rows, blocks = self.row_of(len(self.kept) + 1), [*self.kept, self.due], []
        rows.append(old)  # of the block after it
        for pair in range(len(self.kept) // 2 + 1):
            both = rows[2 * pair : 2 * pair + 2]
            blocks.append(both[self.word(reference.PAIR_DRAW, self.level + 1, pair) >> 31] if len(both) == 2 else None)
        complete = [row for row in blocks if row is not None and row in self.kept]
        self.level, self.stride = self.level + 1, self.stride * 2
        self.kept = complete
        self.due = blocks[len(complete)] if len(complete) < len(blocks) else self.row_of(len(complete))

    def call(self, size):
        """The numbers of the rows in the buffer after it."""
        if self.stride == 0:
            self.first_end = size
            self.stride = max(1, -(-size // self.capacity))
            self.kept = reference.sample_rows(size, self.capacity, *self.key).tolist()
            self.position = size
            self.due = self.row_of(len(self.kept))
            return
        if self.level == 0 and self.position <= self.first_end:  # its last block goes on
            block, length = len(self.kept) - 1, (self.position - 1) % self.stride + 1
            place = (self.word(reference.PAIR_DRAW, 0, block) * self.stride) >> 32
            if length < self.stride and place >= length:
                self.kept, self.due = self.kept[:-1], block * self.stride + place
        end = self.position + size
        while len(self.kept) + len(self.due_below(end)[0]) > self.capacity:
            self.double()
        rows, self.due = self.due_below(end)
        self.kept += rows
        self.position = end


@pytest.mark.parametrize("sizes", [(10, 10, 10), (3, 90, 1, 40), (200, 5), (1,) * 20, (7, 300, 2, 2, 11, 40)], ids=str)
@pytest.mark.parametrize("capacity", [1, 2, 8, 33, 1000])
def test_pooled_calls_are_one_stream_in_blocks(sizes, capacity, kernels):
    total = sum(sizes)
    values = torch.arange(total, dtype=torch.float32)[:, None]
    for seed in range(1 if kernels.kind == "second" else 2):
        rows, state = torch.empty(capacity, 1), torch.zeros(4, STATE_SIZE, dtype=torch.int64)
        stream = Stream(capacity, seed, 9, 3)
        state[:, STEP] = 9
        for part in values.split(sizes):
            capture(rows, state, part, 3, -1, seed)
            stream.call(len(part))
            used, seen, stride = state[3, [USED, SEEN, STRIDE]].tolist()
            assert rows[:used, 0].tolist() == stream.kept and used <= capacity, (seed, len(part))
            assert seen == stream.position and stride == stream.stride
            mark(rows, state, 3, False)
        assert stream.position // stream.stride <= len(stream.kept) <= -(-stream.position // stream.stride)
        if total <= capacity:
            assert torch.equal(rows[:total], values)


@pytest.mark.parametrize("period", [2, 3, 8, 31, 32, 64])
def test_pooled_rows_with_a_period_are_met_as_often_as_they_are(period):
    """Also where the buffer was thinned several times over; rows that drift are met everywhere."""
    size, calls, capacity = 1024, 12, 700
    share, where = torch.zeros(period), torch.zeros(4)
    for step in range(8):
        rows, state = torch.empty(capacity, 1), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
        state[0, STEP] = step
        for part in torch.arange(size * calls, dtype=torch.float64).view(calls, size, 1):
            capture(rows, state, part.float(), 0, -1, 1)
            mark(rows, state, 0, False)
        taken = rows[: int(state[0, USED]), 0].long()
        share += torch.bincount(taken % period, minlength=period) / len(taken) / 8
        where += torch.bincount(taken * 4 // (size * calls), minlength=4) / len(taken) / 8
    draws = 8 * size * calls // int(state[0, STRIDE])
    assert (share - 1 / period).abs().max() < 6 * (1 / period / draws) ** 0.5
    assert (where - 0.25).abs().max() < 0.01


@pytest.mark.parametrize("width", [*range(8, 65, 7), 32, 64])
def test_images_of_every_width_have_their_covariance(width):
    """A step sees all columns of an image, however its width divides the stride.

    The columns differ as much as they can: the largest error is that of a sample of one column."""
    columns = torch.nn.functional.one_hot(torch.arange(width) * 8 // width, 8).float()
    images = columns.T[None, :, None].expand(64, 8, 16, width)
    rows = images.movedim(1, -1).reshape(-1, 8)
    full = rows.T @ rows / len(rows)
    for stride in (width, 2 * width, 16):
        options = dict(chunk=8, max_rows=len(rows) // stride)
        errors = [
            float((co.chunked_covariance(rows, **options, seed=seed)[0] - full).norm() / full.norm())
            for seed in range(4)
        ]
        assert max(errors) < 0.35, (stride, errors)


def test_a_paused_layer_and_an_empty_input_leave_everything_alone():
    rows, state = torch.full((4, 3), 7.0), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
    capture(rows, state, torch.zeros(0, 3), 0, -1, 0)
    state[0, PAUSED] = 1
    before = state.clone()
    capture(rows, state, torch.zeros(2, 3), 0, -1, 0)
    assert torch.equal(state, before) and (rows == 7).all()


@pytest.mark.parametrize("forward", [40, 41, 300])
def test_a_restart_leaves_one_row_of_every_block_behind_it(forward):
    """The blocks are numbered anew, so that later calls and thinning go on with the rows that stayed."""
    for seed in range(8):
        rows, state = torch.full((32, 1), -1.0), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
        stream = torch.arange(3000, dtype=torch.float32)[:, None]
        capture(rows, state, stream[:100], 0, -1, seed)
        mark(rows, state, 0, False)
        capture(rows, state, stream[100 : 100 + forward], 0, -1, seed)
        mark(rows, state, 0, True)
        taken = rows[: int(state[0, USED]), 0]
        assert taken.min() >= 100
        for part in stream[100 + forward :].split(500):
            capture(rows, state, part, 0, -1, seed)
            mark(rows, state, 0, False)
            taken, stride = rows[: int(state[0, USED]), 0], int(state[0, STRIDE])
            # Neighbouring blocks give rows that are less than two blocks apart, and in their order.
            assert (taken.diff() > 0).all() and taken.diff().max() < 2 * stride and len(taken) <= 32
            assert 100 <= taken.min() < 100 + 2 * stride


@pytest.mark.parametrize("operator", [capture, portable_capture.capture_rows_], ids=["native", "portable"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_bring_the_mark_of_the_backward_pass_before_them(operator, seed):
    """Bit by bit what a mark of its own leaves, whether rows are thinned out or not, and of recomputed ones."""
    random.seed(seed)
    capacity = random.choice([8, 100, 400])
    several = [(torch.zeros(capacity, 3), torch.zeros(1, STATE_SIZE, dtype=torch.int64)) for _ in range(2)]
    marked = 0
    for _ in range(8):
        x, marks, in_backward = torch.randn(random.randint(1, 60), 3), random.random() < 0.6, random.random() < 0.2
        (rows, state), (others, others_state) = several
        if marks:
            mark(rows, state, 0, False)
        operator(rows, state, x, 0, 1, seed, in_backward)
        operator(others, others_state, x, 0, 1, seed, in_backward, marks)
        assert torch.equal(rows, others) and torch.equal(state, others_state)
        marked = max(marked, int(state[0, MARK]))
        if random.random() < 0.3:  # what the mark decides
            mark(rows, state, 0, True)
            mark(others, others_state, 0, True)
            assert torch.equal(rows, others) and torch.equal(state, others_state)
    assert marked > 0


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
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        rows, state = torch.zeros(20_000, 48), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
        capture(rows, state, x, 0, 1, 3)
        results.append((rows, state))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows_of_x", [1001, 4096])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_copy_every_row_of_a_block_once(rows_of_x, threads):
    x = torch.randn(2, rows_of_x, 129)
    rows, state = torch.full((2 * rows_of_x + 3, 129), -7.0), torch.zeros(1, STATE_SIZE, dtype=torch.int64)
    torch.set_num_threads(threads)
    for part in x:
        capture(rows, state, part, 0, -1, 0)
    assert torch.equal(rows[: 2 * rows_of_x], x.flatten(0, 1))
    assert bool((rows[2 * rows_of_x :] == -7).all())


def test_a_recomputation_counts_only_where_the_forward_pass_did_not():
    rows, state = torch.zeros(8, 2), torch.zeros(2, STATE_SIZE, dtype=torch.int64)
    x = torch.randn(3, 2)
    for index, calls in enumerate([(False, True, False, True), (True, True)]):
        for in_backward in calls:
            capture(rows, state, x, index, -1, 0, in_backward)
    assert state[:, USED].tolist() == [6, 6]
