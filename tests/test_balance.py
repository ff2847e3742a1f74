"""Samples that are drawn: speakers and languages by temperature, a reference for each sample. The
same for any number of processes, and to the bit when a run resumes.
"""

import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from miniature import write_recordings, write_v3_base
from resume_job import log, make_trainer, run, said, whole_state

from higgs_nb.checkpoint.errors import CheckpointError
from higgs_nb.cli.notebooks import notebook_of
from higgs_nb.cli.planned_run import plan_of, plan_values
from higgs_nb.core.files import load_json
from higgs_nb.data.balance import Balance, draw_epoch, group_conversations, id_keys
from higgs_nb.data.blocks import speech_task
from higgs_nb.data.collator import PackedBatchSampler
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus_table import CorpusTable, write_table
from higgs_nb.data.drawn import (
    ALONE,
    AS_IT_IS,
    WITH_WORDS,
    WITHOUT,
    DrawnBatchSampler,
    DrawnDataset,
    draw_prompts,
    make_sampler,
)
from higgs_nb.data.lengths import sample_lengths
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.references import ReferencePool, ReferenceShares, follow, follow_training
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.family import HIGGS_V2, HIGGS_V3
from higgs_nb.tasks.evaluation import Division
from higgs_nb.training.batches import Shard

KILL = signal.SIGKILL
NAMES = (None, "ann", "bob", "cid")
KINDS = ("plain", "own", "own, alone", "scene", "dialogue")


class MadeUp:
    "Codes of recordings whose names begin with their frames."

    def get(self, audio):
        return torch.zeros(8, int(audio.path.split("-")[0]), dtype=torch.long)

    def frames(self, recordings):
        return np.array([self.get(audio).shape[1] for audio in recordings], np.int64)


def talk(i, speaker, frames, kind="plain", **extra):
    "A conversation of one of `KINDS`."
    voice = ("Before.", Audio(f"{frames % 7 + 1}-own.wav"))
    options = dict(reference=voice) if kind.startswith("own") else {}
    options |= dict(scene="A hall.") if kind == "scene" else {}
    options |= dict(reference=[voice, voice]) if kind == "dialogue" else {}
    words, speech = "Word " * (i % 5 + 1), Audio(f"{frames}-{i}.wav")
    c = tts_conversation(words, speech, id=str(i), speaker=speaker, **options, **extra)
    return follow(c, (None, voice[1])) if kind == "own, alone" else c


talks_of = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(1, 40), st.sampled_from(KINDS)),
    min_size=1,
    max_size=12,
).map(lambda rows: [talk(i, *row) for i, row in enumerate(rows)])
shares_of = st.tuples(st.integers(0, 10), st.integers(0, 10)).map(
    lambda pair: ReferenceShares(pair[0] / 20, pair[1] / 20)
)
TOKENIZER = byte_tokenizer()
TOKENS = AudioTokens.from_tokenizer(TOKENIZER, 1024, 8)


