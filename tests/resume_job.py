"""Training on a made-up corpus, in processes of their own: what test_resume.py and test_ranks.py
start, stop and compare.
"""

import csv
import json
import os
import resource
import socket
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from conftest import fork_server
from transformers import BitsAndBytesConfig

from higgs_nb.data.balance import Balance
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Conversation
from higgs_nb.data.drawn import DrawnDataset
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.references import ReferenceShares
from higgs_nb.data.sample_dataset import SampleDataset
from higgs_nb.model.load import load_model
from higgs_nb.model.lora import apply_lora, create_lora_config
from higgs_nb.model.model import HiggsAudioForTraining, tiny_config
from higgs_nb.training.arguments import HiggsTrainingArguments
from higgs_nb.training.callbacks import Callback, EarlyStoppingCallback
from higgs_nb.training.loop import HiggsTrainer
from higgs_nb.training.speak import SpeechCallback

SMALL = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, codebook_size=34)
TIMES = (
    "tokens_per_second",
    "budget_filled",
    "memory_mb",
    "share_of_peak",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_tokens_per_second",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)


class Melodies:
    "Made-up codes: one melody, cut to different lengths and begun at different notes."

    period = torch.randint(0, 32, (8, 5), generator=torch.Generator().manual_seed(0))

    def get(self, audio):
        n = int(audio.path)
        return self.period.roll(n, 1).repeat(1, n // 5 + 1)[:, :n]


def sentence(n):
    return Conversation.from_dict(
        dict(
            messages=[
                dict(role="user", content="La " * (n % 4 + 1)),
                dict(role="assistant", content={"type": "audio", "path": str(n)}),
            ]
        ),
        id=f"s{n}",
    )


def make_trainer(
    folder,
    frames=range(20, 60, 2),
    held_out=range(21, 60, 8),
    model=(),
    adapter=(),
    dtype="float32",
    audio_attention=False,
    callbacks=(),
    own_optimizer=False,
    base=None,
    quantization=None,
    tokenizer=None,
    drawn=False,
    **args,
):
    """A trainer of 40 steps of two micro-batches, 6 steps an epoch; `frames`: lengths of the
    training clips; `adapter`: more for its configuration, None: the model itself is trained,
    but for one embedding; `own_optimizer`: one made by hand, with two groups of parameters;
    `base`: directory of a model, to be loaded with `quantization`, instead of a made one;
    `tokenizer`: another one than the byte tokenizer; `drawn`: speakers by temperature, and a
    reference for most samples.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = tokenizer or byte_tokenizer()
    config = tiny_config(tokenizer, **{**SMALL, **dict(model)})
    config.use_audio_out_self_attention = audio_attention
    torch.manual_seed(0)
    base = (
        load_model(str(base), quantization_config=BitsAndBytesConfig(**quantization))
        if base
        else HiggsAudioForTraining(config).to(getattr(torch, dtype))
    )
    torch.manual_seed(0)  # the same adapter, however the base was made
    if adapter is None:
        adapted = base.train()
        base.model.embed_tokens.requires_grad_(False)
    else:
        adapted = apply_lora(
            base,
            create_lora_config(
                **{
                    **dict(targets="all", r=4, dropout=0.2, train=("audio_lm_head",)),
                    **dict(adapter),
                }
            ),
        )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(
            [dict(params=trained[:3], lr=1e-2), dict(params=trained[3:])], lr=3e-2, momentum=0.9
        )
        if own_optimizer
        else None
    )
    tokens = AudioTokens.from_config(base.config, tokenizer)
    data, held = (
        SampleDataset([sentence(n) for n in numbers], tokenizer, Melodies(), tokens)
        for numbers in (frames, held_out)
    )
    if drawn:
        talks = [
            replace(c, speaker=f"speaker {n % 5 // 2}") for n, c in enumerate(data.conversations)
        ]
        how = dict(balance=Balance(3), shares=ReferenceShares(0.5, 0.2))
        data = DrawnDataset(talks, tokenizer, Melodies(), tokens, **how)
    settings = dict(
        token_budget=220,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        warmup_steps=5,
        max_steps=40,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=100,
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        probe="warn",
    )
    return HiggsTrainer(
        adapted,
        HiggsTrainingArguments(output_dir=str(folder), **{**settings, **args}),
        data,
        held if len(held) else None,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


class Die(Callback):
    """Sends a signal to this process, `times` times, between the two micro-batches of step `step`
    + 1; with a `rank`, only in that process. What is being saved then in the background is
    there before.
    """

    def __init__(self, step, number, times=1, rank=None):
        self.step, self.number, self.times, self.rank = step, number, times, rank

    def on_substep_end(self, trainer):
        args, state = trainer.args, trainer.state
        if state.global_step == self.step and self.rank in (None, args.process_index):
            due = Path(args.output_dir) / f"checkpoint-{self.step - self.step % state.save_steps}"
            while due.name != "checkpoint-0" and not due.exists():
                time.sleep(0.01)
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class FullDisk(Callback):
    "From step `first` to step `last`, no file of this process can become larger than 40 kB."

    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_step_begin(self, trainer):
        full = self.first <= trainer.state.global_step + 1 <= self.last
        resource.setrlimit(
            resource.RLIMIT_FSIZE,
            (40_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        )


def train(
    folder, resume=None, force=False, die=None, full=None, patience=None, speak=False, **settings
):
    """One process of a run; `die`, `full` and `patience`: arguments of callbacks; `speak`: before,
    every three steps and after.
    """
    torch.set_num_threads(1)
    callbacks = [
        kind(*given)
        for kind, given in ((Die, die), (FullDisk, full), (EarlyStoppingCallback, patience))
        if given
    ]
    if speak:
        callbacks.append(
            SpeechCallback(
                ["La", "La la"],
                load_codec(),
                byte_tokenizer(),
                Path(folder) / "samples",
                every=3,
                max_frames=12,
            )
        )
    trainer = make_trainer(folder, callbacks=callbacks, **settings)
    trainer.train(resume, resume_force=force)
    return trainer


def _process(function, rank, world, port, args, kwargs):
    with open(Path(args[0]) / f"said-{rank}.txt", "a") as said:
        os.dup2(said.fileno(), 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="lo",
        )
    function(*args, **kwargs)


def start(function, folder, *args, ranks=1, **kwargs):
    """Start `function(folder, ...)` in `ranks` new processes; `said-RANK.txt` in `folder` gets
    what they say.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found = [
        fork_server().Process(
            target=_process, args=(function, rank, ranks, port, (str(folder), *args), kwargs)
        )
        for rank in range(ranks)
    ]
    for p in found:
        p.start()
    return found


def finish(processes, timeout=300):
    """Exit codes; when one process ends badly the others, which would wait for it, are ended, as
    launchers do.
    """
    until = time.monotonic() + timeout
    while any(p.is_alive() for p in processes):
        if time.monotonic() > until or any(p.exitcode not in (None, 0, 75) for p in processes):
            time.sleep(1)
            for p in processes:
                p.kill()
        time.sleep(0.05)
    return [p.exitcode for p in processes]


def run(folder, ranks=1, **settings):
    "Exit codes of a run."
    return finish(start(train, folder, ranks=ranks, **settings))


def said(folder):
    return "".join(f.read_text() for f in sorted(Path(folder).glob("said-*.txt")))


def log(folder):
    "The log of a run without what a clock says."
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES}
        for line in (Path(folder) / "log.jsonl").read_text().splitlines()
    ]


def table(folder):
    "The rows of log.csv without what a clock says."
    with open(Path(folder) / "log.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(f)]


def whole_state(checkpoint):
    "All that a checkpoint holds, to the bit, but the seconds that it took."
    state = json.loads((checkpoint / "training_state.json").read_text())
    state.pop("seconds")
    return state, *(file.read_bytes() for file in sorted(checkpoint.glob("*.safetensors")))
