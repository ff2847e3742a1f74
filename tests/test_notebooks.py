"Every chapter runs, each in a process of its own, exactly as `nbdev_test` runs it."
import subprocess, sys
from pathlib import Path

import pytest
from conftest import ROOT, committed

CHAPTERS = [str(file) for file in committed() if file.suffix == ".ipynb" and file.parts[0] == "nbs" and file.parts[1] != "runs"]


@pytest.mark.parametrize("notebook", CHAPTERS)
def test_notebook(notebook):
    run = subprocess.run([Path(sys.executable).with_name("nbdev_test"), "--path", notebook], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0 and "Success." in run.stdout, f"{notebook}\n{run.stdout}{run.stderr}"
