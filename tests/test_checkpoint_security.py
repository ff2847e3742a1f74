"""Checkpoints on disks that fail while they are read, of values that are no numbers, under other
names, and adapters made to do harm.
"""

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoint import make_adapted, make_base, save

import higgs_nb.checkpoint.peft_config as peft_config
from higgs_nb.checkpoint.adapter import (
    load_lora_adapters,
    restore,
    save_lora_adapters,
    take_snapshot,
)
from higgs_nb.checkpoint.base import base_tensors
from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.checkpoint.loading import load_files
from higgs_nb.checkpoint.manifest import HIDDEN, MANIFEST, Manifest, hidden_name
from higgs_nb.checkpoint.peft_config import read_adapter_config
from higgs_nb.checkpoint.pruning import prune_checkpoints
from higgs_nb.checkpoint.repair import find_checkpoints, main, move_aside, unsearched
from higgs_nb.checkpoint.saving import save_checkpoint
from higgs_nb.checkpoint.validate import (
    BYSTANDERS,
    latest_checkpoint,
    list_checkpoints,
    members,
    validate_checkpoint,
)
from higgs_nb.cli.export import source_of, still_to_export
from higgs_nb.core.files import file_sha256
from higgs_nb.core.messages import in_markdown
from higgs_nb.training.resume import checkpoint_to_resume
from higgs_nb.training.state import read_state, state_files

SAYS_SOMETHING = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EBADF,
}
NUMBERS = sorted(errno.errorcode.keys() - SAYS_SOMETHING)


class BrokenFile(io.FileIO):
    "A file that opens and cannot be read."

    number = errno.EIO

    def readinto(self, buffer):
        raise OSError(self.number, os.strerror(self.number))

    def readall(self):
        raise OSError(self.number, os.strerror(self.number))


@contextmanager
def unreadable(fatal: int, number: int, reading: bool):
    """Call number `fatal` of those that look at a disk fails with an errno, or, if it opens a file
    and `reading`, each read of that file.
    """
    places = [(os, "stat"), (os, "scandir"), (os, "listdir"), (builtins, "open"), (io, "open")]
    true = [getattr(where, name) for where, name in places]
    calls = []

    def wrap(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) != fatal:
                return function(*args, **kwargs)
            if reading and name == "open":
                broken = BrokenFile(args[0])
                broken.number = number
                return io.BufferedReader(broken)
            raise OSError(number, os.strerror(number))

        return call

    for (where, name), function in zip(places, true):
        setattr(where, name, wrap(name, function))
    try:
        yield calls
    finally:
        for (where, name), function in zip(places, true):
            setattr(where, name, function)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.sampled_from(NUMBERS), reading=st.booleans(), fatal=st.integers(1, 40))
def test_what_cannot_be_read_is_not_corrupt(tmp_path_factory, number, reading, fatal):
    """Nor passed over, moved or removed; the errno and the path are told, and a moment later all
    is valid.
    """
    run = tmp_path_factory.mktemp("disk") / "run"
    for step in (1, 2, 3):
        save(run / f"checkpoint-{step}", step)
    (run / "log.jsonl").touch()
    before = tree(run)
    with unreadable(fatal, number, reading):
        report = validate_checkpoint(run / "checkpoint-3")
    assert report.status in ("whole", "unreadable") and move_aside(report) is None
    if report.status == "unreadable":
        with pytest.raises(CheckpointError) as caught:
            load_files(report)
        assert caught.value.errno == number and "checkpoint-3" in str(caught.value)
    for resume in (latest_checkpoint, lambda folder: checkpoint_to_resume(folder, "auto")):
        with unreadable(fatal, number, reading) as calls:
            try:
                found = resume(run)
            except (OSError, CheckpointError) as error:
                assert (
                    error.errno == number
                    and str(run) in str(error)
                    or not isinstance(error, CheckpointError)
                )
                found = None
        if found is not None:
            assert (
                len(calls) < fatal and (found[0] if isinstance(found, tuple) else found).step == 3
            )
        assert tree(run) == before
    with unreadable(fatal, number, reading):
        assert main([str(run), "--repair"]) in (0, 1)
    assert tree(run) == before
    with unreadable(fatal, number, reading), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            prune_checkpoints(run, keep=2)
        except CheckpointError as error:
            assert error.errno == number
    assert [r.step for r in list_checkpoints(run) if r.whole][-2:] == [2, 3]
    shutil.rmtree(run.parent)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_stays_when_others_are_pruned(tmp_path, number):
    for step in (1, 2):
        save(tmp_path / f"checkpoint-{step}", step)
    true = os.scandir

    def broken(path="."):
        if str(path).endswith("checkpoint-2"):
            raise OSError(number, os.strerror(number))
        return true(path)

    os.scandir = broken
    try:
        with pytest.warns(UserWarning, match="checkpoint-2"):
            assert prune_checkpoints(tmp_path, keep=1) == []
    finally:
        os.scandir = true
    assert [r.whole for r in list_checkpoints(tmp_path)] == [True, True]


