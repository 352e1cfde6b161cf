"""The convolutional student of ours: what it reads follows from the data, its weights are random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import ASTFeatureExtractor, ViTImageProcessor

from kdexport.models.convnet import ConvNetConfig, ConvNetForAudioClassification, ConvNetForImageClassification
from kdexport.models.loading import Opened
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.inputs import audio, images

# Bands of sound; frames of 160 samples.
_MELS = 40
# Pictures of more pixels a side are halved by the first convolution already.
_SMALL = 32


def build_conv(width: int, teacher: TaskConfig, rows: Sequence[dict[str, Any]]) -> Opened:
    """A convolutional network of three sizes of map, and its processor.

    Args:
        width: channels of the first map; 2 × and 4 × so many follow.
        teacher: what the teacher reads is not exceeded.
        rows: some of the training rows, whose size, rate and scale it takes.
    """
    names = dict(enumerate(teacher.labels))
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    channels = [width, 2 * width, 4 * width]
    if teacher.audio:
        sound = audio.fitted(rows, teacher.audio.rate, _MELS)
        config = ConvNetConfig(channels, stride=2, frames=sound.length, num_mel_bins=sound.mels, **labels)
        return Opened(ConvNetForAudioClassification(config), ASTFeatureExtractor(**audio.extractor_of(sound)))
    assert teacher.image
    picture = images.fitted(rows, images.output_size(teacher.image))
    size = images.output_size(picture)
    stride = 1 if max(size) <= _SMALL else 2
    config = ConvNetConfig(channels, stride=stride, num_channels=picture.channels, image_size=size, **labels)
    return Opened(ConvNetForImageClassification(config), ViTImageProcessor(**images.processor_of(picture)))
