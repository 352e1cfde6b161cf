"""Recordings that the teacher mishears: the transcript takes the place of its text."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from tones import write_folder
from whispers import write_whisper

from kdexport import spec
from kdexport.data import prepare, read_rows, read_summary
from kdexport.distill.losses import LOGIT_LOSSES, with_rest
from kdexport.distill.soft_targets import write_targets
from kdexport.distill.transcripts import heard_once, prepare_transcriber
from kdexport.errors import SpecError
from kdexport.models.registry import open_trained
from kdexport.stages import Run
from kdexport.tasks import load_task

TASK = "automatic-speech-recognition"
TEXTS = ["ab", "dd c", "a b c", "cab", "bad", "add a", "b", "dab c", "ca", "d d d"]


@pytest.fixture(scope="module", params=["single-label", "seq2seq"])
def stages(request, tmp_path_factory):
    """Data, and a random Whisper as their teacher; and outputs with another word where there is a d."""
    root = tmp_path_factory.mktemp("misheard")
    for split, texts in {"train": TEXTS, "validation": TEXTS[:3], "test": TEXTS[:3]}.items():
        write_folder(root / "in" / split, texts, seed=len(texts))
    whisper = write_whisper(root / "whisper", seconds=3)
    how = spec.Data(train=str(root / "in"), problem=request.param, drop_duplicates=False)

    def build(work):
        prepare_transcriber(read_summary(data), str(whisper), read_rows(data, "train"), work)

    with Run(root / "run") as run:
        data = run.stage("data", version=1, settings=None, reads=[], build=lambda work: prepare(how, TASK, 0, work))
        task = load_task(run.stage("teacher", version=1, settings=None, reads=[data], build=build))

    def answers(rows, advance=None):
        heard = (f"{row['label']} a" if "d" in row["label"] else row["label"] for row in rows)
        return np.stack([task.target_of(text) for text in heard])

    return root / "run", task, answers


def targets(stages, out, most):
    root, _, answers = stages
    out.mkdir()
    write_targets(root / "data", root / "teacher", out, answers, max_word_error=most)
    return np.load(out / "train.npy"), json.loads((out / "targets.json").read_text())


def test_a_misheard_row_is_taught_by_its_transcript_and_counted(stages, tmp_path, capsys):
    root, task, answers = stages
    rows = read_rows(root / "data", "train")
    found, record = targets(stages, tmp_path / "strict", 0.1)
    wrong = sum(a != b["label"] for a, b in zip(task.texts(answers(rows)), rows, strict=True))
    assert task.texts(found) == [row["label"] for row in rows]
    assert record["corrected"] == wrong == 5
    assert "5 of 10 are transcripts, where the teacher's text has a word error rate over 10%" in capsys.readouterr().err


def test_none_is_corrected_by_default_or_within_the_limit(stages, tmp_path):
    root, _, answers = stages
    own = answers(read_rows(root / "data", "train"))
    for name, most in (("none", None), ("all", 3.0)):
        found, record = targets(stages, tmp_path / name, most)
        assert np.array_equal(found, own)
        assert record["corrected"] == 0


def test_rows_that_the_teacher_transcribed_stay_as_they_are(stages):
    _, task, answers = stages
    rows = [{"label": "ab", "heard": True}, {"label": None}]
    logits = answers([{"label": "d"}, {"label": "d"}])
    found, corrected = task.corrected(logits, rows, 0.0)
    assert corrected == 0
    assert np.array_equal(found, logits)


def test_other_processes_get_what_a_decoder_learns_from(stages):
    root, task, _ = stages
    if not task.config.decoder:
        pytest.skip("other students read the recordings themselves")
    model = open_trained(root / "teacher")
    *_, encoded = heard_once(model, task, read_rows(root / "data", "train"), None)
    theirs, again = pickle.loads(pickle.dumps((model, encoded)))
    assert again._encode.args[0] is theirs  # one model, not two
    assert {n: a.tolist() for n, a in again[3].items()} == {n: a.tolist() for n, a in encoded[3].items()}


def test_losses_of_a_sure_text_are_least_where_the_student_writes_it(stages):
    _, task, _ = stages
    if not task.config.decoder:
        pytest.skip("it is of packed outputs")
    line = torch.from_numpy(task.target_of("cab")[:1])
    token, vocabulary = int(line[0, 1]), task._tokenizer.get_vocab_size()
    for name in task.menu.losses:
        sizes = []
        for chosen in (token, (token + 1) % vocabulary):
            logits = torch.full((1, vocabulary), -20.0)
            logits[0, chosen] = 0.0
            sizes.append(float(LOGIT_LOSSES[name](*with_rest(logits, line), None, 1.0)))
        assert sizes[0] < 0.01 * sizes[1], name


def test_it_has_no_effect_on_other_tasks():
    given = {"data.train": "a.csv", "teacher.model": "bert", "task": "text-classification"}
    with pytest.raises(SpecError, match=r"distill\.max_word_error has no effect on text-classification"):
        spec.load(None, given | {"distill.max_word_error": 0.1})
