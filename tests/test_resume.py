"""A run that was cut off goes on to the bit; one that is asked to stop saves first; one that
cannot save says so. One process; test_ranks.py has several.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from resume_job import log, make_trainer, run, said, table, train, whole_state
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BitsAndBytesConfig, WhisperFeatureExtractor

from higgs_nb.checkpoint.adapter import adapter_tensors, load_lora_adapters, save_lora_adapters
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.repair import main as higgs_validate
from higgs_nb.checkpoint.validate import list_checkpoints
from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.model.load import load_model
from higgs_nb.model.merge import merge_lora
from higgs_nb.training.callbacks import Callback, EarlyStoppingCallback, Preempted
from higgs_nb.training.identity import describe_data, differences
from higgs_nb.training.loop import HiggsTrainer

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """40 steps without interruption: two micro-batches each, dropout on, 5 steps an epoch, the
    last of them with one micro-batch.
    """
    folder = tmp_path_factory.mktemp("resume") / "whole"
    assert run(folder) == [0], said(folder)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    "13 steps, a checkpoint, three more steps, and a kill in the middle of the next."
    folder = tmp_path_factory.mktemp("resume") / "cut"
    assert run(folder, save_steps=13, die=(16, KILL)) == [-KILL], said(folder)
    return folder


def same_run(folder, whole):
    """Losses, adapter, optimizer, generators and sums at step 40 are those of the run without
    interruption, to the bit.
    """
    assert log(folder) == log(whole) and table(folder) == table(whole)
    assert whole_state(folder / "checkpoint-40") == whole_state(whole / "checkpoint-40")


def test_13_kill_27(whole, cut, tmp_path):
    folder = shutil.copytree(cut, tmp_path / "run")
    assert [entry["step"] for entry in log(folder)][-1] == 15, "it had logged beyond its checkpoint"
    assert run(folder, resume="auto") == [0], said(folder)
    assert f"resuming from {folder}/checkpoint-13" in said(folder)
    same_run(folder, whole)


def test_7_9_24(whole, tmp_path):
    """A kill in the middle of step 8, and a SIGUSR1 in the middle of step 16, after which it is
    saved.
    """
    assert run(tmp_path, save_steps=7, die=(7, KILL)) == [-KILL]
    assert run(tmp_path, resume="auto", die=(15, USR1)) == [75], said(tmp_path)
    assert [r.step for r in list_checkpoints(tmp_path)] == [7, 16] and higgs_validate(
        [str(tmp_path)]
    ) == 0
    assert "step 16: SIGUSR1: saving a checkpoint and stopping" in said(tmp_path)
    assert run(tmp_path, resume="auto") == [0], said(tmp_path)
    same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "more", [dict(), dict(own_optimizer=True, bf16=True)], ids=["AdamW", "own optimizer, bfloat16"]
)
def test_a_model_without_an_adapter(tmp_path, more):
    "6 steps = 3, a kill, and 3, to the bit; what it saves is a model that loads by itself."
    settings = dict(adapter=None, max_steps=6, save_steps=3, **more)
    whole = train(tmp_path / "whole", **settings)
    assert run(tmp_path / "cut", die=(3, KILL), **settings) == [-KILL], said(tmp_path / "cut")
    train(tmp_path / "cut", resume="auto", **settings)
    assert log(tmp_path / "cut") == log(tmp_path / "whole") and whole_state(
        tmp_path / "cut" / "checkpoint-6"
    ) == whole_state(tmp_path / "whole" / "checkpoint-6")
    whole.save_adapter(tmp_path / "model")
    assert (
        all(r.whole for folder in ("whole", "cut") for r in list_checkpoints(tmp_path / folder))
        and higgs_validate([str(tmp_path / "model")]) == 0
    )
    first, last = (
        load_model(str(tmp_path / name)).state_dict() for name in ("whole/checkpoint-3", "model")
    )
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, last[name]) and torch.equal(p, first[name]) == (
            name == "model.embed_tokens.weight"
        ), name
    with pytest.raises(
        CheckpointError, match="adapter.settings: no adapter, the model itself then"
    ):
        make_trainer(tmp_path / "other", max_steps=6).train(tmp_path / "cut" / "checkpoint-3")


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert run(folder, resume="auto") == [0], said(folder)
    same_run(folder, whole)


def test_a_broken_checkpoint_is_passed_over(whole, cut, tmp_path):
    "Whoever resumes hears which, and why; named itself, it is refused."
    folder = shutil.copytree(cut, tmp_path / "run")
    broken = shutil.copytree(folder / "checkpoint-13", folder / "checkpoint-14")
    data = bytearray((broken / "training_state.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "training_state.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="training_state.safetensors"):
        make_trainer(folder).train(broken)
    assert run(folder, resume="auto") == [0]
    assert f"passed over: corrupt: {broken}" in said(
        folder
    ) and "training_state.safetensors: other content than was saved" in said(folder)
    same_run(folder, whole)


def test_nothing_in_a_checkpoint_can_run_code(whole):
    assert {f.suffix for f in (whole / "checkpoint-40").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(frames=range(20, 58, 2)), r"data.samples: 20 then, 19 here"),
        (dict(frames=range(22, 62, 2)), r"data.sha256"),
        (dict(held_out=(21,)), r"held_out_data.samples: 5 then, 1 here"),
        (
            dict(model=dict(intermediate_size=64)),
            r"model.config.intermediate_size: 48 then, 64 here",
        ),
        (dict(adapter=dict(r=8)), r"adapter.settings.r: 4 then, 8 here"),
        (dict(dtype="bfloat16"), r"precision.base: torch.float32 then, torch.bfloat16 here"),
        (dict(bf16=True), r"precision.computed: no then, bf16 here"),
        (
            dict(learning_rate=1e-3, token_budget=300),
            r"settings.learning_rate: 0.003 then, 0.001 here; settings.token_budget: "
            r"220 then, 300 here",
        ),
    ],
)
def test_another_run_is_refused(cut, tmp_path, change, named):
    with pytest.raises(CheckpointError, match=named):
        make_trainer(tmp_path, **change).train(cut / "checkpoint-13")


def test_another_run_is_resumed_if_forced(cut, tmp_path, caplog):
    trainer = make_trainer(tmp_path, frames=range(20, 58, 2), max_steps=15)
    assert trainer.train(cut / "checkpoint-13", resume_force=True).global_step == 15
    assert (
        "this run ends at step 15, the checkpoint's was to end at 40, and its learning "
        "rate (linear) follows the schedule of 15 steps" in caplog.text
    )


def test_data_is_another_if_it_is_heard_otherwise(tmp_path):
    data = make_trainer(tmp_path).train_dataset
    before, data.audio_in_codes = describe_data(data), False
    assert differences(before, describe_data(data)) == ["audio_in_codes: None then, False here"]
    data.audio_in_codes, data.extractor = True, WhisperFeatureExtractor(feature_size=128)
    heard, data.extractor = describe_data(data), WhisperFeatureExtractor(feature_size=80)
    assert differences(heard, describe_data(data)) == ["extractor.feature_size: 128 then, 80 here"]


def test_two_signals_end_at_once(cut, tmp_path):
    folder = shutil.copytree(cut, tmp_path / "run")
    assert run(folder, resume="auto", die=(20, TERM, 2)) == [-TERM]
    assert [r.step for r in list_checkpoints(folder)] == [13] and higgs_validate([str(folder)]) == 0


def test_a_stop_file(cut, tmp_path):
    folder = shutil.copytree(cut, tmp_path / "run")
    (folder / "STOP").touch()
    assert run(folder, resume="auto") == [75]
    assert (
        [r.step for r in list_checkpoints(folder)] == [13, 14]
        and not (folder / "STOP").exists()
        and f"found {folder}/STOP" in said(folder)
    )


def careless(folder):
    """A trainer whose adapter trains a module and the one inside it, both of that name;
    `apply_lora` would refuse.
    """
    trainer = make_trainer(folder / "any")
    base = trainer.model.unload()
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_audio_tokens"])
    )
    return HiggsTrainer(adapted, trainer.args, trainer.train_dataset, trainer.eval_dataset)


def unfrozen(folder):
    trainer = make_trainer(folder / "any")
    trainer.model.get_base_model().text_lm_head.weight.requires_grad_(True)
    return trainer


def on_a_file(folder):
    (folder / "any").write_text("mine")
    return make_trainer(folder / "any" / "run")


@pytest.mark.parametrize(
    "make, says",
    [
        (
            careless,
            (
                "could not be loaded on a fresh base",
                "KeyError",
                "{folder}/any",
                "MB free",
                "give full names in `modules_to_save`",
            ),
        ),
        (
            unfrozen,
            (
                "1 trained parameters belong to no adapter",
                "text_lm_head.weight",
                "name their modules in `modules_to_save`",
            ),
        ),
        (
            lambda folder: make_trainer(folder / "any", adapter=dict(init_lora_weights="pissa")),
            ("init_lora_weights='pissa' moved a part of the base's weights", "'gaussian'"),
        ),
        (
            on_a_file,
            (
                "could not save",
                "FileExistsError: [Errno 17]",
                "{folder}/any/run",
                "MB free",
                "choose another output directory",
            ),
        ),
        (
            lambda folder: make_trainer(folder / "any", save_total_limit=10**9),
            ("the run needs", "{folder}/any", "MB free", "free space on this disk"),
        ),
    ],
    ids=["no reload", "unfrozen", "pissa", "a file", "no room"],
)
def test_a_run_that_could_not_save_ends_before_step_1(tmp_path, make, says):
    "Type, message, path and what to do; nothing is left behind, not even a log."
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path).train()
    for part in says:
        assert part.format(folder=tmp_path) in str(caught.value), str(caught.value)
    assert not [p for p in tmp_path.glob("any/**/*") if p.is_file()]


def test_the_space_that_a_run_needs(whole, tmp_path):
    "`save_total_limit` + 2 checkpoints, each with the adapter and Adam's two moments."
    with pytest.raises(CheckpointError) as caught:
        make_trainer(tmp_path, save_total_limit=10**6 - 2).train()
    each = float(re.search(r"needs ([\d.,]+) MB", str(caught.value))[1].replace(",", ""))
    adapter, state = (
        load_file(whole / "checkpoint-40" / name)
        for name in ("adapter_model.safetensors", "training_state.safetensors")
    )
    assert each == sum(t.nbytes for t in adapter.values()) + sum(
        t.nbytes for name, t in state.items() if "/exp_avg" in name
    )


@pytest.mark.parametrize("policy, code, steps", [("stop", 1, [13]), ("warn", 0, [13, 39, 40])])
def test_a_save_that_fails(cut, tmp_path, policy, code, steps):
    """The disk is full when step 26 is saved, and has room again later if the run goes on. What was
    saved before stays; what went wrong is in the log, all of it.
    """
    folder = shutil.copytree(cut, tmp_path / "run")
    full = (26, 38 if policy == "warn" else 41)  # a save in the background may be late
    assert run(folder, resume="auto", save_steps=13, full=full, on_save_error=policy) == [code]
    assert [r.step for r in list_checkpoints(folder)] == steps and higgs_validate(
        [str(folder)]
    ) == 0
    for part in (
        "CheckpointError: checkpoint not saved",
        "Errno 27",
        f"{folder}/checkpoint-26",
        "MB free",
        "Traceback",
        "ulimit -f",
    ):
        assert part in said(folder), part


def test_the_best_checkpoint_stays_and_patience_is_remembered(tmp_path):
    """Where the highest loss is called the best, the first one stays it. Its checkpoint outlives
    newer ones, and a resumed run counts on the looks that brought nothing.
    """
    settings = dict(
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="audio_loss",
        greater_is_better=True,
        patience=[3],
    )
    assert run(tmp_path, die=(5, KILL), **settings) == [-KILL]
    trainer = train(tmp_path, resume="auto", **settings)
    losses = [entry["eval_audio_loss"] for entry in log(tmp_path) if "eval_audio_loss" in entry]
    assert max(losses[1:]) == losses[1] and trainer.state.global_step == 8, losses
    assert [r.step for r in list_checkpoints(tmp_path)] == [2, 8] and higgs_validate(
        [str(tmp_path)]
    ) == 0
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, best[name]) for name, tensor in adapter_tensors(trainer.model).items()
    )


def test_tensorboard(tmp_path):
    "The curves that accelerate's tracker writes are those of the log."
    train(tmp_path, max_steps=6, logging_steps=2, report_to="tensorboard")
    [events] = {p.parent for p in tmp_path.rglob("events.out.tfevents.*")}
    curves = EventAccumulator(str(events)).Reload()
    seen = {e.step: e.value for e in curves.Scalars("train/audio_loss")}
    assert (
        seen
        == pytest.approx({e["step"]: e["audio_loss"] for e in log(tmp_path) if "audio_loss" in e})
        and len(seen) == 3
    )
    assert {f"train/codebook_{k}" for k in range(8)} | {"eval/audio_loss"} <= {
        *curves.Tags()["scalars"]
    }


def test_checkpointed_activations_and_mixed_precision(tmp_path):
    """Activations computed anew give the same adapter; bfloat16 autocast trains, and goes on to
    the bit.
    """
    plain, again = (
        train(tmp_path / name, max_steps=4, adapter=dict(dropout=0.0), **args)
        for name, args in (("plain", {}), ("again", dict(gradient_checkpointing=True)))
    )
    assert again.model.get_base_model().is_gradient_checkpointing
    for a, b in zip(adapter_tensors(plain.model).values(), adapter_tensors(again.model).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for name in ("whole", "cut"):
        train(tmp_path / name, bf16=True, max_steps=6, save_steps=3)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train(tmp_path / "cut", resume="auto", bf16=True, max_steps=6)
    assert log(tmp_path / "cut") == log(tmp_path / "whole") and whole_state(
        tmp_path / "cut" / "checkpoint-6"
    ) == whole_state(tmp_path / "whole" / "checkpoint-6")


def test_what_is_missing_is_named(tmp_path):
    "Without them, options that need bitsandbytes or TensorBoard say so before the first step."
    code = """
