"""Every form of a corpus that people have, read into the same conversations, and the message for
a broken row of each.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.cli.run import main as higgs_run
from higgs_nb.data import other_sound
from higgs_nb.data.arrow_tables import Cell
from higgs_nb.data.audio import load_audio
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.corpus_check import check_corpus
from higgs_nb.data.corpus_split import split_corpus
from higgs_nb.data.hub_configs import hub_configs
from higgs_nb.data.mixture import weighted
from higgs_nb.data.problems import CorpusError
from higgs_nb.data.understood import preview_corpus
from higgs_nb.data.unreadable import NoTranscripts

WORDS = ["Yes, of course.", 'She said "no" twice.', "Über 3 | 4 of them."]
NAMES = ["84_1_000001_000000", "84_1_000002_000000", "91_1_000001_000000"]
SPEAKERS = ["84", "84", "91"]
SECONDS = 0.5


def wave(hz):
    return 0.3 * np.sin(2 * np.pi * hz * np.arange(round(SECONDS * 24000)) / 24000)


def wav_bytes(hz):
    file = io.BytesIO()
    sf.write(file, wave(hz), 24000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def hertz(i):
    return 300 + 100 * i


def sounds(folder, suffix=".wav", names=NAMES):
    "The three recordings as files."
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        sf.write(folder / f"{name}{suffix}", wave(hertz(i)), 24000, subtype="PCM_16")


def talk(folder):
    "The three recordings as one file."
    folder.mkdir(parents=True, exist_ok=True)
    sf.write(folder / "talk.flac", np.concatenate([wave(hertz(i)) for i in range(3)]), 24000)


def lines(folder, name, rows):
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def rows():
    return list(zip(NAMES, WORDS, SPEAKERS, strict=True))


def ljspeech(folder):
    sounds(folder / "wavs")
    plain = [words.replace(" | ", " or ") for words in WORDS]
    lines(folder, "metadata.csv", [f"{n}|{w}|{w}" for n, w in zip(NAMES, plain, strict=True)])
    return (
        folder,
        lambda: lines(folder, "metadata.csv", [f"{NAMES[0]}|a|b", "half"]),
        ("metadata.csv:2: has 1 cells between '|', and the first row has 3"),
    )


def vits(folder):
    sounds(folder / "wavs")
    made = [f"wavs/{n}.wav|{s}|{w.replace(' | ', ' or ')}" for n, w, s in rows()]
    lines(folder, "train.txt", made)
    return (
        folder / "train.txt",
        lambda: lines(folder, "train.txt", [*made, "a.wav|84|"]),
        ("train.txt:4: has nothing in '3'"),
    )


def common_voice(folder):
    sounds(folder / "clips")
    head = "client_id\tpath\tsentence_id\tsentence\tup_votes\tlocale\tsegment"
    made = [head, *(f"{s}\t{n}.wav\tsame\t{w}\t2\ten\t" for n, w, s in rows())]
    lines(folder, "validated.tsv", made)
    lines(folder, "test.tsv", [head])
    return (
        folder,
        lambda: lines(folder, "validated.tsv", [*made, "x\ty.wav\tz"]),
        ("validated.tsv:5: has 3 cells, and the header has 7 columns"),
    )


def audiofolder(folder):
    sounds(folder / "data")
    made = ["file_name,transcription,speaker"]
    for n, w, s in rows():
        made.append(f'data/{n}.wav,"{w.replace(chr(34), chr(34) * 2)}",{s}')
    lines(folder, "metadata.csv", made)
    return (
        folder,
        lambda: lines(folder, "metadata.csv", [*made, 'a.wav,"open,84']),
        ("metadata.csv:5: cannot be read: unexpected end of data; close its quotes"),
    )


def json_rows(folder):
    sounds(folder)
    made = [dict(path=f"{n}.wav", sentence=w, spk=s) for n, w, s in rows()]
    (folder / "rows.json").write_text(json.dumps(made, indent=1))
    return (
        folder / "rows.json",
        lambda: (folder / "rows.json").write_text(
            json.dumps([*made, dict(path=f"{NAMES[0]}.wav", sentence=7)], indent=1)
        ),
        "rows.json:17: 'sentence' is '7'; write a string",
    )


def jsonl_rows(folder):
    sounds(folder)
    made = [json.dumps(dict(file_name=f"{n}.wav", text=w, speaker=s)) for n, w, s in rows()]
    lines(folder, "metadata.jsonl", made)
    return (
        folder,
        lambda: lines(folder, "metadata.jsonl", [*made, '{"file_name": "x.wav"']),
        ("metadata.jsonl:4: is not JSON"),
    )


def parquet(folder, name="data/train-00000-of-00001.parquet", empty=None):
    cells = [dict(bytes=wav_bytes(hertz(i)), path=f"{n}.wav") for i, n in enumerate(NAMES)]
    if empty is not None:
        cells[empty] = dict(bytes=None, path="x.wav")
    columns = dict(audio=cells, transcription=WORDS, speaker_id=[84, 84, 91])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pydict(columns), folder / name, row_group_size=2)
    return (
        folder,
        lambda: parquet(folder, name, empty=1),
        ("train-00000-of-00001.parquet row 2 (x.wav) holds no bytes of a recording"),
    )


def saved(folder, empty=False):
    cells = [dict(bytes=wav_bytes(hertz(i)), path=f"{n}.wav") for i, n in enumerate(NAMES)]
    words = ["", *WORDS[1:]] if empty else WORDS
    rows = Dataset.from_dict(dict(audio=cells, text=words, speaker=SPEAKERS))
    shutil.rmtree(folder, ignore_errors=True)
    DatasetDict(train=rows).save_to_disk(folder)
    return folder, lambda: saved(folder, empty=True), "train:1: has nothing in 'text'"


def sovits(folder):
    sounds(folder / "slicer")
    made = [f"D:\\voice\\slicer\\{n}.wav|{s}|EN|{w}" for n, w, s in rows()]
    lines(folder / "slicer", "all.list", made)
    return (
        folder / "slicer",
        lambda: lines(folder / "slicer", "all.list", [*made, "a.wav|84"]),
        ("all.list:4: has 2 of the 4 parts path|speaker|language|text"),
    )


def manifest(i, **entries):
    made = dict(audio_filepath="talk.flac", offset=SECONDS * i, duration=SECONDS, text=WORDS[i])
    return json.dumps(made | dict(speaker=SPEAKERS[i], id=NAMES[i]) | entries)


def nemo(folder):
    talk(folder)
    lines(folder, "train.json", [manifest(i) for i in range(3)])
    return (
        folder,
        lambda: lines(folder, "train.json", [manifest(0), manifest(1, duration=9)]),
        ("train.json:2 (id '84_1_000002_000000'): "),
    )


def kaldi(folder):
    talk(folder)
    lines(folder, "wav.scp", ["talk talk.flac"])
    lines(folder, "text", [f"{n} {w}" for n, w, _ in rows()])
    lines(folder, "utt2spk", [f"{n} {s}" for n, _, s in rows()])
    cuts = [f"{n} talk {SECONDS * i} {SECONDS * (i + 1)}" for i, n in enumerate(NAMES)]
    lines(folder, "segments", cuts)
    return (
        folder,
        lambda: lines(folder, "segments", [*cuts[:2], f"{NAMES[2]} tolk 0 1"]),
        ("text:3: 'tolk' is not in wav.scp"),
    )


def libritts(folder):
    for n, w, s in rows():
        sounds(folder / "train-clean" / s / "1", names=[])
        sf.write(folder / f"train-clean/{s}/1/{n}.wav", wave(hertz(NAMES.index(n))), 24000)
        (folder / f"train-clean/{s}/1/{n}.normalized.txt").write_text(w, encoding="utf-8")
    gone = folder / f"train-clean/84/1/{NAMES[0]}.normalized.txt"
    return folder, gone.unlink, f"{NAMES[0]}.normalized.txt:1 (id {NAMES[0]!r}): "


def librispeech(folder):
    for s in ("84", "91"):
        names = [n for n, _, speaker in rows() if speaker == s]
        sounds(folder / s, names=[])
        for n in names:
            sf.write(folder / s / f"{n}.flac", wave(hertz(NAMES.index(n))), 24000)
        lines(folder / s, f"{s}-1.trans.txt", [f"{n} {WORDS[NAMES.index(n)]}" for n in names])
    return (
        folder,
        (folder / f"91/{NAMES[2]}.flac").unlink,
        (f"91-1.trans.txt:1: names {NAMES[2]!r}, and no recording of that name"),
    )


def swift(folder):
    sounds(folder)

    def record(name, words, marks=1):
        turns = [dict(role="system", content="Generate audio following instruction.")]
        turns += [dict(role="user", content=words)]
        turns += [dict(role="assistant", content="<audio>" * marks)]
        return json.dumps(dict(id=name, messages=turns, audios=[f"{name}.wav"], start_index=2))

    made = [record(n, w) for n, w, _ in rows()]
    lines(folder, "swift.jsonl", made)
    return (
        folder,
        lambda: lines(folder, "swift.jsonl", [*made[:2], record("x", "X.", 2)]),
        ("swift.jsonl:3: has 2 times '<audio>' and 1 audios"),
    )


def own(folder):
    sounds(folder)
    made = [dict(id=n, audio_file=f"{n}.wav", text=w, speaker_id=s) for n, w, s in rows()]
    (folder / "metadata.json").write_text(json.dumps(made, indent=1))
    return (
        folder,
        lambda: (folder / "metadata.json").write_text('[{"audio": "a.wav", "text": "A."}]'),
        ("metadata.json:1 (id 'metadata:1'): has no 'audio_file' (is 'audio' meant?)"),
    )


def pairs(folder):
    sounds(folder)
    for n, w, _ in rows():
        (folder / f"{n}.txt").write_text(w, encoding="utf-8")
    return folder, (folder / f"{NAMES[1]}.txt").unlink, f"{NAMES[1]}.txt:1 (id {NAMES[1]!r}): "


FORMATS = dict(
    zip(
        (
            made.__name__
            for made in (
                ljspeech,
                vits,
                common_voice,
                audiofolder,
                json_rows,
                jsonl_rows,
                parquet,
                saved,
                sovits,
                nemo,
                kaldi,
                libritts,
                librispeech,
                swift,
                own,
                pairs,
            )
        ),
        (
            (ljspeech, "LJSpeech"),
            (vits, "path, speaker and text between '|'"),
            (common_voice, "Common Voice with a header"),
            (audiofolder, "CSV with a header"),
            (json_rows, "rows of JSON"),
            (jsonl_rows, "rows of JSON"),
            (parquet, "Parquet"),
            (saved, "saved by datasets"),
            (sovits, "GPT-SoVITS list"),
            (nemo, "NeMo manifest"),
            (kaldi, "Kaldi folder"),
            (libritts, "LibriTTS folder"),
            (librispeech, "LibriSpeech folder"),
            (swift, "records of ms-swift"),
            (own, "metadata.json"),
            (pairs, "pairs of a recording and a .txt"),
        ),
        strict=True,
    )
)  # name -> how it is made, and what it is taken for
WITHOUT_SPEAKER = ("ljspeech", "swift", "pairs")


@pytest.mark.parametrize("name", FORMATS)
def test_every_form_is_the_same_corpus(tmp_path, name):
    make, format = FORMATS[name]
    path, _, _ = make(tmp_path / "corpus")
    assert preview_corpus(path).format == format
    corpus = load_corpus(path)
    words = [w.replace(" | ", " or ") if name in ("ljspeech", "vits") else w for w in WORDS]
    assert [(c.id, c.transcript) for c in corpus] == list(zip(NAMES, words, strict=True))
    speakers = [None] * 3 if name in WITHOUT_SPEAKER else SPEAKERS
    assert [c.speaker for c in corpus] == speakers
    assert [[m.role for m in c.messages] for c in corpus] == [["system", "user", "assistant"]] * 3
    for i, c in enumerate(corpus):
        assert np.abs(load_audio(c.audio[-1]) - wave(hertz(i))).max() < 1e-3, c.id
    report = check_corpus(corpus, progress=False)
    assert len(report.recordings) == 3
    train, held = split_corpus(corpus, 0.3, report=report)
    assert len(train) + len(held) == 3 and all(pickle.loads(pickle.dumps(c)) == c for c in corpus)


@pytest.mark.parametrize("name", FORMATS)
def test_a_broken_row_is_named(tmp_path, name):
    path, spoil, message = FORMATS[name][0](tmp_path / "corpus")
    spoil()
    with pytest.raises(CorpusError) as caught:
        check_corpus(load_corpus(path), progress=False)
    problems = [str(problem) for problem in caught.value.problems]
    assert any(message in problem for problem in problems), problems
    assert all(problem.remedy for problem in caught.value.problems)


def test_a_column_may_be_named(tmp_path):
    sounds(tmp_path)
    made = ["clip,words,german,who", f"{NAMES[0]}.wav,Hello.,Hallo.,ann"]
    lines(tmp_path, "rows.csv", made)
    assert load_corpus(tmp_path)[0].transcript == "Hello."
    (c,) = load_corpus(tmp_path, text_column="german", speaker_column="who")
    assert (c.transcript, c.speaker, c.extra) == ("Hallo.", "ann", {"words": "Hello."})
    for named, what in (
        (dict(text_column="germn"), "did you mean 'german'"),
        (dict(audio_column="wav"), "there are clip, words, german, who"),
    ):
        with pytest.raises(CorpusError, match=what):
            load_corpus(tmp_path, **named)


def test_the_guess_is_shown(tmp_path):
    path, spoil, _ = common_voice(tmp_path)
    spoil()
    seen = preview_corpus(path)
    assert seen.counts == ["3 rows", "2 speakers", "1 that cannot be read"]
    assert ("text", "sentence", WORDS[0]) in seen.cells
    assert "recordings are looked for in clips/" in repr(seen)
    lines(path, "validated.tsv", ["path\tsentence", "<b>x</b>.wav\t<script>\x1b[2J"])
    page = preview_corpus(path)._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "\x1b" not in repr(preview_corpus(path))


def test_a_manifest_keeps_what_it_does_not_read(tmp_path):
    sounds(tmp_path)
    notes = dict(lang="en", duration=SECONDS, nested=dict(a=[1]))
    made = [dict(audio_filepath=f"{NAMES[0]}.wav", text="A.") | notes]
    lines(tmp_path, "m.jsonl", [json.dumps(row) for row in made])
    (c,) = load_corpus(tmp_path)
    assert c.extra == notes and check_corpus([c], progress=False)
    lines(tmp_path, "m.jsonl", [json.dumps(row | dict(duration=9)) for row in made])
    with pytest.raises(CorpusError, match="says a duration of 9 s"):
        check_corpus(load_corpus(tmp_path), progress=False)


@pytest.mark.parametrize(
    "entries, what",
    [
        (dict(offset=-1), "'offset' is '-1'"),
        (dict(offset="soon"), "'offset' is 'soon'"),
        (dict(offset=1e9), "the recording lasts 1.50 s"),
        (dict(duration=None), "has a start and no end"),
        (dict(duration=0), "starts at"),
        (dict(duration=1e9), "up to 3600 s after it"),
        (dict(audio_filepath="gone.flac"), "gone.flac cannot be opened: it does not exist"),
        (dict(text=""), "has nothing in 'text'"),
        (dict(text="Say <|eot_id|> now"), "the model's own marks"),
        (dict(text="half \ud800"), "half a surrogate pair"),
        (dict(text="bell \x07"), "control character"),
    ],
)
def test_bad_sections_and_words_are_named(tmp_path, entries, what):
    talk(tmp_path)
    lines(tmp_path, "m.jsonl", [manifest(0), manifest(1, **entries)])
    with pytest.raises(CorpusError) as caught:
        check_corpus(load_corpus(tmp_path), progress=False)
    (problem,) = caught.value.problems
    assert what in str(problem) and str(problem).startswith(f"{tmp_path}/m.jsonl:2")


def test_a_stranger_reads_no_file_of_yours(tmp_path):
    "Neither through paths, links and commands, nor through the files that a data set names."
    secret = tmp_path / "secret"
    sounds(secret)
    talk(secret)
    folder = tmp_path / "corpus"
    folder.mkdir()
    far = f"../secret/{NAMES[0]}.wav"
    (folder / "link.wav").symlink_to(secret / f"{NAMES[0]}.wav")
    tables = {
        "a.csv": ["path,text", f"{far},A.", f"{secret}/{NAMES[1]}.wav,B.", "link.wav,C."],
        "a.list": [f"{far}|x|en|A."],
        "a.jsonl": [
            json.dumps(
                dict(audio_filepath="../secret/talk.flac", offset=0, duration=0.5, text="A.")
            )
        ],
    }
    for name, made in tables.items():
        lines(folder, name, made)
        with pytest.raises(CorpusError) as caught:
            load_corpus(folder / name)
        assert len(caught.value.problems) == len(made) - name.endswith("csv")
        assert all("allow_outside=True" in str(p) for p in caught.value.problems)
        assert load_corpus(folder / name, allow_outside=True)
    kaldi(tmp_path / "kaldi")
    lines(tmp_path / "kaldi", "wav.scp", [f"talk touch {tmp_path}/TRACE |"])
    with pytest.raises(CorpusError, match="is a command, which is never run"):
        load_corpus(tmp_path / "kaldi", allow_outside=True)
    assert not (tmp_path / "TRACE").exists()
    saved(tmp_path / "saved")
    saved(tmp_path / "other")
    state = tmp_path / "saved/train/state.json"
    held = json.loads(state.read_text())
    held["_data_files"][0]["filename"] = "../../other/train/data-00000-of-00001.arrow"
    state.write_text(json.dumps(held))
    with pytest.raises(CorpusError, match="lies outside of the folder"):
        load_corpus(tmp_path / "saved")


def test_a_data_set_with_a_program_runs_nothing(tmp_path):
    parquet(tmp_path)
    (tmp_path / "corpus.py").write_text(f"open({str(tmp_path / 'TRACE')!r}, 'w')")
    assert len(load_corpus(tmp_path)) == 3 and not (tmp_path / "TRACE").exists()
    with pytest.raises(CorpusError, match="a program, which is never run"):
        load_corpus(tmp_path / "corpus.py")


def test_recordings_without_words_are_a_condition_of_their_own(tmp_path):
    sounds(tmp_path / "interview")
    with pytest.raises(NoTranscripts) as caught:
        load_corpus(tmp_path / "interview")
    assert [path.stem for path in caught.value.recordings] == NAMES
    with pytest.raises(NoTranscripts, match="holds 1 recordings and no words"):
        load_corpus(tmp_path / f"interview/{NAMES[0]}.wav")
    (tmp_path / f"interview/{NAMES[0]}.txt").write_text("A.")
    with pytest.raises(CorpusError) as caught:
        load_corpus(tmp_path / "interview")
    assert not isinstance(caught.value, NoTranscripts) and len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("a.zip", "unpack it"),
        ("a.xlsx", "save its sheet as CSV"),
        ("a.srt", "NeMo manifest"),
        ("a.TextGrid", "NeMo manifest"),
        ("a.lab", "rename them to .txt"),
        ("a.pkl", "export its rows as CSV or JSON"),
        ("a.xyz", "name one of these"),
    ],
)
def test_what_is_not_read_says_what_would_be(tmp_path, name, remedy):
    (tmp_path / name).write_text("x")
    with pytest.raises(CorpusError, match=remedy) as caught:
        load_corpus(tmp_path / name)
    assert name in str(caught.value)


def test_several_tables_are_a_question(tmp_path):
    sounds(tmp_path)
    for name in ("a.csv", "b.csv"):
        lines(tmp_path, name, ["path,text", f"{NAMES[0]}.wav,{name}"])
    with pytest.raises(CorpusError, match="holds a.csv, b.csv; name the one to read"):
        load_corpus(tmp_path)
    assert load_corpus(tmp_path / "b.csv")[0].transcript == "b.csv"


@pytest.mark.parametrize("spoil", ["cut", "text", "columns"])
def test_a_damaged_parquet_file_is_named(tmp_path, spoil):
    parquet(tmp_path)
    path = tmp_path / "data/train-00000-of-00001.parquet"
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif spoil == "text":
        path.write_text("x" * 500)
    else:
        pq.write_table(pa.table(dict(a=[1])), tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(CorpusError, match="parquet"):
        load_corpus(tmp_path)


def test_recordings_stay_in_their_table(tmp_path):
    "Only words are read at once, and the cells are read from where they lie now."
    parquet(tmp_path)
    corpus = load_corpus(tmp_path)
    assert len(pickle.dumps(corpus)) < 10_000 < len(corpus[0].audio[0].raw)
    assert [c.extra["split"] for c in corpus] == ["train"] * 3
    path = tmp_path / "data/train-00000-of-00001.parquet"
    before = corpus[2].audio[0].raw
    os.utime(path, ns=(1, 1))
    assert corpus[2].audio[0].raw == before
    path.unlink()
    with pytest.raises(CorpusError, match="row 1 .* cannot be read"):
        load_audio(corpus[0].audio[0])


OTHER = [
    ("m4a", "mp4", "aac", 24000),
    ("aac", "adts", "aac", 24000),
    ("webm", "webm", "libopus", 48000),
]


def encode(path, kind, coding, rate, seconds=SECONDS, channels="mono"):
    "A tone as ffmpeg's encoders write it."
    av = pytest.importorskip("av")
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    with av.open(str(path), "w", format=kind) as out:
        stream = out.add_stream(coding, rate=rate, layout=channels)
        count = stream.layout.nb_channels
        frame = av.AudioFrame.from_ndarray(
            np.repeat(tone[None], count, 0).astype("f4"), "fltp", channels
        )
        frame.rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return path


DECODERS = [
    "av",
    pytest.param(
        "ffmpeg", marks=pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
    ),
]


@pytest.mark.parametrize("way", DECODERS)
@pytest.mark.parametrize("suffix, kind, coding, rate", OTHER)
def test_recordings_of_telephones_and_browsers(
    tmp_path, monkeypatch, suffix, kind, coding, rate, way
):
    path = encode(tmp_path / f"a.{suffix}", kind, coding, rate)
    (tmp_path / "a.txt").write_text("A.")
    if way == "ffmpeg":
        monkeypatch.setattr(other_sound, "decoder", lambda: shutil.which("ffmpeg"))
    (c,) = load_corpus(tmp_path)
    heard = load_audio(c.audio[0])
    assert abs(len(heard) - SECONDS * 24000) <= 2400 and 0.15 < np.sqrt(np.mean(heard**2)) < 0.25
    assert len(check_corpus([c], progress=False).rows) == 1
    with pytest.raises(CorpusError, match="the limit is 0.2 s"):
        load_audio(path, max_duration_s=0.2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorpusError, match=r"a\.\w+ (stops after|is a recording in a form)"):
        load_audio(path)


def test_six_channels_of_a_film(tmp_path):
    path = encode(tmp_path / "film.mp4", "mp4", "aac", 48000, channels="5.1")
    with pytest.raises(CorpusError, match="has 6 channels"):
        load_audio(path)


def test_without_pyav_and_ffmpeg_there_is_advice(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.m4a", "mp4", "aac", 24000)
    (tmp_path / "a.txt").write_text("A.")
    for module in ("higgs_nb.data.other_sound", "higgs_nb.data.corpus_folder"):
        monkeypatch.setattr(f"{module}.decoder", lambda: None)
    for read in (lambda: load_corpus(tmp_path), lambda: load_audio(path)):
        with pytest.raises(CorpusError, match="needs PyAV or ffmpeg; pip install av"):
            read()


class Mirror(BaseHTTPRequestHandler):
    "A hub with one data set, as far as a download asks for it."

    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {}  # name -> content
    asked = []

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "X-Repo-Commit": self.commit} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        entries = [
            dict(type="file", path=f, size=len(c), oid="a" * 40) for f, c in self.files.items()
        ]
        if path.startswith("/api/datasets/me/voice/tree/"):
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if path in (f"/api/datasets/me/voice/revision/{x}" for x in ("main", "v1", self.commit)):
            siblings = [dict(rfilename=name) for name in self.files]
            info = dict(id="me/voice", sha=self.commit, siblings=siblings)
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        name = path.removeprefix(f"/datasets/me/voice/resolve/{self.commit}/")
        if name in self.files:
            return self.answer(200, self.files[name], ETag=f'"{abs(hash(name)):040x}"')
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def mirror(tmp_path):
    "A hub on this machine; the environment of a process that uses it."
    parquet(tmp_path / "made", "en/train-00000-of-00001.parquet")
    parquet(tmp_path / "made", "de/test-00000-of-00001.parquet")
    folder = tmp_path / "made"
    Mirror.files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.parquet")}
    Mirror.files |= {"voice.py": b"open('TRACE', 'w')", "README.md": b"# Voice"}
    Mirror.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield os.environ | dict(
        HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1"
    )
    server.shutdown()
    server.server_close()


READ = """
import sys
from higgs_nb.data.audio import load_audio
from higgs_nb.data.corpus import load_corpus
try:
    corpus = load_corpus(sys.argv[1])
    c = corpus[0]
    print(len(corpus), c.transcript, c.extra["split"], len(load_audio(c.audio[0])))
