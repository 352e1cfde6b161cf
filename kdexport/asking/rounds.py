"""Ask an endpoint in an order that wastes little: labelled rows first, then those that judge, then those that teach.

What teaches is a random first part, and then in rounds the texts of which a quick first student is unsure, next to
random ones, until the calls are used up or it learns nothing more.
"""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import numpy as np

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.asking import trust
from kdexport.asking.abilities import check_labels
from kdexport.asking.answered import Answered
from kdexport.asking.asker import Asker
from kdexport.asking.given import as_logits
from kdexport.data.rows import Row, Rows
from kdexport.data.sources import SPLITS
from kdexport.errors import ModelError, SpecError, counted
from kdexport.progress import say, warn
from kdexport.results import Asked, Round, Trust
from kdexport.spec.teachers import address_of, named, origin
from kdexport.tasks.base import Task
from kdexport.tasks.judging import near_chance
from kdexport.tasks.metrics import Array

# The least texts that judge, and their share of those that can be asked; validation stops training and asking.
_JUDGING = {"test": (100, 0.15), "validation": (50, 0.1)}
_LEAST = 250  # texts in all
_TRIED, _LEAST_TRIED = 100, 20  # labelled rows on which a teacher is tried first
_TO_FIT = 50  # labelled rows from which a temperature is fitted
_WORDS = 30  # labelled rows that a teacher near chance is asked by words as well
_STEADY = 0.8  # of answers that stay the same in another order
_TWICE = 50  # texts that are asked in a second order of the options
_POOL = 20_000  # texts to choose from at most, or four times those that can be asked
_RANDOM = 0.25  # share of random texts in a round
_EXAMPLES = 8


class Taught(NamedTuple):
    """The rows that teach, how well a first student did after each round, and why no more were asked."""

    rows: list[Row]
    rounds: list[Round]
    stopped: str
    guessed: Sequence[Row] = ()  # of the texts that were not asked those of which the first student is sure


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
    check_labels(labels)
    asker = Asker(address, how, labels, several=not task.one_label)
    examples = _examples(how, task, pool)
    asker.show(examples)
    shown = {task.content(row) for row in examples}
    pool = pool.where(lambda row: task.content(row) not in shown)
    found = Answered(task, corrected, asker.read)
    every = len(splits["test"]) + len(splits["validation"]) + len(pool)
    texts = _estimate(asker, [*splits["test"], *splits["validation"], *pool])

    def own(rows: Sequence[Row]) -> list[Row]:
        """Return rows that only the teacher answers: a person's corrections say nothing of it."""
        return [row for row in rows if task.content(row) not in corrected]

    judging = {
        split: rows if texts >= every else rows.take(sampled(len(rows), max(least, int(share * texts))))
        for split, (least, share) in _JUDGING.items()
        if (rows := splits[split])
    }
    labelled = [row for rows in (*judging.values(), pool) for row in own(rows) if row["label"] is not None]
    _try(asker, task, found, found.of(labelled[:_TRIED], "ask labelled rows"))
    taken: dict[str, Sequence[Row]] = {split: found.of(rows, f"ask {split}") for split, rows in judging.items()}
    tried = [row for row in labelled if task.content(row) in found.logits]
    trusted = _trust(asker, task, found, own(taken["test"]), tried)
    taught = _teach(settings, task, asker, found, pool, taken["validation"])
    found.temperature = trusted.temperature or 1.0  # after the first student, which learns less from softened answers
    taken |= {"train": taught.rows, "unlabelled": taught.guessed}
    return taken, found, _record(settings, asker, taken, len(pool), trusted, taught)


def _examples(how: spec.Ask, task: Task, pool: Rows) -> list[Row]:
    """Return labelled rows of train to show in each prompt, as many of each label as of another."""
    most = min(len(task.labels), _EXAMPLES) if how.examples is None else how.examples
    by_label: dict[str, list[Row]] = {}
    for row in pool:
        if row["label"] is not None:
            by_label.setdefault(row["label"], []).append(row)
    turns = zip_longest(*(rows[:most] for _, rows in sorted(by_label.items())))
    return [row for rows in turns for row in rows if row][:most]


