"""Models as strangers bring them: an artifact scores as transformers does a text alone, or one line says why not."""

import json

import numpy as np
import pytest
import strangers
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kdexport as package
from kdexport import spec
from kdexport.errors import KdexportError, ModelError, VerificationError
from kdexport.models.inference import logits_of
from kdexport.models.loading import ModelAndProcessor, open_tokenizer
from kdexport.models.saving import _check_tokens, save_task
from kdexport.pipeline.export_model import export
from kdexport.pipeline.rehearse import rehearse
from kdexport.tasks import load_task

SHORT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 40}
GPT2 = {"family": "gpt2", "tokenizer": strangers.byte_pairs, "about": strangers.GPTS} | SHORT | strangers.ENDS
RELATIVE = {"family": "xlnet", "n_layer": 2, "d_model": 32, "n_head": 2, "d_inner": 64}
SEQUENCES = {"family": "bart", "eos_token_id": 102, "d_model": 32} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
}
MODELS = {
    "a BERT whose tokenizer gives no token types": {"tokenizer": strangers.unigrams, "about": strangers.XLM},
    "a RoBERTa of one token type whose tokenizer gives two": {
        "family": "roberta", "pad_token_id": 0, "type_vocab_size": 1,
    },
    "truncation on the left": {"about": strangers.BERTS | {"truncation_side": "left"}},
    "padding on the left": {"about": strangers.BERTS | {"padding_side": "left"}},
    "padding by the end token": GPT2 | {"about": strangers.GPTS | {"pad_token": "<|end|>"}, "pad_token_id": 0},
    "no padding in config.json": GPT2 | {"about": strangers.GPTS | {"pad_token": "<|end|>"}},
    "no padding in the tokenizer": GPT2 | {"pad_token_id": 0},
    "no padding": GPT2,
    "no limit of positions, and the last token read": RELATIVE,
    "positions from the padding's": {"family": "data2vec-text", "pad_token_id": 0},
    "positions from another token's": {"family": "mpnet", "pad_token_id": 0},
    "quantized embeddings": {"family": "ibert", "pad_token_id": 0},
    "an encoder and a decoder": SEQUENCES | {"pad_token_id": 0},
}  # fmt: skip
LONG = " ".join(strangers.TEXTS * 3)


def alone(folder, rows, **more):
    """The logits of transformers' own tokenizer and model, each text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    cut = {"truncation": True, "max_length": 32, "return_tensors": "pt"}
    types = {"return_token_type_ids": False} if getattr(model.config, "type_vocab_size", 2) < 2 else {}
    with torch.inference_mode():
        return np.concatenate([model(**tokenizer(*row, **cut, **types)).logits.numpy() for row in rows])


SLOW = "an encoder and a decoder"  # two exporters write it


@pytest.mark.parametrize(
    "kind", [*(kind for kind in MODELS if kind != SLOW), pytest.param(SLOW, marks=pytest.mark.slow)]
)
def test_scores_are_those_of_transformers_for_a_text_alone(kind, tmp_path):
    how = dict(MODELS[kind])
    if "tokenizer" in how:
        how["tokenizer"] = how["tokenizer"]()
    strangers.write(tmp_path / "model", **how)
    found = export(tmp_path / "model", tmp_path / "out", variants="fp32", max_length=32)
    assert found.files[0].max_abs_diff < 1e-4
    rows = [("a",), *((text,) for text in strangers.TEXTS), (LONG,)]
    if how.get("family") != "bart":  # it counts the end tokens of its texts
        rows += [tuple(strangers.TEXTS[:2]), (strangers.TEXTS[2], LONG)]
    predictor = package.load(tmp_path / "out")
    task = predictor.task
    ours = predictor.logits([task.row(row if len(row) > 1 else row[0]) for row in rows])
    assert np.abs(ours - alone(tmp_path / "model", rows)).max() < 1e-4
    assert np.ptp(ours, axis=0).min() > 1e-3  # the texts differ
    assert len(predictor.predict([""])[0].scores) == 3
    # The artifact's own tokenizer, as other runtimes use it, in a batch.
    texts = [row[0] for row in rows[:5]]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, truncation=True, padding=True, return_tensors="np")
    assert set(theirs) == set(task.config.inputs)
    assert np.abs(predictor.run(dict(theirs)) - ours[:5]).max() < 1e-4


def half(dtype):
    def change(folder, model):
        model.to(dtype).save_pretrained(folder)

    return change


def shards(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len([*folder.glob("model-*.safetensors")]) > 1


def pickled(folder, model):
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def of_430(folder, model):
    strangers.configure(
        folder, transformers_version="4.30.2", gradient_checkpointing=False, pruned_heads={}, torch_dtype="float32",
        position_embedding_type="absolute", pooler_size_per_head=128, finetuning_task="x", problem_type=None,
    )  # fmt: skip


def words_alone(folder, model):
    """`vocab.txt`, as BERT's tokenizers were saved before there were fast ones."""
    vocabulary = strangers.word_pieces().get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (folder / "tokenizer.json").unlink()


