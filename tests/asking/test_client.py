"""Calls to an endpoint against a real server: its faults, its limits, and processes that end in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from endpoint import Encoder, running
from endpoint_client import call

from kdexport.asking import client
from kdexport.asking.answers import Answer, Answers, key_of
from kdexport.asking.client import Endpoint, Failed, Reply
from kdexport.asking.faults import judged, retry_after
from kdexport.errors import EndpointError, RunError
from kdexport.spec.teachers import Address

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-a-secret-of-some-length"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Whether a text is long: what is asked matters to no test here."""
    return Encoder(["long", "short"], lambda rows: [[len(row["text"]) - 8.5, 0.0] for row in rows])


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "cache" / "answers.sqlite"


@pytest.fixture
def ask(file, monkeypatch):
    """Make an endpoint with the test's store, whose pauses are short."""
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.01)

    def make(url: str, key: str | None = None, concurrency: int = 4, timeout_s: float = 10.0, model: str = "encoder"):
        address = Address(model, url)
        return Endpoint(address, key, store=Answers(file), concurrency=concurrency, timeout_s=timeout_s)

    return make


def test_replies_come_in_order_and_the_same_call_is_sent_once(encoder, ask):
    with running(encoder) as server:
        endpoint, done = ask(server.url), []
        texts = ["short", "a longer text", "short", *(f"text {i}" for i in range(40))]
        found = endpoint.send([call(text) for text in texts], done.append)
        said = [reply.body["choices"][0]["message"]["content"] for reply in found]
        assert said == ["A" if len(text) > 8 else "B" for text in texts]
        assert server.calls.total() == len(server.calls) == 42
        assert sum(done) == 43
        assert (endpoint.counts.sent, endpoint.counts.cached, len(endpoint.seconds)) == (42, 1, 42)
        assert endpoint.counts.tokens_in == sum(reply.body["usage"]["prompt_tokens"] for reply in found[:2] + found[3:])


def test_a_stored_answer_costs_nothing(encoder, ask):
    calls = [call(f"text {i}") for i in range(10)]
    with running(encoder) as server:
        first = ask(server.url).send(calls)
    again = ask(server.url)  # where nobody listens any more
    assert again.waiting([*calls, call("another"), call("another")]) == 1
    found = again.send(calls)
    assert [reply.body for reply in found] == [reply.body for reply in first]
    assert [reply.seconds for reply in found] == [reply.seconds for reply in first]
    assert all(reply.cached for reply in found)
    assert (again.counts.sent, again.counts.cached, again.counts.tokens_in) == (0, 10, 0)
    assert again.counts.cached_tokens_in > 0


@pytest.mark.parametrize(
    "fault",
    ["429", "503", "500", "502", "408", "reset", "truncated", "shape", "error-200", "not-json", "huge", "timeout"],
)
def test_faults_that_pass(encoder, ask, fault):
    with running(encoder, script=["", fault, fault], hold=3.0) as server:
        endpoint = ask(server.url, timeout_s=0.3 if fault == "timeout" else 10.0)
        found = endpoint.send([call("first")]) + endpoint.send([call("second")])
        assert all(isinstance(reply, Reply) for reply in found)
        assert endpoint.counts.retried == server.faults[fault] == 2
        assert endpoint.counts.limited == (2 if fault == "429" else 0)
        assert [*server.answers.values()] == [1, 1]


def test_a_call_that_never_succeeds_fails_alone(encoder, ask):
    with running(encoder, script=["500"] * 8) as server:
        endpoint = ask(server.url)
        (found,) = endpoint.send([call("a text")])
        assert found == Failed("500: An injected 500", 500, too_long=False)
        assert server.requests == 8
        assert isinstance(endpoint.send([call("a text")])[0], Reply)  # a failure is not stored


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_says_when_to_come_back(encoder, ask, form):
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True) if form == "date" else "0.8"
    with running(encoder, script=["429"], retry_after=after) as server:
        endpoint = ask(server.url)
        endpoint.send([call(f"text {i}") for i in range(12)])
        pause = max(later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False))
        assert pause >= (0.75 if form == "seconds" else 1.0)


def test_a_pause_is_bounded():
    assert retry_after("7") == 7.0
    assert retry_after("86400") == retry_after("inf") == 120.0
    assert retry_after("-3") == retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after(value) for value in (None, "", "soon", "nan")] == [None] * 4


def test_fewer_calls_at_once_while_the_server_is_busy(encoder, ask):
    with running(encoder, latency=0.01, most=2, retry_after="0.01") as server:
        endpoint = ask(server.url, concurrency=16)
        found = endpoint.send([call(f"text {i}") for i in range(60)])
        server.most_under_way = 0
        found += endpoint.send([call(f"more {i}") for i in range(60)])
        assert server.most_under_way <= 4
        assert all(isinstance(reply, Reply) for reply in found)
        server.ways.most, server.most_under_way = 0, 0
        endpoint.send([call(f"at last {i}") for i in range(200)])
        assert server.most_under_way > 8


