"""Remove the views of widgets from saved notebooks.

A widget in a saved notebook is a view without a kernel behind it, which JupyterLab shows as an
error; the still picture beside it stays.
"""

from pathlib import Path

import nbformat

VIEW = "application/vnd.jupyter.widget-view+json"


def without_views(notebook: nbformat.NotebookNode) -> bool:
    "Remove views and their state from `notebook`; whether there were any."
    found = notebook.metadata.pop("widgets", None) is not None
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            found |= output.get("data", {}).pop(VIEW, None) is not None
    return found


def main() -> None:
    for path in Path("nbs").rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        if without_views(notebook):
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
