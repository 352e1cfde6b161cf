"""The examples as they are written, with a few rows of their own data in the place of the hub's."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from kdexport.pipeline.api import settings_of
from kdexport.pipeline.run import plan
from kdexport.results import read_report

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
INTENTS = ("alarm", "balance", "cook_time", "weather")
QUICK = ["bench.rounds=1", "bench.round_seconds=0.2", "bench.precision=null", "bench.batch_sizes=[4]"]


def needed(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"shared/data/{name} is not beside the repository")
    return DATA / name


def few_rows(source, target, count, wanted=lambda row: True):
    """Copy about `count` of the wanted rows of a CSV file, from its beginning to its end."""
    with source.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if wanted(row)]
    rows = rows[:: max(1, len(rows) // count)]
    with target.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return rows


def few_lines(name, folder, wanted=lambda line: True):
    for split, count in (("train", 80), ("validation", 30), ("test", 40)):
        lines = [line for line in (needed(name) / f"{split}.jsonl").open() if wanted(line)][:count]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def queries(folder, count=30):
    for split in ("train", "validation", "test"):
        few_rows(needed("clinc150") / f"{split}.csv", folder / f"{split}.csv", count, lambda r: r["label"] in INTENTS)


def comments(folder):
    few_lines("goemotions", folder, lambda line: set(json.loads(line)["labels"]) <= {"joy", "anger", "love", "neutral"})


def pairs(folder):
    for split, count in (("train", 80), ("validation", 30), ("test", 40)):
        few_rows(needed("stsb") / f"{split}.csv", folder / f"{split}.csv", count)


def posts(folder):
    few_lines("wnut17", folder, lambda line: '"B-person"' in line and line.count('"B-') == 1)


def clothes(folder):
    import pyarrow.parquet as pq

    for split, count in (("train", 120), ("test", 60)):
        pq.write_table(pq.read_table(needed("fashion-mnist") / f"{split}.parquet")[:count], folder / f"{split}.parquet")


def digits(folder):
    for split, count in (("train", 80), ("test", 30)):
        (folder / split).mkdir()
        source = needed("fsdd") / split
        table = folder / split / "metadata.csv"
        for row in few_rows(source / "metadata.csv", table, count, lambda row: row["label"] in "01"):
            shutil.copyfile(source / row["file_name"], folder / split / row["file_name"])


def plays(folder):
    for split, count in (("train", 20_000), ("test", 5_000)):
        (folder / f"{split}.txt").write_text((needed("shakespeare") / f"{split}.txt").read_text()[:count])


def few_orders(folder):
    orders(folder, 8)


def orders(folder, count=24):
    files = sorted((needed("coffee-orders") / "audio").glob("*.flac"))[:count]
    for split, chosen in (("train", files[: 2 * count // 3]), ("test", files[2 * count // 3 :])):
        (folder / split).mkdir()
        for file in chosen:
            shutil.copyfile(file, folder / split / file.name)
        (folder / split / "metadata.csv").write_text("\n".join(["file_name", *(file.name for file in chosen)]) + "\n")


def papers(folder, count=24):
    import msgspec

    source = needed("cranfield")
    queries = (source / "queries.jsonl").read_text().splitlines(keepends=True)[:count]
    names = {msgspec.json.decode(line)["_id"] for line in queries}
    (folder / "queries.jsonl").write_text("".join(queries))
    shutil.copyfile(source / "corpus.jsonl", folder / "corpus.jsonl")
    judged = (source / "qrels" / "test.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("".join(line for line in judged if line.split("\t")[0] in names))


def news(folder):
    from kdexport.data.demo import write_few_labels

    write_few_labels(folder)
    for name in ("test", "train"):
        (folder / f"{name}.jsonl").unlink()
    (folder / "unlabelled.jsonl").rename(folder / "train.jsonl")


# example → a few rows of its data, passes of the teacher until it knows more than chance, and the metric in its report
PIECES = {
    "text-classification": (queries, 6, "accuracy"), "multi-label": (comments, 3, "micro F1"),
    "regression": (pairs, 6, "Pearson correlation"), "token-classification": (posts, 6, "entity F1"),
    "image-classification": (clothes, 8, "accuracy"), "audio-classification": (digits, 6, "accuracy"),
    "causal-lm": (plays, 1, "bits per byte"), "speech-recognition": (orders, None, "word error rate"),
    "text-ranking": (papers, 3, "nDCG@10"),
    "smaller-whisper": (few_orders, None, "word error rate"),
    "sentence-embedding": (pairs, None, "Spearman correlation"),
    "language-model": (news, None, "agreement with the teacher"),
}  # fmt: skip


def at_hand(name):
    """The flags for a teacher of the hub that stands beside the repository."""
    if PIECES[name][2] != "word error rate":
        return {}
    if not (teacher := DATA.parent / "models" / "whisper-tiny.en").is_dir():
        pytest.skip("shared/models/whisper-tiny.en is not beside the repository")
    return {"teacher": str(teacher)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_needs_no_folder_and_takes_other_data_by_one_flag(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "examples" / f"{name}.yaml").read_text()
    assert f"kdexport run examples/{name}.yaml\n" in text
    assert f"kdexport run examples/{name}.yaml --data ./" in text
    of_hub = settings_of(ROOT / "examples" / f"{name}.yaml", {}).data
    assert "/" in of_hub.train
    assert not Path(of_hub.train).parent.exists()  # a hub id, and no place on a disk
    PIECES[name][0](tmp_path)
    settings = settings_of(ROOT / "examples" / f"{name}.yaml", {"data": tmp_path, **at_hand(name)})
    assert {key: value for key, value, _ in plan(settings)}["data.train"] == str(tmp_path)


# Those that the tests of their rooms run: test_asked_docs.py, test_tokens.py and test_speech_runs.py.
ELSEWHERE = {"language-model", "token-classification", "smaller-whisper"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - ELSEWHERE))
def test_an_example_runs_to_its_end(name, tmp_path, kdexport, monkeypatch):
    monkeypatch.chdir(ROOT)
    make, epochs, metric = PIECES[name]
    (data := tmp_path / "data").mkdir()
    make(data)
    flags = ["--data", data, "--epochs", 1, *([] if name == "sentence-embedding" else ["--no-baseline"])]
    flags += ["--teacher-epochs", epochs, "--set", "teacher.train.batch_size=8"] if epochs else []
    flags += ["--max-length", 32] if name == "text-ranking" else []  # abstracts, of which the first words will do
    flags += [part for key, value in at_hand(name).items() for part in (f"--{key}", value)]
    sets = [part for each in QUICK for part in ("--set", each)]
    done = kdexport("run", f"examples/{name}.yaml", *flags, *sets, "--out", tmp_path / "run")
    assert done.returncode in (0, 3), done.stderr  # so short a training may miss the budget
    report = read_report(tmp_path / "run" / "report.json")
    assert report.metric == metric
    assert report.data["name"] == str(data)
    assert (tmp_path / "run" / "artifact" / report.variant(report.recommended).file).is_file()


@pytest.mark.slow
def test_the_example_of_texts_keeps_its_budget(tmp_path, kdexport, monkeypatch):
    monkeypatch.chdir(ROOT)
    queries(tmp_path, 400)
    flags = ["--data", tmp_path, "--teacher-epochs", "1", "--augment", "4", "--epochs", "8", "--no-baseline"]
    sets = [
        part for each in (*QUICK, "distill.batch_size=16", "teacher.train.batch_size=16") for part in ("--set", each)
    ]
    done = kdexport("run", "examples/text-classification.yaml", *flags, *sets, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "run" / "report.json")
    assert report.budget.met
    assert report.variant("student-int8").size_bytes < 2e6
    assert report.variant("teacher-torch").metric.value > 0.9
