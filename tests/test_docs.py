"""The manual: it is built without a warning, its links lead somewhere, README is short, every name has its place."""

import re
import sys

import pytest

import consistency_ops as co
from consistency_ops import experimental, ops
from consistency_ops.analysis.findings import Measurements
from consistency_ops.analysis.results import Result
from consistency_ops.distributed.placement import Placement
from support import documents, processes

ROOT = documents.ROOT
LINK = re.compile(r"\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(not (ROOT / "docs" / "conf.py").exists(), reason="needs the checkout that holds docs")


def anchors(text):
    """Return what ``#...`` may name in a page: headings as GitHub and MyST write them, and explicit labels."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\((.+)\)=$", text, re.MULTILINE))


def dead_links(name, text):
    """Links between files of the checkout that lead nowhere."""
    dead = []
    for link in LINK.findall(re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    return dead


@pytest.mark.parametrize("name", documents.texts())
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert dead_links(name, documents.read(name)) == []


def test_a_dead_link_would_be_noticed():
    text = "[a](docs/install.md#what-it-needs) [b](docs/gone.md) [c](docs/install.md#gone) [d](https://arxiv.org/abs/1)"
    assert dead_links("README.md", text) == ["docs/gone.md", "docs/install.md#gone"]


def test_the_citation_has_the_version():
    assert f"\nversion: {co.__version__}\n" in documents.read("CITATION.cff")


def test_the_readme_is_short():
    text = documents.read("README.md")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 10_000


def test_every_public_name_is_on_an_api_page():
    """A name has its own directive, or its module has one that takes all of ``__all__``."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    for module in (co.linalg, co.nn, co.optim, co.analysis, experimental):
        assert f".. automodule:: {module.__name__}\n   :members:" in pages, module.__name__
    others = {"analysis", "layers", "linalg", "nn", "optim", "__version__"}
    names = {*co.__all__, *ops.__all__} - others
    described = set(re.findall(r"^\.\. (?:auto\w+|data):: (?:[\w.]*\.)?(\w+)$", pages, re.MULTILINE))
    assert names - described == set()
    assert "consistency_ops.layers.register" in pages
    results = {kind.__name__ for kind in [*Result.__subclasses__(), *Measurements.__subclasses__()]}
    assert results - set(re.findall(r"autoclass:: consistency_ops\.analysis\.\w+::(\w+)", pages)) == set()


def test_every_page_is_in_the_table_of_contents():
    pages = {name.removeprefix("docs/").removesuffix(".md") for name in documents.manual() if name != "README.md"}
    listed = {"index"}
    for index, folder in (("docs/index.md", ""), ("docs/api/index.md", "api/")):
        for tree in re.findall(r"```{toctree}\n(.*?)```", documents.read(index), re.DOTALL):
            listed |= {folder + line for line in tree.splitlines() if line and not line.startswith(":")}
    assert pages == listed


def test_the_layout_page_names_every_file_on_the_way_of_a_step():
    page = documents.read("docs/developer/layout.md")
    rooms = [ROOT / "consistency_ops" / room for room in ("ops", "engine", "distributed", "reporting")]
    files = [file for room in rooms for file in room.glob("*.py")] + list(
        (ROOT / "csrc" / "cuda" / "precondition").iterdir()
    )
    named = set(re.findall(r"`([\w.]+)`", page))
    assert {file.name for file in files} - named - {"__init__.py", "plan.h"} == set()
    folders = {
        folder.name for folder in (ROOT / "consistency_ops").iterdir() if folder.is_dir() and any(folder.glob("*.py"))
    }
    assert [folder for folder in folders if not re.search(rf"\b{folder}\b", page)] == []


@pytest.mark.slow
def test_the_manual_is_built_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    places = ["-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")]
    done = processes.run([*command, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "api" / "preconditioner.html").read_text()
    assert "max_rows" in page and "load_state_dict" in page


def quoted_messages():
    """Return the messages in the first column of the troubleshooting page; an ellipsis stands for what differs."""
    rows = re.findall(r"^\| (.*?) \|", documents.read("docs/troubleshooting.md"), re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row) if " " in span]
    return [part for span in spans for part in re.split(r" ?\.\.\. ?", span) if part]


def test_the_messages_of_the_troubleshooting_page_exist():
    files = [ROOT / "setup.py", ROOT / "build_backend.py", *(ROOT / "consistency_ops").rglob("*.py")]
    strings = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))  # joined as Python does
    assert len(quoted_messages()) > 8
    assert [message for message in quoted_messages() if message not in strings] == []


def test_the_placement_in_the_log_example_is_written_as_it_is_logged():
    placement = Placement("module.0", groups=((0, 1),), joins_bias=True)
    assert f"rank 1: {placement!r}\n" in documents.read("docs/distributed.md")
