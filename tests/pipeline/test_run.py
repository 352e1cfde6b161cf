"""The whole chain on real texts: what lands in a run, and that others' code can use it."""

import hashlib
import json
import shutil
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import as_flags
from near import apart

import kdexport as package
from kdexport.data import read_rows
from kdexport.results import read_report
from kdexport.runtime import artifact
from kdexport.runtime.predictor import golden_difference
from kdexport.stages import read_record
from kdexport.tasks import load_task


@pytest.fixture(scope="module")
def report(finished):
    return read_report(finished / "report.json")


@pytest.fixture(scope="module")
def rows(finished):
    return read_rows(finished / "data", "test")


def test_a_run_leaves_every_stage_an_artifact_and_three_reports(finished):
    stages = ("data", "teacher", "targets", "student", "baseline", "export", "verify", "bench", "artifact")
    assert all(read_record(finished / stage).outputs for stage in stages)
    shipped = {path.relative_to(finished / "artifact").as_posix() for path in (finished / "artifact").rglob("*.*")}
    assert {"kdexport.json", "README.md", "config.json", "tokenizer.json", "onnx/model.onnx"} <= shipped
    assert "onnx/model_quantized.onnx" in shipped
    assert all((finished / f"report.{kind}").stat().st_size > 1000 for kind in ("json", "md", "html"))
    assert not list(finished.glob(".kdexport-*"))


def test_the_teacher_learned_and_the_student_follows_it(report):
    assert report.distillation.teacher.value > 0.7
    assert report.variant("student-fp32").agreement > 0.6
    assert report.distillation.student_curve[-1]["loss"] < report.distillation.student_curve[0]["loss"]
    assert report.distillation.baseline is not None


def test_every_variant_is_measured_and_faster_than_the_teacher_in_pytorch(report):
    for variant in report.variants:
        assert variant.latency_ms.p50 > 0
        assert variant.latency_ms.tokenize_p50 + variant.latency_ms.model_p50 <= 1.2 * variant.latency_ms.p50
        assert variant.speedup_p50.ci95 is None  # two rounds allow no interval
    assert report.variant("teacher-torch").speedup_p50.value == 1
    assert all(v.speedup_p50.value > 2 for v in report.variants if v.model == "student")


def test_fp32_is_pytorch_to_a_ten_thousandth_and_int8_is_smaller(report):
    fp32, int8 = report.variant("student-fp32"), report.variant("student-int8")
    assert fp32.max_abs_diff <= 1e-4
    assert int8.size_bytes < fp32.size_bytes / 3
    assert abs(fp32.metric.value - int8.metric.value) < 0.05


def test_accuracy_in_the_report_is_that_of_the_file_that_ships(finished, report, rows):
    model = package.load(finished / "artifact")
    answers = model.predict([row["text"] for row in rows])
    accuracy = np.mean([answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)])
    assert accuracy == pytest.approx(report.variant(report.recommended).metric.value)


@pytest.mark.parametrize(
    ("variant", "file", "off"), [("fp32", "model.onnx", 1e-4), ("int8", "model_quantized.onnx", 0.02)]
)
def test_the_artifact_loads_in_optimum(finished, rows, optimum, variant, file, off):
    texts = [row["text"] for row in rows[:20]]
    theirs = optimum("ORTModelForSequenceClassification", finished / "artifact", file, texts)
    ours = package.load(finished / "artifact", variant).predict(texts)
    # the score of the same label: where two are as good as equal, int8 may choose otherwise in another batch
    assert [score for _, score in theirs] == pytest.approx(
        [o.scores[label] for o, (label, _) in zip(ours, theirs, strict=True)], abs=off
    )


def test_the_plain_graph_runs_in_bare_onnxruntime_with_standard_operators_only(finished, rows):
    task = load_task(finished / "artifact")
    for file in ("model.onnx", "model_quantized.onnx"):
        path = finished / "artifact" / "onnx" / file
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert session.run(None, task.encode(rows[:3]))[0].shape == (3, 5)
    graph = onnx.load(finished / "artifact" / "onnx" / "model.onnx")
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 18)]


