"""Speech from prompts: one clip per prompt, equal to the stock class's codes; options that would
break this are refused by name.
"""

import inspect
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    HiggsAudioV2ForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2Attention

from higgs_nb.data.codec import load_codec
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.delay import delay_pattern, undelay
from higgs_nb.data.higgs_codec import HiggsCodec
from higgs_nb.data.problems import AudioError
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer, fit_tokenizer
from higgs_nb.data.samples import encode_conversation, expand
from higgs_nb.model.layers import CACHE, cache_argument
from higgs_nb.model.load import load_model
from higgs_nb.model.model import tiny_model
from higgs_nb.model.place import check_directory
from higgs_nb.model.tokenizer import tokenizer_fingerprint
from higgs_nb.speech.clips import Speech, save_clips, speech_of
from higgs_nb.speech.codes import generate_codes
from higgs_nb.speech.forced import ForcedCodes, speak_beside
from higgs_nb.speech.generate import generate_speech
from higgs_nb.speech.options import HONOURED, OF_REPEATS, OF_SAMPLING, REFUSED, SET_HERE
from higgs_nb.speech.prompts import Encoder, prompt_of

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(TOKENIZER, hidden_size=64, num_layers=2, intermediate_size=128).eval()


@pytest.fixture(scope="module")
def stock(model):
    stock = HiggsAudioV2ForConditionalGeneration(model.config, use_text_head=True)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def batch_of(model, *texts):
    tokens = AudioTokens.from_config(model.config, TOKENIZER)
    samples = [
        prompt_of(tts_conversation(text, id=str(i)), TOKENIZER, tokens)
        for i, text in enumerate(texts)
    ]
    return PaddedCollator(tokens, pad_left=True)(samples)


def test_greedy_codes_are_those_of_the_stock_class(model, stock):
    batch = batch_of(model, "One.", "The line is busy.")
    ours, theirs = (generate_codes(m, batch, 12, do_sample=False) for m in (model, stock))
    assert torch.equal(ours, theirs) and ours.shape[1] >= 12


def test_audio_attention_generates_the_same_with_and_without_a_cache():
    talker = tiny_model(TOKENIZER, hidden_size=64, num_layers=2, intermediate_size=128)
    talker = type(talker)(
        type(talker.config)(**{**talker.config.to_dict(), "use_audio_out_self_attention": True})
    ).eval()
    batch = batch_of(talker, "One.")
    cached, anew = (
        generate_codes(talker, batch, 8, do_sample=False, use_cache=flag) for flag in (True, False)
    )
    assert torch.equal(cached, anew)


