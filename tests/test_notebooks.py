"""Explanations and tutorials run, those with parameters on small ones; the chapters of the floors
are in `test_chapters_*.py`.
"""

import json
import shutil
from pathlib import Path

import papermill
import pytest
from chapters import GROUPS, chapters, others, run_chapter
from conftest import ROOT

from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.speech.judges import missing_judges

NEEDS_EVAL = ("from_an_interview.ipynb",)
LONG = ("a_new_language.ipynb", "from_common_voice.ipynb", "read_a_run.ipynb")
SMALL = {  # tutorial: its parameters here; what it makes goes into the test's folder, where it runs
    "a_new_language.ipynb": dict(out="run", steps=2, texts=2, max_clips=2),
    "from_common_voice.ipynb": dict(out="run", max_clips=2),
    "from_an_interview.ipynb": dict(out="run", steps=2, minutes=0.7),
    "read_a_run.ipynb": dict(run="run", clips=2, steps=4),
    "your_voice.ipynb": dict(out="run", steps=2, texts=2, max_clips=2),
}


@pytest.mark.parametrize("notebook", [str(file) for file in others() if file.name not in SMALL])
def test_notebook(notebook, tmp_path):
    run_chapter(notebook, tmp_path)


def test_every_group_has_a_file_and_chapters():
    for name, folders in GROUPS.items():
        assert (Path(__file__).parent / f"{name}.py").is_file(), f"tests/{name}.py is missing"
        for folder in folders:
            assert chapters(folder), f"nbs/{folder} has no chapters: take it out of GROUPS"


EXCERPTS = {"a_new_language.ipynb": "june", "your_voice.ipynb": "allison"}  # tutorial: its corpus


def excerpt(corpus, folder, clips=24):
    "Some recordings of the package in a folder: a run checks all that it is given."
    held = json.loads((embedded_corpus(corpus) / "metadata.json").read_text(encoding="utf-8"))
    step = len(held["samples"]) // clips
    held["samples"] = held["samples"][::step]
    for sample in held["samples"]:
        file = folder / sample["audio_file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(embedded_corpus(corpus) / sample["audio_file"], file)
    (folder / "metadata.json").write_text(json.dumps(held), encoding="utf-8")
    return str(folder)


TUTORIALS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in sorted(SMALL)
]


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial(name, tmp_path):
    if name in NEEDS_EVAL and missing_judges():
        pytest.skip("the extra eval is not installed")
    given = dict(SMALL[name])
    if name in EXCERPTS:
        given["recordings"] = excerpt(EXCERPTS[name], tmp_path / "recordings")
    papermill.execute_notebook(
        ROOT / "nbs/tutorials" / name,
        tmp_path / name,
        parameters=given,
        cwd=tmp_path,
        progress_bar=False,
    )
