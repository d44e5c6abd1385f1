"""The random division and row sampling: the same in C++ and Python, a bijection, equal chunks, uniform."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import consistency_ops as co
from consistency_ops import reference
from support.samples import lay_out

SHAPES = [
    (units, chunk, group)
    for units in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 256, 257, 785, 1000, 4096, 11009)
    for chunk, group in ((1, 1), (2, 1), (32, 8), (32, 1), (100, 16), (128, 8), (128, 128), (256, 4), (256, 3))
]
KEYS = ((0, 0, 0), (1, 2, 3), (2**64 - 1, 2**63 + 5, 2**31), (12345678901234, 7, 1))


@pytest.fixture(scope="module")
def library():
    import consistency_ops._C as extension

    return ctypes.CDLL(extension.__file__)


def native_division(library, units, chunk, group, seed, step, layer):
    out = np.full(units + 1, -7, dtype=np.int64)
    sizes = [ctypes.c_int64(value) for value in (units, chunk, group)]
    key = ctypes.c_uint64(seed), ctypes.c_uint64(step), ctypes.c_uint32(layer)
    status = library.co_division(*sizes, *key, out.ctypes.data_as(ctypes.c_void_p))
    assert status == 0 and out[-1] == -7
    return out[:-1]


def test_same_division_in_cpp_and_python(library):
    for (units, chunk, group), (seed, step, layer) in itertools.product(SHAPES, KEYS):
        want = reference.division(units, chunk, group, seed, step, layer).numpy()
        got = native_division(library, units, chunk, group, seed, step, layer)
        assert np.array_equal(got, want), (units, chunk, group, seed, step, layer)


def test_same_row_sample_in_cpp_and_python(library):
    counts, limits = (0, 1, 2, 99, 100, 101, 8000, 32_000, 2**40), (1, 7, 100, 10_000, 2**63 - 1)
    for rows, max_rows in itertools.product(counts, limits):
        if rows / max_rows > 2**32 or min(rows, max_rows) > 100_000:
            continue  # beyond what random.h promises, or what memory holds
        for seed, step, layer in KEYS:
            want = reference.sample_rows(rows, max_rows, seed, step, layer).numpy()
            out, count = np.full(len(want) + 1, -7), ctypes.c_int64(-1)
            key = ctypes.c_uint64(seed), ctypes.c_uint64(step), ctypes.c_uint32(layer)
            arguments = ctypes.c_int64(rows), ctypes.c_int64(max_rows), *key, ctypes.byref(count)
            assert library.co_sample_rows(*arguments, None) == 0 and count.value == len(want)
            assert library.co_sample_rows(*arguments, ctypes.c_void_p(out.ctypes.data)) == 0
            assert np.array_equal(out[:-1], want) and out[-1] == -7, (rows, max_rows)
            assert len(want) <= max_rows and (len(want) >= 1 or rows == 0)


@pytest.mark.parametrize(("rows", "max_rows"), [(100, 100), (101, 100), (1000, 90), (131_072, 4096), (7, 2), (5, 1)])
def test_one_row_of_every_block(rows, max_rows):
    stride = -(-rows // max_rows)
    for step in range(20):
        taken = reference.sample_rows(rows, max_rows, seed=3, step=step)
        blocks = torch.arange(-(-rows // stride))
        assert torch.equal(taken // stride, blocks) and int(taken[-1]) < rows
        another = reference.sample_rows(rows, max_rows, seed=3, step=step + 1)
        assert stride == 1 or len(taken) < 10 or not torch.equal(taken, another)


def test_every_row_of_a_block_is_taken_as_often_as_any_other():
    """Also in the last block, which is shorter and gives a row all the same."""
    rows, stride, steps = 400 * 16 + 5, 16, 60
    places, last = np.zeros(stride, int), np.zeros(5, int)
    for step in range(steps):
        taken = reference.sample_rows(rows, 401, seed=1, step=step, layer=2).numpy()
        places += np.bincount(taken[:-1] % stride, minlength=stride)
        last[taken[-1] - 400 * stride] += 1
    for counts, draws in ((places, 400 * steps), (last, steps)):
        expected = draws / len(counts)
        # Chi squared with k - 1 degrees of freedom, beyond the 99.99th percentile of the normal approximation.
        assert ((counts - expected) ** 2 / expected).sum() < len(counts) - 1 + 5 * (2 * (len(counts) - 1)) ** 0.5


def test_rows_with_a_period_are_met_as_often_as_they_are():
    """Images of every width, and every period that a sequence may have: no column takes more than its share.

    One row in s at a fixed distance would meet a single column wherever s is a multiple of the width."""
    for period in range(2, 65):
        rows = 64 * period * 32
        for stride in (period, 32):
            share = np.zeros(period)
            for step in range(4):
                taken = reference.sample_rows(rows, rows // stride, seed=5, step=step, layer=1).numpy()
                share += np.bincount(taken % period, minlength=period) / len(taken) / 4
            draws = 4 * rows // stride
            # Six standard deviations of a binomial share; strata make it narrower.
            assert np.abs(share - 1 / period).max() < 6 * (1 / period / draws) ** 0.5, (period, stride)


@pytest.mark.parametrize("call", ["division", "sample_rows"])
def test_bad_arguments_are_refused(library, call):
    out = (ctypes.c_int64 * 16)(*([-7] * 16))
    if call == "division":
        for units, chunk, group in ((-1, 4, 1), (8, 0, 1), (8, -1, 1), (8, 4, 0), (8, 4, -1)):
            arguments = [ctypes.c_int64(v) for v in (units, chunk, group)] + [ctypes.c_uint64(0)] * 2
            assert library.co_division(*arguments, ctypes.c_uint32(0), out) == -1, (units, chunk, group)
    else:
        for rows, max_rows, count in ((-1, 4, out), (4, 0, out), (4, -3, out), (4, 2, None)):
            arguments = [ctypes.c_int64(rows), ctypes.c_int64(max_rows)] + [ctypes.c_uint64(0)] * 2
            assert library.co_sample_rows(*arguments, ctypes.c_uint32(0), count, out) == -1, (rows, max_rows)
    assert list(out) == [-7] * 16


def test_every_unit_once_and_chunks_equal_within_one():
    for units, chunk, group in SHAPES:
        order = reference.division(units, chunk, group, 5, 6, 7)
        assert torch.equal(order.sort().values, torch.arange(units)), (units, chunk, group)
        bounds = reference.chunk_bounds(units, chunk)
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
        assert len(sizes) == math.ceil(units / chunk) and sum(sizes) == units
        assert max(sizes) <= chunk and max(sizes) - min(sizes) <= 1
    assert reference.chunk_bounds(129, 128) == [0, 65, 129]


def test_groups_of_consecutive_units_move_together():
    """Every full group keeps its order in consecutive positions, wherever the cyclic offset puts it."""
    for units, chunk, group in ((64, 32, 8), (100, 32, 8), (785, 128, 16), (257, 128, 4)):
        order = reference.division(units, chunk, group, seed=3)
        consecutive = (order[1:] - order[:-1]) % units == 1
        assert consecutive.sum() >= (units // group) * (group - 1)


def division_of(units, chunk, group, draws):
    """(draws, units): position -> unit, over steps of one seed."""
    return np.stack([reference.division(units, chunk, group, 17, step, 0).numpy() for step in range(draws)])


def chi_square_is_plausible(counts, expected, freedom, tests):
    """Whether Pearson's statistic is below what ``tests`` uniform draws exceed once in 1e4 (Bonferroni)."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return statistic <= chi2.isf(1e-4 / tests, freedom)


