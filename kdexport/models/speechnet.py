"""Small networks over mel bands [B, T, M], for speech recognition by CTC: a few convolutions of stride 2, and blocks.

A block of `conv` is QuartzNet's (Kriman et al. 2019, https://arxiv.org/abs/1910.10261): a depthwise convolution over
time, one over channels, a batch norm and a ReLU. One of `gru` is a recurrent network of each direction (Cho et al.
2014). Its input is added to its output. A `PreTrainedModel`, registered with Transformers' Auto classes when this
module is imported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCTC, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kdexport.tasks.transcripts import NEVER

MODEL_TYPE = "kdexport-speech"
# In training, a recording is played so much slower or faster, and at a higher or lower pitch.
_SPEED, _PITCH = 0.15, 0.1
# A word is levelled beside the words around it, as far as it is at most so much softer than the loudest: 20 dB.
_UNEVEN = 4.6
# Heard is what is at most so much softer than the loudest band: 40 dB, in nats of energy, as everything below.
HEARD = 9.2
# In training, a microphone's response at five points of frequency, and a room's noise: between so far below the loudest
# band and hardly heard, falling towards low bands by between −2 and 8, on and off in 70 % of the recordings.
_RESPONSE, _LOUDEST_NOISE, _GRAIN, _JITTER = 1.0, 2.0, 0.8, 0.7
_LEAST_FALL, _MOST_FALL, _GATED, _GATE_FRAMES, _OFF = -2.0, 8.0, 0.7, 25, 20.0
# Below every band.
_NOTHING = -1e9
# SpecAugment (Park et al. 2019, https://arxiv.org/abs/1904.08779): masks, and the most of the frames and bands of each.
_MASKS, _MOST_FRAMES, _MOST_BANDS = 2, 0.05, 0.2

# `halvings` of the frame rate, by the first convolutions; `kernel` of the others, in steps; `loudness`: what is softer
# than the loudest band by more, in units of the input, is not heard; `reach`: the frames before and behind among which
# the loudest is sought; 0: all.
_SHAPE = {
    "kind": "conv",
    "width": 96,
    "depth": 5,
    "kernel": 11,
    "halvings": 2,
    "num_mel_bins": 40,
    "loudness": 1.2,
    "reach": 0,
    "dropout": 0.1,
}


class SpeechNetConfig(PretrainedConfig):  # type: ignore[misc] # transformers ships no types
    """Shape of a `SpeechNet`."""

    model_type = MODEL_TYPE

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(_SHAPE | settings))


class SpeechNetForCTC(PreTrainedModel):  # type: ignore[misc]
    """Blocks over time → logits [B, T', V] of characters at each step.

    Frames that are exactly 0 are padding: a step of such frames is a certain blank, so logits do not depend on a batch.
    """

    config_class = SpeechNetConfig
    base_model_prefix = "net"
    main_input_name = "input_values"

    def __init__(self, config: SpeechNetConfig) -> None:
        super().__init__(config)
        width, first = config.width, config.num_mel_bins
        stem = [_halving(first if i == 0 else width, width) for i in range(config.halvings)]
        self.stem = nn.ModuleList(stem)
        self.blocks = nn.ModuleList(_BLOCKS[config.kind](config) for _ in range(config.depth))
        self.lm_head = nn.Conv1d(width, config.num_labels, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_values: Tensor, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Return logits float [B, T', V] of log-mel bands float [B, T, M]; T' is T, halved `halvings` times."""
        bands = input_values.transpose(1, 2)
        there = (bands.abs().amax(dim=1, keepdim=True) > 0).to(bands.dtype)
        if self.training:
            bands, there = _changed(bands, there)
            bands = _noisy(bands, there, self.config.loudness / HEARD)
        bands = _levelled(bands, there, self.config.loudness, self.config.reach)
        if self.training:
            bands = _masked(bands)
        for layer in self.stem:
            there = there[:, :, ::2]
            bands = layer(bands) * there
        for block in self.blocks:
            bands = (bands + block(bands, there)) * there
        silence = torch.full((self.config.num_labels, 1), NEVER, dtype=bands.dtype, device=bands.device)
        silence[0] = 0.0
        logits = self.lm_head(bands) * there + silence * (1 - there)
        return CausalLMOutput(logits=logits.transpose(1, 2))


class _Block(nn.Sequential):
    def __init__(self, config: SpeechNetConfig) -> None:
        width, kernel = config.width, config.kernel
        super().__init__(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
            nn.Conv1d(width, width, 1, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )

    def forward(self, bands: Tensor, there: Tensor) -> Tensor:  # type: ignore[override] # convolutions read no mask
        for part in self:
            bands = part(bands)
        return bands


class _BothWays(nn.Module):
    """Half of the channels are read forwards, half backwards from each row's own end."""

    def __init__(self, config: SpeechNetConfig) -> None:
        super().__init__()
        half = config.width // 2
        self.forwards = nn.GRU(config.width, half, batch_first=True)
        self.backwards = nn.GRU(config.width, config.width - half, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, bands: Tensor, there: Tensor) -> Tensor:
        steps, order = bands.transpose(1, 2), torch.arange(bands.shape[2], device=bands.device)
        last = (there[:, 0] * order).amax(dim=1, keepdim=True).long()
        mirror = (last - order).clamp(min=0).unsqueeze(-1)
        back = self.backwards(steps.gather(1, mirror.expand(-1, -1, steps.shape[-1])))[0]
        back = back.gather(1, mirror.expand(-1, -1, back.shape[-1]))
        read: Tensor = self.dropout(torch.cat([self.forwards(steps)[0], back], dim=-1))
        return read.transpose(1, 2)


_BLOCKS: dict[str, type[nn.Module]] = {"conv": _Block, "gru": _BothWays}


def _halving(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(before, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(width), nn.ReLU())


def _levelled(bands: Tensor, there: Tensor, loudness: float, reach: int) -> Tensor:
    """Return bands [B, M, T] between −1 and 1: from `loudness` below the loudest band within `reach` up to it.

    So the noise of rooms and microphones, which is below, is the same for all, and a soft word beside a loud one is
    heard.
    """
    loudest = _loudest(bands, there)
    if reach:
        each = torch.where(there > 0, bands, _NOTHING).amax(dim=1, keepdim=True)
        near = F.max_pool1d(each, 2 * reach + 1, stride=1, padding=reach)
        loudest = torch.maximum(near, loudest - _UNEVEN / HEARD * loudness)
    return ((bands - loudest).clamp(min=-loudness) * (2 / loudness) + 1) * there


def _loudest(bands: Tensor, there: Tensor) -> Tensor:
    return torch.where(there > 0, bands, _NOTHING).amax(dim=(1, 2), keepdim=True)


def _changed(bands: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Change speed and pitch at random: [B, M, T], and the frames that are there [B, 1, T].

    Stretching the bands stands for another vocal tract (Jaitly and Hinton 2013).
    """
    rows, mels, frames = bands.shape
    length = max(1, round(frames / (1 + _SPEED * (2 * torch.rand(()).item() - 1))))
    bands, there = F.interpolate(bands, size=length, mode="linear"), F.interpolate(there, size=length)
    warp = 1 + _PITCH * (2 * torch.rand(rows, 1, device=bands.device) - 1)
    places = (torch.arange(mels, device=bands.device)[None] * warp).clamp(max=mels - 1.001)
    below, part = places.long(), (places - places.floor())[..., None]
    index = below[..., None].expand(-1, -1, length)
    bands = bands.gather(1, index) * (1 - part) + bands.gather(1, index + 1) * part
    return bands * there, there


def _noisy(bands: Tensor, there: Tensor, nat: float) -> Tensor:
    """Record bands [B, M, T], in which a nat is `nat`, by another microphone in another room."""
    rows, mels, frames = bands.shape

    def between(least: float, most: float) -> Tensor:
        return least + (most - least) * torch.rand(rows, 1, 1, device=bands.device)

    points = torch.randn(rows, 1, 5, device=bands.device)
    response = F.interpolate(points, size=mels, mode="linear", align_corners=True).transpose(1, 2)
    bands = bands / nat + between(0, _RESPONSE) * response
    slope = between(_LEAST_FALL, _MOST_FALL) * torch.linspace(-1, 0, mels, device=bands.device)[None, :, None]
    noise = _loudest(bands, there) - between(_LOUDEST_NOISE, HEARD) + slope + _GRAIN * torch.randn_like(bands)
    gate = torch.randn(rows, 1, max(2, frames // _GATE_FRAMES), device=bands.device)
    off = (F.interpolate(gate, size=frames, mode="linear") < 0) & (between(0, 1) < _GATED)
    bands = torch.logaddexp(bands, noise - _OFF * off.to(bands.dtype))
    return (bands + between(0, _JITTER) * torch.randn_like(bands)) * nat * there


def _masked(bands: Tensor) -> Tensor:
    """Mask frames and bands."""
    rows, mels, frames = bands.shape
    for _ in range(_MASKS):
        bands = bands * _mask(rows, frames, _MOST_FRAMES, bands.device)[:, None]
        bands = bands * _mask(rows, mels, _MOST_BANDS, bands.device)[:, :, None]
    return bands


def _mask(rows: int, size: int, most: float, device: Any) -> Tensor:
    """Return ones [rows, size] with a run of zeros in each row, of at most the fraction `most`."""
    widths = (torch.rand(rows, 1, device=device) * most * size).long()
    starts = (torch.rand(rows, 1, device=device) * (size - widths + 1)).long()
    places = torch.arange(size, device=device)[None]
    return 1.0 - ((places >= starts) & (places < starts + widths)).float()


AutoConfig.register(MODEL_TYPE, SpeechNetConfig, exist_ok=True)
AutoModelForCTC.register(SpeechNetConfig, SpeechNetForCTC, exist_ok=True)
