"""Parameters, directories, notes, git and signals of a run: what comes from outside runs no code
and loses nothing.
"""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from papermill.translators import PythonTranslator

from higgs_nb.cli import directory, execution
from higgs_nb.cli.directory import HELD, claim, goes_on, is_same, occupied, reading
from higgs_nb.cli.execution import is_done
from higgs_nb.cli.limits import CHOICES, RANGES, WORDS, check_choice, in_range, range_of
from higgs_nb.cli.notebooks import notebook_of, parameters_of, run_notebooks
from higgs_nb.cli.parameters import (
    PATHS,
    SEVERAL_PATHS,
    check_leaves,
    check_parameters,
    read_parameters,
)
from higgs_nb.cli.plain_yaml import load_yaml
from higgs_nb.cli.record import surroundings
from higgs_nb.cli.run import main as higgs_run
from higgs_nb.cli.sweep import main as higgs_sweep
from higgs_nb.cli.sweep_file import read_sweep
from higgs_nb.core.messages import print_error
from higgs_nb.family import HIGGS_V2
from higgs_nb.training.recipe import recipe_of

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
HOSTILE = '"]; open("TRACE", "w") #'


@pytest.fixture
def begin():
    "A function that starts a process in a group of its own, which ends with the test."
    processes = []

    def start(*words):
        processes.append(
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def notebook(tmp_path):
    "A function that writes a notebook with parameters `n`, `out` and a cell of code."

    def write(code, name="work.ipynb"):
        cells = [
            new_code_cell(
                'n: int = 0  # number\nvalues: list = []  # any\nout: str = ""  # directory',
                metadata={"tags": ["parameters"]},
            ),
            new_code_cell(code),
        ]
        nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def own_notebook(tmp_path_factory):
    "The path of a notebook of the user's own, with a parameter of any type among others."
    cell = new_code_cell(
        "values: list = []\nx: float = 0.0\nanything = 3", metadata={"tags": ["parameters"]}
    )
    path = tmp_path_factory.mktemp("own") / "own.ipynb"
    nbformat.write(new_notebook(cells=[cell], metadata=KERNEL), path)
    return str(path)


def command(*words):
    return [
        sys.executable,
        "-c",
        "import sys; from higgs_nb.cli.run import main; sys.exit(main())",
        *map(str, words),
    ]


TEXT = st.one_of(st.text(max_size=12), st.sampled_from([HOSTILE, "\\", '\\"', "'''", "\n#", "{x}"]))
PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        TEXT,
    ),
    lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(TEXT, part, max_size=3)),
    max_leaves=6,
)
ODD = st.one_of(
    st.sampled_from([float("nan"), float("inf"), b"x", {1}, (1, HOSTILE), 2j]),
    st.dates(),
    st.dictionaries(st.integers(), TEXT, min_size=1, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_plain_values_arrive_in_the_notebook_as_they_are(value):
    "Through papermill's own translation, whatever quotes and backslashes they hold, keys too."
    try:
        checked = check_parameters(
            "train", dict(rank_pattern={"x": 1}, codebook_weights=[])
        )  # the check is by name below
    except ValueError as error:
        pytest.fail(str(error))
    value = check_leaves(value, "value")
    [_, assigned] = PythonTranslator.codify(dict(value=value, **{})).split("\n", 1)
    [statement] = ast.parse(assigned).body
    assert ast.literal_eval(statement.value) == value and checked["rank_pattern"] == {"x": 1}


@settings(max_examples=100, deadline=None)
@given(ODD, st.sampled_from(["bare", "list", "mapping", "deep"]))
def test_other_values_never_reach_papermill(own_notebook, value, place):
    "Nor those of a notebook whose parameters have no ranges."
    value = dict(bare=value, list=[value], mapping={"a": value}, deep={"a": [1, {"b": [value]}]})[
        place
    ]
    with pytest.raises(ValueError, match="codebook_weights|rank_pattern"):
        check_parameters("train", dict(codebook_weights=value, rank_pattern=value))
    for key in ("values", "anything"):
        with pytest.raises(ValueError, match=key):
            check_parameters(own_notebook, {key: value})


@pytest.mark.parametrize("text", ["nan", "-inf", float("nan"), 10**400])
def test_numbers_of_any_notebook_are_finite(own_notebook, text):
    with pytest.raises(ValueError, match="x"):
        check_parameters(own_notebook, dict(x=text))


TAGS = [
    "!!pairs",
    "!!omap",
    "!!set",
    "!!binary",
    "!!timestamp",
    "!!python/tuple",
    "!!python/object/apply:os.system",
    "!!int",
    "!!bool",
    "!!float",
    "!!null",
    "!!str",
    "!x",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(TAGS),
    st.sampled_from(
        ["[{'%s': 1}]", "{'%s': 1}", "'%s'", "['%s', [1]]", "{? [1] : '%s'}", "&a [*a, '%s']", ""]
    ),
    st.booleans(),
)
def test_yaml_is_plain_data_or_a_sentence(tag, form, nested):
    text = f"{tag} {form.replace('%s', HOSTILE)}"
    if nested:
        text = f"[[{text}]]"
    try:
        value = load_yaml(text, "file.yaml")
    except ValueError as error:
        assert "file.yaml" in str(error) and "\n" not in str(error)
    else:
        assert yaml.safe_load(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "codebook_weights: !!pairs [{'%s': 1}]" % HOSTILE.replace("'", "''"),
        "codebook_weights: !!omap [{'%s': 1}]" % HOSTILE,
        "rank_pattern: !!set {a, b}",
        "[" * 3000,
        "a: &a [*a]",
        "a: 1\n? [b]\n: 1",
        "1: 2",
        "steps: 010",
        "steps: 1:30",
        "steps: 3\nsteps: 4",
        "data: 2024-01-01",
        "steps: .nan",
        "learning_rate: .inf",
        'data: "a\\nb"',
        "x: !!int ''",
        "\0",
        "a: *b",
        "- 1",
        "steps: 1e400",
        "a: !!timestamp x",
        "seed: " + "9" * 5000,
    ],
)
def test_a_parameter_file_that_cannot_be_is_a_sentence(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *given: pytest.fail("a run was started"))
    file = tmp_path / "given.yaml"
    file.write_text(text)
    assert higgs_run(["train", "-f", str(file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("higgs_run: ") and not (tmp_path / "out").exists()


RECIPES = [recipe_of("small"), recipe_of("tiny"), HIGGS_V2.recipe]


def test_every_number_of_every_notebook_has_a_range():
    for name in run_notebooks():
        for key, p in parameters_of(name).items():
            if p["inferred_type_name"] not in ("int", "float"):
                continue
            assert range_of(name, key), f"{name}: {key} has no range in RANGES"
            default = ast.literal_eval(p["default"])
            values = [default] if default != "auto" else [getattr(r, key) for r in RECIPES]
            if key in ("steps", "epochs"):
                values = [value for value in values if value]  # one of the two is 0
            for value in values:
                assert in_range(value, range_of(name, key)), f"{name}: {key}"
    known = {
        key
        for name in run_notebooks()
        for key in (*parameters_of(name), *(f"{name}.{k}" for k in parameters_of(name)))
    }
    assert set(RANGES) <= known


FREE = {  # string parameters that take any text, and why
    "compare.curve": "a name in log.jsonl",
    "corpus.bitrate": "of ffmpeg",
    "corpus_fr.bitrate": "of ffmpeg",
    "export.text": "words to speak",
    "prepare.language": "a code of Whisper's, checked before the corpus is read",
    "speak.text": "words to speak",
    "speak.reference_text": "the words of a recording",
    "speak.scene": "where it is spoken",
    "speak.revision": "a commit",
    "speak.device": "of torch, or auto",
    "train.revision": "a commit",
    "train.optimizer": "of transformers, which has many",
    "train.scene": "where it was recorded",
    "prepare.revision": "a commit",
    "prepare.scene": "where it was recorded",
    "prepare.scheduler": "an address, which Dask checks",
    "train.rehearse_voices": "names of the base's own voices",
    "prepare.text_column": "a column of the corpus",
    "prepare.audio_column": "a column of the corpus",
    "prepare.speaker_column": "a column of the corpus",
    "train.text_column": "a column of the corpus",
    "train.audio_column": "a column of the corpus",
    "train.speaker_column": "a column of the corpus",
    "train.language_column": "a column of the corpus",
    "train.config": "a configuration of the corpus",
    "prepare.config": "a configuration of the corpus",
}


def test_every_text_of_every_notebook_has_its_words():
    "A string parameter is a path, has words in CHOICES or WORDS, or takes any text."
    seen = set()
    for name in run_notebooks():
        for key, p in parameters_of(name).items():
            if p["inferred_type_name"] != "str":
                continue
            kinds = {f"{name}.{key}"} & (set(CHOICES) | set(FREE)) or {key} & {*WORDS, *PATHS}
            assert kinds, f"{name}: {key} is in none of CHOICES, WORDS, PATHS and FREE"
            seen |= {f"{name}.{key}", key}
            check_choice(name, key, ast.literal_eval(p["default"]))
    assert set(CHOICES) | set(WORDS) | set(FREE) | set(SEVERAL_PATHS) <= seen


@cache
def taker(key):
    "A notebook with this parameter, `train` if it has it."
    return next(name for name in ("train", *run_notebooks()) if key in parameters_of(name))


@st.composite
def misspelt(draw):
    "A parameter, one of its words, and that word with a letter left out, doubled or swapped."
    takers = {**CHOICES, **{f"{taker(key)}.{key}": words for key, words in WORDS.items()}}
    name, key = draw(st.sampled_from(sorted(takers))).split(".")
    word = draw(st.sampled_from([w for w in takers[f"{name}.{key}"] if len(w) > 3]))
    at = draw(st.integers(0, len(word) - 2))
    rest = draw(
        st.sampled_from([word[at + 1 :], 2 * word[at] + word[at + 1 :]])
        | st.just(word[at + 1] + word[at] + word[at + 2 :])
    )
    return name, key, word, word[:at] + rest


@settings(max_examples=60, deadline=None)
@given(misspelt())
@example(("evaluate", "precision", "float32", "flaot32"))
@example(("train", "targets", "all", "al"))
@example(("train", "codec", "world", "wrld"))
def test_a_misspelt_word_never_starts_a_run(case):
    name, key, word, typed = case
    words = CHOICES.get(f"{name}.{key}") or WORDS[key]
    assert check_parameters(name, {key: word}) == {key: word}
    if typed not in words:
        with pytest.raises(ValueError, match=f"did you mean '({'|'.join(words)})'"):
            check_parameters(name, {key: typed})


def test_names_beside_the_words(tmp_path, monkeypatch):
    "A path, a name on the hub and names of modules are no misspelt words."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrld").mkdir()
    for values in (
        dict(codec="wrld"),
        dict(base="someone/small-base", codec="someone/world"),
        dict(targets="self_attn.q_proj,mlp.up_proj", train_in_full="audio_lm_head"),
        dict(targets="q_proj", train_in_full="audio_lm_head,text_lm_head"),
    ):
        assert check_parameters("train", values) == values
    monkeypatch.setattr(execution, "execute", lambda *given: pytest.fail("a kernel starts"))
    assert higgs_run(["train", "--out", str(tmp_path / "out"), "-p", "targets=al"]) == 2
    assert not (tmp_path / "out").exists()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["~/a", " ~", "b", "~/c d ", "/e", "f~"]), min_size=1, max_size=4))
def test_each_of_several_paths_is_expanded(paths):
    corpus = check_parameters("fit_codec", {"corpus": ",".join(paths)})["corpus"]
    assert corpus.split(",") == [os.path.expanduser(p.strip()) for p in paths]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [
            (n, k)
            for n in run_notebooks()
            for k, p in parameters_of(n).items()
            if p["inferred_type_name"] in ("int", "float")
        ]
    ),
    st.one_of(st.integers(-(10**6), 2**33), st.floats()),
)
def test_numbers_outside_of_their_range_never_start_a_run(parameter, value):
    name, key = parameter
    kind = parameters_of(name)[key]["inferred_type_name"]
    right = (
        value == value
        and abs(value) != float("inf")
        and (kind == "float" or type(value) is int)
        and in_range(value, range_of(name, key))
    )
    if right:
        assert check_parameters(name, {key: value})[key] == value
    else:
        with pytest.raises(ValueError, match=key):
            check_parameters(name, {key: value})


