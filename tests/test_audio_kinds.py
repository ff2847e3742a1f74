"A recording is decoded to its end or refused by name; what is measured is what is trained."
import io
import os
import struct

import numpy as np
import pytest
import soundfile as sf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from higgs_nb.audio import Audio, AudioError, load_audio, measure_audio, mp3_frames, read_audio, trim_end

FORMATS = {  # format, coding, rates
    "wav16": ("WAV", "PCM_16", (8000, 24000)), "wav24": ("WAV", "PCM_24", (48000,)), "wav8": ("WAV", "PCM_U8", (8000,)), "float": ("WAV", "FLOAT", (44100,)),
    "alaw": ("WAV", "ALAW", (8000,)), "ulaw": ("WAV", "ULAW", (8000,)), "wavex": ("WAVEX", "PCM_24", (48000,)), "rf64": ("RF64", "PCM_16", (24000,)),
    "flac": ("FLAC", "PCM_16", (16000, 48000)), "vorbis": ("OGG", "VORBIS", (24000,)), "opus": ("OGG", "OPUS", (48000,)), "mp3": ("MP3", "MPEG_LAYER_III", (16000, 24000, 44100))}
LOSSY = ("vorbis", "opus", "mp3")


def voice(seconds, rate, seed=0):
    "Noise that swells four times a second, as syllables do."
    t = np.arange(round(seconds * rate)) / rate
    return (0.2 * np.random.default_rng(seed).standard_normal(len(t)) * (0.6 + 0.4 * np.sin(8 * np.pi * t))).clip(-0.9, 0.9).astype(np.float32)


def encoded(kind, wave, rate, **options):
    file = io.BytesIO()
    sf.write(file, wave, rate, format=FORMATS[kind][0], subtype=FORMATS[kind][1], **options)
    return file.getvalue()


def refusal(data, **limits):
    with pytest.raises(AudioError) as caught: measure_audio(Audio(raw=data), **limits)
    assert f"a recording of {len(data)} bytes" in str(caught.value)
    return str(caught.value)


KIND_AND_RATE = st.sampled_from([(kind, rate) for kind, (_, _, rates) in FORMATS.items() for rate in rates])


