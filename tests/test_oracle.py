"""Our collators and model against recordings of the original implementation: the compact part in
tests/oracle, or the whole of them.

HIGGS_ORACLE=FOLDER names the whole recordings; tests/oracle/README.md says what they are.
"""

import os

import pytest
import torch
from oracle_adapter import collate, forward, load
from oracle_recordings import COMPACT, STEP, Recordings, agrees, compact, thin

from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Conversation
from higgs_nb.data.delay import delay_pattern, undelay
from higgs_nb.data.prompt import AudioTokens
from higgs_nb.data.samples import expand
from higgs_nb.data.whisper_inputs import whisper_extractor
from higgs_nb.original.convert import native_batch
from higgs_nb.original.records import ChatMLDatasetSample, prepare_chatml_sample

folder = os.environ.get("HIGGS_ORACLE") or COMPACT
oracle = Recordings(folder)
ids = oracle.samples["ids"]
TOKENS = AudioTokens(
    ids["AUDIO"],
    ids["AUDIO_OUT"],
    ids["audio_delay"],
    ids["pad"],
    oracle.samples["audio_stream_bos_id"],
    oracle.samples["audio_stream_eos_id"],
    oracle.samples["num_codebooks"],
)


def test_the_recordings_are_complete():
    "Every case with every choice of the collator's arguments, and every variant of the model."
    runs = oracle.collator["runs"]
    assert len(runs) == 448 == 64 * len({r["case"] for r in runs})
    assert len({(r["case"], *r["kwargs"].values()) for r in runs}) == 448
    assert {r["variant"] for r in oracle.model["runs"]} == set("abc") and len(
        oracle.model["runs"]
    ) == 20


def test_every_recorded_batch():
    wrong, raised = [], 0
    for run in oracle.collator["runs"]:
        if "out" not in run:
            raised += 1
            continue
        got = collate(oracle.batch_of(run), **{**oracle.collator["base_kwargs"], **run["kwargs"]})
        wrong += [(run["case"], run["kwargs"], field) for field in oracle.mismatched(got, run)]
    assert wrong == []
    assert raised == sum("error" in run for run in oracle.collator["runs"]) == 16


def changed(name: str, special: dict) -> dict:
    "The sample of a special run, changed as its note says."
    if name == "no_labels":
        return {**oracle.sample("clone_in"), "label_ids": None}
    if name == "resample_24k":
        return {
            **oracle.sample("clone_in"),
            "audio_waveforms_concat": oracle.batch_tensors[special["in_waveform"]],
            "audio_sample_rate": torch.tensor([24000]),
        }
    if name == "long_30s":
        return {
            **oracle.sample("long_in_text"),
            "audio_waveforms_concat": oracle.batch_tensors[special["tile_1s"]].repeat(32)[:507200],
        }
    multi = oracle.sample("multi")
    codes = multi["audio_ids_concat"]
    return {
        **multi,
        "audio_label_ids_concat": codes if name == "no_transform" else torch.full_like(codes, 7),
    }


@pytest.mark.parametrize(
    "special",
    [s for s in oracle.collator["special"] if "same_object" not in s["name"]],
    ids=lambda s: s["name"],
)
def test_special_runs(special):
    got = collate(
        [changed(special["name"], special)],
        **{**oracle.collator["base_kwargs"], **special["kwargs"]},
    )
    assert oracle.mismatched(got, special, 1e-4) == []


@pytest.mark.parametrize("case", oracle.samples["cases"])
@pytest.mark.parametrize("in_tokens", [True, False])
def test_whisper_on_where_the_original_raised(case, in_tokens):
    """Each clip that is spoken keeps its own codes, whatever is heard before or after it, in
    however many chunks.
    """
    names = oracle.samples["cases"][case]
    kwargs = dict(
        oracle.collator["base_kwargs"],
        encode_whisper_embed=True,
        return_audio_in_tokens=in_tokens,
        use_delay_pattern=True,
    )
    got = collate([oracle.sample(n) for n in names], **kwargs)
    without = collate(
        [oracle.sample(n) for n in names], **{**kwargs, "encode_whisper_embed": False}
    )
    for field in ("audio_out_ids", "audio_out_ids_start", "label_audio_ids"):
        assert torch.equal(got[field], without[field]), field
    heard = int((got["input_ids"] == TOKENS.audio_in).sum())
    assert len(got["audio_features"]) == heard
    if in_tokens:
        assert len(got["audio_in_ids_start"]) == heard


