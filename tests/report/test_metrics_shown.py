"""A metric's kind and direction in the report: lower may be better, and not every metric is a share."""

import json

import msgspec
import pytest
from made_reports import BITS, F1, made, variant

from kdexport.report import page_of
from kdexport.report.page import html, markdown
from kdexport.report.table import headers, metric_of, table
from kdexport.report.terminal import conclusion, summary
from kdexport.results import Report, Search, SearchCandidate, Spread, read_report


def bits(**changes):
    """A language model's report: the quicker of its files is worse, and a slower one worse still."""
    variants = [
        variant("teacher-torch", 2.132, (2.1, 2.16), 9.0),
        variant("student-slow", 2.4, (2.3, 2.5), 3.0),
        variant("student-int8", 2.199, (2.17, 2.23), 1.0),
    ]
    return made(variants, BITS, 0.057, (0.03, 0.08), **changes)


def section(report, title):
    return next(s for s in page_of(report).sections if s.title == title)


def test_a_number_is_written_as_a_number_in_its_own_column():
    report = bits()
    assert headers(report)[1] == "bits per byte [95 %]"
    assert table(report)[0][1] == "2.132 [2.100–2.160]"
    drawn = page_of(report)
    assert ("2.199", "bits per byte; teacher 2.132") in drawn.facts
    for text in (markdown(drawn), html(drawn), "\n".join(summary(report))):
        assert "219.9" not in text
        assert "213.2" not in text


def test_the_summary_says_both_numbers_and_the_gain_in_their_unit():
    seeds = Spread([2.19, 2.21], 2.2, 0.014)
    report = bits()
    report = msgspec.structs.replace(
        report, distillation=msgspec.structs.replace(report.distillation, student_seeds=seeds)
    )
    lines = "\n".join(summary(report))
    assert "has 2.199 bits per byte on the test split, the teacher 2.132 (1,000 rows)" in lines
    assert "labels alone: 2.199; distillation gave +0.057 bits per byte" in lines
    assert "50 % of the way to the teacher" in lines
    assert "2 seeds, in PyTorch: student 2.2000 ± 0.014" in lines
    assert "measured on A CPU, 2 cores, 1 thread" in lines


@pytest.mark.parametrize(("gain", "ratio"), [(-0.4, -0.5), (-0.4, 3.0), (0.0, 0.0)])
def test_distillation_that_did_not_help_is_said_to_have_not(gain, ratio):
    """Where the gain is not above 0, there is no way to the teacher; minus signs are minus signs."""
    variants = [variant("teacher-torch", 0.8, (0.7, 0.9)), variant("student-int8", 0.7, (0.6, 0.8))]
    report = made(variants, F1, gain, (-2.4, 1.6), data={"labelled": 1})
    report = msgspec.structs.replace(report, distillation=msgspec.structs.replace(report.distillation, ratio=ratio))
    lead, last = section(report, "How good: entity F1").lead, conclusion(report)
    for text in ("\n".join(summary(report)), lead, last):
        assert "distillation did not help here: " in text
        assert "of the way" not in text
        assert "-" not in text.partition("did not help here: ")[2].partition("\n")[0]
    assert last.startswith("With 1 label, the student keeps 95.0 % of the teacher's entity F1 on the test split, ")


def test_the_frontier_of_a_metric_that_falls_runs_along_the_lowest_values():
    rows = section(bits(), "Accuracy against latency").figures[0].table.rows
    assert {row[0]: row[-1] for row in rows} == {"teacher-torch": "yes", "student-slow": "no", "student-int8": "yes"}
    assert section(bits(), "Accuracy against latency").lead.startswith("Down is better")


def test_the_frontier_of_a_search_follows_the_metric_too():
    def one(name, p99, metric):
        return SearchCandidate(
            name=name, parameters=1, precision="int8", size_bytes=10**6, p50_ms=p99 / 2, p99_ms=p99, metric=metric
        )

    rungs = [one("quick", 1.0, 2.3), one("slow and bad", 3.0, 2.5), one("good", 4.0, 2.1)]
    found = Search(rungs=rungs, winner="good", reason="it is good", teacher=2.0)
    rows = section(bits(search=found), "Search for a student").figures[0].table.rows
    assert {row[0]: row[-1] for row in rows} == {"quick": "yes", "slow and bad": "no", "good": "yes"}
    assert rows[0][2] == "2.300"


@pytest.mark.parametrize(("ci", "says"), [((-0.5, 2.5), "not statistically significant"), ((0.5, 3.5), "beyond doubt")])
def test_whether_a_gain_in_f1_is_significant_is_said_by_its_own_interval(ci, says):
    """Exact matches of whole rows are another metric; their McNemar test says nothing of entity F1."""
    report = made([variant("teacher-torch", 0.8, (0.7, 0.9)), variant("student-int8", 0.7, (0.6, 0.8))], F1, 1.0, ci)
    for p in (0.001, 0.9):
        distilled = msgspec.structs.replace(report.distillation, gain_mcnemar_p=p)
        drawn = msgspec.structs.replace(report, distillation=distilled)
        lead = section(drawn, "How good: entity F1").lead
        assert says in lead
        assert "McNemar" not in lead + "\n".join(summary(drawn))


def test_a_report_of_before_the_metric_said_its_kind_is_read(tmp_path):
    raw = msgspec.to_builtins(made([variant("teacher-torch", 0.8, (0.7, 0.9))], {"metric": "accuracy"}))
    for key in ("metric_kind", "metric_higher_is_better"):
        del raw[key]
    for name, kind in (("accuracy", "fraction"), ("entity F1", "ratio")):
        (tmp_path / "report.json").write_text(json.dumps(raw | {"metric": name}))
        assert metric_of(read_report(tmp_path / "report.json"))[1:] == (True, kind)
    assert isinstance(read_report(tmp_path / "report.json"), Report)


def test_an_interval_that_spans_decades_stretches_no_axis():
    """As reports of two rounds have them."""
    wide = variant("student-fp32", 0.8, (0.7, 0.9), 2.0)
    latency = msgspec.structs.replace(wide.latency_ms, p50_ci95=(1e-12, 1e12), p99_ci95=(1e-12, 1e12))
    wide = msgspec.structs.replace(wide, latency_ms=latency)
    report = made([variant("teacher-torch", 0.85, (0.8, 0.9), 5.0), wide], F1)
    text = html(page_of(report))
    assert "e-12" not in text
    assert "e+12" not in text
    assert "e-10" not in text
