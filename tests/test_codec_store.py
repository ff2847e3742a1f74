"The code store on a disk that is full, and under processes that are killed."

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from higgs_nb.data import codec as codec_module
from higgs_nb.data.audio import load_audio
from higgs_nb.data.audit import audit
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import Codec, checked_codes, complete_frames, load_codec
from higgs_nb.data.collator import PackedCollator, PaddedCollator
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus import embedded_corpus
from higgs_nb.data.delay import undelay
from higgs_nb.data.prompt import AudioTokens, byte_tokenizer
from higgs_nb.data.samples import SampleDataset

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
    stored = sorted(tmp_path.rglob("*.npy"))
    assert len(stored) == 3 and not list(tmp_path.rglob("*.part"))
    assert all(np.load(path, allow_pickle=False).shape[0] == 8 for path in stored)


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
    with pytest.raises(ValueError, match="is not a codec: give a kind"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is not a codec"):
        load_codec(tmp_path)
