"""Every table of README.md and of the pages in docs, and the plots, rebuilt from benchmarks/results.

    python -m benchmarks.report                 write them
    python -m benchmarks.report --check         change nothing; exit 1 where a table differs
    python -m benchmarks.report --file A B ...  the tables of these files instead

A table stands between two lines of a page and is written by the function of that name in ``TABLES``:

    <!-- table: NAME -->
    <!-- end -->
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import markdown
from benchmarks.micro import bench_cuda, bench_scaling
from benchmarks.peers import full_tables, search_tables
from benchmarks.peers import tables as peers
from benchmarks.peers.full import FOLDER, FULL
from benchmarks.peers.runs import Store
from benchmarks.peers.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


class ReportError(Exception):
    """A table cannot be made; the text says which one and why."""


def read(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ReportError(f"{path}: there is no such file; run the benchmark that writes it")
    return json.loads(path.read_text())


def step() -> str:
    """The time that the preconditioner adds to a step of the deep MLP."""
    rows = []
    for row in read("step")["rows"]:
        added = "" if row["name"] == "sgd" else f"{row['added']:+.0%}"
        rows.append([row["name"], f"{row['ms']:.1f}", added])
    return markdown.table(["", "ms per step", "added"], rows)


def whiten() -> str:
    """A step in whitened coordinates over one of plain AdamW."""
    found = read("whiten")["rows"]
    settings = list(dict.fromkeys(row["setting"] for row in found))
    rows = []
    for model in dict.fromkeys(row["model"] for row in found):
        of_model = {row["setting"]: row for row in found if row["model"] == model}
        cells = [f"{row['ratio']:.2f}" if s != "adamw" else f"{row['ms']:.1f} ms" for s, row in of_model.items()]
        rows.append([model, *cells])
    return markdown.table(["", *settings], rows)


LAYERS = {  # workload: how the page calls it, and the file that has it
    "mlp": ("MLP 784-100-100-100-10", "precondition"),
    "wide-mlp": ("3 x Linear 512", "precondition"),
    "resnet50": ("ResNet-50, bfloat16 inputs", "precondition"),
    "resnet50-fp32": ("ResNet-50, float32", "precondition"),
    "vit-b16": ("ViT-B/16, 3 blocks, bfloat16 inputs", "precondition"),
    "linear-4096": ("Linear 4096, bfloat16", "precondition"),
    "linear-4096-fp32": ("Linear 4096, float32", "precondition"),
    "llama-block": ("Llama-7B block, bfloat16, chunk 128 and 512 rows only", "precondition-llama"),
}
CHUNKS = (32, 64, 128, 256)


def precondition() -> str:
    """The correction against the fastest composition of torch's operations."""
    heads = ["layers", "times faster, geometric mean (least)", "share of the sgemm rate, geometric mean"]
    heads.append(f"at chunk {' / '.join(map(str, CHUNKS))} (least)")
    lines = []
    for workload, (text, name) in LAYERS.items():
        rows = [row for row in read(name)["rows"] if row["workload"] == workload]
        mean = statistics.geometric_mean(row["ratio"] for row in rows)
        least = f" ({min(row['ratio'] for row in rows):.2f})" if len(rows) > 1 else ""
        share = statistics.geometric_mean(row["share_of_sgemm"] for row in rows)
        shares = [[row["share_of_sgemm"] for row in rows if row["chunk"] == chunk] for chunk in CHUNKS]
        shown = " / ".join(f"{100 * min(share):.0f}" if share else "-" for share in shares)
        percent = " %" if shares[-1] else ""
        lines.append([text, f"{mean:.2f}{least}", f"{share:.0%}", f"{shown}{percent}"])
    return markdown.table(heads, lines)


def precondition_one_thread() -> str:
    """The share of torch's rate at every chunk that was measured on one thread, with 512 and with 2048 rows."""
    found = read("precondition-one-thread")["rows"]
    chunks = sorted({row["chunk"] for row in found})
    lines = []
    for workload, (text, _) in LAYERS.items():
        rows = [row for row in found if row["workload"] == workload]
        if not rows:
            continue
        cells = []
        for chunk in chunks:
            shares = [f"{row['share_of_sgemm']:.0%}" for row in rows if row["chunk"] == chunk]
            cells.append(", ".join(shares) or "-")
        mean = statistics.geometric_mean(row["ratio"] for row in rows)
        cells.append(f"{mean:.2f} ({min(row['ratio'] for row in rows):.2f})")
        lines.append([text, *cells])
    return markdown.table(["layers", *(f"chunk {chunk}" for chunk in chunks), "times faster (least)"], lines)


