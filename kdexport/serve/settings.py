"""The settings of `kdexport serve`, with its defaults."""

import msgspec

# A photo of 12 megapixels has 6 MB, 8 in base64; a minute of sound at 16 kHz 2 MB, 2.6 in base64.
MAX_BODY = {"text": 2_000_000, "audio": 4_000_000, "image": 10_000_000}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a server; times in seconds, sizes in bytes, unless named otherwise."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 8081
    grpc_port: int | None = None

    threads: int | None = None  # batches at once, each on one core; None: all allowed cores
    max_batch: int = 32  # most rows; warm-up finds where more stop helping
    max_batch_tokens: int = 2048  # padded; a longer row runs alone
    max_wait_ms: float = 0.0  # of a batch for more rows; useless on a CPU
    max_queue_ms: float = 100.0  # longest expected wait; then 429
    max_writing_queue: float = 10.0  # the same for prompts

    max_body: int | None = None  # decompressed; None: `MAX_BODY` by modality
    max_rows: int = 256  # of a request
    max_chars: int = 100_000  # of a text
    max_connections: int = 4096

    timeout: float = 30.0  # from the whole request to its answer; then 504
    read_timeout: float = 10.0  # for a request's headers, and again for its body
    keep_alive: float = 75.0
    drain_delay: float = 0.0  # between SIGTERM and closing the port
    grace: float = 30.0  # for accepted requests after that
    load_timeout: float = 300.0  # for reading, warming up and checking one model

    access_log: str = "all"  # or errors, or off
    api_keys: tuple[str, ...] = ()  # if any, requests need one
    allow_host: tuple[str, ...] = ()  # on loopback without keys: further names in `Host` and `Origin`; `*` for any
    tracing: bool = False

    def body_limit(self, reads: str) -> int:
        """Return `max_body`, or its default for a modality."""
        return MAX_BODY[reads] if self.max_body is None else self.max_body
