"""From start to the first batch, of corpora of 10,000 to a million recordings.

    python benchmarks/corpus.py                  # all three; benchmarks/results/corpus.json
    python benchmarks/corpus.py --rows 10000     # of this size only, and no file

A corpus is made as `prepare` leaves one, without its sound: `metadata.json`, a table of the
same conversations, packs of random codes, 75 frames each, which is three seconds, and the
digests of recordings; with it, a tokenizer of 1024 tokens that was fitted to the words. A new
process does what `train` does with a corpus before its first step: it compares the table with
`metadata.json`, divides it, reads all codes once and compares them with their checks, counts
the tokens of all samples, packs the first epoch, collates its first batch, and describes the
data for the checkpoints. Then a second process does the same but for the codes, which the first
one of several reads for all, while the first still holds everything. Memory is counted in
proportion: a page that both have mapped is half of each. It is counted before the description,
which imports the libraries of a training, and again behind it.

At 10,000 rows a third process reads the same rows from `metadata.json` and writes every sample
for its length, as was done before there were tables.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import __version__ as safetensors_version
from transformers import PreTrainedTokenizerFast

from higgs_nb.core.files import file_sha256, write_json
from higgs_nb.data.audio import Audio
from higgs_nb.data.code_packs import PackFolder, write_columns, write_pack
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import Codec
from higgs_nb.data.collator import PackedBatchSampler, PackedCollator
from higgs_nb.data.conversation import tts_conversation
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.corpus_table import CorpusTable, in_columns, write_samples, write_table
from higgs_nb.data.prompt import AudioTokens, fit_tokenizer
from higgs_nb.data.recording_digests import DIGESTS_FILE, path_key
from higgs_nb.data.sample_dataset import SampleDataset

FRAMES, CODEBOOKS, BUDGET, SEED = 75, 8, 4096, 1
SIZES = (10_000, 100_000, 1_000_000)
IN_MEMORY = 10_000  # rows, at most, that are read as before
RESULTS = Path(__file__).parent / "results" / "corpus.json"
WORDS = "the time is seven press one for your account please hold while we connect you".split()


class NoCodec(Codec):
    "Its codes are made up by `make_corpus`."

    fingerprint = "made up by benchmarks/corpus.py"

    def encode(self, waveform):
        raise ValueError("every recording has codes")

    def decode(self, codes):
        raise ValueError("there is no sound")


def conversations(rows: int, seed: int = 0):
    "Sentences of three to fourteen words, one in a hundred held out."
    rng = np.random.default_rng(seed)
    for i in range(rows):
        words = rng.integers(0, len(WORDS), rng.integers(3, 15))
        text = f"{' '.join(WORDS[w] for w in words)} {i}."
        split = "held_out" if i % 100 == 0 else "train"
        yield tts_conversation(text, Audio(f"audio/{i:07d}.flac"), id=f"{i:07d}", split=split)


def make_packs(store: CodeStore, rows: int, seed: int = 0) -> np.ndarray:
    "Write packs of random codes; returns the digests (rows, 32) of the recordings."
    rng = np.random.default_rng(seed)
    digests = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    for first in range(0, rows, store.per_pack):
        part = digests[first : first + store.per_pack]
        codes = rng.integers(0, 1024, (len(part), CODEBOOKS, FRAMES), dtype=np.int16)
        names = [digest.tobytes() for digest in part]
        write_pack(store.folder, names, list(codes), store.codec.fingerprint)
    PackFolder(store.folder, store.codec.fingerprint).save_index()
    return digests


def make_corpus(folder: Path, rows: int) -> None:
    "A corpus as `prepare` leaves one, without sound."
    store = CodeStore(folder / "codes", NoCodec())
    digests = make_packs(store, rows)
    home = f"{os.path.abspath(folder)}{os.sep}"
    names = (f"{home}audio/{i:07d}.flac" for i in range(rows))
    keys = np.frombuffer(b"".join(path_key(name, home) for name in names), np.uint8)
    keys = keys.reshape(-1, 16)
    order = np.argsort(keys.view("S16").ravel())
    states = np.full((rows, 3), 1)
    columns = dict(keys=keys[order], digests=digests[order], states=states)
    write_columns(store.root / DIGESTS_FILE, columns)
    texts = [c.transcript for c in conversations(min(rows, 2000))]
    fit_tokenizer(texts).save_pretrained(folder / "tokenizer")
    metadata = write_samples(folder / "metadata.json", (c.to_dict() for c in conversations(rows)))
    write_table(folder, conversations(rows), of=file_sha256(metadata))


def memory() -> dict[str, float]:
    "Megabytes of this process: resident, in proportion, its own, and the most it ever had."
    info = psutil.Process().memory_full_info()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000
    sizes = dict(resident=info.rss / 1e6, proportional=info.pss / 1e6, own=info.uss / 1e6)
    return {name: round(size, 1) for name, size in (sizes | dict(peak=peak)).items()}


def open_table(folder: Path):
    "The conversations to train on, from the table."
    table = CorpusTable(folder / "corpus.arrow")
    assert table.metadata["of"] == file_sha256(folder / "metadata.json")
    return table, table.side("train")


def open_json(folder: Path):
    "The conversations to train on, from `metadata.json`."
    corpus = load_corpus(folder / "metadata.json")
    return corpus, [c for c in corpus if c.extra["split"] == "train"]


class OnlyGet:
    "A store that does not count frames, so that samples are written for their lengths."

    def __init__(self, store):
        self.get = store.get


def describe(data: SampleDataset) -> dict:
    "What a checkpoint says of the data; seconds of the imports of a training, and of the rest."
    began = time.time()
    from higgs_nb.training.identity import describe_data  # here, so that memory is without it

    imported = time.time()
    description = describe_data(data)
    seconds = dict(training_imports=imported - began, description=time.time() - imported)
    return description | dict(seconds={part: round(s, 2) for part, s in seconds.items()})


def first_batch(folder: Path, options: argparse.Namespace) -> dict:
    "Everything up to the first batch; seconds of each part."
    start, last = options.start, time.time()
    seconds = dict(imports=last - start)

    def done(part: str) -> None:
        nonlocal last
        now = time.time()
        seconds[part] = now - last
        last = now

    corpus, train = (open_json if options.in_memory else open_table)(folder)
    done("rows")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokens = AudioTokens.from_tokenizer(tokenizer, 1024, CODEBOOKS)
    store = CodeStore(folder / "codes", NoCodec())
    done("store")
    if not options.second:
        clips = (audio for columns in in_columns(corpus) for audio in columns.recordings)
        assert store.encode_all(clips, progress=False)["misses"] == 0
        done("codes")
    data = SampleDataset(train, tokenizer, OnlyGet(store) if options.in_memory else store, tokens)
    lengths = data.lengths
    done("lengths")
    sampler = PackedBatchSampler(lengths, BUDGET, SEED)
    batches = sampler.batches(0)
    done("packing")
    batch = PackedCollator(tokens)([data[i] for i in batches[0]])
    done("batch")
    seconds["total"] = sum(seconds.values())
    order = [int(np.sum(np.array(row) * (np.arange(len(row)) + 1))) for row in batches]
    return dict(
        rows=len(corpus),
        batches=len(batches),
        first_batch=int(batch["input_ids"].sum()),
        order=sum(order),
        seconds={part: round(value, 2) for part, value in seconds.items()},
        cpu_s=round(time.process_time(), 2),  # of all threads
        memory=memory(),
        still_there=(data, corpus, batches),  # until memory was measured
    )


def child(options: argparse.Namespace) -> None:
    "Measure and print; at each line of input measure again, the second time with a description."
    libraries = memory()
    result = first_batch(options.child, options)
    data, *held = result.pop("still_there")
    print(json.dumps(result | dict(libraries=libraries)), flush=True)
    sys.stdin.readline()
    print(json.dumps(memory()), flush=True)
    sys.stdin.readline()
    described = describe(data)
    numbers = dict(cpu_s=round(time.process_time(), 2), memory=memory())
    print(json.dumps(described | numbers), flush=True)
    sys.stdin.readline()
    del held


def start_child(folder: Path, *options: str) -> tuple[subprocess.Popen, dict]:
    "A process that has its first batch, and what it has measured."
    command = [sys.executable, __file__, "--child", str(folder), "--start", str(time.time())]
    process = subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, json.loads(process.stdout.readline())


def ask(process: subprocess.Popen) -> dict:
    "What a process prints next: its memory, then its description of the data."
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def end(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.close()
    process.wait()


def measure(rows: int) -> dict:
    "One size: the first process, the second beside it, and the way of before."
    with tempfile.TemporaryDirectory(prefix="corpus-") as name:
        folder = Path(name)
        began = time.time()
        make_corpus(folder, rows)
        made = round(time.time() - began, 1)
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        load = os.getloadavg()[0]
        first, one = start_child(folder)
        alone = one["memory"]["proportional"]
        second, two = start_child(folder, "--second")
        together = ask(first)["proportional"] + ask(second)["proportional"]
        assert (one["order"], one["first_batch"]) == (two["order"], two["first_batch"])
        one["described"], two["described"] = ask(first), ask(second)
        assert one["described"]["sha256"] == two["described"]["sha256"]
        end(first), end(second)
        result = dict(rows=rows, made_s=made, stored_mb=round(stored / 1e6, 1), table=one)
        result["load"] = round(load, 1)  # of the machine, before: 0 if nothing else runs on it
        result["second_rank"] = two | dict(added_mb=round(together - alone, 1))
        if rows <= IN_MEMORY:
            before, old = start_child(folder, "--in-memory", "--second")
            ask(before)
            old["described"] = ask(before)
            end(before)
            assert (old["order"], old["first_batch"]) == (one["order"], one["first_batch"])
            result["in_memory"] = old
    return result


def line(result: dict) -> str:
    table, second = result["table"], result["second_rank"]
    described = table["described"]["seconds"]["description"]
    before = result.get("in_memory", {}).get("seconds", {}).get("total")
    return (
        f"{result['rows']:>9,} rows: first batch after {table['seconds']['total']:6.1f} s "
        f"({table['cpu_s']:.1f} s of one core), described in {described:.1f} s, "
        f"{table['memory']['resident']:7.0f} MB resident, {second['added_mb']:5.0f} MB more for a "
        f"second rank, {second['libraries']['own']:.0f} MB of it libraries"
        + (f"; from metadata.json {before:.1f} s" if before else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="measure a corpus of this size only")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--second", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    results = []
    for rows in (args.rows,) if args.rows else SIZES:
        results.append(measure(rows))
        print(line(results[-1]), flush=True)
    if not args.rows:
        machine = dict(cores=os.cpu_count(), python=platform.python_version())
        machine |= dict(torch=torch.__version__, safetensors=safetensors_version)
        write_json(RESULTS, dict(machine=machine, token_budget=BUDGET, results=results))


if __name__ == "__main__":
    main()
