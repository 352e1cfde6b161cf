"""The report as a file that opens anywhere: nothing loaded, nothing hidden, nothing claimed that was not measured."""

import json
import re

import msgspec
import pytest

from kdexport.errors import RunError
from kdexport.output import Output
from kdexport.report import page_of, write_reports
from kdexport.report.charts import Axis, Bar, Point, Series, bars, plot
from kdexport.report.page import html, markdown
from kdexport.report.table import between, p99, table, tick, trimmed
from kdexport.report.terminal import summary
from kdexport.results import Report, read_report


@pytest.fixture(scope="module")
def report(finished):
    return read_report(finished / "report.json")


@pytest.fixture(scope="module")
def text(report):
    return html(page_of(report))


def replaced(report, **changes):
    return msgspec.structs.replace(report, **changes)


def test_the_file_is_whole_small_and_forbids_itself_to_load_anything(text):
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"""(src|href)=["'](?!#|data:,)""", text)
    assert "<script" not in text
    assert "url(" not in text
    assert re.search(
        r"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-[A-Za-z0-9+/]+=*'", text
    )


def test_the_first_screen_has_the_verdict_and_the_figures_behind_it(report, text):
    best = report.variant(report.recommended)
    head = text[text.index("<main>") : text.index("<nav")]
    for what in (
        best.file,
        f"{100 * best.metric.value:.1f} %",
        trimmed(best.latency_ms.p50, best.latency_ms.p50_ci95),
        p99(best),
    ):
        assert what in head
    assert f"{trimmed(best.speedup_p50.value, best.speedup_p50.ci95)}×" in head


def test_every_chart_has_its_numbers_in_a_table_below(text):
    figures = re.findall(r"<figure>.*?</figure>", text, re.S)
    assert len(figures) >= 9
    for figure in figures:
        assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', figure)
        assert figure.count("<tr>") >= 3


SECTIONS = [
    "Variants", "Accuracy against latency", "Latency", "What each step gave", "How good: accuracy", "Class by class",
    "Calibration", "Where teacher and student differ", "Training", "Data", "Leakage", "Cost", "Environment",
    "How to reproduce",
]  # fmt: skip


def test_all_parts_are_there_in_order(text):
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert titles == SECTIONS


def test_the_report_says_what_distillation_and_quantization_gave(report, text):
    steps = next(s for s in page_of(report).sections if s.title == "What each step gave")
    named = [row[0] for row in steps.figures[0].table.rows]
    assert named[:3] == [
        "teacher-torch",
        "student-torch",
        "student-fp32" + " ★" * (report.recommended == "student-fp32"),
    ]
    assert f"{report.recommended} ★" in named
    gains = dict(zip(named, (row[2] for row in steps.figures[0].table.rows), strict=True))
    assert gains["student-torch"].endswith("than teacher-torch")
    assert "the same student trained on labels alone" in text


def test_what_was_not_measured_leaves_no_empty_section(report):
    bare = replaced(report, evidence=None, distillation=None, leakage={}, data={})
    titles = [s.title for s in page_of(bare).sections]
    assert not {"Class by class", "Calibration", "Training", "Data", "How good: accuracy"} & set(titles)
    html(page_of(bare))
    markdown(page_of(bare))


def test_a_missed_budget_is_on_the_first_screen_and_says_whether_it_is_sure(report):
    from kdexport.results import Check, Verdict

    missed = Verdict(False, [Check("p99_ms", 0.1, 0.105, False, sure=False, ci95=(0.095, 0.11))])
    drawn = html(page_of(replaced(report, budget=missed)))
    line = "budget p99_ms: NOT kept, not for sure, 0.105 [0.095–0.11] (limit 0.1)"
    assert line in summary(replaced(report, budget=missed))
    assert "<td>0.105 [0.095–0.11]</td>" in drawn
    assert "| 0.105 [0.095–0.11] |" in markdown(page_of(replaced(report, budget=missed)))
    assert "The budget is NOT kept." in drawn
    assert 'class="verdict bad"' in drawn
    assert "not kept, but not for sure" in drawn