@pytest.mark.parametrize(
    "key, inside, outside",
    [
        ("held_out", [0, 0.999], [-0.01, 1, 10]),
        ("dropout", [0, 0.5], [1, 1.5, -0.1]),
        ("code_noise", [0, 1], [1.01, -0.01]),
        ("steps", [1, 10**9], [0, -3]),
        ("warmup", [0], [-3]),
        ("learning_rate", [1e-9, 1e30], [0, -1e-4, float("nan"), float("inf")]),
        ("end_silence", [-1, 0, 2.5], [-0.5, -2]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("codebook_weights", [[0, 1.5]], [[1, -1], [1, float("nan")]]),
        ("rank_pattern", [{"mlp.gate_proj": 1}], [{"mlp.gate_proj": 0}]),
    ],
)
def test_the_ends_of_ranges(key, inside, outside):
    for value in inside:
        assert check_parameters("train", {key: value}) == {key: value}
    for value in outside:
        with pytest.raises(ValueError, match=key):
            check_parameters("train", {key: value})


def test_octal_empty_and_home(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *given: pytest.fail("a run was started"))
    for pair in (["steps", "010"], ["steps", "1:30"], ["data", ""], ["data", " "], ["base", ""]):
        with pytest.raises(ValueError, match=pair[0] + "|" + pair[1]):
            check_parameters("train", read_parameters("train", None, [pair]))
    assert read_parameters("evaluate", None, [["run", ""]]) == dict(
        run=""
    )  # documented: base and adapter say
    home = check_parameters("train", dict(data="~/x", base="~", whisper="a~b"))
    assert home == dict(data=str(Path.home() / "x"), base=str(Path.home()), whisper="a~b")
    assert higgs_run(["train", "--out", ""]) == 2 and higgs_run(["train", "-p", "out="]) == 2


HOLDER = """import sys, time
from pathlib import Path
from higgs_nb.cli.directory import claim, occupied
go = Path(sys.argv[1])
print("ready", flush=True)
for k in range(4):
    out = go.parent/f"out{k}"
    while not Path(f"{go}{k}").exists(): time.sleep(0.001)
    if sys.argv[2] == "look":
        until = time.time() + 1
        while time.time() < until: occupied(out)
        continue
    try: held = claim(out, patience_s=0.2)
    except BlockingIOError: print("refused", flush=True)
    else:
        print("runs", flush=True)
        time.sleep(0.8)
"""


def test_of_simultaneous_starts_exactly_one_runs(tmp_path, begin):
    """Three processes are released at the same moment on a directory, four times, while another
    looks.
    """

    def start(what):
        return begin(sys.executable, "-c", HOLDER, str(tmp_path / "go"), what)

    starters, looker = [start("claim") for _ in range(3)], start("look")
    for process in (*starters, looker):
        assert process.stdout.readline() == "ready\n"
    for k in range(4):
        (tmp_path / f"go{k}").touch()
        said = sorted(process.stdout.readline() for process in starters)
        assert said == ["refused\n", "refused\n", "runs\n"]
    assert [process.wait() for process in (*starters, looker)] == [0] * 4


def test_the_kernel_of_a_killed_run_keeps_its_directory(tmp_path, notebook, begin):
    """And a plain execution claims it as well: the lock is in the kernel's hands before its first
    cell.
    """
    work = notebook(
        "import os, time\nfrom pathlib import Path\nfrom higgs_nb.cli.directory import HELD, "
        "occupy\noccupy(Path(out))\nassert len(HELD) == 1\n"
        "Path(out, 'pid').write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    out = tmp_path / "out"
    process = begin(*command(work, "--out", out))
    while not (out / "pid").exists() or not (out / "pid").read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    kernel = int((out / "pid").read_text())
    os.kill(kernel, signal.SIGSTOP)  # it would end by itself when its parent is gone
    process.kill()
    process.wait()
    try:
        assert occupied(out)
        with pytest.raises(BlockingIOError, match="a run goes on"):
            claim(out, patience_s=0.2)
    finally:
        os.kill(kernel, signal.SIGKILL)
    os.close(claim(out))


def test_a_directory_is_held_before_its_kernel_starts(tmp_path, monkeypatch):
    "And let go at the end."
    out, held = tmp_path / "out", []
    monkeypatch.setattr(
        execution, "execute", lambda *given: held.append((occupied(out), is_same(given[3], out)))
    )
    assert higgs_run(["train", "--out", str(out)]) == 0
    assert held == [(True, True)] and not occupied(out)


def test_what_is_read_is_not_replaced(tmp_path, capsys, monkeypatch):
    "Two may read; a run that would write waits and says so with exit code 2."
    (tmp_path / "metadata.json").touch()
    reading(tmp_path / "metadata.json")
    reading(tmp_path)
    assert len([fd for fd in HELD if is_same(fd, tmp_path)]) == 1 and not occupied(tmp_path)
    monkeypatch.setattr(execution, "claim", lambda out: claim(out, patience_s=0.1))
    try:
        assert (
            higgs_run(["prepare", "--out", str(tmp_path)]) == 2
            and "a run reads" in capsys.readouterr().err
        )
    finally:
        os.close(HELD.pop())
    fd = claim(tmp_path)
    with pytest.raises(BlockingIOError, match="a run writes"):
        reading(tmp_path)
    os.close(fd)


@pytest.mark.parametrize("name", ["parameters.json", "run.json"])
@settings(max_examples=25, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"", b"[]", b'{"steps": 3', b"\xff", b"[" * 5000, b"null"]),
    )
)
def test_damaged_notes_stop_the_run_and_nothing_moves(name, content, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    (out / "parameters.json").write_text('{"steps": 3}')
    (out / name).write_bytes(content)
    (out / "checkpoint-3").mkdir()
    before = sorted(p.name for p in out.iterdir())
    try:
        whole = isinstance(json.loads(content.decode()), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        with pytest.raises(ValueError, match=name):
            goes_on(out, dict(steps=3))
        assert sorted(p.name for p in out.iterdir()) == before
    while HELD:
        os.close(HELD.pop())


def test_notes_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        goes_on(tmp_path, dict(steps=3))
    assert os.listdir(tmp_path) == []
    while HELD:
        os.close(HELD.pop())


def test_run_notebooks_write_no_json_in_place():
    "A file that is cut off while it is written would end each further start: see `write_json`."
    for name in run_notebooks():
        code = "".join(c.source for c in nbformat.read(notebook_of(name), 4).cells)
        assert not re.search(r"""\.json["']\)?\.write_text|json\.dump\(""", code), name


def test_a_checkpoint_that_cannot_be_read_now_moves_nothing(tmp_path, monkeypatch):
    (tmp_path / "parameters.json").write_text('{"steps": 3}')
    (tmp_path / "checkpoint-3").mkdir()

    def unreadable(out):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(directory, "latest_checkpoint", unreadable)
    with pytest.raises(OSError, match="Stale"):
        goes_on(tmp_path, dict(steps=3))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "parameters.json"]
    os.close(HELD.pop())


def test_a_working_directory_runs_no_code(tmp_path, notebook, monkeypatch, new_kernels):
    "Neither what its .git/config and hooks name, nor modules with the names of others."
    folder = tmp_path / "from the net"
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / "a.txt").write_text("a")
    (folder / ".gitattributes").write_text("*.txt filter=bad diff=bad\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    trace = folder / "bad.sh"
    trace.write_text(f"#!/bin/sh\ntouch '{tmp_path}/TRACE'\ncat\n")
    trace.chmod(0o755)
    for hook in ("post-index-change", "pre-commit", "post-checkout"):
        (folder / ".git" / "hooks" / hook).symlink_to(trace)
    for key in (
        "core.fsmonitor",
        "filter.bad.clean",
        "filter.bad.smudge",
        "filter.bad.process",
        "diff.bad.textconv",
        "diff.external",
        "core.pager",
        "core.sshCommand",
        "core.askPass",
    ):
        subprocess.run(["git", "-C", str(folder), "config", key, f"'{trace}'"], check=True)
    time.sleep(0.01)
    (folder / "a.txt").write_text("b")
    (folder / "soundfile.py").write_text(f"open({str(tmp_path / 'TRACE')!r}, 'w')")
    monkeypatch.chdir(folder)
    assert len(surroundings()["git"]["cwd"]["commit"]) == 40
    assert not (tmp_path / "TRACE").exists()
    monkeypatch.setattr(execution, "RUNS", tmp_path)  # this one is of the package
    notebook(
        "import sys\nassert '' not in sys.path and sys.flags.safe_path\nimport "
        "soundfile\nassert hasattr(soundfile, 'SoundFile')",
        "packaged.ipynb",
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(execution.__file__).parents[1]))
    execution.execute(
        tmp_path / "packaged.ipynb", tmp_path / "done.ipynb", {}, os.open(tmp_path, os.O_RDONLY)
    )
    assert not (tmp_path / "TRACE").exists()


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=30),
        PLAIN.map(lambda v: json.dumps(v).encode()),
        st.sampled_from(
            [
                b"[" * 5000,
                b'{"nbformat": 4, "nbformat_minor": 5, "metadata": [], "cells": {}}',
                b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {"papermill": 3}, "cells": [3]}',
                b'{"nbformat": "x"}',
                '{"é'.encode()[:-1],
            ]
        ),
    )
)
def test_a_notebook_that_cannot_be_read_is_not_done(tmp_path_factory, content):
    out = tmp_path_factory.mktemp("out")
    (out / "train.ipynb").write_bytes(content)
    assert is_done("train", out, {}) is False


