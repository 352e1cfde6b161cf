"""The students of images and sound, with random weights and inputs that follow from the data."""

import math
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace
from transformers import ASTFeatureExtractor, ViTImageProcessor

from kdexport.models.convnet import ConvNetConfig, ConvNetForAudioClassification, ConvNetForImageClassification
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.speechnet import HEARD, SpeechNetConfig, SpeechNetForCTC
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.inputs import audio, images

_MELS = 40
_SPEECH_WIDTH, _GRU_LAYERS = 96, 2
_REACH_S = 0.5  # seconds before and behind, among which a word is levelled
_STEP_S = 0.04  # seconds of speech for each character at most
_SMALL = 32  # pixels a side; larger pictures are halved by the first convolution


def build_conv(
    width: int, teacher: TaskConfig, rows: Sequence[dict[str, Any]], *, recurrent: bool = False
) -> ModelAndProcessor:
    """Build a convolutional network of `width`, 2 × and 4 × `width` channels, or one of `width` for speech.

    Args:
        recurrent: for speech alone: recurrent layers behind the first convolutions.
        teacher: its input size is an upper limit.
        rows: some of the training rows, whose size, rate and scale are used.
    """
    names = dict(enumerate(teacher.labels))
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    channels = [width, 2 * width, 4 * width]
    if teacher.audio and teacher.audio.steps:
        # Transformers' extractor pads before it subtracts the mean: without one its padding is 0, as ours is.
        sound = replace(audio.fitted(rows, teacher.audio.rate, _MELS, audio.speech_seconds(rows)), mean=0.0)
        halvings = max(1, round(math.log2(_STEP_S * sound.rate / audio.HOP)))
        shape: dict[str, Any] = {"width": width or _SPEECH_WIDTH, "num_mel_bins": sound.mels, "halvings": halvings}
        shape |= {"kind": "gru", "depth": _GRU_LAYERS} if recurrent else {}
        heard = {"loudness": HEARD / (2 * sound.std), "reach": round(_REACH_S * sound.rate / audio.HOP)}
        speech = SpeechNetForCTC(SpeechNetConfig(**shape, **heard, **labels))
        return ModelAndProcessor(speech, ASTFeatureExtractor(**audio.extractor_of(sound)))
    if teacher.audio:
        sound = audio.fitted(rows, teacher.audio.rate, _MELS)
        config = ConvNetConfig(channels=channels, stride=2, frames=sound.length, num_mel_bins=sound.mels, **labels)
        return ModelAndProcessor(
            ConvNetForAudioClassification(config), ASTFeatureExtractor(**audio.extractor_of(sound))
        )
    assert teacher.image
    picture = images.fitted(rows, images.output_size(teacher.image))
    size = list(images.output_size(picture))
    stride = 1 if max(size) <= _SMALL else 2
    config = ConvNetConfig(channels=channels, stride=stride, num_channels=picture.channels, image_size=size, **labels)
    return ModelAndProcessor(ConvNetForImageClassification(config), ViTImageProcessor(**images.processor_of(picture)))
