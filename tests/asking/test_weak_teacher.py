"""A real language model that is too weak to teach is refused after the calls for a few labelled rows."""

from __future__ import annotations

import json

import pytest
from llama import MODEL, served

from kdexport.asking.stage import ask
from kdexport.data import prepare
from kdexport.errors import ModelError
from kdexport.pipeline.api import settings_of


@pytest.mark.slow
def test_smollm2_is_refused_by_letters(tmp_path, monkeypatch, articles, base_model):
    """Of five topics it answers about one headline in five rightly, which the labelled rows show."""
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))
    rows = [{"text": row["text"].partition("\n")[0], "label": row["label"]} for row in articles]
    rows = [row if i < 60 else {"text": row["text"]} for i, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served() as url:
        settings = settings_of(None, {
            "teacher": f"openai:{MODEL}@{url}", "data": tmp_path / "rows.jsonl",
            "labels": "business,entertainment,politics,sports,tech",
            "set": {"student.base": str(base_model), "teacher.ask.concurrency": 1, "teacher.ask.by": "letters"},
        })  # fmt: skip
        prepare(settings.data, settings.task, 0, tmp_path / "data", few_labels=True)
        (tmp_path / "asked").mkdir()
        message = f"teacher {MODEL}: accuracy .* on 60 labelled rows, which is near chance"
        with pytest.raises(ModelError, match=message) as refused:
            ask(settings, tmp_path / "data", tmp_path / "asked")
    assert "teacher.ask" in refused.value.fix or "data.labels" in refused.value.fix, refused.value.fix
