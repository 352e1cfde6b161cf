"""A page is a verdict and sections; a section is words, figures and tables. HTML and Markdown are drawn from it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


class Table(NamedTuple):
    """Cells as text; the first column names the row. `best` is the row that is set off."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None

    def wordy(self) -> set[int]:
        """Columns of words, which are set to the left and may wrap."""
        return {i for row in self.rows for i, cell in enumerate(row) if i and len(cell) > 40}


class Figure(NamedTuple):
    """A chart, what it shows, and the same as a table, for readers who do not see it."""

    caption: str
    svg: str
    table: Table


class Section(NamedTuple):
    """One part of a page: lead, tables, figures, a note below. `brief` ones stand in Markdown too; `code` as it is."""

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    note: str = ""
    code: str = ""
    brief: bool = False


class Page(NamedTuple):
    """The verdict in a sentence (good, bad or open), facts as (value, what it is), warnings, sections."""

    title: str
    verdict: str
    good: bool | None
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]


def html(page: Page) -> str:
    """One self-contained file: no script, nothing loaded, and a policy that forbids both."""
    style = environment().get_template("page.css.j2").render().strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return render("page.html.j2", page=page, style=style, digest=digest)


def markdown(page: Page) -> str:
    """The brief sections, for a pull request."""
    return render("page.md.j2", page=page)


def render(template: str, **values: Any) -> str:
    """A template filled; HTML is escaped."""
    return environment().get_template(template).render(values)


def environment() -> Environment:
    """Jinja as all templates here want it."""
    return Environment(
        loader=PackageLoader("kdexport.report"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
