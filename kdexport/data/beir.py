"""Retrieval data in BEIR's layout: `corpus.jsonl`, `queries.jsonl`, and judgements in `qrels/<split>.tsv`.

A line of the first two is `{"_id": …, "text": …}`, with a `title` or without; a judgement is `query-id`, `corpus-id`
and `score`, separated by tabs, below a line of these names or without one. Empty documents, which real data have, are
left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec

from kdexport.data.folders import NAMES
from kdexport.data.read import lines_of
from kdexport.errors import DataError, counted
from kdexport.progress import warn

# Query → document → gain.
Judged = dict[str, dict[str, float]]

_CORPUS, _QUERIES = "corpus.jsonl", "queries.jsonl"


@dataclass(frozen=True)
class Beir:
    """A folder's queries (id → text), and its judgements by split; its documents are read on each call."""

    folder: Path
    queries: dict[str, str]
    judged: dict[str, Judged]

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yield each document's id and its text, after its title."""
        return ((name, text) for _, name, text in _texts(self.folder / _CORPUS) if text)


class _Text(msgspec.Struct):
    id: str | int = msgspec.field(name="_id")
    text: str
    title: str | None = None


def is_beir(folder: Path) -> bool:
    """Return whether a folder has the files of BEIR's layout."""
    return all((folder / name).is_file() for name in (_CORPUS, _QUERIES)) and (folder / "qrels").is_dir()


def read_beir(folder: Path) -> Beir:
    """Read the queries and judgements, and check that all that is judged is there; raise DataError where it isn't."""
    for name in (_CORPUS, _QUERIES, "qrels"):
        if not (folder / name).exists():
            fix = f"BEIR's layout is {_CORPUS}, {_QUERIES}, and judgements in qrels/train.tsv, dev.tsv, test.tsv"
            raise DataError(f"{folder} holds no {name}", fix)
    queries = dict[str, str]()
    for number, name, text in _texts(folder / _QUERIES):
        if not text:
            raise DataError(f"{folder / _QUERIES}, line {number}: the text of {name!r} is empty", "Leave the query out")
        queries[name] = text
    documents = {name: bool(text) for _, name, text in _texts(folder / _CORPUS)}
    known = {"query": (queries.keys(), _QUERIES), "document": (documents.keys(), _CORPUS)}
    judged = dict[str, Judged]()
    for split, names in NAMES.items():
        for path in (folder / "qrels" / f"{name}.tsv" for name in names):
            if path.is_file() and split not in judged:
                judged[split] = {}
                for number, query, document, gain in _judgements(path):
                    for what, name in (("query", query), ("document", document)):
                        if name not in known[what][0]:
                            where = f"{path}, line {number}: the {what} {name!r} is not in {known[what][1]}"
                            raise DataError(where, f"Leave the line out, or add the {what}")
                    if documents[document]:
                        judged[split].setdefault(query, {})[document] = gain
    if not judged:
        raise DataError(f"{folder / 'qrels'} holds no judgements", "Name them train.tsv, dev.tsv or test.tsv")
    if empty := sum(not text for text in documents.values()):
        warn(f"data: {counted(empty, 'empty document')} of {folder.name} left out, with the judgements of them")
    return Beir(folder, queries, judged)


def _texts(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the id and the text of each line; raise DataError where an id is there twice."""
    seen = set[str]()
    decode = msgspec.json.Decoder(_Text).decode
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            what = f'{path}, line {number}: it is no JSON object {{"_id": …, "text": …}} ({error})'
            raise DataError(what, "Mend the line, or leave it out") from None
        name, text = str(row.id), f"{row.title or ''} {row.text}".strip()
        if name in seen:
            raise DataError(f"{path}, line {number}: the _id {name!r} is there twice", "Leave one of them out")
        seen.add(name)
        yield number, name, text


def _judgements(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield the line, the query, the document and the gain of each judgement."""
    lines = ((number, line.split("\t")) for number, line in enumerate(lines_of(path), 1) if line.strip())
    first = next(lines, (0, []))
    titled = len(first[1]) == 3 and _number(first[1][2]) is None
    empty = True
    for number, fields in lines if titled else chain([first], lines):
        if len(fields) != 3:
            what = f"{path}, line {number}: it has {len(fields)} fields, not query, document and gain"
            raise DataError(what, "Separate them by tabs")
        gain = _number(fields[2])
        if gain is None:
            raise DataError(f"{path}, line {number}: the gain {fields[2]!r} is no number", "Take 0, 1, 2, …")
        empty = False
        yield number, fields[0], fields[1], gain
    if empty:
        raise DataError(f"{path} holds no judgements", "Add a line for each: query, document and gain")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
