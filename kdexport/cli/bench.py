"""Commands that measure and tell: bench, compare, report, doctor."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.cli.options import (
    Debug,
    Flag,
    Json,
    Label,
    MoveAside,
    SkipBadRows,
    Text,
    TextPair,
    finite,
    numbers,
    quantity,
    rows_in,
    show_report,
)
from kdexport.errors import Interrupted, RunError, SpecError

SECONDS = {"s": 1.0, "ms": 1e-3, "min": 60.0, "m": 60.0}


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
    device: Annotated[str, Flag(help="cpu, cuda or both; what is not there is left out, and said.")] = "cpu",
    threads: Annotated[str, Flag(help="Threads of a runtime; the first is the report's, others are added.")] = "1",
    batch_sizes: Annotated[str, Flag(help="Batches to measure beside single texts; 0 for none.")] = "8,32",
    rounds: Annotated[int, Flag(min=1, help="Rounds at least.")] = 5,
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
    price: Annotated[float | None, Flag(min=0.0, help="Of an hour of one core (or GPU), for the cost table.")] = None,
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
    from kdexport import spec
    from kdexport.bench.loads import Loads
    from kdexport.output import move_aside as move_out_of_the_way
    from kdexport.pipeline.bench import measure
    from kdexport.report.exchange import write_pytest_benchmark

    share = quantity(precision, "--precision", {"": 1.0, "%": 0.01}) or 0.0
    if share >= 1:
        raise SpecError(f"--precision {precision!r} is no share", "Write it like 5% or 0.05")
    settings = {
        "threads": numbers(threads, "--threads"),
        "batch_sizes": [n for n in numbers(batch_sizes, "--batch-sizes", 0) if n],
        "runtimes": runtime.split(","),
        "devices": device.split(","),
        "rounds": rounds,
        "round_seconds": round_seconds,
        "precision": share or None,
        "time_limit_s": quantity(time_limit, "--time-limit", SECONDS),
        "price_per_hour": price,
    }
    rates = [quantity(part, "--rate", {"": 1.0, "%": 0.01, "/s": 1.0}) or 0.0 for part in rate.split(",")]
    shares = ["%" in part for part in rate.split(",")]
    if min(rates) <= 0 or any(shares) != all(shares):
        raise SpecError(
            f"--rate {rate!r} can't be read", "Write shares of the peak, like 50%,80%, or rates, like 100,200"
        )
    loads = Loads(
        connections=tuple(numbers(connections, "--connections")),
        rates=tuple(rates),
        of_peak=all(shares),
        poisson=not even,
        seconds=load_seconds,
    )
    folder = out or Path(f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if pytest_benchmark and os.path.lexists(pytest_benchmark) and not move_aside:
        raise RunError(f"--pytest-benchmark {pytest_benchmark} exists already", "Name another, or pass --move-aside")
    try:
        found = measure(
            targets,
            spec.parse_bench(settings),
            folder,
            texts=rows_in(data, text, text_pair, label, skip_bad_rows),
            reference=reference,
            loads=loads,
            command=shlex.join(["kdexport", *sys.argv[1:]]),
            move_aside=move_aside,
        )
    except KeyboardInterrupt:
        raise Interrupted(f"Whole rounds are kept: the same command with --out {folder} goes on from there") from None
    if pytest_benchmark:
        if os.path.lexists(pytest_benchmark):
            move_out_of_the_way(pytest_benchmark)
        write_pytest_benchmark(found, folder / "samples.npz", pytest_benchmark)
    show_report(found, folder, as_json)


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's (or bench's) folder.")],
    price: Annotated[float | None, Flag(min=0.0, help="Of an hour of one core (or GPU), for the cost table.")] = None,
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
    """What this machine has: CPU, cores allowed, GPU, execution providers, versions; and what to mind.

    [bold]Example[/bold]

      kdexport doctor --json
    """
    from kdexport.bench.machine import advice, environment
    from kdexport.report.sections import written

    facts = environment()
    hints = advice(facts)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(facts | {"advice": hints}), indent=2).decode())
        return
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' '):<16}  {written(value) or '–'}")
    for hint in hints:
        typer.echo(f"mind: {hint}")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The run, bench folder or report to compare with.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The newer one.")],
    fail_if: Annotated[
        list[str] | None, Flag("--fail-if", help="Exit with 3 if so, like 'p99>+10%', 'accuracy<-0.5', 'size>5MB'.")
    ] = None,
    variant: Annotated[
        str | None, Flag(help="Compare this variant.", show_default="the recommended one of each, else all")
    ] = None,
    side_by_side: Annotated[
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
    from kdexport.cli.build import BUDGET_NOT_MET
    from kdexport.output import Output
    from kdexport.pipeline.compare import compare as compare_reports
    from kdexport.pipeline.compare import parse_gate
    from kdexport.report.difference import FILES, show_comparison, write_comparison

    gates = [parse_gate(text) for text in fail_if or []]
    limit = quantity(time_limit, "--time-limit", SECONDS) or 0.0
    with Output(out, "compare", move_aside=move_aside) if out else nullcontext() as folder:
        if folder:
            folder.check(*FILES)
        try:
            found = compare_reports(a, b, gates, variant=variant, side_by_side=side_by_side, time_limit_s=limit)
        except KeyboardInterrupt:
            raise Interrupted("Nothing was written") from None
        if folder:
            write_comparison(found, folder)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        show_comparison(found)
    failing: Any = {"failed", "unsure"} if unsure_fails else {"failed"}
    if any(gate.status in failing for gate in found.gates):
        raise typer.Exit(BUDGET_NOT_MET)
