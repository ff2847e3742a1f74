"""`higgs_run speak` and what it is made of: texts, pieces, seeds, streams. A tiny base that a real
training run made, and the small base of the package.
"""

import json
import re
import subprocess
import sys
import threading
import time
import warnings

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.cli.run import main as higgs_run
from higgs_nb.cli.summary import summary_lines
from higgs_nb.data.audio import load_audio
from higgs_nb.data.codec import Codec, load_codec
from higgs_nb.data.conversation import Audio
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.model.model import tiny_model
from higgs_nb.speech.long import speak_texts
from higgs_nb.speech.long_text import LongText, Voice
from higgs_nb.speech.sentences import pieces, sentences
from higgs_nb.speech.stream import stream_speech
from higgs_nb.speech.stream_clip import ChunkDecoder
from higgs_nb.speech.texts import SpokenText, read_texts
from higgs_nb.tasks.asked import asked_texts, asked_voice
from higgs_nb.tasks.speaker import find_speaker, load_speaker

DRAWN = dict(do_sample=True, temperature=0.9, top_k=50)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Directory of a real training run of `higgs_run`, what it printed, and its events."
    out, events = tmp_path_factory.mktemp("trained") / "run", []
    given = dict(base="tiny", max_clips=4, steps=3, eval_every=2, speak=0, table=1, rank=2)
    words = [word for key, value in given.items() for word in ("-p", f"{key}={value}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "higgs_nb.cli.run", "train", "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        if (out / "events.jsonl").exists():
            events[:] = (out / "events.jsonl").read_text().splitlines()
        time.sleep(0.05)
    said, shown = process.communicate()
    assert process.returncode == 0, shown
    return out, said, shown, events


def test_a_real_training_run_reports_and_is_summed_up(trained):
    "Progress of real steps comes through the trainer; the summary is that of its own run.json."
    out, said, shown, events = trained
    steps = [json.loads(e) for e in events if '"training"' in e]
    assert steps[-1]["done"] == steps[-1]["total"] == 3
    assert {"loss", "held out"} <= steps[-1]["losses"].keys()
    run_json = json.loads((out / "run.json").read_text())
    lines = summary_lines(run_json, "train", out)
    assert 8 <= len(lines) <= 14 and all(line in said for line in lines)
    losses = run_json["held_out_audio_loss"]
    assert f"{losses['before']:.3f} -> {losses['after']:.3f}" in lines[0]
    assert any("stops by itself" in line for line in lines)
    assert f"higgs_run speak -p run={out}" in said
    assert "The corpus" in shown and "The adapter" in shown
    assert "Executing" not in shown and '"versions"' not in said + shown
    for missing in run_json:
        part = {key: value for key, value in run_json.items() if key != missing}
        assert summary_lines(part, "train", out)
        assert summary_lines({**run_json, missing: None}, "train", out)
        assert summary_lines({**run_json, missing: ["x", 3]}, "train", out)


def test_speak_of_a_run(trained, tmp_path, capfd):
    "A file of texts, one with the id of a stranger: wav files inside the directory, and a record."
    out = tmp_path / "spoken"
    rows = [dict(id="../../../x\x1b", text="One moment."), dict(text="Hold. " * 30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["-p", f"texts={tmp_path / 'texts.jsonl'}", "-p", "max_frames=6", "-p", "max_chars=60"]
    code = higgs_run(["speak", "--out", str(out), "-p", f"run={trained[0]}", *words])
    said = capfd.readouterr()
    assert code == 0, said.err
    record = json.loads((out / "speak.json").read_text())
    names = [clip["file"] for clip in record["clips"]]
    assert (
        sorted(p.name for p in out.glob("*.wav"))
        == names
        == [
            "00000-x.wav",
            "00001-Hold.-Hold.-Hold.-Hold.-Hold.-Hold.wav",
        ]
    )
    for clip in record["clips"]:
        info = soundfile.info(out / clip["file"])
        assert abs(info.duration - clip["seconds"]) < 1e-3 and info.subtype == "PCM_16"
    assert len(record["clips"][1]["pieces"]) == 3
    assert [clip["seed"] for clip in record["clips"]] == [0, 1]
    assert record["codec"]["name"] == "world"
    assert "did not stop by themselves" in said.err and "\x1b" not in said.err
    assert "stops by itself  0 of 2" in said.out and "\x1b" not in said.out


def test_standard_input_to_the_small_base(tmp_path):
    out = tmp_path / "spoken"
    command = [sys.executable, "-m", "higgs_nb.cli.run", "speak", "--out", str(out)]
    done = subprocess.run(
        [*command, "-p", "base=small", "-p", "text=-"],
        input="Thank you for calling.\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [clip] = json.loads((out / "speak.json").read_text())["clips"]
    assert clip["text"] == "Thank you for calling." and clip["stopped"]
    assert 0.5 < clip["seconds"] < 5


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["-p", "txt=a"], 2, "did you mean 'text'"),
        (["-p", "text=a", "-p", "max_chars=3"], 2, "max_chars"),
        (["-p", "text=a", "-p", "precision=float31"], 2, "did you mean 'float32'"),
        (["-p", "text=a", "-p", "base=smal"], 2, "did you mean 'small'"),
        (["-p", "text=a", "-p", "base=small", "-p", "reference=a.wav"], 1, "the words of a.wav"),
    ],
)
def test_bad_parameters(words, code, said, tmp_path, capfd):
    assert higgs_run(["speak", "--out", str(tmp_path / "out"), *words]) == code
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
    assert not list(tmp_path.glob("out/*.wav"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "holds no text"),
        (b"\xff\xfe", "not UTF-8"),
        (b"Hello.\n...\n", "line 2: there is no word"),
    ],
)
def test_bad_files_of_texts(content, words, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "a", "speaker": "b"}', "the key 'speaker'"),
        ('{"id": "a"}', "line 1: the text is a NoneType"),
        ('"a"', "is a str"),
        ("[" * 10_000, "is not JSON"),
        ('{"text": "a", "id": ""}', "the id is ''"),
    ],
)
def test_bad_rows(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_texts(tmp_path / "a.jsonl")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt"):
        asked_texts("", str(tmp_path / "none.txt"))
    (tmp_path / "a.wav").write_bytes(b"no sound")
    with pytest.raises(Exception, match="a.wav"):
        asked_voice(str(tmp_path / "a.wav"), "La.", "")
    with pytest.raises(ValueError, match="reference_text has no recording"):
        asked_voice("", "La.", "")
    assert find_speaker(base="somebody/model").codec != "world"
    with pytest.raises(ValueError, match="not on this machine|not a device"):
        load_speaker(
            find_speaker(base="small"), device="cuda:99" if not torch.cuda.is_available() else "x"
        )


# --- pieces


LETTERS = st.text(alphabet="ab,. 12\n!?。，क्षि؟'\"-", max_size=400)


@settings(max_examples=300, deadline=None)
@given(LETTERS, st.integers(20, 60))
def test_nothing_is_lost_and_no_number_is_cut(text, limit):
    try:
        found = pieces(text, limit)
    except ValueError as error:
        assert "without a place to cut" in str(error)
        return
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit for piece in found)
    flat = " ".join(text.split("\n\n")).split()
    numbers = re.findall(r"\d+", " ".join(flat))
    assert re.findall(r"\d+", " ".join(found)) == numbers


