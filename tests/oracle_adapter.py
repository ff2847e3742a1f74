"""The bridge from recordings of the original implementation to ours; it knows the recordings' form
and none of their cases.
"""

from types import SimpleNamespace

from transformers import WhisperFeatureExtractor

from higgs_nb.original.collator import HiggsAudioSampleCollator
from higgs_nb.original.convert import from_original, native_batch


def collate(samples: list[dict], **kwargs) -> dict:
    """The batch of the original from a list of its sample's fields, and the keyword arguments of
    its collator.
    """
    kwargs = {"chunk_size_seconds": 30, **kwargs}
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=kwargs["chunk_size_seconds"])
    return HiggsAudioSampleCollator(SimpleNamespace(feature_extractor=extractor), **kwargs)(samples)


def load(config: dict, state_dict: dict):
    "Our model from the original's configuration and weights."
    return from_original(config, state_dict)


def forward(model, run: dict, inputs: dict) -> dict:
    """Logits of every position of the original's expanded grid (batch, positions, vocabulary), of
    its spoken frames (frames, codebooks, codes), and the parts of the loss where there are
    labels. With gradients, unless the caller turned them off.
    """
    batch = native_batch(inputs, model.config)
    hidden = model.hidden(**batch)
    losses = model.losses(
        hidden, *(batch[k] for k in ("text_rows", "text_targets", "audio_rows", "audio_targets"))
    )
    return dict(
        logits=model.text_lm_head(hidden).view(*batch["input_ids"].shape, -1),
        audio_logits=model.audio_logits(hidden[batch["audio_out_rows"]]),
        **losses,
    )
