"Every notebook of nbs/runs is executed by papermill, with small parameters."

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import soundfile
import torch
from conftest import ROOT, committed
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from higgs_nb.checkpoint.adapter import load_lora_adapters
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.repair import main as higgs_validate
from higgs_nb.cli.answers import answers, compare
from higgs_nb.cli.directory import occupy
from higgs_nb.cli.execution import is_done
from higgs_nb.cli.export import export_model
from higgs_nb.cli.run import main as higgs_run
from higgs_nb.cli.sweep import main as higgs_sweep
from higgs_nb.data.audio import load_audio
from higgs_nb.data.codec import load_codec
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.model.load import load_model
from higgs_nb.model.merge import merge_lora
from higgs_nb.original.disk import convert_folder
from higgs_nb.speech.judges import missing_judges

RUNS = {
    file.name: ROOT / file
    for file in committed()
    if file.parent == Path("nbs/runs") and file.suffix == ".ipynb"
}
SOUNDS, SOUNDS_FR, KOKORO = (
    os.environ.get(name, "")
    for name in ("HIGGS_NB_SOUNDS", "HIGGS_NB_SOUNDS_FR", "HIGGS_NB_KOKORO")
)

# notebook: its parameters here; what it makes goes into the test's folder, where it runs
SMALL = {
    "corpus.ipynb": dict(source=SOUNDS, out="allison"),
    "corpus_fr.ipynb": dict(source=SOUNDS_FR, out="june"),
    "fit_codec.ipynb": dict(
        corpus=str(embedded_corpus()), out="codec", codebook_size=16, width=24, steps=60, clips=8
    ),
    "prepare.ipynb": dict(out="prepared", max_clips=40),
    "compare.ipynb": dict(out="compare"),  # of a sweep
    "pretrain.ipynb": dict(
        voices="codes.safetensors",
        out="pretrain",
        hidden_size=32,
        intermediate_size=64,
        vocabulary=320,
        steps=4,
        warmup=1,
        eval_every=4,
        save_every=4,
        speak=1,
    ),
    "texts.ipynb": dict(out="texts"),
    "voices.ipynb": dict(
        voices=KOKORO,
        out="voices",
        ordinary=2,
        prompts=2,
        service=1,
        readings=0,
        test_texts=1,
        held_out=1,
        variants=2,
    ),
    "evaluate.ipynb": dict(
        out="evaluate", max_texts=2, swap=1, max_frames=30, players=1, judge=not missing_judges()
    ),  # of the run that `trained` makes
    "export.ipynb": dict(out="export", text="Please hold."),  # of the run that `trained` makes
    "speak.ipynb": dict(out="speak", base="small", text="Please hold.", max_frames=60),
    "train.ipynb": dict(
        out="run",
        base="tiny",
        steps=40,
        max_clips=40,
        token_budget=1024,
        learning_rate=0.003,
        eval_every=20,
        save_every=20,
        warmup=5,
        speak=1,
        table=2,
    ),
}
# notebook: what a machine may lack (None: nothing is missing), and why it is skipped then
NEEDS = {
    "corpus.ipynb": None
    if SOUNDS
    else (
        "HIGGS_NB_SOUNDS does not name a folder with Debian's asterisk-core-sounds-en and "
        "-en-g722 unpacked"
    ),
    "corpus_fr.ipynb": None
    if SOUNDS_FR
    else (
        "HIGGS_NB_SOUNDS_FR does not name a folder with Debian's asterisk-core-sounds-fr "
        "and -fr-g722 unpacked"
    ),
    "voices.ipynb": None
    if KOKORO
    else "HIGGS_NB_KOKORO does not name the folder of Kokoro's voices",
}


def test_each_is_listed():
    assert set(SMALL) == set(RUNS), (
        "a notebook of nbs/runs has no small parameters here, or is gone"
    )


@pytest.mark.parametrize(
    "name",
    sorted(
        set(SMALL)
        - {"prepare.ipynb", "train.ipynb", "evaluate.ipynb", "export.ipynb", "compare.ipynb"}
        - {"texts.ipynb"}
    ),
)  # those are looked at more closely below, and in test_texts.py
def test_run(name, tmp_path):
    if NEEDS.get(name):
        pytest.skip(NEEDS[name])
    if name == "pretrain.ipynb":
        synthetic_codes(tmp_path / "codes.safetensors")
    papermill.execute_notebook(
        RUNS[name], tmp_path / name, parameters=SMALL[name], cwd=tmp_path, progress_bar=False
    )


