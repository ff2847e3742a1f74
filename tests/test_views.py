"""What runs and views do with data from outside: corpora without held-out speech, hostile names,
foreign run directories.

Cells of a run notebook are executed here in this process, with small parameters, which takes a
second or two; test_runs.py executes the notebooks by papermill.
"""

import base64
import contextlib
import io
import json
import os
import re
import warnings
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import markdown_it
import nbformat
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from safetensors import safe_open

from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.validate import CheckpointReport, Fault, Reports
from higgs_nb.cli.directory import HELD, claim
from higgs_nb.cli.doctor import main as higgs_doctor
from higgs_nb.cli.machine import Finding
from higgs_nb.cli.sweep_file import SweepRun
from higgs_nb.core.locks import lock_directory
from higgs_nb.core.messages import plain_text
from higgs_nb.data.audit import audit
from higgs_nb.data.collator import PackedCollator
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.measure import CorpusReport
from higgs_nb.data.problems import CorpusError
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.samples import encode_conversation, expand
from higgs_nb.model import model
from higgs_nb.model.model import tiny_config
from higgs_nb.speech import generate
from higgs_nb.speech.clips import Speech, save_clips
from higgs_nb.speech.evaluate import Evaluation
from higgs_nb.speech.score import Score
from higgs_nb.view.codes_explorer import CodesExplorer
from higgs_nb.view.corpus_explorer import CorpusExplorer, measure_clips
from higgs_nb.view.label_explorer import LabelExplorer
from higgs_nb.view.listener import ABListener
from higgs_nb.view.monitor import run_monitor
from higgs_nb.view.run_files import checkpoint_rows, read_log_lines, samples_of


@pytest.fixture(autouse=True)
def without_judges(monkeypatch):
    "As where the extra `eval` is not installed: its models take half a minute to load."
    monkeypatch.setattr("higgs_nb.speech.judges.missing_judges", lambda: ["everything"])


@pytest.fixture(autouse=True)
def small_model_and_short_clips(monkeypatch):
    "A model with random weights says nothing that is worth waiting for."
    full, sizes = generate.generate_codes, dict(hidden_size=64, num_layers=2, num_heads=2)
    tiny = partial(model.tiny_model, intermediate_size=128, **sizes)
    monkeypatch.setattr(model, "tiny_model", tiny)
    monkeypatch.setattr(
        generate,
        "generate_codes",
        lambda model, batch, max_frames, **options: full(
            model, batch, min(max_frames, 8), **options
        ),
    )


SMALL = dict(
    base="tiny",
    rank=2,
    steps=2,
    warmup=1,
    token_budget=512,
    eval_every=1,
    save_every=2,
    speak=1,
    table=1,
    learning_rate=0.001,
)


def execute(out, until=None, notebook="train", given=SMALL, **parameters):
    """Everything that a run notebook defines and prints, after all its cells or those before the
    one with the text `until`.
    """
    space, said = {"__name__": "__main__", "display": lambda *shown, **more: None}, io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for cell in nbformat.read(ROOT / f"nbs/runs/{notebook}.ipynb", 4).cells:
            if cell.cell_type != "code":
                continue
            if until and until in cell.source:
                break
            draw_figures()
            exec(compile(cell.source, f"{notebook}.ipynb", "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(given, out=str(out), **parameters)
    return space, said.getvalue()


def draw_figures():
    "Draw what a cell has plotted, as a notebook does at its end."
    for number in plt.get_fignums():
        plt.figure(number).savefig(io.BytesIO(), dpi=20)
    plt.close("all")


def tone(path, number, seconds=0.6):
    "A recording of its own for each number."
    t = np.arange(int(24000 * seconds)) / 24000
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (150 + 37 * number) * t), 24000)


def corpus_of(folder, rows):
    "A corpus of `rows` (dict of metadata, or ChatML), whose recordings `clipN.wav` are made."
    for number in range(8):
        tone(folder / f"clip{number}.wav", number)
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "data.jsonl")


