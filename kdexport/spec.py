"""The spec: every setting, declared once with its type, default, unit and help.

A spec comes from a YAML file and from flags; flags win. Unknown keys, and values out of range, are
errors that name the key. What is left at `None` is derived later, with the reason (`kdexport run --plan`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta

from kdexport.errors import SpecError

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One block of the spec."""


def _help(text: str) -> Meta:
    return Meta(description=text)


class Data(_Section, frozen=True):
    """Where the rows come from. Columns are guessed when their names are obvious."""

    train: Annotated[
        Text,
        _help("CSV, JSONL or Parquet file, a folder with train.*, validation.* and test.*, or a hub id"),
    ]
    validation: Annotated[Text | None, _help("split off from train (10 %, stratified) when absent")] = None
    test: Annotated[Text | None, _help("split off from train (20 %, stratified) when absent")] = None
    text: Annotated[Text | None, _help("the text's column; guessed when its name is obvious")] = None
    text_pair: Annotated[Text | None, _help("the second text's column, for pairs of texts")] = None
    label: Annotated[Text | None, _help("the label's column; guessed when its name is obvious")] = None
    max_length: Annotated[
        Annotated[int, Meta(ge=8, le=8192)] | None,
        _help("tokens kept of each text, special tokens included; 128 when absent, or what the teacher reads"),
    ] = None
    max_chars: Annotated[Count, _help("a longer text is a bad row: most often a quote that was never closed")] = 100_000
    skip_bad_rows: Annotated[bool, _help("leave bad rows out and count them, instead of stopping")] = False
    drop_duplicates: Annotated[bool, _help("drop texts from train that stand in validation or test as well")] = True


class TeacherTraining(_Section, frozen=True):
    """Fine-tuning of the teacher."""

    epochs: Annotated[Count, _help("passes over the training rows")] = 3
    learning_rate: Annotated[Positive, _help("the highest; warmed up over 10 %, then linear to zero")] = 5e-5
    batch_size: Annotated[Count, _help("rows a step")] = 16


class Teacher(_Section, frozen=True):
    """The model that is distilled."""

    model: Annotated[Text, _help("Hugging Face folder or hub id")]
    train: Annotated[
        TeacherTraining | None, _help("fine-tune it on the data first; absent: the teacher is used as it is")
    ] = None


class Student(_Section, frozen=True):
    """The model that is trained."""

    model: Annotated[
        Text,
        _help(
            "tiny (2 layers × 128), mini (4 × 256), small (4 × 512), layers:N (the teacher's lowest N layers), "
            "or a Hugging Face folder or hub id"
        ),
    ] = "tiny"


class Distill(_Section, frozen=True):
    """Training of the student on the teacher's soft targets."""

    loss: Annotated[Literal["kl"], _help("kl: alpha · T² · KL(teacher ‖ student) + (1 − alpha) · cross-entropy")] = "kl"
    temperature: Annotated[Positive, _help("T: softens the logits of both; 1 leaves them as they are")] = 2.0
    alpha: Annotated[Share, _help("weight of the teacher's term; the labels' term has 1 − alpha")] = 0.9
    epochs: Annotated[Count | None, _help("passes over the training rows; derived from their number when absent")] = (
        None
    )
    learning_rate: Annotated[Positive | None, _help("the highest; derived from the student's width when absent")] = None
    batch_size: Annotated[Count, _help("rows a step")] = 32
    baseline: Annotated[
        bool, _help("also train the same student on the labels alone, to see what distillation gave")
    ] = True


Precision = Literal["fp32", "fp16", "int8"]


class Export(_Section, frozen=True):
    """What is made of the student."""

    variants: Annotated[
        tuple[Precision, ...], Meta(min_length=1), _help("precisions to export; fp32 is always made")
    ] = ("fp32", "int8")
    max_int8_loss: Annotated[
        Share, _help("int8 is recommended only if its metric is at most this far below fp32's")
    ] = 0.01


class Budget(_Section, frozen=True):
    """What the recommended file must keep; what is left out does not bind."""

    p99_ms: Annotated[Positive | None, _help("99th percentile of the latency at batch 1, in ms")] = None
    size_mb: Annotated[Positive | None, _help("size of the ONNX file, in MB (10⁶ bytes)")] = None
    retention: Annotated[Share | None, _help("share of the teacher's metric on the test split")] = None

    def binds(self) -> bool:
        """Whether any limit is set."""
        return any(limit is not None for limit in (self.p99_ms, self.size_mb, self.retention))


Runtime = Literal["torch", "torch-compile", "torch-cudagraphs", "onnxruntime", "openvino"]
Device = Literal["cpu", "cuda"]


class Bench(_Section, frozen=True):
    """How latency is measured."""

    threads: Annotated[
        tuple[Count, ...], Meta(min_length=1), _help("threads of the model's runtime; the first is the report's")
    ] = (1,)
    batch_sizes: Annotated[tuple[Count, ...], _help("batches that are measured beside single texts")] = (8, 32)
    runtimes: Annotated[
        tuple[Runtime, ...],
        Meta(min_length=1),
        _help(
            "torch, torch-compile, torch-cudagraphs (models); onnxruntime, openvino (files); a run adds each first one"
        ),
    ] = ("torch", "onnxruntime")
    devices: Annotated[
        tuple[Device, ...],
        Meta(min_length=1),
        _help("cpu, cuda; what is not there is left out, and said; a run adds cpu"),
    ] = ("cpu",)
    rounds: Annotated[Annotated[int, Meta(ge=1, le=100)], _help("rounds at least; each is a new process a variant")] = 5
    round_seconds: Annotated[Positive, _help("time measured per round and variant, in s")] = 1.0
    precision: Annotated[
        Positive | None, _help("rounds go on until every ratio is known to this share, or time is up; null: no more")
    ] = 0.05
    time_limit_s: Annotated[Positive, _help("no round begins that would end after this, in s")] = 150.0
    price_per_hour: Annotated[
        Positive | None, _help("of one core (or GPU), in any currency: the report tells what a million answers cost")
    ] = None


class Spec(_Section, frozen=True, kw_only=True):
    """The whole job: teacher in, budget in; artifact and report out."""

    task: Annotated[Literal["text-classification"], _help("what the model does")] = "text-classification"
    data: Data
    teacher: Teacher
    student: Student = Student()
    distill: Distill = Distill()
    export: Export = Export()
    budget: Budget = Budget()
    bench: Bench = Bench()
    seed: Annotated[int, Meta(ge=0), _help("seeds splits, initial weights and the order of rows")] = 0


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
    _refuse_settings_without_effect(tree, spec, source)
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


def _refuse_settings_without_effect(tree: Any, spec: Spec, source: str) -> None:
    distill, export = tree.get("distill") or {}, tree.get("export") or {}
    if "temperature" in distill and spec.distill.alpha == 0 and distill["temperature"] != 2.0:
        raise SpecError(f"{source}: distill.temperature has no effect with alpha 0", "Raise alpha, or remove it")
    if "max_int8_loss" in export and "int8" not in spec.export.variants and export["max_int8_loss"] != 0.01:
        raise SpecError(f"{source}: export.max_int8_loss has no effect without int8", "Add int8 to the variants")


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
        nested = [t for t in _types(hints[field.name]) if isinstance(t, type) and issubclass(t, _Section)]
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
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    what, _, where = message.partition(" - at `$")
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
    what = what[:1].lower() + what[1:].replace("`", "")
    meaning = settings().get(where.split("[")[0], "")
    return SpecError(f"{source}: {where or 'spec'}: {what}", f"It means: {meaning}" if meaning else "")
