"""The commands as Python functions: names and defaults of the flags, records instead of printed tables.

They raise `KdexportError`; progress goes to stderr (`contextlib.redirect_stderr`). `export` is in `export_model`.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport import ranks
from kdexport.errors import RunError, SpecError
from kdexport.spec.flags import SECONDS, listed, numbers, overrides, quantity, rows_in

if TYPE_CHECKING:
    from kdexport.results import Comparison, Report
    from kdexport.spec import Spec

Place = str | Path
Several = str | Sequence[str]
Quantity = str | float  # with its unit, like "2ms", or a number of the unit that the flag's help names first
Numbers = str | int | Sequence[int]


def run(
    spec: Spec | Mapping[str, Any] | Place | None = None, *,
    teacher: Place | Sequence[Place] | None = None, teacher_epochs: int | None = None,
    data: Place | None = None, test: Place | None = None, task: str | None = None,
    text: str | None = None, text_pair: str | None = None, label: str | None = None,
    unlabelled: Place | None = None, max_length: int | None = None,
    labels: str | Sequence[str] | Mapping[str, str] | None = None,
    max_calls: int | None = None, max_tokens: int | None = None,
    student: Place | Sequence[Place] | None = None,
    loss: str | None = None, temperature: float | None = None, alpha: float | None = None, epochs: int | None = None,
    augment: int | None = None, seeds: int | None = None, seed: int | None = None,
    max_p99: Quantity | None = None, max_size: Quantity | None = None, min_retention: float | None = None,
    time_limit: Quantity | None = None, no_baseline: bool = False, skip_bad_rows: bool = False,
    set: Mapping[str, Any] | None = None, out: Place | None = None, move_aside: bool = False,
) -> Report:  # fmt: skip
    """Distil a teacher into a verified, measured ONNX artifact; a second call resumes after the finished stages.

    In a script that torchrun starts several times the processes share the run, and each returns its report.

    Args:
        spec: a file, or its content; the other arguments override it.
        set: further keys of the spec, like `{"distill.batch_size": 64}`.
        out: the run's folder; `runs/<data's name>` when None.

    Returns:
        The report; `report.budget.met` is None without a budget.
    """
    given = locals()
    with ranks.joined():
        settings = settings_of(spec, given)
        from kdexport.pipeline.run import run as run_stages

        return run_stages(settings, Path(out or run_folder(spec, settings)), move_aside=move_aside)


def bench(
    targets: Place | Sequence[Place], *,
    data: Place | None = None, text: str | None = None, text_pair: str | None = None, label: str | None = None,
    skip_bad_rows: bool = False, reference: str | None = None,
    runtime: Several = "torch,onnxruntime", device: Several = "cpu", threads: Numbers = "1",
    batch_sizes: Numbers = "8,32", rounds: int = 5, round_seconds: float = 1.0, precision: Quantity = "5%",
    time_limit: Quantity = "150s", connections: Numbers = "1,4,16", rate: Quantity | Sequence[Quantity] = "80%",
    even: bool = False, load_seconds: float = 5.0, price: float | None = None,
    out: Place | None = None, pytest_benchmark: Place | None = None, move_aside: bool = False, command: str = "",
) -> Report:  # fmt: skip
    """Measure latency, throughput, memory and size of runs, files, models and servers, side by side.

    Args:
        targets: runs, artifacts (`folder:int8`), .onnx files, models, addresses; one or several.
        out: the folder to write; `runs/bench-<time>` when None.
        command: the command line, for the report.
    """
    from kdexport import spec
    from kdexport.bench.loads import Loads
    from kdexport.output import move_aside as move_out_of_the_way
    from kdexport.pipeline.bench import measure
    from kdexport.report.exchange import write_pytest_benchmark

    half_width = quantity(precision, "--precision", {"": 1.0, "%": 0.01})
    if half_width >= 1:
        raise SpecError(f"--precision {precision!r} is not below 100%", "Write it like 5% or 0.05")
    settings = spec.parse_bench(
        {
            "threads": numbers(threads, "--threads"),
            "batch_sizes": [size for size in numbers(batch_sizes, "--batch-sizes", 0) if size],
            "runtimes": listed(runtime), "devices": listed(device),
            "rounds": rounds, "round_seconds": round_seconds, "precision": half_width or None,
            "time_limit_s": quantity(time_limit, "--time-limit", SECONDS), "price_per_hour": price,
        }
    )  # fmt: skip
    asked = [str(rate)] if isinstance(rate, float | int) else rate.split(",") if isinstance(rate, str) else rate
    rates = [quantity(one, "--rate", {"": 1.0, "%": 0.01, "/s": 1.0}) for one in asked]
    of_peak = ["%" in str(one) for one in asked]
    if min(rates, default=0.0) <= 0 or any(of_peak) != all(of_peak):
        raise SpecError(f"--rate {rate!r} can't be read", "Write 50%,80% (of the peak), or requests a second: 100,200")
    loads = Loads(
        connections=tuple(numbers(connections, "--connections")), rates=tuple(rates), of_peak=all(of_peak),
        poisson=not even, seconds=quantity(load_seconds, "--load-seconds", {"s": 1.0}),
    )  # fmt: skip
    folder = Path(out or bench_folder())
    if pytest_benchmark and os.path.lexists(pytest_benchmark) and not move_aside:
        raise RunError(f"--pytest-benchmark {pytest_benchmark} exists already", "Name another, or pass --move-aside")
    found = measure(
        [str(target) for target in ([targets] if isinstance(targets, str | Path) else targets)], settings, folder,
        texts=rows_in(data, text, text_pair, label, skip_bad_rows), reference=reference, loads=loads,
        command=command, move_aside=move_aside,
    )  # fmt: skip
    if pytest_benchmark:
        if os.path.lexists(pytest_benchmark):
            move_out_of_the_way(Path(pytest_benchmark))
        write_pytest_benchmark(found, folder / "samples.npz", Path(pytest_benchmark))
    return found


def compare(
    a: Place, b: Place, *,
    fail_if: Several | None = None, variant: str | None = None, measure: bool | None = None,
    time_limit: Quantity = "120s", out: Place | None = None, move_aside: bool = False,
) -> Comparison:  # fmt: skip
    """Compare two reports, with intervals and verdicts; `fail_if` are gates, like "p99>+10%".

    Args:
        a, b: runs, bench folders, report.json or pytest-benchmark files; b is the newer one.
        measure: measure both files here, in turns; None: only if a gate is unsure.
        out: a folder for compare.html, .md and .json.
    """
    from kdexport.output import Output
    from kdexport.pipeline.compare import compare as compare_reports
    from kdexport.pipeline.compare import parse_gate
    from kdexport.report.difference import FILES, write_comparison

    gates = [parse_gate(text) for text in ([fail_if] if isinstance(fail_if, str) else fail_if or [])]
    limit = quantity(time_limit, "--time-limit", SECONDS)
    with Output(Path(out), "compare", move_aside=move_aside) if out else nullcontext() as folder:
        if folder:
            folder.check(*FILES)
        found = compare_reports(str(a), str(b), gates, variant=variant, side_by_side=measure, time_limit_s=limit)
        if folder:
            write_comparison(found, folder)
    return found


def settings_of(spec: Spec | Mapping[str, Any] | Place | None, flags: Mapping[str, Any]) -> Spec:
    """Return the spec from a file or its content, overridden by the arguments of `run`."""
    from kdexport.data.sources import recognised
    from kdexport.spec import load

    over = overrides(flags) | dict(flags.get("set") or {})
    if spec is None or isinstance(spec, str | Path):
        return load(Path(spec) if spec else None, over, recognised)
    import msgspec

    return load(None, copy.deepcopy(msgspec.to_builtins(spec)) | over, recognised)


def run_folder(spec: object, settings: Spec) -> Path:
    """Return the default folder of a run: named after its spec, or after its data."""
    source = Path(settings.data.train)
    named = isinstance(spec, str | Path) and Path(spec).stem
    return Path("runs") / (named if named and named != "spec" else source.stem or source.name)


def bench_folder() -> Path:
    """Return the default folder of a bench."""
    return Path(f"runs/bench-{time.strftime('%Y%m%d-%H%M%S')}")
