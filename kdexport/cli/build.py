"""Commands that make an artifact: run, demo, init, export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport import ranks
from kdexport.cli import options
from kdexport.cli.options import BUDGET_NOT_MET, Flag, arguments, interruptible, parse_sets, print_json, show_report
from kdexport.errors import SpecError


def run(
    spec: Annotated[Path | None, typer.Argument(metavar="[SPEC.yaml]", help="A spec; flags override it.")] = None,
    teacher: Annotated[
        list[str] | None,
        Flag(
            help="Hugging Face folder or hub id, PEFT adapter, ONNX artifact, logits, openai:MODEL@URL (an endpoint), "
            "answers.jsonl, zero-shot:MODEL; several times: an ensemble."
        ),
    ] = None,
    teacher_epochs: Annotated[
        int | None, Flag(help="Epochs to fine-tune the teacher.", show_default="derived, if it has no head")
    ] = None,
    data: Annotated[str | None, Flag(help="CSV, JSONL or Parquet file, folder of train.*, test.*, or hub id.")] = None,
    test: Annotated[str | None, Flag(help="Test file.", show_default="split from the data")] = None,
    task: Annotated[
        str | None, Flag(help="What the model does, like token-classification.", show_default="recognised by the data")
    ] = None,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    unlabelled: Annotated[str | None, Flag(help="More texts, labelled by the teacher alone.")] = None,
    labels: options.Labels = None,
    max_calls: Annotated[int | None, Flag(help="Answers of an endpoint at most.", show_default="3000")] = None,
    max_tokens: Annotated[int | None, Flag(help="Tokens of an endpoint at most.", show_default="no limit")] = None,
    max_length: Annotated[int | None, Flag(help="Tokens read of each text.", show_default="128")] = None,
    student: Annotated[
        list[str] | None,
        Flag(
            help="bag, cnn, gru, tiny, mini, small, 3x192, layers:3, spread:3, a folder or hub id; several: a search.",
            show_default="by the task, tiny for texts; with a budget a search",
        ),
    ] = None,
    loss: Annotated[
        str | None, Flag(help="kl, reverse-kl, jsd, soft-ce, mse, bce, dkd, dist, hidden, …", show_default="kl")
    ] = None,
    temperature: Annotated[float | None, Flag(help="T of the soft targets.", show_default="4")] = None,
    alpha: Annotated[float | None, Flag(help="Weight of the distillation loss.", show_default="1")] = None,
    epochs: Annotated[int | None, Flag(help="Epochs of the student.", show_default="derived")] = None,
    augment: Annotated[int | None, Flag(help="Augmented copies of each text; 0: none.", show_default="derived")] = None,
    seeds: Annotated[int | None, Flag(help="Trainings with other seeds: mean and deviation.", show_default="1")] = None,
    seed: Annotated[int | None, Flag(help="Random seed of splits, weights and order.", show_default="0")] = None,
    max_p99: options.Max99 = None,
    max_size: options.MaxSize = None,
    min_retention: options.MinRetention = None,
    time_limit: options.TimeLimit = None,
    no_baseline: Annotated[bool, Flag("--no-baseline", help="Don't train the student on labels alone.")] = False,
    skip_bad_rows: options.SkipBadRows = False,
    set: options.Sets = None,
    out: options.Out = None,
    move_aside: options.MoveAside = False,
    plan: Annotated[bool, Flag("--plan", help="Print every value with its reason; train nothing.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Distil a teacher into a verified, measured ONNX student within a budget.

    Fine-tunes the teacher if asked, caches its soft targets, distils, exports, quantizes, verifies, measures, packs.
    With a budget or several students it searches: all are measured untrained, those over budget are dropped, the
    most promising are trained until one meets it. Run again, it resumes. Exit code 3: the budget is not met.

    [bold]Examples[/bold]
      kdexport run --teacher ./my-bert --data tickets.csv
      kdexport run --teacher ./my-bert --data tickets.csv --max-p99 2ms --max-size 5MB --min-retention 0.97
      kdexport run --teacher ./minilm --teacher-epochs 3 --data tickets.csv --student layers:2
      kdexport run spec.yaml --student bag --student tiny --max-size 2MB --time-limit 30min
      kdexport run --teacher openai:MODEL@http://localhost:8000/v1 --labels refund,delay,praise --data texts.txt
    """
    given = arguments(locals()) | {"set": parse_sets(set)}
    from kdexport.pipeline import api

    settings = api.settings_of(spec, given)
    if plan:
        with ranks.led(dict) as leads:
            if leads:
                _print_plan(settings, as_json)
    else:
        folder = out or api.run_folder(spec, settings)
        _run({"spec": settings, "out": folder, "move_aside": move_aside}, as_json)


