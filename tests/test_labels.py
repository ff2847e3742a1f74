"""Random conversations: what is supervised follows from the rule alone, in a padded and in a
packed batch, and the audit accepts it.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.data.audit import audit
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Audio, Conversation, Message, Text
from higgs_nb.data.delay import IGNORE
from higgs_nb.data.label_checks import LabelError
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.samples import encode_conversation, expand

TOKENIZER = byte_tokenizer()
TOKENS = AudioTokens.from_tokenizer(TOKENIZER, codebook_size=32, num_codebooks=8)
C = TOKENS.num_codebooks

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=8)
parts = st.one_of(texts.map(Text), st.just(Audio(path="a")))
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "scene", "user", "assistant"]),
    content=st.lists(parts, max_size=3).map(tuple),
    recipient=st.sampled_from([None, None, "all"]),
)


@st.composite
def encoded(draw):
    "A conversation, the frames of its recordings, and the encoded sample with random codes."
    turns = draw(st.lists(messages, min_size=1, max_size=5))
    conversation = Conversation(
        id="any", messages=tuple(turns), start_index=draw(st.none() | st.integers(0, len(turns)))
    )
    frames = [draw(st.integers(1, 12)) for _ in conversation.audio]
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (
        conversation,
        frames,
        encode_conversation(
            conversation, TOKENIZER, [torch.randint(0, 32, (C, n), generator=g) for n in frames]
        ),
    )


def rule(conversation, frames):
    """From the messages alone: supervised text positions; T of the clips that are trained, that
    are gated, and that are heard.
    """
    text, trained, gated, heard, frames = 0, [], [], [], iter(frames)
    for index, message in enumerate(conversation.messages):
        speaks = message.role == "assistant"
        learns = speaks and index >= (conversation.start_index or 0)
        clips = [next(frames) for part in message.content if isinstance(part, Audio)]
        (trained if learns else gated if speaks else heard).extend(clips)
        if not learns:
            continue
        text += sum(
            len(part.text.encode()) for part in message.content if isinstance(part, Text)
        ) + 2 * len(clips)  # around each clip, its begin and its end
        text += 1 + (
            len(message.recipient) + 1 if message.recipient else 0
        )  # the mark that ends the turn; whom it is said to
    return text, trained, gated, heard


def cells(clips):
    return sum(C * (n + C + 1) for n in clips)


def flat_labels(batch):
    "The labels of all real positions and of all real frames, in order."
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return batch["labels"][real], batch["audio_labels"][batch["audio_input_ids_mask"]]


def same(a, b):
    "Equal values, or lists of equal tensors."
    if isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@settings(max_examples=100, deadline=None)
@given(st.lists(encoded(), min_size=1, max_size=3), st.booleans(), st.sampled_from([1, 8]))
def test_counts_follow_from_the_rule(drawn, pad_left, round_to):
    before = copy.deepcopy([vars(sample) for _, _, sample in drawn])
    samples = [expand(sample, TOKENS, str(i)) for i, (_, _, sample) in enumerate(drawn)]
    before += copy.deepcopy([vars(s) for s in samples])
    counts = [rule(conversation, frames) for conversation, frames, _ in drawn]
    text = sum(c[0] for c in counts)
    trained, gated, heard = (sum((c[i] for c in counts), []) for i in (1, 2, 3))
    collators = PaddedCollator(TOKENS, pad_left=pad_left, round_to=round_to), PackedCollator(TOKENS)
    padded, packed = (collate(samples) for collate in collators)
    for batch, collate in zip((padded, packed), collators):
        assert len(batch["text_targets"]) == text
        assert (batch["audio_targets"] != IGNORE).sum(0).tolist() == [
            sum(n + 1 for n in trained)
        ] * C
        assert (batch["audio_targets"] == TOKENS.stream_eos).sum(0).tolist() == [len(trained)] * C
        assert not (batch["audio_labels"] == TOKENS.stream_bos).any()
        frame_at = dict(
            zip(batch["audio_positions"].tolist(), range(len(batch["audio_positions"])))
        )
        assert torch.equal(
            batch["input_ids"].flatten()[batch["text_rows"] + 1], batch["text_targets"]
        )
        assert torch.equal(
            batch["audio_labels"][batch["audio_input_ids_mask"]][
                [frame_at[row + 1] for row in batch["audio_rows"].tolist()]
            ],
            batch["audio_targets"],
        )
        for name, value in collate(samples).items():
            assert (
                torch.equal(value, batch[name])
                if isinstance(value, torch.Tensor)
                else value == batch[name]
            ), name
        if not text:
            with pytest.raises(LabelError, match="nothing in this batch is supervised"):
                audit(batch, TOKENIZER, TOKENS)
            continue
        seen = audit(batch, TOKENIZER, TOKENS)
        assert seen.text_totals["supervised"] == text
        assert seen.text_totals["placeholder"] == sum(n + C + 1 for n in trained + gated + heard)
        assert sum(seen.text_totals.values()) == batch["input_ids"].numel()
        assert seen.text_totals["pad"] == batch["input_ids"].numel() - sum(map(len, samples))
        wanted = {
            "supervised": C * sum(n + 1 for n in trained),
            "BOS": C * len(trained),
            "delay padding": C * (C - 1) * len(trained),
            "gate": cells(gated),
            "reference": cells(heard),
            "pad": batch["audio_input_ids"].numel() - cells(trained + gated + heard),
            "prompt": 0,
            "placeholder": 0,
        }
        assert seen.cell_totals == wanted
    for a, b in zip(flat_labels(padded), flat_labels(packed)):
        assert torch.equal(a, b)
    for name in ("text_targets", "audio_targets"):
        assert torch.equal(padded[name], packed[name])
    for then, now in zip(
        before, [vars(s) for _, _, s in drawn] + [vars(s) for s in samples], strict=True
    ):
        for name, value in then.items():
            assert same(now[name], value), name


@settings(max_examples=50, deadline=None)
@given(encoded())
def test_codes_come_back_from_the_labels(drawn):
    "Codebook k of a trained clip: its T codes and one EOS, at frames k + 1 ... k + T + 1."
    conversation, frames, sample = drawn
    expanded, begin, speaks = expand(sample, TOKENS), 0, []
    for index, message in enumerate(conversation.messages):
        speaks += [
            message.role == "assistant" and index >= (conversation.start_index or 0)
            for part in message.content
            if isinstance(part, Audio)
        ]
    for clip, (n, learns) in enumerate(zip(frames, speaks, strict=True)):
        labels = expanded.audio_labels[begin : begin + n + C + 1]
        begin += n + C + 1
        for k in range(C):
            at = (labels[:, k] != IGNORE).nonzero().flatten().tolist()
            assert at == (list(range(k + 1, k + n + 2)) if learns else [])
            if learns:
                assert labels[at, k].tolist() == [
                    *sample.codes[clip][k].tolist(),
                    TOKENS.stream_eos,
                ]
    assert begin == len(expanded.audio_ids)
