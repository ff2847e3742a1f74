"""Whatever comes from outside, a name stays in its directory, a file is whole, a value is plain,
and a terminal is left alone.
"""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.core.files import check_plain, load_json, safe_name, within, write_json, write_whole
from higgs_nb.core.messages import shown

NASTY = st.text() | st.text(st.sampled_from("./\\\0~\n$%é\ud800 ab"), max_size=400)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ODD = (
    st.binary()
    | st.dates()
    | st.sets(st.integers())
    | st.tuples(st.text(), st.integers())
    | st.complex_numbers()
)


@settings(deadline=None)
@given(NASTY, NASTY)
def test_names_are_short_unique_and_inside(tmp_path_factory, one, other):
    folder = tmp_path_factory.getbasetemp()
    names = [safe_name(0, one, ".wav"), safe_name(1, other, ".wav")]
    assert len({name.casefold() for name in names}) == 2
    for name in names:
        assert len(os.fsencode(name)) < 80 and os.sep not in name and not name.startswith(".")
        assert name.isprintable() and within(folder, name).resolve().parent == folder.resolve()


@settings(deadline=None)
@given(NASTY)
def test_a_path_is_inside_or_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        path = within(folder, name)
    except (ValueError, OSError):
        return
    assert path.resolve().is_relative_to(folder.resolve())


@settings(deadline=None)
@given(NASTY)
def test_what_is_shown_is_one_line_without_control_characters(text):
    assert shown(text).isprintable()


@settings(deadline=None)
@given(PLAIN)
def test_plain_values_pass(value):
    assert check_plain(value) is value


@settings(deadline=None)
@given(PLAIN, ODD, st.sampled_from(["list", "dict", "key"]))
def test_odd_values_are_found_at_any_depth(value, odd, where):
    holder = {
        "list": lambda: [value, odd],
        "dict": lambda: {"a": {"b": odd}},
        "key": lambda: {"a": [{1: value}]},
    }[where]()
    with pytest.raises(ValueError):
        check_plain(holder)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_json(tmp_path / "run.json", {"step": 1})
    full = OSError(28, "No space left on device")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as m:

            def fail(*args, **kwargs):
                raise full

            m.setattr(os if call == "fsync" else type(path), call, fail)
            with pytest.raises(OSError):
                write_json(path, {"step": 2})
        assert load_json(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == [
            "run.json"
        ]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run/log").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(ValueError, match="leads out of"):
        write_whole("log", "theirs", root=tmp_path / "run")
    write_whole(tmp_path / "run/log", "theirs")
    assert (tmp_path / "mine.txt").read_text() == "mine" and (
        tmp_path / "run/log"
    ).read_text() == "theirs"


@settings(deadline=None)
@given(st.binary(max_size=50))
def test_a_damaged_file_is_named(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(data)
    try:
        value = load_json(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert json.loads(data) == value or value != value
