"""Rehearsal of a Higgs Audio V3 in two processes: each speaks its share, both train on all of it,
and a run that was interrupted goes on with the same clips.
"""

import multiprocessing
import os
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import launch_run
from miniature import V3_SIZES, end_early, write_recordings, write_v3_base
from safetensors.torch import load_file

import higgs_nb.tasks.rehearsal as rehearsal
from higgs_nb.core.files import load_json
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.prompt import byte_tokenizer
from higgs_nb.family import HIGGS_V3
from higgs_nb.model.v3 import tiny_v3_model
from higgs_nb.speech.own_speech import controlled_requests, own_speech
from higgs_nb.training.processes import join_processes, leave_processes

RECIPE = dict(codec="world", learning_rate=5e-3, warmup=1, rank=4, token_budget=512, epochs=0)
RECIPE |= dict(steps=4, eval_every=4, save_every=2, max_speech_s=0.4, rehearse=1.0)


class MadeUp:
    "A store of made-up codes."

    def get(self, audio):
        return torch.arange(8 * 9).view(8, 9) % 1024


def speak(rank, processes, port):
    "Ids that this process speaks, and ids and codes of what all of them do."
    own = []

    def counted(model, tokenizer, requests, *args, **options):
        own.extend(request.id for request in requests)
        return own_speech(model, tokenizer, requests, *args, **options)

    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    join_processes(on_cpu=True)
    tokenizer = byte_tokenizer(HIGGS_V3)
    model = tiny_v3_model(tokenizer, **V3_SIZES)
    end_early(model)
    talks = [tts_conversation(f"Text {i}.", Audio(f"{i}.wav"), id=str(i)) for i in range(5)]
    requests = controlled_requests(talks, HIGGS_V3, 5)
    rehearsal.own_speech = counted
    try:
        spoken, codes = rehearsal.spoken_together(
            model, tokenizer, requests, MadeUp(), seed=3, max_frames=12
        )
    finally:
        leave_processes()
    return own, [c.id for c in spoken], {name: clip.tolist() for name, clip in codes.items()}


def speak_in(processes):
    "What each of so many processes returns."
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(speak, rank, processes, port) for rank in range(processes)]
        return [one.result(timeout=300) for one in started]


@pytest.mark.slow
def test_each_process_speaks_its_share():
    "Of five requests, three and two; both get all five, and the codes that one process gets."
    names = [f"rehearsal/{i}" for i in range(5)]
    [alone] = speak_in(1)
    first, second = speak_in(2)
    assert alone[0] == names and first[0] == names[::2] and second[0] == names[1::2]
    assert alone[1:] == first[1:] == second[1:] and alone[1] == names
    assert len({str(clip) for clip in alone[2].values()}) == 5, "each has a seed of its own"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Directories of a run of two processes, and of one whose last two steps were taken again."
    folder = tmp_path_factory.mktemp("runs")
    write_v3_base(folder / "base", RECIPE, ends=True)
    write_recordings(folder / "recordings", 4)
    given = dict(base=folder / "base", data=folder / "recordings", device="cpu", speak=0, table=1)
    words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    words += ["-p", "workers=1"]
    launch_run(folder / "whole", *words)
    cut = shutil.copytree(folder / "whole", folder / "cut")
    for name in ("checkpoint-4", "adapter", "samples"):
        shutil.rmtree(cut / name, ignore_errors=True)
    (cut / "run.json").unlink()
    kept = cut / rehearsal.SPOKEN
    before = kept.stat().st_mtime_ns
    assert "goes on from" in launch_run(cut, *words)
    assert kept.stat().st_mtime_ns == before, "spoken again"
    return folder


@pytest.mark.slow
def test_both_train_on_what_all_have_spoken(runs):
    record = load_json(runs / "whole" / "run.json")
    spoken, codes = rehearsal.load_spoken(runs / "whole" / rehearsal.SPOKEN)
    assert record["processes"] == 2 and record["corpus"]["rehearsed"] == len(spoken) > 1
    assert [c.id for c in spoken] == [f"rehearsal/{i}" for i in range(len(spoken))]
    assert {clip.shape[1] for clip in codes.values()} == {8}
    for executed in ("train.ipynb", "process-1/train.ipynb"):
        text = (runs / "whole" / executed).read_text(encoding="utf-8")
        assert f"{len(spoken)} utterances to rehearse" in text


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_bit(runs):
    whole, again = (
        load_file(runs / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert whole.keys() == again.keys() and all(whole[name].equal(again[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name)
