"Codecs whose weights are not a codec's, and codecs that do not belong to a base."

import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_codec import needs_torchaudio, tiny_higgs_codec

from higgs_nb.data import codec as codec_module
from higgs_nb.data.audio import load_audio
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import check_codec, load_codec
from higgs_nb.data.codec_pairs import check_codec_fits, codec_of_base
from higgs_nb.data.collator import PackedCollator
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.data.higgs_codec import HIGGS_CODEC, HIGGS_CODEC_COPY, HiggsCodec, is_training_only
from higgs_nb.data.prepared_codes import check_prepared
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.model import HiggsAudioForTraining, tiny_config, tiny_model

CLIPS = sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[:3]
TOKENIZER = byte_tokenizer()
CONFIG = tiny_config(TOKENIZER, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)

pytestmark = needs_torchaudio


@pytest.fixture(autouse=True)
def nothing_is_checked_yet(monkeypatch):
    monkeypatch.setattr(codec_module, "_CHECKED", set())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Folders of codecs: (frames per second, codebooks, entries) -> folder."
    root = tmp_path_factory.mktemp("codecs")
    shapes = [(25, 8, 1024), (12.5, 4, 1024), (25, 32, 1024), (25, 4, 1024), (25, 8, 512)]
    shapes.append((12.5, 8, 1024))
    return {s: tiny_higgs_codec(root / f"{s[0]}-{s[1]}-{s[2]}", *s) for s in shapes}


@pytest.fixture
def folder(folders, tmp_path):
    "A copy of the codec of the released shape, to be damaged."
    return shutil.copytree(folders[25, 8, 1024], tmp_path / "codec")


def config_of(codebooks=8, size=1026, **more):
    return tiny_config(TOKENIZER, num_codebooks=codebooks, codebook_size=size, **more)


# codec, (codebooks, codebook_size) of the base, what the error says of either
WRONG_PAIRS = [
    ((25, 32, 1024), (8, 1026), "mine has 32 codebooks, and base has learned 8 codebooks"),
    ((25, 4, 1024), (8, 1026), "mine has 4 codebooks, and base has learned 8 codebooks"),
    ((25, 8, 512), (8, 1026), "mine has 512 codes .* base has learned 1024 codes per codebook"),
    ((25, 8, 1024), (8, 514), "mine has 1024 codes .* base has learned 512 codes per codebook"),
    ((12.5, 8, 1024), (8, 1026), "mine has 12.5 frames .* base has learned 25 frames per second"),
    ((12.5, 4, 1024), (8, 1026), "4 codebooks, 12.5 frames .* 8 codebooks, 25 frames"),
]


@pytest.mark.parametrize("shape, of_base, message", WRONG_PAIRS, ids=lambda v: str(v))
def test_a_pair_that_differs_is_an_error(folders, shape, of_base, message):
    codec = HiggsCodec.from_pretrained(folders[shape])
    assert (codec.frame_rate, codec.num_codebooks, codec.codebook_size) == shape
    with pytest.raises(ValueError, match=message):
        check_codec_fits(codec, config_of(*of_base), "mine", "base")


@pytest.mark.parametrize("shape", [(25, 8, 1024), (12.5, 4, 1024), (25, 32, 1024), (25, 8, 512)])
def test_a_pair_that_agrees_is_none(folders, shape):
    check_codec_fits(HiggsCodec.from_pretrained(folders[shape]), config_of(shape[1], shape[2] + 2))


def test_a_base_may_say_its_frame_rate(folders):
    codec, config = HiggsCodec.from_pretrained(folders[12.5, 8, 1024]), config_of()
    config.frame_rate = 12.5
    check_codec_fits(codec, config)
    with pytest.raises(ValueError, match="has learned 12.5 frames per second"):
        check_codec_fits(load_codec("world"), config)


def test_surplus_codebooks_are_not_cut(folders, tmp_path):
    "A model of 8 codebooks would take the first 8 of 32 and learn them."
    store = CodeStore(tmp_path, load_codec(folders[25, 32, 1024]))
    talks = [tts_conversation("Hi.", Audio(str(CLIPS[0])), id="hi")]
    data = SampleDataset(talks, TOKENIZER, store, AudioTokens.from_config(CONFIG, TOKENIZER))
    with pytest.raises(ValueError, match="'hi' has codes of 32 codebooks, the model reads 8"):
        data[0]