def row(number, **more):
    return (
        dict(id=f"c{number}", audio_file=f"clip{number}.wav", text=f"sentence {chr(97 + number)}")
        | more
    )


def talk(id, *answers, **more):
    turns = [
        dict(role="user", content=f"Say {id}."),
        *(dict(role="assistant", content=a) for a in answers),
    ]
    return dict(id=id, messages=turns, **more)


def sound(number):
    return dict(type="audio", audio_url=f"clip{number}.wav")


NOTHING_HELD = {  # rows and parameters
    "one clip": ([row(0)], {}),
    "one sentence": ([row(i, text="the same words") for i in range(3)], {}),
    "all train": ([row(i, split="train") for i in range(3)], {}),
    "held_out=0": ([row(i) for i in range(3)], dict(held_out=0.0)),
    "only text": (
        [talk("a", sound(0)), talk("b", sound(1)), talk("chat", "Fine.", split="held_out")],
        dict(held_out=0.0),
    ),
}


@pytest.mark.parametrize("name", NOTHING_HELD)
def test_a_corpus_without_held_out_speech(tmp_path, name):
    "The run says so and goes on as if nothing were held out."
    rows, parameters = NOTHING_HELD[name]
    space, said = execute(
        tmp_path / "out",
        until="model = load_base(",
        data=corpus_of(tmp_path / "data", rows),
        **parameters,
    )
    assert (
        "there is no evaluation" in said
        and space["corpus"].held == []
        and space["corpus"].typical(space["store"]) in space["corpus"].train
    )


@pytest.mark.parametrize(
    "rows, held_out",
    [
        ([row(0, id="price $5^^$6")], False),
        (
            [
                talk("a", sound(0), split="train"),
                talk("chat", "Fine.", split="held_out"),
                talk("b", sound(1), split="held_out"),
                talk("more", "Well.", split="train"),
            ],
            True,
        ),
    ],
)
def test_a_run_with_little_speech(tmp_path, rows, held_out):
    "To its end: one clip with a title of mathematics; text-only conversations among speech."
    space, said = execute(tmp_path / "out", data=corpus_of(tmp_path / "data", rows))
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (tmp_path / "out/adapter/manifest.json").is_file() and (
        "there is no evaluation" in said
    ) != held_out
    assert (run["held_out_audio_loss"]["after"] is not None) == held_out == bool(run["probe"])


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row(i, split="held_out") for i in range(3)], "no conversation is left to train on"),
        ([talk("chat", "Fine."), talk("more", "Well.")], "has a recording to train on"),
        (
            [
                dict(
                    id="a",
                    messages=[
                        dict(role="user", content=["Listen.", sound(0)]),
                        dict(role="assistant", content="Fine."),
                    ],
                )
            ],
            "has a recording to train on",
        ),
    ],
)
def test_a_run_without_speech_to_learn(tmp_path, rows, words):
    "One sentence, before the model is loaded."
    with pytest.raises(ValueError, match=words):
        execute(tmp_path / "out", until="open_store(", data=corpus_of(tmp_path / "data", rows))


def test_a_corpus_is_not_replaced_while_it_is_read(tmp_path, monkeypatch):
    "Training holds it, and preparing refuses a directory that is held."
    data = tmp_path / "data"
    execute(tmp_path / "out", until="open_store(", data=corpus_of(data, [row(0), row(1)]))
    with pytest.raises(BlockingIOError, match="a run reads"):
        claim(data, patience_s=0)
    while HELD:
        os.close(HELD.pop())
    monkeypatch.setattr("higgs_nb.cli.directory.claim", lambda out: claim(out, patience_s=0))
    reader = lock_directory(data, alone=False)
    with pytest.raises(BlockingIOError, match="a run reads"):
        execute(data, until="open_inputs(", notebook="prepare", data="")
    os.close(reader)


