"""From recordings to sentences: pauses, pieces, words, speakers and texts that do not fit."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from higgs_nb.cli.run import main as higgs_run
from higgs_nb.data.audio import load_audio, loud_frames
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.problems import AudioError, CorpusError
from higgs_nb.speech import pauses
from higgs_nb.speech.check_text import differences, letters_of, misfit_of
from higgs_nb.speech.judges import RATE, missing_judges
from higgs_nb.speech.pauses import (
    Cut,
    Span,
    cut_pieces,
    divide,
    find_speech,
    other_voice,
    pieces_of,
    put_together,
)
from higgs_nb.speech.speakers import far_from_speaker, find_speakers, name_speakers
from higgs_nb.speech.transcripts import Written, check_language, doubts_of, transcribe_piece
from higgs_nb.speech.written import WordStore
from higgs_nb.tasks.transcribe import (
    recordings_in,
    transcribe_recordings,
    transcription_of,
    voice_encoder,
)
from higgs_nb.view.correction_table import correction_table
from higgs_nb.view.corrections import Corrections

installed = pytest.mark.skipif(bool(missing_judges()), reason="the extra eval is not installed")
TEXTS = [c.transcript for c in load_corpus(embedded_corpus())]


@st.composite
def spoken(draw):
    "Spans of a recording and their speakers."
    spans, at = [], 0.0
    for _ in range(draw(st.integers(1, 40))):
        at += draw(st.floats(0.2, 3.0))
        end = at + draw(st.floats(0.1, 13.0))
        spans.append(Span(at, end))
        at = end
    return spans, [draw(st.sampled_from("ab")) for _ in spans]


@given(spoken(), st.floats(0.5, 4.0))
@settings(max_examples=200, deadline=None)
def test_pieces_are_within_the_limits_and_lose_nothing(recording, shortest_s):
    spans, speakers = recording
    cut = Cut(shortest_s=shortest_s)
    kept, short = pieces_of(spans, speakers, cut)
    for piece, speaker in kept:
        assert shortest_s <= piece.duration_s <= cut.longest_s + 1e-6
        inside = {
            who
            for s, who in zip(spans, speakers)
            if piece.start_s <= s.start_s and s.end_s <= piece.end_s
        }
        assert inside == {speaker}
    assert all(a.end_s <= b.start_s for (a, _), (b, _) in pairwise(kept))
    assert all(piece.duration_s < shortest_s for piece in short)
    for s in spans:
        homes = [p for p in [*(k for k, _ in kept), *short] if p.start_s <= s.start_s < p.end_s]
        assert len(homes) == 1 and s.end_s <= homes[0].end_s + 1e-9


def test_a_monologue_without_long_pauses_is_divided():
    run = [Span(0.5 * i, 0.5 * i + 0.3) for i in range(4000)]
    pieces = divide(run, Cut())
    assert max(p.duration_s for p in pieces) <= 15 and min(p.duration_s for p in pieces) >= 2


def by_loudness(waveform, pause_s=0.2, longest_s=15.0):
    "A voice detector for tones between silence."
    loud = np.flatnonzero(loud_frames(waveform, RATE, 30)) / 100
    spans = []
    for at in loud.tolist():
        if spans and at - spans[-1].end_s < pause_s:
            spans[-1] = Span(spans[-1].start_s, at + 0.01)
        else:
            spans.append(Span(at, at + 0.01))
    return spans


@pytest.mark.parametrize("block_s", [3.0, 7.7, 20.0, 300.0])
@pytest.mark.parametrize("rate", [16000, 22050, 48000])
def test_blocks_change_nothing(tmp_path, monkeypatch, block_s, rate):
    "A span on the border of two blocks is one span, at its place, and its piece its samples."
    monkeypatch.setattr(pauses, "voice_spans", by_loudness)
    random, parts, true, at = np.random.default_rng(0), [], [], 0
    for _ in range(20):
        for seconds, level in ((random.uniform(0.4, 2), 0), (random.uniform(0.3, 5), 0.5)):
            count = round(seconds * rate)
            parts.append(level * np.sin(np.arange(count) * 2000 / rate))
            if level:
                true.append(Span(at / rate, (at + count) / rate))
            at += count
    sound = np.concatenate(parts).astype("float32")
    sf.write(tmp_path / "a.wav", sound, rate, subtype="FLOAT")
    found = list(find_speech(tmp_path / "a.wav", block_s=block_s))
    assert len(found) == len(true)
    for (span, wave), t in zip(found, true):
        assert abs(span.start_s - t.start_s) < 0.03 and abs(span.end_s - t.end_s) < 0.03
        assert abs(len(wave) / RATE - span.duration_s) < 0.001
    cut = list(cut_pieces(tmp_path / "a.wav", true, block_s))
    for (wave, own_rate), t in zip(cut, true, strict=True):
        start = round(t.start_s * rate)
        assert own_rate == rate and np.array_equal(wave, sound[start : round(t.end_s * rate)])


def test_memory_does_not_grow_with_the_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(pauses, "voice_spans", by_loudness)
    tone = np.concatenate([np.zeros(8000), np.sin(np.arange(16000))]).astype("float32") * 0.5
    sf.write(tmp_path / "a.flac", np.tile(tone, 60), 16000)
    sizes = []
    monkeypatch.setattr(pauses, "voice_spans", lambda w, *a: sizes.append(len(w)) or by_loudness(w))
    assert len(list(find_speech(tmp_path / "a.flac", block_s=5))) == 60
    assert len(sizes) > 15 and max(sizes) <= 7 * RATE


def test_a_damaged_recording_is_named(tmp_path):
    sf.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 200000), 16000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.wav").write_bytes(b"RIFF and nothing else")
    for name in ("b.flac", "c.wav", "none.wav"):
        with pytest.raises(AudioError, match=name):
            list(pauses.recording_blocks(tmp_path / name))


@pytest.mark.parametrize("missing", ["faster_whisper", "resemblyzer"])
def test_what_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch, missing):
    from higgs_nb.tasks import transcribe

    def find(name):
        return None if name == missing else SimpleNamespace()

    monkeypatch.setattr(pauses, "find_spec", find)
    monkeypatch.setattr(transcribe, "has_speaker_encoder", lambda: missing != "resemblyzer")
    sf.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install higgs_nb\[eval\]"):
        transcribe_recordings(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/metadata.json").exists()


def test_one_speaker_needs_no_encoder(monkeypatch):
    from higgs_nb.tasks import transcribe

    monkeypatch.setattr(transcribe, "has_speaker_encoder", lambda: False)
    assert voice_encoder(1) is None
    with pytest.raises(ImportError, match="speakers=1"):
        voice_encoder(0)


def test_what_is_no_recording_without_text_is_an_error(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(100), 8000)
    assert recordings_in(tmp_path) == [tmp_path / "a.wav"] == recordings_in(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("Its words.")
    with pytest.raises(CorpusError, match="check_text=yes"):
        recordings_in(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.m4a").write_bytes(b"")
    with pytest.raises(CorpusError, match="ffmpeg"):
        recordings_in(tmp_path)


@pytest.mark.parametrize(
    "changed, named",
    [
        (dict(shortest_s=9.0), "shortest_s=9"),
        (dict(longest_s=40.0), "max_duration_s=30"),
        (dict(language="english"), "did you mean 'en'"),
    ],
)
def test_parameters_that_contradict_each_other(changed, named):
    given = dict(shortest_s=2.0, longest_s=15.0, max_duration_s=30.0, language="auto")
    given |= dict(recogniser="base", digits=False, speakers=0)
    assert transcription_of(SimpleNamespace(**given)).cut == Cut()
    with pytest.raises(ValueError, match=named):
        transcription_of(SimpleNamespace(**given | changed))


@given(st.text(max_size=12))
@settings(max_examples=30, deadline=None)
def test_no_text_is_taken_for_a_language(text):
    try:
        assert check_language(text) == text and text in ("auto", *LANGUAGES)
    except ValueError as error:
        assert "write a code" in str(error)


SURE = Written("One moment please.", "en", 0.9, 0.0, 1.0)


def test_a_second_look_is_taken_only_where_it_is_needed():
    looks = []

    def write(waveform, language, beam=1, context=""):
        looks.append((beam, context))
        return SURE if beam == 1 and not unsure else replace(SURE, confidence=0.4 + 0.1 * beam)

    unsure = False
    assert transcribe_piece(write, np.zeros(24000), "en", "Hello.").doubts == ()
    assert looks == [(1, "")]
    looks.clear()
    unsure = True
    assert transcribe_piece(write, np.zeros(24000), "en", "Hello.").confidence == 0.9
    assert looks == [(1, ""), (5, ""), (5, "Hello.")]


def test_every_reason_for_doubt_can_occur():
    cases = {
        "no words": replace(SURE, text="..."),
        "little confidence": replace(SURE, confidence=0.2),
        "may be no speech": replace(SURE, no_speech=0.9),
        "repeats itself": replace(SURE, compression=3.0),
        "two looks differ": replace(SURE, agreement=0.5),
        "spoken very slowly": replace(SURE, text="Hi."),
        "spoken very fast": replace(SURE, text="One moment please. " * 4),
    }
    assert doubts_of(SURE, 1.5) == ()
    for name, written in cases.items():
        assert doubts_of(written, 1.5) == (name,)


@given(st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_words_that_were_cut_off_are_written_again(tmp_path_factory, end):
    "Wherever the file was cut, a later run has the same words."
    file = tmp_path_factory.mktemp("words") / "words.jsonl"
    waves = [np.full(4, i, np.float32) for i in range(4)]

    def texts():
        store = WordStore(file)
        return [
            store.get(w, ("base",), lambda i=i: replace(SURE, text=f"é {i}"))
            for i, w in enumerate(waves)
        ]

    first = texts()
    file.write_bytes(file.read_bytes()[:end])
    assert texts() == first and len(WordStore(file).known) == 4


@given(st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_speakers_are_told_apart(count, seed):
    "Voices around directions that are as far apart as those of people are."
    random = np.random.default_rng(seed)
    centres = np.linalg.qr(random.standard_normal((64, count)))[0].T * 0.75 + 0.06
    who = np.repeat(np.arange(count), 12)
    voices = centres[who] + random.normal(0, 0.05, (len(who), 64))
    order = random.permutation(len(who))
    found, similarity = find_speakers(voices[order], np.full(len(who), 3.0))
    names = name_speakers(similarity, np.full(len(who), 3.0))
    assert len(found) == count
    assert len({(a, b) for a, b in zip(names, who[order].tolist())}) == count


def test_a_foreign_voice_is_found_in_a_speaker_of_many_clips():
    random = np.random.default_rng(0)
    own, other = np.eye(32)[0], np.eye(32)[1]
    voices = np.array([own] * 40 + [0.4 * own + other]) + random.normal(0, 0.05, (41, 32))
    likeness, far = far_from_speaker(voices, ["a"] * 41)
    assert np.flatnonzero(far).tolist() == [40] and likeness[40] < 0.5 < likeness[:40].min()


@installed
@given(st.sampled_from([t for t in TEXTS if len(t.split()) >= 6]), st.data())
@settings(max_examples=60, deadline=None)
def test_words_that_are_missing_are_a_misfit(text, data):
    "Lost words at either end are found on either side; single letters are not."
    words = text.split()
    kept = len(words) - max(len(words) // 3, 2)
    part = " ".join(data.draw(st.sampled_from([words[:kept], words[-kept:]])))
    whole, part = letters_of(text), letters_of(part)
    assert misfit_of(whole, part) and misfit_of(part, whole)
    assert misfit_of(whole, whole) == ""
    at = data.draw(st.integers(5, len(whole) - 6))
    assert misfit_of(whole, whole[:at] + "xq" + whole[at + 2 :]) == ""


@installed
@given(st.sampled_from(TEXTS), st.sampled_from(TEXTS))
@settings(max_examples=60, deadline=None)
def test_other_texts_are_a_misfit(a, b):
    a, b = letters_of(a), letters_of(b)
    places = differences(a, b)
    assert sum(p.excess for p in places) == len(b) - len(a)
    if sum(max(len(p.lacking), len(p.heard)) for p in places) > 0.5 * max(len(a), len(b)):
        assert misfit_of(a, b)


def test_a_hostile_corpus_is_shown_as_it_is(tmp_path):
    row = dict(id="<script>", audio_file="../../secret.wav", text="<img src=x>", doubts=["<b>"])
    (tmp_path / "metadata.json").write_text(json.dumps(dict(samples=[row], dropped=[{}])))
    with pytest.raises(ValueError, match="leads out|names no file|in another file"):
        correction_table(tmp_path)
    sf.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 8000), 8000)
    row["audio_file"] = "a.wav"
    (tmp_path / "metadata.json").write_text(json.dumps([row]))
    page = correction_table(tmp_path).still()
    assert not any(tag in page for tag in ("<script", "<img", "<b>"))


def test_a_save_that_fails_keeps_the_table(tmp_path, monkeypatch):
    before = json.dumps([dict(id="a", audio_file="a.wav", text="One.")])
    (tmp_path / "metadata.json").write_text(before)
    corrections = Corrections(tmp_path)
    corrections.correct(0, "Two.")
    monkeypatch.setattr("pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        corrections.save()
    assert (tmp_path / "metadata.json").read_text() == before


@installed
def test_a_run_makes_a_corpus_of_a_recording(tmp_path):
    "Two voices in one file become a prepared corpus, which is corrected, read and used again."
    clips = [c for c in load_corpus(embedded_corpus()) if c.extra["split"] == "train"][::55]
    waves = [load_audio(c.audio[-1]) for c in clips]
    waves = [w if i % 2 else other_voice(w, 24000) for i, w in enumerate(waves)]
    turns = [(w, str(i % 2), c.transcript) for i, (w, c) in enumerate(zip(waves, clips))]
    recording, turns = put_together(turns, 24000)
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in/talk.flac", recording, 24000)
    out, given = tmp_path / "out", ["-p", f"data={tmp_path / 'in'}", "-p", "transcribe=yes"]
    given += ["-p", "language=en", "-p", "speakers=2", "-p", "held_out=0.3"]
    assert higgs_run(["prepare", "--out", str(out), *given]) == 0
    corpus, noted = load_corpus(out), json.loads((out / "run.json").read_text())["transcript"]
    assert noted["pieces"] == len(corpus) >= 3
    assert {c.speaker for c in corpus} == {"speaker-1", "speaker-2"} == set(noted["speakers"])
    heard = " ".join(c.transcript for c in sorted(corpus, key=lambda c: c.id)).lower().split()
    said = " ".join(t.text for t in turns).lower().split()
    assert len(set(heard) & set(said)) > 0.7 * len(set(said))
    corrections = Corrections(out / "transcript")
    corrections.correct(0, "Words that somebody corrected.")
    corrections.save()
    again = tmp_path / "again"
    again.mkdir()
    (out / "transcript").rename(again / "transcript")
    assert higgs_run(["prepare", "--out", str(again), *given, "-p", "check_text=yes"]) == 0
    corrected = [c for c in load_corpus(again) if c.transcript == "Words that somebody corrected."]
    assert [c.extra["doubts"] for c in corrected] == [["other words are said"]]
    checked = json.loads((again / "check_text.json").read_text())
    assert [row["id"] for row in checked if row["doubts"]] == [corrected[0].id]
