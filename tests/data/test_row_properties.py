"""Rows on disk are a list of the same rows, whatever letters they hold and however they are taken apart."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from kdexport.data.rows import Rows, copy_rows, write_rows

# Letters that some reader of lines or of JSON takes for an end, and any others; JSON has no lone surrogates.
TEXTS = st.text(
    st.sampled_from('\n\r\u2028\u2029\x85\x0b\x0c\x1c\0"\\\ufeff') | st.characters(exclude_categories=["Cs"])
)
NAMES = TEXTS.filter(lambda name: name not in ("image", "audio"))
VALUES = st.none() | TEXTS | st.integers(-(2**53), 2**53) | st.lists(TEXTS, max_size=2)
ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=3), max_size=8)


@given(ROWS, ROWS, st.data())
def test_rows_are_a_list_however_they_are_taken_apart(tmp_path, first, second, data):
    rows = write_rows(tmp_path, "first", iter(first)) + write_rows(tmp_path, "second", second)
    plain = first + second
    for _ in range(3):
        assert len(rows) == len(plain)
        assert list(rows) == plain
        kind = data.draw(st.sampled_from(["slice", "take", "add", "where", "pickle", "copy"]))
        if kind == "slice":
            some = data.draw(st.slices(len(plain)))
            rows, plain = rows[some], plain[some]
        elif kind == "take":
            places = data.draw(st.lists(st.integers(-len(plain), len(plain) - 1), max_size=6)) if plain else []
            rows, plain = rows.take(places), [plain[i] for i in places]
        elif kind == "add":
            rows, plain = rows + rows[::-1], plain + plain[::-1]
        elif kind == "where":
            rows, plain = rows.where(lambda row: len(row) > 1), [row for row in plain if len(row) > 1]
        elif kind == "pickle":
            rows = pickle.loads(pickle.dumps(rows))
        else:
            rows = copy_rows(tmp_path, f"copy-{data.draw(st.uuids())}", rows)
    assert list(rows) == plain
    for i in range(-len(plain), len(plain)):
        assert rows[i] == plain[i]


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=6))
def test_bytes_of_rows_come_back_by_place_and_length(tmp_path, contents):
    (tmp_path / "media.blob").unlink(missing_ok=True)
    rows = write_rows(tmp_path, "media", [{"image": content} for content in contents])
    for row, content in zip(rows, contents, strict=True):
        name, _, span = row["image"].rpartition("#")
        start, _, length = span.partition("+")
        with open(name, "rb") as file:  # noqa: PTH123
            file.seek(int(start))
            assert file.read(int(length)) == content
    assert list(Rows(tmp_path / "media.jsonl")) == list(rows)
