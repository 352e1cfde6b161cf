"""The records of a teacher that was asked for the labels of some texts: a language model behind an endpoint."""

import msgspec

from kdexport.results.measured import Metric


class Alike(msgspec.Struct, frozen=True):
    """Two labels between which the teacher hesitates, or changes with the order of options, and in how many rows."""

    first: str
    second: str
    rows: int


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """How far the teacher's answers can be trusted; without labelled rows only what needs no label is known.

    `accuracy` is on the labelled rows that were asked first, `by_words` that of the same rows asked by the labels' own
    words. `temperature` divides its logits, fitted on these rows (Guo et al. 2017); `ece_before` and `ece_after` are
    the expected calibration errors without and with one, fitted on one half of the rows and measured on the other.
    `same_in_another_order` is the fraction of rows with the same best label when the options change places. `position`
    is a sentence on options that are taken for their place, empty where there are none. `mass` is the mean probability
    of all labels together.
    """

    accuracy: Metric | None = None
    by_words: Metric | None = None
    temperature: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    same_in_another_order: Metric | None = None
    position: str = ""
    alike: list[Alike] = []
    mass: float | None = None


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """After one round: the texts of train with answers, and how well a quick first student does on validation rows.

    `chosen` texts are those of which it was unsure, the other ones random. `agreement` is with the teacher;
    `random_agreement` is that of the same student on the random texts alone, for comparison at fewer texts.
    """

    chosen: int
    random: int
    agreement: float
    random_agreement: float | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """How a language model behind an endpoint was asked, what it cost, and what its answers are worth.

    `host` is that of its URL; `by` is letters, words, scores or samples; `abilities` says in a line what the server
    can do. `texts` are those with an answer, by split; `pool` are the texts of train, with and without; `guessed`
    ones were labelled by a first student that is sure of them. `sent` calls were answered by the server and
    `cached` ones by an earlier run's; `tokens_in` and `tokens_out` are of both, by the server's own count.
    `refused` texts have no answer as the model declined, `unparsable` ones as none was a label; `shortened` ones
    were longer than the model reads; `failed` calls had errors to the end, `retries` are repeated ones. `price` is
    of a million tokens in and out. `p50_ms` and `p99_ms` are latencies of the calls, as many at once as were sent.
    `stopped` says why no more was asked; `not_known` are sentences on what this run can't tell.
    """

    model: str
    host: str
    by: str
    abilities: str = ""
    orders: int = 1
    texts: dict[str, int]
    pool: int
    guessed: int = 0
    sent: int
    cached: int
    tokens_in: int
    tokens_out: int
    price: tuple[float, float] | None = None
    retries: int = 0
    failed: int = 0
    refused: int = 0
    unparsable: int = 0
    shortened: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    rounds: list[Round] = []
    stopped: str = ""
    not_known: list[str] = []
    trust: Trust = Trust()

    def cost(self) -> float | None:
        """Return the price of all answers, those of an earlier run included; None without prices."""
        if self.price is None:
            return None
        return (self.tokens_in * self.price[0] + self.tokens_out * self.price[1]) / 1e6

    def cost_of_million(self) -> float | None:
        """Return the price of a million texts asked in this way."""
        spent, texts = self.cost(), sum(self.texts.values())
        return None if spent is None or not texts else 1e6 * spent / texts
