"""What the launchers decide on the host: the CPU's tasks and the CUDA launch of random and of given layers."""

import random

import pytest

from benchmarks import plans

COVARIANCE, FACTOR, APPLY = range(3)
FLOAT32, BFLOAT16, FLOAT16 = 0, 2, 3  # DType of csrc/include/consistency_ops/types.h
PACKED_BYTES = 512 << 10  # kPackedBytes of csrc/cpu/plan.h
MAX_SHARED = 227 << 10  # bytes of a CTA of an H200


def shapes(seed):
    """Layers of one network: some share the input of the one before, some have a bias, a tap or a unit only."""
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.randint(1, 12)):
        units, has_bias = draw.choice((1, 3, 17, 64, 100, 300, 768, 2000)), draw.random() < 0.5
        rows, shared = draw.choice((0, 1, 5, 64, 700, 20_000)), bool(layers) and draw.random() < 0.3
        if shared:
            units, has_bias = layers[-1]["units"], layers[-1]["has_bias"]
        outputs, taps = draw.choice((1, 10, 100, 1000)), draw.choice((1, 1, 9))
        layers.append(
            {"units": units, "rows": rows, "outputs": outputs, "taps": taps, "has_bias": has_bias, "same_input": shared}
        )
    return draw, layers


@pytest.fixture(scope="module")
def module():
    return plans.module()


