"higgs_doctor, with what it looks for really broken where that can be made here."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from higgs_nb.cli.doctor import check_hub
from higgs_nb.cli.doctor import main as higgs_doctor
from higgs_nb.cli.machine import check_place, check_python


def finding(check, given="", path=(), **env):
    "What one check prints in a fresh process, with more folders on its path."
    code = (
        f"from higgs_nb.cli.doctor import {check}; f = {check}({given}); print(f.state, "
        "f.found, f.todo, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def package(folder, name, version, source):
    "A package in `folder` that is found before the installed one, with the metadata of a version."
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )
    return folder


def test_an_older_python():
    older = next(
        (
            p
            for v in ("3.9", "3.10")
            for p in [
                Path(sys.base_prefix).parent / f"{v}.18" / "bin" / "python3",
                Path(f"/usr/bin/python{v}"),
            ]
            if p.exists()
        ),
        None,
    )
    state = check_python((3, 10))
    assert state.state == "problem" and "make PYTHON=python3.11" in state.todo
    if older is None:
        return
    done = subprocess.run(
        [older, "-c", "from higgs_nb.cli.doctor import main; raise SystemExit(main([]))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == 1
        and done.stdout.startswith("problem  Python")
        and "install Python 3.11" in done.stdout
    ), done.stdout + done.stderr


def test_a_torchaudio_that_does_not_fit(tmp_path):
    "Its library is not one that this process can load."
    broken = package(
        tmp_path,
        "torchaudio",
        "0.9",
        "import ctypes, os\nctypes.CDLL(os.path.join(os.path.dirname(__file__), "
        "'libtorchaudio.so'))",
    )
    (broken / "torchaudio" / "libtorchaudio.so").write_bytes(b"for another machine")
    state, found, todo = finding("check_torchaudio", path=[broken])
    assert state == "problem" and "0.9 does not load beside torch" in found and "lib/*.so" in todo


def test_a_package_that_is_too_old(tmp_path):
    state, found, todo = finding("check_packages", path=[package(tmp_path, "peft", "0.2", "")])
    assert state == "problem" and found == "peft is 0.2" and "'peft>=0.20'" in todo


def test_torch_that_does_not_load(tmp_path):
    state, found, todo = finding(
        "check_torch",
        path=[
            package(
                tmp_path,
                "torch",
                "2.9",
                "raise OSError('libtorch_cuda.so: cannot open shared object file')",
            )
        ],
    )
    assert state == "problem" and "libtorch_cuda.so" in found and "install" in todo


def test_a_gpu_that_torch_does_not_use(tmp_path):
    "What a machine with a driver and a torch for CPUs looks like."
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA Test, 550.1'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    state, found, todo = finding(
        "check_torch", PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES=""
    )
    assert (
        state == "problem"
        and "NVIDIA Test" in found
        and "CUDA_VISIBLE_DEVICES, which is ''" in todo
    )


def test_without_ffmpeg_or_with_a_broken_soundfile(tmp_path):
    state, found, todo = finding("check_audio", PATH="")
    assert state == "note" and "mp3 are read" in found and "m4a" in todo
    state, found, todo = finding(
        "check_audio",
        path=[package(tmp_path, "soundfile", "0.1", "raise OSError('sndfile library not found')")],
    )
    assert state == "problem" and "sndfile library not found" in found and "soundfile>=0.13" in todo