def test_warnings_are_one_line_before_all_figures_with_the_details_below(report):
    how = msgspec.structs.replace(
        report.bench,
        warnings=["this machine was too noisy", "the machine was busy"],
        failed={"x-torch": "was killed"},
        left_out={"y-cuda": "no GPU"},
    )
    noisy = replaced(report, bench=how)
    details = ["the machine was busy", "x-torch was killed", "y-cuda was left out: no GPU"]
    drawn = html(page_of(noisy))
    (box,) = re.findall(r'<section class="warnings".*?</section>', drawn[: drawn.index("<nav")], re.S)
    (line,) = re.findall(r"<summary>(.*?)</summary>", box)
    assert line.endswith("this machine was too noisy (3 more)")
    assert re.findall(r"<li>(.*?)</li>", box) == details
    text = markdown(page_of(noisy))
    assert "> Warning: this machine was too noisy\n\n<details><summary>3 more warnings</summary>\n\n" in text
    assert "\n".join(f"- {line}" for line in details) + "\n\n</details>" in text
    warned = [line for line in summary(noisy) if line.startswith("warning: ")]
    assert warned == ["warning: this machine was too noisy (1 more in report.html)"]


def test_markdown_has_single_blank_lines_and_none_at_its_end(report):
    for warnings in ([], ["one"], ["one", "two"]):
        drawn = replaced(report, bench=msgspec.structs.replace(report.bench, warnings=warnings))
        text = markdown(page_of(drawn))
        assert "\n\n\n" not in text
        assert not text.endswith("\n\n")
    assert "<summary>1 more warning</summary>" in text


def test_a_lone_warning_has_no_details(report):
    alone = replaced(report, bench=msgspec.structs.replace(report.bench, warnings=["this machine was too noisy"]))
    (box,) = re.findall(r'<section class="warnings".*?</section>', html(page_of(alone)), re.S)
    assert "<details" not in box
    assert "<details" not in markdown(page_of(alone))
    assert "warning: this machine was too noisy" in summary(alone)


def test_two_rounds_show_no_interval_of_times_and_no_bound(report):
    """The run of these tests has two rounds: brackets belong to the accuracy alone."""
    assert report.bench.rounds == 2
    for row in table(report):
        assert [i for i, cell in enumerate(row) if "[" in cell or "≤" in cell] == [1]
    drawn = {section.title: section for section in page_of(report).sections}
    for figure in [*drawn["Latency"].figures, *drawn["What each step gave"].figures]:
        assert 'class="whisker' not in figure.svg


def test_labels_and_texts_are_only_ever_text(report):
    nasty = '<script>alert("x")</script>'
    evil = msgspec.structs.replace(report.evidence.classes[0], label=nasty)
    texts = [msgspec.structs.replace(e, text=nasty) for e in report.evidence.examples]
    evidence = msgspec.structs.replace(report.evidence, classes=[evil], examples=texts)
    drawn = html(page_of(replaced(report, evidence=evidence, reason=nasty)))
    assert "<script" not in drawn
    assert "&lt;script&gt;" in drawn


def test_a_price_makes_a_cost(kdexport, copied):
    before = (copied / "report.html").read_text()
    assert "kdexport report RUN --price" in before
    assert kdexport("report", copied, "--price", "0.04").returncode == 0
    after = (copied / "report.html").read_text()
    assert "at 0.04 an hour of one core or GPU" in after
    report = read_report(copied / "report.json")
    p50 = report.variant("teacher-torch").latency_ms.p50
    section = next(
        s
        for s in page_of(replaced(report, bench=msgspec.structs.replace(report.bench, price_per_hour=0.04))).sections
        if s.title == "Cost"
    )
    row = next(row for row in section.tables[0].rows if row[0] == "teacher-torch")
    assert float(row[3]) == pytest.approx(1e6 * p50 / 3.6e6 * 0.04, rel=0.02)


