"""NVIDIA's CuTe against the wrappers of the matrix instructions: an oracle that nobody here wrote.

CuTe's headers (package nvidia-cutlass) say for every such instruction which element each register of each lane holds;
kernels all over the world rely on it.  They are compiled for the host and compared, element by element and pair by
pair, with probes of the host bodies that tests/simt runs; and its assembler text with that of csrc/cuda/ptx.cuh.
"""

import collections
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import simt_library as simt

from support import processes

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT / "tests" / "oracle"
PTX = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
# Words of an instruction that do not say which element is where; `row.col` is the only order that mma.f32 has.
WITHOUT_MATRIX = {"wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"}
PLAIN = {"sync", "aligned", "shared", "b16", "row", "col"}


def short(instruction):
    """The words of an instruction in a fixed order: CuTe writes ldmatrix.x4.trans.m8n8, PTX's grammar m8n8.x4.trans."""
    name, *words = instruction.rstrip(".").split(".")
    words = [word for word in words if word not in PLAIN]
    shape = [word for word in words if re.fullmatch(r"m\d+n\d+(k\d+)?", word)]
    return ".".join([name, *shape, *(word for word in words if word not in shape)])


def instructions(text):
    return {short(found) for found in re.findall(r"\b(?:mma|ldmatrix|stmatrix|wgmma)\.[\w.:]+", text)}


OURS = {name for name in instructions("\n".join(re.findall(r'"(.*?)"', PTX))) if name not in WITHOUT_MATRIX}


def headers():
    found = importlib.util.find_spec("cutlass_library")
    if found is None:
        pytest.skip("nvidia-cutlass is not installed: pip install --no-deps -r requirements-oracle.txt")
    return Path(next(iter(found.submodule_search_locations))) / "source" / "include"


def operations(folder):
    """CuTe's operation of every instruction in the header files of its architectures."""
    found = {}
    for name in ("mma_sm80.hpp", "copy_sm75.hpp", "mma_sm90_gmma.hpp"):
        text = (folder / "cute" / "arch" / name).read_text()
        for match in re.finditer(r"^struct (\w+)\n(.*?)^};", text, re.MULTILINE | re.DOTALL):
            for instruction in instructions("\n".join(re.findall(r'"(.*?)"', match[2]))):
                found.setdefault(instruction, match[1])
    return found


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """{instruction: {part: (values a lane, elements)}} of CuTe."""
    folder = headers()
    if shutil.which("nvcc") is None:
        pytest.skip("CuTe's headers include CUDA's, and nvcc is not on the PATH")
    known = operations(folder)
    assert set(known) >= OURS, f"CuTe has no {OURS - set(known)}"
    kinds = {"mma": "M", "ldmatrix": "L", "wgmma": "W"}  # ours has its left operand in registers
    lines = [f'{kinds[name.partition(".")[0]]}({known[name].replace("_SS", "_RS")}, "{name}")' for name in sorted(OURS)]
    made = tmp_path_factory.mktemp("oracle")
    (made / "instructions.inc").write_text("\n".join(lines) + "\n")
    program = made / "tables"
    command = ["nvcc", "-std=c++17", "-w", f"-I{folder}", f"-I{made}", ORACLE / "cute_tables.cu", "-o", program]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = collections.defaultdict(dict)
    for line in processes.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, part, *numbers = line.split()
        values, *elements = map(int, numbers)
        found[name][part] = values, elements
    return found


