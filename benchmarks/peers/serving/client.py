"""A client that keeps account of every request: open or closed loops over plain sockets, in a process of its own.

wrk can neither send at a rate of its own nor tell how long the answers with 200 took, and h2load sends one body only.
`python client.py` reads a job (JSON) from stdin and prints what came of it. In an open loop (`rate` requests a second,
a Poisson process) latency counts from when a request was due. It stops after `seconds`, or on SIGTERM, and waits for
what is then still under way; a connection whose reconnecting is refused has ended.
"""

from __future__ import annotations

import json
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path

SETTLE_S = 1.0  # for the server to accept the connections of an open loop
DRAIN_S = 5.0  # for the answers to what is under way in the end


class Connection:
    """A socket, and the request that is under way on it."""

    def __init__(self, port: int, keep: bool) -> None:
        self.port, self.keep = port, keep
        self.due = self.sent = 0.0
        self.waiting = False
        self.answered = 0  # requests on this socket, so that it is known to have been accepted
        self.data = b""
        self.socket: socket.socket | None = None

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answered, self.data = 0, b""


class Client:
    """All connections of a job, and the account."""

    def __init__(self, job: dict) -> None:
        self.rate = job["rate"]
        head = f"POST {job['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        bodies = Path(job["bodies"]).read_bytes().splitlines()
        requests = {
            keep: [f"{head}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
            for keep, more in ((True, ""), (False, "Connection: close\r\n"))
        }
        self.requests, self.turn = requests, 0
        every = job.get("new_connection_every", 0)  # so many'th client makes a new connection for every request
        self.idle = deque(
            Connection(job["port"], keep=not every or number % every > 0) for number in range(job["connections"])
        )
        self.by_socket: dict[int, Connection] = {}
        self.epoll = select.epoll()
        self.random = random.Random(job["seed"])
        self.statuses: Counter[int] = Counter()
        self.ok_ms: list[float] = []  # of answers with 200, from when they were due
        self.ok_sent_ms: list[float] = []  # and from when they were sent
        self.late_ms: list[float] = []  # how long after it was due a request was sent
        self.lost = 0  # sent whole to a connection that was accepted, and not answered whole
        self.not_accepted = 0  # sent, but the server never took the connection from the kernel's queue
        self.refused = 0
        self.stopping = False
        self.lock = threading.Lock()

    # --- one request

    def connect(self, connection: Connection) -> bool:
        try:
            connection.connect()
        except OSError:
            self.refused += 1
            return False
        self.by_socket[connection.socket.fileno()] = connection
        self.epoll.register(connection.socket, select.EPOLLIN)
        return True

    def send(self, connection: Connection, due: float) -> None:
        """Send the next request; a connection that can't be made again is given up."""
        if connection.socket is None and not self.connect(connection):
            return
        request = self.requests[connection.keep][self.turn % len(self.requests[True])]
        self.turn += 1
        connection.due, connection.sent, connection.waiting = due, time.monotonic(), True
        try:
            connection.socket.sendall(request)
        except OSError:  # closed before it was sent whole: not lost, but to be sent again
            connection.waiting = False
            self.drop(connection)
            self.next(connection)

    def receive(self, connection: Connection) -> None:
        """Read what has come; account for the answer when it is whole, or for its loss."""
        try:
            part = connection.socket.recv(65536)
        except OSError:
            part = b""
        connection.data += part
        head, separator, body = connection.data.partition(b"\r\n\r\n")
        if separator and len(body) == _length(head):
            self.account(connection, head)
        elif not part:
            self.drop(connection)
            if connection.waiting:  # else it was idle, and is made again when it is its turn
                accepted = connection.answered or connection.data
                self.lost += bool(accepted)
                self.not_accepted += not accepted
                connection.waiting = False
                self.next(connection)

    def account(self, connection: Connection, head: bytes) -> None:
        status = int(head[9:12])
        self.statuses[status] += 1
        if status == 200:
            now = time.monotonic()
            self.ok_ms.append((now - connection.due) * 1e3)
            self.ok_sent_ms.append((now - connection.sent) * 1e3)
        connection.answered += 1
        connection.waiting, connection.data = False, b""
        if b"connection: close" in head.lower():
            self.drop(connection)
        self.next(connection)

    def next(self, connection: Connection) -> None:
        """In a closed loop ask again at once; in an open one wait for the next that is due."""
        if self.rate is None and not self.stopping:
            self.send(connection, time.monotonic())
        else:
            with self.lock:
                self.idle.append(connection)

    def drop(self, connection: Connection) -> None:
        del self.by_socket[connection.socket.fileno()]
        connection.socket.close()
        connection.socket = None

    # --- all of them

    def run(self, seconds: float) -> dict:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        if self.rate:  # its connections stand before the first request is due
            self.idle = deque(connection for connection in self.idle if self.connect(connection))
            time.sleep(SETTLE_S)
        began = time.monotonic()
        sender = threading.Thread(target=self._send_when_due, args=(began + seconds,))
        if self.rate is None:
            for _ in range(len(self.idle)):
                self.send(self.idle.popleft(), time.monotonic())
        else:
            sender.start()
        while not self.stopping and time.monotonic() < began + seconds and (self.by_socket or self.rate):
            self._receive_some()
        self.stopping = True
        ended = time.monotonic()
        if self.rate:
            sender.join()
        while any(one.waiting for one in self.by_socket.values()) and time.monotonic() < ended + DRAIN_S:
            self._receive_some()
        self.lost += sum(one.waiting for one in self.by_socket.values())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "statuses": dict(self.statuses),
            "ok_ms": self.ok_ms,
            "ok_sent_ms": self.ok_sent_ms,
            "late_ms": self.late_ms,
            "lost": self.lost,
            "not_accepted": self.not_accepted,
            "refused": self.refused,
            "seconds": ended - began,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }

    def _receive_some(self) -> None:
        for number, _ in self.epoll.poll(0.05):
            if connection := self.by_socket.get(number):
                self.receive(connection)

    def _send_when_due(self, ends: float) -> None:
        """The open loop's clock: a thread of its own, because a wait for answers ends on whole milliseconds."""
        due = time.monotonic()
        while due < ends:
            due += self.random.expovariate(self.rate)
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            while not self.idle:  # all connections are busy: the request waits, and its latency says so
                time.sleep(1e-3)
                if time.monotonic() > ends:
                    return
            with self.lock:
                connection = self.idle.popleft()
            self.late_ms.append((time.monotonic() - due) * 1e3)
            self.send(connection, due)


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise ValueError(f"an answer without a length: {head!r}")


def main() -> None:
    job = json.load(sys.stdin)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a socket is a file, and 1,024 is a common limit
    sys.setswitchinterval(1e-4)  # the sender must not wait for the receiver's turn to end
    print(json.dumps(Client(job).run(job["seconds"])))


if __name__ == "__main__":
    main()
