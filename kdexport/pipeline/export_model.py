"""`kdexport export`: any trained model → a verified artifact; an artifact → a layout for Triton or KServe."""

import re
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.bench.stats import ratio
from kdexport.data import demo, hub
from kdexport.data.sources import read_given
from kdexport.errors import ModelError, SpecError
from kdexport.export import Candidate, export_student
from kdexport.export.verify import FP32_TOLERANCE, compare
from kdexport.files import disk_errors, is_place
from kdexport.integrations import kubernetes, triton
from kdexport.output import check_place, making, publish
from kdexport.pipeline.choose import better_graph
from kdexport.progress import say
from kdexport.report import write_export_card
from kdexport.results import Exported, ExportedFile, Ratio
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Predictor, golden_answers
from kdexport.spec.flags import listed, rows_in
from kdexport.spec.teachers import is_adapter
from kdexport.tasks import DEFAULT, load_task, task_class
from kdexport.tasks.base import Task
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import Keeps

ENOUGH_ROWS = 100  # on which int8 agrees with fp32, if it is recommended
_MOST_ROWS = 2000  # PyTorch is slow, and more rows add little
_ROUNDS, _CALLS = 7, 5


def export(
    model: str | Path, out: str | Path, *,
    layout: str = "hub", variants: str | Sequence[str] | None = None, max_length: int | None = None,
    data: str | Path | None = None, text: str | None = None, text_pair: str | None = None, skip_bad_rows: bool = False,
    language: str | None = None, vocabulary: str | None = None, name: str | None = None, image: str | None = None,
    move_aside: bool = False,
) -> Exported | None:  # fmt: skip
    """Pack a Hugging Face model as an artifact, or lay out an artifact (`folder[:variant]`) for Triton or KServe.

    An earlier export in `out` is replaced once the new one is complete. A Triton repository keeps its other models, and
    other versions than 1 of this one.

    Returns:
        The record of the verification; None if `model` is an artifact already.
    """
    if layout not in ("hub", "triton", "kserve"):
        raise SpecError(f"--layout {layout!r} is none of hub, triton, kserve")
    model, out = str(model), Path(out).resolve()
    source, how = _artifact_at(model), _variants(variants)
    given = rows_in(data, text, text_pair, None, skip_bad_rows)
    if source and layout == "hub":
        raise SpecError(f"{model} is an artifact already", "Copy it, or choose another --layout")
    if vocabulary not in (None, "whole", "corpus"):
        raise SpecError(f"--vocabulary {vocabulary} is unknown", "Take whole or corpus")
    if vocabulary == "corpus" and not given:
        raise SpecError("--vocabulary corpus needs recordings", "Name them with --data")
    if source and (variants or max_length or given or language or vocabulary):
        raise SpecError(f"{model} is an artifact already, so only its layout is left to choose")
    if max_length is not None and max_length < 8:
        raise SpecError(f"--max-length {max_length} is below 8")
    if (name and layout == "hub") or (image and layout != "kserve"):
        raise SpecError(f"--{'name' if name else 'image'} has no effect on layout {layout}")
    name = _name(model if source is None else str(source[0].resolve()), name) if layout != "hub" else ""
    places = [out / name, out / f"{name}_text"] if layout == "triton" else [out]
    mine = triton.NAMES if layout == "triton" else None
    for place in places:
        check_place(place, mine, may_move=move_aside)
    with disk_errors(out.parent), making(out) as work:
        made = work / "made"
        made.mkdir()
        found = None if source else _make(model, how, max_length, given, work, language, vocabulary)
        folder, variant = source or (work / "artifact", None)
        match layout:
            case "triton":
                triton.write(folder, variant, name, made)
            case "kserve":
                kubernetes.write(folder, variant, name, image, made / out.name)
            case _:
                folder.rename(made / out.name)
        for place in places:
            publish(made / place.name, place, work, mine, may_move=move_aside)
    return found


