"""Higgs Audio V3, the second family: its rows and labels, its model against stock Qwen3, adapters,
checkpoints in the published form, and clips that are learned by heart and end by themselves.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_fused import traced
from transformers import Qwen3Model

from higgs_nb.checkpoint.adapter import load_lora_adapters, save_lora_adapters
from higgs_nb.core.files import load_json, write_json
from higgs_nb.data.audit import audit
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.delay import IGNORE, undelay
from higgs_nb.data.label_checks import LabelError
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset, sample_options
from higgs_nb.data.samples import encode_conversation, expand
from higgs_nb.family import HIGGS_V3
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import apply_lora, create_lora_config
from higgs_nb.model.merge import merge_lora
from higgs_nb.model.native import CODEC, COPIES, NATIVE, QWEN3_FIELDS, save_native
from higgs_nb.model.v3 import (
    HiggsAudioV3Config,
    HiggsAudioV3ForTraining,
    tiny_v3_config,
    tiny_v3_model,
)
from higgs_nb.speech.forced import speak_beside
from higgs_nb.speech.generate import generate_speech
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.callbacks import Callback, Preempted
from higgs_nb.training.loop import HiggsTrainer
from higgs_nb.training.probe import offset_probe
from higgs_nb.view.label_explorer import label_explorer
from higgs_nb.view.monitor import run_monitor
from higgs_nb.view.plots import plot_losses

TOKENIZER = byte_tokenizer(HIGGS_V3)
# the heads are together 128 wide and the rows 64, as in the released model (4096 and 2560)
SMALL = dict(hidden_size=64, num_layers=2, head_dim=32, intermediate_size=96, codebook_size=34)
TOKENS = AudioTokens.from_config(tiny_v3_config(TOKENIZER, **SMALL), TOKENIZER)
BOC, EOC = 32, 33
TABLE = "model.embed_audio_tokens"
VOICE = Audio("voice.wav")


class MadeUp:
    "A store of made-up codes, as many as the name of the recording says."

    def get(self, audio):
        frames = int(audio.path.split(".")[0].split("-")[-1]) if "-" in audio.path else 6
        seed = sum(map(ord, audio.path))
        return torch.randint(0, 32, (8, frames), generator=torch.Generator().manual_seed(seed))


def talk(text, frames, reference=False):
    "A conversation whose answer has so many frames."
    voice = ("Ref.", VOICE) if reference else None
    return tts_conversation(text, Audio(f"{text}-{frames}.wav"), id=text, reference=voice)


def sample(conversation):
    "A conversation as a sample, with codes of `MadeUp`."
    codes = [MadeUp().get(audio) for audio in conversation.audio]
    return expand(encode_conversation(conversation, TOKENIZER, codes), TOKENS, conversation.id)


TALKS = [talk("Hi", 3), talk("Good morning", 9, reference=True), talk("Yes", 12)]


@pytest.fixture
def model():
    return tiny_v3_model(TOKENIZER, **SMALL)


# rows and labels


def test_the_rows_of_three_frames_are_those_written_by_hand():
    conversation = tts_conversation("A", Audio("a.wav"), id="a")
    codes = torch.arange(24).view(8, 3)
    made = expand(encode_conversation(conversation, TOKENIZER, [codes]), TOKENS)
    B, E, no = BOC, EOC, IGNORE
    rows = [
        [0, B, B, B, B, B, B, B],
        [1, 3, B, B, B, B, B, B],
        [2, 4, 6, B, B, B, B, B],
        [E, 5, 7, 9, B, B, B, B],
        [E, E, 8, 10, 12, B, B, B],
        [E, E, E, 11, 13, 15, B, B],
        [E, E, E, E, 14, 16, 18, B],
        [E, E, E, E, E, 17, 19, 21],
        [E, E, E, E, E, E, 20, 22],
        [E, E, E, E, E, E, E, 23],
    ]
    assert made.audio_ids.tolist() == rows
    assert made.audio_labels.tolist() == [[no if c == B else c for c in row] for row in rows]
    names = TOKENIZER.convert_ids_to_tokens(made.input_ids.tolist())
    assert names == ["<|tts|>", "<|text|>", "A", "<|audio|>", *["<|await_audio|>"] * 10]
    assert (made.labels == no).all(), "no text is learned"
    back, stopped = undelay(made.audio_ids, B, E)
    assert torch.equal(back, codes) and stopped
    # the mark before the clip predicts its first row
    batch = PackedCollator(TOKENS)([made])
    assert batch["audio_rows"].tolist() == list(range(3, 13))
    assert batch["audio_targets"].tolist() == made.audio_labels.tolist()


def test_a_reference_is_read_and_not_learned():
    made = sample(TALKS[1])
    names = TOKENIZER.convert_ids_to_tokens(made.input_ids.tolist())
    assert names[:2] == ["<|tts|>", "<|ref_text|>"]
    mark = names.index("<|ref_audio|>")
    assert names[mark + 1 : mark + 14] == ["<|await_audio|>"] * 13
    assert names[mark + 14] == "<|text|>"
    assert (made.audio_labels[:13] == IGNORE).all()
    assert (made.audio_ids[:13] == sample(tts_conversation("", VOICE, id="v")).audio_ids).all()


@pytest.mark.parametrize("collate", (PackedCollator(TOKENS), PaddedCollator(TOKENS)))
def test_counts_follow_from_the_lengths_of_clips(collate):
    samples = [sample(t) for t in TALKS]
    batch = collate(samples)
    cells = audit(batch, TOKENIZER, TOKENS).cell_totals
    codes, ends, begins = 8 * (3 + 9 + 12), 3 * 28, 3 * 28
    assert cells["supervised"] == codes + ends
    assert cells["BOS"] + cells["delay padding"] == begins
    assert cells["reference"] == 8 * (6 + 7)
    assert "&lt;|tts|&gt;" in label_explorer(audit(batch, TOKENIZER, TOKENS)).still()
    eos = (batch["audio_targets"] == EOC).sum(0)
    assert eos.tolist() == [3 * (7 - k) for k in range(8)]


def test_the_audit_refuses_labels_that_cannot_be():
    def changed(cell, value):
        made = sample(TALKS[2])
        made.audio_labels = made.audio_labels.clone()
        made.audio_labels[cell] = value
        return PackedCollator(TOKENS)([made])

    audit(changed((0, 0), sample(TALKS[2]).audio_labels[0, 0]), TOKENIZER, TOKENS)
    for cell, value, problem in (
        ((0, 3), BOC, "is BOS, which opens a codebook and is never predicted"),
        ((18, 2), IGNORE, "codebook 2: 4 EOS labels, must be 5"),
        ((18, 6), IGNORE, "codebook 6: 0 EOS labels, must be one"),
        ((4, 2), IGNORE, "codebook 2: 16 labels, must be 17"),
    ):
        with pytest.raises(LabelError, match=problem):
            audit(changed(cell, value), TOKENIZER, TOKENS)


# the model


def reference_loss(model, batch):
    "The audio loss of a padded batch by stock Qwen3 and PyTorch's cross-entropy."
    names = ("input_ids", "audio_input_ids", "audio_input_ids_mask")
    embeds = model.model.embed(*(batch[name] for name in names))
    hidden = Qwen3Model.forward(
        model.model, inputs_embeds=embeds, attention_mask=batch["attention_mask"]
    ).last_hidden_state.flatten(0, 1)
    table = model.get_parameter(f"{TABLE}.weight")
    logits = F.linear(hidden[batch["audio_rows"]], table).view(-1, 8, 34)
    targets = batch["audio_targets"]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses.view_as(targets).sum(0) / (targets != IGNORE).sum(0)).mean()


def test_packed_padded_and_stock_agree_with_gradients(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    samples = [sample(t) for t in TALKS]
    padded, packed = PaddedCollator(TOKENS)(samples), PackedCollator(TOKENS)(samples)
    losses = [reference_loss(model, padded), model(**padded).loss, model(**packed).loss]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for loss, grads in zip(losses[1:], gradients[1:]):
        assert abs(loss - losses[0]) < 1e-5
        for g, expected in zip(grads, gradients[0]):
            assert (g - expected).abs().max() < 1e-5


def test_a_sample_sees_no_other(model):
    samples = [sample(t) for t in TALKS]
    together = model(**PackedCollator(TOKENS)(samples))
    alone = [model(**PackedCollator(TOKENS)([s])) for s in samples]
    sums = sum(o.codebook_losses * o.counts[1:] for o in alone)
    assert torch.allclose(sums / together.counts[1:], together.codebook_losses, atol=1e-5)
    ends = sum(o.end_losses * o.end_counts for o in alone)
    ends = ends / together.end_counts.clamp(min=1)
    assert torch.allclose(ends, together.end_losses, atol=1e-5)


def test_nothing_waits(model):
    adapted = apply_lora(model, create_lora_config(r=4, train=(TABLE,)))
    samples = [sample(t) for t in TALKS]
    assert traced(adapted, PackedCollator(TOKENS)(samples)).waits == []
    assert traced(adapted, PaddedCollator(TOKENS)(samples)).waits


def test_recomputed_activations_change_nothing(model):
    batch = PackedCollator(TOKENS)([sample(t) for t in TALKS])

    def gradients():
        return torch.autograd.grad(model.train()(**batch).loss, list(model.parameters()))

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), plain))


def test_another_attention_gives_the_same(model):
    samples = [sample(t) for t in TALKS]
    packed, padded = PackedCollator(TOKENS)(samples), PaddedCollator(TOKENS)(samples)
    expected = model(**packed).loss
    model.set_attn_implementation("eager")
    assert abs(model(**packed).loss - expected) < 1e-5
    assert abs(model(**padded).loss - expected) < 1e-5


def test_new_tokens_belong_to_another_tokenizer(model):
    more = byte_tokenizer(HIGGS_V3)
    more.add_tokens(["<laugh>"])
    model.trained_tokenizer = "0" * 64
    model.resize_token_embeddings(len(more))
    assert model.trained_tokenizer is None
    assert AudioTokens.from_config(model.config, more) == TOKENS
    generate_speech(model, more, ["Ha. <laugh>"], max_frames=2)


def test_text_is_not_supervised(model):
    made = sample(TALKS[0])
    made.labels = made.labels.clone()
    made.labels[2] = made.input_ids[2]
    with pytest.raises(ValueError, match="1 text labels, and this model has no head for text"):
        model(**PackedCollator(TOKENS)([made]))


# adapters


def train(model, batch, steps, lr=5e-3):
    "Steps of AdamW on one batch; returns the last output."
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    for _ in range(steps):
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_an_adapter_comes_back_bit_by_bit_with_one_table(tmp_path, dtype):
    base = tiny_v3_model(TOKENIZER, **SMALL).to(dtype)
    model = apply_lora(base, create_lora_config("all", r=4, train=("audio_lm_head",)))
    batch = PackedCollator(TOKENS)([sample(t) for t in TALKS])
    train(model, batch, 3)
    tables = [n for n, p in model.named_parameters() if p.shape[0] == 8 * 34 and p.requires_grad]
    assert tables == [f"base_model.model.{TABLE}.modules_to_save.default.weight"]
    assert model.get_parameter(tables[0]).dtype == torch.float32
    save_lora_adapters(model, tmp_path / "adapter", base={"id": "tiny"})
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [n for n, t in saved.items() if t.shape[0] == 8 * 34] == [
        f"base_model.model.{TABLE}.weight"
    ]
    again = tiny_v3_model(TOKENIZER, **SMALL).to(dtype)
    again = load_lora_adapters(again, tmp_path / "adapter", trainable=True)
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    merged = merge_lora(model)
    tables = {n: p for n, p in merged.state_dict().items() if len(p) == 8 * 34}
    assert list(tables) == [f"{TABLE}.weight"]
    assert torch.equal(
        tables[f"{TABLE}.weight"], saved[f"base_model.model.{TABLE}.weight"].to(dtype)
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert abs(merged(**batch).loss - model.eval()(**batch).loss) < tolerance


def test_both_names_of_the_table_are_an_error(model):
    with pytest.raises(ValueError, match=f"are one table.*name {TABLE} alone"):
        apply_lora(model, create_lora_config(train=("audio_lm_head", TABLE)))


# clips by heart


def by_heart(samples, steps=160):
    "A model that has learned these samples."
    torch.manual_seed(0)
    model = tiny_v3_model(TOKENIZER, **(SMALL | dict(num_layers=2, hidden_size=96)))
    out = train(model, PackedCollator(TOKENS)(samples), steps, lr=4e-3)
    return model.eval(), out


FOUR = [talk("One", 10), talk("Two", 17), talk("Three", 12, reference=True), talk("Four", 23)]


def reproduced(model):
    "Which of the four clips a model says back and ends by itself."
    clips = generate_speech(model, TOKENIZER, FOUR, store=MadeUp(), max_frames=40)
    expected = [MadeUp().get(t.audio[-1]) for t in FOUR]
    return [c.stopped and torch.equal(c.codes, codes) for c, codes in zip(clips, expected)]


@pytest.fixture(scope="module")
def learned():
    return by_heart([sample(t) for t in FOUR])


def test_four_clips_are_learned_and_said_back(learned):
    model, out = learned
    assert out.audio_loss < 0.02 and out.end_losses.max() < 0.02
    assert reproduced(model) == [True] * 4
    alone = generate_speech(model, TOKENIZER, FOUR[2], store=MadeUp(), max_frames=40)[0]
    assert torch.equal(alone.codes, MadeUp().get(FOUR[2].audio[-1]))
    probe = offset_probe(model, PackedCollator(TOKENS)([sample(t) for t in FOUR]))
    assert probe.verdict == "learning" and probe.best == 1


def test_with_the_first_end_alone_the_rows_that_end_a_clip_are_not_learned():
    def first_end_only(made):
        ends = made.audio_labels == EOC
        later = ends & ends.roll(1, 0)
        made.audio_labels = made.audio_labels.masked_fill(later, IGNORE)
        return made

    samples = [sample(t) for t in FOUR]
    batch = PackedCollator(TOKENS)(samples)
    model, _ = by_heart([first_end_only(s) for s in samples])
    with torch.no_grad():
        out = model(**batch)
    assert out.end_losses.max() > 1, "what is not supervised is not learned"
    assert out.codebook_losses[7] < 0.02, "the codes are"


def test_a_clip_that_does_not_end_is_cut_off_and_keeps_all_frames(learned):
    model, _ = learned
    [clip] = generate_speech(model, TOKENIZER, FOUR[3], max_frames=20)
    assert not clip.stopped
    assert torch.equal(clip.codes, MadeUp().get(FOUR[3].audio[-1])[:, :20])


def test_a_draw_depends_on_the_seed_alone(learned):
    model, _ = learned

    def speak(seed):
        torch.manual_seed(seed)
        options = dict(do_sample=True, temperature=3.0, top_k=20, top_p=0.95, max_frames=12)
        return generate_speech(model, TOKENIZER, ["La."], **options)[0].codes

    assert torch.equal(speak(1), speak(1)) and not torch.equal(speak(1), speak(2))
    with pytest.raises(ValueError, match="sampled without ras_win_len=3"):
        options = dict(ras_win_len=3, ras_win_max_num_repeat=1, max_frames=4)
        generate_speech(model, TOKENIZER, ["La."], **options)


class Beeps:
    "A codec that is none: as many samples as codes."

    sampling_rate, codebook_size, num_codebooks = 100, 32, 8

    def decode(self, codes):
        return codes[0].float() / 32


def test_given_codebooks_are_kept_and_the_others_are_the_models_own(learned):
    clips = speak_beside(learned[0], TOKENIZER, FOUR, Beeps(), given=(0, 1), store=MadeUp())
    for clip, conversation in zip(clips, FOUR):
        codes = MadeUp().get(conversation.audio[-1])
        assert clip.codes.shape == codes.shape
        assert torch.equal(clip.codes[:2], codes[:2])


# training


class StopAt(Callback):
    "Asks for a stop at the end of a step."

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.global_step == self.step - 1:
            Path(trainer.args.output_dir, "STOP").touch()


def test_a_run_trains_saves_resumes_and_reports_the_ends_apart(tmp_path):
    base = tiny_v3_model(TOKENIZER, **SMALL)
    base.save_pretrained(tmp_path / "base")
    config = load_model(str(tmp_path / "base")).config
    options = sample_options(config)
    data = SampleDataset(FOUR, TOKENIZER, MadeUp(), TOKENS, **options)
    held_out = SampleDataset(TALKS, TOKENIZER, MadeUp(), TOKENS, **options)

    def trainer(steps, folder):
        torch.manual_seed(0)
        model = load_model(str(tmp_path / "base"))
        model = apply_lora(model, create_lora_config("all", r=4, train=(TABLE,)))
        args = HiggsTrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            token_budget=128,
            learning_rate=5e-3,
            logging_steps=2,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=4,
            text_loss_weight=0.0,
            probe="warn",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        return HiggsTrainer(model, args, data, held_out)

    whole = trainer(6, tmp_path / "whole")
    whole.train()
    logs = whole.state.log_history
    assert any("eval_end_loss" in entry and "eval_code_loss" in entry for entry in logs)
    assert not any("text_loss" in entry for entry in logs)
    assert "EOS (nats)" in [ax.get_title() for ax in plot_losses(logs).axes]
    assert "step 6" in run_monitor(tmp_path / "whole", follow=False).still()
    first = trainer(6, tmp_path / "cut")
    first.add_callback(StopAt(4))
    with pytest.raises(Preempted, match="stopped after step 4"):
        first.train()
    second = trainer(6, tmp_path / "cut")
    second.train(resume="auto")
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters()):
        assert torch.equal(a, b), name


# checkpoints in the published form


def published(model, folder):
    "A model in the published form, in two files, with 528 tensors of a codec; returns all tensors."
    config, state = model.config, model.state_dict()
    text = {k: getattr(config, k) for k in (*QWEN3_FIELDS, "rope_parameters")}
    audio = dict(encoder_type="discrete", num_codebooks=8, vocab_size=34, out_dim=64)
    audio |= dict(tie_word_embeddings=True, use_delay_pattern=True)
    nested = dict(model_type="higgs_multimodal_qwen3", audio_token_id=-100)
    nested |= dict(audio_encoder_config=audio, text_config=text | dict(model_type="qwen3"))
    tensors = {}
    for name, tensor in state.items():
        ours, theirs = next(pair for pair in NATIVE.items() if name.startswith(pair[0]))
        tensors[theirs + name.removeprefix(ours)] = tensor
    tensors |= {f"{CODEC}part.{i}": torch.randn(3).bfloat16() for i in range(528)}
    listed = list(tensors)
    tensors |= {n: state[t].clone() for n, t in COPIES.items() if n.startswith("tied.head")}
    files = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for i, (name, tensor) in enumerate(tensors.items()):
        files[f"model-{i % 2 + 1}.safetensors"][name] = tensor
    folder.mkdir()
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    index = {n: file for file, part in files.items() for n in part if n in listed}
    write_json(folder / "config.json", nested)
    write_json(folder / "model.safetensors.index.json", dict(weight_map=index))
    (folder / "modeling.py").write_text("raise SystemExit")
    return tensors


def of_release():
    "A small model with the ids of the released tokenizer, in bfloat16."
    config = tiny_v3_config(TOKENIZER, **SMALL).to_dict()
    ids = dict(audio_token_id=151678, audio_delay_token_id=151678, audio_bos_token_id=151670)
    ids |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 151643)
    torch.manual_seed(0)
    config = HiggsAudioV3Config(**(config | ids | dict(vocab_size=151936)))
    return HiggsAudioV3ForTraining(config).to(torch.bfloat16)


def test_the_published_form_and_back(tmp_path):
    model = of_release()
    tensors = published(model, tmp_path / "released")
    assert len(tensors) == 2 * 11 + 3 + 528 + 2
    loaded = load_model(str(tmp_path / "released"))
    expected = model.config.to_dict() | dict(_name_or_path=str(tmp_path / "released"))
    assert loaded.config.to_dict() == expected | dict(dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    save_native(loaded, tmp_path / "back", tmp_path / "released")
    back = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(file)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    names = sorted(p.name for p in (tmp_path / "back").iterdir())
    assert names == sorted({p.name for p in (tmp_path / "released").iterdir()} - {"modeling.py"})
    for name in ("config.json", "model.safetensors.index.json"):
        files = [tmp_path / folder / name for folder in ("released", "back")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_trained_and_merged_model_goes_back_with_its_trained_table(tmp_path):
    published(of_release(), tmp_path / "released")
    base = load_model(str(tmp_path / "released"))
    model = apply_lora(base, create_lora_config("all", r=4, train=(TABLE,)))
    batch = {**PackedCollator(TOKENS)([sample(t) for t in TALKS])}
    ids = batch["input_ids"]
    batch["input_ids"] = ids.masked_fill(ids == TOKENS.audio_out, 151678)
    train(model, batch, 3)
    merged = merge_lora(model)
    save_native(merged, tmp_path / "trained", tmp_path / "released")
    again = load_model(str(tmp_path / "trained"))
    for name, tensor in merged.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16()), name
    head = load_file(tmp_path / "trained" / "model-2.safetensors")
    head |= load_file(tmp_path / "trained" / "model-1.safetensors")
    table = merged.get_parameter(f"{TABLE}.weight")
    assert torch.equal(head["tied.head.modality_heads.0.weight"], table)
    before = of_release().get_parameter(f"{TABLE}.weight")
    assert not torch.equal(table, before), "the table was trained"


def test_the_layout_of_the_port_is_read(tmp_path):
    model = of_release()
    published(model, tmp_path / "port")
    for file in (tmp_path / "port").glob("*.safetensors"):
        file.unlink()
    state = dict(model.state_dict())
    state["audio_embedding.weight"] = state.pop(f"{TABLE}.weight")
    state["audio_head.weight"] = state["audio_embedding.weight"].clone()
    save_file(state, tmp_path / "port" / "model.safetensors")
    loaded = load_model(str(tmp_path / "port"))
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    state["audio_head.weight"] = state["audio_head.weight"] + 1
    save_file(state, tmp_path / "port" / "model.safetensors")
    with pytest.raises(ValueError, match="Head and table were trained apart"):
        load_model(str(tmp_path / "port"))


def test_other_encoders_and_missing_weights_are_refused(tmp_path):
    published(of_release(), tmp_path / "released")
    file = tmp_path / "released" / "model-1.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.startswith("body.layers"))
    save_file({n: t for n, t in whole.items() if n != name}, file)
    with pytest.raises(ValueError, match="1 missing"):
        load_model(str(tmp_path / "released"))
    with pytest.raises(ValueError, match="have no place"):
        save_native(of_release(), tmp_path / "out", tmp_path / "released")
    assert [p.name for p in tmp_path.iterdir()] == ["released"]
    config = load_json(tmp_path / "released" / "config.json")
    config["audio_encoder_config"]["encoder_type"] = "whisper"
    write_json(tmp_path / "released" / "config.json", config)
    with pytest.raises(ValueError, match="'encoder_type': 'whisper'"):
        load_model(str(tmp_path / "released"))


def test_what_the_family_lacks_cannot_be_added(tmp_path):
    tiny_v3_model(TOKENIZER, **SMALL).save_pretrained(tmp_path / "base")
    for option in (dict(use_audio_out_self_attention=True), dict(whisper="somewhere/whisper")):
        with pytest.raises(ValueError, match="whose models have no part for"):
            load_model(str(tmp_path / "base"), **option)
