"""Any JSON to each protocol's parser gives rows that the model can be asked, or a refusal; tensors: test_tensors.py."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kdexport.data import demo
from kdexport.serve.http import Refused
from kdexport.serve.protocols import embeddings, huggingface, openai, tei, tgi, transcriptions
from kdexport.serve.settings import Settings
from kdexport.tasks import task_class
from kdexport.tasks.config import EmbeddingConfig, TaskConfig

ROOM, MAX_CHARS = 31, 50
GENERATOR = SimpleNamespace(room=ROOM)  # all that the parsers ask of one

TEXTS = st.text(max_size=8) | st.sampled_from(["word", "softmax", "none", "simple", "aGVsbG8=", "x" * 60, "right"])
NUMBERS = st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 31, 32, 2**31, 2**53, 2**63, 2**64, 1e300, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | TEXTS
NAMED = ["inputs", "prompt", "parameters", "stream", "top_k", "function_to_apply", "text", "text_pair", "truncate"]
NAMED += ["raw_scores", "aggregation_strategy", "ignore_labels", "return_timestamps", "max_new_tokens", "do_sample"]
NAMED += ["temperature", "top_p", "seed", "stop", "details", "return_full_text", "best_of", "model", "max_tokens"]
NAMED += ["stream_options", "include_usage", "n", "logprobs", "logit_bias", "suffix", "echo", "user"]
NAMED += ["input", "source_sentence", "sentences", "dimensions", "normalize", "prompt_name", "encoding_format"]
FIELDS = st.sampled_from(NAMED)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | TEXTS, inner, max_size=4),
    max_leaves=8,
)
# Near what the protocols take, so that many a request is one.
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": JSON
        | TEXTS
        | st.lists(TEXTS | st.lists(TEXTS, max_size=3), max_size=3)
        | st.lists(TEXTS | NUMBERS | st.lists(NUMBERS, max_size=3), max_size=3)
        | st.fixed_dictionaries({"source_sentence": TEXTS, "sentences": st.lists(TEXTS, max_size=3)}),
        "input": TEXTS | st.lists(TEXTS | st.lists(NUMBERS, max_size=3), max_size=5),
        "dimensions": SCALARS,
        "prompt_name": st.none() | st.sampled_from(["query", "document", "x"]),
        "prompt": JSON | TEXTS,
        "model": TEXTS,
        "parameters": JSON | st.dictionaries(FIELDS, SCALARS | st.lists(TEXTS, max_size=2), max_size=3),
        "stream": SCALARS,
        "max_tokens": SCALARS,
        "temperature": SCALARS,
        "top_k": SCALARS,
        "seed": SCALARS,
        "stop": SCALARS | st.lists(TEXTS, max_size=5),
        "raw_scores": st.booleans(),
        "stream_options": JSON,
    },
)


LONGEST, MAX_ROWS, WIDTH = 4, 3, 16


def embedder():
    """All that the parsers of vectors ask of a version."""
    config = TaskConfig(
        task="sentence-embedding", labels=[], inputs=["input_ids", "attention_mask"], max_length=LONGEST,
        embedding=EmbeddingConfig(width=WIDTH, prompts={"query": "query: "}),
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(demo.teacher() / "tokenizer.json"))
    return SimpleNamespace(name="m", task=task_class(config.task)(config, tokenizer))


EMBEDDER = embedder(), Settings(max_rows=MAX_ROWS)


def of(task):
    return huggingface.parser(task_class(task))


PARSERS = {
    "text": of("text-classification"),
    "tags": of("token-classification"),
    "image": of("image-classification"),
    "speech": of("automatic-speech-recognition"),
    "tei": tei.parse,
    "tgi": lambda body: tgi.parse(body, GENERATOR, MAX_CHARS),
    "vectors": partial(embeddings.parse, *EMBEDDER),
    "openai's vectors": lambda body: embeddings.openai(embeddings.decode(body), *EMBEDDER, body),
    "openai": lambda body: openai.parse(openai.decode(body), GENERATOR, MAX_CHARS),
}


def parsed(name, body):
    """The query, or None for a refusal of one line."""
    try:
        return PARSERS[name](body)
    except Refused as refused:
        assert 400 <= refused.status < 500  # noqa: PT017
        assert "\n" not in str(refused)  # noqa: PT017
        return None


def assert_can_be_asked(query):
    if isinstance(query, tgi.Query | openai.Query):
        how = query.job.how
        assert len(query.job.prompt) <= MAX_CHARS
        assert 1 <= how.max_new_tokens <= ROOM
        assert how.top_k >= 0
        assert how.seed is None or isinstance(how.seed, int)
        assert all(stop for stop in how.stop or ())
        return
    if isinstance(query, embeddings.Query):
        assert 1 <= len(query.rows) <= MAX_ROWS
        assert query.each != "number" or len(query.rows) > 1
        for row in query.rows:
            assert row.get("text") or 1 <= len(row["input_ids"]) <= LONGEST
            assert "text" in row or 0 <= row["input_ids"].min() <= row["input_ids"].max() < EMBEDDER[0].task.vocabulary
            assert row.get("prompt", "query") == "query"
        return
    for row in query.rows:
        (first, given), *second = row.items()
        assert first in ("text", "image", "audio")
        if first == "text":
            assert isinstance(given, str) or all(isinstance(word, str) for word in given)
            assert all(name == "text_pair" and isinstance(text, str) for name, text in second)
        else:
            assert isinstance(given, bytes)
    if isinstance(query, huggingface.Query):
        assert query.top is None or query.top >= 1
        assert not query.single or len(query.rows) == 1
    if isinstance(query, huggingface.TagQuery):
        assert len(query.texts) == len(query.rows)


@pytest.mark.parametrize("name", PARSERS)
@effort(max_examples=80)
@given(asked=REQUESTS | JSON)
@example(asked={"inputs": "a", "prompt": "a", "model": "m"})
@example(asked={"inputs": ["a"], "parameters": {"top_k": 2.0}})
@example(asked={"inputs": [["a", "b"]]})
@example(asked={"inputs": ["a", [1, 2]], "dimensions": 16, "prompt_name": None})
@example(asked={"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {"prompt_name": "query"}})
@example(asked={"input": [1, 2, 3], "dimensions": 2.0})
def test_any_json_is_rows_or_a_refusal(name, asked):
    query = parsed(name, json.dumps(asked).encode())
    if query is not None:
        assert_can_be_asked(query)


@pytest.mark.parametrize("name", PARSERS)
@given(body=st.binary(max_size=30) | st.sampled_from([b"[" * 50_000, b'{"inputs":' * 50_000, b'{"inputs": "\xff"}']))
def test_any_bytes_are_rows_or_a_refusal(name, body):
    query = parsed(name, body)
    if query is not None:
        assert_can_be_asked(query)


HEADS = st.sampled_from(
    [b'Content-Disposition: form-data; name="%s"', b"content-disposition:form-data;name=%s", b"X:%s"]
)
NAMES = [b"file", b"model", b"language", b"prompt", b"response_format", b"temperature", b"stream", b"x", b""]
NAMES += [b"timestamp_granularities[]"]
VALUES = [b"text", b"verbose_json", b"word", b"0", b"nan", b"1e999", b"true", b"en"]
FORMS = st.lists(st.tuples(HEADS, st.sampled_from(NAMES), st.sampled_from(VALUES) | st.binary(max_size=12)), max_size=6)


@effort(max_examples=150)
@given(FORMS, st.sampled_from([b"--", b"", b"-"]), st.booleans())
def test_any_form_is_a_recording_and_its_settings_or_a_refusal(fields, end, whole):
    if whole:
        fields = [*fields, (b'Content-Disposition: form-data; name="%s"', b"file", b"RIFF")]
    parts = [b"--b\r\n" + head % name + b"\r\n\r\n" + value + b"\r\n" for head, name, value in fields]
    try:
        asked = transcriptions.decode(b"multipart/form-data; boundary=b", b"".join(parts) + b"--b" + end)
    except Refused as refused:
        assert 400 <= refused.status < 500  # noqa: PT017
        assert "\n" not in str(refused)  # noqa: PT017
        return
    assert isinstance(asked.file, bytes)
    assert transcriptions.headers(asked)
    assert transcriptions.parse(asked, asked.file).rows == [{"audio": asked.file}]


@given(st.binary(max_size=40), st.binary(max_size=60))
def test_any_content_type_and_body_is_a_refusal_or_a_form(kind, body):
    for content_type in (kind, b"multipart/form-data; boundary=" + kind):
        try:
            transcriptions.decode(content_type, body)
        except Refused as refused:
            assert 400 <= refused.status < 500  # noqa: PT017
