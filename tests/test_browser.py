"""The site, and the widgets in JupyterLab and Voila, in a headless Chromium: the tests in
tests/browser, run by node.

`make test-browser` installs what they need, and keeps screenshots in build/screenshots.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

HERE, SHOTS = ROOT / "tests/browser", ROOT / "build/screenshots"
CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
MISSING = [
    what
    for what, there in {
        "chromium": CHROMIUM,
        "node": shutil.which("node"),
        "node_modules in tests/browser": (HERE / "node_modules/playwright-core").exists(),
        "voila": importlib.util.find_spec("voila"),
    }.items()
    if not there
]


def in_browser(test):
    "Mark a test that a browser runs: `make test` leaves it out."
    reason = f"{', '.join(MISSING)} not found: see `make test-browser`"
    marks = pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=reason)
    for mark in (*marks, pytest.mark.timeout(3600)):
        test = mark(test)
    return test


def node(file, **env):
    "Run one of the node tests; a failure shows what it wrote."
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", HERE / file],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CHROMIUM": CHROMIUM,
            "BIN": str(Path(sys.executable).parent),
            "SHOTS": str(SHOTS),
            **env,
        },
    )
    assert done.returncode == 0, f"{done.stdout[-12000:]}\n{done.stderr[-2000:]}"


@in_browser
def test_site(site):
    node("site.test.mjs", SITE=str(site))


WIDGETS = """\
import tempfile
from higgs_nb.data.audit import audit
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
from higgs_nb.data.collator import PackedCollator
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.model import tiny_config
from higgs_nb.speech.clips import Speech
from higgs_nb.view.codes_explorer import codes_explorer
from higgs_nb.view.corpus_explorer import corpus_explorer
from higgs_nb.view.label_explorer import label_explorer
from higgs_nb.view.listener import ab_listener
from higgs_nb.view.monitor import run_monitor
corpus = sorted(load_corpus(embedded_corpus()), key=lambda c: len(c.transcript))[:12]
codec, tokenizer = load_codec(), byte_tokenizer()
store, tokens = CodeStore(tempfile.mkdtemp(), codec), AudioTokens.from_config(tiny_config(tokenizer), tokenizer)
%%
corpus_explorer(corpus)
%%
label_explorer(audit(PackedCollator(tokens)([*SampleDataset(corpus[:2], tokenizer, store, tokens)]), tokenizer, tokens))
%%
codes_explorer(corpus[:2], codec, store)
%%
def through(c, n):
    codes = store.get(c.audio[0])[:n]
    return Speech(c.id, c.transcript, codes, None, codec.sampling_rate, codec.decode(codes))
ab_listener([through(c, 2) for c in corpus[:3]], [through(c, 8) for c in corpus[:3]])
%%
run_monitor("run", every_s=0.5)
"""


def widgets_notebook():
    "A notebook with the cells of `WIDGETS`."
    python = dict(name="python3", display_name="python3", language="python")
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in WIDGETS.split("%%\n")]
    return nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=python))


def test_each_cell_of_the_notebook_shows_its_widget(tmp_path):
    "So `make test` notices when the notebook of the browser tests no longer runs."
    (tmp_path / "run").mkdir()
    notebook = widgets_notebook()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        [mime for out in cell.outputs for mime in out.get("data", ()) if "widget-view" in mime]
        for cell in notebook.cells
    ]
    assert [len(views) for views in shown] == [0, 1, 1, 1, 1, 1]


@in_browser
def test_widgets(tmp_path):
    "The monitor follows a run that is going on meanwhile, the one of its chapter with more steps."
    nbformat.write(widgets_notebook(), tmp_path / "widgets.ipynb")
    script = re.search(
        r'SMALL_RUN = """(.*?)"""',
        "\n".join(c.source for c in nbformat.read(ROOT / "nbs/view/07_monitor.ipynb", 4).cells),
        re.S,
    )[1]
    (tmp_path / "run").mkdir()
    run = subprocess.Popen(
        ["nice", "-n", "10", sys.executable, "-W", "ignore", "-c", script, "run", "100000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        node("widgets.test.mjs", NOTEBOOKS=str(tmp_path))
        assert run.poll() is None, run.stderr.read().decode()[-2000:]
    finally:
        run.kill()
        run.wait()
