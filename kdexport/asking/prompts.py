"""Build the prompts that ask a language model for a text's labels, and read probabilities from its replies.

The options are listed in one of a few orders, picked by the text's content: their places favour no label over all
texts, and a server can still reuse what it computed for a prompt's beginning, as few beginnings there are.
"""

import hashlib
import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import product, zip_longest
from typing import Any

import numpy as np

from kdexport.asking.abilities import Abilities
from kdexport.asking.client import Call, Failed, Reply
from kdexport.asking.reading import (
    Reading,
    by_samples,
    by_scores,
    by_tokens,
    choices_of,
    failure,
    said_label,
    said_labels,
    text_of,
)
from kdexport.spec.ask import Ask
from kdexport.tasks.config import Row
from kdexport.tasks.metrics import log_softmax
from kdexport.tasks.several import BETWEEN

# I is no letter of an option: answers such as "I'm sorry" begin with it.
_LETTERS = [letter for letter in string.ascii_uppercase if letter != "I"]
# Two letters that are one token with and without a space, to GPT-2 and SmolLM2 at least: a first one, then second ones.
_PAIRS = (
    "AABCDEFGHIKLMNPRSTUVW BABCDEILMOPRSTUY CABCDEFGHILMNOPRSTUV DABCDEFHILMNOPRST EACDEFGLMNPRSTUVX FACDEILMOPRST "
    "GABCDEHILMNOPRSTW HACDEFILOPRST IABCDEFGILMNOPRSTUVX JCDOS KBES LACDEGILMOPST MABCDEHILMNOPRSTWY "
    "NACDEFGHILMOPRSTVWY OBCDFHKMNPRSTW PACDEFGHIKLMOPRSTU QU RABCDEFGHILMNOPRST SABCDEFHIKLMNOPRSTUWY "
    "TABCEFHILMOPRSTVWX UCIKNPRSTVX VAIMORST WACEHRSW XXY Y Z"
)
_ORDERS = 16
# Tokens of an answer: a letter may follow a line break or a mark, a word is told from others by its first few.
_FOR_LETTERS, _FOR_WORDS = 3, 8
_YES_NO = ("Yes", "No")


def codes(count: int) -> list[str]:
    """Return the letters of so many options: one each, or two where there are too few.

    Two are one token as far as they can be. Where they are not, few of them share the first: it alone is surely known.
    """
    if count <= len(_LETTERS):
        return _LETTERS[:count]
    in_turn = zip_longest(*([group[0] + second for second in group[1:]] for group in _PAIRS.split()))
    known = [pair for pairs in in_turn for pair in pairs if pair]
    every = (first + second for second, first in product(string.ascii_uppercase, repeat=2))
    return [*known, *(pair for pair in every if pair not in known)][:count]


