"""README.md, the pages of docs and the other texts of the checkout: their examples, links and tables."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def manual():
    """README.md and the pages of docs, as paths relative to the checkout; empty in an installed package."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(page.relative_to(ROOT)) for page in pages if page.is_file()]


def texts():
    """Return all texts of the checkout, also those that are no pages of the manual."""
    others = ("tests/README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    return [*manual(), *(name for name in others if (ROOT / name).is_file())]


def read(name):
    return (ROOT / name).read_text()


def examples(name):
    """The Python blocks of a page, in their order."""
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in BLOCK.findall(read(name))]
