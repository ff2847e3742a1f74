"""The memory plan against what real training runs allocate.

    python benchmarks/plan.py          # a table, and benchmarks/results/plan.json

Each configuration is planned on the meta device, following the way of the device at hand, and then
trained for two steps with `HiggsTrainer` on made-up samples. On a CPU the bytes are those of
PyTorch's allocator, as its profiler records them, event by event: nothing of the plan's own
counting is used. On a GPU they are `torch.cuda.max_memory_allocated`. "Above the weights" leaves
out what both know from the number of parameters.
"""

import copy
import gc
import json
import multiprocessing
import os
import platform
import socket
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import HiggsAudioV2Config, PretrainedConfig, WhisperConfig

from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset, sample_options
from higgs_nb.family import HIGGS_V3, family_of
from higgs_nb.model.classes import CLASSES
from higgs_nb.model.lora import EMBEDDINGS, HEADS, apply_lora, create_lora_config
from higgs_nb.model.v3 import HiggsAudioV3Config
from higgs_nb.model.whisper import whisper_settings
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.loop import HiggsTrainer
from higgs_nb.training.planned_model import StepSettings
from higgs_nb.training.simulate import simulate
from higgs_nb.training.worst_batch import made_up_sample, tokens_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).parent / "results" / ("plan_gpu.json" if DEVICE == "cuda" else "plan.json")
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)


def configuration(width: int, layers: int, vocabulary: int, heads: int) -> HiggsAudioV2Config:
    "Half as many heads for keys and values; the special tokens are the last of the vocabulary."
    return HiggsAudioV2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        intermediate_size=3 * width,
        codebook_size=1026,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        audio_token_id=vocabulary - 1,
        audio_delay_token_id=vocabulary - 2,
        audio_bos_token_id=vocabulary - 3,
    )


def with_tower(config: HiggsAudioV2Config) -> HiggsAudioV2Config:
    "The configuration with a small Whisper tower, which is new to the base."
    sizes = dict(d_model=128, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=512)
    whisper_settings(config, WhisperConfig(**sizes), config.vocab_size - 4)
    return config


def third_configuration(vocabulary: int) -> HiggsAudioV3Config:
    "Of Higgs Audio V3; the heads are together twice as wide as the rows."
    return HiggsAudioV3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        audio_token_id=vocabulary - 1,
        audio_delay_token_id=vocabulary - 1,
        audio_bos_token_id=vocabulary - 2,
    )


SMALL, WIDE, DEEP = (
    (configuration(256, 4, 4096, 4)),
    (configuration(512, 3, 16_384, 8)),
    (configuration(128, 10, 1024, 4)),
)
LISTENS = with_tower(configuration(256, 4, 4096, 4))
PLAIN = StepSettings(
    create_lora_config(r=16), token_budget=1536, precision="fp32", device="cpu", max_duration_s=10
)
THIRD = third_configuration(4096)
EVERYTHING = create_lora_config(r=16, train=HEADS + EMBEDDINGS)
TABLE = create_lora_config(r=16, train=HIGGS_V3.architecture.heads)
CASES = {
    "plain": (SMALL, PLAIN),
    "bf16": (SMALL, replace(PLAIN, precision="bf16")),
    "recomputed": (SMALL, replace(PLAIN, gradient_checkpointing=True)),
    "in full": (SMALL, replace(PLAIN, lora=EVERYTHING)),
    "accumulated": (SMALL, replace(PLAIN, accumulate=2)),
    "rank 64, dropout": (SMALL, replace(PLAIN, lora=create_lora_config(r=64, dropout=0.1))),
    "long clips": (SMALL, replace(PLAIN, max_duration_s=30)),
    "long, bf16, recomputed": (
        SMALL,
        replace(PLAIN, precision="bf16", max_duration_s=30, gradient_checkpointing=True),
    ),
    "in full, bf16, accumulated": (
        SMALL,
        replace(PLAIN, lora=EVERYTHING, precision="bf16", accumulate=3),
    ),
    "DoRA": (SMALL, replace(PLAIN, lora=create_lora_config(r=16, use_dora=True))),
    "rsLoRA on attention": (
        SMALL,
        replace(PLAIN, lora=create_lora_config("attention", r=8, use_rslora=True)),
    ),
    "the whole model": (SMALL, replace(PLAIN, lora=None)),
    "wide": (WIDE, replace(PLAIN, token_budget=2048)),
    "deep": (DEEP, PLAIN),
    "deep, recomputed": (DEEP, replace(PLAIN, gradient_checkpointing=True)),
    "Whisper tower": (LISTENS, replace(PLAIN, new_modules=("audio_encoder_proj",))),
    "two processes": (DEEP, replace(PLAIN, processes=2)),
    "two processes, divided": (WIDE, replace(PLAIN, processes=2, sharding=True)),
    "two processes, divided, recomputed": (
        WIDE,
        replace(PLAIN, processes=2, sharding=True, gradient_checkpointing=True),
    ),
    "V3": (THIRD, PLAIN),
    "V3, bf16, table in full": (THIRD, replace(PLAIN, lora=TABLE, precision="bf16")),
    "V3, recomputed": (THIRD, replace(PLAIN, gradient_checkpointing=True)),
}


class Samples(SampleDataset):
    "Made-up samples of given lengths."

    def __init__(self, config, lengths):
        samples = [made_up_sample(n, config, seed=i) for i, n in enumerate(lengths)]
        self.samples = [replace(sample, id=str(i)) for i, sample in enumerate(samples)]
        tokens, options = tokens_of(config), sample_options(config)
        super().__init__(self.samples, byte_tokenizer(tokens.family), None, tokens, **options)
        if self.extractor:
            heard = tts_conversation("A", id="0", reference=("B", Audio("b.wav")))
            self.conversations = [replace(heard, id=s.id) for s in self.samples]

    def __getitem__(self, i):
        return self.samples[i]


