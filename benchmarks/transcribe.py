"""How well recordings are transcribed, and wrong texts found.

    python benchmarks/transcribe.py                    # 20 minutes of speech, all parts
    python benchmarks/transcribe.py --minutes 2 --clips 40 --parts transcribe check

`transcribe`: a recording put together from embedded clips, with pauses, noise and a second voice,
becomes a corpus, as `higgs_run prepare -p transcribe=yes` makes it; sentences, words and speakers
are compared with the truth. `train`: adapters of the small base are trained on the first voice's
pieces, with the words that were written and with the true ones; both are measured on the embedded
held-out clips. `check`: 5% of the embedded clips get another's text, or lose the last third of
their text or recording; `check_texts` lists what does not fit. With --commit the
results go to benchmarks/results/transcribe.json.
"""

import argparse
import json
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf

from higgs_nb.cli.run import main as higgs_run
from higgs_nb.core.files import load_json, write_json
from higgs_nb.data.audio import load_audio
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.speech.judges import normalise_english
from higgs_nb.speech.pauses import Turn, other_voice, put_together
from higgs_nb.speech.written import Writing
from higgs_nb.tasks.check_text import check_texts
from higgs_nb.tasks.transcribe import transcribe_recordings

RESULTS = Path(__file__).parent / "results" / "transcribe.json"
RATE = 24000


def long_recording(minutes: float, seed: int = 0) -> tuple[np.ndarray, list[Turn]]:
    "An interview of two voices: turns of one to four sentences, with pauses and noise."
    clips = [c for c in load_corpus(embedded_corpus()) if c.extra["split"] == "train"]
    draw = random.Random(seed)
    sentences, seconds, last = [], 0.0, set()
    while seconds < 60 * minutes:
        who = "guest" if len(sentences) and sentences[-1][1] == "host" else "host"
        for c in draw.sample([c for c in clips if c.id not in last], draw.randint(1, 4)):
            wave = load_audio(c.audio[-1], RATE)
            wave = other_voice(wave, RATE) if who == "guest" else wave
            sentences.append((wave, who, c.transcript))
            seconds += len(wave) / RATE + 1.0
            last = {c.id, *list(last)[-40:]}
    return put_together(sentences, RATE, seed=seed)


def truth_of(row: dict, turns: list[Turn]) -> tuple[str, str]:
    "The words and the speaker of the turns whose middle lies in a piece."
    start, end = row["at_s"], row["at_s"] + row["seconds"]
    inside = [t for t in turns if start <= (t.start_s + t.end_s) / 2 <= end]
    shared = {t: min(end, t.end_s) - max(start, t.start_s) for t in turns}
    nearest = max(shared, key=shared.get)
    return " ".join(t.text for t in inside), nearest.speaker


def found_sentences(rows: list[dict], turns: list[Turn]) -> float:
    "The share of sentences that lie in pieces for at least 90% of their time."
    spans = [(row["at_s"], row["at_s"] + row["seconds"]) for row in rows]
    covered = []
    for t in turns:
        inside = sum(max(min(b, t.end_s) - max(a, t.start_s), 0) for a, b in spans)
        covered.append(inside >= 0.9 * (t.end_s - t.start_s))
    return float(np.mean(covered))


def cut_inside(rows: list[dict], turns: list[Turn]) -> int:
    "Pieces that begin or end inside of a sentence, more than 0.3 s from its edges."
    edges = [edge for row in rows for edge in (row["at_s"], row["at_s"] + row["seconds"])]
    return sum(any(t.start_s + 0.3 < e < t.end_s - 0.3 for t in turns) for e in edges)


def speakers_right(rows: list[dict], turns: list[Turn]) -> float:
    "The share of pieces whose speaker is right, with the best naming of two clusters."
    pairs = [(row["speaker_id"], truth_of(row, turns)[1]) for row in rows]
    names = {}
    for found in {a for a, _ in pairs}:
        votes = [b for a, b in pairs if a == found]
        names[found] = max(set(votes), key=votes.count)
    return float(np.mean([names[a] == b for a, b in pairs]))


