"""Clips per second of `prepare`, today against the store that had a file for each recording.

    python benchmarks/prepare.py                  # both sides; benchmarks/results/prepare.json
    python benchmarks/prepare.py --clips 20       # a look, and no file

The other side is the commit before codes were put into packs, in a worktree of git that is made
for it and removed. Both prepare the same corpus: recordings of the package with a little noise of
their own each, so that every one has to be encoded. The cells of the run notebook are executed in
a new process each time, the sides take turns, and what is timed is everything from the check of
the corpus to the end: base, codec and libraries are loaded before. Then both prepare it again,
with all codes there already.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import soundfile as sf
import torch

from higgs_nb.core.files import write_json
from higgs_nb.data.audio import load_audio
from higgs_nb.data.corpus import embedded_corpus, load_corpus

BEFORE = "e661f2fd"  # the last commit with a file for each recording
HERE = Path(__file__).resolve().parents[1]
RESULTS = HERE / "benchmarks" / "results" / "prepare.json"
RUN = """
import json, sys, time, warnings
import matplotlib, psutil
matplotlib.use("agg")
warnings.simplefilter("ignore")
from pathlib import Path
given = json.loads(sys.argv[2])
namespace, process, begun = dict(__name__="__main__"), psutil.Process(), None

def cpu():
    return sum(process.cpu_times()[:4])

for cell in json.loads(Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] != "code":
        continue
    source = "".join(cell["source"])
    if begun is None and "check_corpus(" in source:
        begun = time.monotonic(), cpu()
    exec(compile(source, "prepare", "exec"), namespace)
    if "parameters" in cell["metadata"].get("tags", ()):
        namespace |= given
seconds, used = time.monotonic() - begun[0], cpu() - begun[1]
print("TIMES", json.dumps(dict(seconds=seconds, cpu_seconds=used)))
"""


def make_corpus(folder: Path, count: int) -> None:
    "Recordings of the package, each with other noise, and their words."
    folder.mkdir()
    rng, conversations, samples = np.random.default_rng(0), load_corpus(embedded_corpus()), []
    for i in range(count):
        c = conversations[i % len(conversations)]
        wave = load_audio(c.audio[-1], 24000)
        wave = 0.9 * wave + rng.normal(0, 1e-3, len(wave))
        sf.write(folder / f"{i}.wav", wave, 24000)
        words = f"{c.transcript} {i}"  # no sentence twice, so that all are alike to both sides
        samples.append(dict(id=str(i), audio_file=f"{i}.wav", text=words))
    (folder / "metadata.json").write_text(json.dumps(dict(samples=samples)))


def prepare(side: Path, corpus: Path, out: Path, workers: int) -> dict[str, float]:
    "Seconds of a run of the notebook of one side."
    given = dict(data=str(corpus), out=str(out), workers=workers)
    command = [sys.executable, "-c", RUN, str(side / "nbs/runs/prepare.ipynb"), json.dumps(given)]
    environment = os.environ | dict(PYTHONPATH=str(side))
    done = subprocess.run(command, cwd=side, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"prepare failed in {side}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.rpartition("TIMES ")[2])


def compare(sides: dict[str, Path], folder: Path, clips: int, rounds: int) -> list[dict]:
    "What each side takes with 1 and with 2 workers, for new recordings and for known ones."
    rows = []
    for workers in (1, 2):
        times = {(name, again): [] for name in sides for again in (False, True)}
        for round in range(rounds):
            for name, side in sides.items():
                out = folder / f"{name}-{workers}-{round}"
                for again in (False, True):
                    times[name, again].append(prepare(side, folder / "corpus", out, workers))
        for again in (False, True):
            row = dict(workers=workers, codes="known" if again else "new")
            for name in sides:
                seconds = median(t["seconds"] for t in times[name, again])
                row[f"{name}_clips_per_second"] = round_to(clips / seconds)
                row[f"{name}_cpu_s"] = round_to(
                    median(t["cpu_seconds"] for t in times[name, again])
                )
            row["times"] = round_to(row["now_clips_per_second"] / row["before_clips_per_second"])
            rows.append(row)
            print(row, flush=True)
    return rows


def round_to(value: float) -> float:
    "Three digits."
    return float(f"{value:.3g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=0, help="recordings; 0: 80, and a file")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    args = parser.parse_args()
    clips = args.clips or 80
    known = ["git", "-C", str(HERE), "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    if subprocess.run(known, capture_output=True).returncode:
        parser.error(f"the commit {BEFORE} is not here: fetch the whole history of the repository")
    git = ["git", "-C", str(HERE), "worktree"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        before = folder / "before"
        added = [*git, "add", "--detach", str(before), BEFORE]
        subprocess.run(added, check=True, capture_output=True)
        try:
            make_corpus(folder / "corpus", clips)
            rows = compare(dict(before=before, now=HERE), folder, clips, args.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    if not args.clips:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        about = dict(clips=clips, rounds=args.rounds, before=BEFORE, machine=machine)
        about |= dict(python=platform.python_version(), torch=torch.__version__)
        write_json(RESULTS, dict(rows=rows, **about))


if __name__ == "__main__":
    main()