@pytest.mark.parametrize(
    "text",
    ["word " * 20_000, "字" * 100_000, "One sentence. " * 7_143, "a, " * 33_334, "क्षि" * 25_000],
)
def test_a_text_of_100_000_characters(text):
    found = pieces(text, 200)
    assert 400 < len(found) < 1200 and max(map(len, found)) <= 200
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_number_without_end_is_an_error():
    with pytest.raises(ValueError, match="raise max_chars"):
        pieces("call " + "5" * 300, 200)


@pytest.mark.parametrize(
    "text, count",
    [
        ("Prof. Dr. med. vet. Müller kommt am 3. Mai. Um 12.30 Uhr.", 2),
        ("Approx. 3.5 km, e.g. from A. to Bonn. Then 1,000.00 more.", 2),
        ("“Is it?” asked Mr. Fox. “Yes!” “No.” She left.", 4),
        ("Wait... what? Oh… I see.", 3),
        ("これは文です。「はい。」そうです！", 3),
        ("ما اسمك؟ اسمي علي. شكرا!", 3),
        ("मेरा नाम राम है। आपका नाम क्या है? धन्यवाद॥", 3),
        ("Version 2.0.1 of www.example.com/a.b?c=d!e is out.", 1),
    ],
)
def test_sentences_of_several_scripts(text, count):
    assert len(sentences(text)) == count, sentences(text)