def _artifact_at(model: str) -> tuple[Path, str | None] | None:
    place, variant = artifact.split_name(model)
    folder = artifact.resolve(place)
    return (folder, variant) if (folder / artifact.MANIFEST).exists() else None


def _name(model: str, name: str | None) -> str:
    found = name or [part for part in Path(model).parts if part != "artifact"][-1]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found):
        raise SpecError(f"{found!r} can't be a model's name", "Give one of letters and digits: --name")
    return found


def _variants(names: str | Sequence[str] | None) -> spec.Export:
    try:
        return msgspec.convert({"variants": listed(names)} if names else {}, spec.Export)
    except msgspec.ValidationError:
        raise SpecError(f"--variants {names!r} can't be read", "Write some of fp32,int8,fp16") from None


def read_rows(data: spec.Data | None, task: type[Task]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return at most 2,000 rows to verify on, which need no labels, and the names of their columns."""
    rows, columns = read_given(data, task, "none") if data else ([], {})
    if len(rows) > _MOST_ROWS:
        say(f"verify: {_MOST_ROWS:,} of {len(rows):,} rows, drawn at random")
    return [rows[i] for i in sampled(len(rows), _MOST_ROWS)], columns


def _make(
    model: str, how: spec.Export, max_length: int | None, data: spec.Data | None, work: Path,
    language: str | None, vocabulary: str | None,
) -> Exported:  # fmt: skip
    """Write `artifact/` into `work`."""
    opened = demo.located(model)
    if not Path(opened).exists() and (is_place(model) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model)):
        raise ModelError(f"{model} does not exist", "Name a folder written by save_pretrained")
    hub.check_model(opened)
    from kdexport.models.loading import open_config
    from kdexport.models.registry import task_of
    from kdexport.models.trained import take_trained

    source, graphs, packed, merged = (work / name for name in ("model", "graphs", "artifact", "merged"))
    for folder in (source, graphs, packed, merged):
        folder.mkdir()
    if is_adapter(Path(model)):
        from kdexport.distill.adapter import merge_adapter

        merge_adapter(Path(model), merged)
        opened = str(merged)
    rows, columns = read_rows(data, task_class(task_of(open_config(opened), opened) or DEFAULT))
    take_trained(opened, max_length, rows, source, language, vocabulary)
    task = load_task(source)
    if strange := [precision for precision in how.variants if precision not in task.menu.precisions]:
        known = ", ".join(task.menu.precisions)
        raise SpecError(f"--variants: {strange[0]} is none for {task.name}, the task of {model}", f"Take {known}")
    export_student(how, source, graphs, rows)
    files, chosen, gain = _verify(task, source, graphs, rows)
    recommended, reason = recommend(files, len(rows), gain, task.int8)
    found = Exported(
        model="/".join(Path(model).parts[-2:]), task=task.name, labels=task.labels, function=task.config.function,
        max_length=task.config.max_length, rows=len(rows), recommended=recommended, reason=reason, files=files,
    )  # fmt: skip
    made = {"by": "kdexport export"} | msgspec.to_builtins(found)
    golden = golden_answers(task, {precision: file for precision, (file, _) in chosen.items()})
    artifact.pack(source, chosen, recommended, made, packed, golden, columns)
    write_export_card(found, packed / "README.md")
    return found


def _verify(
    task: Task, source: Path, graphs: Path, rows: Sequence[Row]
) -> tuple[list[ExportedFile], dict[str, tuple[Path, str]], Ratio | None]:
    """Compare every file with PyTorch.

    Returns:
        The records of the files to ship, precision → (file, graph), and the speedup of int8 over fp32.
    """
    reference = np.load(source / "reference.npy")
    everything = [*rows, *task.probes(), *task.examples()]
    allowed = FP32_TOLERANCE
    if task.config.function == "none" and task.labels:  # regression: float32 has seven digits, numbers may be large
        allowed *= max(1.0, float(np.abs(reference).max()))
    compared = {c.name: (c, logits, diff) for c, logits, diff in compare(task, graphs, everything, reference, allowed)}
    fp32 = compared["fp32"][1][: len(rows)]
    shipped, gain = _shipped(task, graphs, [c for c, _, _ in compared.values()], everything)
    files, chosen = [], {}
    for c, logits, difference in (compared[name] for name in shipped):
        chosen[c.precision] = (graphs / c.file, c.graph)
        agreement = float(task.agrees(logits[: len(rows)], fp32).mean()) if rows else None
        files.append(ExportedFile(
            precision=c.precision, file=artifact.shipped_as(c.precision, graphs / c.file), graph=c.graph,
            agreement=agreement, size_bytes=artifact.size_of(graphs / c.file), max_abs_diff=difference,
        ))  # fmt: skip
    say(f"verify: fp32 against PyTorch on {len(everything)} inputs: max |Δlogit| {files[0].max_abs_diff:.1e}")
    return files, chosen, gain


def recommend(
    files: Sequence[ExportedFile], rows: int, gain: Ratio | None = None, keeps: Keeps = Task.int8
) -> tuple[str, str]:
    """Return the precision to load by default, and the reason.

    int8 is recommended if it agrees with fp32 on enough real rows, and is not slower (`gain` is its speedup).
    """
    int8 = next((file for file in files if file.precision == "int8"), None)
    if int8 is None:
        return "fp32", "there is no int8 file"
    if int8.agreement is None:
        return "fp32", "whether int8 keeps the answers is not known without texts (--data)"
    kept = f"int8 {keeps.text.format(int8.agreement, rows)}"
    if rows < ENOUGH_ROWS:
        return "fp32", f"{kept}, which are too few to tell; {ENOUGH_ROWS} are needed"
    if int8.agreement < keeps.least:
        return "fp32", f"{kept}; {keeps.least:.0%} are wanted"
    if gain is None:
        return "int8", f"{kept}; how fast it is was not measured"
    times = f"{gain.value:.2f}× as fast as fp32" if gain.value < 1 else f"{gain.value:.1f}× faster than fp32"
    how = "in a short measurement here, a text of median length at a time on one thread"
    return ("fp32" if gain.verdict == "slower" else "int8"), f"{kept}, and is {times} ({how})"


def _shipped(
    task: Task, graphs: Path, candidates: list[Candidate], rows: Sequence[Row]
) -> tuple[list[str], Ratio | None]:
    """Return the names of the files to ship, and the speedup of int8 over fp32.

    Of each precision the graph that measures best ships, see `choose.better_graph`.
    """
    shipped = {c.precision: c for c in candidates if c.graph == "plain"}
    if len(candidates) == 1:
        return ["fp32"], None
    timed = [c for c in candidates if c.precision != "fp16"]  # CPUs only convert it
    files = {c.name: graphs / c.file for c in timed}
    times = _times(task, files, rows)
    for other in timed:
        plain = shipped[other.precision]
        size = artifact.size_of(files[other.name]) / artifact.size_of(files[plain.name])
        if better_graph(other, ratio(times[plain.name], times[other.name]), size):
            shipped[other.precision] = other
    names = {precision: c.name for precision, c in shipped.items()}
    return list(names.values()), ratio(times[names["fp32"]], times[names["int8"]]) if "int8" in names else None


def _times(task: Task, files: dict[str, Path], rows: Sequence[Row]) -> dict[str, list[float]]:
    """Measure the seconds of each file in each round, in turns, on one text of median length."""
    arrays = task.sized(rows, int(np.median(task.sizes(task.tokenize(rows)))))
    predictors = {name: Predictor(task, file, threads=1) for name, file in files.items()}
    rounds = [
        {name: min(timeit.repeat(partial(p.run, arrays), number=1, repeat=_CALLS)) for name, p in predictors.items()}
        for _ in range(_ROUNDS)
    ]
    return {name: [times[name] for times in rounds[1:]] for name in files}  # the first round warms up
