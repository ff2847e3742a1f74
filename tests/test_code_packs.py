"""Codes of a corpus in packs: the same bytes however they were made, and nothing that changed or
was cut off goes unnoticed.
"""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_codec_store import Loudness

from higgs_nb.data import recording_digests
from higgs_nb.data.audio import load_audio
from higgs_nb.data.code_packs import CodePack, PackFolder
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.conversation import Audio
from higgs_nb.data.dask_workers import dask_client
from higgs_nb.data.prepared_codes import check_prepared

CODEC = Loudness()


class Patient(Loudness):
    "Takes its time, so that there is a middle in which to be killed."

    concurrency = "processes"

    def encode(self, waveform):
        time.sleep(0.1)
        return super().encode(waveform)


def recordings(folder, count=12):
    "Noise, a little longer from one to the next."
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    audios = []
    for i in range(count):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.standard_normal(4000 + 1000 * i) * 0.1, 24000)
        audios.append(Audio(str(path)))
    return audios


def store_at(root, codec=CODEC, **options):
    "A store with five recordings in each pack."
    store = CodeStore(root, codec, **options)
    store.per_pack = 5
    return store


def encode(root, audios, codec=CODEC, **options):
    return store_at(root, codec).encode_all(audios, False, **options)


def content(root):
    """Codes and index of a store, by name: without the times of recordings, and hidden files that
    a killed process was writing.
    """
    files = (path for path in Path(root).glob("*/[!.]*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def right(root, audios, codec=CODEC):
    "Whether a store has the codes of all recordings, without encoding any."
    store = CodeStore(root, codec)
    same = all(torch.equal(store.get(audio), codec.encode(load_audio(audio))) for audio in audios)
    return same and store.misses == 0


def test_files_of_their_own_become_packs(tmp_path):
    "As earlier versions wrote them; not one is encoded again, and the packs are the same."
    audios = recordings(tmp_path / "audio")
    old = store_at(tmp_path / "old")
    for audio in reversed(audios):
        old.get(audio)
    assert len(list(tmp_path.glob("old/*/*.npy"))) == 12
    assert encode(tmp_path / "old", audios) == dict(clips=12, hits=12, misses=0)
    assert encode(tmp_path / "new", audios) == dict(clips=12, hits=0, misses=12)
    assert content(tmp_path / "old") == content(tmp_path / "new")
    assert len(content(tmp_path / "new")) == 3 and right(tmp_path / "old", audios)


def test_a_corpus_that_grows_gets_one_more_pack(tmp_path):
    audios = recordings(tmp_path / "audio")
    encode(tmp_path / "codes", audios[:7])
    before = content(tmp_path / "codes")
    assert encode(tmp_path / "codes", audios)["misses"] == 5
    after = content(tmp_path / "codes")
    assert before.items() <= after.items() and len(after) == 3
    assert right(tmp_path / "codes", audios)


@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago."
    monkeypatch.setattr(recording_digests, "SETTLED_NS", -(10**12))


def test_a_replaced_recording_is_noticed_and_a_copy_is_not_encoded(tmp_path, settled):
    "Also one of the same size, with the old time of change."
    audios = recordings(tmp_path / "audio")
    encode(tmp_path / "codes", audios)
    again = store_at(tmp_path / "codes")
    assert again.encode_all(audios, False)["misses"] == 0 and again.digests.read_files == 0
    path, state = Path(audios[3].path), os.stat(audios[3].path)
    data = bytearray(path.read_bytes())
    data[-400:] = bytes(400)
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    copy = Audio(str(shutil.copy(audios[5].path, tmp_path / "audio/copy.wav")))
    os.rename(audios[6].path, tmp_path / "audio/renamed.wav")
    audios[6] = Audio(str(tmp_path / "audio/renamed.wav"))
    counts = encode(tmp_path / "codes", [*audios, copy])
    assert counts == dict(clips=13, hits=12, misses=1)
    assert right(tmp_path / "codes", [*audios, copy])


def test_codes_suffice_where_recordings_are_gone(tmp_path, settled):
    "Known by their paths, also after the folder was moved."
    audios = recordings(tmp_path / "corpus")
    encode(tmp_path / "corpus/codes", audios)
    wanted = [CODEC.encode(load_audio(audio)) for audio in audios]
    for audio in audios:
        os.unlink(audio.path)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    moved = [Audio(str(tmp_path / "moved" / Path(audio.path).name)) for audio in audios]
    store = store_at(tmp_path / "moved/codes")
    assert store.encode_all(moved, False) == dict(clips=12, hits=12, misses=0)
    assert all(torch.equal(store.get(a), codes) for a, codes in zip(moved, wanted, strict=True))
    with pytest.raises(FileNotFoundError, match=r"99\.wav"):
        store.get(str(tmp_path / "moved/99.wav"))


def test_lengths_are_known_without_opening_a_pack(tmp_path):
    audios = recordings(tmp_path / "audio")
    store = CodeStore(tmp_path / "codes", CODEC)
    store.per_pack = 1
    store.encode_all(audios, False)
    lengths = [CODEC.encode(load_audio(audio)).shape[1] for audio in audios]
    again = CodeStore(tmp_path / "codes", CODEC)
    assert again.frames(audios).tolist() == lengths and not again.packs[0].opened
    fresh = CodeStore(tmp_path / "other", CODEC)
    assert fresh.frames(audios[:2]).tolist() == lengths[:2] and fresh.misses == 2


@pytest.mark.parametrize("damage", ["cut", "code", "table", "exchanged", "index"])
def test_a_damaged_file_is_named(tmp_path, damage):
    audios = recordings(tmp_path / "audio", count=9)
    store = CodeStore(tmp_path / "codes", CODEC)
    store.per_pack = 1
    store.encode_all(audios, False)
    packs = sorted(tmp_path.glob("codes/*/codes-*"))
    [index] = tmp_path.glob("codes/*/index-*")
    broken = index if damage == "index" else packs[0]
    data = bytearray(broken.read_bytes())
    if damage == "cut":
        data = data[:-5]
    elif damage == "exchanged":
        data = packs[1].read_bytes()
    else:
        data[-100 if damage == "table" else CodePack(packs[0], "loudness").all_codes.offset] ^= 1
    broken.write_bytes(data)
    with pytest.raises(ValueError, match=f"{broken.name}.*delete it"):
        CodeStore(tmp_path / "codes", CODEC).encode_all(audios, False)
    if damage != "index":
        index.unlink()  # it was of the pack that is deleted
    broken.unlink()
    assert encode(tmp_path / "codes", audios)["misses"] == (damage != "index")
    assert right(tmp_path / "codes", audios)


def test_a_pack_of_another_codec_or_with_other_codes_is_refused(tmp_path):
    "Whoever made it: its codes are those of the codec, or an error."
    audios = recordings(tmp_path / "audio", count=1)
    encode(tmp_path / "codes", audios)
    [pack] = tmp_path.glob("codes/*/codes-*")
    with pytest.raises(ValueError, match=f"{pack.name} is of another codec"):
        PackFolder(pack.parent, "another")
    check_prepared(tmp_path, CODEC)
    [digest] = CodeStore(tmp_path / "codes", CODEC).digests.of(audios)
    for codes in (np.full((4, 3), 16, np.int16), np.zeros((5, 3), np.int16)):
        for path in tmp_path.glob("codes/*/*"):
            path.unlink()
        store = CodeStore(tmp_path / "codes", CODEC)
        store._memory[store.file_of(digest)] = codes
        store.pack([digest.tobytes()])
        with pytest.raises(ValueError, match="delete it"):
            CodeStore(tmp_path / "codes", CODEC).get(audios[0])


def encode_until_killed(root, audios, renames):
    "Encode in a child that kills itself instead of its rename number `renames`."
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(target)
        if len(calls) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = killed
    encode(root, audios)
    os._exit(0)


@pytest.mark.parametrize("renames", [1, 3, 6, 9, 13, 15])
def test_resumed_after_kill_9_the_store_is_the_same(tmp_path, renames):
    "In the middle of a recording, of a pack, and between the two."
    audios = recordings(tmp_path / "audio")
    assert encode_until_killed(tmp_path / "codes", audios, renames) == signal.SIGKILL
    store = CodeStore(tmp_path / "codes", CODEC)
    made = sum(store.stored(digest) is not None for digest in store.digests.of(audios))
    assert made or renames == 1
    assert encode(tmp_path / "codes", audios)["misses"] == 12 - made, "none twice"
    encode(tmp_path / "whole", audios)
    assert content(tmp_path / "codes") == content(tmp_path / "whole")
    assert len(content(tmp_path / "codes")) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_make_the_same_packs(tmp_path, workers):
    audios = recordings(tmp_path / "audio")
    encode(tmp_path / "codes", audios, Patient(), workers=workers)
    encode(tmp_path / "one", audios)
    assert content(tmp_path / "codes") == content(tmp_path / "one")


@pytest.mark.slow
def test_a_lost_worker_of_dask_loses_nothing(tmp_path):
    "Two workers, one of them killed in the middle: the same store, byte for byte, as one process."
    distributed = pytest.importorskip("distributed")
    audios = recordings(tmp_path / "audio", count=30)
    encode(tmp_path / "one", audios)
    options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**options, local_directory=str(tmp_path)) as cluster:
        with distributed.Client(cluster) as client:
            pids = list(client.run(os.getpid).values())
        store, counts = store_at(tmp_path / "codes", Patient()), {}

        def prepare():
            counts.update(store.encode_all(audios, False, scheduler=cluster.scheduler_address))

        thread = threading.Thread(target=prepare)
        thread.start()
        until = time.time() + 120
        while len(content(tmp_path / "codes")) < 4 and thread.is_alive():
            assert time.time() < until
            time.sleep(0.02)
        assert thread.is_alive()
        os.kill(pids[0], signal.SIGKILL)
        thread.join(120)
    assert counts == dict(clips=30, hits=0, misses=30)
    assert content(tmp_path / "codes") == content(tmp_path / "one")
    assert len(content(tmp_path / "codes")) == 6 and right(tmp_path / "codes", audios)


def test_a_scheduler_that_cannot_be_used(tmp_path):
    distributed = pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="no Dask scheduler answers at nowhere"):
        dask_client("nowhere")
    options = dict(n_workers=0, processes=False, dashboard_address=None)
    with distributed.LocalCluster(**options, local_directory=str(tmp_path)) as cluster:
        with pytest.raises(ValueError, match="has no workers: start some with `dask worker"):
            dask_client(cluster.scheduler_address)
