"""Audio self-attention and the Whisper tower from a checkpoint without them to a trained adapter,
and back in another process.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HiggsAudioV2ForConditionalGeneration, WhisperConfig, WhisperModel

from higgs_nb.checkpoint.adapter import adapter_tensors, load_lora_adapters, save_lora_adapters
from higgs_nb.checkpoint.base import describe_base
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.data.collator import PackedCollator
from higgs_nb.data.conversation import Conversation
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.data.samples import encode_conversation, expand
from higgs_nb.data.whisper_inputs import whisper_extractor
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import apply_lora, create_lora_config
from higgs_nb.model.model import tiny_model
from higgs_nb.speech.generate import generate_speech
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.loop import HiggsTrainer

SIZE = dict(hidden_size=64, num_layers=2, intermediate_size=96, codebook_size=34)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base checkpoint as transformers would have it, and a Whisper checkpoint."
    folder = tmp_path_factory.mktemp("parts")
    tiny_model(byte_tokenizer(), **SIZE).save_pretrained(folder / "base")
    torch.manual_seed(0)
    WhisperModel(
        WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=60,
            num_mel_bins=8,
            max_source_positions=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).save_pretrained(folder / "whisper")
    return folder


def batch_of(model, features=0):
    "Two samples in a row, and `features` places for a recording that is heard before the first."
    tokenizer = byte_tokenizer()
    tokens = AudioTokens.from_config(model.config, tokenizer)
    generator, samples = torch.Generator().manual_seed(0), []
    for frames in (6, 11):
        talk = Conversation.from_dict(
            dict(
                messages=[
                    dict(role="user", content="Hi."),
                    dict(role="assistant", content={"type": "audio", "path": "a"}),
                ]
            ),
            id="a",
        )
        samples.append(
            expand(
                encode_conversation(
                    talk, tokenizer, [torch.randint(0, 32, (8, frames), generator=generator)]
                ),
                tokens,
            )
        )
    more = torch.full((features,), tokens.audio_in)
    samples[0].input_ids = torch.cat([more, samples[0].input_ids])
    samples[0].labels = torch.cat([torch.full_like(more, -100), samples[0].labels])
    batch = PackedCollator(tokens)(samples)
    if features:
        mask = torch.zeros(1, 100, dtype=torch.long)
        mask[:, : 4 * features] = 1
        batch |= dict(
            audio_features=torch.randn(1, 8, 100, generator=generator),
            audio_feature_attention_mask=mask,
        )
    return batch


def outputs(model, batch):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return base.audio_logits(base.hidden(**batch))


def wanted(folder):
    return dict(use_audio_out_self_attention=True, whisper=str(folder / "whisper"))


def test_new_modules_travel_with_the_adapter(folder):
    "Twenty steps, saved, loaded in a new process: the same logits. The base alone is refused."
    model = load_model(folder / "base", **wanted(folder))
    batch = batch_of(model, features=10)
    adapted = apply_lora(model, create_lora_config("all", r=4))
    before = outputs(adapted.eval(), batch)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=3e-3)
    adapted.train()
    for _ in range(20):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    after = outputs(adapted.eval(), batch)
    assert (after - before).abs().max() > 0.1
    names = adapter_tensors(adapted)
    for part in (
        "audio_attn.o_proj",
        "audio_post_audio_attn_layer_norm",
        "audio_encoder_proj.linear",
    ):
        assert any(part in n for n in names), part
    save_lora_adapters(adapted, folder / "adapter", base=describe_base(adapted))
    torch.save(after, folder / "after.pt")
    program = f"""
import torch
from test_model_parts import *
folder = Path({str(folder)!r})
model = load_lora_adapters(load_model(folder / "base", **wanted(folder)), folder / "adapter").eval()
print(torch.equal(outputs(model, batch_of(model.get_base_model(), features=10)), torch.load(folder / "after.pt")))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.stdout.strip() == "True", run.stderr
    with pytest.raises(CheckpointError, match="use_audio_out_self_attention"):
        load_lora_adapters(load_model(folder / "base"), folder / "adapter")


def test_step_zero_is_the_stock_model(folder):
    """Switched on, no logit differs; switched off, stock transformers loads what is saved, bit for
    bit.
    """
    ours, wide = (
        load_model(folder / "base").eval(),
        load_model(folder / "base", use_audio_out_self_attention=True).eval(),
    )
    batch = batch_of(ours)
    assert (outputs(wide, batch) - outputs(ours, batch)).abs().max() == 0
    ours.save_pretrained(folder / "again")
    assert "use_audio_out_self_attention" not in json.loads(
        (folder / "again" / "config.json").read_text()
    )
    stock = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder / "again", use_text_head=True
    ).eval()
    inputs = {k: batch[k] for k in ("input_ids", "audio_input_ids", "audio_input_ids_mask")}
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, ours(**inputs).logits)


