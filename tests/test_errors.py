"""Errors of other libraries, as one line."""

import re
from pathlib import Path

import pytest

import kdexport
from kdexport.errors import counted, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb\n"), "a"),
        (ValueError("\n  a  \nb"), "a"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_an_error_has_a_first_line_even_without_a_message(error, line):
    assert first_line(error) == line


def test_one_is_one_and_the_rest_are_many():
    assert [counted(n, "text") for n in (0, 1, 2000)] == ["0 texts", "1 text", "2,000 texts"]
    assert counted(1, "class", "classes") == "1 class"
    assert counted(2, "class", "classes") == "2 classes"


def test_no_text_has_a_plural_in_brackets():
    package = Path(kdexport.__file__).parent
    places = [*package.rglob("*.py"), *package.rglob("*.j2")]
    plural = re.compile(r"\b(core|thread|round|row|text|label|file|epoch|warning|request)\(s\)")
    assert [path.name for path in places if plural.search(path.read_text())] == []


def test_no_module_takes_the_line_of_an_error_by_itself():
    """An empty message has none."""
    own = re.compile(r"str\(error\).*splitlines\(\)")
    package = Path(kdexport.__file__).parent
    found = {path.name for path in package.rglob("*.py") if own.search(path.read_text())}
    assert found == {"errors.py"}
