"""Every chapter runs in a process of its own, exactly as `nbdev_test` runs it. The chapters of a
floor are a file of tests, so that `make test` spreads them over its workers.
"""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, committed

GROUPS = {  # file of tests -> folders of nbs
    "test_chapters_data": ("core", "data"),
    "test_chapters_model": ("model", "original"),
    "test_chapters_checkpoint": ("checkpoint", "small"),
    "test_chapters_training": ("training",),
    "test_chapters_speech": ("speech", "view"),
    "test_chapters_cli": ("cli",),
    "test_chapters_tasks": ("tasks",),
}


def chapters(*folders):
    "The notebooks in folders of nbs, as paths from the root of the repository."
    found = [file for file in committed() if file.suffix == ".ipynb" and file.parts[0] == "nbs"]
    return [str(file) for file in found if file.parts[1] in folders]


def others():
    "The notebooks that are in no group."
    grouped = [folder for folders in GROUPS.values() for folder in folders]
    found = [file for file in committed() if file.suffix == ".ipynb" and file.parts[0] == "nbs"]
    return [file for file in found if file.parts[1] not in (*grouped, "runs")]


def run_chapter(notebook):
    "Run a notebook; a failure shows what it printed."
    run = subprocess.run(
        [Path(sys.executable).with_name("nbdev_test"), "--path", notebook],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Success." in run.stdout, f"{notebook}\n{run.stdout}{run.stderr}"
