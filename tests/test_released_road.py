"""The road with a released model, on a miniature of it: stock classes, the released file layout,
the real codec class. Only `base` and `data` are given.
"""

import json
import shutil

import pytest
import torch
from miniature import write_base, write_recordings
from safetensors.torch import load_file, save_file
from tiny_codec import needs_torchaudio, tiny_higgs_codec

from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.cli.notebooks import defaults_of
from higgs_nb.cli.run import main as higgs_run
from higgs_nb.core.files import load_json, write_json
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.family import HIGGS_V2
from higgs_nb.tasks.corpus import read_corpus
from higgs_nb.tasks.inputs import open_inputs
from higgs_nb.tasks.settings import resolve

pytestmark = needs_torchaudio


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    "A folder with `codec`, `base` and `recordings`."
    folder = tmp_path_factory.mktemp("road")
    codec = tiny_higgs_codec(folder / "codec")
    write_base(folder / "base", codec)
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


def broken_codec(road, name, change):
    "A copy of the codec with other weights."
    folder = shutil.copytree(road / "codec", road / name, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", dict(format="pt"))
    return folder


def without_decoder(weights):
    return {k: v for k, v in weights.items() if not k.startswith("acoustic_decoder")}


def constant(weights):
    return {k: torch.zeros_like(v) if "codebook" in k else v for k, v in weights.items()}


def config_only(road, name, **config):
    "A folder with a config.json."
    folder = road / name
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config)
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
    "a codec with constant codes": (
        lambda r: dict(codec=broken_codec(r, "constant", constant)),
        "the same code",
    ),
    "the base as codec": (lambda r: dict(codec=r / "base"), "is a model of type"),
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
}


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


def test_the_tokenizer_of_another_model(road, tmp_path):
    base = shutil.copytree(road / "base", tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(64)])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match="beyond the model's vocab_size"):
        open_inputs(settings_of(road, base=base))


def test_it_says_so_on_the_terminal_and_encodes_nothing(road, tmp_path, capfd):
    words = ["-p", f"base={road / 'base'}", "-p", f"data={road / 'recordings'}"]
    out = tmp_path / "run"
    assert higgs_run(["train", "--out", str(out), *words, "-p", "codec=world"]) == 1
    assert "was trained with the codec" in capfd.readouterr().err
    assert not (out / "codes").exists()