def test_codes_of_a_read_only_corpus_go_into_the_run(tmp_path, monkeypatch):
    corpus_of(tmp_path / "data", [row(0), row(1)])
    (tmp_path / "data/codes").mkdir()
    writable = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "data" not in Path(path).parts and writable(path, mode)
    )
    execute(tmp_path / "out", until="model = load_base(", data=str(tmp_path / "data"))
    assert not list((tmp_path / "data/codes").iterdir())
    [pack] = (tmp_path / "out/codes").rglob("codes-*.safetensors")
    with safe_open(pack, "numpy") as file:
        assert len(file.get_tensor("frames")) == 2


def test_what_stands_out_is_told_of_its_own_recording(tmp_path):
    "Two recordings that a table holds as bytes have one name where they are of equal length."
    talks = []
    for number, end_s in enumerate((0, 0.9)):
        wave = np.sin(np.arange(24000) / (10 + number)) * (np.arange(24000) < (1 - end_s) * 24000)
        file = io.BytesIO()
        soundfile.write(file, 0.3 * wave, 24000, format="WAV")
        raw = dict(type="audio", raw_audio=base64.b64encode(file.getvalue()).decode())
        talks.append(talk(f"clip {number}", raw))
    data = corpus_of(tmp_path / "data", talks)
    space, said = execute(
        tmp_path / "out", until="fig, axes", notebook="prepare", data=data, held_out=0.0
    )
    assert space["found"]["silence at the end"] == ["clip 1"]


def test_a_negative_number_of_clips(tmp_path):
    with pytest.raises(ValueError, match="max_clips"):
        execute(tmp_path / "out", until="load_codec(codec)", max_clips=-1)
    assert not (tmp_path / "out").exists()


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.integers(0, 5))
def test_no_recording_is_trained_and_held_out(tmp_path_factory, numbers, seed):
    "Rows that share a recording under different words end on one side."
    folder = tmp_path_factory.mktemp("twice")
    rows = [
        dict(id=f"r{i}", audio_file=f"clip{n}.wav", text=f"sentence {chr(97 + i)}")
        for i, n in enumerate(numbers)
    ]
    space, said = execute(
        folder / "out", until="open_store(", data=corpus_of(folder, rows), held_out=0.5, seed=seed
    )
    sides = [
        {Path(c.audio[-1].path).name for c in side}
        for side in (space["corpus"].train, space["corpus"].held)
    ]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"clip{n}.wav" for n in numbers}
    assert len(space["corpus"].train) + len(space["corpus"].held) == len(numbers)


def test_a_long_clip_is_heard_to_the_end_of_the_run(tmp_path):
    "A held-out recording and a reference beyond 30 s, with a limit that allows them."
    data = corpus_of(
        tmp_path / "data",
        [row(i, split="train") for i in range(2)]
        + [row(7, split="held_out", ref_audio_file="clip7.wav", ref_transcript="a reference")],
    )
    tone(tmp_path / "data/clip7.wav", 7, 31)
    space, said = execute(tmp_path / "out", data=data, max_duration_s=40.0, token_budget=2048)
    assert json.loads((tmp_path / "out/run.json").read_text())["held_out_audio_loss"]["after"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(st.characters(), max_size=12) | st.text(r"$\^_{}%f ", max_size=12))
@example(r"price $5^^$6")
@example("_$\\$x$")
@example("\0\ud800\n$")
def test_any_text_can_be_drawn(text):
    """As a title, a label of a tick, and a line that a legend names; matplotlib reads no
    mathematics in it.
    """
    fig = Figure(figsize=(1, 1))
    ax = fig.subplots()
    ax.plot([1], label=plain_text(text))
    ax.set(title=plain_text(text), xticks=[0], xticklabels=[plain_text(text)])
    legend = ax.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        fig.savefig(io.BytesIO(), format="svg")
    assert len(legend.texts) == 1


class Elements(HTMLParser):
    "The elements and attributes of HTML, and the texts in it."

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