def test_markdown_has_the_verdict_and_the_tables(report, finished):
    text = (finished / "report.md").read_text()
    assert f"Ship {report.variant(report.recommended).file}" in text
    assert "| variant | accuracy [95 %] |" in text
    for variant in report.variants:
        assert f"| {variant.name}" in text


def test_the_card_carries_a_model_index_that_the_hub_reads(report, finished):
    from huggingface_hub import ModelCard

    result, *others = ModelCard.load(finished / "artifact" / "README.md").data.eval_results
    assert [other.metric_type for other in others] == ["macro F1"]
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(report.variant(report.recommended).metric.value, abs=1e-4)


def test_an_older_schema_is_migrated_and_a_newer_one_refused(report, finished, tmp_path):
    raw = json.loads((finished / "report.json").read_text())
    added = {"evidence", "command"}
    old = {key: value for key, value in raw.items() if key not in added} | {"schema": 1}
    old["bench"] = {
        key: raw["bench"][key] for key in ("batch_size", "threads", "rounds", "round_seconds", "rows", "clock")
    }
    for variant in old["variants"]:
        for key in ("footprint", "cells", "wrong_rows", "speedup_p99"):
            variant.pop(key)
        for key in ("quantiles", "round_p50", "p99_ci95", "p90_ci95", "p99_at_most"):
            variant["latency_ms"].pop(key)
    (tmp_path / "report.json").write_text(json.dumps(old))
    migrated = read_report(tmp_path / "report.json")
    assert migrated.schema == report.schema
    write_reports(migrated, Output(tmp_path / "drawn", "report"))
    assert "Ship " in (tmp_path / "drawn" / "report.html").read_text()
    (tmp_path / "report.json").write_text(json.dumps(raw | {"schema": 9}))
    with pytest.raises(RunError, match="is of schema 9, this kdexport reads 1 and 2"):
        read_report(tmp_path / "report.json")


def test_a_run_without_a_report_and_half_a_file_are_named(tmp_path, finished):
    with pytest.raises(RunError, match=r"report\.json does not exist\. A finished kdexport run writes it"):
        read_report(tmp_path / "report.json")
    whole = (finished / "report.json").read_bytes()
    (tmp_path / "report.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"can't be read: .*truncated"):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("value", "ci", "shown"),
    [
        (1.1326, (1.08, 1.19), "1.13"),
        (1.1326, (0.9, 1.4), "1.1"),
        (33.87, (32.9, 36.1), "34"),
        (12.3, (2.0, 30.0), "12"),
        (0.4344, (0.43, 0.44), "0.434"),
        (0.408, (0.1, 4.0), "0.4"),
        (0.4344, None, "0.434"),
        (123.4, None, "123"),
        (None, None, "–"),
    ],
)
def test_no_digit_is_shown_that_the_interval_does_not_carry(value, ci, shown):
    assert trimmed(value, ci) == shown


def test_an_interval_is_written_with_the_digits_of_its_value():
    assert between((1.081, 1.192), 1.1326) == " [1.08–1.19]"
    assert between(None, 1.0) == ""
    assert between((0.01, 92_345.0), 228.0) == " [not known]"


def test_a_p99_without_samples_enough_is_a_bound_or_nothing(report):
    latency = msgspec.structs.replace(report.variants[0].latency_ms, p99=None, p99_at_most=12.34, rounds=3)
    assert p99(msgspec.structs.replace(report.variants[0], latency_ms=latency)) == "≤ 12.3"
    of_two = msgspec.structs.replace(latency, rounds=2)
    assert p99(msgspec.structs.replace(report.variants[0], latency_ms=of_two)) == "–"
    latency = msgspec.structs.replace(latency, p99_at_most=None)
    assert p99(msgspec.structs.replace(report.variants[0], latency_ms=latency)) == "–"


