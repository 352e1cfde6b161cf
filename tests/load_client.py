"""A client that keeps count: what was sent whole, what came back whole."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections import Counter
from urllib.parse import urlsplit


def ask(url: str, content: object = None, **headers: str) -> tuple[int, dict, dict[str, str]]:
    """One request: GET without content, POST with it; the status, the JSON, the headers."""
    body = content if content is None or isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(url, data=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read() or b"null"), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null"), dict(error.headers)


class Load:
    """Connections that ask one after another until told to stop, or until the port is closed.

    `codes` counts answers by status, `lost` requests that were written on an open connection and got no whole answer.
    """

    def __init__(self, url: str, texts: list[str], connections: int = 16) -> None:
        self.codes: Counter[int] = Counter()
        self.answers: list[tuple[str, str]] = []
        self.lost: list[str] = []
        self.stopping = False
        at = urlsplit(url)
        self._host, self._port, self._texts = at.hostname, at.port, texts
        self._tasks = [asyncio.ensure_future(self._loop(i)) for i in range(connections)]

    async def stop(self) -> None:
        """Let what is under way end."""
        self.stopping = True
        await self.ended()

    async def ended(self) -> None:
        """Wait until the server has closed every connection, and its port."""
        await asyncio.gather(*self._tasks)

    async def _loop(self, i: int) -> None:
        while not self.stopping:
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port)
            except ConnectionError:
                return  # nobody listens any more: what was not sent is not lost
            try:
                while not self.stopping:
                    i += 1
                    if not await self._one(reader, writer, self._texts[i % len(self._texts)]):
                        break
            finally:
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> bool:
        body = json.dumps({"inputs": text, "parameters": {"top_k": 1}}).encode()
        try:
            writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
            )
            answer = json.loads(await reader.readexactly(length))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.lost.append(repr(error))
            return False
        code = int(head.split()[1])
        self.codes[code] += 1
        if code == 200:
            self.answers.append((text, answer[0][0]["label"]))
        return b"connection: close" not in head
