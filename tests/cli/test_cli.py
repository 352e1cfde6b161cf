import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import as_flags

from kdexport.runtime.artifact import read_columns
from kdexport.spec.flags import quantity

ERRORS = [
    (["run"], "'data.train' is missing"),
    (["run", "--data", "no.csv", "--teacher", "./t"], "no.csv does not exist. Check the path"),
    (["run", "--data", "no.csv", "--teacher", "./t", "--plan"], "no.csv does not exist. Check the path"),
    (["run", "no.yaml"], "spec no.yaml does not exist. Write one with: kdexport init"),
    (["run", "--set", "student.modle=tiny"], "unknown key 'student.modle'. Did you mean 'student.model'?"),
    (["run", "--set", "seed"], "--set 'seed' is not KEY=VALUE"),
    (["run", "--max-p99", "fast"], "--max-p99 'fast' can't be read. Write a number and one of: ms, s"),
    (["predict", "nowhere", "x"], "nowhere is no artifact"),
    (["report", "nowhere"], "nowhere/report.json does not exist"),
]


@pytest.mark.parametrize(("arguments", "says"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_wrong_use_is_one_line_and_exit_code_2(kdexport, arguments, says):
    found = kdexport(*arguments)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: ")
    assert says in found.stderr
    assert "Traceback" not in found.stderr


def test_an_unknown_flag_is_exit_code_2_without_traceback(kdexport):
    found = kdexport("run", "--techer", "x")
    assert found.returncode == 2
    assert "No such option" in found.stderr
    assert "Traceback" not in found.stderr


def test_debug_shows_the_traceback(kdexport):
    assert "Traceback" in kdexport("predict", "nowhere", "x", "--debug").stderr


def test_bad_data_stops_before_anything_is_trained_and_keeps_what_was_done(kdexport, tmp_path, base_model):
    (tmp_path / "bad.csv").write_text("text,label\nfine,a\n,b\n")
    found = kdexport("run", "--data", tmp_path / "bad.csv", "--teacher", base_model, "--out", tmp_path / "run")
    assert found.returncode == 2
    assert found.stderr == (
        "error: bad.csv, row 2: text is empty. Mend the row, or leave such rows out: --skip-bad-rows\n"
    )


def test_the_plan_says_how_a_teacher_without_head_will_be_trained_and_why(kdexport, finished, base_model):
    data = json.loads((finished / "report.json").read_text())["spec"]["data"]["train"]
    plan = kdexport("run", "--data", data, "--teacher", base_model, "--plan", "--json")
    values = json.loads(plan.stdout)
    assert values["teacher.train.learning_rate"]["value"] == "0.0002"
    assert values["teacher.train.epochs"]["reason"].startswith("about 21,000 examples (labels: 5)")
    for trained in (finished / "teacher", finished / "artifact"):
        plan = kdexport("run", "--data", data, "--teacher", trained, "--student", base_model, "--plan", "--json")
        assert "teacher.train.epochs" not in json.loads(plan.stdout)


def test_the_plan_of_texts_without_labels_trains_no_teacher(kdexport, base_model, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} {i}"} | ({"label": "ab"[i % 2]} if split == "test" else {}) for i in range(20)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = kdexport("run", "--data", tmp_path / "data", "--teacher", base_model, "--plan", "--json")
    assert "teacher.train.epochs" not in json.loads(plan.stdout)


def test_bytes_that_are_no_utf8_on_stdin_are_one_line(finished):
    command = [sys.executable, "-m", "kdexport", "predict", str(finished)]
    found = subprocess.run(command, input=b"\xff shares\n", capture_output=True)
    assert found.returncode == 2
    assert b"stdin, line 1: byte 0xff is not UTF-8. Convert it" in found.stderr
    assert b"Traceback" not in found.stderr


def test_ctrl_c_is_130_and_says_that_nothing_is_lost(settings, tmp_path):
    command = [sys.executable, "-m", "kdexport", "run", *as_flags(settings), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"KDEXPORT_CACHE": str(tmp_path / "cache")}
    )
    while not (tmp_path / "run" / ".kdexport-teacher" / "task.json").exists():
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in log
    assert log.splitlines()[-1].startswith("error: interrupted. Finished stages are kept")
    assert (tmp_path / "run" / "data" / "stage.json").exists()


def test_predict_reads_arguments_stdin_lines_csv_and_jsonl(kdexport, finished, tmp_path):
    texts = ["Shares rose", "The match ended in a draw"]
    (tmp_path / "a.csv").write_text("id,text\n1,Shares rose\n2,The match ended in a draw\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    outputs = [
        kdexport("predict", finished, *texts),
        kdexport("predict", finished, input="\n".join(texts) + "\n"),
        *(kdexport("predict", finished, "--file", tmp_path / f"a.{kind}") for kind in ("csv", "jsonl", "txt")),
    ]
    assert {found.stdout for found in outputs} == {outputs[0].stdout}, outputs[0].stderr
    lines = [json.loads(line) for line in outputs[0].stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert all(line["label"] and 0 < line["score"] <= 1 for line in lines)
    assert read_columns(finished) == {"text": "text", "label": "label"}
    scored = json.loads(kdexport("predict", finished, texts[0], "--scores").stdout)
    assert sum(scored["scores"].values()) == pytest.approx(1, abs=1e-4)


def test_predict_in_a_pipe_that_closes_early_is_quiet(finished):
    command = f"yes 'a text' | head -20000 | {sys.executable} -m kdexport predict {finished} | head -1"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert json.loads(found.stdout)["text"] == "a text"
    assert found.stderr == ""


def test_predict_names_what_is_wrong_with_a_file(kdexport, finished, tmp_path):
    (tmp_path / "a.csv").write_text("words\nx\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    wrong = kdexport("predict", finished, "-f", tmp_path / "a.csv").stderr
    assert "which column is the text? Name it with --text. Its columns: words" in wrong
    wrong = kdexport("predict", finished, "-f", tmp_path / "a.jsonl").stderr
    assert "a.jsonl, row 2: Input data was truncated" in wrong


def test_report_draws_again_and_refuses_half_a_file(kdexport, copied):
    (copied / "report.html").unlink()
    found = kdexport("report", copied)
    assert found.returncode == 0, found.stderr
    assert "student-int8" in found.stdout
    assert "<title>" in (copied / "report.html").read_text()
    whole = (copied / "report.json").read_bytes()
    (copied / "report.json").write_bytes(whole[: len(whole) // 2])
    assert "can't be read" in kdexport("report", copied).stderr
    (copied / "report.json").write_bytes(whole.replace(b'"schema": 2', b'"schema": 9'))
    assert "is of schema 9, this kdexport reads 1 and 2" in kdexport("report", copied).stderr


def test_init_writes_a_spec_that_plan_explains(kdexport, tmp_path, articles_file, base_model):
    path = tmp_path / "spec.yaml"
    assert kdexport("init", "--teacher", base_model, "--data", articles_file, "--out", path).returncode == 0
    found = kdexport("run", path, "--plan")
    assert found.returncode == 0, found.stderr
    assert "distill.epochs" in found.stdout
    assert "there are 215 rows" in found.stdout
    assert kdexport("init", "--teacher", "x", "--data", "y", "--out", path).returncode == 2
    planned = json.loads(kdexport("run", path, "--plan", "--json").stdout)
    assert planned["distill.learning_rate"]["value"] == "0.0005"


@pytest.mark.parametrize(("text", "value"), [("2ms", 2.0), ("2 ms", 2.0), ("0.5s", 500.0), ("3", 3.0), (3, 3.0)])
def test_quantities_have_units(text, value):
    assert quantity(text, "--max-p99", {"ms": 1.0, "s": 1e3}) == value


def test_help_shows_examples_and_costs_little(kdexport):
    started = time.monotonic()
    found = kdexport("run", "--help")
    assert time.monotonic() - started < 5
    assert "kdexport run --teacher ./my-bert --data tickets.csv" in found.stdout