def test_charts_put_points_where_the_axes_say():
    chart = plot("t", [Series("a", [Point(1, 0), Point(10, 5), Point(100, 10)])], Axis("x", log=True), Axis("y"))
    (path,) = re.findall(r'class="line s0" d="M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)L([\d.]+),([\d.]+)"', chart)
    x1, y1, x2, y2, x3, y3 = map(float, path)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # decades are equally wide
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y3  # up is more


WHISKER = r'"whisker[^"]*" d="([^"]+)"'


@pytest.mark.parametrize("log", [False, True])
def test_axes_come_from_the_points_and_clip_intervals_with_an_arrow(log):
    def drawn(ci):
        chart = plot("t", [Series("a", [Point(1, 2, ci, ci), Point(8, 5)])], Axis("x", log=log), Axis("y", log=log))
        return re.findall(r'<path class="grid" d="[^"]+"', chart), re.findall(WHISKER, chart)

    (grid, (across, upright)), (same, none) = drawn((1e-12, 1e12)), drawn(None)
    assert grid == same
    assert none == []
    assert across.startswith("M56.0,")  # from the left edge of the frame to the right, with an arrow at both
    assert [float(x) for x in re.findall(r"L([\d.]+),", across)[::2]] == [56.0, 466.0]
    assert len(re.findall("L", upright)) == 4
    _, (short, _) = drawn((1.0, 2.0))
    assert "L" not in short  # within the axes: no arrow
    _, (half, _) = drawn((1.0, 1e12))
    assert [float(x) for x in re.findall(r"L([\d.]+),", half)[::2]] == [466.0]


def test_bars_clip_intervals_and_an_axis_reaches_as_far_as_asked():
    wide = [Bar("a", 2.0, (-50.0, 3.0)), Bar("b", 4.0, (3.5, 90.0))]
    one, other = re.findall(WHISKER, bars("t", wide, Axis("x")))
    assert one.startswith("M8.0,")  # its left end is clipped, and the right end of the other
    assert [float(x) for x in re.findall(r"L([\d.]+),", one + other)[::2]] == [8.0, 466.0]
    assert "L" not in "".join(re.findall(WHISKER, bars("t", wide, Axis("x", reach=(-50.0, 90.0)))))


def test_ticks_stand_at_the_value_that_they_name():
    def ticks(first, last, axis):
        chart = plot("t", [Series("a", [Point(first, 0), Point(last, 1)])], axis, Axis("y"))
        at = re.findall(r'<path class="grid" d="M([\d.]+),[\d.]+V[^>]+/><text[^>]+>([^<]+)</text>', chart)
        begin, end = (float(x) for x in re.findall(r"translate\(([\d.]+),", chart)[-2:])
        scale = (last - first) / (end - begin)
        return [(text, round(first + scale * (float(x) - begin), 3)) for x, text in at]

    assert ticks(1, 2, Axis("round", least=1.0)) == [("1", 1.0), ("2", 2.0)]
    of_percent = ticks(0.932, 0.938, Axis("accuracy", tick))
    assert len(of_percent) >= 3
    for text, value in of_percent:
        assert float(text.removesuffix(" %")) == pytest.approx(100 * value, abs=0.1)


@pytest.mark.parametrize("points", [[], [Point(1, 1)], [Point(3, 2), Point(3, 2)], [Point(0, 1), Point(5, 1)]])
@pytest.mark.parametrize("log", [False, True])
def test_charts_of_few_or_equal_points_do_not_break(points, log):
    chart = plot("t", [Series("a", points)], Axis("x", log=log), Axis("y", log=log))
    assert "nan" not in chart
    assert "inf" not in chart


def test_bars_run_from_their_base_to_their_value():
    chart = bars("t", [Bar("a", 10.0, base=2.0), Bar("b", 2.0)], Axis("x", reach=(0.0,)))
    (x, width), _ = [map(float, found) for found in re.findall(r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart)]
    assert width > 100
    assert x > 50


def test_the_report_is_the_same_bytes_from_the_same_numbers(report):
    assert html(page_of(report)) == html(page_of(report))
    assert isinstance(report, Report)