def numbered_from_1(folder, model):
    strangers.configure(folder, id2label={"1": "a", "2": "b", "3": "c"}, label2id={"a": 1, "b": 2, "c": 3})


LAYOUTS = [half(torch.float16), half(torch.bfloat16), shards, pickled, of_430, words_alone, numbered_from_1]
NAMES = ["float16", "bfloat16", "shards", "pytorch_model.bin", "transformers 4.30", "vocab.txt", "labels from 1"]


@pytest.mark.parametrize("change", LAYOUTS, ids=NAMES)
def test_layouts_of_files_are_read(change, tmp_path):
    change(tmp_path, strangers.write(tmp_path))
    export(tmp_path, tmp_path / "out", variants="fp32")
    rows = [(text,) for text in strangers.TEXTS]
    predictor = package.load(tmp_path / "out")
    assert np.abs(predictor.logits([{"text": text} for (text,) in rows]) - alone(tmp_path, rows)).max() < 1e-4
    labels = ["a", "b", "c"] if change is numbered_from_1 else ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert predictor.task.labels == labels
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert [config["id2label"][str(i)] for i in range(3)] == labels
    assert config["label2id"] == {label: i for i, label in enumerate(labels)}


def inner(name):
    def change(folder):
        files = [path for path in folder.iterdir() if path.is_file()]
        (folder / name).mkdir()
        for path in files:
            path.rename(folder / name / path.name)

    return change


def sentence_transformers(folder):
    inner("0_Transformer")(folder)
    (folder / "config.json").write_text('{"__version__": "0.3.0"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')


def setfit(folder):
    strangers.configure(folder, architectures=["BertModel"])
    (folder / "config_setfit.json").write_text("{}")
    (folder / "model_head.pkl").write_bytes(b"")


def settings(**values):
    return lambda folder: strangers.configure(folder, **values)


