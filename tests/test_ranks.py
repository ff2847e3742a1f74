"""Several processes train what one would, stop together, fail together, and go on to the bit.
Gloo, on the CPU.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resume_job import log, make_trainer, run, said, whole_state
from safetensors.torch import load_file

from higgs_nb.checkpoint.repair import main as higgs_validate
from higgs_nb.checkpoint.validate import list_checkpoints
from higgs_nb.data.collator import PackedBatchSampler

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "40 steps of two processes without interruption."
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    assert run(folder, ranks=2) == [0, 0], said(folder)
    return folder


def same_run(folder, whole):
    assert log(folder) == log(whole)
    assert whole_state(folder / "checkpoint-40") == whole_state(whole / "checkpoint-40")


def test_13_kill_27(whole, tmp_path):
    assert run(tmp_path, ranks=2, save_steps=13, die=(16, KILL)) == [-KILL, -KILL], said(tmp_path)
    assert run(tmp_path, ranks=2, resume="auto") == [0, 0], said(tmp_path)
    same_run(tmp_path, whole)


def test_7_9_24_and_one_process_is_asked_to_stop(whole, tmp_path):
    "The second process alone gets a SIGTERM in step 16: both stop after it, with one checkpoint."
    assert run(tmp_path, ranks=2, save_steps=7, die=(7, KILL)) == [-KILL, -KILL], said(tmp_path)
    assert run(tmp_path, ranks=2, resume="auto", die=(15, TERM, 1, 1)) == [75, 75], said(tmp_path)
    assert [r.step for r in list_checkpoints(tmp_path)] == [7, 16] and higgs_validate(
        [str(tmp_path)]
    ) == 0
    assert "step 16: another process was asked to: saving a checkpoint and stopping" in said(
        tmp_path
    )
    assert run(tmp_path, ranks=2, resume="auto") == [0, 0], said(tmp_path)
    same_run(tmp_path, whole)


def test_a_save_that_fails_fails_everywhere(tmp_path):
    "Only the first process writes; the other says what happened to it."
    assert run(tmp_path, ranks=2, save_steps=3, full=(3, 9), max_steps=9) == [1, 1]
    assert not list_checkpoints(tmp_path)
    other = (tmp_path / "said-1.txt").read_text()
    for part in (
        "CheckpointError: in the first process: checkpoint not saved",
        "Errno 27",
        f"{tmp_path}/checkpoint-3",
        "MB free",
    ):
        assert part in other, other


def test_what_cannot_be_saved_is_refused(tmp_path):
    assert run(tmp_path, ranks=2, fsdp="full_shard") == [1, 1]
    assert "FSDP and DeepSpeed, as accelerate sets them up, divide the adapter" in said(
        tmp_path
    ) and "shard_base=True" in said(tmp_path)


def test_a_base_that_is_divided(whole, tmp_path):
    """16 steps with half of each layer in each process, and then, from a checkpoint, with the
    whole base in each: to the bit what a run with the whole base is.
    """
    assert run(tmp_path, ranks=2, shard_base=True, save_steps=13, die=(16, KILL)) == [
        -KILL,
        -KILL,
    ], said(tmp_path)
    assert run(tmp_path, ranks=2, resume="auto") == [0, 0], said(tmp_path)
    same_run(tmp_path, whole)


def test_a_divided_base_recomputes_and_speaks(tmp_path):
    """Two layers with audio self-attention, activations recomputed in the backward, and speech
    every three steps, to which both processes add and which the first keeps.
    """
    settings = dict(
        ranks=2,
        model=dict(num_layers=2),
        audio_attention=True,
        gradient_checkpointing=True,
        speak=True,
        max_steps=6,
        save_steps=3,
        eval_steps=3,
    )
    for name in ("whole", "divided"):
        assert run(tmp_path / name, shard_base=name == "divided", **settings) == [0, 0], said(
            tmp_path / name
        )
    assert log(tmp_path / "divided") == log(tmp_path / "whole")
    for file in (
        "checkpoint-6/adapter_model.safetensors",
        "samples/step-000006/00000-0.wav",
        "samples/step-000006/00001-1.wav",
        "samples/step-000000/00001-1.wav",
    ):
        assert (tmp_path / "divided" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes(), file


def test_one_process_has_nothing_to_divide(tmp_path):
    assert run(tmp_path, shard_base=True, max_steps=2, save_steps=2) == [
        0
    ] and "it holds the whole base" in said(tmp_path)
    assert run(tmp_path / "all", ranks=2, shard_base=True, adapter=None) == [
        1,
        1,
    ] and "give it an adapter" in said(tmp_path / "all")


FRAMES = (20, 22, 24, 26, 28, 30, 32, 34)  # eight sentences: one row of all, or two rows of four


def budget_of_two_rows(folder):
    lengths = make_trainer(folder, frames=FRAMES, token_budget=10_000).train_dataset.lengths
    return next(
        b
        for b in range(max(lengths), 10_000)
        if [len(row) for row in PackedBatchSampler(lengths, b, 1).batches(0)] == [4, 4]
    )


def test_two_processes_train_what_one_would(tmp_path):
    """2 processes x batch 4 = 1 process x batch 8, in packed rows; and nine rows in two processes,
    where one row is nobody's, are nine rows in one process that accumulates two. Audio
    self-attention on. Adapters equal to 1e-6 after 10 steps, and the losses on five held-out
    sentences in three batches: each counts once.
    """
    same = dict(adapter=dict(dropout=0.0), audio_attention=True, max_steps=10, eval_steps=5)
    eight = dict(same, frames=FRAMES, gradient_accumulation_steps=1)
    runs = dict(
        one_of_8=(1, dict(eight, token_budget=10_000)),
        two_of_4=(2, dict(eight, token_budget=budget_of_two_rows(tmp_path / "any"))),
        one_by_2=(1, dict(same, gradient_accumulation_steps=2)),
        two_by_1=(2, dict(same, gradient_accumulation_steps=1)),
    )
    for name, (ranks, settings) in runs.items():
        assert run(tmp_path / name, ranks=ranks, **settings) == [0] * ranks, said(tmp_path / name)
    for a, b in (("one_of_8", "two_of_4"), ("one_by_2", "two_by_1")):
        one, two = (
            load_file(tmp_path / name / "checkpoint-10" / "adapter_model.safetensors")
            for name in (a, b)
        )
        worst = max((one[name] - two[name]).abs().max().item() for name in one)
        print(f"{a}, {b}: largest difference of an adapter {worst:.1e}")
        assert worst < 1e-6 and any("audio_attn" in name for name in one)
        for x, y in zip(log(tmp_path / a), log(tmp_path / b), strict=True):
            assert all(abs(x[k] - y[k]) < 1e-5 for k in x if "loss" in k), (x, y)


ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0", "--num_cpu_threads_per_process", "1"),
]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2"),
]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(ACCELERATE, id="accelerate launch", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, id="torchrun"),
    ],
)
def test_launchers(tmp_path, launcher):
    (tmp_path / "script.py").write_text(
        "import sys; from resume_job import train; train(sys.argv[1], max_steps=4, "
        "save_steps=2, eval_steps=4)"
    )
    done = subprocess.run(
        [*launcher, tmp_path / "script.py", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r.step for r in list_checkpoints(tmp_path / "run")] == [2, 4] and higgs_validate(
        [str(tmp_path / "run")]
    ) == 0
    assert len((whole_state(tmp_path / "run" / "checkpoint-4")[0])["processes"]) == 2


@pytest.mark.slow
def test_two_hosts_of_which_one_is_asked_to_stop(tmp_path):
    """Two launchers with a process each, as on two hosts: a signal to one lets both save, stop and
    say 75; started again, they go on where they were.
    """
    (tmp_path / "script.py").write_text(
        "import sys; from resume_job import train; train(sys.argv[1], resume='auto', "
        "max_steps=40, save_steps=2, save_total_limit=2)"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def start():
        command = [
            sys.executable,
            "-c",
            "import sys; from higgs_nb.cli.launch import main; sys.exit(main())",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"localhost:{port}",
            "--local-addr",
            "localhost",
            "script.py",
            "run",
        ]
        said = open(tmp_path / "said.txt", "a")
        env = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        return [
            subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said, env=env)
            for _ in range(2)
        ]

    def codes(launchers):
        return [launcher.wait(timeout=300) for launcher in launchers]

    launchers = start()
    while not (tmp_path / "run" / "checkpoint-2").is_dir() and all(
        launcher.poll() is None for launcher in launchers
    ):
        time.sleep(0.02)
    launchers[1].send_signal(signal.SIGUSR1)
    assert codes(launchers) == [75, 75], (tmp_path / "said.txt").read_text()[-3000:]
    assert (tmp_path / "said.txt").read_text().count("the same command goes on") == 2
    stopped = list_checkpoints(tmp_path / "run")[-1]
    assert stopped.whole and 2 <= stopped.step < 40
    assert codes(start()) == [0, 0], (tmp_path / "said.txt").read_text()[-3000:]
    assert [r.step for r in list_checkpoints(tmp_path / "run")] == [38, 40] and higgs_validate(
        [str(tmp_path / "run")]
    ) == 0
    steps = [e["step"] for e in log(tmp_path / "run") if "loss" in e]
    assert steps == sorted(set(steps)) and steps[0] == 3  # one log, that goes on where it was
