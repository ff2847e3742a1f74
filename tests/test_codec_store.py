"The code store on a disk that is full, and under processes that are killed."

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tiny_codec import needs_torchaudio, tiny_higgs_codec

from higgs_nb.data import codec as codec_module
from higgs_nb.data.audio import load_audio
from higgs_nb.data.audit import audit
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import Codec, checked_codes, complete_frames, load_codec
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.data.delay import undelay
from higgs_nb.data.problems import AudioError
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.sample_dataset import SampleDataset

CLIPS = sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[:3]

HEAD = """
import sys, resource, signal, os
from higgs_nb.data.conversation import Audio
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
root, *clips = sys.argv[1:]
store = CodeStore(root, load_codec())
"""


def run(code, root):
    return subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(code), root, *map(str, CLIPS)],
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    sys.platform == "win32", reason="RLIMIT_FSIZE stands for a full disk, and Windows has none"
)
def test_full_disk(tmp_path):
    full = run(
        """
        store.get(Audio(clips[0]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        store.get(Audio(clips[1]))
        """,
        tmp_path,
    )
    assert full.returncode == 1
    last = full.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("OSError")
        and "could not be stored" in last
        and str(tmp_path) in last
        and ".npy" in last
    ), full.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1, "the clip before is stored, of this one nothing"
    again = run("print(store.encode_all([Audio(c) for c in clips], progress=False))", tmp_path)
    assert again.stdout.strip() == "{'clips': 3, 'hits': 1, 'misses': 2}", again.stderr


def test_killed_while_writing(tmp_path):
    killed = run(
        """
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        store.get(Audio(clips[0]))
        """,
        tmp_path,
    )
    assert killed.returncode == -9, killed.stderr
    again = run("print(store.encode_all([Audio(c) for c in clips], progress=False))", tmp_path)
    assert again.stdout.strip() == "{'clips': 3, 'hits': 0, 'misses': 3}", again.stderr