REFUSED = [
    (inner("checkpoint-500"), r"holds no config.json with a model_type\. .*, such as \S+/checkpoint-500$"),
    (sentence_transformers, r"holds no config.json with a model_type\. .*, such as \S+/0_Transformer$"),
    (setfit, "it is BertModel for feature-extraction, whose SetFit head is not read"),
    (settings(id2label={"0": "a", "2": "b", "5": "c"}), "id2label in config.json has the ids 0, 2, 5. Count them from"),
    (settings(id2label={"0": "a", "1": "b"}), "has weights of other sizes than its config.json says: classifier.bias"),
    (settings(quantization_config={"quant_method": "gptq", "bits": 4}), r"are quantized \(gptq\)"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_can_not_be_read_is_one_line(change, says, tmp_path):
    folder = tmp_path / "model"
    strangers.write(folder)
    change(folder)
    with pytest.raises(ModelError, match=says) as error:
        export(folder, tmp_path / "out")
    assert "\n" not in str(error.value)


BATCHED = {"family": "convbert", "pad_token_id": 0, "head_ratio": 1}


def test_a_family_whose_scores_depend_on_the_batch_is_refused_before_any_training(tmp_path):
    strangers.write(tmp_path / "model", **BATCHED)
    with pytest.raises(ModelError, match="convbert models score a text otherwise beside longer ones, by "):
        export(tmp_path / "model", tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    named = {"teacher.model": str(tmp_path / "model"), "data.train": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ModelError, match="can't be made: convbert models score a text otherwise"):
        rehearse(spec.load(None, named | {"student.model": "layers:1"}))
    rehearse(spec.load(None, named | {"student.model": "bag"}))


def test_a_model_that_can_not_read_its_tokenizers_texts_is_one_line(tmp_path):
    strangers.write(tmp_path / "model", "xmod", pad_token_id=0)
    with pytest.raises(ModelError, match=r"the model \(xmod\) can't read texts of its tokenizer: Input language unkn"):
        export(tmp_path / "model", tmp_path / "out")


def test_a_language_model_reads_texts_in_a_batch_as_alone_wherever_its_tokenizer_pads(tmp_path):
    from transformers import AutoModelForCausalLM

    config = strangers.write(tmp_path / "model", **dict(GPT2, tokenizer=strangers.byte_pairs())).config
    strangers.configure(tmp_path / "model", "tokenizer_config.json", padding_side="left", truncation_side="left")
    tokenizer = open_tokenizer(str(tmp_path / "model"), "causal-lm")
    model = AutoModelForCausalLM.from_config(config)
    save_task(ModelAndProcessor(model, tokenizer), 32, [], tmp_path, task="causal-lm")
    task = load_task(tmp_path)
    rows = [task.ready({"text": text}) for text in (*strangers.TEXTS, "")]
    together, each = (logits_of(model, task, rows, batch_size=size) for size in (4, 1))
    assert task.difference(together, each) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"  # as transformers pads prompts


def test_tokens_that_are_not_transformers_stop_the_export(tmp_path):
    model = strangers.write(tmp_path / "model", about=strangers.BERTS | {"truncation_side": "left"})
    out = tmp_path / "out"
    out.mkdir()
    save_task(ModelAndProcessor(model, open_tokenizer(str(tmp_path / "model"))), None, ["a", "b", "c"], out)
    assert load_task(out).config.truncation_side == "left"
    _check_tokens(out)
    strangers.configure(out, "task.json", truncation_side="right")
    with pytest.raises(VerificationError, match=r"the text 'The parcel .*' has other tokens than transformers gives"):
        _check_tokens(out)


def test_an_adapter_is_exported_with_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = strangers.write(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    strangers.configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    found = export(tmp_path / "adapter", tmp_path / "out", variants="fp32", max_length=32)
    assert found.model.endswith("/adapter")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "base")(strangers.TEXTS[1], return_tensors="pt")
    with torch.inference_mode():
        theirs = adapted.eval()(**inputs).logits.numpy()
    ours = package.load(tmp_path / "out").logits([{"text": strangers.TEXTS[1]}])
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(theirs - alone(tmp_path / "base", [(strangers.TEXTS[1],)])).max() > 1e-3
    strangers.configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path="nobody/has-this")
    with pytest.raises(
        KdexportError, match="model 'nobody/has-this' can't be opened: there is no such folder, and no hub"
    ):
        export(tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize("command", ["teacher", "student", "export"])
def test_a_folder_that_is_not_there_is_named_at_once(kdexport, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    if command == "export":
        found = kdexport("export", "models/bert2", "out", HF_HUB_OFFLINE="0")
    else:
        names = {"teacher": ".", "student": "tiny"} | {command: "models/bert2"}
        flags = [part for role, name in names.items() for part in (f"--{role}", name)]
        found = kdexport("run", "--data", "rows.jsonl", *flags, HF_HUB_OFFLINE="0")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert "models/bert2 does not exist" in found.stderr


def test_a_hub_that_can_not_be_reached_is_asked_once(kdexport, tmp_path):
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = kdexport("export", "nobody/has-this", tmp_path / "out", **nowhere)
    assert found.returncode == 2
    assert found.stderr.startswith(
        "error: model 'nobody/has-this' can't be opened: there is no such folder, and no hub: "
    )
    assert found.stderr.count("\n") == 1


def test_int8_is_recommended_by_measurement_too(tmp_path):
    strangers.write(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(40) for text in strangers.TEXTS))
    found = export(tmp_path / "model", tmp_path / "out", data=rows)
    int8 = next(file for file in found.files if file.precision == "int8")
    assert ("in a short measurement here" in found.reason) == (int8.agreement >= 0.99)
