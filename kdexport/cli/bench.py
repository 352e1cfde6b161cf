"""Commands that measure and report: bench, compare, report, doctor."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdexport.cli.options import (
    BUDGET_NOT_MET,
    Debug,
    Flag,
    Json,
    Label,
    MoveAside,
    SkipBadRows,
    Text,
    TextPair,
    arguments,
    finite,
    interruptible,
    print_json,
    show_report,
)


def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET…", help="Runs, artifacts (`folder:int8`), .onnx files, models, URLs.")
    ],
    data: Annotated[
        str | None, Flag(help="Rows: a file or folder as in run.", show_default="a named run's test split")
    ] = None,
    text: Text = None,
    text_pair: TextPair = None,
    label: Label = None,
    skip_bad_rows: SkipBadRows = False,
    reference: Annotated[str | None, Flag(help="Ratios are taken to this variant.", show_default="the first")] = None,
    runtime: Annotated[
        str, Flag(help="Of torch, torch-compile, torch-cudagraphs, onnxruntime, openvino.")
    ] = "torch,onnxruntime",
    device: Annotated[str, Flag(help="cpu, cuda or both; unavailable ones are skipped with a warning.")] = "cpu",
    threads: Annotated[str, Flag(help="Threads of a runtime; the first is the report's, others are added.")] = "1",
    batch_sizes: Annotated[str, Flag(help="Batches to measure beside single texts; 0 for none.")] = "8,32",
    rounds: Annotated[int, Flag(min=1, help="Fewest rounds.")] = 5,
    round_seconds: Annotated[float, Flag(help="Time measured per round and variant, in s.")] = 1.0,
    precision: Annotated[
        str, Flag(help="Rounds go on until every ratio is known so well, or time is up; 0 for no more rounds.")
    ] = "5%",
    time_limit: Annotated[
        str, Flag(help="No round begins that would end after this; accuracy and loads come on top.")
    ] = "150s",
    connections: Annotated[str, Flag(help="Servers: clients of the closed loops.", rich_help_panel="Load")] = "1,4,16",
    rate: Annotated[
        str, Flag(help="Servers: open loops, as shares of the peak or requests/s.", rich_help_panel="Load")
    ] = "80%",
    even: Annotated[
        bool, Flag("--even", help="Evenly spaced requests, not a Poisson process.", rich_help_panel="Load")
    ] = False,
    load_seconds: Annotated[float, Flag(callback=finite, help="Time of each load.", rich_help_panel="Load")] = 5.0,
    price: Annotated[float | None, Flag(min=0.0, help="Price of an hour of a core (or GPU): a cost table.")] = None,
    out: Annotated[Path | None, Flag("--out", "-o", help="Folder.", show_default="runs/bench-<time>")] = None,
    pytest_benchmark: Annotated[
        Path | None, Flag("--pytest-benchmark", help="Write pytest-benchmark's JSON here too, to a new file.")
    ] = None,
    move_aside: MoveAside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Latency, throughput, memory and size, side by side in one run.

    Variants take turns in shuffled rounds, each in a process of its own; ratios come with 95 % intervals and one
    of four verdicts: faster, slower, same, unsure.

    [bold]Examples[/bold]

      kdexport bench runs/demo runs/demo/teacher --reference teacher-torch

      kdexport bench runs/demo:int8 runs/other:int8 --threads 1,2

      kdexport bench ./my-bert --data texts.csv --runtime torch,torch-compile --device cpu,cuda

      kdexport bench http://127.0.0.1:8080/predict --data texts.csv --connections 1,8 --rate 50%,90%
    """
    given = arguments(locals())
    from kdexport.pipeline import api

    folder = out or api.bench_folder()
    with interruptible(f"Whole rounds are kept: the same command with --out {folder} goes on from there"):
        found = api.bench(**given | {"out": folder, "command": shlex.join(["kdexport", *sys.argv[1:]])})
    show_report(found, folder, as_json)


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's (or bench's) folder.")],
    price: Annotated[float | None, Flag(min=0.0, help="Price of an hour of a core (or GPU): a cost table.")] = None,
    to: Annotated[
        str | None, Flag("--to", help="Also log to: mlflow, mlflow:URI, tensorboard:FOLDER.", show_default="nowhere")
    ] = None,
    move_aside: MoveAside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw report.md and report.html again from report.json, and show the table.

    [bold]Examples[/bold]

      kdexport report runs/demo --price 0.04

      kdexport report runs/demo --to tensorboard:runs/tb
    """
    from kdexport.report import redraw

    found = redraw(run_folder, price, move_aside=move_aside)
    if to:
        from kdexport.report.exchange import log_to

        log_to(found, to, run_folder)
    show_report(found, run_folder, as_json)


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """What this machine has: CPU, cores allowed, GPU, execution providers, versions; and hints.

    [bold]Example[/bold]

      kdexport doctor --json
    """
    from kdexport.bench.machine import advice, environment
    from kdexport.report.sections import written

    facts = environment()
    hints = advice(facts)
    if as_json:
        return print_json(facts | {"advice": hints})
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' '):<16}  {written(value) or '–'}")
    for hint in hints:
        typer.echo(f"hint: {hint}")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The run, bench folder or report to compare with.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The newer one.")],
    fail_if: Annotated[
        list[str] | None, Flag("--fail-if", help="Exit with 3 if so, like 'p99>+10%', 'accuracy<-0.5', 'size>5MB'.")
    ] = None,
    variant: Annotated[
        str | None, Flag(help="Compare this variant.", show_default="the recommended one of each, else all")
    ] = None,
    measure: Annotated[
        bool | None,
        Flag(
            "--measure/--no-measure", help="Measure both files here, in turns.", show_default="while a gate is unsure"
        ),
    ] = None,
    time_limit: Annotated[str, Flag(help="For measuring.")] = "120s",
    unsure_fails: Annotated[bool, Flag("--unsure-fails", help="A gate that stays unsure fails too.")] = False,
    out: Annotated[Path | None, Flag("--out", "-o", help="Write compare.html, .md and .json here.")] = None,
    move_aside: MoveAside = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What changed from A to B, with intervals and verdicts; gates for CI.

    A gate passes or fails only when its whole 95 % interval does; while it is unsure and both files are at hand,
    more rounds are measured, in turns on this machine. Exit code 3: a gate failed.

    [bold]Examples[/bold]

      kdexport compare runs/old runs/new

      kdexport compare runs/old runs/new --fail-if "p99>+10%" --fail-if "accuracy<-0.5"

      kdexport compare old.json new.json --fail-if "p50>+25%"     (pytest-benchmark's JSON)
    """
    given = arguments(locals())
    from kdexport.pipeline import api
    from kdexport.report.difference import show_comparison

    with interruptible("Nothing was written"):
        found = api.compare(**given)
    if as_json:
        print_json(found)
    else:
        show_comparison(found)
    failing = {"failed", "unsure"} if unsure_fails else {"failed"}
    if any(gate.status in failing for gate in found.gates):
        raise typer.Exit(BUDGET_NOT_MET)