@settings(max_examples=60, deadline=None)
@given(talks_of, shares_of, st.integers(0, 3), st.integers(0, 2**32 - 1))
@example([talk(0, "ann", 5)], ReferenceShares(1.0), 0, 0)
def test_lengths_are_those_of_the_samples_and_every_batch_fits(talks, shares, epoch, seed):
    """Whatever is drawn: each length is exact, none is above what was announced, no sample follows
    its own recording or that of another speaker, and no batch is above the budget.
    """
    besides = [talk(99, "ann", 9)]
    options = dict(shares=shares, balance=Balance(2 if any(c.speaker for c in talks) else 1))
    data = DrawnDataset(talks, TOKENIZER, MadeUp(), TOKENS, besides=besides, **options)
    drawn = data.draws.epoch(seed, epoch)
    lengths = [len(data[drawn[i]]) for i in range(len(drawn))]
    assert drawn.lengths.tolist() == lengths
    assert (drawn.lengths <= data.draws.longest[drawn.index]).all()
    for sample in (drawn[i] for i in range(len(drawn))):
        c, made = data.conversations[sample.index], data.conversation(sample)
        assert made.audio[-1] == c.audio[-1] and made.targets == c.targets
        if sample.reference >= 0:
            source = data.conversations[sample.reference]
            assert source.speaker == c.speaker and source.audio[-1] != c.audio[-1]
            assert sample.reference < len(talks), "what comes besides lends no clips"
    budget = int(data.draws.longest.max())
    sampler = DrawnBatchSampler(data.draws, budget, seed)
    batches = sampler.batches(epoch)
    assert len(batches) == len(sampler) == len(sampler.batches(epoch + 1))
    assert all(batches), "no batch is empty"
    totals = [sum(len(data[sample]) for sample in batch) for batch in batches]
    assert max(totals) <= budget
    with pytest.raises(ValueError, match=f"does not fit a batch of {budget - 1}"):
        DrawnBatchSampler(data.draws, budget - 1, seed)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.floats(1, 1e6),
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
)
def test_a_group_comes_as_often_as_its_temperature_says(sizes, temperature, seed, epochs):
    """Over some epochs, each group has what n^(1/T) gives it, to within one conversation, and no
    conversation of a group comes twice more than another.
    """
    talks = [talk(i, f"s{g}", 5) for g, n in enumerate(sizes) for i in range(100 * g, 100 * g + n)]
    groups, often = group_conversations(talks, Balance(temperature))
    weights = np.array(sizes) ** (1 / temperature)
    assert np.allclose(often, sum(sizes) * weights / weights.sum())
    keys = id_keys(talks)
    drawn = np.concatenate([draw_epoch(groups, often, keys, seed, e) for e in range(epochs)])
    counts = np.bincount(drawn, minlength=len(talks))
    for g, expected in enumerate(often):
        of_group = counts[groups == g]
        assert abs(of_group.sum() - epochs * expected) <= 1 + 1e-6
        assert np.ptp(of_group) <= 1


def many(count=400):
    "Conversations of 20 speakers."
    return [talk(i, f"speaker {i % 20}", i % 30 + 1) for i in range(count)]


def test_without_temperature_or_shares_nothing_changes():
    "The order of a run without parameters is what it was; with references, each comes once."
    talks = many()
    plain = SampleDataset(talks, TOKENIZER, MadeUp(), TOKENS)
    ordinary = make_sampler(plain, 600, 5, True)
    assert type(ordinary) is PackedBatchSampler
    assert ordinary.batches(2) == PackedBatchSampler(plain.lengths, 600, 5).batches(2)
    data = DrawnDataset(talks, TOKENIZER, MadeUp(), TOKENS, shares=ReferenceShares(0.5))
    held = make_sampler(data, 600, 5, False)
    assert type(held) is PackedBatchSampler, "held-out data come as they are"
    sampler = make_sampler(data, 600, 5, True)
    for epoch in range(3):
        order = Counter(s.index for batch in sampler.batches(epoch) for s in batch)
        assert order == Counter(range(len(talks)))


def test_the_draw_is_a_function_of_seed_and_epoch(tmp_path):
    "From a list and from a table, in one process and in three; another for each epoch and seed."
    talks = many()
    table = CorpusTable(write_table(tmp_path, talks))
    store = SimpleNamespace(get=MadeUp().get, frames=MadeUp().frames)

    def short(audio):
        return Audio(audio.path.rpartition("/")[2])

    store.frames = lambda recordings: MadeUp().frames([short(a) for a in recordings])
    store.get = lambda audio: MadeUp().get(short(audio))
    how = dict(balance=Balance(2), shares=ReferenceShares(0.5, 0.3))
    listed, stored = (
        DrawnBatchSampler(DrawnDataset(c, TOKENIZER, store, TOKENS, **how).draws, 700, seed=3)
        for c in (talks, table)
    )
    seen = []
    for epoch in (0, 1, 4):
        batches = listed.batches(epoch)
        assert batches == stored.batches(epoch)
        seen.append(batches)
        parts = []
        for rank in range(3):
            shard = Shard(stored, rank, 3)
            shard.set_position(epoch)
            parts.append(list(shard))
        together = [batch for row in zip(*parts, strict=True) for batch in row if batch]
        assert together == batches
        shard.set_position(epoch, 2)
        assert list(shard) == parts[-1][2:]
    assert seen[0] != seen[1] and listed.batches(0) == seen[0]
    other = DrawnBatchSampler(listed.draws, 700, seed=4)
    assert other.batches(0) != seen[0]