import importlib.util, sys
true = importlib.util.find_spec
MISSING = ("bitsandbytes", "tensorboard", "tensorboardX")
importlib.util.find_spec = lambda name, *args: None if name in MISSING else true(name, *args)
from resume_job import make_trainer, train
from higgs_nb.model.load import load_model
from transformers import BitsAndBytesConfig
folder = sys.argv[1]
make_trainer(folder + "/any", adapter=None).model.save_pretrained(folder + "/base")
for what in (lambda: train(folder + "/optimizer", optim="adamw_bnb_8bit", max_steps=1), lambda: load_model(folder + "/base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
             lambda: make_trainer(folder + "/report", report_to="tensorboard")):
    try: what()
    except (ImportError, RuntimeError) as error: print(type(error).__name__, " ".join(str(error).split()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    said = done.stdout.splitlines()
    assert (
        len(said) == 3
        and "bitsandbytes" in said[0]
        and "bitsandbytes" in said[1]
        and "tensorboard" in said[2]
    ), done.stderr[-2000:]


without_bits = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="bitsandbytes is not installed: make test-bits"
)


@pytest.mark.bits
@without_bits
def test_an_optimizer_in_eight_bits(tmp_path):
    "Moments in eight bits are saved as they are: a run goes on to the bit."
    wide = dict(
        model=dict(hidden_size=128, intermediate_size=192),
        adapter=dict(r=32),
        optim="adamw_bnb_8bit",
        max_steps=6,
        save_steps=3,
    )  # smaller tensors keep float32
    trainer = train(tmp_path / "whole", **wide)
    assert any(
        v.dtype == torch.uint8
        for s in trainer.optimizer.state.values()
        for v in s.values()
        if torch.is_tensor(v)
    )
    train(tmp_path / "cut", **wide)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train(tmp_path / "cut", resume="auto", **wide)
    assert log(tmp_path / "cut") == log(tmp_path / "whole") and whole_state(
        tmp_path / "cut" / "checkpoint-6"
    ) == whole_state(tmp_path / "whole" / "checkpoint-6")


@pytest.mark.bits
@without_bits
@pytest.mark.parametrize(
    "bits",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_8bit=True),
    ],
    ids=["4 bits", "8 bits"],
)
def test_a_quantised_base(tmp_path, bits):
    """Only the decoder layers' matrices are quantised, so that a head can be trained in full; a
    run goes on to the bit, although it has evaluated meanwhile; the adapter loads on the base
    as it was, and on no other; and is not merged into rounded weights.
    """
    make_trainer(
        tmp_path / "any", model=dict(hidden_size=64, intermediate_size=128), adapter=None
    ).model.save_pretrained(tmp_path / "base")
    how = dict(bits, bnb_4bit_compute_dtype=torch.float32) if "load_in_4bit" in bits else bits
    settings = dict(
        base=tmp_path / "base", quantization=how, max_steps=6, save_steps=3, eval_steps=2
    )
    trainer = train(tmp_path / "whole", **settings)
    base = trainer.model.get_base_model()
    kinds = {
        name: type(m.base_layer).__name__
        for name, m in base.named_modules()
        if hasattr(m, "lora_A")
    }
    assert (
        set(kinds.values()) == {"Linear4bit" if "load_in_4bit" in bits else "Linear8bitLt"}
        and type(base.text_lm_head) is torch.nn.Linear
    )
    train(tmp_path / "cut", **settings)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train(tmp_path / "cut", resume="auto", **settings)
    assert log(tmp_path / "cut") == log(tmp_path / "whole") and whole_state(
        tmp_path / "cut" / "checkpoint-6"
    ) == whole_state(tmp_path / "whole" / "checkpoint-6")
    loaded = load_lora_adapters(
        load_model(str(tmp_path / "base"), quantization_config=BitsAndBytesConfig(**how)),
        tmp_path / "whole" / "checkpoint-6",
    )
    assert all(
        torch.equal(t, adapter_tensors(trainer.model)[name])
        for name, t in adapter_tensors(loaded).items()
    )
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_lora_adapters(load_model(str(tmp_path / "base")), tmp_path / "whole" / "checkpoint-6")
    with pytest.raises(ValueError, match="quantised base cannot take up"):
        merge_lora(loaded)


