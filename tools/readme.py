"""Write README.md: `nbs/index.ipynb` as Markdown.

Links there are relative to `nbs/` and README.md is one folder up; cells tagged `site` are for
the site alone.
"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

LEFT_OUT = {"remove-cell", "site"}


def main() -> None:
    index = nbformat.read("nbs/index.ipynb", 4)
    index.metadata.language_info = {"name": "python"}
    index.cells = [c for c in index.cells if not LEFT_OUT & set(c.metadata.get("tags", []))]
    text, _ = MarkdownExporter().from_notebook_node(index)
    text = re.sub(r"\]\(([\w./-]+\.(?:ipynb|svg|png))\)", r"](nbs/\1)", text)
    Path("README.md").write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


if __name__ == "__main__":
    main()
