"""Schemes of tags: names in BIO, IO, IOB1, IOE, BIOES, BILOU or BMES, or plain tags such as parts of speech."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
# A word's place within a name, and the name's kind.
_MARKED = re.compile(r"([BIMELSUW])-(.+)")
_LATER, _LAST = "IMEL", "ELSUW"
# BIO's (first word of a name?, last word?) → the marks for it, the most exact one first.
_ORDER = {(True, True): "SUWBI", (True, False): "BI", (False, True): "ELIB", (False, False): "MIB"}
_SCHEMES = {"M": "BMES", "L": "BILOU", "U": "BILOU", "S": "BIOES", "E": "BIOES", "W": "BMES"}


class Entity(NamedTuple):
    """Words `start` up to, but not including, `end` are an entity of this kind."""

    kind: str
    start: int
    end: int


def are_plain(labels: Collection[str]) -> bool:
    """Return whether tags are plain labels, such as parts of speech: no O, and not all marked as in BIO."""
    others = {*labels} - {OUTSIDE}
    if OUTSIDE in labels:  # among parts of speech that are letters, O is a pronoun
        return len(others) > 4 and max(map(len, others)) == 1
    return not all(map(_MARKED.fullmatch, others))


def bio(tags: Sequence[str]) -> list[str]:
    """Convert tags of names in any scheme to BIO, as conlleval and seqeval read them; an unmarked kind is inside."""
    found, before, ended = list[str](), "", False
    for tag in tags:
        mark, kind = _parts(tag)
        later = mark in _LATER and kind == before and not ended
        found.append(f"{'I' if later else 'B'}-{kind}" if kind else OUTSIDE)
        before, ended = kind, mark in _LAST
    return found


def entities(tags: Sequence[str]) -> list[Entity]:
    """Extract the entities of tags in any scheme."""
    found, start = list[Entity](), 0
    marked = [*bio(tags), OUTSIDE]
    for i, tag in enumerate(marked):
        if i and marked[i - 1] != OUTSIDE and tag[0] != "I":
            found.append(Entity(marked[start][2:], start, i))
        if tag[0] == "B":
            start = i
    return found


def spelled(tags: Sequence[str], labels: Collection[str]) -> list[str]:
    """Rewrite BIO tags in the scheme of a model's labels, as far as it has their kinds."""
    inside = {_parts(label)[1] for label in labels if label.startswith("I-")}
    iob1 = any(f"B-{kind}" not in labels for kind in inside)  # B- only between two names of a kind
    found = []
    for before, tag, after in zip([OUTSIDE, *tags], tags, [*tags[1:], OUTSIDE], strict=False):
        mark, kind = _parts(tag)
        marks = _ORDER[mark == "B", after != f"I-{kind}"]
        if iob1 and _parts(before)[1] != kind:
            marks = "I"
        names = (*(f"{mark}-{kind}" for mark in marks), kind)
        found.append(next((name for name in names if name in labels), tag))
    return found


def own_names(known: Sequence[str], own: Sequence[str]) -> list[str]:
    """Return the labels of a model for the kinds of names in these labels; these themselves if it lacks a kind."""
    kinds = {_parts(label)[1] for label in known}
    if are_plain(known) or are_plain(own) or not kinds <= {_parts(label)[1] for label in own}:
        return list(known)
    return [label for label in own if _parts(label)[1] in kinds]


def misfit(labels: Collection[str]) -> set[str]:
    """Return the tags without a mark beside O and marked ones."""
    plain = {label for label in labels if label != OUTSIDE and not _MARKED.fullmatch(label)}
    return plain if OUTSIDE in labels and len(plain) + 1 < len(labels) else set()


def scheme_of(rows: Callable[[], Iterable[Sequence[str]]]) -> str:
    """Describe the scheme of the tags of all rows, which each call yields; an empty text if no word has one but O."""
    labels = {tag for tags in rows() for tag in tags}
    if not labels - {OUTSIDE}:
        return ""
    if are_plain(labels):
        return f"tags are plain, such as {', '.join(sorted(labels)[:3])}: judged by accuracy over words"
    marks = {_parts(label)[0] for label in labels - {OUTSIDE}}
    if others := marks - {*"BI"}:
        return f"tags are {next(name for mark, name in _SCHEMES.items() if mark in others)}, read as BIO"
    if "B" not in marks:
        return "tags are IO, read as BIO"
    if not (strays := sum(bio(tags) != list(tags) for tags in rows())):
        return "tags are BIO"
    pairs = (pair for tags in rows() for pair in zip([OUTSIDE, *tags], tags, strict=False))
    if all(_parts(before)[1] == _parts(tag)[1] for before, tag in pairs if tag[0] == "B"):
        return "tags are IOB1, read as BIO"
    return f"tags are BIO; an I- that begins a name ({strays:,} rows) is read as B-"


def _parts(tag: str) -> tuple[str, str]:
    """Return the mark and the kind; both are empty outside of names, and a kind without a mark is inside."""
    if match := _MARKED.fullmatch(tag):
        return match[1], match[2]
    return ("", "") if tag == OUTSIDE else ("I", tag)
