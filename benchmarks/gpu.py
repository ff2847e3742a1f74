"""One card, eight minutes: stock transformers against higgs_nb on the released configuration, the
memory plan against the allocator, generation and codec.

    make bench-gpu                         # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --steps 10    # more steps of each arm

Random weights in bfloat16, LoRA r=16 on all linear layers, 4,096 tokens a step in 16 samples. The
arms are those of `train_step.py`, one after the other, so that a card holds one model at a time.
The share of the peak is useful arithmetic (see there) over the rate of a large matrix product in
bfloat16, measured on the same card. Needs a GPU with 40 GB for the stock arm; an arm that does not
fit is named in the results, and the others are measured. Writes benchmarks/results/gpu.json.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # where the other benchmarks are

from train_step import DEVICE, DTYPE, LENGTHS, Arm, configuration

from higgs_nb.data.higgs_codec import HiggsCodec
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.family import HIGGS_V2
from higgs_nb.model.lora import create_lora_config
from higgs_nb.model.model import HiggsAudioForTraining
from higgs_nb.speech.generate import generate_speech
from higgs_nb.training.planned_model import StepSettings
from higgs_nb.training.simulate import simulate
from higgs_nb.training.speed import matmul_rate, peak_memory_mb

RESULTS = Path(__file__).parent / "results" / "gpu.json"
TOKENS = 4096  # of a step


def scaled_lengths(tokens: int) -> tuple[int, ...]:
    "The lengths of `train_step.py`, so many tokens in all."
    lengths = [round(n * tokens / sum(LENGTHS)) for n in LENGTHS]
    lengths[-1] += tokens - sum(lengths)
    return tuple(lengths)


def free():
    "Give back what earlier sections held."
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def train(name: str, config, lengths: tuple[int, ...], steps: int, rate: float) -> dict:
    "Speed, share of the rate, and memory of one arm."
    free()
    with tempfile.TemporaryDirectory() as folder:
        try:
            arm = Arm(name, config, folder, lengths)
            free()
            seconds = median(arm.train(steps).seconds)
        except torch.OutOfMemoryError as error:
            return dict(arm=name, out_of_memory=str(error).splitlines()[0])
        return dict(
            arm=name,
            tokens_per_second=sum(lengths) / seconds,
            share_of_peak=arm.useful() / seconds / rate,
            peak_bytes=round(peak_memory_mb() * 1e6),
        )


def planned_bytes(config, lengths: tuple[int, ...]) -> int:
    "What the plan says of our arm."
    settings = StepSettings(
        create_lora_config("all", r=16, alpha=32),
        lengths=lengths,
        precision="bf16" if DTYPE == torch.bfloat16 else "fp32",
        device=DEVICE,
    )
    stages = simulate(config, settings)
    return max(sum(kinds.values()) for stage, kinds in stages.items() if stage != "evaluation")


def with_byte_tokenizer(config):
    "The configuration with the special ids of the byte tokenizer; the released one is not here."
    tokenizer = byte_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    fields = {field: ids(token) for field, token in HIGGS_V2.placeholders.items()}
    fields |= dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return tokenizer, type(config).from_dict(config.to_dict() | fields)


def speak(config, clips: int = 8, frames: int = 100) -> dict:
    "Frames per second of greedy generation, all clips at once."
    free()
    tokenizer, config = with_byte_tokenizer(config)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = HiggsAudioForTraining(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    texts = [f"Sentence number {i}, with a few more words." for i in range(clips)]
    generate_speech(model, tokenizer, texts, max_frames=8, batch_size=clips)
    wait()
    start = time.perf_counter()
    spoken = generate_speech(model, tokenizer, texts, max_frames=frames, batch_size=clips)
    wait()
    seconds = time.perf_counter() - start
    made = sum(s.codes.shape[-1] for s in spoken)
    return dict(
        clips=clips,
        frames=made,
        frames_per_second=made / seconds,
        times_real_time=made / seconds / HIGGS_V2.frame_rate,
        peak_bytes=round(peak_memory_mb() * 1e6),
    )


def codec_speed(config=None, seconds: float = 10.0, clips: int = 8) -> dict:
    "Seconds of speech that the codec encodes and decodes in a second, clip by clip."
    free()
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError) as error:
        return dict(skipped=f"{error}: pip install 'higgs_nb[codec]'")
    config = config or transformers.HiggsAudioV2TokenizerConfig()
    with torch.device(DEVICE):
        codec = HiggsCodec(transformers.HiggsAudioV2TokenizerModel(config))
    waves = torch.rand(clips, round(seconds * codec.sampling_rate)).sub(0.5).mul(0.1).numpy()
    speeds = {}
    codes = [codec.encode(waves[0])] * clips  # the first call is not timed
    codec.decode(codes[0])
    for name, work, given in (("encode", codec.encode, waves), ("decode", codec.decode, codes)):
        wait()
        start = time.perf_counter()
        for one in given:
            work(one)
        wait()
        speeds[f"{name}_times_real_time"] = clips * seconds / (time.perf_counter() - start)
    return speeds


def measure(config, tokens: int = TOKENS, steps: int = 6, codec=None, frames: int = 100) -> dict:
    "All sections; `config` without special ids of a tokenizer."
    device = torch.device(DEVICE)
    rate, lengths = matmul_rate(device, DTYPE), scaled_lengths(tokens)
    results = dict(
        machine=dict(
            device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            torch=torch.__version__,
            transformers=transformers.__version__,
            precision=str(DTYPE).removeprefix("torch."),
            matrix_tflops=rate / 1e12,
        ),
        tokens=tokens,
        training=[],
    )
    for name in ("ours", "stock"):
        results["training"].append(train(name, config, lengths, steps, rate))
        print(json.dumps(results["training"][-1]), flush=True)
    ours, stock = results["training"]
    if "tokens_per_second" in ours and "tokens_per_second" in stock:
        results["ratio"] = ours["tokens_per_second"] / stock["tokens_per_second"]
    planned = planned_bytes(config, lengths)
    results["plan"] = dict(planned=planned, measured=ours.get("peak_bytes"))
    if "peak_bytes" in ours:
        results["plan"]["off"] = planned / ours["peak_bytes"] - 1
    results["generation"] = speak(config, frames=frames)
    results["codec"] = codec_speed(codec)
    for section in ("plan", "generation", "codec"):
        print(section, json.dumps(results[section]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="of each arm; the first is not timed")
    args = parser.parse_args()
    if DEVICE != "cuda":
        print(
            "benchmarks/gpu.py needs a GPU; benchmarks/train_step.py runs on a CPU", file=sys.stderr
        )
        return 2
    start = time.perf_counter()
    results = measure(configuration("released"), steps=args.steps)
    results["seconds"] = round(time.perf_counter() - start)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{RESULTS} in {results['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
