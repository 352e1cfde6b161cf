"""The search for a student: what is dropped untrained, what is trained first, when it stops, and what it says."""

import json
import shutil

import pytest

from kdexport import spec
from kdexport.errors import SpecError
from kdexport.pipeline import search
from kdexport.report.search import best_trained
from kdexport.results import SearchCandidate, read_report
from kdexport.spec import derive
from kdexport.tasks.menus import TEXTS
from kdexport.tasks.metrics import Metric


def rung(name, p99=1.0, size=1.0, trial=None, metric=None):
    return SearchCandidate(
        name=name, parameters=1000, precision="int8", size_bytes=int(size * 1e6), p50_ms=(p99 or 1) / 2, p99_ms=p99,
        trial=trial, metric=metric,
    )  # fmt: skip


def judged(rungs, budget):
    from msgspec.structs import replace

    return [replace(one, over=search.over(one, budget)) for one in rungs]


def names(rungs):
    return [one.name for one in rungs]


def test_what_is_over_a_limit_is_said_with_both_numbers():
    budget = spec.Budget(p99_ms=2.0, size_mb=5.0)
    assert search.over(rung("fits", 2.0, 5.0), budget) == ""
    assert search.over(rung("slow", 2.5, 1.0), budget) == "p99 2.500 ms of 2"
    assert search.over(rung("both", 3.0, 9.0), budget) == "9.00 MB of 5 and p99 3.000 ms of 2"
    assert search.over(rung("unknown", None), budget) == "p99 not known of 2"


def test_with_limits_on_speed_the_best_trial_is_trained_first_and_what_is_over_budget_never():
    budget = spec.Budget(p99_ms=2.0)
    ladder = judged([rung("quick", 0.5, trial=0.7), rung("good", 1.5, trial=0.9), rung("slow", 5.0)], budget)
    assert names(search.promising(ladder, budget)) == ["good", "quick"]


def test_asked_for_accuracy_alone_the_quickest_that_is_near_the_best_trial_comes_first():
    budget = spec.Budget(retention=0.97)
    ladder = [rung("poor", 0.1, trial=0.5), rung("quick", 0.5, trial=0.88), rung("best", 3.0, trial=0.9)]
    assert names(search.promising(ladder, budget)) == ["quick", "best", "poor"]


def test_where_nothing_fits_the_closest_is_trained():
    budget = spec.Budget(p99_ms=0.1, size_mb=1.0)
    ladder = judged([rung("slow", 1.0, 0.5), rung("large", 0.05, 3.0), rung("both", 2.0, 9.0)], budget)
    assert names(search.promising(ladder, budget)) == ["large"]


def test_the_frontier_holds_what_nothing_beats_in_both():
    rungs = [rung("a", 1, metric=0.8), rung("b", 2, metric=0.7), rung("c", 3, metric=0.9), rung("d", 4)]
    assert names(best_trained(rungs, lambda one: one.p99_ms, Metric("accuracy"))) == ["a", "c"]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("tiny", ("narrow", 2, 128)),
        ("3x192", ("narrow", 3, 192)),
        ("layers:2", ("lowest", 2, 0)),
        ("spread:3", ("spread", 3, 0)),
        ("layers:0+2+5", ("named", 3, 0)),
        ("bag", ("network", 1, 0)),
        ("cnn:512", ("network", 1, 512)),
        ("my/model", ("model", 0, 0)),
    ],
)
def test_names_of_students(model, shape):
    assert derive.shape_of(model)[:3] == shape


@pytest.mark.parametrize("model", ["layers:", "layers:x", "layers:0", "spread:0", "spread:1+2", "layers:1+x"])
def test_a_name_that_says_no_layers_is_refused(model):
    with pytest.raises(SpecError, match="names no number of layers"):
        derive.shape_of(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student.model": "layers:2", "student.embedding": 64}, "student.embedding has no effect"),
        ({"student.model": "bag", "student.start": "embeddings"}, "student.start has no effect"),
        ({"student.embedding": 64, "student.start": "embeddings"}, "student.start has no effect"),
        ({"student.model": ["tiny", "bag"], "distill.loss": "hidden"}, "hidden matches layers, and bag has none"),
        ({"student.embedding": 64, "distill.loss": {"kl": 1, "relation": 1}}, "relation matches layers, and tiny has"),
        ({"student.model": ["tiny", "layers:x"]}, "names no number of layers"),
    ],
)
def test_a_setting_that_no_student_has_is_refused_before_any_work(changes, says):
    with pytest.raises(SpecError, match=says):
        spec.load(None, {"teacher.model": "t", "data.train": "d.csv"} | changes)


def test_students_of_one_name_in_two_folders_stand_apart():
    assert search.slug("./a/student") != search.slug("./b/student")
    assert search.slug("layers:0+2") != search.slug("layers:02")


