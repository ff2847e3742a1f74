"""Miniatures of the released models: their classes and file layouts, with tokenizers that have the
same special tokens, and a folder of recordings.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DacFeatureExtractor,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerModel,
    PreTrainedTokenizerFast,
)

from higgs_nb.cli.processor import chat_template
from higgs_nb.core.files import write_json
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.family import HIGGS_V3
from higgs_nb.model.model import tiny_config
from higgs_nb.model.native import AUDIO, CODEC, COPIES, NATIVE, QWEN3_FIELDS, TEXT
from higgs_nb.model.v3 import HiggsAudioV3Config, HiggsAudioV3ForTraining, tiny_v3_config

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


V3_SIZES = dict(hidden_size=64, num_layers=2, head_dim=32, intermediate_size=96)
FIRST_MARK = 151665  # of V3's own tokens in the released vocabulary


def v3_tokenizer():
    "One token per byte, and V3's special tokens under their released ids."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end, *marks = HIGGS_V3.special.names
    unused = [f"<unused {i}>" for i in range(FIRST_MARK - len(alphabet) - 1)]
    before = HIGGS_V3.released_ids["pad"] - len(alphabet)
    words = [*alphabet, *unused[:before], end, *unused[before:]]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([end, *marks])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)


def native_config(config):
    "The published, nested form of a configuration."
    text = {k: getattr(config, k) for k in (*QWEN3_FIELDS, "rope_parameters")}
    audio = dict(encoder_type="discrete", use_delay_pattern=True, tie_word_embeddings=True)
    audio |= dict(num_codebooks=config.num_codebooks, vocab_size=config.codebook_size)
    nested = dict(architectures=["HiggsMultimodalQwen3ForConditionalGeneration"])
    nested |= dict(model_type=HIGGS_V3.architecture.model_type, audio_token_id=-100)
    nested[AUDIO] = audio | dict(out_dim=config.hidden_size)
    return nested | {TEXT: text | dict(model_type="qwen3", pad_token_id=None)}


def native_tensors(model, codec_parts=528):
    "The tensors of a model under their published names, with copies and a codec beside them."
    state, named = model.state_dict(), {}
    for name, tensor in state.items():
        ours, theirs = next(pair for pair in NATIVE.items() if name.startswith(pair[0]))
        named[theirs + name.removeprefix(ours)] = tensor
    parts = torch.Generator().manual_seed(1)
    for i in range(codec_parts):
        named[f"{CODEC}part.{i}"] = torch.randn(3, generator=parts).bfloat16()
    heads = {n: state[t].clone() for n, t in COPIES.items() if n.startswith("tied.head")}
    return named, heads


@torch.no_grad()
def end_early(model):
    """Let a V3 model with random weights end each clip as soon as it may: all embeddings share a
    large first number, and so does the row of the first codebook's EOS, three times as large.
    """
    table = model.model.embed_audio_tokens.weight
    model.model.embed_tokens.weight[:, 0] = 1
    table[:, 0] = 1
    table[model.config.audio_stream_eos_id, 0] = 3


def write_v3_base(folder, recipe=None, ends=False, **sizes):
    """A small Higgs Audio V3 as it is published: two files, doubled heads, 528 tensors of a codec,
    an index. `recipe`: written beside it; `ends`: see `end_early`. Returns the folder.
    """
    folder = Path(folder)
    tokenizer = v3_tokenizer()
    sizes = V3_SIZES | sizes
    config = tiny_v3_config(tokenizer, **sizes)
    config.vocab_size = HiggsAudioV3Config.vocab_size
    torch.manual_seed(0)
    model = HiggsAudioV3ForTraining(config).to(torch.bfloat16)
    if ends:
        end_early(model)
    listed, heads = native_tensors(model)
    files = {f"model-0000{i}-of-00002.safetensors": {} for i in (1, 2)}
    names = list(files)
    for i, (name, tensor) in enumerate((listed | heads).items()):
        files[names[i % 2]][name] = tensor
    folder.mkdir(parents=True)
    for file, part in files.items():
        save_file(part, folder / file, {"format": "pt"})
    index = {name: file for file, part in files.items() for name in part if name in listed}
    write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map=index))
    write_json(folder / "config.json", native_config(config))
    (folder / "LICENSE").write_text(f"{HIGGS_V3.licence}\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    if recipe is not None:
        write_json(folder / "recipe.json", recipe)
    return folder
