"""What changed between two runs, and gates that decide only when the whole interval does."""

import json

import msgspec
import numpy as np
import pytest
from made_reports import BITS, F1, made, variant
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdexport.errors import RunError, SpecError
from kdexport.files import hash_file, write_json
from kdexport.pipeline.compare import compare, parse_gate
from kdexport.report.difference import show_comparison
from kdexport.report.table import trimmed
from kdexport.results import read_report
from kdexport.tasks.config import TaskConfig


@pytest.fixture(scope="module")
def report(finished):
    """The run's report, as precise as if it had been measured for a long time."""
    report, variants = read_report(finished / "report.json"), []
    for v in report.variants:
        near, ratio = v.latency_ms.p50, v.speedup_p50.value
        latency = msgspec.structs.replace(
            v.latency_ms, p50_ci95=(near / 1.02, near * 1.02), p99=1.5 * near, p99_ci95=(1.4 * near, 1.6 * near)
        )
        memory, cold = v.footprint.rss_mb, v.footprint.cold_ms
        footprint = msgspec.structs.replace(
            v.footprint,
            cores_used=1.0,
            rss_mb_ci95=(memory / 1.01, memory * 1.01),
            cold_ms_ci95=(cold / 1.1, cold * 1.1),
        )
        speedup = msgspec.structs.replace(v.speedup_p50, ci95=(ratio / 1.02, ratio * 1.02))
        variants.append(msgspec.structs.replace(v, latency_ms=latency, speedup_p50=speedup, footprint=footprint))
    return msgspec.structs.replace(report, variants=variants, environment=report.environment | {"busy_percent": 0.0})


def scaled(latency, factor):
    """A latency so many times as long, with its intervals."""

    def times(ci):
        return ci and (ci[0] * factor, ci[1] * factor)

    return msgspec.structs.replace(
        latency, p50=latency.p50 * factor, p50_ci95=times(latency.p50_ci95), p99=latency.p99 and latency.p99 * factor,
        p99_ci95=times(latency.p99_ci95), p90=latency.p90 and latency.p90 * factor, p90_ci95=times(latency.p90_ci95),
    )  # fmt: skip


def slower(report, factor, all_variants=False):
    """The report of a student (or of a machine) that is so many times slower."""
    variants = []
    for v in report.variants:
        if all_variants or v.name == report.recommended:
            ratio = v.speedup_p50
            if not all_variants:
                ci = tuple(x / factor for x in ratio.ci95)
                ratio = msgspec.structs.replace(ratio, value=ratio.value / factor, ci95=ci)
            v = msgspec.structs.replace(v, latency_ms=scaled(v.latency_ms, factor), speedup_p50=ratio, speedup_p99=None)
        variants.append(v)
    return msgspec.structs.replace(report, variants=variants)


@pytest.fixture
def write(tmp_path):
    def write(report, name):
        write_json(tmp_path / name, report)
        return str(tmp_path / name)

    return write


def by_metric(found):
    return {change.metric: change for change in found.changes}


def gates(*texts):
    return [parse_gate(text) for text in texts]


def statuses(found):
    return [gate.status for gate in found.gates]


def test_a_student_twice_as_slow_is_worse_and_fails_its_gate(report, write):
    a, b = write(report, "a.json"), write(slower(report, 2.0), "b.json")
    found = compare(a, b, gates("p50>+10%", "p50>+300%", "speedup<-10%", "accuracy<-5"), side_by_side=False)
    changes = by_metric(found)
    assert changes["p50"].verdict == "worse"
    assert changes["p50"].change == pytest.approx(100, abs=1)
    assert changes["speedup"].verdict == "worse"
    assert changes["size"].verdict == "same"
    assert statuses(found) == ["failed", "passed", "failed", "passed"]


def test_a_busier_machine_is_not_taken_for_a_slower_student(report, write):
    """Teacher and student both took 1.5 times as long: their ratio, measured in each run, did not change."""
    a, b = write(report, "a.json"), write(slower(report, 1.5, all_variants=True), "b.json")
    found = compare(a, b, gates("p50>+30%"), side_by_side=False)
    p50 = by_metric(found)["p50"]
    assert p50.change == pytest.approx(0, abs=0.1)
    teacher = report.variant(report.bench.reference).latency_ms.p50
    took = f"{trimmed(teacher)} ms and {trimmed(1.5 * teacher)} ms"
    assert p50.how == f"by ratios to the same teacher, which took {took}"
    assert statuses(found) != ["failed"]
    assert found.notes == []


