"""No text costs much, whatever it is made of: pairs, texts without spaces, words that are not read, stop texts."""

from __future__ import annotations

import json
import random
import threading
import time

import msgspec
import numpy as np
import pytest
from limits import assert_cheap, begin_peak, cost_of, memory_mb
from serve_process import served
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from wire import ask

from kdexport.data import demo
from kdexport.runtime.generation import _sure
from kdexport.serve.http import Refused
from kdexport.serve.large import check_answer
from kdexport.serve.protocols import oip
from kdexport.tasks.causal_lm import CausalLM
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification
from kdexport.tasks.token_classification import TokenClassification

LABELS = ["O", "B-x", "I-x"]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "unbelievably",
    "12345",
    "don't",
    "(x)",
    "foo-bar,",
    "naïve",
    "你好",
    "мир",
]
PARTS = [
    "the", "cat", " ", "  ", "\n", "(", "((((", "x" * 150, "a" * 90, "你好", "мир", "é", " " * 40, "[SEP]", "</s>",
    "don't", "\u200b", "\U0001f600", "12345678", ". ", " a", " b", " the", " of",
]  # fmt: skip
SPECIAL = [("<s>", 0), ("</s>", 1)]


def word_pieces():
    return Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))


def trained(tokenizer, trainer):
    draw = random.Random(0)
    tokenizer.train_from_iterator([" ".join(draw.choices(WORDS, k=30)) for _ in range(300)], trainer)
    return tokenizer


def byte_level(post_processor):
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    found.post_processor = post_processor
    return trained(found, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=["<s>", "</s>"]))