@pytest.fixture(scope="module")
def probes():
    """{instruction: lines of numbers} of the host bodies."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    units = [("tests/simt/runtime.cpp", ["-O2"]), ("tests/oracle/host_probe.cu", ["-O2", *simt.KERNEL])]
    program = simt.link("oracle", simt.ROOT, units, ["-O2"], program=True)
    found = collections.defaultdict(list)
    for line in processes.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, *numbers = line.split()
        found[name].append(tuple(map(int, numbers)))
    return found


pytestmark = pytest.mark.slow


def test_every_matrix_instruction_is_probed(probes):
    assert len(OURS) >= 4 and set(probes) == OURS


def agree(found, want):
    """The same terms, each once.  As a number: where CI is set, pytest explains a difference of sets for an hour."""
    differing = len(set(found) ^ want)
    assert differing == 0 and len(found) == len(want)


@pytest.mark.parametrize("name", sorted(name for name in OURS if name.startswith("mma")))
def test_products(name, tables, probes):
    rows, columns, _ = tables[name]["shape"][1]
    values = {part: tables[name][part][0] for part in "ABC"}

    def element(part, lane, value):
        return tables[name][part][1][lane * values[part] + value]

    at = {element("C", lane, v): (lane, v) for lane in range(32) for v in range(values["C"])}
    assert len(at) == rows * columns
    of_b = collections.defaultdict(list)
    for lane in range(32):
        for v in range(values["B"]):
            column, k = element("B", lane, v) % columns, element("B", lane, v) // columns
            of_b[k].append((lane, v, column))
    want = set()
    for lane in range(32):
        for v in range(values["A"]):
            row, k = element("A", lane, v) % rows, element("A", lane, v) // rows
            want |= {(lane, v, b_lane, b_v, *at[row + rows * column]) for b_lane, b_v, column in of_b[k]}
    assert len(want) == rows * columns * (32 * values["A"] // rows)
    agree(probes[name], want)


@pytest.mark.parametrize("name", sorted(name for name in OURS if name.startswith("ldmatrix")))
def test_loads(name, tables, probes):
    bits, elements = tables[name]["destination"]
    # The source is numbered in bits, 16 an element, as the rows of 8 elements that the lanes point to lie in memory.
    per_register = 32
    for lane, register, low, high in probes[name]:
        for half, got in ((0, low), (1, high)):
            bit = elements[lane * bits + register * per_register + 16 * half]
            assert bit % 16 == 0 and got == bit // 16, (lane, register, half)
    assert len(probes[name]) == 32 * bits // per_register


@pytest.mark.parametrize("name", sorted(name for name in OURS if name.startswith("wgmma")))
def test_products_of_a_warpgroup(name, tables, probes):
    """Of its first warp; the others have the next rows (CuTe's tables have all)."""
    rows, columns, depth = tables[name]["shape"][1]
    assert (rows, columns, depth) == (64, 32, 16)
    (a_values, a), (c_values, c) = tables[name]["A"], tables[name]["C"]
    for warp in range(4):  # of CuTe, as of the first one
        for elements, values in ((a, a_values), (c, c_values)):
            first = elements[: 32 * values]
            assert elements[32 * values * warp : 32 * values * (warp + 1)] == [e + 16 * warp for e in first]
    at = {c[lane * c_values + v]: (lane, v) for lane in range(32) for v in range(c_values)}
    want = set()
    for part, transposed in (("K", 0), ("MN", 1)):
        place = tables["swizzle"][part][1]  # [row][column] of our 32 x 32 numbers
        assert sorted(place) == list(range(1024))
        for half in range(2):
            for lane in range(32):
                for v in range(a_values):
                    row, k = a[lane * a_values + v] % rows, a[lane * a_values + v] // rows + 16 * half
                    for n in range(columns):
                        number = place[k * 32 + n if transposed else n * 32 + k]
                        want.add((transposed, half, lane, v, *at[row + rows * n], number))
    assert len(want) == 4 * 16 * 16 * 32
    agree(probes[name], want)


def test_a_wrong_lane_would_be_noticed(tables, probes):
    name = next(name for name in sorted(OURS) if name.startswith("mma"))
    values, elements = tables[name]["A"]
    swapped = {**tables, name: {**tables[name], "A": (values, elements[values:] + elements[:values])}}
    with pytest.raises(AssertionError):
        test_products(name, swapped, probes)
