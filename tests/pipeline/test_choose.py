"""Which file is recommended, and whether the budget is met: by the validation split, and by the metric's direction."""

import numpy as np
import pytest

from kdexport import spec
from kdexport.bench.engine import Measured
from kdexport.export import Candidate
from kdexport.export.verify import Validation
from kdexport.pipeline.choose import choose, judge_budget, lost
from kdexport.pipeline.search import one_each, promising
from kdexport.results import Conditions, Latency, SearchCandidate
from kdexport.tasks.metrics import Metric, paired_difference, wilson_interval

ACCURACY, BITS = Metric("accuracy", kind="fraction"), Metric("bits per byte", higher_is_better=False, kind="number")
FILES = [Candidate(name, f"{name}.onnx", name, "plain") for name in ("fp32", "int8", "fp16", "int4")]
SIZES = {"fp32": 40_000_000, "int8": 12_000_000, "fp16": 20_000_000, "int4": 8_000_000}


def measured(rounds=5, **p50):
    def latency(ms):
        return Latency(p50=ms, p90=ms, p99=None, p50_ci95=None, samples=100, rounds=rounds, round_p50=[ms] * rounds)

    return Measured(
        latency={f"student-{name}": latency(ms) for name, ms in p50.items()}, speedup={}, speedup_p99={}, footprint={},
        cells={}, conditions=Conditions(rounds=5, round_seconds=1.0, rows=1, clock=""), environment={},
    )  # fmt: skip


def chosen(metric, values, limit_mb=None, names=("fp32", "int8"), **times):
    files = [c for c in FILES if c.name in names]
    found = Validation(metric, {f"student-{name}": value for name, value in values.items()})
    times = times or dict.fromkeys(names, 1.0)
    choice = choose(files, found, measured(**times), spec.Export(), SIZES, limit_mb)
    return choice.recommended.name, choice.reason


def test_int8_is_chosen_by_what_it_loses_on_validation():
    assert chosen(ACCURACY, {"fp32": 0.90, "int8": 0.895}) == (
        "int8",
        "int8 loses 0.5 points against fp32 on validation and is as fast",
    )
    assert chosen(ACCURACY, {"fp32": 0.90, "int8": 0.88}) == (
        "fp32",
        "int8 loses 2.0 points against fp32 on validation; 1 points are allowed",
    )
    assert chosen(ACCURACY, {"fp32": 0.90, "int8": 0.90}, int8=2.0, fp32=1.0)[0] == "fp32"


def test_two_rounds_make_nothing_faster():
    found = Validation(ACCURACY, {"student-fp32": 0.9, "student-int8": 0.9})
    for rounds, speed in ((2, "; which is faster is not sure"), (3, " and is 5.0× faster")):
        choice = choose(FILES[:2], found, measured(rounds, fp32=5.0, int8=1.0), spec.Export(), SIZES)
        assert choice.reason == f"int8 loses nothing against fp32 on validation{speed}"


def test_more_bits_are_a_loss_and_fewer_are_none():
    assert chosen(BITS, {"fp32": 2.0, "int8": 2.1}) == (
        "fp32",
        "int8 loses 4.8 % against fp32 on validation; 1 % are allowed",
    )
    name, reason = chosen(BITS, {"fp32": 2.0, "int8": 1.9})
    assert name == "int8"
    assert reason.startswith("int8 loses nothing")
    assert lost(BITS, 2.0, 2.1) == pytest.approx(1 - 2 / 2.1)
    assert lost(ACCURACY, 0.9, 0.8) == pytest.approx(0.1)


def test_int8_vectors_are_chosen_by_the_neighbours_that_they_share_with_fp32():
    def of(shared, limit_mb=None):
        values, both = {"student-fp32": 0.8, "student-int8": 0.8}, {"student-fp32": 1.0, "student-int8": shared}
        found = Validation(Metric("Spearman correlation"), values, both, 0.9)
        choice = choose(FILES[:2], found, measured(fp32=1.0, int8=1.0), spec.Export(), SIZES, limit_mb)
        return choice.recommended.name, choice.reason

    name, reason = of(0.95)
    assert name == "int8"
    assert reason.startswith("int8 has 95.0% of fp32's nearest on validation; int8 loses nothing against fp32")
    assert of(0.89) == ("fp32", "int8 has 89.0% of fp32's nearest on validation; 90% are wanted")
    assert of(0.89, limit_mb=20)[0] == "fp32"  # a limit of the size makes it no better
    assert of(0.95, limit_mb=20)[0] == "int8"


