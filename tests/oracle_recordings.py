"""The recordings of the original implementation: their reader, and the command that makes the
compact part.

    python tests/oracle_recordings.py FOLDER    # the whole recordings -> tests/oracle

The compact part has every case and every variant. Of the largest outputs it keeps every eighth
number; see `thin`.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

COMPACT = Path(__file__).parent / "oracle"
STEP = 8  # the compact part keeps one number of so many
SAMPLE_FIELDS = (
    "input_ids",
    "label_ids",
    "audio_ids_concat",
    "audio_ids_start",
    "audio_waveforms_concat",
    "audio_waveforms_start",
    "audio_sample_rate",
    "audio_speaker_indices",
)
BATCH_FIELDS = (
    "input_ids",
    "attention_mask",
    "audio_features",
    "audio_feature_attention_mask",
    "audio_out_ids",
    "audio_out_ids_start",
    "audio_in_ids",
    "audio_in_ids_start",
    "label_ids",
    "label_audio_ids",
    "audio_out_ids_start_group_loc",
    "reward",
)


def thin(x: Tensor) -> Tensor:
    """Every eighth number of the last dimension; row r starts with number r % 8, so that no column
    is left out.
    """
    rows, width = x[..., 0].numel(), x.shape[-1] // STEP
    columns = torch.arange(rows)[:, None] % STEP + STEP * torch.arange(width)
    return x.reshape(rows, -1).gather(1, columns).view(*x.shape[:-1], width)


def agrees(got: Tensor | None, expected: Tensor | None, tolerance: float = 0.0) -> bool:
    "The same shape, and no number further away than `tolerance`; None is an empty tensor."
    if got is None or expected is None or got.numel() == expected.numel() == 0:
        return all(x is None or x.numel() == 0 for x in (got, expected))
    same_shape = got.shape == expected.shape
    return same_shape and bool((got.float() - expected.float()).abs().max() <= tolerance)


def thinned_names(file: Path) -> set[str]:
    "The tensors of a file of the compact part that are thinned; none in a file of the whole."
    with safe_open(str(file), "pt") as opened:
        return set(json.loads((opened.metadata() or {}).get("thinned", "[]")))


class Recordings:
    """Samples, batches and models as the original made them, from the whole folder or the compact
    part.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.samples = self.read("samples.json")
        self.collator = self.read("collator.json")
        self.model = self.read("model.json")
        self.native = self.read("native.json")
        self.sample_tensors = self.tensors_of("samples")
        self.batch_tensors = self.tensors_of("collator")
        self.model_tensors = self.tensors_of("model")
        self.thinned = {
            name: thinned_names(self.folder / f"{name}.safetensors")
            for name in ("collator", "model")
        }

    def read(self, name: str):
        "A JSON file of the recordings."
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        "All tensors of a file."
        return load_file(str(self.folder / f"{name}.safetensors"))

    def sample(self, name: str) -> dict[str, Tensor]:
        "A new copy of one sample, as a dict of the original's fields."
        return {f: self.sample_tensors[f"{name}.{f}"].clone() for f in SAMPLE_FIELDS}

    def batch_of(self, run: dict) -> list[dict[str, Tensor]]:
        "The samples of a recorded run of the collator."
        return [self.sample(name) for name in run["samples"]]

    def weights(self, variant: str) -> dict[str, Tensor]:
        "The state dict of a variant, under the original's names."
        stored = self.tensors_of("weights")
        return {k: stored[k] for k in self.model["state_dict_keys"][variant]}

    def mismatched(self, got: dict, run: dict, tolerance: float = 1e-5) -> list[str]:
        """The fields in which a batch differs from the recorded one; Whisper's features may by
        `tolerance`.
        """
        bad = []
        for field in BATCH_FIELDS:
            name = run["out"][field]
            expected = None if name is None else self.batch_tensors[name]
            ours = thin(got[field]) if name in self.thinned["collator"] else got[field]
            if not agrees(ours, expected, tolerance if field == "audio_features" else 0.0):
                bad.append(field)
        return bad

    def model_runs(self, variant: str) -> Iterator[tuple[dict, dict]]:
        "The recorded runs of a variant: what is recorded, and the original's batch."
        for run in self.model["runs"]:
            if run["variant"] == variant:
                yield run, self.named(run["inputs"])

    def named(self, names: dict) -> dict[str, Tensor | None]:
        "Tensors of the model's runs by field."
        return {k: None if n is None else self.model_tensors[n] for k, n in names.items()}

    def distance(self, got: dict, run: dict) -> float:
        """The largest difference of text logits at attended positions and of audio logits of all
        frames.
        """
        recorded = self.named(run["outputs"])
        attended = recorded["attention_mask"].bool()
        is_thin = run["outputs"]["logits"] in self.thinned["model"]
        text = thin(got["logits"]) if is_thin else got["logits"]
        pairs = [(text[attended], recorded["logits"][attended])]
        pairs.append((got["audio_logits"], recorded["audio_logits"]))
        return max((a - b).abs().max().item() for a, b in pairs if b.numel())


def large_outputs(whole: Recordings) -> dict[str, set[str]]:
    "The tensors that the compact part thins: all text logits, and Whisper features of 30 s."
    batches = (run["out"] for run in whole.collator["special"])
    features = {out["audio_features"] for out in batches} - {None}
    return {
        "model": {run["outputs"]["logits"] for run in whole.model["runs"]},
        "collator": {n for n in features if whole.batch_tensors[n].shape[-1] == 3000},
    }


def compact(folder: str | Path, out: str | Path) -> None:
    "Write the compact part of the whole recordings in `folder` to `out`; the same bytes each time."
    whole, out = Recordings(folder), Path(out)
    if any(whole.thinned.values()):
        raise ValueError(
            f"{folder} is a compact part itself: give the folder of the whole recordings"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in ("samples", "collator", "model", "native", "tokenizer"):
        shutil.copyfile(whole.folder / f"{name}.json", out / f"{name}.json")
    large = large_outputs(whole)
    for name in ("samples", "collator", "model", "native", "delay", "weights"):
        thinned = large.get(name, set())
        stored = whole.tensors_of(name)
        kept = {k: thin(v) if k in thinned else v for k, v in stored.items()}
        metadata = {"thinned": json.dumps(sorted(thinned))} if thinned else None
        save_file(kept, out / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    compact(sys.argv[1], COMPACT)
    print(f"{COMPACT}: {sum(f.stat().st_size for f in COMPACT.iterdir()) / 1e6:.1f} MB")
