"""A fine-tuned encoder behind OpenAI's protocol, in place of a language model: it is asked in words, and answers so.

`python tests/endpoint.py FOLDER --port 8000 --faults 0.2` serves a teacher's folder or an artifact, and prints the URL.
It reads labels and text out of the prompt as a language model would, gives log-probabilities of tokens, and has the
faults that servers have: refusals, full queues, broken connections, bodies that end in the middle. `GET /log` says what
was asked, and how often a whole answer went out.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
FAULTS = ("429", "503", "500", "reset", "truncated", "shape", "error-200", "timeout")
FILLERS = ["The", "\n", " A", "I", "This", "It", "Sure", "**", "Answer", ":", "Label", "Text", "a", "None", "-", '"']
REFUSAL = "I'm sorry, but I can't help with that."


@dataclass
class Ways:
    """How a server answers, and how it fails."""

    model: str = "encoder"
    key: str | None = None
    listed: bool = True  # GET /models
    logprobs: bool = True
    top: int = 20
    completions: bool = True
    echo: bool = True
    constrained: tuple[str, ...] = ("json_schema",)
    several: bool = True  # n answers to a call
    usage: bool = True  # it counts tokens
    context: int = 0  # tokens at most; 0: no limit
    latency: float = 0.0
    bias: float = 0.0  # added to the logit of the first option
    off: float = 0.02  # probability that is on no option
    sharpness: float = 1.0  # factor of the logits
    shift: int = 0  # each class gets the logit of another: a teacher that is wrong
    rates: dict[str, float] = field(default_factory=dict)  # by fault
    script: list[str] = field(default_factory=list)  # faults of the next calls; "" for none
    refusals: float = 0.0
    retry_after: str | None = "0.05"
    hold: float = 30.0  # of a time-out
    most: int = 0  # calls at once; more get 429
    seed: int = 0


class Encoder:
    """Labels, and the logits of rows, computed in batches and once for each text."""

    def __init__(self, labels: Sequence[str], logits: Callable[[list[Row]], Any], several: bool = False) -> None:
        self.labels, self.several = [" ".join(label.split()) for label in labels], several
        self.places = {label: c for c, label in enumerate(self.labels)}
        self._logits, self._known, self._lock = logits, dict[tuple[str, str | None], Any](), threading.Lock()

    @classmethod
    def of(cls, folder: Path) -> Encoder:
        """Open a teacher stage's folder, or an artifact."""
        from kdexport.tasks import load_task

        if any((folder / inner / "kdexport.json").is_file() for inner in ("", "artifact")):
            import kdexport

            found = kdexport.load(folder, threads=1)
            return cls(found.task.config.labels, found.logits, found.task.config.function == "sigmoid")
        from kdexport.models.inference import logits_of
        from kdexport.models.registry import open_to_read

        model, task = open_to_read(folder, "float32", all_devices=False), load_task(folder)
        return cls(task.config.labels, lambda rows: logits_of(model, task, rows), task.config.function == "sigmoid")

    def know(self, rows: Sequence[Row]) -> None:
        """Compute what is not known yet."""
        with self._lock:
            new = {key_of(row): row for row in rows if key_of(row) not in self._known}
            if new:
                self._known.update(zip(new, np.asarray(self._logits(list(new.values()))), strict=True))

    def of_row(self, row: Row) -> Any | None:
        return self._known.get(key_of(row))


def key_of(row: Row) -> tuple[str, str | None]:
    return row["text"], row.get("text_pair")


