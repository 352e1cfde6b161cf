"""Outputs of two programs that add the same numbers in another order."""

from __future__ import annotations

import numpy as np


def apart(found: object, expected: object) -> float:
    """The largest difference as a fraction of the largest expected value: rounding grows with the numbers."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