@pytest.mark.parametrize("seed", range(40))
def test_every_chunk_and_output_of_the_cpu_has_its_task_after_what_it_waits_for(module, seed):
    draw, layers = shapes(seed)
    threads, chunk, float64 = draw.choice((1, 2, 7)), draw.choice((8, 64, 128, 256)), draw.random() < 0.5
    for layer in layers:
        layer["x_dtype"] = draw.choice((FLOAT32, BFLOAT16))
    described = [module.Shape(**layer) for layer in layers]
    plan = module.cpu_plan(described, threads, chunk, step=seed, float64=float64, pairs=draw.random() < 0.5)
    tasks = plan["tasks"]

    def of(phase, layer, before=None):
        return [task for task in tasks[:before] if task[:2] == (phase, layer)]

    for at, (phase, layer, *_, ticket, in_phase) in enumerate(tasks):
        assert ticket <= at  # or one thread alone would wait for ever
        if phase != COVARIANCE:
            head = plan["layers"][layer]["head"]
            assert in_phase == len(of(phase - 1, head)) == len(of(phase - 1, head, at))

    for index, (layer, planned) in enumerate(zip(layers, plan["layers"], strict=True)):
        head = plan["layers"][planned["head"]]
        if head["active"]:
            outputs = [o for *_, begin, end, _, _ in of(APPLY, index) for o in range(begin, end)]
            assert outputs == list(range(layer["outputs"]))
        chunks = planned["chunks"]
        for phase in (COVARIANCE, FACTOR):
            assert [c for *_, begin, end, _, _ in of(phase, index) for c in range(begin, end)] == list(
                range(len(chunks))
            )
        if not planned["active"]:
            assert chunks == []
            continue
        sizes = [at["size"] for at in chunks]
        assert sum(sizes) == layer["units"] + layer["has_bias"]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= chunk
        units = [unit + k for unit, length in planned["runs"] for k in range(length)]
        assert sorted(units) == list(range(layer["units"]))
    # Layers that wait for the same ticket share the storage.
    ends = {}
    for index in dict.fromkeys(layer for phase, layer, *_ in tasks if phase == COVARIANCE):
        wave = of(COVARIANCE, index)[0][4]
        for at in plan["layers"][index]["chunks"]:
            assert at["storage"] >= ends.get(wave, 0)
            ends[wave] = at["storage"] + (16 * at["panels"]) ** 2
    assert max(ends.values(), default=0) == plan["storage_elements"]
    # One chunk is the least that a task can pack.
    widest = max((at["panels"] * p["packed_panel"] for p in plan["layers"] for at in p["chunks"]), default=0)
    assert plan["packed_elements"] <= max(PACKED_BYTES // (8 if float64 else 4), widest)


@pytest.mark.parametrize("seed", range(10))
def test_what_decides_about_rounding_does_not_depend_on_the_threads(module, seed):
    described = [module.Shape(**layer) for layer in shapes(seed)[1]]

    def what_rounds(threads):
        planned = module.cpu_plan(described, threads=threads, step=seed)["layers"]
        for layer in planned:
            for chunk in layer["chunks"]:
                del chunk["storage"]
        return planned

    assert what_rounds(1) == what_rounds(2) == what_rounds(16)


@pytest.mark.parametrize(
    ("units", "dtype", "float32_rows", "pair_rows"),
    [
        (768, BFLOAT16, 128, 128),  # never more rows, whose rounding errors would add up
        (2048, BFLOAT16, 64, 128),
        (4096, BFLOAT16, 32, 64),
        (20_000, BFLOAT16, 32, 32),
        (4096, FLOAT32, 32, 32),
        (4096, FLOAT16, 32, 32),  # widened into the block
    ],
)
def test_two_rows_of_bfloat16_in_a_word_are_packed_in_half_the_memory(module, units, dtype, float32_rows, pair_rows):
    shape = module.Shape(units, 2048, 64, x_dtype=dtype)
    (widened,) = module.cpu_plan([shape])["layers"]
    (paired,) = module.cpu_plan([shape], pairs=True)["layers"]
    assert widened["row_block"] == float32_rows and not widened["in_pairs"]
    assert paired["row_block"] == pair_rows and paired["in_pairs"] == (dtype == BFLOAT16)
    words = pair_rows // 2 if dtype == BFLOAT16 else pair_rows
    assert paired["packed_panel"] == 16 * (words + 1)
    doubled = module.cpu_plan([shape], float64=True, pairs=True)["layers"][0]
    assert not doubled["in_pairs"]


@pytest.mark.parametrize("rows", [1, 16, 40, 64, 65])
@pytest.mark.parametrize("units", [256, 2048, 5120])
def test_chunks_with_few_rows_are_not_packed_in_pairs(module, units, rows):
    shape = module.Shape(units, rows, 64, x_dtype=BFLOAT16)
    (layer,) = module.cpu_plan([shape], chunk=256, pairs=True)["layers"]
    few = [chunk["row_panels"] > 0 for chunk in layer["chunks"]]
    assert layer["in_pairs"] == (not any(few))
    assert rows > 16 or all(few)


@pytest.mark.parametrize("units", range(1, 257, 5))
def test_a_cta_of_an_h200_holds_every_chunk(module, units):
    threads, tile_floats, arena_floats, shared = module.cta(units, MAX_SHARED)
    assert threads == (256 if units <= 128 else 512)
    side = -(-units // 32)
    assert tile_floats == side * (side + 1) // 2 * 32 * 33 and arena_floats > 0
    assert shared <= MAX_SHARED and (units > 128 or 2 * shared <= MAX_SHARED)


def test_a_chunk_that_does_not_fit_has_no_cta(module):
    assert module.cta(256, 99 << 10)[0] == 0
    with pytest.raises(ValueError, match="refuses"):
        module.cuda_plan([module.Shape(256, 512, 64)], chunk=256, shared_bytes=99 << 10)


@pytest.mark.parametrize(
    ("layers", "cluster", "ctas"),
    [  # the table of csrc/cuda/precondition/heuristics.h
        ([(784, 100), (100, 100), (100, 100), (100, 10)], 8, 80),
        ([(512, 512)] * 3, 8, 96),
        ([(4096, 4096)], 8, 256),
    ],
)
def test_how_many_ctas_work_on_a_chunk(module, layers, cluster, ctas):
    rows = {80: 128, 96: 1024, 256: 4096}[ctas]
    plan = module.cuda_plan([module.Shape(units, rows, outputs, group=8) for units, outputs in layers])
    assert (plan["cluster"], plan["ctas"]) == (cluster, ctas)


@pytest.mark.parametrize("seed", range(20))
def test_a_launch_fits_its_parameter_and_its_device(module, seed):
    layers = [layer for layer in shapes(seed)[1] if not layer["same_input"]]
    plan = module.cuda_plan([module.Shape(**layer) for layer in layers])
    assert len(plan["parameter"]) <= 32_764 and plan["shared_bytes"] <= MAX_SHARED
    assert plan["threads"] in (256, 512) or plan["ctas"] == 0
    chunks = {of["layer"]: of["chunks"] for of in plan["layers"]}
    assert chunks == {at: -(-(layer["units"] + layer["has_bias"]) // 128) for at, layer in enumerate(layers)}
