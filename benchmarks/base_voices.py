"""The small base in its own voices: what is held out, spoken and judged.

`benchmarks/small_base.py --voices runs/voices` calls this; the folder is what
`nbs/runs/voices.ipynb` makes. Each held-out text was read by one voice. The base is asked for
that voice by its description, and its clips are compared with what the voice itself said.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from higgs_nb.data.audio import load_audio
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Audio, Conversation, tts_conversation
from higgs_nb.model.load import base_path, load_model
from higgs_nb.small.rehearsal import Rehearsal
from higgs_nb.speech.clips import Speech
from higgs_nb.speech.evaluate import Evaluation, evaluate
from higgs_nb.speech.generate import generate_speech
from higgs_nb.speech.judges import Judges, default_judges
from higgs_nb.speech.score import Score, voice_of

SCENES = {  # that ask the base for each of its voices
    "af_heart": "A warm American woman.",
    "af_bella": "A lively American woman.",
    "af_sarah": "A calm American woman.",
    "af_kore": "A firm American woman.",
    "af_aoede": "A gentle American woman.",
    "am_michael": "A calm American man.",
    "am_fenrir": "A deep American man.",
    "am_puck": "A lively American man.",
    "bf_emma": "A British woman.",
    "bm_george": "A British man.",
}
DRAWN = {"temperature": 0.4, "top_k": 10}
HEARD = 20  # recordings of a voice that its mean is taken of


@dataclass
class Utterance:
    "A text that a synthetic voice read."

    id: str
    kind: str  # "prompt", or the kind of an ordinary sentence
    text: str
    voice: str
    codes: torch.Tensor  # (codebooks, frames)
    file: Path

    def asked(self) -> Conversation:
        "The conversation that asks the base for this text in this voice."
        return tts_conversation(self.text, id=self.id, scene=SCENES[self.voice])

    def recorded(self) -> np.ndarray:
        "What the voice said: (samples,) at 24 kHz."
        return load_audio(Audio(str(self.file)))


def base_voices() -> dict[str, str]:
    "The description of each voice that the base was trained on."
    known = set(Rehearsal.load(base_path("small"), load_codec("world")).voices)
    return {voice: scene for voice, scene in SCENES.items() if voice in known}


def utterances(folder: Path, split: str, voices: set[str]) -> list[Utterance]:
    "Those of one side that these voices read."
    found, at = [], 0
    with safe_open(folder / "codes.safetensors", "pt") as file:
        rows, codes = json.loads(file.metadata()["rows"]), file.get_slice("codes")
        for row in rows:
            frames, size = row["frames"][0], sum(row["frames"])
            if row["split"] == split and row["speaker_id"] in voices:
                clip = codes[:, at : at + frames].long()
                place = folder / f"audio/{row['id']}.flac"
                found.append(
                    Utterance(row["id"], row["kind"], row["text"], row["speaker_id"], clip, place)
                )
            at += size
    return found


def targets(folder: Path, voices: set[str], judges: Judges) -> dict[str, np.ndarray]:
    "The mean voice of each speaker, from recordings that the base was trained on."
    found = {}
    for voice in sorted(voices):
        known = utterances(folder, "train", {voice})[:HEARD]
        found[voice] = voice_of([u.recorded() for u in known], 24000, judges)
    return found


def recorded_arms(held: list[Utterance], codec) -> dict[str, list[Speech]]:
    "The recordings, and what the codec leaves of them."
    arms = {"synthesised originals": [], "codec": [], "codec, 4 codebooks": []}
    for u in held:
        sounds = (u.recorded(), codec.decode(u.codes), codec.decode(u.codes[:4]))
        for clips, sound in zip(arms.values(), sounds):
            clips.append(Speech(u.id, u.text, u.codes, None, 24000, torch.as_tensor(sound)))
    return arms


def spoken_arms(held: list[Utterance], codec) -> dict[str, list[Speech]]:
    "The base, greedy and drawn."
    model = load_model(base_path("small")).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(base_path("small"))
    arms = {"base, greedy": {}, "base, temperature 0.4, top 10": dict(do_sample=True, **DRAWN)}
    asked, common = [u.asked() for u in held], dict(max_frames=500, batch_size=16, progress=True)
    return {
        name: generate_speech(model, tokenizer, asked, codec, **common, **options)
        for name, options in arms.items()
    }


def rounded(scores: list[Score]) -> dict:
    "The metrics of judged clips, rounded as they are committed."
    [found] = Evaluation({"": scores}).summary().values()
    return {name: value and [round(x, 4) for x in value] for name, value in found.items()}


def measure(folder: Path, clips: int) -> dict:
    """Sections `voices`, `counts`, `by_voice` and `examples`, of at most `clips` prompts and three
    times as many ordinary sentences.
    """
    torch.manual_seed(0)
    judges, codec = default_judges(), load_codec("world")
    voices = set(base_voices())
    held = utterances(folder, "held_out", voices)
    kinds = {
        "": [u for u in held if u.kind == "prompt"][:clips],
        ": ordinary sentences": [u for u in held if u.kind != "prompt"][: 3 * clips],
    }
    means = targets(folder, voices, judges)
    wanted = {u.id: means[u.voice] for u in held}
    said = {u.id: len(u.recorded()) / 24000 for u in held}
    found = {"voices": {}, "counts": {}, "by_voice": {}, "examples": []}
    for kind, members in kinds.items():
        arms = recorded_arms(members, codec) | spoken_arms(members, codec)
        judged = evaluate(arms, judges, wanted, recorded_s=said, players=0).scores
        for arm, scores in judged.items():
            found["voices"][f"{arm}{kind}"] = rounded(scores)
            found["counts"][f"{arm}{kind}"] = len(scores)
        greedy = judged["base, greedy"]
        found["examples"] += [dict(text=s.text, heard=s.heard) for s in greedy[:6]]
        for voice in sorted(voices):
            own = {u.id for u in members if u.voice == voice}
            scores = [s for s in greedy if s.id in own]
            if scores:
                found["by_voice"][f"{voice}{kind}"] = rounded(scores)
    return found
