"""The whole road on a small Higgs Audio V3 in the published layout: prepared, planned, trained,
interrupted and resumed, spoken, evaluated and exported. The cells of the run notebooks are executed
in this process, which takes seconds where a kernel each would take minutes.
"""

import math
import shutil

import matplotlib
import nbformat
import pytest
import torch
from miniature import write_recordings, write_v3_base
from safetensors.torch import load_file
from transformers.utils import logging

from higgs_nb.checkpoint.adapter import load_lora_adapters
from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.cli.notebooks import notebook_of
from higgs_nb.cli.planned_run import plan_of, plan_values
from higgs_nb.core.files import load_json
from higgs_nb.data.audio import load_audio
from higgs_nb.data.audit import audit
from higgs_nb.data.codec import load_codec
from higgs_nb.data.collator import PackedCollator
from higgs_nb.data.conversation import tts_conversation
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.prompt import AudioTokens
from higgs_nb.data.samples import encode_conversation, expand
from higgs_nb.family import HIGGS_V3
from higgs_nb.model.load import base_family, load_config, load_model, load_tokenizer
from higgs_nb.model.merge import merge_lora
from higgs_nb.model.native import CODEC, is_native
from higgs_nb.speech.generate import generate_speech
from higgs_nb.speech.long import speak_texts
from higgs_nb.speech.own_speech import reference_pair
from higgs_nb.speech.stream import stream_speech
from higgs_nb.training.plan import host_and_disk
from higgs_nb.training.recipe import recipe_of
from higgs_nb.view.codes_explorer import codes_explorer
from higgs_nb.view.corpus_explorer import corpus_explorer
from higgs_nb.view.label_explorer import label_explorer
from higgs_nb.view.monitor import VIEWS, plot_run, run_monitor
from higgs_nb.view.run_files import read_log

TABLE = "model.embed_audio_tokens"
RECIPE = dict(codec="world", learning_rate=5e-3, warmup=1, rank=4, token_budget=512, epochs=0)
RECIPE |= dict(steps=4, eval_every=4, save_every=2, train_in_full=[TABLE], max_speech_s=0.4)
RECIPE |= dict(rehearse=0.5)


