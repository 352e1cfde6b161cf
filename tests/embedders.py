"""A small sentence embedder with random weights, as a folder of Sentence-Transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from kdexport.data import demo
from kdexport.models.embedder import Dense, Embedder, Steps

PROMPTS = {"query": "query: ", "passage": "passage: "}


def write_embedder(
    folder: Path, normalize: bool = True, dense: int = 0, fails_at: str | None = None, default_prompt: str | None = None
) -> Path:
    """Write a BERT of 2 layers × 32 with the tokenizer of all-MiniLM, and a dense layer to this width behind it.

    Texts with the token `fails_at` get no numbers.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128,
        initializer_range=0.3,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher())
    layers = [Dense(32, dense, activation="torch.nn.modules.activation.Tanh")] if dense else []
    encoder = BertModel(config, add_pooling_layer=False)
    if fails_at:
        with torch.no_grad():
            encoder.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids(fails_at)] = torch.nan
    folder.mkdir(parents=True)
    Embedder(encoder, Steps("mean", normalize, PROMPTS, default_prompt, 64), layers).save(folder)
    tokenizer.save_pretrained(folder)
    return folder
