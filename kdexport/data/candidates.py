"""Queries with their judged documents, and the best others by BM25, as rows to rank."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kdexport.data.beir import read_beir
from kdexport.data.read import Raw, Source
from kdexport.tasks.metrics import Array

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75  # Lucene's


def read_candidates(folder: Path, split: str, most: int) -> Source:
    """Read the queries of a split of BEIR's layout, each with its documents, `most` if there are as many.

    Documents that are judged come first, all of them; others have the gain 0. Without this split all queries are read.
    """
    beir = read_beir(folder)
    every = {query: gains for one in beir.judged.values() for query, gains in one.items()}
    judged = beir.judged.get(split, every)

    def rows() -> Iterator[Raw]:
        names = [name for name, _ in beir.documents()]
        found = best_by_bm25((text for _, text in beir.documents()), [beir.queries[one] for one in judged], most)
        gains = {}
        for (query, known), best in zip(judged.items(), found, strict=True):
            others = [name for place in best.tolist() if (name := names[place]) not in known]
            gains[query] = known | dict.fromkeys(others[: max(0, most - len(known))], 0.0)
        wanted = {name for of_query in gains.values() for name in of_query}
        texts = {name: text for name, text in beir.documents() if name in wanted}
        for query, of_query in gains.items():
            for name, gain in of_query.items():
                yield {"query": beir.queries[query], "passage": texts[name], "gain": gain}

    return Source(folder.name, ["query", "passage", "gain"], rows())


def best_by_bm25(texts: Iterable[str], queries: Sequence[str], most: int) -> Iterator[Array]:
    """Yield the places of each query's best texts, in order: those that share a word with it.

    Robertson and Zaragoza 2009, equation 3.15, with Lucene's frequencies of documents; words are as they stand, in
    lower case.
    """
    asked = {word for query in queries for word in _words(query)}
    places: dict[str, array[int]] = {word: array("I") for word in asked}
    counts: dict[str, array[int]] = {word: array("I") for word in asked}
    sizes = array("I")
    for i, text in enumerate(texts):
        words = Counter(_words(text))
        sizes.append(words.total())
        for word in words.keys() & asked:
            places[word].append(i)
            counts[word].append(words[word])
    lengths = np.array(sizes, dtype=np.float64)
    long = _K1 * (1 - _B + _B * lengths / max(1.0, lengths.mean() if len(lengths) else 1.0))
    for query in queries:
        scores = np.zeros(len(lengths))
        for word in _words(query):
            of, times = np.array(places[word], dtype=np.int64), np.array(counts[word], dtype=np.float64)
            rare = np.log1p((len(lengths) - len(of) + 0.5) / (len(of) + 0.5))
            scores[of] += rare * times * (_K1 + 1) / (times + long[of])
        some = np.argpartition(-scores, most - 1)[:most] if most < len(scores) else np.arange(len(scores))
        some = some[scores[some] > 0]
        yield some[np.lexsort((some, -scores[some]))]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
