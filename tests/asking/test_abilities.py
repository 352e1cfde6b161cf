"""What servers can do is found out by asking them, and what they lack is refused or done in another way."""

import pytest
from endpoint import Encoder, running
from llama import MODEL, served

from kdexport.asking.abilities import Abilities, check_labels, choose_by, probe
from kdexport.asking.answers import Answers
from kdexport.asking.client import Endpoint, Failed, Reply
from kdexport.errors import EndpointError, ModelError, SpecError
from kdexport.spec.sections import Ask
from kdexport.spec.teachers import Address

LABELS = {"sport": "", "politics": "", "cooking": ""}
ABLE = Abilities(top=20, echo=True, constrained="json_schema", n=True)
UNABLE = Abilities(top=0, echo=False, constrained="", n=False)


def endpoint(url, tmp_path, model="encoder", key=None):
    return Endpoint(Address(model, url), key, store=Answers(tmp_path / "answers"), concurrency=2, timeout_s=60)


def never(rows):
    raise AssertionError("a probe asks about no text of the data")


@pytest.mark.parametrize(
    ("ways", "found"),
    [
        ({}, (20, True, "json_schema", True)),
        ({"top": 5, "several": False}, (5, True, "json_schema", False)),
        ({"logprobs": False, "echo": False, "constrained": ("guided_choice",)}, (0, False, "guided_choice", True)),
        ({"completions": False, "constrained": ("grammar",)}, (20, False, "grammar", True)),
        ({"constrained": ()}, (20, True, "", True)),
    ],
)
def test_what_a_server_can_do(ways, found, tmp_path):
    with running(Encoder(["a", "b"], never), **ways) as server:
        can = probe(endpoint(server.url, tmp_path), "encoder")
        requests = server.requests
        assert probe(endpoint(server.url, tmp_path), "encoder") == can
    assert (can.top, can.echo, can.constrained, can.n) == found
    assert requests <= 8
    assert len(can.line().splitlines()) == 1


def test_a_probe_is_paid_for_once(tmp_path):
    with running(Encoder(["a", "b"], never)) as server:
        probe(endpoint(server.url, tmp_path), "encoder")
        asked = server.requests
        probe(endpoint(server.url, tmp_path), "encoder")
        assert server.requests == asked == 4


def test_llama_cpps_server(tmp_path):
    with served() as url:
        found = endpoint(url, tmp_path, MODEL)
        can = probe(found, MODEL)
        assert found.models()
    # It takes `echo`, and generates instead.
    assert can == Abilities(top=20, echo=False, constrained="json_schema", n=False)
    assert can.line().startswith("gives log-probabilities of 20 tokens, scores no given texts, can be held")


class Objects:
    """An endpoint that answers no chat while an objection holds: a condition, and the server's words."""

    def __init__(self, *objections, **message):
        self.objections, self.message = objections, {"role": "assistant", "content": "Paris"} | message

    def send(self, calls):
        ((path, body),) = calls
        for holds, words in self.objections:
            if path == "/chat/completions" and holds(body):
                return [Failed(f"400: {words}", 400)]
        return [Reply({"choices": [{"message": self.message, "finish_reason": "length"}]}, 0.1, False)]


def test_what_a_server_objects_to_is_left_out():
    # OpenAI's models that think, asked as older ones are.
    thinks = Objects(
        (lambda body: "max_tokens" in body, "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
         "'max_completion_tokens' instead."),
        (lambda body: body.get("temperature") == 0, "Unsupported value: 'temperature' does not support 0 with this "
         "model. Only the default (1) value is supported."),
        (lambda body: "logprobs" in body, "logprobs are not supported with reasoning models."),
        content="",
    )  # fmt: skip
    can = probe(thinks, "o9")
    assert can == Abilities(top=0, echo=False, constrained="", n=False, limit="max_completion_tokens",
                            temperature=False, thinks=True)  # fmt: skip
    assert can.line().endswith("thinks before it answers")
    assert can.body([{"role": "user", "content": "…"}], 3)["max_completion_tokens"] > 1000
    # vLLM with the chat templates of Gemma 2, and with --max-logprobs 5.
    plain = Objects(
        (lambda body: body["messages"][0]["role"] == "system", "System role not supported"),
        (lambda body: body.get("top_logprobs", 0) > 5, "Requested sample logprobs of 20, which is greater than max "
         "allowed: 5"),
    )  # fmt: skip
    can = probe(plain, "gemma")
    assert not can.system
    assert not can.thinks
    # Of DeepSeek-R1's thoughts, where nothing parses them.
    assert probe(Objects(content="<think>\nOkay, the"), "r1").thinks


def test_errors_of_the_endpoint_pass(tmp_path):
    with running(Encoder(["a", "b"], never), key="secret-key") as server:
        with pytest.raises(EndpointError, match="refuses the key"):
            probe(endpoint(server.url, tmp_path, key="another-key"), "encoder")
    with running(Encoder(["a", "b"], never)) as server:
        with pytest.raises(EndpointError, match="has no model 'other'"):
            probe(endpoint(server.url, tmp_path, "other"), "other")
    with running(Encoder(["a", "b"], never), script=["400"] * 9) as server:
        with pytest.raises(ModelError, match="can't be asked"):
            probe(endpoint(server.url, tmp_path), "encoder")


def test_the_way_of_reading():
    assert choose_by(Ask(), LABELS, ABLE) == ("letters", "")
    assert choose_by(Ask(by="words"), LABELS, ABLE) == ("words", "")
    assert choose_by(Ask(by="scores"), LABELS, ABLE) == ("scores", "")
    by, remark = choose_by(Ask(samples=7), LABELS, UNABLE)
    assert by == "samples"
    assert "frequencies of 7 answers" in remark


@pytest.mark.parametrize(
    ("by", "able", "line"),
    [
        ("letters", UNABLE, "letters needs log-probabilities, and the server gives none. Set it to samples"),
        ("words", UNABLE, "words needs log-probabilities"),
        ("scores", Abilities(top=20, echo=False, constrained="", n=True), "echo.*Set it to letters"),
        ("scores", UNABLE, "echo.*Set it to samples"),
    ],
)
def test_what_a_server_lacks_is_said(by, able, line):
    with pytest.raises(SpecError, match=f"teacher.ask.by: .*{line}"):
        choose_by(Ask(by=by), LABELS, able)


@pytest.mark.parametrize(
    "labels", [["Sport", "sports"], ["card lost", "card stolen"], ["change_pin", "change_name"], ["1", "2", "10"]]
)
def test_words_that_begin_alike_are_read_by_letters(labels):
    by, remark = choose_by(Ask(by="words"), dict.fromkeys(labels, ""), ABLE)
    assert by == "letters"
    assert "begin alike" in remark


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (["one"], "1 label"), (["a", " "], "a label is empty"), (["Card lost", "card  Lost"], "differ in case"),
        ([str(i) for i in range(677)], "677 labels"),
    ],
)  # fmt: skip
def test_labels_that_no_prompt_can_list(labels, line):
    with pytest.raises(SpecError, match=f"data.labels: .*{line}"):
        check_labels(dict.fromkeys(labels, ""))


def test_labels_that_a_prompt_can_list():
    check_labels({"a": "", "b": "with words"})
    check_labels([str(i) for i in range(676)])