class Server:
    """The server, its counts, and its doors; `answers` is by text, `calls` by the whole request."""

    def __init__(self, encoder: Encoder, ways: Ways) -> None:
        self.encoder, self.ways, self.url = encoder, ways, ""
        self.answers, self.calls, self.faults = Counter[str](), Counter[str](), Counter[str]()
        self.requests, self.under_way, self.most_under_way = 0, 0, 0
        self.times: list[float] = []
        self._random = random.Random(ways.seed)
        self._waiting: list[tuple[Row, asyncio.Future[Any]]] = []
        self._ready: asyncio.Event | None = None
        self.end: Callable[[], object] = lambda: None

    async def serve(self, port: int, started: Callable[[], object] = lambda: None) -> None:
        self._ready = asyncio.Event()
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        self.end = lambda: loop.call_soon_threadsafe(task.cancel)
        thinking = asyncio.create_task(self._think())
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=2**24, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        started()
        try:
            await server.serve_forever()
        finally:
            thinking.cancel()

    async def _think(self) -> None:
        """Compute logits of all texts that wait, together."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            asked, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self.encoder.know, [row for row, _ in asked])
            except Exception as error:
                for _, future in asked:
                    future.set_exception(error)
                continue
            for row, future in asked:
                if not future.done():
                    future.set_result(self.encoder.of_row(row))

    async def _logits(self, row: Row) -> Any:
        if (known := self.encoder.of_row(row)) is None:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((row, future))
            self._ready.set()
            known = await future
        return np.roll(known, self.ways.shift) * self.ways.sharpness

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                content = await reader.readexactly(int(headers.get("content-length") or 0))
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    await self._request(reader, writer, method, path, headers, content)
                finally:
                    self.under_way -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            writer.close()

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str,
        headers: dict[str, str], content: bytes,
    ) -> None:  # fmt: skip
        ways = self.ways
        if path == "/log":
            log = {name: getattr(self, name) for name in ("requests", "faults", "answers", "calls", "most_under_way")}
            return await send(writer, 200, log)
        if ways.key is not None and headers.get("authorization") != f"Bearer {ways.key}":
            # Some servers tell which key it was.
            return await send(writer, 401, error(f"Incorrect API key provided: {headers.get('authorization')}"))
        if method == "GET" and path == "/v1/models" and ways.listed:
            return await send(writer, 200, {"object": "list", "data": [{"id": ways.model, "object": "model"}]})
        if method != "POST" or path not in ("/v1/chat/completions", "/v1/completions"):
            return await send(writer, 404, {"detail": "Not Found"})
        self.requests += 1
        self.times.append(time.monotonic())
        if fault := self._fault():
            self.faults[fault] += 1
            if await self._go_wrong(writer, fault):
                return None
        if ways.latency:
            await asyncio.sleep(ways.latency)
        body = json.loads(content)
        status, answer, text = await self._answer(path, body)
        if fault == "truncated":
            return await send(writer, status, answer, cut=True)
        if status == 200 and not (writer.is_closing() or reader.at_eof()):  # before, as who has it may look at once
            self.answers[text] += 1
            self.calls[hashlib.sha256(content).hexdigest()[:16]] += 1
        return await send(writer, status, answer | ({"request": headers} if fault == "repeats" else {}))

    def _fault(self) -> str:
        if self.ways.most and self.under_way > self.ways.most:
            return "429"
        if self.ways.script:
            return self.ways.script.pop(0)
        place = self._random.random()
        for name, rate in self.ways.rates.items():
            if place < rate:
                return name
            place -= rate
        return ""

    async def _go_wrong(self, writer: asyncio.StreamWriter, fault: str) -> bool:
        """Whether the fault was the whole answer."""
        after = {"Retry-After": self.ways.retry_after} if self.ways.retry_after else {}
        if fault == "429":
            await send(writer, 429, error("Rate limit reached"), after)
        elif fault == "quota":
            await send(writer, 429, error("You exceeded your current quota", "insufficient_quota"))
        elif fault == "503":
            await send(writer, 503, error("Loading model"), after)
        elif fault == "shape":
            await send(writer, 200, {"object": "chat.completion"})
        elif fault == "error-200":
            await send(writer, 200, error("Provider returned error"))
        elif fault == "not-json":
            await send(writer, 200, b"<html>Bad gateway</html>")
        elif fault == "huge":
            await send(writer, 200, b'"' + b"x" * (17 * 2**20) + b'"')
        elif fault == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            raise ConnectionResetError
        elif fault == "timeout":
            await asyncio.sleep(self.ways.hold)
            raise ConnectionResetError
        elif fault.isdigit():
            await send(writer, int(fault), error(f"An injected {fault}"), {"Location": "http://example.org/v1"})
        else:
            return False
        return True

    async def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any, str]:
        ways, chat = self.ways, path == "/v1/chat/completions"
        if body.get("model") != ways.model:
            return 404, error(f"The model `{body.get('model')}` does not exist", "model_not_found"), ""
        if not chat and not ways.completions:
            return 404, {"detail": "Not Found"}, ""
        prompt = "\n\n".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        used = len(tokens_of(prompt))
        if ways.context and used > ways.context:
            line = (
                f"This model's maximum context length is {ways.context} tokens. However, you requested {used} tokens."
            )
            return 400, error(line, "context_length_exceeded"), ""
        asked = (body.get("top_logprobs") if chat else body.get("logprobs")) or 0
        if asked > ways.top:
            return 400, error(f"Invalid top_logprobs: {asked}, must be at most {ways.top}"), ""
        row = row_of(body["messages"][-1]["content"] if chat else last_of(prompt))
        options = await self._options(prompt, row)
        if not chat and body.get("echo") and ways.echo:
            return 200, echoed(prompt, options, ways.off, used) | ({} if ways.usage else {"usage": None}), row["text"]
        wants = bool(body.get("logprobs")) and ways.logprobs
        n = int(body.get("n") or 1) if ways.several else 1
        choices = [self._choice(i, body, options, asked if wants else None, chat) for i in range(n)]
        words = sum(len(tokens_of(said)) for said, _ in choices)
        found = {
            "id": f"chatcmpl-{self.requests}", "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()), "model": ways.model, "choices": [choice for _, choice in choices],
            "usage": {"prompt_tokens": used, "completion_tokens": words, "total_tokens": used + words},
        }  # fmt: skip
        found |= {} if ways.usage else {"usage": None}
        return 200, found, row["text"]

    async def _options(self, prompt: str, row: Row) -> dict[str, float]:
        """What may be answered, with its logit."""
        if asked := re.findall(r"^Does this label fit the text\? (.+)$", prompt, re.M):
            logits = await self._logits(row)
            c = self._class_of(asked[-1])
            if c is None:
                return {"Yes": -8.0, "No": 0.0}
            rest = 0.0 if self.encoder.several else float(np.logaddexp.reduce(np.delete(logits, c)))
            return {"Yes": float(logits[c]) - rest, "No": 0.0}
        head, _, _ = prompt.partition("Text: " if "\nFirst text: " not in prompt else "First text: ")
        listed = re.findall(r"^([A-Z]{1,2})\) +(.+)$", head, re.M)
        listed = listed or [("", line) for line in re.findall(r"^- +(.+)$", head, re.M)]
        if not listed:
            return {"Paris": 3.0, "Lyon": 0.0}
        logits, found = await self._logits(row), dict[str, float]()
        for place, (code, line) in enumerate(listed):
            c = self._class_of(line)
            bias = self.ways.bias if place == 0 else 0.0
            said = code or (self.encoder.labels[c] if c is not None else line)
            found[said] = (float(logits[c]) if c is not None else -8.0) + bias
        return found

    def _class_of(self, line: str) -> int | None:
        places, line = self.encoder.places, line.strip()
        return places.get(line, places.get(line.partition(" – ")[0]))

    def _choice(
        self, i: int, body: dict[str, Any], options: dict[str, float], top: int | None, chat: bool
    ) -> tuple[str, dict[str, Any]]:
        held, wrap = held_to(body, self.ways.constrained)
        if held:
            options = {each: options.get(each, -8.0) for each in held}
        temperature = body.get("temperature", 1.0)
        by = random.Random(f"{body.get('seed')} {self._random.random()}")
        if wrap == "labels":
            said = [each for each, x in options.items() if by.random() < 1 / (1 + math.exp(-x))]
            answer, steps = json.dumps({"labels": said}), []
        else:
            answer = drawn(options, temperature, by)
            steps = steps_of(answer, options, 0.0 if held else self.ways.off)
            answer = json.dumps({"label": answer}) if wrap == "label" else answer
        if self._random.random() < self.ways.refusals:
            answer, steps = REFUSAL, steps_of("I", {"I": 0.0} | options, 0.0)[:1]
        logprobs = None
        if top is not None and wrap is None:
            logprobs = {"content": [position(said, found, top) for said, found in steps[: most_tokens(body)]]}
        shown = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
        return answer, {"index": i, **shown, "logprobs": logprobs, "finish_reason": "stop"}


def most_tokens(body: dict[str, Any]) -> int:
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)


def row_of(content: str) -> Row:
    """The text, or the pair of texts, of a message."""
    if content.startswith("First text: "):
        text, _, pair = content.removeprefix("First text: ").partition("\nSecond text: ")
        return {"text": text, "text_pair": pair}
    return {"text": content.removeprefix("Text: ")}


def last_of(prompt: str) -> str:
    """The last block of a plain prompt that begins like a message: those before it are examples."""
    before, _, _ = prompt.rpartition("\nAnswer:")
    starts = [*re.finditer(r"^(?:First text|Text): ", before, re.M)]
    return before[starts[-1].start() :] if starts else prompt


def held_to(body: dict[str, Any], ways: Sequence[str]) -> tuple[list[str], str | None]:
    """The only answers that a request allows, and the name of the JSON property that holds them."""
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema") or {}
    if "json_schema" in ways:
        for name, inner in (schema.get("properties") or {}).items():
            enum = inner.get("enum") or (inner.get("items") or {}).get("enum")
            return (enum, name if name in ("label", "labels") else "label") if enum else ([], None)
    if "guided_choice" in ways and body.get("guided_choice"):
        return body["guided_choice"], None
    if "grammar" in ways and body.get("grammar"):
        return [json.loads(each) for each in re.findall(r'"(?:[^"\\]|\\.)*"', body["grammar"])], None
    return [], None


@lru_cache(10_000)
def tokens_of(text: str) -> list[str]:
    """Letters of a code one by one; else words, with what stands before them."""
    return list(text) if re.fullmatch(r"[A-Z]{1,2}", text) else re.findall(r"\s?[^\W_]+|\s?[\W_]", text)


def drawn(options: dict[str, float], temperature: float, by: random.Random) -> str:
    if not temperature:
        return max(options, key=lambda each: options[each])
    x = np.array([*options.values()]) / temperature
    return by.choices([*options], np.exp(x - x.max()))[0]


def steps_of(answer: str, options: dict[str, float], off: float) -> list[tuple[str, dict[str, float]]]:
    """For each token of an answer its probabilities: of the tokens that go on from those before it."""
    parts = {each: tokens_of(each) for each in options}
    x = np.array([*options.values()])
    shares = dict(zip(options, np.exp(x - np.logaddexp.reduce(x)), strict=True))
    said, steps = parts.get(answer, tokens_of(answer)), []
    for place, token in enumerate(said):
        found = Counter[str]()
        for each, share in shares.items():
            if parts[each][:place] == said[:place]:
                found[parts[each][place] if len(parts[each]) > place else "\n"] += share
        total = sum(found.values())
        steps.append((token, {each: share / total * (1 - off) for each, share in found.items()} | {"": off}))
    return steps


def position(token: str, found: dict[str, float], top: int) -> dict[str, Any]:
    """One place of `logprobs.content`, with as many tokens as were asked for."""
    off, named = found.get("", 0.0), {each: share for each, share in found.items() if each}
    fillers = [each for each in FILLERS if each not in named] + [f"w{i}" for i in range(top)]
    spread = {each: max(off, 1e-9) / 2 ** (i + 1) for i, each in enumerate(fillers[:top])}
    likeliest = sorted((named | spread).items(), key=lambda pair: -pair[1])[:top]
    return entry(token, named.get(token, 1.0)) | {"top_logprobs": [entry(each, share) for each, share in likeliest]}


def entry(token: str, share: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(-99.0, math.log(max(share, 1e-42))), "bytes": list(token.encode())}


def echoed(prompt: str, options: dict[str, float], off: float, used: int) -> dict[str, Any]:
    """A prompt with the log-probability of each of its tokens, as /completions gives them."""
    start = prompt.rfind("\nAnswer:") + len("\nAnswer:") if "\nAnswer:" in prompt else prompt.rfind(" ")
    before, answer = tokens_of(prompt[:start]), prompt[start:].strip()
    steps = steps_of(answer, options, off)
    said = [(" " if i == 0 else "") + token for i, (token, _) in enumerate(steps)]
    values = [math.log(max(found.get(token, 0.0), 1e-42)) for token, found in steps]
    if prompt.endswith("\n"):
        said, values = [*said, "\n"], [*values, math.log(1 - off)]
    tokens = [*before, *said, "."]  # one more is always written
    offsets = [0, *np.cumsum([len(token) for token in tokens])[:-1].tolist()]
    logprobs = {
        "tokens": tokens, "token_logprobs": [None, *[-3.0] * (len(before) - 1), *values, -1.0],
        "top_logprobs": None, "text_offset": offsets,
    }  # fmt: skip
    choice = {"index": 0, "text": f"{prompt}.", "logprobs": logprobs, "finish_reason": "length"}
    usage = {"prompt_tokens": used, "completion_tokens": 1, "total_tokens": used + 1}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


async def send(
    writer: asyncio.StreamWriter, status: int, content: Any, headers: dict[str, str] | None = None, cut: bool = False
) -> None:
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} .", "Content-Type: application/json", f"Content-Length: {len(payload)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    head = "\r\n".join([*lines, "", ""]).encode()
    writer.write(head + (payload[: len(payload) // 2] if cut else payload))
    await writer.drain()
    if cut:
        raise ConnectionResetError


@contextmanager
def running(encoder: Encoder | Path, **ways: Any) -> Iterator[Server]:
    """Serve on a free port of this process, until the block ends."""
    server = Server(encoder if isinstance(encoder, Encoder) else Encoder.of(encoder), Ways(**ways))
    started = threading.Event()

    def run() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(server.serve(0, started.set))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield server
    finally:
        server.end()
        thread.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a teacher stage's folder, or an artifact")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--texts", type=Path, action="append", default=[], help="JSONL of rows to compute first")
    parser.add_argument("--faults", type=float, default=0.0, help="share of calls that go wrong")
    for name in ("model", "key", "top", "context", "latency", "bias", "off", "sharpness", "shift", "refusals", "hold",
                 "most", "seed"):  # fmt: skip
        value = getattr(Ways, name)
        parser.add_argument(f"--{name}", type=str if value is None else type(value), default=value)
    for name in ("logprobs", "completions", "echo", "several"):
        parser.add_argument(f"--no-{name}", dest=name, action="store_false")
    given = vars(parser.parse_args())
    folder, port, texts, faults = (given.pop(name) for name in ("folder", "port", "texts", "faults"))
    encoder = Encoder.of(folder)
    for file in texts:
        encoder.know([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    server = Server(encoder, Ways(**given, rates={name: faults / len(FAULTS) for name in FAULTS} if faults else {}))
    with suppress(KeyboardInterrupt):
        asyncio.run(server.serve(port, lambda: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
