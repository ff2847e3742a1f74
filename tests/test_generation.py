"Speech from prompts: one clip per prompt, equal to the stock class's codes; options that would break this are refused by name."
import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2Attention

from higgs_nb.codec import load_codec
from higgs_nb.collator import PaddedCollator
from higgs_nb.generate import Speech, generate_codes, generate_speech, prompt_of, save_clips
from higgs_nb.layers import CACHE
from higgs_nb.model import tiny_model
from higgs_nb.samples import AudioTokens, byte_tokenizer, delay_pattern, undelay
from higgs_nb.chatml import tts_conversation

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model(): return tiny_model(TOKENIZER, hidden_size=64, num_layers=2, intermediate_size=128).eval()


@pytest.fixture(scope="module")
def stock(model):
    stock = HiggsAudioV2ForConditionalGeneration(model.config, use_text_head=True)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def batch_of(model, *texts):
    tokens = AudioTokens.from_config(model.config, TOKENIZER)
    samples = [prompt_of(tts_conversation(text, id=str(i)), TOKENIZER, tokens) for i, text in enumerate(texts)]
    return PaddedCollator(tokens, pad_left=True)(samples)


def test_greedy_codes_are_those_of_the_stock_class(model, stock):
    batch = batch_of(model, "One.", "The line is busy.")
    ours, theirs = (generate_codes(m, batch, 12, do_sample=False) for m in (model, stock))
    assert torch.equal(ours, theirs) and ours.shape[1] >= 12


def test_audio_attention_generates_the_same_with_and_without_a_cache():
    talker = tiny_model(TOKENIZER, hidden_size=64, num_layers=2, intermediate_size=128)
    talker = type(talker)(type(talker.config)(**{**talker.config.to_dict(), "use_audio_out_self_attention": True})).eval()
    batch = batch_of(talker, "One.")
    cached, anew = (generate_codes(talker, batch, 8, do_sample=False, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached, anew)


def test_a_step_reads_one_position_and_the_prefill_keeps_one(model):
    shapes, seen = [], []
    hooks = [model.audio_lm_head.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[:2]))),
             model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))]
    generate_codes(model, batch_of(model, "One.", "Two."), 5, do_sample=False)
    for hook in hooks: hook.remove()
    assert set(shapes) == {(2, 1)} and seen[0] > 10 and set(seen[1:]) == {1}


def test_the_cache_has_the_name_that_the_layers_take():
    assert CACHE in inspect.signature(HiggsAudioV2Attention.forward).parameters


def test_one_text_is_one_prompt(model):
    (clip,) = generate_speech(model, TOKENIZER, "Please hold.", max_frames=3)
    assert clip.text == "Please hold."


@pytest.mark.parametrize("option", [dict(num_return_sequences=2), dict(num_beams=2), dict(return_dict_in_generate=True), dict(max_new_tokens=5),
                                    dict(max_length=9), dict(streamer=print), dict(min_new_tokens=4), dict(repetition_penalty=1.2),
                                    dict(max_frames=0), dict(batch_size=0), dict(max_frames=-1), dict(batch_size=2.0)], ids=str)
def test_options_that_break_one_clip_per_prompt_are_refused(model, option):
    with pytest.raises(ValueError, match=next(iter(option))): generate_speech(model, TOKENIZER, ["One."], **option)


def test_the_generation_config_is_looked_at_too(model):
    model.generation_config.num_return_sequences = 2
    try:
        with pytest.raises(ValueError, match="num_return_sequences=2 in the generation config"): generate_speech(model, TOKENIZER, ["One."])
    finally: model.generation_config.num_return_sequences = None


@given(st.integers(1, 24), st.integers(0, 40), st.integers(0, 10_000))
@settings(deadline=None)
def test_stopped_means_that_no_frame_is_missing(frames, rows, seed):
    codes = torch.randint(0, 1024, (8, frames), generator=torch.Generator().manual_seed(seed))
    delayed = delay_pattern(codes, torch.tensor([frames]), 1024, 1025)[0][:rows]
    clip, stopped = undelay(delayed, 1024, 1025)
    assert torch.equal(clip, codes[:, :clip.shape[1]])
    if stopped: assert torch.equal(clip, codes)
    if rows >= frames + 9: assert stopped  # BOS row, frames, seven rows of delay, EOS


NASTY = st.text(st.sampled_from("./\\\0~$é ab"), max_size=300)


@given(st.lists(NASTY, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_clips_stay_in_their_folder_whatever_their_ids(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("clips")
    (folder/"mine.wav").write_bytes(b"mine")
    speech = [Speech(id, "La.", torch.zeros(8, 1), True, 24000, torch.zeros(960)) for id in (*ids, str(folder/"mine"), "../mine")]
    rows = save_clips(speech, folder/"run/step-000000")
    assert json.loads((folder/"run/step-000000/clips.json").read_text()) == rows and [r["id"] for r in rows] == [s.id for s in speech]
    assert {p.name for p in folder.iterdir()} == {"mine.wav", "run"} and (folder/"mine.wav").read_bytes() == b"mine"
    assert {p.name for p in (folder/"run/step-000000").iterdir()} == {"clips.json", *(r["file"] for r in rows)}
