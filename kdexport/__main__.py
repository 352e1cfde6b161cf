"""`kdexport` and `python -m kdexport`; signals are handled before the slow imports."""

import errno
import os
import signal
import sys
import threading
from types import FrameType, ModuleType


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
    run = command_line().main
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


def command_line() -> ModuleType:
    """Import the commands, or end in one line where there are too many open files for that."""
    try:
        from kdexport import cli
    except (OSError, ImportError) as error:
        if os.strerror(errno.EMFILE) not in str(error):
            raise
        again = "Raise the limit (ulimit -n 1024) and run the same command again"
        os.write(2, f"error: too many files are open. {again}\n".encode())
        raise SystemExit(2) from None
    return cli


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
