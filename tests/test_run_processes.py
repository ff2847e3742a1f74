"A training run in two processes, with the base whole in each and divided between them."

import pytest
from conftest import launch_run
from safetensors.torch import load_file

from higgs_nb.checkpoint.validate import list_checkpoints, validate_checkpoint
from higgs_nb.cli.run import main as higgs_run
from higgs_nb.core.files import load_json
from higgs_nb.core.launcher import launched

TINY = (
    "base=tiny device=cpu steps=4 save_every=2 eval_every=2 token_budget=700 max_clips=8 speak=1 "
    "table=1 max_speech_s=0.5 max_duration_s=20 rank=4 workers=1"
).split()
WORDS = [word for pair in TINY for word in ("-p", pair)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Directories of the two runs, and what the second has printed."
    folder = tmp_path_factory.mktemp("runs")
    launch_run(folder / "whole", *WORDS)
    return folder, launch_run(folder / "divided", *WORDS, "-p", "sharding=True")


@pytest.mark.slow
def test_a_divided_base_trains_the_same_adapter(runs):
    "To the bit, and what it says on held-out sentences is the same, too."
    folder, _ = runs
    whole, divided = (load_json(folder / name / "run.json") for name in ("whole", "divided"))
    a, b = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "divided")
    )
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert any(tensor.any() for name, tensor in a.items() if "lora_B" in name)
    for name in ("held_out_audio_loss", "probe", "before_and_after", "stopped"):
        assert whole[name] == divided[name], name
    assert divided["finished"] and divided["processes"] == 2
    assert divided["parameters"]["sharding"] and not whole["parameters"]["sharding"]


@pytest.mark.slow
def test_the_first_process_writes_what_they_have_in_common(runs):
    folder, printed = runs
    out = folder / "divided"
    assert validate_checkpoint(out / "adapter").status == "whole"
    assert [r.step for r in list_checkpoints(out)] == [2, 4]
    assert (out / "train.ipynb").is_file() and (out / "process-1" / "train.ipynb").is_file()
    assert not (out / "process-1" / "run.json").exists()
    assert not (out / "process-1" / "codes").exists()
    assert printed.count("train is done") == 1


def test_one_process_cannot_divide_a_base(tmp_path, capfd):
    out = tmp_path / "run"
    assert higgs_run(["train", "--out", str(out), *WORDS, "-p", "sharding=True"]) == 1
    said = capfd.readouterr().err
    assert "sharding=True divides the base among several processes" in said
    assert "higgs_launch --standalone" in said and not (out / "codes").exists()


def test_a_run_that_is_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launched() == (1, 2)
    assert higgs_run(["prepare", "--out", str(tmp_path / "corpus")]) == 2
    assert "prepare is one process, and a launcher has started 2" in capsys.readouterr().err
