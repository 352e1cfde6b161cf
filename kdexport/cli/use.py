"""Commands that use an artifact: predict."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.cli.options import Debug, Flag
from kdexport.errors import SpecError


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


def _text_of(row: dict[str, Any], file: Path | None) -> Any:
    if "text" not in row:
        raise SpecError(f"{file} has no column 'text'", f"Its columns: {', '.join(map(str, row))}")
    return (row["text"], row["text_pair"]) if row.get("text_pair") else row["text"]
