"""Language models: passages, soft targets of the top k, and the example from end to end on a few of its own rows."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_media_runs import ROOT, needed, run
from tokenizers import Tokenizer
from torch.nn import functional as F

from kdexport import spec
from kdexport.data import read_rows
from kdexport.data.passages import cutter
from kdexport.distill.losses import jsd, kl, reverse_kl, with_rest
from kdexport.distill.targets import SoftTargets
from kdexport.errors import KdexportError, SpecError
from kdexport.results import read_report
from kdexport.runtime.generation import Sampling, choose, stream, write
from kdexport.runtime.predictor import load
from kdexport.tasks import load_task
from kdexport.tasks.causal_lm import CausalLM, log_softmax
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.judging import metric
from kdexport.tasks.packed import most_probable

TEACHER = ROOT / "examples" / "teachers" / "shakespeare-gpt2"
LINE = "What, art thou weary of the world, my lord, and of thyself?\n"


def tokenizer():
    return Tokenizer.from_file(str(TEACHER / "tokenizer.json"))


def task(max_length=32, kept=4):
    config = TaskConfig(
        task="causal-lm", labels=[], inputs=["input_ids", "attention_mask"], max_length=max_length, kept=kept, end_id=0
    )
    return CausalLM(config, tokenizer())


# --- passages


@pytest.mark.parametrize(
    "text", [40 * LINE, "no end of a line " * 90, "x" * 700, "字" * 300, f"one\r\n\r\ntwo {60 * LINE}"]
)
def test_passages_are_the_whole_text_in_the_tokens_that_it_has(text):
    found = cutter(tokenizer(), 32)(text)
    assert "".join(found) == text
    each = [tokenizer().encode(passage).ids for passage in found]
    assert max(map(len, each)) <= 32
    if " " in text:  # else there is no place to cut at that keeps tokens
        assert [i for ids in each for i in ids] == tokenizer().encode(text).ids
        assert np.mean([len(ids) for ids in each[:-1]]) > 24


# --- answers


def packed(model, found, rows):
    batch = found.encode(rows)
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(array) for name, array in found.graph_inputs(batch).items()}).logits
    return found.gather(logits.numpy(), batch), logits


@pytest.fixture(scope="module")
def model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


def test_perplexity_is_that_of_transformers_and_bits_are_of_the_bytes_that_were_predicted(model):
    found, row = task(), {"text": LINE}
    answers, _ = packed(model, found, [row])
    ids = torch.tensor([tokenizer().encode(LINE).ids])
    loss = model(ids, labels=ids).loss.item()
    metrics = found.further(answers, [row])
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    first = len(tokenizer().decode(ids[0, :1].tolist()))
    bits = loss * (ids.shape[1] - 1) / math.log(2) / (len(LINE) - first)
    assert metric(found, answers, [row]) == pytest.approx(bits, rel=1e-4)


def test_answers_to_a_batch_are_those_to_its_rows(model):
    found, rows = task(), [{"text": LINE}, {"text": "A"}, {"text": ""}, {"text": "What then?"}]
    together, _ = packed(model, found, rows)
    each = np.concatenate([packed(model, found, [row])[0] for row in rows])
    assert found.difference(together, each) < 1e-5
    assert found.agrees(together, each).tolist() == [1, 0, 0, 1]  # of the short ones nothing is predicted


# --- soft targets


def test_the_loss_over_64_tokens_is_that_over_the_whole_vocabulary():
    draw = np.random.default_rng(0)
    theirs = (3 * draw.normal(size=(1, 2000, 1024))).astype(np.float32)
    ours = torch.tensor(theirs[0] + draw.normal(size=(2000, 1024)), dtype=torch.float32, requires_grad=True)
    ids = draw.integers(0, 1024, (1, 2000))
    whole = kl(ours, torch.tensor(theirs[0]), None, 1.0).item()
    found = {}
    for k in (8, 64, 1024):
        answers = task(2000, k).gather(theirs, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        loss = kl(*with_rest(ours[:-1], torch.from_numpy(answers[0, :-1])), None, 1.0)
        loss.backward()
        found[k] = loss.item()
    assert found[64] == pytest.approx(whole, rel=0.01)
    assert found[1024] == pytest.approx(whole, rel=1e-3)
    assert found[8] < 0.95 * whole
    assert torch.isfinite(ours.grad).all()


def test_reverse_kl_and_jsd_are_their_definitions():
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    p, q = F.softmax(teacher / 2, -1), F.softmax(student / 2, -1)
    m = (p + q) / 2
    assert reverse_kl(student, teacher, None, 2.0).item() == pytest.approx(
        4 * (q * (q / p).log()).sum(-1).mean().item()
    )
    both = 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))
    assert jsd(student, teacher, None, 2.0).item() == pytest.approx(4 * both.mean().item(), rel=1e-5)


def test_the_most_probable_come_first():
    logs = log_softmax(np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32))
    for k in (1, 5, 50):
        assert (most_probable(logs, k) == np.argsort(-logs, axis=1)[:, :k]).all()


def test_tokens_are_drawn_as_often_as_their_probability_and_never_outside_of_top_k_and_top_p():
    logits, draw = np.log(np.array([0.5, 0.3, 0.15, 0.05])), np.random.default_rng(0)

    def shares(**how):
        found = [choose(logits, Sampling(temperature=1.0, **how), draw)[0] for _ in range(2000)]
        return np.bincount(found, minlength=4) / 2000

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert choose(logits, Sampling(), draw)[0] == 0


# --- the example, from end to end


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory, cache):
    """The example with a twentieth of the text, and a teacher of two narrow layers."""
    data, source = tmp_path_factory.mktemp("shakespeare"), needed("shakespeare")
    for split, size in (("train", 50_000), ("test", 6_000)):
        (data / f"{split}.txt").write_text((source / f"{split}.txt").read_text()[:size])
    teacher = tmp_path_factory.mktemp("teacher") / "gpt2"
    shutil.copytree(TEACHER, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"n_embd": 64, "n_layer": 3, "n_head": 2}))
    how = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 8, "dtype": "bfloat16"}
    flags = {"data.train": str(data), "teacher.model": str(teacher), "teacher.train": how, "student.model": "2x32"}
    flags |= {"distill.epochs": 4, "distill.batch_size": 8, "distill.samples": 30}
    return run("causal-lm.yaml", tmp_path_factory.mktemp("run") / "shakespeare", cache, **flags)


def test_the_report_has_bits_per_byte_and_tokens_a_second(shakespeare):
    report = read_report(shakespeare / "report.json")
    assert (report.metric, report.metric_higher_is_better) == ("bits per byte", False)
    shipped = [v.name.removesuffix("-dynamo") for v in report.variants if v.shipped]  # what measured faster here
    assert sorted(shipped) == ["student-fp32", "student-int4", "student-int8"]
    for variant in report.variants:
        assert 1 < variant.metric.value < 4
        assert 0 < variant.further["token accuracy"] < 1
        assert variant.latency_ms.tokens_per_second == pytest.approx(32e3 / variant.latency_ms.p50)
        assert 0 < variant.latency_ms.first_token_p50 < variant.latency_ms.p50
    assert {"teacher", "student", "baseline"} == set(report.distillation.further)
    assert report.variant("student-fp32").max_abs_diff < 1e-4
    assert "bits per byte" in (shakespeare / "report.md").read_text()


def test_the_card_says_how_it_is_used_and_its_python_runs(shakespeare, capsys):
    card = (shakespeare / "artifact" / "README.md").read_text()
    for said in ("pipeline_tag: text-generation", "name: bits per byte", "ORTModelForCausalLM.from_pretrained"):
        assert said in card
    assert "labels:" not in card
    (block,) = re.findall(r"```python\n(.*?)```", card, re.S)
    exec(block.replace("path/to/this/folder", str(shakespeare / "artifact")))
    written = write(load(shakespeare), "Once upon a time", Sampling(max_new_tokens=40)).completion
    assert capsys.readouterr().out == f"{written}\n"


def test_the_teacher_wrote_what_the_student_also_learned(shakespeare):
    rows = read_rows(shakespeare / "targets", "transfer")
    assert len(rows) == 30
    train = {row["text"] for row in read_rows(shakespeare / "data", "train")}
    assert not {row["text"] for row in rows} & train
    targets = SoftTargets(load_task(shakespeare / "teacher"), shakespeare / "targets" / "transfer.npy")
    assert targets[:].shape == (30, 128, 129)


@pytest.mark.parametrize(("variant", "file"), [("fp32", "model.onnx"), ("int4", "model_q4.onnx")])
def test_optimum_writes_the_same(shakespeare, optimum, variant, file):
    prompts = ["ROMEO:\nWhat", "The king"]
    theirs = optimum("ORTModelForCausalLM", shakespeare / "artifact", file, prompts)
    model = load(shakespeare, variant)
    assert [write(model, prompt, Sampling(max_new_tokens=24)).completion for prompt in prompts] == theirs


def test_the_cache_changes_nothing_that_transformers_writes_without_one(shakespeare):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(shakespeare / "student"), load(shakespeare, "fp32")
    ids = found.task.prompt("O, what a", 20)
    written = list(ids)
    with torch.no_grad():
        for _ in range(20):
            written.append(int(model(torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
    ours = write(found, "O, what a", Sampling(max_new_tokens=20))
    assert ours.completion == found.task.text_of(written[len(ids) :])
    assert (ours.tokens, ours.prompt_tokens, ours.finish) == (20, len(ids), "length")


def test_writing_stops_at_a_text_before_any_of_it_is_told(shakespeare):
    found, how = load(shakespeare, "fp32"), Sampling(max_new_tokens=40, temperature=1.0, seed=3)
    whole = write(found, "Good", how).completion
    stop = whole[10:14]
    pieces = list(stream(found, "Good", Sampling(max_new_tokens=40, temperature=1.0, seed=3, stop=[stop])))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert write(found, "Good", how).completion == whole  # the seed decides


def test_a_prompt_that_is_too_long_and_none_at_all_are_gone_on_from(shakespeare):
    found = load(shakespeare, "int8")
    assert write(found, 99 * LINE, Sampling(max_new_tokens=8)).tokens == 8
    assert write(found, "", Sampling(max_new_tokens=500)).tokens <= 127


def cli(*arguments):
    return subprocess.run([sys.executable, "-m", "kdexport", *arguments], capture_output=True, text=True, check=False)


def test_predict_writes_and_tells_how_well_texts_are_foreseen(shakespeare):
    done = cli("predict", str(shakespeare), "ROMEO:", "--max-new-tokens", "5")
    answer = json.loads(done.stdout)
    assert (answer["tokens"], answer["finish"]) == (5, "length")
    foreseen = json.loads(cli("predict", str(shakespeare), LINE, "--perplexity").stdout)
    assert 1 < foreseen["bits_per_byte"] < 6
    wrong = cli("predict", str(shakespeare), "ROMEO:", "--top-p", "0")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--top-p" in wrong.stderr


def test_a_llama_is_exported_with_its_cache(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kdexport.models.shrink import narrow
    from kdexport.pipeline.export_model import export

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, **sizes)
    )
    narrow(llama, 2, 32).model.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(tmp_path / "llama")
    done = export(str(tmp_path / "llama"), tmp_path / "out", variants=("fp32", "int4"))
    assert done.task == "causal-lm"
    assert done.files[0].max_abs_diff < 1e-4
    assert write(load(tmp_path / "out"), "What", Sampling(max_new_tokens=3)).tokens == 3


# --- what can't be


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"student.model": "bag"}, "none for causal-lm"),
        ({"teacher.model": ["a", "b"]}, "one teacher"),
        ({"distill.loss": "hidden"}, "distill.loss: hidden is not for causal-lm"),
        ({"distill.augment": {}}, "distill.augment changes texts, and not the rows of causal-lm"),
        ({"task": "text-classification", "export.variants": ["int4"]}, "int4 is none for text-classification"),
        ({"task": "text-classification", "distill.samples": 5}, "no effect on text-classification"),
    ],
)
def test_what_language_models_do_not_have_is_said_before_any_work(tmp_path, flags, said):
    from kdexport.pipeline.run import run as run_pipeline

    (tmp_path / "train.txt").write_text(30 * LINE)
    given = {"task": "causal-lm", "data.train": str(tmp_path), "teacher.model": str(TEACHER)}
    with pytest.raises(SpecError, match=said):
        run_pipeline(spec.load(None, given | flags), tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n\n", "text is empty"), (b"a\xff\n", "not UTF-8")]
)
def test_a_text_that_can_not_be_read_is_named(tmp_path, content, said):
    from kdexport.pipeline.run import run as run_pipeline

    (tmp_path / "train.txt").write_bytes(content)
    given = {"task": "causal-lm", "data.train": str(tmp_path / "train.txt"), "teacher.model": str(TEACHER)}
    with pytest.raises(KdexportError, match=said) as caught:
        run_pipeline(spec.load(None, given), tmp_path / "run")
    assert "train.txt" in str(caught.value)