def test_small_division_draws_every_order_alike():
    """All units! orders of a tiny layer are equally likely: the exact division of the paper."""
    for units in (2, 3, 4):
        draws = division_of(units, 1, 1, 4000)
        orders = {order: i for i, order in enumerate(itertools.permutations(range(units)))}
        counts = np.bincount([orders[tuple(draw)] for draw in draws], minlength=len(orders))
        assert chi_square_is_plausible(counts, len(draws) / len(orders), len(orders) - 1, 3), (units, counts)


@pytest.mark.parametrize(
    ("units", "chunk", "group"), [(5, 2, 1), (16, 8, 1), (33, 8, 1), (64, 16, 4), (100, 32, 8), (129, 128, 8)]
)
def test_unit_and_position_are_independent(units, chunk, group):
    """A fixed unit falls on every position of the division equally often (multinomial with `units` cells); in groups of
    a multiple of 8 units on every one that half a group further on or back would be it again, and the units behind the
    last half group on their own."""
    draws = division_of(units, chunk, group, 3000)
    turn = group // 2 if group % 8 == 0 else 1
    rotated = units // turn * turn
    for unit in range(rotated):
        counts = np.bincount(np.nonzero(draws == unit)[1], minlength=units)
        cells = counts[unit % turn : rotated : turn]
        assert counts.sum() == cells.sum(), unit
        assert chi_square_is_plausible(cells, len(draws) / len(cells), len(cells) - 1, units), unit
    assert (draws[:, rotated:] == np.arange(rotated, units)).all()


