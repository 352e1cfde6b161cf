"""The settings of `kdexport serve`, with its defaults."""

from __future__ import annotations

import msgspec

# A photo of 12 megapixels has 6 MB, 8 in base64; a minute of sound at 16 kHz 2 MB, 2.6 in base64.
MAX_BODY = {"text": 2_000_000, "audio": 4_000_000, "image": 10_000_000}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a server; times in seconds, sizes in bytes, unless the name says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 8081
    grpc_port: int | None = None

    threads: int | None = None  # batches that run at once, each on one core; all allowed cores when None
    max_batch: int = 32  # rows at most; warm-up finds where more stop helping, which is less for larger models
    max_batch_tokens: int = 2048  # padded; a longer row runs alone
    max_wait_ms: float = 0.0  # how long a batch waits for more rows; on a CPU waiting gives nothing
    max_queue_ms: float = 100.0  # how long new work may have to wait; else 429
    max_writing_queue: float = 10.0  # the same of prompts: each takes longer than a batch

    max_body: int | None = None  # of a request, after decompression; `MAX_BODY` by what its model reads when None
    max_rows: int = 256  # of a request
    max_chars: int = 100_000  # of a text
    max_connections: int = 4096

    timeout: float = 30.0  # from the whole request to its answer; then 504
    read_timeout: float = 10.0  # for a request's headers, and again for its body
    keep_alive: float = 75.0
    drain_delay: float = 0.0  # after SIGTERM, how long requests are still accepted while `ready` says no
    grace: float = 30.0  # how long accepted requests may then take
    load_timeout: float = 300.0  # for reading, warming up and checking one model; then it is refused

    access_log: str = "all"  # or errors, or off
    api_keys: tuple[str, ...] = ()  # when there are any, requests must carry one
    allow_host: tuple[str, ...] = ()  # on loopback without keys: further names in `Host` and `Origin`; `*` for any
    tracing: bool = False

    def body_limit(self, reads: str) -> int:
        """Return `max_body`, or its default for a model that reads this."""
        return MAX_BODY[reads] if self.max_body is None else self.max_body