def word_errors(rows: list[dict], turns: list[Turn]) -> float:
    "Word error rate over the complete recording, in order, sentences that are missing included."
    said = " ".join(normalise_english(t.text) for t in turns)
    written = " ".join(normalise_english(row["text"]) for row in rows)
    return jiwer.wer(said, written)


def transcribe(out: Path, minutes: float) -> dict:
    "Measure transcription; the corpus stays in `out/transcript`."
    recording, turns = long_recording(minutes)
    (out / "recordings").mkdir(parents=True, exist_ok=True)
    sf.write(out / "recordings/interview.flac", recording, RATE)
    write_json(out / "turns.json", [vars(t) for t in turns])
    began = time.perf_counter()
    made = transcribe_recordings(out / "recordings", out / "transcript")
    took = time.perf_counter() - began
    rows = made.samples
    doubtful = [row for row in rows if row["doubts"]]
    seconds = [row["seconds"] for row in rows]
    return {
        "recording, minutes": round(len(recording) / RATE / 60, 1),
        "sentences": len(turns),
        "sentences found %": round(100 * found_sentences(rows, turns), 1),
        "pieces": len(rows),
        "pieces, shortest and longest s": [min(seconds), max(seconds)],
        "cuts inside of a sentence": cut_inside(rows, turns),
        "too short and left out, s": round(sum(made.short_s), 1),
        "WER %": round(100 * word_errors(rows, turns), 2),
        "speakers found": len({row["speaker_id"] for row in rows}),
        "speakers right %": round(100 * speakers_right(rows, turns), 1),
        "doubtful pieces": len(doubtful),
        "WER % of doubtful pieces": part_errors(doubtful, turns),
        "WER % of the others": part_errors([r for r in rows if not r["doubts"]], turns),
        "times real time": round(took / (len(recording) / RATE), 2),
    }


def part_errors(rows: list[dict], turns: list[Turn]) -> float | None:
    "Word error rate of some pieces, against the sentences in each; None without words."
    pairs = [(normalise_english(truth_of(r, turns)[0]), normalise_english(r["text"])) for r in rows]
    pairs = [(said, written) for said, written in pairs if said]
    if not pairs:
        return None
    return round(100 * jiwer.wer([a for a, _ in pairs], [b for _, b in pairs]), 2)


def corpus_with(out: Path, texts: str, rows: list[dict], turns: list[Turn]) -> Path:
    "The first voice's pieces, and the embedded held-out clips, as a corpus."
    folder = out / texts
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    samples = []
    for row in rows:
        words = row["text"] if texts == "written" else truth_of(row, turns)[0]
        name = Path(row["audio_file"]).name
        shutil.copy(out / "transcript" / row["audio_file"], folder / "audio" / name)
        samples.append(dict(id=row["id"], audio_file=f"audio/{name}", text=words, split="train"))
    for c in load_corpus(embedded_corpus()):
        if c.extra["split"] == "held_out":
            file = Path(c.audio[-1].path)
            shutil.copy(file, folder / "audio" / file.name)
            row = dict(id=c.id, audio_file=f"audio/{file.name}", text=c.transcript)
            samples.append({**row, "split": "held_out"})
    write_json(folder / "metadata.json", dict(samples=samples))
    return folder


