"""Errors of other libraries, as one line."""

import pytest

from kdexport.errors import first_line, last_line


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (ValueError("a\nb\n"), "a", "b"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError(" \n"), "OSError", "OSError"),
    ],
)
def test_an_error_has_a_line_even_without_a_message(error, first, last):
    assert (first_line(error), last_line(error)) == (first, last)
