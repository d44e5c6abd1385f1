"""Every barrier and fence of the CUDA kernels is needed, and the tests notice when one is gone or another mistake is
made.

Each test deletes one barrier, or plants one mistake in a copy of the sources.  Then a case must fail: of a mistake in
the plain build, or else with AddressSanitizer and UBSan, or else with ThreadSanitizer; of a barrier with
ThreadSanitizer, or else in the plain build.  A line that ends in ``// redundant: why`` is left out.

``make test-mutants`` runs all of it and ends with the table of mutant_table.py.
"""

import dataclasses
import re
import shutil
import sys

import linalg_cases
import mutant_table
import pytest
import simt_library as simt

from support import processes

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")]

SYNCHRONISATION = re.compile(
    r"((__syncthreads|__syncwarp|__threadfence|cluster_barrier)\(\)|barrier_(sync|arrive)\(k\w.*\));"
)
CASES = ("one chunk", "several layers", "bias", "nchw", "trace", "NaN in X", "NaN in G, bias", "infinity in X, trace")
CASES += ("several layers@one_cta", "bias@one_cta", "NaN in X@one_cta", "95@one_cta")  # no barrier of a cluster helps
CASES += ("bias of taps@one_cta",)
CASES += ("three launches", "three launches, trace of one chunk", "inverse apart", "bfloat16", "float16")
CASES += (
    "several layers@cluster",
    "trace@cluster",
    "several layers@queue",
    "bias@queue",
    "trace@queue",
    "NaN in X@queue",
)
CASES += ("96", "128", "128@one_cta", "128, X of 16 bits", "160", "160 of 16 bits", "not aligned")
CASES += tuple(f"permuted, {name}@packed" for name in ("blocks", "aligned, bias", "not aligned", "four layers"))
CASES += ("mixed types@sm_80", "not aligned@sm_80", "96@sm_80", "128 bfloat16@sm_80")
CASES += ("same input@queue", "same input, bias, trace@queue", "permuted, same input@packed")
CASES += tuple(f"whitened, {name}" for name in ("several layers", "no average", "no average, no trace", "bias"))
CASES += tuple(f"whitened, {name}" for name in ("taps", "bfloat16", "rows", "no rows yet", "NaN in X", "NaN in G"))
CASES += tuple(f"whitened, {name}" for name in ("damping raised", "damping raised, one chunk", "a chunk given up"))
CASES += tuple(f"whitened, {name}" for name in ("no gradient", "norm free", "not finished", "permuted", "160"))
CASES += ("whitened, not finished, norm free", "whitened, a gradient of the bias alone")
CASES += ("whitened, 160, a chunk given up", "whitened, stages apart")
CASES += ("whitened, float16@sm_80", "whitened, bias@sm_80", "whitened, not aligned")
CASES += (
    "overflow of float16",
    "overflow of one unit",
    "NaN at the end of a row of G",
    "well conditioned",
    "well conditioned@sm_80",
)
CASES += tuple(linalg_cases.PREFIX + name for name in linalg_cases.SMALL)
FILES = (
    "gram.cuh",
    "factor.cuh",
    "sweep.cuh",
    "tile_product.cuh",
    "apply.cuh",
    "gradient_rows.cuh",
    "plane_product.cuh",
    "chunk_io.cuh",
    "permute.cuh",
    "scheduler.cuh",
    "whitening.cuh",
    "precondition.cu",
    "substitute.cuh",
    "linalg.cu",
)


def find(pattern, files=FILES):
    """(file, line number) of every match outside comments."""
    found = []
    for name in files:
        lines = simt.kernel_source(name).read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if pattern.search(line) and not line.lstrip().startswith("//") and "// redundant: " not in line:
                found.append((name, number))
    return found


def copy_sources(folder):
    for part in ("csrc", "tests/simt"):
        shutil.copytree(simt.ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))


def edit(folder, file, number, change):
    """A copy of the sources in which one line is changed."""
    copy_sources(folder)
    change_line(folder, file, number, change)


def change_line(folder, file, number, change):
    path = simt.kernel_source(file, folder)
    lines = path.read_text().split("\n")
    changed = change(lines[number - 1])
    assert changed != lines[number - 1]
    lines[number - 1] = changed
    path.write_text("\n".join(lines))