def test_times_of_two_runs_decide_nothing_where_a_machine_was_starved(report, write):
    """A p99 forty times as long, of a process that got half a core."""
    late = slower(report, 40.0)
    starved = [
        msgspec.structs.replace(v, footprint=msgspec.structs.replace(v.footprint, cores_used=0.5))
        for v in late.variants
    ]
    a = write(report, "a.json")
    found = compare(a, write(late, "b.json"), gates("p99>+10%"), side_by_side=False)
    assert (by_metric(found)["p99"].verdict, statuses(found), found.notes) == ("worse", ["failed"], [])
    b = write(msgspec.structs.replace(late, variants=starved), "b.json")
    found = compare(a, b, gates("p99>+10%"), side_by_side=False)
    p99 = by_metric(found)["p99"]
    assert (p99.verdict, p99.ci95, p99.how) == ("unsure", None, "measured apart, on a busy machine")
    assert statuses(found) == ["unsure"]
    assert found.notes[0].startswith("B was measured on a busy machine, so ")


def test_large_changes_have_no_decimals_and_minus_signs_are_minus_signs(report, write, capsys):
    show_comparison(compare(write(report, "a.json"), write(slower(report, 40.0), "b.json"), [], side_by_side=False))
    shown = capsys.readouterr().out
    assert "+3,900 % [+" in shown
    assert " -" not in shown.replace(" - ", "")


def test_other_hardware_is_refused_for_times_and_not_for_ratios(report, write):
    elsewhere = msgspec.structs.replace(report, environment=report.environment | {"hardware": "other", "cpu": "Other"})
    a, b = write(report, "a.json"), write(elsewhere, "b.json")
    with pytest.raises(SpecError, match=r"p50 is not comparable: A was measured on .*\. Compare ratios"):
        compare(a, b, gates("p50>+10%"), side_by_side=False)
    found = compare(a, b, gates("speedup<-60%", "size>5MB"), side_by_side=False)
    assert statuses(found) == ["passed", "passed"]
    assert by_metric(found)["p50"].verdict == "not comparable"
    assert "times are not compared" in found.notes[0]


