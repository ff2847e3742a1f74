"""What goes wrong in training is said where it begins: numbers that are not finite, weights in 16
bits, a trainer that is used twice.
"""

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, get_peft_model
from resume_job import SMALL, Melodies, finish, make_trainer, said, sentence, start
from torch.overrides import TorchFunctionMode
from transformers import HiggsAudioV2ForConditionalGeneration, TrainingArguments

from higgs_nb.checkpoint.adapter import (
    adapter_state,
    load_lora_adapters,
    restore,
    save_lora_adapters,
    take_snapshot,
)
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.manifest import Manifest
from higgs_nb.checkpoint.validate import list_checkpoints, validate_checkpoint
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Conversation
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer, fit_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import EMBEDDINGS, HEADS, apply_lora, create_lora_config
from higgs_nb.model.merge import merge_lora
from higgs_nb.model.model import tiny_config, tiny_model
from higgs_nb.model.modules import HALF
from higgs_nb.speech.generate import generate_speech
from higgs_nb.training import restoring
from higgs_nb.training.arguments import AT_LEAST, BELOW_ONE, REFUSED, HiggsTrainingArguments
from higgs_nb.training.callbacks import Callback, EarlyStoppingCallback
from higgs_nb.training.identity import describe_data, differences
from higgs_nb.training.loop import HiggsTrainer
from higgs_nb.training.meter import LossMeter
from higgs_nb.training.probe import OFFSETS, OffsetProbe, copy_floor
from higgs_nb.training.speed import SpeedCallback
from higgs_nb.training.watch import NotFinite

IN_FULL = HEADS + EMBEDDINGS


class Spoil(Callback):
    "Writes `value` into one trained weight at a step."

    def __init__(self, step, part, value=torch.nan):
        self.step, self.part, self.value = step, part, value

    def on_step_end(self, trainer):
        if trainer.state.global_step != self.step:
            return
        named = trainer.model.named_parameters()
        with torch.no_grad():
            next(p for n, p in named if p.requires_grad and self.part in n).view(-1)[0] = self.value


@pytest.mark.parametrize(
    "part, value, logging_steps", [("lora_A", torch.nan, 3), ("audio_lm_head", torch.inf, 50)]
)
def test_a_run_that_is_not_finite_stops_and_keeps_its_good_checkpoints(
    tmp_path, part, value, logging_steps
):
    trainer = make_trainer(
        tmp_path,
        max_steps=12,
        save_steps=2,
        logging_steps=logging_steps,
        eval_strategy="no",
        save_total_limit=2,
        callbacks=[Spoil(7, part, value)],
    )
    with pytest.raises(NotFinite, match=r"step \d+: .*not finite"):
        trainer.train()
    trainer.saver.wait()
    reports = list_checkpoints(tmp_path)
    assert [r.step for r in reports if r.whole] == [4, 6]
    for report in reports:
        restore(trainer.model, report)  # refuses what is not finite
    with pytest.raises(NotFinite, match="trained parameters"):
        Spoil(trainer.state.global_step, part, value).on_step_end(trainer)
        trainer.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=4, eval_steps=2, logging_steps=50, callbacks=[Spoil(2, "lora_A")]
    )
    with pytest.raises(NotFinite, match="held-out"):
        trainer.train()


def test_a_training_loss_that_is_not_finite_stops_the_run(tmp_path):
    "Also where nothing is saved or evaluated."
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        callbacks=[Spoil(2, "lora_A")],
    )
    with pytest.raises(NotFinite, match="step 3: .*audio_loss.* on training data"):
        trainer.train()


def test_nothing_that_is_not_finite_is_saved_or_restored(tmp_path):
    model = make_trainer(tmp_path / "run").model
    save_lora_adapters(model, tmp_path / "good", base={})
    with pytest.raises(CheckpointError, match="state/exp_avg"):
        take_snapshot(
            model,
            base={},
            files={"training_state.safetensors": {"state/exp_avg": torch.tensor([torch.inf])}},
        )
    spoiled = adapter_state(model)["base_model.model.audio_lm_head.weight"]
    spoiled.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="audio_lm_head"):
        save_lora_adapters(model, tmp_path / "bad", base={})
    assert not (tmp_path / "bad").exists() and validate_checkpoint(tmp_path / "good").whole
    restore(model, tmp_path / "good")
    assert torch.isfinite(spoiled).all()


