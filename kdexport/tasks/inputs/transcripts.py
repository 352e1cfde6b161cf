"""Transcripts: their normal form, and how far one is from another."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from kdexport.errors import MissingPackage

_APOSTROPHES = str.maketrans("’ʼ‘", "'''")


class Edits(NamedTuple):
    """The fewest words (or characters) to change, leave out and put in that turn a transcript into what was heard."""

    substitutions: int
    deletions: int
    insertions: int


def normalised(text: str) -> str:
    """Return a transcript in lower case, of letters, digits and inner apostrophes, with single spaces."""
    plain = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES).lower()
    letters = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in plain)
    return " ".join(filter(None, (word.strip("'") for word in letters.split())))


def edits(truth: Sequence[str], heard: Sequence[str]) -> Edits:
    """Return the edits of the Levenshtein distance between two lists of words, or two texts."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError:
        raise MissingPackage("rapidfuzz", "distill") from None
    tags = [edit.tag for edit in Levenshtein.editops(truth, heard)]
    return Edits(tags.count("replace"), tags.count("delete"), tags.count("insert"))
