"""Corpora in the forms that people have them: what would train another thing is an error that
names the row, and nothing crashes.
"""

import json
import os
import unicodedata

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.data.conversation import Audio, Conversation, Message, Text, tts_conversation
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.corpus_check import check_corpus, speakers_without_mark
from higgs_nb.data.corpus_split import sentence_key, split_corpus
from higgs_nb.data.problems import CorpusError, Problem
from higgs_nb.data.prompt import byte_tokenizer, special_ids
from higgs_nb.family import HIGGS_V2
from higgs_nb.original.records import prepare_chatml_sample

SPECIAL_TOKENS = HIGGS_V2.special.names


def tone(path, hz=440.0, seconds=0.3):
    "Write a tone and return its path."
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * 24000)) / 24000)
    sf.write(path, wave, 24000, subtype="PCM_16")
    return path


def table(folder, *rows, name="metadata.json", indent=1):
    "A table of rows beside the recordings a.wav and b.wav."
    tone(folder / "a.wav")
    tone(folder / "b.wav", 300)
    path = folder / name
    path.write_text(json.dumps(list(rows), indent=indent), encoding="utf-8")
    return path


def row(**entries):
    return {"audio_file": "a.wav", "text": "Good."} | entries


def problems_of(path, **options):
    "The problems of a corpus, as text."
    with pytest.raises(CorpusError) as caught:
        check_corpus(load_corpus(path, **options), progress=False)
    return [str(p) for p in caught.value.problems]


SECTIONS = [
    "offset",
    "start",
    "end",
    "start_time",
    "end_time",
    "begin",
    "Start-Time",
    "segment_start",
    "startMs",
    "end_sec",
    "audio_offset",
    "start_sample",
    "onset",
]


@pytest.mark.parametrize("key", SECTIONS)
def test_section_of_a_recording_is_an_error(tmp_path, key):
    voice = dict(speaker_id="x", ref_audio_file="b.wav", ref_transcript="Hi.")
    path = table(tmp_path, row(**{key: 0.5}), row(ref_speakers=[voice | {key: 0}]))
    first, second = problems_of(path)
    assert first.startswith(f"{path}:2 (id 'metadata:1'): ") and repr(key) in first
    assert repr(key) in second and "cut the recording" in first


NEAR = {
    "ref_audio": "ref_audio_file",
    "ref_text": "ref_transcript",
    "ref_audiofile": "ref_audio_file",
    "speaker": "speaker_id",
    "Speaker_ID": "speaker_id",
    "Split": "split",
    "Scene": "scene",
    "ref_transcripts": "ref_transcript",
    "refSpeakers": "ref_speakers",
    "prompt_wav": "ref_audio_file",
}


@pytest.mark.parametrize("key", NEAR)
def test_near_miss_of_an_optional_key_is_asked_about(tmp_path, key):
    (problem,) = problems_of(table(tmp_path, row(**{key: "b.wav"})))
    assert f"{key!r}, which is not read (did you mean {NEAR[key]!r}?)" in problem


def test_required_keys_of_other_tools_are_asked_about(tmp_path):
    for key in ("audio_path", "audio_filepath", "file_name", "wav"):
        (problem,) = problems_of(table(tmp_path, {key: "a.wav", "text": "A."}))
        assert f"has no 'audio_file' (is {key!r} meant?)" in problem


def test_notes_are_kept(tmp_path):
    notes = {
        "language": "en",
        "emotion": "calm",
        "duration": 0.3,
        "normalized_text": "good",
        "gender": "f",
        "speaker_gender": "f",
        "language_id": 3,
        "source": "x",
        "duration_ms": 300,
    }
    (c,) = load_corpus(table(tmp_path, row(**notes)))
    assert c.extra == notes and check_corpus([c], progress=False)


def test_duration_of_a_part_is_an_error(tmp_path):
    assert "duration of 0.1 s" in problems_of(table(tmp_path, row(duration=0.1)))[0]


def test_keys_beside_the_rows(tmp_path):
    path = table(tmp_path)
    path.write_text(json.dumps({"scene": "A hall.", "language": "en", "samples": [row()]}))
    (problem,) = problems_of(path)
    assert "'scene' beside 'samples'" in problem
    path.write_text(json.dumps({"data": [row()]}))
    assert any("is 'data' meant?" in p for p in problems_of(path))