def test_the_last_layer_is_computed_at_one_position(finished):
    """Behind the last attention nothing is as long as the text; the teacher's logits test says that it is right."""
    graph = onnx.load(finished / "export" / "model.onnx").graph
    cut = {node.output[0] for node in graph.node if node.op_type == "Slice" and "first" in node.name}
    assert len(cut) == 2  # the attention's output, and the residual beside it


def test_an_untrained_student_is_exported_right_too(finished, rows, tmp_path):
    """Its biases are all equal, so the exporter stores one and names it many times."""
    from transformers import AutoModelForSequenceClassification

    from kdexport import spec
    from kdexport.distill.student import build_student
    from kdexport.export import export_student
    from kdexport.models.inference import logits_of
    from kdexport.models.saving import save_model, save_task
    from kdexport.runtime.predictor import Predictor

    task = load_task(finished / "teacher")
    opened = build_student(spec.Student(vocabulary="whole"), "tiny", finished / "teacher").opened
    save_task(opened, 32, task.labels, tmp_path)
    save_model(opened, tmp_path)
    export_student(spec.Export(), tmp_path, tmp_path)
    torch_logits = logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path), task, rows)
    for file in ("model.onnx", "model_fused.onnx"):
        assert apart(Predictor(task, tmp_path / file).logits(rows), torch_logits) < 1e-4


def test_a_finished_run_is_instant_and_loads_no_torch(copied, settings, kdexport, cache):
    before = json.loads((copied / "report.json").read_text())
    started = time.monotonic()
    found = kdexport("run", *as_flags(settings), "--out", copied, "--json")
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("done before") == 9
    assert json.loads(found.stdout)["recommended"] == read_report(copied / "report.json").recommended
    after = json.loads((copied / "report.json").read_text())
    assert after.pop("command") != before.pop("command")  # it names the folder, and this is a copy
    assert after == before
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_a_second_student_reuses_the_soft_targets(copied, settings, kdexport):
    shutil.rmtree(copied / "targets")
    other = {"student.model": "layers:1", "distill.epochs": 1, "bench.rounds": 1, "export.variants": ["fp32"]}
    found = kdexport("run", *as_flags(settings | other), "--no-baseline", "--out", copied)
    assert found.returncode == 0, found.stderr
    assert "teacher: done before" in found.stderr
    assert "soft targets: 300 of 300 reused" in found.stderr
    assert "the teacher's layers 0" in found.stderr
    assert "the teacher reads" not in found.stderr
    assert read_report(copied / "report.json").distillation.baseline is None


def test_a_budget_that_is_not_met_exits_with_3_and_says_what_was_missed(copied, settings, kdexport):
    command = ["run", *as_flags(settings), "--student", "tiny", "--out", copied]
    missed = kdexport(*command, "--max-size", "0.5MB", "--max-p99", "9s")
    assert missed.returncode == 3
    assert "budget size_mb: NOT kept" in missed.stdout
    kept = kdexport(*command, "--max-size", "5MB", "--min-retention", "0.1")
    assert kept.returncode == 0, kept.stderr
    assert "budget retention: kept" in kept.stdout


def test_int8_that_loses_too_much_is_not_recommended(copied, settings, kdexport):
    from kdexport import spec
    from kdexport.pipeline.report import Stages, assemble

    found = json.loads((copied / "verify" / "validation.json").read_text())
    for name in ("student-int8", "student-int8-fused"):
        if name in found["values"]:
            found["values"][name] = found["values"]["student-fp32"] - 0.02
    (copied / "verify" / "validation.json").write_text(json.dumps(found))
    folders = [copied / n for n in ("data", "teacher", "targets", "student", "baseline", "export", "verify", "bench")]
    report, _ = assemble(spec.load(None, settings), Stages(copied, *folders))
    assert report.recommended == "student-fp32"
    assert report.reason == "int8 loses 2.0 points against fp32 on validation; 1 points are allowed"


