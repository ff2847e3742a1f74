"What goes wrong in training is said where it begins: numbers that are not finite, weights in 16 bits, a trainer that is used twice."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from higgs_nb.checkpoint import CheckpointError, adapter_state, load_lora_adapters, restore, save_lora_adapters, take_snapshot
from higgs_nb.fused import HALF
from higgs_nb.generate import generate_speech
from higgs_nb.lora import EMBEDDINGS, HEADS, apply_lora, create_lora_config, merge_lora
from higgs_nb.manifest import list_checkpoints, validate_checkpoint
from higgs_nb.probe import OFFSETS, OffsetProbe
from higgs_nb.trainer import HiggsTrainingArguments, NotFinite
from resume_job import make_trainer

IN_FULL = HEADS + EMBEDDINGS


class Spoil(TrainerCallback):
    "Writes `value` into one trained weight at a step."
    def __init__(self, step, part, value=torch.nan): self.step, self.part, self.value = step, part, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step: return
        with torch.no_grad(): next(p for n, p in model.named_parameters() if p.requires_grad and self.part in n).view(-1)[0] = self.value


@pytest.mark.parametrize("part, value, logging_steps", [("lora_A", torch.nan, 3), ("audio_lm_head", torch.inf, 50)])
def test_a_run_that_is_not_finite_stops_and_keeps_its_good_checkpoints(tmp_path, part, value, logging_steps):
    trainer = make_trainer(tmp_path, max_steps=12, save_steps=2, logging_steps=logging_steps, eval_strategy="no", save_total_limit=2,
                           callbacks=[Spoil(7, part, value)])
    with pytest.raises(NotFinite, match=r"step \d+: .*not finite"): trainer.train()
    trainer.saver.wait()
    reports = list_checkpoints(tmp_path)
    assert [r.step for r in reports if r.whole] == [4, 6]
    for report in reports: restore(trainer.model, report)  # refuses what is not finite
    with pytest.raises(NotFinite, match="trained parameters"):
        Spoil(0, part, value).on_step_end(None, type("S", (), dict(global_step=0)), None, trainer.model)
        trainer.save_adapter(tmp_path/"adapter")
    assert not (tmp_path/"adapter").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, eval_steps=2, logging_steps=50, callbacks=[Spoil(2, "lora_A")])
    with pytest.raises(NotFinite, match="held-out"): trainer.train()


def test_nothing_that_is_not_finite_is_saved_or_restored(tmp_path):
    model = make_trainer(tmp_path/"run").model
    save_lora_adapters(model, tmp_path/"good", base={})
    spoiled = adapter_state(model)["base_model.model.audio_lm_head.weight"]
    spoiled.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="audio_lm_head"): save_lora_adapters(model, tmp_path/"bad", base={})
    with pytest.raises(CheckpointError, match="state/exp_avg"): take_snapshot(model, base={}, files={"training_state.safetensors": {"state/exp_avg": torch.tensor([torch.inf])}})
    assert not (tmp_path/"bad").exists() and validate_checkpoint(tmp_path/"good").whole
    restore(model, tmp_path/"good")
    assert torch.isfinite(spoiled).all()


@given(st.lists(st.sampled_from([0.5, 3.0, torch.nan, torch.inf]), min_size=4, max_size=4))
def test_the_probe_says_so(losses):
    verdict = OffsetProbe(dict(zip(OFFSETS, losses)), {}, 10, 6.9, 1.0).verdict
    assert (verdict == "not finite") == (not all(torch.isfinite(torch.tensor(losses))))


@pytest.mark.parametrize("name, value", [("learning_rate", float("nan")), ("learning_rate", -1.0), ("weight_decay", float("inf")), ("codebook_weights", [1, float("nan")]),
                                         ("codebook_weights", [-1.0]), ("audio_loss_weight", -1.0), ("label_smoothing_factor", 1.5), ("token_budget", 0),
                                         ("auto_find_batch_size", True), ("neftune_noise_alpha", 5.0), ("max_grad_norm", float("nan"))])
def test_settings_that_cannot_be_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name): HiggsTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def trained(tmp_path, dtype, **kwargs):
    trainer = make_trainer(tmp_path/dtype, dtype=dtype, adapter=dict(train=IN_FULL, dropout=0.0), max_steps=8, learning_rate=1e-4, warmup_steps=0,
                           lr_scheduler_type="constant", save_strategy="no", eval_strategy="no", **kwargs)
    before = {n: p.detach().float().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    full = [(before[n], p.detach().float()) for n, p in trainer.model.named_parameters() if n in before and "lora_" not in n]
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
    save_lora_adapters(model, tmp_path/"adapter", base={})
    again = load_lora_adapters(make_trainer(tmp_path/"fresh", dtype=str(dtype).removeprefix("torch.")).model.unload(), tmp_path/"adapter").eval()
    for name, tensor in adapter_state(model).items(): assert torch.equal(adapter_state(again)[name], tensor), name
    assert again(**batch).loss.item() == packed
    tokenizer = trainer.tokenizer
    spoken = [generate_speech(m, tokenizer, ["La la"], max_frames=6)[0].codes for m in (model, again)]
    assert torch.equal(*spoken)
    merged = merge_lora(model)
    assert {p.dtype for p in merged.parameters()} == {dtype} and {type(m).__name__ for m in merged.modules()}.isdisjoint({"Float32Linear", "Float32Embedding"})
    assert merged.eval()(**batch).loss.item() == pytest.approx(packed, rel=0.02)


def test_a_trainer_that_was_interrupted_does_not_begin_at_step_0_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.done: self.done = True; raise KeyboardInterrupt
        done = False
    trainer = make_trainer(tmp_path, max_steps=6, eval_strategy="no", callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt): trainer.train()
    for resume in (None, "auto"):
        with pytest.raises(RuntimeError, match="make the model and the trainer again"): trainer.train(resume=resume)


def test_evaluating_a_finished_run_leaves_its_log_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, save_steps=3)
    trainer.train()
    logs = {f: (tmp_path/f).read_bytes() for f in ("log.jsonl", "log.csv")}
    metrics = make_trainer(tmp_path, max_steps=3).evaluate()
    assert metrics["eval_loss"] > 0 and {f: (tmp_path/f).read_bytes() for f in logs} == logs


@pytest.mark.parametrize("metric, best", [("eval_similarity", 4), ("wer", 2)])
def test_the_best_checkpoint_by_what_judges_logged(tmp_path, metric, best):
    scores = {0: (90.0, 0.1), 2: (10.0, 0.2), 4: (50.0, 0.9), 6: (60.0, 0.3)}
    class Judge(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in scores: self.trainer.log(dict(zip(("eval_wer", "eval_similarity"), scores[state.global_step])))
    judge = Judge()
    trainer = judge.trainer = make_trainer(tmp_path, max_steps=6, eval_steps=2, save_steps=2, save_total_limit=1, metric_for_best_model=metric, callbacks=[judge])
    trainer.train()
    assert trainer.state.best_global_step == best and validate_checkpoint(tmp_path/f"checkpoint-{best}").whole