@given(st.lists(st.sampled_from([0.5, 3.0, torch.nan, torch.inf]), min_size=4, max_size=4))
def test_the_probe_says_so(losses):
    verdict = OffsetProbe(dict(zip(OFFSETS, losses)), {}, 10, 6.9, 1.0).verdict
    assert (verdict == "not finite") == (not all(torch.isfinite(torch.tensor(losses))))


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", float("nan")),
        ("learning_rate", -1.0),
        ("weight_decay", float("inf")),
        ("codebook_weights", [1, float("nan")]),
        ("codebook_weights", [-1.0]),
        ("audio_loss_weight", -1.0),
        ("label_smoothing_factor", 1.5),
        ("token_budget", 0),
        ("auto_find_batch_size", True),
        ("neftune_noise_alpha", 5.0),
        ("max_grad_norm", float("nan")),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        HiggsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def trained(tmp_path, dtype, **kwargs):
    trainer = make_trainer(
        tmp_path / dtype,
        dtype=dtype,
        adapter=dict(train=IN_FULL, dropout=0.0),
        max_steps=8,
        learning_rate=1e-4,
        warmup_steps=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        eval_strategy="no",
        **kwargs,
    )
    before = {
        n: p.detach().float().clone()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    trainer.train()
    full = [
        (before[n], p.detach().float())
        for n, p in trainer.model.named_parameters()
        if n in before and "lora_" not in n
    ]
    return trainer, sum((a != b).sum().item() for a, b in full) / sum(a.numel() for a, _ in full)


def test_what_is_trained_in_full_moves_on_a_base_in_16_bits_as_in_32(tmp_path):
    shares = {dtype: trained(tmp_path, dtype)[1] for dtype in ("float32", "bfloat16")}
    assert shares["bfloat16"] > 0.95 * shares["float32"], shares


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_base_in_16_bits_stays_so_and_what_is_trained_is_in_float32(tmp_path, dtype):
    trainer, _ = trained(tmp_path, str(dtype).removeprefix("torch."))
    model = trainer.model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    batch = next(iter(trainer.get_eval_dataloader()))
    model.eval()
    packed = model(**batch).loss.item()
    save_lora_adapters(model, tmp_path / "adapter", base={})
    again = load_lora_adapters(
        make_trainer(tmp_path / "fresh", dtype=str(dtype).removeprefix("torch.")).model.unload(),
        tmp_path / "adapter",
    ).eval()
    for name, tensor in adapter_state(model).items():
        assert torch.equal(adapter_state(again)[name], tensor), name
    assert again(**batch).loss.item() == packed
    tokenizer = trainer.tokenizer
    spoken = [
        generate_speech(m, tokenizer, ["La la"], max_frames=6)[0].codes for m in (model, again)
    ]
    assert torch.equal(*spoken)
    wide = copy.deepcopy(again).float()
    assert len(generate_speech(wide, tokenizer, ["La la"], max_frames=2)) == 1 and {
        p.dtype for p in wide.parameters()
    } == {torch.float32}
    merged = merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {dtype} and {
        type(m).__name__ for m in merged.modules()
    }.isdisjoint({"Float32Linear", "Float32Embedding"})
    assert merged.eval()(**batch).loss.item() == pytest.approx(packed, rel=0.02)


@pytest.mark.parametrize("norm", ["model.norm", "model.layers.0.input_layernorm"])
def test_a_norm_that_is_trained_on_a_base_in_16_bits_speaks(tmp_path, norm):
    trainer = make_trainer(
        tmp_path,
        dtype="bfloat16",
        adapter=dict(train=(norm, "audio_lm_head"), dropout=0.0),
        max_steps=2,
        eval_strategy="no",
        save_strategy="no",
    )
    trainer.train()
    assert len(generate_speech(trainer.model, trainer.tokenizer, ["La la"], max_frames=2)) == 1


def moved_base(train, dtype=torch.bfloat16):
    "A 16-bit base with an adapter and modules in full, all of them moved."
    model = tiny_model(byte_tokenizer(), **SMALL).to(dtype)
    adapted = apply_lora(model, create_lora_config("attention", r=4, train=train)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return adapted


def loss_and_codes(model):
    "Losses of a packed and of a padded batch, and a few codes."
    tokens = AudioTokens.from_config(model.config, byte_tokenizer())
    data = SampleDataset([sentence(n) for n in (20, 27)], byte_tokenizer(), Melodies(), tokens)
    samples = [data[0], data[1]]
    with torch.no_grad():
        losses = [
            model(**collate(tokens)(samples)).loss.item()
            for collate in (PackedCollator, PaddedCollator)
        ]
    (clip,) = generate_speech(model, byte_tokenizer(), "La la", max_frames=4)
    return losses, clip.codes


def load_and_answer(folder):
    "For a process of its own."
    base = tiny_model(byte_tokenizer(), **SMALL).to(torch.bfloat16)
    torch.save(
        [
            loss_and_codes(load_lora_adapters(base, Path(folder) / "adapter")),
            loss_and_codes(load_model(str(Path(folder) / "merged")).eval()),
        ],
        Path(folder) / "answers.pt",
    )


WAYS = dict(
    heads=HEADS,
    embeddings=EMBEDDINGS,
    norms=("model.norm", "model.layers.0.input_layernorm", "model.layers.0.audio_input_layernorm"),
    projections=("model.layers.0.mlp.up_proj", "model.layers.0.audio_mlp.down_proj"),
    all=(*IN_FULL, "model.norm", "model.layers.0.mlp.up_proj"),
)


@pytest.mark.parametrize("kind", WAYS)
def test_modules_in_float32_on_a_16_bit_base_answer_the_same_in_every_way(tmp_path, kind):
    model = moved_base(WAYS[kind])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses, codes = loss_and_codes(model)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    merged = merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert [p.dtype for p in model.parameters() if p.requires_grad][0] == torch.float32
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_model(str(tmp_path / "merged")).eval()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    of_merged = loss_and_codes(loaded)  # whose rotary angles are in float32
    assert of_merged[0] == pytest.approx(losses, rel=0.02)
    assert loss_and_codes(merged)[0] == pytest.approx(losses, rel=0.02)
    wide, _ = loss_and_codes(copy.deepcopy(model).float())
    assert wide[0] == pytest.approx(wide[1], rel=1e-5) and wide == pytest.approx(losses, rel=0.02)
    save_lora_adapters(model, tmp_path / "adapter", base={})
    assert finish(start(load_and_answer, tmp_path)) == [0], said(tmp_path)
    for (then, spoken), now in zip(
        ((losses, codes), of_merged), torch.load(tmp_path / "answers.pt")
    ):
        assert now[0] == then and torch.equal(now[1], spoken)


def test_an_adapter_with_embeddings_speaks_on_the_stock_class_in_16_bits(tmp_path):
    model = moved_base(IN_FULL)
    save_lora_adapters(model, tmp_path / "adapter", base={})
    stock = HiggsAudioV2ForConditionalGeneration(model.config, use_text_head=True)
    stock.load_state_dict(tiny_model(byte_tokenizer(), **SMALL).state_dict())
    with pytest.warns(UserWarning, match="were rounded to torch.bfloat16"):
        again = load_lora_adapters(stock.to(torch.bfloat16), tmp_path / "adapter")
    assert generate_speech(again, byte_tokenizer(), "La la", max_frames=2)


def test_a_trainer_that_was_interrupted_does_not_begin_at_step_0_again(tmp_path):
    class Interrupt(Callback):
        def on_step_end(self, trainer):
            if trainer.state.global_step == 3 and not self.done:
                self.done = True
                raise KeyboardInterrupt

        done = False

    trainer = make_trainer(tmp_path, max_steps=6, eval_strategy="no", callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for resume in (None, "auto"):
        with pytest.raises(RuntimeError, match="make the model and the trainer again"):
            trainer.train(resume=resume)


def test_evaluating_a_finished_run_leaves_its_log_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, save_steps=3)
    trainer.train()
    logs = {f: (tmp_path / f).read_bytes() for f in ("log.jsonl", "log.csv")}
    metrics = make_trainer(tmp_path, max_steps=3).evaluate()
    assert metrics["eval_loss"] > 0 and {f: (tmp_path / f).read_bytes() for f in logs} == logs


@pytest.mark.parametrize(
    "metric, best", [("eval_similarity", 4), ("wer", 2), ("eval_stops", 2), ("stops", 2)]
)
def test_the_best_checkpoint_by_what_judges_logged(tmp_path, metric, best):
    "Steps that nobody judged are never the best."
    names = ("eval_wer", "eval_similarity", "eval_stops")
    scores = {
        0: (90.0, 0.1, 30.0),
        2: (10.0, 0.2, 90.0),
        4: (50.0, 0.9, 50.0),
        6: (60.0, 0.3, 40.0),
    }

    class Judge(Callback):
        def on_step_end(self, trainer):
            if trainer.state.global_step in scores:
                trainer.log(dict(zip(names, scores[trainer.state.global_step])))

    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        eval_steps=1,
        save_steps=2,
        save_total_limit=1,
        metric_for_best_model=metric,
        callbacks=[Judge()],
    )
    trainer.train()
    assert (
        trainer.state.best_global_step == best
        and validate_checkpoint(tmp_path / f"checkpoint-{best}").whole
    )


class LikeMps(TorchFunctionMode):
    "Tensors say that they are on MPS until `cpu` is called, and have no float64 there."

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        if function is torch.Tensor.double and not any(args[0] is t for t in self.moved):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            self.moved.append(result)
        return result


def test_an_accelerator_without_float64():
    meter = LossMeter()
    meter.sums, meter.counts = torch.tensor([6.0, *[8.0] * 8]), torch.tensor([3, *[4] * 8])
    repeats, targets = torch.tensor([[True], [False]]), torch.zeros(2, 1, dtype=torch.long)
    expected = copy_floor(repeats, targets)
    with LikeMps():
        means = meter.means(lambda tensor: tensor)
        assert copy_floor(repeats, targets) == expected
    assert means["text_loss"] == means["audio_loss"] == 2


def test_an_accelerator_that_does_not_count_its_memory(monkeypatch):
    monkeypatch.setattr("higgs_nb.training.speed.device_module", lambda: object())
    speed = SpeedCallback(tiny_config(byte_tokenizer(), **SMALL), token_budget=64)
    assert speed.report()["memory_mb"] > 1


# --- every argument has an answer

FIELDS = {f.name: f for f in dataclasses.fields(TrainingArguments)}
USED = {f.name for f in dataclasses.fields(HiggsTrainingArguments)} & set(FIELDS)
TESTED = "5.23" if transformers.__version__.startswith("5.23") else None


def test_the_table_of_arguments_has_each_once():
    tables = [USED, set(REFUSED)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    unknown = set(FIELDS) - set.union(*tables)
    if unknown and TESTED is None:
        pytest.skip(
            f"transformers {transformers.__version__} has settings that the table does "
            f"not know: {sorted(unknown)}"
        )
    assert not unknown


def another(name):
    "A value of a setting that is not transformers' default."
    default = FIELDS[name].default
    if default is dataclasses.MISSING:
        return ["loss"]
    if isinstance(default, bool):
        return name == "remove_unused_columns" or not default
    if isinstance(default, int):
        return default + 3
    return dict(
        train_sampling_strategy="group_by_length", accelerator_config=dict(split_batches=False)
    ).get(name, "other")


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS)))
def test_an_argument_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}="):
        HiggsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: another(name)})


