"""Whisper's log-mel bands (Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2), without torch.

The arithmetic is that of transformers' `WhisperFeatureExtractor`: Slaney's filters over a centred spectrum of 400
samples with a hop of 160 at 16 kHz, base-10 logs at most 8 below the recording's highest, moved to about −1 … 1.
"""

from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdexport.tasks.metrics import Array

RATE, FRAME, HOP = 16_000, 400, 160
_FLOOR, _RANGE = 1e-10, 8.0
# Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, then 27 bands for a factor of 6.4.
_LINEAR_HZ, _BREAK_HZ = 200.0 / 3, 1000.0
_LOG_STEP = np.log(6.4) / 27
_WINDOW = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)


def log_mels(samples: Array, mels: int, frames: int) -> Array:
    """Return log energy by band, float32 [mels, frames], of samples float32 [T] at 16 kHz, padded with silence."""
    whole = np.zeros(frames * HOP, np.float64)
    whole[: len(samples)] = samples[: len(whole)]
    centred = np.pad(whole, FRAME // 2, mode="reflect")
    spectrum = np.fft.rfft(sliding_window_view(centred, FRAME)[::HOP][:frames] * _WINDOW)
    energy = spectrum.real**2 + spectrum.imag**2
    logs = np.log10(np.maximum(_filters(mels).T @ energy.T, _FLOOR))
    return np.asarray((np.maximum(logs, logs.max() - _RANGE) + 4.0) / 4.0, np.float32)


@cache
def _filters(mels: int) -> Array:
    """Return Slaney's triangular filters, each of the same area: float64 [201, mels] up to 8 kHz."""
    top = _mel(np.array(RATE / 2))
    corners = _hertz(np.linspace(0.0, float(top), mels + 2))
    places = np.linspace(0, RATE / 2, FRAME // 2 + 1)[:, None]
    width = np.diff(corners)
    rising, falling = (places - corners[:-2]) / width[:-1], (corners[2:] - places) / width[1:]
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (corners[2:] - corners[:-2]))


def _mel(hertz: Array) -> Array:
    linear = hertz / _LINEAR_HZ
    logarithmic = _BREAK_HZ / _LINEAR_HZ + np.log(np.maximum(hertz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.asarray(np.where(hertz < _BREAK_HZ, linear, logarithmic))


def _hertz(mel: Array) -> Array:
    first = _BREAK_HZ / _LINEAR_HZ
    return np.asarray(np.where(mel < first, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_LOG_STEP * (mel - first))))
