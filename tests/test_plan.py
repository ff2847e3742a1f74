"""The memory plan against real training runs, its extrapolation against the whole simulation, its
command, its advice.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROOT, load_script
from transformers import HiggsAudioV2Config, WhisperConfig

from higgs_nb.cli.notebooks import parameters_of
from higgs_nb.cli.plan import main
from higgs_nb.cli.planned_run import MPS, plan_of, plan_values
from higgs_nb.family import HIGGS_V2
from higgs_nb.model.lora import HEADS, create_lora_config
from higgs_nb.training.advice import advice, as_parameters, changes, check_plan
from higgs_nb.training.cards import CardTable, budget_line, compare_cards, largest_budget
from higgs_nb.training.counter import KINDS, MemoryCounter
from higgs_nb.training.plan import host_and_disk, plan_training, schedule
from higgs_nb.training.planned_base import RELEASED, plan_config, released_config
from higgs_nb.training.planned_model import StepSettings, check_settings
from higgs_nb.training.simulate import simulate, simulate_layers


@pytest.fixture(scope="module")
def measured():
    "The benchmark, which its processes find by its name."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield load_script("plan")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "bf16",
        "recomputed",
        "in full",
        "accumulated",
        "rank 64, dropout",
        "long, bf16, recomputed",
        "Whisper tower",
        "two processes",
        "V3",
        "V3, bf16, table in full",
        "V3, recomputed",
    ],
)
def test_the_plan_is_what_a_run_allocates(measured, name):
    """Against PyTorch's own record of what its allocator gave out during two steps of the trainer:
    within 5%, the weights, which both know, included or not.
    """
    config, settings = measured.CASES[name]
    row = measured.compare(config, replace(settings, token_budget=768))
    assert abs(row["off"]) < 0.05 and abs(row["off_above_weights"]) < 0.05, row


def test_a_look_at_held_out_data_is_planned(measured):
    "The offset probe of a small model takes more than a step whose activations are recomputed."
    config = measured.configuration(64, 2, 512, 2)
    settings = replace(measured.PLAIN, gradient_checkpointing=True, token_budget=6144)
    look, step = (measured.compare(config, settings, evaluate=e) for e in (True, False))
    assert look["measured"] > 1.2 * step["measured"] and look["planned"] > 1.2 * step["planned"]
    assert -0.05 < look["off"] < 0.1, look  # the probe leaves out frames at the ends of clips


def test_a_divided_base_is_planned(measured):
    """Two processes that exchange layers through gloo: a layer's buffers more or less, and far from
    what a whole base takes.
    """
    config, settings = measured.CASES["two processes, divided"]
    settings = replace(settings, token_budget=512)
    row = measured.compare(config, settings)
    assert -0.05 < row["off"] < 0.1, row
    divided, whole = (
        simulate(config, replace(settings, sharding=sharding))["start"]["weights"]
        for sharding in (True, False)
    )
    layers = sum(p.numel() * 4 for name, p in measured.frozen_layers(config))
    assert whole - divided == pytest.approx(layers / 2, rel=1e-3)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(sharding=True), "--processes 2"),
        (dict(sharding=True, processes=2, bits=4), "4 or 8 bits cannot be divided"),
        (dict(sharding=True, processes=2, lora=None), "trained as a whole cannot be divided"),
        (dict(processes=0), "at least 1"),
    ],
)
def test_what_cannot_be_divided_is_an_error(changes, message):
    settings = replace(StepSettings(create_lora_config(r=4)), **changes)
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_several_processes_of_the_released_model():
    "Each holds the gradients once more, and half the layers if two divide them; advice says so."
    plan = plan_training("released", create_lora_config(r=16))
    two = plan.with_settings(processes=2)
    divided = two.with_settings(sharding=True)
    trained = plan.breakdown["adapters"]
    assert two.peak - plan.peak == pytest.approx(trained, rel=1e-3)
    assert two.peak - divided.peak > 3.5e9
    available = divided.needs + 1
    assert dict(sharding=True) in [change for change, _ in changes(two, available)]
    assert not any("sharding" in change for change, _ in changes(plan, available))
    assert host_and_disk(two)["loading"] == 2 * host_and_disk(plan)["loading"]
    steps = [schedule(p, hours=10)["steps"] for p in (plan, two)]
    assert steps[0] == pytest.approx(2 * steps[1], abs=1) and "divided among" in str(divided)


def test_a_tower_is_planned(tmp_path):
    "Its weights, and the projector, which is trained."
    sizes = dict(d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128)
    WhisperConfig(**sizes, decoder_layers=1, vocab_size=99).save_pretrained(tmp_path)
    values = [["whisper", str(tmp_path)], ["device", "cpu"]]
    plan, without = (plan_of("tiny", plan_values("tiny", given)) for given in (values, values[1:]))
    assert plan.stages["start"]["weights"] > without.stages["start"]["weights"] + 100_000
    projector = 2 * (64 + 1) * plan.config.hidden_size
    adapters = [p.stages["start"]["adapters"] for p in (plan, without)]
    assert adapters[0] - adapters[1] >= projector


def test_what_is_known_of_mps_is_said(capsys, monkeypatch):
    monkeypatch.setattr("higgs_nb.cli.plan.compare_cards", lambda plan: CardTable({}, {}))
    assert main(["tiny", "-p", "device=mps"]) == 0
    said = capsys.readouterr().out
    assert MPS in said and "fp32" in said and "on the CPU" in said
    values = plan_values("tiny", [["device", "mps"]])
    assert plan_of("tiny", values).settings.precision == "fp32"


def total(kinds):
    return sum(kinds.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(gradient_checkpointing=True),
        dict(lora=create_lora_config(r=8, train=HEADS), accumulate=2, optimizer="adamw_bnb_8bit"),
        dict(bits=4),
    ],
    ids=lambda c: ", ".join(c) or "plain",
)
def test_few_layers_say_what_all_of_them_take(changes):
    "28 layers, simulated whole; only the list of gradient norms is rounded up differently."
    config = released_config()
    settings = replace(StepSettings(create_lora_config(r=16), token_budget=2048), **changes)
    few, whole = simulate(config, settings), simulate_layers(config, settings, 28)
    assert few.keys() == whole.keys()
    for stage in whole:
        assert abs(total(few[stage]) - total(whole[stage])) <= 4096 * (stage == "clipping"), stage


def test_the_way_of_the_planned_device_is_followed():
    """A GPU in 16 bits keeps no matrix of positions times positions, a CPU does for short samples.
    In float32 a GPU takes the way of the CPU.
    """
    config = replace_layers(released_config(), 3)
    settings = StepSettings(create_lora_config(r=16), lengths=(512,) * 4)
    heads, matrix = config.num_attention_heads, 512 * 512
    gpu, cpu, wide = (
        simulate(config, replace(settings, **way))["losses"]["activations"]
        for way in ({}, dict(device="cpu"), dict(precision="fp32"))
    )
    assert cpu - gpu > 3 * 4 * heads * matrix * 2 * 0.9  # layers, samples, two bytes
    assert wide > 2 * cpu * 0.9


def replace_layers(config, layers):
    config.num_hidden_layers = layers
    return config


def test_storages_are_counted_once_and_until_they_are_gone():
    counter = MemoryCounter(block=1)
    x = torch.zeros(10, device="meta")
    with counter:
        y = x + 1
        views = y[:5], y.view(2, 5), y.detach()
        assert counter.alive["activations"] == 40
        del y, views
        assert counter.alive["activations"] == 0
        x.add(1)
    assert counter.peaks["start"] == dict.fromkeys(KINDS, 0) | dict(activations=40)


def test_what_a_run_needs_is_a_line_in_its_tokens():
    "Between and beyond the sizes that are simulated, and the largest batch really fits."
    plan = plan_training("released", create_lora_config(r=16), gradient_checkpointing=True)
    line = budget_line(plan)
    for budget in (2048, 20_480):
        needs = plan.with_settings(token_budget=budget).needs
        assert abs(line.needed(budget) / needs - 1) < 0.01, budget
    largest = largest_budget(plan, 16e9)
    assert plan.with_settings(token_budget=largest).needs <= 16e9
    assert plan.with_settings(token_budget=int(largest * 1.1)).needs > 16e9


def test_advice_is_a_run_that_fits():
    "The words of every change are parameters of a run, and its plan fits."
    plan = plan_training("released", create_lora_config(r=16, train=HEADS))
    known = set(parameters_of("train"))
    for available in (30e9, 16e9):
        change, smaller = next(changes(plan, available))
        assert set(change) <= known and smaller.needs <= available < plan.needs
        assert as_parameters(change) in advice(plan, available)
        with pytest.raises(ValueError, match="-p .* makes it"):
            check_plan(plan, available)
    check_plan(plan, plan.needs)
    assert "no setting makes it fit" in advice(plan, 2e9)


def test_a_plan_shows_itself():
    plan = plan_training("tiny", create_lora_config("attention", r=4), token_budget=512)
    cards = compare_cards(plan, (1, 2))
    assert "<table>" in plan._repr_html_() and "4 GB" not in str(cards)
    assert [row[0] for row in cards.rows] == list(cards.plans) and len(cards.rows) == 5
    assert len(cards.plot().patches) == 5 * (len(KINDS) + 1)


def test_a_name_from_outside_is_escaped(tmp_path):
    "The directory of a base may have any name."
    base = tmp_path / "<b>x"
    released_config().save_pretrained(base)
    plan = plan_training(str(base), create_lora_config(r=4), token_budget=512)
    assert "&lt;b&gt;x" in plan._repr_html_() and "<b>x" not in plan._repr_html_()


def test_the_command_needs_a_config_alone(tmp_path):
    "A program of its own, offline, for a folder that holds config.json and nothing else."
    released_config().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    words = [str(tmp_path), "-p", "token_budget=2048", "--card", "16", "--json", "--hours", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "higgs_nb.cli.plan", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    plan = plan_of("released", plan_values("released", [["token_budget", "2048"]]))
    assert said["peak"] == plan.peak and not said["fits"] and "-p " in said["advice"]
    assert said["schedule"]["steps"] > 0 and said["disk"] > said["saving"]


@pytest.mark.parametrize(
    "words,expected",
    [
        (["someone/some-model"], "hf download someone/some-model"),
        (["./nowhere/at/all"], "no directory"),
        (["small", "-p", "learning_rate=1"], "changes nothing about the memory"),
        (["small", "-p", "rnak=1"], "did you mean 'rank'"),
        (["small", "-p", "targets=nothing"], "matches nothing"),
        (["small", "-p", "bits=5"], "choose 0 or 4 or 8"),
        (["released", "-p", "optimizer=sgd"], "optimizer"),
        (["small", "-p", "sharding=True"], "higgs_plan --processes 2"),
        (["small", "-p", "device=xpu"], "small token_budget"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(words, expected, capsys, monkeypatch):
    def no_network(*_, **__):
        raise OSError("we could not connect")

    monkeypatch.setattr(HiggsAudioV2Config, "from_pretrained", no_network)
    monkeypatch.setattr("higgs_nb.training.planned_base.base_path", lambda base: base)
    if words[0] == "small":
        monkeypatch.setattr(
            "higgs_nb.training.planned_base.load_config", lambda *_: released_config()
        )
    assert main(words) == 2
    said = capsys.readouterr()
    assert expected in said.err and not said.out


def test_the_released_model_is_known_without_a_network(monkeypatch):
    "By both names that it has on the hub; a pinned revision is looked up."

    def no_network(*_, **__):
        raise OSError("we could not connect")

    monkeypatch.setattr(HiggsAudioV2Config, "from_pretrained", no_network)
    for name in RELEASED:
        config, origin = plan_config(name)
        assert config.codebook_size == 1026 and "which the package knows" in origin
    with pytest.raises(OSError, match="hf download"):
        plan_config(HIGGS_V2.architecture.released[0], revision="abc")


def measured_in_tiny_sizes():
    "What the benchmark for a GPU gives here; accelerate keeps the precision of a process."
    config = load_script("train_step").configuration("128x512", layers=2)
    sizes = dict(tokens=2400, steps=2, codec=tiny_codec(), frames=9)
    return json.loads(json.dumps(load_script("gpu").measure(config, **sizes)))


def test_the_gpu_benchmark_runs():
    "Its sections with tiny sizes on a CPU: real trainers, a real model that speaks, a real plan."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = pool.submit(measured_in_tiny_sizes).result()
    ours, stock = results["training"]
    for row in (ours, stock):
        assert row["tokens_per_second"] > 0 and 0 < row["share_of_peak"], row
    assert results["ratio"] > 0 and results["plan"]["planned"] > 0
    assert results["generation"]["frames_per_second"] > 0
    assert "skipped" in results["codec"] or results["codec"]["encode_times_real_time"] > 0
    assert results["machine"]["precision"] in ("bfloat16", "float32")


def tiny_codec():
    "The configuration of a small codec of transformers' class."
    acoustic = dict(model_type="dac", encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=16)
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
    ratios = dict(downsampling_ratios=[8, 5, 4, 2, 3], upsampling_ratios=[8, 5, 4, 2, 3])
    return transformers.HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 2],
        codebook_dim=8,
        acoustic_model_config=acoustic | ratios,
        semantic_model_config=semantic,
    )


@pytest.mark.parametrize(
    "flags,expected",
    [("fma avx512_bf16 amx_tile", True), ("fma avx2", False), ("asimd bf16", True)],
)
def test_a_cpu_without_bfloat16_is_measured_in_float32(monkeypatch, flags, expected):
    script = load_script("train_step")
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script.Path, "read_text", lambda *_: f"flags : {flags}")
    assert script.computes_bfloat16() is expected


def test_the_gpu_targets_name_what_they_run():
    made = (ROOT / "Makefile").read_text()
    assert "tests/test_gpu.py" in made and "benchmarks/gpu.py" in made
