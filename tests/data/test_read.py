"""One reader: a file gives the same rows to `run`, `predict`, `bench --data` and `export --data`, or the same error."""

import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from fuzz import small

from kdexport import spec
from kdexport.data.read import read_file, read_stream
from kdexport.data.sources import choose_columns, local_files, read_splits, read_test, to_answer, to_rows
from kdexport.errors import DataError, MissingPackage
from kdexport.pipeline import bench, export_model
from kdexport.runtime import artifact
from kdexport.tasks import load_task
from kdexport.tasks.inputs.media import bytes_of
from kdexport.tasks.text_classification import TextClassification
from kdexport.tasks.token_classification import TokenClassification

FAULTS = Path(__file__).parents[3] / "shared" / "faults"
FORTY = ("think is arrived the bad parcel and late arrived is 0", 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.pack(small.configs()["text"], tmp_path_factory.mktemp("small") / "text")


def data(path, **more):
    return spec.Data(train=str(path), **more)


def by_run(given, model):
    splits = read_splits(given)
    return to_rows(splits["train"], given, TextClassification, "if any")[0]


def by_predict(given, model):
    found = to_answer(read_test(given), given, load_task(model), artifact.read_columns(model))
    return [{"id": one["id"]} | one["row"] for one in found if one]


def by_bench(given, model):
    return bench.read_texts(given, [], str(model))


def by_export(given, model):
    return export_model.read_rows(given, TextClassification)[0]


COMMANDS = {"run": by_run, "predict": by_predict, "bench": by_bench, "export": by_export}


def rows_of(given, model):
    """What all four read: (id, text, second text); and the labels, which two of them read."""
    found = {name: read(given, model) for name, read in COMMANDS.items()}
    texts = {name: [(row["id"], row["text"], row.get("text_pair")) for row in rows] for name, rows in found.items()}
    assert texts["run"] == texts["predict"] == texts["bench"] == texts["export"]
    labels = [[row["label"] for row in found[name]] for name in ("run", "bench")]
    assert labels[0] == labels[1]
    return texts["run"], labels[0]


@pytest.mark.parametrize(
    ("name", "first", "n"),
    [
        ("01-unnamed-index-column.csv", *FORTY),
        ("01-trailing-comma.csv", "a good", None),
        ("02-records.json", *FORTY),
        ("03-rows.parquet", *FORTY),
        ("04-unicode-line-ends.txt", "good\u2028movie", 4),
        ("05-blank-line.jsonl", *FORTY),
        ("06-unquoted.tsv", '"' + FORTY[0], 40),
        ("07-utf16.csv", *FORTY),
        ("08-pairs.csv", "good movie", None),
    ],
)
def test_all_commands_read_the_same_rows(model, name, first, n):
    if not FAULTS.is_dir():
        pytest.skip("shared/faults is not beside the repository")
    rows, labels = rows_of(data(FAULTS / name), model)
    assert rows[0][:2] == (f"{name}:1", first)
    assert n is None or len(rows) == n
    assert set(labels) == ({None} if name.endswith(".txt") else {"pos", "neg"})
    assert {second is None for *_, second in rows} == {name != "08-pairs.csv"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_field_longer_than_csvs_limit_is_a_bad_row(model, tmp_path, command):
    path = tmp_path / "long.csv"
    path.write_text("text,label\nshort,pos\n" + "x" * 131_073 + ",neg\nlast,neg\n")
    with pytest.raises(DataError, match=r"long\.csv, row 2: text has 131,073 characters .*--skip-bad-rows"):
        COMMANDS[command](data(path), model)
    rows = COMMANDS[command](data(path, skip_bad_rows=True), model)
    assert [row["text"] for row in rows] == ["short", "last"]


GBK = "text,label\n很好,pos\n".encode("gbk")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", GBK, "a.csv, line 2: byte 0xba is not UTF-8. Convert it from its encoding (latin1, gb18030, "),
        ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "a.csv is UTF-16 without a byte-order mark, or no text"),
        ("a.csv", "text,label\na,b\n".encode("utf-16")[:-1], "a.csv is no valid UTF-16: truncated data"),
        ("a.csv", b"text,label\na,b,c\n", "a.csv, row 1: it has 3 fields, and the header names 2"),
        ("a.csv", b"text,text\na,b\n", "a.csv: its first row must name the columns, each once"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n\n{"text": \n', "a.jsonl, row 2: Input data was truncated"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n[1]\n', "a.jsonl, row 2: it is no JSON object"),
        ("a.json", b'[{"text": "a"}, ', "a.json can't be read: Input data was truncated"),
        ("a.parquet", b"PAR1 and no more", "a.parquet can't be read: "),
        ("a.csv", b"words\nx\n", "which column is the text? Name it with --text. Its columns: words"),
        ("a.csv", b"", "a.csv is empty"),
    ],
)
def test_what_is_wrong_is_the_same_line_for_all_commands(model, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    lines = set()
    for read in COMMANDS.values():
        with pytest.raises(DataError) as caught:
            read(data(tmp_path / name), model)
        lines.add(str(caught.value))
    assert len(lines) == 1
    assert says in lines.pop()


def test_a_file_of_utf_16_is_not_read_as_a_whole(tmp_path):
    (tmp_path / "a.txt").write_text("a text of some words\n" * 50_000, encoding="utf-16")
    tracemalloc.start()
    assert sum(1 for _ in read_file(tmp_path / "a.txt").rows) == 50_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


def test_bad_rows_are_left_out_by_all_commands(model, tmp_path):
    good = [json.dumps({"text": text, "label": "b"}) for text in "az"]
    (tmp_path / "a.jsonl").write_text("\n".join([good[0], '{"text": ', "5", '{"text": 5}', good[1]]))
    rows, _ = rows_of(data(tmp_path / "a.jsonl", skip_bad_rows=True), model)
    assert rows == [("a.jsonl:1", "a", None), ("a.jsonl:5", "z", None)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('text\tlabel\n"say ""hi"", you"\ta\n', 'say "hi", you'),  # quoted, a row a line
        ('text\tlabel\n"two\nlines"\ta\n', "two\nlines"),  # quoted, over two lines
        ('text\tlabel\n"open\ta\nmore "\tb\n', '"open'),  # as GLUE has it, though the quotes would pair up
        ('text\tlabel\n"so" he said\ta\n', '"so" he said'),
    ],
)
def test_quotes_in_a_tsv_hold_fields_together_only_where_they_pair_up_in_each_row(tmp_path, text, found):
    (tmp_path / "a.tsv").write_text(text)
    assert next(iter(read_file(tmp_path / "a.tsv").rows)) == {"text": found, "label": "a"}


def test_classes_of_hugging_face_data_sets_have_their_names(tmp_path):
    import pyarrow
    import pyarrow.parquet

    features = {"label": {"names": ["x", "y"], "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    features["tags"] = {"feature": features["label"], "_type": "List"}
    table = pyarrow.table({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], None]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet").rows) == [
        {"text": "a", "label": "y", "tags": ["x", "y"]},
        {"text": "b", "label": None, "tags": None},
    ]


@pytest.mark.parametrize(
    ("texts", "classes", "says"),
    [([b"a", b"\xff", b"c"], [0, 1, 0], "a text that is not UTF-8"), ([b"a", b"b", b"c"], [0, 2, 1], "has no name")],
)
def test_a_bad_row_of_parquet_is_named_or_left_out(model, tmp_path, texts, classes, says):
    import pyarrow
    from pyarrow import parquet

    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y"]}}}}
    strings = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": strings, "label": classes})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "a.parquet")
    for read in COMMANDS.values():
        with pytest.raises(DataError, match=rf"a\.parquet, row 2: .*{says}"):
            read(data(tmp_path / "a.parquet"), model)
        assert len(read(data(tmp_path / "a.parquet", skip_bad_rows=True), model)) == 2


def test_without_pyarrow_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackage, match=r"kdexport\[parquet\]"):
        read_file(tmp_path / "a.parquet")


def test_columns_are_those_of_flags_then_the_artifacts_then_obvious_ones(tmp_path):
    (tmp_path / "a.csv").write_text("sentence1,sentence2,body,text,kind\na,b,c,d,e\n")
    source, known = read_file(tmp_path / "a.csv"), {"text": "body", "label": "kind"}

    def chosen(known=None, labels="none", **flags):
        return choose_columns(source, data("a.csv", **flags), TextClassification, labels, known)

    assert chosen(known) == {"text": "body"}
    assert chosen(known, "some") == {"text": "body", "label": "kind"}
    assert chosen() == {"text": "sentence1", "text_pair": "sentence2"}
    assert chosen({"text": "absent", "text_pair": "body"}) == {"text": "sentence1", "text_pair": "sentence2"}
    assert chosen(known, text="text") == {"text": "text"}
    assert chosen(known, text="text", text_pair="body") == {"text": "text", "text_pair": "body"}


def test_images_of_a_folder_a_table_and_parquet_are_read_by_all_commands(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    model = small.pack(small.configs()["image"], tmp_path / "small")
    folder = tmp_path / "shirts"
    for i, kind in enumerate("ab"):
        (folder / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / kind / "x.png")
    paths = [str(folder / kind / "x.png") for kind in "ab"]
    (folder / "table.csv").write_text("image,label\na/x.png,a\nb/x.png,b\n")
    (folder / "list.txt").write_text("\n".join(paths))
    content = [Path(path).read_bytes() for path in paths]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": one, "path": None} for one in content], "label": ["a", "b"]}),
        folder / "bytes.parquet",
    )
    task = load_task(model)
    for name, images in (("", paths), ("table.csv", paths), ("list.txt", paths), ("bytes.parquet", content)):
        given = data(folder / name)
        predicted = list(to_answer(read_test(given), given, task, {}))
        assert [row["asked"] for row in predicted] == images
        assert [row["image"] for row in export_model.read_rows(given, type(task))[0]] == images
        rows = bench.read_texts(given, [], str(model))
        assert [bytes_of(row["image"]) for row in rows] == content
        assert [row["label"] for row in rows] == ([None, None] if name == "list.txt" else ["a", "b"])
        if name != "list.txt":
            assert [row["image"] for row in to_rows(read_test(given), given, type(task)).rows] == images


def test_names_of_columns_in_capitals_are_recognised_and_exact_ones_come_first(tmp_path):
    (tmp_path / "a.csv").write_text("Id,Text,Category\n1,one,x\n2,two,y\n")
    (tmp_path / "b.csv").write_text("Text,text,label\none,three,x\ntwo,four,y\n")
    for name, texts in (("a.csv", ["one", "two"]), ("b.csv", ["three", "four"])):
        given = data(tmp_path / name)
        rows = to_rows(read_test(given), given, TextClassification).rows
        assert [(row["text"], row["label"]) for row in rows] == list(zip(texts, "xy", strict=True))


def test_plain_texts_are_words_to_tag_where_nobody_needs_tags(tmp_path):
    (tmp_path / "a.txt").write_text("Ada, in York\n")
    given = data(tmp_path / "a.txt")
    assert to_rows(read_test(given), given, TokenClassification, "none")[0][0]["text"] == "Ada , in York"


def test_a_folder_gives_its_test_split_and_a_mistyped_one_is_no_hub_id(tmp_path, capfd):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{split},a\n")
    assert list(read_test(data(tmp_path)).rows) == [{"text": "test", "label": "a"}]
    assert "the test split is taken" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"tset does not exist"):
        local_files(data(tmp_path / "tset"))