@pytest.mark.parametrize(("units", "group"), [(768, 8), (769, 8), (4096, 16), (1000, 16), (785, 8)])
def test_four_units_on_a_multiple_of_four_stay_together(units, group):
    """In groups of 8 or 16 units, whose half is a multiple of 4: kernels read them at once."""
    for step in range(20):
        order = reference.division(units, 128, group, seed=5, step=step)
        fours = order[: units // group * group].reshape(-1, 4)
        whole = fours[:, 0] < units // 4 * 4 - 3
        assert (fours[whole, 0] % 4 == 0).all()
        assert (fours[whole] - fours[whole, :1] == torch.arange(4)).all()


@pytest.mark.parametrize(("units", "chunk"), [(6, 3), (16, 8), (64, 32), (257, 128)])
def test_pairs_of_units_share_a_chunk_as_often_as_by_chance(units, chunk):
    """group = 1: P(two units in one chunk) = sum over chunks of s (s - 1) / (d (d - 1)), for every pair alike.

    Pairs of one draw are dependent, so every pair is tested by its own binomial z-score, and the largest must stay
    below the two-sided quantile of all of them."""
    draws, bounds = 1500, reference.chunk_bounds(units, chunk)
    together = np.zeros((units, units))
    for order in division_of(units, chunk, 1, draws):
        member = np.zeros((units, len(bounds) - 1))
        for c, (begin, end) in enumerate(itertools.pairwise(bounds)):
            member[order[begin:end], c] = 1
        together += member @ member.T
    sizes = np.diff(bounds)
    probability = (sizes * (sizes - 1)).sum() / (units * (units - 1))
    pairs = together[np.triu_indices(units, 1)]
    z = np.abs(pairs - draws * probability) / math.sqrt(draws * probability * (1 - probability))
    assert z.max() ** 2 <= chi2.isf(1e-4 / len(pairs), 1)


def test_a_large_division_is_uniform():
    """Chunk of every unit over 400 draws of 4096 units: 4096 x 32 counts, one chi-square a unit."""
    units, chunk, draws = 4096, 128, 400
    counts = np.zeros((units, units // chunk))
    for order in division_of(units, chunk, 8, draws):
        counts[order, np.arange(units) // chunk] += 1
    for unit in range(units):
        assert chi_square_is_plausible(counts[unit], draws * chunk / units, units // chunk - 1, units), unit


def test_seed_step_and_layer_all_change_the_division():
    base = reference.division(1000, 128, 1, 1, 2, 3)
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (1, 2 + 2**32, 3)):
        assert (reference.division(1000, 128, 1, *key) != base).sum() > 900
    assert torch.equal(reference.division(1000, 128, 1, 1, 2, 3), base)


def test_subsampling_of_the_cifar_network():
    """512000, 128000, 32000, 8000 and 500 rows of its layers give strides of 52, 13, 4, 1, 1.

    The released code of arXiv 1708.00631 has no stride above 50. There is no such cap here: max_rows is a promise."""
    for rows, stride in ((512_000, 52), (128_000, 13), (32_000, 4), (8_000, 1), (500, 1)):
        taken = reference.sample_rows(rows, 10_000)
        assert torch.equal(taken // stride, torch.arange(-(-rows // stride)))


@pytest.mark.parametrize("seed", range(4))
def test_the_op_uses_this_division(seed):
    """A gradient that is one in a single unit comes back with zeros outside the chunk of that unit."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 100, generator=generator)
    order = reference.division(100, 32, 8, seed, 0, 0)
    bounds = reference.chunk_bounds(100, 32)
    for begin, end in itertools.pairwise(bounds):
        grad = torch.zeros(1, 100)
        grad[0, order[begin]] = 1
        corrected = co.precondition(grad, lay_out(inputs, "every-other"), damping=0.1, chunk=32, group=8, seed=seed)
        assert set(corrected[0].nonzero()[:, 0].tolist()) == set(order[begin:end].tolist())
