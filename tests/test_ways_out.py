"""What leaves the package: layouts, models merged from the disk, files for processors; and how much
memory that takes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle_adapter import forward
from oracle_recordings import COMPACT, Recordings
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperModel

from higgs_nb.checkpoint.adapter import save_lora_adapters
from higgs_nb.checkpoint.base import describe_base
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.merged import merge_stored
from higgs_nb.checkpoint.saving import save_checkpoint
from higgs_nb.checkpoint.stored import INDEX, ONE_FILE, weight_names
from higgs_nb.checkpoint.whole_model import model_files
from higgs_nb.cli.answers import answers
from higgs_nb.cli.doctor import check_hub
from higgs_nb.cli.export import Question, export_files
from higgs_nb.cli.export_files import merged_contents
from higgs_nb.cli.processor import SETTINGS, processor_files
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import EMBEDDINGS, HEADS, apply_lora, create_lora_config
from higgs_nb.model.merge import merge_lora
from higgs_nb.model.model import tiny_model
from higgs_nb.original.command import main as higgs_convert
from higgs_nb.original.disk import convert_folder
from higgs_nb.original.to_original import NOTE

recordings = Recordings(os.environ.get("HIGGS_ORACLE") or COMPACT)
TOKENIZER = byte_tokenizer()
SIZES = dict(hidden_size=64, num_layers=2, intermediate_size=96)


def bytes_of(folder: Path) -> dict[str, bytes]:
    "Name -> content of every file in a folder."
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def recorded_checkpoint(folder: Path, variant: str, shards: int) -> dict[str, torch.Tensor]:
    "A checkpoint of the original as a folder, from what was recorded; its tensors."
    folder.mkdir()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(recordings.folder / "tokenizer.json"))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(recordings.model["configs"][variant], indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id": 309}')
    weights = recordings.weights(variant)
    names = sorted(weights)
    files = {
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)
    }
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file)
    where = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return weights


@pytest.mark.parametrize("variant, shards", [("a", 1), ("b", 3), ("c", 2)])
def test_a_recorded_checkpoint_there_and_back(variant, shards, tmp_path):
    """Converted, it gives the recorded logits; converted back, every tensor has its bits, and both
    configurations and the tokenizer their bytes.
    """
    weights = recorded_checkpoint(tmp_path / "theirs", variant, shards)
    assert higgs_convert([str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    model = load_model(str(tmp_path / "ours"))
    with torch.no_grad():
        distances = [
            recordings.distance(forward(model.eval(), run, inputs), run)
            for run, inputs in recordings.model_runs(variant)
        ]
    assert distances and max(distances) <= 5e-5
    assert higgs_convert([str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    again = tmp_path / "again"
    found = {}
    for name in weight_names(again):
        found |= load_file(again / name)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    first, second = bytes_of(tmp_path / "theirs"), bytes_of(again)
    texts = [name for name in first if name.endswith(".json") and name != INDEX]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(texts)
    assert [name for name in texts if first[name] != second[name]] == []


def test_what_was_added_to_a_converted_model_is_in_the_original_s_settings(tmp_path):
    "Audio self-attention that was trained on a base from the original goes back with it."
    recorded_checkpoint(tmp_path / "theirs", "a", 1)
    convert_folder(tmp_path / "theirs", tmp_path / "base")
    base = dict(name_or_path=str(tmp_path / "base"), use_audio_out_self_attention=True)
    trained(base, tmp_path / "adapter", create_lora_config(r=2))
    stored = merge_stored(base, tmp_path / "adapter")
    contents = merged_contents(stored, "original", tmp_path / "base", "")
    save_checkpoint(tmp_path / "original", contents.contents, meta=contents.meta)
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "original")
    )
    assert after.pop("use_audio_out_self_attention") and not before.pop(
        "use_audio_out_self_attention"
    )
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert "layers.0.audio_attn.q_proj.weight" in load_file(tmp_path / "original" / ONE_FILE)


@pytest.mark.parametrize("remaining", [1, 2, 3])
def test_a_conversion_that_fails_leaves_nothing(remaining, tmp_path):
    "A shard that ends early, one that is missing, and a tensor of the wrong shape."
    recorded_checkpoint(tmp_path / "theirs", "a", 3)
    file = tmp_path / "theirs" / f"model-0000{remaining}-of-00003.safetensors"
    if remaining == 1:
        file.write_bytes(file.read_bytes()[:-4])
    elif remaining == 2:
        file.unlink()
    else:
        part = load_file(file)
        name = next(iter(part))
        save_file(part | {name: torch.zeros(1)}, file)
    assert higgs_convert([str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    "A codec, an adapter without its base, pickled weights, and a target that exists."
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "config.json").write_text('{"model_type": "higgs_audio_v2_tokenizer"}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    recorded_checkpoint(tmp_path / "pickled", "a", 1)
    (tmp_path / "pickled" / INDEX).unlink()
    file = tmp_path / "pickled" / "model-00001-of-00001.safetensors"
    file.rename(tmp_path / "pickled" / "pytorch_model.bin")
    for source, target, message in (
        ("codec", "x", "model_type 'higgs_audio_v2_tokenizer'"),
        ("adapter", "x", "--base"),
        ("pickled", "x", "load_original"),
        ("pickled", "codec", "its place is taken"),
    ):
        assert higgs_convert([str(tmp_path / source), str(tmp_path / target)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_the_doctor_names_the_command_for_an_original_base(where, tmp_path, monkeypatch):
    "For a folder, and for a download that is in the cache of the hub."
    recorded_checkpoint(tmp_path / "theirs", "a", 1)
    config = str(tmp_path / "theirs" / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: config)
    base = str(tmp_path / "theirs") if where == "folder" else "someone/theirs"
    finding = check_hub(base)
    assert finding.state == "problem" and f"higgs_convert {base} TARGET" in finding.found


def trained(base: dict, folder: Path, config) -> torch.nn.Module:
    "An adapter whose every tensor is random, saved in `folder`; the model with it."
    model = apply_lora(load_model(**base), config).eval()
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    save_lora_adapters(model, folder, base=describe_base(model))
    return model


KINDS = {
    "plain": dict(r=4),
    "heads and embeddings in full": dict(r=4, train=HEADS + EMBEDDINGS),
    "rsLoRA with other ranks": dict(r=4, use_rslora=True, rank_pattern={"mlp.gate_proj": 8}),
    "DoRA": dict(r=4, use_dora=True),
    "rows of the embedding": dict(r=4, trainable_token_indices={"embed_tokens": [3, 7]}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_from_the_disk_is_merged_in_memory(kind, dtype, tmp_path):
    "Every file has the bytes that the merge in memory gives, whatever was trained."
    tiny_model(TOKENIZER, **SIZES).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    base = dict(name_or_path=str(tmp_path / "base"))
    model = trained(base, tmp_path / "adapter", create_lora_config(**KINDS[kind]))
    made = merge_stored(base, tmp_path / "adapter").files()
    expected = model_files(merge_lora(model), copy=True)
    for name, contents in (("made", made), ("expected", expected)):
        save_checkpoint(tmp_path / name, contents, meta={})
    assert bytes_of(tmp_path / "made") == bytes_of(tmp_path / "expected")


def test_merged_from_the_disk_in_another_precision(tmp_path):
    "`precision=float32` on a base in 16 bits is what loading it in float32 and merging gives."
    tiny_model(TOKENIZER, **SIZES).bfloat16().save_pretrained(tmp_path / "base")
    base = dict(name_or_path=str(tmp_path / "base"))
    model = trained(base | dict(dtype="float32"), tmp_path / "adapter", create_lora_config(r=4))
    made = merge_stored(base, tmp_path / "adapter", "float32").files()
    save_checkpoint(tmp_path / "made", made, meta={})
    found = load_file(tmp_path / "made" / ONE_FILE)
    expected = merge_lora(model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_whisper_tower_is_merged_too(tmp_path):
    "It comes from the Whisper model that the run named; its projector from the adapter."
    config = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        num_mel_bins=80,
        max_source_positions=50,
    )
    torch.manual_seed(0)
    WhisperModel(config).save_pretrained(tmp_path / "whisper")
    tiny_model(TOKENIZER, **SIZES).save_pretrained(tmp_path / "base")
    base = dict(name_or_path=str(tmp_path / "base"), whisper=str(tmp_path / "whisper"))
    model = trained(base, tmp_path / "adapter", create_lora_config(r=4))
    made = merge_stored(base, tmp_path / "adapter").files()
    save_checkpoint(tmp_path / "made", made, meta={})
    expected = merge_lora(model).state_dict()
    found = load_file(tmp_path / "made" / ONE_FILE)
    assert found.keys() == expected.keys() and any("audio_tower" in name for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A base and an adapter on the disk, and what the adapted model answers."
    folder = tmp_path_factory.mktemp("run")
    tiny_model(TOKENIZER, **SIZES).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base = dict(name_or_path=str(folder / "base"))
    model = trained(base, folder / "adapter", create_lora_config(r=4, train=HEADS))
    return folder, base, answers(model, TOKENIZER, "Please hold.", 12)


def exported(run, kind: str, path: Path, **options):
    "A merged model, exported."
    folder, base, said = run
    stored = merge_stored(base, folder / "adapter")
    contents = merged_contents(stored, kind, folder / "base", "# A card\n", **options)
    return export_files(contents, path, Question("Please hold.", 12), said)


def test_the_original_s_layout_is_the_merged_export_converted(run, tmp_path):
    "Bit by bit: weights, both configurations and the tokenizer."
    for kind in ("merged", "original"):
        assert exported(run, kind, tmp_path / kind).same_codes
    convert_folder(tmp_path / "merged", tmp_path / "converted")
    own = {"README.md", "manifest.json"}
    made, converted = (
        {name: data for name, data in bytes_of(tmp_path / kind).items() if name not in own}
        for kind in ("original", "converted")
    )
    assert made == converted and {"config.json", "generation_config.json", ONE_FILE} < made.keys()


def test_an_export_that_answers_otherwise_is_not_there(run, tmp_path):
    folder, base, said = run
    other = {
        name: -tensor if tensor.is_floating_point() else tensor for name, tensor in said.items()
    }
    with pytest.raises(CheckpointError, match="what was saved is another model"):
        exported((folder, base, other), "merged", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_processor_files_of_the_base_are_taken_over(run, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(run[0] / "base", folder)
    settings = dict(audio_tokenizer=dict(audio_tokenizer_name_or_path="someone/codec"), more=1)
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / NOTE).write_text("{}")
    files = processor_files(folder, {}, "").files
    assert json.loads(files[SETTINGS]) == settings
    assert files["chat_template.jinja"] == b"{{ messages }}"
    stored = merge_stored(run[1], run[0] / "adapter")
    contents = merged_contents(stored, "merged", folder, "", files=files).contents
    assert contents[SETTINGS] == files[SETTINGS] and NOTE in contents
    another = processor_files(folder, {}, "k2-fsa/OmniVoice").files[SETTINGS]
    assert json.loads(another)["audio_tokenizer"] == dict(
        audio_tokenizer_name_or_path="k2-fsa/OmniVoice"
    )


def tiny_codec(folder: Path) -> None:
    "A random codec of transformers' class, with the released rate and codebooks."
    from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

    ratios = [8, 5, 4, 2, 3]
    sizes = dict(encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=16)
    acoustic = dict(model_type="dac", downsampling_ratios=ratios, upsampling_ratios=ratios, **sizes)
    semantic = dict(
        model_type="hubert",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 2],
        codebook_dim=8,
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
    )
    torch.manual_seed(0)
    model = HiggsAudioV2TokenizerModel(config)
    for quantizer in model.quantizer.quantizers:
        quantizer.codebook.embed.normal_(std=0.1)
    model.save_pretrained(folder)


@pytest.mark.skipif(
    importlib.util.find_spec("torchaudio") is None,
    reason="torchaudio is not installed, which the codec of the processor needs",
)
def test_auto_processor_loads_and_generate_speaks(run, tmp_path):
    "In the fresh process and here; saved again, the settings are the same."
    from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

    tiny_codec(tmp_path / "codec")
    config = json.loads((run[0] / "base" / "config.json").read_text())
    made = processor_files(run[0] / "base", config, str(tmp_path / "codec"))
    found = exported(run, "merged", tmp_path / "merged", files=made.files)
    assert made.complete and found.processor.endswith("s of sound")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    wave = torch.rand(24000).numpy() - 0.5
    talk = [
        dict(role="system", content=[dict(type="text", text="Generate audio.")]),
        dict(role="user", content=[dict(type="text", text="The words of it.")]),
        dict(role="assistant", content=[dict(type="audio", audio=wave)]),
        dict(role="user", content=[dict(type="text", text="Please hold.")]),
    ]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template(talk, **options)
    assert inputs["audio_input_ids"].shape == (1, 25 + 2 + 7, 8)
    [spoken] = processor.batch_decode(model.generate(**inputs, max_new_tokens=30, do_sample=False))
    assert spoken.isfinite().all() and spoken.numel() % 960 == 0 and spoken.numel()
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / SETTINGS).read_text())
    assert saved == json.loads(made.files[SETTINGS])


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from higgs_nb.checkpoint.adapter import load_lora_adapters
from higgs_nb.checkpoint.merged import merge_stored
from higgs_nb.cli.export_files import merged_contents
from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.model.load import load_model
from higgs_nb.original.disk import convert_folder

what, folder = sys.argv[1], Path(sys.argv[2])
base = dict(name_or_path=str(folder / "base"))
def peak():  # of this program alone: ru_maxrss begins with that of the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
load_model(str(folder / "tiny"))
before = peak()
if what == "load":
    load_lora_adapters(load_model(**base), folder / "adapter")
elif what == "merge":
    stored = merge_stored(base, folder / "adapter")
    for kind in ("merged", "original"):
        merged_contents(stored, kind, folder / "base", "").save(folder / kind)
elif what == "convert":
    convert_folder(folder / "original", folder / "converted")
print(json.dumps(dict(before=before, peak=peak())))
"""


def peak_of(what: str, folder: Path) -> int:
    "Bytes by which the memory of a fresh process grows at most while it does something."
    command = [sys.executable, "-c", MEASURE, what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["peak"] - found["before"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read in /proc")
@pytest.mark.slow
def test_no_model_is_in_memory_where_one_is_written(tmp_path):
    """Merging, both layouts, and converting take a fraction of the base; loading it takes all of
    it, so that a copy that is held would be seen.
    """
    sizes = dict(hidden_size=512, num_layers=8, intermediate_size=1536)
    tiny_model(TOKENIZER, **sizes).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    tiny_model(TOKENIZER, **SIZES).save_pretrained(tmp_path / "tiny")
    base = dict(name_or_path=str(tmp_path / "base"))
    trained(base, tmp_path / "adapter", create_lora_config(r=4))
    size = (tmp_path / "base" / ONE_FILE).stat().st_size
    assert size > 120e6
    assert peak_of("load", tmp_path) > 0.9 * size
    assert peak_of("merge", tmp_path) < 0.5 * size
    assert peak_of("convert", tmp_path) < 0.5 * size
