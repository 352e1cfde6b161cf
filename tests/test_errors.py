"""Errors of other libraries, as one line."""

import re
from pathlib import Path

import pytest

import kdexport
from kdexport.errors import first_line


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


def test_no_module_takes_the_line_of_an_error_by_itself():
    """An empty message has none."""
    own = re.compile(r"str\(error\).*splitlines\(\)")
    package = Path(kdexport.__file__).parent
    found = {path.name for path in package.rglob("*.py") if own.search(path.read_text())}
    assert found == {"errors.py"}