# --- one clip, whatever is beside it


@pytest.fixture(scope="module")
def tiny():
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128)
    return model, tokenizer, load_codec()


TEXTS = [
    "A short one.",
    "A much longer text of several pieces. It goes on and on. It ends here, at last.",
    "Two pieces are enough for this one. They are.",
]


def test_a_clip_does_not_depend_on_the_batch(tiny):
    options = dict(DRAWN, seed=5, max_frames=7, max_chars=40)
    alone = speak_texts(*tiny[:2], TEXTS, tiny[2], batch_size=1, **options)
    for size in (2, 8):
        together = speak_texts(*tiny[:2], TEXTS, tiny[2], batch_size=size, **options)
        for a, b in zip(alone, together):
            assert torch.equal(a.codes, b.codes) and torch.equal(a.waveform, b.waveform)
    [last] = speak_texts(*tiny[:2], TEXTS[2:], tiny[2], **dict(options, seed=7))
    assert torch.equal(last.codes, alone[2].codes) and last.seed == alone[2].seed == 7
    [other] = speak_texts(*tiny[:2], TEXTS[2:], tiny[2], **dict(options, seed=8))
    assert not torch.equal(other.codes, last.codes)
    state = torch.get_rng_state()
    speak_texts(*tiny[:2], TEXTS[:1], tiny[2], **options)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


def test_pieces_of_a_text_have_seeds_of_their_own(tiny):
    text = "The same words again. " * 3
    options = dict(DRAWN, max_frames=6, max_chars=25, history=0)
    [clip] = speak_texts(*tiny[:2], [text], tiny[2], **options)
    first, second, _ = [piece.codes for piece in clip.pieces]
    assert first.shape == second.shape and not torch.equal(first, second)


def test_what_a_piece_hears(tiny):
    "The reference or the first piece, and the piece before; nothing that was cut off."
    clip = next(c for c in load_corpus(embedded_corpus()) if len(c.transcript) > 10)
    voice = Voice(clip.audio[-1], clip.transcript)

    def heard(voice, history, stopped):
        plan = LongText(SpokenText("One. Two. Three. Four."), 0, voice, 6, history)
        for ended in stopped:
            [spoken] = speak_texts(*tiny[:2], ["a"], tiny[2], max_frames=3)
            spoken.stopped = ended
            plan.add(spoken)
        return [words for words, _ in plan.context()]

    assert heard(Voice(), 1, [True] * 3) == ["One.", "Three."]
    assert heard(Voice(), 2, [True] * 3) == ["One.", "Two.", "Three."]
    assert heard(Voice(), 0, [True] * 3) == []
    assert heard(Voice(), 1, [False, True, False]) == ["Two."]
    assert heard(voice, 1, [True] * 3) == [clip.transcript, "Three."]
    assert heard(voice, 0, [True]) == [clip.transcript]


def test_a_reference_is_encoded_once_and_changes_the_clip(tiny):
    model, tokenizer, codec = tiny
    recording = Audio(next(iter(load_corpus(embedded_corpus()))).audio[-1].path)
    calls = []

    class Store:
        def get(self, audio):
            calls.append(audio)
            return codec.encode(load_audio(audio))[:, :20]

    options = dict(DRAWN, max_frames=6, max_chars=40)
    voice = Voice(recording, "The words.")
    clips = speak_texts(model, tokenizer, TEXTS, codec, voice, Store(), **options)
    assert len(calls) == 1
    plain = speak_texts(model, tokenizer, TEXTS, codec, **options)
    assert not torch.equal(clips[0].codes, plain[0].codes)


@pytest.mark.parametrize("text", ["", "  \n", "...", "?!"])
def test_an_empty_text_is_an_error(text, tiny):
    with pytest.raises(ValueError, match="text 2: there is no word"):
        speak_texts(*tiny[:2], ["Fine.", text], tiny[2], max_frames=2)


# --- streams


class Convolution(Codec):
    "Sound in which a frame depends on three frames before and after it; decodes no more at a time."

    frame_rate, decode_behind, decode_ahead, fingerprint = 25, 3, 3, "an example"
    longest = 0

    def encode(self, waveform):
        raise NotImplementedError

    def decode(self, codes):
        self.longest = max(self.longest, codes.shape[1])
        weights = torch.arange(1.0, 8)[None, None]
        smooth = torch.nn.functional.conv1d(codes.float().sum(0)[None, None], weights, padding=3)
        return smooth[0, 0].repeat_interleave(self.samples_per_frame) / 1e6


