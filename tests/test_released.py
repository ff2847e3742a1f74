"""The released configuration, whole, with random weights: 5.8 billion parameters are loaded,
adapted, trained, killed, taken up again, and speak. Takes some seven minutes of one core, a
machine with 24 GB of memory, and 14 GB of disk: `make test-released`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resume_job import Melodies, log, sentence
from safetensors.torch import save_file
from transformers import HiggsAudioV2Config

from higgs_nb.checkpoint.repair import main as higgs_validate
from higgs_nb.checkpoint.validate import list_checkpoints
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import apply_lora, create_lora_config
from higgs_nb.model.model import HiggsAudioForTraining, tiny_config
from higgs_nb.speech.generate import generate_speech
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.callbacks import Callback
from higgs_nb.training.loop import HiggsTrainer

pytestmark = [pytest.mark.released, pytest.mark.timeout(7200)]
SHARD = 2 * 10**9  # bytes


def write_base(folder: Path):
    """A checkpoint of the released sizes, in bfloat16 and several files; only the special tokens
    are those of another tokenizer.
    """
    ids = {
        k: v for k, v in tiny_config(byte_tokenizer()).to_dict().items() if k.endswith("_token_id")
    }
    config = HiggsAudioV2Config(codebook_size=1026, **ids)
    with torch.device("meta"):
        model = HiggsAudioForTraining(config)
    assert (
        config.vocab_size == 128256 and 5.7e9 < sum(p.numel() for p in model.parameters()) < 5.9e9
    )
    config.architectures, config.dtype = ["HiggsAudioV2ForConditionalGeneration"], "bfloat16"
    config.save_pretrained(folder)
    generator, files, names, size = torch.Generator().manual_seed(0), [], {}, 0

    def flush():
        nonlocal size
        if not names:
            return
        files.append([*names])
        save_file(names, folder / f"model-{len(files)}.safetensors", {"format": "pt"})
        names.clear()
        size = 0

    for name, p in model.state_dict().items():
        names[name] = (
            torch.ones(p.shape, dtype=torch.bfloat16)
            if p.dim() == 1
            else torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        )
        size += names[name].nbytes
        if size > SHARD:
            flush()
    flush()
    where = {name: f"model-{i + 1}.safetensors" for i, group in enumerate(files) for name in group}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(dict(metadata={}, weight_map=where))
    )


def train(base, folder, resume=None, die_at=None):
    "Four steps of an adapter on all matrices; `die_at`: ends the process at once after that step."

    class Die(Callback):
        def on_step_begin(self, trainer):
            if trainer.state.global_step == die_at:
                while not (Path(folder) / f"checkpoint-{die_at}").exists():
                    time.sleep(0.1)
                os._exit(9)

    tokenizer, began = byte_tokenizer(), time.time()

    def note(what):
        print(f"{time.time() - began:6.0f} s: {what}", file=sys.stderr, flush=True)

    model = load_model(base)
    note("loaded")
    torch.manual_seed(0)
    model = apply_lora(model, create_lora_config("all", r=16, train=("audio_lm_head",)))
    tokens = AudioTokens.from_config(model.config, tokenizer)
    data, held = (
        SampleDataset([sentence(n) for n in lengths], tokenizer, Melodies(), tokens)
        for lengths in (range(20, 60, 4), [30])
    )
    args = HiggsTrainingArguments(
        folder,
        token_budget=256,
        learning_rate=1e-3,
        max_steps=4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        probe="warn",
        gradient_checkpointing=True,
    )
    trainer = HiggsTrainer(model, args, data, held, callbacks=[Die()])
    trainer.train(resume)
    note("trained")
    [speech] = generate_speech(model.eval(), tokenizer, ["La la."], max_frames=12)
    assert speech.codes.shape[0] == 8 and speech.codes.max() < 1024
    note(f"spoke {speech.codes.shape[1]} frames")


def test_the_whole_way(tmp_path):
    write_base(tmp_path)

    def run(name, **how):
        code = (
            f"from test_released import train; train({str(tmp_path)!r}, "
            f"{str(tmp_path / name)!r}, **{how!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        print(name, how, *[line for line in done.stderr.splitlines() if " s: " in line], sep="\n")
        return done

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert run("cut", die_at=2).returncode == 9
    again = run("cut", resume="auto")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming from" in again.stderr + again.stdout
    entries = log(tmp_path / "whole")
    print(*entries, sep="\n")
    assert entries == log(tmp_path / "cut") and len(entries) > 4
    for name in ("whole", "cut"):
        assert [r.step for r in list_checkpoints(tmp_path / name)] == [2, 4] and higgs_validate(
            [str(tmp_path / name)]
        ) == 0
    a, b = (
        (tmp_path / name / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert a == b