class Trainer(HiggsTrainer):
    "The audit of the first batch is left out: its tokens are made up."

    def before_training(self):
        pass


def make_trainer(
    config: PretrainedConfig, settings: StepSettings, folder: str, evaluate: bool = False
) -> HiggsTrainer:
    "A trainer of a random model on batches as the plan has them; two steps."
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    with torch.device(settings.device):
        model = CLASSES[family_of(config).name].model(config).to(settings.dtype)
    model.new_modules = settings.new_modules
    if settings.lora is not None:
        model = apply_lora(model, settings.lora)
    batches, processes = min(settings.accumulate, 2), settings.processes
    args = HiggsTrainingArguments(
        folder,
        use_cpu=settings.device == "cpu",
        bf16=settings.autocast is not None,
        token_budget=sum(settings.samples),
        gradient_accumulation_steps=batches,
        gradient_checkpointing=settings.gradient_checkpointing,
        optim=settings.optimizer,
        shard_base=settings.sharding,
        max_steps=2,
        probe="warn" if evaluate else "off",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    held_out = Samples(config, settings.samples) if evaluate else None
    return Trainer(model, args, Samples(config, settings.samples * batches * processes), held_out)


def frozen_layers(config: HiggsAudioV2Config) -> list[tuple[str, nn.Parameter]]:
    "Name and parameter of everything in the decoder layers, on the meta device."
    with torch.device("meta"):
        return list(CLASSES[family_of(config).name].model(config).model.layers.named_parameters())


def allocated_at_most(events: list[dict]) -> int:  # of a trace of PyTorch's profiler
    "Bytes that the allocator of the CPU held at most, from the beginning of the training on."
    start = next(e["ts"] for e in events if e.get("name") == "training")
    memory = [e for e in events if e.get("name") == "[memory]"]
    memory.sort(key=lambda e: e["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return max(e["args"]["Total Allocated"] for e in memory if e["ts"] >= start) - before


def measured_on_cpu(config, settings: StepSettings, evaluate: bool = False) -> int:
    "Bytes that a real run of two steps takes at most, its model included."
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            trainer = make_trainer(config, settings, folder, evaluate)
            with record_function("training"):
                trainer.train()
            del trainer
            gc.collect()
        recorded.export_chrome_trace(f"{folder}/trace.json")
        return allocated_at_most(json.loads(Path(folder, "trace.json").read_text())["traceEvents"])


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def measured_as(rank: int, port: int, config, settings: StepSettings, evaluate: bool) -> int:
    "What `measured_on_cpu` finds in one of several processes."
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(settings.processes))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    return measured_on_cpu(config, settings, evaluate)


def measured_in_processes(config, settings: StepSettings, evaluate: bool = False) -> int:
    "Bytes that the fullest of several processes takes at most, exchanged through gloo."
    context, port = multiprocessing.get_context("spawn"), free_port()
    with ProcessPoolExecutor(settings.processes, context) as pool:
        given = (port, config, settings, evaluate)
        found = [pool.submit(measured_as, rank, *given) for rank in range(settings.processes)]
        return max(one.result(timeout=300) for one in found)


def measured_on_gpu(config, settings: StepSettings, evaluate: bool = False) -> int:
    "Bytes that PyTorch's allocator gave out at most during a real run of two steps."
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, settings, folder, evaluate)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return torch.cuda.max_memory_allocated() - before


def compare(config, settings: StepSettings, evaluate: bool = False) -> dict:
    "Planned and measured bytes, and how far the plan is off."
    several = measured_in_processes if settings.processes > 1 else measured_on_cpu
    measure = measured_on_gpu if settings.device == "cuda" else several
    measured = measure(config, settings, evaluate)
    stages = simulate(config, settings)
    if not evaluate:
        del stages["evaluation"]
    kinds = max(stages.values(), key=lambda kinds: sum(kinds.values()))
    planned, model = sum(kinds.values()), kinds["weights"] + kinds["adapters"]
    return dict(
        measured=measured,
        planned=planned,
        off=planned / measured - 1,
        off_above_weights=(planned - model) / (measured - model) - 1,
    )


def main():
    rows = []
    print(
        f"{'configuration':<36}{'planned MB':>12}{'measured MB':>13}{'off':>9}{'above weights':>15}"
    )
    for name, (config, settings) in CASES.items():
        if DEVICE == "cuda" and settings.processes > 1:
            continue  # one GPU is measured
        start = time.perf_counter()
        row = compare(config, replace(settings, device=DEVICE))
        rows.append(dict(name=name, **row))
        print(
            f"{name:<36}{row['planned'] / 1e6:>12.1f}{row['measured'] / 1e6:>13.1f}"
            f"{row['off']:>+9.2%}{row['off_above_weights']:>+15.2%}"
            f"{time.perf_counter() - start:>8.1f} s",
            flush=True,
        )
    machine = dict(
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    divided = {name for name, (_, settings) in CASES.items() if settings.sharding}
    largest = max(abs(row["off"]) for row in rows if row["name"] not in divided)
    RESULTS.parent.mkdir(exist_ok=True)
    result = dict(machine=machine, largest=largest, divided=sorted(divided), rows=rows)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"largest difference, divided bases aside: {largest:.2%}")


if __name__ == "__main__":
    main()