def test_a_missing_file_is_incomplete_and_a_locked_folder_is_named(tmp_path, capsys):
    save(tmp_path / "checkpoint-1", 1)
    (tmp_path / "checkpoint-1" / "weights.safetensors").unlink()
    assert validate_checkpoint(tmp_path / "checkpoint-1").status == "incomplete"
    true = os.listdir

    def locked(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true(path)

    (tmp_path / "locked").mkdir()
    os.listdir = locked
    try:
        assert main([str(tmp_path), "--repair"]) == 1
    finally:
        os.listdir = true
    assert "locked" in capsys.readouterr().out and (tmp_path / "locked").is_dir()


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_tensors_that_are_not_finite_are_not_saved(tmp_path, value, dtype):
    "Wherever they are: in the factors, in modules trained in full, in the optimizer's state."
    model = make_adapted()
    state = torch.zeros(3, 4).to(dtype)

    def files():
        return state_files({"optimizer": {"exp_avg": state}})

    assert take_snapshot(model, base={}, meta=dict(step=7), files=files()).meta["finite"] is True
    spoiled = torch.zeros(3, 4)
    spoiled[1, 2] = value
    state = spoiled.to(dtype)
    if dtype != torch.float8_e4m3fn or value != value:  # that dtype has no infinity
        with pytest.raises(CheckpointError, match="step 7.*exp_avg"):
            take_snapshot(model, base={}, meta=dict(step=7), files=files())
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][
        int(value == value)
    ]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match="not finite"):
        save_lora_adapters(model, tmp_path / "adapter", base={})
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, **contents: bytes) -> Path:
    "Other contents for files of a checkpoint (`__` for a dot), and a manifest in order for them."
    manifest = Manifest.loads((path / MANIFEST).read_text())
    files = dict(manifest.files)
    for key, data in contents.items():
        name = key.replace("__", ".")
        (path / name).write_bytes(data)
        files[name] = files.get(name, {}) | dict(size=len(data), sha256=file_sha256(path / name))
    (path / MANIFEST).write_text(Manifest(files, manifest.meta).dumps())
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "A saved adapter with a training state."
    path = tmp_path_factory.mktemp("saved") / "checkpoint-3"
    save_lora_adapters(
        make_adapted(),
        path,
        base={},
        meta=dict(step=3),
        files=state_files({"exp_avg": torch.zeros(3)})
        | {"trainer_state.json": b'{"global_step": 3}'},
    )
    assert validate_checkpoint(path).whole
    return path


