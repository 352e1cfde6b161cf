"""Pages of a verdict and sections with text, figures and tables; rendered as HTML and Markdown."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from kdexport.errors import counted


class Table(NamedTuple):
    """Cells as text; the first column names the row, the row `best` is highlighted."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None

    def wordy(self) -> set[int]:
        """Return the columns of long text, which are aligned left and wrap."""
        return {i for row in self.rows for i, cell in enumerate(row) if i and len(cell) > 40}


class Figure(NamedTuple):
    """A chart with its caption, and the same figures as a table, for accessibility."""

    caption: str
    svg: str
    table: Table


class Section(NamedTuple):
    """One part of a page: lead, tables, figures, note, preformatted `code`; Markdown has only the `brief` ones."""

    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    note: str = ""
    code: str = ""
    brief: bool = False


class Page(NamedTuple):
    """The verdict in a sentence (good, bad, or None: open), facts as (value, meaning), warnings, sections."""

    title: str
    verdict: str
    good: bool | None
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    sections: Sequence[Section]


def html(page: Page) -> str:
    """Render one self-contained file; its content security policy forbids scripts and loading."""
    style = render("page.css.j2").strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return render("page.html.j2", page=page, style=style, digest=digest)


def markdown(page: Page) -> str:
    """Render the brief sections, for a pull request."""
    return render("page.md.j2", page=page)


def render(template: str, **values: Any) -> str:
    """Fill a template; values in HTML and SVG are escaped."""
    return _environment().get_template(template).render(values, counted=counted)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kdexport.report"), autoescape=select_autoescape(["html.j2", "svg.j2"]),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