def test_same_object_twice():
    "The recorded second pass lost its labels; ours equals the first."
    special = {s["name"]: s for s in oracle.collator["special"]}
    for mask in (True, False):
        first = special[f"same_object_1st_pass.mask={mask}"]
        sample = [oracle.sample("tts")]
        for _ in range(2):
            got = collate(sample, **{**oracle.collator["base_kwargs"], **first["kwargs"]})
            assert oracle.mismatched(got, first) == []
        assert int((got["label_audio_ids"] >= 0).sum()) == 8 * 10


@pytest.mark.parametrize(
    "run", oracle.native["variant_a_vs_native"], ids=lambda r: f"{r['tensors_prefix']}{r['case']}"
)
def test_native_sequence(run):
    """Ids, frames and both kinds of labels of every recorded run, row by row; a clip that is not
    trained has no recorded audio labels.
    """
    native = oracle.tensors_of("native")

    def at(name):
        return native.get(run["tensors_prefix"] + name)

    samples = [
        expand(
            ChatMLDatasetSample.wrap(oracle.sample(n)).encoded(),
            TOKENS,
            n,
            delay=run["kwargs"]["use_delay_pattern"],
            audio_in_codes=run["kwargs"]["return_audio_in_tokens"],
        )
        for n in oracle.samples["cases"][run["case"]]
    ]
    for row, sample in enumerate(samples):
        text, frames = at("attention_mask")[row].bool(), at("audio_input_ids_mask")[row].bool()
        assert torch.equal(sample.input_ids, at("input_ids")[row][text])
        assert torch.equal(sample.labels, at("text_labels_upstream_rule")[row][text])
        assert torch.equal(sample.audio_ids, at("audio_input_ids")[row][frames])
        if at("audio_labels_upstream_rule") is not None:
            assert torch.equal(sample.audio_labels, at("audio_labels_upstream_rule")[row][frames])
        else:
            assert not (sample.audio_labels >= 0).any()
    batch = PaddedCollator(TOKENS)(samples)
    for row, sample in enumerate(samples):
        assert torch.equal(
            batch["audio_input_ids"][row][batch["audio_input_ids_mask"][row]], sample.audio_ids
        )


@pytest.mark.parametrize("name", oracle.samples["samples"])
def test_prepared_tokens(name):
    "The recorded tokens and labels of `prepare_chatml_sample`."
    from transformers import PreTrainedTokenizerFast

    recorded = oracle.samples["samples"][name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(oracle.folder / "tokenizer.json"))
    input_ids, label_ids, audios, _ = prepare_chatml_sample(
        Conversation.from_dict(recorded["chatml"], id=name), tokenizer
    )
    assert input_ids == recorded["input_tokens"] and label_ids == recorded["label_tokens"]
    assert [a.path for a in audios] == recorded["audio_urls"]


@pytest.mark.parametrize("name", sorted({k.split(".")[0] for k in oracle.tensors_of("delay")}))
def test_delay_pattern(name):
    recorded = oracle.tensors_of("delay")
    codes, delayed = recorded[f"{name}.codes"], recorded[f"{name}.delayed"]
    got, _ = delay_pattern(codes, torch.tensor([codes.shape[1]]), delayed[-1, 0], delayed[0, -1])
    assert torch.equal(got.t(), delayed)
    assert torch.equal(undelay(got, int(delayed[-1, 0]), int(delayed[0, -1]))[0], codes)


@pytest.fixture(scope="module")
def models():
    "Our model of each variant, from the recorded weights under the original's names."
    return {v: load(config, oracle.weights(v)) for v, config in oracle.model["configs"].items()}


RUNS = [(v, n) for v in oracle.model["configs"] for n, _ in enumerate(oracle.model_runs(v))]


@pytest.mark.parametrize("variant", oracle.model["configs"])
def test_model_logits(models, variant):
    "Text logits at every attended position and audio logits of every spoken frame."
    with torch.no_grad():
        runs = [
            (r["case"], oracle.distance(forward(models[variant], r, i), r))
            for r, i in oracle.model_runs(variant)
        ]
    assert runs and [(case, distance) for case, distance in runs if not distance <= 5e-5] == []


def original_name(name: str) -> str:
    "The original's name of a parameter of our model."
    if name.endswith("_lm_head.weight"):
        return f"audio_decoder_proj.{name}"
    return name.replace(
        "model.embed_audio_tokens.embed_audio_tokens", "audio_codebook_embeddings"
    ).removeprefix("model.")


