"""What the promise of `higgs_nb.checkpoint.adapter` is worth: real kills, real full disks, injected
errors. Children are forked, so torch is loaded once.
"""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

import higgs_nb.checkpoint.manifest
import higgs_nb.checkpoint.pruning
import higgs_nb.checkpoint.saving
import higgs_nb.checkpoint.validate
import higgs_nb.checkpoint.writing
import higgs_nb.core.locks
from higgs_nb.checkpoint.adapter import adapter_tensors, load_lora_adapters, save_lora_adapters
from higgs_nb.checkpoint.base import base_tensors, describe_base
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.manifest import hidden_name, writer_of
from higgs_nb.checkpoint.preflight import preflight
from higgs_nb.checkpoint.pruning import prune_checkpoints, remove_directory
from higgs_nb.checkpoint.saving import save_checkpoint
from higgs_nb.checkpoint.validate import latest_checkpoint, list_checkpoints, validate_checkpoint
from higgs_nb.checkpoint.writing import same_bits
from higgs_nb.model.lora import apply_lora, create_lora_config

SAVER = (  # modules whose lines are counted
    higgs_nb.checkpoint.saving,
    higgs_nb.checkpoint.writing,
    higgs_nb.checkpoint.pruning,
    higgs_nb.checkpoint.manifest,
    higgs_nb.checkpoint.validate,
    higgs_nb.core.locks,
)
CONFIG = HiggsAudioV2Config(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=320,
    codebook_size=34,
    audio_token_id=316,
    audio_bos_token_id=313,
    audio_delay_token_id=314,
    audio_stream_bos_id=32,
    audio_stream_eos_id=33,
    pad_token_id=301,
    bos_token_id=300,
    eos_token_id=309,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "A forked child must not inherit a pool of threads that are not there."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(value: int):
    return {
        "a": torch.full((40, 40), float(value)),
        "b": torch.full((9,), value, dtype=torch.bfloat16),
    }


def save(path: Path, value: int = 0):
    "A checkpoint of two files of tensors and one of bytes, in a folder."
    contents = {
        "weights.safetensors": weights(value),
        "state/optimizer.safetensors": weights(-value),
        "state/position.json": b"{}",
    }
    return save_checkpoint(path, contents, meta=dict(step=value))


def holds(path: Path, value: int) -> bool:
    "Whether a checkpoint of `save` is whole and every tensor in it is what was saved."
    read = {
        name: load_file(path / name)
        for name in ("weights.safetensors", "state/optimizer.safetensors")
    }
    return validate_checkpoint(path).whole and all(
        same_bits(read[f][k], t)
        for f, v in zip(read, (value, -value))
        for k, t in weights(v).items()
    )


def in_child(f, *args) -> int:
    "Exit code of a process that runs `f`; negative for a signal."
    child = multiprocessing.get_context("fork").Process(target=f, args=args)
    child.start()
    child.join()
    return child.exitcode


def die_at_line(f, fatal: int, seen: Path, first_only: bool):
    """Run `f` and be killed before the `fatal`-th line of the saver; each line of the source
    counts once with `first_only`. The count goes to `seen`.
    """
    lines, files = [], {module.__file__ for module in SAVER}

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        where = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and not (first_only and where in lines):
            lines.append(where)
            if len(lines) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    f()
    sys.settrace(None)
    seen.write_text(str(len(lines)))


def test_killed_at_every_line_of_a_save(tmp_path):
    run, seen, kills, renamed = tmp_path / "run", tmp_path / "seen", 0, False
    save(run / "checkpoint-1", 1)
    assert in_child(die_at_line, lambda: save(run / "checkpoint-2", 2), 0, seen, True) == 0
    shutil.rmtree(run / "checkpoint-2")
    for fatal in range(1, int(seen.read_text()) + 1):
        assert (
            in_child(die_at_line, lambda: save(run / "checkpoint-2", 2), fatal, seen, True)
            == -signal.SIGKILL
        )
        kills += 1
        newest, passed = latest_checkpoint(run)
        assert holds(newest.path, newest.step) and validate_checkpoint(run / "checkpoint-1").whole
        assert all(p.status == "incomplete" and writer_of(p.path) == "gone" for p in passed)
        assert renamed <= (newest.step == 2)  # once it is there, no later kill takes it away
        renamed = newest.step == 2
        if renamed:
            remove_directory(run / "checkpoint-2")
        prune_checkpoints(run, keep=1)
        assert os.listdir(run) == ["checkpoint-1"]
    assert renamed and kills > 60, kills


def test_killed_at_every_line_of_pruning(tmp_path):
    run, seen = tmp_path / "run", tmp_path / "seen"

    def fill():
        shutil.rmtree(run, ignore_errors=True)
        for step in (1, 2, 3):
            save(run / f"checkpoint-{step}", step)
        hidden_name(run / "checkpoint-4", "saving").mkdir()

    def prune():
        prune_checkpoints(run, keep=1)

    fill()
    assert in_child(die_at_line, prune, 0, seen, True) == 0
    for fatal in range(1, int(seen.read_text()) + 1, 3):
        fill()
        assert in_child(die_at_line, prune, fatal, seen, True) == -signal.SIGKILL
        assert holds(run / "checkpoint-3", 3) and latest_checkpoint(run)[0].step == 3
        for report in list_checkpoints(run):
            assert report.whole or report.path.name.startswith("."), (
                report
            )  # what lost its content lost its name before
        prune()
        assert os.listdir(run) == ["checkpoint-3"]


def error_of(f, *args) -> CheckpointError | None:
    "The CheckpointError that `f` raises, if it does."
    try:
        f(*args)
    except CheckpointError as error:
        return error


@contextmanager
def failing(name: str, fatal: int, number: int):
    "The `fatal`-th call of `os.<name>` fails with an errno; yields the list of calls."
    calls, true = [], getattr(os, name)

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == fatal:
            raise OSError(number, os.strerror(number))
        return true(*args, **kwargs)

    setattr(os, name, broken)
    try:
        yield calls
    finally:
        setattr(os, name, true)


@pytest.mark.parametrize("name", ["mkdir", "open", "fsync", "rename", "scandir"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_every_call(tmp_path, name, number):
    run = tmp_path / "run"
    save(run / "checkpoint-1", 1)
    with failing(name, 0, number) as calls:
        save(run / "checkpoint-2", 2)
    shutil.rmtree(run / "checkpoint-2")
    for fatal in range(1, len(calls) + 1):
        with failing(name, fatal, number), pytest.raises(CheckpointError) as caught:
            save(run / "checkpoint-2", 2)
        error = caught.value
        assert (
            error.errno == number
            and os.strerror(number) in str(error)
            and str(run / "checkpoint-2") in str(error)
            and error.free > 0
            and error.remedy
        )
        assert isinstance(error.__cause__, OSError) and holds(run / "checkpoint-1", 1)
        if "but its directory" in error.what:  # only the last fsync failed: it is there, and whole
            assert name in ("fsync", "open") and holds(run / "checkpoint-2", 2)
            shutil.rmtree(run / "checkpoint-2")
        assert os.listdir(run) == ["checkpoint-1"]


def with_limit(path: Path, limit: int, answer: Path):
    """Save under a limit on the size of a file, the nearest thing to a full disk that needs no
    rights.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(path, 2)
    except CheckpointError as error:
        answer.write_text(str(error)[:limit]), os._exit(3)


def test_no_room_at_any_size(tmp_path):
    run = tmp_path / "run"
    largest = max(entry["size"] for entry in save(run / "checkpoint-1", 1).files.values())
    for limit in [1, 2, 100, 600, 1000, largest // 2, largest - 1]:
        assert in_child(with_limit, run / "checkpoint-2", limit, tmp_path / "answer") == 3
        assert os.listdir(run) == ["checkpoint-1"] and holds(run / "checkpoint-1", 1)
    assert in_child(with_limit, run / "checkpoint-2", 10 * largest, tmp_path / "answer") == 0
    assert holds(run / "checkpoint-2", 2) and "File too large" in (tmp_path / "answer").read_text()


def test_a_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting needs rights")
    try:
        save(disk / "run" / "checkpoint-1", 1)
        step = 2
        while not (failed := error_of(save, disk / "run" / f"checkpoint-{step}", step)):
            step += 1
        assert (
            failed.errno == errno.ENOSPC
            and "free space" in failed.remedy
            and failed.free < 64 * 1024
        )
        reports = list_checkpoints(disk / "run")
        assert [r.whole for r in reports] == [True] * (step - 1) and holds(
            reports[-1].path, step - 1
        )
        assert "needs 1.0 MB" in str(error_of(preflight, disk / "run", 10**6))
        (disk / "rest").write_bytes(bytes(shutil.disk_usage(disk).free))
        assert error_of(preflight, disk / "run", 0).errno == errno.ENOSPC
        prune_checkpoints(disk / "run", keep=1)  # removing must work on a full disk
        assert [r.step for r in list_checkpoints(disk / "run")] == [step - 1]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_bad_places(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "test.txt").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file", "file/run/checkpoint-1", "used", "loop"):
        before = sorted(tmp_path.rglob("*"))
        assert error_of(save, tmp_path / place).remedy
        assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"
        assert not validate_checkpoint(tmp_path / place).whole
    for place in ("file", "file/run", "loop", "loop/run"):
        assert error_of(preflight, tmp_path / place, 0).path == tmp_path / place
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", 1)
    assert holds(tmp_path / "empty", 1)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    save(tmp_path / "run" / "checkpoint-1", 1)
    left = hidden_name(tmp_path / "run" / "checkpoint-2", "saving")
    left.mkdir()
    assert holds(tmp_path / "run" / "checkpoint-1", 1) and writer_of(left) == "unknown"
    assert prune_checkpoints(tmp_path / "run", keep=1) == [] and left.is_dir()


def test_a_vanished_directory(tmp_path):
    true = os.fsync

    def vanish(fd):
        true(fd)
        if (tmp_path / "run").exists() and os.listdir(tmp_path / "run"):
            shutil.rmtree(tmp_path / "run")

    os.fsync = vanish
    try:
        error = pytest.raises(CheckpointError, save, tmp_path / "run" / "checkpoint-1").value
    finally:
        os.fsync = true
    assert error.errno == errno.ENOENT and error.remedy and not (tmp_path / "run").exists()


def test_two_writers_of_one_directory(tmp_path):
    meet, errors = threading.Barrier(2), []
    rename = os.rename

    def rename_together(*args):
        meet.wait()
        rename(*args)

    def save_together(value):
        try:
            save_checkpoint(
                tmp_path / "run" / "checkpoint-1",
                {"weights.safetensors": weights(value)},
                meta=dict(value=value),
            )
        except CheckpointError as error:
            errors.append(error)

    os.rename = rename_together
    threads = [threading.Thread(target=save_together, args=(value,)) for value in (1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    os.rename = rename
    assert len(errors) == 1 and errors[0].errno in (errno.ENOTEMPTY, errno.EEXIST)
    report = validate_checkpoint(tmp_path / "run" / "checkpoint-1")
    assert report.whole and os.listdir(tmp_path / "run") == ["checkpoint-1"]
    assert same_bits(
        load_file(report.path / "weights.safetensors")["a"],
        weights(report.manifest.meta["value"])["a"],
    )


def make_base():
    return (
        torch.manual_seed(0)
        and HiggsAudioV2ForConditionalGeneration(CONFIG, use_text_head=True).eval()
    )


def make_adapted():
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "audio_mlp.up_proj"],
        modules_to_save=["model.embed_audio_tokens", "audio_lm_head", "text_lm_head"],
    )
    model = get_peft_model(make_base(), lora).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def logits(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (1, 9))
    ids[:, 3:7] = CONFIG.audio_token_id
    with torch.no_grad():
        return model(
            input_ids=ids,
            audio_input_ids=torch.randint(0, 32, (1, 4, 8)),
            audio_input_ids_mask=torch.ones(1, 4, dtype=torch.bool),
            use_cache=False,
        ).logits


def test_an_adapter_comes_back(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    model = make_adapted()
    save_lora_adapters(
        model,
        tmp_path / "adapter",
        base=describe_base(model, id="someone/some-base", revision="abc"),
    )
    expected = logits(model)
    for again in (
        load_lora_adapters(make_base(), tmp_path / "adapter"),
        PeftModel.from_pretrained(make_base(), str(tmp_path / "adapter")).eval(),
    ):
        assert torch.equal(logits(again), expected)
    saved, loaded = (
        adapter_tensors(model),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    assert saved.keys() == loaded.keys() and all(same_bits(saved[k], loaded[k]) for k in saved)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        len(trained) == len(saved) and not asked
    )  # no hub, though the base has a hub's kind of name


def test_an_adapter_that_was_tampered_with_does_not_load(tmp_path):
    save_lora_adapters(make_adapted(), tmp_path / "adapter", base={})
    for file in sorted((tmp_path / "adapter").iterdir()):
        data = file.read_bytes()
        for changed in (
            data[:-1],
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
            b"",
            None,
        ):
            file.unlink() if changed is None else file.write_bytes(changed)
            base = make_base()
            assert "not loaded" in str(error_of(load_lora_adapters, base, tmp_path / "adapter"))
            assert not any(
                "lora" in name for name, _ in base.named_parameters()
            )  # it was refused before anything was touched
            file.write_bytes(data)
    assert validate_checkpoint(tmp_path / "adapter").whole


def test_the_console_script(tmp_path):
    save(tmp_path / "run" / "checkpoint-1", 1)

    def validate(*args):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from higgs_nb.checkpoint.repair import main; sys.exit(main())",
                *args,
            ],
            capture_output=True,
            text=True,
        )

    good = validate(tmp_path / "run")
    assert (good.returncode, good.stdout.split()[0]) == (0, "whole")
    (tmp_path / "run" / "checkpoint-1" / "weights.safetensors").write_bytes(b"")
    bad = validate(tmp_path / "run", tmp_path / "nowhere")
    assert (bad.returncode, [line.split()[0] for line in bad.stdout.splitlines()]) == (
        1,
        ["corrupt", "incomplete"],
    )
    assert validate().returncode == 2


def test_single_rows_of_an_embedding():
    """PEFT's `trainable_token_indices`: counted, saved, and loaded on the base that they were
    trained on.
    """

    def base():
        torch.manual_seed(0)
        return HiggsAudioV2ForConditionalGeneration(CONFIG, use_text_head=True).eval()

    model = apply_lora(
        base(), create_lora_config("attention", r=4, trainable_token_indices=[5, 300])
    ).eval()
    assert [(m.target, m.kind, m.trainable) for m in model.match_table][-1] == (
        "embed_tokens",
        "single rows",
        2 * 64,
    )
    assert base_tensors(model).keys() == base_tensors(base()).keys()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.tensor([[5, 7, 300, 9]])
    with tempfile.TemporaryDirectory() as d, torch.no_grad():
        save_lora_adapters(model, Path(d, "adapter"), base={})
        for loaded in (
            load_lora_adapters(base(), Path(d, "adapter")),
            PeftModel.from_pretrained(base(), f"{d}/adapter").eval(),
        ):
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
