"""A miniature of the released Higgs Audio V2: stock classes and the released file layout, with a
tokenizer that has the same special tokens, and a folder of recordings.
"""

import shutil
from pathlib import Path

import torch
from transformers import (
    DacFeatureExtractor,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerModel,
)

from higgs_nb.cli.processor import chat_template
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.model.model import tiny_config

SIZES = dict(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96)


def write_base(folder, codec=None, tokenizer=None):
    """A base as transformers saves it; `codec`: a folder, which its processor names; `tokenizer`:
    another one than that of bytes.
    """
    tokenizer = tokenizer or byte_tokenizer()
    config = tiny_config(tokenizer, **SIZES)
    torch.manual_seed(0)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if codec:
        audio_tokenizer = HiggsAudioV2TokenizerModel.from_pretrained(codec)
        extractor = DacFeatureExtractor(sampling_rate=24000, hop_length=960)
        template = dict(chat_template=chat_template())
        processor = HiggsAudioV2Processor(extractor, tokenizer, audio_tokenizer, **template)
        processor.save_pretrained(folder)
    return Path(folder)


def write_recordings(folder, count=8):
    "A folder in which each recording has its words beside it, as people have them."
    folder = Path(folder)
    folder.mkdir(parents=True)
    for c in load_corpus(embedded_corpus())[:count]:
        source = Path(c.audio[-1].path)
        shutil.copy(source, folder / source.name)
        (folder / source.name).with_suffix(".txt").write_text(c.transcript, encoding="utf-8")
    return folder
