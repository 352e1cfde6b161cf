"""Ask an endpoint in an order that wastes little: labelled rows first, then those that judge, then those that teach.

What teaches is a random first part, and then in rounds the texts of which a committee of quick first students is
unsure, next to random ones, until the calls are used up or the students learn nothing more.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.asking.answered import Answered
from kdexport.asking.asker import Asker
from kdexport.asking.trust import trust_of, try_out
from kdexport.data.rows import Row, Rows
from kdexport.errors import SpecError, counted
from kdexport.progress import say
from kdexport.results.asked import Asked, Point
from kdexport.spec import derive
from kdexport.spec.teachers import address_of, named
from kdexport.tasks.base import Task
from kdexport.tasks.metrics import Array

# Shares of the texts that can be asked: those that judge, and those that stop training and draw the curve.
_TEST, _VALIDATION = 0.15, 0.1
_LEAST_TEST, _LEAST_VALIDATION = 100, 50
_TRIED = 100  # labelled rows on which a teacher is tried first
_TWICE = 50  # texts that are asked in a second order of the options
_POOL = 20_000  # texts to choose from at most, or four times those that can be asked
_RANDOM = 0.25  # share of random texts in a round
_EXAMPLES = 8


class Taught(NamedTuple):
    """The rows that teach, the first student's score over their number, and why no more were asked."""

    rows: list[Row]
    chosen: list[Point]
    random: list[Point]
    stopped: str


def ask_in_rounds(
    settings: spec.Spec, task: Task, splits: Mapping[str, Rows], pool: Rows, corrected: Mapping[str, str]
) -> tuple[dict[str, Sequence[Row]], Answered, Asked]:
    """Return the answered rows of each split, the answers, and the record of how they came about.

    Raises:
        ModelError: the teacher is near chance on labelled rows.
        EndpointError: the endpoint can't be reached or used, or its answers can't be read.
    """
    how, address = settings.teacher.ask or spec.Ask(), address_of(named(settings)[0])
    described = settings.data.labels
    labels = {label: described[label] if isinstance(described, dict) else "" for label in task.labels}
    asker = Asker(address, how, labels, several=task.function == "sigmoid", seed=settings.seed)
    examples = _examples(how, task, pool)
    asker.show(examples)
    shown = {task.content(row) for row in examples}
    pool = pool.where(lambda row: task.content(row) not in shown)
    found = Answered(task, corrected, asker.read)
    texts = _estimate(asker, [*splits["test"], *splits["validation"], *pool])
    share = {
        "test": max(_LEAST_TEST, int(_TEST * texts)),
        "validation": max(_LEAST_VALIDATION, int(_VALIDATION * texts)),
    }
    judging = {split: splits[split].take(sampled(len(splits[split]), most)) for split, most in share.items()}
    with_label = [row for rows in (*judging.values(), pool) for row in rows if row["label"] is not None]
    try_out(asker, task, found, found.of(with_label[:_TRIED], "ask labelled rows"))
    taken: dict[str, Sequence[Row]] = {split: found.of(rows, f"ask {split}") for split, rows in judging.items()}
    known = [row for row in with_label if task.content(row) in found.logits]
    again = asker.in_another_order(taken["test"][:_TWICE])
    trusted = trust_of(task, found, known, taken["test"][:_TWICE], again)
    found.temperature = trusted.temperature or 1.0
    taught = _teach(settings, task, asker, found, pool, taken["validation"])
    taken["train"] = taught.rows
    return taken, found, asker.record(trusted, taught)


def _examples(how: spec.Ask, task: Task, pool: Rows) -> list[Row]:
    """Return labelled rows of train to show in each prompt, as many of each label as of another."""
    most = min(len(task.labels), _EXAMPLES) if how.examples is None else how.examples
    by_label: dict[str, list[Row]] = {}
    for row in pool:
        if row["label"] is not None:
            by_label.setdefault(row["label"], []).append(row)
    turns = (row for rows in zip(*(_cycled(rows, most) for _, rows in sorted(by_label.items()))) for row in rows)
    return [row for row in turns if row][:most]


def _cycled(rows: list[Row], most: int) -> list[Row | None]:
    return [*rows[:most], *[None] * (most - len(rows))]