@pytest.mark.parametrize("value", BAD)
def test_a_checkpoint_that_is_not_finite_is_not_resumed(adapter, tmp_path, value):
    path = shutil.copytree(adapter, tmp_path / "checkpoint-3")
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        tensors = load_file(adapter / name)
        next(iter(tensors.values())).view(-1)[0] = value
        save_file(tensors, tmp_path / "new")
        rewritten(path, **{name.replace(".", "__"): (tmp_path / "new").read_bytes()})
    assert validate_checkpoint(path).whole
    model = make_adapted()
    with pytest.raises(CheckpointError, match="not finite"):
        restore(model, path)
    with pytest.raises(CheckpointError, match="not finite"):
        load_lora_adapters(make_base(), path)
    with pytest.raises(CheckpointError, match="not finite"):
        read_state(validate_checkpoint(path))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=4)), max_size=2),
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.integers(-1, 9), st.text(max_size=3)), max_size=2
    ),
    st.sampled_from(
        [
            "pissa",
            "olora",
            "corda",
            "(a+)+$",
            ".*",
            "q_proj",
            "all-linear",
            [["a"]],
            [[0, 2]],
            {"q_proj": 3},
            [0, 1],
        ]
    ),
)
KEYS = sorted({*LoraConfig().to_dict(), *peft_config.FORMS, "of_a_later_peft"})


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(KEYS), value=ODD)
def test_settings_of_an_adapter_are_taken_in_known_forms_only(adapter, key, value):
    given_now = json.loads((adapter / "adapter_config.json").read_bytes())
    try:
        config = read_adapter_config(json.dumps(given_now | {key: value}).encode())
    except CheckpointError as error:
        assert repr(key) in str(error)
        return
    assert (
        config.init_lora_weights in (True, False, "gaussian", "orthogonal", "eva")
        and config.layer_replication is None
    )
    assert (
        config.megatron_config is None
        and config.megatron_core == "megatron.core"
        and config.auto_mapping is None
    )
    assert 0 < config.r <= peft_config.MAX_RANK and 0 < config.lora_alpha <= peft_config.MAX_ALPHA


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(KEYS), value=ODD)
@example(key="modules_to_save", value=None)
@example(key="target_modules", value=None)
def test_mutated_settings_load_or_are_refused(adapter, tmp_path_factory, key, value):
    "With a `CheckpointError`, and the base's weights are never changed."
    path = shutil.copytree(adapter, tmp_path_factory.mktemp("forged") / "checkpoint-3")
    given_now = json.loads((adapter / "adapter_config.json").read_bytes())
    rewritten(path, adapter_config__json=json.dumps(given_now | {key: value}).encode())
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    try:
        load_lora_adapters(base, path)
    except CheckpointError:
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(base).items())


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"[" * 10**5, b"\xff", b"{}", b'{"r": 1e400, "peft_type": "LORA"}'],
)
def test_settings_that_are_no_settings(data):
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        read_adapter_config(data)


def test_what_is_loaded_is_what_was_verified(adapter, tmp_path):
    """A configuration that changes after the report is not read, and a later key of PEFT at its
    default does no harm.
    """
    path = shutil.copytree(adapter, tmp_path / "checkpoint-3")
    report = validate_checkpoint(path)
    config = json.loads((path / "adapter_config.json").read_bytes())
    (path / "adapter_config.json").write_text(
        json.dumps(config | dict(lora_alpha=config["lora_alpha"] * 100))
    )
    with pytest.raises(CheckpointError, match="no longer what was saved"):
        load_lora_adapters(make_base(), report)
    rewritten(path, adapter_config__json=json.dumps(config | dict(of_a_later_peft=None)).encode())
    assert (
        load_lora_adapters(make_base(), path).peft_config["default"].lora_alpha
        == config["lora_alpha"]
    )


def test_weights_that_change_after_the_report_are_not_loaded(adapter, tmp_path):
    path = shutil.copytree(adapter, tmp_path / "checkpoint-3")
    report = validate_checkpoint(path)
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path / "adapter_model.safetensors")
    for load in (lambda: load_lora_adapters(make_base(), report), lambda: load_files(report)):
        with pytest.raises(CheckpointError, match="adapter_model.safetensors.* no longer what was"):
            load()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    step=st.integers(0, 10**6).filter(lambda step: step != 3),
    where=st.sampled_from(["name", "manifest", "trainer_state"]),
)
def test_steps_must_agree(adapter, tmp_path_factory, step, where):
    run = tmp_path_factory.mktemp("steps")
    path = shutil.copytree(adapter, run / f"checkpoint-{step if where == 'name' else 3}")
    if where == "manifest":
        manifest = Manifest.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(
            Manifest(manifest.files, manifest.meta | dict(step=step)).dumps()
        )
    if where == "trainer_state":
        rewritten(path, trainer_state__json=json.dumps(dict(global_step=step)).encode())
    assert validate_checkpoint(path).status == "corrupt" and latest_checkpoint(run)[0] is None


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-03",
        "checkpoint-003",
        "checkpoint-٣",
        "checkpoint-３",
        "checkpoint-3 ",
        "checkpoint--3",
    ],
)
def test_other_spellings_are_no_steps(adapter, tmp_path, name):
    shutil.copytree(adapter, tmp_path / name)
    assert members(tmp_path) == [] and latest_checkpoint(tmp_path) == (None, [])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.one_of(
        st.sampled_from(
            [
                "added_tokens.json",
                "special_tokens_map.json",
                "chat_template.jinja",
                "modeling_evil.py",
                "index.json",
                "notes.txt",
                "a/b.json",
            ]
        ),
        st.from_regex(r"[a-z_]{1,8}(\.[a-z]{1,6})?", fullmatch=True),
    )
)
def test_a_file_that_no_manifest_names_is_a_fault(adapter, tmp_path_factory, name):
    path = shutil.copytree(adapter, tmp_path_factory.mktemp("more") / "checkpoint-3")
    if BYSTANDERS.fullmatch(name) or (path / name).exists():
        return
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    report = validate_checkpoint(path)
    assert report.status == "corrupt" and name in str(report)
    with pytest.raises(CheckpointError):
        load_lora_adapters(make_base(), path)


