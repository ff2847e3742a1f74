import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.provisioning import KernelProvisionerFactory

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PRELOADED = [  # what the fork server imports, once for all processes that it forks
    *("resume_job", "transformers.generation", "scipy.signal", "scipy.stats", "soundfile"),
    *("matplotlib.pyplot", "IPython", "ipywidgets", "nbdev.test", "papermill", "pydantic"),
    *("higgs_nb.tasks.training", "ipykernel.kernelapp", "kernels", "frozen"),
]


def fork_server():
    "Makes processes that have imported the libraries already, which takes seconds."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here = str(Path(__file__).parent)  # the server looks for its preloads where PYTHONPATH says
    if here not in os.environ.get("PYTHONPATH", ""):
        paths = filter(None, (here, os.environ.get("PYTHONPATH")))
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return context


@pytest.fixture(scope="session", autouse=True)
def forked_kernels():
    "The kernels of runs that tests start in their own process are forked: see `kernels`."
    from kernels import fork_kernels

    fork_kernels()


@pytest.fixture
def new_kernels(forked_kernels, monkeypatch):
    "The kernels of this test's runs are new interpreters, as a user's are."
    factory = KernelProvisionerFactory.instance()
    monkeypatch.setattr(factory, "default_provisioner_name", "local-provisioner")


def run(*command, cwd, **env):
    "Standard output of `command`; a failure shows the end of what it wrote."
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}"
    )
    return done.stdout


def launch_run(out: Path, *words: str) -> str:
    "Start two processes of `higgs_run train`, which have to succeed; returns what they print."
    start = ("--standalone", "--nproc-per-node", "2", "-m", "higgs_nb.cli.run", "train")
    command = (sys.executable, "-m", "higgs_nb.cli.launch", *start, "--out", str(out), *words)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def committed():
    """Paths of the repository's files, relative to its root: tracked ones, and new ones that git
    does not ignore.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [
        Path(name)
        for name in sorted(set(listed.stdout.split("\0")))
        if name and ((ROOT / name).exists() or (ROOT / name).is_symlink())
    ]


def load_script(name):
    "A script of benchmarks/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_copy(tmp_path_factory):
    "A function that copies the repository, as a fresh clone would have it, into a new folder."

    def copy():
        folder = tmp_path_factory.mktemp("copy")
        for file in committed():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file, follow_symlinks=False)
        return folder

    return copy


@pytest.fixture(scope="session")
def pristine(make_copy):
    "A copy of the repository that no test writes to."
    return make_copy()


@pytest.fixture(scope="session")
def site(make_copy):
    "The built site."
    copy = make_copy()
    run("make", "docs", "SETUP=", f"BIN={BIN}", cwd=copy)
    return copy / "_docs"
