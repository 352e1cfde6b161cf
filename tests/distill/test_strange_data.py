"""Data and labels that do not fit a teacher: mended, or said before it is trained."""

from __future__ import annotations

import json
import random
import re
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, pipeline

from kdexport import spec
from kdexport.data import demo, prepare
from kdexport.distill.teacher import prepare_teacher
from kdexport.errors import ModelError
from kdexport.models.loading import open_config
from kdexport.models.trained import take_trained
from kdexport.spec import sections
from kdexport.tasks import load_task
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification

CHINESE = "政府宣布新的经济措施球队赢得比赛股市下跌天气预报明日有雨"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model of random weights with an English vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher())
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def headlines(draw, n=30):
    return [{"text": "".join(draw.choices(CHINESE, k=12)) + str(i), "label": "ab"[i % 2]} for i in range(n)]


def test_a_script_that_the_vocabulary_lacks_is_named_before_the_teacher_is_trained(tmp_path, teacher, capfd):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in headlines(random.Random(0))))
    prepare(spec.Data(train=str(data / "rows.jsonl")), "text-classification", 0, data)
    prepare_teacher(spec.Teacher(model=str(teacher), train=sections.TeacherTraining(epochs=1)), data, 32, 0, out)
    said = capfd.readouterr().err
    warning = re.search(r"warning: teacher: [56]\d% of the texts' tokens are unknown to its vocabulary", said)
    assert warning.start() < said.index("teacher: fine-tuning")


@pytest.mark.parametrize(
    ("tokenizer", "warned"),
    [
        (Tokenizer(Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.0)], 0)), True),
        (Tokenizer(BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")), True),
        (Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, [])), False),
    ],
)
def test_only_what_becomes_the_unknown_token_is_unknown(tokenizer, warned):
    tokenizer.pre_tokenizer = ByteLevel() if not warned else Metaspace()
    config = TaskConfig(task="text-classification", labels=["a", "b"], inputs=["input_ids"], max_length=4000)
    task = TextClassification(config, tokenizer)
    remarks = task.remarks([{"text": CHINESE}] * 3)
    assert ["unknown to its vocabulary" in remark for remark in remarks] == [True][:warned]
    assert task.remarks([{"text": "a" * 10}]) == []


def test_labels_that_count_from_1_are_renumbered(tmp_path, teacher):
    folder, out = tmp_path / "from-1", tmp_path / "out"
    shutil.copytree(teacher, folder)
    out.mkdir()
    config = json.loads((folder / "config.json").read_bytes())
    names = {"id2label": {"1": "good", "2": "bad"}, "label2id": {"good": 1, "bad": 2}}
    (folder / "config.json").write_text(json.dumps(config | names))
    take_trained(str(folder), 32, [{"text": "a film"}], out)
    assert load_task(out).labels == ["good", "bad"]
    (found,) = pipeline("text-classification", str(out), top_k=None)(["a film"])
    assert {one["label"] for one in found} == {"good", "bad"}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "good", "2": "bad"}, "label2id": {}}))
    with pytest.raises(ModelError, match=r"numbers its labels 0, 2\. Count id2label in its config\.json from 0"):
        open_config(str(folder))
