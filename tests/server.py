"""A small real server for tests: our predictor behind the standard library's HTTP server, in three protocols."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kdexport


@contextmanager
def serving(
    artifact: Path, stall_at: float | None = None, stall_s: float = 0.0, chunked: bool = False
) -> Iterator[str]:
    """Serve an artifact on a free loopback port; one stall of everything, so many seconds after the first request."""
    model, lock = kdexport.load(artifact, threads=1), threading.Lock()
    stalls = {"due": None if stall_at is None else stall_at, "begun": None}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # One packet an answer: head and body apart would wait for each other (Nagle and delayed acknowledgement).
        wbufsize, disable_nagle_algorithm = -1, True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path not in ("/", "/predict", "/v2/models/m/infer"):
                return self.answer(404, {"error": "no such path"})
            texts = body["inputs"]
            if self.path.startswith("/v2"):
                texts = texts[0]["data"]
            texts = [texts] if isinstance(texts, str) else [t if isinstance(t, str) else t[0] for t in texts]
            with lock:
                stalls["begun"] = stalls["begun"] or time.monotonic()
                if stalls["due"] is not None and time.monotonic() - stalls["begun"] >= stalls["due"]:
                    stalls["due"] = None
                    time.sleep(stall_s)
                found = model.predict(texts)
            self.answer(200, [{"label": one.label, "score": one.score} for one in found])

        def answer(self, status: int, content: object) -> None:
            payload = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                payload = b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload)
            else:
                self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 256

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def forget_sessions() -> None:
    """Let huggingface_hub open new connections."""
    from huggingface_hub import utils

    (getattr(utils, "close_session", None) or utils.reset_sessions)()