def test_a_recording_in_two_rows_is_one_clip():
    "Neither of the two rows follows it, and the weights of a mixture repeat rows."
    first, other = talk(0, "ann", 5), talk(1, "ann", 6)
    again = replace(talk(2, "ann", 5), messages=first.messages)
    pool = ReferencePool([first, other, again, first])
    assert len(pool.clips) == 2
    random = np.arange(1000, dtype=np.uint64)
    for sample in (0, 2, 3):
        assert set(pool.choose(np.full(1000, sample), random)) == {1}


def test_speakers_of_two_corpora_are_two():
    "Each corpus numbers its speakers from 1."
    talks = [talk(i, "1", 5, corpus=name) for i, name in enumerate(["en", "en", "fr", "fr"])]
    pool = ReferencePool(talks)
    random = np.arange(4, dtype=np.uint64)
    assert pool.choose(np.arange(4), random).tolist() == [1, 0, 3, 2]
    _, often = group_conversations([*talks, talk(9, "1", 5, corpus="en")], Balance(1e9))
    assert np.allclose(often, 2.5)


def test_held_out_sentences_follow_training():
    "Always the same clip of the training side, with its words unless only the sound is asked for."
    talks, held = many(), [talk(1000 + i, f"speaker {i}", 5) for i in range(25)]
    pool = ReferencePool(talks)
    asked = follow_training(held, talks, pool, ReferenceShares(0.5))
    assert asked == follow_training(held, talks, pool, ReferenceShares(0.5))
    trained = {c.audio[0] for c in talks}
    for before, after in zip(held, asked):
        known = int(before.speaker.split()[1]) < 20
        assert after.audio[-1] == before.audio[-1] and after.transcript == before.transcript
        assert len(after.audio) == 1 + known and set(after.audio[:-1]) <= trained
    alone = follow_training(held[:1], talks, pool, ReferenceShares(alone=0.5))
    assert [m.role for m in alone[0].messages] == ["system", "user", "user", "assistant"]


@pytest.mark.parametrize("family", [HIGGS_V2, HIGGS_V3])
def test_both_families_have_all_three_prompts(family):
    "The shares of V3's three forms come of the same draw, and the order of the corpus is nothing."
    reference = ("Ref.", Audio("5-ref.wav"))
    talks = [replace(talk(i, None, 5), id=str(i)) for i in range(400)]
    talks = [follow(c, reference) for c in talks]
    pool, shares = ReferencePool(talks), ReferenceShares(0.5, 0.3)
    prompt, _ = draw_prompts(pool, shares, np.arange(400), 0, 0)
    counts = np.bincount(prompt, minlength=4)
    assert abs(counts[ALONE] - 120) < 30 and abs(counts[WITHOUT] - 80) < 30
    backwards, _ = draw_prompts(ReferencePool(talks[::-1]), shares, np.arange(400), 0, 0)
    assert (backwards[::-1] == prompt).all()
    tokenizer = byte_tokenizer(family)
    tokens = AudioTokens.from_tokenizer(tokenizer, 1024, 8)
    data = DrawnDataset(talks, tokenizer, MadeUp(), tokens, shares=shares)
    drawn = data.draws.epoch(0, 0)
    for i in range(0, 400, 20):
        c = data.conversation(drawn[i])
        words, recording = prompt[i] == WITH_WORDS, prompt[i] != WITHOUT
        if family is HIGGS_V3:
            task = speech_task(c, family.template)
            assert (task.reference_text is not None, task.reference is not None) == (
                words,
                recording,
            )
            assert task.learned and task.text == c.transcript
        length = sample_lengths([c], tokenizer, MadeUp(), tokens)[0]
        assert length == drawn.lengths[i] == len(data[drawn[i]])
    off = DrawnDataset(talks, tokenizer, MadeUp(), tokens)
    assert set(off.draws.epoch(0, 0).prompt) == {AS_IT_IS}


