"""The floors of the package and which imports go against them.

`python tools/house.py` prints every import that goes up, into a wing, or in a circle, and ends
with 1 if there is one.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "higgs_nb"
FLOORS = (
    *("core", "family", "data", "model", "checkpoint", "speech", "training", "view", "cli"),
    "tasks",
)
WINGS = ("original", "small")


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    "Dotted name below the package -> file, of every module that notebooks export."
    found = {}
    for path in sorted(package.rglob("[!_]*.py")):
        found[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return found


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    "Modules of the package that the module at `path` imports, anywhere in its code."
    here, found = path.relative_to(package).parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level]
            found.add(".".join([*above, *(node.module or "").split(".")]).strip("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("higgs_nb."):
            found.add(node.module.removeprefix("higgs_nb."))
    return found


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    "Module -> modules of the package that it imports."
    names = modules(package)
    return {name: imports(path, package) & set(names) for name, path in names.items()}


def against_the_floors(arrows: dict[str, set[str]]) -> list[str]:
    "Imports that go to a higher floor, or from the road into a wing."
    wrong = []
    for source, targets in arrows.items():
        floor = source.split(".")[0]
        for target in sorted(targets):
            below = target.split(".")[0]
            if below in WINGS and floor != below:
                wrong.append(f"{source} imports {target}, a wing")
            elif floor in FLOORS and below in FLOORS and FLOORS.index(below) > FLOORS.index(floor):
                wrong.append(f"{source} imports {target}, a higher floor")
    return wrong


def circles(arrows: dict[str, set[str]]) -> list[str]:
    "Circles of imports, each once."
    found, done = [], set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in sorted(arrows[name]):
                walk(target, (*way, name))
            done.add(name)

    for name in arrows:
        walk(name, ())
    return found


def main() -> int:
    arrows = graph()
    wrong = against_the_floors(arrows) + [f"circle: {c}" for c in circles(arrows)]
    print("\n".join(wrong) or f"{len(arrows)} modules, no import against the floors")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
