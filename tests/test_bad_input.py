"""Bad corpora: every problem is named with its file, line and id, says what to do, and leaves the
files as they were.
"""

import json

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.data.audio import load_audio
from higgs_nb.data.conversation import Audio, Conversation, Message, Text, tts_conversation
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.corpus_check import check_corpus
from higgs_nb.data.corpus_split import sentence_key, split_corpus
from higgs_nb.data.problems import AudioError, CorpusError


def tone(path, seconds=1.0, rate=24000, channels=1, hz=440.0):
    "Write a tone and return its path."
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    sf.write(path, np.repeat(wave[:, None], channels, 1), rate)
    return path


def corpus(folder, *rows, name="metadata.json"):
    "A metadata.json with a row a line; the first row stands in line 2."
    path = folder / name
    path.write_text(
        "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]",
        encoding="utf-8",
    )
    return path


def row(id, **entries):
    return {"id": id, "audio_file": "good.wav", "text": "Good."} | entries


def problems_of(path, **limits):
    """The problems of the corpus at `path`, which must have some; no file may have changed by
    looking.
    """
    files = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    with pytest.raises(CorpusError) as caught:
        check_corpus(load_corpus(path), progress=False, **limits)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == files
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value) and problem.remedy
    return [str(p) for p in caught.value.problems]


BAD_AUDIO = {
    "missing": (lambda p: None, "does not exist"),
    "text": (lambda p: p.write_text("These are words."), "is not a recording that can be decoded"),
    "empty": (lambda p: p.write_bytes(b""), "is not a recording that can be decoded"),
    "nan": (
        lambda p: sf.write(p, np.array([0.1, np.nan, 0.1]), 24000, subtype="FLOAT"),
        "NaN or infinite",
    ),
    "infinite": (
        lambda p: sf.write(p, np.array([0.1, np.inf, 0.1]), 24000, subtype="FLOAT"),
        "NaN or infinite",
    ),
    "no_samples": (lambda p: sf.write(p, np.zeros(0), 24000), "holds no samples"),
    "eight": (lambda p: tone(p, channels=8), "has 8 channels"),
    "three_minutes": (
        lambda p: tone(p, seconds=180, rate=8000),
        "lasts 180.0 s, the limit is 30 s",
    ),
    "folder": (lambda p: p.mkdir(), "cannot be opened"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_recording_is_named(tmp_path, name):
    make, what = BAD_AUDIO[name]
    tone(tmp_path / "good.wav")
    make(tmp_path / f"{name}.wav")
    path = corpus(tmp_path, row("fine"), row("bad", audio_file=f"{name}.wav"))
    (problem,) = problems_of(path)
    assert (
        problem.startswith(f"{path}:3 (id 'bad'): {tmp_path / name}.wav ")
        and what in problem
        and "; " in problem
    )
    with pytest.raises(AudioError, match=what):
        load_audio(tmp_path / f"{name}.wav")


def test_header_of_raw_samples(tmp_path):
    (tmp_path / "samples.raw").write_bytes(bytes(4000))
    with pytest.raises(AudioError, match="samples.raw is not a recording that can be decoded"):
        load_audio(tmp_path / "samples.raw")


def test_duration_limit_can_be_raised(tmp_path):
    path = tone(tmp_path / "good.wav", seconds=31, rate=8000)
    assert "lasts 31.0 s" in problems_of(corpus(tmp_path, row("a")))[0]
    assert len(check_corpus(load_corpus(tmp_path), max_duration_s=None, progress=False).rows) == 1
    assert len(load_audio(path, max_duration_s=40)) == 31 * 24000


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_length_and_pitch(tmp_path, rate):
    wave = load_audio(tone(tmp_path / "a.wav", seconds=2, rate=rate, hz=1000))
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert wave.dtype == np.float32 and wave.shape == (48000,)
    assert abs(spectrum.argmax() / 2 - 1000) <= 0.5
    assert abs(np.abs(wave[2400:-2400]).max() - 0.3) < 0.003


def test_two_channels_are_averaged(tmp_path):
    sf.write(tmp_path / "a.wav", np.stack([np.full(2400, 0.5), np.full(2400, 0.1)], 1), 24000)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), 0.3, atol=1e-4)


def test_malformed_json_names_its_line(tmp_path):
    tone(tmp_path / "good.wav")
    turns = [
        {"role": "user", "content": "Hi.\u2028"},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "good.wav"}},
    ]
    lines = [json.dumps({"id": str(i), "messages": turns}, ensure_ascii=False) for i in range(10)]
    lines[3] = ""
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert len(check_corpus(load_corpus(tmp_path), progress=False).rows) == 9
    lines[6] = lines[6][:-1]
    lines[8] = lines[8].replace('"content"', '"contents"', 1)
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    problems = problems_of(tmp_path / "talks.jsonl")
    assert len(problems) == 2
    assert problems[0].startswith(f"{tmp_path}/talks.jsonl:7: is not JSON") and problems[
        0
    ].endswith("correct line 7")
    assert (
        problems[1].startswith(f"{tmp_path}/talks.jsonl:9 (id '8'): ")
        and "did you mean 'content'?" in problems[1]
    )