def newest(folder):
    return max((r.step for r in list_checkpoints(folder) if r.whole), default=0)


def cut_off(command, folder, number):
    """The exit code of a command that gets a signal when the run in `folder` has saved once more,
    and the step that it had reached.
    """
    before = newest(folder)
    with open(folder.parent / "said.txt", "a") as words:
        process = subprocess.Popen(command, stdout=words, stderr=words)
        while process.poll() is None and newest(folder) == before:
            time.sleep(0.05)
        process.send_signal(number)
        code = process.wait(120)
    time.sleep(
        2
    )  # the notebook's own process looks once a second whether the one that started it lives
    return code, newest(folder)


@pytest.mark.slow
def test_a_notebook_run_goes_on(tmp_path):
    """`higgs_run train`, killed, started again with the same parameters, asked to stop, and
    started again: each goes on from the last checkpoint, and in the end all is there.
    """
    corpus = json.loads((embedded_corpus() / "metadata.json").read_text())
    corpus["samples"] = [
        {
            **s,
            "audio_file": str(embedded_corpus() / s["audio_file"]),
            "split": "held_out" if i > 3 else "train",
        }
        for i, s in enumerate(corpus["samples"][:6])
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(corpus))
    small = dict(
        data=tmp_path / "metadata.json",
        allow_outside=True,
        steps=40,
        speak=0,
        table=0,
        token_budget=512,
        save_every=2,
        eval_every=20,
        warmup=1,
    )
    command = [
        Path(sys.executable).with_name("higgs_run"),
        "train",
        "--out",
        tmp_path / "run",
        *[x for key, value in small.items() for x in ("-p", key, str(value))],
    ]

    def words():
        return (tmp_path / "said.txt").read_text()

    code, saved = cut_off(command, tmp_path / "run", KILL)
    assert code == -KILL and 0 < saved < 40, words()
    code, stopped = cut_off(command, tmp_path / "run", TERM)
    assert code == 75 and saved < stopped < 40, words()
    assert (
        f"this run was cut off and goes on from {tmp_path}/run/checkpoint-{saved}" in words()
        and not (tmp_path / "run" / "run.json").exists()
    )
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert (
        f"this run was cut off and goes on from {tmp_path}/run/checkpoint-{stopped}"
        in last.stdout + last.stderr
    )
    assert [e["step"] for e in log(tmp_path / "run") if "eval_audio_loss" in e] == [0, 20, 40] and (
        tmp_path / "run" / "run.json"
    ).exists()
    assert (
        higgs_validate([str(tmp_path / "run")]) == 0
        and not (tmp_path / "run" / "earlier-1").exists()
        and not (tmp_path / "run" / "STOP").exists()
    )