@given(KIND_AND_RATE, st.floats(0.3, 2.5), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_a_recording_is_read_to_its_end(kind_and_rate, seconds, channels):
    kind, rate = kind_and_rate
    wave = voice(seconds, rate)
    samples, found = read_audio(Audio(raw=encoded(kind, np.repeat(wave[:, None], channels, 1), rate)))
    slack = 0.15 * rate if kind in LOSSY else 0
    assert found == rate and samples.shape[1] == channels and abs(len(samples) - len(wave)) <= slack


@given(KIND_AND_RATE, st.floats(0.05, 0.97))
@settings(max_examples=60, deadline=None)
@example(("mp3", 24000), 0.5)
def test_a_recording_that_is_cut_off_is_refused(kind_and_rate, share):
    kind, rate = kind_and_rate
    data = encoded(kind, voice(2.5, rate), rate)
    refusal(data[:int(len(data) * share)])


@given(st.sampled_from([16000, 24000, 44100]), st.floats(0.5, 3.0), st.sampled_from([None, "loud", "soft"]), st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_an_mp3_without_its_first_frame_keeps_its_length(rate, seconds, first, channels):
    wave = voice(seconds, rate)
    if first: wave[:len(wave) // 2] *= 0.001 if first == "soft" else 1
    data = encoded("mp3", np.repeat(wave[:, None], channels, 1), rate, **dict(bitrate_mode="VARIABLE", compression_level=0.2) if first else {})
    bare = data[mp3_frames(data)[1]:]
    for variant in (bare, b"ID3\4\0\0\0\0\10\0" + bytes(1024) + bare, bare + b"TAG" + bytes(125), bare + bare):
        samples, _ = read_audio(Audio(raw=variant))
        wanted = len(wave) * (2 if variant == bare + bare else 1)
        assert wanted - 0.02 * rate <= len(samples) <= wanted + 0.3 * rate


@given(st.integers(0, 2**32 - 1), st.sampled_from(["wav16", "wav24", "float"]))
@settings(max_examples=40, deadline=None)
@example(0, "wav16")
@example(2**32 - 1, "wav16")
def test_the_size_in_a_wav_header_is_true_or_open_or_refused(size, kind):
    wave = voice(1.0, 24000)
    data = bytearray(encoded(kind, wave, 24000))
    at = data.index(b"data") + 4
    true = struct.unpack("<I", data[at:at + 4])[0]
    data[at:at + 4] = struct.pack("<I", size)
    if size in (0, 2**32 - 1, true): assert len(read_audio(Audio(raw=bytes(data)))[0]) == len(wave)
    else: refusal(bytes(data))


def test_chunks_after_the_samples_are_fine():
    data = encoded("wav16", voice(1.0, 24000), 24000)
    info = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Recorder 1.0\0\0"
    assert len(read_audio(Audio(raw=data + info))[0]) == 24000


def test_joined_ogg_files_are_refused():
    one = encoded("vorbis", voice(1.0, 24000), 24000)
    assert "several streams" in refusal(one + encoded("vorbis", voice(1.0, 24000, 1), 24000))


def test_a_flac_that_does_not_say_how_long_it_is():
    wave = voice(1.5, 16000)
    data = bytearray(encoded("flac", wave, 16000))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    for limit in (30.0, None): assert "does not say how long it is" in refusal(bytes(data), max_duration_s=limit)


@pytest.mark.parametrize("format, coding", [("WAV", "GSM610"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("AU", "PCM_16"), ("AIFF", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("VOC", "PCM_16")])
def test_other_formats_are_refused_with_those_that_are_read(format, coding):
    file = io.BytesIO()
    sf.write(file, voice(1.0, 8000), 8000, format=format, subtype=coding)
    assert "flac, ogg, opus or mp3" in refusal(file.getvalue())


@given(st.binary(max_size=300) | st.sampled_from(sorted(FORMATS)).map(lambda kind: encoded(kind, voice(0.3, FORMATS[kind][2][0]), FORMATS[kind][2][0])),
       st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_never_end_in_another_error(data, changes):
    data = bytearray(data)
    for at, value in changes:
        if at < len(data): data[at] = value
    try: load_audio(Audio(raw=bytes(data) or b"x"))
    except AudioError: pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)], ids=["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path/"a.wav")
    with pytest.raises(AudioError, match="a.wav cannot be opened"): load_audio(tmp_path/"a.wav")


@given(st.floats(0.3, 1.0), st.booleans())
@settings(max_examples=15, deadline=None)
def test_channels_that_cancel_are_refused(gain, swapped):
    wave = voice(1.0, 24000)
    pair = [wave, -wave * (0.9 + 0.1 * gain)]
    data = encoded("wav16", np.stack(pair[::-1] if swapped else pair, 1), 24000)
    assert "opposite phase" in refusal(data)
    with pytest.raises(AudioError, match="opposite phase"): load_audio(Audio(raw=data))


@given(st.floats(0.0, 1.0), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_other_stereo_is_averaged(balance, seed):
    wave, room = voice(1.0, 24000, seed), voice(1.0, 24000, seed + 50)
    pair = np.stack([wave * balance + 0.05 * room, wave * (1 - balance) - 0.05 * room], 1)
    load_audio(Audio(raw=encoded("wav16", pair, 24000)))


def test_one_person_per_channel_is_refused():
    turns = np.repeat([[1, 0], [0, 1], [1, 0], [0, 1]], 24000, 0) * np.stack([voice(4.0, 24000), voice(4.0, 24000, 1)], 1)
    assert "another voice in each channel" in refusal(encoded("wav16", turns + 1e-4, 24000))


def test_silence_is_refused_and_an_offset_is_no_sound():
    assert "is silent" in refusal(encoded("wav16", np.full(24000, 0.1, np.float32), 24000))
    wave = np.concatenate([voice(1.0, 24000), np.zeros(36000, np.float32)])
    for offset in (0.0, 0.05, -0.3): assert abs(len(trim_end(wave + np.float32(offset), 24000, 0.1)) - 26400) <= 480
    assert measure_audio(Audio(raw=encoded("float", wave + np.float32(0.3), 44100))).offset == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("kind", ["wav16", "wav24", "wav8", "alaw", "ulaw", "float"])
def test_clipping_is_seen_in_every_coding(kind):
    rate = FORMATS[kind][2][0]
    assert measure_audio(Audio(raw=encoded(kind, (voice(1.0, rate) * 20).clip(-1, 1), rate))).clipped > 0.3
    assert measure_audio(Audio(raw=encoded(kind, voice(1.0, rate), rate))).clipped == 0