def _estimate(asker: Asker, rows: Sequence[Row]) -> int:
    """Print what the answers will cost at most, and return how many texts can be asked."""
    some = [rows[i] for i in sampled(len(rows), 50)]
    texts = min(asker.affordable(some[0]), len(rows))
    if texts < _LEAST_TEST + _LEAST_VALIDATION + _LEAST_TEST:
        least = (_LEAST_TEST + _LEAST_VALIDATION + _LEAST_TEST) * asker.calls_a_text(some[0])
        what = f"teacher.ask: the limits allow answers to {counted(texts, 'text')}, and judging and teaching need more"
        raise SpecError(what, f"Raise --max-calls to {least:,} at least")
    tokens_in, tokens_out = (texts * each for each in asker.tokens_a_text(some))
    price = asker.price(tokens_in, tokens_out)
    cost = "" if price is None else f", for {price:.2f} at the price given"
    calls = f"{texts * asker.calls_a_text(some[0]):,} calls for {texts:,} of {len(rows):,} texts"
    say(f"teacher: at most {calls}: about {tokens_in:,.0f} tokens in and {tokens_out:,.0f} out{cost}")
    return texts


def _teach(
    settings: spec.Spec, task: Task, asker: Asker, found: Answered, pool: Rows, validation: Sequence[Row]
) -> Taught:
    """Ask the texts of the pool that teach most, as far as the calls go."""
    order = np.random.default_rng(settings.seed).permutation(len(pool))
    budget = asker.affordable(pool[0]) if len(pool) else 0
    if budget >= len(pool):
        rows = found.of(pool.take(order), "ask train")
        return Taught(rows, [], [], "every text was asked")
    from kdexport.asking.choose import Committee, first_and_step, is_flat, next_places, vectors

    candidates = pool.take(order[: max(_POOL, 4 * budget)])
    base, length = derive.base(settings), settings.data.max_length or type(task).usual_length
    with tempfile.TemporaryDirectory() as work:
        x = vectors(base, [*candidates, *validation], length, Path(work) / "base")
    x, x_validation = x[: len(candidates)], x[len(candidates) :]
    contents = [task.content(row) for row in candidates]
    first, step = first_and_step(budget, len(candidates))
    tried, at_random = set(range(first)), set(range(first))
    found.of(candidates[:first], "ask train")
    draw = np.random.default_rng(settings.seed)
    share = 1.0 if asker.how.choose == "random" else _RANDOM
    chosen, random = list[Point](), list[Point]()

    def fitted(places: Sequence[int]) -> Committee:
        own = [candidates[i] for i in places]
        return Committee(task.function, settings.seed).fit(x[places], task.scores(found.array(own)))

    def score(committee: Committee) -> float:
        return _score(task, committee.probabilities(x_validation).mean(axis=0), found.array(validation), validation)

    while True:
        answered = [i for i, content in enumerate(contents) if content in found.logits]
        committee = fitted(answered)
        chosen.append(Point(len(answered), score(committee)))
        own = [i for i in answered if i in at_random]
        random.append(chosen[-1] if len(own) == len(answered) else Point(len(own), score(fitted(own))))
        say(f"asked: {len(answered):,} texts of train; a first student's score on validation is {chosen[-1].score:.1%}")
        left = asker.affordable(candidates[0])
        if left <= 0 or len(tried) == len(candidates):
            return Taught([candidates[i] for i in answered], chosen, random, "the limit of calls was reached")
        if is_flat([point.score for point in chosen]):
            return Taught([candidates[i] for i in answered], chosen, random, "the first student learned nothing more")
        open_ = [i for i in range(len(candidates)) if i not in tried and contents[i] not in found.logits]
        by_doubt, by_chance = next_places(committee, x[open_], min(step, left, len(open_)), share, draw)
        new = [open_[i] for i in (*by_doubt, *by_chance)]
        at_random |= {open_[i] for i in by_chance}
        tried |= set(new)
        found.of([candidates[i] for i in new], "ask train")


def _score(task: Task, probabilities: Array, teacher: Array, rows: Sequence[Row]) -> float:
    """Return the first student's metric on labelled rows, or its agreement with the teacher on others."""
    logits = np.log(np.maximum(probabilities, 1e-9))
    if task.function == "sigmoid":
        logits = logits - np.log(np.maximum(1 - probabilities, 1e-9))
    judged_by = judged(task, rows, teacher)
    return metric(judged_by, logits, rows)
