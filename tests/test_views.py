"""What runs and views do with data from outside: corpora without held-out speech, hostile names, foreign run directories.

Cells of a run notebook are executed here in this process, with small parameters, which takes a second or two; test_runs.py executes the notebooks by papermill."""
import contextlib, io, json, warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat, numpy as np, pytest, soundfile
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings, strategies as st
from matplotlib.figure import Figure

from higgs_nb.plots import plain_text

@pytest.fixture(autouse=True)
def without_judges(monkeypatch):
    "As where the extra `eval` is not installed: its models take half a minute to load."
    monkeypatch.setattr("higgs_nb.evaluate.missing_judges", lambda: ["everything"])


SMALL = dict(base="tiny", rank=2, steps=2, warmup=1, token_budget=512, eval_every=1, save_every=2, speak=1, table=1, learning_rate=0.001)


def execute(out, until=None, **parameters):
    "Everything that train.ipynb defines and prints, after all its cells or those before the one with the text `until`."
    space, said = {"__name__": "__main__", "display": lambda *shown, **more: None}, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in nbformat.read(ROOT/"nbs/runs/train.ipynb", 4).cells:
            if cell.cell_type != "code":
                continue
            if until and until in cell.source:
                break
            exec(compile(cell.source, "train.ipynb", "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space.update(SMALL, out=str(out), **parameters)
    return space, said.getvalue()


def tone(path, number, seconds=0.6):
    "A recording of its own for each number."
    t = np.arange(int(24000 * seconds)) / 24000
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (150 + 37 * number) * t), 24000)


def corpus_of(folder, rows):
    "A corpus of `rows` (dict of metadata, or ChatML), whose recordings `clipN.wav` are made."
    for number in range(8):
        tone(folder/f"clip{number}.wav", number)
    (folder/"data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder/"data.jsonl")


def row(number, **more):
    return dict(id=f"c{number}", audio_file=f"clip{number}.wav", text=f"sentence {chr(97 + number)}") | more


def talk(id, *answers, **more):
    turns = [dict(role="user", content=f"Say {id}."), *(dict(role="assistant", content=a) for a in answers)]
    return dict(id=id, messages=turns, **more)


def sound(number):
    return dict(type="audio", audio_url=f"clip{number}.wav")


NOTHING_HELD = {  # rows and parameters
    "one clip": ([row(0)], {}),
    "one sentence": ([row(i, text="the same words") for i in range(3)], {}),
    "all train": ([row(i, split="train") for i in range(3)], {}),
    "held_out=0": ([row(i) for i in range(3)], dict(held_out=0.0)),
    "only text": ([talk("a", sound(0)), talk("b", sound(1)), talk("chat", "Fine.", split="held_out")], dict(held_out=0.0)),
}


@pytest.mark.parametrize("name", NOTHING_HELD)
def test_a_corpus_without_held_out_speech(tmp_path, name):
    "The run says so and goes on as if nothing were held out."
    rows, parameters = NOTHING_HELD[name]
    space, said = execute(tmp_path/"out", until='base == "tiny"', data=corpus_of(tmp_path/"data", rows), **parameters)
    assert "there is no evaluation" in said and space["held"] == [] and space["clip"] in space["train"]


@pytest.mark.parametrize("rows, held_out", [
    ([row(0, id="price $5^^$6")], False),
    ([talk("a", sound(0), split="train"), talk("chat", "Fine.", split="held_out"), talk("b", sound(1), split="held_out"), talk("more", "Well.", split="train")], True)])
def test_a_run_with_little_speech(tmp_path, rows, held_out):
    "To its end: one clip with a title of mathematics; text-only conversations among speech."
    space, said = execute(tmp_path/"out", data=corpus_of(tmp_path/"data", rows))
    run = json.loads((tmp_path/"out/run.json").read_text())
    assert (tmp_path/"out/adapter/manifest.json").is_file() and ("there is no evaluation" in said) != held_out
    assert (run["held_out_audio_loss"]["after"] is not None) == held_out == bool(run["probe"])


@pytest.mark.parametrize("rows, words", [
    ([row(i, split="held_out") for i in range(3)], "no conversation is left to train on"),
    ([talk("chat", "Fine."), talk("more", "Well.")], "has a recording in an assistant turn"),
    ([dict(id="a", messages=[dict(role="user", content=["Listen.", sound(0)]), dict(role="assistant", content="Fine.")])], "has a recording in an assistant turn")])
def test_a_run_without_speech_to_learn(tmp_path, rows, words):
    "One sentence, before the model is loaded."
    with pytest.raises(ValueError, match=words):
        execute(tmp_path/"out", until="load_codec(codec)", data=corpus_of(tmp_path/"data", rows))


def test_a_negative_number_of_clips(tmp_path):
    with pytest.raises(ValueError, match="max_clips"):
        execute(tmp_path/"out", until="load_codec(codec)", max_clips=-1)
    assert not (tmp_path/"out").exists()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.integers(0, 5))
def test_no_recording_is_trained_and_held_out(tmp_path_factory, numbers, seed):
    "Rows that share a recording under different words end on one side."
    folder = tmp_path_factory.mktemp("twice")
    rows = [dict(id=f"r{i}", audio_file=f"clip{n}.wav", text=f"sentence {chr(97 + i)}") for i, n in enumerate(numbers)]
    space, said = execute(folder/"out", until="def recording", data=corpus_of(folder, rows), held_out=0.5, seed=seed)
    sides = [{Path(c.audio[-1].path).name for c in space[side]} for side in ("train", "held")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"clip{n}.wav" for n in numbers}
    assert len(space["train"]) + len(space["held"]) == len(numbers)


def test_a_long_clip_is_heard_to_the_end_of_the_run(tmp_path):
    "A held-out recording and a reference beyond 30 s, with a limit that allows them."
    data = corpus_of(tmp_path/"data", [row(i, split="train") for i in range(2)] + [row(7, split="held_out", ref_audio_file="clip7.wav", ref_transcript="a reference")])
    tone(tmp_path/"data/clip7.wav", 7, 31)
    space, said = execute(tmp_path/"out", data=data, max_duration_s=40.0, token_budget=2048)
    assert json.loads((tmp_path/"out/run.json").read_text())["held_out_audio_loss"]["after"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(), max_size=12) | st.text(r"$\^_{}%f ", max_size=12))
@example(r"price $5^^$6")
@example("_$\\$x$")
@example("\0\ud800\n$")
def test_any_text_can_be_drawn(text):
    "As a title, a label of a tick, and a line that a legend names; matplotlib reads no mathematics in it."
    fig = Figure(figsize=(1, 1))
    ax = fig.subplots()
    ax.plot([1], label=plain_text(text))
    ax.set(title=plain_text(text), xticks=[0], xticklabels=[plain_text(text)])
    legend = ax.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        fig.savefig(io.BytesIO(), format="svg")
    assert len(legend.texts) == 1
