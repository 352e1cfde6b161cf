"""Ask an endpoint about many texts: `python tests/endpoint_client.py URL STORE FIRST LAST [CONCURRENCY]`.

A process of its own, for tests that end it; it writes a dot for each call that was answered, and its counts at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from kdexport.asking.answers import Answers
from kdexport.asking.client import Call, Endpoint
from kdexport.spec.teachers import Address

HEAD = "Choose the label that fits the text.\n\nA) long\nB) short\n\nAnswer with the letter of one label."


def call(text: str, model: str = "encoder") -> Call:
    messages = [{"role": "system", "content": HEAD}, {"role": "user", "content": f"Text: {text}"}]
    more = {"temperature": 0, "max_tokens": 3, "logprobs": True, "top_logprobs": 20}
    return Call("/chat/completions", {"model": model, "messages": messages} | more)


def main() -> None:
    url, store, first, last, *concurrency = sys.argv[1:]
    endpoint = Endpoint(
        Address("encoder", url), None, store=Answers(Path(store)),
        concurrency=int(concurrency[0]) if concurrency else 8, timeout_s=2.0,
    )  # fmt: skip
    calls = [call(f"text {i}") for i in range(int(first), int(last))]
    endpoint.send(calls, lambda done: print("." * done, end="", flush=True))
    print(msgspec.json.encode(endpoint.counts).decode())


if __name__ == "__main__":
    main()