def cuda() -> str:
    """The one launch on a GPU: every target beside what was measured, if anything was."""
    if not (RESULTS / "cuda.json").exists():
        measured, results = {}, None
    else:
        results = read("cuda")
        measured = {row["workload"]: row for row in results["rows"]}
    heads = ["workload", "target, us", "cold", "warm", "share of the copy floor", "times faster than B", "than C"]
    rows = []
    for number, setting in bench_cuda.SETTINGS.items():
        row = measured.get(number)
        cells = ["never run"] + [""] * 5
        if row is not None:
            against_c = row["ratio_to_C"]
            cells = [f"{row[key]['ours']:.1f}" for key in ("cold_us", "warm_us")]
            cells += [f"{row['share_of_floor']:.0%}", f"{row['ratio_to_B']:.1f}"]
            cells += ["-" if against_c is None else f"{against_c:.1f}", str(row["calls"]["ours"]["launches"])]
        rows.append([f"({number}) {setting.workload}", f"{setting.target_us:.0f}", *cells])
    table = markdown.table([*heads, "launches"], rows)
    if results is None:
        return table
    return f"{table}\n\n{results['device']}, {results['machine']['date'][:10]}. {results['tier_c']}."


FRAMEWORKS = {"gpt2": "GPT-2", "vit": "ViT", "resnet": "ResNet"}


def frameworks() -> str:
    """GPT-2, ViT and ResNet: the loss after 50 steps of tiny ones, the time added to a step of larger ones."""
    heads = ["", "trainer, optimizer", "loss without", "loss with", "model of the timing", "capture", "launch", "both"]
    rows = []
    losses = {row["name"]: row for row in read("trainers")["rows"]}
    times = {row["name"]: row for row in read("frameworks")["rows"]}
    for name, text in FRAMEWORKS.items():
        loss, time = losses[name], times[name]
        means = [f"{statistics.mean(loss[key]):.3g}" for key in ("without", "with")]
        added = [f"{time[key]:+.1%}" for key in ("added_by_capture", "added_by_launch", "added")]
        model = time["model"].rstrip(".").replace("; AdamW", "").replace("; SGD with momentum", "")
        rows.append([text, loss["trainer"], *means, model, *added])
    return markdown.table(heads, rows)


def monitors() -> str:
    """The cost of monitors in plain passes and steps."""
    found = read("monitors")["rows"]
    ratios = {(row["monitor"], row["pass"]): row["ratio"] for row in found}
    rows = []
    for name in dict.fromkeys(row["monitor"] for row in found):
        if (name, "a call") in ratios:
            cells = [f"a call: {ratios[name, 'a call']:.2g} of a step", ""]
        else:
            cells = [f"{ratios[name, 'recorded']:.2g}", f"{ratios[name, 'not recorded']:.2f}"]
        rows.append([f"`{name}`", *cells])
    return markdown.table(["", "a pass that is recorded", "a pass that is not"], rows)


def same_input() -> str:
    """Layers that have one input, with a shared covariance and inverse and without."""
    rows = []
    for row in read("same_input")["rows"]:
        shape = f"{row['layers']} of {row['units']} units and {row['outputs']} outputs, {row['rows']} rows"
        rows.append([shape, *(f"{row[f'{name}_ms']:.1f}" for name in ("shared", "apart", "concatenated"))])
    return markdown.table(["layers with one input", "shared, ms", "an input each", "concatenated"], rows)


def small_batches() -> str:
    """Networks with few rows a layer, with all layers corrected and with the dear ones left alone."""
    found = read("small_batches")["rows"]
    rows = []
    for row in found:
        limited = row["limited"]
        added = [f"+{100 * part['added']:.0f} %" for part in (row, limited)]
        rows.append([row["name"], str(row["layers"]), f"{row['ms']['plain']:.0f} ms", *added, str(limited["left"])])
    limit = f"with `max_share={found[0]['limited']['max_share']}`"
    return markdown.table(["network", "layers", "a step without", "all corrected", limit, "of these left alone"], rows)


def layer_cost() -> str:
    """How far the count of a layer's cost is from what was measured."""
    rows = read("layer_cost")["rows"]
    lines = []
    for mode, text in (("correct", '`"correct"`'), ("whiten", '`"whiten"`, `every=1`')):
        # Where nearly nothing was measured there is nothing to compare with.
        ratios = [row[mode]["counted"] / row[mode]["share"] for row in rows if row[mode]["share"] > 0.05]
        near = sum(0.5 <= ratio <= 2 for ratio in ratios)
        quartiles = ", ".join(f"{value:.2f}" for value in statistics.quantiles(ratios, n=4))
        lines.append([text, quartiles, f"{near} of {len(ratios)}"])
    return markdown.table(["mode", "counted over measured share: quartiles", "layers within a factor of 2"], lines)


