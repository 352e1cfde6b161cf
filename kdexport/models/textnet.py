"""Small text students: a wide table of token embeddings, a small encoder, pooling, an MLP.

The encoder is none (a bag), a convolution over windows, a recurrent network, or a few narrow transformer layers. A wide
table costs little time, as a text looks up few rows, and pooling over all tokens is learned from little data
(benchmarks/README.md). Importing this module registers them with Transformers' Auto classes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, ElectraConfig, ElectraModel, PretrainedConfig, PreTrainedModel
from transformers import AutoModelForSequenceClassification as ForTexts
from transformers import AutoModelForTokenClassification as ForTokens
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

MODEL_TYPE = "kdexport-text"
KINDS = ("bag", "cnn", "gru", "encoder")
_FARTHEST = 1e4  # stands for minus infinity where padding must not be the maximum; fp16 holds it


_SHAPE = {
    **{"vocab_size": 30522, "embedding_size": 128, "pad_token_id": 0, "dropout": 0.0, "window": 3},  # tokens, of cnn
    **{"hidden_size": 128, "head_size": 256},  # features of a position, except in a bag; width before the logits
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512},  # of an encoder
}


class TextNetConfig(PretrainedConfig):  # type: ignore[misc] # transformers ships no types
    """Shape of a `TextNet`.

    Args:
        kind: bag (each token by itself), cnn (windows of `window` tokens; Kim 2014), gru (both directions), encoder
            (`num_hidden_layers` transformer layers behind a projection, as ELECTRA has it; Clark et al. 2020).
    """

    model_type = MODEL_TYPE

    def __init__(self, kind: str = "bag", **settings: Any) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        super().__init__(kind=kind, **(_SHAPE | settings))


class TextNet(PreTrainedModel):  # type: ignore[misc]
    """Token embeddings → features of each position → their weighted mean and maximum → a small MLP → logits [B, C].

    Each token has a learned weight in the mean (as SIF weighting by frequency, Arora et al. 2017). Padding is masked,
    so a text's logits don't depend on its batch.
    """

    config_class = TextNetConfig
    base_model_prefix = "net"
    _supports_sdpa = True
    _output: Any = SequenceClassifierOutput
    _pooled = 2  # a mean and a maximum

    def __init__(self, config: TextNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.importance = nn.Embedding(config.vocab_size, 1)
        width = config.embedding_size
        if config.kind == "cnn":
            # a linear layer on the window's embeddings side by side: a convolution, but int8 products are quick
            self.windows = nn.Linear(config.window * width, config.hidden_size)
            width = config.hidden_size
        elif config.kind == "gru":
            self.forwards = nn.GRU(width, config.hidden_size, batch_first=True)
            self.backwards = nn.GRU(width, config.hidden_size, batch_first=True)
            width = 2 * config.hidden_size
        elif config.kind == "encoder":
            self.encoder = ElectraModel(_encoder_config(config))
            del self.encoder.embeddings.word_embeddings  # ours are given to it
            width = config.hidden_size
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(self._pooled * width, config.head_size)
        self.classifier = nn.Linear(config.head_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "importance", None):
            nn.init.zeros_(self.importance.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:  # noqa: D102
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # noqa: D102
        self.embeddings = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> ModelOutput:
        """Return logits float [B, C] of token ids int64 [B, T] and their mask [B, T]."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        mask = attention_mask.unsqueeze(-1).to(self.embeddings.weight.dtype)
        features = self._features(self.embeddings(input_ids), attention_mask)
        weights = torch.sigmoid(self.importance(input_ids)) * mask
        mean = (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)
        most = (features - (1 - mask) * _FARTHEST).max(dim=1).values
        return self._answer(torch.cat([mean, most], dim=-1))

    def _answer(self, pooled: Tensor) -> ModelOutput:
        hidden = torch.relu(self.dense(self.dropout(pooled)))
        return self._output(logits=self.classifier(self.dropout(hidden)))

    def _features(self, embedded: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [B, T, E] → features of each position [B, T, F], arbitrary at padding."""
        if self.config.kind == "cnn":
            embedded = embedded * attention_mask.unsqueeze(-1).to(embedded.dtype)  # windows reach over the end
            reach = self.config.window // 2
            padded = nn.functional.pad(embedded, (0, 0, reach, self.config.window - 1 - reach))
            length = embedded.shape[1]
            shifted = [padded[:, i : i + length] for i in range(self.config.window)]
            return torch.relu(self.windows(torch.cat(shifted, dim=-1)))
        if self.config.kind == "encoder":
            hidden: Tensor = self.encoder(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
            return hidden
        if self.config.kind == "gru":
            # Read backwards from each text's own end; the outputs may stay in that order, for they are pooled.
            last = attention_mask.sum(dim=1, keepdim=True) - 1
            places = (last - torch.arange(embedded.shape[1], device=embedded.device)).clamp(min=0)
            places = places.unsqueeze(-1)
            read = self.backwards(embedded.gather(1, places.expand(-1, -1, embedded.shape[-1])))[0]
            read = read.gather(1, places.expand(-1, -1, read.shape[-1])) if self._pooled == 1 else read
            return torch.cat([self.forwards(embedded)[0], read], dim=-1)
        return embedded


class TextNetForTokens(TextNet):
    """A `TextNet` without pooling: features of each position → a small MLP → logits [B, T, C]."""

    _output = TokenClassifierOutput
    _pooled = 1

    def __init__(self, config: TextNetConfig) -> None:
        super().__init__(config)
        del self.importance

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> ModelOutput:
        """Return logits float [B, T, C] of token ids int64 [B, T] and their mask [B, T]."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        return self._answer(self._features(self.embeddings(input_ids), attention_mask))


def _encoder_config(config: TextNetConfig) -> ElectraConfig:
    return ElectraConfig(
        vocab_size=1,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=4 * config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=0,
    )


@torch.no_grad()
def start_as_mean(network: TextNet) -> None:
    """Initialise each layer of an encoder as the mean over the tokens, added to the token itself.

    Nearly equal attention scores and values passed through make the encoder a bag of embeddings at first; random
    attention would have to find that from data.
    """
    for layer in network.encoder.encoder.layer:
        attention = layer.attention
        for scores in (attention.self.query, attention.self.key):
            scores.weight.mul_(0.05)
        for passed in (attention.self.value, attention.output.dense):
            nn.init.eye_(passed.weight)
        layer.output.dense.weight.mul_(0.1)


AutoConfig.register(MODEL_TYPE, TextNetConfig, exist_ok=True)
ForTexts.register(TextNetConfig, TextNet, exist_ok=True)
ForTokens.register(TextNetConfig, TextNetForTokens, exist_ok=True)
