"""A language model behind an endpoint as a function of rows, within limits of calls and tokens."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdexport import spec
from kdexport.asking.abilities import choose_by, probe
from kdexport.asking.answers import Answers
from kdexport.asking.client import Endpoint, Failed, Reply
from kdexport.asking.prompts import Questions
from kdexport.asking.reading import Reading
from kdexport.errors import EndpointError, SpecError, counted
from kdexport.progress import bar, say
from kdexport.spec.teachers import Address
from kdexport.tasks.metrics import Array, log_softmax

Row = Mapping[str, Any]

_CHUNK = 256  # texts, between looks at the limits
_HALVINGS = 3  # of a text that is longer than the model reads
_LOOK = 50  # texts, of which most must have an answer that can be read
_CHARACTERS_A_TOKEN = 4.0
_OUT_OF_CALLS = Reading(None, 0.0, "out of calls", "")


class Asker:
    """Asks, reads, counts and stops at the limits; identical questions are answered by the cache."""

    def __init__(self, address: Address, how: spec.Ask, labels: Mapping[str, str], *, several: bool) -> None:
        self.how, self.labels, self.several = how, labels, several
        self.model, self.url = address
        self.endpoint = Endpoint(
            address, os.environ.get(how.key) or None, store=Answers(), concurrency=how.concurrency,
            timeout_s=how.timeout_s,
        )  # fmt: skip
        self.abilities = probe(self.endpoint, address.model)
        self.endpoint.counts.failed = 0  # probes of what the server lacks
        if how.max_tokens is not None and not any(self.tokens):
            raise SpecError("teacher.ask.max_tokens: the server counts no tokens", "Set --max-calls alone")
        say(f"teacher: {address.model}: {self.abilities.line()}")
        self.by, remark = choose_by(how, labels, self.abilities)
        if remark:
            say(f"teacher: {remark}")
        self.problems: Counter[str] = Counter()
        self.mass: list[float] = []
        self.seconds: list[float] = []
        self.shortened = 0
        self._texts, self._expected = 0, 0.0
        self.show(())

    def show(self, examples: Sequence[Row]) -> None:
        """Put these labelled rows into every prompt."""
        self.questions = self._questions(self.by, examples)
        self._examples = examples

    def _questions(self, by: str, examples: Sequence[Row]) -> Questions:
        return Questions(
            self.model, self.labels, self.how, by, several=self.several, examples=examples,
            abilities=self.abilities,
        )  # fmt: skip

    # --- limits

    @property
    def calls(self) -> int:
        """The answers that were paid for, those of an earlier run included."""
        return self.endpoint.counts.sent + self.endpoint.counts.cached

    @property
    def tokens(self) -> tuple[int, int]:
        """The tokens in and out of these answers."""
        counts = self.endpoint.counts
        return counts.tokens_in + counts.cached_tokens_in, counts.tokens_out + counts.cached_tokens_out

    def mean_mass(self) -> float | None:
        """Return the mean probability of all labels together; None where there is no answer yet."""
        return float(np.mean(self.mass)) if self.mass else None

    def place_of(self, row: Row, label: int) -> int:
        """Return the place in the list of options, from 0, in which a text's first question has a label."""
        return self.questions.places(row, 0).index(label)

    def calls_a_text(self, row: Row) -> int:
        """Return the calls that a text takes in all orders."""
        return len(self.questions.of(row, 0)) * self.how.orders

    def affordable(self, row: Row, *more: Row) -> int:
        """Return the number of texts like these for which calls are left, and tokens as far as they are known."""
        left = [10**9]
        if self.how.max_calls is not None:
            left.append((self.how.max_calls - self.calls) // self.calls_a_text(row))
        if self.how.max_tokens is not None:
            spent = sum(self.tokens)
            each = spent / self._texts if self._texts else sum(self.tokens_a_text([row, *more]))
            left.append(int((self.how.max_tokens - spent) / max(each, 1)))
        return max(0, min(left))

    def tokens_a_text(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Estimate the tokens of a text, in and out, from the length of its prompts."""
        calls = [call for row in rows for call in self.questions.of(row, 0)]
        characters = sum(len(str(call.body.get("messages") or call.body.get("prompt"))) for call in calls)
        most = self.abilities.limit
        out = sum(call.body.get(most, call.body.get("max_tokens", 8)) * call.body.get("n", 1) for call in calls)
        scale = self.how.orders / max(len(rows), 1)
        return characters / _CHARACTERS_A_TOKEN * scale, out * scale

    def price(self, tokens_in: float, tokens_out: float) -> float | None:
        """Return the price of these tokens, where one is given."""
        return (tokens_in * self.how.price[0] + tokens_out * self.how.price[1]) / 1e6 if self.how.price else None

    # --- answers

    def read(self, rows: Sequence[Row], title: str = "ask") -> list[Reading]:
        """Return the answer to each row, the mean over the orders of options; texts beyond the limits have none."""
        found: list[Reading] = []
        with bar(title, len(rows) * (self.calls_a_text(rows[0]) if rows else 0)) as advance:
            while len(found) < len(rows):
                chunk = self._chunk(rows[len(found) : len(found) + (_CHUNK if self._texts else _LOOK)])
                if not chunk:
                    found += [_OUT_OF_CALLS] * (len(rows) - len(found))
                    break
                readings = self._answers(chunk, range(self.how.orders), advance)
                self._count(readings)
                found += readings
        return found

    def _chunk(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the first rows within the limits; as tokens are estimates, only half of those left are used."""
        rows = rows[: self.affordable(rows[0])]
        if self.how.max_tokens is None:
            return rows
        spent = sum(self.tokens)
        scale, left = spent / self._expected if self._expected else 1.0, self.how.max_tokens - spent
        expected = np.cumsum([sum(self.tokens_a_text([row])) for row in rows])
        fit = int((expected * scale <= left / 2).sum()) or int(expected[:1].sum() * scale <= left)
        self._expected += float(expected[:fit].max(initial=0.0))
        return rows[:fit]

    def in_another_order(self, rows: Sequence[Row]) -> list[Reading]:
        """Return the answers to rows with their options in an order that `read` does not use."""
        return self._answers(rows[: self.affordable(rows[0]) if rows else 0], [self.how.orders])

    def by_words(self, rows: Sequence[Row]) -> list[Reading]:
        """Return the answers to rows in the labels' own words, where letters are asked for otherwise."""
        asked, self.questions = self.questions, self._questions("words", self._examples)
        found = self._answers(rows[: self.affordable(rows[0])], [0])
        self.questions = asked
        return found

    def _answers(
        self, rows: Sequence[Row], orders: Sequence[int], advance: Callable[[int], None] = lambda _: None
    ) -> list[Reading]:
        questions = [(row, order) for row in rows for order in orders]
        readings, k = self._asked(questions, advance), len(orders)
        return [_mean(readings[i * k : (i + 1) * k], several=self.several) for i in range(len(rows))]

    def _asked(self, questions: Sequence[tuple[Row, int]], advance: Callable[[int], None]) -> list[Reading]:
        """Return the answer to each row and order; a text that is too long is asked again by its first half."""
        readings: dict[int, Reading] = {}
        waiting = dict(enumerate(questions))
        for _ in range(_HALVINGS + 1):
            calls = {i: self.questions.of(*question) for i, question in waiting.items()}
            replies = iter(self.endpoint.send([call for some in calls.values() for call in some], advance))
            got: dict[int, list[Reply | Failed]] = {i: [next(replies) for _ in some] for i, some in calls.items()}
            self.seconds += [one.seconds for some in got.values() for one in some if isinstance(one, Reply)]
            readings |= {i: self.questions.read(*waiting[i], some) for i, some in got.items()}
            long = [i for i, some in got.items() if any(isinstance(one, Failed) and one.too_long for one in some)]
            if long and self.how.max_calls is not None:  # some calls of a long text may have been answered
                long = long[: max(0, self.how.max_calls - self.calls) // len(next(iter(calls.values())))]
            if not long:
                break
            self.shortened += len(long) if len(waiting) == len(questions) else 0
            waiting = {i: (_half(waiting[i][0]), waiting[i][1]) for i in long}
        return [readings[i] for i in range(len(questions))]

    def _count(self, readings: Sequence[Reading]) -> None:
        """Count answers; raise EndpointError where most of the first ones can't be read."""
        self._texts += len(readings)
        self.mass += [one.mass for one in readings if one.logits is not None]
        self.problems += Counter(one.why for one in readings if one.logits is None)
        bad = self.problems.total()
        if self._texts >= _LOOK and 2 * bad > self._texts:
            (why, _), *_ = self.problems.most_common(1)
            said = next((one.said for one in readings if one.logits is None and one.said), "")
            what = (
                f"{bad} of the first {counted(self._texts, 'text')} have no answer that can be read ({why}: {said!r})"
            )
            raise EndpointError(what, "Set teacher.ask.instruction, or another way to read: teacher.ask.by")


def _half(row: Row) -> Row:
    return {**row, **{side: row[side][: len(row[side]) // 2] for side in ("text", "text_pair") if row.get(side)}}


def _mean(readings: Sequence[Reading], *, several: bool) -> Reading:
    """Return the geometric mean over orders: what a place in the list adds to a logit is in each label's mean alike."""
    answered = [one for one in readings if one.logits is not None]
    if not answered:
        return readings[0]
    logits: Array = np.mean([one.logits for one in answered if one.logits is not None], axis=0)
    mass = float(np.mean([one.mass for one in answered]))
    return Reading((logits if several else log_softmax(logits)).astype(np.float32), mass, "", answered[0].said)