@pytest.mark.parametrize("drawing", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("chunk_s", [0.04, 0.3, 60])
def test_a_stream_is_the_clip(drawing, chunk_s, tiny):
    model, tokenizer, _ = tiny
    codec = Convolution()
    options = dict(drawing, max_frames=40, max_chars=40, seed=3)
    [clip] = speak_texts(model, tokenizer, TEXTS[2:], codec, **options)
    codec.longest = 0
    chunks = list(stream_speech(model, tokenizer, TEXTS[2], codec, chunk_s=chunk_s, **options))
    assert torch.equal(torch.cat(chunks), clip.waveform)
    if chunk_s == 0.3:  # the clip itself is decoded once, at its end
        assert len(chunks) > 6


def test_a_stream_of_the_small_base_is_the_clip():
    "Through WORLD, whose decoder depends on all frames before."
    model, tokenizer, codec = load_speaker(find_speaker(base="small"), "float32", "cpu")
    options = dict(DRAWN, max_frames=60, max_chars=30, seed=1)
    text = "Thank you for calling. Please hold the line."
    chunks = list(stream_speech(model, tokenizer, text, codec, chunk_s=0.2, **options))
    [clip] = speak_texts(model, tokenizer, [text], codec, **options)
    assert len(chunks) > 6 and max(p.waveform.abs().max() for p in clip.pieces) < 0.999
    joined = torch.cat(chunks)
    assert joined.shape == clip.waveform.shape
    assert (joined - clip.waveform).abs().max() < 2e-3


@pytest.fixture(scope="module")
def recorded():
    "Codes, sound and true peak of a few recordings, of which the codec scales some down."
    codec, found = load_codec(), []
    for conversation in list(load_corpus(embedded_corpus()))[:12]:
        codes = codec.encode(load_audio(conversation.audio[-1]))[:, :75]
        sound = codec.decode(codes)
        found.append((codes, sound, float(codec.decode_part(codes).abs().max())))
    assert {peak > 1 for _, _, peak in found} == {True, False}
    return codec, found


@settings(max_examples=12, deadline=None, report_multiple_bugs=False)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 11))
def test_chunks_of_a_recording_join(recorded, steps, number):
    codec, found = recorded
    codes, whole, peak = found[number]
    decoder, chunks, known = ChunkDecoder(codec), [], 0
    for step in steps:
        known = min(known + step, codes.shape[1])
        chunks.append(decoder.decode(codes[:, :known]))
    chunks.append(decoder.decode(codes, is_end=True))
    joined = torch.cat(chunks)
    assert joined.shape == whole.shape and joined.abs().max() <= 1
    expected = (whole * max(peak, 1)).clamp(-1, 1)  # not scaled down, its peaks cut
    assert (joined - expected).abs().max() < 2e-3


def test_a_stream_that_nobody_wants_ends(tiny):
    model, tokenizer, codec = tiny
    model.train()
    before = threading.active_count()
    stream = stream_speech(model, tokenizer, "A text.", codec, chunk_s=0.04, max_frames=700)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before and model.training
    model.eval()


def test_an_error_in_the_model_reaches_the_listener(tiny):
    model, tokenizer, codec = tiny
    weight = model.audio_lm_head.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    try:
        with pytest.raises(ValueError, match="not finite"):
            list(stream_speech(model, tokenizer, "A text.", codec, max_frames=5))
    finally:
        weight.data.copy_(kept)


def test_the_first_chunk_comes_before_the_last_row(tiny, monkeypatch):
    "While the model waits for the listener to have the first chunk, it has not ended."
    from higgs_nb.speech import stream_clip as stream

    ended = []
    full = stream.generate_codes

    def generate(*given, **options):
        out = full(*given, **options)
        ended.append(True)
        return out

    monkeypatch.setattr(stream, "generate_codes", generate)
    chunks = stream_speech(*tiny[:2], "A text.", tiny[2], chunk_s=0.04, max_frames=600)
    next(chunks)
    assert not ended
    chunks.close()


def test_unknown_options_are_an_error(tiny):
    with pytest.raises(ValueError, match="temprature"):
        next(stream_speech(*tiny[:2], "A text.", tiny[2], temprature=0.5))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="temprature"):
        speak_texts(*tiny[:2], ["A text."], tiny[2], temprature=0.5)
