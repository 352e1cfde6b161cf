"""Pages that are made when the site is built: from the commands' help, the schemas, docstrings and the repository."""

import inspect
import json
import posixpath
import re
import runpy
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import kdexport
from kdexport import schemas
from kdexport.cli import app
from kdexport.report.table import headers, table
from kdexport.report.terminal import summary
from kdexport.results import read_report
from kdexport.schemas import openapi

ROOT = Path(__file__).parent.parent
# The repository's own documents → their pages.
DOCUMENTS = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "figures.md",
}
SCHEMAS = {
    "report": ("report.json", "The record of a run, or of `kdexport bench`, in its folder."),
    "manifest": ("kdexport.json", "The manifest of an artifact: what a runtime needs to know, and how it was made."),
    "comparison": ("comparison.json", "What `kdexport compare` prints with `--json`, and writes with `--out`."),
}
SPEC = """# The spec

`kdexport init` writes a file with all of these settings and their meanings; `--set KEY=VALUE` changes one. Unknown
keys, and settings without an effect, are errors. Where the meaning says “derived”, `kdexport run --plan` prints the
value and the reason for your data. The same as [JSON Schema](../schemas/spec.schema.json), for editors.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the results that pages link to."""
    for name, content in _pages():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.*")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for name in schemas.SCHEMAS:
        path = schemas.path(name)
        files.append(File.generated(config, f"schemas/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables of results, which pages mark by `<!-- table: FILE -->`."""
    markdown = markdown.replace("<!-- table: benchmarks/results/demo.json -->", _demo())
    return markdown.replace("<!-- table: benchmarks/tasks.py -->", _tasks())


def _pages() -> Iterator[tuple[str, str]]:
    for source, page in DOCUMENTS.items():
        yield page, _document(source)
    for name in typer.main.get_command(app).commands:
        yield f"reference/commands/{name}.md", command_page(name)
    yield "reference/spec.md", SPEC + _tables(_schema("spec"), _places(_schema("spec")))
    for name, (title, about) in SCHEMAS.items():
        link = f"The same as [JSON Schema](../schemas/{name}.schema.json)."
        yield f"reference/{name}.md", f"# {title}\n\n{about} {link}\n" + _tables(_schema(name), {})
    yield "reference/python.md", _python()
    yield "reference/http.md", _http()


# --- documents of the repository


def _document(source: str) -> str:
    """Return a document with the links that it needs as a page; files that are no pages are only named."""

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target or ":" in target:
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if place.startswith("docs/"):
            return f"[{text}]({place.removeprefix('docs/')}{anchor})"
        return f"[{text}]({DOCUMENTS[place]}{anchor})" if place in DOCUMENTS else f"{text} (`{place}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#]*)(#[^)]*)?\)", moved, (ROOT / source).read_text(encoding="utf-8"))


def _demo() -> str:
    report = read_report(ROOT / "benchmarks" / "results" / "demo.json")
    rows = [
        [f"**{cell}**" if variant.name == report.recommended else cell for cell in row]
        for variant, row in zip(report.variants, table(report), strict=True)
    ]
    return _table(headers(report), rows, right=True) + "\n" + "\n".join(f"- {x}" for x in summary(report))


def _tasks() -> str:
    made = runpy.run_path(str(ROOT / "benchmarks" / "tasks.py"))
    return _table(made["HEADERS"], made["rows"](), right=True).replace("(benchmarks/results/", "(results/")


# --- commands


def command_page(name: str) -> str:
    """Return the page of a command, from what `--help` shows."""
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(["kdexport", name, *command.collect_usage_pieces(context)])
    usage = re.sub(r"[{}]", "", usage.replace("[[", "[").replace("]]", "]"))
    about, _, examples = inspect.cleandoc(command.help).partition("[bold]Example")
    parts = [f"# kdexport {name}", about.strip(), f"```text\n{usage}\n```"]
    if examples:
        parts += ["## Examples", f"```console\n{_prompted(examples)}\n```"]
    panels: dict[str, list[tuple[str, str, str]]] = {}
    for parameter in command.params:
        flag, text = parameter.get_help_record(context)
        meaning, _, extra = text.rstrip("]").partition("  [")
        panel = parameter.rich_help_panel or ("Options" if "--" in flag else "Arguments")
        panels.setdefault(panel, []).append((f"`{flag}`", _plain(meaning), _plain(_default_of(extra))))
    for panel, rows in panels.items():
        parts += [f"## {panel}", _table(("name", "meaning", "default"), rows)]
    return "\n\n".join(parts) + "\n"


def _default_of(extra: str) -> str:
    """Return `5, at least 1` of `default: 5; x>=1`, and `the data's name` of `default: (the data's name)`."""
    parts = [part.removeprefix("default: ").strip("()") for part in extra.split("; ")]
    return ", ".join(re.sub(r"^x>=", "at least ", re.sub(r"^x<=", "at most ", part)) for part in parts if part)


def _prompted(examples: str) -> str:
    lines = examples.partition("[/bold]")[2].strip("\n").splitlines()
    return "\n".join(f"$ {line.strip()}" for line in lines if line.strip())


# --- schemas


def _schema(name: str) -> dict[str, Any]:
    return json.loads(schemas.path(name).read_bytes())


def _places(schema: dict[str, Any]) -> dict[str, str]:
    """Return each section's dotted key in the spec."""
    found = dict[str, str]()

    def walk(name: str, key: str) -> None:
        found.setdefault(name, key or "The whole")
        for field, kind in schema["$defs"][name].get("properties", {}).items():
            for inner in re.findall(r"#/\$defs/(\w+)", json.dumps(kind)):
                if inner not in found:
                    walk(inner, f"{key}.{field}" if key else field)

    walk("Spec", "")
    return found


def _tables(schema: dict[str, Any], places: dict[str, str]) -> str:
    """Return a section with a table of fields for each type of a schema; `places` are headings instead of titles."""
    parts = []
    for name, kind in schema["$defs"].items():
        parts.append(f"## {places.get(name, name)}")
        parts.append(_prose(kind.get("description", "")))
        rows = []
        for field, one in kind.get("properties", {}).items():
            default = _default(one, field in kind.get("required", ()))
            rows.append((f"`{field}`", _kind(one, places), default, _plain(one.get("description", ""))))
        parts.append(_table(("key", "type", "default", "meaning"), rows))
    return "\n" + "\n\n".join(parts) + "\n"


def _kind(schema: dict[str, Any], places: dict[str, str]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        shown = places.get(name, name)
        return f"[{shown}](#{shown.lower().replace('.', '').replace(' ', '-')})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one, places) for one in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"[{', '.join(_kind(one, places) for one in schema['prefixItems'])}]".replace("[", "\\[", 1)
    match schema.get("type"):
        case "array":
            return f"list of {_kind(schema.get('items', {}), places)}"
        case "object":
            inner = schema.get("additionalProperties")
            return f"names to {_kind(inner, places)}" if isinstance(inner, dict) else "mapping"
        case str(found):
            return found
    return "anything"


def _default(schema: dict[str, Any], required: bool) -> str:
    if required or "default" not in schema or "$ref" in schema:
        return "required" if required else ""
    value = schema["default"]
    return "" if value is None or value in ([], {}, "") else f"`{json.dumps(value, ensure_ascii=False)}`"


# --- Python


def _python() -> str:
    parts = ["# Python", "Everything that `import kdexport` offers, with the docstrings of the source."]
    objects = {name: _public(name) for name in kdexport.__all__ if name != "__version__"}
    functions = [name for name, one in objects.items() if inspect.isfunction(one)]
    errors = [name for name, one in objects.items() if inspect.isclass(one) and issubclass(one, Exception)]
    for name in functions:
        parts += [f"## {name}", _signature(f"kdexport.{name}", objects[name]), _prose(objects[name].__doc__)]
    for name in sorted(set(objects) - {*functions, *errors}):
        one = objects[name]
        parts += [f"## {name}", _prose(one.__doc__)]
        if fields := getattr(one, "__struct_fields__", ()):
            parts.append("Fields: " + ", ".join(f"`{field}`" for field in fields) + ".")
        for method, function in vars(one).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                parts += [f"### {name}.{method}", _signature(method, function), _prose(function.__doc__)]
    parts += ["## Errors", "Each is a `KdexportError`. The command line prints its line and ends with 2."]
    parts.append(
        _table(("", ""), [(f"`{name}`", _plain(inspect.getdoc(objects[name]).splitlines()[0])) for name in errors])
    )
    return "\n\n".join(parts) + "\n"


def _public(name: str) -> Any:
    try:
        return kdexport.__getattr__(name)  # `kdexport.bench` itself is a package
    except AttributeError:
        return vars(kdexport)[name]


def _signature(name: str, function: Any) -> str:
    """Return a signature as a block of code, a parameter a line."""
    found = inspect.signature(function)
    lines, starred = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines, starred = [*lines, "*,"], True
        kind = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}{kind}{default},")
    returns = "" if found.return_annotation is found.empty else f" -> {_annotation(found.return_annotation)}"
    return f"```python\n{name}(\n" + textwrap.indent("\n".join(lines), "    ") + f"\n){returns}\n```"


def _annotation(kind: Any) -> str:
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    plain = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    return plain.replace("ndarray[tuple[Any, ...], dtype[Any]]", "ndarray")


def _prose(docstring: str | None) -> str:
    """Return a docstring as Markdown, with its `Args:` and the like as lists."""
    text = inspect.cleandoc(docstring or "")

    def listed(section: re.Match[str]) -> str:
        entries = re.sub(r"\n {4,}", " ", textwrap.dedent(section[2])).strip().splitlines()
        shown = [re.sub(r"^([\w, `]+): ", lambda m: f"`{m[1]}`: ".replace(", ", "`, `"), entry) for entry in entries]
        return f"**{section[1]}**\n\n" + "\n".join(f"- {entry}" for entry in shown) + "\n"

    return re.sub(r"^(Args|Returns|Raises):\n((?: {4}.*\n?|\n(?= {4}))+)", listed, text, flags=re.M)


# --- HTTP


def _http() -> str:
    document = json.loads(openapi.PATH.read_bytes())
    rows = []
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            if isinstance(one, str):  # it depends on the model
                one = document["x-variants"][one[1:]]["classifies"]
            rows.append((f"`{method.upper()} {path}`", _plain(one["summary"])))
    errors = [(status, _plain(one["description"])) for status, one in document["components"]["responses"].items()]
    return "\n\n".join(
        [
            "# HTTP API",
            "A server answers these paths on its public port. Its own `/openapi.json` has every field, for the models "
            "that it serves; see also [Serving](../guides/serving.md).",
            _table(("path", ""), rows),
            "## Errors",
            'Every error is `{"error": "one line"}`.',
            _table(("status", "meaning"), errors),
        ]
    )


# --- Markdown


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Return a table without its empty columns."""
    used = [i for i, header in enumerate(headers) if any(row[i] for row in rows)]
    marks = ["---", *(["--:" if right else "---"] * (len(headers) - 1))]
    return "\n".join(f"| {' | '.join(line[i] for i in used)} |" for line in (headers, marks, *rows)) + "\n"


def _plain(text: str) -> str:
    """Escape what Markdown would read as its own, outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(one if one.startswith("`") else re.sub(r"([|*_<\[])", r"\\\1", one) for one in parts)