def rows_dtype() -> str:
    results = read("rows_dtype")
    columns = ["float32", "bfloat16"]
    rows = []
    for data, title in (("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST")):
        found = results[data]
        for key, text, form in (("train_loss", "train loss", ".4f"), ("test_error", "test error", ".4f")):
            cells = [", ".join(format(run[key], form) for run in found[kind]) for kind in columns]
            rows.append([f"{title}, {text}", *cells])
        apart = ", ".join(f"{damping}: {value:.1e}" for damping, value in found["after"].items())
        rows.append([f"{title}, corrected gradients apart (relative), at damping", "", apart])
    sizes = [f"{results['mnist'][kind][0]['rows_bytes'] / 2**20:.2f} MiB" for kind in columns]
    return markdown.table(["", "rows in float32", "in bfloat16"], [*rows, ["row buffers", *sizes]])


def linalg() -> str:
    """The inverse and the solve of small matrices against the fastest composition of torch's operations."""
    shown: dict[tuple, dict] = {}
    for row in read("linalg")["rows"]:
        columns = "n" if row["columns"] == row["n"] else row["columns"]
        what = row["operation"] if columns is None else f"solve, {columns} column{'' if columns == 1 else 's'}"
        shown.setdefault((what, row["threads"], row["dtype"]), {})[row["n"]] = row
    sizes = sorted({n for rows in shown.values() for n in rows})
    lines = []
    for (what, threads, dtype), rows in shown.items():
        cells = [f"{rows[n]['ratio']:.1f} ({rows[n]['us_per_matrix']['ours']:.3g} us)" for n in sizes]
        lines.append([f"{what}, {dtype}", str(threads), *cells])
    return markdown.table(["", "threads", *(f"{n} rows" for n in sizes)], lines)


RANKS = (8, 64, 256, 512, 4096, 16384)