def at_step(step, do):
    """A callback that does something with the output directory at the end of a step, after the
    trainer's own have looked.
    """

    class At(Callback):
        def on_step_end(self, trainer):
            if trainer.state.global_step == step:
                do(Path(trainer.args.output_dir))

    return At()


@pytest.mark.parametrize(
    "settings",
    [
        dict(
            eval_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            save_total_limit=2,
        ),
        dict(eval_strategy="no"),
        dict(eval_steps=6, metric_for_best_model="eval_audio_loss"),
    ],
    ids=["best", "plain", "metric"],
)
def test_a_step_is_saved_once(tmp_path, settings):
    "The end of a step and of an epoch may both ask for it."
    trainer = make_trainer(
        tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="epoch", **settings
    )
    trainer.train()
    steps = [r.step for r in list_checkpoints(tmp_path)]
    assert steps[-1] == trainer.state.max_steps and higgs_validate([str(tmp_path)]) == 0


def test_stopped_at_the_last_step_of_an_epoch(tmp_path):
    settings = dict(max_steps=-1, num_train_epochs=2, save_strategy="epoch", eval_strategy="no")
    epoch = -(
        -len(make_trainer(tmp_path / "any", **settings).get_train_dataloader()) // 2
    )  # of two micro-batches a step
    with pytest.raises(Preempted):
        make_trainer(
            tmp_path / "run",
            callbacks=[at_step(epoch - 1, lambda out: (out / "STOP").touch())],
            **settings,
        ).train()
    assert [r.step for r in list_checkpoints(tmp_path / "run")] == [epoch] and list_checkpoints(
        tmp_path / "run"
    )[0].whole


