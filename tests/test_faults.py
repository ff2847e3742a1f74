"""Saves that are killed at every write, fsync and rename, disks that fail at every call,
checkpoints spoiled in every way, and checkpoints made to do harm. Real kills of forked
children; a fault of the disk is an error of the very call that would report it.
"""

import errno
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from resume_job import make_trainer, whole_state

import higgs_nb.checkpoint.writing as writing
from higgs_nb.checkpoint.background import BackgroundSaver
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.loading import load_files
from higgs_nb.checkpoint.manifest import MANIFEST, Manifest, writer_of
from higgs_nb.checkpoint.pruning import prune_checkpoints
from higgs_nb.checkpoint.repair import main
from higgs_nb.checkpoint.saving import Snapshot, staging_directory
from higgs_nb.checkpoint.validate import latest_checkpoint, list_checkpoints, validate_checkpoint
from higgs_nb.checkpoint.writing import same_bits
from higgs_nb.core.files import file_sha256

STEPS = ("write", "fsync", "rename")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    "Many writes a file, and no pool of threads that a forked child would lack."
    monkeypatch.setattr(writing, "CHUNK", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(step: int):
    return {f"layer.{i}": torch.full((8, 9), step + i / 8) for i in range(8)}


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        {
            "adapter.safetensors": tensors(step),
            "optimizer/state.safetensors": tensors(-step),
            "position.json": b'{"epoch": 1}',
        },
        dict(step=step),
    )


def save(run, step: int):
    return snapshot(step).save(run / f"checkpoint-{step}")


def as_saved(run) -> int:
    """The step of the newest verified checkpoint, after its tensors were compared with those that
    were saved.
    """
    newest, passed = latest_checkpoint(run)
    contents = load_files(newest)
    for name, sign in (("adapter.safetensors", 1), ("optimizer/state.safetensors", -1)):
        assert contents[name].keys() == tensors(0).keys() and all(
            same_bits(contents[name][k], t) for k, t in tensors(sign * newest.step).items()
        )
    assert all(
        p.path.name.startswith(".") and p.status == "incomplete" and writer_of(p.path) == "gone"
        for p in passed
    )  # what is broken has no name
    return newest.step


