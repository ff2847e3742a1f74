"""Encoding with several processes against one at a time: seconds side by side, as a ratio.

    python benchmarks/encoders.py           # a table, and benchmarks/results/encoders.json

The codec is of the released class, with random weights and small sizes unless --codec names
another one; recordings are those in the package. The arms take turns, each into an empty store,
and the codes of all arms are the same. The start of the processes counts.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers

from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Audio
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.encoders import cores
from higgs_nb.data.higgs_codec import tiny_higgs_codec

RESULTS = Path(__file__).parent / "results" / "encoders.json"


def recordings(count: int) -> list[Audio]:
    "Recordings of the package."
    return [audio for c in load_corpus(embedded_corpus()) for audio in c.audio][:count]


def encode(codec, audios: list[Audio], workers: int) -> tuple[float, list]:
    "Seconds that an empty store takes for all recordings, and their codes."
    with tempfile.TemporaryDirectory() as folder:
        store = CodeStore(Path(folder), codec)
        began = time.perf_counter()
        store.encode_all(audios, progress=False, workers=workers)
        seconds = time.perf_counter() - began
        return seconds, [store.get(audio) for audio in audios]


def measure(codec, audios: list[Audio], workers: int, rounds: int) -> dict:
    "Seconds of both arms, in turns; `AssertionError` if their codes differ."
    seconds = {1: [], workers: []}
    for _ in range(rounds):
        codes = {}
        for count, times in seconds.items():
            spent, codes[count] = encode(codec, audios, count)
            times.append(spent)
        assert all(map(torch.equal, codes[1], codes[workers])), "codes differ"
    ratios = [one / several for one, several in zip(seconds[1], seconds[workers])]
    return dict(
        one=median(seconds[1]),
        several=median(seconds[workers]),
        ratio=median(ratios),
        least=min(ratios),
        most=max(ratios),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", help="for `load_codec`: a folder, or an id on the hub")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    audios, workers = recordings(args.clips), max(cores(), 2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            codec = load_codec(args.codec or str(tiny_higgs_codec(folder)))
        except ImportError as error:
            print(f"not measured: {error}")
            return
        row = measure(codec, audios, workers, args.rounds)
    row |= dict(codec=args.codec or "small, random", clips=len(audios), processes=workers)
    print(
        f"{len(audios)} clips: {row['one']:.1f} s one at a time, {row['several']:.1f} s in "
        f"{workers} processes, {row['ratio']:.2f} times as fast "
        f"({row['least']:.2f} to {row['most']:.2f})"
    )
    machine = dict(
        cores=cores(),
        capability=torch.backends.cpu.get_cpu_capability(),
        system=platform.platform(terse=True),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(dict(machine=machine, rows=[row]), indent=1) + "\n")


if __name__ == "__main__":
    main()
