"""Audio self-attention and the Whisper tower from a checkpoint without them to a trained adapter, and back in another process."""
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration, WhisperConfig, WhisperModel

from higgs_nb.chatml import Conversation
from higgs_nb.checkpoint import CheckpointError, adapter_tensors, describe_base, load_lora_adapters, save_lora_adapters
from higgs_nb.collator import PackedCollator
from higgs_nb.lora import apply_lora, create_lora_config
from higgs_nb.model import load_model, tiny_model
from higgs_nb.samples import AudioTokens, byte_tokenizer, encode_conversation, expand

SIZE = dict(hidden_size=64, num_layers=2, intermediate_size=96, codebook_size=34)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A base checkpoint as transformers would have it, and a Whisper checkpoint."
    folder = tmp_path_factory.mktemp("parts")
    tiny_model(byte_tokenizer(), **SIZE).save_pretrained(folder / "base")
    torch.manual_seed(0)
    WhisperModel(WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                               vocab_size=60, num_mel_bins=8, max_source_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                               decoder_start_token_id=1)).save_pretrained(folder / "whisper")
    return folder


def batch_of(model, features=0):
    "Two samples in a row, and `features` places for a recording that is heard before the first."
    tokenizer = byte_tokenizer()
    tokens = AudioTokens.from_config(model.config, tokenizer)
    generator, samples = torch.Generator().manual_seed(0), []
    for frames in (6, 11):
        talk = Conversation.from_dict(dict(messages=[dict(role="user", content="Hi."), dict(role="assistant", content={"type": "audio", "path": "a"})]), id="a")
        samples.append(expand(encode_conversation(talk, tokenizer, [torch.randint(0, 32, (8, frames), generator=generator)]), tokens))
    more = torch.full((features,), tokens.audio_in)
    samples[0].input_ids = torch.cat([more, samples[0].input_ids])
    samples[0].labels = torch.cat([torch.full_like(more, -100), samples[0].labels])
    batch = PackedCollator(tokens)(samples)
    if features:
        mask = torch.zeros(1, 100, dtype=torch.long)
        mask[:, :4 * features] = 1
        batch |= dict(audio_features=torch.randn(1, 8, 100, generator=generator), audio_feature_attention_mask=mask)
    return batch


def outputs(model, batch):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad(): return base.audio_logits(base.hidden(**batch))


def wanted(folder): return dict(use_audio_out_self_attention=True, whisper=str(folder / "whisper"))


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
    for part in ("audio_attn.o_proj", "audio_post_audio_attn_layer_norm", "audio_encoder_proj.linear"): assert any(part in n for n in names), part
    save_lora_adapters(adapted, folder / "adapter", base=describe_base(adapted))
    torch.save(after, folder / "after.pt")
    program = f"""
import torch
from test_model_parts import *
folder = Path({str(folder)!r})
model = load_lora_adapters(load_model(folder / "base", **wanted(folder)), folder / "adapter").eval()
print(torch.equal(outputs(model, batch_of(model.get_base_model(), features=10)), torch.load(folder / "after.pt")))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
    with pytest.raises(CheckpointError, match="use_audio_out_self_attention"): load_lora_adapters(load_model(folder / "base"), folder / "adapter")


def test_step_zero_is_the_stock_model(folder):
    "Switched on, no logit differs; switched off, stock transformers loads what is saved, bit for bit."
    ours, wide = load_model(folder / "base").eval(), load_model(folder / "base", use_audio_out_self_attention=True).eval()
    batch = batch_of(ours)
    assert (outputs(wide, batch) - outputs(ours, batch)).abs().max() == 0
    ours.save_pretrained(folder / "again")
    assert "use_audio_out_self_attention" not in json.loads((folder / "again" / "config.json").read_text())
    stock = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder / "again", use_text_head=True).eval()
    inputs = {k: batch[k] for k in ("input_ids", "audio_input_ids", "audio_input_ids_mask")}
    with torch.no_grad(): assert torch.equal(stock(**inputs).logits, ours(**inputs).logits)


def test_additions_are_announced(folder, caplog):
    load_model(folder / "base")
    assert not caplog.messages
    model = load_model(folder / "base", **wanted(folder))
    added = sum(p.numel() for n, p in model.named_parameters() if "audio_attn" in n)
    assert any(f"adds {added:,} parameters" in m for m in caplog.messages) and any("Whisper tower: on" in m for m in caplog.messages)


def test_no_attention_across_samples(folder):
    "Other codes in the first sample change nothing in the second."
    model = load_model(folder / "base", use_audio_out_self_attention=True).eval()
    for layer in model.model.layers: torch.nn.init.normal_(layer.audio_attn.o_proj.weight, std=0.3)
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
    reference, model = load_model(folder / "base", **kwargs).eval(), load_model(folder / "base", attn_implementation=attention, **kwargs).eval()
    if attention == "sdpa": model.set_attn_implementation("sdpa")
    for m in (reference, model):
        torch.manual_seed(0)
        for layer in m.model.layers: torch.nn.init.normal_(layer.audio_attn.o_proj.weight, std=0.3)
    batch = batch_of(model, features=10)
    assert (outputs(model, batch) - outputs(reference, batch)).abs().max() < 1e-5


def test_gradient_checkpointing(folder):
    "The same gradients with activations computed again."
    model = load_model(folder / "base", use_audio_out_self_attention=True).train()
    batch, norms = batch_of(model), []
    for on in (False, True):
        if on: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.zero_grad()
        model(**batch).loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in model.model.layers.parameters()]))
    assert torch.allclose(*norms, rtol=1e-5)