ALLOWED = {
    "p": {"role"},
    "strong": set(),
    "br": set(),
    "em": set(),
    "img": {"alt", "style", "src"},
    "audio": {"controls", "preload", "aria-label", "style", "src"},
}
HOSTILE = "<img src=x onerror=alert(1)>'\"><script>document.title='bad'</script>"


def assert_harmless(page):
    page.encode("utf-8")  # no half surrogate, which a browser could not be sent
    for tag, attributes in Elements(page).found:
        assert tag in ALLOWED and set(attributes) <= ALLOWED[tag], (tag, attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("role", "status") == "status"


words = st.sampled_from([HOSTILE, "", "5", "\ud800", "\0"]) | st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | words,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(words, part, max_size=3),
    max_leaves=4,
)
names = st.sampled_from(
    [
        "step",
        "audio_loss",
        "text_loss",
        "eval_audio_loss",
        "tokens_per_second",
        "memory_mb",
        "eval_probe_+1",
        "eval_codebook_0",
        "train_runtime",
    ]
)
entries = st.fixed_dictionaries(
    {"step": st.integers(0, 99) | values},
    optional={
        "audio_loss": values,
        "eval_audio_loss": st.floats() | values,
        "tokens_per_second": st.integers() | values,
    },
)
lines = st.one_of(
    entries.map(json.dumps),
    st.dictionaries(names, values).map(json.dumps),
    values.map(json.dumps),
    words.map(lambda w: w.replace("\n", "")),
    st.just("[" * 5000),
    st.just('{"step": 3, "audio_loss": 2.5}'),
)


@settings(max_examples=6, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.lists(lines, max_size=6),
    values.map(json.dumps) | words,
    values,
    values,
    st.sampled_from(["losses", "probe", "scores", "speed and memory"]),
)
@example(
    ['{"step": 1, "audio_loss": 1}', json.dumps(dict(step=HOSTILE, audio_loss=1.0))],
    json.dumps(dict(steps=HOSTILE)),
    dict(max_steps=HOSTILE),
    [dict(id=HOSTILE, file="a.wav")],
    "losses",
)
@example(
    ['{"step": 1, "audio_loss": 1}'],
    "[]",
    [],
    [dict(id="x", file="../../../a.wav")],
    "speed and memory",
)
@example(['{"step": 1, "audio_loss": 1}'], "", "", [dict(id=1), 3], "probe")
def test_the_monitor_of_a_foreign_run(tmp_path_factory, log, parameters, state, clips, view):
    """Whatever lies in its files: nothing is raised, HTML holds no element of theirs, and each
    line is an entry or counted.
    """
    run = tmp_path_factory.mktemp("run") / "a<b>"
    for folder in (
        "checkpoint-3",
        f"checkpoint-{HOSTILE[:4]}",
        "samples/step-000004",
        "samples/step-last",
        "samples/step-9x",
    ):
        (run / folder).mkdir(parents=True)
    raw = "".join(f"{line}\n" for line in log).encode("utf-8", "surrogatepass")
    (run / "log.jsonl").write_bytes(raw)
    (run / "parameters.json").write_bytes(parameters.encode("utf-8", "surrogatepass"))
    (run / "checkpoint-3/trainer_state.json").write_text(json.dumps(state))
    (run / "samples/step-000004/clips.json").write_text(json.dumps(clips))
    for folder in ("samples/step-000004", "samples/step-last"):
        (run / folder / "a.wav").write_bytes(b"no recording")
    (run.parent / "a.wav").write_bytes(b"of somebody else")
    entries, unreadable = read_log_lines(run)
    assert len(entries) + unreadable == sum(
        bool(line.strip()) for line in raw.decode("utf-8", "replace").split("\n")
    )
    monitor = run_monitor(run, follow=False)
    monitor.show.value = view
    for name in monitor.sample.options:
        monitor.sample.value = name
        shown = (monitor.status, monitor.view, monitor.sound)
        assert_harmless("".join(widget.value for widget in shown))
    assert_harmless(monitor.still())
    assert (f"{unreadable} lines" in monitor.status.value) == bool(unreadable)
    assert not [
        f for f in samples_of(run).values() if not f.resolve().is_relative_to(run.resolve())
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "log.jsonl").mkdir(),
        lambda run: [run.rmdir(), run.write_text("a file")],
        lambda run: (run / "parameters.json").mkdir(),
        lambda run: [
            (run / "checkpoint-1/manifest.json").mkdir(parents=True),
            (run / "log.jsonl").write_text('{"step": 1}\n'),
        ],
        lambda run: [
            (run / "checkpoint-1").write_text("a file"),
            (run / "log.jsonl").write_text('{"step": 1}\n'),
        ],
        lambda run: (run / "samples").write_text("a file"),
    ],
)
def test_the_monitor_of_a_damaged_directory(tmp_path, damage):
    run = tmp_path / "run"
    run.mkdir()
    damage(run)
    monitor = run_monitor(run, follow=False)
    monitor.update()
    assert "<p" in monitor.still()