def _estimate(asker: Asker, rows: Sequence[Row]) -> int:
    """Print what the answers will cost at most, and return how many texts can be asked."""
    some = [rows[i] for i in sampled(len(rows), 50)]
    texts = min(asker.affordable(*some), len(rows))
    if texts < min(_LEAST, len(rows)):
        least = min(_LEAST, len(rows))
        needed = least * asker.calls_a_text(some[0]) + asker.calls
        what = f"teacher.ask: the limits allow answers to {counted(texts, 'text')}, and judging and teaching need more"
        enough = asker.how.max_calls is None or asker.how.max_calls >= needed
        tokens = least * sum(asker.tokens_a_text(some)) + sum(asker.tokens)
        fix = f"--max-tokens to about {tokens:,.0f}" if enough else f"--max-calls to {needed:,} at least"
        raise SpecError(what, f"Raise {fix}")
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
        return Taught(found.of(pool.take(order), "ask train"), [], "every text was asked")
    from kdexport.asking.choose import FirstStudent, agreement, first_and_step, is_flat, next_places, sure_from, vectors

    candidates = pool.take(order[: max(_POOL, 4 * budget)])
    length = settings.data.max_length or type(task).usual_length
    with tempfile.TemporaryDirectory() as work:
        x = vectors(origin(settings), [*candidates, *validation], length, Path(work) / "base")
    x, x_validation = x[: len(candidates)], x[len(candidates) :]
    contents = [task.content(row) for row in candidates]
    first, step = first_and_step(budget, len(candidates))
    share = 1.0 if asker.how.choose == "random" else _RANDOM
    draw, judged_by = np.random.default_rng(settings.seed), found.array(validation)
    asked, at_random, rounds = set(range(first)), set(range(first)), list[Round]()
    found.of(candidates[:first], "ask train")

    def student(places: Sequence[int]) -> FirstStudent:
        own = found.array([candidates[i] for i in places])
        return FirstStudent(task.function).fit(x[places], task.scores(own))

    while True:
        answered = [i for i, content in enumerate(contents) if content in found.logits]
        by_chance = [i for i in answered if i in at_random]
        first_student = student(answered)
        score = agreement(first_student, x_validation, judged_by)
        alone = score if len(by_chance) == len(answered) else agreement(student(by_chance), x_validation, judged_by)
        chosen = len(answered) - len(by_chance)
        rounds.append(Round(chosen=chosen, random=len(by_chance), agreement=score, random_agreement=alone))
        say(f"asked: {len(answered):,} texts of train; a first student agrees on {score:.1%} of validation")
        left, rest = asker.affordable(candidates[0]), [i for i in range(len(candidates)) if i not in asked]
        if not left or not rest:
            stopped = "the limit was reached"
            break
        if is_flat([one.agreement for one in rounds], len(validation)):
            stopped = "a first student learned nothing more"
            break
        new = next_places(first_student, x[rest], min(step, left), share, draw)
        at_random |= {rest[i] for i in new.random}
        places = [rest[i] for i in (*new.chosen, *new.random)]
        asked |= {*places}
        found.of([candidates[i] for i in places], "ask train")
    sure = sure_from(first_student, x_validation, judged_by) if asker.how.guess else np.inf
    open_ = [i for i, content in enumerate(contents) if content not in found.logits and content not in found.unanswered]
    places = [i for i, doubt in zip(open_, first_student.doubt(x[open_]), strict=True) if 1 - doubt >= sure]
    for i, probabilities in zip(places, first_student.probabilities(x[places]), strict=True):
        found.guessed[contents[i]] = as_logits(probabilities, several=asker.several)
    if places:
        say(f"asked: the first student labels {counted(len(places), 'text')} more, of which it is sure")
    return Taught([candidates[i] for i in answered], rounds, stopped, [candidates[i] for i in places])


def _try(asker: Asker, task: Task, found: Answered, rows: Sequence[Row]) -> None:
    """Refuse a teacher that is near chance on labelled rows, naming the likely cause."""
    logits = found.array(rows)
    if len(rows) < _LEAST_TRIED or not near_chance(task, logits, rows):
        return
    right = trust.accuracy(task, logits, rows).value
    some, by_words = rows[:_WORDS], None
    if asker.by == "letters" and not asker.several and (answers := asker.by_words(some)):
        both = [(row, one.logits) for row, one in zip(some, answers, strict=False) if one.logits is not None]
        if both:
            by_words = trust.accuracy(task, np.stack([logits for _, logits in both]), [row for row, _ in both]).value
    twice = _twice(asker, task, found, some)
    why = trust.cause(
        task, logits, mass=asker.mean_mass(), asked_by=asker.by, right=right, right_by_words=by_words,
        same_in_another_order=trust.order_agreement(task, twice.first, twice.second).value if twice else None,
    )  # fmt: skip
    what = f"teacher {asker.model}: {task.metric.name} {task.metric.text(right)} on {len(rows)} labelled rows"
    raise ModelError(f"{what}, which is near chance", why)


