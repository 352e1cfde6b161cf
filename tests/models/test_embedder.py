"""Embedders: pooling against a plain computation, folders written and read again, steps that are refused by name."""

import json

import numpy as np
import pytest
import torch
from embedders import PROMPTS, write_embedder
from families import byte_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from kdexport.data import demo
from kdexport.distill.teacher_outputs import _files
from kdexport.distill.teachers import TeacherFolder
from kdexport.errors import ModelError
from kdexport.export.onnx import export_onnx
from kdexport.models.embedder import Dense, Embedder, Steps, Table, TableConfig, pooled, read_steps
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor, open_config, open_model
from kdexport.models.registry import task_of
from kdexport.models.saving import save_model, save_task
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task

NAME = "sentence-embedding"
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_embedder(tmp_path_factory.mktemp("models") / "embedder", normalize=False, dense=24)


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder, whose list of modules is changed."""
    import shutil

    def change(make, name="modules.json"):
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / name).write_text(json.dumps(make(json.loads((copy / name).read_text()))))
        return copy

    return change


def configure(folder, name, **values):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


# --- pooling


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_reads_the_tokens_of_each_text_on_either_side(pooling, side):
    torch.manual_seed(0)
    states, lengths = torch.randn(3, 6, 4), [6, 4, 1]
    mask = torch.zeros(3, 6, dtype=torch.long)
    expected = []
    for i, n in enumerate(lengths):
        own = slice(0, n) if side == "right" else slice(6 - n, 6)
        mask[i, own] = 1
        tokens = states[i, own]
        expected.append({"mean": tokens.mean(dim=0), "first": tokens[0], "last": tokens[-1]}[pooling])
    assert torch.allclose(pooled(states, mask, pooling), torch.stack(expected), atol=1e-6)


def test_a_text_without_tokens_has_finite_vectors():
    states, mask = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    for pooling in ("mean", "first", "last"):
        assert pooled(states, mask, pooling).isfinite().all()


def test_an_embedder_is_its_steps_one_after_the_other(folder):
    model = Embedder.open(folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    dense = load_file(folder / "2_Dense" / "model.safetensors")
    inputs = AutoTokenizer.from_pretrained(folder)(["one text", "a longer text"], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        expected = torch.tanh(mean @ dense["linear.weight"].T + dense["linear.bias"])
        found = model(**inputs)
    assert torch.allclose(found.logits, expected, atol=1e-6)
    assert torch.equal(found.last_hidden_state, states)
    assert model.width == 24
    assert model.steps.prompts == PROMPTS
    assert model.steps.reads == 64


def test_a_table_gives_each_token_its_vector():
    table = Table(TableConfig(vocab_size=10, hidden_size=4, pad_token_id=0))
    ids = torch.tensor([[3, 4], [4, 3]])
    vectors = Embedder(table, Steps())(ids, torch.ones_like(ids)).logits
    assert torch.allclose(vectors[0], vectors[1])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1])


# --- folders


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_saved_is_opened_again(folder, tmp_path, pooling, normalize):
    first = Embedder.open(folder)
    made = Embedder(first.encoder, Steps(pooling, normalize, {"query": "find: "}, "query", 32), list(first.dense))
    made.save(tmp_path)
    again = Embedder.open(tmp_path)
    assert again.steps == made.steps
    ids = torch.tensor([[101, 2023, 102]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, made(ids).logits)


def test_a_table_is_saved_and_opened_again(tmp_path):
    made = Embedder(Table(TableConfig(vocab_size=30, hidden_size=4)), Steps())
    made.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(Embedder.open(tmp_path)(ids).logits, made(ids).logits)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "cls"}, "first"),  # as version 5 writes it
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_both_formats_of_pooling_are_read(folder, changed, config, pooling):
    copy = changed(lambda _: config, "1_Pooling/config.json")
    assert read_steps(copy)[0].pooling == pooling


@pytest.mark.parametrize("config", [{"pooling_mode": "max"}, {}, {"pooling_mode_max_tokens": True}])
def test_other_pooling_is_refused_unless_one_is_named(folder, changed, config):
    copy = changed(lambda _: config, "1_Pooling/config.json")
    with pytest.raises(ModelError, match=r"pools by .*, which is not read"):
        Embedder.open(copy)
    assert Embedder.open(copy, "mean").steps.pooling == "mean"


def test_a_plain_encoder_needs_a_name_for_its_pooling(folder, tmp_path):
    Embedder.open(folder).encoder.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a plain encoder, and names no pooling") as error:
        Embedder.open(tmp_path)
    assert "teacher.pooling" in error.value.fix
    assert Embedder.open(tmp_path, "last").steps == Steps("last")


MODULE = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda found: [*found, {"path": "3_CNN", "type": f"{MODULE}CNN"}], "has a module 'CNN', which is not read"),
        (lambda found: found[:1], "names no pooling"),
        (
            lambda found: [*found[:2], {"path": "9_Normalize", "type": f"{MODULE}Normalize"}, found[2]],
            "has a module 'Dense', which is not read",
        ),
        (lambda found: [*found, {"path": "9_Dense", "type": f"{MODULE}Dense"}], "9_Dense lacks config.json or"),
    ],
)
def test_modules_that_are_not_read_are_named(changed, change, what):
    with pytest.raises(ModelError, match=what):
        Embedder.open(changed(change))


def test_an_activation_is_a_module_of_torch(folder, changed):
    copy = changed(lambda config: config, "2_Dense/config.json")
    for name in ("os.getcwd", "torch.nn.functional.relu", "torch.nn.init.os.getcwd"):
        configure(copy, "2_Dense/config.json", activation_function=name)
        with pytest.raises(ModelError, match=f"has the activation '{name}'"):
            Embedder.open(copy)


def test_pooling_without_the_prompts_tokens_is_refused(changed):
    copy = changed(lambda config: config | {"include_prompt": False}, "1_Pooling/config.json")
    with pytest.raises(ModelError, match="pools without its prompts"):
        Embedder.open(copy)


@pytest.mark.parametrize("content", ["{", '[{"idx": 0}]'])
def test_a_damaged_list_of_modules_is_one_line(folder, changed, content):
    copy = changed(lambda found: found)
    (copy / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json|can't be opened"):
        open_model(str(copy), open_config(str(copy)), NAME, [])


def test_missing_weights_are_never_random_ones(folder, changed):
    copy = changed(lambda config: config | {"num_hidden_layers": 3}, "config.json")
    with pytest.raises(ModelError, match=r"lacks trained weights: encoder\.layer\.2"):
        Embedder.open(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        open_model(str(copy), open_config(str(copy)), NAME, [])


def test_tables_of_others_are_no_teachers(tmp_path):
    save_file({"embedding.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": f"{MODULE}StaticEmbedding"}]))
    with pytest.raises(ModelError, match="is a table of tokens"):
        open_config(str(tmp_path))
    (tmp_path / "modules.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    with pytest.raises(ModelError, match="is a table of tokens"):
        open_config(str(tmp_path))


def test_an_embedder_made_of_a_language_model_is_none(changed):
    model = changed(lambda config: config | {"architectures": ["BertLMHeadModel"]}, "config.json")
    config = AutoConfig.from_pretrained(model)
    assert task_of(config, model) == "sentence-embedding"
    (model / "modules.json").unlink()
    assert task_of(config, model) == "causal-lm"


def test_all_files_of_the_steps_decide_a_teachers_outputs(folder):
    """Else two teachers that differ in a dense layer alone would share soft targets."""
    (folder / "task.json").touch()
    names = _files(TeacherFolder(folder, "", "torch", "x"))
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= {*names}


# --- export

WRITERS = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


def encoder_of(family):
    """An encoder with random weights of usual size, and a tokenizer."""
    torch.manual_seed(0)
    if family in WRITERS:
        tokenizer = byte_pairs()
        ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        config = AutoConfig.for_model(family, **WRITERS[family], **ids, vocab_size=len(tokenizer))
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer = AutoTokenizer.from_pretrained(demo.teacher())
        more = {"pad_token_id": 0} if family == "roberta" else {}
        config = AutoConfig.for_model(
            family, **SIZES, max_position_embeddings=80, vocab_size=len(tokenizer), initializer_range=0.3, **more
        )
    return AutoModel.from_config(config).eval(), tokenizer


@pytest.mark.parametrize(
    ("family", "steps", "dense"),
    [
        ("bert", Steps("mean", normalize=False), 0),  # vectors of other lengths than 1
        ("bert", Steps("first", prompts=PROMPTS), 12),
        ("roberta", Steps("mean"), 0),
        ("gpt2", Steps("last"), 0),
        ("llama", Steps("last", normalize=False), 0),
    ],
)
def test_an_exported_file_gives_pytorchs_vectors(tmp_path, family, steps, dense):
    encoder, tokenizer = encoder_of(family)
    layers = [Dense(32, dense, activation="torch.nn.modules.activation.GELU")] if dense else []
    opened = ModelAndProcessor(Embedder(encoder, steps, layers).eval(), tokenizer)
    save_task(opened, None, [], tmp_path, task=NAME, function="none")
    save_model(opened, tmp_path)
    task = load_task(tmp_path)
    rows = [*task.probes(), *task.examples(), *(row | {"prompt": "document"} for row in task.examples())]
    reference = logits_of(Embedder.open(tmp_path), task, rows)
    export_onnx(tmp_path, tmp_path / "model.onnx")
    found = Predictor(task, tmp_path / "model.onnx").logits(rows)
    assert found.shape == (len(rows), dense or 32)
    assert task.difference(found, reference) < 1e-5
    lengths = np.linalg.norm(reference, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == steps.normalize
    alone = Predictor(task, tmp_path / "model.onnx").logits(rows, 1)
    assert task.difference(alone, reference) < 1e-5