def test_a_wrong_key_ends_the_run_and_stays_secret(encoder, ask, file, capsys):
    with running(encoder, key="another") as server:
        with pytest.raises(EndpointError, match=r"refuses the key \(401\).*teacher\.ask\.key") as found:
            ask(server.url, KEY).send([call(f"text {i}") for i in range(50)])
        assert server.answers.total() == 0
        with pytest.raises(EndpointError, match=r"wants a key \(401\)"):
            ask(server.url).send([call("a text")])
    assert KEY not in str(found.value) + capsys.readouterr().err


def test_the_key_is_in_no_file_even_where_a_server_repeats_it(encoder, ask, file):
    with running(encoder, key=KEY) as server:
        found = ask(server.url, f"{KEY}\n").send([call(f"text {i} {KEY}") for i in range(3)])
        assert all(isinstance(reply, Reply) for reply in found)
    said = json.dumps({"error": {"message": f"Wrong: Bearer {KEY}\nmore"}}).encode()
    refused = judged("/chat/completions", "m", 403, {}, said, KEY)
    assert refused == (403, "Wrong: Bearer ***")
    with running(encoder, script=["repeats"]) as server:
        (reply,) = ask(server.url, KEY).send([call("a text")])
        assert KEY not in json.dumps(reply.body)
        assert "***" in json.dumps(reply.body)
    assert all(KEY.encode() not in path.read_bytes() for path in file.parent.iterdir())


def test_a_key_that_no_header_can_carry(ask):
    with pytest.raises(EndpointError, match="no header can carry") as found:
        ask("http://localhost:1/v1", "sk-with\r\nX-Other: header")
    assert "sk-with" not in str(found.value)


def test_an_unknown_model(encoder, ask):
    with running(encoder) as server:
        with pytest.raises(EndpointError, match=r"has no model 'gpt-9'\. It serves encoder$"):
            ask(server.url, model="gpt-9").send([call("a text", "gpt-9")])
        server.ways.listed = False
        assert ask(server.url).models() == []
        with pytest.raises(EndpointError, match="has no model 'gpt-9'"):
            ask(server.url, model="gpt-9").send([call("a text", "gpt-9")])


def test_a_path_that_a_server_lacks_ends_no_run(encoder, ask):
    with running(encoder, completions=False) as server:
        (found,) = ask(server.url).send([call("a text")._replace(path="/completions")])
        assert found.status == 404


def test_a_wrong_url(encoder, ask):
    with running(encoder, script=["307"]) as server:
        with pytest.raises(EndpointError, match=r"leads elsewhere \(307\): http://example\.org/v1"):
            ask(server.url).send([call("a text")])
        with pytest.raises(EndpointError, match=r"chat/completions is not there \(404\).*with /v1"):
            ask(server.url.removesuffix("/v1")).send([call("a text")])
    port = re.search(r":(\d+)", server.url)[1]
    with pytest.raises(EndpointError, match=rf"can't be reached.*Is the server running, on port {port}\?"):
        ask(server.url).send([call("a text")])
    with pytest.raises(EndpointError, match=r"can't be reached.*Check the URL"):
        ask("http://nobody.invalid/v1").send([call("a text")])


def test_an_account_without_credit_is_not_asked_again(encoder, ask):
    with running(encoder, script=["", "quota"]) as server:
        endpoint = ask(server.url, concurrency=1)
        with pytest.raises(EndpointError, match=r"no credit left.*1 answer kept"):
            endpoint.send([call("one"), call("two"), call("three")])
        assert server.requests == 2


def test_a_server_that_fails_for_good_ends_the_run_and_the_next_one_goes_on(encoder, ask):
    calls = [call(f"text {i}") for i in range(100)]
    with running(encoder) as server:
        ask(server.url).send(calls[:30])
        server.ways.rates = {"500": 1.0}
        endpoint = ask(server.url)
        with pytest.raises(EndpointError, match=r"answers no more.*500.*30 answers kept"):
            endpoint.send(calls)
        assert server.requests - 30 <= 8 * (20 + 20 + 4)  # attempts, of calls that failed and of those on their way
        server.ways.rates = {}
        again = ask(server.url)
        assert all(isinstance(reply, Reply) for reply in again.send(calls))
        assert (again.counts.cached, again.counts.sent) == (30, 70)


def test_a_server_that_stays_silent_ends_the_run(encoder, ask, monkeypatch):
    monkeypatch.setattr(client, "_SILENT_S", 0.5)
    with running(encoder, rates={"timeout": 1.0}) as server:
        with pytest.raises(EndpointError, match=r"answers no more.*no answer within 0\.1 s"):
            ask(server.url, timeout_s=0.1).send([call(f"text {i}") for i in range(100)])


