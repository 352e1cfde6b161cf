"""Trim a tokenizer and its model to the tokens that a corpus needs.

A small student's token embeddings are most of its size. Texts of the corpus keep their tokens, so the teacher's can be
mapped; a word of other texts may fall into more and smaller pieces, but none becomes unknown that was known.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skeletoken import TokenizerModel
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdexport.errors import ModelError

logging.getLogger("skeletoken").setLevel(logging.ERROR)

_BATCH = 1000  # texts
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how a vocabulary writes a byte that stands for itself
_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
_WORD_START = "▁"


def trim_vocabulary(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, texts: Iterable[str], written: Iterable[int] = ()
) -> NDArray[np.int64]:
    """Trim tokenizer and model, both in place.

    What stays: the tokens of the texts, at any length; those that they are merged from; special and other added tokens,
    but no `[unused7]`; and every single character or byte, in the middle of a word too.

    Args:
        tokenizer: WordPiece, BPE or Unigram.
        model: its embeddings [V, E] shrink to [K, E], an output layer over the vocabulary with them; its config's
            `vocab_size` and token ids follow.
        texts: the corpus, which is read several times; of a pair, both texts.
        written: ids of further tokens that stay.

    Returns:
        The old id of each new one, int64 [K], ascending.

    Raises:
        ModelError: another kind of tokenizer, or one with more tokens than the model has embeddings.
    """
    backend = tokenizer.backend_tokenizer
    rows = model.get_input_embeddings().num_embeddings
    if (last := max(backend.get_vocab().values())) >= rows:
        raise ModelError(f"the tokenizer has ids up to {last:,}, the model's table {rows:,} rows", "Name its own one")
    needed = _needed(backend, texts, written) | set(tokenizer.all_special_ids) | _ids_of_model(model)
    trimmed = _only(backend, needed)
    kept = np.array([backend.token_to_id(trimmed.id_to_token(i)) for i in range(trimmed.get_vocab_size())], np.int64)
    _check(backend, trimmed, kept, texts)
    _keep_rows(model, kept)
    tokenizer._tokenizer = trimmed
    tokenizer.vocab_file = None  # SentencePiece's own file can't be trimmed, and would be saved beside ours
    return kept


# --- which tokens


def _needed(backend: Tokenizer, corpus: Iterable[str], written: Iterable[int]) -> set[int]:
    """Return ids of the tokens that give the corpus the same tokens again, and any other text some."""
    spec = json.loads(backend.to_str())
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    vocab: dict[str, int] = backend.get_vocab()
    needed = {vocab[token] for token in added if not _UNUSED.fullmatch(token)} | set(written)
    needed |= {id_ for token, id_ in vocab.items() if _is_character(token, model)}
    unknown = vocab.get(model.get("unk_token") or "")
    pair = ("", "")  # it shows the post-processor's own tokens
    for text, encoding in _encodings(backend, chain([pair], corpus)):
        needed.update(encoding.ids)
        if model["type"] == "WordPiece" and unknown is not None and unknown in encoding.ids:
            needed |= _pieces_of_unknown_words(text, encoding, unknown, backend, vocab, model)
    if model["type"] == "BPE":
        needed |= _merged_from(needed, vocab, model)
    if model["type"] == "Unigram":
        # An unknown character scores 10 less than the worst piece, and competes at that with pieces that hold it.
        needed.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
    return needed


def _is_character(token: str, model: dict[str, Any]) -> bool:
    """Return whether a token is a single character or byte, apart from word-boundary marks."""
    bare = token.removeprefix(model.get("continuing_subword_prefix") or "").removeprefix(_WORD_START)
    return len(bare.removesuffix(model.get("end_of_word_suffix") or "")) <= 1 or bool(_BYTE.fullmatch(token))


def _merged_from(ids: set[int], vocab: dict[str, int], model: dict[str, Any]) -> set[int]:
    """Return ids of all tokens that tokens are merged from, down to characters.

    No merge inside a word crosses the borders of its final tokens, so these are all that happen.
    """
    parts: dict[int, list[int]] = {}
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parts.setdefault(vocab[left + right.removeprefix(prefix)], []).extend((vocab[left], vocab[right]))
    found: set[int] = set()
    new = set(ids)
    while new:
        found |= new
        new = {part for id_ in new for part in parts.get(id_, ())} - found
    return found


def _pieces_of_unknown_words(
    text: Any, encoding: Encoding, unknown: int, backend: Tokenizer, vocab: dict[str, int], model: dict[str, Any]
) -> set[int]:
    """Return ids of all pieces of a text's unknown words.

    A word is unknown where, after its longest pieces from the left, nothing fits. Without those pieces others would be
    taken, after which something might fit.
    """
    found: set[int] = set()
    for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        word = text[start:end] if id_ == unknown else ""
        word = backend.normalizer.normalize_str(word) if backend.normalizer else word
        if len(word) > model["max_input_chars_per_word"]:
            continue  # unknown whatever its pieces
        for i in range(len(word)):
            prefix = model["continuing_subword_prefix"] if i else ""
            found |= {vocab[t] for j in range(i, len(word)) if (t := prefix + word[i : j + 1]) in vocab}
    return found


def _ids_of_model(model: PreTrainedModel) -> set[int]:
    """Return ids in a model's config; and where positions are counted from the padding's id, all up to it."""
    rows = model.get_input_embeddings().num_embeddings
    named = {id_ for ids in _token_ids(model.config).values() for id_ in np.atleast_1d(ids).tolist() if id_ < rows}
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    first = getattr(positions, "padding_idx", None)  # RoBERTa and its kin; BERT's has none
    return named | set(range(0 if first is None else first + 1))


def _token_ids(config: Any) -> dict[str, Any]:
    return {name: ids for name, ids in vars(config).items() if name.endswith("_token_id") and ids is not None}


# --- the smaller tokenizer and table


def _only(backend: Tokenizer, ids: set[int]) -> Tokenizer:
    """Return a tokenizer with these tokens alone, renumbered in their order."""
    try:
        model = TokenizerModel.from_tokenizer(backend)
        trimmed = model.remove_tokens_from_vocabulary(
            [token for token, id_ in backend.get_vocab().items() if id_ not in ids]
        )
        if model.model.type == "Unigram":  # its unknown piece is named by a number, which removal leaves as it was
            trimmed.model.unk_token = model.unk_token
        return trimmed.to_tokenizer()
    except BaseException as error:  # bare ones of tokenizers, ValueError and its kin of skeletoken
        # From 0.23 on tokenizers panics at merges that don't fit, and that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"the tokenizer's vocabulary can't be trimmed: {error}", "Keep it whole") from None


def _check(old: Tokenizer, new: Tokenizer, kept: NDArray[np.int64], corpus: Iterable[str]) -> None:
    """Compare both tokenizers on the whole corpus: tokenizers may hold components that we do not know."""
    for (text, before), (_, after) in zip(_encodings(old, corpus), _encodings(new, corpus), strict=True):
        if before.ids != kept[after.ids].tolist():
            raise ModelError(
                f"with a trimmed vocabulary the text {text[:60]!r} gets other tokens", "Keep the vocabulary whole"
            )


def _encodings(tokenizer: Tokenizer, texts: Iterable[Any]) -> Iterator[tuple[Any, Encoding]]:
    """Yield texts and their encodings, untruncated."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    left = iter(texts)
    while batch := list(islice(left, _BATCH)):
        yield from zip(batch, whole.encode_batch(batch), strict=True)


@torch.no_grad()
def _keep_rows(model: PreTrainedModel, kept: NDArray[np.int64]) -> None:
    """Shrink all weights over the vocabulary, tied or not, and renumber the config's ids."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    padding, rows = table.padding_idx, torch.from_numpy(kept)
    tensors = [table.weight, *(getattr(head, name, None) for name in ("weight", "bias"))]
    for tensor in {tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}.values():
        tensor[: len(kept)] = tensor[rows]
    model.resize_token_embeddings(len(kept))
    new = {int(old): i for i, old in enumerate(kept)}
    model.get_input_embeddings().padding_idx = new.get(padding)
    for name, ids in _token_ids(model.config).items():
        setattr(model.config, name, [new.get(i, i) for i in ids] if isinstance(ids, list) else new.get(ids, ids))
