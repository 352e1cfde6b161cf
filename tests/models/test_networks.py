"""Students that are no transformers: the same answer in any batch, and after saving and export."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdexport import spec
from kdexport.data import demo
from kdexport.export import export_student, read_candidates
from kdexport.models.loading import ModelAndProcessor
from kdexport.models.saving import save_model, save_task
from kdexport.models.textnet import KINDS, TextNet, TextNetConfig
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task

LABELS = ["a", "b", "c"]
ROWS = [{"text": text} for text in ("short", "a text that is a good deal longer than the other ones", "two words")]


def net(kind):
    torch.manual_seed(0)
    config = TextNetConfig(
        kind=kind, embedding_size=16, hidden_size=24, head_size=32, num_labels=len(LABELS), num_hidden_layers=2
    )
    made = TextNet(config).eval()
    torch.nn.init.normal_(made.importance.weight)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model, ids = net(kind), torch.randint(5, 1000, (1, 7))
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    # junk behind the text, which the mask hides
    padded = torch.cat([ids, torch.randint(5, 1000, (1, 9))], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 9, dtype=torch.long)], dim=1)
    assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits, alone, atol=1e-5)


@pytest.mark.parametrize(("kind", "reads_order"), [("bag", False), ("cnn", True), ("gru", True), ("encoder", True)])
def test_who_reads_the_order_of_words(kind, reads_order):
    model = net(kind)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    same = torch.allclose(model(input_ids=ids).logits, model(input_ids=ids.flip(1)).logits, atol=1e-5)
    assert same is not reads_order


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_file_answers_as_the_saved_model(kind, tmp_path):
    opened = ModelAndProcessor(net(kind), AutoTokenizer.from_pretrained(demo.teacher()))
    save_task(opened, 32, LABELS, tmp_path)
    save_model(opened, tmp_path)
    (tmp_path / "export").mkdir()
    export_student(spec.Export(), tmp_path, tmp_path / "export")
    task = load_task(tmp_path)
    inputs = {name: torch.from_numpy(array) for name, array in task.encode(ROWS).items()}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = loaded(**inputs).logits.detach().numpy()
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    for candidate in read_candidates(tmp_path / "export"):
        predictor = Predictor(task, tmp_path / "export" / candidate.file)
        allowed = 1e-5 if candidate.precision == "fp32" else 0.1
        assert np.abs(predictor.logits(ROWS) - expected).max() < allowed
        single = np.concatenate([predictor.run(task.encode([row])) for row in ROWS])
        assert np.abs(single - expected).max() < allowed


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="none of bag, cnn, gru, encoder"):
        TextNetConfig(kind="lstm")