def test_additions_are_announced(folder, caplog):
    load_model(folder / "base")
    assert not caplog.messages
    model = load_model(folder / "base", **wanted(folder))
    added = sum(p.numel() for n, p in model.named_parameters() if "audio_attn" in n)
    assert any(f"adds {added:,} parameters" in m for m in caplog.messages) and any(
        "Whisper tower: on" in m for m in caplog.messages
    )


def test_no_attention_across_samples(folder):
    "Other codes in the first sample change nothing in the second."
    model = load_model(folder / "base", use_audio_out_self_attention=True).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.audio_attn.o_proj.weight, std=0.3)
    batch = batch_of(model)
    other = batch | dict(audio_input_ids=batch["audio_input_ids"].clone())
    first = batch["frame_lengths"][0]
    other["audio_input_ids"][:, :first] = 5
    a, b = outputs(model, batch), outputs(model, other)
    border = batch["lengths"][0]
    assert not torch.equal(a[:border], b[:border]) and torch.equal(a[border:], b[border:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(folder, attention):
    "The packed row through the library's masks and through SDPA by sample."
    kwargs = dict(use_audio_out_self_attention=True, whisper=str(folder / "whisper"))
    reference, model = (
        load_model(folder / "base", **kwargs).eval(),
        load_model(folder / "base", attn_implementation=attention, **kwargs).eval(),
    )
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    for m in (reference, model):
        torch.manual_seed(0)
        for layer in m.model.layers:
            torch.nn.init.normal_(layer.audio_attn.o_proj.weight, std=0.3)
    batch = batch_of(model, features=10)
    assert (outputs(model, batch) - outputs(reference, batch)).abs().max() < 1e-5


def test_gradient_checkpointing(folder):
    "The same gradients with activations computed again."
    model = load_model(folder / "base", use_audio_out_self_attention=True).train()
    batch, norms = batch_of(model), []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=dict(use_reentrant=False)
            )
        model.zero_grad()
        model(**batch).loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.model.layers.parameters()]))
    assert torch.allclose(*norms, rtol=1e-5)


class Melody:
    "Codes of a recording, by its name: the same whenever they are asked for."

    def get(self, audio):
        return torch.randint(
            0, 32, (8, 9), generator=torch.Generator().manual_seed(len(audio.path))
        )


def dataset_of(config, folder, hear=True, **options):
    """Six conversations; in every other one a recording is heard: of 0.3, 1.2 and 2.5 s, in up to
    three chunks of a window of one second.
    """
    folder.mkdir(exist_ok=True)
    talks, audio = [], lambda path: {"type": "audio", "path": str(path)}
    for i in range(6):
        path = folder / f"heard{'x' * i}.wav"
        soundfile.write(
            path,
            np.sin(np.arange(int((0.3, 0, 1.2, 0, 2.5, 0)[i] * 24000) + 24) / (5 + i)).astype("f4"),
            24000,
        )
        prompt = ["Like this:", audio(path)] if hear and i % 2 == 0 else "Hi."
        talks.append(
            Conversation.from_dict(
                dict(
                    messages=[
                        dict(role="user", content=prompt),
                        dict(role="assistant", content=audio("out" + "y" * i)),
                    ]
                ),
                id=str(i),
            )
        )
    tokenizer = byte_tokenizer()
    return SampleDataset(
        talks, tokenizer, Melody(), AudioTokens.from_config(config, tokenizer), **options
    )


def heard_batch(config, folder):
    "Every conversation of `dataset_of`, in one packed row."
    data = dataset_of(config, folder, extractor=whisper_extractor(config))
    return PackedCollator(data.tokens, data.extractor)([data[i] for i in range(len(data))])