def test_a_checkpoint_whose_manifest_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/manifest.json").touch()
    stat = Path.stat

    def stale(path, **options):
        if path.name == "manifest.json":
            raise OSError(116, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    assert checkpoint_rows(tmp_path) == [("checkpoint-1", "cannot be read: Stale file handle")]


def test_samples_are_listed_by_their_ids(tmp_path):
    "In the order of clips.json, by the ids in it; a folder without one by its files."
    clips = [
        Speech(id, "words", np.zeros((1, 1)), True, 24000, np.zeros(240, dtype=np.float32))
        for id in ("b/1", "a", "a")
    ]
    save_clips(clips, tmp_path / "samples/step-000002")
    tone(tmp_path / "samples/step-000000/old.wav", 0)
    assert list(samples_of(tmp_path)) == [
        "step 0, old",
        "step 2, b/1",
        "step 2, a",
        "step 2, a (2)",
    ]
    assert all(file.is_file() for file in samples_of(tmp_path).values())


CLIPS = measure_clips(sorted(load_corpus(embedded_corpus()), key=lambda c: len(c.transcript))[:12])


class Sent:
    "What a widget tells a browser, as one that applies each message in turn."

    def __init__(self, widget):
        self.states = []
        send = widget.comm.send

        def keep(data=None, buffers=None, **more):
            if data and data.get("method") == "update":
                self.states.append(data["state"])
            return send(data=data, buffers=buffers, **more)

        widget.comm.send = keep


@settings(max_examples=5, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["search", "sort", "only", "pick", "next"]),
            st.text("doi-", max_size=2),
            st.integers(0, 9),
        ),
        max_size=6,
    )
)
@example([("pick", "", 7), ("search", "d", 0), ("search", "do", 0)])
@example([("search", "zz", 0), ("search", "", 0)])
def test_what_is_listed_is_what_is_shown(monkeypatch, steps):
    """After any steps the panel shows the recording that the list has chosen, and each message to
    the browser has options and choice together. Its picture is not drawn here.
    """
    monkeypatch.setattr("higgs_nb.view.corpus_explorer.picture", lambda figure, words: words)
    monkeypatch.setattr(CorpusExplorer, "figure", lambda explorer, waveform: None)
    explorer = CorpusExplorer(CLIPS, 3.5)
    sent = Sent(explorer.pick)
    for control, text, number in steps:
        sent.states.clear()
        if control == "search":
            explorer.search.value = text
        elif control == "sort":
            explorer.sort.value = explorer.sort.options[number % len(explorer.sort.options)]
        elif control == "only":
            explorer.only.value = bool(number % 2)
        elif control == "pick" and explorer.pick.options:
            explorer.pick.index = number % len(explorer.pick.options)
        elif control == "next":
            explorer.after.click()
        assert explorer.view.value == explorer.still()
        assert [i for _, i in explorer.pick.options] == explorer.shown()
        chosen = explorer.pick.value
        assert (chosen is None) == (not explorer.shown())
        if chosen is not None:
            assert explorer.pick.options[explorer.pick.index][1] == chosen
            assert f">{explorer.clips[chosen].row.id}</td>" in explorer.view.value
        assert [
            set(s) >= {"index", "_options_labels"} for s in sent.states if "_options_labels" in s
        ] in ([], [True])
        assert len([s for s in sent.states if "index" in s]) <= 1


