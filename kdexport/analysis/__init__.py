"""Data and answers looked at: near duplicates, evidence for a difference, what confidence gives away."""

import random


def sampled(n: int, most: int = 5000) -> list[int]:
    """Return the places of at most `most` of n rows, ascending; always the same ones for the same n.

    Drawn, and not each k-th: files may have an order, such as classes that take turns.
    """
    return sorted(random.Random(0).sample(range(n), min(n, most)))


def shortened(text: str, most: int) -> str:
    """Return a text on one line, of about `most` characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most].rstrip()} …"