def test_accuracy_is_compared_row_by_row(report, write):
    best = report.variant(report.recommended)
    wrong = sorted({*best.wrong_rows, *range(best.metric.n // 2)})
    n = best.metric.n
    worse = msgspec.structs.replace(
        best, wrong_rows=wrong, metric=msgspec.structs.replace(best.metric, value=1 - len(wrong) / n, ci95=(0.3, 0.6))
    )
    variants = [worse if v.name == best.name else v for v in report.variants]
    found = compare(
        write(report, "a.json"),
        write(msgspec.structs.replace(report, variants=variants), "b.json"),
        gates("accuracy<-5", "accuracy<20%", "accuracy<99%"),
        side_by_side=False,
    )
    change = by_metric(found)["accuracy"]
    assert change.verdict == "worse"
    assert change.how == "the same test rows, paired"
    assert statuses(found) == ["failed", "passed", "failed"]


def test_a_gate_whose_limit_lies_in_the_interval_is_unsure(report, write):
    a = write(report, "a.json")
    found = compare(a, a, gates("accuracy<-0.001", "p50>+0.001%"), side_by_side=False)
    assert statuses(found) == ["unsure", "unsure"]


def test_an_unsure_gate_measures_both_files_in_turns(finished, kdexport):
    """The same file on both sides: it can't be 60 % slower than itself."""
    flags = ["--variant", "student-int8", "--measure", "--time-limit", "60s", "--json"]
    found = kdexport("compare", finished, finished, "--fail-if", "p50>+60%", *flags)
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    p50 = next(c for c in result["changes"] if c["metric"] == "p50")
    assert p50["how"].startswith("in turns, ")
    assert result["gates"][0]["status"] == "passed"


def test_a_failed_gate_exits_with_3_and_leaves_pages(finished, report, write, kdexport, tmp_path):
    a, b = write(report, "a.json"), write(slower(report, 2.0), "b.json")
    found = kdexport("compare", a, b, "--fail-if", "p50>+10%", "--no-measure", "--out", tmp_path / "out")
    assert found.returncode == 3
    assert "gate p50>+10%: FAILED" in found.stdout
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "1 of 1 gates failed: p50&gt;+10%." in page
    assert "<svg" in page
    assert (
        "| student-int8 | p50 |" in (tmp_path / "out" / "compare.md").read_text()
        or report.recommended != "student-int8"
    )
    unsure = ["compare", a, a, "--fail-if", "p50>+0.001%", "--no-measure"]
    assert kdexport(*unsure).returncode == 0
    assert kdexport(*unsure, "--unsure-fails").returncode == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("p98>1", "can't be read"),
        ("p99", "can't be read"),
        ("p99>1.2.3%", "can't be read"),
        ("p99>.", "can't be read"),
        ("p99>10%", r"p99 is not in '%' but in ms, s, us. For a change write a sign: 'p99>\+10%'"),
        ("size>5ms", "size is not in 'ms' but in mb, kb"),
        ("p99>+1ms", "a change of p99 has no such unit. Write it like 'p99>\\+10%'"),
    ],
)
def test_gates_that_say_nothing_are_refused(text, says):
    with pytest.raises(SpecError, match=says):
        parse_gate(text)


def test_gates_are_read_in_their_units():
    read = {
        text: parse_gate(text).bound for text in ("p99>2ms", "p99>1s", "size>500KB", "accuracy<95%", "accuracy<0.95")
    }
    assert list(read.values()) == pytest.approx([2, 1000, 0.5, 0.95, 0.95])
    assert parse_gate("accuracy<95").bound == pytest.approx(0.95)
    assert parse_gate("accuracy<-0.5").bound == -0.5
    assert parse_gate("speedup<10").bound == 10


def test_every_gate_that_is_offered_can_decide(report, write):
    a = write(report, "a.json")
    found = compare(
        a,
        a,
        gates("cold>100s", "memory>1", "memory>100000MB", "speedup<0.01", "p50<0.000001", "size>5MB"),
        side_by_side=False,
    )
    assert statuses(found) == ["passed", "failed", "passed", "passed", "passed", "passed"]


@pytest.mark.parametrize(
    ("changes", "says"), [({"threads": 4}, "with 1 thread, B with 4"), ({"texts": "others"}, "on different texts")]
)
def test_other_threads_or_texts_are_not_compared(report, write, changes, says):
    other = msgspec.structs.replace(report, bench=msgspec.structs.replace(report.bench, **changes))
    found = compare(write(report, "a.json"), write(other, "b.json"), [])
    assert says in found.notes[0]
    assert by_metric(found)["p50"].verdict == "not comparable"


def test_what_only_one_report_has_is_said(report, write):
    variants = [
        msgspec.structs.replace(v, latency_ms=msgspec.structs.replace(v.latency_ms, p99=None)) for v in report.variants
    ]
    a, b = write(report, "a.json"), write(msgspec.structs.replace(report, variants=variants), "b.json")
    with pytest.raises(SpecError, match="p99 is not comparable: B has no p99"):
        compare(a, b, gates("p99>+10%"), side_by_side=False)


def test_a_file_that_cannot_be_measured_is_named(finished, copied):
    file = next(copied.glob("artifact/onnx/model_quantized.onnx"))
    before = hash_file(file)
    file.write_bytes(b"garbage")
    path = copied / "report.json"
    path.write_text(path.read_text().replace(before, hash_file(file)))
    if read_report(path).recommended.startswith("student-fp32"):
        pytest.skip("fp32 is recommended here, and it is whole")
    with pytest.raises(RunError, match=r"B's file can't be measured: it stopped .*can't be loaded"):
        compare(str(finished), str(copied), gates("p50>+10%"), side_by_side=True)


def test_reports_without_a_common_variant_are_refused(report, write):
    other = [msgspec.structs.replace(v, name=f"x-{v.name}") for v in report.variants]
    a = write(msgspec.structs.replace(report, recommended=None), "a.json")
    b = write(msgspec.structs.replace(report, variants=other, recommended=None), "b.json")
    with pytest.raises(RunError, match="no variant in common"):
        compare(a, b, [])
    with pytest.raises(RunError, match=r"has no variant 'y'\. It has: "):
        compare(a, a, [], variant="y")


def test_a_metric_that_no_report_has_is_refused(report, write):
    bare = [msgspec.structs.replace(v, footprint=None) for v in report.variants]
    a = write(msgspec.structs.replace(report, variants=bare), "a.json")
    with pytest.raises(SpecError, match="neither report has memory"):
        compare(a, a, gates("memory>+10%"))


def same_rows(value, ci95, metric, **changes):
    """A report of which the test rows are known to be the same."""
    best = variant("student-int8", value, ci95, **changes)
    return made([variant("teacher-torch", 0.9, (0.85, 0.95)), best], metric, data={"sha256": {"test.jsonl": "x"}})


def test_a_gate_on_f1_is_held_against_the_interval_of_f1(write):
    """Whole rows that are right are another metric: no row of them changed here, and F1 fell by 10 points."""
    a = write(same_rows(0.80, (0.78, 0.82), F1, wrong_rows=[1, 2]), "a.json")
    b = write(same_rows(0.70, (0.68, 0.72), F1, wrong_rows=[1, 2]), "b.json")
    found = compare(a, b, gates("accuracy<-0.5", "metric<-0.5", "accuracy<-20"), side_by_side=False)
    assert statuses(found) == ["failed", "failed", "passed"]
    change = by_metric(found)["entity F1"]
    assert change.verdict == "worse"
    assert change.ci95 == pytest.approx((-12.8, -7.2), abs=0.1)
    assert change.how == "unpaired"


def test_runs_that_still_have_each_rows_part_are_compared_row_by_row(tmp_path):
    """B misses one more name in 20 of 1,000 rows: paired that is sure, by both intervals it is not."""
    counts = np.tile([[4.0, 5.0, 5.0]], (1000, 1))
    less = counts.copy()
    less[::50, 0] = 3.0
    for name, stats in (("a", counts), ("b", less)):
        folder = tmp_path / name
        (folder / "verify").mkdir(parents=True)
        np.savez(folder / "verify" / "stats.npz", **{"student-int8": stats})
        f1 = float(2 * stats[:, 0].sum() / stats[:, 1:].sum())
        write_json(folder / "report.json", same_rows(f1, (f1 - 0.02, f1 + 0.02), F1))
        config = TaskConfig(task="token-classification", labels=["O", "B-x"], inputs=["input_ids"], max_length=8)
        write_json(folder / "task.json", config)
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"), gates("accuracy<-0.1"), side_by_side=False)
    change = by_metric(found)["entity F1"]
    assert change.how == "the same test rows, paired"
    assert change.change == pytest.approx(-0.4)
    assert -0.7 < change.ci95[0] < change.ci95[1] < -0.2
    assert statuses(found) == ["failed"]
    (tmp_path / "b" / "verify" / "stats.npz").unlink()
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"), gates("accuracy<-0.1"), side_by_side=False)
    assert statuses(found) == ["unsure"]


def test_fewer_bits_per_byte_are_better_and_change_in_per_cent(write):
    a, b = (write(same_rows(v, (v - 0.01, v + 0.01), BITS), f"{v}.json") for v in (2.0, 2.2))
    worse = compare(a, b, gates("metric>+5%", "metric>+20%", "metric>2.1"), side_by_side=False)
    assert statuses(worse) == ["failed", "passed", "failed"]
    change = by_metric(worse)["bits per byte"]
    assert (change.verdict, change.unit) == ("worse", "%")
    assert change.change == pytest.approx(10)
    assert by_metric(compare(b, a, [], side_by_side=False))["bits per byte"].verdict == "better"
    for gate in ("accuracy<-0.5", "metric>+0.5"):
        with pytest.raises(SpecError, match=r"bits per byte is a number: write 'metric>\+2%'"):
            compare(a, b, gates(gate), side_by_side=False)


def test_two_metrics_are_not_held_against_each_other(write):
    a, b = write(same_rows(2.0, (1.9, 2.1), BITS), "a.json"), write(same_rows(0.5, (0.4, 0.6), F1), "b.json")
    found = compare(a, b, [], side_by_side=False)
    assert not {"bits per byte", "entity F1"} & set(by_metric(found))
    assert "A is judged by bits per byte, B by entity F1, so these are not compared" in found.notes
