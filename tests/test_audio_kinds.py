"Kinds of recordings: each is decoded in full, or refused by a message that names the file."

import io
import os
import re
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_nb.data.audio import load_audio, loud_frames, read_audio, trim_end
from higgs_nb.data.code_store import CodeStore
from higgs_nb.data.codec import load_codec
from higgs_nb.data.conversation import Audio, tts_conversation
from higgs_nb.data.corpus import embedded_corpus, load_corpus
from higgs_nb.data.corpus_check import check_corpus
from higgs_nb.data.measure import measure_audio
from higgs_nb.data.problems import AudioError

KINDS = [
    ("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
]
KINDS += [("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24")]
KINDS += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
REFUSED = [
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "GSM610"),
    ("WAV", "G721_32"),
    ("AU", "PCM_16"),
]
REFUSED += [("AIFF", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("FLAC", "PCM_16", b"RIFF")]
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def sound(seconds=0.7, rate=16000, channels=1, seed=0):
    "Noise with a slow envelope, (samples, channels)."
    count = round(seconds * rate)
    wave = np.random.default_rng(seed).standard_normal((count, channels)) * 0.1
    return wave * np.linspace(0.2, 1, count)[:, None]


def encoded(kind, wave, rate=16000):
    file = io.BytesIO()
    sf.write(file, wave, rate, format=kind[0], subtype=kind[1])
    return file.getvalue()


def read(data):
    return read_audio(Audio(raw=data))[0]


@given(
    st.sampled_from(KINDS),
    st.sampled_from([8000, 16000, 24000, 48000]),
    st.integers(1, 2),
    st.integers(1, 30000),
)
@QUICK
def test_what_was_written_is_read_in_full(kind, rate, channels, count):
    wave = sound(count / rate, rate, channels)
    samples = read(encoded(kind, wave, rate))
    assert samples.shape == wave.shape
    if kind[1] in ("PCM_16", "FLOAT", "PCM_24"):
        np.testing.assert_allclose(samples, wave, atol=1e-4)


@given(st.sampled_from(KINDS), st.integers(1, 2), st.floats(0.0, 0.999))
@QUICK
def test_a_cut_file_is_refused(kind, channels, share):
    data = encoded(kind, sound(channels=channels))
    with pytest.raises(
        AudioError, match=f"a recording of {int(len(data) * share)} bytes|either a path or bytes"
    ):
        read(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "kind, mark",
    [
        (("OGG", "VORBIS"), b"OggS"),
        (("OGG", "OPUS"), b"OggS"),
        (("FLAC", "PCM_16"), b"\xff\xf8"),
    ],
)
def test_a_file_that_is_cut_between_pages_or_frames_is_refused(kind, mark):
    "For a decoder such a file ends there, without an error."
    data = encoded(kind, sound(4))
    places = [found.start() for found in re.finditer(re.escape(mark), data)][1:]
    assert len(places) > 3
    for place in (*places, *(place + 37 for place in places[:-1])):
        with pytest.raises(AudioError, match=f"a recording of {place} bytes"):
            read(data[:place])


@given(
    st.sampled_from([k for k in KINDS if k[0] != "MP3"]), st.floats(0.1, 0.95), st.integers(1, 255)
)
@QUICK
def test_a_changed_byte_never_makes_it_shorter(kind, share, flip):
    wave = sound()
    data = bytearray(encoded(kind, wave))
    data[int(len(data) * share)] ^= flip
    try:
        assert len(read(bytes(data))) == len(wave)
    except AudioError:
        pass


def with_size(data, size):
    at = data.index(b"data") + 4
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


@given(
    st.integers(0, 2**32 - 1) | st.integers(0, 30000),
    st.sampled_from(["PCM_16", "PCM_24", "FLOAT", "ULAW"]),
)
@QUICK
def test_any_stated_size_of_a_wav_file(size, coding):
    wave = sound()
    data = encoded(("WAV", coding), wave)
    try:
        assert len(read(with_size(data, size))) == len(wave)
    except AudioError as error:
        assert size not in (0, 2**32 - 1), error


@pytest.mark.parametrize("size", [0, 2**32 - 1])
@pytest.mark.parametrize("coding", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_streamed_wav_is_read_to_its_end(size, coding):
    wave = sound(channels=2)
    assert len(read(with_size(encoded(("WAV", coding), wave), size))) == len(wave)


def test_chunks_after_the_samples_are_no_fault():
    data = encoded(("WAV", "PCM_16"), sound())
    tail = (
        b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Recorder 1.0\0\0"
    )
    assert len(read(data + tail)) == len(sound())
    with pytest.raises(AudioError, match="two chunks of samples"):
        read(data + b"data" + struct.pack("<I", 4) + bytes(4))


@pytest.mark.parametrize(
    "kind", [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "PCM_16")]
)
def test_joined_files_are_refused(kind):
    data = encoded(kind, sound())
    with pytest.raises(AudioError, match="several|states|goes on after"):
        read(data + encoded(kind, sound(seed=1)))


def without_xing(data):
    "An MP3 file without the first frame, which states how many follow."
    return data[data.index(data[:2], 4) :]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate", [16000, 24000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_without_a_stated_length(mode, rate, channels):
    loud, soft = sound(2, rate, channels), np.zeros((3 * rate, channels))
    file = io.BytesIO()
    sf.write(
        file,
        np.concatenate([loud, soft]),
        rate,
        format="MP3",
        bitrate_mode=mode,
        compression_level=0.2,
    )
    samples = read(without_xing(file.getvalue()))
    assert 5 * rate <= len(samples) <= 5 * rate + 4 * 1152
    assert np.abs(samples[: 2 * rate]).mean() > 20 * np.abs(samples[3 * rate :]).mean()


@pytest.mark.parametrize("kind", REFUSED)
def test_other_codings_are_refused(kind, tmp_path):
    data = b"".join(kind[2:]) + encoded(kind, sound(rate=8000), 8000)
    (tmp_path / "call.wav").write_bytes(data)
    with pytest.raises(AudioError, match="call.wav is .*A-law.*ffmpeg"):
        load_audio(tmp_path / "call.wav")


@pytest.mark.parametrize("limit", [1.0, 30.0])
def test_a_small_file_that_unpacks_into_hours(limit, monkeypatch):
    "No more of it is decoded than may be."
    decode, decoded = sf.SoundFile.buffer_read_into, []

    def counted(*args, **kwargs):
        decoded.append(decode(*args, **kwargs))
        return decoded[-1]

    monkeypatch.setattr(sf.SoundFile, "buffer_read_into", counted)
    data = bytearray(encoded(("FLAC", "PCM_16"), np.zeros(16000 * 200)))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # the encoder did not know the length
    with pytest.raises(AudioError, match=f"lasts more than {limit:.1f} s"):
        read_audio(Audio(raw=bytes(data)), limit)
    assert 0 < sum(decoded) <= 16000 * limit + 1
    assert len(read_audio(Audio(raw=bytes(data)), None)[0]) == 16000 * 200


def test_a_pipe_and_a_device_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(AudioError, match="not a regular file"):
            load_audio(path)


def measured(data):
    return measure_audio(Audio(raw=data))


@given(st.floats(-1.0, -0.8))
@QUICK
def test_channels_of_opposite_phase_are_refused(factor):
    left = sound()[:, 0]
    data = encoded(("WAV", "PCM_24"), np.stack([left, factor * left], 1))
    for look in (load_audio, measure_audio):
        with pytest.raises(AudioError, match="opposite phase.*keep one"):
            look(Audio(raw=data))


@given(st.floats(-0.5, 0.5))
@QUICK
def test_silence_is_refused_at_any_offset(offset):
    with pytest.raises(AudioError, match="is silent"):
        measured(encoded(("WAV", "FLOAT"), np.full(8000, offset)))


@given(st.floats(-0.5, 0.5), st.floats(0.2, 2.0))
@QUICK
def test_offset_hides_no_silence(offset, seconds):
    wave = np.concatenate([sound(1.0)[:, 0], np.zeros(round(seconds * 16000))]) + offset
    assert abs(len(trim_end(wave, 16000, 0.1)) - 1.1 * 16000) <= 160
    assert loud_frames(wave, 16000)[:90].all() and not loud_frames(wave, 16000)[101:].any()
    stats = measured(encoded(("WAV", "FLOAT"), wave))
    assert abs(stats.offset - offset) < 0.01
    assert abs(stats.rms_db - measured(encoded(("WAV", "FLOAT"), wave - offset)).rms_db) < 0.01


def test_one_person_on_each_channel_is_named(tmp_path):
    voice, quiet = sound()[:, 0], np.zeros(len(sound()))
    call = np.stack([np.concatenate([voice, quiet]), np.concatenate([quiet, voice])], 1)
    assert measured(encoded(("WAV", "PCM_16"), call)).one_sided > 0.4
    for one in (np.stack([voice, quiet], 1), np.stack([voice, 0.5 * voice], 1), voice):
        assert measured(encoded(("WAV", "PCM_16"), one)).one_sided == 0
    sf.write(tmp_path / "call.wav", call, 16000)
    (tmp_path / "call.txt").write_text("Two people speak.")
    assert "one voice on each channel" in repr(check_corpus(load_corpus(tmp_path), progress=False))


@pytest.mark.parametrize("coding", ["PCM_U8", "PCM_16", "PCM_24", "ULAW", "ALAW"])
def test_full_scale_of_each_coding(coding):
    clipped = np.sign(sound())
    assert measured(encoded(("WAV", coding), clipped)).clipped > 0.9
    assert measured(encoded(("WAV", coding), 0.9 * clipped)).clipped == 0


def test_level_is_that_of_the_mix():
    left = sound()[:, 0]
    stereo = measured(encoded(("WAV", "FLOAT"), np.stack([left, -0.3 * left], 1)))
    mono = measured(encoded(("WAV", "FLOAT"), 0.35 * left))
    assert abs(stereo.rms_db - mono.rms_db) < 0.1 and stereo.mix_loss_db > 6


def test_doubtful_sound_is_in_the_report(tmp_path):
    left = sound()[:, 0]
    waves = {
        "much quieter when mixed": np.stack([left, -0.3 * left], 1),
        "offset": left + 0.05,
        "beyond full scale": left * 1.5 / np.abs(left).max(),
    }
    for number, wave in enumerate(waves.values()):
        sf.write(tmp_path / f"{number}.wav", wave, 16000, subtype="FLOAT")
        (tmp_path / f"{number}.txt").write_text(f"Sentence {number}.")
    report = repr(check_corpus(load_corpus(tmp_path), progress=False))
    for number, what in enumerate(waves):
        assert re.search(rf"{what}.*: 1, e.g. .*{number}.wav", report), report


def test_recordings_of_one_name_are_told_apart():
    "Bytes in a table have no path, and those of equal length have one name."
    talks = [
        tts_conversation(
            f"Word {n}", Audio(raw=encoded(("WAV", "PCM_16"), sound(seed=n))), id=f"{n}"
        )
        for n in range(2)
    ]
    report = check_corpus(talks, progress=False)
    assert len({row.path for row in report.rows}) == 1 and len(report.recordings) == 2


CLIP = Audio(str(sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[0]))


@pytest.fixture(scope="module")
def codec():
    return load_codec()


def test_stored_codes_that_changed_are_refused(codec, tmp_path):
    store = CodeStore(tmp_path, codec)
    codes = store.get(CLIP).numpy()
    path = store.path(CLIP)
    data = path.read_bytes()
    files = []
    for array in (
        np.roll(codes, 1, 1).astype(np.int16),
        codes,
        np.int16(3),
        codes[:3].astype(np.int16),
    ):
        file = io.BytesIO()
        np.save(file, array)
        files.append(file.getvalue())
    file = io.BytesIO()
    np.savez(file, codes=codes)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(data), 40):
        files.append(data[:place] + bytes([data[place] ^ 1 << rng.integers(8)]) + data[place + 1 :])
    huge = data.replace(b"'shape': (8,", b"'shape': (99999999999,")
    for wrong in (*files, file.getvalue(), huge, data[:-32], b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{path.name}.*delete it"):
            CodeStore(tmp_path, codec).get(CLIP)
        with pytest.raises(ValueError, match=f"{path.name}.*delete it"):
            CodeStore(tmp_path, codec).encode_all([CLIP], progress=False)


def test_codes_of_another_recording_are_refused(codec, tmp_path):
    other = Audio(str(sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[1]))
    store = CodeStore(tmp_path, codec)
    store.get(CLIP), store.get(other)
    store.path(CLIP).write_bytes(store.path(other).read_bytes())
    with pytest.raises(ValueError, match="another recording"):
        CodeStore(tmp_path, codec).get(CLIP)


def test_store_that_cannot_be_written_to(codec, tmp_path):
    CodeStore(tmp_path / "prepared", codec).get(CLIP)
    script = """
        import os, sys
        from higgs_nb.data.conversation import Audio
        from higgs_nb.data.code_store import CodeStore
        from higgs_nb.data.codec import load_codec
        os.chmod(sys.argv[1], 0o777)
        os.chmod(sys.argv[1] + "/run", 0o777)
        root, run = sys.argv[1] + "/prepared", sys.argv[1] + "/run"
        clip, other = Audio(sys.argv[2]), Audio(sys.argv[3])
        codec = load_codec()
        clip, other = (Audio(raw=open(a.path, "rb").read()) for a in (clip, other))
        if os.getuid() == 0: os.setuid(65534)  # root may write everywhere
        store = CodeStore(root, codec, fallback=run)
        store.encode_all([clip, other], progress=False)
        print(store.hits, store.misses, len(list(os.scandir(store.new_folder))))
        print(CodeStore(root, codec).get(clip).shape[0])
        try: CodeStore(root, codec, end_silence_s=0.3)
        except OSError as error: print(error)
        print(CodeStore(root, codec, end_silence_s=0.3, fallback=run).get(clip).shape[0])
        """
    (tmp_path / "run").mkdir()
    for folder in (tmp_path / "prepared", *(tmp_path / "prepared").iterdir()):
        folder.chmod(0o555)
    other = sorted((embedded_corpus() / "audio").glob("conf-*.opus"))[1]
    for folder in tmp_path.parents:
        if (
            folder.stat().st_uid == os.getuid()
            and folder.is_relative_to("/tmp")
            and folder != folder.parent.parent
        ):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path, CLIP.path, other],
        capture_output=True,
        text=True,
    )
    for folder in (tmp_path / "prepared", *(tmp_path / "prepared").iterdir()):
        folder.chmod(0o755)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["1 1 1", "8"] and "fallback" in lines[2] and lines[3] == "8", done.stderr