def test_two_processes_at_once(tmp_path):
    code = "print(store.encode_all([Audio(c) for c in clips], progress=False)['clips'])"
    command = [sys.executable, "-c", HEAD + code, tmp_path, *map(str, CLIPS)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["3", "3"]
    files = [path.name for path in tmp_path.glob("*/*")]
    assert len(files) == 1 and files[0].startswith("codes-"), "a pack, and nothing half written"
    codec = load_codec()
    store = CodeStore(tmp_path, codec)
    assert all(torch.equal(store.get(clip), codec.encode(load_audio(clip))) for clip in CLIPS)
    assert (store.hits, store.misses) == (3, 0)


class Loudness(Codec):
    "12.5 frames per second, 4 codebooks of 16 entries: how loud each quarter of a frame is."

    frame_rate, num_codebooks, codebook_size, fingerprint = 12.5, 4, 16, "loudness"

    @classmethod
    def recognises(cls, name):
        return str(name).endswith(".loudness")

    @classmethod
    def from_pretrained(cls, name=None):
        return cls()

    def encode(self, waveform):
        level = np.abs(complete_frames(waveform, self).reshape(-1, 4, 480)).mean(2)
        return torch.from_numpy((level * 40).clip(0, 15)).long().T

    def decode(self, codes):
        return (checked_codes(codes, self).T.flatten() / 40).repeat_interleave(480)


class Suicidal(Loudness):
    "Its second recording ends the process, as the system does where memory is used up."

    concurrency, folder = "processes", ""

    def __init__(self):
        self.here = self.folder

    def encode(self, waveform):
        if any(name.endswith(".npy") for _, _, names in os.walk(self.here) for name in names):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(waveform)


class Slow(Loudness):
    "A recording takes a minute; a file beside the codes says that it has begun."

    concurrency = "processes"

    def encode(self, waveform):
        folder = Path(sys.argv[1]) / f"{self.fingerprint[:16]}-v2"
        (folder / f"{os.getpid()}.begun").write_text("")
        time.sleep(60)
        return super().encode(waveform)


def test_a_codec_of_another_rate_and_another_number_of_codebooks(tmp_path, monkeypatch):
    "From a recording to a batch and back, with nothing but a line in the list of codecs."
    monkeypatch.setitem(codec_module.CODECS, "loudness", f"{__name__}:Loudness")
    codec = load_codec("any.loudness")
    assert isinstance(codec, Loudness) and isinstance(load_codec("loudness"), Loudness)
    assert codec.samples_per_frame == 1920
    store = CodeStore(tmp_path, codec)
    assert store.encode_all([Audio(str(clip)) for clip in CLIPS], progress=False)["misses"] == 3
    tokenizer = byte_tokenizer()
    tokens = AudioTokens.from_tokenizer(tokenizer, codec.codebook_size, codec.num_codebooks)
    talks = [tts_conversation("Hi.", Audio(str(clip)), id=clip.stem) for clip in CLIPS]
    data = SampleDataset(talks, tokenizer, store, tokens)
    for clip, sample in zip(CLIPS, data, strict=True):
        waveform = load_audio(clip)
        frames = -(-len(waveform) // 1920)
        assert sample.audio_ids.shape == (frames + 5, 4)
        assert (sample.input_ids == tokens.audio_delay).sum() == 3
        codes, stopped = undelay(sample.audio_ids, tokens.stream_bos, tokens.stream_eos)
        assert stopped and torch.equal(codes, codec.encode(waveform))
        assert codec.decode(codes).shape == (frames * 1920,)
    for collate in (PaddedCollator(tokens), PackedCollator(tokens)):
        batch = collate(list(data))
        cells = audit(batch, tokenizer, tokens).cell_totals
        frames = sum(len(sample.audio_ids) - 5 for sample in data)
        assert cells["supervised"] == 4 * (frames + 3)
        assert cells["BOS"] == 3 * 4
        assert batch["audio_targets"].shape == (frames + 3 * 4, 4)


def test_a_folder_that_is_no_codec(tmp_path):
    with pytest.raises(ValueError, match="is not a codec: it holds neither config.json nor"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not a codec"):
        load_codec(tmp_path)


@pytest.fixture(scope="module")
def higgs(tmp_path_factory):
    "A tiny codec of the released class."
    return load_codec(tiny_higgs_codec(tmp_path_factory.mktemp("codec")))


def stored(root):
    "Whatever is in the folder of a codec, by name."
    return {path.name: path.read_bytes() for path in root.glob("*/*")}


@needs_torchaudio
def test_codes_are_the_same_for_every_number_of_workers(higgs, tmp_path):
    "One process, two, or whatever the machine allows; the files are equal to the byte."
    for workers in (1, 2, 0):
        store = CodeStore(tmp_path / str(workers), higgs)
        counts = store.encode_all([Audio(str(c)) for c in CLIPS], False, workers)
        assert counts == dict(clips=3, hits=0, misses=3)
        assert all(torch.equal(store.get(c), higgs.encode(load_audio(c))) for c in CLIPS)
        assert store.encode_all([Audio(str(c)) for c in CLIPS], False, workers)["hits"] == 3
    one, *others = (stored(tmp_path / str(workers)) for workers in (1, 2, 0))
    assert len(one) == 1 and all(other == one for other in others)


@needs_torchaudio
def test_codes_do_not_depend_on_the_threads_of_torch(higgs):
    "With more threads, sums of the same numbers differ in their last digits."
    speech, seen = load_audio(CLIPS[0]), []
    hook = higgs.model.fc.register_forward_hook(lambda module, x, y: seen.append(y))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            higgs.encode(speech)
            assert torch.get_num_threads() == threads
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@needs_torchaudio
def test_padding_changes_codes_and_equal_lengths_do_not(higgs):
    "Why recordings of different lengths are never encoded in one batch."
    clips = [torch.from_numpy(load_audio(clip))[:24000] for clip in CLIPS]
    with torch.inference_mode():
        batch = higgs.model.encode(torch.stack(clips)[:, None], return_dict=False)
    assert all(torch.equal(codes, higgs.encode(c)) for codes, c in zip(batch, clips, strict=True))
    padded = torch.cat([clips[0], torch.zeros(24000)])
    assert not torch.equal(higgs.encode(padded)[:, :25], higgs.encode(clips[0]))


@needs_torchaudio
def test_an_error_in_a_process_names_the_recording(higgs, tmp_path):
    "As without processes, with its type; what was encoded before is stored."
    (tmp_path / "text.wav").write_text("no sound")
    audios = [Audio(str(CLIPS[0])), Audio(str(tmp_path / "text.wav")), Audio(str(CLIPS[1]))]
    errors = []
    for workers in (1, 2):
        store = CodeStore(tmp_path / str(workers), higgs)
        with pytest.raises(AudioError, match="text.wav") as error:
            store.encode_all(audios, False, workers)
        errors.append((str(error.value), error.value.problems))
        assert stored(tmp_path / str(workers))
    assert errors[0] == errors[1]


def test_a_process_that_is_killed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Suicidal, "folder", str(tmp_path))
    store = CodeStore(tmp_path, Suicidal())
    with pytest.raises(RuntimeError, match="of 2 processes that encode has ended.*workers=1"):
        store.encode_all([Audio(str(c)) for c in CLIPS], False, workers=2)


SLOW = """
import signal, sys
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.conversation import Audio
sys.path.insert(0, TESTS)
from test_codec_store import Slow

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a background job
    root, *clips = sys.argv[1:]
    store = CodeStore(root, Slow())
    try:
        store.encode_all([Audio(c) for c in clips], True, workers=2)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def has_ended(process):
    "Whether a process has ended, although its parent may not have asked for its exit code."
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_no_process_outlives_the_run(tmp_path, number):
    "Each is in a recording that takes a minute."
    script = tmp_path / "slow.py"
    script.write_text(SLOW.replace("TESTS", repr(os.path.dirname(__file__))))
    command = [sys.executable, script, tmp_path / "codes", *map(str, CLIPS)]
    main = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.time() + 120
    while len(list(tmp_path.glob("codes/*/*.begun"))) < 2 and main.poll() is None:
        assert time.time() < until
        time.sleep(0.1)
    children = main.children(recursive=True)
    assert len(children) >= 2
    main.send_signal(number)
    alive = psutil.wait_procs([main, *children], timeout=40)[1]
    left = [process for process in alive if not has_ended(process)]
    for process in left:
        process.kill()
    out, err = main.communicate()
    assert not left, err
    if number == signal.SIGINT:
        assert "interrupted" in out and main.returncode == 0, err
    assert "3 of 3 recordings have to be encoded, 0.6 min of sound, in 2 processes on cpu" in out


def test_a_line_says_what_is_encoded_and_why(tmp_path, capsys):
    world = load_codec()
    audios = [Audio(str(clip)) for clip in CLIPS]
    CodeStore(tmp_path, world).encode_all(audios[:1], progress=False)
    assert not capsys.readouterr().out
    CodeStore(tmp_path, world).encode_all(audios, workers=2)
    seen = capsys.readouterr()
    assert "2 of 3 recordings have to be encoded, 0.4 min of sound, in 2 threads" in seen.out
    assert "another codec" not in seen.out
    assert "stored codes: 100%" in seen.err and "codes: 100%" in seen.err and " s [" in seen.err
    CodeStore(tmp_path, Loudness()).encode_all(audios, workers=2)
    out = capsys.readouterr().out
    assert "3 of 3 recordings have to be encoded, 0.6 min of sound, one at a time" in out
    assert f"{tmp_path} holds codes of another codec ({world.fingerprint[:16]})" in out
    CodeStore(tmp_path, Loudness()).encode_all(audios)
    assert not capsys.readouterr().out


def test_the_number_of_workers_is_checked(tmp_path):
    with pytest.raises(ValueError, match="workers is -1"):
        CodeStore(tmp_path, Loudness()).encode_all([Audio(str(CLIPS[0]))], False, workers=-1)
