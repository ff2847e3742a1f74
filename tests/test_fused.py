"""What the training forward promises beyond equal numbers: it waits for nothing, and holds no
logits.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.delay import IGNORE, delay_pattern
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.samples import Sample
from higgs_nb.model.lora import EMBEDDINGS, HEADS, apply_lora, create_lora_config
from higgs_nb.model.loss import LossChunks, LossWeights, target_counts
from higgs_nb.model.model import tiny_model

TOKENIZER = byte_tokenizer()
WAITS = (
    "nonzero",
    "_local_scalar_dense",
    "item",
    "masked_select",
    "unique",
    "repeat_interleave",
    "is_nonzero",
    "bincount",
    "equal",
)


def samples(config, frames=(5, 0, 9, 3), seed=0):
    "Conversations of made-up words and codes; one has no speech."
    g, tokens, made = (
        torch.Generator().manual_seed(seed),
        AudioTokens.from_config(config, TOKENIZER),
        [],
    )
    for i, n in enumerate(frames):
        text = torch.randint(10, 200, (4 + i,), generator=g)
        audio_ids, audio_labels = delay_pattern(
            torch.randint(0, config.codebook_size - 2, (8, n), generator=g),
            torch.tensor([n] * (n > 0), dtype=torch.long),
            tokens.stream_bos,
            tokens.stream_eos,
        )
        frames_ids = torch.full((len(audio_ids),), tokens.audio_out)
        labels = torch.where(torch.arange(len(text)) > 1, text, IGNORE)
        made.append(
            Sample(
                torch.cat([text, frames_ids]),
                torch.cat([labels, torch.full_like(frames_ids, IGNORE)]),
                audio_ids,
                audio_labels,
                str(i),
            )
        )
    return made, tokens


class Trace(TorchDispatchMode):
    "Names of the operations that would make a GPU's host wait."

    def __init__(self):
        super().__init__()
        self.waits, self.shapes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for a in args
            if isinstance(a, (list, tuple))
            for i in a
        )
        if name in WAITS or by_mask:
            self.waits.append(name)
        out = func(*args, **(kwargs or {}))
        self.shapes |= {
            tuple(o.shape)
            for o in (out if isinstance(out, (list, tuple)) else [out])
            if isinstance(o, torch.Tensor)
        }
        return out


def traced(model, batch):
    "A trace of forward and backward of one batch, counts given as the trainer gives them."
    counts = target_counts(batch)
    model(**batch, counts=counts).loss.backward()  # what is made once is made
    with Trace() as trace:
        model(**batch, counts=counts).loss.backward()
    return trace


@pytest.fixture(
    params=[dict(), dict(use_audio_out_self_attention=True)], ids=["stock", "self-attention"]
)
def base(request):
    config = dict(hidden_size=64, num_layers=2, intermediate_size=96, codebook_size=34)
    base = tiny_model(TOKENIZER, **config)
    if request.param:
        base.config.use_audio_out_self_attention = True
        torch.manual_seed(0)
        base = type(base)(base.config)
    return base


@pytest.fixture
def model(base):
    return apply_lora(base, create_lora_config(r=4, train=HEADS + EMBEDDINGS[:1]))


def test_nothing_waits(model):
    made, tokens = samples(model.config)
    assert traced(model, PackedCollator(tokens)(made)).waits == []
    assert traced(model, PaddedCollator(tokens)(made)).waits, (
        "the padded way does, so the trace can see it"
    )


def test_full_logits_never_exist(model):
    # two rows of text at a time
    model.get_base_model().loss_chunks = LossChunks(logits=2 * model.config.vocab_size)
    made, tokens = samples(model.config)
    batch = PackedCollator(tokens)(made)
    rows, vocab = len(batch["text_rows"]), model.config.vocab_size
    shapes = traced(model, batch).shapes
    assert rows > 4 and (2, vocab) in shapes
    assert not [s for s in shapes if len(s) == 2 and vocab in s and 2 < min(s) <= rows]


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(model, autocast):
    "The packed and the padded way within rounding of each other; losses and adapters in float32."
    model.bfloat16()
    for n, p in model.named_parameters():
        if p.requires_grad and "embed" not in n:
            p.data = p.data.float()
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    made, tokens = samples(model.config)
    losses, grads = [], []
    for collate in (PackedCollator(tokens), PaddedCollator(tokens)):
        model.zero_grad()
        if isinstance(collate, PaddedCollator) and not autocast:
            continue  # transformers' layers mix precisions under autocast only
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**collate(made))
        assert out.loss.dtype == out.codebook_losses.dtype == torch.float32
        out.loss.backward()
        losses.append(out.codebook_losses)
        grads.append(
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])
        )
        assert grads[-1].isfinite().all() and all(
            p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n
        )
    if autocast:
        torch.testing.assert_close(*losses, rtol=0.01, atol=0.01)
        assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_without_an_adapter(base, autocast):
    "Every weight gets the gradient that the padded way gives it."
    made, tokens = samples(base.config)
    grads = []
    for collate in (PackedCollator(tokens), PaddedCollator(tokens)):
        base.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            base(**collate(made)).loss.backward()
        grads.append({name: p.grad for name, p in base.named_parameters()})
    for (name, a), b in zip(grads[0].items(), grads[1].values()):
        assert a.dtype == torch.float32 and b.norm() > 0, name
        if autocast:
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99, (
                name
            )
        else:
            assert (a - b).norm() < 1e-4 * b.norm(), name


def test_weights_and_smoothing_reach_the_gradient(model):
    "The loss that is trained is the weighted one, on both ways."
    made, tokens = samples(model.config)
    model.get_base_model().loss_weights = LossWeights(
        text=0.3, audio=2.0, codebooks=(2.0, *[0.5] * 7), label_smoothing=0.1
    )
    grads = []
    for collate in (PackedCollator(tokens), PaddedCollator(tokens)):
        model.zero_grad()
        model(**collate(made)).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


def test_under_torch_compile(model):
    "`torch_compile=True` of the trainer is no error; the packed way stays as it is."
    made, tokens = samples(model.config)
    compiled = torch.compile(model, backend="eager")
    for some in (made, made[::2]):
        batch = PackedCollator(tokens)(some)
        assert torch.equal(compiled(**batch).loss, model(**batch).loss)


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=(
        "needs a GPU: flash attention over packed rows, and the driver's own account of who waits"
    ),
)
def test_on_a_gpu(model):
    made, tokens = samples(model.config)
    batch = PackedCollator(tokens)(made)
    model.bfloat16()
    there = model(**batch)
    model.cuda()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    counts = target_counts(batch)
    here = model(**batch, counts=counts)
    here.loss.backward()
    torch.testing.assert_close(
        here.codebook_losses.cpu(), there.codebook_losses, rtol=0.02, atol=0.02
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, counts=counts).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