def test_an_artifact_that_was_changed_is_refused(copied):
    folder = copied / "artifact"
    assert artifact.read_manifest(folder).task.labels == load_task(copied / "student").labels
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(package.KdexportError, match=r"tokenizer\.json is not the file that was packed"):
        package.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(package.KdexportError, match=r"missing or unreadable"):
        package.load(folder)


def test_golden_answers_say_whether_a_file_still_does_what_was_packed(copied):
    folder = copied / "artifact"
    for variant in artifact.read_manifest(folder).variants:
        predictor = package.load(folder, variant)
        assert golden_difference(predictor, copied, variant) < 1e-4
        assert len(artifact.read_golden(folder).rows) == len(artifact.read_golden(folder).logits[variant])
        if variant != "fp32":
            assert golden_difference(predictor, folder, "fp32") > 1e-4
    assert golden_difference(predictor, folder, "fp8") is None
    manifest = json.loads((folder / "kdexport.json").read_text())
    (folder / "golden.json").write_text("{")
    manifest["files"]["golden.json"] = hashlib.sha256(b"{").hexdigest()
    (folder / "kdexport.json").write_text(json.dumps(artifact.sealed(manifest)))
    with pytest.raises(package.KdexportError, match=r"golden\.json can't be read"):
        golden_difference(package.load(folder), folder, "fp32")
    # Artifacts of before have no golden answers, and no function.
    del manifest["files"]["golden.json"], manifest["task"]["function"]
    (folder / "kdexport.json").write_text(json.dumps(artifact.sealed(manifest)))
    with pytest.raises(package.KdexportError, match=r"golden\.json is not in the manifest"):
        package.load(folder)
    (folder / "golden.json").unlink()
    assert golden_difference(package.load(folder), folder, "fp32") is None


def test_wrong_artifacts_and_variants_are_named(finished, tmp_path):
    with pytest.raises(package.KdexportError, match=r"is no artifact: it has no kdexport\.json"):
        package.load(tmp_path)
    with pytest.raises(package.KdexportError, match=r"has no variant 'int4'\. It has: fp32, int8"):
        package.load(finished, "int4")


def test_predict_takes_pairs_empty_and_endless_texts_and_refuses_what_is_no_text(finished):
    model = package.load(finished)
    assert model.predict([]) == []
    answers = model.predict(["", "x" * 200_000, ("a pair", "of texts"), "lone surrogate \ud800"])
    assert [round(sum(answer.scores.values()), 6) for answer in answers] == [1.0] * 4
    with pytest.raises(package.KdexportError, match="input 1 is no text but int"):
        model.predict(["fine", 3])


def test_answers_do_not_depend_on_the_batch(finished, rows):
    model = package.load(finished, "fp32")
    texts = [row["text"] for row in rows[:40]]
    one_by_one = [model.predict(text)[0].score for text in texts]
    assert [a.score for a in model.predict(texts, batch_size=7)] == pytest.approx(one_by_one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is one")
def test_a_gpu_that_is_asked_for_and_not_there_is_left_out_and_said(copied, settings, kdexport):
    more = settings | {"bench.devices": ["cuda"], "bench.runtimes": ["onnxruntime"], "bench.rounds": 1}
    found = kdexport("run", *as_flags(more), "--out", copied)
    assert found.returncode == 0, found.stderr
    report = read_report(copied / "report.json")
    assert report.bench.left_out["student-int8-cuda"] == "onnxruntime has no CUDAExecutionProvider"
    assert report.variant("teacher-torch").latency_ms.p50 > report.variant(report.recommended).latency_ms.p50
    assert (
        "student-int8-cuda was left out: onnxruntime has no CUDAExecutionProvider"
        in (copied / "report.html").read_text()
    )
