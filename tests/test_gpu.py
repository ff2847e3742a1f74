"What only a GPU can show; skipped without one."

from dataclasses import replace

import pytest
import resume_job
import torch
from conftest import load_script
from safetensors.torch import load_file
from tiny_codec import needs_torchaudio, tiny_higgs_codec

from higgs_nb.checkpoint.validate import validate_checkpoint
from higgs_nb.data.audio import load_audio
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Audio
from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.model.attention import attend, attend_to_itself
from higgs_nb.model.model import tiny_model
from higgs_nb.speech.generate import generate_speech

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("heads,groups", [(4, 4), (4, 2), (8, 1)])
def test_attention_of_packed_samples(heads, groups):
    """Flash attention in bfloat16 against the way of a CPU in float32, queries grouped or not: the
    outputs and all three gradients.
    """
    lengths, g = [7, 64, 1, 130], torch.Generator().manual_seed(0)

    class Attention:
        config, scaling = type("Config", (), dict(_attn_implementation="sdpa")), 64**-0.5

    x = [torch.randn(sum(lengths), n, 64, generator=g) for n in (heads, groups, groups, heads)]
    want = [t.clone().requires_grad_() for t in x[:3]]
    got = [t.cuda().bfloat16().requires_grad_() for t in x[:3]]
    out = (
        torch.cat(
            [
                attend_to_itself(*(t.transpose(0, 1) for t in qkv), Attention.scaling)
                for qkv in zip(*(t.split(lengths) for t in want))
            ],
            1,
        )
        .transpose(0, 1)
        .flatten(1)
    )
    there = attend(
        Attention,
        *got,
        lengths,
        torch.tensor([0, 7, 71, 72, 202], dtype=torch.int32, device="cuda"),
    )
    (out * x[3].flatten(1)).sum().backward()
    (there * x[3].flatten(1).cuda().bfloat16()).sum().backward()
    for a, b in [(there, out), *((a.grad, b.grad) for a, b in zip(got, want))]:
        assert (a.cpu().float() - b).norm() < 0.01 * b.norm()


def losses(folder):
    return [row["audio_loss"] for row in resume_job.log(folder) if "audio_loss" in row]


def test_a_run_learns_as_on_a_cpu(tmp_path):
    "In float32 the same losses; in bfloat16 nearly so."
    for name, more in (
        ("cpu", dict()),
        ("gpu", dict(use_cpu=False)),
        ("bf16", dict(use_cpu=False, bf16=True)),
    ):
        resume_job.train(tmp_path / name, adapter=dict(dropout=0.0), **more)
    want, got, half = (losses(tmp_path / n) for n in ("cpu", "gpu", "bf16"))
    assert want[-1] < 0.8 * want[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half, want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resume_is_exact(tmp_path, precision):
    """13 steps, a stop, and 27 more are 40 steps, to the bit, where kernels are asked to be
    deterministic.
    """
    more = dict(use_cpu=False, full_determinism=True, save_steps=13, bf16=precision == "bf16")
    resume_job.train(tmp_path / "whole", **more)
    trainer = resume_job.make_trainer(tmp_path / "parts", **more)
    trainer.add_callback(Stop(13))
    trainer.train()
    resume_job.train(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-13"), **more)
    last = [tmp_path / name / "checkpoint-39" for name in ("whole", "parts")]
    assert all(validate_checkpoint(path).whole for path in last)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for a, b in zip(*(sorted(path.glob("*.safetensors")) for path in last)):
        a, b = load_file(a), load_file(b)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    torch.use_deterministic_algorithms(False)


class Stop(resume_job.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        trainer.control.should_training_stop = trainer.state.global_step == self.step


def test_generation_says_the_same():
    "Greedy codes of a model in float32."
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer, hidden_size=64, num_layers=2, intermediate_size=96)
    want = [
        s.codes for s in generate_speech(model, tokenizer, ["One.", "Two words."], max_frames=20)
    ]
    got = [
        s.codes
        for s in generate_speech(model.cuda(), tokenizer, ["One.", "Two words."], max_frames=20)
    ]
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_torchaudio
def test_the_codec_runs_there_and_gives_what_a_cpu_gives(tmp_path):
    "Codes and sound come back to the CPU; codes are the same again, alone and among others."
    clips = sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[:4]
    folder = tiny_higgs_codec(tmp_path / "codec")
    codec, cpu = load_codec(folder), load_codec(folder, device="cpu")
    assert codec.device.type == "cuda" and cpu.device.type == "cpu"
    assert codec.fingerprint == cpu.fingerprint
    store = CodeStore(tmp_path / "codes", codec)
    assert store.encode_all([Audio(str(clip)) for clip in clips], False)["misses"] == 4
    same = 0
    for clip in clips:
        codes = codec.encode(load_audio(clip))
        assert codes.device.type == "cpu" and torch.equal(store.get(clip), codes)
        sound, expected = codec.decode(codes), cpu.decode(codes)
        assert sound.device.type == "cpu"
        assert (sound - expected).norm() < 0.01 * expected.norm()
        same += (codes == cpu.encode(load_audio(clip))).float().mean().item() / 4
    assert same > 0.98


@pytest.mark.parametrize("name", ["plain", "recomputed", "in full"])
def test_the_plan_is_what_the_allocator_gives_out(name):
    """A training run of two steps in bfloat16, large enough that the libraries' workspaces are a
    small part of it.
    """
    measured = load_script("plan")
    config = measured.configuration(2048, 8, 32_000, 16)
    changes = {
        "plain": {},
        "recomputed": dict(gradient_checkpointing=True),
        "in full": dict(lora=measured.EVERYTHING, accumulate=2),
    }[name]
    settings = dict(precision="bf16", device="cuda", token_budget=8192, max_duration_s=30)
    row = measured.compare(config, replace(measured.PLAIN, **settings | changes))
    assert abs(row["off"]) < 0.05, row
