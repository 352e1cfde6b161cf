"""A small sentence embedder with random weights, as a folder of Sentence-Transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from kdexport.data import demo
from kdexport.models.embedder import Dense, Embedder, Steps

PROMPTS = {"query": "query: ", "passage": "passage: "}


def write_embedder(
    folder: Path, prompts: dict[str, str] = PROMPTS, normalize: bool = True, dense: int = 0, reads: int = 64
) -> Path:
    """Write a BERT of 2 layers × 32 with the tokenizer of all-MiniLM, and a dense layer to this width behind it."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128,
        initializer_range=0.3,
    )  # fmt: skip
    layers = [Dense(32, dense, activation="torch.nn.modules.activation.Tanh")] if dense else []
    encoder = BertModel(config, add_pooling_layer=False)
    folder.mkdir(parents=True)
    Embedder(encoder, Steps("mean", normalize, prompts, None, reads), layers).save(folder)
    AutoTokenizer.from_pretrained(demo.teacher()).save_pretrained(folder)
    return folder
