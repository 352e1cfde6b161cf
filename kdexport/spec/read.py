"""A spec from a YAML file and flags; flags win. Whatever is wrong is an error that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from kdexport.errors import SpecError
from kdexport.spec.effects import refuse_without_effect, with_defaults_of_task
from kdexport.spec.sections import Bench, Section, Spec


class Loader(yaml.SafeLoader):
    """YAML in which 2e-4 is a number, as everyone means it; YAML 1.1 reads a text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: Path | None, overrides: Mapping[str, Any]) -> Spec:
    """Read a spec file, lay the overrides over it, and check the whole.

    Args:
        path: a YAML file, or None for a spec that is made of overrides alone.
        overrides: dotted key → value, e.g. `{"student.model": "mini"}`; they win over the file.

    Raises:
        SpecError: the file can't be read, or a key or value is wrong; the line names it.
    """
    tree = _read_yaml(path) if path else {}
    source = str(path) if path else "flags"
    for key, value in overrides.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise SpecError(f"{source}: {section!r} is not a section, so {key!r} can't be set in it")
        node[leaf] = value
    return parse(tree, source)


def parse(tree: Any, source: str) -> Spec:
    """Check a tree of plain values and turn it into a `Spec`; `source` is named in errors."""
    try:
        spec = msgspec.convert(tree, Spec)
    except msgspec.ValidationError as error:
        raise _explain(str(error), source) from None
    spec = with_defaults_of_task(tree, spec, source)
    refuse_without_effect(tree, spec, source)
    return spec


def parse_bench(values: Mapping[str, Any]) -> Bench:
    """Check the settings of `kdexport bench`, which has no spec."""
    try:
        return msgspec.convert(values, Bench)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        key = re.split(r"[\[.`]", where)[0]
        flag = {"runtimes": "runtime", "devices": "device", "time_limit_s": "time-limit", "price_per_hour": "price"}
        raise SpecError(
            f"--{flag.get(key, key).replace('_', '-')}: {what}", f"It means: {settings().get(f'bench.{key}', '')}"
        ) from None


def dump(spec: Spec) -> str:
    """The whole spec as YAML, with every default written out."""
    return yaml.safe_dump(msgspec.to_builtins(spec), sort_keys=False, allow_unicode=True, width=100)


def commented(spec: Spec) -> str:
    """The whole spec as YAML with each setting's meaning above it, for a person to edit."""
    lines, helps, path = ["# kdexport run takes this file; flags override it."], settings(), list[str]()
    for line in dump(spec).splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        key = line.strip().partition(":")[0]
        if not key.startswith("- "):
            path = [*path[:depth], key]
            if meaning := helps.get(".".join(path)):
                lines.append(f"{'  ' * depth}# {meaning}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def settings() -> dict[str, str]:
    """Every dotted key of the spec with its help text, in order."""
    return {key: text for key, text, _ in walk(Spec)}


def walk(section: type, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted key, help text, default) for each setting below a section."""
    hints = get_type_hints(section, include_extras=True)
    for field in msgspec.structs.fields(section):
        key = f"{prefix}{field.name}"
        nested = [t for t in _types(hints[field.name]) if isinstance(t, type) and issubclass(t, Section)]
        text = _description(hints[field.name])
        if text or not nested:
            yield key, text, None if field.default is msgspec.NODEFAULT else field.default
        for inner in nested:
            yield from walk(inner, f"{key}.")


def _types(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        yield from _types(get_args(hint)[0])
    elif get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        for part in get_args(hint):
            yield from _types(part)
    else:
        yield hint


def _description(hint: Any) -> str:
    if get_origin(hint) is not Annotated:
        return ""
    return next((m.description for m in get_args(hint)[1:] if isinstance(m, Meta) and m.description), "")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise SpecError(f"spec {path} does not exist", "Write one with: kdexport init --data … --teacher …") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {path} can't be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SpecError(f"spec {path}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise SpecError(f"spec {path} holds no settings", "Write one with: kdexport init")
    return tree


def _explain(message: str, source: str) -> SpecError:
    """msgspec's message → what, where (dotted key) and, for an unknown key, the nearest known one."""
    what, _, where = message.replace("at `key` in `$", "at `$").partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    unknown = re.search(r"unknown field `(.+)`", what)
    if unknown:
        key = ".".join(filter(None, [where, unknown[1]]))
        known = [*settings(), *(field.name for field in msgspec.structs.fields(Spec))]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        section = [k.removeprefix(f"{where}.") for k in settings() if k.startswith(f"{where}.")]
        fix = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(section or settings())}"
        return SpecError(f"{source}: unknown key {key!r}", fix)
    missing = re.search(r"missing required field `(.+)`", what)
    if missing:
        key = ".".join(filter(None, [where, missing[1]]))
        flag = {"data": "data.train", "teacher": "teacher.model"}.get(key, key)
        return SpecError(f"{source}: {flag!r} is missing", f"Set it in the spec, or pass --{flag.split('.')[0]}")
    what = what[:1].lower() + what[1:].replace("`", "").replace(" | object", " or a mapping")
    meaning = settings().get(where.split("[")[0], "")
    return SpecError(f"{source}: {where or 'spec'}: {what}", f"It means: {meaning}" if meaning else "")
