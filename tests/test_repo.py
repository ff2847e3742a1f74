"""The repository agrees with itself: package and notebooks, README and index, wheel and tree, the
site.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
import zipfile
from configparser import ConfigParser
from functools import cached_property
from html import unescape
from html.parser import HTMLParser
from types import FunctionType
from urllib.parse import unquote

import nbformat
import pytest
import torch
from conftest import BIN, ROOT, committed, run
from fastcore.docments import docments
from safetensors.torch import save_file


def differing(a, b, pattern):
    "Files under `a` or `b` matching `pattern` that are not the same in both."
    files = {f.relative_to(root) for root in (a, b) for f in root.glob(pattern) if f.is_file()}
    return sorted(
        str(f)
        for f in files
        if not (
            (a / f).is_file() and (b / f).is_file() and (a / f).read_bytes() == (b / f).read_bytes()
        )
    )


def test_package_is_what_the_notebooks_export(pristine, make_copy):
    copy = make_copy()
    for module in copy.glob("higgs_nb/**/*.py"):
        module.unlink()
    run(BIN / "nbdev_export", cwd=copy)
    assert not differing(pristine, copy, "higgs_nb/**/*.py"), (
        "nbs/ and higgs_nb/ are out of step: `make prepare`"
    )


def test_notebooks_are_clean(pristine, make_copy):
    copy = make_copy()
    run(BIN / "nbdev_clean", cwd=copy)
    assert not differing(pristine, copy, "nbs/**/*.ipynb"), (
        "notebooks hold what git should not see: `make prepare`"
    )


def test_readme_is_the_index(pristine, make_copy):
    copy = make_copy()
    run("make", "readme", "SETUP=", f"BIN={BIN}", cwd=copy)
    assert not differing(pristine, copy, "README.md"), (
        "README.md is not what nbs/index.ipynb renders to: `make prepare`"
    )
    missing = [
        link
        for link in re.findall(r"\]\(([^)#:]+)\)", (copy / "README.md").read_text())
        if not (copy / link).exists()
    ]
    assert not missing, f"README.md links to files that are not there: {missing}"


def test_no_private_paths():
    private = re.compile(
        rb"(?<![\w./+-])/(?:home|root|Users|work|tmp)/\w+|" + re.escape(bytes(ROOT))
    )
    text = {".py", ".ipynb", ".md", ".txt", ".ini", ".yml", ".json", ".css", ".svg", ""}
    found = [
        f"{file}: {match.group().decode()}..."
        for file in committed()
        if file.suffix in text and (ROOT / file).is_file()
        for match in [private.search((ROOT / file).read_bytes())]
        if match
    ]
    assert not found, "\n".join(found)


MODULES = sorted(
    ".".join(f.relative_to(ROOT / "higgs_nb").with_suffix("").parts)
    for f in (ROOT / "higgs_nb").rglob("[!_]*.py")
)


def undocumented(module):
    """Public functions and classes of `module`, and the public methods and properties of these
    classes, that have no docstring and inherit none.
    """
    bare = []
    for name in module.__all__:
        thing = getattr(module, name)
        if (
            not (inspect.isclass(thing) or inspect.isfunction(thing))
            or thing.__module__ != module.__name__
        ):
            continue
        if not thing.__doc__ or thing.__doc__.startswith(f"{name}("):
            bare.append(f"{module.__name__}.{name}")  # that is what a dataclass gives itself
        methods = (
            [
                k
                for k, v in vars(thing).items()
                if isinstance(
                    v, (FunctionType, classmethod, staticmethod, property, cached_property)
                )
            ]
            if inspect.isclass(thing)
            else []
        )
        bare += [
            f"{module.__name__}.{name}.{k}"
            for k in methods
            if k[0] != "_"
            and not any(getattr(vars(base).get(k), "__doc__", None) for base in thing.__mro__)
        ]
    return bare


def test_every_public_name_has_a_docstring():
    bare = [
        name
        for module in MODULES
        for name in undocumented(importlib.import_module(f"higgs_nb.{module}"))
    ]
    assert not bare, "without a docstring:\n" + "\n".join(bare)


WHOLE = (
    "data.audio",
    "data.conversation",
    "data.measure",
    "data.corpus",
    "data.corpus_check",
    "data.corpus_split",
    "cli.answers",
    "cli.export",
    "cli.model_card",
    "speech.clips",
    "speech.codes",
    "speech.generate",
    "speech.options",
    "speech.prompts",
    "model.lora",
    "view.codes_explorer",
    "view.corpus_explorer",
    "view.label_explorer",
    "view.listener",
    "view.monitor",
    "view.panel",
    "view.plots",
    "view.run_files",
)  # all of these is for users


def imported(code):
    "(module, name) of what `code` imports from the package; lines of IPython are left out."
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("higgs_nb."):
            yield from ((node.module, alias.name) for alias in node.names)


def user_facing():
    """Functions that users call: those of WHOLE, and what the home page, runs, tutorials and
    explanations import from the package.
    """
    names = {
        (f"higgs_nb.{module}", name)
        for module in WHOLE
        for name in importlib.import_module(f"higgs_nb.{module}").__all__
    }
    for file in committed():
        if (
            file.suffix != ".ipynb"
            or file.parts[0] != "nbs"
            or file.parts[1] not in ("index.ipynb", "runs", "tutorials", "explanations")
        ):
            continue
        code = "\n".join(
            cell.source for cell in nbformat.read(ROOT / file, 4).cells if cell.cell_type == "code"
        )
        names |= set(imported(code))
    return {
        f
        for module, name in names
        if inspect.isfunction(f := getattr(importlib.import_module(module), name))
    }


def test_parameters_of_what_users_call_are_explained():
    "By a comment beside each, as API pages and JupyterLab show it."
    bare = [
        f"{f.__module__}.{f.__name__}: {p}"
        for f in user_facing()
        for p, d in docments(f, full=True, returns=False).items()
        if not d["docment"]
        and inspect.signature(f).parameters[p].kind != inspect.Parameter.VAR_KEYWORD
    ]  # of which docments knows nothing
    assert len(user_facing()) > 80 and not bare, "without a comment:\n" + "\n".join(sorted(bare))


def test_no_widget_is_saved_without_its_kernel():
    "JupyterLab shows an error in its place; the still picture beside it stays."
    held = [
        str(f)
        for f in committed()
        if f.suffix == ".ipynb"
        and '"application/vnd.jupyter.widget-view+json": {'
        in (ROOT / f).read_text(encoding="utf-8")
    ]
    assert not held, f"`make prepare` removes the views of widgets from {', '.join(held)}"


@pytest.fixture(scope="session")
def wheel(make_copy):
    "The wheel that the repository builds."
    copy = make_copy()
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    [built] = copy.glob("dist/*.whl")
    return built


def test_wheel_holds_package_data_and_runs(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(f) for f in committed() if f.parts[0] == "higgs_nb" and f.name != "runs"} | {
        f"higgs_nb/runs/{f.name}"
        for f in committed()
        if f.parts[:2] == ("nbs", "runs") and f.suffix == ".ipynb"
    }
    package = {name for name in held if ".dist-info/" not in name}
    assert package == wanted, (
        f"missing: {sorted(wanted - package)}, not ours: {sorted(package - wanted)}"
    )


def test_wheel_trains_outside_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        cwd=tmp_path,
    )
    train = (
        "from higgs_nb.cli import run; print(run.__file__); raise "
        "SystemExit(run.main(['train', '--out', 'out', '-p', 'steps', '2', '-p', "
        "'max_clips', '4', '-p', 'speak', '0', '-p', 'table', '0']))"
    )
    said = run(sys.executable, "-c", train, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site / "higgs_nb") in said.splitlines()[0] and (tmp_path / "out/run.json").exists()


def test_commands_of_settings_exist():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    for script in settings["DEFAULT"]["console_scripts"].split():
        assert "usage" in run(BIN / script.split("=")[0], "--help", cwd=ROOT)


class Loads(HTMLParser):
    """Addresses that a browser fetches by itself to show a page (links that a reader may follow
    are none).
    """

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") not in ("canonical", "license"):
            self.found.append(attrs.get("href"))
        if tag != "a":
            self.found += [
                attrs.get("src"),
                attrs.get("srcset"),
                attrs.get("poster"),
                attrs.get("data"),
            ]


def test_site_has_a_page_for_each_notebook(site):
    pages = {str(p.relative_to(site).with_suffix("")) for p in site.rglob("*.html")}
    wanted = {
        str(f.relative_to("nbs").with_suffix("")) for f in committed() if f.suffix == ".ipynb"
    }
    assert wanted <= pages, sorted(wanted - pages)
    assert (site / "search.json").stat().st_size > 1000


def test_first_cell_is_the_title_alone():
    "nbdev makes title, description and options of it; whatever else stands there, no page shows."
    title = re.compile(r"# .*\n*(> .*\n*)?(- [\w-]+: .*\n*)*")
    held = [
        str(f)
        for f in committed()
        if f.suffix == ".ipynb" and not title.fullmatch(nbformat.read(ROOT / f, 4).cells[0].source)
    ]
    assert not held, f"move the text below into a cell of its own in {', '.join(held)}"


def test_no_link_is_shown_as_it_is_written(site):
    found = [
        f"{page.relative_to(site)}: {link}"
        for page in site.rglob("*.html")
        for link in re.findall(r"\]\(/[\w/]+\.ipynb[^)]*\)", page.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_site_asks_nothing_of_other_hosts(site):
    outside = re.compile(r"^\s*(?:https?:)?//")
    found = [
        f"{page.relative_to(site)}: {address}"
        for page in site.rglob("*.html")
        for address in Loads(page.read_text(encoding="utf-8")).found
        if address and outside.match(address)
    ]
    found += [
        f"{page.relative_to(site)}: {address}"
        for page in [*site.rglob("*.css"), *site.rglob("*.html")]
        for address in re.findall(
            r"""(?:url\(|@import|from)\s*['"]?((?:https?:)?//[^'")\s]+)""",
            page.read_text(encoding="utf-8"),
        )
    ]
    assert not found, "\n".join(found)


