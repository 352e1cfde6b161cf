"""What a report says of a teacher that was asked: its price, its worth, and when the student has paid for it."""

import msgspec
import pytest
from made_reports import made, variant

from kdexport.report import page_of
from kdexport.report.asked import asked, saves
from kdexport.report.page import html, markdown
from kdexport.report.terminal import summary
from kdexport.results import Alike, Asked, Conditions, Metric, Report, Round, Trust

ACCURACY = {"metric": "accuracy", "metric_kind": "fraction", "task": "text-classification"}
PRICED = Conditions(rounds=5, round_seconds=1.0, rows=256, clock="text to answer", price_per_hour=3.6)
ROUNDS = [
    Round(chosen=0, random=300, agreement=0.81, random_agreement=0.81),
    Round(chosen=56, random=319, agreement=0.87, random_agreement=0.82),
    Round(chosen=112, random=338, agreement=0.9, random_agreement=0.83),
]
# 1,000 texts for 20 in all: 20,000 a million, or 0.02 each.
ASKED = Asked(
    model="qwen", host="localhost:8000", by="letters", texts={"test": 350, "validation": 200, "train": 450},
    pool=5_000, sent=900, cached=100, tokens_in=9_000_000, tokens_out=1_000_000, price=(2.0, 2.0), p50_ms=400.0,
    p99_ms=1_300.0, rounds=ROUNDS, stopped="the limit was reached", not_known=["Nobody knows the rest."],
    trust=Trust(accuracy=Metric(0.93, (0.87, 0.96), 100), alike=[Alike("bill", "invoice", 9)], mass=0.97),
)  # fmt: skip


def report(asked=ASKED, bench=PRICED):
    variants = [variant("teacher-torch", 0.95, (0.94, 0.96), 5.0), variant("student-int8", 0.94, (0.93, 0.95), 1.0)]
    return made(variants, ACCURACY, asked=asked, bench=bench)


def replaced(**changes):
    return msgspec.structs.replace(ASKED, **changes)


def test_the_section_has_what_was_asked_and_what_it_is_worth():
    text = html(page_of(report()))
    for what in (
        "qwen at localhost:8000 labelled 450 of 5,000 texts of train", "Asking ended: the limit was reached.",
        "9,000,000, 1,000,000", "93.0 % [87.0–96.0]", "bill and invoice (9 rows)", "Nobody knows the rest.",
    ):  # fmt: skip
        assert what in text
    assert "The teacher that was asked" in markdown(page_of(report()))


def test_the_curve_has_each_round_at_its_number_of_texts():
    (figure,) = asked(report()).figures
    assert [row[0] for row in figure.table.rows] == ["300", "375", "450"]
    assert "375" in figure.table.rows[1]
    assert not asked(report(replaced(rounds=ROUNDS[:1]))).figures


def test_asking_is_paid_back_after_what_the_student_saves():
    """The student costs 1 a million answers, the endpoint 20,000."""
    assert ASKED.cost() == pytest.approx(20.0)
    assert ASKED.cost_of_million() == pytest.approx(20_000.0)
    assert replaced(calls_a_text=3).cost_of_million() == pytest.approx(60_000.0)
    assert "3 calls a text" in html(page_of(report(replaced(calls_a_text=3))))
    assert "cost 20.0" in saves(report())
    assert "in 1,000 answers" in saves(report())
    table = asked(report()).tables[-1]
    assert [row[1] for row in table.rows] == ["20000", "1.00"]
    assert table.rows[1][-1] == "400×"


def test_a_student_that_saves_nothing_is_not_praised():
    dear = msgspec.structs.replace(PRICED, price_per_hour=3.6e5)
    assert "no cheaper" in saves(report(bench=dear))


def test_without_prices_no_cost_is_claimed():
    found = report(replaced(price=None))
    assert saves(found) == ""
    assert asked(found).tables[-1].rows[0][1] == "–"
    without = msgspec.structs.replace(PRICED, price_per_hour=None)
    assert "its own time not counted" in saves(report(bench=without))


def test_the_terminal_says_it_in_a_line():
    assert any(line.startswith("asked: qwen labelled 450 of 5,000 texts of train. All") for line in summary(report()))
    assert not any(line.startswith("asked:") for line in summary(report(None)))
    assert asked(report(None)) is None


def test_the_record_survives_the_file():
    assert msgspec.json.decode(msgspec.json.encode(report()), type=Report) == report()
