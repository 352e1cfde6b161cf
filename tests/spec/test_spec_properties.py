"""Any tree of keys and values is a spec or one SpecError, and a spec that is dumped is read back as it was."""

from typing import get_args

from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from kdexport import spec
from kdexport.cli.options import parse_sets
from kdexport.errors import SpecError
from kdexport.spec.read import parse_bench, read_yaml
from kdexport.spec.sections import Augmentation, Device, LossName, Precision, Problem, Runtime
from kdexport.tasks import names

MINIMAL = {"data.train": "a.csv", "teacher.model": "./t"}
KNOWN = [*get_args(LossName), *get_args(Precision), *get_args(Augmentation), *get_args(Problem), *get_args(Runtime)]
KNOWN += [*get_args(Device), *names(), "tiny", "mini", "layers:2", "spread:3", "4x192", "gru:1", "a.csv", "t/whisper"]
# What YAML reads as something else than a text, or not at all, unless it is quoted.
ODD = ["", " ", "2e-4", "1e5", "-1E+5", "null", "~", "yes", "0x10", "0o7", "1_0", "2024-01-01", "1:30", "<<", "="]
ODD += ["- a", "a: b", "#", "'", '"', "\0", "\x85", "\u2028", "\ufeff", "\U0001f600", "a\nb", "\t", "{", "[", "*a", "@"]
TEXTS = st.sampled_from(KNOWN) | st.sampled_from(ODD) | st.text(max_size=8)
ENDS = st.sampled_from(["from", "to"])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 8, 64, 0.5, 1e-5, 2**31, 2**63, 1e300, float("inf"), float("nan")])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS | st.integers() | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | ENDS, inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(list(spec.settings())) | st.text(max_size=6)
TREES = st.recursive(
    VALUES, lambda inner: st.dictionaries(KEYS.map(lambda key: key.split(".")[0]), inner, max_size=4), max_leaves=6
)


def one_line(call):
    """The result of a call, or None for a SpecError of one line."""
    try:
        return call()
    except SpecError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None


def assert_comes_back(found):
    for text in (spec.dump(found), spec.commented(found)):
        assert spec.parse(read_yaml(text, "dumped"), "dumped") == found


@effort(max_examples=150)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values_of_settings_are_a_spec_or_one_error(overrides):
    found = one_line(lambda: spec.load(None, MINIMAL | overrides))
    if found:
        assert_comes_back(found)


@effort(max_examples=150)
@given(TREES)
def test_any_tree_is_a_spec_or_one_error(tree):
    one_line(lambda: spec.parse(tree, "x"))
    if isinstance(tree, dict):
        one_line(lambda: spec.parse({"data": {"train": "a"}, "teacher": {"model": "t"}} | tree, "x"))
        one_line(lambda: parse_bench(tree))


# One value for each setting that takes it, so that many a spec is a whole one.
GOOD = {
    "seed": st.integers(0, 2**31),
    "data.test": TEXTS,
    "data.text": TEXTS,
    "data.unlabelled": TEXTS,
    "data.language": TEXTS,
    "teacher.model": TEXTS | st.lists(TEXTS, min_size=1, max_size=2),
    "student.model": st.sampled_from(["tiny", "mini", "2x128", "layers:2", ["tiny", "mini"]]),
    "student.tokenizer": TEXTS,
    "distill.alpha": st.floats(0, 1),
    "distill.loss": st.sampled_from([*get_args(LossName), {"kl": 1, "mse": 0.5}, {"kl": {"from": 1, "to": 0}}]),
    "distill.temperature": st.floats(0.01, 100) | st.just({"from": 4, "to": 1.5}),
    "export.variants": st.lists(st.sampled_from(get_args(Precision)), min_size=1, max_size=3),
    "budget.max_p99_ms": st.floats(1e-3, 1e6),
}


@effort(max_examples=150)
@given(st.fixed_dictionaries({}, optional=GOOD))
@example({"teacher.model": "2e-4"})
@example({"data.train": "1e5", "data.text": "=", "data.test": "2024-01-01"})
@example({"teacher.model": "a\0b"})
def test_what_is_dumped_is_read_back(overrides):
    found = one_line(lambda: spec.load(None, MINIMAL | overrides))
    if found:
        assert_comes_back(found)


@given(st.lists(st.tuples(KEYS, TEXTS).map("=".join) | TEXTS, max_size=3))
def test_any_flags_are_a_spec_or_one_error(flags):
    one_line(lambda: spec.load(None, MINIMAL | parse_sets(flags)))
