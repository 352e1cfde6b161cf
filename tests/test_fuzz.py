"""What reads strangers' bytes, fuzzed for ten seconds each; `make fuzz` does it for an hour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["images", "sound", "bodies", "tensors", "manifests", "specs"])
def test_no_bytes_are_answered_by_a_fault_or_cost_too_much(target):
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 only")
    found = subprocess.run(
        [sys.executable, str(FUZZ), target, "--seconds", "10"], capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert f"{target}: ok" in found.stdout
