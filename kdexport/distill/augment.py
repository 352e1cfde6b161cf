"""Augmented texts, which the teacher labels anew, so an augmented text need not mean what the text means.

Tang et al. 2019 (https://arxiv.org/abs/1903.12136, section 3.2): words masked or replaced, and with p = 0.25 a part of
the text. TinyBERT (Jiao et al. 2020, algorithm 1): a word of one token is replaced by a near one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from kdexport import spec
from kdexport.distill.store import content_key
from kdexport.errors import ModelError
from kdexport.progress import say
from kdexport.tasks.base import Task
from kdexport.tasks.inputs.words import pattern
from kdexport.tasks.metrics import Array

Rows = Sequence[dict[str, Any]]
Change = Callable[[Sequence[str]], list[list[str]]]

_WORD = pattern("'’")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*|\s*\n\s*")
# p_ng of Tang et al.
_WHOLE_CHANCE = 0.25
_NEAREST = 10
_BLOCK, _AT_ONCE = 1024, 4096


def transfer_rows(
    train: Rows, unlabelled: Rows, change: Change | None, task: type[Task], seen: Sequence[Rows] = ()
) -> Iterator[dict[str, Any]]:
    """Yield rows without a label, which the teacher alone labels: unlabelled texts, then augmented ones of all texts.

    Each content occurs once, and none of `train` and `seen` (validation and test). A row's third augmented text has the
    id `<id>~3`; of a pair of texts the first is changed.
    """
    taken = {content_key(task.content(row)) for rows in (train, *seen) for row in rows}
    unknown = None if task.has_labels else ""  # texts are their own labels where there are none

    def new(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if (key := content_key(task.content(row))) not in taken:
                taken.add(key)
                yield row | {"label": unknown}

    fresh = []
    for i, row in enumerate(unlabelled):
        for one in new([row]):
            fresh.append(i)
            yield one
    if change:
        for block in chain(_blocks(train, range(len(train))), _blocks(unlabelled, fresh)):
            for row, copies in zip(block, change([row["text"] for row in block]), strict=True):
                yield from new(row | {"id": f"{row['id']}~{i}", "text": text} for i, text in enumerate(copies, 1))


def _blocks(rows: Rows, places: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    return ([rows[i] for i in places[start : start + _AT_ONCE]] for start in range(0, len(places), _AT_ONCE))


def changer(teacher: Path, how: spec.Augment, seed: int) -> Change:
    """Return the augmentation of a teacher; raise ModelError if only neighbours are asked for, without embeddings."""
    nearest = None
    if "neighbours" in how.kinds:
        embeddings = _input_embeddings(teacher)
        kinds = tuple(kind for kind in how.kinds if kind != "neighbours")
        if embeddings is not None:
            nearest = Nearest(Tokenizer.from_file(str(teacher / "tokenizer.json")), embeddings)
        elif kinds:
            say("augment: the teacher has no embeddings to find neighbours in; using the other kinds")
            how = msgspec.structs.replace(how, kinds=kinds)
        else:
            raise ModelError("the teacher has no embeddings to find neighbours in", "Ask for other kinds: mask")
    mask = mask_token(teacher)
    return lambda texts: views(texts, how, seed, mask=mask, nearest=nearest)


def views(
    texts: Sequence[str], how: spec.Augment, seed: int, *, mask: str | None = None, nearest: Nearest | None = None
) -> list[list[str]]:
    """Augment each text: a function of text and seed alone, so that cached soft targets stay valid.

    About `share` of the words are masked or replaced, at least one. With p = 0.25, or always where no words are
    changed, the text is cut to a part of at least half its words, or its sentences are shuffled. Without a `mask` token
    words are dropped instead.

    Each text gets at most `how.views` different ones, none equal to it or without a word; the first ones stay the same
    when more are asked for.
    """
    near: dict[str, list[str]] = {}
    if "neighbours" in how.kinds:
        assert nearest is not None, "neighbours are found in embeddings"
        near = nearest.of({word for text in texts for word in _WORD.findall(text)})
    return [_views_of(text, how, random.Random(f"{seed}\x1f{text}"), mask, near) for text in texts]


def _views_of(
    text: str, how: spec.Augment, chance: random.Random, mask: str | None, near: dict[str, list[str]]
) -> list[str]:
    whole = [change for kind, change in _OF_THE_WHOLE.items() if kind in how.kinds]
    words_too = "mask" in how.kinds or "neighbours" in how.kinds
    found: dict[str, None] = {}
    for _ in range(how.views):
        view = text
        for change in [c for c in whole if chance.random() < _WHOLE_CHANCE] if words_too else [chance.choice(whole)]:
            view = change(view, chance)
        if words_too:
            view = _change_words(view, how, chance, mask, near)
        if view != text and _WORD.search(view.replace(mask, "") if mask else view):
            found[view] = None
    return list(found)


def _change_words(
    text: str, how: spec.Augment, chance: random.Random, mask: str | None, near: dict[str, list[str]]
) -> str:
    """Mask or replace about `share` of the words, at least one."""
    masks = "mask" in how.kinds
    words = [match for match in _WORD.finditer(text) if masks or match[0] in near]
    if not words:
        return text
    chosen = [word for word in words if chance.random() < how.share] or [chance.choice(words)]
    parts, end = [], 0
    for word in chosen:
        parts.append(text[end : word.start()])
        end = word.end()
        if word[0] in near and not (masks and chance.random() < 0.5):
            parts.append(chance.choice(near[word[0]]))
        elif mask:
            parts.append(mask)
        else:
            end += len(text[end:]) - len(text[end:].lstrip())
    return "".join([*parts, text[end:]]).strip()


def _part(text: str, chance: random.Random) -> str:
    """Return a contiguous part of at least half the words."""
    words = list(_WORD.finditer(text))
    if len(words) < 2:
        return text
    length = chance.randint((len(words) + 1) // 2, len(words) - 1)
    first = chance.randint(0, len(words) - length)
    return text[words[first].start() : words[first + length - 1].end()]


def _reorder(text: str, chance: random.Random) -> str:
    sentences = [part for part in _SENTENCE_END.split(text) if part]
    if len(sentences) < 2:
        return text
    chance.shuffle(sentences)
    return " ".join(sentences)


_OF_THE_WHOLE = {"ngram": _part, "shuffle": _reorder}


class Nearest:
    """Words near a word, by the cosine of their token embeddings [V, H]; cached."""

    def __init__(self, tokenizer: Tokenizer, embeddings: Array) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spelled = _whole_words(self._tokenizer, len(embeddings))
        self._ids = np.array(sorted(self._spelled), dtype=np.int64)
        table = np.asarray(embeddings, dtype=np.float32)[self._ids]
        self._table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        self._found: dict[str, list[str]] = {}

    def of(self, words: Collection[str]) -> dict[str, list[str]]:
        """Return the ten nearest words of letters of each word that is one token, never the word itself."""
        new = sorted({*words} - self._found.keys())
        encoded = self._tokenizer.encode_batch_fast([f" {word}" for word in new], add_special_tokens=False)
        token = {
            w: e.ids[0] for w, e in zip(new, encoded, strict=True) if len(e.ids) == 1 and e.ids[0] in self._spelled
        }
        near = self._near(sorted(set(token.values())))
        for word in new:
            found = near[token[word]] if word in token else []
            self._found[word] = [one for one in found if one.casefold() != word.casefold()]
        return {word: self._found[word] for word in words if self._found[word]}

    def _near(self, tokens: Sequence[int]) -> dict[int, list[str]]:
        places, k = np.searchsorted(self._ids, tokens), min(_NEAREST, len(self._ids) - 1)
        if k < 1:
            return {token: [] for token in tokens}
        near: dict[int, list[str]] = {}
        for start in range(0, len(places), _BLOCK):
            block = places[start : start + _BLOCK]
            cosines = self._table[block] @ self._table.T
            cosines[np.arange(len(block)), block] = -np.inf  # a word is no neighbour of its own
            best = np.argpartition(cosines, -k, axis=1)[:, -k:]
            for place, columns in zip(block, best, strict=True):
                near[int(self._ids[place])] = [self._spelled[int(i)] for i in np.sort(self._ids[columns])]
        return near


def _whole_words(tokenizer: Tokenizer, below: int) -> dict[int, str]:
    """Return token id → word, of the tokens that a word of letters in the middle of a text becomes."""
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i < below]
    texts = [text.strip() for text in tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=True)]
    candidates = [(i, text) for i, text in zip(ids, texts, strict=True) if text.isalpha()]
    encoded = tokenizer.encode_batch_fast([f" {text}" for _, text in candidates], add_special_tokens=False)
    return {i: text for (i, text), e in zip(candidates, encoded, strict=True) if e.ids == [i]}


def mask_token(folder: Path) -> str | None:
    """Return a tokenizer's mask token, or None."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = msgspec.json.decode((folder / name).read_bytes()).get("mask_token")
            if token:
                return str(token["content"] if isinstance(token, dict) else token)
    return None


def _input_embeddings(teacher: Path) -> Array | None:
    """Return a folder's input embeddings [V, H]; None where there are no weights of PyTorch."""
    if not list(teacher.glob("*.safetensors")):
        return None
    import kdexport.models.textnet  # noqa: F401  # a teacher may be a student of ours
    from kdexport.models.registry import open_trained

    model = open_trained(teacher)
    return np.asarray(model.get_input_embeddings().weight.detach().float().cpu().numpy())