def test_a_size_limit_looks_at_every_precision_that_ships():
    alike = dict.fromkeys(SIZES, 0.9)
    assert chosen(ACCURACY, alike, 10, names=SIZES)[0] == "int4"
    assert chosen(ACCURACY, alike, 25, names=("fp32", "fp16")) == (
        "fp16",
        "fp32 is over 25 MB; fp16 loses nothing against fp32 on validation",
    )
    assert chosen(ACCURACY, alike, 50, names=("fp32", "fp16"))[0] == "fp32"
    name, reason = chosen(ACCURACY, alike | {"int4": 0.8}, 10, names=SIZES)
    assert name == "int8"
    assert reason.endswith("int4 loses 10.0 points against fp32 on validation, though it is within 10 MB")


def test_retention_of_a_metric_that_falls_is_met_from_below():
    def check(value, least, change=(0.0, 0.01)):
        (found,) = judge_budget(spec.Budget(retention=least), BITS, value, 2.0, change, None, 1).checks
        return found

    assert check(2.05, 0.97).met
    assert check(2.05, 0.97).found == pytest.approx(2 / 2.05)
    assert not check(2.2, 0.97).met
    assert check(1.9, 0.97).met
    assert not check(2.05, 0.97, (0.0, 0.2)).sure  # the file may have 2.2 bits
    assert check(2.2, 0.97, (0.1, 0.3)).sure
    assert check(2.05, 0.97, (0.0, 0.2)).ci95 == pytest.approx((2 / 2.2, 1.0))


def test_retention_is_sure_by_the_paired_difference_which_is_narrower_than_accuracys_own_interval():
    """3 of 240 rows wrong, the teacher none: the accuracy may be 96.4 %, yet the limit of 97 % is kept for sure."""
    right, wrong = np.ones(240, bool), np.arange(240) >= 3
    value, change = paired_difference(right, wrong)
    assert wilson_interval(237, 240)[0] < 0.965
    for least, sure in ((0.97, True), (0.975, False)):
        (found,) = judge_budget(spec.Budget(retention=least), ACCURACY, 1 + value, 1.0, change, None, 1).checks
        assert (found.met, found.sure) == (True, sure)
        assert found.ci95 == pytest.approx((1 + change[0], 1 + change[1]))


def student(name, p99, trial=None, precision="int8", size=1.0):
    return SearchCandidate(
        name=name, parameters=1, precision=precision, size_bytes=int(size * 1e6), p50_ms=p99 / 2, p99_ms=p99,
        trial=trial,
    )  # fmt: skip


def test_a_search_trains_the_student_with_the_fewest_bits_first():
    ladder = [student("poor", 0.5, 3.0), student("good", 1.5, 2.0), student("near", 1.0, 2.05)]
    assert [one.name for one in promising(ladder, spec.Budget(p99_ms=9.0), BITS)] == ["good", "near", "poor"]
    assert [one.name for one in promising(ladder, spec.Budget(retention=0.9), BITS)] == ["near", "good", "poor"]


def test_a_search_takes_the_precision_that_fits():
    ladder = [
        student("big", 1.0, size=40, precision="fp32"),
        student("big", 2.0, size=20, precision="fp16"),
        student("big", 1.5, size=8, precision="int4"),
        student("small", 1.0, size=5, precision="fp32"),
    ]

    def picked(**limits):
        return [(one.name, one.precision, bool(one.over)) for one in one_each(ladder, spec.Budget(**limits))]

    assert picked(retention=0.9) == [("big", "fp32", False), ("small", "fp32", False)]
    assert picked(size_mb=25) == [("big", "int4", False), ("small", "fp32", False)]
    assert picked(size_mb=1) == [("big", "int4", True), ("small", "fp32", True)]