@given(
    st.sampled_from(
        [
            (n, v)
            for n, least in AT_LEAST.items()
            for v in (least - 1, float("nan"), float("inf"), "many")
        ]
        + [(n, 1.0) for n in BELOW_ONE]
        + [
            ("max_steps", 0),
            ("max_steps", -2),
            ("save_total_limit", -1),
            ("codebook_weights", [0.0] * 8),
        ]
    )
)
@settings(max_examples=60, deadline=None)
def test_a_number_out_of_its_range_is_refused_by_name(change):
    name, value = change
    with pytest.raises(ValueError, match=name):
        HiggsTrainingArguments(output_dir="unused", use_cpu=True, **{name: value})


@pytest.mark.parametrize("length", [1, 7, 12])
def test_weights_of_another_number_of_codebooks_are_refused(tmp_path, length):
    with pytest.raises(ValueError, match=f"codebook_weights=.*{length} weights.*8 codebooks"):
        make_trainer(tmp_path, codebook_weights=[1.0] * length)


# --- what can be trained


def trainer_of(model, tmp_path, eval_dataset=None):
    data = make_trainer(tmp_path / "other").train_dataset
    return HiggsTrainer(
        model, HiggsTrainingArguments(output_dir=str(tmp_path), use_cpu=True), data, eval_dataset
    )


