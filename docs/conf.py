"""Sphinx's settings for the manual; `make docs` builds it, with warnings as errors.

The pages are Markdown that reads well without Sphinx, too. The pages under api/ are made from the docstrings, so the
extension has to be built first.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

project = "consistency_ops"
author = "The consistency_ops developers"
copyright = f"2026, {author}"
release = version = re.search(r'__version__ = "(.+?)"', (ROOT / "consistency_ops" / "environment.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"consistency_ops {release}"
html_copy_source = False
html_show_sourcelink = False

DOCS = ROOT / "docs"
# Pages that are files of other folders. What stands in docs is a link, for readers without Sphinx.
COPIES = {
    "overview": ROOT / "README.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "security": ROOT / "SECURITY.md",
    "changes": ROOT / "CHANGELOG.md",
    "developer/bad-input": ROOT / "tests" / "README.md",
}
PAGES = {path: DOCS / f"{page}.md" for page, path in COPIES.items()}


def read_page(app, page, source):
    """Put the file in the place of its link, and let the links of every page lead to pages and not to such files."""
    file = COPIES.get(page, DOCS / f"{page}.md")
    if page in COPIES:
        source[0] = file.read_text()
        app.env.note_dependency(file)

    def link(match):
        path, mark, anchor = match[1].partition("#")
        target = (file.parent / path).resolve()
        if not path or not target.exists():
            return match[0]
        return f"]({os.path.relpath(PAGES.get(target, target), (DOCS / page).parent)}{mark}{anchor})"

    source[0] = re.sub(r"\]\(([^)\s]+)\)", link, source[0])


def setup(app):
    app.connect("source-read", read_page)