ODD = st.sampled_from(
    [
        HOSTILE,
        "javascript:alert(1)",
        "</audio></td></script><b>",
        "&lt;script&gt;&#60;b&#62;",
        "\x1b]0;title\x07\x1b[31m",
        "a\u2028b\u2029c",
        "\u202egnp.exe\u2066",
        "\ud800",
        "price $5^^$6",
        "a$$b",
        "\\frac{",
        "_^",
    ]
)
OUTSIDE = ODD | st.text(
    st.sampled_from("<>'\"&/=`ab \n\u202e\u2028\x00$\\_^{}%|"), min_size=1, max_size=12
).filter(str.strip)
QUICK = dict(
    deadline=None,
    suppress_health_check=[*HealthCheck],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
PLAIN = "a name"


@pytest.fixture(scope="module")
def labelled():
    "The audit of a small batch."
    tokenizer = byte_tokenizer()
    tokens = AudioTokens.from_config(tiny_config(tokenizer), tokenizer)
    talk = CLIPS[0].conversation
    codes = [torch.randint(0, 32, (tokens.num_codebooks, 5)) for _ in talk.audio]
    sample = expand(encode_conversation(talk, tokenizer, codes), tokens, talk.id)
    return audit(PackedCollator(tokens)([sample]), tokenizer, tokens)


def structure(page):
    "The elements of a page with their attributes' names; nothing is loaded from elsewhere."
    elements = Elements(page).found
    for tag, attributes in elements:
        assert not {"href", "onerror", "onclick", "srcset"} & set(attributes)
        assert attributes.get("src", "data:").startswith("data:")
    page.encode("utf-8")
    hidden = [c for c in page if c in "\x00\x07\x1b\u2028\u2029\u202e\u2066"]
    assert not hidden, hidden
    return [(tag, sorted(attributes)) for tag, attributes in elements]


def reports(text):
    "Reports about a corpus, a checkpoint and an evaluation."
    row = replace(CLIPS[0].row, id=text, path=text, split=text, offset=1.0, peak=2.0)
    yield CorpusReport(1, [row], 24000, (text, "b"))
    fault = Fault("corrupt", text, text, text, text)
    yield Reports([CheckpointReport(Path("a" + text.replace("\0", "")), (fault,))])
    scores = [Score(text, text, 1.0, True, text, 2, 1)]
    yield Evaluation({text: scores}, {text: [(np.zeros(2400, np.float32), 24000)]})


def explorers(text, labelled):
    "Explorers of recordings, labels and codes, and a listening test with its result."
    clip = CLIPS[0]
    talk = replace(clip.conversation, id=text, speaker=text or None)
    yield CorpusExplorer(
        [replace(clip, row=replace(clip.row, id=text), text=text, conversation=talk)], 3.5
    )
    yield LabelExplorer(replace(labelled, names=[text] * len(labelled.names)))
    yield CodesExplorer([talk], Silence(), None)
    sound = np.zeros(240, dtype=np.float32)
    said = [Speech(text, text, np.zeros((1, 1)), True, 24000, sound)]
    for votes in (0, 1):
        listener = ABListener(said, said, (text, text + "b"), 0)
        listener.vote(0) if votes else None
        yield listener


class Silence:
    "A codec that makes nothing of everything."

    num_codebooks, sampling_rate, frame_rate = 2, 24000, 25

    def encode(self, wave):
        return np.zeros((2, 4), dtype=int)

    def decode(self, codes):
        return np.zeros(4000, dtype=np.float32)


def pages(text, labelled):
    "The structure of each view of a text, and a look at the labels of its controls."
    views = [v._repr_html_() for v in reports(text)]
    for view in explorers(text, labelled):
        views.append(view.view.value if isinstance(view, ABListener) else "")
        views.append(view.still())
        for control in view.children[0].children:
            "".join(map(str, getattr(control, "_options_labels", ()))).encode("utf-8")
    return list(map(structure, views))


@pytest.fixture(scope="module")
def plain(labelled):
    "The structure of the views of a harmless text."
    return pages(PLAIN, labelled)


@settings(max_examples=2, **QUICK)
@given(OUTSIDE)
@example(HOSTILE)
@example("\ud800\u202e\x1b$^^$")
def test_no_element_comes_from_a_text(labelled, plain, text):
    """In reports and explorers, a text from outside makes no element and no attribute, and shows
    what cannot be seen as escapes; no label of a widget holds such a character either.
    """
    assert pages(text, labelled) == plain
    for report in reports(text):
        assert all(c.isprintable() or c == "\n" for c in repr(report))


@settings(max_examples=4, **QUICK)
@given(OUTSIDE)
@example("price $5^^$6")
@example("a$$b")
@example(r"\frac{")
@example("_^")
def test_any_name_can_be_plotted(labelled, text):
    "Every `plot` of a report and every explorer's figure, with names that look like mathematics."
    corpus, _, evaluation = reports(text)
    figures = [corpus.plot().figure, evaluation.plot()]
    named = replace(labelled, names=[text] * len(labelled.names))
    figures += [named.plot(), LabelExplorer(named).figure()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        for figure in figures:
            figure.savefig(io.BytesIO(), format="svg")
            plt.close(figure)


@settings(max_examples=4, **QUICK)
@given(OUTSIDE)
@example("price $5^^$6")
@example(HOSTILE + "|a\n| b |")
def test_a_comparison_of_hostile_runs(tmp_path_factory, text):
    """compare.ipynb draws and lists runs whose directories, metrics and parameters have such
    names; its table is one table of plain text.
    """
    folder = tmp_path_factory.mktemp("sweep")
    name = re.sub("[/\0\ud800]", "-", text).strip(".") or "x"
    runs = [SweepRun("train", folder / f"{i}{name}", {text: i, "rank": i}) for i in (1, 2)]
    for run in runs:
        run.out.mkdir()
        (run.out / "run.json").write_text(json.dumps({"m": {text: 1.5}, "verdict": text}))
        (run.out / "log.jsonl").write_text(json.dumps({"step": 1, text: 2.0}) + "\n")
    shown = []
    space = {"__name__": "__main__", "display": shown.append}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("higgs_nb.cli.sweep_file.read_sweep", lambda path: runs)
        patch.setattr(SweepRun, "state", "done")
        patch.setattr("higgs_nb.cli.parameters.parameters", lambda *given: None)
        patch.setattr("IPython.display.display", shown.append)
        for cell in nbformat.read(ROOT / "nbs/runs/compare.ipynb", 4).cells:
            if cell.cell_type == "code":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(cell.source, "compare.ipynb", "exec"), space)
                if "parameters" in cell.metadata.get("tags", []):
                    space.update(
                        out=str(folder), curve=text, metrics=[f"m.{text}".lstrip("."), "verdict"]
                    )
        space["fig"].savefig(io.BytesIO(), format="svg")
        plt.close(space["fig"])
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(shown[0].data)
    inline = [child.type for token in tokens for child in token.children or ()]
    assert [t.type for t in tokens].count("tr_open") == 3 and tokens[0].type == "table_open"
    assert set(inline) <= {"text", "text_special"}


@settings(max_examples=6, **QUICK)
@given(OUTSIDE)
@example("a\x1b[31m\u202e/b")
def test_the_doctor_of_a_hostile_name(text):
    "Each finding is one line, without control characters."
    said = io.StringIO()
    ok = [
        f"check_{n}"
        for n in ("packages", "torch", "cache", "audio", "data", "torchaudio", "notebooks")
    ]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for name in ok:
            patch.setattr(f"higgs_nb.cli.doctor.{name}", lambda: Finding("it", "ok", text, text))
        higgs_doctor(["--base", f"./{text}".replace("\0", "")])
    assert said.getvalue().count("->") >= len(ok)
    assert all(c.isprintable() or c == "\n" for c in said.getvalue())


def prepare(out, data):
    return execute(out, notebook="prepare", given={}, data=data)


def let_go():
    "Give up what this process holds, as its end would."
    while HELD:
        os.close(HELD.pop())


def test_prepare_keeps_what_is_beyond_full_scale_and_what_it_made_before(tmp_path):
    """A float recording that is too loud is written as float, unclipped. A second prepare that
    fails on a broken recording leaves the first one's results in their place.
    """
    data = corpus_of(tmp_path / "data", [row(i) for i in range(8)])
    loud = 2.5 * np.sin(np.arange(24000) / 20)
    soundfile.write(tmp_path / "data/clip3.wav", loud, 24000, subtype="FLOAT")
    prepare(tmp_path / "out", data)
    made = [f for f in (tmp_path / "out/audio").iterdir() if f.suffix == ".wav"]
    assert len(made) == 1 and soundfile.info(made[0]).subtype == "FLOAT"
    assert np.allclose(soundfile.read(made[0])[0], loud, atol=1e-6)
    kept = ("metadata.json", "run.json", *(f"audio/{f.name}" for f in made))
    before = [(tmp_path / "out" / name).read_bytes() for name in kept]
    whole = (tmp_path / "data/clip5.wav").read_bytes()
    (tmp_path / "data/clip5.wav").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="clip5"):
        prepare(tmp_path / "out", data)
    assert [(tmp_path / "out" / name).read_bytes() for name in kept] == before
    assert not (tmp_path / "out/earlier-1").exists()
    let_go()