TUNERS = dict(
    adalora=AdaLoraConfig(
        init_r=4, target_r=2, total_step=6, tinit=1, tfinal=1, target_modules=["q_proj"]
    ),
    ia3=IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    loha=LoHaConfig(r=4, target_modules=["q_proj"]),
    lokr=LoKrConfig(r=4, target_modules=["q_proj"]),
    oft=OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
)


@pytest.mark.parametrize("name", TUNERS)
def test_other_tuners_are_refused_before_the_first_step(tmp_path, name):
    def base():
        return tiny_model(byte_tokenizer(), **SMALL)

    with pytest.raises(ValueError, match="only LoRA is supported"):
        apply_lora(base(), TUNERS[name])
    with pytest.raises(ValueError, match="only LoRA is supported"):
        trainer_of(get_peft_model(base(), TUNERS[name]), tmp_path)


@pytest.mark.parametrize(
    "setting",
    [dict(layers_to_transform=[0]), dict(exclude_modules=["q_proj"]), dict(lora_bias=True)],
    ids=str,
)
def test_what_narrows_an_adapter_is_named(setting):
    with pytest.raises((RuntimeError, ValueError), match=next(iter(setting))):
        apply_lora(
            tiny_model(byte_tokenizer(), **{**SMALL, "num_layers": 2}),
            create_lora_config("attention", r=4, **setting),
        )