except ValueError as error:
    print("ERROR", error)
"""


def test_a_data_set_of_the_hub(mirror, tmp_path):
    def read(address, **more):
        command = [sys.executable, "-c", READ, address]
        run = subprocess.run(
            command, env=mirror | more, cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    first, rows = read("hf://me/voice@v1/en")
    assert first == f"hf://me/voice@{Mirror.commit}"
    assert rows == f"3 {WORDS[0]} train {round(SECONDS * 24000)}"
    assert not any("de/test" in path or path.endswith(".py") for path in Mirror.asked)
    assert read(f"hf://me/voice@{Mirror.commit}/en", HF_HUB_OFFLINE="1")[1] == rows
    assert "has no 'fr'" in read("hf://me/voice@v1/fr")[-1]
    (missing,) = read("hf://me/none@v1")
    assert "me/none (v1) cannot be downloaded" in missing and "correct its id" in missing
    (wrong,) = read("hf://me")
    assert "write hf://OWNER/NAME@REVISION" in wrong
    assert not list(tmp_path.rglob("TRACE")) and not list(tmp_path.rglob("voice.py"))


CONFIGS = """---
license: cc0-1.0
configs:
- config_name: en
  data_files:
  - split: train
    path: "en/train-*"
  - split: test
    path: [en/late.parquet]