def demo(
    out: Annotated[Path, Flag("--out", "-o", help="The run's folder.")] = Path("runs/demo"),
    student: Annotated[
        list[str] | None, Flag(help="bag, cnn, tiny, layers:N, …", show_default="tiny; with a budget a search of six")
    ] = None,
    max_p99: options.Max99 = None,
    max_size: options.MaxSize = None,
    min_retention: options.MinRetention = None,
    set: options.Sets = None,
    move_aside: options.MoveAside = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run on embedded data, without network: 200 labelled articles of BBC News, and 1,200 without labels.

    The teacher, all-MiniLM-L6-v2, is fine-tuned on the 200; the student learns from its answers to all.

    [bold]Examples[/bold]
      kdexport demo --max-size 10MB --min-retention 0.97
      kdexport demo --student tiny
    """
    given = arguments(locals())
    from kdexport.data import demo as embedded

    data = out.with_name("bbc-news")

    def write() -> None:
        if not (data / "unlabelled.jsonl").exists():  # the last one that is written
            data.mkdir(parents=True, exist_ok=True)
            embedded.write_few_labels(data)

    ranks.agreed(write)
    unlabelled = data / "unlabelled.jsonl"
    recipe = {"max_length": 96, "data": data, "unlabelled": unlabelled, "teacher": embedded.teacher()}
    _run(given | recipe | {"set": {"bench.time_limit_s": 90} | parse_sets(set)}, as_json)


def init(
    teacher: Annotated[str, Flag(help="Hugging Face folder or hub id of the teacher.")],
    data: Annotated[str, Flag(help="CSV, JSONL or Parquet file, a folder, or a hub id.")],
    test: Annotated[str | None, Flag(help="Test file.", show_default="split from the data")] = None,
    task: Annotated[str | None, Flag(help="As of run.", show_default="by the data")] = None,
    labels: options.Labels = None,
    out: Annotated[Path, Flag("--out", "-o", help="The spec to write.")] = Path("spec.yaml"),
    debug: options.Debug = False,
) -> None:
    """Write a spec with every setting, its default and its meaning, to edit and run.

    [bold]Example[/bold]
      kdexport init --teacher ./my-bert --data tickets.csv && kdexport run spec.yaml
    """
    given = {"teacher": teacher, "data": data, "test": test, "task": task, "labels": labels}
    from kdexport import spec
    from kdexport.files import write_bytes
    from kdexport.pipeline import api

    content = spec.commented(api.settings_of(None, given)).encode()
    try:
        write_bytes(out, content, new=True)
    except FileExistsError:
        raise SpecError(f"{out} exists already", "Name another file with --out") from None
    typer.echo(f"wrote {out}; run it with: kdexport run {out}")


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id of a trained model; an artifact; a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an unchanged earlier export is replaced.")],
    layout: Annotated[str, Flag(help="hub: the artifact; triton: a repository; kserve: with manifests.")] = "hub",
    variants: Annotated[str | None, Flag(help="fp32 (always made), int8, fp16.", show_default="fp32,int8")] = None,
    max_length: Annotated[int | None, Flag(min=8, help="Tokens read of each text.", show_default="up to 512")] = None,
    data: Annotated[str | None, Flag(help="Rows to verify on, without labels: a file or folder as in run.")] = None,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    skip_bad_rows: options.SkipBadRows = False,
    language: Annotated[
        str | None,
        Flag(help="Language of a multilingual Whisper: de, german.", show_default="heard in --data, else English"),
    ] = None,
    vocabulary: Annotated[
        str | None,
        Flag(help="Tokens of a Whisper: whole, or corpus, those that it writes for --data.", show_default="whole"),
    ] = None,
    name: Annotated[str | None, Flag(help="Name in triton and kserve.", show_default="the folder's")] = None,
    image: Annotated[str | None, Flag(help="Name of kserve's image.", show_default="<name>:<version>")] = None,
    move_aside: options.MoveAside = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Export any trained model as a verified artifact: ONNX, optimised, quantized, packed.

    Every file is compared with PyTorch on odd and plain inputs, and on --data; fp32 must match to 1e-4 in every
    logit. int8 is recommended if it agrees with fp32 on 99 % of at least 100 rows of --data and measures no slower,
    else fp32.

    An artifact, or a run, can be laid out for Triton or KServe too, as ARTIFACT[:VARIANT].

    [bold]Examples[/bold]
      kdexport export ./my-bert artifacts/tickets
      kdexport export ./my-bert artifacts/tickets --data tickets.csv --variants fp32,int8,fp16
      kdexport export openai/whisper-base artifacts/orders --language german --data ./orders/train --vocabulary corpus
      kdexport export runs/demo:int8 repository --layout triton
    """
    given = arguments(locals())
    from kdexport.pipeline import export_model

    found = export_model.export(**given)
    if as_json:
        return print_json(found)
    if found is None:
        typer.echo(f"wrote {out}")
        return
    for file in found.files:
        star = "★" if file.precision == found.recommended else " "
        same = "" if file.agreement is None else f"  same answer as fp32: {file.agreement:.1%}"
        size = f"{file.size_bytes / 1e6:6.1f} MB"
        typer.echo(f"{star} {file.file:<25} {size}  max |Δlogit| from PyTorch {file.max_abs_diff:.1e}{same}")
    typer.echo(f"★ loads by default: {found.reason}")
    typer.echo(f"wrote {out}")


def _run(given: dict[str, Any], as_json: bool) -> None:
    from kdexport.pipeline import api

    with interruptible("Finished stages are kept: the same command goes on from there"):
        found = api.run(**given)
    show_report(found, given["out"], as_json)
    if found.budget.met is False:
        raise typer.Exit(BUDGET_NOT_MET)


def _print_plan(settings: Any, as_json: bool) -> None:
    from kdexport.pipeline.run import plan

    rows = plan(settings)
    if as_json:
        return print_json({key: {"value": value, "reason": why} for key, value, why in rows})
    width = max(len(key) for key, _, _ in rows)
    for key, value, why in rows:
        typer.echo(f"{key:<{width}}  {value:<24}  {why}")
