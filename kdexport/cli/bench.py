"""Commands that measure and report: bench, compare, report, doctor."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kdexport.cli import options
from kdexport.cli.options import BUDGET_NOT_MET, Flag, arguments, finite, interruptible, print_json, show_report

Load = partial(Flag, rich_help_panel="Load")


def bench(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET…", help="Runs, artifacts (`folder:int8`), .onnx files, models, URLs.")
    ],
    data: Annotated[str | None, Flag(help="Rows: a file or folder.", show_default="a run's test split")] = None,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    skip_bad_rows: options.SkipBadRows = False,
    reference: Annotated[str | None, Flag(help="Ratios are taken to this variant.", show_default="the first")] = None,
    runtime: Annotated[str, Flag(help="torch, torch-compile, torch-cudagraphs, onnxruntime, openvino.")] = (
        "torch,onnxruntime"
    ),
    device: Annotated[str, Flag(help="cpu, cuda or both; unavailable ones are skipped with a warning.")] = "cpu",
    threads: Annotated[str, Flag(help="Threads of a runtime; the report's is the first.")] = "1",
    batch_sizes: Annotated[str, Flag(help="Batches to measure beside single texts; 0: none.")] = "8,32",
    rounds: Annotated[int, Flag(min=1, help="Fewest rounds.")] = 5,
    round_seconds: Annotated[float, Flag(help="Time measured per round and variant, in s.")] = 1.0,
    precision: Annotated[str, Flag(help="Add rounds until every ratio is this precise; 0: add none.")] = "5%",
    time_limit: Annotated[str, Flag(help="Time limit of the rounds; accuracy and loads come on top.")] = "150s",
    connections: Annotated[str, Load(help="Servers: clients of the closed loops.")] = "1,4,16",
    rate: Annotated[str, Load(help="Servers: open loops, in % of the peak or requests/s.")] = "80%",
    even: Annotated[bool, Load("--even", help="Evenly spaced requests, not a Poisson process.")] = False,
    load_seconds: Annotated[float, Load(callback=finite, help="Time of each load, in s.")] = 5.0,
    price: Annotated[float | None, Flag(min=0.0, help="Price of an hour of a core (or GPU): a cost table.")] = None,
    out: Annotated[Path | None, Flag("--out", "-o", help="Folder.", show_default="runs/bench-<time>")] = None,
    pytest_benchmark: Annotated[Path | None, Flag(help="New file for pytest-benchmark's JSON.")] = None,
    move_aside: options.MoveAside = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure latency, throughput, memory and size, side by side in one run.

    Variants take turns in shuffled rounds, each in its own process; ratios have 95 % intervals and a verdict:
    faster, slower, same or unsure.

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
    to: Annotated[str | None, Flag(help="Log to mlflow, mlflow:URI, tensorboard:FOLDER.", show_default="none")] = None,
    move_aside: options.MoveAside = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
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


def doctor(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show this machine's CPU, allowed cores, GPU, execution providers and versions, with hints.

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
    fail_if: Annotated[list[str] | None, Flag(help="Exit with 3 if 'p99>+10%', 'accuracy<-0.5', 'size>5MB', …")] = None,
    variant: Annotated[str | None, Flag(help="Variant to compare.", show_default="the recommended, else all")] = None,
    measure: Annotated[bool | None, Flag(help="Measure both files.", show_default="while a gate is unsure")] = None,
    time_limit: Annotated[str, Flag(help="Time limit of measuring.")] = "120s",
    unsure_fails: Annotated[bool, Flag("--unsure-fails", help="Fail on a gate that stays unsure.")] = False,
    out: Annotated[Path | None, Flag("--out", "-o", help="Write compare.html, .md and .json here.")] = None,
    move_aside: options.MoveAside = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare B with A: differences with intervals and verdicts; gates for CI.

    A gate passes or fails when its whole 95 % interval does; while one is unsure and both files exist, more rounds
    are measured on this machine. Exit code 3: a gate failed.

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