def test_a_step_reads_one_position_and_the_prefill_keeps_one(model):
    shapes, seen = [], []
    hooks = [
        model.audio_lm_head.register_forward_hook(
            lambda m, i, o: shapes.append(tuple(o.shape[:2]))
        ),
        model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.shape[1])),
    ]
    generate_codes(model, batch_of(model, "One.", "Two."), 5, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert set(shapes) == {(2, 1)} and seen[0] > 10 and set(seen[1:]) == {1}


def test_the_cache_has_the_name_that_the_layers_take():
    assert CACHE in inspect.signature(HiggsAudioV2Attention.forward).parameters


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_either_name(model, name):
    batch, cache = batch_of(model, "One."), DynamicCache(config=model.config)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"], **cache_argument(cache))
    inputs = model.prepare_inputs_for_generation(
        batch["input_ids"], attention_mask=batch["attention_mask"], **{name: cache}
    )
    assert cache.get_seq_length() == length and inputs[CACHE] is cache


def test_one_text_is_one_prompt(model):
    (clip,) = generate_speech(model, TOKENIZER, "Please hold.", max_frames=3)
    assert clip.text == "Please hold."


@pytest.mark.parametrize(
    "option",
    [
        dict(num_return_sequences=2),
        dict(num_return_sequences=2, do_sample=True),
        dict(num_beams=2),
        dict(return_dict_in_generate=True),
        dict(max_new_tokens=5),
        dict(max_length=9),
        dict(streamer=print),
        dict(min_new_tokens=4),
        dict(repetition_penalty=1.2),
        dict(max_frames=0),
        dict(batch_size=0),
        dict(max_frames=-1),
        dict(batch_size=2.0),
        dict(min_length=4),
        dict(synced_gpus=True),
    ],
    ids=str,
)
def test_options_that_break_one_clip_per_prompt_are_refused(model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        generate_speech(model, TOKENIZER, ["One."], **option)


def test_the_generation_config_is_looked_at_too(model):
    model.generation_config.num_return_sequences = 2
    try:
        with pytest.raises(ValueError, match="num_return_sequences=2 in the generation config"):
            generate_speech(model, TOKENIZER, ["One."])
    finally:
        model.generation_config.num_return_sequences = None


FIELDS = sorted(
    name
    for name in vars(GenerationConfig())
    if not name.startswith("_") and name not in ("transformers_version", "do_sample")
)
TAKEN = dict(  # option -> values that are honoured, then values out of range
    temperature=((0.5, 2), (0, -1.0, math.nan, math.inf, "1", True)),
    top_k=((0, 5), (-1, 2.5, True, "5")),
    top_p=((0.5, 1, 1.0), (0, 0.0, -0.1, 1.5, math.nan)),
    ras_win_len=((3,), (0, -1, 2.5)),
    ras_win_max_num_repeat=((1,), (0, -1, 2.5)),
    max_time=((60, 60.0), (0, -1, math.nan)),
    use_cache=((True, False), (1, "yes")),
    cache_implementation=(("dynamic", "static"), ("quantized", 3)),
    disable_compile=((True, False), (0, "no")),
    logits_processor=(([],), (print,)),
)
OUTSIDE = {"ras_win_len", "ras_win_max_num_repeat", "logits_processor"}


def together(name, value):
    "An option with those that it needs."
    more = dict(do_sample=True) if name in OF_SAMPLING else {}
    pair = dict.fromkeys(OF_REPEATS, 1) if name in OF_REPEATS else {}
    return {**pair, **more, name: value}


def test_the_options_are_honoured_or_refused_each_in_one_way():
    tables = [set(HONOURED), set(REFUSED), set(SET_HERE)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert set(TAKEN) == set(HONOURED)
    assert set(HONOURED) - OUTSIDE <= set(FIELDS)


@pytest.mark.parametrize("name", [*FIELDS, "seed", "streamer", "generation_config", "temprature"])
def test_every_field_of_a_generation_config_is_honoured_or_refused_by_name(name):
    model = small()
    good, bad = TAKEN.get(name, ((), ("anything", 3)))
    for value in good:
        (clip,) = generate_speech(model, TOKENIZER, "La.", max_frames=2, **together(name, value))
        assert clip.codes.shape[0] == 8
    for value in bad:
        with pytest.raises(ValueError, match=rf"(with|;) {name}={re.escape(repr(value))}: \w+"):
            generate_speech(model, TOKENIZER, "La.", max_frames=2, **together(name, value))


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_the_other_options_are_honoured_or_refused_by_name(name):
    test_every_field_of_a_generation_config_is_honoured_or_refused_by_name(name)


@pytest.mark.parametrize(
    "options, reason",
    [(together(name, 1) | dict(do_sample=False), "do_sample=True") for name in OF_SAMPLING]
    + [({name: 1}, "too") for name in OF_REPEATS]
    + [(dict(do_sample="yes"), "True or False")],
    ids=str,
)
def test_an_option_that_would_change_nothing_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        generate_speech(small(), TOKENIZER, "La.", max_frames=2, **options)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_in_a_generation_config_too(name):
    model = small()
    for harmless in REFUSED[name][0]:
        setattr(model.generation_config, name, harmless)
        generate_speech(model, TOKENIZER, "La.", max_frames=1)
    setattr(model.generation_config, name, 3)
    with pytest.raises(ValueError, match=f"{name}=3 in the generation config: "):
        generate_speech(model, TOKENIZER, "La.", max_frames=1)


def test_repeats_are_drawn_anew_whether_or_not_the_generation_config_says_so():
    options = dict(ras_win_len=4, ras_win_max_num_repeat=1)
    spoken = []
    for by_config in (True, False):
        model = small()
        if by_config:
            model.generation_config.update(**options, allow_custom_entries=True)
        torch.manual_seed(0)
        given = {} if by_config else options
        spoken.append(generate_speech(model, TOKENIZER, "La.", max_frames=20, **given)[0].codes)
    assert torch.equal(*spoken)
    plain = generate_speech(small(), TOKENIZER, "La.", max_frames=20)[0].codes
    assert not torch.equal(plain, spoken[0])


@given(st.integers(1, 24), st.integers(0, 40), st.integers(0, 10_000))
@settings(deadline=None)
def test_stopped_means_that_no_frame_is_missing(frames, rows, seed):
    codes = torch.randint(0, 1024, (8, frames), generator=torch.Generator().manual_seed(seed))
    delayed = delay_pattern(codes, torch.tensor([frames]), 1024, 1025)[0][:rows]
    clip, stopped = undelay(delayed, 1024, 1025)
    assert torch.equal(clip, codes[:, : clip.shape[1]])
    if stopped:
        assert torch.equal(clip, codes)
    if rows >= frames + 9:
        assert stopped  # BOS row, frames, seven rows of delay, EOS


@pytest.mark.parametrize("max_frames", [1, 9, 18, 19, 20, 21, 30])
def test_a_clip_that_was_cut_off_has_not_stopped(model, max_frames):
    "The model says twenty frames and EOS, with rows to spare for the delay of the codebooks."
    codes = torch.randint(0, 1024, (8, 20), generator=torch.Generator().manual_seed(0))
    forced = ForcedCodes([codes], range(8), AudioTokens.from_config(model.config, TOKENIZER))
    (clip,) = generate_speech(
        model, TOKENIZER, "One.", max_frames=max_frames, logits_processor=[forced]
    )
    assert torch.equal(clip.codes, codes[:, :max_frames]) and clip.stopped == (max_frames >= 20)


@given(st.integers(1, 24), st.integers(1, 7), st.integers(0, 23), st.sampled_from([1024, 1025]))
@settings(deadline=None)
def test_a_stray_stream_code_ends_a_clip_that_has_not_stopped(frames, codebook, at, stray):
    "Only EOS in the first codebook is the model's word for the end."
    at = min(at, frames - 1)
    codes = torch.randint(0, 1024, (8, frames), generator=torch.Generator().manual_seed(at))
    changed = codes.clone()
    changed[codebook, at] = stray
    delayed = delay_pattern(changed, torch.tensor([frames]), 1024, 1025)[0]
    clip, stopped = undelay(delayed, 1024, 1025)
    assert torch.equal(clip, codes[:, :at]) and not stopped


NASTY = st.text(st.sampled_from("./\\\0~$é ab"), max_size=300)


@given(st.lists(NASTY, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_clips_stay_in_their_folder_whatever_their_ids(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("clips")
    (folder / "mine.wav").write_bytes(b"mine")
    speech = [
        Speech(id, "La.", torch.zeros(8, 1), True, 24000, torch.zeros(960))
        for id in (*ids, str(folder / "mine"), "../mine")
    ]
    rows = save_clips(speech, folder / "run/step-000000")
    assert json.loads((folder / "run/step-000000/clips.json").read_text()) == rows and [
        r["id"] for r in rows
    ] == [s.id for s in speech]
    assert {p.name for p in folder.iterdir()} == {"mine.wav", "run"} and (
        folder / "mine.wav"
    ).read_bytes() == b"mine"
    assert {p.name for p in (folder / "run/step-000000").iterdir()} == {
        "clips.json",
        *(r["file"] for r in rows),
    }


SMALL = dict(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, codebook_size=34)


def small(**config):
    return tiny_model(TOKENIZER, **{**SMALL, **config}).eval()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [False, True])
def test_logits_that_are_not_finite_end_generation(value, sampling):
    model = small()
    with torch.no_grad():
        model.audio_lm_head.weight[5] = value
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        generate_speech(model, TOKENIZER, ["One."], max_frames=4, do_sample=sampling)


@pytest.mark.parametrize(
    "part", ["audio_lm_head", "text_lm_head", "model.embed_tokens", "model.embed_audio_tokens"]
)
def test_float32_parts_on_a_16_bit_base_speak(part):
    model = small().to(torch.bfloat16)
    model.get_submodule(part).float()
    (clip,) = generate_speech(model, TOKENIZER, ["One."], max_frames=4)
    assert clip.codes.shape[0] == 8


@given(st.integers(1, 9), st.booleans())
@settings(max_examples=6, deadline=None)
def test_the_text_head_follows_the_vocabulary(tmp_path_factory, more, mean):
    folder, model = tmp_path_factory.mktemp("base"), small()
    head = model.text_lm_head.weight.detach().clone()
    rows = len(head) + more
    model.resize_token_embeddings(rows, mean_resizing=mean)
    assert (
        len(model.text_lm_head.weight)
        == model.config.vocab_size
        == model.get_input_embeddings().num_embeddings
        == rows
    )
    assert torch.equal(model.text_lm_head.weight[: len(head)], head)
    model.save_pretrained(folder)
    assert torch.equal(load_model(str(folder)).text_lm_head.weight, model.text_lm_head.weight)


def test_tokens_without_a_row_are_named():
    more = byte_tokenizer()
    more.add_tokens(["<laugh>", "<sigh>"])
    with pytest.raises(
        ValueError,
        match=(
            "2 tokens beyond the model's vocab_size 271: <laugh>, <sigh>.*resize_token_embeddings"
        ),
    ):
        generate_speech(small(), more, ["One."])
    model = small()
    model.resize_token_embeddings(len(more))
    assert generate_speech(model, more, ["One <laugh>."], max_frames=2)


def test_a_fingerprint_is_that_of_the_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = type(TOKENIZER).from_pretrained(tmp_path)
    more = byte_tokenizer()
    more.add_tokens(["<laugh>"])
    others = [
        more,
        fit_tokenizer(["one two three " * 20], 300),
        fit_tokenizer(["four five six " * 20], 300),
    ]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(TOKENIZER)
    assert len({tokenizer_fingerprint(t) for t in (TOKENIZER, *others)}) == 4


def test_a_prompt_of_another_type_is_named(model):
    with pytest.raises(TypeError, match="prompt 1 is a int: give a text or a Conversation"):
        generate_speech(model, TOKENIZER, ["One.", 2])


def packed(model):
    tokens = AudioTokens.from_config(model.config, TOKENIZER)
    codes = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(0))
    talk = tts_conversation("One.", Audio(path="a.wav"), id="a")
    return PackedCollator(tokens)([expand(encode_conversation(talk, TOKENIZER, [codes]), tokens)])


def test_attention_dropout_is_refused_in_training():
    model = small().train()
    model.config.attention_dropout = 0.1
    with pytest.raises(
        ValueError, match="attention_dropout=0.1.*set model.config.attention_dropout = 0"
    ):
        model(**packed(model))
    assert torch.isfinite(model.eval()(**packed(model)).loss)


@pytest.mark.parametrize(
    "config, remedy",
    [
        ({"model_type": "higgs_audio"}, "load_original"),
        ({"model_type": "higgs_audio_v2_tokenizer"}, "load_codec"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ([], "model_type None"),
    ],
)
def test_what_is_no_base_is_named(tmp_path, config, remedy):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"cannot be loaded as a base: .*{remedy}"):
        load_model(str(tmp_path))


def test_an_adapter_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter.*load_lora_adapters"):
        load_model(str(tmp_path))


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in (
        "runs/mybase",
        "./mybase",
        "../mybase",
        "~/mybase",
        "/nowhere/base",
        str(tmp_path / "gone"),
        "a/b/c",
        "my base",
        "runs/x\0",
        "",
    ):
        with pytest.raises(FileNotFoundError, match="no directory .* not asked of the hub"):
            check_directory(name)
        with pytest.raises(FileNotFoundError):
            load_model(name)
    for name in ("runs", tmp_path, "bosonai/higgs-audio-v2-generation-3B-base", "gpt2"):
        check_directory(name)


def test_a_tower_is_read_from_safetensors_alone(tmp_path):
    "One whose weights are a pickle is not opened."
    sizes = dict(d_model=8, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=8)
    whisper = WhisperModel(WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=1))
    small().save_pretrained(tmp_path / "base")
    whisper.save_pretrained(tmp_path / "whisper")
    (tmp_path / "whisper/model.safetensors").unlink()
    torch.save(whisper.state_dict(), tmp_path / "whisper/pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path / "base"), whisper=str(tmp_path / "whisper"))


def test_a_codec_is_read_from_safetensors_alone(monkeypatch):
    "Its class needs torchaudio, so that another stands for it here."

    class Tokenizer:
        config = SimpleNamespace(sample_rate=24000, frame_rate=25, num_quantizers=8, hop_length=960)
        config.codebook_size = 1024
        eval = to = requires_grad_ = lambda self, value=None: self

        @classmethod
        def from_pretrained(cls, name, use_safetensors=None, **options):
            assert use_safetensors is True and options["output_loading_info"]
            return cls(), {}

    monkeypatch.setattr("higgs_nb.data.higgs_codec._require_torchaudio", lambda: None)
    monkeypatch.setattr("transformers.HiggsAudioV2TokenizerModel", Tokenizer)
    assert HiggsCodec.from_pretrained("OWNER/NAME").num_codebooks == 8


def test_recordings_may_be_as_long_as_the_run_allows(tmp_path):
    sf.write(tmp_path / "long.wav", np.full(31 * 24000, 0.1), 24000)
    talk = tts_conversation("One.", Audio(path=str(tmp_path / "long.wav")), id="long")
    codec = load_codec()
    for refused in (lambda: Encoder(codec).get(talk.audio[0]), lambda: speech_of([talk])):
        with pytest.raises(AudioError, match="limit is 30 s"):
            refused()
    assert Encoder(codec, 40).get(talk.audio[0]).shape[1] > 750
    assert speech_of([talk], max_duration_s=40)[0].duration_s == 31
    with pytest.raises(AudioError, match="limit is 29 s"):
        speak_beside(small(), TOKENIZER, [talk], codec, range(8), max_duration_s=29)
