"""Words of texts in any script."""

import re
from functools import cache
from itertools import islice
from unicodedata import category

# Scripts without blanks between words, where a character stands for one: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@cache
def pattern(between: str, others: str = "") -> re.Pattern[str]:
    """Return the pattern of a word: letters and digits with their combining marks, and one of `between` between them.

    `others` is a pattern of further words.
    """
    # `\w` has neither combining marks nor the joiners within words of Hindi and Persian.
    marks = "\u200c\u200d" + "".join(c for c in map(chr, range(0x300, 0x1F000)) if category(c)[0] == "M")
    letters = rf"[^\W{_SINGLE}]+(?:[{marks}]+[^\W{_SINGLE}]*)*"
    return re.compile(rf"{letters}(?:[{between}]{letters})*|[{_SINGLE}][{marks}]*{others}")


def words_in(text: str, most: int | None = None) -> list[str]:
    """Split a text into words, or its first `most`; punctuation marks are words of their own."""
    return [found[0] for found in islice(pattern(".’'-", r"|[^\w\s]").finditer(text), most)]