@pytest.mark.parametrize("parameters", [{}, {"rank": 8}])
def test_a_notebook_without_cells_is_not_done(tmp_path, parameters):
    empty = new_notebook(metadata={"papermill": {"parameters": {"out": str(tmp_path)}}})
    nbformat.write(empty, tmp_path / "train.ipynb")
    assert is_done("train", tmp_path, parameters) is False
    empty.cells = [new_code_cell("1", metadata={"papermill": {"status": "completed"}})]
    nbformat.write(empty, tmp_path / "train.ipynb")
    assert is_done("train", tmp_path, parameters) is (not parameters)


def test_ctrl_c_saves_and_stops(tmp_path, notebook, begin):
    """In a terminal the signal goes to the whole group. Once: exit code 75, no traceback. A run
    that does not stop ends at the second.
    """
    work = notebook(
        "import os, time\nfrom pathlib import Path\nPath(out, 'begun').touch()\nclass "
        "Preempted(Exception): pass\n"
        "while n or not Path(out, 'STOP').exists(): time.sleep(0.05)\nPath(out, "
        "'saved').touch()\nraise Preempted('saved')"
    )

    def start(out, n):
        return begin(*command(work, "--out", tmp_path / out, "-p", f"n={n}"))

    processes = [start("once", 0), start("twice", 1)]
    for out, process in zip(("once", "twice"), processes):
        while not (tmp_path / out / "begun").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
    output = processes[0].communicate(timeout=60)[0]
    assert (
        processes[0].returncode == 75
        and "the same command goes on" in output
        and "concurrent" not in output
        and (tmp_path / "once" / "saved").exists()
    ), output
    assert not (tmp_path / "once" / "STOP").exists()
    while not (tmp_path / "twice" / "STOP").exists():
        time.sleep(0.05)
    os.killpg(processes[1].pid, signal.SIGINT)
    assert processes[1].wait(20) == -signal.SIGINT


