"""Recordings: each format, each kind of WAV, real ones as others read them, and other rates."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import wave
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy import signal

from kdexport import spec
from kdexport.data import prepare, read_summary
from kdexport.errors import DataError, MissingPackage, TooLarge
from kdexport.tasks import task_class
from kdexport.tasks.config import AudioConfig, TaskConfig
from kdexport.tasks.inputs import audio, media, recordings
from kdexport.tasks.inputs.recordings import Recording, decoded

DATA = Path(__file__).parents[3] / "shared" / "data"
FORMATS = {
    "wav": ("WAV", "PCM_16", 1e-4),
    "flac": ("FLAC", "PCM_16", 1e-4),
    "ogg": ("OGG", "VORBIS", 0.05),
    "opus": ("OGG", "OPUS", 0.05),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.05),
}


def tone(seconds: float = 2.0, rate: int = 16_000, hertz: float = 440) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def written(samples: np.ndarray, rate: int, suffix: str) -> bytes:
    file, (form, subtype, _) = io.BytesIO(), FORMATS[suffix]
    soundfile.write(file, samples, rate, subtype, format=form)
    return file.getvalue()


def some(pattern: str, count: int = 8) -> list[Path]:
    """Real recordings, every n-th of them."""
    found = sorted(DATA.glob(pattern))
    if not found:
        pytest.skip(f"shared/data/{pattern} is not beside the repository")
    return found[:: max(1, len(found) // count)][:count]


# --- files → samples


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format(suffix):
    left, right = tone(), tone(hertz=880)
    found = decoded(written(np.stack([left, right], 1), 16_000, suffix))
    assert found.rate == 16_000
    assert len(found.samples) == pytest.approx(32_000, abs=2_000)  # codecs work in frames
    middle = slice(4_000, 28_000)
    assert np.abs(found.samples[middle] - (left + right)[middle] / 2).max() < FORMATS[suffix][2]


@pytest.mark.parametrize("suffix", FORMATS)
def test_pieces_are_the_whole(suffix, monkeypatch):
    content = written(np.random.default_rng(0).normal(0, 0.1, (40_000, 2)), 16_000, suffix)
    whole = decoded(content).samples
    monkeypatch.setattr(recordings, "_AT_ONCE", 5_000)
    np.testing.assert_allclose(decoded(content).samples, whole, atol=1e-6)
    np.testing.assert_allclose(decoded(content, 0.5).samples, whole[:8_000], atol=1e-6)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_broken_file_is_shorter_or_refused(suffix, capfd):
    content = written(np.random.default_rng(0).normal(0, 0.1, 40_000), 16_000, suffix)
    for end in range(0, len(content), len(content) // 40):
        try:
            assert len(decoded(content[:end]).samples) <= 41_000
        except DataError:
            continue
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_little_that_lasts_long_is_refused_by_its_header(suffix):
    content = written(np.zeros(121 * 8_000), 8_000, suffix)
    with pytest.raises(TooLarge, match="it lasts 121 s; at most 120 are read"):
        decoded(content, 1)


def test_mp3_after_a_tag():
    content = written(tone(), 16_000, "mp3")
    tag = b"ID3\4\0\0\0\0\2\1" + bytes(2 << 7 | 1)
    assert np.array_equal(decoded(tag + content).samples, decoded(content).samples)


@pytest.mark.parametrize(
    "content",
    [b"FORM\0\0\0\x10AIFF" + bytes(40), b".snd" + bytes(40), b"ID3\4\0\0\0\0\0\0RIFF\0\0\0\0WAVE", b"RIFX" + bytes(40),
     b"OggS", b"\x00\x00\x00\x18ftypM4A " + bytes(40), b"ID3"],
)  # fmt: skip
def test_other_formats_are_no_sound(content):
    with pytest.raises(DataError, match=r"no sound file|broken OGG"):
        decoded(content)


def test_other_kinds_of_wav_are_refused():
    file = io.BytesIO()
    soundfile.write(file, tone(), 16_000, "IMA_ADPCM", format="WAV")
    with pytest.raises(DataError, match="of the kind IMA_ADPCM, which is not supported"):
        decoded(file.getvalue())


@pytest.mark.parametrize(("bits", "kind"), [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3), (64, 3)])
def test_every_kind_of_wav(bits, kind):
    wanted = np.linspace(-0.9, 0.9, 50)
    if kind == 3:
        raw = wanted.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        raw = np.round(wanted * 128 + 128).astype(np.uint8).tobytes()
    else:
        raw = b"".join(round(v * 2 ** (bits - 1)).to_bytes(bits // 8, "little", signed=True) for v in wanted)
    head = struct.pack("<HHIIHH", kind, 1, 8000, 8000 * bits // 8, bits // 8, bits)
    chunks = b"fmt " + struct.pack("<I", 16) + head + b"LIST" + struct.pack("<I", 3) + b"odd\0"
    chunks += b"data" + struct.pack("<I", len(raw)) + raw
    found = decoded(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    assert found.rate == 8000
    np.testing.assert_allclose(found.samples, wanted, atol=1 / 120 if bits == 8 else 1e-4)


@pytest.mark.parametrize("pattern", ["fsdd/test/*.wav", "speech-samples/*/*.wav"])
def test_real_recordings_have_the_samples_of_their_pcm(pattern):
    for path in some(pattern):
        with wave.open(str(path)) as file:
            assert file.getsampwidth() == 2
            pcm = np.frombuffer(file.readframes(-1), "<i2").reshape(-1, file.getnchannels())
            rate = file.getframerate()
        expected = (pcm.astype(np.float32) / 32_768).mean(axis=1)
        found = decoded(path.read_bytes())
        assert found.rate == rate
        assert np.array_equal(found.samples, expected)
        assert np.array_equal(decoded(written(expected, rate, "flac")).samples, expected)


# --- other rates


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
@pytest.mark.parametrize("pattern", ["fsdd/test/*.wav", "speech-samples/*/*.wav", "coffee-orders/audio/*.flac"])
def test_real_recordings_are_resampled_as_by_a_long_filter(pattern, rate):
    for path in some(pattern):
        recording = decoded(path.read_bytes())
        ours = audio.resampled(recording, rate, 1 << 30)
        if rate == recording.rate:
            assert np.array_equal(ours, recording.samples)
            continue
        up, down = (one // gcd(rate, recording.rate) for one in (rate, recording.rate))
        taps = signal.firwin(128 * max(up, down) + 1, 1 / max(up, down), window=("kaiser", 12))
        theirs = signal.resample_poly(recording.samples.astype(np.float64), up, down, window=taps)
        assert abs(len(ours) - len(theirs)) <= 1
        length = min(len(ours), len(theirs))
        difference = np.fft.rfft(ours[:length] - theirs[:length])
        heard = np.fft.rfftfreq(length, 1 / rate) < 0.45 * min(rate, recording.rate)  # filters differ above it
        assert np.linalg.norm(difference[heard]) < 1e-3 * np.linalg.norm(np.fft.rfft(ours))


def test_what_lies_above_half_the_rate_is_gone():
    high = audio.resampled(Recording(tone(0.5, 44_100, 10_000) + tone(0.5, 44_100), 44_100), 8_000, 10_000)
    assert len(high) == 4000
    assert np.abs(high - tone(0.5, 8_000))[200:-200].max() < 1e-3


@pytest.mark.parametrize("own", [1, 8_000, 44_101, 384_000])
def test_a_single_sample_can_be_resampled(own):
    assert 1 <= len(audio.resampled(Recording(np.ones(1, np.float32), own), 16_000, 20_000)) <= 16_000


# --- as data and answers


def test_a_folder_of_all_formats(tmp_path):
    for i in range(20):
        for label, hertz in (("high", 880), ("low", 220)):
            suffix = list(FORMATS)[i % len(FORMATS)]
            (tmp_path / "all" / label).mkdir(parents=True, exist_ok=True)
            content = written(tone(0.3 + i / 100, 16_000, hertz), 16_000, suffix)
            (tmp_path / "all" / label / f"{i}.{suffix}").write_bytes(content)
    (tmp_path / "data").mkdir()
    prepare(spec.Data(train=str(tmp_path / "all")), "audio-classification", 0, tmp_path / "data")
    assert sum(read_summary(tmp_path / "data").rows.values()) == 40


def test_all_formats_are_nearly_the_same_bands():
    how = AudioConfig(rate=16_000, length=100, mels=40)
    task = task_class("audio-classification")(TaskConfig(task="", labels=["a"], inputs=["x"], audio=how))
    (path,) = some("coffee-orders/audio/*.flac", 1)
    recording = decoded(path.read_bytes())
    plain, *others = (task.array(written(recording.samples, recording.rate, suffix)) for suffix in FORMATS)
    for other in others:
        assert np.corrcoef(plain.ravel(), other.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_a_missing_library_is_named(name, monkeypatch):
    content = written(tone(), 16_000, "wav")
    monkeypatch.setitem(sys.modules, name, None)
    media.installed.cache_clear()
    with pytest.raises(MissingPackage, match=rf"'{name}' is not installed\. .*kdexport\[cpu\]"):
        audio.resampled(decoded(content), 8_000, 100)
    media.installed.cache_clear()


def test_nothing_of_sound_is_imported_before_sound_comes():
    code = (
        "import sys, kdexport.serve.server, kdexport.runtime.predictor; print(set(sys.modules) & {'soundfile', 'soxr'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
