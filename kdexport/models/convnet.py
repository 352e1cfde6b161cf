"""A small convolutional network for images [B, C, H, W] and for mel bands of sound [B, T, M].

3 × 3 convolutions, each with a batch norm and a ReLU that the exporter folds into one, rather than depthwise ones,
which are bound by memory on small pictures. Like `textnet` a `PreTrainedModel`, registered with Transformers' Auto
classes when this module is imported.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import AutoModelForAudioClassification as ForAudio
from transformers import AutoModelForImageClassification as ForImages
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import ModelOutput

MODEL_TYPE = "kdexport-image"


# `channels` of the stem, then of each stage of `depth` convolutions, which halves height and width; `stride` of the
# stem, 2 for pictures of more than about 32 pixels.
_SHAPE = {
    **{"channels": [16, 32, 64], "depth": 2, "stride": 1, "dropout": 0.0},
    **{"num_channels": 1, "image_size": [28, 28], "frames": 64, "num_mel_bins": 40},
}


class ConvNetConfig(PretrainedConfig):  # type: ignore[misc] # transformers ships no types
    """Shape of a `ConvNet`."""

    model_type = MODEL_TYPE

    def __init__(self, **settings: Any) -> None:
        super().__init__(**(_SHAPE | settings))


class ConvNet(PreTrainedModel):  # type: ignore[misc]
    """Stages of convolutions → global average pooling → logits [B, C]."""

    config_class = ConvNetConfig
    base_model_prefix = "net"
    _of_sound: ClassVar = False

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        first, *stages = config.channels
        layers = [_convolution(1 if self._of_sound else config.num_channels, first, config.stride)]
        for before, width in zip(config.channels, stages, strict=False):
            layers.append(_convolution(before, width, 2))
            layers += [_convolution(width, width, 1) for _ in range(config.depth - 1)]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.channels[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def _logits(self, pixels: Tensor) -> Tensor:
        pooled = self.features(pixels).mean(dim=(2, 3))
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


class ConvNetForImageClassification(ConvNet):
    """A `ConvNet` of images."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ModelOutput:
        """Return logits float [B, C] of pixel values float [B, channels, H, W]."""
        return ImageClassifierOutput(logits=self._logits(pixel_values))


class ConvNetForAudioClassification(ConvNet):
    """A `ConvNet` of mel bands, as images of one channel."""

    main_input_name = "input_values"
    _of_sound = True

    def forward(self, input_values: Tensor, labels: Tensor | None = None, **_: Any) -> ModelOutput:
        """Return logits float [B, C] of log-mel bands float [B, T, M]."""
        return SequenceClassifierOutput(logits=self._logits(input_values.unsqueeze(1)))


def _convolution(before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


AutoConfig.register(MODEL_TYPE, ConvNetConfig, exist_ok=True)
ForImages.register(ConvNetConfig, ConvNetForImageClassification, exist_ok=True)
ForAudio.register(ConvNetConfig, ConvNetForAudioClassification, exist_ok=True)
