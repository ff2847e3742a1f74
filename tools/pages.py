"""Write the notebooks that `make docs` renders into `_proc`.

nbdev adds API entries, drops exported code and links to where it expects the site to be
published. Here these links become links to notebooks, links inside signatures become plain
text, and each figure gets a description, the sentence before it.
"""

import json
import re
from pathlib import Path

from nbdev import serve
from nbdev.quarto import refresh_quarto_yml
from shells import Pages

PROC = Path("_proc")
SIGNATURE = re.compile(r"```python.*?```", re.DOTALL)
LINKED_NAME = re.compile(r"\[(`[^`]*`)\]\([^)\s]*\)")


def chapters() -> dict[str, str]:
    "Page that nbdev links to, without suffix -> notebook, both relative to the site."
    pages = {}
    for path in PROC.glob("*/[0-9]*.ipynb"):
        folder, name = path.relative_to(PROC).parts
        pages[f"{folder}/{path.stem.split('_', 1)[1]}"] = f"{folder}/{name}"
    return pages


def local_links(text: str, site: str, pages: dict[str, str]) -> str:
    "`text` of a notebook with links into `site` turned into links to notebooks."

    def notebook(link):
        return f"/{pages[link[1]]}#" if link[1] in pages else link[0]

    text = re.sub(re.escape(site) + r"/([\w/]+)\.html#", notebook, text)
    return re.sub(r"(\.ipynb#\w+)\.\w+", r"\1", text)  # a method is described with its class


def first_sentence(markdown: str) -> str:
    "The first sentence of a cell of prose, without marks and addresses of links."
    plain = re.sub(r"\]\([^)]*\)|[#*`>|\[\]]", "", markdown)
    return re.sub(r"\s+", " ", plain).strip().split(". ")[0]


def has_figure(cell: dict) -> bool:
    "Whether a cell's outputs hold an image."
    outputs = cell.get("outputs", ())
    return any(mime.startswith("image/") for out in outputs for mime in out.get("data", ()))


def prepare(notebook: dict) -> None:
    "Change `notebook` in place: signatures without links, figures with a description."
    prose = ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.strip():
            prose = first_sentence(source)
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).get("text/markdown")
            if shown:
                output["data"]["text/markdown"] = SIGNATURE.sub(
                    lambda code: LINKED_NAME.sub(r"\1", code[0]), "".join(shown)
                )
        if has_figure(cell) and "fig-alt" not in source:
            description = json.dumps("A figure: " + prose[:200])
            cell["source"] = f"#| fig-alt: {description}\n{source}"


def main() -> None:
    refresh_quarto_yml()
    serve.FilterDefaults = Pages  # which proc_nbs takes from its module
    serve.proc_nbs(force=True, n_workers=1)  # a second would import torch and transformers again
    site = re.search(r'site-url: "(.*)"', (PROC / "nbdev.yml").read_text())[1]
    pages = chapters()
    for path in PROC.rglob("*.ipynb"):
        notebook = json.loads(local_links(path.read_text(encoding="utf-8"), site, pages))
        prepare(notebook)
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
