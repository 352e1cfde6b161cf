"""Change the package in one place at a time, and see whether its tests notice: `make mutants`.

Each mutant is a fork of a process that has torch and pytest loaded: so it takes seconds, and no file is changed. A
survivor is a change that no test of its module's few notices: a missing test, or a change without an effect. Results go
to `benchmarks/results/mutants.json`; there `why` is written by hand, and stays when the same mutant survives again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
TESTS = {
    "distill/losses.py": [
        "distill/test_losses.py",
        "tasks/test_speech.py::test_ctc_is_the_sum_over_paths",
        "tasks/test_speech.py::test_rows_without_a_transcript_teach_nothing_and_weigh",
        "tasks/test_speech.py::test_a_teacher_teaches_its_text_whatever_its_steps",
        "distill/test_loss_properties.py",
    ],
    "distill/targets.py": ["data/test_rows.py", "distill/test_target_properties.py"],
    "distill/store.py": ["distill/test_store.py", "distill/test_target_properties.py"],
    "tasks/metrics.py": ["tasks/test_metrics.py", "tasks/test_metric_properties.py"],
    "tasks/packed.py": ["tasks/test_packed_properties.py", "data/test_rows.py"],
    "runtime/artifact.py": ["runtime/test_manifest.py"],
}
_SECONDS = 120  # more than any of them takes; a mutant that loops is killed by it
_SWAPPED: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """Yield node, field and new value of each change (`not x` becomes None); types and texts are left alone."""
    types = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    of_types = {part for one in types if one for part in ast.walk(one)}
    for node in ast.walk(tree):
        if node in of_types:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
            yield node, "ops", [_SWAPPED[type(node.ops[0])](), *node.ops[1:]]
        elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPPED:
            yield node, "op", _SWAPPED[type(node.op)]()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, "op", ast.UAdd() if isinstance(node.op, ast.USub) else None
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            yield node, "value", not value if isinstance(value, bool) else 0 if value == 1 else value + 1
        elif isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
            yield node, "value", ast.Constant(None)


def mutant(source: str, i: int) -> tuple[ast.Module, dict[str, Any]] | None:
    """Return the i-th mutant of a source, and its line before and after."""
    tree = ast.parse(source)
    found = next((change for at, change in enumerate(places(tree)) if at == i), None)
    if found is None:
        return None
    node, field, value = found
    statement = next(one for one in reversed([*ast.walk(tree)]) if isinstance(one, ast.stmt) and node in ast.walk(one))
    was = ast.unparse(statement).splitlines()
    if value is None:  # `not x` → `x`, in the node's own place
        node.__class__, node.op, node.values = ast.BoolOp, ast.Or(), [node.operand, node.operand]  # type: ignore
    else:
        setattr(node, field, value)
    became = ast.unparse(statement).splitlines()
    changed = [(a, b) for a, b in zip(was, became, strict=False) if a != b] or [(was[0], became[0])]
    facts = {"line": node.lineno, "was": changed[0][0].strip(), "became": changed[0][1].strip()}  # type: ignore
    return ast.fix_missing_locations(tree), facts


def passes(path: Path, tree: ast.Module, tests: list[str]) -> bool:
    """Run tests in a fork where the module is this tree."""
    with tempfile.TemporaryDirectory(prefix="kdexport-mutants-") as folder:
        child = os.fork()
        if not child:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            tempfile.tempdir = folder
            plain, code = SourceFileLoader.get_code, compile(tree, str(path), "exec")
            SourceFileLoader.get_code = lambda self, name: code if self.path == str(path) else plain(self, name)
            os._exit(int(_pytest(folder, tests)))
        ends = time.monotonic() + _SECONDS
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def _pytest(folder: str, tests: list[str]) -> int:
    import pytest

    plain = ["-x", "-q", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-m"]
    quiet = ["not slow", "-W", "ignore::pytest.PytestAssertRewriteWarning", "--hypothesis-profile", "mutants"]
    return pytest.main([*plain, *quiet, f"--basetemp={folder}/base", *(str(ROOT / "tests" / test) for test in tests)])


def judge(module: str, most: int, known: dict[str, Any], again: bool) -> dict[str, Any]:
    """Return how many mutants of a module its tests notice, and the survivors; `again`: try only those `known`."""
    path = ROOT / "kdexport" / module
    source, tests = path.read_text(), TESTS[module]
    assert passes(path, ast.parse(source), tests), f"the tests of {module} fail without any change"
    every = len([*places(ast.parse(source))])
    chosen = sorted(random.Random(0).sample(range(every), min(most, every)))
    lived = {(one["was"], one["became"]): one for one in known.get("survivors", [])}
    survivors = []
    for at, i in enumerate(chosen, 1):
        tree, facts = mutant(source, i)  # type: ignore[misc]
        before = lived.get((facts["was"], facts["became"]), {})
        if again and not before:
            continue
        if lives := passes(path, tree, tests):
            survivors.append(facts | ({"why": before["why"]} if "why" in before else {}))
        print(f"{module} {at}/{len(chosen)} {'LIVES' if lives else 'killed'} {facts}", flush=True)
    killed = len(chosen) - len(survivors)
    found = {"places": every, "mutants": len(chosen), "killed": killed, "share": round(killed / len(chosen), 3)}
    return found | {"tests": tests, "survivors": survivors}


def main() -> None:
    """Judge the modules that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=[*TESTS], help=f"of {', '.join(TESTS)}; all")
    parser.add_argument("--most", type=int, default=10_000, help="mutants of each module, drawn by a fixed seed")
    parser.add_argument("--again", action="store_true", help="only the survivors of the results, after new tests")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    import hypothesis
    import pytest
    import scipy.stats
    import sklearn.metrics
    import torch
    import transformers

    del pytest, scipy, sklearn, torch, transformers  # for the forks
    hypothesis.settings.register_profile(
        "mutants", max_examples=40, deadline=None, derandomize=True, database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )  # fmt: skip
    for module in asked.modules:
        found = judge(module, asked.most, _read().get(module, {}), asked.again)
        results = {name: found if name == module else one for name, one in ({module: found} | _read()).items()}
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False) + "\n")


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
