"""Runs whose teacher gives answers and no weights: logits, a zero-shot model; and a person who corrects them."""

import json

import msgspec
import numpy as np
import pytest
from transformers import AutoConfig

from kdexport import spec
from kdexport.data import read_rows
from kdexport.pipeline.run import run
from kdexport.tasks.metrics import softmax

LABELS = ["business", "entertainment", "politics", "sports", "tech"]
QUICK = {
    "distill.epochs": 1, "distill.baseline": False, "data.max_length": 32,
    "bench.rounds": 1, "bench.round_seconds": 0.1, "bench.precision": None, "bench.batch_sizes": (),
}  # fmt: skip


@pytest.fixture
def stored(tmp_path, articles):
    """120 articles, and a file of logits that are right about them."""
    rows = [row | {"text": row["text"][:160]} for row in articles[:120]]
    file = tmp_path / "news.jsonl"
    file.write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    logits = np.array([[4.0 * (row["label"] == label) for label in LABELS] for row in rows])
    np.savez(tmp_path / "logits.npz", train=logits, labels=LABELS)
    return {"data.train": str(file), "teacher.model": str(tmp_path / "logits.npz")} | QUICK, rows


def test_students_of_stored_logits_are_made_from_another_model(tmp_path, stored, base_model, monkeypatch):
    given, rows = stored
    # What a person says: one text twice in the data's words, and one that is in no row.
    corrected = tmp_path / "corrected.csv"
    wrong = "tech" if rows[3]["label"] != "tech" else "business"
    texts = [json.dumps(rows[3]["text"]).replace('\\"', '""').encode().decode("unicode_escape"), '"of another world"']
    corrected.write_text(f"text,label\n{texts[0]},{wrong}\n{texts[1]},tech\n", encoding="utf-8")
    changes = {"student.base": str(base_model), "student.model": "layers:1", "teacher.corrections": str(corrected)}
    settings = spec.load(None, given | changes)
    report = run(settings, tmp_path / "run")
    assert report.variants[0].name == "teacher-stored"
    assert "the teacher's layers 0" in report.distillation.origin
    student = AutoConfig.from_pretrained(tmp_path / "run" / "student")
    assert (student.num_hidden_layers, student.hidden_size, student.num_labels) == (1, 384, 5)
    found = {}
    for split in ("train", "validation", "test"):
        kept = read_rows(tmp_path / "run" / "data", split)
        answers = softmax(np.load(tmp_path / "run" / "targets" / f"{split}.npy"))
        found |= {row["text"]: answer for row, answer in zip(kept, answers, strict=True)}
    sure = found[rows[3]["text"]]
    assert sure[LABELS.index(wrong)] == pytest.approx(0.99)
    assert np.delete(sure, LABELS.index(wrong)) == pytest.approx(np.full(4, 0.0025))
    assert found[rows[4]["text"]].max() == pytest.approx(np.exp(4) / (np.exp(4) + 4), abs=1e-5)