def test_a_codec_of_12_5_frames_and_4_codebooks_trains(folders, tmp_path):
    "Corpus, store, samples, model, loss: nothing depends on 25 frames and 8 codebooks."
    codec = load_codec(folders[12.5, 4, 1024])
    config = tiny_config(
        TOKENIZER, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, num_codebooks=4
    )
    check_codec_fits(codec, config)
    store = CodeStore(tmp_path, codec)
    talks = [tts_conversation("Hi.", Audio(str(clip)), id=clip.stem) for clip in CLIPS]
    audios = [audio for talk in talks for audio in talk.audio]
    assert store.encode_all(audios, progress=False)["misses"] == 3
    tokens = AudioTokens.from_config(config, TOKENIZER)
    samples = list(SampleDataset(talks, TOKENIZER, store, tokens))
    for clip, sample in zip(CLIPS, samples, strict=True):
        frames = -(-len(load_audio(clip)) // 1920)
        assert sample.audio_ids.shape == (frames + 5, 4)
    torch.manual_seed(0)
    model = HiggsAudioForTraining(config)
    result = model(**PackedCollator(tokens)(samples))
    result.loss.backward()
    assert result.codebook_losses.shape == (4,)
    assert abs(result.audio_loss.item() - np.log(1026)) < 0.2
    assert model.audio_lm_head.weight.grad.abs().sum() > 0


def damage(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def talker(weights):
    "The weights of a language model, as the hub's repository of the codec has had them."
    weights.clear()
    weights.update({k: v.clone() for k, v in tiny_model(TOKENIZER).state_dict().items()})


DAMAGES = {
    "missing": (lambda w: w.pop("fc.weight"), r"1 missing \(fc.weight\)"),
    "unexpected": (lambda w: w.update(other=torch.ones(1)), r"1 unexpected \(other\)"),
    "escapes": (lambda w: w.update({"\x1b[2J": torch.ones(1)}), r"1 unexpected \(\\x1b\[2J\)"),
    "mismatched": (lambda w: w.update({"fc.bias": torch.ones(3)}), "1 mismatched .*fc.bias"),
    "codebooks": (
        lambda w: [w.pop(k) for k in list(w) if k.endswith(".codebook.embed")],
        r"8 missing \(quantizer.quantizers.0.codebook.embed",
    ),
    "talker": (talker, r"\d+ missing \(acoustic_decoder.*; \d+ unexpected \(audio_lm_head.weight"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_that_are_not_the_codecs_are_an_error(folder, kind):
    change, message = DAMAGES[kind]
    damage(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_codec(folder)
    assert str(folder) in str(error.value) and HIGGS_CODEC_COPY in str(error.value)


def test_a_folder_without_safetensors_is_an_error(folder):
    (folder / "model.safetensors").rename(folder / "model.pth")
    with pytest.raises(OSError, match="model.safetensors") as error:
        load_codec(folder)
    assert HIGGS_CODEC_COPY in str(error.value)


def test_weights_of_the_codecs_training_may_be_missing(folder):
    "They decide neither codes nor sound nor fingerprint, though they are random then."
    codec, speech = load_codec(folder), load_audio(CLIPS[0])
    codes, sound, fingerprint = codec.encode(speech), None, codec.fingerprint
    sound = codec.decode(codes)
    unused = [k for k in codec.model.state_dict() if is_training_only(k)]
    assert {k.split(".")[0] for k in unused} == {"fc1", "decoder_semantic", "quantizer"}
    damage(folder, lambda w: [w.pop(k) for k in unused])
    again = load_codec(folder)
    assert not torch.equal(again.model.fc1.weight, codec.model.fc1.weight)
    assert again.fingerprint == fingerprint and torch.equal(again.encode(speech), codes)
    assert torch.equal(again.decode(codes), sound)


def test_what_is_needed_decides_the_fingerprint(folder, folders):
    names = [k for k in load_file(folder / "model.safetensors") if not is_training_only(k)]
    assert len(names) > 250
    for name in names[::40]:
        damage(folder, lambda w, name=name: w.update({name: w[name] + 1}))
    assert load_codec(folder).fingerprint != load_codec(folders[25, 8, 1024]).fingerprint


def test_an_untrained_codec_is_an_error(tmp_path, folders):
    "The class as transformers initialises it, complete and saved by the library itself."
    codec = HiggsCodec.from_pretrained(folders[25, 8, 1024])
    untrained = type(codec.model)(codec.model.config)
    untrained.save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match="untrained gives nearly every frame .* 0, 1, 2, 3, 4, 5,"):
        load_codec(tmp_path / "untrained")


def test_one_constant_codebook_is_enough(folders):
    codec = HiggsCodec.from_pretrained(folders[25, 8, 1024])
    codec.model.quantizer.quantizers[5].codebook.embed.zero_()
    with pytest.raises(ValueError, match="in the codebooks 5 of 8"):
        check_codec(codec)


def test_the_codec_is_checked_once_per_process(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(codec_module, "check_codec", lambda codec, name: calls.append(name))
    for _ in range(3):
        load_codec(folders[25, 8, 1024])
        load_codec(folders[12.5, 4, 1024])
    assert calls == [folders[25, 8, 1024], folders[12.5, 4, 1024]]


def test_a_folder_that_is_something_else_says_what(tmp_path):
    tiny_model(TOKENIZER).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="is a model of type higgs_audio_v2: give the folder of"):
        load_codec(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: give the codec of its base"):
        load_codec(tmp_path / "adapter")
    with pytest.raises(ValueError, match="neither a folder here nor a name on the hub"):
        load_codec(f"{tmp_path}/none")
    (tmp_path / "adapter/config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_codec(tmp_path / "adapter")


def test_a_misspelt_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/codec is not a codec"):
        load_codec("runs/codec")
    assert HiggsCodec.recognises(HIGGS_CODEC) and HiggsCodec.recognises(HIGGS_CODEC_COPY)


def cached(hub, repository, revision="a" * 40):
    "The folder of a repository's files in a cache of the hub."
    home = hub / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(revision)
    (home / "snapshots" / revision).mkdir(parents=True)
    return home / "snapshots" / revision


def test_a_folder_inside_a_repository(folders, tmp_path):
    "From the cache of the hub, without a network, as `codec_of_base` reads a base there."
    inside = cached(tmp_path, "k2-fsa/OmniVoice") / "audio_tokenizer"
    shutil.copytree(folders[25, 8, 1024], inside)
    talkers = cached(tmp_path, HIGGS_CODEC)
    shutil.copytree(folders[25, 8, 1024], talkers, dirs_exist_ok=True)
    damage(talkers, talker)
    named = dict(audio_tokenizer_name_or_path=HIGGS_CODEC)
    base = cached(tmp_path, "some/base")
    (base / "processor_config.json").write_text(json.dumps(dict(audio_tokenizer=named)))
    code = """
    from higgs_nb.data.codec import load_codec
    from higgs_nb.data.codec_pairs import codec_of_base
    from higgs_nb.data.higgs_codec import HiggsCodec
    print(load_codec("k2-fsa/OmniVoice:audio_tokenizer").fingerprint)
    print(HiggsCodec.from_pretrained("k2-fsa/OmniVoice", subfolder="audio_tokenizer").fingerprint)
    print(codec_of_base("some/base"))
    for name in (codec_of_base("some/base"), "k2-fsa/OmniVoice:other"):
        try:
            load_codec(name)
        except (ValueError, OSError) as error:
            print(type(error).__name__, " ".join(str(error).split()))
    try:
        codec_of_base("other/base")
    except OSError as error:
        print("OSError", " ".join(str(error).split()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stdout + done.stderr[-3000:]
    fingerprint = HiggsCodec.from_pretrained(folders[25, 8, 1024]).fingerprint
    assert lines[:3] == [fingerprint, fingerprint, HIGGS_CODEC]
    assert lines[3].startswith("ValueError bosonai/higgs-audio-v2-tokenizer does not hold")
    assert HIGGS_CODEC_COPY in lines[3] and "audio_lm_head" in lines[3]
    assert lines[4].startswith("OSError") and "k2-fsa/OmniVoice:other cannot be read" in lines[4]
    assert lines[5].startswith("OSError other/base cannot be reached")


def test_the_codec_that_a_saved_processor_names(tmp_path, folders):
    "As transformers writes it: the path or the id that the codec was loaded from."
    from transformers import DacFeatureExtractor, HiggsAudioV2Processor

    codec = HiggsCodec.from_pretrained(folders[25, 8, 1024])
    extractor = DacFeatureExtractor(sampling_rate=24000, hop_length=960)
    processor = HiggsAudioV2Processor(extractor, TOKENIZER, audio_tokenizer=codec.model)
    processor.save_pretrained(tmp_path)
    named = codec_of_base(tmp_path)
    assert named == str(folders[25, 8, 1024])
    assert load_codec(named).fingerprint == codec.fingerprint
    TOKENIZER.save_pretrained(tmp_path / "bare")
    assert codec_of_base(tmp_path / "bare") is None


def test_a_name_that_leaves_the_base_is_a_name(tmp_path):
    "What a base says is looked up as a name; a path out of it is refused."
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    named = dict(audio_tokenizer_name_or_path="../other")
    file = tmp_path / "base/processor_config.json"
    file.write_text(json.dumps(dict(audio_tokenizer=named)))
    with pytest.raises(ValueError, match="leads out of"):
        codec_of_base(tmp_path / "base")


def test_a_directory_of_another_codec_is_an_error(tmp_path, folders):
    ours, other = load_codec("world"), load_codec(folders[25, 8, 1024])
    check_prepared(tmp_path, other)
    CodeStore(tmp_path / "codes", ours).encode_all([Audio(str(CLIPS[0]))], progress=False)
    CodeStore(tmp_path / "codes", other)  # its folder is empty
    with pytest.raises(ValueError, match=f"another codec: \\({ours.fingerprint[:16]}\\)"):
        check_prepared(tmp_path, other, "released")
    run = dict(codec=dict(name="world", fingerprint=ours.fingerprint))
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="another codec: 'world' .* this run has 'released'") as e:
        check_prepared(tmp_path, other, "released")
    assert ours.fingerprint[:16] in str(e.value) and other.fingerprint[:16] in str(e.value)
    check_prepared(tmp_path, other, reencode=True)
    check_prepared(tmp_path, ours)
    for text in ("[]", '{"codec": 3}', '{"codec": {"fingerprint": 3}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="was encoded by another codec"):
            check_prepared(tmp_path, other)
