"""A spec from a YAML file and from flags, which win. Errors name the key."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import yaml
from msgspec import inspect

from kdexport.errors import SpecError
from kdexport.spec.ask import Section
from kdexport.spec.checks import checked
from kdexport.spec.sections import Bench, Data, Spec
from kdexport.spec.teachers import LABELLING, kind_of
from kdexport.tasks import DEFAULT, names, task_class

_DEEPEST, _MOST_VALUES = 20, 10_000  # aliases of aliases multiply
_SHOWN = 40  # characters of a wrong value in an error


class Loader(yaml.SafeLoader):
    """YAML of texts, numbers, lists and sections, with 2e-4 a number (a text in YAML 1.1).

    Other tags, dates, merge keys, repeated keys, and what would exhaust memory or the stack are errors.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a value that is nested no deeper than a spec can be."""
        if self._depth > _DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="it is nested too deep", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Return the nodes of a document as plain values."""
        return self._value(node, "")

    def _value(self, node: yaml.Node, key: str) -> Any:
        def wrong(problem: str, at: yaml.Node = node) -> yaml.MarkedYAMLError:
            return yaml.MarkedYAMLError(context=key[:200], problem=problem, problem_mark=at.start_mark)

        self._values += 1
        if self._values > _MOST_VALUES or key.count(".") > _DEEPEST:
            raise wrong("it is nested too deep, or has too many values")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and tag == "map":
            found: dict[str, Any] = {}
            for named, value in node.value:
                name = named.value if isinstance(named, yaml.ScalarNode) else None
                if name is None or named.tag != "tag:yaml.org,2002:str":
                    raise wrong("a key must be a text, and no merge key (<<)", named)
                if name in found:
                    raise wrong(f"the key {name[:_SHOWN]!r} stands twice", named)
                found[name] = self._value(value, f"{key}.{name}" if key else name)
            return found
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self._value(value, f"{key}.{i}") for i, value in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or tag not in ("str", "int", "float", "bool", "null"):
            quoted = "; put quotes around a text" if tag == "timestamp" else ""
            raise wrong(f"a value of the kind {tag[:_SHOWN]!r} is not known here{quoted}")
        try:
            plain = self.construct_object(node)
        except (ValueError, KeyError, OverflowError, IndexError):
            raise wrong(f"{node.value[:_SHOWN]!r} is no {tag} that can be read") from None
        if not _is_real(plain):
            raise wrong(f"{node.value[:_SHOWN]!r} is no finite number below 2⁶³")
        return plain


class Dumper(yaml.SafeDumper):
    """YAML that `Loader` reads back: the text 2e-4 in quotes."""