def unigram(template=True):
    found = Tokenizer(models.Unigram())
    found.normalizer, found.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    if template:
        pair = "<s> $A </s> </s> $B </s>"
        found.post_processor = processors.TemplateProcessing("<s> $A </s>", pair=pair, special_tokens=SPECIAL)
    special = ["<s>", "</s>", "<unk>"]
    return trained(found, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"))


TOKENIZERS = {
    "WordPiece": word_pieces,
    "RoBERTa": lambda: byte_level(processors.RobertaProcessing(("</s>", 1), ("<s>", 0))),
    "GPT-2": lambda: byte_level(processors.ByteLevel()),
    "Unigram": unigram,
    "no post-processor": lambda: unigram(template=False),
}


def task_of(cls, tokenizer, max_length, **more):
    named = {"task": cls.name, "labels": LABELS, "inputs": ["input_ids", "attention_mask", "token_type_ids"]}
    return cls(TaskConfig(**(named | {"max_length": max_length} | more)), tokenizer)


def some_text(draw, most):
    parts = draw.sample(PARTS, draw.choice([1, 2, 4, len(PARTS)]))
    return "".join(draw.choices(parts, k=draw.choice([0, 1, 3, 30, 200, 1500])))[:most]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_read_is_what_the_tokenizer_itself_reads_with_truncation(kind):
    draw, kept = random.Random(kind), TOKENIZERS[kind]().to_str()
    for max_length in (8, 9, 16, 33, 96):
        for side, cut in (("left", "right"), ("right", "left")):
            theirs = Tokenizer.from_str(kept)
            theirs.no_padding()
            theirs.enable_truncation(max_length, direction=cut)
            sides = {"padding_side": side, "truncation_side": cut}
            task = task_of(TextClassification, Tokenizer.from_str(kept), max_length, **sides)
            rows = [{"text": some_text(draw, 3000)} for _ in range(20)]
            rows += [{"text": some_text(draw, 400), "text_pair": some_text(draw, 400)} for _ in range(30)]
            draw.shuffle(rows)
            batch = task.encode(rows)
            for i, row in enumerate(rows):
                expected = theirs.encode(row["text"], row.get("text_pair") or None)
                assert task.is_cut(row) == bool(expected.overflowing), row
                width, size = batch["input_ids"].shape[1], len(expected.ids)
                where = slice(width - size, None) if side == "left" else slice(size)
                for name, values in (("input_ids", expected.ids), ("token_type_ids", expected.type_ids)):
                    assert batch[name][i, where].tolist() == values, row


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_and_prompts_are_those_of_the_whole_text(kind):
    draw, kept = random.Random(kind), TOKENIZERS[kind]().to_str()
    whole = Tokenizer.from_str(kept)
    whole.no_truncation()
    whole.no_padding()
    for max_length in (8, 33):
        tagger = task_of(TokenClassification, Tokenizer.from_str(kept), max_length)
        writer = task_of(CausalLM, Tokenizer.from_str(kept), max_length, labels=[], end_id=1)
        cutting = Tokenizer.from_str(kept)
        cutting.no_padding()
        cutting.enable_truncation(max_length)
        for _ in range(40):
            text = some_text(draw, 6000)
            row = tagger.ready({"text": text})
            if row["text"]:
                expected = cutting.encode(row["text"].split(" "), is_pretokenized=True)
                assert tagger.tokenize([row])[0]["input_ids"].tolist() == expected.ids
            text += " the cat sat on a mat" * 100
            assert writer.prompt(text, 3) == whole.encode(text).ids[-(max_length - 3) :]


def test_a_cost_counts_what_may_have_to_be_tokenised():
    task = task_of(TextClassification, word_pieces(), 96)
    assert task.cost({"text": "the cat sat on a mat " * 1000}) == 96
    for text in ("(" * 50_000, "\n" * 50_000, "word\n\n\n\n\n\n\n\n\n" * 5000):
        assert task.cost({"text": text}) > 5 * 96


TASK = """
import numpy as np
from kdexport.tasks import load_task
from pathlib import Path
texts, words, language = (load_task(Path(folder)) for folder in arguments)
for task in (texts, words, language):
    task.tokenize([{"text": "warm"}])
"""
WORK = """
text = {text}
for task, rows in (
    (texts, [dict(text=text, text_pair=text), dict(text=text)]),
    (words, [words.ready(dict(text=text))]),
    (language, [dict(text=text)]),
):
    task.tokenize(rows)
    [(task.cost(row), task.is_cut(row)) for row in rows]
language.prompt(text, 3)
language.stats(np.zeros((1, 128, 3)), rows)
result = 0
"""
LONG = {
    "brackets": "'(' * 99_000",
    "English": "'Can you tell me how much is left? ' * 2_800",
    "white space": "chr(10) * 99_000",
    "one word": "'x' * 99_000",
    "Chinese": "chr(0x4f60) * 99_000",
    "sparse, then dense": "chr(10) * 49_000 + '(' * 50_000",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks without a model, of all kinds that read texts; WordPiece."""
    made = tmp_path_factory.mktemp("tasks")
    for cls in (TextClassification, TokenClassification, CausalLM):
        (made / cls.name).mkdir()
        (made / cls.name / "tokenizer.json").write_text(word_pieces().to_str())
        config = task_of(cls, word_pieces(), 128).config
        (made / cls.name / "task.json").write_bytes(msgspec.json.encode(config))
    return made


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_no_text_costs_much(folder, text):
    folders = [folder / cls.name for cls in (TextClassification, TokenClassification, CausalLM)]
    assert_cheap(cost_of(TASK, WORK.format(text=text), *folders))


def test_a_pair_in_a_batch_does_not_make_its_other_texts_dear(folder):
    folders = [folder / cls.name for cls in (TextClassification, TokenClassification, CausalLM)]
    rows = "[{'text': 'Can you tell me? ' * 5000}] * 19 + [{'text': 'a', 'text_pair': 'b'}]"
    assert_cheap(cost_of(TASK, f"texts.tokenize({rows}); result = 0", *folders), mb=50, seconds=0.3)


# --- words


def test_only_words_that_are_read_are_answered_and_names_behind_them_are_missed():
    task = task_of(TokenClassification, word_pieces(), 8)
    row = {"text": " ".join("abcdefghij"), "label": "B-x O O O O O O B-x O O"}
    arrays = task.encode([row])
    output = np.zeros((1, 8, 3), dtype=np.float32)
    output[..., 0], output[0, 1] = 2.0, [0, 5, 0]
    logits = task.gather(output, arrays)
    (answer,) = task.decode(logits, [row])
    assert answer.words == list("abcdef")
    assert answer.tags == ["B-x", *"OOOOO"]
    assert task.stats(logits, [row]).tolist() == [[1, 1, 2]]
    labels, _ = oip._best(LABELS, logits, task.scores(logits))
    assert labels == ["B-x O O O O O"]


def test_a_text_without_words_has_no_names():
    task = task_of(TokenClassification, word_pieces(), 8)
    rows = [task.row(""), task.row(" \n")]
    logits = task.gather(np.ones((2, 3, 3), dtype=np.float32), task.encode(rows))
    assert [answer.words for answer in task.decode(logits, rows)] == [[], []]
    assert task.confidence(logits, rows).tolist() == [1, 1]


# --- answers


def test_an_answer_that_would_be_too_large_is_refused_before_there_is_work():
    version = type(
        "Version", (), {"entry_bytes": 90, "generator": None, "task": task_of(CausalLM, word_pieces(), 512)}
    )()
    assert check_answer(256 * 512 * version.entry_bytes, "give fewer rows, or top_k") < 16 << 20
    with pytest.raises(Refused, match="top_k") as refused:
        check_answer(256 * 5000 * version.entry_bytes, "give fewer rows, or top_k")
    assert refused.value.status == 413
    version.task = task_of(TokenClassification, word_pieces(), 512, labels=[str(i) for i in range(50)])
    query = oip.Query([None] * 256, [], [oip.RequestedOutput("scores")], False, None, None)
    with pytest.raises(Refused, match="fewer rows"):
        oip.answer_size(version, query)
    assert oip.answer_size(version, query._replace(rows=[None] * 4)) < 16 << 20


# --- texts that stop


def test_texts_that_stop_cost_next_to_nothing():
    text, stops = "a" * 4096, ["a" * 200 + "b" * 56] * 16
    began = time.process_time()
    assert _sure(text, stops) <= 4096
    assert time.process_time() - began < 0.01
    assert _sure("see the en", ["end", "then"]) == 8


# --- the server


@pytest.fixture(scope="module")
def server(finished):
    with served(finished) as running:
        yield running


HUGE = "(" * 99_000
BODIES = {
    "/": [
        {"inputs": {"text": HUGE, "text_pair": HUGE}},
        {"inputs": [HUGE] * 19},
        {"inputs": [{"text": "(" * 8000, "text_pair": "(" * 8000}] * 100},
        {"inputs": [" " * 49_000 + "(" * 50_000] * 19},
    ],
    "/invocations": [{"inputs": [[HUGE, HUGE]]}],
    "/predict": [{"inputs": [[HUGE, HUGE]], "truncate": False}],
}


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in BODIES.items() for body in bodies])
def test_no_request_takes_memory_or_others_time(server, path, body):
    longest, done = 0.0, threading.Event()
    before = begin_peak(server.process.pid)

    def watch():
        nonlocal longest
        while not done.is_set():
            began = time.monotonic()
            ask(server.url, "/v2/health/live")
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        found = ask(server.url, path, json.dumps(body).encode())
    finally:
        done.set()
        watching.join()
    assert found.status in (200, 422)
    assert memory_mb(server.process.pid) - before < 200
    assert longest < 1.0  # it is milliseconds; this machine may be busy with other work