- config_name: fr
  data_files: fr/clips.csv
---
# Voice
"""


def voices(folder):
    "A data set of two configurations: Parquet files of two splits, and a table beside recordings."
    parquet(folder, "en/train-00000-of-00002.parquet")
    parquet(folder, "en/train-00001-of-00002.parquet")
    parquet(folder, "en/late.parquet")
    parquet(folder, "de/train-00000-of-00001.parquet")  # that no configuration names
    sounds(folder / "fr/clips")
    rows = [f"{name}.wav,Mot {i}" for i, name in enumerate(NAMES)]
    (folder / "fr/clips.csv").write_text("\n".join(["path,sentence", *rows]))
    (folder / "README.md").write_text(CONFIGS)
    return folder


def test_a_readme_says_which_files_are_read(tmp_path):
    """The splits of a configuration, whatever their files are called, and of the other the rows
    with recordings beside them; without a choice both are listed.
    """
    folder = voices(tmp_path / "voices")
    corpus = load_corpus(folder, config="en")
    assert [c.extra["split"] for c in corpus] == ["train"] * 6 + ["held_out"] * 3
    assert [c.transcript for c in corpus] == WORDS * 3
    assert len({c.id for c in corpus}) == 9
    assert {len(load_audio(c.audio[0])) for c in corpus} == {round(SECONDS * 24000)}
    french = load_corpus(folder, config="fr")
    assert [c.transcript for c in french] == ["Mot 0", "Mot 1", "Mot 2"]
    assert [len(load_audio(c.audio[0])) for c in french] == [round(SECONDS * 24000)] * 3
    assert "configuration fr of 2 in README.md" in repr(preview_corpus(folder, config="fr"))
    for name, message in (
        ("", "lists 2 configurations: en, fr; name one of them, such as config=en"),
        ("fre", r"has no configuration 'fre' \(did you mean 'fr'\?\)"),
    ):
        with pytest.raises(CorpusError, match=message):
            load_corpus(folder, config=name)
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("name: fr", "name: fr\n  default: true"))
    assert load_corpus(folder) == french
    (folder / "README.md").write_text(readme.replace("en/late", "en/gone"))
    with pytest.raises(CorpusError, match="no file of .* is 'en/gone.parquet'"):
        load_corpus(folder, config="en")
    (folder / "README.md").write_text(readme.replace("fr/clips.csv", "../*/fr/clips.csv"))
    with pytest.raises(CorpusError, match="leads out of the data set"):
        load_corpus(folder, config="fr")
    with pytest.raises(CorpusError, match="its README lists none"):
        load_corpus(nemo(tmp_path / "nemo")[0], config="fr")


@given(
    st.recursive(
        st.none() | st.text(max_size=8) | st.integers(),
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["config_name", "data_files", "split", "path", "data_dir", "default"]
                ),
                part,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_list_of_configurations_is_read_or_named(tmp_path_factory, value):
    "Plain data of any shape: configurations, or an error that names the README."
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(value)}\n---\n")
    try:
        found = hub_configs(folder)
    except CorpusError as error:
        assert "README.md cannot be read" in str(error)
    else:
        assert (value is None and not found) or len(found) == len(value)


def test_a_readme_of_a_data_set_of_the_hub(mirror, tmp_path):
    "The same from a hub; a YAML bomb and tags of Python are errors and nothing runs."
    folder = voices(tmp_path / "voices")
    files = [f for f in folder.rglob("*") if f.is_file()]
    Mirror.files = {str(f.relative_to(folder)): f.read_bytes() for f in files}

    def read(config, readme=CONFIGS):
        Mirror.files["README.md"] = readme.encode()
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        code = READ.replace("(sys.argv[1])", "(sys.argv[1], config=sys.argv[2])")
        command = [sys.executable, "-c", code, "hf://me/voice@v1", config]
        run = subprocess.run(command, env=mirror, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()[-1]

    assert read("en") == f"9 {WORDS[0]} train {round(SECONDS * 24000)}"
    assert "lists 2 configurations: en, fr" in read("")
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefgh", "bcdefghi"):
        bomb += f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for head in (f"{bomb}configs: *i\n", "configs: !!python/object/apply:os.mkdir [TRACE]\n"):
        assert "README.md cannot be read" in read("", f"---\n{head}---\n")
    assert not list(tmp_path.rglob("TRACE"))


def test_a_split_with_a_report_reads_no_table_again(tmp_path, monkeypatch):
    parquet(tmp_path)
    corpus = load_corpus(tmp_path)
    report = check_corpus(corpus, progress=False)
    expected = split_corpus(corpus, 0.3)

    def read(self):
        raise AssertionError("a cell was read")

    monkeypatch.setattr(Cell, "raw", property(read))
    assert split_corpus(corpus, 0.3, report=report) == expected


@pytest.mark.parametrize("seed", range(5))
def test_each_speaker_is_on_both_sides(seed):
    "Of forty rows of one and four of each other, with sentences that two speakers share."
    talks = []
    for i in range(56):
        speaker = "a" if i < 40 else "bcde"[(i - 40) // 4]
        words = f"Shared {i % 4}" if i % 8 == 0 else f"Sentence {i}"
        audio = Audio(raw=bytes([i, 1]))
        talks.append(tts_conversation(words, audio, id=str(i), speaker=speaker))
    train, held = split_corpus(talks, 0.25, seed, per_speaker=True)
    assert {c.speaker for c in train} == {c.speaker for c in held} == set("abcde")
    assert not {c.transcript for c in train} & {c.transcript for c in held}
    assert len(train) + len(held) == 56 and 14 <= len(held) <= 20
    assert split_corpus(talks, 0.25, seed, per_speaker=True) == (train, held)
    alone = [c for c in talks if c.speaker == "a"]
    plain = split_corpus(alone, 0.25, seed)
    assert split_corpus(alone, 0.25, seed, per_speaker=True) == plain


@pytest.mark.parametrize("make, suffix", [(parquet, ".wav"), (nemo, ".flac")])
def test_recordings_within_files_are_encoded_like_files(tmp_path, make, suffix):
    "In this process and in others; the codes are those of the same sound in a file of its own."
    corpus = load_corpus(make(tmp_path / "corpus")[0])
    sounds(tmp_path / "files", suffix)  # writers of the two round differently
    codec = load_codec("world")
    alone = CodeStore(tmp_path / "alone", codec)
    wanted = [alone.get(str(tmp_path / f"files/{name}{suffix}")) for name in NAMES]
    store = CodeStore(tmp_path / "codes", codec)
    audios = [audio for c in corpus for audio in c.audio]
    assert store.encode_all(audios, progress=False, workers=2)["misses"] == 3
    assert store.encode_all(audios, progress=False)["hits"] == 3
    for audio, codes in zip(audios, wanted, strict=True):
        assert torch.equal(store.get(audio), codes)


def test_corpora_that_are_prepared_together(tmp_path):
    "Ids of both, one division, and a weight for each in the run that trains."
    pairs(tmp_path / "mine")
    (tmp_path / f"mine/{NAMES[0]}.txt").write_text(WORDS[0] + " Twice.")
    other = tmp_path / "cv"
    common_voice(other)
    words = ["prepare", "--out", str(tmp_path / "out"), "-p", f"data={tmp_path / 'mine'}"]
    words += ["-p", f"also={other}", "-p", "base=tiny", "-p", "held_out=0.3", "-p", "workers=1"]
    assert higgs_run(words) == 0
    corpus = load_corpus(tmp_path / "out")
    assert {c.id for c in corpus} == {f"{x}/{name}" for x in ("mine", "cv") for name in NAMES}
    train, held = split_corpus(corpus)
    assert held and len(train) + len(held) == 6
    sides = [{c.transcript for c in side} for side in (train, held)]
    waves = [{sf.read(c.audio[0].path)[0].tobytes() for c in side} for side in (train, held)]
    assert not sides[0] & sides[1] and not waves[0] & waves[1]
    mixed = weighted(train, {"mine": 2, "cv": 0})
    assert len(mixed) == 2 * sum(c.extra["corpus"] == "mine" for c in train)


CELL = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["a.wav", "path", "text", "offset", '"', "|", "\t", ",", "\0", "../x", "1.5"]),
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELL,
    lambda part: st.lists(part, max_size=2) | st.dictionaries(CELL, part, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from("path text speaker id offset duration end split messages audios x".split())


def read_or_refuse(path):
    "Read a corpus; whatever is wrong with it is an error that can be shown."
    try:
        corpus = load_corpus(path)
        json.dumps([c.extra for c in corpus])
        check_corpus(corpus, progress=False)
    except CorpusError as error:
        assert str(error).replace("\n", "").isprintable() and error.problems
    try:
        assert repr(preview_corpus(path))
    except CorpusError:
        pass


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([".csv", ".tsv", ".list", ".txt"]),
    st.sampled_from(["path,text\n", "path\ttext\tclient_id\n", "a|b|c\n", ""]),
    st.lists(st.lists(CELL, max_size=4), max_size=4),
    st.sampled_from(",\t|;"),
)
def test_any_text_is_a_table_or_an_error(tmp_path_factory, suffix, head, rows, between):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    text = head + "\n".join(between.join(row) for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refuse(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUE | st.dictionaries(KEYS, VALUE, max_size=5), max_size=3))
def test_any_json_is_a_table_or_an_error(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read_or_refuse(path)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS, st.text(max_size=4) | st.none(), max_size=4), max_size=3),
    st.integers(0, 400),
    st.integers(1, 255),
)
def test_any_parquet_is_a_table_or_an_error(tmp_path_factory, rows, place, flip):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    columns = {key for row in rows for key in row} or {"path"}
    data = {key: [row.get(key) for row in rows] for key in columns}
    pq.write_table(pa.table({k: pa.array(v, pa.string()) for k, v in data.items()}), path)
    read_or_refuse(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= flip
    path.write_bytes(content)
    read_or_refuse(path)