def test_what_git_and_hubs_write_is_no_fault(adapter, tmp_path):
    path = shutil.copytree(adapter, tmp_path / "checkpoint-3")
    for name in (
        ".gitattributes",
        ".gitignore",
        ".git/objects/ab/pack.bin",
        ".cache/huggingface/download/x.metadata",
        "README.md",
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    assert validate_checkpoint(path).whole


def test_repair_moves_only_what_is_ours(adapter, tmp_path, capsys):
    """Web sites and other tools' adapters stay; what is left of our saves goes; what a living
    writer is at stays.
    """
    for name in ("website/public", "extension", "hf_peft", "hf_run/checkpoint-500"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("website/public", "extension"):
        (tmp_path / name / "manifest.json").write_text('{"name": "x"}')
    for name in ("hf_peft", "hf_run/checkpoint-500"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    theirs = tree(tmp_path)
    broken = shutil.copytree(adapter, tmp_path / "run" / "checkpoint-3")
    (broken / "adapter_config.json").write_text("")
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "run" / "parameters.json").touch()
    (tmp_path / "run" / "checkpoint-4").mkdir()
    dead = hidden_name(tmp_path / "export" / "merged", "saving")
    (dead / "merged").mkdir(parents=True)
    elsewhere = dead.with_name(dead.name.replace(HIDDEN.fullmatch(dead.name)["machine"], "0" * 6))
    elsewhere.mkdir()
    assert main([str(tmp_path)]) == 1 and ".merged.saving-" in capsys.readouterr().out
    assert main([str(tmp_path), "--repair"]) == 1
    said = capsys.readouterr().out
    assert said.count("not ours") == 4 and "removed: " in said
    assert set(theirs) <= set(tree(tmp_path)) and not dead.exists() and elsewhere.exists()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "broken-1",
        "log.jsonl",
        "parameters.json",
    ]
    assert sorted(p.name for p in (tmp_path / "run" / "broken-1").iterdir()) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_exports_of_an_interrupted_call_are_gone_on_with(adapter, tmp_path):
    source = source_of(validate_checkpoint(adapter))
    assert still_to_export(tmp_path, ["adapter", "merged"], source) == ["adapter", "merged"]
    save_checkpoint(tmp_path / "adapter", {"x.json": b"{}"}, meta=source)
    assert still_to_export(tmp_path, ["adapter", "merged"], source) == ["merged"]
    with pytest.raises(CheckpointError, match="exist and are valid"):
        still_to_export(tmp_path, ["adapter"], source)
    with pytest.raises(CheckpointError, match="another adapter"):
        still_to_export(tmp_path, ["adapter"], dict(source_adapter="0"))
    (tmp_path / "adapter" / "x.json").write_text("")
    with pytest.raises(CheckpointError, match="corrupt"):
        still_to_export(tmp_path, ["adapter", "merged"], source)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
    ],
    ids=lambda c: type(c).__name__,
)
def test_only_lora_is_saved(tmp_path, config):
    with pytest.raises(CheckpointError, match="only LORA"):
        save_lora_adapters(get_peft_model(make_base(), config), tmp_path / "adapter", base={})


