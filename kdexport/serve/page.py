"""The page at `/`: models in service, a form to try them, and the model card.

The card is untrusted: its Markdown is rendered to text, tables and links to http(s), and the page's policy allows only
its own script and style.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from kdexport import __version__
from kdexport.serve.http import Headers, Response
from kdexport.serve.registry import Version
from kdexport.tasks.base import can_embed, can_transcribe

_SAMPLE = "I was charged twice for the same order, and nobody answers my mails."
_PROMPT = "Once upon a time"
_WEB = re.compile(r"https?://", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t\r]*$.*?^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
_MAX_CARD = 50_000  # characters; rendering blocks the event loop
_HEADERS: Headers = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class _Model(NamedTuple):
    """A version on the page; `path` is relative, as proxies add prefixes, `writes` the most new tokens.

    `seconds` are those of a recording whose speech is recognised, `width` the dimensions of a text's vector.
    """

    name: str
    path: str
    task: str
    reads: str
    labels: int
    writes: int
    seconds: float
    width: int
    function: str
    variant: str
    size: str
    version: str
    card: str


def render(versions: Sequence[Version], with_card: bool) -> Response:
    """Return the page of the versions in service; with model cards if no key is needed."""
    # The short path is the first model's, which may be out of service.
    alone = len(versions) == 1
    return _page(tuple(_model(version, alone, with_card) for version in versions), not with_card)


def card_html(markdown: str) -> str:
    """Render a model card as safe HTML: no raw HTML, no images, links to http(s) alone."""
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml

    text = _FRONT_MATTER.sub("", markdown, count=1)
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text[:_MAX_CARD] + ("…" if len(text) > _MAX_CARD else ""))
    for token in chain(tokens, *(token.children or () for token in tokens)):
        match token.type:
            case "heading_open" | "heading_close":
                token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"  # below the page's own
            case "link_open":
                href = str(token.attrs["href"])
                token.attrs = {"href": href, "rel": "noopener"} if _WEB.match(href) else {}
            case "th_open" | "td_open":  # the page's policy forbids style attributes
                side = str(token.attrs.get("style", "")).removeprefix("text-align:")
                token.attrs = {"class": side} if side else {}
            case "image":
                token.type = "text"
            case "fence" | "code_block":  # focusable, for scrolling by keyboard
                html = f'<pre tabindex="0"><code>{escapeHtml(token.content)}</code></pre>\n'
                token.type, token.content = "html_block", html
            case "table_open":
                html = '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>\n'
                token.type, token.content = "html_block", html
            case "table_close":
                token.type, token.content = "html_block", "</table></div>\n"
    return str(parser.renderer.render(tokens, parser.options, {}))


def _model(version: Version, alone: bool, with_card: bool) -> _Model:
    config, file = version.task.config, version.manifest.variants[version.variant]
    return _Model(
        name=version.name, path="./" if alone else f"models/{version.name}", task=version.task.name,
        reads=version.task.modality, labels=len(config.labels), function=config.function,
        writes=version.generator.room if version.generator else 0, variant=version.variant, version=version.version,
        seconds=version.task.longest if can_transcribe(version.task) else 0.0,
        width=version.task.width if can_embed(version.task) else 0,
        size=f"{file.size_bytes / 1e6:.1f} MB", card=version.card if with_card else "",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _page(models: tuple[_Model, ...], keyed: bool) -> Response:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("kdexport", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    report_style = environment.get_template("report/templates/page.css.j2").render()
    style = report_style + loader.get_source(environment, "serve/templates/page.css")[0]
    drawn = [model._replace(card=card_html(model.card)) for model in models]
    texts = [model for model in drawn if model.reads == "text" and not model.width]
    vectors = [model for model in drawn if model.width]
    speech = [model for model in drawn if model.seconds]
    forms = [form for form, shown in (("page", texts), ("speech", speech), ("vectors", vectors)) if shown]
    scripts = [loader.get_source(environment, f"serve/templates/{form}.js")[0] for form in forms]
    html = environment.get_template("serve/templates/page.html.j2").render(
        models=drawn, texts=texts, speech=speech, vectors=vectors,
        files=[model for model in drawn if model.reads != "text" and not model.seconds],
        keyed=keyed, style=style, scripts=scripts, kdexport=__version__,
        sample=_PROMPT if texts and texts[0].writes else _SAMPLE,
    )  # fmt: skip
    allowed = " ".join(map(_source, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {_source(style)}; img-src data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return Response(html.encode(), headers=[*_HEADERS, (b"content-security-policy", policy.encode())])


def _source(text: str) -> str:
    """Return the hash of an inline script or style for the policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
