"""The scores on the page of the small base, measured again.

    python benchmarks/small_base.py                         # into runs/scores: hours of two cores
    python benchmarks/small_base.py --clips 4 --steps 20    # a small run: does all of it work?
    python benchmarks/small_base.py --only adapter          # one section
    python benchmarks/small_base.py --voices runs/voices    # also the base in its own voices
    python benchmarks/small_base.py --commit                # a full run: its figures go into
                                                            # benchmarks/results/small_base.json

A section is `higgs_run` with parameters, then its judged clips put into groups; the base in its
own voices is judged here and needs the folder that nbs/runs/voices.ipynb makes. What is done stays
in runs/scores and is not done again. The file that is written begins as a copy of the
committed one; `from` says of each section whether it was measured now, or what it needs that
this machine does not have.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from base_voices import DRAWN, base_voices, measure, rounded

from higgs_nb.cli.run import main as run_notebook
from higgs_nb.core.files import load_json, write_json, write_whole
from higgs_nb.data.audio import load_audio
from higgs_nb.data.codec import load_codec
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.model.load import base_path
from higgs_nb.small.world import world_features, world_synthesis
from higgs_nb.speech.clips import Speech, speech_of
from higgs_nb.speech.evaluate import evaluate
from higgs_nb.speech.judges import default_judges
from higgs_nb.speech.score import Score, voice_of

RESULTS = Path(__file__).parent / "results" / "small_base.json"
PROMPTS = 104  # the first lines of the base's held_out.txt; what other services say follows
NEEDS = {  # sections that no command here measures
    "pretrain": "a run of `make base`: a GPU, and the speech that nbs/runs/voices.ipynb makes",
    "voices": "--voices, the folder that nbs/runs/voices.ipynb makes",
    "counts": "as voices",
    "by_voice": "as voices",
    "examples": "as voices",
    "controls": "adapters trained with wrong losses and labels, which the trainer refuses",
}


def higgs_run(name: str, out: Path, **parameters) -> None:
    "Execute a notebook of nbs/runs, unless `out` holds its result."
    done = {"train": "run.json", "evaluate": "evaluate.json"}[name]
    if (out / done).is_file():
        print(f"{out} is done")
        return
    given = [x for key, value in parameters.items() for x in ("-p", key, json.dumps(value))]
    code = run_notebook([name, "--out", str(out), *given])
    if code or not (out / done).is_file():
        raise SystemExit(
            f"higgs_run {name} ended with exit code {code}; the same command resumes in {out}"
        )


def texts_of(file: Path, clips: int) -> Path:
    "The first prompts of the base's held-out texts as a file."
    lines = Path(base_path("small"), "held_out.txt").read_text(encoding="utf-8").splitlines()
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(file, "\n".join(lines[:clips]) + "\n")


def summary(scores: list[dict]) -> dict:
    "The metrics of judged clips as `evaluate.json` holds them, rounded as they are committed."
    return rounded([Score(**s) for s in scores])


def split(scores: list[dict]) -> tuple[list[dict], list[dict]]:
    "Clips of prompts, which have no recording, and of the recordings' sentences."
    prompts = [s for s in scores if s["id"].startswith("text ")]
    return prompts, [s for s in scores if s not in prompts]


def adapter_arms(scores: dict[str, list[dict]]) -> dict:
    "The rows of the section `adapter`, from the judged clips of each way to speak."
    drawn = "temperature 0.4, top 10"
    rows = {name: summary(scores[name]) for name in ("recordings", "codec", "codec, 4 codebooks")}
    asked = {
        name: split(s)[0]
        for name, s in scores.items()
        if name.startswith("base, A ") and "greedy" in name
    }
    voices = {name: summary(s) for name, s in asked.items()}
    rows["base, greedy: prompts"] = summary(split(scores["base, greedy"])[0])
    nearest = max(voices.values(), key=lambda row: row["similarity"][0])
    rows["base in the nearest of its voices: prompts"] = {**nearest, "WER %": None, "CER %": None}
    rows["adapter, greedy: prompts"] = summary(split(scores["adapter, greedy"])[0])
    rows[f"adapter, {drawn}: prompts"] = summary(split(scores["adapter, sampling"])[0])
    rows["base, greedy: recordings' sentences"] = summary(split(scores["base, greedy"])[1])
    rows["adapter, greedy: recordings' sentences"] = summary(split(scores["adapter, greedy"])[1])
    rows[f"adapter, {drawn}: recordings' sentences"] = summary(
        split(scores["adapter, sampling"])[1]
    )
    return rows


def vocoder() -> list[float]:
    "Similarity of the speaker's held-out recordings after the vocoder alone, with nothing rounded."
    judges, config = default_judges(), load_codec("world").config
    held = [c for c in load_corpus(embedded_corpus()) if c.extra["split"] == "held_out"]
    voices = {c.id: voice_of([load_audio(c.audio[-1])], 24000, judges) for c in held}
    targets = {}
    for c in held:
        mean = sum(voice for id, voice in voices.items() if id != c.id)
        targets[c.id] = mean / (mean @ mean) ** 0.5
    clips = []
    for recorded in speech_of(held):
        frame = 24000 // 25
        x = recorded.waveform.numpy()
        y = world_synthesis(world_features(x[: len(x) // frame * frame], config), config)
        clips.append(Speech(recorded.id, recorded.text, recorded.codes, None, 24000, y))
    judges.transcribe = judges.opinion = None
    found = evaluate({"vocoder": clips}, judges, targets, players=0)
    return [round(x, 3) for x in found.summary()["vocoder"]["similarity"]]


def adapter(work: Path, clips: int, steps: int) -> dict:
    """The adapter of `make train`, its base, recordings and codec: the sections `adapter`,
    `codebooks`, `ladder` and one more.
    """
    texts = texts_of(work / f"prompts-{clips}.txt", clips)
    higgs_run("train", work / f"train-{steps}", steps=steps)
    out = work / f"evaluate-{steps}-{clips}"
    scenes = list(base_voices().values())[: None if clips == PROMPTS else 1]
    options = dict(run=str(work / f"train-{steps}"), texts=str(texts), voices=scenes, **DRAWN)
    higgs_run("evaluate", out, **options)
    judged = load_json(out / "evaluate.json")
    rows = adapter_arms(judged["arms"]["scores"])
    similarity = {name: [round(x, 4) for x in row["similarity"]] for name, row in rows.items()}
    ladder = {
        "her recordings": similarity["recordings"],
        "vocoder, nothing rounded": vocoder(),
        "codec": similarity["codec"],
        "adapter, greedy": similarity["adapter, greedy: prompts"],
        "base, nearest of its voices": similarity["base in the nearest of its voices: prompts"],
        "base, no voice asked for": similarity["base, greedy: prompts"],
    }
    codebooks = {name: summary(s) for name, s in judged["codebooks"]["scores"].items()}
    same = judged["merged_gives_same_codes"]
    return {
        "adapter": rows,
        "codebooks": codebooks,
        "ladder": ladder,
        "merged_gives_same_codes": same,
    }


def rehearsal(work: Path, clips: int, steps: int) -> dict:
    "The control `without rehearsal`, on 60 prompts."
    texts = texts_of(work / f"control-{min(clips, 60)}.txt", min(clips, 60))
    higgs_run("train", work / f"unrehearsed-{steps}", steps=steps, rehearse=0.0)
    out = work / f"evaluate-unrehearsed-{steps}-{clips}"
    higgs_run("evaluate", out, run=str(work / f"unrehearsed-{steps}"), texts=str(texts), swap=1)
    scores = load_json(out / "evaluate.json")["arms"]["scores"]
    return {"controls": {"without rehearsal": summary(split(scores["adapter, greedy"])[0])}}


SECTIONS = {"adapter": adapter, "rehearsal": rehearsal}


def sections(given: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    "The name of each section that was asked for, and what it measured."
    for name in [given.only] if given.only else SECTIONS:
        yield name, SECTIONS[name](given.out, given.clips, given.steps)
    if given.voices:
        yield "voices", measure(given.voices, given.clips)


def merged(results: dict, measured: dict) -> dict:
    "The results with what was measured now; a control is replaced alone."
    new = {**results, **measured}
    if "controls" in measured:
        new["controls"] = {**results["controls"], **measured["controls"]}
    return new


def main(arguments: list[str] | None = None) -> None:
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SECTIONS, help="measure this section alone")
    parser.add_argument(
        "--clips", type=int, default=PROMPTS, help="prompts that are spoken; fewer for a trial"
    )
    parser.add_argument("--steps", type=int, default=300, help="of training; fewer for a trial")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/scores"),
        help="folder of runs, clips and the new file",
    )
    parser.add_argument(
        "--voices", type=Path, help="the synthetic voices: measure the base in them"
    )
    parser.add_argument(
        "--commit", action="store_true", help="write the committed file; only after a full run"
    )
    given = parser.parse_args(arguments)
    if given.commit and (given.clips, given.steps) != (PROMPTS, 300):
        parser.error("--commit is for a full run, without --clips and --steps")
    results, new = load_json(RESULTS), given.out / "small_base.json"
    results["from"] = {
        **results.get("from", {}),
        **{name: f"kept; needs {what}" for name, what in NEEDS.items()},
    }
    for name, measured in sections(given):
        results = merged(results, measured)
        note = (
            f"benchmarks/small_base.py, section {name}, {given.clips} prompts, {given.steps} steps"
        )
        results["from"].update(
            {f"{key}: {name}" if key == "controls" else key: note for key in measured}
        )
        write_json(new, results)
        print(f"{name}: in {new}")
    if given.commit:
        write_json(RESULTS, results)


if __name__ == "__main__":
    main()