def test_adapters_of_other_tools_are_explained(tmp_path):
    model, path = make_adapted(), tmp_path / "plain"
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"PeftModel\.from_pretrained\(base, path\)"):
        load_lora_adapters(make_base(), path)
    renamed = {
        name.replace("base_model.model.model.", "base_model.model."): t
        for name, t in load_file(path / "adapter_model.safetensors").items()
    }
    save_file(renamed, path / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match="(?s)lacks, such as 'base_model.model.*this base has 'model"
    ):
        load_lora_adapters(make_base(), path)
    (path / "adapter_model.safetensors").unlink()
    torch.save({}, path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="convert adapter_model.bin to safetensors"):
        load_lora_adapters(make_base(), path)


def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path):
    model = make_base()
    model.resize_token_embeddings(model.config.vocab_size + 2)
    if len(model.text_lm_head.weight) == model.config.vocab_size:
        pytest.skip("this version resizes the text head")
    with pytest.raises(CheckpointError, match="text head has 320 rows"):
        take_snapshot(model, base={})


HOSTILE = st.text(
    st.sampled_from("\x1b\n\r\x07\x9b\u202e[]52;c\ud800 whole"), min_size=1, max_size=12
).map(lambda t: t.replace("\0", ""))


@settings(max_examples=40, deadline=None)
@given(name=HOSTILE)
def test_names_reach_no_terminal_as_they_are(name):
    from higgs_nb.checkpoint.validate import CheckpointReport, Fault, Reports

    text = str(Reports([CheckpointReport(Path(name), (Fault("corrupt", name, "x"),))])) + repr(
        CheckpointReport(Path(name))
    )
    assert all(c.isprintable() for c in text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("<>[]()!`|*_#\n\\&$~ab"), max_size=20))
def test_words_in_a_card_are_plain_text(text):
    import markdown_it

    tokens = (
        markdown_it.MarkdownIt("commonmark")
        .enable("table")
        .enable("strikethrough")
        .parse(f"Verdict: {in_markdown(text)}")
    )
    inline = [child.type for token in tokens for child in token.children or ()]
    assert set(inline) <= {"text", "text_special"} and [t.type for t in tokens] == [
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]


def test_python_m(adapter):
    done = subprocess.run(
        [sys.executable, "-m", "higgs_nb.checkpoint.repair", str(adapter)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("whole"), done.stderr


TREE = st.recursive(
    st.sampled_from(["empty", "link", "file", "checkpoint"]),
    lambda part: st.dictionaries(st.sampled_from("abc"), part, min_size=1, max_size=2),
    max_leaves=8,
)


def grow(path, tree):
    "Make a tree of folders, links, files and checkpoints."
    if tree == "file":
        return path.write_text("")
    if tree == "link":
        return path.symlink_to(path.parent, target_is_directory=True)
    path.mkdir()
    if tree == "checkpoint":
        return (path / "manifest.json").write_text("{}")
    for name, part in tree.items() if isinstance(tree, dict) else ():
        grow(path / name, part)


@settings(max_examples=40, deadline=None, suppress_health_check=[*HealthCheck])
@given(tree=TREE.filter(lambda t: isinstance(t, dict)))
@example(tree={"a": {"b": {"c": {"a": {"b": {"c": "checkpoint"}}}}}})
@example(tree={"a": "link", "b": "checkpoint"})
def test_what_a_search_leaves_out_is_said(tmp_path_factory, tree):
    "Each checkpoint is found, or lies behind a link or a depth that is named."
    root = tmp_path_factory.mktemp("tree") / "root"
    grow(root, tree)
    found, said = set(find_checkpoints(root)), unsearched(root)
    named = [Path(line.split(": ", 1)[1]) for line in said]
    for path in root.rglob("manifest.json"):
        hidden = [p for p in named if path.is_relative_to(p)]
        assert (path.parent in found) != bool(hidden)
    for path, line in zip(named, said):
        assert path.is_dir() and path.is_symlink() == line.startswith("not followed, a link")
    links = [p for p in root.rglob("*") if p.is_symlink()]
    assert all(any(link.is_relative_to(p) for p in named) for link in links)


def test_the_search_says_what_it_left_out(adapter, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    (run / "else\x1bwhere").symlink_to(tmp_path, target_is_directory=True)
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "not followed, a link:" in said and "else\\x1bwhere" in said
