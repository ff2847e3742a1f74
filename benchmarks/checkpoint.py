"""A verified save against PEFT's plain `save_pretrained`: seconds, bytes, and how long training
waits.

    python benchmarks/checkpoint.py             # a table, and benchmarks/results/checkpoint.json
    python benchmarks/checkpoint.py --dir DIR   # on the disk of DIR

The adapter has the sizes of the 3B configuration, r=64 on all targets that the released model
has, with random values in float32; the base stays on the meta device. Plain saves leave their
bytes in the system's memory; "made durable" adds the fsync that keeps them there when the power
fails, which ours includes, with sha256 and reading back. Arms take turns, each into an emptied
directory.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_nb.checkpoint.adapter import adapter_state, save_lora_adapters, take_snapshot
from higgs_nb.checkpoint.background import BackgroundSaver
from higgs_nb.checkpoint.base import BASE_KEYS
from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.core.files import fsync
from higgs_nb.model.lora import apply_lora, create_lora_config

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"


def adapter_of_3b(r: int):
    """A PEFT model of the released configuration: adapters with random values in memory, the base
    without any.
    """
    with torch.device("meta"):
        model = apply_lora(
            HiggsAudioV2ForConditionalGeneration(
                HiggsAudioV2Config(codebook_size=1026), use_text_head=True
            ),
            create_lora_config("all", r=r),
        )
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                module._parameters[name] = torch.nn.Parameter(torch.randn(p.shape))
    return model


def seconds(f) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def measure(model, root: Path, rounds: int) -> dict[str, list[float]]:
    "Seconds of each arm in each round; the first round, which warms up, is left out."
    base, state = (
        {key: [] for key in BASE_KEYS},
        adapter_state(model),
    )  # a base without values has no fingerprint

    def durable():
        model.save_pretrained(root / "plain")
        for file in (root / "plain").iterdir():
            fsync(file)
        fsync(root / "plain")

    def background():
        saver.submit(take_snapshot(model, base=base), root / "checkpoint-1")

    kept = []
    arms = {
        "plain": lambda: model.save_pretrained(root / "plain"),
        "plain, made durable": durable,
        "save_lora_adapters": lambda: save_lora_adapters(model, root / "checkpoint-1", base=base),
        "copy of the tensors": lambda: kept.append([t.clone() for t in state.values()]),
        "stall of a background save": background,
    }
    taken = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            for child in root.iterdir():
                shutil.rmtree(child)
            os.sync()
            kept.clear()
            with BackgroundSaver() as saver:
                taken[name].append(seconds(arm))
            if name == "save_lora_adapters":
                assert validate_checkpoint(root / "checkpoint-1").whole
    return {name: times[1:] for name, times in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dir",
        type=Path,
        help="where to save; default: the system's directory for temporary files",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    model = adapter_of_3b(args.rank)
    size = sum(t.nbytes for t in adapter_state(model).values())
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        taken = measure(model, Path(root), args.rounds)
    mid = {name: median(times) for name, times in taken.items()}
    print(
        f"r={args.rank}: {size / 1e6:.0f} MB in {len(adapter_state(model))} tensors, "
        f"median (range) of {args.rounds} rounds\n\n| arm | s | range | MB/s "
        "|\n|---|---|---|---|"
    )
    for name, times in taken.items():
        print(
            f"| {name} | {mid[name]:.2f} | {min(times):.2f}-{max(times):.2f} | "
            f"{size / 1e6 / mid[name]:,.0f} |"
        )
    ratios = {
        "save / plain": mid["save_lora_adapters"] / mid["plain"],
        "save / plain, made durable": mid["save_lora_adapters"] / mid["plain, made durable"],
        "stall / copy": mid["stall of a background save"] / mid["copy of the tensors"],
    }
    print("\n" + ", ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            dict(
                rank=args.rank,
                bytes=size,
                rounds=args.rounds,
                seconds={k: round(v, 3) for k, v in mid.items()},
                range={k: [round(min(v), 3), round(max(v), 3)] for k, v in taken.items()},
                ratios={k: round(v, 2) for k, v in ratios.items()},
                torch=torch.__version__,
                python=platform.python_version(),
                machine=platform.machine(),
                cpus=os.cpu_count(),
            ),
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