def train(out: Path, steps: int) -> dict:
    "Held-out losses of adapters that were trained with the written and with the true words."
    turns = [Turn(**t) for t in load_json(out / "turns.json")]
    rows = load_json(out / "transcript/metadata.json")["samples"]
    rows = [r for r in rows if truth_of(r, turns)[1] == "host" and truth_of(r, turns)[0]]
    losses = {}
    for texts in ("true", "written"):
        data = corpus_with(out, texts, rows, turns)
        given = ["-p", f"data={data}", "-p", f"steps={steps}", "-p", "speak=0", "-p", "table=0"]
        assert higgs_run(["train", "--out", str(out / f"train-{texts}"), *given]) == 0
        losses[texts] = load_json(out / f"train-{texts}/run.json")["held_out_audio_loss"]
    ratio = losses["written"]["after"] / losses["true"]["after"]
    return {"steps": steps, "pieces": len(rows), **losses, "written over true": round(ratio, 4)}


def damaged(out: Path, clips: int, share: float = 0.05, seed: int = 0) -> tuple[Path, dict]:
    "A corpus with wrong texts and recordings, and which clips have what."
    draw = random.Random(seed)
    corpus = load_corpus(embedded_corpus())[: clips or None]
    long = [c for c in corpus if len(c.transcript.split()) >= 5]
    bad = draw.sample(long, max(round(share * len(corpus)), 3))
    kinds = {c.id: ("swapped", "text cut", "recording cut")[i % 3] for i, c in enumerate(bad)}
    folder = out / "damaged"
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    samples, swapped = [], [c for c in bad if kinds[c.id] == "swapped"]
    for c in corpus:
        kind, text, wave = kinds.get(c.id), c.transcript, load_audio(c.audio[-1], RATE)
        words = text.split()
        if kind == "swapped":
            at = swapped.index(c)
            text = swapped[(at + 1) % len(swapped)].transcript
            if len(swapped) == 1:
                text = next(o.transcript for o in corpus if o is not c)
        elif kind == "text cut":
            text = " ".join(words[: -max(len(words) // 3, 1)])
        elif kind == "recording cut":
            wave = wave[: len(wave) * 2 // 3]
        sf.write(folder / f"audio/{c.id}.flac", wave, RATE)
        row = dict(id=c.id, audio_file=f"audio/{c.id}.flac", text=text, speaker_id="allison")
        samples.append(row)
    write_json(folder / "metadata.json", dict(samples=samples))
    return folder, kinds


def check(out: Path, clips: int) -> dict:
    "How many wrong texts are listed, and how many right ones."
    folder, kinds = damaged(out, clips)
    began = time.perf_counter()
    report = check_texts(load_corpus(folder), folder, Writing())
    took = time.perf_counter() - began
    rows = [asdict(row) for row in report.rows]
    write_json(out / "check_text.json", rows)
    listed = {row["id"] for row in rows if row["doubts"]}
    by_kind = {}
    for kind in sorted(set(kinds.values())):
        members = [id for id, k in kinds.items() if k == kind]
        by_kind[kind] = [sum(id in listed for id in members), len(members)]
    right = [row["id"] for row in rows if row["id"] not in kinds]
    false = sorted(listed & set(right))
    return {
        "clips": len(rows),
        "wrong": len(kinds),
        "wrong listed %": round(100 * len(listed & set(kinds)) / len(kinds), 1),
        "listed of each kind": by_kind,
        "false alarms %": round(100 * len(false) / len(right), 2),
        "false alarms": false,
        "seconds per clip": round(took / len(rows), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/transcribe"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of the recording")
    parser.add_argument("--clips", type=int, default=0, help="that are checked; 0: all")
    parser.add_argument("--steps", type=int, default=300, help="of each training run")
    parser.add_argument("--parts", nargs="+", default=["transcribe", "train", "check"])
    parser.add_argument("--commit", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    parts = dict(
        transcribe=lambda: transcribe(args.out, args.minutes),
        train=lambda: train(args.out, args.steps),
        check=lambda: check(args.out, args.clips),
    )
    for name in args.parts:
        measured = {name: parts[name]()}
        print(json.dumps(measured, indent=1), flush=True)
        if args.commit:
            held = load_json(RESULTS) if RESULTS.exists() else {}
            write_json(RESULTS, held | measured)


if __name__ == "__main__":
    main()
