"The house: formatter and linter agree with the pages, and imports with the floors."

import sys

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
