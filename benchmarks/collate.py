"""Samples collated a second, against the original's way of doing it.

    python benchmarks/collate.py             # speed: a table, and benchmarks/results/collate.json
    python benchmarks/collate.py --memory    # also: resident memory over 100,000 collated samples

The reference arm below does what the original collator does, step for step and written anew: it
slices, wraps, delays and labels one clip at a time and then concatenates. Its fields are
compared with those of `HiggsAudioSampleCollator` before anything is timed. Arms take turns,
each on one thread, as in a worker of a data loader; time is CPU time of the process, so that
other programs on the machine do not count.
"""

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.nn.functional as F

from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.delay import IGNORE
from higgs_nb.data.prompt import AudioTokens
from higgs_nb.data.samples import expand
from higgs_nb.family import HIGGS_V2
from higgs_nb.original.collator import HiggsAudioSampleCollator
from higgs_nb.original.records import ChatMLDatasetSample

FRAME_RATE, CODEBOOKS, BATCH = 25, 8, 8
TOKENS = AudioTokens(**HIGGS_V2.released_ids)
RESULTS = Path(__file__).parent / "results" / "collate.json"


def make_samples(count: int, seed: int = 0) -> list[ChatMLDatasetSample]:
    """Speech samples of 1 to 15 s as they come from disk: a prompt, a text of about 4 tokens a
    second, one recording.
    """
    g = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    samples = []
    for seconds in (1 + 14 * torch.rand(count, generator=g)).tolist():
        prompt, codes = (
            randint(0, 128000, 40 + round(4 * seconds)),
            randint(0, 1024, CODEBOOKS, round(seconds * FRAME_RATE)),
        )
        spoken = torch.tensor(
            [128013, TOKENS.audio_out, 128012, 128009]
        )  # begin of a recording, the recording, its end, end of the turn
        samples.append(
            ChatMLDatasetSample(
                torch.cat([prompt, spoken]),
                torch.cat([torch.full_like(prompt, IGNORE), spoken]),
                codes,
                torch.tensor([0]),
                torch.zeros(0),
                torch.zeros(0, dtype=torch.long),
                torch.zeros(0, dtype=torch.long),
                torch.tensor([-1]),
            )
        )
    return samples


def delay_one(codes, bos, pad):
    """The delay pattern of one wrapped clip (codebooks, frames): triangles of `bos` before it and
    of `pad` behind it; also the form with -1 where a model generates.
    """
    codebooks, frames = codes.shape
    to_fill = torch.ones(codebooks, frames + codebooks - 1, dtype=torch.long)
    before, behind = torch.tril(to_fill, -1) > 0, torch.triu(to_fill, frames) > 0
    to_fill[before] = bos
    to_fill[~before & ~behind] = codes.reshape(-1)
    delayed = to_fill.clone()
    delayed[behind], to_fill[behind] = pad, -1
    return delayed, to_fill


def codes_of(sample, index):
    "The codes of one recording, as a slice between two starts."
    start = sample.audio_ids_start[index]
    end = (
        sample.audio_ids_start[index + 1]
        if index < len(sample.audio_ids_start) - 1
        else sample.audio_ids_concat.shape[-1]
    )
    return sample.audio_ids_concat[:, start:end]


def wrap(codes, opens, closes):
    "One column before and one behind the codes of a clip."

    def edge(value):
        return torch.full((codes.shape[0], 1), value, dtype=torch.long)

    return torch.cat([edge(opens), codes, edge(closes)], dim=1)


def join(clips):
    "All clips side by side, and where each begins."
    if not clips:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return torch.cat(clips, dim=1).long(), torch.cumsum(
        torch.tensor([0] + [c.shape[1] for c in clips[:-1]]), dim=0
    )


def clip_by_clip(batch):
    """The original's way: its batch fields, clip by clip, with delay pattern, labels and
    `round_to=8`, without Whisper.
    """
    bos, eos = TOKENS.stream_bos, TOKENS.stream_eos
    heard, spoken, untrained, label_ids = [], [], [], []
    for sample in batch:
        is_in, is_out = sample.input_ids == TOKENS.audio_in, sample.input_ids == TOKENS.audio_out
        number = torch.ones_like(sample.input_ids)
        number[is_in ^ is_out] = torch.cumsum(number[is_in ^ is_out], 0) - 1
        heard += [codes_of(sample, i)[:CODEBOOKS] for i in number[is_in]]
        spoken += [codes_of(sample, i)[:CODEBOOKS] for i in number[is_out]]
        untrained.append(sample.label_ids[is_out] < 0)
        label_ids.append(sample.label_ids.clone())
        label_ids[-1][is_out] = IGNORE  # the original writes this into the sample itself

    audio_ids, audio_labels, skip = [], [], torch.cat(untrained)
    for i, codes in enumerate(spoken):
        audio_ids.append(delay_one(wrap(codes, bos, eos), bos, eos)[0])
        audio_labels.append(delay_one(wrap(codes, IGNORE, eos), IGNORE, IGNORE)[0])
        if skip[i]:
            audio_labels[-1][:] = IGNORE

    out_ids, out_start = join(audio_ids)
    in_ids, in_start = join([delay_one(wrap(codes, bos, eos), bos, eos)[0] for codes in heard])
    longest = -(-max(len(s.input_ids) for s in batch) // 8) * 8

    def pad(rows, value):
        return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows])

    return dict(
        input_ids=pad([s.input_ids for s in batch], TOKENS.pad),
        label_ids=pad(label_ids, IGNORE),
        attention_mask=pad([torch.ones_like(s.input_ids) for s in batch], 0),
        audio_out_ids=out_ids,
        audio_out_ids_start=out_start,
        label_audio_ids=join(audio_labels)[0],
        audio_in_ids=in_ids,
        audio_in_ids_start=in_start,
        audio_out_ids_start_group_loc=torch.arange(len(batch)),
        reward=torch.zeros(0),
        audio_features=None,
        audio_feature_attention_mask=None,
    )


