"""What sections of a spec are made of, and the section on a language model that is asked."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One block of the spec."""


def helped(text: str) -> Meta:
    """Return the help of a setting."""
    return Meta(description=text)


def some(text: str) -> Meta:
    """Return the help of a list that must not be empty."""
    return Meta(description=text, min_length=1)


class Ask(Section, frozen=True):
    """How a language model behind an endpoint is asked for the labels of texts."""

    instruction: Annotated[
        Text | None, helped("what the labels are about, in a sentence or a page; stands before them in each prompt")
    ] = None
    examples: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        helped(
            "labelled rows of train that each prompt shows; when absent one a label, at most 8, where there are any"
        ),
    ] = None
    by: Annotated[
        Literal["letters", "words", "scores", "samples"] | None,
        helped(
            "how probabilities are read: of the letters of options, of the labels' own words, of whole labels scored "
            "one by one, or from several answers; when absent letters, or samples where the server gives no "
            "log-probabilities"
        ),
    ] = None
    orders: Annotated[
        Count, helped("orders of the options in which each text is asked, a call each; the mean is its answer")
    ] = 1
    samples: Annotated[Count, helped("answers to each text, where `by` is samples")] = 5
    max_calls: Annotated[
        Count | None, helped("answers to pay for at most, those of an earlier run included; null: no limit")
    ] = 3_000
    max_tokens: Annotated[Count | None, helped("tokens in and out at most; absent: no limit")] = None
    choose: Annotated[
        Literal["unsure", "random"],
        helped("which texts: after a random first part those of which a first student is unsure, or random ones"),
    ] = "unsure"
    guess: Annotated[
        bool,
        helped("let the first student label texts that were not asked, where it is sure; students learn from them too"),
    ] = True
    key: Annotated[Text, helped("the environment variable that holds the key, if the server wants one")] = (
        "OPENAI_API_KEY"
    )
    concurrency: Annotated[Count, helped("calls at once, at most; fewer while the server says that it is busy")] = 8
    timeout_s: Annotated[Positive, helped("deadline of one call, in s")] = 60.0
    price: Annotated[
        tuple[Annotated[float, Meta(ge=0)], Annotated[float, Meta(ge=0)]] | None,
        helped("of a million tokens in, and of a million out, in any currency, for estimate and report"),
    ] = None