@pytest.mark.parametrize("variant, number", RUNS)
def test_model_losses_and_gradients(models, variant, number):
    """Each part of the loss, and the norm of every parameter's gradient; a gradient that the
    original leaves undefined is zero or undefined here.
    """
    run, inputs = list(oracle.model_runs(variant))[number]
    model, recorded = models[variant], run["losses"]
    got = forward(model, run, inputs)
    if recorded.get("text_n"):
        assert abs(got["text_loss"].item() - recorded["text_ce"]) < 1e-4
    if any(recorded.get("audio_n_per_codebook") or ()):
        expected = torch.tensor(recorded["audio_ce_per_codebook"])
        assert (got["codebook_losses"] - expected).abs().max() < 1e-4
        assert abs(got["audio_loss"] - recorded["audio_ce_mean_over_codebooks"]) < 1e-4
    if "total_text_plus_audio_mean" in recorded:
        assert abs(got["loss"].item() - recorded["total_text_plus_audio_mean"]) < 1e-4
    model.zero_grad()
    got["loss"].backward()
    norms = {
        original_name(n): 0.0 if p.grad is None else p.grad.norm().item()
        for n, p in model.named_parameters()
    }
    assert norms.keys() == run["grad_norm"].keys()
    for name, norm in run["grad_norm"].items():
        assert abs(norms[name] - (norm or 0.0)) <= 1e-4 * (norm or 0.0) + 1e-7, name


def test_every_variant_together(models):
    """Audio self-attention and tower in one model: the union of the recorded weights, padded as
    one batch and sample by sample.
    """
    configs = oracle.model["configs"]
    config = next(c for c in configs.values() if not c["skip_audio_tower"]) | dict(
        use_audio_out_self_attention=True
    )
    weights = {k: w for v in configs for k, w in oracle.weights(v).items()}
    model = load(config, weights)
    run, inputs = next(r for r in oracle.model_runs("c") if len(r[1]["input_ids"]) > 1)
    samples = [[oracle.sample(n)] for n in oracle.samples["cases"][run["case"]]]
    kwargs = {**oracle.collator["base_kwargs"], **run["kwargs"]}
    with torch.no_grad():
        together = forward(model, run, inputs)["audio_logits"]
        alone = [forward(model, run, collate(s, **kwargs))["audio_logits"] for s in samples]
    assert len(together) and (together - torch.cat(alone)).abs().max() < 5e-5


@pytest.mark.parametrize("number", [n for n, _ in enumerate(oracle.model_runs("c"))])
@pytest.mark.parametrize("collator", [PackedCollator, PaddedCollator])
def test_training_batches_with_whisper(models, number, collator):
    """What a `SampleDataset` with waveforms hands to the trainer's collators: the recorded losses,
    and the logits of the original's collator.
    """
    run, inputs = list(oracle.model_runs("c"))[number]
    model, kwargs, recorded = models["c"], run["kwargs"], run["losses"]
    extractor = whisper_extractor(model.config)
    samples = [
        expand(
            ChatMLDatasetSample.wrap(oracle.sample(n)).encoded(),
            TOKENS,
            n,
            kwargs["use_delay_pattern"],
            kwargs["return_audio_in_tokens"],
            extractor,
        )
        for n in oracle.samples["cases"][run["case"]]
    ]
    ours, theirs = (
        collator(TOKENS, extractor=extractor)(samples),
        native_batch(inputs, model.config),
    )
    assert len(ours["whisper_rows"]) == len(theirs.get("whisper_rows", ())) and torch.equal(
        ours["audio_targets"], theirs["audio_targets"]
    )
    with torch.no_grad():
        got = model(**ours)
        logits = [model.audio_logits(model.hidden(**b)[b["audio_rows"]]) for b in (ours, theirs)]
    if len(logits[0]):
        assert (logits[0] - logits[1]).abs().max() < 5e-5
        assert (
            got["codebook_losses"] - torch.tensor(recorded["audio_ce_per_codebook"])
        ).abs().max() < 1e-4
    if recorded.get("text_n"):
        assert abs(got["text_loss"] - recorded["text_ce"]) < 1e-4


def test_the_compact_part_leaves_no_column_out():
    x = torch.arange(48.0).view(2, 3, 8).repeat(1, 1, 5) + 1
    kept = thin(x)
    assert kept.shape == (2, 3, 5) and thin(torch.eye(STEP)).sum() == STEP
    for row, column in ((0, 0), (1, 9), (2, 34)):
        changed = x.clone()
        changed[0, row, column] = 0
        assert not agrees(thin(changed), kept)


if folder != COMPACT:

    def test_the_compact_part_is_made_of_the_whole(tmp_path):
        "To the byte, so that nothing in tests/oracle was edited."
        compact(folder, tmp_path)
        made = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
        assert made == {f.name: f.read_bytes() for f in COMPACT.iterdir() if f.name != "README.md"}