def arms():
    """Name -> function of what `fresh` gives for it; the first is the reference, the second has
    its fields.
    """
    ours = HiggsAudioSampleCollator(
        None,
        encode_whisper_embed=False,
        audio_num_codebooks=CODEBOOKS,
        audio_in_token_id=TOKENS.audio_in,
        pad_token_id=TOKENS.pad,
        audio_out_token_id=TOKENS.audio_out,
        audio_stream_bos_id=TOKENS.stream_bos,
        audio_stream_eos_id=TOKENS.stream_eos,
    )
    padded, packed = PaddedCollator(TOKENS), PackedCollator(TOKENS)
    return {
        "clip by clip, as the original": clip_by_clip,
        "HiggsAudioSampleCollator": ours,
        "expand + PaddedCollator": lambda batch: padded([expand(s, TOKENS) for s in batch]),
        "expand + PackedCollator": lambda batch: packed([expand(s, TOKENS) for s in batch]),
    }


def same(a, b):
    return a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


def fresh(samples, name: str) -> list:
    """The same samples as new objects, as a data set hands them out: nothing that a collator keeps
    in them helps the next pass. The record of the original, or ours for `expand`.
    """
    new = [
        ChatMLDatasetSample(**{f: getattr(s, f) for f in s.__dataclass_fields__}) for s in samples
    ]
    return [s.encoded() for s in new] if name.startswith("expand") else new


def speed(samples, passes: int) -> dict[str, float]:
    "Samples a second of each arm, the median of `passes`, arms taking turns."
    seconds = {name: [] for name in arms()}
    for _ in range(passes + 1):  # the first warms up
        for name, arm in arms().items():
            batches = [fresh(samples[i : i + BATCH], name) for i in range(0, len(samples), BATCH)]
            gc.collect()  # what is left of the arm before
            began = time.process_time()
            for batch in batches:
                arm(batch)
            seconds[name].append(time.process_time() - began)
    return {name: len(samples) / median(s[1:]) for name, s in seconds.items()}


def memory(samples, count: int) -> dict[str, float]:
    """MB by which resident memory grew over `count` collated samples, for each of our arms, after
    10,000 to settle.
    """
    grown, process = {}, psutil.Process()
    for name, arm in list(arms().items())[1:]:
        for done in range(0, count + 10_000, BATCH):
            if done == 10_000:
                before = process.memory_info().rss
            at = done % (len(samples) - BATCH)
            arm(fresh(samples[at : at + BATCH], name))
        grown[name] = (process.memory_info().rss - before) / 1e6
    return grown


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also collate 100,000 samples and report how memory grows",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples(args.samples)
    reference, ours, *_ = arms().values()
    for i in range(0, len(samples), BATCH):
        expected, got = reference(samples[i : i + BATCH]), ours(samples[i : i + BATCH])
        differing = [
            field for field in expected.keys() | got.keys() if not same(expected[field], got[field])
        ]
        if differing:
            raise SystemExit(f"batch {i // BATCH}: not the fields of the reference: {differing}")

    rates = speed(samples, args.passes)
    base = next(iter(rates.values()))
    print(
        f"{args.samples} samples of 1 to 15 s, {CODEBOOKS} codebooks at {FRAME_RATE} "
        f"frames/s, batches of {BATCH}, one thread, median of {args.passes}\n"
    )
    print("| arm | samples/s | times |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / base:.1f} |")
    result = dict(
        samples=args.samples,
        batch=BATCH,
        passes=args.passes,
        samples_per_second={k: round(v) for k, v in rates.items()},
        times_the_reference={k: round(v / base, 2) for k, v in rates.items()},
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
    )
    if args.memory:
        result["mb_grown_over_100000_samples"] = {
            k: round(v, 1) for k, v in memory(samples, 100_000).items()
        }
        print(
            "\nresident memory over 100,000 samples: "
            + ", ".join(
                f"{k} {v:+.1f} MB" for k, v in result["mb_grown_over_100000_samples"].items()
            )
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