# The names of cases that come first, because they reach what is in these files.
SOON = {
    "whitening.cuh": ("whitened",),
    "permute.cuh": ("permuted",),
    "linalg.cu": (linalg_cases.PREFIX,),
    "substitute.cuh": (linalg_cases.PREFIX + "solve",),
    "factor.cuh": ("whitened, bfloat16", linalg_cases.PREFIX, "whitened, 160", "160"),
    "sweep.cuh": ("one chunk", "bias@one_cta", "NaN in X@one_cta", linalg_cases.PREFIX + "inverse of 70"),
    "scheduler.cuh": ("NaN in X@queue", "whitened, bfloat16", "whitened, taps", "permuted, not aligned"),
}
SEEDS = {"plain": 4, "memory": 1, "races": 2}
# What a case says that has found something.
FOUND = (
    r"WARNING: (ThreadSanitizer: data race)",
    r"(ThreadSanitizer: SEGV)",
    r"(AddressSanitizer: [\w-]+)",
    r"runtime error: (.*)",
    r"Error: (simt: .*)",
    r"(simt: watchdog)",
    r"(AssertionError)",
)


@dataclasses.dataclass
class Finding:
    build: str
    case: str
    how: str


def what_was_found(done):
    """The words of a process that has failed by what it tested; any other failure is one of this test."""
    text = done.stdout + done.stderr
    words = [match[1] for pattern in FOUND if (match := re.search(pattern, text))]
    if done.returncode < 0:
        words.append(f"signal {-done.returncode}")
    assert words, f"exit status {done.returncode}, which is no find:\n{text[-3000:]}"
    assert "FATAL: ThreadSanitizer" not in text, text[-3000:]
    return words[0].strip().replace("AssertionError", "wrong numbers")


def noticed(folder, file, kinds, cases=CASES):
    """What the cases find in these sources, whose ``file`` is changed; None if they pass."""
    for kind in kinds:
        library = simt.build(kind, folder)
        names = sorted(cases, key=lambda name: not name.startswith(SOON.get(file, ())))
        # One case a process, because too many memory maps would pass for a find.
        for some in [[name] for name in names] if kind == "races" else [names]:
            done = simt.run_cases(kind, library, some, SEEDS[kind])
            if done.returncode != 0:
                passed = set(done.stdout.splitlines())
                return Finding(kind, next(name for name in some if name not in passed), what_was_found(done))
    return None


