"""A language model behind an endpoint as teacher, from texts to an artifact; the tests' own endpoint is an encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from endpoint import Encoder, running

import kdexport
from kdexport import spec
from kdexport.asking.stage import ask, with_labels
from kdexport.data import prepare, read_rows, read_summary
from kdexport.distill.store import Store, content_keys
from kdexport.errors import DataError, EndpointError, ModelError, SpecError
from kdexport.pipeline.api import settings_of

LABELS = ("business", "entertainment", "politics", "sports", "tech")


@pytest.fixture(scope="module")
def encoder(finished):
    return Encoder.of(finished / "teacher")


@pytest.fixture(scope="module")
def right(articles):
    """A teacher that is always right, of articles and of copies that end in a number."""
    label_of = {row["text"]: row["label"] for row in articles}

    def logits(rows):
        labels = [label_of.get(row["text"]) or label_of[row["text"].rpartition(" ")[0]] for row in rows]
        return np.array([[9.0 * (name == label) for name in LABELS] for label in labels])

    return Encoder(LABELS, logits)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDEXPORT_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(rows, labelled=0):
    return [row if i < labelled else {"text": row["text"]} for i, row in enumerate(rows)]


def asked(tmp_path, server, base_model, rows, model=None, **given):
    """Run the data stage and the asked one; return the folder of the latter, and its record."""
    keys = {"data.max_length": 32, "student.base": str(base_model)} | given.pop("set", {})
    settings = settings_of(None, {
        "teacher": model or f"openai:encoder@{server.url}", "data": write(tmp_path / "rows.jsonl", rows),
        "labels": ",".join(LABELS), "set": keys,
    } | given)  # fmt: skip
    settings, data, out = with_labels(settings), tmp_path / "data", tmp_path / "asked"
    prepare(settings.data, settings.task, 0, data, few_labels=True)
    out.mkdir(exist_ok=True)
    ask(settings, data, out)
    record = out / "asked.json"
    return out, json.loads(record.read_text()) if record.exists() else {}


@pytest.mark.usefixtures("own_cache")
def test_texts_and_an_endpoint_become_an_artifact(tmp_path, finished, encoder, articles, base_model):
    """From the command to a file, within the calls, and a second time without one."""
    with running(encoder) as server:
        given = {
            "teacher": f"openai:encoder@{server.url}", "data": write(tmp_path / "texts.jsonl", texts_of(articles)),
            "labels": LABELS, "student": "bag", "epochs": 8, "max_length": 32, "out": tmp_path / "run",
            "set": {
                "student.base": str(base_model), "bench.rounds": 2, "bench.round_seconds": 0.2, "bench.precision": None,
                "bench.batch_sizes": [], "teacher.ask.price": [0.5, 1.5],
            },
        }  # fmt: skip
        report = kdexport.run(**given)
        requests = server.requests
        again = kdexport.run(**given | {"epochs": 9})
        assert server.requests == requests
    found = report.asked
    assert (found.model, found.by, found.texts["train"] + found.texts["validation"]) == ("encoder", "letters", 240)
    assert (found.sent, again.asked.sent) == (requests - 1 if found.retries else found.sent, found.sent)
    assert report.metric == "agreement with the teacher"
    assert report.variant(report.recommended).metric.value > 0.4  # five labels
    assert found.trust.accuracy is None
    assert "no row has a label" in found.not_known[0]
    assert found.price == (0.5, 1.5)
    assert "asked" in report.machines
    page = (tmp_path / "run" / "report.md").read_text()
    assert "agreement" in page
    assert kdexport.load(tmp_path / "run").predict([articles[0]["text"]])[0].label in LABELS


@pytest.mark.usefixtures("own_cache")
def test_answers_are_those_of_the_endpoint(tmp_path, encoder, articles, base_model):
    rows = articles[:260]
    with running(encoder) as server:
        out, record = asked(tmp_path, server, base_model, texts_of(rows))
    kept = [row for split in ("train", "validation", "test") for row in read_rows(out, split)]
    logits = Store(out / "logits").look_up(content_keys(row["text"] for row in kept))
    theirs = np.stack([encoder.of_row(row) for row in kept])
    assert len(kept) == 260
    assert record["stopped"] == "every text was asked"
    assert (logits.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.99
    assert 0.9 < record["trust"]["mass"] < 1


@pytest.mark.usefixtures("own_cache")
def test_the_limit_of_calls_holds_and_unsure_texts_are_chosen(tmp_path, encoder, articles, base_model, capsys):
    with running(encoder) as server:
        out, record = asked(tmp_path, server, base_model, texts_of(articles), max_calls=270)
        assert sum(server.answers.values()) <= 270
    assert record["sent"] + record["cached"] <= 270
    assert record["stopped"] == "the limit was reached"
    first, *_, last = record["rounds"]
    assert (first["chosen"], last["chosen"] > last["random"] - first["random"]) == (0, True)
    assert read_summary(out).rows["train"] == last["chosen"] + last["random"]
    guessed = list(read_rows(out, "unlabelled")) if record["guessed"] else []
    assert len(guessed) == record["guessed"]
    told = capsys.readouterr().err
    assert "teacher: at most 26" in told
    assert "tokens in and" in told


@pytest.mark.usefixtures("own_cache")
def test_a_first_student_labels_texts_of_which_it_is_sure(tmp_path, right, articles, base_model):
    """They are no answers of the teacher, nor texts that it declined, and can be left out."""
    rows = [row | {"text": f"{row['text']} {i}"} for i in range(2) for row in articles]
    with running(right, refusals=0.1) as server:
        _, without = asked(
            tmp_path, server, base_model, texts_of(rows), max_calls=330, set={"teacher.ask.guess": False}
        )
        out, record = asked(tmp_path, server, base_model, texts_of(rows), max_calls=330)
    assert (record["guessed"] > 50, without["guessed"]) == (True, 0)
    guessed = list(read_rows(out, "unlabelled"))
    logits = Store(out / "logits").look_up(content_keys(row["text"] for row in guessed))
    right.know(guessed)
    theirs = np.stack([right.of_row(row) for row in guessed])
    assert (logits.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.8
    assert not {*server.answers} & {row["text"] for row in guessed}
    written = {json.loads(line)["text"] for line in (out / "answers.jsonl").read_text().splitlines()}
    assert written <= {*server.answers}


@pytest.mark.usefixtures("own_cache")
def test_labelled_rows_tell_how_good_the_teacher_is(tmp_path, encoder, articles, base_model, capsys):
    with running(encoder, sharpness=6.0) as server:
        out, record = asked(tmp_path, server, base_model, texts_of(articles, labelled=200))
    trust = record["trust"]
    assert trust["accuracy"]["value"] > 0.7
    assert trust["accuracy"]["ci95"][0] < trust["accuracy"]["value"] < trust["accuracy"]["ci95"][1]
    assert trust["temperature"] > 1.2  # answers that are too sure
    assert trust["ece_after"] < trust["ece_before"]
    assert all(row["label"] for row in read_rows(out, "test"))
    assert " labelled rows" in capsys.readouterr().err


@pytest.mark.usefixtures("own_cache")
def test_a_persons_corrections_say_nothing_of_the_teacher(tmp_path, right, articles, base_model):
    rows = articles[:120]
    file = write(tmp_path / "mine.jsonl", [row | {"label": "tech"} for row in rows[:60] if row["label"] == "sports"])
    with running(right) as server:
        _, record = asked(
            tmp_path, server, base_model, texts_of(rows, labelled=60), set={"teacher.corrections": str(file)}
        )
    trust = record["trust"]
    assert 30 < trust["accuracy"]["n"] <= 60 - len(file.read_text().splitlines())
    assert (trust["accuracy"]["value"], trust["same_in_another_order"]["value"]) == (1, 1)


@pytest.mark.usefixtures("own_cache")
def test_labelled_rows_of_one_label_are_no_chance(tmp_path, right, articles, base_model):
    rows = sorted(articles, key=lambda row: row["label"] != "tech")[:160]
    with running(right) as server:
        _, record = asked(tmp_path, server, base_model, texts_of(rows, labelled=40))
    assert record["trust"]["accuracy"]["value"] == 1


@pytest.mark.usefixtures("own_cache")
def test_a_teacher_near_chance_is_refused_before_the_money_is_spent(tmp_path, encoder, articles, base_model):
    with (
        running(encoder, shift=1) as server,
        pytest.raises(ModelError, match="60 labelled rows, which is near chance"),
    ):
        asked(tmp_path, server, base_model, texts_of(articles, labelled=60))
    assert sum(server.answers.values()) < 200


@pytest.mark.usefixtures("own_cache")
def test_a_server_without_log_probabilities_is_asked_several_times(tmp_path, encoder, articles, base_model):
    with running(encoder, logprobs=False) as server:
        _, record = asked(tmp_path, server, base_model, texts_of(articles[:100]))
    assert record["by"] == "samples"
    assert record["texts"]["train"] > 60


@pytest.mark.usefixtures("own_cache")
def test_refusals_are_left_out_and_counted(tmp_path, encoder, articles, base_model):
    with running(encoder, refusals=0.2) as server:
        _, record = asked(tmp_path, server, base_model, texts_of(articles[:200]))
    assert 15 < record["refused"] < 70
    assert sum(record["texts"].values()) == 200 - record["refused"] - record["unparsable"]


@pytest.mark.usefixtures("own_cache")
def test_a_text_longer_than_the_context_is_shortened(tmp_path, encoder, articles, base_model):
    with running(encoder, context=600) as server:
        _, record = asked(tmp_path, server, base_model, texts_of(articles[:100]))
    assert sum(record["texts"].values()) > 95
    assert record["shortened"] > 10


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("ways", "given", "message"),
    [
        ({"key": "right"}, {}, "key"),
        ({"model": "other"}, {}, "other"),
        ({"refusals": 1.0}, {}, "no answer that can be read .*sorry"),
        ({}, {"max_calls": 40}, "allow answers to 3. texts.* Raise --max-calls to 12. at least"),
        ({}, {"max_tokens": 5000}, "allow answers to .* Raise --max-tokens to about"),
        ({"logprobs": False}, {"set": {"teacher.ask.by": "letters"}}, "letters needs log-probabilities"),
        ({"completions": False}, {"set": {"teacher.ask.by": "scores"}}, "scores given texts"),
        ({}, {"labels": "Sports,sports"}, "differ in case or spaces alone"),
        ({}, {"labels": None}, "no labels. Name them all: --labels"),
    ],
)
def test_what_can_not_work_ends_in_one_line(tmp_path, encoder, articles, base_model, ways, given, message):
    with running(encoder, **ways) as server, pytest.raises((DataError, EndpointError, SpecError), match=message):
        asked(tmp_path, server, base_model, texts_of(articles[:120]), **given)


def test_nobody_listens(tmp_path, articles, base_model):
    with pytest.raises(EndpointError, match="Is the server running"):
        asked(tmp_path, None, base_model, texts_of(articles[:60]), model="openai:gpt@http://127.0.0.1:9/v1")


def test_stored_answers_and_corrections_teach_as_well(tmp_path, articles, base_model):
    """Texts without an answer are left out; a corrected one needs none."""
    rows = articles[:120]
    write(tmp_path / "answers.jsonl", [
        {"text": row["text"], "labels": {row["label"]: 0.7, LABELS[0]: 0.2, LABELS[4]: 0.1}} for row in rows[10:]
    ])  # fmt: skip
    write(tmp_path / "mine.jsonl", [{"text": rows[0]["text"], "label": "tech"}])
    given = {
        "labels": None,
        "model": str(tmp_path / "answers.jsonl"),
        "set": {"teacher.corrections": str(tmp_path / "mine.jsonl")},
    }
    out, _ = asked(tmp_path, None, base_model, texts_of(rows), **given)
    kept = [row for split in ("train", "validation", "test") for row in read_rows(out, split)]
    assert len(kept) == 111
    logits = Store(out / "logits").look_up(content_keys(row["text"] for row in kept))
    of_first = next(i for i, row in enumerate(kept) if row["text"] == rows[0]["text"])
    assert LABELS[int(logits[of_first].argmax())] == "tech"
    assert np.exp(logits[of_first]).max() > 0.9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "labels": {"weather": 1}}', "row 2: label 'weather' is none of"),
        ('{"text": "a", "labels": {"tech": -1}}', "row 2: its probabilities are none"),
        ('{"text": "a", "labels": ["tech"]}', "row 2: .*Write a line like"),
        ('{"text": "a", "label": "sport"}', "row 2: label 'sport' is none of"),
    ],
)
def test_a_bad_stored_answer_is_named(tmp_path, articles, base_model, line, message):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"text": "b", "labels": {"tech": 1}}) + "\n" + line + "\n")
    with pytest.raises(ModelError, match=message):
        asked(tmp_path, None, base_model, texts_of(articles[:60]), model=str(file))


def test_the_stage_does_not_depend_on_how_quickly_is_asked(tmp_path, articles):
    from kdexport.asking.stage import settings_of as key_of

    def key(**ask):
        given = {
            "teacher": "openai:m@http://localhost:1/v1",
            "data": write(tmp_path / "t.jsonl", texts_of(articles[:5])),
        }
        return key_of(
            settings_of(None, given | {"labels": "a,b", "set": {f"teacher.ask.{k}": v for k, v in ask.items()}})
        )

    assert key(concurrency=1, timeout_s=3, price=[1, 2], key="MY_KEY") == key()
    assert key(orders=2) != key()
    assert spec.Ask().concurrency == 8


@pytest.mark.parametrize("lines", [[], [{"text": "a", "label": "tech"}]])
def test_stored_answers_name_two_labels(tmp_path, articles, base_model, lines):
    file = write(tmp_path / "answers.jsonl", lines)
    with pytest.raises(ModelError, match=r"its answers name [01] labels?"):
        asked(tmp_path, None, base_model, texts_of(articles[:60]), model=str(file), labels=None)
