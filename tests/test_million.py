"""What a table and packs give is what lists and single files gave: the same samples, lengths,
batches and first batch, at ten thousand rows; and no row of them becomes an object for it.
"""

import gc
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script

from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.collator import PackedBatchSampler, PackedCollator
from higgs_nb.data.corpus import load_corpus
from higgs_nb.data.corpus_table import CorpusTable
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.tasks import large_corpus
from higgs_nb.tasks.corpus import read_corpus
from higgs_nb.tasks.settings import Settings
from higgs_nb.tasks.sides import spoken
from higgs_nb.training.batches import CollateOrBlank, Ids, Shard
from higgs_nb.training.identity import describe_data

ROWS = 10_000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The corpus of benchmarks/corpus.py."
    module = load_script("corpus")
    module.FRAMES = 5
    folder = tmp_path_factory.mktemp("corpus")
    module.make_corpus(folder, ROWS)
    return module, folder


@pytest.fixture(scope="module")
def both(made):
    "The data set from a table, and the reference in memory."
    module, folder = made
    tokenizer = byte_tokenizer()
    tokens = AudioTokens.from_tokenizer(tokenizer, 1024, 8)
    store = CodeStore(folder / "codes", module.NoCodec())
    _, table = module.open_table(folder)
    _, listed = module.open_json(folder)
    table = SampleDataset(table, tokenizer, store, tokens)
    return table, SampleDataset(listed, tokenizer, module.OnlyGet(store), tokens)


def test_conversations_are_the_same(both):
    table, listed = both
    assert len(table) == len(listed) == ROWS - ROWS // 100
    assert list(table.conversations) == listed.conversations
    assert list(Ids(table.conversations)) == [c.id for c in listed.conversations]


def test_lengths_and_the_order_of_every_epoch_are_the_same(both):
    table, listed = both
    assert table.has_counted_frames and not listed.has_counted_frames
    assert table.lengths == listed.lengths
    samplers = [PackedBatchSampler(data.lengths, 2048, seed=3) for data in both]
    for epoch in (0, 1, 5):
        assert samplers[0].batches(epoch) == samplers[1].batches(epoch)
    for rank in range(3):
        shards = [Shard(sampler, rank, 3) for sampler in samplers]
        assert list(shards[0]) == list(shards[1])


def test_the_first_batch_is_the_same(both):
    collate = PackedCollator(both[0].tokens)
    rows = PackedBatchSampler(both[0].lengths, 2048, seed=3).batches(0)[0]
    a, b = (collate([data[i] for i in rows]) for data in both)
    for key, value in a.items():
        assert torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key], key


def with_rows(data, conversations):
    "The data set of some of its conversations, which knows nothing of them yet."
    return SampleDataset(conversations, data.tokenizer, data.store, data.tokens)


def test_a_table_is_described_as_its_rows_are(both):
    "The same digest, wherever the rows are kept and however many are looked at together."
    table, listed = both
    described = describe_data(table)
    assert described == describe_data(with_rows(table, listed.conversations))
    joined = table.conversations[:3000] + listed.conversations[3000:]
    assert described == describe_data(with_rows(table, joined))
    swapped = [listed.conversations[1], listed.conversations[0], *listed.conversations[2:]]
    other = describe_data(with_rows(table, swapped))
    assert other["tokens"] == described["tokens"] and other["sha256"] != described["sha256"]


def begun(data):
    "What a run computes of its data before the first step."
    with_speech = spoken(data.conversations)
    sampler = PackedBatchSampler(data.lengths, 2048, seed=3)
    blank = CollateOrBlank(None, data)
    return with_speech, describe_data(data), sampler.batches(0), blank


def test_no_row_becomes_a_conversation_but_those_that_are_looked_at(both, monkeypatch):
    "One of each form, the samples whose tensors are described, and those of a first sample."
    made, conversation = [], CorpusTable.conversation
    monkeypatch.setattr(
        CorpusTable,
        "conversation",
        lambda self, *row: made.append(row[0]) or conversation(self, *row),
    )
    begun(with_rows(both[0], both[0].conversations))
    assert 0 < len(made) < 200, "of 9900 rows"


def test_memory_grows_by_a_few_bytes_for_each_row(both):
    "Of a row its place and its length are kept, and numbers of its batch. As objects it is 1,300."
    table = both[0].conversations

    def grown(first, rows):
        "Bytes of Python and numpy that are kept of what was begun, and the most at one time."
        gc.collect()
        tracemalloc.start()
        data = with_rows(both[0], table[:rows])
        held = begun(data)[:first]
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return np.array([kept, most]) if held else 0

    grown(4, 100)  # fills what is filled once
    without_batches, with_batches = ((grown(n, 9500) - grown(n, 4500)) / 5000 for n in (2, 4))
    assert without_batches[0] < 24 and with_batches[0] < 32
    assert max(without_batches[1], with_batches[1]) < 200


def test_a_table_is_shared_by_processes_and_not_copied(both):
    "What goes to a worker of a data loader is the path and the numbers of the rows."
    state = both[0].conversations.__getstate__()
    assert set(state) == {"path", "rows"}
    again = object.__new__(CorpusTable)
    again.__setstate__(state)
    assert np.array_equal(again.rows, both[0].conversations.rows)
    assert again[5] == both[0].conversations[5]
    store = both[0].store.packs[0].__getstate__()
    assert set(store) == {"folder", "fingerprint"}


def test_load_corpus_reads_the_same_rows(made):
    "The table is of `metadata.json`, row by row."
    _, folder = made
    table = CorpusTable(folder / "corpus.arrow")
    corpus = load_corpus(folder)
    assert len(table) == len(corpus)
    assert all(a == b for a, b in zip(table[::97], corpus[::97], strict=True))


def test_a_run_opens_a_large_corpus_by_its_table(made, monkeypatch, capsys):
    "No recording is read, none is held in memory, and a changed metadata.json is noticed."
    module, folder = made
    given = dict(data=str(folder), learn_references=False, max_clips=0, max_duration_s=30.0)
    settings = Settings("train", given, dict.fromkeys(given, "given"))
    inputs = SimpleNamespace(codec=module.NoCodec(), codec_name="made up")
    assert large_corpus.large_table(settings) is None, "so small a corpus is read"
    monkeypatch.setattr(large_corpus, "TABLE_FROM", ROWS)
    corpus = read_corpus(settings, inputs)
    assert isinstance(corpus.train, CorpusTable) and isinstance(corpus.spoken_train, CorpusTable)
    assert (len(corpus.spoken_train), len(corpus.spoken_held)) == (9900, 100)
    store = CodeStore(folder / "codes", module.NoCodec())
    assert store.encode_all(corpus.recordings, False) == dict(clips=ROWS, hits=ROWS, misses=0)
    assert corpus.typical(store) in list(corpus.held)
    few = large_corpus.read_table(corpus.report.table, replace_values(settings, max_clips=7))
    assert (len(few.train), len(few.held)) == (7, 7)
    with open(folder / "metadata.json", "a") as file:
        file.write(" ")
    assert large_corpus.large_table(settings) is None
    assert "metadata.json has changed since corpus.arrow was made of it" in capsys.readouterr().out


def replace_values(settings, **values):
    "Settings with other values."
    given = settings.values | values
    return Settings("train", given, dict.fromkeys(given, "given"))