def run(name, out, **given):
    "Execute the cells of a run notebook with these parameters; returns its directory."
    out.mkdir(exist_ok=True)
    cells = nbformat.read(notebook_of(name), 4).cells
    namespace = dict(__name__="__main__")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("higgs_nb.tasks.speaking.missing_judges", lambda: ["all"])  # takes seconds
        for i, cell in enumerate(c for c in cells if c.cell_type == "code"):
            exec(compile(cell.source, f"{name}, code cell {i}", "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", ()):
                namespace |= dict(given, out=str(out))
    matplotlib.pyplot.close("all")
    return out


@pytest.fixture(scope="module", autouse=True)
def quiet():
    matplotlib.use("agg")
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    "A folder with `base`, and `recordings` of which one is to be whispered."
    folder = tmp_path_factory.mktemp("road")
    write_v3_base(folder / "base", RECIPE)
    recordings = write_recordings(folder / "recordings", 4)
    text = min(recordings.glob("*.txt"))
    text.write_text(f"<|style:whispering|>{text.read_text()}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(road):
    given = dict(base=str(road / "base"), data=str(road / "recordings"))
    return run("prepare", road / "prepared", **given)


def train(road, prepared, out):
    given = dict(base=str(road / "base"), data=str(prepared), device="cpu", speak=1, table=1)
    return run("train", out, **given)


@pytest.fixture(scope="module")
def trained(road, prepared):
    return train(road, prepared, road / "train")


def test_the_recipe_is_that_of_the_base(road, trained):
    record = load_json(trained / "run.json")
    used = record["parameters"]
    assert used["train_in_full"] == [TABLE] and used["steps"] == 4 and record["finished"]
    assert record["sources"]["learning_rate"] == "recipe"
    assert record["held_out_text_loss"] == dict(before=None, after=None)
    assert recipe_of(HIGGS_V3.architecture.released[0]) == HIGGS_V3.recipe


def test_its_memory_is_planned(road):
    "Of the small base by its config.json, of the released model by its name, for 24 GB."
    small, released = str(road / "base"), HIGGS_V3.architecture.released[0]
    plan = plan_of(small, plan_values(small, []))
    assert plan.fits(12) and host_and_disk(plan)["loading"] > 151936 * 64 * 2
    plan = plan_of(released, plan_values(released, [["train_in_full", TABLE]]))
    assert not plan.fits(24)
    assert plan.with_settings(gradient_checkpointing=True).fits(24)


def test_an_interrupted_run_goes_on_to_the_bit(road, prepared, trained, capsys):
    "A run whose last two steps are gone, as after a kill, is resumed and ends as the whole one."
    cut = shutil.copytree(trained, road / "cut")
    for name in ("checkpoint-4", "adapter", "samples"):
        shutil.rmtree(cut / name)
    (cut / "run.json").unlink()
    capsys.readouterr()
    train(road, prepared, cut)
    assert "goes on from" in capsys.readouterr().out
    whole, again = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (trained, cut))
    assert whole.keys() == again.keys() and len(whole) == 2 * 2 * 7 + 1
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    table = f"base_model.model.{TABLE}.weight"
    assert whole[table].dtype == torch.float32
    before = load_model(str(road / "base")).get_parameter(f"{TABLE}.weight")
    assert not torch.equal(whole[table], before.float())


def test_the_log_tells_eos_from_codes(trained):
    lines = (trained / "log.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","))) for line in lines[1:]]
    for name in ("code_loss", "end_loss", "eval_code_loss", "eval_end_loss"):
        assert any(float(row[name] or 0) > 0 for row in rows), name
    assert "text_loss" not in columns


def test_it_speaks_a_long_text_after_a_reference(road, trained):
    [recording, *_] = sorted((road / "recordings").glob("*.opus"))
    words = recording.with_suffix(".txt").read_text().split("|>")[-1]
    given = dict(run=str(trained), max_chars=30, max_frames=6, device="cpu")
    given["text"] = "One moment, please. <|prosody:pause|>Hold."
    for name, more in dict(
        alone={}, voice=dict(reference=str(recording), reference_text=words)
    ).items():
        out = run("speak", road / name, **given, **more)
        [clip] = load_json(out / "speak.json")["clips"]
        assert (out / clip["file"]).is_file() and len(clip["pieces"]) == 2


def test_it_is_evaluated(road, trained):
    given = dict(judge=False, max_frames=6, swap=1, max_texts=1, device="cpu", reference=True)
    out = run("evaluate", road / "evaluate", run=str(trained), precision="float32", **given)
    result = load_json(out / "evaluate.json")
    assert result["merged_gives_same_codes"] == dict(clips=1, same=1)
    assert any(arm.startswith("base, after") for arm in result["arms"]["summary"])


def test_merged_speaks_as_the_adapter_does(road, trained):
    base, prompts = str(road / "base"), ["One.", "<|style:whispering|>Two."]
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype="float32")
    before = generate_speech(model, tokenizer, prompts, max_frames=10)
    model = load_lora_adapters(model, trained / "adapter", tokenizer=tokenizer)
    adapted = generate_speech(model, tokenizer, prompts, max_frames=10)
    merged = generate_speech(merge_lora(model), tokenizer, prompts, max_frames=10)
    for a, b, c in zip(before, adapted, merged):
        assert torch.equal(b.codes, c.codes) and not torch.equal(a.codes, b.codes)


@pytest.fixture(scope="module")
def exported(road, trained):
    return run(
        "export", road / "export", run=str(trained), text="Hold.", max_frames=6, device="cpu"
    )


def test_the_merged_model_has_the_published_names(road, trained, exported):
    base, merged = road / "base", exported / "merged"
    assert validate_checkpoint(merged).status == "whole"
    files = sorted(p.name for p in base.iterdir())
    there = {p.name for p in merged.iterdir()}
    assert there == {*files, "manifest.json", "README.md", "NOTICE"}
    assert is_native(load_json(merged / "config.json"))
    changed = set()
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(merged / file.name)
        assert before.keys() == after.keys()
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(CODEC) for name in changed)
    assert len(changed) == 2 * 7 + 2, "seven matrices of each layer, the table and its copy"
    for name in ("config.json", "model.safetensors.index.json", "LICENSE", "tokenizer.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_every_export_carries_licence_and_notice(road, exported):
    for kind in ("adapter", "merged"):
        card = (exported / kind / "README.md").read_text()
        assert HIGGS_V3.notice in card and HIGGS_V3.licence in card, kind
        assert f"# {HIGGS_V3.heading.format(title=HIGGS_V3.title)}" in card
        assert (exported / kind / "NOTICE").read_text() == HIGGS_V3.notice + "\n"
        assert (exported / kind / "LICENSE").read_bytes() == (
            road / "base" / "LICENSE"
        ).read_bytes()


def test_there_is_no_original_layout(road, trained):
    with pytest.raises(ValueError, match="no original layout of Higgs Audio V3"):
        run("export", road / "original", run=str(trained), what="all")


def test_an_exported_model_is_a_base_again(road, exported):
    merged = str(exported / "merged")
    assert recipe_of(merged) == recipe_of(str(road / "base"))
    assert base_family(merged) is HIGGS_V3


def test_the_explorers_show_it(prepared):
    conversations = load_corpus(prepared)
    assert "whispering" in corpus_explorer(conversations).still()
    assert "codebooks" in codes_explorer(conversations, load_codec("world")).still()


def test_the_monitor_shows_it(trained):
    "Every view has a picture, that of the losses has EOS in the place of text, and it is heard."
    monitor = run_monitor(trained, follow=False)
    newest = {key: value for entry in read_log(trained) for key, value in entry.items()}
    assert "step 4" in monitor.still() and f"EOS {newest['end_loss']:.3f}" in monitor.still()
    for view in VIEWS:
        monitor.show.value = view
        assert f"The {view} of train up to step 4" in monitor.still()
    history = read_log(trained)
    losses = plot_run(history, "losses", math.log(1026))
    titles = [ax.get_title().split(" (")[0] for ax in losses.axes]
    assert titles == ["audio", "EOS", "each codebook"]
    [probe] = plot_run(history, "probe").axes
    for figure in (losses.axes, [probe]):
        drawn = [line for ax in figure for line in ax.lines if line.get_label()[0] != "_"]
        assert len(drawn) >= 4 and all(len(line.get_ydata()) for line in drawn)
    monitor.sample.value = monitor.sample.options[-1]
    assert "<audio" in monitor.still()


def test_the_labels_of_a_batch_are_walked_through(road, prepared):
    "The last row of a clip has a code in the last codebook and EOS, which is learned, elsewhere."
    base, codec = str(road / "base"), load_codec("world")
    tokenizer = load_tokenizer(base)
    tokens = AudioTokens.from_config(load_config(base, None), tokenizer)
    other, talk = load_corpus(prepared)[:2]
    voice = reference_pair(other)
    heard = tts_conversation(talk.transcript, talk.audio[-1], id="heard", reference=voice)
    samples = []
    for c in (talk, heard):
        codes = [codec.encode(load_audio(audio)) for audio in c.audio]
        samples.append(expand(encode_conversation(c, tokenizer, codes), tokens, c.id))
    batch = PackedCollator(tokens)(samples)
    explorer = label_explorer(audit(batch, tokenizer, tokens))
    for sample in (0, 1):
        explorer.sample.value = sample
        explorer.go(10**6)
        assert "supervised" in explorer.still() and "1025" in explorer.still()
        explorer.figure()
    assert any(row["kind"] == "reference" for row in explorer.rows())


def test_a_stream_is_the_clip(road):
    "Both sample the same rows, and nothing of the delay is heard."
    model = load_model(str(road / "base"), dtype="float32")
    tokenizer, codec = load_tokenizer(str(road / "base")), load_codec("world")
    text, options = "One moment, please. Hold the line.", dict(max_frames=12, max_chars=30)
    [clip] = speak_texts(model, tokenizer, [text], codec, **options)
    chunks = list(stream_speech(model, tokenizer, text, codec, chunk_s=0.2, **options))
    assert len(clip.pieces) == 2 and len(chunks) > 4
    assert torch.allclose(torch.cat(chunks), clip.waveform, atol=1e-4)


@pytest.mark.slow
def test_a_base_with_random_weights_takes_the_whole_road(tmp_path):
    "`base=tiny_v3`: the run makes it, and nothing of it is under the licence of the release."
    assert plan_of("tiny_v3", plan_values("tiny_v3", [])).fits(12)
    given = dict(base="tiny_v3", device="cpu", max_clips=4, steps=2, eval_every=2, save_every=2)
    given |= dict(speak=0, table=1, rank=2, max_speech_s=0.4, token_budget=512)
    out = run("train", tmp_path / "train", **given)
    record = load_json(out / "run.json")
    assert record["finished"] and base_family(str(out / "base")) is HIGGS_V3
    assert record["parameters"]["train_in_full"] == [TABLE, "model.embed_tokens"]
    short = dict(run=str(out), max_frames=6, device="cpu")
    [clip] = load_json(run("speak", tmp_path / "speak", text="Hold.", **short) / "speak.json")[
        "clips"
    ]
    assert clip["seconds"] > 0
    exported = run("export", tmp_path / "export", text="Hold.", **short)
    assert base_family(str(exported / "merged")) is HIGGS_V3
    assert HIGGS_V3.notice not in (exported / "merged" / "README.md").read_text()
    assert not (exported / "merged" / "NOTICE").exists()
    merged = dict(base=str(exported / "merged"), text="Hold.", max_frames=6, device="cpu")
    assert run("speak", tmp_path / "again", **merged)