def test_a_drawn_run_resumes_to_the_bit(tmp_path):
    "Two processes, killed in the middle of an epoch; other shares are another run."
    options = dict(ranks=2, drawn=True, token_budget=330, max_steps=16, save_steps=5, eval_steps=8)
    options |= dict(save_total_limit=5)
    assert run(tmp_path / "whole", **options) == [0, 0], said(tmp_path / "whole")
    killed = tmp_path / "killed"
    assert run(killed, die=(7, KILL), **options) == [-KILL, -KILL], said(killed)
    assert run(killed, resume="auto", **options) == [0, 0], said(killed)
    assert log(killed) == log(tmp_path / "whole")
    states = [whole_state(folder / "checkpoint-15") for folder in (killed, tmp_path / "whole")]
    assert states[0] == states[1]
    options = {k: v for k, v in options.items() if k != "ranks"}
    trainer = make_trainer(tmp_path / "killed", **options)
    trainer.train_dataset.shares = ReferenceShares(0.4, 0.2)
    with pytest.raises(CheckpointError, match=r"drawn\.references\.with_words: 0\.5 then, 0\.4"):
        trainer.train("auto")


def test_an_evaluation_speaks_as_the_run_was_trained():
    "Held-out sentences get a clip from training; texts without a speaker stay as they are."
    trained, held = many(40), [talk(100, "speaker 3", 5), tts_conversation("Hi.", id="text")]
    asked = Division(reference_share=0.5, seed=2).as_trained(held, trained)
    assert asked[0].audio[0] in {c.audio[0] for c in trained if c.speaker == "speaker 3"}
    assert asked[0].audio[-1] == held[0].audio[-1] and asked[1] == held[1]
    assert Division().as_trained(held, trained) == held


def test_a_plan_knows_that_samples_have_references():
    "The longest sample is as long as two clips."
    plans = [
        plan_of("tiny", plan_values("tiny", pairs))
        for pairs in ([], [["reference_alone_share", "0.2"]])
    ]
    assert [plan.settings.max_duration_s for plan in plans] == [30, 60]


@pytest.fixture(scope="module")
def two_speakers(tmp_path_factory):
    "A table of six clips of two speakers."
    folder = write_recordings(tmp_path_factory.mktemp("two") / "recordings", 6)
    lines = ["file_name,text,speaker,locale"]
    for i, file in enumerate(sorted(folder.glob("*.opus"))):
        text = file.with_suffix(".txt")
        speaker, locale = ("ann", "en") if i < 4 else ("bob", "fr")
        lines.append(f'{file.name},"{text.read_text().strip()}",{speaker},{locale}')
        text.unlink()
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", ["tiny V2", "small V3"])
def test_a_run_that_draws(family, two_speakers, tmp_path, capsys):
    "From the parameters of the notebook to an adapter, with held-out sentences in both voices."
    base = "tiny"
    if family == "small V3":
        base = str(tmp_path / "base")
        write_v3_base(tmp_path / "base", dict(codec="world", learning_rate=5e-3, rehearse=0.5))
    given = dict(data=str(two_speakers), base=base, steps=4, eval_every=2.0, save_every=4.0)
    given |= dict(held_out=0.3, per_speaker=True, token_budget=1280, rank=2, max_speech_s=0.4)
    given |= dict(speaker_temperature=2.0, language_temperature=3.0, speak=1, table=1)
    given |= dict(reference_share=0.6, reference_alone_share=0.2, out=str(tmp_path / "run"))
    namespace = dict(__name__="__main__")
    (tmp_path / "run").mkdir()
    matplotlib.use("agg")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("higgs_nb.tasks.speaking.missing_judges", lambda: ["all"])
        for cell in (c for c in nbformat.read(notebook_of("train"), 4).cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, "train", "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", ()):
                namespace |= given
    matplotlib.pyplot.close("all")
    assert "references are drawn from" in capsys.readouterr().out
    record = load_json(tmp_path / "run/run.json")
    assert record["finished"] and record["parameters"]["reference_share"] == 0.6
    trainer = namespace["trainer"]
    assert isinstance(trainer.train_dataset, DrawnDataset)
    held = namespace["corpus"].held
    assert {len(c.audio) for c in held if c.speaker == "ann"} == {2}
    assert record["corpus"]["held_out_clips"] == len(held)
