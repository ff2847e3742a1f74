"""Every chapter runs in a process of its own, as `nbdev_test` runs it. The chapters of a floor are
a file of tests, so that `make test` spreads them over its workers. The processes are forked from
one that has imported the libraries, which takes longer than most chapters do.
"""

import os
from pathlib import Path

from conftest import ROOT, committed, fork_server
from kernels import fork_kernels, tests_address
from nbdev.test import nbdev_test

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


def run_here(notebook, printed, environment, tests):
    "Run a notebook in this process; what it prints goes to the file `printed`."
    fork_kernels(tests)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(nothing, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    nbdev_test(path=notebook)


def run_chapter(notebook, folder):
    "Run a notebook; a failure shows what it printed, which a file in `folder` holds."
    printed = Path(folder, "printed")
    given = (notebook, printed, dict(os.environ), tests_address())
    child = fork_server().Process(target=run_here, args=given)
    child.start()
    try:
        child.join()
    finally:
        child.kill()  # after a timeout
    written = printed.read_text(encoding="utf-8", errors="replace") if printed.exists() else ""
    assert child.exitcode == 0 and "Success." in written, f"{notebook}\n{written}"
