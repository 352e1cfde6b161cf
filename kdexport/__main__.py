"""`kdexport` and `python -m kdexport`; signals are handled before the slow imports."""

import os
import signal
import sys
import threading
from types import FrameType


def main() -> None:
    """Run the command line."""
    serving = sys.argv[1:2] == ["serve"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _end)
    if serving:  # until the server can reload
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for fd in (0, 1, 2):  # else the next file or socket would get a closed one's number, and the log
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    from kdexport.cli import main as run

    if not serving:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if os.getpid() != 1:  # a container's first process gets no signal without a handler
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])
    try:
        run()
    except SystemExit as end:
        if any(thread.name.startswith(("load ", "consumer-")) for thread in threading.enumerate()):  # hung
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
    except KeyboardInterrupt:  # outside of any command
        raise SystemExit(130) from None
    finally:
        _flush()


def _end(number: int, _: FrameType | None) -> None:
    os._exit(0 if number == signal.SIGTERM and sys.argv[1:2] == ["serve"] else 128 + number)


def _flush() -> None:
    """Drop text that stderr refuses, which would change the interpreter's exit code."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    main()
