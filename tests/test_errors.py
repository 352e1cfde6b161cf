"""Errors are one line, whatever was raised."""

import pytest

from kdexport.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n  a  \nb"), "a"),
        (ValueError(""), "ValueError"),
        (RuntimeError(), "RuntimeError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_an_error_has_a_first_line_even_where_its_message_is_empty(error, line):
    assert first_line(error) == line
