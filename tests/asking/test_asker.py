"""The limits of calls and tokens hold, whatever the texts and the server are like."""

from __future__ import annotations

import numpy as np
import pytest
from endpoint import Encoder, running

from kdexport import spec
from kdexport.asking.asker import Asker
from kdexport.errors import EndpointError, SpecError
from kdexport.spec.teachers import Address

LABELS = {"a short one": "", "another label whose name has more words than a text leaves room for": ""}
SHORT = [{"text": f"text {i}"} for i in range(120)]
LONG = [{"text": f"{i} " + "word " * 400} for i in range(120)]


@pytest.fixture
def encoder():
    return Encoder([*LABELS], lambda rows: np.array([[float(len(row["text"]) % 5 - 2), 0.0] for row in rows]))


@pytest.fixture
def asker(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))

    def make(server, *, several=False, **how):
        return Asker(Address("encoder", server.url), spec.Ask(**how), LABELS, several=several)

    return make


def answered(readings):
    return sum(one.logits is not None for one in readings)


def test_texts_beyond_the_calls_have_no_answer(encoder, asker):
    with running(encoder) as server:
        ask = asker(server, max_calls=60, orders=2)
        readings = ask.read(SHORT)
        ask.in_another_order(SHORT)
        ask.by_words(SHORT)
    assert answered(readings) == (60 - 4) // 2
    assert {one.why for one in readings} == {"", "out of calls"}
    assert sum(server.answers.values()) <= 60


@pytest.mark.parametrize("context", range(75, 90, 3))
def test_long_texts_that_are_asked_again_stay_within_the_calls(encoder, asker, context):
    """With several labels a text may be too long beside one label and not beside another, whose answer is paid for."""
    encoder.several = True
    rows = [{"text": f"{i} " + "word " * 50} for i in range(20)]
    with running(encoder, context=context) as server:
        ask = asker(server, several=True, max_calls=44)
        ask.read(rows)
    assert sum(server.answers.values()) <= 44


def test_tokens_are_limited_where_long_texts_follow_short_ones(encoder, asker):
    with running(encoder) as server:
        ask = asker(server, max_tokens=30_000)
        readings = ask.read([*SHORT[:40], *LONG])
    assert sum(ask.tokens) <= 30_000
    assert 40 < answered(readings) < 40 + 30_000 / 400


def test_a_limit_of_tokens_needs_a_server_that_counts_them(encoder, asker):
    with running(encoder, usage=False) as server:
        with pytest.raises(SpecError, match="max_tokens: the server counts no tokens"):
            asker(server, max_tokens=1000)
        assert asker(server).tokens == (0, 0)


def test_a_server_whose_answers_cant_be_read_is_left_after_a_few(encoder, asker):
    with running(encoder, refusals=1.0) as server:
        ask = asker(server)
        with pytest.raises(EndpointError, match="50 of the first 50 texts"):
            ask.read([*SHORT, *LONG])
    assert sum(server.answers.values()) < 60


def test_what_the_server_lacks_is_no_failure_of_a_call(encoder, asker):
    with running(encoder, completions=False, top=5) as server:
        ask = asker(server)
        ask.read(SHORT[:5])
    assert ask.endpoint.counts.failed == 0


def test_thoughts_are_in_the_estimate(encoder, asker):
    with running(encoder) as server:
        ask = asker(server)
    ask.abilities = type(ask.abilities)(
        top=0, echo=False, constrained="", n=False, limit="max_completion_tokens", thinks=True
    )
    ask.show(())
    assert ask.tokens_a_text(SHORT)[1] > 1000
