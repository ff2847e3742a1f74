"""A training step, stock transformers against higgs_nb: real tokens a second, share of the
machine's matrix-product rate, peak memory, agreement.

    python benchmarks/train_step.py                    # speed and memory at every size: tables, and
                                                       # benchmarks/results/train_step.json
    python benchmarks/train_step.py --sizes 512x128256 # of one size, width x vocabulary
    python benchmarks/train_step.py --only dropout     # stock and ours with dropout in the adapters
    python benchmarks/train_step.py --only agreement   # 50 steps of both on equal labels
    python benchmarks/train_step.py --only growth      # from 1,024 to 8,192 tokens a step
    python benchmarks/train_step.py --sizes released   # on a GPU: the released configuration with
                                                       # random weights; train_step_gpu.json

Arms, all with the same base, the same LoRA (r=16 on all linear layers of the decoder), bfloat16
with float32 adapters (float32 on a CPU without instructions for bfloat16, which is said), the same
samples and the same seed:

    stock   `transformers.Trainer` on `HiggsAudioV2ForConditionalGeneration`, padded batches of four
            in random order, four of them a step, labels by the rule of
            transformers' own processor
    ours    `HiggsTrainer` on `HiggsAudioForTraining`, the same 16 samples packed into one row,
            labels by our rule
    equal   `ours` on the labels of `stock`: the same work, text head included

Each arm is a real training run with its optimizer. Arms take turns in one process; time is from
the end of one step to the end of the next, without the first step of each turn. Memory is the
largest resident set of a process of its own, on a GPU what its allocator held at most. Useful
arithmetic is what a frozen base needs, forward and gradient of the inputs: 4 x (attention and
one feed-forward network) x tokens + 4 x audio head x supervised frames + 4 x text head x
supervised text positions. Padding and adapters count as nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from higgs_nb.data.collator import PaddedCollator
from higgs_nb.data.delay import IGNORE, delay_pattern
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.data.samples import Sample
from higgs_nb.family import HIGGS_V2
from higgs_nb.model.lora import apply_lora, create_lora_config
from higgs_nb.model.model import HiggsAudioForTraining
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.callbacks import Callback
from higgs_nb.training.loop import HiggsTrainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def computes_bfloat16() -> bool:
    """Whether this device has instructions for products in bfloat16. Without them a CPU takes them
    apart, and a step takes minutes.
    """
    if DEVICE == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    words = flags.split()  # the last is that of Arm
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


DTYPE = torch.bfloat16 if computes_bfloat16() else torch.float32
RESULTS = (
    Path(__file__).parent
    / "results"
    / ("train_step_gpu.json" if DEVICE == "cuda" else "train_step.json")
)
LENGTHS = (
    157,
    149,
    168,
    420,
    119,
    75,
    164,
    132,
    340,
    202,
    253,
    254,
    340,
    225,
    186,
    149,
)  # tokens of the 16 samples of a step
LAYERS, CODES, MATRICES = (
    8,
    1026,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
SIZES = ("256x8192", "512x128256", "1024x32000")
transformers.logging.set_verbosity_error()
warnings.simplefilter("ignore", FutureWarning)


def configuration(size: str, layers: int = LAYERS) -> HiggsAudioV2Config:
    """Heads of 64, half as many for keys and values, a feed-forward network three times as wide.
    The special tokens are the last of the vocabulary. `released`: that of the released model.
    """
    if size == "released":
        return HiggsAudioV2Config(codebook_size=CODES, attn_implementation="sdpa")
    width, vocab = map(int, size.split("x"))
    return HiggsAudioV2Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        intermediate_size=3 * width,
        codebook_size=CODES,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        audio_token_id=vocab - 1,
        audio_delay_token_id=vocab - 2,
        audio_bos_token_id=vocab - 3,
    )


def tokens_of(config) -> AudioTokens:
    ids = dict(
        audio_in=config.vocab_size - 4,
        audio_out=config.audio_token_id,
        audio_delay=config.audio_delay_token_id,
        pad=0,
    )
    return AudioTokens(**HIGGS_V2.released_ids | ids)


def make_sample(length: int, config, rule: str, g: torch.Generator) -> Sample:
    """A prompt of 30 tokens, a text of 4 tokens a second, its speech at 25 frames a second, and
    the closing tokens; made-up words and codes. `rule`: whose labels.
    """
    frames = round((length - 34) * 25 / 29)
    codes, tokens = torch.randint(0, 1024, (8, frames - 9), generator=g), tokens_of(config)
    audio_ids, audio_labels = delay_pattern(codes, torch.tensor([frames - 9]), 1024, 1025)
    prompt = torch.randint(3, config.audio_bos_token_id - 10, (length - frames - 4,), generator=g)
    closing = torch.tensor([config.vocab_size - 5, config.vocab_size - 6, config.vocab_size - 6])
    ids = torch.cat(
        [
            prompt,
            torch.tensor([config.audio_bos_token_id]),
            torch.full((frames - 7,), tokens.audio_out),
            torch.full((7,), tokens.audio_delay),
            closing,
        ]
    )
    if rule == "stock":
        # HiggsAudioV2Processor(..., output_labels=True): all but audio placeholders,
        # audio_out_bos and padding; codes, but neither BOS nor EOS
        labels = torch.where(
            (ids == tokens.audio_out) | (ids == config.audio_bos_token_id), IGNORE, ids
        )
        return Sample(ids, labels, audio_ids, torch.where(audio_ids >= 1024, IGNORE, audio_ids))
    labels = torch.full_like(ids, IGNORE)
    labels[len(prompt)], labels[-3:-1] = ids[len(prompt)], ids[-3:-1]
    return Sample(ids, labels, audio_ids, audio_labels)


class Samples(SampleDataset):
    "The samples of one step, made up instead of encoded."

    def __init__(self, config, rule, lengths=LENGTHS):
        g = torch.Generator().manual_seed(0)
        self.samples = [
            replace(make_sample(n, config, rule, g), id=str(i)) for i, n in enumerate(lengths)
        ]
        super().__init__(self.samples, byte_tokenizer(), None, tokens_of(config))

    def __getitem__(self, i):
        return self.samples[i]


class Stopwatch(Callback):
    "Seconds from the end of each step to the end of the next, and the loss of each."

    def __init__(self):
        self.seconds, self.losses = [], []

    def on_step_end(self, trainer):
        now = time.perf_counter()
        if trainer.state.global_step > 1:
            self.seconds.append(now - self.last)
        self.last = now

    def on_log(self, trainer, logs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class StockStopwatch(TrainerCallback):
    "Calls a `Stopwatch` at the events of transformers' own trainer."

    def __init__(self, watch: Stopwatch):
        self.watch = watch

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.on_step_end(SimpleNamespace(state=state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.watch.on_log(None, logs or {})


class Ours(HiggsTrainer):
    """What happens once, before the first step, is left out: made-up labels would not pass the
    audit.
    """

    def before_training(self):
        pass


@dataclass
class Arm:
    "One way of training, with a model of its own."

    name: str
    config: HiggsAudioV2Config
    folder: str
    lengths: tuple = LENGTHS
    dropout: float = 0.0  # of the adapters' inputs

    def __post_init__(self):
        torch.manual_seed(0)
        kind, rule = (
            (HiggsAudioV2ForConditionalGeneration, "stock")
            if self.name == "stock"
            else (HiggsAudioForTraining, "stock" if self.name == "equal" else "ours")
        )
        torch.set_default_dtype(DTYPE)  # never twice as large, on a card that it just fits
        try:
            with torch.device(DEVICE):
                base = kind(self.config, use_text_head=True)
        finally:
            torch.set_default_dtype(torch.float32)
        start = torch.Generator(DEVICE).manual_seed(1)
        with torch.no_grad():  # the same base, in whatever order a class makes its parts
            for _, p in sorted(base.named_parameters()):
                if p.ndim > 1:
                    p.normal_(std=0.02, generator=start)
        base.to(DTYPE)
        self.data = Samples(self.config, rule, self.lengths)
        torch.manual_seed(0)
        if self.name == "stock":
            self.model = get_peft_model(
                base,
                LoraConfig(
                    r=16, lora_alpha=32, lora_dropout=self.dropout, target_modules=list(MATRICES)
                ),
            )
        else:
            self.model = apply_lora(
                base, create_lora_config("all", r=16, alpha=32, dropout=self.dropout)
            )
        with torch.no_grad():
            for _, p in sorted(
                (n, p)
                for n, p in self.model.named_parameters()
                if p.requires_grad and "lora_A" in n
            ):
                p.normal_(std=0.02, generator=start)

    def train(self, steps: int, whole: bool = False) -> Stopwatch:
        """`steps` optimizer steps. `whole`: all samples in one batch, and the plain mean of each
        loss, codebooks added up.
        """
        watch = Stopwatch()
        options = dict(
            max_steps=steps,
            bf16=DTYPE == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            seed=0,
        )
        if self.name == "stock":
            fields, collate = (
                (
                    "input_ids",
                    "attention_mask",
                    "labels",
                    "audio_input_ids",
                    "audio_labels",
                    "audio_input_ids_mask",
                ),
                PaddedCollator(self.data.tokens),
            )
            batch = (
                dict(per_device_train_batch_size=16, gradient_accumulation_steps=1)
                if whole
                else dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
            )
            if DEVICE == "cuda":
                options["bf16"] = (
                    # under autocast, a GPU adds up the codebooks in float32, and transformers
                    # 5.23 fails to put them among bfloat16 text
                    False
                )
            trainer = Trainer(
                self.model,
                TrainingArguments(self.folder, remove_unused_columns=False, **batch, **options),
                train_dataset=self.data,
                callbacks=[StockStopwatch(watch)],
                data_collator=lambda samples: {
                    k: v for k, v in collate(samples).items() if k in fields
                },
            )
            trainer.remove_callback(PrinterCallback)
            if whole:
                trainer.model_accepts_loss_kwargs = (
                    False  # else the audio loss is divided by the number of text labels
                )
        else:
            trainer = Ours(
                self.model,
                HiggsTrainingArguments(
                    self.folder,
                    token_budget=max(4096, sum(self.lengths)),
                    probe="off",
                    audio_loss_weight=8.0,
                    **options,
                ),
                self.data,
                callbacks=[watch],
            )
        trainer.train()
        return watch

    def bytes(self) -> int:
        "What the weights take."
        return sum(p.nbytes for p in self.model.parameters())

    def useful(self) -> float:
        "Operations of one step that count."
        layer = self.model.get_base_model().model.layers[0]

        def size(module):
            return sum(p.numel() for n, p in module.named_parameters() if "lora" not in n)

        tokens, frames = (
            sum(self.data.lengths),
            sum(int((s.audio_labels[1:] != IGNORE).any(1).sum()) for s in self.data.samples),
        )
        text = sum(int((s.labels[1:] != IGNORE).sum()) for s in self.data.samples)
        width = self.config.hidden_size
        return 4.0 * (
            self.config.num_hidden_layers * (size(layer.self_attn) + size(layer.mlp)) * tokens
            + 8 * CODES * width * frames
            + self.config.vocab_size * width * text
        )


def matrix_rate(n: int = 4096 if DEVICE == "cpu" else 8192) -> float:
    "Operations a second of a large matrix product of random numbers, in the precision of the arms."
    a, wait = (
        torch.randn(n, n, device=DEVICE).to(DTYPE),
        torch.cuda.synchronize if DEVICE == "cuda" else int,
    )

    def once():
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        return time.perf_counter() - start

    once()
    return 2 * n**3 / min(once() for _ in range(3 if DEVICE == "cpu" else 20))


def speed(
    size: str, turns: int, steps: int, names=("stock", "ours", "equal"), dropout: float = 0.0
) -> list[dict]:
    "The arms in turn."
    with tempfile.TemporaryDirectory() as folder:
        arms = [Arm(name, configuration(size), folder, dropout=dropout) for name in names]
        seconds, rates, held = {a.name: [] for a in arms}, [matrix_rate()], {}
        for _ in range(turns):
            for arm in arms:
                if DEVICE == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    others = torch.cuda.memory_allocated() - arm.bytes()
                seconds[arm.name] += arm.train(steps).seconds
                if DEVICE == "cuda":
                    held[arm.name] = dict(
                        resident_gb=arm.bytes() / 1e9,
                        peak_gb=(torch.cuda.max_memory_allocated() - others) / 1e9,
                    )
                rates.append(matrix_rate())
        tokens, rate = sum(LENGTHS), max(rates)
        return [
            dict(
                size=size,
                arm=a.name,
                tokens_per_second=tokens / median(seconds[a.name]),
                ratio=median(seconds["stock"]) / median(seconds[a.name]),
                useful_gflops=a.useful() / median(seconds[a.name]) / 1e9,
                share=a.useful() / median(seconds[a.name]) / rate,
                matrix_gflops=rate / 1e9,
                seconds=[round(s, 4) for s in seconds[a.name]],
                **held.get(a.name, {}),
            )
            for a in arms
        ]


def memory(size: str, name: str) -> dict:
    "Largest resident set in GB, loaded and after two steps, of a process that runs this arm alone."
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import "
        f"train_step; train_step.measure_memory({size!r}, {name!r})"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def measure_memory(size: str, name: str):
    """Print what /proc says of this process (Linux); getrusage would count the process that
    started it.
    """

    def gigabytes(field):
        return (
            next(
                int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)
            )
            * 1024
            / 1e9
        )

    with tempfile.TemporaryDirectory() as folder:
        arm = Arm(name, configuration(size), folder)
        resident = gigabytes("VmRSS")
        arm.train(2)
    print(json.dumps(dict(resident_gb=resident, peak_gb=gigabytes("VmHWM"))))


def agreement(steps: int = 50, size: str = "512x8192") -> dict:
    """The losses of both arms on equal labels, step by step, as means over text and the eight
    codebooks.
    """
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = (
            Arm(name, configuration(size, 4), folder).train(steps, whole=True).losses
            for name in ("stock", "equal")
        )
    gaps = [abs(a - b) / 9 for a, b in zip(stock, ours)]
    return dict(
        size=size,
        layers=4,
        steps=steps,
        stock=[x / 9 for x in stock],
        ours=[x / 9 for x in ours],
        largest_gap=max(gaps),
        first_gap=gaps[0],
    )


def growth(size: str = "512x128256") -> list[dict]:
    "Seconds of a step of ours by its tokens."
    rows = []
    for times in (1, 2, 4, 8):
        lengths = tuple(n for n in LENGTHS[:5] * times if n)
        with tempfile.TemporaryDirectory() as folder:
            seconds = Arm("ours", configuration(size), folder, lengths).train(4).seconds
        rows.append(dict(size=size, tokens=sum(lengths), seconds=min(seconds)))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES if DEVICE == "cpu" else ("released",),
        metavar="WIDTHxVOCABULARY",
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each arm")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps a turn; the first does not count"
    )
    parser.add_argument(
        "--only", choices=("speed", "dropout", "agreement", "growth"), help="one part"
    )
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = dict(
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        processor=platform.processor() or platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
        precision=str(DTYPE).removeprefix("torch."),
        **(dict(gpu=torch.cuda.get_device_name()) if DEVICE == "cuda" else {}),
    )
    if DTYPE == torch.float32:
        print("this CPU has no instructions for bfloat16: both arms are measured in float32")
    if args.only in (None, "speed"):
        rows = [r for r in results.get("speed", []) if r["size"] not in args.sizes]
        print(
            f"{'width x vocabulary':<20}{'arm':<8}{'tokens/s':>10}{'ratio':>8}{'GFLOP/s':>9}"
            f"{'share':>8}{'peak GB':>9}{'above the model':>17}"
        )
        for size in args.sizes:
            for row in speed(size, args.turns, args.steps):
                if DEVICE == "cpu":
                    row |= memory(size, row["arm"])
                rows.append(row)
                print(
                    f"{size:<20}{row['arm']:<8}{row['tokens_per_second']:>10,.0f}"
                    f"{row['ratio']:>8.2f}{row['useful_gflops']:>9.0f}{row['share']:>8.1%}"
                    f"{row['peak_gb']:>9.2f}"
                    f"{row['peak_gb'] - row['resident_gb']:>17.2f}",
                    flush=True,
                )
        results["speed"] = sorted(
            rows, key=lambda r: (r["size"] == "released" or int(r["size"].split("x")[0]), r["size"])
        )
    if args.only in (None, "dropout"):
        results["dropout"] = speed(
            "512x128256" if DEVICE == "cpu" else "released",
            args.turns,
            args.steps,
            ("stock", "ours"),
            0.1,
        )
        for row in results["dropout"]:
            print(
                f"dropout 0.1 in the adapters, {row['size']}, {row['arm']}: "
                f"{row['tokens_per_second']:,.0f} tokens/s, ratio {row['ratio']:.2f}",
                flush=True,
            )
    if args.only in (None, "agreement"):
        results["agreement"] = a = agreement()
        print(
            f"losses of {a['steps']} steps on equal labels: {a['stock'][0]:.3f} -> "
            f"{a['stock'][-1]:.3f}, largest gap {a['largest_gap']:.1e}, at the first "
            f"step {a['first_gap']:.1e}"
        )
    if args.only in (None, "growth"):
        results["growth"] = growth()
        for row in results["growth"]:
            print(
                f"{row['tokens']:>6,} tokens: {row['seconds']:.2f} s, "
                f"{1000 * row['seconds'] / row['tokens']:.2f} s per 1,000"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