def capture_noticed(folder, kinds):
    """The same by the tests of the row capture."""
    file = simt.ROOT / "tests" / "simt" / "test_simt_capture.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "--tb=short", file]
    for kind in kinds:
        environment = {**simt.sanitizer_environment(kind), "SIMT_LIBRARY": str(simt.build(kind, folder))}
        selection = "many_tiles or restart or thin or paused" if kind == "races" else ""  # the others take too long
        done = processes.run([*command, "-k", selection], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
            return Finding(kind, failed[1] if failed else "", what_was_found(done))
    return None


BARRIERS = find(SYNCHRONISATION)
SWITCH = """#include <cstdlib>
inline const char* const simt_without_text = std::getenv("SIMT_WITHOUT");
inline const int simt_without = simt_without_text != nullptr ? std::atoi(simt_without_text) : -1;
"""


def make_barriers_optional(folder):
    """A copy of the sources, without the barrier BARRIERS[i] while the environment has SIMT_WITHOUT=i: one build."""
    copy_sources(folder)
    for i, (file, number) in enumerate(BARRIERS):
        change_line(
            folder, file, number, lambda line, i=i: SYNCHRONISATION.sub(rf"(simt_without == {i} ? void() : \1);", line)
        )
    host = simt.kernel_source("ptx_host.h", folder)
    host.write_text(SWITCH + host.read_text())


@pytest.fixture(scope="module")
def optional_barriers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("barriers")
    make_barriers_optional(folder)
    return folder


# ThreadSanitizer takes half an hour for all cases, which is the time limit of a test: there each is a test.
CONTROLS = [("races", [name]) for name in CASES] + [(kind, CASES) for kind in SEEDS if kind != "races"]


@pytest.mark.parametrize(("kind", "cases"), CONTROLS, ids=[f"{k}-{c[0]}" if len(c) == 1 else k for k, c in CONTROLS])
def test_nothing_is_noticed_where_nothing_is_wrong(optional_barriers, kind, cases):
    assert noticed(optional_barriers, "", [kind], cases) is None


@pytest.mark.parametrize("kind", ["plain", "races"])
def test_nothing_is_noticed_where_the_capture_is_right(tmp_path, kind):
    copy_sources(tmp_path)
    assert capture_noticed(tmp_path, [kind]) is None


@pytest.mark.parametrize("barrier", range(len(BARRIERS)), ids=lambda i: ":".join(map(str, BARRIERS[i])))
def test_deleted_synchronisation_is_noticed(optional_barriers, monkeypatch, barrier):
    monkeypatch.setenv("SIMT_WITHOUT", str(barrier))
    with judged(*BARRIERS[barrier]) as found:
        found.append(noticed(optional_barriers, BARRIERS[barrier][0], ["races", "plain"]))


CAPTURE_BARRIERS = find(SYNCHRONISATION, ["capture.cu"])


@pytest.mark.parametrize(("file", "number"), CAPTURE_BARRIERS)
def test_deleted_synchronisation_of_the_capture_is_noticed(tmp_path, file, number):
    edit(tmp_path, file, number, lambda line: SYNCHRONISATION.sub(";", line))
    with judged(file, number) as found:
        found.append(capture_noticed(tmp_path, ["plain", "races"]))


def plant(file, original, mutant):
    text = simt.kernel_source(file).read_text()
    assert text.count(original) == 1, (file, original)
    number = text[: text.index(original)].count("\n") + 1
    return file, number, original, mutant


# Not in the list, because they change no result:
#   gradient_rows.cuh  without `if (unit == kNoUnit) return;` the four units are asked one by one, and none is there
#   precondition.cu    `(none >> lane & 15u) == 15u` as `& 1u`: where the first of four positions is behind the chunk's
#                      end, so are the others
PLANTED = [
    plant("gram.cuh", "next <= kPartialRows)", "next < kPartialRows)"),
    plant("gram.cuh", "row < rows ? chunk.scratch.unit", "row <= rows ? chunk.scratch.unit"),
    plant("gram.cuh", "if (kSplit) {", "if (false) {"),
    plant("gram.cuh", "left[i / 2 * 4 * pitch + i % 2 * 8 + m * 16]", "left[i % 2 * 4 * pitch + i / 2 * 8 + m * 16]"),
    plant(
        "gram.cuh",
        "left = stage + lane / 16 * 8 * pitch + lane / 8 % 2 * 8",
        "left = stage + lane / 8 % 2 * 8 * pitch + lane / 16 * 8",
    ),
    plant("gram.cuh", ": b[n / 2][n % 2 * 2],", ": b[n / 2][n % 2],"),
    plant("gram.cuh", "is_lower ? a[1][i] : a[0][i]", "a[0][i]"),
    plant("gram.cuh", "kDiagonal ? a[n / 2 % kRows][n % 2 + 2]", "kDiagonal ? a[n / 2 % kRows][n % 2 + 1]"),
    plant("gram.cuh", "half, a[n / 2][n % 2], a", "half, a[0][n % 2], a"),
    plant("gram.cuh", "kColumns = 0x3210201010", "kColumns = 0x3210201011"),
    plant("gram.cuh", "fresh_thread() / 32 % 2 == 1);", "false);"),
    plant("factor.cuh", "inverse_pivot[j] = inverse;", "inverse_pivot[j] = pivot;"),
    plant("factor.cuh", "pivot > 0.0f && is_finite(pivot)", "pivot != 0.0f"),
    plant("factor.cuh", "fma(-row[j], row[j], row[j + 1]), j + 1", "row[j + 1], j + 1"),
    plant("factor.cuh", "while (j > i) j -= ++i;", "while (j > i + 1) j -= ++i;"),
    plant("factor.cuh", "base = job >> 2 * level << (level + 1)", "base = 0"),
    plant("factor.cuh", "panels + first / 2 % 2 * kTile", "panels"),
    plant("factor.cuh", "fma(-row[j + 1], row[j + 1], fma(-row[j], row[j], row[j + 2]))", "row[j + 2]"),
    plant("factor.cuh", "row[c] = fma(-row[j + 1], of_c.v[1],", "row[c] = fma(-row[j + 1], of_c.v[0],"),
    plant("factor.cuh", "job % 2 * (kTile / 2)", "0"),
    plant("factor.cuh", "job = warp + 1; job < 2", "job = warp + 2; job < 2"),
    plant("sweep.cuh", "fabs(rest) < 0x1p-6f", "true"),
    plant("sweep.cuh", "root = fma(0.5f * y, rest, y);", "root = 2.0f * y;"),
    plant("sweep.cuh", "pivot > 0.0f && is_finite(pivot)", "pivot != 0.0f"),
    plant("sweep.cuh", "z[m] = fma(-z[j], block[m][j], z[m]);", ""),
    plant("sweep.cuh", "lower.template clear<kNext - 1>();", ""),
    plant("sweep.cuh", "fma(-sign[m][r], high[m][i], pair.v[e])", "fma(sign[m][r], high[m][i], pair.v[e])"),
    plant("sweep.cuh", "(t ^ (i / 2 & 3))", "(t ^ (i / 2 & 7))"),
    plant("sweep.cuh", "first[e] += upper;", "first[e] -= upper;"),
    plant("sweep.cuh", "if (eight != p) last[e]", "if (true) last[e]"),
    plant("sweep.cuh", "2 * kRow + 1 > p ? -1.0f : 1.0f", "-1.0f"),
    plant("sweep.cuh", "c + 1 == kNext ? 0.0f : sum[c]", "sum[c]"),
    plant("sweep.cuh", "if (c < 2) return;", ""),
    plant("sweep.cuh", "barrier_sync(kFactorsReady + p % 2,", "barrier_sync(kFactorsReady,"),
    plant("tile_product.cuh", "if (kProducts > 2) mma", "if (kProducts > 3) mma"),
    plant("tile_product.cuh", "i / 2 * inner_a", "i % 2 * inner_a"),
    plant("gram.cuh", " && chunk.x_stage() * columns == kWarps * kLoads", ""),
    plant("apply.cuh", "if (++tap < taps) continue;", "if (++tap <= taps) continue;"),
    plant("apply.cuh", "sum = chunk.scratch.bias_sum;", "sum = 0.0f;"),
    plant("plane_product.cuh", "(p & 2) << 2 | (p & 12) >> 1", "(p & 14)"),
    plant("plane_product.cuh", "if (is_below) {", "if (true) {"),
    plant("plane_product.cuh", "(b == 0 ? 0 : above_16)", "0"),
    plant("apply.cuh", "multiply_by_planes<3, 3>", "multiply_by_planes<2, 2>"),
    plant("plane_product.cuh", "adds || q + 1 < kLevels);", "adds);"),
    plant("plane_product.cuh", "if (reads_below(triangle, k, n)) {", "if (true) {"),
    plant("plane_product.cuh", "s * 16, !kApart);", "0, !kApart);"),
    plant("plane_product.cuh", "+ n) * kPlaneTile + s * 16 * kTile", "+ n) * kPlaneTile + s * 16"),
    plant("plane_product.cuh", "add_now(total[i], term[i]);", "total[i] = term[i];"),
    plant("apply.cuh", "(kWarps == 8 ? together : 1)", "4"),
    plant(
        "plane_product.cuh",
        "kApart && n < 2; ++n) add(sum[n], term[n]);",
        "kApart && n < 1; ++n) add(sum[n], term[n]);",
    ),
    plant("chunk.cuh", "i < 4; ++i) add_now(sum[i], term[i]);", "i < 3; ++i) add_now(sum[i], term[i]);"),
    plant("apply.cuh", "const bool below = reads_below(triangle, k / 2, column);", "const bool below = true;"),
    plant("apply.cuh", ">> 4 * quad & 15u) == 15u", ">> 4 * quad & 1u) == 1u"),
    plant("gradient_rows.cuh", "if (single == kNoUnit) continue;", ""),
    plant("gradient_rows.cuh", "layer.g_unit_stride == 1 && bits % 4 == 0 ? 1 : 0", "layer.g_unit_stride == 1 ? 1 : 0"),
    plant("gradient_rows.cuh", "index + 8 < part.end ? 2 :", "true ? 2 :"),
    plant("apply.cuh", "chunk.scratch.not_finite[place_of_lane<kWarps>() + 8 * r] == 0", "true"),
    plant("precondition.cu", "(none >> lane & 15u) == 15u", "(none >> lane & 15u) != 0"),
    plant("precondition.cu", "first >= 0 && first % 4 == 0 &&", "first >= 0 &&"),
    plant("precondition.cu", "if (!is_run && !is_empty) atomicOr(&chunk.scratch.ragged, 1);", ""),
    plant("scheduler.cuh", "layer.x_unit_stride == 1 && bits % 4 == 0", "layer.x_unit_stride == 1"),
    plant("chunk.cuh", "((1 << 16) + columns - 1) / columns", "(1 << 16) / columns"),
    plant("gram.cuh", "add(sum, load_cluster(tiles + e, rank))", "add(sum, load_cluster(tiles + e, 0))"),
    plant("gram.cuh", "store_cluster(tiles + e, rank, sum)", "store_cluster(tiles + e, 0, sum)"),
    plant("chunk_io.cuh", "for (int r = 1; r < count; ++r)", "for (int r = 2; r < count; ++r)"),
    plant("chunk_io.cuh", "for (int s = 1; s < gram_tasks; ++s)", "for (int s = 1; s < 1; ++s)"),
    plant("scheduler.cuh", "task.awaited += ctas;", "task.awaited += ctas - 1;"),
    plant("scheduler.cuh", "ctas * static_cast<uint32_t>(task.of_layer.gram_tasks)", "ctas"),
    plant("scheduler.cuh", "task.stages &= ~kStageApply;", ""),
    plant("scheduler.cuh", "counters->ticket = 0;", ""),
    plant("scheduler.cuh", "counters->inverted[l] = counters->corrected[l] = 0;", "counters->corrected[l] = 0;"),
    plant("scheduler.cuh", "atomicExch(&counters->finished, 0u);", ""),
    plant("scheduler.cuh", "if (user >= 0) {", "if (user < 0) {"),
    plant("scheduler.cuh", "(task.of_layer.pack_tasks);", "(task.of_layer.pack_tasks - 1);"),
    plant("scheduler.cuh", "(task.of_layer.permute_tasks);", "(task.of_layer.permute_tasks - 1);"),
    plant("scheduler.cuh", "ctas * static_cast<uint32_t>(task.of_layer.apply_tasks);", "ctas;"),
    plant("permute.cuh", "table[restore ? unit : position]", "table[position]"),
    plant("permute.cuh", "chunk.scratch.bias_position != units) {", "chunk.scratch.bias_position == units) {"),
    plant("permute.cuh", "= one_bits<Raw>(", "= 0 & one_bits<Raw>("),
    plant("permute.cuh", "(work.out_units + kWidth - 1) / kWidth", "work.out_units / kWidth"),
    plant("permute.cuh", "walk.row * work.to_pitch", "walk.row * work.in_units"),
    plant("precondition.cu", "? static_cast<int32_t>(at) : chunk.scratch.bias_position;", "? at : layer.units - 1;"),
    plant("plan.cpp", "turn++ % 2 * packed_bytes", "turn++ % 1 * packed_bytes"),
    plant("scheduler.cuh", "count = min(n, first + size) - first;", "count = size;"),
    plant("scheduler.cuh", "min(members[member].outputs, begin + task.outputs)", "members[member].outputs"),
    plant("scheduler.cuh", "all_outputs += params.layers[", "all_outputs = params.layers["),
    plant("precondition.cu", "for (int m = 0; m < task.members; ++m) {", "for (int m = 0; m < 1; ++m) {"),
    plant("precondition.cu", "if (threadIdx.x == 0) *status() = chunk.scratch.failed_minor;", ""),
    plant(
        "gradient_rows.cuh",
        "return triangle == Triangle::kLower ? n > k :",
        "return triangle == Triangle::kLower ? n < k :",
    ),
    plant("gradient_rows.cuh", "Triangle::kUpper && n < k;", "Triangle::kUpper && n < k - 1;"),
    plant("gradient_rows.cuh", "n >= k : triangle == Triangle::kUpper;", "n >= k : triangle == Triangle::kLower;"),
    plant(
        "gradient_rows.cuh",
        "written ? value_of(from_float<Raw>(kType, value)) : from;",
        "value_of(from_float<Raw>(kType, value));",
    ),
    plant("gradient_rows.cuh", "return chunk.task.adds ? old + to : to;", "return to;"),
    plant("gradient_rows.cuh", "single == kBiasUnit && written", "single == kBiasUnit"),
    plant("apply.cuh", "add_square(squares[0], displacement(layer, chunk, at));", ""),
    plant("apply.cuh", "if (chunk.task.adds) value +=", "if (false) value +="),
    plant("apply.cuh", "chunk.scratch.warp_sum[2 * warp + side] +=", "chunk.scratch.warp_sum[2 * warp + side] ="),
    plant("apply.cuh", "!rows.unwhitens() || chunk.scratch.failed_minor == 0", "true"),
    plant("chunk_io.cuh", "!(lower && row < column)", "true"),
    plant("factor.cuh", "!kTriangular && begin", "begin"),
    plant(
        "scheduler.cuh",
        "task.of_layer.permute_tasks + task.of_layer.finish_tasks > 0",
        "task.of_layer.permute_tasks > 0",
    ),
    plant("scheduler.cuh", "params.whitening.finish && !params.whitening.keep_norm", "!params.whitening.keep_norm"),
    plant(
        "scheduler.cuh",
        "(options.stages & kStageCovariance) && params.whitening.mode != Mode::kWhitens;",
        "(options.stages & kStageCovariance);",
    ),
    plant("whitening.cuh", "if (!is_finite(value)) flags |= kNotFinite;", ""),
    plant("whitening.cuh", "!kOwn || chunk.scratch.has_bias != 0", "!kOwn"),
    plant("whitening.cuh", "average != nullptr && chunk.task.part == 0", "average != nullptr"),
    plant("whitening.cuh", "rows.count == chunk.task.division.units;", "true;"),
    plant("whitening.cuh", "enters = enters && chunk.scratch.warp_count[w] == 0;", ""),
    plant("whitening.cuh", "if (chunk.scratch.failed_tries > 0) {", "if (false) {"),
    plant("whitening.cuh", "fma(mean, rows.sum, kept * diagonal)", "mean * rows.sum"),
    plant("whitening.cuh", "*static_cast<float*>(params.whitening.of_layer[l]) = *new_weight(params, l);", ""),
    plant("whitening.cuh", "if (!has_moved(params, task)) return;", ""),
    plant("whitening.cuh", "is_finite(ratio) ? ratio : 1.0f", "1.0f"),
    plant(
        "whitening.cuh", "if (!whitening.keep_norm || !whitening.finish) return;", "if (!whitening.keep_norm) return;"
    ),
    plant("precondition.cu", "if (scale < 0.0f) {", "if (false) {"),
    plant("precondition.cu", "if (!has_moved(params, chunk.task)) return;", ""),
    plant("plan.cpp", "static_cast<int32_t>(of.has_gradient - call.has_gradient)", "static_cast<int32_t>(r)"),
    plant("linalg.cu", "const int i = max(row, column), j = min(row, column);", "const int i = row, j = column;"),
    plant("linalg.cu", "i == j ? 1.0f : 0.0f;", "0.0f;"),
    plant("linalg.cu", "i < n ? a[", "true ? a["),
    plant("linalg.cu", "if (j > i) return;", ""),
    plant("linalg.cu", "a[i * p.a_row + j * p.a_column]", "a[i * p.a_column + j * p.a_row]"),
    plant("linalg.cu", "m * p.a_batch", "m * p.n * p.n"),
    plant("linalg.cu", "int64_t first = part * kTile;", "int64_t first = 0;"),
    plant("linalg.cu", "p.nrhs - first < kTile ? p.nrhs - first : kTile", "kTile"),
    plant("linalg.cu", "r < width && u < n ? b[", "u < n ? b["),
    plant("linalg.cu", "b[u * p.b_row + (first + r) * p.b_column]", "b[(first + r) * p.b_row + u * p.b_column]"),
    plant("linalg.cu", "m * p.b_batch", "m * p.n * p.nrhs"),
    plant("linalg.cu", 'ok ? *at(r, u) : nanf("");', "*at(r, u);"),
    plant("linalg.cu", "out[u * p.nrhs + first + r]", "out[u * p.nrhs + r]"),
    plant("linalg.cu", "side == 3 || side == 4 ? kSweepFloats : 0", "0"),
    plant("substitute.cuh", "int j = k + 1 + warp;", "int j = k + 2 + warp;"),
    plant(
        "substitute.cuh",
        "lower_tile(chunk.tiles, j, k), 1, kTilePitch);",
        "lower_tile(chunk.tiles, j, k), kTilePitch, 1);",
    ),
    plant("substitute.cuh", "-= sum; });", "+= sum; });"),
    plant("substitute.cuh", "int j = kTile - 1; j >= 0; --j", "int j = kTile - 1; j > 0; --j"),
    plant("substitute.cuh", "x[m] * factor[m * kTilePitch + j]", "x[m] * factor[j * kTilePitch + m]"),
    plant("substitute.cuh", "int k = side - 1; k >= 0; --k", "int k = side - 1; k > 0; --k"),
    plant(
        "ptx_host.h", "__atomic_fetch_add(counter, value, __ATOMIC_RELEASE)", "__atomic_fetch_add(counter, value, 0)"
    ),
    plant(
        "ptx_host.h", "__atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL)", "__atomic_fetch_add(counter, value, 0)"
    ),
    plant("ptx_host.h", "__atomic_load_n(counter, __ATOMIC_ACQUIRE)", "__atomic_load_n(counter, 0)"),
]


# What no wrong number shows, and the build that does.
SANITIZER = {
    " && chunk.x_stage() * columns == kWarps * kLoads": "memory",
    "r < width && u < n ? b[": "memory",
    "panels + first / 2 % 2 * kTile": "races",
    "__atomic_fetch_add(counter, value, __ATOMIC_RELEASE)": "races",
    "__atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL)": "races",
    "__atomic_load_n(counter, __ATOMIC_ACQUIRE)": "races",
}


@pytest.mark.parametrize(("file", "number", "original", "mutant"), PLANTED)
def test_planted_mistake_is_noticed(tmp_path, file, number, original, mutant):
    edit(tmp_path, file, number, lambda line: line.replace(original, mutant))
    with judged(file, number, original, mutant) as found:
        first = SANITIZER.get(original, "plain")
        found.append(noticed(tmp_path, file, sorted(SEEDS, key=lambda kind: kind != first)))


CAPTURE = [
    plant("capture.cu", "(warp + s * kWarps) % 2 * 32 + lane", "lane"),
    plant("capture.cu", "first < plan.kept; first += kRows", "first + kRows <= plan.kept; first += kRows"),
    plant(
        "capture.cu",
        "if (add_acquire_release(arrived, 1) != gridDim.x - 1)",
        "if (add_acquire_release(arrived, 1) != 0)",
    ),
]


@pytest.mark.parametrize(("file", "number", "original", "mutant"), CAPTURE)
def test_planted_mistake_of_the_capture_is_noticed(tmp_path, file, number, original, mutant):
    edit(tmp_path, file, number, lambda line: line.replace(original, mutant))
    with judged(file, number, original, mutant) as found:
        found.append(capture_noticed(tmp_path, ["plain", "races"]))


KINDS = {"barriers": BARRIERS, "barriers of the capture": CAPTURE_BARRIERS}
KINDS |= {"mistakes": PLANTED, "mistakes in the capture": CAPTURE}


def judged(*mutant):
    listed = [(kind, mutant_table.name_of(*one)) for kind, mutants in KINDS.items() for one in mutants]
    return mutant_table.judged(mutant_table.name_of(*mutant), listed)
