"""The floors of the package and which imports go against them; private names of other libraries.

`python tools/house.py` prints every import that goes up, into a wing, or in a circle, and every
private name of another library that is not in `PRIVATE`, and ends with 1 if there is one.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "higgs_nb"
FLOORS = (
    *("core", "family", "data", "model", "checkpoint", "speech", "training", "view", "cli"),
    "tasks",
)
WINGS = ("original", "small")
PRIVATE = {  # names of other libraries that are used, and why: no public one does it
    "_attn_implementation": "read: transformers sets it by a public name and tells it by this one",
    "_commit_hash": "read: the commit of a configuration from the hub",
    "_exit": "Python's os._exit, which is documented",
    "_forward_hooks": "read: a projection with hooks is called as a whole",
    "_forward_pre_hooks": "read: as above",
    "_keys_to_ignore_on_load_unexpected": "class attribute: how a model of transformers says it",
    "_no_split_modules": "class attribute: as above, what FSDP and device_map keep together",
    "_pytree": "torch.utils._pytree: the tensors of nested arguments, for the memory plan",
    "_python_dispatch": "torch.utils._python_dispatch: the mode that PyTorch's docs import so",
    "_scaled_dot_product_flash_attention_for_cpu": "an operator of torch.ops.aten, by its name",
    "_set_params_and_buffers_to_ignore_for_model": "the one way to keep divided weights out of DDP",
    "_softmax_backward_data": "an operator of torch.ops.aten, by its name",
}


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


def is_private(name: str) -> bool:
    "Whether a name begins with one underscore; those that end with one are protocols of Jupyter."
    return re.fullmatch(r"_[a-zA-Z]\w*(?<!_)", name) is not None


def used_names(tree: ast.Module) -> Iterator[str]:
    """Names of attributes, of what is imported, of class attributes, and words in quotes that are
    given to `getattr` and the like or have a name.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.ClassDef):
            targets = [t for n in node.body if isinstance(n, ast.Assign) for t in n.targets]
            yield from (t.id for t in targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            yield from (str(ast.literal_eval(a)) for a in node.args if isinstance(a, ast.Constant))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    yield from (str(value.value) for value in values if isinstance(value, ast.Constant))


def own_names(tree: ast.AST) -> Iterator[str]:
    "Names of functions, of annotated fields, and of what is set on `self`."
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target).removeprefix("self.")
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield ast.unparse(node).removeprefix("self.")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.__dict__.update":
            yield from (keyword.arg or "" for keyword in node.keywords)


def private_names(package: Path = PACKAGE) -> dict[str, set[str]]:
    "Private name of another library -> modules that use it."
    trees = {n: ast.parse(p.read_text(encoding="utf-8")) for n, p in modules(package).items()}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = {}
    for module, tree in trees.items():
        for name in used_names(tree):
            if is_private(name) and name not in own:
                found.setdefault(name, set()).add(module)
    return found


def main() -> int:
    arrows = graph()
    wrong = against_the_floors(arrows) + [f"circle: {c}" for c in circles(arrows)]
    strange = {name: users for name, users in private_names().items() if name not in PRIVATE}
    wrong += [f"{name}, private, in {', '.join(sorted(u))}" for name, u in strange.items()]
    print("\n".join(wrong) or f"{len(arrows)} modules, no import against the floors")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
