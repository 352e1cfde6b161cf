"""Whisper, which writes what it hears token by token, as a model with a path of characters as its output."""

import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

from kdexport.tasks.base import Task

_MOST_TOKENS = 224  # of 30 s, half of what the decoder could write: more is a loop
_GRAM = 4


class Heard(NamedTuple):
    """A text and what it is judged by.

    `log_p` is the mean log probability of its tokens; `compression` the text's bytes for one of zlib's; `repeats` how
    often its most frequent run of four words occurs.
    """

    text: str
    log_p: float
    compression: float
    repeats: int


class Transcriber(nn.Module):
    """A Whisper and its tokenizer: log-mel bands [B, M, 3000] → texts, greedily."""

    def __init__(self, model: Any, tokenizer: Any, task: Task | None = None) -> None:
        super().__init__()
        self.model, self._tokenizer, self._task = model.eval(), tokenizer, task
        self.config = model.config

    @classmethod
    def open(cls, folder: str | Path, task: Task | None = None) -> "Transcriber":
        """Open a Hugging Face folder; `task` gives the characters of `forward`'s paths."""
        model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder), task)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def transcribe(self, bands: Tensor) -> list[Heard]:
        """Return what is heard in each recording."""
        found = self.model.generate(
            bands, max_new_tokens=_MOST_TOKENS, do_sample=False, num_beams=1, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        scores = self.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        written = found.sequences[:, -scores.shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        there = torch.isfinite(scores) & (written != self.model.generation_config.pad_token_id)
        sums = torch.where(there, scores, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        return [_judged(text.strip(), log_p) for text, log_p in zip(texts, sums.tolist(), strict=True)]

    def forward(self, input_features: Tensor) -> CausalLMOutput:
        """Return each text as the logits of a path of characters: float [B, T', V]."""
        assert self._task
        paths = [self._task.path_of(heard.text) for heard in self.transcribe(input_features)]  # type: ignore[attr-defined]
        return CausalLMOutput(logits=torch.stack([torch.from_numpy(path) for path in paths]))


def _judged(text: str, log_p: float) -> Heard:
    content, words = text.encode(), text.split()
    grams = Counter(tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1))
    return Heard(text, log_p, len(content) / max(1, len(zlib.compress(content))), max(grams.values(), default=0))