class Questions:
    """The calls that ask for the labels of a text, and what their replies say."""

    def __init__(
        self,
        model: str,
        labels: Mapping[str, str],
        how: Ask,
        by: str,
        *,
        several: bool,
        examples: Sequence[Row],
        abilities: Abilities,
    ) -> None:
        self._model, self._how, self._by, self._several = model, how, by, several
        self._labels, self._names = list(labels), [" ".join(label.split()) for label in labels]
        self._about = [" ".join(about.split()) for about in labels.values()]
        self._codes, self._examples, self._abilities = codes(len(labels)), examples, abilities
        self._orders = _orders(len(labels))
        # Answers to a call: all at once, or a call each, every one with another order of the options.
        self._each = 1 if by != "samples" or abilities.n else how.samples

    def of(self, row: Row, order: int) -> list[Call]:
        """Return the calls that ask for a row's labels, with the options in the order of this number."""
        if self._by == "samples":
            return [self._sample(row, order * self._each + i) for i in range(self._each)]
        if self._by == "scores":
            return [self._scored(prompt, text) for prompt, texts in self._prompts(row, order) for text in texts]
        if self._several:
            return [self._yes_or_no(row, c, order) for c in range(len(self._names))]
        return [self._one(row, order)]

    def read(self, row: Row, order: int, replies: Sequence[Reply | Failed]) -> Reading:
        """Return what the replies to these calls say of the row's labels."""
        if self._by == "samples":
            return self._read_samples(row, order, replies)
        if self._by == "scores":
            asked, rest = self._prompts(row, order), iter(replies)
            parts = [by_scores([next(rest) for _ in texts], prompt, texts) for prompt, texts in asked]
        elif self._several:
            parts = [by_tokens(reply, _YES_NO, fold=True) for reply in replies]
        else:
            options = self._options(self.places(row, order))
            parts = [by_tokens(replies[0], options, fold=self._by == "words")]
        for part in parts:
            if part.logits is None:
                return part
        if self._several:
            logits = np.array([part.logits[0] - part.logits[1] for part in parts if part.logits is not None])
            return Reading(logits.astype(np.float32), sum(part.mass for part in parts) / len(parts), "", parts[0].said)
        return parts[0]._replace(logits=self._in_order_of_labels(row, order, parts[0]))

    # --- one label of all

    def _one(self, row: Row, order: int) -> Call:
        listed = self.places(row, order)
        options = dict(zip(listed, self._options(listed), strict=True))
        tokens = _FOR_WORDS if self._by == "words" else _FOR_LETTERS + len(self._codes[0]) - 1
        return self._chat(
            self._head(listed, "name" if self._by == "words" else "letters"),
            lambda example: options[self._of_example(example)[0]],
            row, tokens, more=self._log_probabilities(),
        )  # fmt: skip

    def _options(self, listed: Sequence[int]) -> list[str]:
        """Return the answers that stand for the labels, in the order of the list."""
        return [self._names[c] for c in listed] if self._by == "words" else self._codes

    def _head(self, listed: Sequence[int], answer: str) -> str:
        """Return the instruction, the options, and what to answer."""
        lettered = [f"{code}) " for code in self._codes] if answer != "name" else ["- "] * len(listed)
        lines = [mark + self._described(c) for mark, c in zip(lettered, listed, strict=True)]
        return f"{self._instruction()}\n\n{chr(10).join(lines)}\n\n{self._what_to_answer(answer)}"

    def _instruction(self) -> str:
        every = "Choose all labels that fit the text." if self._several else "Choose the label that fits the text."
        return self._how.instruction.strip() if self._how.instruction else every

    def _what_to_answer(self, answer: str) -> str:
        noun = "letter" if len(self._codes[0]) == 1 else "two letters"
        if answer == "name":
            return "Answer with the name of one label, and nothing else."
        if self._abilities.constrained == "json_schema" and self._by == "samples":
            shape = '{"labels": [letters of all that fit]}' if self._several else f'{{"label": {noun} of one}}'
            return f"Answer in JSON: {shape}"
        if self._several:
            return "Answer with the letters of all labels that fit, with commas between, or with the word none."
        return f"Answer with the {noun} of one label, and nothing else."

    def _in_order_of_labels(self, row: Row, order: int, part: Reading) -> Any:
        logits = np.empty(len(self._names), dtype=np.float32)
        listed = [*range(len(self._names))] if self._by == "scores" else self.places(row, order)
        logits[listed] = part.logits
        return log_softmax(logits)

    # --- each label by itself

    def _yes_or_no(self, row: Row, label: int, order: int) -> Call:
        return self._chat(
            self._head_of_one(label, order), self._fits(label), row, _FOR_LETTERS, more=self._log_probabilities()
        )

    def _fits(self, label: int) -> Callable[[Row], str]:
        """Return what says whether a label is one of an example's."""
        return lambda example: _YES_NO[label not in self._of_example(example)]

    def _head_of_one(self, label: int, order: int) -> str:
        words = "Yes or No" if order % 2 == 0 else "No or Yes"
        question = f"Does this label fit the text? {self._described(label)}"
        return "\n\n".join(filter(None, (self._how.instruction, question, f"Answer with {words}, and nothing else.")))

    # --- whole labels after a prompt

    def _prompts(self, row: Row, order: int) -> list[tuple[str, list[str]]]:
        """Return each prompt, and the texts that are scored after it; their end counts, as one may begin another."""
        if not self._several:
            head = self._head(self.places(row, order), "name")
            answers = [f" {name}\n" for name in self._names]
            return [(self._plain(head, lambda e: self._names[self._of_example(e)[0]], row), answers)]
        answers = [f" {word}\n" for word in _YES_NO]
        every = range(len(self._names))
        return [(self._plain(self._head_of_one(c, order), self._fits(c), row), answers) for c in every]

    def _plain(self, head: str, answer: Callable[[Row], str], row: Row) -> str:
        shown = [f"{_shown(example)}\nAnswer: {answer(example)}" for example in self._examples]
        return "\n\n".join([head, *shown, f"{_shown(row)}\nAnswer:"])

    def _scored(self, prompt: str, text: str) -> Call:
        body = {"prompt": prompt + text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        return Call("/completions", {"model": self._model} | body)

    # --- several answers

    def _sample(self, row: Row, order: int) -> Call:
        listed, held = self.places(row, order), self._abilities.held_to(self._codes, several=self._several)
        code_of = dict(zip(listed, self._codes, strict=True))
        in_json = self._abilities.constrained == "json_schema"

        def answer(example: Row) -> str:
            fit = sorted(code_of[c] for c in self._of_example(example))
            if self._several:
                return json.dumps({"labels": fit}) if in_json else ", ".join(fit) or "none"
            return json.dumps({"label": fit[0]}) if in_json else fit[0]

        more = held | ({"n": self._how.samples} if self._abilities.n and self._how.samples > 1 else {"seed": order})
        tokens = 16 + 8 * len(self._codes) if self._several else 24
        return self._chat(self._head(listed, "letters"), answer, row, tokens, temperature=0.7, more=more)

    def _read_samples(self, row: Row, order: int, replies: Sequence[Reply | Failed]) -> Reading:
        answers, chosen = [], []
        for i, reply in enumerate(replies):
            listed = self.places(row, order * self._each + i)
            names = [self._names[c] for c in listed]
            for choice in choices_of(reply) if isinstance(reply, Reply) else []:
                one, said = None if self._several else said_label(text_of(choice), self._codes, names), None
                if self._several:
                    said = said_labels(text_of(choice), self._codes, names)
                elif one is not None:
                    said = {one}
                answers.append(choice)
                chosen.append(None if said is None else {listed[c] for c in said})
        if not answers:
            failed = next((reply for reply in replies if isinstance(reply, Failed)), None)
            return failure(failed) if failed else Reading(None, 0.0, "unparsable", "")
        return by_samples(answers, chosen, len(self._names), several=self._several)

    # --- what all of them share

    def _chat(
        self,
        head: str,
        answer: Callable[[Row], str],
        row: Row,
        tokens: int,
        *,
        temperature: float = 0.0,
        more: Mapping[str, Any],
    ) -> Call:
        messages = [{"role": "system", "content": head}]
        for example in self._examples:
            messages.append({"role": "user", "content": _shown(example)})
            messages.append({"role": "assistant", "content": answer(example)})
        messages.append({"role": "user", "content": _shown(row)})
        body = self._abilities.body(messages, tokens, temperature)
        return Call("/chat/completions", {"model": self._model} | body | dict(more))

    def _log_probabilities(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self._abilities.top}

    def _described(self, label: int) -> str:
        return " – ".join(filter(None, (self._names[label], self._about[label])))

    def _of_example(self, example: Row) -> list[int]:
        return [self._labels.index(label) for label in example["label"].split(BETWEEN) if label]

    def places(self, row: Row, number: int) -> list[int]:
        """Return the labels in the order in which they are listed; two numbers that follow are each other's reverse."""
        content = f"{row['text']}\x1f{row.get('text_pair') or ''}".encode()
        first = int.from_bytes(hashlib.sha256(content).digest()[:4], "big")
        pair, reverse = first // 2 + number // 2, (first + number) % 2
        return self._orders[pair % (_ORDERS // 2)][:: -1 if reverse else 1]


def _orders(count: int) -> list[list[int]]:
    return [random.Random(i).sample(range(count), count) for i in range(_ORDERS // 2)]


def _shown(row: Row) -> str:
    """Return a text, or a pair of them, as a message shows it."""
    if row.get("text_pair") is None:
        return f"Text: {row['text']}"
    return f"First text: {row['text']}\nSecond text: {row['text_pair']}"