def test_messages_leave_a_terminal_alone(capsys):
    print_error("one\x1b]52;c;\x07\ntwo\x9b")
    assert capsys.readouterr().err == "one\\x1b]52;c;\\x07\ntwo\\x9b\n"


def test_a_directory_that_was_moved_is_named(tmp_path, monkeypatch, capsys):
    "The run has made it anew, so that its results are in two places."

    def moving(*given):
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(execution, "execute", moving)
    assert higgs_run(["train", "--out", str(tmp_path / "out")]) == 1
    assert "was moved during the run" in capsys.readouterr().err


def test_no_run_executes_the_code_of_a_repository():
    for name in run_notebooks():
        cells = nbformat.read(notebook_of(name), 4).cells
        code = "\n".join(c.source for c in cells if c.cell_type == "code")
        for call in (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)):
            if re.match(r"Auto\w+\.from_pretrained$", ast.unparse(call.func)):
                assert "trust_remote_code=False" in ast.unparse(call), name


def test_a_yaml_file_that_unfolds_into_millions_is_refused():
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8]"]
    for n in range(1, 8):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]")
    with pytest.raises(ValueError, match="file.yaml has more than 100,000 parts"):
        load_yaml("\n".join(lines), "file.yaml")


def test_exit_codes_and_the_cause(tmp_path, monkeypatch, capsys):
    """A full disk in a run that has begun: 1, and a clean-up that fails hides nothing. Control
    characters do not reach the terminal.
    """

    def full(*given):
        (tmp_path / "out" / "STOP").mkdir()  # unlink fails
        raise OSError(28, "No space left on device", "a\x1b]52;")

    monkeypatch.setattr(execution, "execute", full)
    assert higgs_run(["train", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and "STOP was not removed" in said and "\x1b" not in said
    assert (
        higgs_run(["train", "--out", str(tmp_path / "a\nb")]) == 2
        and len(os.listdir(tmp_path)) == 1
    )


@pytest.mark.parametrize("module", ["cli.run", "cli.sweep", "cli.doctor", "cli.launch"])
def test_python_dash_m(module):
    done = subprocess.run(
        [sys.executable, "-m", f"higgs_nb.{module}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_windows_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import higgs_nb.cli.run"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "on Windows use WSL2" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "text",
    [
        "run: [train]",
        "run: train\ngrid: [rank]",
        "run: train\ngrid: {rank: []}",
        "run: train\ngrid: {rank: 3}",
        "run: train\ngrid: {rank: '12'}",
        "run: train\n1: 2",
        "[" * 4000,
        "run: train\nruns: []",
        "run: train\nout: 3",
        "run: train\nparameters: [a]",
        "run: train\ngrid: {rank: !!set {a}}",
        'run: train\nout: "a\\nb"',
        "x",
        "",
        "run: train\nruns: [{1: 2}]",
        "run: train\nruns: [3]",
        "run: train\nout: ' '",
        "run: train\ngrid: {steps: [1, 2, x]}",
        "run: train\ngrid: {rank_pattern: [!!pairs [a: b]]}",
        "run: 'train\0'",
        "run: {a: b}",
    ],
)
def test_a_sweep_that_cannot_be_is_a_sentence(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    assert higgs_sweep(["sweep.yaml", "--list"]) == 2
    assert capsys.readouterr().err.startswith("higgs_sweep: ") and os.listdir() == ["sweep.yaml"]


PARTS = st.recursive(
    st.one_of(st.none(), st.integers(-3, 3), st.sampled_from(["train", "rank", "", "a\nb", "run"])),
    lambda part: st.one_of(
        st.lists(part, max_size=2),
        st.dictionaries(st.sampled_from(["rank", "steps", "out", "x"]), part, max_size=2),
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    said=st.fixed_dictionaries(
        {}, optional={key: PARTS for key in ("run", "out", "parameters", "grid", "runs", "more")}
    )
)
def test_any_sweep_is_runs_or_a_sentence(said, tmp_path_factory):
    file = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    file.write_text(yaml.safe_dump({"run": "train", **said}))
    try:
        assert read_sweep(file)
    except ValueError as error:
        assert str(error)


def test_a_torn_notebook_stops_no_sweep(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        json.dumps(dict(run="train", out=str(tmp_path / "out"), grid=dict(rank=[1, 2])))
    )
    (tmp_path / "out" / "rank=1").mkdir(parents=True)
    (tmp_path / "out" / "rank=1" / "train.ipynb").write_bytes('{"cells": "é'.encode()[:-1])
    assert higgs_sweep([str(tmp_path / "s.yaml"), "--list"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["begun", "to"]


def test_names_are_no_commands_of_the_job_script(tmp_path, monkeypatch, capsys):
    """Spaces, shell characters and `%` arrive as they are; line breaks are refused, in `out` and
    in the name of the file.
    """
    folder = tmp_path / "my $(touch TRACE) 'sweeps'; touch TRACE #%u"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(name, out):
        return Path(name).write_text(json.dumps(dict(run="train", out=out, grid=dict(rank=[1]))))

    write("$(touch TRACE) `x`.yaml", "out; touch TRACE")
    assert higgs_sweep(["$(touch TRACE) `x`.yaml", "--slurm", "job.sh"]) == 0
    lines = Path("job.sh").read_text().splitlines()
    assert (
        f'#SBATCH --output="{str(folder).replace("%", "%%")}/out; touch TRACE/slurm-%A_%a.log"'
    ).replace("/out;", "/out;") in lines
    job = Path("job.sh").read_text().replace(sys.executable, "echo")
    done = subprocess.run(
        ["bash"],
        input=job,
        capture_output=True,
        text=True,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"},
    )
    assert f"{folder}/$(touch TRACE) `x`.yaml --only 0" in done.stdout and not list(
        tmp_path.rglob("TRACE")
    )
    write("b.yaml", "swept\ntouch TRACE\n#")
    write("c\ntouch TRACE\n.yaml", "out")
    for name in ("b.yaml", "c\ntouch TRACE\n.yaml"):
        assert higgs_sweep([name, "--slurm", "other.sh"]) == 2 and not Path("other.sh").exists()
    write("d.yaml", 'quoted"')  # sbatch knows no way to write it
    assert higgs_sweep(["d.yaml", "--slurm", "other.sh"]) == 2 and not Path("other.sh").exists()


def test_a_job_script_starts_nothing_elsewhere(tmp_path, monkeypatch, capsys):
    "Where its directory is gone; and none is written in a directory whose name is two lines."
    sweep = json.dumps(dict(run="train", out="out", grid=dict(rank=[1])))
    for name in ("here", "two\nlines"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("s.yaml").write_text(sweep)
        assert higgs_sweep(["s.yaml", "--slurm", "job.sh"]) == (0 if name == "here" else 2)
    job = (tmp_path / "here/job.sh").read_text().replace(sys.executable, "echo")
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(["bash"], input=job, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""


def test_an_executed_notebook_is_never_half_written(notebook, tmp_path, monkeypatch):
    """Each save of a run replaces its notebook: a reader of the earlier file keeps it whole, and
    a disk that is full leaves the last whole one.
    """
    out = tmp_path / "out"
    file = Path(notebook("print(6 * 7)"))
    execution.run(str(file), out)
    executed = out / file.name
    before = executed.read_bytes()
    assert b"42" in before and nbformat.reads(before.decode(), 4).metadata["papermill"]
    os.link(executed, tmp_path / "earlier")
    execution.run(str(file), out, {"n": 2})
    assert (tmp_path / "earlier").read_bytes() == before != executed.read_bytes()
    assert not [f for f in os.listdir(out) if f.endswith(".new")]
    kept = executed.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        execution.WholeNotebook(executed).write("{" * 100, str(executed))
    assert executed.read_bytes() == kept
