"The house: formatter and linter agree with the pages, and imports with the floors."

import sys
from importlib import import_module
from types import FunctionType

import pytest
from conftest import BIN, ROOT, run

sys.path.insert(0, str(ROOT / "tools"))
import house


@pytest.mark.parametrize("command", (["format", "--check"], ["check"]), ids=" ".join)
def test_ruff_finds_nothing(command):
    run(BIN / "ruff", *command, ".", cwd=ROOT)


def test_imports_go_down():
    arrows = house.graph()
    assert len(arrows) > 30 and any(arrows.values())
    wrong = house.against_the_floors(arrows)
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
    assert not house.circles(house.graph())


@pytest.mark.parametrize(
    "arrows, wrong",
    [
        ({"data.codec": {"view.plots"}}, ["data.codec imports view.plots, a higher floor"]),
        ({"data.codec": {"small.world"}}, ["data.codec imports small.world, a wing"]),
        ({"family": {"data.codec"}}, ["family imports data.codec, a higher floor"]),
        ({"original.convert": {"model.model"}, "cli.run": {"data.codec", "family"}}, []),
    ],
)
def test_an_import_that_goes_up_is_found(arrows, wrong):
    assert house.against_the_floors(arrows) == wrong


def test_a_circle_is_found():
    arrows = {"a.a": {"b.b"}, "b.b": {"c.c"}, "c.c": {"a.a"}, "d.d": {"a.a"}}
    assert house.circles(arrows) == ["a.a -> b.b -> c.c -> a.a"]


def test_every_module_is_on_a_floor():
    floors = {*house.FLOORS, *house.WINGS}
    strays = [name for name in house.modules() if name.split(".")[0] not in floors]
    assert not strays


def test_private_names_are_listed_with_their_reason():
    assert house.private_names().keys() == house.PRIVATE.keys()


@pytest.mark.parametrize(
    "source",
    [
        "class T(Trainer):\n    _tied = []",
        "trainer._inner_training_loop()",
        "config._kind = 1",
        "setattr(config, '_kind', 1)",
        "from torch._dynamo import disable",
        "from torch import _dynamo",
        "NAME = '_kind'",
    ],
)
def test_a_private_name_is_found(source, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.py").write_text("def _own():\n    pass\n\n\n_own()\nself._x = _own\n")
    assert not house.private_names(tmp_path)
    (tmp_path / "data/b.py").write_text(source)
    [users] = house.private_names(tmp_path).values()
    assert users == {"data.b"}


def overridden(cls):
    "Private functions and properties of a class of ours that another library's class has too."
    bases = [base for base in cls.__mro__ if not base.__module__.startswith("higgs_nb")]
    written = FunctionType | property | classmethod | staticmethod
    mine = {
        n for n, value in vars(cls).items() if house.is_private(n) and isinstance(value, written)
    }
    return mine & {name for base in bases for name in vars(base)}


def test_no_private_method_of_another_library_is_overridden():
    modules = [import_module(f"higgs_nb.{name}") for name in house.modules()]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type)}
    ours = [c for c in classes if c.__module__.startswith("higgs_nb")]
    assert len(ours) > 200
    names = {name for c in ours for name in overridden(c)}
    assert names <= house.PRIVATE.keys()


def test_an_overridden_private_method_is_found():
    from transformers import Trainer

    def nothing(self):
        pass

    body = {"__module__": "higgs_nb.a", "_inner_training_loop": nothing, "_own": nothing}
    assert overridden(type("T", (Trainer,), body)) == {"_inner_training_loop"}
