"""Every chapter runs, each in a process of its own, exactly as `nbdev_test` runs it; tutorials
with parameters run on small ones.
"""

import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from conftest import ROOT, committed

SMALL = {  # tutorial: its parameters here; what it makes goes into the test's folder, where it runs
    "a_new_language.ipynb": dict(out="run", steps=2, texts=2, max_clips=2),
    "read_a_run.ipynb": dict(run="run", clips=2, steps=4),
    "your_voice.ipynb": dict(out="run", steps=2, texts=2, max_clips=2),
}
NOTEBOOKS = [
    file
    for file in committed()
    if file.suffix == ".ipynb" and file.parts[0] == "nbs" and file.parts[1] != "runs"
]


@pytest.mark.parametrize("notebook", [str(file) for file in NOTEBOOKS if file.name not in SMALL])
def test_notebook(notebook):
    run = subprocess.run(
        [Path(sys.executable).with_name("nbdev_test"), "--path", notebook],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Success." in run.stdout, f"{notebook}\n{run.stdout}{run.stderr}"


@pytest.mark.parametrize("name", sorted(SMALL))
def test_tutorial(name, tmp_path):
    papermill.execute_notebook(
        ROOT / "nbs/tutorials" / name,
        tmp_path / name,
        parameters=SMALL[name],
        cwd=tmp_path,
        progress_bar=False,
    )