class Tap:
    """Counts the calls of `os.write`, `os.fsync` and `os.rename`; at call number `fatal` does
    `strike(name, call, args)` instead.
    """

    def __init__(self, fatal: int, strike):
        self.fatal, self.strike, self.calls = fatal, strike, []

    def __enter__(self):
        self.true = {name: getattr(os, name) for name in STEPS}
        for name in STEPS:
            setattr(os, name, self.wrap(name))
        return self

    def wrap(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            return (
                self.strike(name, self.true[name], args)
                if len(self.calls) == self.fatal
                else self.true[name](*args, **kwargs)
            )

        return call

    def __exit__(self, *error):
        for name, f in self.true.items():
            setattr(os, name, f)


def die(name, true, args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(name, true, args):
    true(*args) and None, die(name, true, args)


def die_halfway(name, true, args):
    if name == "write":
        true(args[0], args[1][: len(args[1]) // 2])
    die(name, true, args)


def killed(f, fatal: int, strike) -> bool:
    "Whether a forked child that runs `f` with a `Tap` was killed; False if it ended well."
    child = os.fork()
    if child == 0:
        with Tap(fatal, strike):
            f()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


@pytest.mark.slow
def test_killed_at_every_write_fsync_and_rename(tmp_path):
    run, kills = tmp_path / "run", []
    save(run, 1)
    with Tap(0, None) as tap:
        save(tmp_path / "count", 2)
    points = tap.calls[1:]  # the first makes the directory of the run, which is there already
    assert {name: points.count(name) > 0 for name in STEPS} == dict.fromkeys(STEPS, True)
    for strike in (die, die_halfway, die_after):
        renamed = False
        for fatal in range(1, len(points) + 1):
            if strike is die_halfway and points[fatal - 1] != "write":
                continue
            assert killed(lambda: save(run, 2), fatal, strike)
            kills.append(points[fatal - 1])
            assert validate_checkpoint(run / "checkpoint-1").whole
            newest = as_saved(run)
            assert newest == 2 or not renamed
            renamed = newest == 2
            if renamed:
                shutil.rmtree(run / "checkpoint-2")
            prune_checkpoints(run, keep=1)
            assert os.listdir(run) == ["checkpoint-1"]  # what the dead writer left is cleared away
        assert renamed or strike is die_halfway  # killed behind the rename, a checkpoint is there
    print({name: kills.count(name) for name in STEPS}, len(kills))
    assert len(kills) >= 200 and all(kills.count(name) >= 2 * points.count(name) for name in STEPS)
    save(run, 2)
    assert as_saved(run) == 2


def test_killed_while_saving_in_the_background_and_pruning(tmp_path):
    run, kills = tmp_path / "run", 0

    def train():
        with BackgroundSaver() as saver:
            saver.submit(
                snapshot(3), run / "checkpoint-3", then=lambda: prune_checkpoints(run, keep=1)
            )

    for fatal in range(1, 1000, 7):
        shutil.rmtree(run, ignore_errors=True)
        save(run, 1), save(run, 2)
        if not killed(train, fatal, die):
            break
        kills += 1
        assert as_saved(run) in (2, 3) and (
            validate_checkpoint(run / "checkpoint-3").whole
            or validate_checkpoint(run / "checkpoint-2").whole
        )
    assert kills > 10 and [r.step for r in list_checkpoints(run)] == [3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_every_call(tmp_path, number):
    run, failures = tmp_path / "run", 0
    save(run, 1)
    with Tap(0, None) as tap:
        save(tmp_path / "count", 2)

    def fail(name, true, args):
        raise OSError(number, os.strerror(number))

    for fatal in range(1, len(tap.calls)):
        with Tap(fatal, fail), pytest.raises(CheckpointError) as caught:
            save(run, 2)
        assert (
            caught.value.errno == number
            and caught.value.path == run / "checkpoint-2"
            and caught.value.free > 0
            and caught.value.remedy
        )
        failures += 1
        if "but its directory" in caught.value.what:
            shutil.rmtree(
                run / "checkpoint-2"
            )  # only the last fsync failed: it is there, and whole
        assert os.listdir(run) == ["checkpoint-1"] and as_saved(run) == 1
    assert failures == len(tap.calls) - 1 > 50


def spoiled(run):
    "Name -> function that spoils checkpoint-2 of `run`, one for each fault of each file."
    path, cases = run / "checkpoint-2", {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        cases[f"{name}: truncated"] = lambda file=file: os.truncate(file, file.stat().st_size - 1)
        cases[f"{name}: a flipped byte"] = lambda file=file: file.write_bytes(
            (d := bytearray(file.read_bytes()))
            and bytes(d[:9]) + bytes([d[9] ^ 255]) + bytes(d[10:])
        )
        cases[f"{name}: deleted"] = file.unlink
        cases[f"{name}: a directory"] = lambda file=file: (file.unlink(), file.mkdir())
        cases[f"{name}: a link to itself"] = lambda file=file: (
            file.unlink(),
            file.symlink_to(file.name),
        )
    cases["a file, no directory"] = lambda: (shutil.rmtree(path), path.touch())
    cases["a link to itself"] = lambda: (shutil.rmtree(path), path.symlink_to(path.name))
    return cases


def test_spoiled_in_every_way(tmp_path):
    run = tmp_path / "run"
    save(run, 1), save(run, 2)
    names = list(spoiled(run))
    for name in names:
        spoiled(run)[name]()
        assert not validate_checkpoint(run / "checkpoint-2").whole, name
        newest, passed = latest_checkpoint(run)
        assert (
            newest.step == 1
            and [p.path.name for p in passed] == ["checkpoint-2"]
            and passed[0].problems
        ), name
        with pytest.raises(CheckpointError):
            load_files(run / "checkpoint-2")
        assert main([str(run)]) == 1
        path = run / "checkpoint-2"
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        save(run, 2)
    assert len(names) == 22 and as_saved(run) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of two steps with a checkpoint after each."
    folder, threads = tmp_path_factory.mktemp("trained") / "run", torch.get_num_threads()
    short_run(folder).train()
    yield folder
    torch.set_num_threads(threads)


def short_run(folder):
    torch.set_num_threads(1)  # as many for the same bits
    return make_trainer(
        folder,
        held_out=(),
        eval_strategy="no",
        max_steps=2,
        save_steps=1,
        gradient_accumulation_steps=1,
        logging_steps=1,
    )


def unsaved(checkpoint, strike):
    "A save in place of `checkpoint` that `strike` ends."
    shutil.rmtree(checkpoint)
    if strike is die:
        assert killed(lambda: snapshot(2).save(checkpoint), 9, die)
    else:
        with Tap(9, strike), pytest.raises(CheckpointError):
            snapshot(2).save(checkpoint)


def io_error(name, true, args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def no_space(name, true, args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def vanish(name, true, args):
    for left in Path(os.readlink(f"/proc/self/fd/{args[0]}")).parents[1].glob(".checkpoint-2.*"):
        shutil.rmtree(left)
    return true(*args)


CLASSES = {
    **{
        kind: lambda c, kind=kind: spoiled(c.parent)[f"training_state.safetensors: {kind}"]()
        for kind in ("truncated", "a flipped byte", "deleted", "a directory", "a link to itself")
    },
    **{kind: lambda c, kind=kind: spoiled(c.parent)[kind]() for kind in ("a file, no directory",)},
    "the checkpoint a link to itself": lambda c: spoiled(c.parent)["a link to itself"](),
    "killed": lambda c: unsaved(c, die),
    "EIO": lambda c: unsaved(c, io_error),
    "ENOSPC": lambda c: unsaved(c, no_space),
    "vanished": lambda c: unsaved(c, vanish),
    "another writer": lambda c: (shutil.rmtree(c), staging_directory(c).__enter__()),
}


@pytest.mark.parametrize("fault", CLASSES)
def test_training_goes_on_after_each_kind_of_fault(trained, tmp_path, monkeypatch, fault):
    "From the newest whole checkpoint, over the place of the broken one, to the same bits."
    run = shutil.copytree(trained, tmp_path / "run")
    CLASSES[fault](run / "checkpoint-2")
    monkeypatch.setattr(writing, "CHUNK", 2**16)
    assert short_run(run).train("auto").global_step == 2
    assert [r.step for r in list_checkpoints(run) if r.whole] == [1, 2] and whole_state(
        run / "checkpoint-2"
    ) == whole_state(trained / "checkpoint-2")


class Harm:
    "A pickle that leaves a trace when it is opened."

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (open, (self.trace, "w"))


def forge(path, **files):
    """A checkpoint of `files` (name -> bytes, `__` for a dot) whose manifest is in order for all
    that they are not.
    """
    path.mkdir()
    named = {name.replace("__", "."): data for name, data in files.items()}
    for name, data in named.items():
        (path / name).write_bytes(data)

    def entry(n):
        return dict(size=(path / n).stat().st_size, sha256=file_sha256(path / n)) | (
            dict(tensors={}) if n.endswith(".safetensors") else {}
        )

    (path / MANIFEST).write_text(Manifest({n: entry(n) for n in named}, {}).dumps())


def safetensors_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_checkpoints_that_mean_harm(tmp_path):

    trace, made = tmp_path / "trace", {}
    payload = pickle.dumps(Harm(trace))
    overlap = json.dumps(
        {n: dict(dtype="F32", shape=[2], data_offsets=[0, 8]) for n in "ab"}
    ).encode()
    huge = json.dumps(dict(a=dict(dtype="F32", shape=[2**40, 2**40], data_offsets=[0, 8]))).encode()
    for name, files in {
        "pickle": dict(optimizer__pt=payload),
        "pickle without its name": dict(notes__txt=payload),
        "pickle as tensors": dict(a__safetensors=payload),
        "oversized header": dict(a__safetensors=(2**50).to_bytes(8, "little") + b"{}"),
        "overlapping tensors": dict(a__safetensors=safetensors_of(overlap, bytes(8))),
        "huge shape": dict(a__safetensors=safetensors_of(huge, bytes(8))),
        "empty": dict(a__safetensors=b""),
        "deep header": dict(a__safetensors=safetensors_of(b"[" * 10**5)),
    }.items():
        forge(made.setdefault(name, tmp_path / name), **files)
    for name, inner in (
        ("outside", "../secret.txt"),
        ("absolute", "/etc/hostname"),
        ("nul", "a\0b"),
    ):
        forge(made.setdefault(name, tmp_path / name))
        (tmp_path / name / MANIFEST).write_text(
            Manifest({inner: dict(size=1, sha256="0" * 64)}, {}).dumps()
        )
    for name, change in (
        ("duplicate keys", lambda t: t.replace('"meta": {}', '"meta": {},\n "meta": {}')),
        ("deep JSON", lambda t: "[" * 10**5),
        ("no JSON", lambda t: "\0"),
    ):
        forge(made.setdefault(name, tmp_path / name))
        (tmp_path / name / MANIFEST).write_text(change((tmp_path / name / MANIFEST).read_text()))
    forge(made.setdefault("10,000 files", tmp_path / "10,000 files"))
    for i in range(10_000):
        (tmp_path / "10,000 files" / f"{i}.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, path in made.items():
        report = validate_checkpoint(path)
        assert report.status == "corrupt" and report.problems, (name, report)
        with pytest.raises(CheckpointError):
            load_files(path)
    assert sorted(tmp_path.rglob("*")) == before and not trace.exists() and len(made) == 15