MARKS = [*SPECIAL_TOKENS, "<|reserved_special_token_200|>", "<|python_tag|>"]
PLACES = {
    "text": lambda s: row(text=s),
    "scene": lambda s: row(scene=s),
    "speaker": lambda s: row(speaker_id=s),
    "id": lambda s: row(id=s),
    "tag": lambda s: row(
        text=f"{s} Hi.",
        ref_speakers=[dict(speaker_tag=s, ref_audio_file="b.wav", ref_transcript="Hi.")],
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "bad", [*MARKS, "nul\0", "bell\x07", "lost \ufffd", "\x1b[2J", "half \ud800"]
)
def test_text_that_is_no_text(tmp_path, place, bad):
    path = table(tmp_path, PLACES[place](f"Say {bad} now"))
    problems = problems_of(path)
    assert problems and all(p.startswith(f"{path}:2 (id ") for p in problems)
    assert all(p.isprintable() for p in problems)


@pytest.mark.parametrize("place", ["id", "speaker"])
@pytest.mark.parametrize("sign", "\n\r\t")
def test_names_are_on_one_line(tmp_path, place, sign):
    (problem,) = problems_of(table(tmp_path, PLACES[place](f"two{sign}lines")))
    assert "holds a line break or a tab" in problem and problem.isprintable()


@pytest.mark.parametrize(
    "text", ["<laugh> ha", "[laughter]", "<|", "a <| b |> c", "<| |>", "tab\tand\nline"]
)
def test_plain_signs_stay(tmp_path, text):
    (c,) = load_corpus(table(tmp_path, row(text=text)))
    check_corpus([c], progress=False)
    assert c.transcript == text


TOKENIZER = byte_tokenizer()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", "<|", "|>", " "]), min_size=1, max_size=4).map(
        "".join
    ),
    st.sampled_from(["text", "scene", "system", "recipient", "role"]),
)
def test_no_text_makes_a_mark(text, place):
    parts = {
        "text": "Hi.",
        "scene": "A room.",
        "system": "Speak.",
        "recipient": "you",
        "role": "user",
    }
    parts[place] = text
    c = Conversation(
        "talk",
        (
            Message("system", (Text(parts["system"]),)),
            Message("scene", (Text(parts["scene"]),)),
            Message(parts["role"], (Text(parts["text"]),), parts["recipient"]),
            Message("assistant", (Audio("a.wav"),)),
        ),
        source="talks.jsonl:7",
    )
    if any(t in text for t in SPECIAL_TOKENS):
        with pytest.raises(CorpusError, match=r"talks.jsonl:7 \(id 'talk'\): a text holds"):
            prepare_chatml_sample(c, TOKENIZER)
    else:
        prepare_chatml_sample(c, TOKENIZER)
    assert special_ids(TOKENIZER) == set(TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)))


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_without_ids(tmp_path, indent):
    corpus = load_corpus(table(tmp_path, row(), row(text="B."), indent=indent))
    assert [c.id for c in corpus] == ["metadata:1", "metadata:2"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9),
    st.floats(0, 0.99),
    st.integers(0, 9),
)
def test_no_sentence_and_no_recording_on_both_sides(rows, share, seed):
    talks = [
        tts_conversation(f"Words {'abcdef'[w]}", Audio(raw=bytes([r, 1])), id=str(i))
        for i, (w, r) in enumerate(rows)
    ]
    train, held = split_corpus(talks, held_out=share, seed=seed)
    assert train and sorted(c.id for c in train + held) == sorted(c.id for c in talks)
    assert not {sentence_key(c.transcript) for c in train} & {
        sentence_key(c.transcript) for c in held
    }
    assert not {a for c in train for a in c.targets} & {a for c in held for a in c.targets}


