"""Host memory of whole runs on a base of 1 GB, by stages: `train`, `evaluate` and `export`.

    python benchmarks/memory.py          # a table, and benchmarks/results/memory.json

The base is of the released class: three of its layers with random weights and a small vocabulary,
in bfloat16. Each run is the command as users start it; while it works, the resident memory of its
kernel and of what the kernel starts is sampled a hundred times a second, from outside, and each
sample goes to the cell that was being executed. Pages of mapped files count, although the system
may take them back. "Above the base" leaves out Python with its libraries and one base, so that
1.0 means that a second base was there. What training needs is the peak of its steps.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import torch
import transformers

from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.model.model import tiny_config

RESULTS = Path(__file__).parent / "results" / "memory.json"
LIMIT = 1.3  # bases above what training needs
LAYERS = 3
EVERY = 0.01  # seconds
RUNS = {
    "train": "device=cpu precision=bfloat16 codec=world other_codec=True rehearse=0 steps=2 "
    "token_budget=700 max_clips=4 max_duration_s=20 speak=1 table=1 max_speech_s=1",
    "evaluate": "device=cpu precision=bfloat16 judge=False max_texts=1 max_frames=25 swap=1",
    "export": "device=cpu what=all max_frames=25",
}


def write_base(folder: Path) -> int:
    "A base with layers of the released sizes; returns its bytes."
    tokenizer = byte_tokenizer()
    released = transformers.HiggsAudioV2Config()
    sizes = dict(hidden_size=released.hidden_size, intermediate_size=released.intermediate_size)
    config = tiny_config(tokenizer, num_layers=LAYERS, num_heads=24, **sizes)
    config.num_key_value_heads = released.num_key_value_heads
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="400MB")
    tokenizer.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def resident_bytes(process: psutil.Process) -> int:
    "Bytes of a process; 0 if it has ended."
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


class Sampler(threading.Thread):
    "Time and bytes of all processes that a command has started, until it ends."

    def __init__(self, command: subprocess.Popen):
        super().__init__(daemon=True)
        self.process, self.samples = psutil.Process(command.pid), []

    def run(self):
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            try:
                started = self.process.children(recursive=True)
            except psutil.Error:
                return
            self.samples.append((time.time(), sum(map(resident_bytes, started))))
            time.sleep(EVERY)


def execute(name: str, out: Path, **given) -> list[tuple[float, int]]:
    "Run `higgs_run NAME`; returns the samples. Ends the benchmark if the run fails."
    words = [*RUNS[name].split(), *(f"{key}={value}" for key, value in given.items())]
    pairs = [word for pair in words for word in ("-p", pair)]
    command = [sys.executable, "-m", "higgs_nb.cli.run", name, "--out", str(out), *pairs]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    with open(out.parent / f"{name}.log", "w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        sampler = Sampler(started)
        sampler.start()
        code = started.wait()
        sampler.join()
    if code:
        sys.exit((out.parent / f"{name}.log").read_text()[-3000:])
    return sampler.samples


def seconds(text: str) -> float:  # a moment, as papermill writes it
    "Seconds since 1970."
    return datetime.fromisoformat(text).timestamp()


def stages(executed: Path) -> list[tuple[str, float, float]]:
    "Heading, begin and end of each code cell of an executed notebook."
    found, heading = [], "start"
    for cell in json.loads(executed.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).splitlines()
            heading = next((x.lstrip("# ") for x in lines if x.startswith("#")), heading)
            continue
        moments = cell["metadata"].get("papermill", {})
        if moments.get("start_time") and moments.get("end_time"):
            found.append((heading, seconds(moments["start_time"]), seconds(moments["end_time"])))
    return found


def peaks(samples: list[tuple[float, int]], executed: Path) -> dict[str, int]:
    "Heading -> most bytes while its cells were executed."
    most = {}
    for heading, begin, end in stages(executed):
        inside = [size for moment, size in samples if begin <= moment <= end]
        most[heading] = max([most.get(heading, 0), *inside])
    return most


def measure(folder: Path) -> dict:
    "All runs, one after the other."
    base = write_base(folder / "base")
    rows, libraries, training = [], None, None
    sources = dict(train=dict(base=folder / "base"))
    for name in RUNS:
        given = sources.get(name, dict(run=folder / "train"))
        samples = execute(name, folder / name, **given)
        most = peaks(samples, folder / name / f"{name}.ipynb")
        if name == "train":
            libraries, training = most["The corpus"], most["Training"]
        for stage, size in most.items():
            above = (size - libraries) / base - 1
            rows.append(dict(run=name, stage=stage, bytes=size, above_base=above))
            print(f"{name:<10}{stage:<36}{size / 1e9:>8.2f} GB{above:>+9.2f} bases", flush=True)
    summary = dict(base=base, libraries=libraries, training=training)
    return summary | dict(rows=rows)


def worst(result: dict) -> dict[str, float]:
    "Run -> most bases by which one of its stages is above training."
    found = {}
    for row in result["rows"]:
        above = (row["bytes"] - result["training"]) / result["base"]
        found[row["run"]] = max(above, found.get(row["run"], above))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for base and runs, which stay there")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    result["above_training"] = worst(result)
    result["machine"] = dict(
        system=platform.platform(terse=True),
        capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, above in result["above_training"].items():
        print(f"{name}: at most {above:+.2f} bases above training (limit {LIMIT})")
    return 0 if max(result["above_training"].values()) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