def test_what_a_run_reads_is_not_prepared_anew(tmp_path):
    "Train holds what it reads until it ends; and it does not begin while prepare writes there."
    folder = tmp_path / "prepared"
    data = corpus_of(folder, [row(i) for i in range(8)])
    execute(tmp_path / "out", until="model = load_base(", data=data)
    with pytest.raises(BlockingIOError, match="a run reads"):
        claim(folder, patience_s=0)
    let_go()
    writer = claim(folder, patience_s=0)
    with pytest.raises(BlockingIOError, match="a run writes"):
        execute(tmp_path / "other", until='base == "tiny"', data=data)
    os.close(writer)
    let_go()


def test_a_run_that_was_cut_off_is_moved_or_its_data_changes(tmp_path):
    """A directory that was moved resumes under its new name. Changed data is refused, and the
    error names `-p resume_force=True`, which goes on.
    """
    rows = [row(i) for i in range(8)]
    data = corpus_of(tmp_path / "data", rows)
    run = dict(data=data, steps=4, save_every=2, speak=0, table=0, max_clips=4)

    def interrupt(callback, trainer):
        if trainer.state.global_step == 3:
            trainer.saver.wait()  # for the checkpoint of step 2
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("higgs_nb.view.plots.LiveLosses.on_step_end", interrupt)
        execute(tmp_path / "first", **run)
    let_go()
    (tmp_path / "first").rename(tmp_path / "moved")
    _, said = execute(tmp_path / "moved", until="length = planned_length", **run)
    assert f"goes on from {tmp_path / 'moved' / 'checkpoint-2'}" in said
    corpus_of(tmp_path / "data", [{**r, "text": r["text"] + " again"} for r in rows])
    with pytest.raises(CheckpointError, match="-p resume_force=True"):
        execute(tmp_path / "moved", **run)
    space, _ = execute(tmp_path / "moved", **run, resume_force=True)
    assert space["trainer"].state.global_step == 4
    assert (tmp_path / "moved/run.json").is_file() and not (tmp_path / "moved/earlier-1").exists()
    let_go()