def test_texts_that_are_too_long_fail_alone(encoder, ask):
    with running(encoder, context=100) as server:
        calls = [call("a text"), *(call(f"{i} is long " * 50) for i in range(30)), call("another text")]
        first, *long, last = ask(server.url).send(calls)
        assert isinstance(first, Reply)
        assert isinstance(last, Reply)
        assert all(failed.too_long and failed.status == 400 for failed in long)
        assert server.requests == 32


@pytest.mark.parametrize(
    ("status", "message", "too_long"),
    [
        (400, "This model's maximum context length is 4096 tokens. However, you requested 4100 tokens.", True),
        (400, "the request exceeds the available context size, try increasing it", True),
        (400, "prompt is too long: 210000 tokens > 200000 maximum", True),
        (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", True),
        (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048", True),
        (413, "Payload Too Large", True),
        (400, "Invalid value for 'top_logprobs': must be less than or equal to 5.", False),
        (400, "max_tokens is too large: 5000. This model supports at most 4096 completion tokens", False),
        (400, "Unsupported parameter: 'logprobs'", False),
    ],
)
def test_what_servers_say_of_long_texts(status, message, too_long):
    found = judged("/chat/completions", "m", status, {}, json.dumps({"error": {"message": message}}).encode(), "")
    assert found == Failed(f"{status}: {message}", status, too_long)


def test_no_proxy_stands_between_this_machine_and_itself(encoder, ask, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with running(encoder) as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            assert isinstance(ask(url).send([call(url)])[0], Reply)


def test_a_proxy_that_cant_be_used(ask, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks9://127.0.0.1:9")
    with pytest.raises(EndpointError, match=r"can't be reached.*socks9"):
        ask("http://somewhere.invalid/v1").send([call("a text")])


def test_calls_are_sent_from_a_running_loop(encoder, ask):
    """As in a notebook."""
    with running(encoder) as server:

        async def cell() -> list[Reply | Failed]:
            return ask(server.url).send([call("a text")])

        assert isinstance(asyncio.run(cell())[0], Reply)


def asking(url: str, file: Path, last: int, concurrency: int) -> subprocess.Popen[str]:
    program = [sys.executable, ROOT / "tests" / "endpoint_client.py", url, file, 0, last, concurrency]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*map(str, program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_ended_loses_no_answer(encoder, ask, file, number):
    with running(encoder, latency=0.2) as server:
        process = asking(server.url, file, 40, 4)
        assert process.stdout.read(6) == "......"
        time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == -number
        assert said.endswith("KeyboardInterrupt\n") == (number == signal.SIGINT)
        assert 6 <= len(server.calls) < 40
        assert set(server.calls.values()) == {1}
        time.sleep(0.3)  # the server ends what was under way
        came, kept = len(server.calls), len(Answers(file))
        assert came - kept <= (4 if number == signal.SIGKILL else 0)
        server.ways.latency = 0.0
        endpoint = ask(server.url)
        assert all(isinstance(reply, Reply) for reply in endpoint.send([call(f"text {i}") for i in range(40)]))
        assert endpoint.counts.cached == kept
        assert server.calls.total() - 40 == came - kept


def test_two_processes_share_a_store(encoder, file):
    with running(encoder) as server:
        both = [asking(server.url, file, last, 4) for last in (150, 200)]
        assert [process.communicate(timeout=60) and process.returncode for process in both] == [0, 0]
    assert len(Answers(file)) == 200


def test_a_damaged_store_is_put_aside(file, capsys):
    answers, key, other = Answers(file), key_of("/chat/completions", {"a": 1}), key_of("/chat/completions", {"a": 2})
    answers.put(key, Answer(b'{"choices": [1]}', 0.5))
    answers.put(other, Answer(b'{"choices": [2]}', 0.5))
    answers.close()
    with sqlite3.connect(file) as rows:
        rows.execute("UPDATE answers SET body = ? WHERE key = ?", (b'{"choices": [7]}', other))
    answers = Answers(file)
    assert answers.get(key) == (b'{"choices": [1]}', 0.5)
    assert answers.get(other) is None
    answers.close()
    file.write_bytes(b"not a database" * 1000)
    answers = Answers(file)
    assert answers.get(key) is None
    answers.put(key, Answer(b"{}", 0.1))
    assert len(Answers(file)) == 1
    assert "is damaged" in capsys.readouterr().err
    assert [path for path in file.parent.iterdir() if ".damaged-" in path.name]


def test_a_store_that_cant_be_written(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(RunError, match=r"can't be used.*KDEXPORT_CACHE"):
        Answers(tmp_path / "cache" / "answers.sqlite")


def test_calls_differ_by_what_is_asked_alone():
    body = {"model": "m", "messages": [{"role": "user", "content": "a \ud800 text"}], "temperature": 0}
    assert key_of("/chat/completions", body) == key_of("/chat/completions", dict(reversed(body.items())))
    keys = {key_of("/chat/completions", body | other) for other in ({}, {"temperature": 0.5}, {"model": "n"})}
    assert len(keys | {key_of("/completions", body)}) == 4