for _side in (Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_yaml(text: str, source: str) -> Any:
    """Read YAML as plain values; raise a SpecError that names `source`, line and key."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        key = f"{context}: " if type(error) is yaml.MarkedYAMLError and (context := error.context) else ""
        raise SpecError(f"{source}{line} is not valid YAML: {key}{getattr(error, 'problem', None) or error}") from None


def load(
    path: Path | None,
    overrides: Mapping[str, Any],
    recognised: Callable[[Data, str | None], tuple[str, str]] | None = None,
) -> Spec:
    """Read a spec file, if any, apply the overrides, like `{"student.model": "mini"}`, and check the whole.

    `recognised` returns the task and the problem of data, where the spec names neither; for some tasks the problem.
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
    data = tree.get("data")
    task = tree.get("task") or (DEFAULT if _labels_texts(tree) else None)
    if (
        recognised
        and isinstance(data, dict)
        and ("task" not in tree or tree["task"] is None or _judged(task))
        and "problem" not in data
    ):
        _refuse_unreal(tree, source)
        with suppress(msgspec.ValidationError):  # `parse` names what is wrong, and where
            tree["task"], data["problem"] = recognised(msgspec.convert(data, Data), task)
    return parse(tree, source)


def _labels_texts(tree: Mapping[str, Any]) -> bool:
    """Return whether the first teacher is one that labels texts, whatever the rows look like."""
    teacher = tree.get("teacher")
    model = teacher.get("model") if isinstance(teacher, dict) else None
    first = model[0] if isinstance(model, list | tuple) and model else model
    return isinstance(first, str) and kind_of(first) in LABELLING


def _judged(task: Any) -> bool:
    """Return whether a task's problem follows from the data that judge it."""
    return task in names() and task_class(task).labels_judge


def parse(tree: Any, source: str) -> Spec:
    """Check a tree of plain values and return it as a `Spec`; `source` is named in errors."""
    _refuse_unreal(tree, source)
    try:
        return checked(tree, msgspec.convert(tree, Spec))
    except msgspec.ValidationError as error:
        raise _explain(str(error), source) from None
    except SpecError as error:
        raise SpecError(f"{source}: {error.what}", error.fix) from None


def parse_bench(values: Mapping[str, Any]) -> Bench:
    """Check the settings of `kdexport bench`, which has no spec."""
    _refuse_unreal(values, "kdexport bench")
    try:
        return msgspec.convert(values, Bench)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        key = re.split(r"[\[.`]", where)[0]
        flags = {"runtimes": "runtime", "devices": "device", "time_limit_s": "time-limit", "price_per_hour": "price"}
        meaning = settings().get(f"bench.{key}", "")
        raise SpecError(f"--{flags.get(key, key).replace('_', '-')}: {what}", f"It means: {meaning}") from None


def dump(spec: Spec) -> str:
    """Return the whole spec as YAML, with every default."""
    return yaml.dump(msgspec.to_builtins(spec), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def commented(spec: Spec) -> str:
    """Return the whole spec as YAML with each setting's help above it."""
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
    """Return every dotted key of the spec with its help text, in order."""
    return dict(_settings(inspect.type_info(Spec), ""))


def of_results(section: Section) -> dict[str, Any]:
    """Return the plain values of a section that decide its results; the others say only how they are computed."""
    values: dict[str, Any] = msgspec.to_builtins(section)
    for place in (values, values.get("train") or {}):
        for name in ("accumulate", "checkpoint_gradients", "compile", "devices", "base"):  # see the teacher stage
            place.pop(name, None)
    return values


def values(spec: Spec) -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a spec with its plain value, None where its section is absent."""
    tree = msgspec.to_builtins(spec)
    for key in settings():
        value = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        yield key, value


def _settings(kind: inspect.Type, prefix: str) -> Iterator[tuple[str, str]]:
    for section in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
        if isinstance(section, inspect.StructType) and issubclass(section.cls, Section):
            for field in section.fields:
                key, inner = f"{prefix}{field.name}", field.type
                if isinstance(inner, inspect.Metadata):
                    yield key, (inner.extra_json_schema or {})["description"]
                    inner = inner.type
                yield from _settings(inner, f"{key}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"spec {path} does not exist", "Write one with: kdexport init --data … --teacher …") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"spec {path} can't be read: {error}") from None
    tree = read_yaml(text, f"spec {path}")
    if not isinstance(tree, dict):
        raise SpecError(f"spec {path} holds no settings", "Write one with: kdexport init")
    return tree


def _refuse_unreal(value: Any, source: str, key: str = "") -> None:
    """Refuse infinite numbers, NaN, and those of more than 64 bits."""
    if isinstance(value, Mapping | list | tuple):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, one in named:
            _refuse_unreal(one, source, f"{key}.{name}" if key else str(name))
    elif not _is_real(value):
        raise SpecError(f"{source}: {key}: expected a finite number below 2⁶³")


def _is_real(value: Any) -> bool:
    """Return whether a value is no number, or a finite one of 64 bits."""
    return not isinstance(value, int | float) or abs(value) < 2**63


def _explain(message: str, source: str) -> SpecError:
    """Return msgspec's message as what, where (dotted key) and, for an unknown key, the nearest known one."""
    what, _, where = message.replace("at `key` in `$", "at `$").partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    helps = settings()
    if unknown := re.search(r"unknown field `(.+)`", what):
        key = ".".join(filter(None, [where, unknown[1]]))
        close = difflib.get_close_matches(key, [*helps, *Spec.__struct_fields__], n=1, cutoff=0.6)
        section = [k.removeprefix(f"{where}.") for k in helps if k.startswith(f"{where}.")]
        fix = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(section or helps)}"
        return SpecError(f"{source}: unknown key {key!r}", fix)
    if missing := re.search(r"missing required field `(.+)`", what):
        key = ".".join(filter(None, [where, missing[1]]))
        flag = {"data": "data.train", "teacher": "teacher.model"}.get(key, key)
        return SpecError(f"{source}: {flag!r} is missing", f"Set it in the spec, or pass --{flag.split('.')[0]}")
    what = what[:1].lower() + what[1:].replace("`", "").replace(" | object", " or a mapping")
    meaning = helps.get(where.split("[")[0], "")
    return SpecError(f"{source}: {where or 'spec'}: {what}", f"It means: {meaning}" if meaning else "")
