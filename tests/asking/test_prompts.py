"""What a language model is asked, and that its answers give back the probabilities that it has."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from endpoint import Encoder, running
from llama import MODEL, served

from kdexport.asking.abilities import Abilities, probe
from kdexport.asking.answers import Answers
from kdexport.asking.client import Endpoint, Failed
from kdexport.asking.prompts import Questions, codes
from kdexport.spec.sections import Ask
from kdexport.spec.teachers import Address
from kdexport.tasks.metrics import sigmoid, softmax
from kdexport.tasks.several import BETWEEN

ABLE = Abilities(top=20, echo=True, constrained="json_schema", n=True)
TOPICS = {"sport": "games and athletes", "politics": "", "cooking": "recipes, and food"}
MANY = {f"{first} {second}": "" for first in "abcde" for second in map(str, range(30))}
TEXTS = ["The keeper saved it.", "Parliament met.", "Text: of a text", "Peel the onions.\n\nThen fry them."]
ROWS = [{"text": text, "label": None} for text in TEXTS]
PAIRS = [{"text": text, "text_pair": f"Not {text}", "label": None} for text in TEXTS[:2]]


def questions(labels=TOPICS, by="letters", *, several=False, examples=(), abilities=ABLE, **how):
    return Questions("encoder", labels, Ask(by=by, **how), by, several=several, examples=examples,
                     abilities=abilities)  # fmt: skip


def logits_by_content(labels, spread=3.0):
    def logits(rows):
        seeds = [hashlib.sha256(f"{row['text']}{row.get('text_pair')}".encode()).digest() for row in rows]
        each = [np.random.default_rng([*seed]).normal(0, spread, len(labels)) for seed in seeds]
        return np.array(each, dtype=np.float32)

    return logits


def encoder(labels, several=False):
    return Encoder([*labels], logits_by_content(labels), several)


def readings(url, asked, rows, tmp_path, order=0, model="encoder"):
    endpoint = Endpoint(Address(model, url), None, store=Answers(tmp_path / "answers"), concurrency=4, timeout_s=60)
    found = []
    for row in rows:
        replies = endpoint.send(asked.of(row, order))
        found.append(asked.read(row, order, replies))
    return found


def said(call):
    return [message["content"] for message in call.body["messages"]]


def test_a_prompt_lists_the_options_and_ends_with_the_text():
    examples = [{"text": "He won.", "label": "sport"}]
    (call,) = questions(examples=examples, instruction="Topics of news.").of(ROWS[0], 0)
    assert call.path == "/chat/completions"
    assert [message["role"] for message in call.body["messages"]] == ["system", "user", "assistant", "user"]
    head, shown, letter, last = said(call)
    instruction, options, what = head.split("\n\n")
    assert instruction == "Topics of news."
    assert sorted(line[3:] for line in options.splitlines()) == sorted(
        ["sport – games and athletes", "politics", "cooking – recipes, and food"]
    )
    assert [line[:3] for line in options.splitlines()] == ["A) ", "B) ", "C) "]
    assert what == "Answer with the letter of one label, and nothing else."
    assert (shown, last) == ("Text: He won.", "Text: The keeper saved it.")
    assert f"{letter}) sport – games and athletes" in options.splitlines()
    assert call.body["temperature"] == 0
    assert (call.body["logprobs"], call.body["top_logprobs"]) == (True, 20)


def test_pairs_and_names():
    (call,) = questions(by="words").of(PAIRS[0], 0)
    head, last = said(call)
    assert "\n- politics\n" in f"{head}\n"
    assert last == "First text: The keeper saved it.\nSecond text: Not The keeper saved it."


def test_the_same_text_is_asked_in_the_same_words():
    for by in ("letters", "words", "samples", "scores"):
        for several in (False, True):
            one, other = (questions(by=by, several=several, orders=2).of(ROWS[1], 1) for _ in range(2))
            assert json.dumps(one) == json.dumps(other)


def test_orders_favour_no_place_and_have_few_beginnings():
    asked, rows = questions(), [{"text": f"text {i}"} for i in range(200)]
    listed = [[said(asked.of(row, order)[0])[0].split("\n\n")[1] for row in rows] for order in (0, 1)]
    assert len(set(listed[0])) <= 16
    for one, other in zip(*listed, strict=True):
        names = [[line[3:] for line in options.splitlines()] for options in (one, other)]
        assert names[0] == names[1][::-1]
    first = [options.splitlines()[0][3:].split()[0] for options in listed[0]]
    assert all(30 < first.count(label) < 110 for label in TOPICS)


def test_letters():
    assert codes(3) == ["A", "B", "C"]
    assert "I" not in codes(25)  # with which "I'm sorry" begins
    assert codes(28)[:2] == ["AA", "BA"]
    # No more than it takes share the first letter, which alone is known where each letter is a token.
    assert max(Counter(code[0] for code in codes(150)).values()) <= 9
    assert len({*codes(676)}) == 676
    assert {len(code) for code in codes(676)} == {2}


@pytest.mark.parametrize("by", ["letters", "words", "scores"])
@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["texts", "pairs"])
def test_probabilities_come_back(by, rows, tmp_path):
    labels = [*TOPICS, "science", "travel"]
    with running(encoder(labels), off=1e-3) as server:
        asked = questions(dict.fromkeys(labels, ""), by, examples=[{"text": "He won.", "label": "sport"}])
        if "text_pair" in rows[0]:
            asked = questions(dict.fromkeys(labels, ""), by)
        found = readings(server.url, asked, rows, tmp_path)
    wanted = softmax(logits_by_content(labels)(rows).astype(np.float64))
    np.testing.assert_allclose(np.exp([each.logits for each in found]), wanted, atol=1e-3)
    assert all(0.9 < each.mass <= 1 and each.why == "" for each in found)
    assert all(each.logits.dtype == np.float32 for each in found)


def test_a_second_order_gives_the_same_probabilities(tmp_path):
    with running(encoder(TOPICS), off=1e-3) as server:
        one, other = (readings(server.url, questions(), ROWS, tmp_path, order) for order in (0, 1))
    np.testing.assert_allclose(*(np.exp([each.logits for each in both]) for both in (one, other)), atol=1e-3)


def test_a_bias_for_the_first_option_cancels_over_two_orders(tmp_path):
    labels = [*TOPICS][:2]
    with running(encoder(labels), bias=1.0, off=1e-3) as server:
        one, other = (
            readings(server.url, questions(dict.fromkeys(labels, "")), ROWS, tmp_path, order) for order in (0, 1)
        )
    wanted = logits_by_content(labels)(ROWS)
    mean = np.mean([[each.logits for each in both] for both in (one, other)], axis=0)
    np.testing.assert_allclose(np.diff(mean), np.diff(wanted), atol=0.02)


def test_more_labels_than_letters(tmp_path):
    asked = questions(MANY)
    with running(encoder(MANY), off=1e-5) as server:
        found = readings(server.url, asked, ROWS, tmp_path)
    wanted = softmax(logits_by_content(MANY)(ROWS).astype(np.float64))
    for row, each, share in zip(ROWS, found, wanted, strict=True):
        best = int(share.argmax())
        lines = said(asked.of(row, 0)[0])[0].split("\n\n")[1].splitlines()
        first = np.array([next(line[0] for line in lines if line[4:] == label) for label in MANY])
        assert int(each.logits.argmax()) == best
        assert np.exp(each.logits[best]) == pytest.approx(share[best], abs=1e-3)
        # Of others the second letter, a token of its own, is not known: those with the first share its probability.
        for letter in {first[c] for c in share.argsort()[-5:]}:
            assert np.exp(each.logits[first == letter]).sum() == pytest.approx(share[first == letter].sum(), abs=2e-3)
        assert np.exp(each.logits).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("by", ["letters", "scores"])
def test_several_labels(by, tmp_path):
    examples = [{"text": "He won, and resigned.", "label": BETWEEN.join(["politics", "sport"])}]
    asked = questions(by=by, several=True, examples=examples)
    calls = asked.of(ROWS[0], 0)
    with running(encoder(TOPICS, several=True), off=1e-3) as server:
        found = readings(server.url, asked, ROWS, tmp_path)
    np.testing.assert_allclose([each.logits for each in found], logits_by_content(TOPICS)(ROWS), atol=2e-3)
    if by == "letters":
        assert len(calls) == 3
        assert [said(call)[2] for call in calls] == ["Yes", "Yes", "No"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("n", [True, False])
def test_samples_are_frequencies(several, n, tmp_path):
    able = Abilities(top=0, echo=False, constrained="json_schema", n=n)
    asked = questions(by="samples", several=several, abilities=able, samples=200)
    calls = asked.of(ROWS[0], 0)
    assert len({json.dumps(call) for call in calls}) == (1 if n else 200)
    with running(encoder(TOPICS, several), several=n) as server:
        found = readings(server.url, asked, ROWS[:2], tmp_path)
    logits = logits_by_content(TOPICS)(ROWS[:2]).astype(np.float64)
    wanted = sigmoid(logits) if several else softmax(logits / 0.7)
    shares = np.array([sigmoid(each.logits) if several else np.exp(each.logits) for each in found])
    np.testing.assert_allclose(shares, wanted, atol=0.12)
    assert [each.mass for each in found] == [1, 1]


def test_samples_without_constraint(tmp_path):
    able = Abilities(top=0, echo=False, constrained="", n=True)
    with running(encoder(TOPICS), constrained=()) as server:
        found = readings(server.url, questions(by="samples", abilities=able, samples=20), ROWS, tmp_path)
    assert all(each.logits is not None and each.mass == 1 for each in found)


def test_refusals_and_failures_are_of_one_row(tmp_path):
    with running(encoder(TOPICS), refusals=1.0) as server:
        assert [each.why for each in readings(server.url, questions(), ROWS[:2], tmp_path)] == ["refusal"] * 2
    asked = questions(several=True)
    failed = [Failed("500: no memory", 500)] * 3
    assert asked.read(ROWS[0], 0, failed)[::2] == (None, "500: no memory")
    assert questions(by="samples").read(ROWS[0], 0, [Failed("400: …", 400, too_long=True)]).why == "too long"


def test_instructions_for_models_without_them():
    able = Abilities(top=20, echo=False, constrained="", n=False, system=False, limit="max_completion_tokens",
                     temperature=False)  # fmt: skip
    (call,) = questions(abilities=able).of(ROWS[0], 0)
    (message,) = call.body["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith("Choose the label that fits the text.\n\nA) ")
    assert message["content"].endswith("\n\nText: The keeper saved it.")
    assert "temperature" not in call.body
    assert call.body["max_completion_tokens"] == 3


@pytest.fixture(scope="module")
def llama():
    with served() as url:
        yield url


@pytest.mark.parametrize("by", ["letters", "words", "samples"])
def test_a_real_language_model(by, llama, tmp_path):
    endpoint = Endpoint(Address(MODEL, llama), None, store=Answers(tmp_path / "a"), concurrency=1, timeout_s=60)
    examples = [{"text": "The goalkeeper saved a penalty.", "label": "sport"},
                {"text": "Chop the onions, and fry them in butter.", "label": "cooking"}]  # fmt: skip
    asked = questions(by=by, abilities=probe(endpoint, MODEL), examples=examples, samples=2)
    found = [reading for row in ROWS[:3] for reading in [asked.read(row, 0, endpoint.send(asked.of(row, 0)))]]
    for each in found:
        assert 0 < each.mass <= 1
        assert np.isfinite(each.logits).all()
        assert np.exp(each.logits).sum() == pytest.approx(1, abs=1e-5)
        assert each.said
