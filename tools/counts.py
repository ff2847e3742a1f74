"""Count what `CONTRIBUTING.md` asks of the pages: line lengths, sizes of cells, complexity.

`python tools/counts.py` prints a table over the exported cells of `nbs/`; folders or notebooks as
arguments narrow it. `--cells` lists the longest cells, `--functions` the most complex functions.
"""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

NBS = Path(__file__).parents[1] / "nbs"
FLOORS = ("core", "data", "model", "checkpoint", "speech", "training", "view", "cli", "tasks")
CHAPTERS = ("core", "family.ipynb", *FLOORS[1:], "original", "small")
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


@dataclass
class Cell:
    "An exported cell and the cell before it."

    notebook: Path
    number: int
    lines: list[str]  # not blank, without directives
    definitions: list[str]  # names of functions and classes
    after_prose: bool


def notebooks(paths: list[str]) -> list[Path]:
    "Chapters below the given folders or notebooks; all of them without an argument."
    roots = [Path(p) for p in paths] or [
        NBS / floor for floor in CHAPTERS if (NBS / floor).exists()
    ]
    return sorted(f for root in roots for f in ([root] if root.is_file() else root.glob("*.ipynb")))


def sources(path: Path) -> list[tuple[str, str]]:
    "(kind, source) of every cell of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"])) for c in cells]


def is_exported(kind: str, source: str) -> bool:
    "Whether nbdev exports this cell."
    return kind == "code" and re.match(r"#\|\s*export", source) is not None


def exported(path: Path) -> list[Cell]:
    "The exported cells of a notebook, in order."
    found, before = [], ""
    for number, (kind, source) in enumerate(sources(path)):
        if is_exported(kind, source):
            body = ast.parse(source).body
            lines = [x for x in source.split("\n") if x.strip() and not x.startswith("#|")]
            names = [node.name for node in body if isinstance(node, DEFINITIONS)]
            found.append(Cell(path, number, lines, names, before == "markdown"))
        before = kind
    return found


def assertions(path: Path) -> int:
    "Assertions in cells that are not exported: `assert`, and the tests of fastcore."
    code = "\n".join(s for kind, s in sources(path) if kind == "code" and not is_exported(kind, s))
    return len(re.findall(r"^\s*(?:assert\b|test_\w+\()", code, re.MULTILINE))


def imports(path: Path) -> int:
    "Import statements at the top of the module that a notebook exports."
    cells = [source for kind, source in sources(path) if is_exported(kind, source)]
    nodes = [node for source in cells for node in ast.parse(source).body]
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)


def complexity(paths: list[Path]) -> list[tuple[int, str]]:
    "Cyclomatic complexity of every function in these notebooks, from ruff, the highest first."
    command = ["ruff", "check", "--isolated", "--select=C901", "--output-format=json"]
    options = ["--config=lint.mccabe.max-complexity=0", "--exit-zero"]
    done = subprocess.run([*command, *options, *paths], capture_output=True, text=True, check=True)
    found = []
    for fault in json.loads(done.stdout):
        name, value = re.search(r"`(.+)` is too complex \((\d+) > 0\)", fault["message"]).groups()
        found.append((int(value), f"{Path(fault['filename']).stem}: {name}"))
    return sorted(found, reverse=True)


def p95(values) -> float:
    "The value that 95% do not exceed."
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]


def share(hits, total) -> str:
    "A share in percent."
    return f"{100 * sum(hits) / max(total, 1):.1f}%"


def table(paths: list[Path]) -> list[tuple[str, str, str]]:
    "Rows of measure, value here, goal."
    cells = [cell for path in paths for cell in exported(path)]
    widths = [len(line) for cell in cells for line in cell.lines]
    sizes = [len(cell.lines) for cell in cells]
    defining = [cell for cell in cells if cell.definitions]
    names = sum(len(cell.definitions) for cell in defining)
    functions = [value for value, _ in complexity(paths)] or [0]
    imported = [imports(path) for path in paths]
    checks = sum(assertions(path) for path in paths)
    return [
        ("line length, mean / p95 / max", f"{mean(widths):.0f} / {p95(widths)} / {max(widths)}",
         "- / under 96 / 100"),
        ("lines per exported cell, mean; over 25",
         f"{mean(sizes):.1f}; {share((s > 25 for s in sizes), len(sizes))}", "under 13; under 5%"),
        ("definitions per defining cell", f"{names / len(defining):.2f}", "under 1.4"),
        ("complexity of functions, p95 / max", f"{p95(functions)} / {max(functions)}", "8 / 12"),
        ("imports per module, mean / max", f"{mean(imported):.1f} / {max(imported)}", "9 / 16"),
        ("prose before a defining cell",
         share((c.after_prose for c in defining), len(defining)), "80%"),
        ("assertions per definition", f"{checks / names:.1f}", "1.6"),
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    paths = notebooks([a for a in arguments if not a.startswith("--")])
    for measure, value, goal in table(paths):
        print(f"{measure:<42}{value:>18}   goal {goal}")
    if "--cells" in arguments:
        cells = sorted((c for p in paths for c in exported(p)), key=lambda c: -len(c.lines))
        for cell in cells[:40]:
            print(f"{len(cell.lines):>5} {cell.notebook.name} {cell.number} {cell.definitions[:4]}")
    if "--functions" in arguments:
        for value, name in complexity(paths)[:40]:
            print(f"{value:>5} {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