def test_data_that_is_not_whole(tmp_path):
    "A copy of the package without one recording."
    import shutil

    shutil.copytree(
        ROOT / "higgs_nb", tmp_path / "higgs_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    next((tmp_path / "higgs_nb" / "assets" / "allison" / "audio").glob("*.opus")).write_bytes(b"")
    code = (
        "from higgs_nb.cli.doctor import check_data; f = check_data(); print(f.state, f.found, "
        "f.todo, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.startswith("problem|") and "the package is not whole" in done.stdout, (
        done.stdout + done.stderr
    )


def test_directories_that_cannot_be_written(tmp_path):
    assert check_place("/proc/runs").state == "problem"  # nobody may write there, root neither
    (tmp_path / "taken").write_text("")
    assert (
        check_place(tmp_path / "taken" / "runs").state == "problem"
        and check_place(tmp_path / "new" / "runs").state != "problem"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_hub_that_cannot_be_reached(tmp_path):
    "A note, and no error; a closed port of this machine stands for a network that is down."
    state, found, todo = finding(
        "check_hub", "'somebody/some-base'", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path)
    )
    assert (
        state == "note"
        and "cannot be reached" in found
        and "hf download somebody/some-base" in todo
    )
    assert check_hub(str(tmp_path / "nowhere")).state == "problem"


def directory(folder, files):
    "A directory with files of these names; a value that is no text is written as JSON."
    folder.mkdir()
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


BASE = {"model_type": "higgs_audio_v2"}
PARTS = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
NOT_A_BASE = {  # files and what is said of them
    "original": (
        {"config.json": {"model_type": "higgs_audio"}, "model.safetensors": ""},
        "original format: load it with higgs_nb.original.convert.load_original",
    ),
    "codec": ({"config.json": {"model_type": "higgs_audio_v2_tokenizer"}}, "it is a codec"),
    "adapter": ({"adapter_config.json": {}, "adapter_model.safetensors": ""}, "is an adapter"),
    "empty": ({}, "is empty"),
    "corpus": ({"metadata.json": []}, "no config.json"),
    "other": ({"config.json": {"model_type": "llama"}, "model.safetensors": ""}, "'llama'"),
    "weights alone": ({"model.safetensors": ""}, "no config.json"),
    "settings alone": ({"config.json": BASE}, "no model.safetensors"),
    "index alone": (
        {"config.json": BASE, "model.safetensors.index.json": PARTS},
        "lacks 2 files of weights",
    ),
    "a part": (
        {
            "config.json": BASE,
            "model.safetensors.index.json": PARTS,
            "model-1-of-2.safetensors": "",
        },
        "lacks 1 files of weights",
    ),
    "damaged index": ({"config.json": BASE, "model.safetensors.index.json": "{"}, "is damaged"),
    "odd index": (
        {"config.json": BASE, "model.safetensors.index.json": {"weight_map": [1]}},
        "names no weights",
    ),
    "damaged": ({"config.json": "{", "model.safetensors": ""}, "is damaged"),
    "pickle": ({"config.json": BASE, "pytorch_model.bin": ""}, "no model.safetensors"),
}


@pytest.mark.parametrize("name", NOT_A_BASE)
def test_a_directory_that_is_not_a_base(tmp_path, name):
    "It is named for what it is, with what to give instead."
    files, words = NOT_A_BASE[name]
    found = check_hub(str(directory(tmp_path / "a directory", files)))
    assert (found.check, found.state) == ("base", "problem")
    assert words in found.found and "a base in transformers' format" in found.todo


def test_a_directory_that_is_a_base(tmp_path):
    whole = {"config.json": BASE, "model.safetensors": ""}
    parts = {"config.json": BASE, "model.safetensors.index.json": PARTS}
    parts |= dict.fromkeys(PARTS["weight_map"].values(), "")
    for name, files in (("whole", whole), ("parts", parts)):
        assert check_hub(str(directory(tmp_path / name, files))).state == "ok"
    assert "is a file" in check_hub(str(tmp_path / "whole/config.json")).found


WINDOWS = """
import os, runpy, signal, sys
import nbclient, papermill, psutil, safetensors.torch, soundfile, torch.distributed.run, tqdm.auto
import transformers

sys.argv = ["higgs", "--out", os.devnull]
for missing in ("fcntl", "resource", "SIGUSR1"):
    commands = ("cli.run", "checkpoint.repair", "cli.sweep", "cli.launch", "cli.doctor")
    for name in commands[: 5 if missing == "fcntl" else 4]:
        print(f"== {missing} {name}", file=sys.stderr, flush=True)
        if os.fork() == 0:
            os.dup2(2, 1)
            if missing == "SIGUSR1":
                del signal.SIGUSR1
            else:
                sys.modules[missing] = None
            try:
                runpy.run_module(f"higgs_nb.{name}", run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                print(f"exit {ended.code}", file=sys.stderr)
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(0)
        os.wait()
"""


def test_a_system_that_is_not_supported():
    """Without what Windows lacks each command ends with a sentence, and higgs_doctor with a
    finding. Other packages are imported before it is hidden: on Windows they look elsewhere.
    """
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True)
    assert done.stderr.count("== ") == 13 and "Traceback" not in done.stderr, done.stderr
    for part in done.stderr.split("== ")[1:]:
        title, *said = part.strip().splitlines()
        missing, command = title.split()
        if command == "cli.doctor":
            assert f"problem  system               {sys.platform} is not supported" in said[1]
            assert "WSL2" in said[2] and said[-1] == "exit 1"
        else:
            assert "on Windows use WSL2" in said[0] and missing in said[0]
            assert said[1:] == ["exit 2"]


def test_exit_codes(capsys):
    assert (
        higgs_doctor(["--out", "/proc/runs"]) == 1
        and "1 problem: repair" in capsys.readouterr().out
    )
