"""What servers answer, in the shapes that each has."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdexport.asking.client import Failed, Reply
from kdexport.asking.reading import (
    by_samples,
    by_scores,
    by_tokens,
    choices_of,
    positions_of,
    said_label,
    said_labels,
    score_of,
    shares_of,
    text_of,
)

LETTERS = ["A", "B", "C"]


def token(text, share, **others):
    return {"token": text, "logprob": math.log(share), "bytes": list(text.encode())} | others


def place(came, **shares):
    """A position of `logprobs.content`; underscores are spaces."""
    top = [token(text.replace("_", " "), share) for text, share in shares.items()]
    return next(each for each in top if each["token"] == came) | {"top_logprobs": top}


def chat(text, *places, **choice):
    message = {"role": "assistant", "content": text}
    return Reply({"choices": [{"message": message, "logprobs": {"content": [*places]}} | choice]}, 0.1, False)


def probabilities(reading):
    return np.exp(reading.logits)


def test_variants_of_a_letter_add_up_and_what_is_no_letter_is_left_out():
    # OpenAI's chat completions, and llama.cpp's of b6900: "A" and " A" are tokens of their own.
    reading = by_tokens(chat("A", place("A", A=0.4, _A=0.1, B=0.2, The=0.2, C=0.05)), LETTERS, fold=False)
    np.testing.assert_allclose(probabilities(reading), [0.5 / 0.75, 0.2 / 0.75, 0.05 / 0.75], rtol=1e-5)
    assert reading.mass == pytest.approx(0.75)
    assert (reading.why, reading.said) == ("", "A")


def test_the_letter_after_a_line_break_or_a_mark_counts():
    breaks = chat(
        "\n**B**", place("\n", **{"\n": 0.9, "A": 0.06}), place("**", **{"**": 1.0}), place("B", B=0.7, A=0.3)
    )
    shares = shares_of(positions_of(choices_of(breaks)[0]), LETTERS, fold=False)
    np.testing.assert_allclose(shares, [0.06 + 0.9 * 0.3, 0.9 * 0.7, 0], atol=1e-9)


def test_tokens_as_tokenizers_write_them():
    # Servers that give the vocabulary's own tokens, without bytes: SentencePiece's ▁A, byte-level BPE's ĠA and Ċ.
    for space in "▁Ġ":
        top = [{"token": f"{space}A", "logprob": math.log(0.6)}, {"token": f"{space}B", "logprob": math.log(0.4)}]
        reading = by_tokens(chat("A", top[0] | {"top_logprobs": top}), LETTERS[:2], fold=False)
        np.testing.assert_allclose(probabilities(reading), [0.6, 0.4], rtol=1e-5)


def test_two_letters_in_two_tokens():
    codes = ["AA", "AB", "BA", "BB"]
    both = chat("AB", place("A", A=0.6, B=0.3, BB=0.1), place("B", B=0.75, A=0.25))
    shares = shares_of(positions_of(choices_of(both)[0]), codes, fold=False)
    # B did not come, so that nobody says how it would have gone on.
    np.testing.assert_allclose(shares, [0.15, 0.45, 0.15, 0.25], atol=1e-9)


def test_words_by_their_first_tokens():
    words = ["sport", "politics", "business"]
    one = chat("Sport", place("Sp", Sp=0.5, pol=0.2, bus=0.1, The=0.1), place("ort", ort=0.8, ring=0.2))
    shares = shares_of(positions_of(choices_of(one)[0]), words, fold=True)
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.1], atol=1e-9)
    # A label that begins another is meant where the word ends.
    ends = chat("no", place("no", no=1.0), place("", **{"": 0.9, "_opinion": 0.1}))
    shares = shares_of(positions_of(choices_of(ends)[0]), ["no", "no opinion"], fold=True)
    np.testing.assert_allclose(shares, [0.9, 0.1], atol=1e-9)


def test_characters_that_come_in_parts():
    # llama.cpp gives "�" for a part of a character, and its bytes.
    first, rest = "体".encode()[:2], "体".encode()[2:] + "育".encode()
    places = []
    for part in (first, rest):
        piece = {"token": "�", "logprob": 0.0, "bytes": list(part)}
        places.append(piece | {"top_logprobs": [piece]})
    reading = by_tokens(chat("体育", *places), ["体育", "政治"], fold=True)
    assert probabilities(reading)[0] > 0.99


def test_a_letter_that_goes_on_as_a_word_is_no_answer():
    begins = chat("Apples", place("A", A=0.9, B=0.1), place("pples", pples=0.95, **{")": 0.05}))
    shares = shares_of(positions_of(choices_of(begins)[0]), LETTERS[:2], fold=False)
    np.testing.assert_allclose(shares, [0.9 * 0.05, 0.1], atol=1e-9)


def test_the_probability_that_a_server_leaves_out_goes_to_options_that_it_does_not_name():
    options = [chr(65 + i) for i in range(8)]
    some = by_tokens(chat("A", place("A", A=0.6, B=0.2, C=0.1)), options, fold=False)
    found = probabilities(some)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert found[3:] == pytest.approx([found[3]] * 5)
    assert found[3] == pytest.approx(0.1 * 0.9 / 5 / (0.9 + 0.09), rel=1e-3)
    # No more than the last one that is named.
    assert probabilities(by_tokens(chat("A", place("A", A=0.5, B=0.01)), LETTERS, fold=False))[2] < 0.02


def test_openais_older_shape():
    # OpenAI's API reference, "The completion object": lists beside each other, a dict of the likeliest for each.
    logprobs = {
        "tokens": [" B", "\n"], "token_logprobs": [math.log(0.7), -0.1], "text_offset": [5, 7],
        "top_logprobs": [{" B": math.log(0.7), " A": math.log(0.3)}, {"\n": -0.1}],
    }  # fmt: skip
    reply = Reply({"choices": [{"text": " B\n", "index": 0, "logprobs": logprobs}]}, 0.1, False)
    np.testing.assert_allclose(probabilities(by_tokens(reply, ["A", "B"], fold=False)), [0.3, 0.7], rtol=1e-5)


def test_llama_cpps_completions_have_the_shape_of_chat():
    # Asked of llama.cpp's /v1/completions with logprobs: 5, by xllamacpp 2026.10.
    places = [{"id": 30, "token": " B", "bytes": [32, 66], "logprob": -0.4,
               "top_logprobs": [{"id": 30, "token": " B", "bytes": [32, 66], "logprob": -0.4}]}]  # fmt: skip
    reply = Reply({"choices": [{"text": " B", "index": 0, "logprobs": {"content": places}}]}, 0.1, False)
    assert by_tokens(reply, ["A", "B"], fold=False).mass == pytest.approx(math.exp(-0.4))
    assert score_of(reply, "The answer is", " B") is None  # it was asked to echo, and did not


def test_a_grammars_choice_counts_with_its_probability_without_the_grammar():
    # llama.cpp gives probabilities as they were before its grammar, and leaves the token out of the likeliest.
    forced = token("B", 0.01) | {"top_logprobs": [token("The", 0.5), token("A", 0.2)]}
    np.testing.assert_allclose(
        shares_of(positions_of(choices_of(chat("B", forced))[0]), LETTERS, fold=False), [0.2, 0.01, 0]
    )


def test_thoughts_are_skipped():
    # DeepSeek-R1 and Qwen3 by a server without a parser of thoughts: they stand in the text, A and B among them.
    thought = [place(text, **{text: 1.0}) for text in ("<think>", "A", "?", "</think>", "\n\n")]
    reply = chat("<think>A?</think>\n\nB", *thought, place("B", B=0.8, A=0.2))
    reading = by_tokens(reply, LETTERS[:2], fold=False)
    np.testing.assert_allclose(probabilities(reading), [0.2, 0.8], rtol=1e-5)
    assert reading.said == "B"
    # The template began the thoughts, so that only their end is in the answer; and one that never ended.
    assert text_of({"message": {"content": "It fits A.\n</think>\n\nB"}}) == "B"
    endless = by_tokens(chat("<think>A", *thought[:2]), LETTERS, fold=False)
    assert (endless.logits, endless.why) == (None, "unparsable")


def test_thoughts_beside_the_answer():
    # vLLM with --reasoning-parser: content is null until the thoughts end.
    message = {"role": "assistant", "content": None, "reasoning_content": "The text is about"}
    reply = Reply({"choices": [{"message": message, "logprobs": None, "finish_reason": "length"}]}, 0.1, False)
    assert by_tokens(reply, LETTERS, fold=False).why == "unparsable"


def test_content_as_parts():
    # Mistral's models that think: parts of thoughts, and parts of text.
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "A?"}]}, {"type": "text", "text": "B"}]
    assert text_of({"message": {"content": parts}}) == "B"


@pytest.mark.parametrize(
    ("message", "finish", "why"),
    [
        ({"content": "I can't help with that."}, "stop", "refusal"),
        ({"content": "I’m sorry, but"}, "stop", "refusal"),
        # OpenAI's structured outputs, "Refusals": the content is null, and the words stand elsewhere.
        ({"content": None, "refusal": "I'm not going to label that."}, "stop", "refusal"),
        # Azure OpenAI, "Content filtering".
        ({"content": ""}, "content_filter", "refusal"),
        ({"content": "The text describes a match."}, "stop", "unparsable"),
    ],
)
def test_answers_that_name_no_label(message, finish, why):
    reply = Reply({"choices": [{"message": message, "finish_reason": finish}]}, 0.1, False)
    reading = by_tokens(reply, LETTERS, fold=False)
    assert (reading.logits, reading.mass, reading.why) == (None, 0, why)
    assert by_samples(choices_of(reply), [None], 3, several=False).why == why


def test_calls_that_failed():
    assert by_tokens(Failed("400: too many tokens", 400, too_long=True), LETTERS, fold=False).why == "too long"
    assert by_tokens(Failed("500: out of memory", 500), LETTERS, fold=False).why == "500: out of memory"
    # Azure OpenAI answers 400 to a prompt that its filter stops.
    filtered = Failed("400: The response was filtered due to Azure OpenAI's content management policy", 400)
    assert by_tokens(filtered, LETTERS, fold=False).why == "refusal"


def echo(tokens, p, **more):
    # vLLM's /v1/completions with echo: the prompt's tokens, the first without a probability, and one that it wrote.
    logprobs = {"tokens": tokens, "token_logprobs": p, "top_logprobs": [None] * len(tokens)} | more
    return Reply({"choices": [{"text": "".join(tokens), "logprobs": logprobs}]}, 0.1, False)


def test_labels_are_scored_after_their_prompt():
    sport = echo(["Text", ":", " x", "\n", "Label", ":", " sp", "ort", "\n", "More"],
                 [None, -1, -2, -1, -1, -1, -0.5, -0.25, -0.25, -3])  # fmt: skip
    other = echo(["<s>", "Text", ":", " x", "\n", "Label", ":", " art", "\n", "More"],
                 [None, -1, -1, -2, -1, -1, -1, -1.5, -0.5, -3])  # fmt: skip
    reading = by_scores([sport, other], "Text: x\nLabel:", [" sport\n", " art\n"])
    np.testing.assert_allclose(probabilities(reading), np.exp([-1, -2]) / np.exp([-1, -2]).sum(), rtol=1e-5)
    assert reading.mass == pytest.approx(math.exp(-1) + math.exp(-2))
    # Of a character's parts the text is no use; their places are.
    parts = echo(["Label", ":", " ", "�", "�"], [None, -1, -1, -2, -3], text_offset=[0, 5, 6, 7, 7])
    assert score_of(parts, "Label:", " 体") == -6
    assert score_of(echo(["Label", ":"], [None, -1]), "Label:", " sport") is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("B", 1), ("b", 1), ("B)", 1), ("(B)", 1), ("**B**", 1), ('"B"', 1), ("B) sports – of any kind", 1),
        ('{"label": "B"}', 1), ('```json\n{"label": "B"}\n```', 1), ("Sports", 1), ("'sports'.", 1),
        ("The label is sports.", 1), ("This is about water sports.", 2), ("The answer is B.", 1),
        ("I choose B) here", 1),
        ("It could be art or sports.", None), ("A text about nothing", None), ("", None), ("A) or B)", None),
        ("D", None),
    ],
)  # fmt: skip
def test_one_label_in_many_words(text, label):
    assert said_label(text, LETTERS, ["art", "sports", "water sports"]) == label


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("A, C", {0, 2}), ("A C", {0, 2}), ("A and B", {0, 1}), ('{"labels": ["A", "C"]}', {0, 2}), ('["B"]', {1}),
        ('{"labels": []}', set()), ("none", set()), ("None.", set()), ("art, water sports", {0, 2}), ("A", {0}),
        ("- A) art\n- C) water sports", {0, 2}), ("Well, well", None),
    ],
)  # fmt: skip
def test_several_labels_in_many_words(text, labels):
    assert said_labels(text, LETTERS, ["art", "sports", "water sports"]) == labels


def test_samples_become_frequencies():
    answers = [{"message": {"content": "A"}}] * 5
    one = by_samples(answers, [{0}, {0}, {0}, {1}, None], 4, several=False)
    np.testing.assert_allclose(probabilities(one), np.array([3.125, 1.125, 0.125, 0.125]) / 4.5, rtol=1e-5)
    assert one.mass == 0.8
    several = by_samples(answers, [{0}, {0, 1}, set(), set()], 2, several=True)
    np.testing.assert_allclose(several.logits, np.log([2.25 / 2.25, 1.25 / 3.25]), rtol=1e-5, atol=1e-7)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.sampled_from([10**400, "A", "<think>", '{"label": 1}', "[" * 99]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["choices", "message", "content", "logprobs", "top_logprobs", "token", "logprob", "bytes", "text", "tokens",
         "token_logprobs", "text_offset", "refusal", "finish_reason"]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300)
@given(values, values, values)
def test_no_answer_breaks_the_reading(message, content, logprobs):
    for choice in ({"message": message, "logprobs": {"content": [content]}}, {"text": message, "logprobs": logprobs}):
        reply = Reply({"choices": [choice]}, 0.1, False)
        for reading in (by_tokens(reply, LETTERS, fold=False), by_scores([reply] * 2, "A", [" B", " C"])):
            assert reading.logits is None or np.isfinite(reading.logits).all()
            assert 0 <= reading.mass <= 1
        said_label(text_of(choice), LETTERS, ["a", "b", "c"])
        said_labels(text_of(choice), LETTERS, ["a", "b", "c"])
    choices_of(Reply({"choices": message}, 0.1, False))