def synthetic_codes(path):
    "What nbs/runs/voices.ipynb would make, of a few recordings in the package."
    codec, clips = load_codec(), load_corpus(embedded_corpus())[:8]
    codes = [codec.encode(load_audio(c.audio[-1])).to(torch.int16) for c in clips]
    rows = [
        dict(
            id=c.id,
            text=c.transcript,
            speaker_id=("af_heart", "am_michael")[i % 2],
            split=("train", "held_out")[i > 5],
            frames=[x.shape[1]],
            words=[np.linspace(0, x.shape[1], len(c.transcript.split()), endpoint=False).tolist()],
        )
        for i, (c, x) in enumerate(zip(clips, codes))
    ]
    save_file(dict(codes=torch.cat(codes, 1)), path, dict(rows=json.dumps(rows)))


@pytest.mark.parametrize("name", sorted(RUNS))
def test_parameters_are_explained(name):
    "`papermill --help-notebook` shows a type and a comment for each."
    parameters = papermill.inspect_notebook(RUNS[name])
    assert parameters, f"{name} has no cell with the tag `parameters`"
    bare = [
        p["name"] for p in parameters.values() if p["inferred_type_name"] == "None" or not p["help"]
    ]
    assert not bare, f"{name}: a type or a comment is missing for {', '.join(bare)}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "The directory of a small `higgs_run prepare`, its exit code asserted."
    out = tmp_path_factory.mktemp("runs") / "prepared"
    assert (
        higgs_run(
            ["prepare", "--out", str(out), "-p", f"max_clips={SMALL['prepare.ipynb']['max_clips']}"]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def trained(prepared):
    "The directory of a small `higgs_run train` on what was prepared, its exit code asserted."
    out, given = prepared.with_name("train"), given_to_train(prepared)
    assert (
        higgs_run(
            [
                "train",
                "--out",
                str(out),
                *(x for key, value in given.items() for x in ("-p", key, str(value))),
            ]
        )
        == 0
    )
    return out


def given_to_train(prepared, **changes):
    return {
        **{key: value for key, value in SMALL["train.ipynb"].items() if key != "out"},
        "data": str(prepared),
        **changes,
    }


def test_what_prepare_leaves(prepared, trained):
    """A corpus that says its splits, of mono files at the codec's rate, with codes that the
    training run has used and not made again.
    """
    corpus, whole = load_corpus(prepared), load_corpus(embedded_corpus())
    parts = {
        s: [c for c in whole if c.extra["split"] == s][: SMALL["prepare.ipynb"]["max_clips"]]
        for s in ("train", "held_out")
    }
    assert [(c.id, c.transcript, c.extra["split"]) for c in corpus] == [
        (c.id, c.transcript, s) for s, members in parts.items() for c in members
    ]
    for c in corpus:
        [audio] = c.audio
        info = soundfile.info(audio.path)
        assert (info.samplerate, info.channels, info.format) == (24000, 1, "FLAC") and Path(
            audio.path
        ).parent == prepared / "audio"
    [pack] = prepared.glob("codes/*/codes-*.safetensors")
    with safe_open(pack, "numpy") as file:
        assert len(file.get_tensor("frames")) == len(corpus)
    assert not list(prepared.rglob("*.npy")) and not (trained / "codes").exists()
    run = json.loads((prepared / "run.json").read_text())
    assert (
        run["conversations"]
        == {s: len(members) for s, members in parts.items()}
        == dict(train=40, held_out=32)
        and run["recordings"] == len(corpus)
        and not run["stands_out"]["clipped"]
    )


def test_what_a_run_leaves(prepared, trained):
    """Verified checkpoints and adapter, the executed notebook, the log, samples, and run.json with
    what was measured.
    """
    run = json.loads((trained / "run.json").read_text())
    assert run["held_out_audio_loss"]["after"] < 0.97 * run["held_out_audio_loss"]["before"]
    assert run["verdict"] in ("frequencies", "learning") and set(run["probe"]) == {
        "-1",
        "+0",
        "+1",
        "+2",
    }
    next_frame = run["probe_train"].pop("+1")
    assert next_frame < min(run["probe_train"].values()), (
        "on real recordings that it was trained on, the next frame is known best"
    )
    assert (
        run["tokens_per_second"] > 0
        and run["versions"]["torch"]
        and run["parameters"]["steps"] == 40
    )
    assert sorted(p.name for p in trained.glob("checkpoint-*")) == [
        "checkpoint-20",
        "checkpoint-40",
    ]
    assert is_done("train", trained, given_to_train(prepared)) and not is_done(
        "train", trained, given_to_train(prepared, steps=61)
    )
    noted = json.loads((trained / "environment.jsonl").read_text())
    assert (
        noted["parameters"]["seed"] == 0
        and noted["parameters"]["steps"] == 40
        and noted["versions"]["torch"] == run["versions"]["torch"]
        and "package" in noted["git"]
    )
    assert higgs_validate([str(trained)]) == 0
    assert (
        len(list((trained / "samples").glob("step-*/*.wav"))) == 2
        and (trained / "log.jsonl").exists()
    )
    outputs = [
        o
        for c in nbformat.read(trained / "train.ipynb", 4).cells
        if c.cell_type == "code"
        for o in c.outputs
    ]
    pictures = sum("image/png" in o.get("data", {}) for o in outputs)
    players = sum("<audio" in o.get("data", {}).get("text/html", "") for o in outputs)
    assert (
        pictures >= 4 and players >= 2
    )  # the recording, and before or after: a model that says nothing has no player


def test_stock_peft_reads_the_adapter(trained):
    base = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        trained / "base", use_text_head=True
    )
    stock = PeftModel.from_pretrained(base, trained / "adapter").eval()
    ours = load_lora_adapters(load_model(str(trained / "base")), trained / "adapter").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_an_evaluation_of_a_run(trained, tmp_path):
    """Ways to speak the same held-out texts, side by side; merged, the adapter says the same. The
    judges join where they are installed.
    """
    given = SMALL["evaluate.ipynb"]
    assert (
        higgs_run(
            [
                "evaluate",
                "--out",
                str(tmp_path),
                "-p",
                "run",
                str(trained),
                *(
                    x
                    for key, value in given.items()
                    if key != "out"
                    for x in ("-p", key, json.dumps(value))
                ),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert list(found["arms"]["scores"]) == [
        "recordings",
        "codec",
        "codec, 4 codebooks",
        *(f"{who}, {way}" for who in ("base", "adapter") for way in ("greedy", "sampling")),
        "merged, greedy",
    ]
    assert all(
        len(scores) == 2 and (scores[0]["heard"] is None) != given["judge"]
        for scores in found["arms"]["scores"].values()
    )
    assert (
        found["merged_gives_same_codes"] == dict(clips=2, same=2)
        and found["compared_with"]["conversations"] == 40
    )
    recorded, *swapped = [
        scores[0]["duration_s"] for scores in found["codebooks"]["scores"].values()
    ]
    assert len(swapped) == 3 and swapped == [recorded] * 3


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    "The directory of `higgs_run export` on that run: `adapter`, `merged` and `original`."
    out = tmp_path_factory.mktemp("exports") / SMALL["export.ipynb"]["out"]
    assert (
        higgs_run(
            [
                "export",
                "--out",
                str(out),
                "-p",
                "run",
                str(trained),
                "-p",
                "text",
                SMALL["export.ipynb"]["text"],
                "-p",
                "what",
                "all",
            ]
        )
        == 0
    )
    return out


def test_the_original_layout_is_the_merged_model(exported, tmp_path):
    "The third export is what converting the second gives; its card says how it is loaded."
    convert_folder(exported / "merged", tmp_path / "converted")
    for file in (tmp_path / "converted").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (exported / "original" / file.name).read_bytes(), file.name
    assert "HiggsAudioServeEngine" in (exported / "original" / "README.md").read_text()


def test_stock_classes_read_both_exports(trained, exported):
    """transformers alone loads the merged model, and with plain PEFT the adapter; both answer as
    the run's adapter does, on words and frames.
    """

    def stock(path):
        return HiggsAudioV2ForConditionalGeneration.from_pretrained(path, use_text_head=True)

    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    expected = answers(
        load_lora_adapters(load_model(str(trained / "base")), trained / "adapter"),
        tokenizer,
        "Hello.",
        20,
    )
    assert expected["codes"].shape[1] > 0, "this model says nothing: choose another text"
    assert (
        compare(
            answers(
                PeftModel.from_pretrained(stock(trained / "base"), exported / "adapter"),
                tokenizer,
                "Hello.",
                20,
            ),
            expected,
            "the adapter",
            exported,
        )
        < 1e-6
    )
    assert (
        compare(
            answers(stock(exported / "merged"), tokenizer, "Hello.", 20),
            expected,
            "the merged model",
            exported,
        )
        < 1e-4
    )
    with pytest.raises(CheckpointError, match="another model"):
        compare(
            answers(stock(trained / "base"), tokenizer, "Hello.", 20),
            expected,
            "the base",
            exported,
        )
    assert higgs_validate([str(exported)]) == 0
    card = ModelCard.load(exported / "merged" / "README.md")
    run = json.loads((trained / "run.json").read_text())
    assert (
        card.data.pipeline_tag == "text-to-speech"
        and f"{run['held_out_audio_loss']['after']:.4f}" in card.text
        and run["verdict"] in card.text
    )


def test_a_weight_that_changed_after_the_merge_is_not_exported(trained, tmp_path):
    "Nor is one that does not reach the disk: in both cases nothing is left, hidden or not."
    model, tokenizer = (
        load_lora_adapters(load_model(str(trained / "base")), trained / "adapter"),
        AutoTokenizer.from_pretrained(trained / "base"),
    )
    expected, merged = answers(model, tokenizer, "Hello.", 20), merge_lora(model)
    with torch.no_grad():
        merged.model.layers[0].mlp.down_proj.weight[3] += 0.1
    with pytest.raises(CheckpointError, match="the model to export is another model"):
        export_model(
            merged,
            tmp_path / "merged",
            tokenizer,
            "",
            expected=expected,
            text="Hello.",
            max_frames=20,
        )
    merged = merge_lora(model)
    merged.text_lm_head._register_state_dict_hook(
        lambda module, state, prefix, meta: state.update(
            {f"{prefix}weight": -state[f"{prefix}weight"]}
        )
    )
    with pytest.raises(CheckpointError, match="what was saved is another model"):
        export_model(merged, tmp_path / "merged", tokenizer, "", text="Hello.", max_frames=20)
    assert not list(tmp_path.iterdir())


def test_validator_sees_a_flipped_byte(trained, tmp_path, capsys):
    broken = tmp_path / "adapter"
    shutil.copytree(trained / "adapter", broken)
    weights = broken / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert higgs_validate([str(broken)]) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_of_training_runs(prepared, tmp_path):
    """Two ranks, and the notebook that compares them: a table with the losses, the better first,
    and curves.
    """
    small = dict(data=str(prepared), steps=2, warmup=1, max_clips=4, speak=0, token_budget=512)
    (tmp_path / "ranks.yaml").write_text(
        json.dumps(
            dict(run="train", out=str(tmp_path / "ranks"), parameters=small, grid=dict(rank=[2, 4]))
        )
    )
    assert higgs_sweep([str(tmp_path / "ranks.yaml"), "--jobs", "2"]) == 0
    better, worse = json.loads((tmp_path / "ranks" / "compare" / "compare.json").read_text())
    assert better["held_out_audio_loss.after"] <= worse["held_out_audio_loss.after"] and {
        better["run"],
        worse["run"],
    } == {"rank=2", "rank=4"}
    assert (
        higgs_validate([str(tmp_path / "ranks" / "rank=2"), str(tmp_path / "ranks" / "rank=4")])
        == 0
    )
    shown = [
        o.data
        for c in nbformat.read(tmp_path / "ranks" / "compare" / "compare.ipynb", 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if "data" in o
    ]
    assert any(
        "| rank | held_out_audio_loss.after |" in d.get("text/markdown", "") for d in shown
    ) and any("image/png" in d for d in shown)


@pytest.mark.slow
def test_killed_three_times_at_random_moments(prepared, tmp_path):
    """Called again, it ends with exit code 0 and, to the bit, the adapter of a run that nobody
    disturbed.
    """
    given = dict(
        data=prepared,
        steps=12,
        save_every=1,
        eval_every=12,
        warmup=1,
        max_clips=4,
        speak=0,
        token_budget=512,
    )

    def command(out):
        return [
            Path(sys.executable).with_name("higgs_run"),
            "train",
            "--out",
            out,
            *[x for key, value in given.items() for x in ("-p", f"{key}={value}")],
        ]

    start = time.monotonic()
    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    moments = [random.uniform(0, 0.6 * (time.monotonic() - start)) for _ in range(3)]
    for moment in moments:
        process = subprocess.Popen(
            command(tmp_path / "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moment)
        process.kill()
        process.wait()
    process = subprocess.Popen(
        command(tmp_path / "cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / "cut/adapter").is_dir():
        time.sleep(0.05)
    process.kill()  # once more, when the adapter is saved and the run is not yet done
    process.wait()
    last = subprocess.run(command(tmp_path / "cut"), capture_output=True, text=True)
    assert last.returncode == 0, f"killed after {moments} s: {last.stderr}"
    adapters = [
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("whole", "cut")
    ]
    assert adapters[0] == adapters[1], f"killed after {moments} s"
    assert higgs_validate([str(tmp_path / "cut")]) == 0


def test_a_second_run_keeps_the_first(prepared, trained):
    "The same directory again: the results of the first are moved aside, whole."
    first = (trained / "run.json").read_bytes()
    given = [
        x
        for key, value in given_to_train(prepared, steps=2, max_clips=4, speak=0, table=0).items()
        for x in ("-p", key, str(value))
    ]
    assert higgs_run(["train", "--out", str(trained), *given]) == 0
    assert (trained / "earlier-1" / "run.json").read_bytes() == first
    assert higgs_validate([str(trained / "earlier-1")]) == 0 and higgs_validate([str(trained)]) == 0


@pytest.mark.parametrize(
    "given, code, said",
    [
        (["-p", "data", "nowhere"], 1, "nowhere"),  # the run fails, and says why
        (["-p", "max_duration_s", "5", "-p", "steps", "1"], 1, "limit"),
        (["-p", "learning_rte", "1"], 2, "did you mean 'learning_rate'"),  # the run does not start
        (["-p", "steps=many"], 2, "takes steps as int"),
        (["-f", "nowhere.yaml"], 2, "nowhere.yaml"),
    ],
)
def test_a_run_that_cannot_work(given, code, said, tmp_path, capsys):
    assert higgs_run(["train", "--out", str(tmp_path / "run"), *given]) == code
    assert said in capsys.readouterr().err


def test_plain_papermill_meets_a_misspelt_parameter(tmp_path):
    "papermill only warns; the notebook ends in its first cell, before it makes anything."
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'learning_rate'"):
        papermill.execute_notebook(
            RUNS["train.ipynb"],
            tmp_path / "train.ipynb",
            parameters=dict(learning_rte=1, out=str(tmp_path / "run")),
            cwd=tmp_path,
            progress_bar=False,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["train.ipynb"]


def test_no_two_runs_in_a_directory_and_none_among_the_sources(tmp_path, capsys):
    with multiprocessing.get_context("spawn").Pool(1) as other:
        other.apply(occupy, [tmp_path])
        (tmp_path / "STOP").touch()  # meant for the run that goes on
        assert (
            higgs_run(["train", "--out", str(tmp_path)]) == 2
            and "a run goes on" in capsys.readouterr().err
        )
    assert (
        higgs_run(["train", "--out", str(ROOT / "nbs" / "runs" / "mine")]) == 2
        and "among the sources" in capsys.readouterr().err
    )
    assert [p.name for p in tmp_path.iterdir()] == ["STOP"] and not (
        ROOT / "nbs" / "runs" / "mine"
    ).exists()


def test_two_output_directories(tmp_path, capsys):
    assert (
        higgs_run(["train", "--out", str(tmp_path / "one"), "-p", f"out={tmp_path / 'two'}"]) == 2
    )
    assert "leave one out" in capsys.readouterr().err and not list(tmp_path.iterdir())
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert (
        higgs_run(["train", "-p", f"out={taken}"]) == 2
        and f"{taken} is a file" in capsys.readouterr().err
    )  # it is where the run would go


def test_output_directory_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert higgs_run(["train", "--out", str(tmp_path / "taken")]) == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"
