"""What became of every mutant of test_simt_mutants.py: a record that its tests add to, and a table of it to quote.

The table counts what was run on these very sources, in one run of pytest or in several.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import resource

import simt_library as simt

FOLDER = simt.ROOT / "build" / "simt"
RECORD, TABLE = FOLDER / "mutants.jsonl", FOLDER / "mutants.md"
BUILDS = ("plain", "memory", "races")
SUFFIXES = {".cu", ".cuh", ".h", ".cpp", ".py"}


def name_of(file, number, original="", mutant=""):
    """A mutant's name: a mistake, or without ``original`` the barrier in that line."""
    what = f"{original} -> {mutant}" if original else simt.kernel_source(file).read_text().splitlines()[number - 1]
    return f"{file}:{number} {what.strip()}"


def digest_of_sources():
    """Of everything that decides whether a mutant is noticed."""
    folders = simt.ROOT / "csrc" / "cuda", simt.ROOT / "csrc" / "include", simt.ROOT / "tests" / "simt"
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES)
    files.remove(simt.ROOT / "tests" / "simt" / "mutant_table.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def processor_seconds():
    """Of the programs that have ended which this process had started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def judged(name, listed):
    """Records what is appended to the list that this gives, None or what has noticed the mutant, and asserts that
    something has.  ``listed``: (kind of mutant, name) of all mutants."""
    found, before = [], processor_seconds()
    entry = {"name": name, "sources": digest_of_sources(), "build": "error", "case": "", "how": ""}

    def record(**more):
        add({**entry, **more, "seconds": round(processor_seconds() - before, 1)}, listed)

    try:
        yield found
    except Exception as error:
        record(how=f"{type(error).__name__}: {error}"[:300])
        raise
    (by,) = found
    record(**({"build": "none"} if by is None else {"build": by.build, "case": by.case, "how": by.how}))
    assert found[0] is not None, f"nothing notices {name}"


def add(entry, listed):
    """Appends to the record and writes the table anew; several processes may."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "mutants.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(RECORD, "a") as record:
            record.write(json.dumps(entry) + "\n")
        entries = map(json.loads, RECORD.read_text().splitlines())
        latest = {e["name"]: e for e in entries if e["sources"] == entry["sources"]}
        partial = TABLE.with_suffix(".partial")
        partial.write_text(table(listed, latest))
        os.replace(partial, TABLE)


def table(listed, latest):
    """``latest``: the entry of every mutant that was run, by its name."""
    kinds = dict.fromkeys(kind for kind, _ in listed)
    lines = ["| mutants | listed | run | noticed | " + " | ".join(BUILDS) + " | not noticed | errors |"]
    lines.append("|---" * (len(BUILDS) + 6) + "|")
    for kind in [*kinds, "all"]:
        names = [name for of, name in listed if kind in (of, "all")]
        builds = [latest[name]["build"] for name in names if name in latest]
        count = [builds.count(build) for build in (*BUILDS, "none", "error")]
        row = [kind, len(names), len(builds), sum(count[: len(BUILDS)]), *count]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    seconds = sum(entry["seconds"] for entry in latest.values())
    lines += ["", f"Noticed by the build named; {seconds / 60:.0f} minutes of processor time.", ""]
    for what, build in (("Not noticed", "none"), ("Error", "error")):
        rows = [entry for entry in latest.values() if entry["build"] == build]
        lines += [f"- {what}: `{entry['name']}` {entry['how']}" for entry in rows]
    lines += [f"- Not run: `{name}`" for _, name in listed if name not in latest]
    lines += ["", "| seconds | build | case | how | mutant |", "|---|---|---|---|---|"]
    for entry in sorted(latest.values(), key=lambda entry: entry["name"]):
        cells = [str(entry[key]) for key in ("seconds", "build", "case", "how", "name")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
