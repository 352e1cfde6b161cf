"""A small Whisper with random weights, as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|nocaptions|>", "<|notimestamps|>"]
TEXTS = ["one latte with oat milk please", "could i have a large mocha", "turn it off and on again", "no sugar thanks"]


def write_whisper(
    folder: Path, layers: int = 4, seconds: int = 2, seed: int = 0, languages: tuple[str, ...] = ()
) -> Path:
    """Write a Whisper of 2 encoder layers × 32 that writes tokens of a small vocabulary at random."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    named = [f"<|{language}|>" for language in languages]
    tokenizer.add_special_tokens([*SPECIAL, *named, *(["<|transcribe|>"] if languages else [])])
    end, start, _, no_times = map(tokenizer.token_to_id, SPECIAL)
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, encoder_layers=2, decoder_layers=layers,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
        max_source_positions=50 * seconds, max_target_positions=64, init_std=0.3, decoder_start_token_id=start,
        eos_token_id=end, bos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    rules = {
        "no_timestamps_token_id": no_times,
        "begin_suppress_tokens": [end],
        "is_multilingual": False,
        "return_timestamps": False,
    }
    if languages:  # as OpenAI's have it
        task = tokenizer.token_to_id("<|transcribe|>")
        rules |= {
            "is_multilingual": True,
            "lang_to_id": {token: tokenizer.token_to_id(token) for token in named},
            "task_to_id": {"transcribe": task},
            "forced_decoder_ids": [[1, None], [2, task]],
            "_from_model_config": False,
        }
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0]).save_pretrained(
        folder
    )
    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
    return folder