def test_links_within_the_site_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        for address in re.findall(r'href="([^"#?:]+)[^":]*"', page.read_text(encoding="utf-8")):
            target = page.parent / address
            if not (target.is_file() or (target / "index.html").is_file()):
                broken.append(f"{page.relative_to(site)}: {address}")
    assert not broken, "\n".join(broken)


def test_links_to_a_heading_find_it(site):
    pages = {page.resolve(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    ids = {page: set(re.findall(r'\sid="([^"]+)"', text)) for page, text in pages.items()}
    links = [
        (page, (page.parent / address).resolve() if address else page, unescape(anchor))
        for page, text in pages.items()
        for address, anchor in re.findall(r'<a [^>]*href="([^"#?:]*)#([^":]+)"', text)
    ]
    broken = {
        f"{page.name}: {target.name} has no heading #{unquote(anchor)}"
        for page, target, anchor in links
        if target in ids and unquote(anchor) not in ids[target]
    }
    assert len(links) > 500
    assert not broken, "\n".join(sorted(broken))


def test_figures_in_the_table_of_scores_are_those_that_were_measured():
    """The rows of the table on the page of the small base, in order, are these of
    benchmarks/results/small_base.json.
    """
    results = json.loads((ROOT / "benchmarks" / "results" / "small_base.json").read_text())
    rows = [
        ("voices", arm)
        for arm in (
            "synthesised originals",
            "codec",
            "codec, 4 codebooks",
            "base, greedy",
            "base, temperature 0.4, top 10",
            "base, other service sentences, greedy",
        )
    ]
    rows += [
        ("adapter", arm)
        for arm in (
            "recordings",
            "codec",
            "base, greedy: prompts",
            "base in the nearest of its voices: prompts",
            "adapter, greedy: prompts",
            "adapter, temperature 0.4, top 10: prompts",
            "adapter, greedy: recordings' sentences",
        )
    ]

    def cell(interval, digits):
        return (
            ""
            if interval is None
            else "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*interval, d=digits)
        )

    measured = [
        [
            cell(results[group][arm][metric], digits)
            for metric, digits in (("WER %", 1), ("similarity", 2), ("stops %", 1))
        ]
        for group, arm in rows
    ]
    page = nbformat.read(ROOT / "nbs/explanations/small_base.ipynb", 4)
    head = "| what | word errors, %"
    [text] = [cell.source for cell in page.cells if head in cell.source]
    table = text.split(head, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert [[c.strip() for c in line.split("|")[2:5]] for line in table] == measured


@pytest.mark.parametrize(
    "name", ["plain", "two words", "it's", 'a "clone"', "a;b", "$HOME", "`id`"]
)
def test_make_works_in_a_clone_with_any_name(tmp_path, name):
    "Commands that take the clone's path get it as it is."
    clone = tmp_path / name
    tools, speech = clone / ".venv/bin", clone / "runs/voices/codes.safetensors"
    for folder in (tools, speech.parent, clone / ".venv/bits"):
        folder.mkdir(parents=True)
    speech.touch()
    shutil.copy(ROOT / "Makefile", clone)
    for tool in ("higgs_run", "pytest", "pip"):
        (tools / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$PYTHONPATH"\n')
        (tools / tool).chmod(0o755)
    lines = run("make", "-s", "base", "test-bits", "SETUP=", cwd=clone, PYTHONPATH="").splitlines()
    assert f"voices={speech}" in lines and str(clone / ".venv/bits") in lines
    # pip has no network here, so the tests run without torchaudio
    lines = run("make", "-s", "test", "SETUP=", cwd=clone, PYTHONPATH="").splitlines()
    assert "torchaudio" in lines and lines[-1] == str(clone / ".venv/codec")


def test_actions_are_pinned_by_commit():
    "A tag can be moved to other code; the comment says which release the commit is."
    workflows = [ROOT / file for file in committed() if file.parts[:2] == (".github", "workflows")]
    used = [
        line.strip() for f in workflows for line in f.read_text().splitlines() if "uses:" in line
    ]
    assert len(used) > 5
    loose = [
        line
        for line in used
        if not re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line)
    ]
    assert not loose, "\n".join(loose)


@pytest.fixture(scope="module")
def scores_script():
    "benchmarks/small_base.py as a module."
    spec = importlib.util.spec_from_file_location(
        "small_base", ROOT / "benchmarks" / "small_base.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def judged(id, errors):
    "A judged clip as evaluate.json holds it."
    return dict(
        id=id,
        text="one two",
        duration_s=1.0,
        stopped=True,
        words=2,
        word_errors=errors,
        letters=7,
        letter_errors=errors,
        similarity=0.5,
    )


def test_the_scores_script_writes_what_the_results_hold(scores_script, tmp_path, monkeypatch):
    """Each key of the file is measured by a section or named among what the script needs; rows are
    those of the file, in order.
    """
    results = json.loads(scores_script.RESULTS.read_text())
    ways = [
        "recordings",
        "codec",
        "codec, 4 codebooks",
        "base, greedy",
        "base, A British woman., greedy",
        "adapter, greedy",
        "adapter, sampling",
    ]
    arms = {way: [judged("text 0", 1), judged("recorded", 2)] for way in ways}
    evaluation = dict(
        arms=dict(scores=arms),
        codebooks=dict(scores={way: [judged("recorded", 2)] for way in results["codebooks"]}),
        merged_gives_same_codes=dict(clips=2, same=2),
    )

    def earlier_run(name, out, **parameters):
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluate.json").write_text(json.dumps(evaluation))

    monkeypatch.setattr(scores_script, "higgs_run", earlier_run)
    monkeypatch.setattr(scores_script, "vocoder", lambda: [0.5, 0.5, 0.5])
    measured = scores_script.adapter(tmp_path, 1, 1)
    for section, rows in measured.items():
        assert list(rows) == list(results[section]), section
    assert set(results) - {"from"} == set(measured) | set(scores_script.NEEDS)
    assert measured["adapter"]["adapter, greedy: prompts"]["WER %"][0] == 50
    assert measured["adapter"]["adapter, greedy: recordings' sentences"]["WER %"][0] == 100
    control = scores_script.merged(results, scores_script.rehearsal(tmp_path, 1, 1))["controls"]
    assert (
        list(control) == list(results["controls"])
        and control["without rehearsal"]["WER %"][0] == 50
    )
    assert control["losses unshifted"] == results["controls"]["losses unshifted"]


def test_a_trial_of_the_scores_cannot_be_committed(scores_script):
    before = scores_script.RESULTS.read_bytes()
    for trial in (["--clips", "4"], ["--steps", "3"]):
        with pytest.raises(SystemExit):
            scores_script.main(["--commit", *trial])
    assert scores_script.RESULTS.read_bytes() == before


def test_the_scores_script_finds_what_each_voice_read(scores_script, tmp_path):
    "Codes of an utterance are its first variant; the others and other voices are passed over."
    import base_voices  # which the fixture has imported

    def row(id, voice, frames, split="held_out"):
        return dict(id=id, kind="prompt", text=id, speaker_id=voice, split=split, frames=frames)

    rows = [row("a", "v", [3, 2], "train"), row("b", "w", [4]), row("c", "v", [5])]
    codes = torch.arange(8 * 14).reshape(8, 14).to(torch.int16)
    save_file(dict(codes=codes), tmp_path / "codes.safetensors", dict(rows=json.dumps(rows)))
    [c] = base_voices.utterances(tmp_path, "held_out", {"v"})
    assert (c.id, c.codes.tolist()) == ("c", codes[:, 9:].tolist())
    [a] = base_voices.utterances(tmp_path, "train", {"v", "w"})
    assert a.codes.tolist() == codes[:, :3].tolist() and a.file == tmp_path / "audio/a.flac"