class Twice(NamedTuple):
    """Rows that were asked in two orders of the options, with both answers [N, C]."""

    rows: list[Row]
    first: Array
    second: Array


def _twice(asker: Asker, task: Task, found: Answered, rows: Sequence[Row]) -> Twice | None:
    """Ask rows again with their options in another order; None where none of them has two answers."""
    again = asker.in_another_order(rows)
    both = [(row, one.logits) for row, one in zip(rows, again, strict=False) if one.logits is not None]
    if not both:
        return None
    own = [row for row, _ in both]
    return Twice(own, found.array(own), np.stack([logits for _, logits in both if logits is not None]))


def _trust(asker: Asker, task: Task, found: Answered, judging: Sequence[Row], labelled: Sequence[Row]) -> Trust:
    """Return what is known of the answers, and warn of what speaks against them."""
    known: dict[str, Any] = {"mass": asker.mean_mass()}
    if twice := _twice(asker, task, found, judging[:_TWICE]):
        same = trust.order_agreement(task, twice.first, twice.second)
        places = [
            asker.place_of(row, int(best)) for row, best in zip(twice.rows, twice.first.argmax(axis=1), strict=True)
        ]
        known |= {"same_in_another_order": same, "alike": trust.alike(task, twice.first, twice.second)}
        known |= {"position": trust.position_bias(np.array(places), len(task.labels)) if not asker.several else ""}
        if same.value < _STEADY:
            warn(
                f"teacher: {same.value:.0%} of {counted(len(twice.rows), 'text')} keep their answer when the options "
                "change places; the mean over several orders is steadier: --set teacher.ask.orders=4"
            )
        if known["position"]:
            warn(f"teacher: {known['position']}")
        for pair in known["alike"][:3]:
            both = f"{pair.first!r} and {pair.second!r} share {counted(pair.rows, 'text')}"
            warn(f"teacher: {both}; do they mean the same?")
    if labelled:
        logits, labels = found.array(labelled), cast(Any, task).label_array(labelled)
        known["accuracy"] = trust.accuracy(task, logits, labelled)
        if len(labelled) >= _TO_FIT:
            before, after = trust.calibration(logits, labels)
            temperature = trust.fitted_temperature(logits, labels)
            known |= {"temperature": temperature, "ece_before": before, "ece_after": after}
        found_ = known["accuracy"]
        low, high = (task.metric.text(side) for side in found_.ci95)
        say(
            f"teacher: {task.metric.name} {task.metric.text(found_.value)} [{low}–{high}] on "
            f"{counted(len(labelled), 'labelled row')}"
        )
    else:
        warn("teacher: no row has a label, so nobody knows how often it is right; 100 labelled rows would tell")
    return Trust(**known)


def _record(
    settings: spec.Spec, asker: Asker, taken: Mapping[str, Sequence[Row]], pool: int, trusted: Trust, taught: Taught
) -> Asked:
    counts = asker.endpoint.counts
    p50, p99 = (float(1e3 * np.percentile(asker.seconds, q)) for q in (50, 99)) if asker.seconds else (None, None)
    not_known = []
    if trusted.accuracy is None:
        not_known.append("How often the teacher is right: no row has a label, so all figures are agreement with it.")
    elif trusted.temperature is None:
        not_known.append(f"How sure its probabilities are to be taken: fewer than {_TO_FIT} rows have a label.")
    if asker.how.price is None:
        not_known.append("What the answers cost: teacher.ask.price gives the price of a million tokens in and out.")
    return Asked(
        model=asker.model, host=urlsplit(asker.url).netloc, by=asker.by, abilities=asker.abilities.line(),
        orders=asker.how.orders, calls_a_text=asker.calls_a_text(taken["test"][0]) if taken["test"] else 1,
        texts={split: len(taken[split]) for split in SPLITS}, pool=pool,
        guessed=len(taught.guessed),
        sent=counts.sent, cached=counts.cached, tokens_in=asker.tokens[0], tokens_out=asker.tokens[1],
        price=asker.how.price, retries=counts.retried, failed=counts.failed,
        refused=asker.problems["refusal"], unparsable=asker.problems["unparsable"],
        p50_ms=p50, p99_ms=p99, shortened=asker.shortened,
        rounds=taught.rounds, stopped=taught.stopped, not_known=not_known, trust=trusted,
    )  # fmt: skip
