"""Packed batches of the embedded corpus: nothing is padded, rows are full, and a resumed epoch
goes on where it stopped.
"""

import soundfile
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from higgs_nb.data.collator import PackedBatchSampler, PackedCollator
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.corpus_split import split_corpus
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.model import tiny_config


class Silence:
    "Codes of a recording's true length, without the cost of encoding it."

    def get(self, audio):
        info = soundfile.info(audio.path)
        return torch.zeros(8, -(-info.frames * 25 // info.samplerate), dtype=torch.long)


def corpus():
    tokenizer = byte_tokenizer()
    train, _ = split_corpus(load_corpus(embedded_corpus()))
    return SampleDataset(
        train, tokenizer, Silence(), AudioTokens.from_config(tiny_config(tokenizer), tokenizer)
    )


def test_rows_are_full():
    data = corpus()
    for budget in (2048, 4096):
        sampler = PackedBatchSampler(data.lengths, budget)
        for epoch in range(3):
            rows = sampler.batches(epoch)
            assert sorted(i for row in rows for i in row) == list(range(len(data)))
            assert max(sum(data.lengths[i] for i in row) for row in rows) <= budget
            tokens = sum(
                PackedCollator(data.tokens)([data[i] for i in row])["input_ids"].numel()
                for row in rows
            )
            assert tokens == sum(data.lengths), "a packed batch holds no padding"
        # what filling every row to the budget would add, but for the last, which holds what is
        # left over
        full = sorted(sum(data.lengths[i] for i in row) for row in rows)[1:]
        assert 1 - sum(full) / (len(full) * budget) < 0.03


def test_a_resumed_epoch_goes_on_where_it_stopped():
    data = corpus()

    def loader():
        sampler = PackedBatchSampler(data.lengths, 2048, seed=3)
        sampler.set_epoch(2)
        return DataLoader(data, batch_sampler=sampler, collate_fn=PackedCollator(data.tokens))

    whole, rest = list(loader()), list(skip_first_batches(loader(), 5))
    assert len(rest) == len(whole) - 5
    for a, b in zip(whole[5:], rest):
        assert torch.equal(a["input_ids"], b["input_ids"])
