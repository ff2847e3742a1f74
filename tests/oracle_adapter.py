"""The bridge from recordings of the original implementation to ours; it knows the recordings' form and none of their cases."""
from types import SimpleNamespace

from transformers import WhisperFeatureExtractor

from higgs_nb.collator import HiggsAudioSampleCollator


def collate(samples: list[dict], **kwargs) -> dict:
    "The batch of the original from a list of its sample's fields, and the keyword arguments of its collator."
    kwargs = {"chunk_size_seconds": 30, **kwargs}
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=kwargs["chunk_size_seconds"])
    return HiggsAudioSampleCollator(SimpleNamespace(feature_extractor=extractor), **kwargs)(samples)