def test_a_directory_belongs_to_one_run(tmp_path):
    """A new run, and one that goes on from an older checkpoint, would come upon the checkpoints
    that are there: they are refused before the first step. Nothing is lost.
    """
    train(tmp_path, max_steps=4, save_steps=2)
    before = {p.name: whole_state(p) for p in tmp_path.glob("checkpoint-*")}
    for resume, sentence in (
        (None, "of an earlier run"),
        (tmp_path / "checkpoint-2", "checkpoint-4, newer than"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            train(tmp_path, resume=resume, max_steps=6, save_steps=3)
    assert {p.name: whole_state(p) for p in tmp_path.glob("checkpoint-*")} == before
    train(tmp_path, resume=True, max_steps=6, save_steps=3)
    assert [r.step for r in list_checkpoints(tmp_path)] == [2, 4, 6]


def test_a_best_checkpoint_that_could_not_be_saved(tmp_path):
    "The run ends as it would, with the model of its last step, and the log says so."
    settings = dict(
        max_steps=12,
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        on_save_error="warn",
        save_total_limit=3,
    )
    assert run(tmp_path, full=(4, 7), **settings) == [0], said(tmp_path)
    assert [r.step for r in list_checkpoints(tmp_path)] == [
        8,
        12,
    ] and "the model stays that of the last step" in said(tmp_path)


def test_early_stopping_is_the_end(tmp_path):
    """A run that stopped early does not train on when it is resumed, also if it was asked to stop
    in that step; unless it is forced to.
    """

    def stopping(folder, *callbacks):
        return make_trainer(
            folder,
            callbacks=[EarlyStoppingCallback(1), *callbacks],
            metric_for_best_model="eval_loss",
            greater_is_better=True,
            max_steps=20,
            eval_steps=4,
            save_steps=4,
        )

    whole = stopping(tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 8
    stopping(tmp_path / "asked", at_step(7, lambda out: (out / "STOP").touch())).train()
    again = stopping(tmp_path / "asked")
    again.train("auto")
    assert again.state.global_step == 8 and not (tmp_path / "asked" / "STOP").exists()
    assert all(
        torch.equal(t, adapter_tensors(whole.model)[name])
        for name, t in adapter_tensors(again.model).items()
    )
    on = stopping(tmp_path / "asked", at_step(9, lambda out: (out / "STOP").touch()))
    with pytest.raises(Preempted):
        on.train("auto", resume_force=True)
    assert on.state.global_step == 10  # asked to stop, not at its end
    on = stopping(tmp_path / "asked")
    on.train("auto")
    assert on.state.global_step == 12


def test_a_merged_adapter_is_not_saved(tmp_path):
    model = make_trainer(tmp_path / "any").model
    model.merge_adapter()
    with pytest.raises(CheckpointError, match="merged into the base"):
        save_lora_adapters(model, tmp_path / "adapter", base={})
    model.unmerge_adapter()
    save_lora_adapters(model, tmp_path / "adapter", base={})


BRIEF = dict(
    frames=range(20, 36, 2),
    held_out=(21, 29),
    token_budget=120,
    max_steps=4,
    save_steps=2,
    eval_steps=2,
    logging_steps=1,
    warmup_steps=1,
    probe="off",
)
WITH = [
    dict(text_loss_weight=0.5, audio_loss_weight=2.0),
    dict(text_loss_weight=0.0),
    dict(codebook_weights=[2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.0]),
    dict(label_smoothing_factor=0.1),
    dict(code_noise=0.2),
    dict(lr_scheduler_type="cosine"),
    dict(lr_scheduler_type="constant_with_warmup"),
    dict(lr_scheduler_type="inverse_sqrt"),
    dict(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs=dict(num_cycles=2)),
    dict(lr_scheduler_type="reduce_lr_on_plateau"),
    dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6),
    dict(max_grad_norm=0.0),
    dict(max_grad_norm=0.05),
    dict(gradient_accumulation_steps=1),
    dict(gradient_accumulation_steps=3, logging_steps=3),
    dict(dataloader_num_workers=1),
    dict(dataloader_num_workers=2, code_noise=0.1),
    dict(gradient_checkpointing=True),
    dict(bf16=True),
    dict(dtype="bfloat16", adapter=dict(train=("audio_lm_head", "model.embed_tokens"))),
    dict(adapter=dict(dropout=0.5)),
    dict(optim="adafactor"),
    dict(max_steps=-1, num_train_epochs=2.0),
]


@pytest.mark.parametrize("more", WITH, ids=lambda more: " ".join(f"{k}={more[k]}" for k in more))
def test_a_run_with_any_setting_goes_on_to_the_bit(tmp_path, more):
    "Half of a run and the rest in a new trainer, whatever the generators did in between."
    settings = {**BRIEF, **more}
    train(tmp_path / "whole", **settings)
    last = max(r.step for r in list_checkpoints(tmp_path / "whole"))
    assert last >= 4
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for report in list_checkpoints(tmp_path / "cut"):
        if report.step > 2:
            shutil.rmtree(report.path)
    torch.manual_seed(99)
    train(tmp_path / "cut", resume="auto", **settings)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    then, now = (whole_state(tmp_path / name / f"checkpoint-{last}") for name in ("whole", "cut"))
    assert now == then
