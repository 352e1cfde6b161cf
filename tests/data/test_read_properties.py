"""Files of rows: what the usual writers write comes back, and any bytes give rows, reasons, or one DataError."""

import csv
import io
import json

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from kdexport.data.read import SUFFIXES, read_file
from kdexport.errors import DataError

NAMES = st.text("abcxyzé漢", min_size=1, max_size=4)
ODD = st.sampled_from("\"',;\t|\\#\ufeff\u2028\x85\x0b\x1c")
LETTERS = ODD | st.characters(exclude_categories=["Cs", "Cc"])
LINES = st.text(LETTERS, max_size=12)
TEXTS = st.text(LETTERS | st.sampled_from("\r\n"), max_size=12)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Z"]), min_size=1, max_size=6)


def tables(values, least=1, most=3):
    """Columns, and rows of as many values."""
    columns = st.lists(NAMES, min_size=least, max_size=most, unique=True)
    return columns.flatmap(
        lambda names: st.tuples(
            st.just(names), st.lists(st.lists(values, min_size=len(names), max_size=len(names)), max_size=5)
        )
    )


def rows_of(path):
    source = read_file(path)
    return source.columns, list(source.rows)


def dicts(columns, rows):
    return [dict(zip(columns, row, strict=True)) for row in rows]


# --- what is written comes back


@given(tables(TEXTS), st.sampled_from([",", ";", "\t"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_csv_of_pythons_writer_comes_back(tmp_path, table, delimiter, encoding):
    columns, rows = table
    assume(delimiter == "," or len(columns) > 1)  # the header tells which it is
    with (tmp_path / "a.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
    assert rows_of(tmp_path / "a.csv") == (columns, dicts(columns, rows))


@given(tables(LINES | st.just("two\nlines")), st.booleans())
def test_csv_of_pandas_comes_back_with_and_without_its_index(tmp_path, table, index):
    columns, rows = table
    pd.DataFrame(rows, columns=columns, dtype=str).to_csv(tmp_path / "a.csv", index=index)
    assert rows_of(tmp_path / "a.csv") == (columns, dicts(columns, rows))


@given(tables(st.text(LETTERS.filter(lambda letter: letter != "\t"), max_size=12), least=2))
def test_tsv_of_pythons_writer_comes_back(tmp_path, table):
    columns, rows = table
    with (tmp_path / "a.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    assert rows_of(tmp_path / "a.tsv") == (columns, dicts(columns, rows))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXTS, JSON, max_size=3), min_size=1, max_size=5)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.sampled_from(["utf-8", "utf-16"]))
def test_json_comes_back_as_an_array_and_by_line(tmp_path, rows, ascii_, indent, encoding):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    array = json.dumps(rows, ensure_ascii=ascii_, indent=indent)
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_) for row in rows)
    for name, content in (("a.json", array), ("b.jsonl", array), ("c.jsonl", lines), ("d.json", lines + "\n\n")):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert rows_of(tmp_path / name) == (columns, rows)


@given(tables(TEXTS), st.lists(st.integers() | st.none(), min_size=5, max_size=5))
def test_parquet_comes_back(tmp_path, table, numbers):
    columns, rows = table
    found = [row | {"n": n % 2**31 if n else n, "l": list(row)} for row, n in zip(dicts(columns, rows), numbers)]  # noqa: B905
    assume(found)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == (list(found[0]), found)


@given(st.lists(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), max_size=4), st.sampled_from([" ", "\t_ "]))
def test_conll_comes_back(tmp_path, texts, between):
    assume(not any(word == "-DOCSTART-" for text in texts for word, _ in text))
    content = "-DOCSTART- -X- O O\n\n" + "\n".join(
        "".join(f"{word}{between}{tag}\n" for word, tag in text) for text in texts
    )
    (tmp_path / "a.conll").write_text(content, encoding="utf-8")
    columns, rows = rows_of(tmp_path / "a.conll")
    assert columns == ["tokens", "tags"]
    assert [list(zip(row["tokens"], row["tags"], strict=True)) for row in rows] == texts


@given(st.lists(LINES, min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_a_text_a_line_comes_back(tmp_path, lines, end):
    assume(not lines[0].startswith("\ufeff"))
    content = "".join(line + end for line in lines)
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert rows_of(tmp_path / "a.txt") == (["text"], [{"text": line} for line in lines])
    (whole,) = read_file(tmp_path / "a.txt", whole=True).rows
    assert whole == {"text": content}


# --- any bytes at all

PIECES = [
    b"a,b\n",
    b"a\tb\n",
    b'"',
    b'""',
    b"\n",
    b"\r",
    b"\0",
    b"[",
    b"]",
    b"{",
    b"}",
    b'{"a": 1}\n',
    b":",
    b",",
    b"\t",
]
PIECES += [b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xd8", b"O", b" ", b"1e999", b"NaN", b"\\ud800", b"PAR1"]
BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=12).map(b"".join)


def read_or_refused(path):
    """Read a file whole; its rows are rows or reasons, and an error is one line."""
    try:
        source = read_file(path)
        rows = list(source.rows)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert all(isinstance(row, dict | str) for row in rows)
    assert all(isinstance(column, str) for column in source.columns)
    assert not any("\n" in row for row in rows if isinstance(row, str))


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@given(content=BYTES)
@example(content=b"[" * 100_000)
@example(content=b'{"a": ' * 100_000)
def test_any_bytes_are_rows_or_one_error(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    read_or_refused(path)


def parquet(metadata=None):
    table = pyarrow.table({"text": ["one", "two"], "label": [0, 1], "many": [[1], [0, 1]]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), file, compression="none")
    return file.getvalue()


PLAIN = parquet()


@effort(max_examples=80)
@given(st.integers(4, len(PLAIN) - 9), st.integers(1, 255))
def test_a_damaged_parquet_file_is_rows_or_one_error(tmp_path, at, change):
    content = bytearray(PLAIN)
    content[at] ^= change
    (tmp_path / "a.parquet").write_bytes(content)
    read_or_refused(tmp_path / "a.parquet")


CLASS = {"_type": "ClassLabel", "names": ["x"]}


@given(JSON | st.sampled_from([CLASS, [CLASS], [], {"feature": CLASS}, CLASS | {"names": None}, CLASS | {"names": {}}]))
def test_any_features_of_hugging_face_in_a_parquet_file_are_rows_or_one_error(tmp_path, feature):
    for metadata in (
        json.dumps({"info": {"features": {"text": feature, "label": feature, "many": feature}}}),
        json.dumps({"info": feature}),
        json.dumps(feature),
        f"{json.dumps(feature)}}}",
    ):
        (tmp_path / "a.parquet").write_bytes(parquet({"huggingface": metadata}))
        read_or_refused(tmp_path / "a.parquet")
