"The code store on a disk that is full, and under processes that are killed."

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from higgs_nb.data.corpus import embedded_corpus

CLIPS = sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[:3]

HEAD = """
import sys, resource, signal, os
from higgs_nb.data.conversation import Audio
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
root, *clips = sys.argv[1:]
store = CodeStore(root, load_codec())
"""


def run(code, root):
    return subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code), root, *map(str, CLIPS)],
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    sys.platform == "win32", reason="RLIMIT_FSIZE stands for a full disk, and Windows has none"
)
def test_full_disk(tmp_path):
    full = run(
        """
        store.get(Audio(clips[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        store.get(Audio(clips[1]))
        """,
        tmp_path,
    )
    assert full.returncode == 1
    last = full.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("OSError")
        and "could not be stored" in last
        and str(tmp_path) in last
        and ".npy" in last
    ), full.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1, "the clip before is stored, of this one nothing"
    again = run("print(store.encode_all([Audio(c) for c in clips], progress=False))", tmp_path)
    assert again.stdout.strip() == "{'clips': 3, 'hits': 1, 'misses': 2}", again.stderr


def test_killed_while_writing(tmp_path):
    killed = run(
        """
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.get(Audio(clips[0]))
        """,
        tmp_path,
    )
    assert killed.returncode == -9, killed.stderr
    again = run("print(store.encode_all([Audio(c) for c in clips], progress=False))", tmp_path)
    assert again.stdout.strip() == "{'clips': 3, 'hits': 0, 'misses': 3}", again.stderr


def test_two_processes_at_once(tmp_path):
    code = "print(store.encode_all([Audio(c) for c in clips], progress=False)['clips'])"
    command = [sys.executable, "-c", HEAD + code, tmp_path, *map(str, CLIPS)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["3", "3"]
    stored = sorted(tmp_path.rglob("*.npy"))
    assert len(stored) == 3 and not list(tmp_path.rglob("*.part"))
    assert all(np.load(path, allow_pickle=False).shape[0] == 8 for path in stored)
