"""Whisper, which writes what it hears token by token, as a model whose output is the text that it writes."""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from kdexport.models.caches import cache_name, read_after
from kdexport.spec.teachers import TRANSCRIBER
from kdexport.tasks import task_class
from kdexport.tasks.base import Task
from kdexport.tasks.config import AudioConfig, DecoderConfig, TaskConfig
from kdexport.tasks.inputs.languages import code_of, codes_of, tokens_of
from kdexport.tasks.inputs.whisper import HOP, RATE
from kdexport.tasks.metrics import Array
from kdexport.tasks.speech_seq2seq import Read

# What is written in 30 s at most, and in a second: more is a loop.
_MOST_TOKENS, _TOKENS_PER_S, _SPARE = 224, 7.5, 16
_GRAM = 4
NO_TIMES, _SILENCE = "<|notimestamps|>", ("<|nospeech|>", "<|nocaptions|>")


class Heard(NamedTuple):
    """A text and what it is judged by.

    `log_p` is the mean log probability of its tokens; `compression` the text's bytes for one of zlib's; `repeats` how
    often its most frequent run of four words occurs.
    """

    text: str
    log_p: float
    compression: float
    repeats: int


class Transcriber(WhisperForConditionalGeneration):  # type: ignore[misc] # transformers ships no types
    """A Whisper whose output is what it writes, greedily: log-mel bands [B, M, T] → logits as its task has them."""

    _writer: Any
    _spell: Callable[[str], Array] | None

    @classmethod
    def open(cls, folder: str | Path, task: Task) -> "Transcriber":
        """Open a Hugging Face folder; `task` gives the form of the output: packed tokens, or a path of characters."""
        model = cls.from_pretrained(folder, dtype=torch.float32).eval()
        model.writes(task, task if task.config.decoder else writer_of(folder, model, task.name, task.config.audio))
        return model  # type: ignore[no-any-return]

    def writes(self, task: Task, writer: Any) -> None:
        """Set the tasks that decide the form of the output, and what is written."""
        self._writer = writer
        self._spell = None if task.config.decoder else task.target_of  # type: ignore[attr-defined]

    @torch.inference_mode()
    def packed(self, bands: Tensor, *, loops: bool = False) -> Array:
        """Return what is heard in each recording, packed [B, L, 1 + 2k]; `loops` are cut unless they are wanted."""
        return self.decoded(self.encoded(bands), loops=loops)

    def encoded(self, bands: Tensor) -> Tensor:
        """Return the encoder's states [B, T / 2, H]."""
        return self.model.encoder(bands).last_hidden_state  # type: ignore[no-any-return]

    def decoded(self, states: Tensor, *, loops: bool = False) -> Array:
        """Return what is written for the encoder's states, packed."""
        return np.asarray(self._writer.write(self.reader(states), len(states), loops=loops))

    def reader(self, states: Tensor) -> Read:
        """Return the decoder for an encoder's states."""

        def read(ids: Array, cache: Any) -> tuple[Array, Any]:
            inputs: dict[str, Any] = {"heard": states, "decoder_input_ids": torch.from_numpy(ids).to(self.device)}
            logits, cache = read_after(self, cache, **inputs)
            return logits.float().cpu().numpy(), cache

        return read

    @property
    def languages(self) -> list[str]:
        """The codes of the languages that it knows."""
        return codes_of(self.generation_config.to_dict(), self.config.vocab_size)

    @property
    def language(self) -> str:
        """The code of the language that it writes; empty where that is not known."""
        rules = self.generation_config.to_dict()
        forced = {token for _, token in rules.get("forced_decoder_ids") or ()}
        named = rules.get("language") or next((code for code, i in tokens_of(rules).items() if i in forced), "")
        return code_of(named) if named else "en" if self.languages == ["en"] else ""

    @torch.inference_mode()
    def language_of(self, bands: Tensor) -> Array:
        """Return the probability of each of the languages in each recording [B, languages], after the first token."""
        first = torch.full((len(bands), 1), self.generation_config.decoder_start_token_id, device=self.device)
        logits = self(heard=self.encoded(bands), decoder_input_ids=first).logits[:, -1]
        tokens = [*tokens_of(self.generation_config.to_dict()).values()]
        return np.asarray(logits[:, tokens].softmax(dim=1).cpu().numpy())

    def transcribe(self, bands: Tensor) -> list[Heard]:
        """Return what is heard in each recording, with its loops, by which it is judged."""
        packed = self.packed(bands, loops=True)
        return [
            _judged(text, math.log(score))
            for text, score in zip(self._writer.raw(packed), self._writer.confidence(packed, ()), strict=True)
        ]

    def forward(
        self, input_features: Tensor | None = None, heard: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, cache: Any = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        """Return logits [B, n, V] for the tokens to read; without those, the output for what is heard.

        `heard` are the encoder's states [B, T, H], where they are known already.
        """
        if decoder_input_ids is None:
            assert input_features is not None
            packed = self.packed(input_features)
            logits = np.stack([self._spell(text) for text in self._writer.raw(packed)]) if self._spell else packed
            return CausalLMOutput(logits=torch.from_numpy(logits))
        return super().forward(
            input_features=input_features, encoder_outputs=None if heard is None else BaseModelOutput(heard.float()),
            decoder_input_ids=decoder_input_ids, use_cache=use_cache, **{cache_name(super().forward): cache},
        )  # fmt: skip


Transcriber.__name__ = "WhisperForConditionalGeneration"  # what save_pretrained names the architecture


def is_transcriber(config: Any) -> bool:
    """Return whether a configuration is that of a Whisper."""
    return getattr(config, "model_type", None) == TRANSCRIBER


def audio_of(config: Any, seconds: float | None = None) -> AudioConfig:
    """Return the input of a Whisper that reads so many seconds, rounded up; as many as it can when None."""
    most = 2 * config.max_source_positions
    frames = most if seconds is None else min(most, math.ceil(seconds) * RATE // HOP)
    return AudioConfig(rate=RATE, length=frames, mels=config.num_mel_bins, filters="slaney")


def writer_of(folder: str | Path, model: Any, task: str, how: AudioConfig | None = None) -> Any:
    """Return the task of a Whisper as it writes, for its whole window or another."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind: Any = task_class(task, "seq2seq")
    return kind(config_of(model, tokenizer, how or audio_of(model.config), task), tokenizer.backend_tokenizer)


def config_of(
    model: Any, tokenizer: Any, how: AudioConfig, task: str, kept: int = 1, seconds: float | None = None
) -> TaskConfig:
    """Return `task.json` of a Whisper, which writes its language without times, by its generation_config.json.

    `seconds` is the length of the longest recording that is read, in one window or several; one window when None.
    """
    rules, ids = model.config.to_dict() | model.generation_config.to_diff_dict(), tokenizer.get_vocab()
    end, forced = rules["eos_token_id"], rules.get("forced_decoder_ids") or []
    start = [rules["decoder_start_token_id"]]
    if language := tokens_of(rules).get(model.language):
        start += [language, ids["<|transcribe|>"]]
    else:
        start += [token for _, token in sorted(forced) if token is not None]
    if (no_times := ids.get(NO_TIMES)) is not None and no_times not in start:
        start.append(no_times)
    window = how.length * HOP / RATE
    most = min(_MOST_TOKENS, model.config.max_target_positions - len(start), _likely(min(window, seconds or window)))
    decoder = DecoderConfig(
        start=start,
        never=sorted(token for token in rules.get("suppress_tokens") or () if 0 <= token <= end),
        never_first=sorted(rules.get("begin_suppress_tokens") or ()),
        silence=next((ids[token] for token in _SILENCE if token in ids), None),
        most=most,
        seconds=seconds or window,
    )
    return TaskConfig(
        task=task, labels=[], inputs=["input_features"], function="none", audio=how, kept=kept, end_id=end,
        decoder=decoder, max_length=max(most, _likely(seconds or window)), language=model.language,
    )  # fmt: skip


def _likely(seconds: float) -> int:
    return math.ceil(_TOKENS_PER_S * seconds) + _SPARE


@torch.no_grad()
def cut(teacher: Transcriber, layers: Sequence[int], how: AudioConfig) -> Transcriber:
    """Build a student of a Whisper: its encoder for a shorter window, and some layers of its decoder.

    Gandhi et al. 2023 (https://arxiv.org/abs/2311.00430), section 3. The encoder is frozen, and so are the embeddings.
    """
    config = deepcopy(teacher.config)
    config.decoder_layers, config.max_source_positions = len(layers), how.length // 2
    student: Transcriber = Transcriber(config).eval()
    positions = "model.encoder.embed_positions.weight"
    weights = {name: weight for name, weight in teacher.state_dict().items() if ".decoder.layers." not in name}
    weights[positions] = weights[positions][: config.max_source_positions]
    student.load_state_dict(weights, strict=False)
    for i, layer in zip(layers, student.model.decoder.layers, strict=True):
        layer.load_state_dict(teacher.model.decoder.layers[i].state_dict())
    student.generation_config = deepcopy(teacher.generation_config)
    student.generation_config.alignment_heads = None  # of layers that may be gone
    for part in (student.model.encoder, student.model.decoder.embed_tokens, student.model.decoder.embed_positions):
        part.requires_grad_(False)
    return student


def _judged(text: str, log_p: float) -> Heard:
    content, words = text.encode(), text.split()
    grams = Counter(tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1))
    return Heard(text, log_p, len(content) / max(1, len(zlib.compress(content))), max(grams.values(), default=0))