def test_same_recording_in_files_and_forms(tmp_path):
    talks = []
    for i in range(12):
        path = tone(tmp_path / f"{i}.wav", 200 + 50 * (i // 2))
        if i % 2:
            sf.write(path.with_suffix(".flac"), sf.read(path, dtype="int16")[0], 24000)
        talks.append(tts_conversation(f"Word {i}", Audio(str(path)), id=str(i)))
    by_bytes = split_corpus(talks, 0.3)[1]
    assert {int(c.id) // 2 for c in by_bytes} and len(by_bytes) == 4
    flac = [
        tts_conversation(c.transcript, Audio(c.audio[0].path.replace(".wav", ".flac")), id=c.id)
        if int(c.id) % 2
        else c
        for c in talks
    ]
    held = split_corpus(flac, 0.3, report=check_corpus(flac, progress=False))[1]
    assert [c.id for c in held] == [c.id for c in by_bytes]
    assert len({int(c.id) // 2 for c in held}) == len(held) / 2


def test_given_splits_that_share_a_recording(tmp_path):
    path = table(
        tmp_path, row(id="one", split="train"), row(id="two", text="Other.", split="held_out")
    )
    with pytest.raises(CorpusError) as caught:
        split_corpus(load_corpus(path))
    assert "'one'" in str(caught.value) and "'two'" in str(caught.value)


def test_a_lent_voice_is_not_held_out():
    talks = [
        tts_conversation(
            f"Word {i}",
            Audio(raw=bytes([i, 1])),
            id=str(i),
            reference=("Ref.", Audio(raw=b"\0\1")) if i else None,
        )
        for i in range(6)
    ]
    for seed in range(6):
        assert "0" not in {c.id for c in split_corpus(talks, 0.7, seed)[1]}


@pytest.mark.parametrize("share", [10, 1, -0.1, float("nan"), float("inf"), "0.1", True, False])
def test_held_out_is_a_share(share):
    with pytest.raises(ValueError, match="such as 0.1; 10 percent is 0.1"):
        split_corpus([], held_out=share)


def test_one_sentence_is_trained():
    talks = [tts_conversation("Word", id="a"), tts_conversation("word!", id="b")]
    assert split_corpus(talks, 0.5) == (talks, [])


def test_paths_stay_in_the_folder(tmp_path):
    folder = tmp_path / "corpus"
    secret = tmp_path / "secret.txt"
    secret.write_text("The secret words.")
    tone(tmp_path / "far.wav")
    path = table(
        folder,
        row(id="words", text=None, transcript_file="../secret.txt"),
        row(id="sound", audio_file=str(tmp_path / "far.wav"), text="B."),
        row(id="link", text=None, transcript_file="link.txt"),
    )
    (folder / "link.txt").symlink_to(secret)
    problems = problems_of(path)
    assert len(problems) == 3 and all("allow_outside=True" in p for p in problems)
    assert not any("secret words" in p for p in problems)
    assert len(load_corpus(path, allow_outside=True)) == 3


def test_pipes_and_devices_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    path = table(
        tmp_path,
        row(id="a", audio_file="pipe"),
        row(id="b", text=None, transcript_file="pipe"),
        row(id="c", text=None, transcript_file="/dev/zero"),
    )
    for options in ({}, {"allow_outside": True}):
        assert any("not a regular file" in p for p in problems_of(path, **options))
    table(tmp_path, row(audio_file="pipe"))
    assert "pipe cannot be opened: it is not a regular file" in problems_of(path)[0]
    (tmp_path / "long.txt").write_bytes(b"a" * 1_000_001)
    table(tmp_path, row(text=None, transcript_file="long.txt"))
    assert "larger than 1,000,000 bytes" in problems_of(path)[0]


def pairs(folder, *names):
    for name in names:
        tone(folder / f"{name}.wav")
        (folder / f"{name}.txt").write_text(f"Words of {name}.")


def test_folders_that_are_no_part_of_a_corpus(tmp_path):
    for name in (
        "",
        ".Trash-0/files",
        ".git",
        "__MACOSX",
        ".ipynb_checkpoints",
        "runs/prepare/audio",
    ):
        pairs(tmp_path / name, f"clip{len(name)}")
    (tmp_path / "runs/prepare/parameters.json").write_text("{}")
    with pytest.warns(UserWarning, match="runs/prepare is the output of a run"):
        assert [c.id for c in load_corpus(tmp_path)] == ["clip0"]


def test_linked_folder_is_named(tmp_path):
    pairs(tmp_path / "far", "x")
    pairs(tmp_path / "corpus", "own")
    (tmp_path / "corpus/speaker").symlink_to(tmp_path / "far")
    assert "speaker is a link to a folder" in problems_of(tmp_path / "corpus")[0]
    assert len(load_corpus(tmp_path / "corpus", allow_outside=True)) == 2


@pytest.mark.parametrize("suffix", [".m4a", ".aiff", ".aac", ".wma", ".webm", ".oga"])
def test_other_sound_files_are_named(tmp_path, suffix):
    pairs(tmp_path, "a")
    (tmp_path / f"b{suffix}").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("B.")
    (problem,) = problems_of(tmp_path)
    assert f"b{suffix} is a recording in a form that is not read" in problem and "ffmpeg" in problem


@pytest.mark.parametrize(
    "name",
    [
        "metadata.csv",
        "train.tsv",
        "train.list",
        "manifest.json",
        "x.parquet",
        "dataset_info.json",
        "a1.lab",
        "a1.normalized.txt",
        "a1.wav.txt",
        "transcripts.txt",
        "sub/metadata.json",
    ],
)
def test_table_of_another_tool_is_named_once(tmp_path, name):
    for i in range(30):
        tone(tmp_path / f"a{i}.wav", seconds=0.01)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    (problem,) = problems_of(tmp_path)
    assert name in problem and "metadata.json" in problem


@pytest.mark.parametrize(
    "names",
    [
        ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"],
        ["dataset_dict.json", "train/dataset_info.json"],
        ["train-00000-of-00001.parquet", "README.md"],
    ],
)
def test_hugging_face_data_sets_are_named(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (problem,) = problems_of(tmp_path)
    assert "is a Hugging Face data set" in problem and "metadata.json" in problem


@pytest.mark.parametrize(
    "there, asked",
    [
        ("wavs/clip.wav", "Wavs/clip.wav"),
        ("clip.wav", "clip"),
        ("wavs/clip.wav", "wavs\\clip.wav"),
        ("clip.WAV", "clip.wav"),
        ("wavs/clip.wav", "C:\\data\\wavs\\clip.wav"),
        ("clip.flac", "clip.wav"),
        ("clip.wav", "clip.wav "),
        (unicodedata.normalize("NFD", "é.wav"), unicodedata.normalize("NFC", "é.wav")),
    ],
)
def test_file_that_is_there_is_named(tmp_path, there, asked):
    tone(tmp_path / f"x.{there.rpartition('.')[2].lower()}").rename(tmp_path / "x")
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / "x").rename(tmp_path / there)
    (problem,) = problems_of(table(tmp_path, row(audio_file=asked)))
    folder, _, name = there.rpartition("/")
    whole, last = f"{there!r} in {tmp_path}?", f"{name!r} in {tmp_path / folder}?"
    assert "does not exist (did you mean " in problem and (whole in problem or last in problem)


def test_transcript_that_is_almost_there(tmp_path):
    pairs(tmp_path, "a", "b")
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    assert "is 'a.TXT' meant?" in problems_of(tmp_path)[0]
    (tmp_path / "a.TXT").rename(tmp_path / "a.txt")
    tone(tmp_path / "b.flac")
    assert "b.flac and b.wav share one name" in problems_of(tmp_path)[0]
    path = table(tmp_path, row(text=None, transcript_file="A.txt "))
    assert f"did you mean 'a.txt' in {tmp_path}?" in problems_of(path)[0]


def test_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pairs(tmp_path / "my voice", "a")
    assert len(load_corpus("~/my voice")) == 1
    for path, what in (
        ("~/none", "does not exist"),
        ("", "is empty"),
        (tmp_path / "x.json", "does not exist"),
    ):
        with pytest.raises(CorpusError, match=what):
            load_corpus(path)


@pytest.mark.parametrize("text", ["\x1b[2J", "two\nlines", "\x9b", "half \ud800"])
def test_problems_leave_a_terminal_alone(text):
    for problem in (Problem(text, "x", "a:1"), Problem("x", text, "a:1"), Problem("x", "y", text)):
        assert str(problem).isprintable() and str(CorpusError(problem)).isprintable()


def test_messages_stay_short(tmp_path):
    path = table(tmp_path, *[{"audio": "x" * 999, "words": i} for i in range(3_000)])
    with pytest.raises(CorpusError) as caught:
        load_corpus(path)
    message = str(caught.value)
    assert len(caught.value.problems) == 6_000
    assert len(message) < 20_000 and message.count("\n") < 100 and "5,990 more" not in message
    assert "... and 2,990 more like it" in message
    kinds = [
        Problem(f"{chr(97 + i % 26) * (i // 26 + 1)} is wrong", "x" * 999) for i in range(2000)
    ]
    assert len(str(CorpusError(*kinds))) < 20_000


def test_swift_rows_and_talks_without_recordings(tmp_path):
    turns = [dict(role="user", content="<audio> say it"), dict(role="assistant", content="It.")]
    path = table(tmp_path, dict(messages=turns, audios=["a.wav"]))
    assert "the key 'audios', which is not read" in problems_of(path)[0]
    assert "has a recording to train on" in problems_of(table(tmp_path, dict(messages=turns)))[0]
    spoken = [turns[0], dict(role="assistant", content=dict(type="audio", path="a.wav"))]
    corpus = load_corpus(table(tmp_path, dict(messages=turns), dict(messages=spoken)))
    assert check_corpus(corpus, progress=False) and [len(c.targets) for c in corpus] == [0, 1]


def test_speakers_that_share_a_prompt(tmp_path):
    both = [row(speaker_id="ann"), row(speaker_id="ben", text="Other.", audio_file="b.wav")]
    corpus = load_corpus(table(tmp_path, *both))
    report = check_corpus(corpus, progress=False)
    assert report.unmarked_speakers == ("ann", "ben") and "2 speakers share one prompt" in repr(
        report
    )
    both[1] |= dict(ref_audio_file="b.wav", ref_transcript="Hi.")
    assert not speakers_without_mark(load_corpus(table(tmp_path, *both)))
    assert not speakers_without_mark(corpus[:1])
    tagged = [both[0] | dict(text="[calm] Good."), row(speaker_id="ben", text="Other.")]
    assert not speakers_without_mark(load_corpus(table(tmp_path, *tagged)))
    named = [both[0] | dict(text="Ann: good."), row(speaker_id="ben", text="Ben: other.")]
    assert not speakers_without_mark(load_corpus(table(tmp_path, *named)))


KEYS = st.sampled_from(
    [
        "id",
        "audio_file",
        "text",
        "transcript_file",
        "speaker_id",
        "scene",
        "ref_audio_file",
        "ref_transcript",
        "ref_speakers",
        "speaker_tag",
        "messages",
        "role",
        "content",
        "type",
        "path",
        "raw_audio",
        "recipient",
        "start_index",
        "speaker",
        "extra",
        "split",
        "duration",
        "samples",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["a.wav", "\ud800", "a\0.wav", "../x", "/", "user", "assistant", "audio"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3),
    max_leaves=8,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        k: VALUES
        for k in (
            "id",
            "text",
            "scene",
            "speaker_id",
            "ref_speakers",
            "split",
            "extra",
            "duration",
            "transcript_file",
            "start_index",
            "ref_audio_file",
        )
    },
)
TALKS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=3).map(
    lambda m: {"messages": m}
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(VALUES | ROWS.map(lambda r: {"audio_file": "a.wav"} | r) | TALKS, max_size=3)
    | VALUES
)
def test_any_json_is_a_corpus_or_an_error(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    if not (folder / "a.wav").exists():
        tone(folder / "a.wav")
    path = folder / "metadata.json"
    path.write_text(json.dumps(rows))
    try:
        corpus = load_corpus(path)
        check_corpus(corpus, progress=False)
        split_corpus(corpus)
        json.dumps([c.to_dict() for c in corpus])
    except CorpusError as error:
        assert "metadata.json" in str(error) or all(p.source for p in error.problems[:-1])
        str(error).encode()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '[{"audio_file": "a.wav", "n": ' + "9" * 5000 + "}]",
        '[{"audio_file": "a.wav", "text": "A.", "x": ' + "[" * 400 + "]" * 400 + "}]",
        '[{"audio_file": "a\\u0000.wav", "text": "A."}]',
        '[{"audio_file": "a\\ud800.wav", "text": "A."}]',
        '[{"audio_file": "a\\u001b[2J.wav", "text": "A."}]',
        '[{"audio_file": "a.wav", "text": "A.", "ref_speakers": [{"speaker_tag": 5, '
        '"ref_audio_file": "b.wav", "ref_transcript": "B."}]}]',
    ],
)
def test_json_that_is_out_of_range(tmp_path, text):
    path = table(tmp_path)
    path.write_text(text)
    with pytest.raises(CorpusError) as caught:
        load_corpus(path)
    assert f"{path}:1" in str(caught.value) and str(caught.value).isprintable()