def test_a_budget_without_a_student_asks_for_a_ladder(tmp_path):
    plain = spec.load(None, {"teacher.model": "t", "data.train": "d.csv"})
    assert derive.students(plain) == ("tiny",)
    budget = spec.load(None, {"teacher.model": "t", "data.train": "d.csv", "budget.size_mb": 2})
    assert derive.students(budget) == TEXTS.ladder
    words = {"task": "token-classification", "data.train": "d.jsonl"}
    assert derive.students(spec.load(None, words | {"teacher.model": "t"})) == ("spread:3",)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    assert derive.students(spec.load(None, words | {"teacher.model": str(tmp_path)})) == ("tiny",)
    named = spec.load(None, {"teacher.model": "t", "data.train": "d.csv", "budget.size_mb": 2, "student.model": "bag"})
    assert derive.students(named) == ("bag",)


@pytest.fixture(scope="module")
def searched(kdexport, finished, settings, tmp_path_factory):
    """A search on the finished run's teacher: a bag and a convolution fit, two layers of the teacher do not."""
    out = tmp_path_factory.mktemp("search") / "run"
    given = settings | {
        "teacher.model": str(finished / "teacher"),
        "student.model": ["layers:2", "bag", "cnn", "layers:7"],
        "distill.baseline": False,
        "bench.rounds": 1,
        "budget.size_mb": 6.0,
        "budget.retention": 0.5,
    }
    given = {key: value for key, value in given.items() if not key.startswith("teacher.train")}
    spec_file = out.parent / "spec.yaml"
    spec_file.write_text(spec.dump(spec.load(None, given)))
    found = kdexport("run", spec_file, "--out", out)
    assert found.returncode in (0, 3), found.stderr
    return out, spec_file, found


@pytest.mark.slow
def test_a_search_drops_untrained_what_cannot_fit_and_trains_the_best_of_the_rest(searched):
    out, _, found = searched
    report = read_report(out / "report.json")
    by_name = {one.name: one for one in report.search.rungs}
    assert "layers:7" not in by_name  # the teacher has two
    assert "search: layers:7 is left out: the teacher has 2 layers, not 7" in found.stderr
    assert by_name["layers:2"].over
    assert by_name["layers:2"].trial is None
    assert not (out / "student-layers-2").exists()
    assert all(by_name[name].trial is not None for name in ("bag", "cnn"))
    winner = by_name[report.search.winner]
    assert winner.met
    assert winner.metric is not None
    assert winner.seconds > 0
    assert winner.size_bytes <= 6e6
    assert report.distillation.model == report.search.winner
    shipped = report.variant(report.recommended)
    assert shipped.size_bytes == pytest.approx(winner.size_bytes, rel=0.1)  # weights don't change a size much
    assert (found.returncode == 0) is report.budget.met
    assert f"search: {report.search.reason}" in found.stdout
    page = (out / "report.html").read_text()
    assert "Search for a student" in page
    assert "over budget" in page


@pytest.mark.slow
def test_a_search_that_is_done_is_done_at_once(searched, kdexport):
    out, spec_file, before = searched
    again = kdexport("run", spec_file, "--out", out)
    assert again.returncode == before.returncode
    assert "train student" not in again.stderr
    assert "ladder: done before" in again.stderr


@pytest.mark.slow
def test_a_budget_that_nothing_can_meet_shows_the_closest_and_exits_3(searched, kdexport, tmp_path):
    out, spec_file, _ = searched
    shutil.copytree(out, tmp_path / "run")
    found = kdexport("run", spec_file, "--max-size", "10kB", "--epochs", "1", "--out", tmp_path / "run")
    assert found.returncode == 3, found.stderr
    assert "no student fits the budget" in found.stdout
    assert "budget size_mb: NOT kept" in found.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert all(one["over"] for one in report["search"]["rungs"])
    trained = [one["name"] for one in report["search"]["rungs"] if one["metric"] is not None]
    assert trained == [report["search"]["winner"]]
    assert (tmp_path / "run" / "artifact" / "onnx" / "model.onnx").exists()


@pytest.mark.slow
def test_another_budget_measures_and_trains_nothing_twice(searched, kdexport):
    out, spec_file, _ = searched
    found = kdexport("run", spec_file, "--max-size", "7MB", "--out", out)
    assert "ladder: done before" in found.stderr
    assert "trial-bag: done before" in found.stderr


@pytest.mark.slow
def test_a_time_limit_trains_no_second_student(searched, kdexport, tmp_path):
    out, spec_file, _ = searched
    shutil.copytree(out, tmp_path / "run")
    flags = ("--epochs", "2", "--min-retention", "1", "--time-limit", "1s")
    found = kdexport("run", spec_file, *flags, "--out", tmp_path / "run")
    assert found.returncode == 3, found.stderr
    assert "over the time limit; it is left out" in found.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert sum(one["metric"] is not None for one in report["search"]["rungs"]) == 1


@pytest.mark.slow
def test_a_trial_is_a_small_part_of_a_training_and_keeps_no_weights(searched):
    out, _, _ = searched
    for name in ("bag", "cnn"):
        trial = json.loads((out / f"trial-{name}" / "training.json").read_bytes())
        assert trial["recipe"]["epochs"] < 12
        assert not list((out / f"trial-{name}").glob("*.safetensors"))
