"""Wav2Vec2 and its kin as teachers of CTC, with the characters of their own vocabularies."""

from __future__ import annotations

import json

import pytest
import torch
from tones import say
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from kdexport import spec
from kdexport.analysis.duplicates import Audit
from kdexport.data import Summary, read_rows, write_rows
from kdexport.distill.teacher import prepare_teacher
from kdexport.errors import ModelError
from kdexport.files import write_json
from kdexport.models.inference import logits_of
from kdexport.models.loading import alphabet_of
from kdexport.models.registry import open_trained
from kdexport.tasks import load_task

TASK = "automatic-speech-recognition"


def wav2vec2(folder, **vocab):
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=[32] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "</s>": 1, "|": 2, "A": 3, "B": 4} | vocab))
    tokens = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>", "word_delimiter_token": "|"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def test_a_ctc_model_writes_the_characters_of_its_vocabulary(tmp_path):
    assert alphabet_of(str(wav2vec2(tmp_path)), 6) == ["<pad>", "</s>", " ", "a", "b", "<5>"]
    with pytest.raises(ModelError, match=r"has its blank '<pad>' at 3"):
        alphabet_of(str(wav2vec2(tmp_path, **{"<pad>": 3, "A": 0})), 6)
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"<pad>": 0}, "deu": {"<pad>": 0}}))
    with pytest.raises(ModelError, match=r"has no vocab\.json of characters\. Save the tokenizer of one language"):
        alphabet_of(str(tmp_path), 6)


def test_a_wav2vec2_teacher_reads_as_transformers_decodes(tmp_path):
    data, out, model = (tmp_path / name for name in ("data", "out", "model"))
    for folder in (data, out, model):
        folder.mkdir()
    wav2vec2(model)
    rows = [{"id": f"r:{i}", "audio": say("ab ba", i), "label": "ab ba", "sha256": str(i)} for i in range(3)]
    write_rows(data, "train", rows)
    audit = Audit(0, 0, 0, {}, {}, {})
    write_json(data / "data.json", Summary({"train": 3}, ["<pad>", " ", "a", "b"], 0, [], audit, 0, TASK))
    prepare_teacher(spec.Teacher(model=str(model)), data, None, 0, out)
    task = load_task(out)
    rows = read_rows(data, "train")
    logits = logits_of(open_trained(out), task, rows, batch_size=1)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(model)
    theirs = [tokenizer.decode(path) for path in logits.argmax(axis=2)]
    ours = [text.replace("<5>", "<s>") for text in task.texts(logits)]  # which transformers adds
    assert ours == [text.lower() for text in theirs]
    write_json(data / "data.json", Summary({"train": 3}, ["<pad>", "z"], 0, [], audit, 0, TASK))
    with pytest.raises(ModelError, match=r"does not write the data's character 'z'"):
        prepare_teacher(spec.Teacher(model=str(model)), data, None, 0, out)