@pytest.mark.parametrize("codes", [True, False])
def test_training_with_a_tower(folder, tmp_path, codes):
    """The trainer's own batches, made by two workers: the projector learns, and the checkpoint
    gives the same logits in a new process.
    """
    model = load_model(folder / "base", whisper=str(folder / "whisper"))
    data = dataset_of(
        model.config,
        tmp_path / "wav",
        extractor=whisper_extractor(model.config),
        audio_in_codes=codes,
    )
    adapted = apply_lora(model, create_lora_config("all", r=4))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    args = HiggsTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        token_budget=300,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=4,
        dataloader_num_workers=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = HiggsTrainer(adapted, args, data)
    batches = list(trainer.get_train_dataloader())
    assert sum(len(b["audio_features"]) for b in batches) == 1 + 2 + 3 and all(
        {"whisper_rows", "feature_rows"} <= b.keys() for b in batches
    )
    trainer.train()
    projector = [
        n for n, p in adapted.named_parameters() if "audio_encoder_proj" in n and p.requires_grad
    ]
    assert len(projector) == 2 and not any(
        torch.equal(adapted.get_parameter(n), before[n]) for n in projector
    )
    assert all(
        torch.equal(p, before[n]) for n, p in adapted.named_parameters() if "audio_tower" in n
    )
    batch = heard_batch(model.config, tmp_path / "wav")
    logits = outputs(adapted.eval(), batch)
    torch.save(logits, tmp_path / "logits.pt")
    program = f"""
import torch
from test_model_parts import *
run = Path({str(tmp_path)!r})
model = load_lora_adapters(load_model({str(folder / "base")!r}, whisper={str(folder / "whisper")!r}), run / "run" / "checkpoint-4").eval()
print(torch.equal(outputs(model, heard_batch(model.get_base_model().config, run / "wav")), torch.load(run / "logits.pt")))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.stdout.strip() == "True", run.stderr
    assert not torch.equal(
        outputs(adapted, batch | dict(audio_features=-batch["audio_features"])), logits
    )


def test_a_batch_that_hears_nothing(folder, tmp_path):
    """Every trainable parameter of tower and projector has a gradient, and it is zero: ranks that
    train together all have the same ones.
    """
    model = load_model(folder / "base", whisper=str(folder / "whisper")).train()
    data = dataset_of(model.config, tmp_path, hear=False, extractor=whisper_extractor(model.config))
    model(**PackedCollator(data.tokens, data.extractor)([data[0], data[1]])).loss.backward()
    parts = [
        p
        for part in (model.audio_tower, model.audio_encoder_proj)
        for p in part.parameters()
        if p.requires_grad
    ]
    assert parts and all(p.grad is not None and not p.grad.any() for p in parts)


def test_a_tower_and_its_data_have_to_fit(folder, tmp_path, caplog):
    """Waveforms that nobody hears, and a tower that hears nothing, are errors; data without a
    recording in any prompt is announced.
    """

    def args():
        return HiggsTrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True)

    def trainer(tower, **options):
        model = load_model(
            folder / "base", **(dict(whisper=str(folder / "whisper")) if tower else {})
        )
        data = dataset_of(
            model.config,
            tmp_path / "wav",
            **{k: v(model.config) if callable(v) else v for k, v in options.items()},
        )
        return HiggsTrainer(apply_lora(model, create_lora_config("all", r=4)), args(), data)

    with pytest.raises(ValueError, match="the dataset gives it no waveforms"):
        trainer(True)
    hears = load_model(folder / "base", whisper=str(folder / "whisper")).config
    with pytest.raises(ValueError, match="the model has no Whisper tower"):
        trainer(False, extractor=lambda _: whisper_extractor(hears))
    trainer(True, extractor=whisper_extractor, hear=False)
    assert any("none of the 6 conversations has a recording to hear" in m for m in caplog.messages)


def test_generation_hears(folder, tmp_path):
    """What is heard in a prompt reaches generation through the tower: with and without cache the
    same, and with another recording not.
    """
    model = load_model(folder / "base", whisper=str(folder / "whisper")).eval()
    torch.manual_seed(0)
    for part in (model.audio_encoder_proj, *model.model.layers):
        for p in part.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.2)  # a model that listens
    model.audio_lm_head.weight.data.view(8, 34, -1)[:, 32:] = 0  # and speaks on
    data = dataset_of(model.config, tmp_path)
    said = [
        generate_speech(
            model,
            data.tokenizer,
            [data.conversations[0]],
            store=Melody(),
            max_frames=12,
            use_cache=cache,
        )[0].codes
        for cache in (True, False)
    ]
    assert said[0].shape[1] and torch.equal(*said)
    soundfile.write(
        data.conversations[0].audio[0].path,
        np.random.default_rng(0).normal(size=7000).astype("f4") / 9,
        24000,
    )
    assert not torch.equal(
        generate_speech(
            model, data.tokenizer, [data.conversations[0]], store=Melody(), max_frames=12
        )[0].codes,
        said[0],
    )