def distributed() -> str:
    """A refresh on several ranks, simulated: microseconds alone and shared, what the cost model chooses in bold."""
    rows = read("distributed")["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for ranks in RANKS:
        cells = []
        for model in models:
            (row,) = [row for row in rows if (row["model"], row["ranks"]) == (model, ranks)]
            times = {how: f"{row[f'{how}_simulated_us']:.0f}" for how in ("alone", "shared")}
            cells.append(" / ".join(f"**{t}**" if how == row["chosen"] else t for how, t in times.items()))
        lines.append([str(ranks), *cells])
    table = markdown.table(["ranks", *(f"{model} alone / shared" for model in models)], lines)
    right = sum(row["regret"] == 0 for row in rows)
    return (
        f"{table}\n\nBold is what the cost model chooses. It is the faster in {right} of {len(rows)} simulated cases."
    )


def stored(task: str) -> list[dict]:
    path = RESULTS / "peers" / f"{task}.jsonl"
    if not path.exists():
        raise ReportError(f"{path}: there is no such file; run python -m benchmarks.peers {task}")
    return Store(path).runs


def measured_tasks() -> list[str]:
    return [task for task in TASKS if (RESULTS / "peers" / f"{task}.jsonl").exists()]


def whole_trainings(folder: Path = FOLDER) -> dict[str, list[dict]]:
    return {task: Store(folder / f"{task}.jsonl").runs for task in FULL}


def kernel_model() -> str:
    """One chunk of the correction's kernel by the model, after each step of its redesign."""
    rows = []
    for step_ in read("kernel-model")["steps"]:
        chunk = step_["one_chunk"]
        counts = [str(chunk["instructions"][name]) for name in ("gram", "factor", "apply")]
        rows.append([step_["step"], *counts, f"{chunk['factor_inverse_us']:.1f}", f"{chunk['us']:.1f}"])
    heads = ["kernel", "X^T X", "factor and inverse", "G", "latency of factor and inverse, us", "of the CTA, us"]
    return markdown.table(heads, rows)


def kernel_bounds() -> str:
    """The largest bound of every workload by the model, after each step, in us."""
    steps = read("kernel-model")["steps"]
    names = list(steps[0]["workloads"])
    rows = []
    for step_ in steps:
        found = [step_["workloads"][name] for name in names]
        rows.append([step_["step"], *(f"{bound['bound_us']:.0f} ({bound['bound_by']})" for bound in found)])
    rows.append(["target", *(str(steps[0]["workloads"][name]["target_us"]) for name in names)])
    return markdown.table(["kernel", *(steps[0]["workloads"][name]["title"] for name in names)], rows)


def kernel_whitening() -> str:
    """The bounds of the two launches of whitening, and of one correction of the same workload, by the model, in us."""
    found = read("kernel-model")
    bounds = ["issue", "memory", "passes", "tensor"]
    lines = []
    for name, launches in found["whitening"].items():
        rows = {"one correction": found["steps"][-1]["workloads"][name]}
        rows |= {"before the step, new factors": launches["whiten"], "after the step": launches["unwhiten"]}
        for what, row in rows.items():
            lines.append([f"{launches['title']}: {what}", *(f"{row[f'{bound}_us']:.0f}" for bound in bounds)])
    return markdown.table(["", *bounds], lines)


TABLES: dict[str, Callable[[], str]] = {
    "kernel-model": kernel_model,
    "kernel-whitening": kernel_whitening,
    "kernel-bounds": kernel_bounds,
    "step": step,
    "whiten": whiten,
    "precondition": precondition,
    "precondition-one-thread": precondition_one_thread,
    "cuda": cuda,
    "frameworks": frameworks,
    "monitors": monitors,
    "same-input": same_input,
    "rows-dtype": rows_dtype,
    "small-batches": small_batches,
    "layer-cost": layer_cost,
    "linalg": linalg,
    "distributed": distributed,
    "peers-cost": lambda: peers.cost(read("peers/cost")),
    "peers-summary": lambda: peers.overview({task: stored(task) for task in measured_tasks()}),
    "peers-ablations": lambda: peers.ablations(stored("ablations")),
    "peers-variants": lambda: peers.variants(stored("ablations")),
    "full-train": lambda: full_tables.ends(whole_trainings(), "train_loss"),
    "full-test": lambda: full_tables.ends(whole_trainings(), "metric"),
    "full-muon-steps": lambda: full_tables.muon_steps(whole_trainings()),
    "full-first-order-steps": lambda: full_tables.first_order_steps(whole_trainings()),
    "full-rates": lambda: full_tables.rates(whole_trainings()),
    "full-summary": lambda: full_tables.summary(whole_trainings()),
    "full-goals": lambda: full_tables.goals(whole_trainings()),
    "full-converged": lambda: full_tables.converged(whole_trainings()),
    "full-longer": lambda: full_tables.longer(whole_trainings(FOLDER / "longer")),
    "full-seconds": lambda: full_tables.seconds(whole_trainings()),
    "search": lambda: search_tables.search(stored("full/search")),
    "search-outputs": lambda: search_tables.outputs(stored("full/search")),
    "search-around": lambda: search_tables.around(stored("full/search")),
    "search-kernels": lambda: search_tables.kernels(stored("full/search")),
    "small-norms": lambda: search_tables.small_norms(stored("full/norms")),
    "small-members": lambda: search_tables.members(stored("full/norms")),
    "search-norms": lambda: search_tables.norms(stored("full/search")),
    **{f"peers-{task}": (lambda task=task: peers.finals(stored(task), task)) for task in TASKS},
}


def plots() -> dict[Path, Callable[[Path], None]]:
    """Return the path of each plot and the function that draws it."""
    drawn = {
        RESULTS / "peers" / f"{task}.png": (lambda path, task=task: peers.plot(stored(task), task, path))
        for task in measured_tasks()
    } | {
        RESULTS / "scaling.png": lambda path: bench_scaling.plot(read("scaling"), path),
        ROOT / "docs" / "images" / "overview.png": lambda path: peers.summary_plot(
            stored("deep-mlp"), "deep-mlp", read("peers/cost"), "deep MLP, batch 500", path
        ),
    }
    if (RESULTS / "cuda.json").exists():
        drawn[RESULTS / "cuda.png"] = lambda path: bench_cuda.plot(read("cuda"), path)
    return drawn


def rebuild(text: str, tables: dict[str, Callable[[], str]] | None = None) -> str:
    """Return ``text`` with every table made again."""
    tables = TABLES if tables is None else tables
    starts, ends = text.count("<!-- table:"), text.count("<!-- end -->")
    if not starts == ends == len(BLOCK.findall(text)):
        raise ReportError(
            f"every '<!-- table: NAME -->' line needs an '<!-- end -->' line after it, got {starts} and {ends}"
        )

    def block(match: re.Match) -> str:
        name = match["name"]
        if name not in tables:
            raise ReportError(f"there is no table {name!r}; benchmarks/report.py has {', '.join(sorted(tables))}")
        return f"{match[1]}{tables[name]()}\n{match[4]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Return README.md and the pages of docs that have a table."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in texts if path.is_file() and "<!-- table:" in path.read_text()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the tables only")
    parser.add_argument("--file", type=Path, nargs="+", help="texts with table blocks (default: README.md and docs)")
    arguments = parser.parse_args()
    try:
        old = {}
        for path in arguments.file or pages():
            if not path.is_file():
                raise ReportError(f"{path}: there is no such file")
            old[path] = path.read_text()
        new = {path: rebuild(text) for path, text in old.items()}
        if not arguments.check:
            for path, draw in plots().items():
                draw(path)
                print(path.relative_to(ROOT))
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        lines = [
            line
            for path in old
            for line in difflib.unified_diff(
                old[path].splitlines(), new[path].splitlines(), str(path), "benchmarks/results", lineterm="", n=0
            )
        ]
        print("\n".join(lines))
        return bool(lines)
    for path, text in new.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
