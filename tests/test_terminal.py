"""What a person sees of a run: on a terminal, in the log of a batch job, when it fails, and when
it is interrupted. Small notebooks, real kernels, real commands.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from configparser import ConfigParser

import nbformat
import pytest
from conftest import ROOT, run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from higgs_nb.cli.run import main as higgs_run
from higgs_nb.cli.summary import SUMMARIES, summary_lines
from higgs_nb.core.events import EVENTS

pytestmark = pytest.mark.usefixtures("new_kernels")  # whose start is shown, too
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = 'n: int = 0  # a number\nout: str = ""  # directory'
STEPS = """import logging, time, warnings
from higgs_nb.core.events import send_event
print("printed by a cell")
logging.getLogger("higgs_nb.some").warning("beware of \\x1b]52;c;\\x07this")
warnings.warn("and of that")
warnings.warn("a library speaks to its authors", DeprecationWarning)
send_event("confetti", colour="red")
for done in range(41):
    losses = {"loss": 6 - done / 40, "held out": 6.5}
    send_event("progress", what="training", done=done, total=40, losses=losses)
    time.sleep(0.02)"""


@pytest.fixture
def notebook(tmp_path):
    "A function that writes a notebook: headings and code, in turn."

    def write(*sources):
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
        for source in sources:
            is_prose = source.startswith("#")
            cells.append((new_markdown_cell if is_prose else new_code_cell)(source))
        nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / "work.ipynb")
        return str(tmp_path / "work.ipynb")

    return write


def command(*words):
    return [sys.executable, "-m", "higgs_nb.cli.run", *map(str, words)]


def test_a_command_starts_without_torch():
    "Its import takes longer than all the others of a command."
    code = "import sys, higgs_nb.cli.run, higgs_nb.cli.sweep; print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "False"


def on_a_terminal(*words):
    "Exit code, and all that a command writes to a terminal of its own."
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        command(*words),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode()


def test_a_batch_job_has_plain_lines(notebook, tmp_path, capfd):
    work = notebook("# work\n\n> A title", "## First", STEPS, "## Second", "1 + 1")
    assert higgs_run([work, "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr()
    log = tmp_path / "out" / "work.log"
    lines = [re.sub(r"^ *\d\d:\d\d ", "", line) for line in said.err.splitlines()]
    assert lines == [
        f"work in {tmp_path / 'out'}, log in work.log",
        "First",
        "warning: beware of \\x1b]52;c;\\x07this",
        "warning: and of that",
        "Second",
    ]
    assert said.out.splitlines()[0] == f"work is done: {tmp_path / 'out' / 'work.ipynb'}"
    assert said.out.splitlines()[-1] == f"  log: {log}"
    assert "\r" not in said.out + said.err and "\x1b" not in said.out + said.err
    text = log.read_text()
    for words in ("Executing Cell 5", "printed by a cell", "a library speaks", "and of that"):
        assert words in text
    assert "\x1b" not in text.replace("\x1b[", "")
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_a_terminal_has_a_bar(notebook, tmp_path):
    work = notebook("## First", STEPS, "## Second", "1 + 1")
    code, said = on_a_terminal(work, "--out", tmp_path / "out")
    assert code == 0, said
    assert re.search(r"training: +\d+%\|.*/40 .*<.*loss 5\.\d+, held out 6\.500", said), said
    assert "Executing" not in said and "printed by a cell" not in said
    assert said.index("First") < said.index("warning: and of that") < said.index("Second")
    assert "\x1b]52" not in said


def test_verbose_shows_all(notebook, tmp_path):
    work = notebook("## First", STEPS, "## Second", "raise ValueError('no good')")
    code, said = on_a_terminal(work, "--out", tmp_path / "out", "--verbose")
    assert code == 1
    for words in ("Executing Cell", "printed by a cell", "Traceback", "ValueError: no good"):
        assert words in said, words
    assert "\x1b]52" not in said


def test_a_failure_is_a_sentence_and_a_place(notebook, tmp_path, capfd):
    work = notebook("## First", "1 + 1", "## The second", "raise ValueError('no\\ngood\\x1b[2J')")
    assert higgs_run([work, "--out", str(tmp_path / "out")]) == 1
    said, log = capfd.readouterr().err, tmp_path / "out" / "work.log"
    assert said.splitlines()[-4:] == [
        "work failed at 'The second', in cell [4] of the executed notebook:",
        "ValueError: no",
        "good\\x1b[2J",
        f"  log: {log}",
    ]
    assert "Traceback" not in said and "\x1b" not in said
    assert "Traceback" in log.read_text()


def test_a_kernel_that_dies_names_the_log(notebook, tmp_path, capfd):
    work = notebook("## First", "import os\nos.kill(os.getpid(), 9)")
    assert higgs_run([work, "--out", str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert "work failed at 'First'" in said and "died" in said
    assert said.splitlines()[-1].endswith(str(tmp_path / "out" / "work.log"))


def test_what_cannot_start_has_no_log(notebook, tmp_path, capfd):
    assert higgs_run([notebook("1"), "--out", str(tmp_path / "out"), "-p", "m=1"]) == 2
    assert "log" not in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_second_start_adds_to_the_log(notebook, tmp_path):
    work = notebook("print('word', n)")
    for n in (1, 2):
        assert higgs_run([work, "--out", str(tmp_path / "out"), "-p", f"n={n}"]) == 0
    text = (tmp_path / "out" / "work.log").read_text()
    assert "word 1" in text and "word 2" in text


def test_no_link_is_followed(notebook, tmp_path, capfd):
    "Neither the log nor the channel writes outside of the run's directory."
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (out / "events.jsonl").symlink_to(tmp_path / "mine")
    assert higgs_run([notebook(STEPS), "--out", str(out)]) == 0
    assert (tmp_path / "mine").read_text() == "mine"
    (out / "work.log").unlink()
    (out / "work.log").symlink_to(tmp_path / "mine")
    assert higgs_run([notebook(STEPS), "--out", str(out)]) == 1
    assert (tmp_path / "mine").read_text() == "mine"
    assert "work.log" in capfd.readouterr().err


def test_a_terminal_that_goes_away_does_not_end_the_run(notebook, tmp_path):
    work = notebook("## First", STEPS, "## Second", "open(out + '/end', 'w')")
    process = subprocess.Popen(
        command(work, "--out", tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    process.stderr.readline()
    process.stderr.close()
    process.wait(60)
    assert (tmp_path / "out" / "end").exists()
    assert "can no longer be written" in (tmp_path / "out" / "work.log").read_text()


def test_ctrl_c_says_how_to_resume(notebook, tmp_path):
    work = notebook(
        "## Training",
        "import os, time\nfrom pathlib import Path\nPath(out, 'begun').touch()\n"
        "class Preempted(Exception): pass\n"
        "while not Path(out, 'STOP').exists(): time.sleep(0.05)\n"
        "raise Preempted('stopped after step 3 of 9')",
    )
    words = command(work, "--out", tmp_path / "out", "-p", "n=1")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out" / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 75, said
    assert said[-4:] == [
        "work stopped before its end, SIGINT: the same command goes on",
        "  stopped after step 3 of 9",
        f"  to resume: higgs_run {work} --out {tmp_path / 'out'} -p n=1",
        f"  log: {tmp_path / 'out' / 'work.log'}",
    ]


def test_a_slow_or_dead_reader_does_not_hold_a_run_up(tmp_path):
    "A channel on a full disk or without a reader costs a warning, not the run."
    code = (
        "from higgs_nb.core.events import send_event\n"
        "for n in range(3): send_event('progress', what='x', done=n)\nprint('end')"
    )
    for channel, warnings in (("/dev/full", 1), (tmp_path / "gone" / "events.jsonl", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, EVENTS: str(channel)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "end\n" and len(done.stderr.splitlines()) == warnings, done.stderr


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_of_anything(name):
    for run_json in ({}, {"clips": 3}, {"arms": {"summary": {"a": None}}}, {"minutes": "x"}):
        assert all("\x1b" not in line for line in summary_lines(run_json, name, "runs/\x1b"))


def entry_points():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    return [line.split("=") for line in settings["DEFAULT"]["console_scripts"].split()]


@pytest.mark.parametrize("script, target", entry_points())
def test_each_command_is_a_module(script, target):
    "`python -m` does what the command does."
    said = run(sys.executable, "-m", target.split(":")[0], "--help", cwd=ROOT)
    assert said.startswith(f"usage: {script} ")
