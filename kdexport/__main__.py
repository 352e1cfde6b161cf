"""`kdexport` and `python -m kdexport`. Signals are heeded from the first line on, long before the imports are done."""

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
    if serving:  # the server will reload on it, when there is something to reload
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for fd in (0, 1, 2):  # a closed one's number would go to the next file or socket, and the log into that
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
        if any(thread.name.startswith(("load ", "consumer-")) for thread in threading.enumerate()):
            # A model that never ends: it would run on while the interpreter is taken down.
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
    except KeyboardInterrupt:  # outside of any command
        raise SystemExit(130) from None
    finally:
        _flush()


def _end(number: int, _: FrameType | None) -> None:
    """End at once: nothing has begun that would have to be finished."""
    os._exit(0 if number == signal.SIGTERM and sys.argv[1:2] == ["serve"] else 128 + number)


def _flush() -> None:
    """Drop text that stderr does not take: the interpreter would change the exit code because of it."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    main()