def test_malformed_metadata_names_line_and_column(tmp_path):
    (tmp_path / "metadata.json").write_text('{"samples": [\n  {"id": "a",\n   "text": oops}]}')
    (problem,) = problems_of(tmp_path / "metadata.json")
    assert problem.startswith(f"{tmp_path}/metadata.json:3: is not JSON") and "column 12" in problem


def test_every_problem_at_once(tmp_path):
    tone(tmp_path / "good.wav")
    (tmp_path / "blank.txt").write_text("\ufeff \n", encoding="utf-8")
    path = corpus(
        tmp_path,
        row("a"),
        row("a"),
        row("no_words", text=" "),
        row("blank", text=None, transcript_file="blank.txt"),
        row("split", split="test"),
        row("gone", audio_file="gone.wav"),
    )
    expected = [
        "3 (id 'a'): the id is already used",
        "4 (id 'no_words'): the transcript in message 1 (user) is empty",
        "5 (id 'blank'): the transcript",
        "6 (id 'split'): split is 'test'",
        "7 (id 'gone'): ",
    ]
    for problem, start in zip(problems_of(path), expected, strict=True):
        assert problem.startswith(f"{path}:{start}")


def test_unreadable_rows_do_not_hide_the_others(tmp_path):
    tone(tmp_path / "good.wav")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "other.txt").write_text("Other.")
    path = corpus(
        tmp_path,
        row("a"),
        {"id": "near", "audiofile": "good.wav", "transcript": "Hi."},
        row("latin", text=None, transcript_file="latin.txt"),
        row("web", audio_file="https://example.org/a.wav"),
        row("ref", ref_audio_file="good.wav"),
        row("two", transcript_file="other.txt"),
        "words",
        row("number", text=7),
        row("refs", ref_speakers=[{"ref_audio_file": "good.wav"}]),
        row("a"),
    )
    expected = [
        "3 (id 'near'): has no 'audio_file' (is 'audiofile' meant?)",
        "3 (id 'near'): has neither 'text' nor 'transcript_file' (is 'transcript' meant?)",
        f"4 (id 'latin'): {tmp_path}/latin.txt is not UTF-8 at byte 0",
        "5 (id 'web'): https://example.org/a.wav is an address",
        "6 (id 'ref'): has no 'ref_transcript'",
        "7 (id 'two'): 'text' and 'transcript_file' say different things",
        "8: a row is 'words'",
        "9 (id 'number'): 'text' is '7'",
        "10 (id 'refs'): has no 'ref_transcript'",
        "11 (id 'a'): the id is already used",
    ]
    for problem, start in zip(problems_of(path), expected, strict=True):
        assert problem.startswith(f"{path}:{start}")


def chat(*messages, **entries):
    return {"id": "x", "messages": list(messages)} | entries


HI, SPOKEN = (
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": {"type": "audio", "path": "good.wav"}},
)
BAD_CHATS = {
    "has the role 'asistant' (did you mean 'assistant'?)": chat(
        HI, SPOKEN, {"role": "asistant", "content": "Hi."}
    ),
    "no assistant turn is left to train": chat(HI),
    "start_index 5 is outside": chat(HI, SPOKEN, start_index=5),
    "start_index -1 is outside": chat(HI, SPOKEN, start_index=-1),
    "start_index is True": chat(HI, SPOKEN, start_index=True),
    "message 0 (user) is empty": chat({"role": "user", "content": []}, SPOKEN),
    "has no list of 'messages' (is 'message' meant?)": {"id": "x", "message": [], "messages": None},
    "has the key 'offset'": chat(
        HI, {"role": "assistant", "content": {"type": "audio", "path": "good.wav", "offset": 1}}
    ),
    "has audio_url and path": chat(
        HI,
        {
            "role": "assistant",
            "content": {"type": "audio", "path": "good.wav", "audio_url": "good.wav"},
        },
    ),
    "an audio part has no recording": chat(HI, {"role": "assistant", "content": {"type": "audio"}}),
    "the type of a part is 'adio' (did you mean 'audio'?)": chat(
        HI, {"role": "assistant", "content": {"type": "adio", "path": "good.wav"}}
    ),
    "raw_audio is not base64": chat(
        HI, {"role": "assistant", "content": {"type": "audio", "raw_audio": "no!"}}
    ),
    "a recording of 4 bytes is not a recording": chat(
        HI, {"role": "assistant", "content": {"type": "audio", "raw_audio": "UklGRg=="}}
    ),
    "half a surrogate pair": chat({"role": "user", "content": "\ud800 Hi."}, SPOKEN),
}


