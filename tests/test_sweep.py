"""A sweep of a small notebook: killed, taken up, asked to stop, failing, as a SLURM task and on
Dask.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from distributed import LocalCluster
from nbformat.v4 import new_code_cell, new_notebook

from higgs_nb.cli.sweep import main as higgs_sweep
from higgs_nb.cli.sweep_file import read_sweep

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = """n: int = 0  # number of the run
seconds: float = 1.0  # that it takes
out: str = ""  # its directory
diary: str = ""  # file that says what happened"""
WORK = """import json, time
from pathlib import Path
from higgs_nb.cli.directory import occupy
occupy(Path(out))
def note(what):
    with open(diary, "a") as f: f.write(f"{what} {n}\\n")
note("begin")
until = time.time() + seconds
while time.time() < until and not (Path(out)/"STOP").exists(): time.sleep(0.05)
if (Path(out)/"STOP").exists():
    class Preempted(Exception): pass
    raise Preempted("asked to stop")
assert n != 13
Path(out, "run.json").write_text(json.dumps(dict(square=n * n)))
note("end")"""


@pytest.fixture
def sweep(tmp_path):
    "A function that writes a sweep over `n`, and returns its file and its diary as a function."
    notebook = new_notebook(
        cells=[new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(WORK)],
        metadata=KERNEL,
    )
    nbformat.write(notebook, tmp_path / "work.ipynb")
    (tmp_path / "diary").touch()

    def write(numbers, seconds=1.0):
        (tmp_path / "sweep.yaml").write_text(
            json.dumps(
                dict(
                    run=str(tmp_path / "work.ipynb"),
                    out=str(tmp_path / "out"),
                    grid=dict(n=numbers),
                    parameters=dict(diary=str(tmp_path / "diary"), seconds=seconds),
                )
            )
        )
        return tmp_path / "sweep.yaml"

    write.diary = lambda: Counter((tmp_path / "diary").read_text().splitlines())
    return write


def command(file, *more):
    return [Path(sys.executable).with_name("higgs_sweep"), file, "--jobs", "2", *more]


def until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.05)
    assert process.poll() is None, "the sweep was over too soon"


@pytest.mark.slow
def test_six_runs_two_at_a_time_killed_in_the_middle(sweep, tmp_path):
    """The sweep alone is killed: the runs that it left behind are waited for, and do not begin
    again. Then it dies with its runs, as if the machine were lost: those that are not done begin
    once more, the others do not. In the end there are six results.
    """
    file = sweep(list(range(6)), seconds=3.0)

    def states():
        return Counter(r.state for r in read_sweep(file))

    first = subprocess.Popen(command(file), start_new_session=True, stdout=subprocess.DEVNULL)
    until(first, lambda: sum(sweep.diary()[f"begin {n}"] for n in range(6)) == 2)
    first.kill()
    first.wait()
    left_behind = [n for n in range(6) if sweep.diary()[f"begin {n}"]]
    second = subprocess.Popen(command(file), start_new_session=True, stdout=subprocess.DEVNULL)
    until(
        second,
        lambda: states()["done"] >= 2 and sum(sweep.diary()[f"begin {n}"] for n in range(6)) == 4,
    )
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    then, done = sweep.diary(), [r.parameters["n"] for r in read_sweep(file) if r.state == "done"]
    assert (
        set(left_behind) <= set(done)
        and len(done) < 6
        and all(then[f"begin {n}"] == then[f"end {n}"] == 1 for n in done)
    )
    last = subprocess.run(command(file), capture_output=True, text=True)
    assert last.returncode == 0 and "6 of 6 done" in last.stdout, last.stdout + last.stderr
    diary = sweep.diary()
    for n in range(6):  # one may have come to its end and not to its record
        again = n not in done
        for word in ("begin", "end"):
            assert diary[f"{word} {n}"] == then[f"{word} {n}"] + again, diary
    compared = json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())
    assert sorted((c["parameters"]["n"], c["square"], c["state"]) for c in compared) == [
        (n, n * n, "done") for n in range(6)
    ]


def test_a_run_that_fails_does_not_hold_up_the_others(sweep, tmp_path, capsys):
    "Exit code 1; called again, only what failed is tried again."
    file = sweep([1, 13], seconds=0.0)
    assert higgs_sweep([str(file), "--jobs", "2"]) == 1
    assert (
        "1 of 2 done, failed: n=13" in capsys.readouterr().out
        and "AssertionError" in (tmp_path / "out" / "n=13" / "higgs_run.log").read_text()
    )
    assert higgs_sweep([str(file), "--only", "0"]) == 0 and sweep.diary() == Counter(
        ["begin 1", "end 1", "begin 13"]
    )


@pytest.mark.slow
def test_a_task_of_a_slurm_array_that_is_preempted(sweep, tmp_path):
    """The script that is for sbatch, run by bash: a signal stops the run with 75 and queues the
    task again; the next time it ends with 0.
    """
    file = sweep([1, 2, 3], seconds=20.0)
    assert higgs_sweep([str(file), "--slurm", str(tmp_path / "job.sh")]) == 0
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path))}/requeued\n'
    )  # SLURM's command
    (tmp_path / "scontrol").chmod(0o755)
    task = dict(
        os.environ,
        SLURM_ARRAY_TASK_ID="1",
        SLURM_ARRAY_JOB_ID="77",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    job = subprocess.Popen(["bash", tmp_path / "job.sh"], env=task, stdout=subprocess.DEVNULL)
    until(job, lambda: sweep.diary()["begin 2"])
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 75 and (tmp_path / "requeued").read_text() == "requeue 77_1\n"
    file.write_text(file.read_text().replace("20.0", "0.0"))
    assert (
        subprocess.run(
            ["bash", tmp_path / "job.sh"], env=task, stdout=subprocess.DEVNULL
        ).returncode
        == 0
    )
    assert sweep.diary() == Counter({"begin 2": 2, "end 2": 1})


@pytest.mark.slow
def test_on_dask(sweep, tmp_path):
    "Workers of a scheduler conduct the runs."
    file = sweep([1, 2], seconds=0.0)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert higgs_sweep([str(file), "--dask", cluster.scheduler_address]) == 0
    assert sweep.diary() == Counter(["begin 1", "end 1", "begin 2", "end 2"])
