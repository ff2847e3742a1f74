"""What a piece of a long text gains from the pieces before it.

    python benchmarks/history.py            # a table, and benchmarks/results/history.json

The small base, which has eight voices, speaks texts of five sentences that it was not trained on,
one sentence in a piece, drawn with the same seeds: each piece by itself, and continuing the first
piece and the last one or two. The judges of the extra `eval` count wrong words and compare the
voice of each piece with that of the first piece of its text; the share of pieces that stop by
themselves is noted, too. For comparison there are the similarity of the first pieces of different
texts, `floor`, and that of the two halves of a piece, `ceiling`, which are shorter than a piece.
"""

import argparse
import json
import platform
import time
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

from higgs_nb.data.codec import load_codec
from higgs_nb.model.load import base_path, load_model
from higgs_nb.speech.evaluate import evaluate
from higgs_nb.speech.judges import Judges, default_judges
from higgs_nb.speech.long import speak_texts
from higgs_nb.speech.long_text import LongSpeech
from higgs_nb.speech.score import voice_of

RESULTS = Path(__file__).parent / "results" / "history.json"
HISTORIES = (0, 1, 2)
DRAWING = dict(do_sample=True, temperature=0.7, top_k=50, max_frames=200, max_chars=60)
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)


def texts_of(count: int, sentences: int = 5) -> list[str]:
    "Texts of several sentences each that the base was not trained on."
    lines = Path(base_path("small"), "held_out.txt").read_text(encoding="utf-8").splitlines()
    chosen = [line for line in lines if len(line) <= DRAWING["max_chars"]][: count * sentences]
    return [" ".join(chosen[i::count]) for i in range(count)]


def voices_of(clip: LongSpeech, judges: Judges) -> list[np.ndarray]:
    "The voice of each piece, (features,)."
    return [voice_of([p.waveform.numpy()], p.sampling_rate, judges) for p in clip.pieces]


def within_texts(voices: list[list[np.ndarray]]) -> list[float]:
    "Similarity of each later piece to the first one of its text."
    return [float(first @ other) for first, *later in voices for other in later]


def across_texts(voices: list[list[np.ndarray]]) -> list[float]:
    "Similarity of the first pieces of different texts."
    return [float(a[0] @ b[0]) for a, b in combinations(voices, 2)]


def within_pieces(clips: list[LongSpeech], judges: Judges) -> list[float]:
    "Similarity of the two halves of each piece."
    found = []
    for piece in (piece for clip in clips for piece in clip.pieces):
        halves = np.array_split(piece.waveform.numpy(), 2)
        a, b = (voice_of([half], piece.sampling_rate, judges) for half in halves)
        found.append(float(a @ b))
    return found


def mean_and_interval(values: list[float], draws: int = 2000) -> list[float]:
    "Mean, and the bounds that hold 95% of bootstrap draws."
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(np.array(values)[picks].mean(1), [0.025, 0.975])
    return [round(float(x), 4) for x in (np.mean(values), low, high)]


def measure(count: int) -> dict:
    "A row for each history, ceiling and floor."
    path, judges = base_path("small"), default_judges()
    model, codec = load_model(path, dtype="float32").eval(), load_codec()
    tokenizer, texts, rows, spoken = AutoTokenizer.from_pretrained(path), texts_of(count), [], {}
    for history in HISTORIES:
        began = time.perf_counter()
        clips = speak_texts(model, tokenizer, texts, codec, history=history, **DRAWING)
        seconds = time.perf_counter() - began
        voices = [voices_of(clip, judges) for clip in clips]
        spoken[str(history)] = clips
        rows.append(dict(history=history, similarity=mean_and_interval(within_texts(voices))))
        rows[-1] |= dict(
            stopped=np.mean([p.stopped for c in clips for p in c.pieces]).item(),
            seconds_per_second=seconds / sum(c.duration_s for c in clips),
        )
        print(f"history {history}: {rows[-1]}", flush=True)
        if history == 0:
            floor = mean_and_interval(across_texts(voices))
            ceiling = mean_and_interval(within_pieces(clips, judges))
    summary = evaluate(spoken, judges, players=0, progress=False).summary()
    for row in rows:
        row["wer"] = summary[str(row["history"])]["WER %"]
        print(f"history {row['history']}: WER {row['wer']}")
    return dict(texts=len(texts), rows=rows, floor=floor, ceiling=ceiling)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=10)
    result = measure(parser.parse_args().texts)
    result["machine"] = dict(
        capability=torch.backends.cpu.get_cpu_capability(),
        system=platform.platform(terse=True),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
