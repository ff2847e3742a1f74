"""The ordinary texts in the package, how they are made, and which of them the voices read."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import papermill
import pytest
from safetensors import safe_open

from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.small.texts import load_texts, runs_in, texts_folder, words_in

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "nbs/runs"
KOKORO = os.environ.get("HIGGS_NB_KOKORO", "")
TEXTS = load_texts()
TRAIN = [t for t in TEXTS if t.split == "train"]
HELD_OUT = [t for t in TEXTS if t.split == "held_out"]
GENERATED = ("number", "date", "time", "price", "name", "address", "news", "notice")
PACKAGED = ("example", "order", "story", "dialogue", "question")


def recorded(split):
    return [c.transcript for c in load_corpus(embedded_corpus()) if c.extra["split"] == split]


def all_runs(texts):
    return {run for text in texts for run in runs_in(text)}


def test_how_many_there_are():
    assert len({" ".join(words_in(t.text)) for t in TRAIN}) == len(TRAIN) >= 15000
    assert len({word for t in TRAIN for word in words_in(t.text)}) >= 8000
    assert len({t.text for t in HELD_OUT}) == len(HELD_OUT) == 300


def test_all_kinds_are_on_both_sides():
    kinds, held = (Counter(t.kind for t in side) for side in (TRAIN, HELD_OUT))
    assert set(kinds) == {*GENERATED, *PACKAGED, "recording"}
    assert set(held) == {*GENERATED, *PACKAGED}
    assert min(kinds.values()) >= 200 and min(held.values()) >= 4
    first = Counter(t.kind for t in TRAIN[:5000])
    for kind, count in kinds.items():
        share = count / len(TRAIN)
        assert 0.5 * share < first[kind] / 5000 < 2 * share, f"{kind} is not spread over the file"


def test_nothing_held_out_is_trained():
    trained = all_runs(t.text for t in TRAIN)
    assert not trained & all_runs(t.text for t in HELD_OUT)
    assert not trained & all_runs(recorded("held_out"))
    assert not {t.text for t in TEXTS} & set(recorded("held_out"))
    assert not all_runs(t.text for t in HELD_OUT) & all_runs(recorded("train"))
    words = {tuple(words_in(t.text)) for t in TRAIN}
    assert {tuple(words_in(text)) for text in recorded("train")} <= words


def test_all_are_written_in_one_way():
    for t in TEXTS:
        assert not re.search(r"\d|\b(Mr|Mrs|Dr)\b|[\"()\[\]&$%_`]|  |--", t.text), t.text
        assert t.text.isascii() and t.text[0].isupper() and t.text[-1] in ".?!:", t.text
        assert not re.search(r"\bi\b", t.text), t.text
        if t.kind != "recording":
            assert 3 <= len(t.text.split()) <= 26, t.text
            assert not re.search(r"\b[A-Z]{2,}\b|[:;]", t.text), t.text
        if t.kind in GENERATED:
            assert not re.search(r"\b[Aa] [aeio]", t.text), t.text


def test_none_offends():
    words = {word for t in TEXTS for word in words_in(t.text)}
    unwanted = "rape naked whore murdered suicide nazi negro fuck shit bitch slave drunk retarded"
    assert not words & set(unwanted.split())


def test_licences_lie_beside_them():
    about = (texts_folder() / "README.md").read_text(encoding="utf-8")
    wordnet = (texts_folder() / "LICENSE-WordNet.txt").read_text(encoding="utf-8")
    assert "Permission to use, copy, modify and distribute this software" in wordnet
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in wordnet
    for kind in {t.kind for t in TEXTS}:
        assert re.search(rf"\b{kind}\b", about), f"README.md says no licence of {kind}"


def test_they_are_made_anew_alike(tmp_path):
    "The notebook makes the committed file again, from what is committed."
    papermill.execute_notebook(
        RUNS / "texts.ipynb",
        tmp_path / "texts.ipynb",
        parameters=dict(out=str(tmp_path / "texts")),
        cwd=tmp_path,
        progress_bar=False,
    )
    assert load_texts(tmp_path / "texts/texts.tsv.gz") == TEXTS
    readme = tmp_path / "texts/README.md"
    assert readme.read_text() == (texts_folder() / "README.md").read_text()


def chosen(until="SERVICES = ", **parameters):
    "What the cells of voices.ipynb define, up to and with the one that has a text."
    space = {}
    for cell in json.loads((RUNS / "voices.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            exec(source, space)  # noqa: S102
            if "parameters" in cell["metadata"].get("tags", ()):
                space |= parameters
            if until in source:
                return space
    raise AssertionError(f"no cell has {until!r}")


def test_the_voices_share_the_texts():
    space = chosen(prompts=200, service=100, readings=3)
    rows, voices = space["rows"], space["VOICES"]
    train = [u for u in rows if u.split == "train"]
    held = [u for u in rows if u.split == "held_out"]
    assert 8 <= len(voices) <= 12
    ordinary = Counter(t.kind for t in TRAIN[:15000])
    assert sum(u.kind in ordinary and u.kind != "recording" for u in train) >= 14000
    by_voice = Counter(u.voice for u in train)
    assert set(by_voice) == set(voices)
    assert max(by_voice.values()) < 1.1 * min(by_voice.values())
    readers = Counter(u.text for u in {(u.text, u.voice): u for u in rows}.values())
    assert max(readers.values()) < len(voices) / 2, "no sentence needs all voices"
    assert {u.text for u in held if u.kind != "prompt"} == {t.text for t in HELD_OUT}
    trained = all_runs({u.text for u in train})
    assert not trained & all_runs(t.text for t in HELD_OUT)
    assert not trained & all_runs(recorded("held_out"))


def test_more_speech_keeps_what_is_there():
    "A later run with more of everything needs every utterance of an earlier one."
    few = chosen(ordinary=50, prompts=20, service=10, readings=1, test_texts=5, held_out=5)["rows"]
    more = chosen(ordinary=80, prompts=30, service=15, readings=2, test_texts=9, held_out=9)["rows"]
    assert {u.id for u in few} < {u.id for u in more}
    assert len({u.id for u in more}) == len(more)


@pytest.mark.parametrize("workers", (0, 2))
def test_workers_keep_the_order_and_report_errors(workers, tmp_path):
    space = chosen("def in_workers", workers=workers, out=str(tmp_path), ordinary=5, prompts=1)
    assert list(space["in_workers"](str.upper, list("abcde"), "trying")) == list("ABCDE")
    with pytest.raises(ZeroDivisionError):
        list(space["in_workers"](lambda x: 1 / x, [2, 0], "trying"))


@pytest.mark.skipif(not KOKORO, reason="HIGGS_NB_KOKORO does not name Kokoro's voices")
def test_an_interrupted_run_goes_on(tmp_path):
    "What is missing is made, what is there is not made again, and the codes are the same."
    few = dict(ordinary=2, prompts=1, service=0, readings=0, test_texts=1, held_out=0, variants=2)
    given = dict(few, voices=KOKORO, out="voices", workers=2)
    out, notebook = tmp_path / "voices", tmp_path / "voices.ipynb"

    def run():
        papermill.execute_notebook(
            RUNS / "voices.ipynb", notebook, parameters=given, cwd=tmp_path, progress_bar=False
        )
        with safe_open(out / "codes.safetensors", "pt") as file:
            return file.metadata()["rows"], file.get_tensor("codes")

    def made():
        return {p: p.stat().st_mtime_ns for p in out.rglob("*-*.*") if p.is_file()}

    rows, codes = run()
    before = made()
    lost = sorted(out.glob("words/*.json"))[0]
    (gone,) = out.glob(f"codes/*/{lost.stem}.safetensors")
    lost.unlink()
    gone.unlink()
    again, same = run()
    assert again == rows and same.equal(codes)
    changed = {p.stem for p, time in made().items() if time != before[p]}
    assert changed == {lost.stem}
    for row in json.loads(rows):
        assert [len(words) for words in row["words"]] == [len(row["text"].split())] * len(
            row["frames"]
        )