def test_nothing_to_train_and_several_held_out_sets_are_refused(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    save_lora_adapters(trainer.model, tmp_path / "adapter", base={})
    with pytest.raises(ValueError, match="one SampleDataset"):
        trainer_of(trainer.model, tmp_path, {"a": trainer.eval_dataset})
    frozen = trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        trainer_of(frozen, tmp_path)


# --- the data's digest sees every sample


@given(st.integers(0, 39), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_digest_sees_every_sample(changed, text):
    class Codes:
        other = None

        def get(self, audio):
            codes = torch.full((8, 3), int(audio.path) % 30)
            return codes + (audio.path == str(self.other))

    tokenizer, store = byte_tokenizer(), Codes()
    tokens = AudioTokens.from_config(tiny_config(tokenizer, **SMALL), tokenizer)

    def data(words=None):
        talks = [
            Conversation.from_dict(
                dict(
                    messages=[
                        dict(role="user", content=words if n == changed and words else "La"),
                        dict(role="assistant", content={"type": "audio", "path": str(n)}),
                    ]
                ),
                id=f"s{n}",
            )
            for n in range(40)
        ]
        return SampleDataset(talks, tokenizer, store, tokens)

    before = describe_data(data(), 4)
    assert describe_data(data(), 4) == before
    if not text:
        store.other = changed
    assert differences(before, describe_data(data("Lo" if text else None), 4))[0].startswith(
        "sha256"
    )


# --- a stranger's state


def checkpoint_with(tmp_path, change, whole=True):
    "A checkpoint whose manifest vouches for a `trainer_state.json` that `change` made."
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        save_steps=2,
        eval_steps=2,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    manifest = validate_checkpoint(file.parent).manifest or Manifest.loads(
        file.with_name("manifest.json").read_text()
    )
    manifest.files[file.name].update(
        size=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest()
    )
    file.with_name("manifest.json").write_text(manifest.dumps())
    assert validate_checkpoint(file.parent).whole == whole
    return make_trainer(
        tmp_path / "again",
        max_steps=4,
        eval_steps=2,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(3)],
    )


@pytest.mark.parametrize(
    "named, attributes",
    [
        ("early_stopping_threshold", dict(early_stopping_threshold=9.0)),
        ("on_step_end", dict(on_step_end=1)),
        ("counter", dict(early_stopping_patience_counter="1")),
        ("__class__", dict(__class__="x")),
        (None, dict(early_stopping_patience_counter=1)),
    ],
)
def test_a_state_sets_only_what_its_callback_saves(tmp_path, named, attributes):
    trainer = checkpoint_with(
        tmp_path,
        lambda state: (
            state["stateful_callbacks"]["EarlyStoppingCallback"].update(attributes=attributes)
            if isinstance(state["stateful_callbacks"]["EarlyStoppingCallback"], dict)
            else state["stateful_callbacks"]["EarlyStoppingCallback"][0].update(
                attributes=attributes
            )
        ),
    )
    if named is None:
        return trainer.train(tmp_path / "checkpoint-2") and None
    with pytest.raises(CheckpointError, match=named):
        trainer.train(tmp_path / "checkpoint-2")


def test_a_state_of_another_step_is_not_resumed(tmp_path):
    trainer = checkpoint_with(tmp_path, lambda state: state.update(global_step=1), whole=False)
    with pytest.raises(CheckpointError):
        trainer.train(tmp_path / "checkpoint-2")


def test_the_state_that_was_verified_is_the_one_that_is_read(tmp_path, monkeypatch):
    make_trainer(tmp_path, max_steps=2, save_steps=2, eval_strategy="no").train()
    file = tmp_path / "checkpoint-2" / "trainer_state.json"

    restored = restoring.restore

    def swap(*args):  # after the state was verified
        restored(*args)
        file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": 3}))

    monkeypatch.setattr(restoring, "restore", swap)
    trainer = make_trainer(tmp_path, max_steps=4, eval_strategy="no")
    steps = []

    class Count(Callback):
        def on_step_end(self, trainer):
            steps.append(trainer.state.global_step)

    trainer.add_callback(Count())
    trainer.train(tmp_path / "checkpoint-2")
    assert steps == [3, 4]


def test_a_clock_that_is_set_back_leaves_the_runtime_positive(tmp_path, monkeypatch):
    real, back = time.time, []

    class SetBack(Callback):
        def on_step_end(self, trainer):
            back.append(86400)

    monkeypatch.setattr(time, "time", lambda: real() - sum(back))
    assert (
        0
        < make_trainer(
            tmp_path, max_steps=2, eval_strategy="no", save_strategy="no", callbacks=[SetBack()]
        )
        .train()
        .metrics["train_runtime"]
        < 600
    )


def test_the_remedy_among_foreign_checkpoints_is_not_what_was_done(tmp_path):
    foreign = tmp_path / "checkpoint-5"
    make_trainer(tmp_path / "other").model.save_pretrained(str(foreign))
    (foreign / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        make_trainer(tmp_path).train(resume="auto")
    assert "cannot go on" in str(error.value) and "choose another output_dir" in str(error.value)


# --- the tokenizer is part of what an adapter was trained on

WORDS = st.text("abcdefghijk", min_size=3, max_size=6)


def like(words):
    "A tokenizer with the special ids and the size of its siblings, and merges of its own."
    return fit_tokenizer([f"{word} " * 20 for word in words], 280)


def without_tokenizer(source, target):
    "A copy of a checkpoint as older versions wrote it, which say nothing of the tokenizer."
    shutil.copytree(source, target)
    file = target / "manifest.json"
    manifest = Manifest.loads(file.read_text())
    assert manifest.meta["base"].pop("tokenizer_fingerprint")
    file.write_text(manifest.dumps())
    return target


@given(st.lists(WORDS, min_size=4, max_size=6, unique=True))
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
def test_an_adapter_is_loaded_spoken_and_trained_with_its_tokenizer_alone(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("run")
    mine, other = like(["zz", "yyyy", *words]), like(["xxxx", "vv", *words])
    assert len(mine) == len(other) and mine.get_vocab() != other.get_vocab()
    kwargs = dict(max_steps=2, save_steps=1, eval_strategy="no")
    trainer = make_trainer(folder / "run", tokenizer=mine, **kwargs)
    trainer.train()
    checkpoint = folder / "run" / "checkpoint-1"

    def base():
        return make_trainer(folder / "base", tokenizer=mine).model.unload()

    def fresh():
        model = base()
        model.trained_tokenizer = None
        return model

    with pytest.raises(
        CheckpointError, match="(?s)another tokenizer.*remedy: load the tokenizer of"
    ):
        load_lora_adapters(fresh(), checkpoint, tokenizer=other)
    loaded = load_lora_adapters(fresh(), checkpoint, tokenizer=mine)
    merge_lora(loaded).save_pretrained(folder / "plain")
    take_snapshot(
        merge_lora(loaded), base=validate_checkpoint(checkpoint).manifest.meta["base"]
    ).save(folder / "merged")
    models = (trainer.model, loaded, merge_lora(loaded), load_model(str(folder / "merged")))
    for model in models:
        assert generate_speech(model, mine, "La.", max_frames=1)
        with pytest.raises(
            ValueError, match="another tokenizer.*load the tokenizer that was saved"
        ):
            generate_speech(model, other, "La.", max_frames=1)
    assert generate_speech(load_model(str(folder / "plain")), other, "La.", max_frames=1)
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        HiggsTrainer(
            load_lora_adapters(fresh(), checkpoint, trainable=True),
            HiggsTrainingArguments(output_dir=str(folder / "on"), use_cpu=True),
            make_trainer(folder / "other", tokenizer=other).train_dataset,
        )
    with pytest.raises(
        CheckpointError, match="(?s)model.tokenizer_fingerprint.*with its tokenizer"
    ):
        make_trainer(folder / "again", tokenizer=other, **kwargs).train(checkpoint)


def test_a_checkpoint_that_names_no_tokenizer_is_loaded_and_resumed(tmp_path, caplog):
    kwargs = dict(max_steps=2, save_steps=1, eval_strategy="no")
    whole = make_trainer(tmp_path / "run", **kwargs)
    whole.train()
    older = without_tokenizer(tmp_path / "run" / "checkpoint-1", tmp_path / "checkpoint-1")
    base = make_trainer(tmp_path / "base").model.unload()
    base.trained_tokenizer = None
    with pytest.warns(UserWarning, match="does not say which tokenizer .* is unknown"):
        model = load_lora_adapters(base, older, tokenizer=byte_tokenizer())
    assert generate_speech(model, byte_tokenizer(), "La.", max_frames=1)
    resumed = make_trainer(tmp_path / "on", **kwargs)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    resumed.train(older)
    assert "does not say which tokenizer" in caplog.text
    for name, tensor in adapter_state(whole.model).items():
        assert torch.equal(adapter_state(resumed.model)[name], tensor), name


def test_a_model_without_an_adapter_is_resumed_with_its_tokenizer_alone(tmp_path):
    kwargs = dict(adapter=None, max_steps=2, save_steps=1, eval_strategy="no")
    words = (["one", "two", "six"], ["four", "five", "ten"])
    mine, other = map(like, words)
    make_trainer(tmp_path / "run", tokenizer=mine, **kwargs).train()
    with pytest.raises(CheckpointError, match="model.tokenizer_fingerprint"):
        make_trainer(tmp_path / "on", tokenizer=other, **kwargs).train(
            tmp_path / "run" / "checkpoint-1"
        )
    with pytest.raises(ValueError, match="another tokenizer"):
        generate_speech(
            load_model(str(tmp_path / "run" / "checkpoint-2")), other, "La.", max_frames=1
        )


def test_a_vocabulary_that_is_resized_asks_for_no_tokenizer_of_before():
    model, more = tiny_model(byte_tokenizer(), **SMALL), byte_tokenizer()
    model.trained_tokenizer = "0" * 64
    more.add_tokens(["<laugh>"])
    model.resize_token_embeddings(len(more))
    assert generate_speech(model, more, "La.", max_frames=1)


class OnMac(torch.Tensor):
    "A tensor that says it is on a Mac's GPU, where there is no float64."

    device = torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")

    def to(self, *args, **kwargs):
        if torch.float64 in (*args, *kwargs.values()):
            self.double()
        return super().to(*args, **kwargs)


def test_sums_on_a_device_without_float64():
    "Means of losses, and the floor of copying, of tensors on MPS are those of tensors on a CPU."
    sums, counts = torch.tensor([6.0, 4.0, 9.0]), torch.tensor([2.0, 1.0, 3.0])
    meters = [LossMeter.__new__(LossMeter) for _ in range(2)]
    for meter, kind in zip(meters, (torch.Tensor, OnMac)):
        meter.sums, meter.counts = sums.as_subclass(kind), counts.as_subclass(kind)
    assert meters[0].means(lambda x: x) == meters[1].means(lambda x: x)
    repeats, targets = torch.tensor([[True, False]] * 5), torch.ones(5, 2, dtype=torch.long)
    floors = [
        copy_floor(repeats.as_subclass(k), targets.as_subclass(k)) for k in (torch.Tensor, OnMac)
    ]
    assert floors[0] == floors[1]
    with pytest.raises(TypeError, match="float64"):
        meters[1].sums.double()


def test_a_device_that_counts_no_memory(tmp_path, monkeypatch):
    "torch.mps has no max_memory_allocated: the memory of the process is logged."
    monkeypatch.setattr("higgs_nb.training.speed.device_module", lambda: torch.mps)
    trainer = make_trainer(
        tmp_path, max_steps=2, logging_steps=1, eval_strategy="no", save_strategy="no"
    )
    trainer.train()
    logged = [h["memory_mb"] for h in trainer.state.log_history if "memory_mb" in h]
    assert len(logged) == 2 and min(logged) > 0