def test_lines_of_stdin_come_one_by_one_and_bytes_that_are_no_utf8_are_named(model):
    lines = iter([b"\xef\xbb\xbfone\r\n", b"\n", "two\u2028\x0c\x85 halves\n".encode(), b"caf\xe9\n"])
    source, asked = read_stream(lines), []
    answers = to_answer(source, data("stdin"), load_task(model), {})
    for _ in range(3):
        asked.append(next(answers)["asked"])
    assert asked == ["one", "", "two\u2028\x0c\x85 halves"]
    with pytest.raises(DataError, match="stdin, line 4: byte 0xe9 is not UTF-8"):
        next(answers)
    assert list(read_stream(io.BytesIO(b"")).rows) == []


def test_predict_takes_the_columns_that_the_artifact_remembers_and_flags_override_them(tmp_path):
    folder = small.pack(small.configs()["text"], tmp_path / "small")
    manifest = json.loads((folder / artifact.MANIFEST).read_bytes()) | {"columns": {"text": "a", "text_pair": "b"}}
    (folder / artifact.MANIFEST).write_text(json.dumps(artifact.sealed(manifest)))
    (tmp_path / "t.csv").write_text("a,b,c\none,two,three\n,,\n")

    def predict(*flags):
        command = [sys.executable, "-m", "kdexport", "predict", folder, "--file", tmp_path / "t.csv", *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    assert predict() == [["one", "two"], ""]
    assert predict("--text", "c") == ["three", ""]