@pytest.mark.parametrize("what", BAD_CHATS)
def test_bad_conversation_is_named(tmp_path, what):
    tone(tmp_path / "good.wav")
    path = tmp_path / "talks.jsonl"
    path.write_text(
        "\n"
        + json.dumps(BAD_CHATS[what] | {"id": "x"})
        + "\n"
        + json.dumps(chat(HI, SPOKEN, id="fine"))
    )
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:2 (id 'x'): ") and what in problem


def test_folder_of_pairs(tmp_path):
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav")
    (tmp_path / "a.txt").write_text("A."), (tmp_path / "c.txt").write_text("C.")
    with pytest.raises(CorpusError) as caught:
        load_corpus(tmp_path)
    missing_audio, missing_text = map(str, caught.value.problems)
    assert missing_audio.startswith(
        f"{tmp_path}/c.txt:1: has no recording"
    ) and missing_text.startswith(f"{tmp_path}/b.txt:1 (id 'b'): ")


@pytest.mark.parametrize(
    "name, what",
    [
        ("", "holds no conversation; give a metadata.json"),
        ("gone", "is not a folder, .json or .jsonl"),
        ("recording", r"address either \(did you mean 'recordings'\?\)"),
        ("gone.json", "cannot be opened"),
    ],
)
def test_nothing_to_read(tmp_path, name, what):
    (tmp_path / "recordings").touch()
    with pytest.raises(CorpusError, match=what):
        load_corpus(tmp_path / name)


def test_held_out_recording_in_training(tmp_path):
    samples, rate = sf.read(tone(tmp_path / "good.wav"), dtype="int16")
    sf.write(tmp_path / "copy.flac", samples, rate)
    tone(tmp_path / "other.wav", hz=300)
    reference = dict(ref_audio_file="copy.flac", ref_transcript="Good.")
    path = corpus(
        tmp_path,
        row("held", split="held_out"),
        row("clone", split="train", audio_file="other.wav", **reference),
    )
    (problem,) = problems_of(path)
    assert problem.startswith(
        f"{path}:2 (id 'held'): its recording is held out, and in training as part of 'clone'"
    )
    corpus(
        tmp_path,
        row("train", split="train"),
        row("clone", split="held_out", audio_file="other.wav", **reference),
    )
    check_corpus(load_corpus(path), progress=False)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
notes = st.dictionaries(
    words, st.none() | st.booleans() | st.integers() | words | st.lists(words), max_size=3
)
recordings = st.builds(Audio, path=words.filter(lambda s: s and "://" not in s)) | st.builds(
    Audio, raw=st.binary(min_size=1, max_size=30)
)
messages = st.builds(
    Message,
    role=words,
    content=st.lists(st.builds(Text, words) | recordings, max_size=3).map(tuple),
    recipient=st.none() | words,
)
conversations = st.builds(
    Conversation,
    id=words,
    messages=st.lists(messages, max_size=4).map(tuple),
    start_index=st.none() | st.integers(),
    speaker=st.none() | words,
    source=words,
    extra=notes,
)


@settings(deadline=None)
@given(conversations)
def test_to_dict_and_back(c):
    assert Conversation.from_dict(c.to_dict()) == c
    assert Conversation.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["क", "को", "Ja", "ja!", "你好", "شكرا", "e\u0301", "é", "?", "!"]),
            st.sampled_from([None, "train", "held_out"]),
        )
    ),
    st.integers(0, 9),
)
def test_no_sentence_on_both_sides(sentences, seed):
    talks = [
        tts_conversation(text, Audio("a.wav"), id=str(i), **({"split": split} if split else {}))
        for i, (text, split) in enumerate(sentences)
    ]
    said = {}
    for text, split in sentences:
        said.setdefault(sentence_key(text), set()).update({split} - {None})
    if any(len(splits) > 1 for splits in said.values()):
        with pytest.raises(CorpusError, match="is held_out and train"):
            split_corpus(talks, seed=seed)
        return
    train, held = split_corpus(talks, held_out=0.3, seed=seed)
    assert sorted(int(c.id) for c in train + held) == list(range(len(talks)))
    assert not {sentence_key(c.transcript) for c in train} & {
        sentence_key(c.transcript) for c in held
    }
    for split, part in (("train", train), ("held_out", held)):
        assert all(c.extra.get("split", split) == split for c in part)
